"""What scoring over several processes needs of `torch.distributed`; nothing of it does anything in one process.

Every rank holds its rows of each global batch, the same number as every other. With R ranks and losses that are means over
rows, the loss and the gradient of a global batch are the means over ranks,

    L = 1/R sum_r L_r          g = 1/R sum_r g_r

and so is every quantity that is linear in them, a Hessian-vector product H v with one v among it. What is computed from
these means is the same on every rank, bit for bit: a collective gives all ranks one result. `check_identical` makes sure.

All ranks must call these functions in the same order. They send numbers only, never pickled objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_identical", "gather_rows", "made_by_first_rank", "mean_over_ranks", "world_size"]

BUCKET_ELEMENTS = 2**24  # of one collective: few enough calls, and a copy of 64 MiB at most beside the tensors


def world_size() -> int:
    """Number of processes that work together, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor on a device that the process group sends from: NCCL takes none from the CPU."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    return tensor if tensor.device.type in devices else tensor.to(devices[0])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, together no larger than a bucket (or alone)."""
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key, count = (tensor.dtype, tensor.device), tensor.numel()
        bucket, filled = filling.get(key, ([], 0))
        if bucket and filled + count > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filling[key] = bucket, filled + count
    yield from (bucket for bucket, _ in filling.values())


@torch.no_grad()
def mean_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over all ranks, in place.

    Args:
        tensors: Floating point, in the same order and of the same shapes on every rank. Half precision is summed in float32.
    """
    ranks = world_size()
    if ranks == 1:
        return
    for bucket in _buckets(tensors):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = _sendable(torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in bucket]))
        dist.all_reduce(flat)
        flat /= ranks
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other.

    Args:
        tensor: With shape `(rows, ...)` and any dtype; shape and dtype are the same on every rank.

    Returns:
        With shape `(ranks * rows, ...)`, on the device of `tensor`; `tensor` itself in one process.
    """
    ranks = world_size()
    if ranks == 1:
        return tensor
    data = _sendable(tensor.detach().contiguous().reshape(-1).view(torch.uint8))  # bytes, which every backend sends
    parts = [torch.empty_like(data) for _ in range(ranks)]
    dist.all_gather(parts, data)
    return torch.cat(parts).to(tensor.device).view(tensor.dtype).view(-1, *tensor.shape[1:])


def made_by_first_rank(make: Callable[[], dict]) -> dict:
    """JSON values that rank 0 makes and every rank gets: what is measured is not the same twice.

    Args:
        make: Makes them; it is called on rank 0 alone.

    Returns:
        The values; floats keep every bit.

    Raises:
        ValueError: Rank 0 could not make them. There, its own error is raised.
    """
    if world_size() == 1:
        return make()
    text, error = b"", None
    if dist.get_rank() == 0:
        try:
            text = json.dumps(make()).encode()
        except Exception as caught:  # of any type: the other ranks wait, and have to be told
            error = caught
    size = _sendable(torch.tensor([-1 if error is not None else len(text)]))
    dist.broadcast(size, 0)
    if error is not None:
        raise error
    if int(size) < 0:
        raise ValueError("rank 0 has failed, with the error that it says: there is nothing to go on with")
    data = _sendable(torch.tensor(list(text) if text else [0] * int(size), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _fingerprint(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data.numpy().tobytes())


def check_identical(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not the same on every rank, bit for bit. Fingerprints are compared, not values.

    Args:
        tensors: By what the error calls them (`"scores of conv_in"`).

    Raises:
        ValueError: On every rank, naming the first tensor that differs and the first rank that differs from rank 0.
    """
    if world_size() == 1:
        return
    names = gather_rows(torch.tensor([_digest("\n".join(tensors).encode())]))
    if len(names.unique()) > 1:  # the rows of the next collective would not fit together
        raise ValueError("the processes compare tensors of different names: every rank must prune the same model")
    found = gather_rows(torch.tensor([[_fingerprint(tensor) for tensor in tensors.values()]]))  # (ranks, tensors)
    for name, fingerprints in zip(tensors, found.t()):
        other = (fingerprints != fingerprints[0]).nonzero()
        if len(other) > 0:
            raise ValueError(
                f"{name} differ between rank 0 and rank {int(other[0])}: every rank must have the same weights, masks and "
                f"options, and its own rows of the same calibration batches"
            )
