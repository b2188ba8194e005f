"""Packages that make and run exports, checked before any work."""

from __future__ import annotations

import importlib.util

__all__ = ["check_runtime"]

# Import names: what runs an export, and what else makes it. Each pair of format and package is in an extra of setup.cfg.
RUNTIMES = {"onnx": ("onnxruntime",), "openvino": ("openvino",), "torch": ()}
EXPORTERS = {"onnx": ("onnx", "onnxscript"), "openvino": (), "torch": ()}
QUANTIZER = "nncf"
SIMILARITY = "skimage"  # SSIM of samples


def check_runtime(format: str, dtype: str | None = None) -> None:
    """Check for the packages that run exports of a format, and those that make them.

    Args:
        format: One of `description.FORMATS`.
        dtype: The precision of an export to make, one of `description.DTYPES`; None: it is only run.

    Raises:
        ImportError: A package is not installed. The message contains the command that installs them.
    """
    needed = list(RUNTIMES[format])
    if dtype is not None:
        needed += EXPORTERS[format]
        needed += [QUANTIZER] if dtype == "int8" else []
        needed += [SIMILARITY] if dtype != "fp32" else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "training" if format == "torch" else format
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'diffusers-gfprune[{extra}]'")
