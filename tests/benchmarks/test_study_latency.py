"""benchmarks/study_latency.py: models have the widths of their rows, and only new rows are measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import study_latency
import study_records
import torch
from diffusers import UNet2DModel
from study_records import DEFAULT, PLAIN, load, load_channels, title_of, widths_key, widths_of
from torch import nn

from diffusers_gfprune.metrics.model_size import count_macs
from helpers.scripts import ROOT, assert_one_error, run_script
from helpers.study import run_of

RIVAL = "one-shot-magnitude"


@pytest.fixture(scope="module")
def dense() -> UNet2DModel:
    return UNet2DModel.from_pretrained(ROOT / "training/digits/teacher/unet", use_safetensors=True).eval()


# --- widths -------------------------------------------------------------------------------------------------------------


def test_widths_are_recorded_or_those_of_the_run_with_the_same_size() -> None:
    first, second = run_of(DEFAULT, 0, 0.9), run_of(DEFAULT, 1, 0.9, width=40)
    found = {
        DEFAULT: [first, second],
        "scratch": [run_of("scratch", 1, 0.8)],
        "torch-pruning": [run_of("torch-pruning", 0, 0.8)],
    }
    scratch, peer = found["scratch"][0], found["torch-pruning"][0]
    scratch["widths"], peer["widths"], peer["peer"] = {}, {}, {"widths": {"conv_in": 32}}
    assert widths_of(first, found) == {"conv_in": 48} and widths_of(peer, found) == {"conv_in": 32}
    assert widths_of(scratch, found) == {"conv_in": 40}  # of its seed
    scratch["pruned"]["parameters"] = 8
    assert widths_of(scratch, found) is None
    assert widths_key({"a": 1, "b": 2}) == widths_key({"b": 2, "a": 1}) != widths_key({"a": 2, "b": 1})


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_the_earlier_build_has_rows_at_every_budget(dataset: str) -> None:
    """Single channels at 30, 50 and 70 % of the MACs removed, three seeds each, under both names."""
    found = load_channels(dataset)
    assert set(found) == {name + ending for name in study_records.CHANNELS for ending in study_records.BUDGETS}
    for name, runs in found.items():
        removed = {"-30": 0.3, "-70": 0.7}.get(name[-3:], 0.5)
        assert [run["seed"] for run in runs] == [0, 1, 2] and title_of(name) in study_records.CHANNELS.values()
        assert all(1 - run["pruned"]["macs"] / run["dense"]["macs"] == pytest.approx(removed, abs=0.001) for run in runs)


# --- models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups"), [(48, 8), (45, 5), (53, 1), (68, 4), (6, 6)])
def test_native_norms_have_the_most_equal_groups(channels: int, groups: int) -> None:
    assert study_latency.native_groups(channels, 8) == groups


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize(("ragged", "built"), [(False, "native norms"), (True, "ragged norms")])
def test_a_model_of_single_channels_has_the_widths_and_macs_of_its_run(ragged: bool, built: str, dense: UNet2DModel) -> None:
    run = load_channels("digits")["channels"][0]
    small, how = study_latency.model_of(run, run["widths"], dense, ragged)
    modules = dict(small.named_modules())
    assert how == built and count_macs(small) == run["pruned"]["macs"]
    widths = {name: getattr(modules[name], "out_channels", None) or modules[name].out_features for name in run["widths"]}
    assert widths == run["widths"] and widths["conv_in"] % 8
    plain = all(type(m) is nn.GroupNorm for m in modules.values() if isinstance(m, nn.GroupNorm))
    assert plain != ragged
    with torch.no_grad():
        assert small(torch.zeros(2, 1, 8, 8), 3).sample.isfinite().all()
    changed = copy.deepcopy(run)
    changed["pruned"]["macs"] += 1
    with pytest.raises(ValueError, match=r"two-phase, seed 0: the model has 14,\d+,\d+ MACs, not 14,"):
        study_latency.model_of(changed, run["widths"], dense)
    with pytest.raises(ValueError, match="not those of the dense model's channel groups"):
        study_latency.narrowed(dense, {"conv_in": 44})


def test_a_model_of_whole_norm_groups_is_the_model_itself(dense: UNet2DModel) -> None:
    """At widths of the ladders, norms keep their groups of the dense size."""
    widths = {group.name: group.num_channels for group in study_latency.trace_channel_groups(dense)}
    widths["down_blocks.1.resnets.0.conv1"] = 60  # six groups of ten
    small, how = study_latency.narrowed(dense, widths)
    norm = small.down_blocks[1].resnets[0].norm2
    assert (how, norm.num_groups, norm.num_channels) == ("units", 6, 60)


def test_torch_prunings_model_is_made_again(dense: UNet2DModel) -> None:
    run = load("digits")["earlier-torch-pruning"][0]
    small, how = study_latency.model_of(run, run["peer"]["widths"], dense)
    assert how == "torch-pruning" and small.conv_in.out_channels == run["peer"]["widths"]["conv_in"] == 32
    assert all(parameter.grad is None for model in (dense, small) for parameter in model.parameters())
    with pytest.raises(ValueError, match="no longer gives the widths"):
        study_latency.pruned_again(dense, {**run["peer"], "widths": {"conv_in": 31}})


# --- measurements ---------------------------------------------------------------------------------------------------------


def test_only_rows_that_are_new_or_changed_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with equal widths once; other rows keep what they had, and rows that are gone go."""
    timed: list[tuple[str, bool]] = []
    speeds = iter(range(1, 100))
    monkeypatch.setattr(study_latency, "BATCH_SIZES", {"digits": (16,)})
    monkeypatch.setattr(
        study_latency, "model_of", lambda run, widths, dense, ragged: (timed.append((run["setting"], ragged)), "units")
    )
    monkeypatch.setattr(
        study_latency,
        "time_model",
        lambda dense, small, n, rounds: {"speedup": next(speeds), "interval": [0, 9], "rounds": rounds},
    )
    results, output = tmp_path / "study", tmp_path / "latency.json"

    def keep(run: dict, folder: Path = results) -> Path:
        path = folder / "digits" / f"{run['setting']}-seed{run['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
        return path

    def measure(*words: str) -> tuple[list, dict]:
        timed.clear()
        study_latency.main(["--dataset", "digits", "--results", str(results), "--output", str(output), *words])
        rows = json.loads(output.read_text())["rows"]["digits"]
        speeds = {
            f"{name} {seed}": row["speed"]["16"]["speedup"] for name, seeds in rows.items() for seed, row in seeds.items()
        }
        return list(timed), speeds

    for seed in (0, 1):
        keep(run_of(DEFAULT, seed, 0.9, width=40))
        gone = keep(run_of(RIVAL, seed, 0.9, width=30 + seed))
    keep(run_of(PLAIN, 0, 0.9, width=40), tmp_path / "study_channels")
    first = {f"{RIVAL} 0": 2, f"{RIVAL} 1": 3, "default 0": 1, "default 1": 1}
    ragged = {"channels 0": 1, "channels-ragged 0": 4}  # equal widths, other norms
    everything = [(DEFAULT, False), (RIVAL, False), (RIVAL, False), (PLAIN, True)]
    assert measure() == (everything, {**first, **ragged})
    assert measure() == ([], {**first, **ragged})
    keep(run_of(DEFAULT, 1, 0.9, width=32))
    gone.unlink()
    del first[f"{RIVAL} 1"]
    assert measure("--only", RIVAL)[1] == {
        **{k: v for k, v in first.items() if k != "default 1"},
        **ragged,
    }  # known to be old
    first["default 1"] = 5
    assert measure("--only", "default") == ([(DEFAULT, False)], {**first, **ragged})
    first |= {"default 0": 6, "default 1": 7}
    assert measure("--only", "default", "--overwrite") == ([(DEFAULT, False)] * 2, {**first, **ragged})
    assert measure("--only", RIVAL, "--rounds", "61") == (
        [(RIVAL, False)],
        {**first, f"{RIVAL} 0": 8, **ragged},
    )  # more of them
    content = json.loads(output.read_text())
    output.write_text(json.dumps({**content, "machine": {"hardware": "other"}}))
    with pytest.raises(ValueError, match="is of another machine: measure all rows again with --overwrite"):
        measure("--only", "default", "--overwrite")


def test_a_model_is_timed_against_the_dense_one(dense: UNet2DModel) -> None:
    found = study_latency.time_model(dense, dense, 1, 6)
    assert set(found) == {"speedup", "interval", "dense_ms", "pruned_ms", "rounds"} and found["rounds"] == 6
    assert found["interval"][0] <= found["speedup"] <= found["interval"][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "5"], "rounds=5 must be at least 6"),
        (["--only", "short"], "only=short must be `default` or one of default"),
        (["--results", "nowhere"], "results=nowhere holds no results: run benchmarks/study.py first"),
    ],
)
def test_bad_arguments_are_refused(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        study_latency.main([*words, "--output", "latency.json"])
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    assert_one_error(run_script("benchmarks/study_latency.py", "--rounds", "5", cwd=tmp_path), "rounds=5 must be at least 6")
