"""`export.json`: what an export is, how it was made, and how far it is from the model in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..run_folder import write_json
from ..runtimes.requirements import PACKAGES, known_versions

__all__ = [
    "COMPILED_FILE",
    "DTYPES",
    "FILES",
    "FORMATS",
    "ExportDescription",
    "TensorDescription",
    "check_format",
    "installed_versions",
    "parse_batch",
]

NAME = "export.json"
FORMATS = ("onnx", "openvino", "torch")
DTYPES = ("fp32", "fp16", "int8")
# File that a runtime opens
FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
COMPILED_FILE = "compiled.pt2"
FORMAT_VERSION = 1


def check_format(format: str, dtype: str) -> None:
    """Check that a format is known and has a data type.

    Raises:
        ValueError: It is not, or has not.
    """
    for name, value, allowed in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name}={value} must be one of {', '.join(allowed)}")
    if (format, dtype) == ("torch", "int8"):
        raise ValueError("dtype=int8 must be fp32 or fp16 with format=torch: use onnx or openvino for int8")


def parse_batch(batch: str | int) -> int | None:
    """The number of samples in a batch of the export; None for any number.

    Args:
        batch: `"dynamic"`, or a number from 1 on.

    Raises:
        ValueError: It is neither.
    """
    if batch == "dynamic":
        return None
    if isinstance(batch, bool) or not str(batch).isdecimal() or int(batch) < 1:
        raise ValueError(f"batch={batch} must be dynamic or a number of samples, at least 1")
    return int(batch)


def installed_versions(format: str, dtype: str) -> dict[str, str]:
    """Versions of the packages that make an export."""
    quantizer = ["nncf"] if dtype == "int8" else []
    return known_versions(["diffusers-gfprune", "torch", "diffusers", *PACKAGES[format], *quantizer])


@dataclass(frozen=True)
class TensorDescription:
    """An input of an export.

    Attributes:
        dtype: `"float32"` or `"int64"`.
        shape: Lengths of its axes; None for any number of samples.
    """

    dtype: str
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int | str | None, ...]) -> bool:
        """Whether a runtime's shape, with text or None for free axes, is this one."""
        known = tuple(length if isinstance(length, int) and length > 0 else None for length in shape)
        return known == self.shape


@dataclass(frozen=True)
class ExportDescription:
    """Content of `export.json`.

    Attributes:
        format: One of `FORMATS`.
        dtype: One of `DTYPES`: the precision inside. Inputs and outputs are float32.
        batch_size: Number of samples of every forward pass; None for any number.
        model_class: Class of the model, such as `UNet2DModel`.
        inputs: Inputs by name, in the order of the model: `sample`, `timestep`, and the conditioning.
        checks: For each file, batch size and timestep, the maximum error relative to the largest output in PyTorch.
        max_relative_error: The largest of them.
        similarity: For fp16 and int8, similarity of samples to those of the model in float32, and the sampler's settings.
        versions: Versions of the packages that made the export.
        compiled: Whether there is a `compiled.pt2`.
    """

    format: str
    dtype: str
    batch_size: int | None
    model_class: str
    inputs: Mapping[str, TensorDescription]
    checks: tuple[Mapping, ...] = ()
    max_relative_error: float | None = None
    similarity: Mapping | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    compiled: bool = False

    @property
    def file(self) -> str:
        """Name of the file that the runtime opens."""
        return FILES[self.format]

    def save(self, folder: Path) -> None:
        """Write `export.json`."""
        write_json(folder / NAME, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> ExportDescription:
        """Read and check the description of an export.

        Raises:
            ValueError: The folder is not an export, or its description is damaged or of a later version.
        """
        path = folder / NAME
        if not path.is_file():
            raise ValueError(f"folder={folder} is not an export: it has no {NAME}")
        try:
            content = json.loads(path.read_text())
            found = content.pop("format_version")
            if found != FORMAT_VERSION:
                raise ValueError(f"format_version={found} must be {FORMAT_VERSION}")
            content["inputs"] = {
                name: TensorDescription(entry["dtype"], tuple(entry["shape"])) for name, entry in content["inputs"].items()
            }
            description = cls(**{**content, "checks": tuple(content["checks"])})
            check_format(description.format, description.dtype)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"{path} does not describe an export: {error}") from error
        return description
