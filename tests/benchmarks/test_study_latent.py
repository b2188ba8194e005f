"""The study's rows on latent models: blocks by hand, models without blocks, Torch-Pruning, right digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import study
import study_baselines
import study_digits
import study_latency
import study_report
import torch
from blocks_by_hand import order_by_hand, remove_by_hand
from diffusers import ModelMixin, UNet2DModel
from study_settings import LATENT, SETTINGS, TEACHERS

from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.trained_pipelines import load_pipeline
from helpers.scripts import ROOT, assert_one_error, run_script
from helpers.study import run_of

FIRST = [LATENT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LATENT[1:])]
BY_HAND = {
    "digits-dit": [f"transformer_blocks.{index}" for index in (1, 3, 5, 2, 4)],
    # One pair in down stages, two in up stages, of which BK-SDM keeps the first and the last: the middle, then the inner stage
    "digits-ldm": [
        *("mid_block.attentions.0", "mid_block.resnets.0", "mid_block.resnets.1"),
        *("down_blocks.1.attentions.0", "down_blocks.1.resnets.0"),
        *("up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1"),
        *("up_blocks.1.resnets.0", "up_blocks.1.resnets.1"),
    ],
}


@pytest.fixture(scope="module")
def models() -> dict[str, ModelMixin]:
    return {name: load_pipeline(str(ROOT / TEACHERS[name])).denoiser.eval() for name in LATENT}


# --- blocks by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_HAND)
def test_blocks_go_in_the_order_of_their_sources(name: str, models: dict[str, ModelMixin]) -> None:
    assert order_by_hand(models[name]) == BY_HAND[name]


def test_the_second_of_three_pairs_goes_first_as_in_bk_sdm() -> None:
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    order = order_by_hand(unet)
    first = ["down_blocks.0.resnets.1", "up_blocks.1.resnets.1", "down_blocks.1.resnets.1", "up_blocks.0.resnets.1"]
    assert order[:4] == first  # up stages have three pairs, and keep the first and the third
    assert order[4:6] == ["mid_block.resnets.0", "mid_block.resnets.1"]


@pytest.mark.parametrize("name", FIRST)
def test_blocks_by_hand_are_those_nearest_to_the_budget(name: str, models: dict[str, ModelMixin]) -> None:
    dense, order = models[name], order_by_hand(models[name])
    small, removed = remove_by_hand(dense, 0.5)
    assert removed == order[: len(removed)] and sorted(removed) == small.config.removed_blocks
    missed = {}
    for count in (len(removed) - 1, len(removed), len(removed) + 1):
        other, _ = study_latency.narrowed(dense, dict.fromkeys(order[:count], 0))
        missed[count] = abs(1 - count_macs(other) / count_macs(dense) - 0.5)
    assert min(missed, key=missed.get) == len(removed)


def test_a_model_is_built_again_with_its_widths_and_without_its_blocks(models: dict[str, ModelMixin]) -> None:
    dense = models["digits-dit"]
    block, inside, outside = "transformer_blocks.2", "transformer_blocks.2.ff.net.0.proj", "transformer_blocks.1.ff.net.0.proj"
    groups = {group.name: group for group in study_latency.trace_channel_groups(dense)}
    widths = {name: group.num_channels for name, group in groups.items()}
    small, how = study_latency.narrowed(dense, {**widths, inside: 0, outside: widths[outside] // 2, block: 0})
    assert how == "units" and small.config.removed_blocks == [block]
    assert small.transformer_blocks[1].ff.net[0].proj.out_features == widths[outside] // 2
    with pytest.raises(ValueError, match="channel groups and blocks"):
        study_latency.narrowed(dense, {"transformer_blocks.9": 0})


# --- Torch-Pruning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_torch_pruning_prunes_latent_models(name: str, models: dict[str, ModelMixin]) -> None:
    dense = models[name]
    for parameter in dense.parameters():
        parameter.grad = torch.randn_like(parameter)
    example = study_baselines.example_of(dense)
    small = study_baselines.prune_once(dense, example, 0.5)
    dense.zero_grad()
    with torch.no_grad():
        assert small(**example).sample.shape == dense(**example).sample.shape
    assert count_macs(small) < 0.75 * count_macs(dense)
    if name == "digits-dit":
        widths = study_baselines.layer_widths(small)
        assert widths["pos_embed.proj"] == widths["transformer_blocks.0.ff.net.2"] == dense.pos_embed.proj.out_channels


# --- digits -------------------------------------------------------------------------------------------------------------


def test_figures_of_digits_are_kept_beside_those_of_the_run(tmp_path: Path) -> None:
    run, latent = run_of("depth-only", 0, 0.8), {"dense": {"fd_digits": 0.1}, "pruned": {"fd_digits": 0.3}}
    for which, share in (("dense", 0.95), ("pruned", 0.9)):
        run[which] |= {**latent[which], "right_digits": share}
    run["evaluation"]["distances"]["fd_digits"] = {"title": "FD-digits"}
    table = study_report.main_table({"depth-only": [run]}, "digits-dit", ["depth-only"])
    head, _, dense, row = table.splitlines()
    assert "FD-digits" in head and head.endswith("right digits |")
    assert "0.1000" in dense and dense.endswith("0.9500 |") and "0.3000" in row and row.endswith("0.9000 |")


@pytest.mark.slow
def test_samples_of_the_dense_model_are_right() -> None:
    figures = study_digits.digit_figures(ROOT / TEACHERS["digits-dit"], num_images=100)
    assert figures["right_digits"] > 0.8 and 0 < figures["fd_digits"] < 1


def test_another_pipeline_is_one_line(tmp_path: Path) -> None:
    words = [str(ROOT / TEACHERS["digits"]), "--output", str(tmp_path / "digits.json")]
    run = run_script("benchmarks/study_digits.py", *words, environment=study_digits.script_environment())
    assert_one_error(run, "DDPMPipeline, not a latent pipeline")


def test_rows_of_latent_models_have_no_curves() -> None:
    words = study.arguments_of(SETTINGS["two-phase"], "digits-dit", 0, [])
    assert "--eval_steps" not in words and "digits_dit" in words
