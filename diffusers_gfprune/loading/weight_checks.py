"""What files of weights may hold: safetensors, floating point, finite, also in the dtype that they are loaded as.

A file is read once, in pieces that stay in the processor's cache: while Diffusers maps it, every page that is touched costs
a fault, which takes longer than to read all of it. For `x_i` of a tensor, `max_i |x_i|` is NaN or infinite if one of them is.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["check_weights", "largest_value"]

FLOATS = {
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
BUFFER = 2**20  # bytes that are read at once
PIECE = 2**15 - 1  # values that are looked at at once: more would be shared by threads, which costs more than it saves


def check_weights(files: Sequence[str | os.PathLike], dtype: torch.dtype, quantized: bool = False) -> None:
    """Refuse weights that are not floating point (unless they are quantized), or not finite, as they are or in a dtype.

    Args:
        files: Of the weights.
        dtype: What they become.
        quantized: Whether they may be whole numbers, which mean something else.

    Raises:
        ValueError: A file or a weight, by name, and what is wrong with it.
        OSError: A file that is not whole.
    """
    for path in files:
        if not str(path).endswith(".safetensors"):  # an index of safetensors can name any file
            raise ValueError(f"{path} is no safetensors file: pruned models are loaded from safetensors only")
    for path in files:
        try:
            with safe_open(path, framework="pt") as whole:
                _check_file(Path(path), whole, dtype, quantized)
        except SafetensorError as error:
            raise OSError(f"{path} is no whole safetensors file: {error}") from error


def _check_file(path: Path, whole, dtype: torch.dtype, quantized: bool) -> None:
    """`whole` is the same file, opened by safetensors, which has checked what its header says."""
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        header = {name: entry for name, entry in json.loads(file.read(size)).items() if name != "__metadata__"}
        places: dict[torch.dtype, dict[str, tuple[int, int]]] = {}  # where in the file values begin and end
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] in FLOATS:
                first, last = entry["data_offsets"]
                places.setdefault(FLOATS[entry["dtype"]], {})[name] = (8 + size + first, 8 + size + last)
            elif not quantized:
                raise ValueError(f"the weight {name} is {whole.get_tensor(name).dtype}, and must be floating point")
            if name.endswith((".to_qkv.weight", ".to_qkv.bias")):
                _check_fused(name, whole, header)
        for stored, of_names in places.items():
            for first, last in _joined(of_names.values()):
                largest = largest_value(_pieces(file, first, last, stored))
                if not largest <= torch.finfo(dtype).max:  # NaN is not, either: one of these, by name
                    for name, (first, last) in of_names.items():
                        _check_largest(name, largest_value(_pieces(file, first, last, stored)), dtype)


def _joined(places: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Neighbours as one: to look at each tensor for itself takes several times as long."""
    found: list[list[int]] = []
    for first, last in places:
        if found and found[-1][1] == first:
            found[-1][1] = last
        else:
            found.append([first, last])
    return found


def _pieces(file: io.FileIO, first: int, last: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values between two places in a file, in pieces of up to `PIECE`; each is gone when the next is asked for."""
    buffer = bytearray(min(BUFFER, last - first))
    for offset in range(first, last, BUFFER):
        size = min(BUFFER, last - offset)
        file.seek(offset)
        if file.readinto(memoryview(buffer)[:size]) != size:
            raise OSError(f"{file.name} ends too early")
        values = torch.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize)
        yield from (values.float() if dtype.itemsize == 1 else values).split(PIECE)


def largest_value(pieces: Iterable[Tensor]) -> float:
    """The largest absolute value, NaN where there is one, in one pass (`isfinite` takes ten times as long)."""
    extremes = [extreme for piece in pieces for extreme in piece.aminmax()]
    return float(torch.stack(extremes).abs().max()) if extremes else 0.0


def _check_largest(name: str, largest: float, dtype: torch.dtype) -> None:
    if not math.isfinite(largest):
        raise ValueError(f"the weight {name} holds values that are not finite (NaN or infinity)")
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"the weight {name} holds a value of size {largest:g}, which {dtype} does not have")


def _check_fused(name: str, whole, header: Mapping) -> None:
    """What Diffusers loads are to_q, to_k and to_v: a fused projection that was trained alone would be lost."""
    sources = [name.replace(".to_qkv.", f".to_{letter}.") for letter in "qkv"]
    if header.keys() >= set(sources):
        parts = [whole.get_tensor(source) for source in sources]
        if not torch.equal(torch.cat(parts), whole.get_tensor(name)):
            raise ValueError(f"the weight {name} is not that of to_q, to_k and to_v: unfuse projections before training")
