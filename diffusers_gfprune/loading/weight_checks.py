"""Checks of weight files: they must be safetensors with finite floating-point values, also in the dtype they are loaded in.

A file is read once, in pieces that fit into the processor's cache. This is faster than Diffusers' memory map, where every page
causes a fault when it is first touched. For values `x_i` of a tensor, `max_i |x_i|` is NaN or infinite if one of them is.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["check_weights"]

FLOATS = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
FUSED = r"\.to_(added_)?(qkv|kv)\.(weight|bias)$"  # projections of attention
BUFFER = 2**20  # bytes per read
PIECE = 2**15 - 1  # values per check: larger pieces would be divided among threads, which is slower


def check_weights(files: Sequence[str | os.PathLike], dtype: torch.dtype, quantized: bool = False) -> None:
    """Check that weights are floating point (unless quantized) and finite, both as stored and in the dtype of the model.

    Args:
        files: Weight files.
        dtype: Dtype in which the weights are loaded.
        quantized: Whether integer weights are allowed.

    Raises:
        ValueError: A file or a weight is invalid; the message has its name.
        OSError: A file is incomplete.
    """
    for path in files:
        if not str(path).endswith(".safetensors"):  # an index of safetensors can name any file
            raise ValueError(f"{path} is not a safetensors file: pruned models are loaded from safetensors only")
    for path in files:
        try:
            with safe_open(path, framework="pt") as whole:
                _check_file(Path(path), whole, dtype, quantized)
        except SafetensorError as error:
            raise OSError(f"{path} is not a complete safetensors file: {error}") from error


def _check_file(path: Path, whole, dtype: torch.dtype, quantized: bool) -> None:
    """`whole` is the same file, opened by safetensors, which has checked its header."""
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        header = {name: entry for name, entry in json.loads(file.read(size)).items() if name != "__metadata__"}
        places: dict[torch.dtype, dict[str, tuple[int, int]]] = {}  # start and end of the values in the file
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] in FLOATS:
                first, last = entry["data_offsets"]
                places.setdefault(FLOATS[entry["dtype"]], {})[name] = (8 + size + first, 8 + size + last)
            elif not quantized:
                raise ValueError(f"the weight {name} is {whole.get_tensor(name).dtype}, but must be floating point")
            if re.search(FUSED, name):
                _check_fused(name, whole, header)
        for stored, of_names in places.items():
            for first, last in _joined(of_names.values()):
                largest = largest_value(_pieces(file, first, last, stored))
                if not largest <= torch.finfo(dtype).max:  # also true for NaN: find the tensor
                    for name, (first, last) in of_names.items():
                        _check_largest(name, largest_value(_pieces(file, first, last, stored)), dtype)


def _joined(places: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Join adjacent tensors: checking each one separately takes several times as long."""
    joined: list[list[int]] = []
    for first, last in places:
        if joined and joined[-1][1] == first:
            joined[-1][1] = last
        else:
            joined.append([first, last])
    return joined


def _pieces(file: io.FileIO, first: int, last: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values between two offsets in a file, in pieces of up to `PIECE`; each piece is valid until the next one."""
    buffer = bytearray(min(BUFFER, last - first))
    for offset in range(first, last, BUFFER):
        size = min(BUFFER, last - offset)
        file.seek(offset)
        if file.readinto(memoryview(buffer)[:size]) != size:
            raise OSError(f"{file.name} ends too early")
        values = torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize)
        yield from (values.float() if dtype.itemsize == 1 else values).split(PIECE)


def largest_value(pieces: Iterable[Tensor]) -> float:
    """The largest absolute value, or NaN if there is one, in one pass (`isfinite` takes ten times as long)."""
    extremes = [extreme for piece in pieces for extreme in piece.aminmax()]
    return float(torch.stack(extremes).abs().max()) if extremes else 0.0


def _check_largest(name: str, largest: float, dtype: torch.dtype) -> None:
    if not math.isfinite(largest):
        raise ValueError(f"the weight {name} holds values that are not finite (NaN or infinity)")
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"the weight {name} holds a value of size {largest:g}, which is too large for {dtype}")


def _check_fused(name: str, whole, header: Mapping) -> None:
    """Diffusers loads to_q, to_k and to_v only, so a fused projection that was trained separately would be lost."""
    added, letters = re.search(FUSED, name).group(1, 2)
    form = ".add_{}_proj" if added else ".to_{}"  # add_q_proj etc. of a second stream
    sources = [re.sub(FUSED, rf"{form.format(letter)}.\3", name) for letter in letters]
    if header.keys() >= set(sources):
        parts = [whole.get_tensor(source) for source in sources]
        if not torch.equal(torch.cat(parts), whole.get_tensor(name)):
            parts = [form.format(letter).removeprefix(".") for letter in letters]
            listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
            raise ValueError(f"the weight {name} differs from {listed}: unfuse projections before training")
