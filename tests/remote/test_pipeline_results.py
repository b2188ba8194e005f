"""remote/pipeline_prune_ddpm.py: card, report, results and pictures of a run stay with the weights that were measured."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.remote.pipeline_prune_ddpm import COMPANIONS, EARLIER, EVAL_RESULTS, has_weights_of, weight_files
from helpers.architectures import build
from helpers.hub import contents, make_run

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with results for the Hub's collection, too."""
    folder = make_run(tmp_path / "run")
    (folder / EVAL_RESULTS).parent.mkdir()
    (folder / EVAL_RESULTS).write_text("[]")
    return folder


def companions(folder: Path) -> dict[str, bytes]:
    """Card, report, results and pictures of a folder."""
    return {name: data for name, data in contents(folder).items() if name in COMPANIONS}


def trained(pipe: PruneDDPMPipeline) -> PruneDDPMPipeline:
    """The pipeline, after a small change of one weight."""
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0] += 1e-3
    return pipe


def test_results_go_with_the_weights_that_were_measured(run: Path, tmp_path: Path) -> None:
    """A pipeline loaded from a run takes its card along, unless its UNet has been trained or replaced."""
    loaded = PruneDDPMPipeline.from_pretrained(run)
    loaded.save_pretrained(tmp_path / "same")
    PruneDDPMPipeline.from_pretrained(run, torch_dtype=torch.float16).save_pretrained(tmp_path / "half")
    compiled = PruneDDPMPipeline.from_pretrained(run)
    compiled.unet = torch.compile(compiled.unet)
    compiled.save_pretrained(tmp_path / "compiled")
    for name in ("same", "half", "compiled"):
        assert companions(tmp_path / name) == companions(run)
    trained(loaded).save_pretrained(tmp_path / "trained")
    loaded.register_modules(unet=build())
    loaded.save_pretrained(tmp_path / "replaced")
    for name in ("trained", "replaced"):
        assert not companions(tmp_path / name)


def test_results_of_replaced_weights_are_set_aside(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trained further and saved into the same folder; again, over the results of the time before."""
    measured, pipe = companions(run), PruneDDPMPipeline.from_pretrained(run)
    assert len(measured) == len(COMPANIONS)
    trained(pipe).save_pretrained(run)
    assert not companions(run) and companions(run / EARLIER) == measured
    (message,) = caplog.messages
    assert "has results of other weights" in message and message.endswith(f"{run / EARLIER}.") and "\n" not in message
    assert torch.equal(DDPMPipeline.from_pretrained(run).unet.conv_in.weight, pipe.unet.conv_in.weight)
    (run / "pruning_report.json").write_text("{}")
    trained(pipe).save_pretrained(str(run))
    assert companions(run / EARLIER) == {**measured, "pruning_report.json": b"{}"} and not companions(run)


def test_results_of_another_pipeline_are_set_aside(run: Path, tmp_path: Path) -> None:
    """Whether the one that is saved has results or not; also where the weights of the run are damaged."""
    measured, other = companions(run), make_run(tmp_path / "other")
    trained(PruneDDPMPipeline.from_pretrained(other)).save_pretrained(other)
    (other / "pruning_report.json").write_text("{}")  # measured now
    PruneDDPMPipeline.from_pretrained(other).save_pretrained(run)
    assert companions(run / EARLIER) == measured and companions(run) == {"pruning_report.json": b"{}"}
    (run / "unet" / WEIGHTS).write_bytes(b"damaged")
    PruneDDPMPipeline(unet=build(), scheduler=DDPMPipeline.from_pretrained(other).scheduler).save_pretrained(run)
    assert companions(run / EARLIER) == {**measured, "pruning_report.json": b"{}"} and not companions(run)


def test_results_stay_where_the_measured_weights_stay(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saved as they are, in shards, in another precision, or beside a variant; and where there are no weights yet."""
    measured, pipe = companions(run), PruneDDPMPipeline.from_pretrained(run)
    for options in ({}, {"max_shard_size": "20KB"}, {}):
        pipe.save_pretrained(run, **options)
    trained(copy.deepcopy(pipe)).save_pretrained(run, variant="ema")
    PruneDDPMPipeline(unet=copy.deepcopy(pipe.unet).half(), scheduler=pipe.scheduler).save_pretrained(run)
    for path in (run / "unet").glob("*.safetensors"):
        path.unlink()
    trained(pipe).save_pretrained(run)
    assert companions(run) == measured and not (run / EARLIER).exists() and not caplog.messages


def test_weights_are_those_that_the_index_names(run: Path, tmp_path: Path) -> None:
    """As Diffusers loads them: a single file beside an index is of an earlier time."""
    unet = GFPrunedUNet2DModel.from_pretrained(run / "unet")
    unet.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = weight_files(tmp_path / "shards")
    assert len(shards) > 1
    other = {name: values + 1 for name, values in load_file(run / "unet" / WEIGHTS).items()}
    save_file(other, tmp_path / "shards" / WEIGHTS, {"format": "pt"})
    assert weight_files(tmp_path / "shards") == shards and has_weights_of(unet, tmp_path / "shards")
    shards[0].unlink()
    assert not has_weights_of(unet, tmp_path / "shards")
    (tmp_path / "shards" / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(ValueError, match=f"{WEIGHTS}.index.json is not an index of weights"):
        weight_files(tmp_path / "shards")
    assert not has_weights_of(unet, tmp_path / "shards")


def test_weights_of_a_variant_count_if_there_are_no_others(run: Path) -> None:
    unet = GFPrunedUNet2DModel.from_pretrained(run / "unet")
    unet.save_pretrained(run / "unet", variant="ema", max_shard_size="20KB")
    assert weight_files(run / "unet") == [run / "unet" / WEIGHTS]
    (run / "unet" / WEIGHTS).unlink()
    assert len(weight_files(run / "unet")) > 1 and has_weights_of(unet, run / "unet")
