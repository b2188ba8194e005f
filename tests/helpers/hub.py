"""A finished run to push: the model of the published format, with the results and the report of a real run."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "tests/fixtures/published-format-1"
EXPECTED = ROOT / "tests/fixtures/published-format-1-output.safetensors"
CARD = ROOT / "model_cards/digits-gfpruned"


def make_run(folder: Path) -> Path:
    """A run folder as `prune_ddpm.py` leaves it."""
    shutil.copytree(PUBLISHED, folder)
    for path in CARD.iterdir():
        shutil.copy(path, folder)
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder by their relative paths, without what the Hub adds."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def digest(folder: Path) -> str:
    """One hash of everything in a folder."""
    return hashlib.sha256(repr(sorted(contents(folder).items())).encode()).hexdigest()


def samples(pipe) -> torch.Tensor:
    """Samples of a pipeline by DDIM from fixed noise."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images = pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    return torch.from_numpy(images)


def assert_published_output(unet, tolerance: float = 1e-5) -> None:
    """The model computes what it computed when it was published."""
    known = load_file(EXPECTED)
    with torch.no_grad():
        output = unet(known["sample"].to(unet.dtype), known["timestep"]).sample.float()
    torch.testing.assert_close(output, known["output"], rtol=tolerance, atol=tolerance)
