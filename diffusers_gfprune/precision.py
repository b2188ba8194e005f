"""What float32 layers compute in; float32 without TF32, bfloat16 or autocast inside; and PyTorch's usual modes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["check_float64", "float32_description", "ieee_float32", "own_forward", "usual_modes"]


def check_float64(device: torch.device) -> None:
    """Check that a device has float64, in which scores, least squares and metrics are summed.

    Raises:
        ValueError: It is an Apple GPU, which has none.
    """
    if device.type == "mps":
        raise ValueError(
            "device=mps has no float64, in which scores, least squares and metrics are summed: use the CPU, in scripts by "
            "accelerate launch --cpu"
        )


def _older_flags() -> tuple[str, bool] | None:
    """The older TF32 flags of torch; None if torch refuses to read them, as it does after the newer ones were set."""
    try:
        torch.backends.cuda.matmul.allow_tf32  # noqa: B018
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_older_flags(matmul: str, convolution: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of the older flags
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def _float32_precisions(device_type: str) -> dict[str, str]:
    """What float32 products and convolutions may be computed in: `ieee`, `tf32` or `bf16`."""
    backends, cuda = torch.backends, device_type == "cuda"
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        owners = (backends.cuda.matmul, backends.cudnn.conv) if cuda else (backends.mkldnn.matmul, backends.mkldnn.conv)
        matmul, convolution = (owner.fp32_precision for owner in owners)
    else:
        lower = {"high": "tf32", "medium": "tf32"} if cuda else {"medium": "bf16"}
        matmul = lower.get(torch.get_float32_matmul_precision(), "ieee")
        convolution = "tf32" if cuda and backends.cudnn.allow_tf32 else "ieee"
    return {"matmul": matmul, "convolution": convolution}


def float32_description(device: torch.device) -> dict[str, bool | str]:
    """What float32 layers of a device compute in, as JSON values for results and keys of caches.

    Returns:
        `tf32`: whether some may use TensorFloat-32, which is PyTorch's default for convolutions on GPUs that have it. And
        where it is not float32, `float32_matmul` and `float32_convolution`: `"tf32"` or `"bf16"`.
    """
    lower = {}
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        precisions = _float32_precisions(device.type)
        lower = {f"float32_{name}": value for name, value in precisions.items() if value not in ("ieee", "none")}
    return {"tf32": "tf32" in lower.values(), **lower}


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Context in which float32 matrix products and convolutions use float32, not TF32 or bfloat16."""
    backends = torch.backends
    owners = ()
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before, older = [owner.fp32_precision for owner in owners], _older_flags()
    try:
        if older is not None:  # both kinds of flags, since torch raises if they contradict each other
            _set_older_flags("highest", False)
        for owner in owners:
            owner.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            _set_older_flags(*older)
        for owner, precision in zip(owners, before):
            owner.fp32_precision = precision


@contextmanager
def usual_modes() -> Iterator[None]:
    """Context without inference mode, whose tensors take no gradients and count no changes, and without a default device.

    It changes nothing where neither is set. It can be used as a decorator.
    """
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Context in which the model uses its forward without the autocast wrapper of Accelerate."""
    wrapped = vars(model).get("forward")
    original = vars(model).get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
