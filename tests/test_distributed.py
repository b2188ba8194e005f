"""Two processes with B rows each score and prune as one with 2B rows, and refuse differing inputs.

All comparisons use the files of one run of `distributed_worker.py` in two processes and one in a single process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusers_gfprune import distributed
from diffusers_gfprune.distributed import check_identical, gather_rows, mean_over_ranks, world_size
from helpers.architectures import build
from helpers.distributed_worker import CRITERIA, main, message
from helpers.scripts import ROOT

WORKER = ROOT / "tests/helpers/distributed_worker.py"


@dataclass(repr=False)
class Result:
    """What one process wrote."""

    tensors: dict[str, Tensor]
    values: dict

    def scores(self, name: str) -> dict[str, Tensor]:
        """By group name."""
        prefix = f"scores/{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result, Result]:
    """A single process, and the two ranks of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    commands = [[sys.executable, WORKER, str(rank), "2", two] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    main(0, 1, one)  # meanwhile
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    found = [
        Result(load_file(folder / f"rank{rank}.safetensors"), json.loads((folder / f"rank{rank}.json").read_text()))
        for folder, rank in ((one, 0), (two, 0), (two, 1))
    ]
    assert [result.values["world_size"] for result in found] == [1, 2, 2]
    return tuple(found)


# --- scores and masks --------------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(3)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_those_of_the_global_batches(runs: tuple[Result, Result, Result], criterion: str) -> None:
    """Means of ranks are sums in another order; both ranks have the same, bit for bit."""
    single, first, second = (result.scores(criterion) for result in runs)
    assert len(single) > 10
    for name, expected in single.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert torch.equal(first[name], second[name])
        assert expected.unique().numel() > 1


def test_joint_changes_are_those_of_the_global_batches(runs: tuple[Result, Result, Result]) -> None:
    """Row by row, of the images of all ranks in the order of one process; the same on both, bit for bit."""
    single, *ranks = ({name: v for name, v in run.tensors.items() if name.startswith("changes/")} for run in runs)
    assert len(single) > 10
    for name, expected in single.items():
        assert len(expected) > 1 and expected.abs().max() > 0
        for changes in ranks:
            torch.testing.assert_close(changes[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert torch.equal(ranks[0][name], ranks[1][name])


def test_batches_matter(runs: tuple[Result, Result, Result]) -> None:
    """The comparison above could not tell scores of one batch from those of another if these were alike."""
    mean, each = (runs[0].scores(name)["conv_in"] for name in ("exact-mean", "exact-each"))
    assert not torch.allclose(mean, each, rtol=1e-2)


def test_a_pruning_run_is_that_of_one_process(runs: tuple[Result, Result, Result]) -> None:
    """Trained by DDP between rankings: the same masks and history, the same weights to float tolerance."""
    trained = [{key: value for key, value in result.tensors.items() if key.startswith("trained/")} for result in runs]
    assert [update["step"] for update in runs[0].values["history"]] == [0, 2, 6]
    assert all(result.values["history"] == runs[0].values["history"] for result in runs)
    masks = [key for key in trained[0] if "channel_masks" in key]
    assert masks and all(trained[0][key].unique().tolist() == [0.0, 1.0] for key in masks)
    for key, expected in trained[0].items():
        torch.testing.assert_close(trained[1][key], expected, rtol=1e-3, atol=0 if key in masks else 1e-4)
        assert torch.equal(trained[1][key], trained[2][key]), key


def test_recovery_is_that_of_one_process(runs: tuple[Result, Result, Result]) -> None:
    """Sums of all ranks; both have the same weights, bit for bit."""
    single, *ranks = ({k: v for k, v in run.tensors.items() if k.startswith("recovered/")} for run in runs)
    dense = {f"recovered/{name}": weight for name, weight in build("fine-units").named_parameters()}
    assert sum(not torch.equal(single[name], weight) for name, weight in dense.items()) > 20
    for name, expected in single.items():
        change = float((expected - dense[name]).abs().max())
        torch.testing.assert_close(ranks[0][name], expected, rtol=0, atol=1e-3 * change + 1e-6)
        assert torch.equal(ranks[0][name], ranks[1][name]), name


def test_images_of_recovery_are_those_of_one_process(runs: tuple[Result, Result, Result]) -> None:
    """Each rank has its rows of the same noise."""
    assert len({result.values["recovery batches"] for result in runs}) == 1
    for index in range(3):  # images, noise, timesteps
        single, first, second = (result.tensors[f"repeated/{index}"] for result in runs)
        assert torch.equal(torch.cat([first, second]), single)


@pytest.mark.slow
def test_comparison_with_magnitude_is_that_of_one_process(runs: tuple[Result, Result, Result]) -> None:
    """Losses are means over ranks."""
    single, first, second = (result.values["comparison"] for result in runs)
    assert first == second
    assert first == pytest.approx(single, rel=1e-3)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("weights", "values of .*weight differ between rank 0 and rank 1: every rank must have the same weights"),
        ("weights, magnitude", "scores of .* differ between rank 0 and rank 1: every rank must have the same weights"),
        ("averaged scores", "averaged scores of conv_in differ between rank 0 and rank 1"),
        ("masks", "masks of conv_in differ between rank 0 and rank 1"),
        ("seeds", "scores of conv_in differ between rank 0 and rank 1"),
        ("NaN images, gradient-flow", "scores of conv_in are not finite"),
        ("NaN images, taylor", "scores of conv_in are not finite"),
        ("NaN images, diff-pruning", "scores of conv_in are not finite"),
        ("NaN weights", "scores of .* are not finite"),
        ("rows", "shapes of calibration batches differ between rank 0 and rank 1"),
        ("batches", "shapes of calibration batches differ between rank 0 and rank 1"),
        ("no batches", "shapes of calibration batches differ between rank 0 and rank 1"),
        ("names", "tensor names differ between ranks"),
        ("types", "values of a differ between rank 0 and rank 1"),
        ("shapes", "values of a differ between rank 0 and rank 1"),
        ("the same", "nothing was refused"),
    ],
)
def test_ranks_that_differ_are_refused_on_both(runs: tuple[Result, Result, Result], case: str, expected: str) -> None:
    """With the same message; neither waits for the other."""
    _, first, second = (result.values["refusals"] for result in runs)
    assert re.search(expected, first[case])
    assert second[case] == first[case]


def test_what_the_first_rank_measures_is_everybodys(runs: tuple[Result, Result, Result]) -> None:
    """Bit for bit; where it fails, the others do not wait for ever."""
    made = {"rank": 0, "third": 1 / 3, "text": "3 µs"}
    assert all(result.values["made by first rank"] == made for result in runs)
    single, first, second = (result.values["failed on first rank"] for result in runs)
    assert single == first and "none of it" in first
    assert "rank 0 failed" in second


def test_ranks_fail_together(runs: tuple[Result, Result, Result]) -> None:
    assert all(result.values["failed on no rank"] == "nothing was refused" for result in runs)
    single, first, second = (result.values["failed on last rank"] for result in runs)
    assert single == second == "of the last rank" and first == "rank 1 failed: see its error message"


def test_the_group_that_differs_is_named(runs: tuple[Result, Result, Result]) -> None:
    """A weight into the stream of the middle block belongs to the groups of its two ends."""
    said = runs[1].values["refusals"]["weights, magnitude"]
    assert "down_blocks.0.downsamplers.0.conv" in said or "mid_block.resnets.0.conv1" in said


# --- functions ---------------------------------------------------------------------------------------------------------


def test_means_over_two_ranks(runs: tuple[Result, Result, Result]) -> None:
    """Known answers for any dtype, shape and memory format, without overflow in half precision."""
    for result in runs[1:]:
        means = [result.tensors[f"mean/{index}"] for index in range(4)]
        expected = [torch.full((5,), 1.5), torch.full((2, 3), 1.5, dtype=torch.float64)]
        expected += [torch.full((4,), 60016.0, dtype=torch.float16), torch.full((1, 2, 3, 2), 3.5)]
        for found, wanted in zip(means, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_gathered_rows_of_two_ranks(runs: tuple[Result, Result, Result]) -> None:
    """In the order of ranks, also of types that the backend does not send."""
    for result in runs[1:]:
        assert result.tensors["gathered"].tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert result.tensors["gathered"].dtype == torch.int16
        assert result.tensors["gathered flags"].tolist() == [True, False]


def test_one_process_needs_nothing() -> None:
    """No process group, no work."""
    values = torch.tensor([1.0, float("nan")])
    mean_over_ranks([values])
    assert world_size() == 1 and values[0] == 1 and gather_rows(values) is values
    assert message(lambda: check_identical({"a": values})) == "nothing was refused"


def test_buckets_hold_one_dtype_and_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few collectives, each of a bounded size; a tensor that is larger goes alone, and none is left out."""
    monkeypatch.setattr(distributed, "BUCKET_ELEMENTS", 10)
    sizes = [(4, torch.float32), (5, torch.float64), (6, torch.float32), (1, torch.float32), (30, torch.float64)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    buckets = list(distributed._buckets(tensors))
    assert sorted(id(tensor) for bucket in buckets for tensor in bucket) == sorted(id(tensor) for tensor in tensors)
    found = sorted((bucket[0].dtype.itemsize, [len(tensor) for tensor in bucket]) for bucket in buckets)
    assert found == [(4, [1]), (4, [4, 6]), (8, [5]), (8, [30])]
