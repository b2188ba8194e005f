"""families/unet_2d_condition.py: what is pruned of a conditional UNet, and what is refused."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from diffusers_gfprune import GFPrunedUNet2DConditionModel, GradientFlowPruner
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.families.unet_2d_condition import LIMITS, TRANSFORMER_LAYERS, UNet2DConditionFamily
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from helpers.architectures import NoMemory
from helpers.families import ARCHITECTURES, CONDITION, CROSS, TEXT_TIME, build, inputs, pruned, run, traced
from helpers.plans import check_plans, fields
from helpers.pruners import one_shot

FIELDS = fields(UNet2DConditionModel)
ATTENTION = "down_blocks.1.attentions.0"
BLOCK = f"{ATTENTION}.transformer_blocks.0"
NAN, INF = float("nan"), float("inf")

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# --- what is pruned ----------------------------------------------------------------------------------------------------


def groups_by_name(name: str = "base") -> dict:
    return {group.name: group for group in traced("condition", name)}


def test_groups_of_a_transformer_are_the_ones_worked_out_by_hand() -> None:
    """Two attentions and a feed-forward layer; its hidden states are in no group, the stream around it is."""
    groups = groups_by_name()
    inside = [name for name in groups if name.startswith(ATTENTION)]
    assert [(name.removeprefix(f"{ATTENTION}."), groups[name].num_channels, groups[name].heads) for name in inside] == [
        ("transformer_blocks.0.attn1.to_q", 32, 4),
        ("transformer_blocks.0.attn2.to_q", 32, 4),
        ("transformer_blocks.0.ff.net.0.proj", 128, 1),
        ("proj_out", 32, 1),  # the residual stream, which the group norm reads
    ]
    stream = {(piece.module, piece.role) for piece in groups[f"{ATTENTION}.proj_out"].slices}
    assert {(f"{ATTENTION}.norm", "norm"), (f"{ATTENTION}.proj_in", "input"), (f"{ATTENTION}.proj_out", "output")} <= stream
    outputs = {piece.module for group in groups.values() for piece in group.slices if piece.role == "output"}
    assert f"{ATTENTION}.proj_in" not in outputs and f"{BLOCK}.ff.net.2" not in outputs


def test_values_and_gates_go_together() -> None:
    group = groups_by_name()[f"{BLOCK}.ff.net.0.proj"]
    rows = [piece.positions for piece in group.slices if piece.name == f"{BLOCK}.ff.net.0.proj.weight"]
    assert rows == [tuple(range(128)), tuple(range(128, 256))]
    assert [piece.positions for piece in group.slices if piece.name == f"{BLOCK}.ff.net.2.weight"] == [tuple(range(128))]


def test_what_texts_and_conditions_are_given_in_stays() -> None:
    """Keys and values read the text; a projection of the text is pruned, one that is added to given sinusoids is not."""
    columns = {(piece.module, piece.dim) for group in traced("condition") for piece in group.slices}
    assert (f"{BLOCK}.attn2.to_k", 0) in columns and (f"{BLOCK}.attn2.to_k", 1) not in columns
    assert "encoder_hid_proj" in groups_by_name("projected-text")
    assert not any(
        piece.module.endswith("cond_proj") for group in traced("condition", "time-condition") for piece in group.slices
    )


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(SD15, 859_520_964, id="SD 1.5"),
        pytest.param(SDXL, 2_567_463_684, id="SDXL", marks=pytest.mark.slow),  # the plans take ten seconds
    ],
)
def test_published_models_are_planned(config: dict, parameters: int) -> None:
    """stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    start = time.process_time()
    groups = trace_channel_groups(model)
    assert time.process_time() - start < 5
    check_plans(model, groups, "head_dim", "heads")


# What the config.json of stable-diffusion-xl-base-1.0 leaves open, where Diffusers has other defaults or none
SDXL_NULLS = (
    *("class_embed_type", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type", "mid_block_only_cross_attention"),
    *("num_attention_heads", "num_class_embeds", "reverse_transformer_layers_per_block", "time_cond_proj_dim"),
    *("time_embedding_act_fn", "time_embedding_dim", "timestep_post_act", "upcast_attention"),
)


def test_the_nulls_of_sdxl_are_accepted() -> None:
    """Before and after pruning, as a `config.json` has them."""
    dense = UNet2DConditionModel(**{**CONDITION, **TEXT_TIME, **dict.fromkeys(SDXL_NULLS)}).eval()
    pruner = GradientFlowPruner(dense, one_shot(ratio=0.3, criterion="magnitude"))
    pruner.step(0, ())
    small = pruner.compact()
    config = {name: value for name, value in small.config.items() if not name.startswith("_")}
    assert all(config[name] is None for name in SDXL_NULLS)
    again = GFPrunedUNet2DConditionModel.from_config(config)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in small.parameters()]


OTHERS = {
    "SD 2.1": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        865_910_724,
    ),
    "SDXL refiner": (
        {
            **{key: SDXL[key] for key in ("use_linear_projection", "addition_embed_type", "addition_time_embed_dim")},
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [384, 768, 1536, 1536],
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        },
        2_259_526_660,
    ),
    "SSD-1B": (
        {
            **SDXL,
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        1_331_334_404,
    ),
    "BK-SDM-Small": ({"cross_attention_dim": 768, "layers_per_block": 1, "mid_block_type": None}, 482_346_884),
}


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("name", OTHERS)
def test_other_published_models_are_traced(name: str) -> None:
    config, parameters = OTHERS[name]
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    family_of(model).check_arguments({key: value for key, value in model.config.items() if not key.startswith("_")})
    groups = trace_channel_groups(model)
    covered = {(piece.name, piece.dim) for group in groups for piece in group.slices}
    assert {(f"{name}.weight", 0) for name, _ in model.named_modules() if name.endswith((".to_q", ".ff.net.0.proj"))} < covered


def test_text_and_time_are_nested() -> None:
    """The pipeline of SDXL passes them as `added_cond_kwargs`; a batch has one row of each for each image."""
    model = build("condition", "text-time")
    found = inputs(model)
    assert {name: tuple(value.shape[1:]) for name, value in found.conditioning.items()} == {
        "encoder_hidden_states": (77, 12),
        "text_embeds": (12,),
        "time_ids": (6,),
    }
    text, *added = found.conditioning.values()
    wanted = model(found.sample, found.timesteps, text, added_cond_kwargs=dict(zip(("text_embeds", "time_ids"), added))).sample
    assert torch.equal(family_of(model).predict(model, found), wanted)


# --- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    *[("sample_size", value) for value in (0, -8, 8.0, "8", [8], [8, -8], 10**9)],
    *[(name, value) for name in ("in_channels", "out_channels") for value in (0, -1, 10**9, None, 2.0)],
    *[("out_channels", value) for value in (3, 5, 9)],
    *[("block_out_channels", value) for value in (16, [], [16, 0], None, [16, "32"], [16] * 17)],
    *[
        ("down_block_types", value)
        for value in (["DownBlock2D"], "DownBlock2D", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"])
    ],
    *[("up_block_types", value) for value in (None, ["KUpBlock2D", "UpBlock2D"], ["SkipUpBlock2D", "UpBlock2D"])],
    *[("mid_block_type", value) for value in ("UNetMidBlock2DSimpleCrossAttn", "other", 1)],
    *[("only_cross_attention", value) for value in (1, [True], [True, 0], None)],
    *[("layers_per_block", value) for value in (0, [1], [1, 0], 65, None)],
    *[("norm_num_groups", value) for value in (3, 0, None)],
    *[("norm_eps", value) for value in (0, NAN, INF, None)],
    *[("cross_attention_dim", value) for value in (0, None, [12], [12, 8])],
    *[("transformer_layers_per_block", value) for value in (0, [1], [1, 0], None, 10**9, [1, [1, 1]], "1")],
    *[("reverse_transformer_layers_per_block", value) for value in (3, [1], [[1, 1], [1]], [[1, 0], [1, 1]])],
    *[("encoder_hid_dim_type", value) for value in ("text_image_proj", "image_proj", "ip_image_proj")],
    *[("attention_head_dim", value) for value in (0, 33, [4], [4, 0], None, 2.0)],
    ("num_attention_heads", 4),
    ("dual_cross_attention", True),
    *[("class_embed_type", value) for value in ("other", 1)],
    *[("addition_embed_type", value) for value in ("text", "text_image", "image", "image_hint")],
    *[("num_class_embeds", value) for value in (0, -1, 1.5)],
    *[("resnet_time_scale_shift", value) for value in ("ada_group", "spatial", None)],
    *[("resnet_out_scale_factor", value) for value in (0, INF)],
    *[("time_embedding_type", value) for value in ("learned", None)],
    *[("time_embedding_act_fn", value) for value in ("relu", 1)],
    *[(name, value) for name in ("conv_in_kernel", "conv_out_kernel") for value in (0, 2, 33, None)],
    *[("attention_type", value) for value in ("gated", "gated-text-image")],
    *[("cross_attention_norm", value) for value in ("layer_norm", "group_norm")],
    *[("freq_shift", value) for value in (8, -1, NAN)],
    *[(name, 1) for name in ("use_linear_projection", "upcast_attention", "center_input_sample", "class_embeddings_concat")],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name_before_anything_is_allocated(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=") as error, NoMemory():
        GFPrunedUNet2DConditionModel(**{**CONDITION, name: value})
    assert "\n" not in str(error.value) and "must be" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim=None must be an integer for"),
        ({**TEXT_TIME, "addition_time_embed_dim": None}, "addition_time_embed_dim=None must be an even integer"),
        ({**TEXT_TIME, "projection_class_embeddings_input_dim": 8}, "projection_class_embeddings_input_dim=8 must be larger"),
        ({**TEXT_TIME, "freq_shift": 4}, "freq_shift=4 must be a number from 0 to 3 for addition_time_embed_dim=8"),
        ({**TEXT_TIME, "class_embeddings_concat": True}, "class_embeddings_concat=True must be False"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim=None must be an integer"),
        ({"encoder_hid_dim": 8, "cross_attention_dim": [12, 12]}, "must be one integer"),
        ({"time_embedding_type": "fourier", "time_embedding_dim": 25}, "time_embedding_dim=25 must be even"),
        ({**CROSS, "transformer_layers_per_block": [[1], [1]]}, "reverse_transformer_layers_per_block=None must be a list"),
        ({"layers_per_block": 64, "transformer_layers_per_block": 64}, "transformer_layers_per_block=64 must be at most 256"),
    ],
)
def test_values_that_depend_on_others(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedUNet2DConditionModel(**{**CONDITION, **arguments})


def test_every_argument_has_a_check() -> None:
    known = {"sample_size", *TRANSFORMER_LAYERS, *LIMITS.integers, *LIMITS.numbers, *LIMITS.choices}
    assert sorted(known) == sorted(FIELDS)
    defaults = {name: parameter.default for name, parameter in FIELDS.items()}
    UNet2DConditionFamily().check_arguments({**defaults, "later": [1, "word"]})
    with pytest.raises(ValueError, match=r"^later=.* must be a finite number"):
        UNet2DConditionFamily().check_arguments({**defaults, "later": {}})


NARROW = {
    **{f"{BLOCK}.attn2.to_{letter}": [width, 16] for letter, width in (("q", 32), ("k", 12), ("v", 12))},
    f"{BLOCK}.attn2.to_out.0": [16, 32],
}


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({**NARROW, f"{BLOCK}.attn2.to_k": [12, 8]}, "attn2.to_k has 8 output channels, but must have 16"),
        ({**NARROW, f"{BLOCK}.attn2.to_k": [8, 16]}, "attn2.to_k has 8 input channels, but must have 12"),
        ({f"{BLOCK}.ff.net.0.proj": [32, 126]}, "ff.net.2 has 128 input channels, but must have 63"),
        ({f"{BLOCK}.ff.net.0.proj": [32, 127]}, "ff.net.0.proj has 127 output channels, but must have an even number"),
        ({f"{ATTENTION}.proj_in": [32, 16]}, "proj_in has 16 output channels, but must have 32"),
        ({f"{ATTENTION}.proj_out": [32, 16]}, "proj_out has 16 output channels, but must have 32"),
        ({"time_embedding.linear_2": [64, 32]}, "time_emb_proj has 64 input channels, but must have 32"),
        ({"conv_in": [2, 16]}, "changes 4 channels that are never pruned"),
    ],
)
def test_tables_that_do_not_fit_are_refused(channels: dict, message: str) -> None:
    GFPrunedUNet2DConditionModel(**CONDITION, layer_channels=NARROW)
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedUNet2DConditionModel(**CONDITION, layer_channels=channels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dual_cross_attention": True}, "dual_cross_attention=True cannot be pruned; it must be False"),
        ({"attention_type": "gated"}, "attention_type=gated cannot be pruned; it must be default"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type=UNetMidBlock2DSimpleCrossAttn cannot be pruned"),
        ({"in_channels": 9}, "out_channels=4 must be in_channels=9, or 18 with learned variances"),
        (
            {"addition_embed_type": "image", "encoder_hid_dim": 8},
            "addition_embed_type=image cannot be pruned; it must be one of",
        ),
    ],
)
def test_dense_models_that_cannot_be_pruned_are_refused(arguments: dict, message: str) -> None:
    model = UNet2DConditionModel(**{**CONDITION, **arguments})
    with pytest.raises(ValueError, match=f"^{message}"):
        trace_channel_groups(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("base", {"encoder_hidden_states": None}, "the model needs encoder_hidden_states, but the batch has none"),
        ("base", {"encoder_hidden_states": torch.zeros(2, 5, 8)}, r"shape \(2, 5, 8\), but .* need \(2, 5, 12\)"),
        ("base", {"encoder_hidden_states": torch.zeros(1, 5, 12)}, r"shape \(1, 5, 12\), but .* need \(2, 5, 12\)"),
        ("base", {"encoder_hidden_states": torch.zeros(2, 5, 12).long()}, "encoder_hidden_states have dtype torch.int64"),
        ("base", {"class_labels": torch.zeros(2)}, "has class_labels, which this UNet2DConditionModel does not take"),
        (
            "base",
            {"encoder_attention_mask": torch.ones(2, 4)},
            r"encoder_attention_mask have shape \(2, 4\), .* need \(2, 77\)",
        ),
        ("class-embedding", {"class_labels": torch.tensor([0, 10])}, "class_labels range from 0 to 10"),
        ("class-projection", {"class_labels": torch.zeros(2, 3)}, r"class_labels have shape \(2, 3\), but .* need \(2, 14\)"),
        ("text-time", {"time_ids": torch.zeros(2, 5)}, r"text_embeds have shape \(2, 12\), but .* need \(2, 20\)"),
        ("text-time", {"text_embeds": None}, "the model needs text_embeds"),
    ],
)
def test_conditioning_is_checked(name: str, change: dict, message: str) -> None:
    model = build("condition", name)
    right = dict(inputs(model).conditioning)
    family_of(model).check_conditioning(model, {**right, "encoder_attention_mask": torch.ones(2, 77)}, 2)
    wrong = {key: value for key, value in {**right, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        family_of(model).check_conditioning(model, wrong, 2)


# --- features of Diffusers ---------------------------------------------------------------------------------------------


def test_pipelines_keep_a_pruned_unet(tmp_path: Path) -> None:
    """Also in `from_pipe`, which looks at the exact class."""
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        unet=pruned("condition"), vae=vae, scheduler=DDIMScheduler(), **rest, requires_safety_checker=False
    )
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **rest, requires_safety_checker=False)
    assert type(loaded.unet) is GFPrunedUNet2DConditionModel
    assert torch.equal(run(loaded.unet), run(pruned("condition")))
    assert StableDiffusionImg2ImgPipeline.from_pipe(loaded).unet is loaded.unet


@pytest.mark.slow
def test_training_with_gradient_checkpointing_compiling_and_fused_projections(tmp_path: Path) -> None:
    model = copy.deepcopy(pruned("condition"))
    known, arguments = run(model), inputs(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(family_of(model).predict(compiled, arguments), known, rtol=1e-4, atol=1e-4)
    model.train().enable_gradient_checkpointing()
    family_of(model).predict(model, arguments).square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.eval().fuse_qkv_projections()
    torch.testing.assert_close(run(model), known, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded), known, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.get_submodule(BLOCK).attn2.to_kv.weight.add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn2.to_kv.weight differs from to_k and to_v"):
        GFPrunedUNet2DConditionModel.from_pretrained(tmp_path)


def test_static_attributes_follow_the_widths() -> None:
    """Diffusers reads some of them: slicing, IP adapters, samplers."""
    model = pruned("condition")
    for module in model.modules():
        if type(module).__name__ == "Attention":
            assert (module.inner_dim, module.query_dim) == (module.to_q.out_features, module.to_q.in_features)
            assert module.cross_attention_dim == module.to_k.in_features
        elif type(module).__name__ == "Transformer2DModel":
            assert module.in_channels == module.out_channels == module.norm.num_channels


def test_many_architectures_are_tried() -> None:
    assert len(ARCHITECTURES["condition"]) > 25
