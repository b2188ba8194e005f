"""The command line of evaluate.py: valid combinations, and one-line errors for others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffusers_gfprune.evaluation.arguments import parse_evaluate_arguments

MODEL = ("--model", "a/b", "--dataset_name", "c/d")


def test_defaults() -> None:
    """50,000 samples of 100 evenly spaced steps, FID where its weights are."""
    args = parse_evaluate_arguments([*MODEL])
    settings = args.samples.settings()
    assert (settings.num_images, settings.num_inference_steps, settings.timestep_spacing) == (50_000, None, "leading")
    assert args.samples.features == ["auto"] and args.output_dir == "runs/b-evaluation"
    assert [(s.batch_size, s.dtype, s.mode) for s in args.cost.speed_settings()] == [
        (1, "float32", "eager"),
        (16, "float32", "eager"),
    ]
    assert args.words == [*MODEL]


def test_output_folders_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert parse_evaluate_arguments(["--model", ".", "--dataset_name", "x"]).output_dir == "runs/run-evaluation"
    assert parse_evaluate_arguments(["--images_dir", "../run", "--dataset_name", "x"]).output_dir == "runs/run-evaluation"
    assert parse_evaluate_arguments(["--compare", "a", "b"]).output_dir == "runs/comparison"
    assert parse_evaluate_arguments(["--compare", "a", "b", "--output_dir", "c"]).output_dir == "c"


def test_home_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--output_dir=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("output_dir", "evaluation_cache_dir", "cache_dir", "encoding_cache_dir")
    args = parse_evaluate_arguments([*MODEL, *(f"--{name}=~/{name}" for name in names)])
    found = (args.output_dir, args.output.evaluation_cache_dir, args.data.cache_dir, args.data.encoding_cache_dir)
    assert found == tuple(str(tmp_path / name) for name in names)


def test_lists() -> None:
    args = parse_evaluate_arguments(
        [*MODEL, "--features", "inception", "dinov2", "--speed_batch_sizes", "1", "8", "--speed_modes", "eager", "compiled"]
    )
    assert args.samples.features == ["inception", "dinov2"] and len(args.cost.speed_settings()) == 4
    assert parse_evaluate_arguments([*MODEL, "--speed_batch_sizes", "0"]).cost.speed_settings() == []


def test_the_step_loss_has_a_batch_size_without_samples() -> None:
    args = parse_evaluate_arguments([*MODEL, "--num_images", "0", "--eval_batch_size", "4"])
    assert args.samples.settings().batch_size == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "x"], "give one of --model, --images_dir and --compare, not none of them"),
        ([*MODEL, "--compare", "a"], "give one of --model, --images_dir and --compare, not model and compare"),
        (["--images_dir", "nowhere", "--dataset_name", "x"], "images_dir=nowhere is not a folder"),
        (["--images_dir", ".", "--reference_model", "a/b"], "reference_model=a/b needs --model"),
        (["--images_dir", ".", "--revision", "v1"], "revision=v1 needs --model"),
        ([*MODEL, "--reference_revision", "v1"], "reference_revision=v1 needs --reference_model"),
        (["--images_dir", ".", "--eta", "0.5"], "eta=0.5 cannot be combined with --images_dir"),
        (["--images_dir", ".", "--dtype", "bfloat16"], "dtype=bfloat16 cannot be combined with --images_dir"),
        (
            ["--images_dir", ".", "--speed_modes", "compiled"],
            r"speed_modes=\['compiled'\] cannot be combined with --images_dir",
        ),
        (["--images_dir", ".", "--features", "none"], "images_dir=. needs images and --features"),
        (["--compare", "a", "b", "--num_images", "5"], "num_images=5 cannot be combined with --compare"),
        (["--compare", "a", "--update_model_card"], "update_model_card=True cannot be combined with --compare"),
        (["--compare", "a", "--dataset_name", "x"], "dataset_name=x cannot be combined with --compare"),
        ([*MODEL, "--num_images", "1"], "num_images=1 must be at least 2, or 0"),
        ([*MODEL, "--num_images", "-5"], "num_images=-5 must be at least 2, or 0"),
        ([*MODEL, "--num_reference_images", "1"], "num_reference_images=1 must be at least 2"),
        ([*MODEL, "--num_inference_steps", "0"], "num_inference_steps=0 must be at least 1"),
        ([*MODEL, "--eval_batch_size", "0"], "eval_batch_size=0 must be at least 1"),
        ([*MODEL, "--eta", "1.5"], r"eta=1.5 must be in \[0, 1\]"),
        ([*MODEL, "--seed", "-1"], "seed=-1 must not be negative"),
        ([*MODEL, "--features", "vgg"], "features=vgg must be one of auto, none, inception, efflite0, dinov2, pixels"),
        ([*MODEL, "--features", "pixels", "pixels"], "features=pixels pixels must name each network once"),
        ([*MODEL, "--features", "auto", "pixels"], "features=auto pixels must name each network once, or be auto or none"),
        ([*MODEL, "--features", "none"], "features=none without --reference_model leaves nothing to measure on samples"),
        ([*MODEL, "--features", "pixels", "--inception_weights", "x"], "inception_weights=x needs --features inception"),
        (["--model", "a/b"], "give the images either as dataset_name or as train_data_dir, not both or none"),
        (["--images_dir", "."], "give the images either as dataset_name or as train_data_dir, not both or none"),
        ([*MODEL, "--train_data_dir", "."], "give the images either as dataset_name or as train_data_dir, not both or none"),
        ([*MODEL, "--streaming"], "streaming=True needs --num_reference_images"),
        ([*MODEL, "--dinov2_model", "x"], "dinov2_model=x needs --features dinov2"),
        ([*MODEL, "--num_images", "0", "--seed", "5"], "seed=5 cannot be combined with --num_images 0"),
        ([*MODEL, "--num_images", "0", "--features", "pixels"], "features=.* cannot be combined with --num_images 0"),
        (
            [*MODEL, "--speed_batch_sizes", "0", "--speed_modes", "compiled"],
            "speed_modes=.* cannot be combined with --speed_batch_",
        ),
        ([*MODEL, "--random_flip"], "random_flip=True is for training"),
        ([*MODEL, "--center_crop"], "center_crop=True is for training"),
        ([*MODEL, "--caption_dropout", "0.2"], "caption_dropout=0.2 is for training"),
        ([*MODEL, "--dataloader_num_workers", "2"], "dataloader_num_workers=2 is for training"),
        ([*MODEL, "--step_loss_timesteps", "0"], "step_loss_timesteps=0 must be at least 1"),
        ([*MODEL, "--speed_batch_sizes", "4", "0"], "speed_batch_sizes=0 must be at least 1, or 0 alone"),
        ([*MODEL, "--speed_dtypes", "int8"], "speed_dtypes=int8 must be one of"),
        ([*MODEL, "--speed_modes", "fast"], "speed_modes=fast must be one of"),
        (
            [*MODEL, "--speed_modes", "openvino", "--speed_dtypes", "fp16"],
            "speed_dtypes=float16 must be float32 with modes=op",
        ),
        ([*MODEL, "--speed_memory_formats", "rows"], "speed_memory_formats=rows must be one of"),
        ([*MODEL, "--validation_images", "0"], "validation_images=0 must be at least 1"),
        ([*MODEL, "--update_model_card"], "update_model_card=True needs --model and --reference_model"),
        ([*MODEL, "--reference_model", "e/f", "--update_model_card"], "update_model_card=True needs --model to be the folder"),
        (
            [*MODEL, "--reference_model", "e/f", "--update_model_card", "--num_images", "0"],
            "update_model_card=True needs samples and --features",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_evaluate_arguments(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*MODEL, "--timestep_spacing", "cubic"], "--timestep_spacing.*: invalid choice: 'cubic'"),
        ([*MODEL, "--dtype", "int8"], "--dtype.*: invalid choice: 'int8'"),
        ([*MODEL, "--num_images", "many"], "--num_images.*: invalid int value: 'many'"),
        ([*MODEL, "--speed_batch_sizes", "big"], "--speed_batch_sizes.*: invalid int value: 'big'"),
        ([*MODEL, "--features"], "--features: expected at least one argument"),
    ],
)
def test_words_that_are_no_values(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_evaluate_arguments(words)
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_unknown_argument() -> None:
    with pytest.raises(ValueError, match=r"^unknown argument --num_image: did you mean --num_images\?$"):
        parse_evaluate_arguments([*MODEL, "--num_image", "5"])
