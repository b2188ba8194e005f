"""Packages that make and run exports, checked before any work."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

__all__ = ["PACKAGES", "RUNTIMES", "check_runtime", "check_runtimes", "known_versions", "runtime_versions"]

# Runtimes in which models are timed, and the format of their exports
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
# Import names: what runs an export, and what else makes it. Each pair of format and package is in an extra of setup.cfg.
RUNNERS = {"onnx": ("onnxruntime",), "openvino": ("openvino",), "torch": ()}
EXPORTERS = {"onnx": ("onnx", "onnxscript"), "openvino": (), "torch": ()}
QUANTIZER = "nncf"
SIMILARITY = "skimage"  # SSIM of samples
# Distributions that make an export, by format
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch": ()}


def check_runtime(format: str, dtype: str | None = None) -> None:
    """Check for the packages that run exports of a format, and those that make them.

    Args:
        format: `"onnx"`, `"openvino"` or `"torch"`.
        dtype: The precision of an export to make: `"fp32"`, `"fp16"` or `"int8"`; None: it is only run.

    Raises:
        ImportError: A package is not installed. The message contains the command that installs them.
    """
    needed = list(RUNNERS[format])
    if dtype is not None:
        needed += EXPORTERS[format]
        needed += [QUANTIZER] if dtype == "int8" else []
        needed += [SIMILARITY] if dtype != "fp32" else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "training" if format == "torch" else format
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'diffusers-gfprune[{extra}]'")


def check_runtimes(names: Iterable[str]) -> None:
    """Check that models can be timed in backends, before long work.

    Args:
        names: Backends; those that are not in `RUNTIMES` need nothing.

    Raises:
        ImportError: As in `check_runtime`.
    """
    for name in names:
        if name in RUNTIMES:
            check_runtime(RUNTIMES[name], "fp32")


def known_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages by name, without those that are on the path but not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def runtime_versions(runtime: str) -> dict[str, str]:
    """Versions of the packages that determine what a runtime executes, one of `RUNTIMES`. It must be installed."""
    # Builds for other hardware are distributions of other names
    return {**known_versions(PACKAGES[RUNTIMES[runtime]]), runtime: importlib.import_module(runtime).__version__}
