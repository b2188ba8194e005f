"""training/recipes.py: a recipe is a command line in a file, and the command line overrides it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from diffusers_gfprune.configuration import PRESETS
from diffusers_gfprune.training.arguments import Arguments, parse_arguments
from diffusers_gfprune.training.recipes import expand_recipe, read_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]


REAL = ["celeba_hq", "cifar10", "lsun_bedroom", "lsun_church"]
LATENT = {"dit_imagenet": "DiT-XL-2-256", "ldm_celebahq": "ldm-celebahq-256", "sd15": "stable-diffusion-v1-5"}
LATENT_DIGITS = ["digits_dit", "digits_ldm", "digits_text"]
KNOWN = {
    *("learning_rate", "train_batch_size", "use_ema", "mixed_precision", "hub_token", "preset", "recipe", "report_to"),
    *("criterion", "mask_schedule", "soft_fraction", "update_interval", "output_dir", "interpolate_masks"),
}


@pytest.fixture
def recipe(tmp_path: Path):
    """A function that writes a recipe and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def parse(path: str, *words: str) -> Arguments:
    """Arguments of a run with a recipe that names no model or data."""
    return parse_arguments(["--recipe", path, "--pretrained_model_name_or_path", "m", "--dataset_name", "d", *words])


# --- values ------------------------------------------------------------------------------------------------------------


def test_values_stand_in_front_as_they_are_written(recipe) -> None:
    path = recipe("learning_rate: 2e-4\nuse_ema: true\nmixed_precision: no\nupdate_interval:\noutput_dir: -runs/a b\n")
    words = ["--learning_rate=1e-3", "--recipe", path, "--use-ema", "false"]
    assert expand_recipe(words, KNOWN) == [
        "--learning_rate=2e-4",
        "--use_ema=true",
        "--mixed_precision=no",
        "--output_dir=-runs/a b",
        *words,
    ]


def test_without_recipe_nothing_changes() -> None:
    words = ["--preset", "paper", "--output_dir", "recipe"]
    assert expand_recipe(words, KNOWN, PRESETS) == words


def test_parser_converts_the_values(recipe) -> None:
    args = parse(
        recipe(
            "learning_rate: 3e-4  # text to YAML, which wants 3.0e-4\n"
            "max_train_steps: 20_000\n"
            "use_ema: true\n"
            "interpolate_masks: false  # true by default\n"
            "mixed_precision: no  # a truth value to YAML\n"
            "update_interval: null\n"
            "train-batch-size: 8\n"
        )
    )
    t, p = args.training, args.pruning
    assert (t.learning_rate, t.max_train_steps, t.use_ema, t.train_batch_size) == (3e-4, 20_000, True, 8)
    assert (p.interpolate_masks, p.update_interval) == (False, None)
    assert args.to_dict()["mixed_precision"] == "no"


def test_several_values_are_a_list(recipe) -> None:
    path = recipe("speed_batch_sizes: [1, 16]\nspeed_modes:\n- eager\n- compiled\n")
    evaluation = parse(path).evaluation
    assert (evaluation.speed_batch_sizes, evaluation.speed_modes) == ([1, 16], ["eager", "compiled"])
    assert parse(path, "--speed_batch_sizes", "4").evaluation.speed_batch_sizes == [4]
    assert parse(recipe("speed_batch_sizes: 2")).evaluation.speed_batch_sizes == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1, 2]", "line 1: learning_rate must be a single value, not a sequence"),
        ("speed_batch_sizes: []", "line 1: speed_batch_sizes must be a list of one or more single values"),
        ("speed_batch_sizes: [[1]]", "line 1: speed_batch_sizes must be a list of one or more single values"),
        ("speed_batch_sizes: {a: 1}", "line 1: speed_batch_sizes must be a single value, not a mapping"),
    ],
)
def test_lists_are_for_arguments_with_several_values(recipe, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(recipe(text))


def test_the_home_folder_has_its_short_name(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(recipe("output_dir: ~/runs/x\ntrain_data_dir: ~/images\nrevision: ~other"))
    assert (args.run.output_dir, args.data.train_data_dir) == ("/home/me/runs/x", "/home/me/images")
    assert args.model.revision == "~other"


def test_range_of_a_value_is_checked_as_on_the_command_line(recipe) -> None:
    with pytest.raises(ValueError, match=re.escape("ratio=1.5 must be between 0 and 1")):
        parse(recipe("ratio: 1.5"))


@pytest.mark.parametrize("spelling", ["--train_batch_size", "--train-batch-size"])
@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_command_line_wins_wherever_it_stands(recipe, spelling, equals, before) -> None:
    own = [f"{spelling}=4"] if equals else [spelling, "4"]
    given = [f"--recipe={recipe('train_batch_size: 8')}"]
    needed = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d"]
    args = parse_arguments([*needed, *(own + given if before else given + own)])
    assert args.training.train_batch_size == 4


def test_flag_of_a_recipe_can_be_taken_back(recipe) -> None:
    path = recipe("use_ema: true\ninterpolate_masks: true")
    assert not parse(path, "--use_ema", "false").training.use_ema
    assert not parse(path, "--no_interpolate_masks").pruning.interpolate_masks


# --- presets -----------------------------------------------------------------------------------------------------------


def test_order_of_presets(recipe) -> None:
    """Defaults < preset of the recipe < recipe < preset of the command line < command line."""
    path = recipe("preset: paper\nmask_schedule: cosine\nsoft_fraction: 0.15")
    plain = parse_arguments(["--pretrained_model_name_or_path", "m", "--dataset_name", "d"]).pruning
    assert (plain.aggregation, plain.mask_schedule) == ("sum_abs", "linear")

    from_recipe = parse(path)
    assert from_recipe.run.preset == "paper"
    assert (from_recipe.pruning.aggregation, from_recipe.pruning.mask_schedule) == ("signed", "cosine")
    assert from_recipe.pruning.soft_fraction == 0.15

    replaced = parse(path, "--preset", "one-shot").pruning
    assert replaced.soft_fraction == 0.0  # the preset's key, in place of the recipe's
    assert replaced.mask_schedule == "cosine"  # no key of it, so the recipe's stays
    assert replaced.aggregation == "sum_abs"  # one preset counts: the recipe's is gone

    assert parse(path, "--preset=paper").pruning.mask_schedule == "linear"
    assert parse(path, "--preset", "paper", "--mask_schedule", "cubic").pruning.mask_schedule == "cubic"
    assert parse(path, "--preset", "default").pruning.aggregation == "sum_abs"


def test_presets_set_arguments_of_other_groups(recipe) -> None:
    """The teacher's part and recovery; what is named on the command line wins."""
    path = recipe("preset: paper")
    assert parse(path).pruning.recovery == "none" and parse(path).objective.distillation_weight == 0
    named = parse(path, "--recovery", "compaction")
    assert named.pruning.recovery == "compaction" and named.objective.distillation_weight == 0
    for preset in ("default", "one-shot"):
        assert parse(path, "--preset", preset).pruning.recovery == "rankings"
        assert parse(path, "--preset", preset).objective.distillation_weight == 1


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-4", "line 1: learning_rat is not an argument; did you mean learning_rate?"),
        ("use_ema: true\nqqq: 1", "line 2: qqq is not an argument"),
        ("use_ema: true\nlearning_rate: 1\nuse_ema: false", "line 3: use_ema is given twice"),
        ("use_ema: true\nuse-ema: true", "line 2: use_ema is given twice"),
        ("training:\n  use_ema: true", "line 1: training is not an argument"),
        ("learning_rate:\n  peak: 1", "line 1: learning_rate must be a single value, not a mapping"),
        ("learning_rate: [1, 2]", "line 1: learning_rate must be a single value, not a sequence"),
        ("[1, 2]: 3", "line 1: the name of an argument must be a single word"),
        ("- use_ema", "must be a mapping of arguments to values"),
        ("use_ema", "must be a mapping of arguments to values"),
        ("", "must be a mapping of arguments to values"),
        ("use_ema: [", "is not YAML: "),
        ("a: b: c", "is not YAML: mapping values are not allowed here in line 1"),
        ("---\nuse_ema: true\n---\nuse_ema: true", "is not YAML: "),
        ("use_ema: \x07", "is not YAML: "),
        ("hub_token: hf_x", "line 1: hub_token is a secret"),
        ("hub-token: hf_x", "line 1: hub_token is a secret"),
        ("recipe: digits", "line 1: recipe is the name of another recipe"),
    ],
)
def test_what_is_no_recipe_is_one_line(recipe, text, message) -> None:
    path = recipe(text)
    with pytest.raises(ValueError) as error:
        expand_recipe(["--recipe", path], KNOWN)
    assert str(error.value).startswith(f"recipe={path}") and message in str(error.value)
    assert "\n" not in str(error.value) and "hf_x" not in str(error.value)


def test_objects_are_never_built(recipe) -> None:
    path = recipe("output_dir: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="must be a single value"):
        read_recipe(path, KNOWN)


def test_missing_recipe_lists_those_shipped(tmp_path: Path) -> None:
    for name in ("imagenet", str(tmp_path), str(tmp_path / "none.yaml")):
        with pytest.raises(ValueError) as error:
            expand_recipe([f"--recipe={name}"], KNOWN)
        assert str(error.value).endswith(f"shipped recipe: {', '.join(shipped_recipes())}")


def test_unreadable_recipe(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: \xe9t\xe9")
    with pytest.raises(ValueError, match="cannot be read: "):
        expand_recipe(["--recipe", str(tmp_path / "latin.yaml")], KNOWN)


def test_two_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="recipe=digits, cifar10 names 2 recipes"):
        expand_recipe(["--recipe", "digits", "--recipe=cifar10"], KNOWN)


def test_shipped_name_comes_before_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").write_text("learning_rate: 7")
    everything = {name for shipped in shipped_recipes() for name in keys_of(shipped)}
    assert read_recipe("cifar10", everything)["learning_rate"] == "2e-4"
    assert read_recipe("./cifar10", everything) == {"learning_rate": "7"}


# --- the recipes shipped -----------------------------------------------------------------------------------------------


def keys_of(name: str) -> list[str]:
    return re.findall(r"^(\w+):", (ROOT / f"training/recipes/{name}.yaml").read_text(), flags=re.MULTILINE)


def test_recipes_that_are_shipped() -> None:
    assert shipped_recipes() == sorted(["digits", *LATENT_DIGITS, *REAL, *LATENT])


def test_digits_is_what_make_prune_passes() -> None:
    """The Makefile and the recipe must stay consistent."""
    lines = (ROOT / "Makefile").read_text().partition("\nprune:")[2].partition("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(lines.partition("training/prune_ddpm.py")[2].replace("$(addprefix _,$(FAMILY)) $(ARGS)", ""))
    from_make, from_recipe = parse_arguments(words).to_dict(), parse_arguments(["--recipe", "digits"]).to_dict()
    assert {**from_make, "recipe": "digits"} == from_recipe
    assert from_recipe["max_train_steps"] == 1500 and from_recipe["output_dir"] == "runs/digits-gfpruned"


@pytest.mark.parametrize("name", LATENT_DIGITS)
def test_recipes_of_latent_digits(name: str) -> None:
    """They train a trained model that ships here, each in a folder of its own."""
    settings = parse_arguments(["--recipe", name]).to_dict()
    assert (Path(settings["pretrained_model_name_or_path"]) / "model_index.json").is_file()
    assert settings["output_dir"] == f"runs/{name.replace('_', '-')}-gfpruned"
    assert (settings["caption_column"] is not None) == (name == "digits_text")


@pytest.mark.parametrize("name", REAL)
def test_recipes_of_real_models(name: str) -> None:
    """What the paper states, and what such runs need."""
    args = parse_arguments(["--recipe", name, "--output_dir", "runs/x"])
    settings = args.to_dict()
    stated = {
        **{"preset": "paper", "ratio": 0.5, "target": "macs", "soft_fraction": 0.1, "hard_fraction": 0.2},
        **{"aggregation": "signed", "mask_schedule": "linear", "ddim_num_inference_steps": 100},
        "distillation_weight": 0.0,
        "max_train_steps": 100_000 if name == "cifar10" else 500_000,
    }
    needed = {
        **{"channel_multiple": "auto", "use_ema": True, "ema_max_decay": 0.9999, "mixed_precision": "bf16"},
        **{"report_to": "tensorboard", "checkpointing_steps": 1000, "resolution": 32 if name == "cifar10" else 256},
    }
    wanted = {**stated, **needed}
    assert {key: settings[key] for key in wanted} == wanted
    assert settings["sample_steps"] > 0 and settings["dataloader_num_workers"] > 0
    assert "/" in settings["pretrained_model_name_or_path"] and "/" in settings["dataset_name"]


@pytest.mark.parametrize("name", REAL)
def test_what_is_ours_and_what_is_the_papers_is_told_apart(name: str) -> None:
    text = (ROOT / f"training/recipes/{name}.yaml").read_text()
    for key in ("max_train_steps", "ratio", "preset", "ddim_num_inference_steps"):
        assert re.search(rf"^{key}:.*# paper: ", text, flags=re.MULTILINE), key
    for key in ("train_batch_size", "learning_rate", "use_ema", "calibration_batches", "target", "channel_multiple"):
        assert re.search(rf"^{key}:.*# ours", text, flags=re.MULTILINE), key
    assert re.search("^# Written for (one process|four processes)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", LATENT)
def test_recipes_of_latent_models(name: str) -> None:
    """What such runs need, and where each setting is from."""
    settings = parse_arguments(["--recipe", name, "--output_dir", "runs/x"]).to_dict()
    assert settings["pretrained_model_name_or_path"].endswith(LATENT[name]) and "/" in settings["dataset_name"]
    needed = {"target": "macs", "use_ema": True, "mixed_precision": "bf16", "checkpointing_steps": 1000, "random_flip": True}
    assert {key: settings[key] for key in needed} == needed
    assert settings["distillation_weight"] == 1  # learned variances have no other target
    assert settings["resolution"] == (512 if name == "sd15" else 256)
    assert (settings["caption_column"] is not None) == (name == "sd15")
    text = (ROOT / f"training/recipes/{name}.yaml").read_text()
    assert f"--recipe {name} --output_dir" in text and max(map(len, text.splitlines())) <= 127
    for key in keys_of(name):
        if key not in ("pretrained_model_name_or_path", "dataset_name", "image_column", "label_column", "caption_column"):
            beside = re.search(rf"^{key}:.*# (source|ours)", text, flags=re.MULTILINE)
            assert beside or key == "ema_max_decay", key


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [("auto", "cuda", "cuda"), ("auto", "cpu", "cpu"), ("cpu", "cuda", "cpu"), ("auto", "mps", "auto")],
)
def test_widths_suit_the_device_that_the_run_trains_on(given: str, device: str, expected: str) -> None:
    """Models are loaded on the CPU: its blocks would be taken for those of the GPU."""
    pruning = parse_arguments(["--recipe", "digits", "--target_device", given]).pruning
    assert pruning.on_device(device).target_device == expected
    assert pruning.target_device == given
