"""training/arguments.py: budgets and measurements in runtimes are checked before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_gfprune.runtimes import requirements
from diffusers_gfprune.training.arguments import parse_arguments

MODEL = ("--pretrained_model_name_or_path", "a/b", "--dataset_name", "x")
LATENCY = ("--target", "latency", "--latency_backend", "openvino")


@pytest.mark.parametrize("words", [LATENCY, ("--speed_modes", "eager", "openvino")])
def test_a_missing_runtime_is_found_before_any_work(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with the command that installs it; not where it is not used."""
    parse_arguments([*MODEL, *words])
    find = requirements.importlib.util.find_spec
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(ImportError, match=r"^openvino not installed: pip install 'diffusers-gfprune\[openvino\]'$"):
        parse_arguments([*MODEL, *words])
    parse_arguments([*MODEL, "--latency_backend", "openvino"])  # MACs are the target


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--raito", "0.3"), r"^unknown argument --raito: did you mean --ratio\?$"),
        (("--max-train-step=5",), r"^unknown argument --max-train-step: did you mean --max_train_steps\?$"),
        (("--zzz", "--raito"), "^unknown argument --zzz: see --help$"),
        (("ratio",), "^unknown argument ratio: see --help$"),
    ],
)
def test_an_unknown_argument_is_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*MODEL, *words])


def test_a_budget_for_a_runtime_is_for_the_cpu() -> None:
    """Wherever training runs: blocks of channels are those of CPUs."""
    for words, wanted in ((LATENCY, "cpu"), (LATENCY[:2], "cuda"), (LATENCY[2:], "cuda")):
        assert parse_arguments([*MODEL, *words]).pruning.on_device("cuda").target_device == wanted


def test_a_token_is_not_stored_by_a_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases stores the command line."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    hub = ("--push_to_hub", "--hub_token", "hf_secret")
    with pytest.raises(
        ValueError, match="^hub_token cannot be used with report_to=wandb, which stores the command line"
    ) as raised:
        parse_arguments([*MODEL, *hub, "--report_to", "wandb"])
    assert "hf_secret" not in str(raised.value)
    parse_arguments([*MODEL, *hub, "--report_to", "tensorboard"])


def test_home_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--output_dir=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("output_dir", "evaluation_cache_dir", "cache_dir", "encoding_cache_dir", "resume_from_checkpoint")
    names += ("teacher_images_dir", "teacher_prompts", "train_data_dir")
    given = [f"--{name}=~/{name}" for name in names]
    found = parse_arguments([*MODEL[:2], "--train_data", "teacher", *given]).to_dict()
    assert {name: found[name] for name in names} == {name: str(tmp_path / name) for name in names}


def test_a_rate_that_cannot_fall_is_refused() -> None:
    """Diffusers' own error would come after images are encoded, and names no argument."""
    words = [*MODEL, "--lr_scheduler", "polynomial", "--learning_rate"]
    with pytest.raises(
        ValueError, match=r"^learning_rate=1e-07 must be greater than 1e-07, the last one of lr_scheduler=poly"
    ):
        parse_arguments([*words, "1e-7"])
    parse_arguments([*words, "2e-7"])
    parse_arguments([*MODEL, "--learning_rate", "1e-7"])


def test_a_warm_up_that_does_not_end_is_said() -> None:
    def doubts(warmup: int) -> list[str]:
        return parse_arguments([*MODEL, "--max_train_steps", "100", "--lr_warmup_steps", str(warmup)]).training.doubts()

    assert doubts(99) == []
    assert doubts(100) == [
        "lr_warmup_steps=100 is not less than max_train_steps=100: the learning rate never reaches its peak"
    ]


def test_numbers_are_finite() -> None:
    """Checkpoints and reports are JSON, which has no infinity: the run would stop when it writes the first of them."""
    for value, words in (("inf", "be finite"), ("nan", "not be negative")):
        with pytest.raises(ValueError, match=f"^max_grad_norm={value} must {words}$"):
            parse_arguments([*MODEL, "--max_grad_norm", value])
    assert parse_arguments([*MODEL, "--max_grad_norm", "0"]).training.max_grad_norm == 0  # none is clipped
