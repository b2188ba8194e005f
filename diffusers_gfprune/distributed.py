"""Collectives of `torch.distributed` for scoring with several processes. They do nothing in a single process.

Every rank holds its rows of each global batch, the same number on each rank. With R ranks and losses that are means over
rows, the loss and the gradient of a global batch are the means over ranks,

    L = 1/R sum_r L_r          g = 1/R sum_r g_r

The same holds for every quantity that is linear in them, such as a Hessian-vector product H v with the same v on all ranks.
A collective returns the same result on every rank, so that values computed from these means agree bit for bit.
`check_identical` verifies this.

All ranks must call these functions in the same order. They send numbers only, never pickled objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    *("check_identical", "fail_together", "gather_rows", "made_by_first_rank", "mean_over_ranks"),
    *("process_rank", "world_size"),
]

BUCKET_ELEMENTS = 2**24  # per collective: few calls, and a temporary copy of at most 64 MiB


def world_size() -> int:
    """Number of processes in the process group, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process in the process group, 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor on a device that the process group supports: NCCL does not send from the CPU."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    return tensor if tensor.device.type in devices else tensor.to(devices[0])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors by dtype and device into buckets of limited size; a larger tensor gets its own bucket."""
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
        tensors: Floating-point tensors, in the same order and with the same shapes on every rank. Half precision is summed
            in float32.
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
    """The rows of all ranks, in the order of ranks.

    Args:
        tensor: Tensor with shape `(rows, ...)` and any dtype; shape and dtype are the same on every rank.

    Returns:
        A tensor with shape `(ranks * rows, ...)`, on the device of `tensor`; `tensor` itself in a single process.
    """
    ranks = world_size()
    if ranks == 1:
        return tensor
    data = _sendable(tensor.detach().contiguous().reshape(-1).view(torch.uint8))  # every backend supports bytes
    parts = [torch.empty_like(data) for _ in range(ranks)]
    dist.all_gather(parts, data)
    return torch.cat(parts).to(tensor.device).view(tensor.dtype).view(-1, *tensor.shape[1:])


def made_by_first_rank(make: Callable[[], dict]) -> dict:
    """JSON values that rank 0 computes and broadcasts, for measurements that would differ between ranks.

    Args:
        make: Computes the values. It is called on rank 0 only.

    Returns:
        The values on every rank; floats are exact.

    Raises:
        ValueError: `make` failed on rank 0. On rank 0 itself the original error is raised.
    """
    if world_size() == 1:
        return make()
    text, error = b"", None
    if dist.get_rank() == 0:
        try:
            text = json.dumps(make()).encode()
        except Exception as caught:  # of any type: the other ranks wait for a result
            error = caught
    size = _sendable(torch.tensor([-1 if error is not None else len(text)]))
    dist.broadcast(size, 0)
    if error is not None:
        raise error
    if int(size) < 0:
        raise ValueError("rank 0 failed: see its error message")
    data = _sendable(torch.tensor(list(text) if text else [0] * int(size), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def fail_together(error: Exception | None) -> None:
    """Raise an error on every rank if there is one on any, so that no rank waits for one that failed.

    Args:
        error: The error of this rank, if any.

    Raises:
        Exception: The error of this rank.
        ValueError: Another rank failed.
    """
    failed = gather_rows(torch.tensor([error is not None]))
    if error is not None:
        raise error
    if failed.any():
        raise ValueError(f"rank {int(failed.nonzero()[0])} failed: see its error message")


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _fingerprint(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data.numpy().tobytes())


def check_identical(tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are bit-identical on all ranks, by comparing hashes.

    Args:
        tensors: Tensors by the name that is used in the error message (`"scores of conv_in"`).

    Raises:
        ValueError: A tensor differs. Raised on every rank, with the first such tensor and the first rank that differs from
            rank 0.
    """
    if world_size() == 1:
        return
    names = gather_rows(torch.tensor([_digest("\n".join(tensors).encode())]))
    if len(names.unique()) > 1:  # the next collective needs rows of the same shape
        raise ValueError("tensor names differ between ranks: every rank must prune the same model")
    fingerprints = gather_rows(torch.tensor([[_fingerprint(tensor) for tensor in tensors.values()]]))  # (ranks, tensors)
    for name, of_ranks in zip(tensors, fingerprints.t()):
        other = (of_ranks != of_ranks[0]).nonzero()
        if len(other) > 0:
            raise ValueError(
                f"{name} differ between rank 0 and rank {int(other[0])}: every rank must have the same weights, masks and "
                f"options, and its rows of the same calibration batches"
            )
