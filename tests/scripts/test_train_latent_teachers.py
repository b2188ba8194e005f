"""training/digits: the scripts that made the latent digits models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from latent_training import LatentTrainArguments, run
from learned_variance import variance_loss
from make_captions import CAPTIONED, captioned
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Normal, kl_divergence

from helpers.scripts import ROOT, assert_one_error, run_script

SHORT = ("--max_train_steps", "2", "--train_batch_size", "4")


def train(kind: str, autoencoder: Path, output_dir: Path, *more: str) -> subprocess.CompletedProcess:
    """A teacher's training, in this process."""
    words = ("--kind", kind, "--autoencoder", autoencoder, "--output_dir", output_dir)
    return run_script("training/digits/train_latent_teachers.py", *words, *SHORT, *more)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "teachers"), [("kl", ["dit", "text"]), ("vq", ["ldm"])])
def test_scripts_leave_pipelines(kind: str, teachers: list[str], tmp_path: Path) -> None:
    """Two steps of the autoencoder, as users start it, then of each teacher in its latents."""
    words = ["training/digits/train_autoencoder.py", "--kind", kind, "--output_dir", str(tmp_path / "vae"), *SHORT]
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    for teacher in teachers:
        done = train(teacher, tmp_path / "vae", tmp_path / teacher)
        assert done.returncode == 0, done.stderr
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / teacher)
        shipped = {path.relative_to(ROOT / "training/digits" / teacher) for path in files(ROOT / "training/digits" / teacher)}
        made = {path.relative_to(tmp_path / teacher) for path in files(tmp_path / teacher)}
        assert made == shipped - {Path("README.md")}
        assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
        assert not [
            path for path in made if path.suffix == ".json" and str(tmp_path) in (tmp_path / teacher / path).read_text()
        ]
    assert {path.name for path in tmp_path.iterdir()} == {"vae", *teachers}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_captions_are_made_again_as_they_are() -> None:
    for seed, split in enumerate(("train", "validation")):
        shipped = datasets.Dataset.from_parquet(str(CAPTIONED / "data" / f"{split}.parquet"))
        assert list(captioned(split, seed)["caption"]) == list(shipped["caption"])


# --- the loop ----------------------------------------------------------------------------------------------------------


def start(folder: Path, stop_at: int | None = None, **options: object) -> torch.Tensor:
    """Ten steps on a tiny module, which may be interrupted; the weights that were saved."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=generator)
        return (nn.functional.dropout(module(x), 0.5) - x[:, :2]).square().mean()

    args = LatentTrainArguments(output_dir=str(folder), max_train_steps=10, checkpointing_steps=3, **options)
    run(args, {"module": module}, loss_of, lambda path: save_file(module.state_dict(), path / "weights"), {"kind": "toy"})
    return load_file(folder / "weights")["weight"]


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "parts", stop_at=8)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.1"):
        start(tmp_path / "parts", resume_from_checkpoint="latest", learning_rate=0.1)
    with pytest.raises(ValueError, match="resume with --resume_from_checkpoint latest"):
        start(tmp_path / "parts")
    assert torch.equal(start(tmp_path / "parts", resume_from_checkpoint="latest"), whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--autoencoder", "absent"), "autoencoder=absent is not a folder that train_autoencoder.py has written"),
        (("--autoencoder", "training/digits/dit/vae", "--max_train_steps", "-1"), "max_train_steps=-1 must be at least 1"),
        (("--autoencoder", "training/digits/dit/vae", "--learning_rate", "0"), "learning_rate=0.0 must be greater than 0"),
    ],
)
def test_wrong_arguments_are_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    script = "training/digits/train_latent_teachers.py"
    assert_one_error(run_script(script, "--output_dir", tmp_path / "out", *words), message)
    assert list(tmp_path.iterdir()) == []


# --- learned variances -------------------------------------------------------------------------------------------------


def draws(timesteps: list[int]) -> tuple[SimpleNamespace, DDPMScheduler]:
    """A batch of one value per image."""
    scheduler, generator = DDPMScheduler(num_train_timesteps=100), torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, len(timesteps), 1, 1, 1), generator=generator)
    steps = torch.tensor(timesteps)
    noisy = scheduler.add_noise(clean, noise, steps)
    return SimpleNamespace(clean=clean, noise=noise, noisy=noisy, timesteps=steps), scheduler


@pytest.mark.parametrize("step", [1, 2, 50, 99])
@pytest.mark.parametrize("v", [-1.0, -0.2, 1.0])
def test_variance_loss_is_the_divergence_of_the_reverse_step(step: int, v: float) -> None:
    """Against PyTorch's divergence of two normal distributions, with the posterior of equation 7 of Ho et al."""
    batch, scheduler = draws([step])
    beta, alpha = scheduler.betas[step].double(), scheduler.alphas[step].double()
    abar, before = scheduler.alphas_cumprod[step].double(), scheduler.alphas_cumprod[step - 1].double()
    predicted = torch.full_like(batch.noise, 0.3)

    def mean(noise: torch.Tensor) -> torch.Tensor:
        clean = (batch.noisy - (1 - abar).sqrt() * noise) / abar.sqrt()
        return before.sqrt() * beta / (1 - abar) * clean + alpha.sqrt() * (1 - before) / (1 - abar) * batch.noisy

    smallest = (1 - before) / (1 - abar) * beta
    variance = beta ** ((v + 1) / 2) * smallest ** ((1 - v) / 2)
    wanted = kl_divergence(Normal(mean(batch.noise), smallest.sqrt()), Normal(mean(predicted), variance.sqrt()))
    found = variance_loss(torch.full_like(batch.noise, v), predicted, batch, scheduler.alphas_cumprod)
    assert found.item() == pytest.approx(wanted.mean().item() / torch.tensor(2.0).log().item(), rel=1e-3, abs=1e-6)


def test_variances_learn_and_means_do_not() -> None:
    batch, scheduler = draws([0, 3, 60])
    variance, noise = (torch.zeros_like(batch.noise, requires_grad=True) for _ in range(2))
    loss = variance_loss(variance, noise, batch, scheduler.alphas_cumprod)
    loss.backward()
    assert torch.isfinite(loss) and noise.grad is None and (variance.grad != 0).all()
