"""diffusion/prompts.py: prompts are encoded as Diffusers' pipelines encode them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from diffusers_gfprune.diffusion.prompts import PromptEncoder
from diffusers_gfprune.loading.pipeline_layouts import LAYOUTS
from helpers.latent_models import (
    MAX_TOKENS,
    projecting_text_encoder,
    t5_encoder,
    t5_tokenizer,
    text_encoder,
    three_text_encoders,
    tokenizer,
)
from helpers.latent_pipelines import sd3

PROMPTS = ["ab cd", "", "a", "abcdefghijkl mnop"]  # the last one is too long


def one_encoder(folder: Path, **options) -> PromptEncoder:
    tokens = tokenizer(folder)
    return PromptEncoder.of_pipeline({"tokenizer": tokens, "text_encoder": text_encoder(tokens)}, **options)


def two_encoders(folder: Path, **options) -> tuple[dict, PromptEncoder]:
    tokens = tokenizer(folder)
    components = {
        **{"tokenizer": tokens, "text_encoder": text_encoder(tokens)},
        **{"tokenizer_2": tokens, "text_encoder_2": projecting_text_encoder(tokens)},
    }
    return components, PromptEncoder.of_pipeline(components, image_size=(16, 24), **options)


def test_prompts_are_those_of_stable_diffusion(tmp_path: Path) -> None:
    encoder = one_encoder(tmp_path)
    components = {"tokenizer": encoder.tokenizers[0], "text_encoder": encoder.encoders[0]}
    others = dict.fromkeys(["vae", "unet", "scheduler", "safety_checker", "feature_extractor"])
    pipeline = StableDiffusionPipeline(**components, **others, requires_safety_checker=False)
    expected, null = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    made = encoder.encode(PROMPTS)
    assert set(made) == {"encoder_hidden_states"} and made["encoder_hidden_states"].shape == (4, MAX_TOKENS, 16)
    torch.testing.assert_close(made["encoder_hidden_states"], expected)
    torch.testing.assert_close(encoder.null()["encoder_hidden_states"], null[:1])
    assert not made["encoder_hidden_states"].requires_grad


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_are_those_of_sdxl(zeros: bool, tmp_path: Path) -> None:
    components, encoder = two_encoders(tmp_path, force_zeros_for_empty_prompt=zeros)
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, **components, force_zeros_for_empty_prompt=zeros, add_watermarker=False
    )
    states, null_states, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    made, null = encoder.encode(PROMPTS), encoder.null()
    torch.testing.assert_close(made["encoder_hidden_states"], states)
    torch.testing.assert_close(made["text_embeds"], pooled)
    torch.testing.assert_close(null["encoder_hidden_states"], null_states[:1])
    torch.testing.assert_close(null["text_embeds"], null_pooled[:1])
    assert (
        made["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 4
        and null["time_ids"].tolist() == made["time_ids"].tolist()[:1]
    )
    assert {name: values.shape[1:] for name, values in made.items()} == encoder.shapes


def test_prompts_are_those_of_ldm(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path, max_length=512)  # the pipeline takes 77 whatever the tokenizer says
    config = LDMBertConfig(
        **{"vocab_size": len(tokens), "max_position_embeddings": 77, "encoder_layers": 1, "encoder_ffn_dim": 16},
        **{"encoder_attention_heads": 2, "head_dim": 4, "d_model": 8, "pad_token_id": tokens.pad_token_id},
    )
    bert = LDMBertModel(config)
    encoder = PromptEncoder.of_pipeline({"tokenizer": tokens, "bert": bert}, max_length=77)
    ids = tokens(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    torch.testing.assert_close(encoder.encode(PROMPTS)["encoder_hidden_states"], bert.eval()(ids)[0].detach())
    assert encoder.shapes == {"encoder_hidden_states": (77, 8)}


@pytest.mark.parametrize("kind", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_prompts_are_those_of_pixart(kind: type) -> None:
    """In lower case, cut to the pipeline's limit, with the mask of their tokens and, where the model takes them, sizes."""
    tokens, limit = t5_tokenizer(), LAYOUTS[kind.__name__].max_length
    components = {"tokenizer": tokens, "text_encoder": t5_encoder(tokens)}
    encoder = PromptEncoder.of_pipeline(components, (16, 24), max_length=limit, takes={"resolution": torch.zeros(1, 2)})
    prompts = ["Ab CD ", "", "a", "b" * (limit + 5)]
    assert encoder.count_long(prompts) == 1
    pipeline = kind(vae=None, transformer=None, scheduler=None, **components)
    states, mask, null_states, null_mask = pipeline.encode_prompt(prompts, device="cpu")
    made, null = encoder.encode(prompts), encoder.null()
    torch.testing.assert_close(made["encoder_hidden_states"], states)
    torch.testing.assert_close(null["encoder_hidden_states"], null_states[:1])
    assert torch.equal(made["encoder_attention_mask"], mask) and torch.equal(null["encoder_attention_mask"], null_mask[:1])
    assert made["encoder_attention_mask"].sum(dim=1).tolist() == [7, 1, 3, limit]  # each word has a mark of its start
    assert made["resolution"].tolist() == [[16, 24]] * 4 and null["aspect_ratio"].tolist() == [[pytest.approx(16 / 24)]]
    assert {name: values.shape[1:] for name, values in made.items()} == encoder.shapes
    assert {name: values.dtype for name, values in encoder.encode([]).items()} == {n: v.dtype for n, v in made.items()}
    plain = PromptEncoder.of_pipeline(components, max_length=limit)
    assert set(plain.encode(["a"])) == {"encoder_hidden_states", "encoder_attention_mask"}


@pytest.mark.parametrize("has_t5", [True, False])
def test_prompts_are_those_of_stable_diffusion_3(has_t5: bool, tmp_path: Path) -> None:
    """Tokens of CLIP, then those of T5 or as many zeros, all as wide as the model's."""
    pipeline, limit = sd3(tmp_path / "sd3", has_t5), LAYOUTS["StableDiffusion3Pipeline"].max_length
    takes = {"encoder_hidden_states": torch.zeros(1, 9, 44), "pooled_projections": torch.zeros(1, 24)}
    encoder = PromptEncoder.of_pipeline(pipeline.components, (16, 24), max_length=limit, takes=takes)
    encoder.check_fits(takes)
    prompts = ["Ab CD ", "", "a", "abcdefghijkl mnop"]
    states, null_states, pooled, null_pooled = pipeline.encode_prompt(prompts, None, None, device="cpu")
    made, null = encoder.encode(prompts), encoder.null()
    assert {name: values.shape[1:] for name, values in made.items()} == encoder.shapes
    assert encoder.shapes["encoder_hidden_states"] == (MAX_TOKENS + 256, 44)
    for found, wanted in (
        (made["encoder_hidden_states"], states),
        (made["pooled_projections"], pooled),
        (null["encoder_hidden_states"], null_states[:1]),
        (null["pooled_projections"], null_pooled[:1]),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert encoder.limits == (MAX_TOKENS, MAX_TOKENS, 256)[: 3 if has_t5 else 2] and encoder.count_long(prompts) == 1
    assert bool((made["encoder_hidden_states"][:, MAX_TOKENS:] == 0).all()) != has_t5


def test_other_text_encoders_of_stable_diffusion_3_are_refused(tmp_path: Path) -> None:
    components = three_text_encoders(tmp_path, width=36)
    takes = {"encoder_hidden_states": torch.zeros(1, 9, 44), "pooled_projections": torch.zeros(1, 24)}
    with pytest.raises(ValueError, match="CLIP have width 40 side by side, more than the 36 of T5"):
        PromptEncoder.of_pipeline(components, max_length=256, takes=takes)
    first = {name: value for name, value in components.items() if not name.endswith("_2")}
    with pytest.raises(ValueError, match="are CLIPTextModelWithProjection, T5EncoderModel, but must be .*, or without T5"):
        PromptEncoder.of_pipeline(first, max_length=256, takes=takes)
    wider = PromptEncoder.of_pipeline(three_text_encoders(tmp_path, width=48), max_length=256, takes=takes)
    with pytest.raises(ValueError, match="have width 48, but the model needs 44: it is the text encoder of another model"):
        wider.check_fits(takes)


def test_prompts_do_not_depend_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = one_encoder(tmp_path)
    whole = encoder.encode(PROMPTS)["encoder_hidden_states"]
    monkeypatch.setattr("diffusers_gfprune.diffusion.prompts.BATCH_SIZE", 3)
    torch.testing.assert_close(encoder.encode(PROMPTS)["encoder_hidden_states"], whole)
    torch.testing.assert_close(encoder.encode(PROMPTS[2:3])["encoder_hidden_states"], whole[2:3])
    assert not torch.allclose(whole[0], whole[1])
    assert encoder.encode([])["encoder_hidden_states"].shape == (0, MAX_TOKENS, 16)


def test_long_prompts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A word of n letters has n tokens, and each prompt has a start and an end."""
    encoder = one_encoder(tmp_path)
    fits = "a" * (MAX_TOKENS - 2)
    assert encoder.count_long([fits, fits + "a", "", fits + " b"]) == 2
    with caplog.at_level(logging.WARNING):
        encoder.warn_of_long([fits, ""])
        assert caplog.messages == []
        encoder.warn_of_long([fits, fits + "a"], "captions")
    (line,) = caplog.messages
    assert line == "1 of 2 captions are longer than the limit of 8 tokens: they are cut, as in Diffusers' pipelines"


def test_text_encoders_of_other_models_are_refused(tmp_path: Path) -> None:
    encoder = one_encoder(tmp_path)
    encoder.check_fits({"encoder_hidden_states": torch.zeros(1, 77, 16)})
    with pytest.raises(ValueError, match="have width 16, but the model needs 32: it is the text encoder of another model"):
        encoder.check_fits({"encoder_hidden_states": torch.zeros(1, 77, 32)})
    with pytest.raises(ValueError, match="the model needs text_embeds, which the text encoder does not make"):
        encoder.check_fits({"encoder_hidden_states": torch.zeros(1, 77, 16), "text_embeds": torch.zeros(1, 12)})
    with pytest.raises(ValueError, match="the text encoder makes encoder_hidden_states, which the model does not take"):
        encoder.check_fits({})
    _, pooled = two_encoders(tmp_path)
    wanted = {"encoder_hidden_states": torch.zeros(1, 77, 40), "text_embeds": torch.zeros(1, 12)}
    pooled.check_fits({**wanted, "time_ids": torch.zeros(1, 6)})
    with pytest.raises(ValueError, match="text_embeds of the text encoder have width 12, but the model needs 13"):
        pooled.check_fits({**wanted, "text_embeds": torch.zeros(1, 13), "time_ids": torch.zeros(1, 6)})


def test_other_components_are_refused(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path)
    assert PromptEncoder.of_pipeline({"vae": object(), "text_encoder": None}) is None
    for components, message in (
        ({"tokenizer_2": tokens, "text_encoder_2": projecting_text_encoder(tokens)}, "are CLIPTextModelWithProjection, but"),
        ({"text_encoder": text_encoder(tokens)}, "1 text encoders need as many tokenizers"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptEncoder.of_pipeline(components)
    with pytest.raises(ValueError, match="image_size=None must be height and width"):
        PromptEncoder([tokens] * 2, [text_encoder(tokens), projecting_text_encoder(tokens)])


def test_identity_follows_encoder_and_tokenizer(tmp_path: Path) -> None:
    encoder = one_encoder(tmp_path / "a")
    before = encoder.identity()
    encoder.encode(PROMPTS)  # a tokenizer remembers its last padding
    tokens = tokenizer(tmp_path / "a")
    identities = [
        PromptEncoder([tokens], [text_encoder(tokens)]).identity(),
        PromptEncoder([tokens], [text_encoder(tokens, seed=1)]).identity(),
        PromptEncoder([tokenizer(tmp_path / "b", words=("zero",))], [text_encoder(tokens)]).identity(),
        PromptEncoder([tokens], [text_encoder(tokens)], max_length=4).identity(),
    ]
    assert identities[0] == before == one_encoder(tmp_path / "a").identity()
    assert len({str(identity) for identity in identities}) == 4


def test_identity_of_several_encoders_follows_each_of_them(tmp_path: Path) -> None:
    """And what "no prompt" is: the empty prompt, or zeros."""
    components, encoder = two_encoders(tmp_path / "a")
    other = {**components, "text_encoder_2": projecting_text_encoder(components["tokenizer_2"], seed=7)}
    others = [
        two_encoders(tmp_path / "a", force_zeros_for_empty_prompt=False)[1],
        PromptEncoder.of_pipeline(other, image_size=(16, 24)),
        PromptEncoder.of_pipeline({**components, "tokenizer_2": tokenizer(tmp_path / "b", words=("zero",))}, (16, 24)),
    ]
    assert encoder.identity() == two_encoders(tmp_path / "a")[1].identity()
    assert len({str(each.identity()) for each in (encoder, *others)}) == 4


def test_identity_of_joined_encoders_follows_their_width(tmp_path: Path) -> None:
    """Without T5, tokens of CLIP are filled up with zeros to the width of the model."""
    parts = {name: part for name, part in three_text_encoders(tmp_path).items() if not name.endswith("_3")}

    def identity(width: int) -> dict:
        takes = {"encoder_hidden_states": torch.zeros(1, 9, width), "pooled_projections": torch.zeros(1, 24)}
        return PromptEncoder.of_pipeline(parts, max_length=16, takes=takes).identity()

    assert identity(44) == identity(44) != identity(48)
