"""data/captions.py, and captions in batches: each draw has the conditioning of its image's caption, or of no prompt."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_gfprune.data.batches import calibration_batches, train_dataloader
from diffusers_gfprune.data.captions import RowCaptions, caption_column, read_captions
from diffusers_gfprune.diffusion.prompts import PromptEncoder
from helpers.latent_data import SIZE, latent_spec, load_latents, noise_image, prompt_encoder, write_images
from helpers.latent_models import t5_encoder, t5_tokenizer
from helpers.processes import ddpm

CAPTIONS = ["zero", "one", "two", "three"] * 3 + ["two", "aa"]
IMAGES = [noise_image(number) for number in range(len(CAPTIONS))]


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


# columns


def test_the_caption_column_is_found_by_name_or_kind() -> None:
    many = rows(author=["x"], text=["a"], number=[1])
    assert caption_column(many, None) == "text" and caption_column(many, "author") == "author"
    assert caption_column(rows(number=[1], description=["a"]), None) == "description"
    assert caption_column(rows(name=["x"], captions=[["a", "b"]]), None) == "captions"


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("title", r"caption_column=title is not a column of the data set, which has \['a', 'b', 'n'\]"),
        ("n", "caption_column=n must be a column of texts, or of lists of texts"),
        (None, r"pass caption_column, .* has \['a', 'b', 'n'\], of which \['a', 'b'\] hold texts"),
    ],
)
def test_a_missing_caption_column_is_one_line(requested: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_column(rows(a=["x"], b=["y"], n=[1]), requested)
    with pytest.raises(ValueError, match="none of which holds texts"):
        caption_column(rows(n=[1]), None)


def test_different_captions_are_numbered() -> None:
    texts, (first, second), missing = read_captions(
        [rows(text=[["b", "a"], [], None, ["a"]]), rows(text=[["a", "c", "b"]])], "text"
    )
    assert texts == ["b", "a", "", "c"] and missing == 2
    assert [texts[first.of(row)] for row in range(4)] == ["b", "", "", "a"]
    assert [texts[second.of(0, uniform)] for uniform in (0.0, 0.3, 0.34, 0.99)] == ["a", "a", "c", "b"]


def test_one_of_several_captions_is_drawn() -> None:
    captions = RowCaptions([0, 1, 2, 3, 4], [2, 3])
    drawn = [captions.of(1, uniform) for uniform in np.random.default_rng(0).random(3000)]
    assert np.bincount(drawn)[2:].min() > 900


# batches


def test_batches_have_the_conditioning_of_their_captions(tmp_path: Path) -> None:
    prompts = prompt_encoder(tmp_path / "tokens")
    folder = write_images(tmp_path / "data", IMAGES, CAPTIONS)
    images, held_out = load_latents(folder, latent_spec(prompts=prompts), caption_dropout=0.25)
    assert images.choices() == {"caption_column": "text", "caption_dropout": 0.25}
    known = prompts.encode(["zero", "one", "two", "three", "aa", ""])["encoder_hidden_states"]
    batches = list(itertools.islice(train_dataloader(images, 4, seed=0, process=ddpm(10)), 90))
    states = torch.cat([batch.conditioning["encoder_hidden_states"] for batch, *_ in batches])
    distances = (states[:, None] - known).abs().amax(dim=(2, 3))
    assert distances.min(dim=1).values.max() < 1e-5 and states.shape[1:] == (8, 16)
    chosen = distances.argmin(dim=1)
    assert 0.2 < (chosen == 5).float().mean() < 0.3
    clean = torch.cat([batch.clean for batch, *_ in batches])
    moments = torch.stack([images.split.moments.read("moments", row)[0] for row in range(len(IMAGES))])
    row_of = torch.cdist(clean.flatten(1), images.draw(moments).flatten(1)).argmin(dim=1)
    number = {"zero": 0, "one": 1, "two": 2, "three": 3, "aa": 4}
    right = torch.tensor([number[CAPTIONS[row]] for row in row_of])
    assert torch.equal(chosen[chosen < 5], right[chosen < 5])
    kept = held_out.conditioning["encoder_hidden_states"]
    torch.testing.assert_close(kept, prompts.encode([CAPTIONS[row] for row in held_out.rows])["encoder_hidden_states"])
    null = images.null_conditioning()
    torch.testing.assert_close(null["encoder_hidden_states"], prompts.null()["encoder_hidden_states"])


def test_calibration_drops_the_right_share(tmp_path: Path) -> None:
    images, _ = load_latents(
        write_images(tmp_path / "data", IMAGES, CAPTIONS), latent_spec(prompts=prompt_encoder(tmp_path / "tokens"))
    )
    null = images.null_conditioning()["encoder_hidden_states"]
    for step in range(3):
        batches = calibration_batches(images, 5, 12, process=ddpm(1000), seed=0, step=step)
        states = torch.cat([batch.conditioning["encoder_hidden_states"] for batch in batches])
        assert 5 <= (states == null).all(dim=(1, 2)).sum() <= 7  # a tenth of 60


def test_conditioning_of_sdxl_has_the_sizes_of_the_image(tmp_path: Path) -> None:
    prompts = prompt_encoder(tmp_path / "tokens", pooled=True)
    wide = [noise_image(number, 20, 40) for number in range(6)]
    images, held_out = load_latents(
        write_images(tmp_path / "data", wide, list("abcdef")), latent_spec(prompts=prompts), caption_dropout=0.5
    )
    (batch, *_), *_ = itertools.islice(train_dataloader(images, 4, seed=0, process=ddpm(10)), 1)
    shapes = {name: tuple(values.shape) for name, values in batch.conditioning.items()}
    assert shapes == {"encoder_hidden_states": (4, 8, 40), "text_embeds": (4, 12), "time_ids": (4, 6)}
    assert batch.conditioning["time_ids"].tolist() == [[20, 40, 0, 8, 16, 16]] * 4  # also without a caption
    assert held_out.conditioning["time_ids"].tolist() == [[20, 40, 0, 8, 16, 16]] * 2
    assert set(images.null_conditioning()) == {"encoder_hidden_states", "text_embeds"}  # sizes are those of each image
    dropped = (batch.conditioning["encoder_hidden_states"] == 0).all(dim=(1, 2))
    assert dropped.tolist() == (batch.conditioning["text_embeds"] == 0).all(dim=1).tolist()
    expected = prompts.encode([list("abcdef")[row] for row in held_out.rows])
    torch.testing.assert_close(held_out.conditioning["text_embeds"], expected["text_embeds"])


def test_conditioning_of_pixart_has_masks_and_the_size_of_all_images(tmp_path: Path) -> None:
    """Masks are those of the captions, also in the cache; sizes are those that the model makes, and in no cache."""
    tokens = t5_tokenizer()
    components = {"tokenizer": tokens, "text_encoder": t5_encoder(tokens)}
    prompts = PromptEncoder.of_pipeline(components, (SIZE, SIZE), max_length=9, takes={"resolution": torch.zeros(1, 2)})
    folder = write_images(tmp_path / "data", IMAGES, CAPTIONS)
    images, held_out = load_latents(folder, latent_spec(prompts=prompts), caption_dropout=0.5)
    (batch, *_), *_ = itertools.islice(train_dataloader(images, 12, seed=0, process=ddpm(10)), 1)
    found = {name: (tuple(values.shape), values.dtype) for name, values in batch.conditioning.items()}
    assert found == {
        "encoder_hidden_states": ((12, 9, 16), torch.float32),
        "encoder_attention_mask": ((12, 9), torch.int64),
        "resolution": ((12, 2), torch.float32),
        "aspect_ratio": ((12, 1), torch.float32),
    }
    lengths = batch.conditioning["encoder_attention_mask"].sum(dim=1)  # with the mark of a word's start, and the end
    assert {1, 5} < set(lengths.tolist()) <= {1, 4, 5, 6, 7}  # the empty prompt has its end only
    assert batch.conditioning["resolution"].tolist() == [[SIZE, SIZE]] * 12
    assert batch.conditioning["aspect_ratio"].tolist() == [[1]] * 12
    known = prompts.encode([CAPTIONS[row] for row in held_out.rows])
    for name, values in held_out.conditioning.items():
        torch.testing.assert_close(values, known[name])
    (cached,) = (load_file(path) for path in (tmp_path / "encoded").glob("captions*"))
    assert set(cached) == {"encoder_hidden_states", "encoder_attention_mask"}


def test_long_and_missing_captions_are_one_line_each_before_encoding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captions = ["abcdefgh", None, *CAPTIONS[2:]]
    folder = write_images(tmp_path / "data", IMAGES, captions)
    with caplog.at_level(logging.WARNING):
        load_latents(folder, latent_spec(prompts=prompt_encoder(tmp_path / "tokens")), prepare=False)
    assert caplog.messages == [
        "1 rows have no caption in column text: their prompt is empty",
        "1 of 7 different captions are longer than the limit of 8 tokens: they are cut, as in Diffusers' pipelines",
    ]
    assert not (tmp_path / "encoded").exists()


def test_a_split_without_captions_is_not_used_for_held_out_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_images(tmp_path / "data", IMAGES, CAPTIONS)
    write_images(folder, IMAGES[:3], [None] * 2 + [""], split="test")
    spec = latent_spec(prompts=prompt_encoder(tmp_path / "tokens"))
    _, held_out = load_latents(folder, spec, prepare=False, validation_images=3)
    assert held_out.split.images.num_images == 3  # an empty caption is one
    write_images(folder, IMAGES[:3], [None] * 3, split="test")
    with caplog.at_level(logging.WARNING):
        images, held_out = load_latents(folder, spec, prepare=False)
    assert images.summary.held_out == "train" and "split test has no captions in column text" in caplog.text
    with pytest.raises(ValueError, match="validation_split_name=test: split test has no captions in column text of"):
        load_latents(folder, spec, prepare=False, validation_split_name="test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_evaluation_encodes_the_held_out_images_only(split: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", IMAGES, CAPTIONS)
    if split == "test":
        write_images(folder, IMAGES[:5], CAPTIONS[:5], split="test")

    def spec():
        return latent_spec(prompts=prompt_encoder(tmp_path / "tokens"))

    whole, kept = load_latents(folder, spec(), validation_images=3)
    images, held_out = load_latents(folder, spec(), False, validation_images=3, encoding_cache_dir=str(tmp_path / "own"))
    images.prepare_held_out()
    sizes = {path.name.partition("-")[0]: rows_of(path) for path in (tmp_path / "own").iterdir()}
    assert sizes["moments"] == 3 and sizes["captions"] <= 3
    torch.testing.assert_close(held_out.samples, kept.samples, rtol=1e-4, atol=1e-5)
    for name, values in kept.conditioning.items():
        torch.testing.assert_close(held_out.conditioning[name], values)
    for name, values in whole.null_conditioning().items():
        torch.testing.assert_close(images.null_conditioning()[name], values)


def rows_of(path: Path) -> int:
    """Number of rows of a shard."""
    return len(next(iter(load_file(path).values())))
