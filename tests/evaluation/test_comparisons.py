"""Comparisons of evaluations: a table, or an error if figures cannot be compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler
from PIL import Image
from safetensors.torch import save_file

from diffusers_gfprune.evaluation.comparisons import common_reference, comparison_table, differing_settings
from diffusers_gfprune.reports.results import ModelFigures, Results
from helpers.evaluations import ROOT, run


def speed(latency: float, batch_size: int = 1, **more: object) -> dict:
    setting = {"batch_size": batch_size, "dtype": "float32", "mode": "eager", "memory_format": "contiguous"}
    machine = {"device": "cpu", "hardware": "abacus", "threads": 1, "sample_size": [8, 8]}
    return {**setting, **machine, "latency_ms": latency, **more}


def results(name: str, fid: float | None = 4.0, reference: bool = True, **evaluation: object) -> Results:
    """Made-up results."""
    quality = {"fid": fid, "kid": 0.001, "psnr_to_dense": None, "ssim_to_dense": 0.9}
    model = ModelFigures(
        name, "c0ffee", "12ab34cd", True, 1_500_000, 2_000_000_000, 6_000_000, 0.03, {"5": 0.03}, quality, [speed(7.5)]
    )
    dense = ModelFigures(
        "org/dense", None, "0a0b0c0d", None, 3_000_000, 4_000_000_000, 12_000_000, 0.02, {"5": 0.02}, {"fid": 3.5}
    )
    dense.speed.append(speed(15.0))
    distances = {
        "fid": {"title": "FID", "features": "Inception", "reference_images": 50_000},
        "kid": {"title": "KID", "features": "Inception", "reference_images": 50_000},
    }
    depends = {"num_images": 1000, "seed": 0, "distances": distances, "versions": {"torch": "2"}, **evaluation}
    return Results("evaluation", model, dense if reference else None, depends, "accelerate launch training/evaluate.py")


def write(folder: Path, found: Results, samples: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found.to_dict()))
    if samples is not None:
        save_file(samples, folder / "samples.safetensors")
    return folder


def test_only_what_figures_depend_on_must_be_the_same() -> None:
    assert differing_settings([results("a"), results("b", versions={"torch": "3"}, hardware="x", threads=9)]) == []
    other = results("b", seed=1)
    other.evaluation["distances"] = copy.deepcopy(other.evaluation["distances"])
    other.evaluation["distances"]["fid"]["reference_images"] = 10
    other.evaluation["new"] = "x"
    found = differing_settings([results("a"), other])
    assert found == ["seed: 0, 1", "distances.fid.reference_images: 50000, 10", "new: None, x"]


def test_similarities_are_compared_where_there_is_a_reference() -> None:
    """The dense model is evaluated alone, and pruned ones beside it: their FIDs are comparable."""
    similar = {"ssim_to_dense": "scikit-image"}
    alone = results("dense", reference=False, similarities={})
    assert differing_settings([alone, results("a", similarities=similar), results("b", similarities=similar)]) == []
    found = differing_settings([alone, results("a", similarities=similar), results("b", similarities={"ssim_to_dense": "x"})])
    assert found == ["similarities.ssim_to_dense: scikit-image, x"]


def test_table() -> None:
    """Numbers as in papers, a dash for missing values, and speed-ups with their uncertainty."""
    lines = comparison_table([results("a"), results("b", None)]).splitlines()
    quality = "| step loss | FID | KID | PSNR to dense (dB) | SSIM to dense | latency (ms), batch 1 |"
    head = f"| model | parameters | MACs | file {quality}"
    assert lines[0] == head
    assert lines[2] == "| org/dense (reference) | 3.00M | 4.00G | 12 MB | 0.02 | 3.5 | - | - | - | 15 |"
    assert lines[3] == "| a | 1.50M | 2.00G | 6 MB | 0.03 | 4 | 0.001 | - | 0.9 | 7.5 |"
    assert lines[4] == "| b | 1.50M | 2.00G | 6 MB | 0.03 | - | 0.001 | - | 0.9 | 7.5 |"
    assert {line.count("|") for line in lines} == {11} and len(lines) == 5


def test_reference_is_shown_where_all_have_the_same() -> None:
    a, b = results("a"), results("b")
    assert common_reference([a, b]) == a.reference_model
    assert common_reference([a, results("b", reference=False)]) is None
    b.reference_model.weights = "01010101"
    assert common_reference([a, b]) is None
    a.model.quality = b.model.quality = {"fid": 4.0}
    assert differing_settings([a, b]) == [] and "reference" not in comparison_table([a, b])


def test_similarities_are_to_one_reference() -> None:
    """By its weights, whatever it is called. Distances to real images do not depend on it."""
    a, b, alone = results("a"), results("b"), results("dense", reference=False)
    b.reference_model.name = "copy"
    assert differing_settings([a, alone, b]) == []
    b.reference_model.weights = "01010101"
    assert differing_settings([a, alone, b]) == ["reference_model.weights: 0a0b0c0d, 01010101"]
    b.model.quality = {"fid": 4.0}
    assert differing_settings([a, alone, b]) == []


def test_step_loss_of_consistency_models_is_to_one_reference() -> None:
    """It is a distance to the outputs of the reference; that of other models is not."""
    for sampler, found in (
        ("multistep consistency sampling", ["reference_model.weights: 0a0b0c0d, 01010101"]),
        ("Euler's method", []),
    ):
        pair = results("a", sampler=sampler), results("b", sampler=sampler)
        for one in pair:
            one.model.quality = {}
        pair[1].reference_model.weights = "01010101"
        assert differing_settings(pair) == found
        pair[1].model.step_loss = None
        assert differing_settings(pair) == []


def test_step_loss_depends_on_the_process_of_a_ddpm() -> None:
    """Not on how its scheduler samples. Entries that a class of schedulers lacks have their defaults."""
    a, b = results("a"), results("b")
    a.model.scheduler = dict(DDPMScheduler().config)
    b.model.scheduler = dict(PNDMScheduler(steps_offset=1).config)
    assert differing_settings([a, b]) == []
    b.model.scheduler |= {"prediction_type": "v_prediction", "trained_betas": [0.01] * 1000}
    assert differing_settings([a, b]) == [
        "scheduler.trained_betas: None, a list of 1000",
        "scheduler.prediction_type: epsilon, v_prediction",
    ]
    b.model.step_loss = None
    assert differing_settings([a, b]) == []


def test_data_are_compared_by_content() -> None:
    """A folder has many paths. Without a hash of what was read, only names tell data apart."""
    names = ({"name": "data/digits"}, {"name": "digits"})
    common = {"step_loss_images": 8, "step_loss_fingerprint": "0123abcd"}
    pair = [results("a", dataset={**name, "fingerprint": "f00d"}, **common) for name in names]
    assert differing_settings(pair) == []
    named = "dataset.name: data/digits, digits"
    pair[1].evaluation["dataset"]["fingerprint"] = "beef"
    assert differing_settings(pair) == [named, "dataset.fingerprint: f00d, beef"]
    for missing in ({"step_loss_fingerprint": None}, {"dataset": {"fingerprint": None}}):
        pair = [results("a", **{**common, "dataset": {"fingerprint": "f00d"}, **missing}) for _ in names]
        for one, name in zip(pair, names):
            one.evaluation["dataset"] = {**name, **one.evaluation["dataset"]}
        assert differing_settings(pair) == [named]


def test_latency_is_shown_where_all_were_timed_alike() -> None:
    a, b = results("a", reference=False), results("b", reference=False)
    b.model.speed = [speed(3.0, hardware="calculator")]
    assert "latency" not in comparison_table([a, b])
    b.model.speed = [{**speed(0), "latency_ms": None, "error": "no memory"}]
    assert "latency" not in comparison_table([a, b])
    for one, factor in ((a, 1.0), (b, 2.0)):
        one.model.speed = [speed(factor), speed(2 * factor, 16), speed(3 * factor, 16, mode="compiled")]
    lines = comparison_table([a, b]).splitlines()
    titles = ("batch 1 eager", "batch 16 eager", "batch 16 compiled")
    assert lines[0].endswith("".join(f" latency (ms), {title} |" for title in titles))
    assert lines[2].endswith("| 1 | 2 | 3 |") and lines[3].endswith("| 2 | 4 | 6 |")


def test_speedups_are_those_over_the_common_reference() -> None:
    """Each model's own, from the rounds in which it was timed beside the reference."""
    found = [results("a"), results("b")]
    for one, speedup in zip(found, (2.0, 1.01)):
        one.model.speed = [speed(7.5, speedup=speedup, speedup_interval=[speedup - 0.05, speedup + 0.05])]
    lines = comparison_table(found).splitlines()
    assert lines[0].endswith("| latency (ms), batch 1 | speed, batch 1 |")
    assert lines[2].endswith("| 15 | 1 |")
    assert lines[3].endswith("| 7.5 | 2.00 times as fast (1.95 to 2.05) |")
    assert lines[4].endswith("| 7.5 | no difference (0.96 to 1.06) |")
    found[1].reference_model.weights = "01010101"
    assert "times as fast" not in comparison_table(found)


def test_folder_of_images_has_a_table() -> None:
    """Without cost."""
    found = Results("evaluation", ModelFigures("samples", quality={"fid": 5.0}), None, {"distances": {}}, "")
    assert comparison_table([found]).splitlines()[2] == "| samples | - | - | - | - | 5 |"


# --- the command --------------------------------------------------------------------------------------------------------


def compare(folder: Path, *names: str, more: tuple[str, ...] = ()) -> None:
    from helpers.evaluations import evaluate

    paths = [str(folder / name) for name in names]
    evaluate.main(["--compare", *paths, "--output_dir", str(folder / "out"), *more])


def samples(value: int, reference: bool = True) -> dict:
    images = {"model": torch.full((20, 3, 8, 8), value, dtype=torch.uint8)}
    return images | ({"reference_model": torch.full((20, 3, 8, 8), 255, dtype=torch.uint8)} if reference else {})


def test_comparison_prints_a_table_and_draws_samples(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, value in (("a", 0), ("b", 128)):
        write(tmp_path / name, results(name), samples(value))
    compare(tmp_path, "a", "b")
    table = comparison_table([results("a"), results("b")])
    printed = capsys.readouterr().out
    assert table in printed and f"saved: {tmp_path / 'out'}" in printed
    assert (tmp_path / "out/table.md").read_text() == table + "\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "comparison.png"}
    # the reference model, a and b, from above: white, black, grey
    picture = Image.open(tmp_path / "out/comparison.png").convert("L")
    column = [picture.getpixel((picture.width // 2 + 5, y)) for y in range(picture.height)]
    order = [value for value in column if value in (0, 128, 255)]
    longest = [value for i, value in enumerate(order) if order[i : i + 20] == [value] * 20]
    shades = [value for i, value in enumerate(longest) if i == 0 or longest[i - 1] != value]
    assert [shade for shade in shades if shade != 255] == [0, 128] and 255 in shades
    compare(tmp_path, "a", "b", more=("--overwrite_output_dir",))


def test_comparison_without_samples_or_with_those_of_some(tmp_path: Path) -> None:
    write(tmp_path / "a", results("a"))
    write(tmp_path / "b", results("b"))
    compare(tmp_path, "a", "b")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.md"]
    write(tmp_path / "b", results("b"), samples(3))
    compare(tmp_path, "a", "b", more=("--overwrite_output_dir",))
    assert (tmp_path / "out/comparison.png").is_file()


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a", results("a"), samples(0))
    write(tmp_path / "b", results("b", seed=3, num_images=10))
    with pytest.raises(ValueError, match="cannot be compared, they differ in num_images: 1000, 10; seed: 0, 3"):
        compare(tmp_path, "a", "b")
    with pytest.raises(ValueError, match="nowhere holds no results.json"):
        compare(tmp_path, "a", "nowhere")
    with pytest.raises(
        ValueError, match="compare=.*gfpruned holds results of a pruning run: run evaluate.py on the model first"
    ):
        compare(ROOT / "model_cards", "digits-gfpruned", more=("--output_dir", str(tmp_path / "out")))
    (tmp_path / "a/samples.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="a/samples.safetensors cannot be read"):
        compare(tmp_path, "a")
    with pytest.raises(ValueError, match="contains .*a, which this run reads"):
        compare(tmp_path, "a", more=("--output_dir", str(tmp_path), "--overwrite_output_dir"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_other_versions_and_machines_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They may move figures in the last digits, and do not forbid a comparison."""
    write(tmp_path / "a", results("a"))
    write(tmp_path / "b", results("b", versions={"torch": "3"}, hardware="abacus"))
    compare(tmp_path, "a", "b")
    warnings = capsys.readouterr().err
    assert "warning: versions.torch differs: 2, 3" in warnings and "hardware differs: None, abacus" in warnings


@pytest.mark.slow
def test_other_held_out_images_of_one_name_are_refused(tmp_path: Path) -> None:
    """Where no features are taken, the step loss alone tells two data sets apart."""
    from helpers.evaluations import save_dense, write_images

    model = ("--model", save_dense(tmp_path / "model"), "--num_images", 0)
    short = ("--speed_batch_sizes", "0", "--step_loss_timesteps", "4")
    for seed, folder in enumerate(("one", "other")):
        data = write_images(tmp_path / folder / "images", seed=seed)
        run(tmp_path, *model, "--dataset_name", data, out=f"of-{folder}", short=short)
    with pytest.raises(ValueError, match="they differ in step_loss_fingerprint: [0-9a-f]{8}, [0-9a-f]{8}$"):
        compare(tmp_path, "of-one", "of-other")


@pytest.mark.slow
def test_evaluations_of_this_script_can_be_compared(tmp_path: Path) -> None:
    """Two seeds cannot; a model and its copy can."""
    from helpers.evaluations import save_dense, write_images

    data = ("--dataset_name", write_images(tmp_path / "images"), "--num_images", 70)
    for name in ("first", "second"):
        run(tmp_path, "--model", save_dense(tmp_path / name), *data, out=f"of-{name}")
    run(tmp_path, "--model", tmp_path / "first", *data, "--seed", 5, out="other-seed")
    compare(tmp_path, "of-first", "of-second")
    rows = (tmp_path / "out/table.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| first", "| second"]
    assert rows[0].replace("first", "second") == rows[1]
    with pytest.raises(ValueError, match="they differ in seed: 1234, 5"):
        compare(tmp_path, "of-first", "other-seed", more=("--overwrite_output_dir",))
