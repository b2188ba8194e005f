"""Pictures and figures of two drawings: grids, their difference, times, similarity."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..metrics.fidelity import SSIM_WINDOW, psnr_to_reference, ssim_to_reference
from ..metrics.sampling import to_uint8
from ..reports.plots import sample_grid
from .drawing import Drawing
from .models import Models, ShownModel

__all__ = ["GAIN", "compare", "describe_models", "difference", "picture"]

# Factor of the difference picture
GAIN = 4
# Width to which small images are enlarged, in pixels
ENLARGED = 128


def picture(images: Tensor):
    """A PIL picture with all images of a drawing, as nearly square as can be.

    Args:
        images: Images in [0, 1] with shape `(n, channels, height, width)`.
    """
    columns = next(columns for columns in range(1, len(images) + 1) if columns**2 >= len(images))
    return to_pil_image(to_uint8(sample_grid(list(images), columns, ENLARGED)))  # of floats it would round down


def difference(images: Tensor, reference: Tensor) -> Tensor:
    """Absolute differences, times `GAIN`, limited to 1; zero where images are equal."""
    return ((images - reference).abs() * GAIN).clamp(max=1)


def compare(drawn: Drawing, reference: Drawing | None) -> str:
    """Times and similarity, in Markdown."""
    if reference is None:
        lines = [f"**{drawn.seconds:.2f} s**"]
    else:
        lines = [f"dense **{reference.seconds:.2f} s**, pruned **{drawn.seconds:.2f} s**"]
        psnr = psnr_to_reference(drawn.images, reference.images)
        similar = ["equal images"] if psnr is None else [f"PSNR {psnr:.1f} dB"]
        if psnr is not None and min(drawn.images.shape[-2:]) >= SSIM_WINDOW:
            similar.insert(0, f"SSIM {ssim_to_reference(drawn.images, reference.images):.3f}")
        lines.append(", ".join(similar))
    return "  \n".join([*lines, *drawn.changes])


def describe_models(models: Models) -> str:
    """Names and sizes of the models, in Markdown."""

    def row(what: str, model: ShownModel) -> str:
        return f"| {what} | {model.name} | {model.parameters / 1e6:,.2f}M | {model.macs / 1e6:,.1f}M |"

    rows = ["| | model | parameters | MACs |", "|---|---|---:|---:|"]
    if models.reference is not None:
        rows.append(row("dense", models.reference))
    rows.append(row("pruned", models.pruned))
    if models.reference is not None:
        removed = [1 - getattr(models.pruned, name) / getattr(models.reference, name) for name in ("parameters", "macs")]
        rows.append(f"| removed | | {removed[0]:.1%} | {removed[1]:.1%} |")
    more = [text for text in (models.speed, models.notice) if text is not None]
    return "\n".join([*rows, *(line for text in more for line in ("", text))])
