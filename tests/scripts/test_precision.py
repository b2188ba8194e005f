"""Reduced precision, accumulation and memory formats give the same channels and weights, within bounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.resume import TEACHER, checkpoints_kept, last_checkpoint, run_here

# Twelve steps of pruning at batch 32, and one more: nothing but them chooses channels
LARGE = (
    *("--train_batch_size", 32, "--calibration_batches", 2),
    *("--max_train_steps", 13, "--soft_fraction", 0.46, "--hard_fraction", 0.92),
)
# Of 12 steps 6 prune
FEW = ("--max_train_steps", 12)


def final(folder: Path, *arguments: object):
    """The last checkpoint of a run, the only one that it saves."""
    with checkpoints_kept(folder / "kept") as kept:
        run_here(folder / "run", *arguments, "--checkpointing_steps", 100)
    return last_checkpoint(kept)


def without_dropout(folder: Path) -> tuple[object, ...]:
    """The digits teacher with nothing that depends on the order of draws, trained on noise.

    Against its own prediction a dense model has no loss at step 0, and Adam makes whole steps of rounding errors.
    """
    shutil.copytree(TEACHER, folder)
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.0}))
    return "--pretrained_model_name_or_path", folder, "--distillation_weight", 0


def kept_channels(checkpoint) -> torch.Tensor:
    tensors = checkpoint.tensors["pruner"]
    return torch.cat([tensors[name] for name in sorted(tensors) if name.startswith("kept/")])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    return final(tmp_path_factory.mktemp("plain"), *LARGE)


@pytest.mark.slow
def test_bf16_keeps_the_channels_that_fp32_keeps(plain, tmp_path: Path) -> None:
    """At half of the MACs of the digits teacher; scores are in full precision, weights have trained in bf16."""
    reduced = final(tmp_path, *LARGE, "--mixed_precision", "bf16")
    full, half = kept_channels(plain), kept_channels(reduced)
    assert 0.6 < full.float().mean() < 0.8  # half of the MACs, not of the channels
    agreement = (full == half).float().mean().item()
    print(f"bf16 and fp32 agree on {agreement:.1%} of {len(full)} channels")
    assert agreement >= 0.95
    different = [n for n, w in plain.tensors["model"].items() if w.shape != reduced.tensors["model"][n].shape]
    assert different == []


@pytest.mark.slow
def test_accumulation_and_channels_last_change_rounding_only(tmp_path: Path) -> None:
    """Two batches of 8 images make the step that one of 16 makes, whatever the order of memory."""
    common = (*without_dropout(tmp_path / "model"), "--calibration_batch_size", 16, *FEW)
    large = final(tmp_path / "large", *common, "--train_batch_size", 16)
    parts = ("--train_batch_size", 8, "--gradient_accumulation_steps", 2)
    for name, arguments in {"parts": parts, "last": ("--train_batch_size", 16, "--channels_last")}.items():
        other = final(tmp_path / name, *common, *arguments)
        assert torch.equal(kept_channels(large), kept_channels(other))
        for key, weight in large.tensors["model"].items():
            torch.testing.assert_close(other.tensors["model"][key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_training_leads_to_the_same_weights(tmp_path: Path) -> None:
    common = without_dropout(tmp_path / "model")
    graphs = ("--torch_compile", "reduce-overhead")
    plain, compiled = (final(tmp_path / f"run{len(more)}", *common, *more) for more in ((), graphs))
    assert torch.equal(kept_channels(plain), kept_channels(compiled))
    for name, weight in plain.tensors["model"].items():
        torch.testing.assert_close(compiled.tensors["model"][name], weight, rtol=1e-3, atol=1e-4)
