"""families/sd3_transformer_2d.py: what is pruned of Stable Diffusion 3, and what is refused."""

from __future__ import annotations

import copy
import functools
import time
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_gfprune import GFPrunedSD3Transformer2DModel
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.families.sd3_transformer_2d import LIMITS, TEXT_TOKENS, SD3Transformer2DFamily
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.pruning.blocks import trace_groups
from diffusers_gfprune.pruning.budget import select_units, width_ladder
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.joint_search import Items
from helpers.architectures import NoMemory
from helpers.families import NORMS, SD3, build, inputs, pruned, run, traced
from helpers.plans import check_plans, fields

FIELDS = fields(SD3Transformer2DModel)
BLOCK = "transformer_blocks.0"
NAN = float("nan")
# stabilityai/stable-diffusion-3-medium and stable-diffusion-3.5-medium
LAYERS = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536}
PUBLISHED = {
    "3": {**LAYERS, "pos_embed_max_size": 192},
    "3.5": {**LAYERS, **NORMS, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
}

# --- what is pruned ----------------------------------------------------------------------------------------------------


def test_groups_are_the_ones_worked_out_by_hand() -> None:
    """Attentions and both feed-forward layers of each block, without the text's in the last, and the shared embedding."""
    wanted = [("attn.to_q", 4), ("attn2.to_q", 4), ("ff.net.0.proj", 128), ("ff_context.net.0.proj", 128)]
    blocks = [(f"transformer_blocks.{index}.{name}", units) for index in range(2) for name, units in wanted][:-1]
    shared = [(f"time_text_embed.{name}", 32) for name in ("timestep_embedder.linear_1", "timestep_embedder.linear_2")]
    shared.append(("time_text_embed.text_embedder.linear_1", 32))
    groups = traced("sd3", "norms-and-dual-attention")
    assert [(group.name, group.num_units) for group in groups] == [*shared, *blocks]
    assert [group.name for group in groups if group.heads != 1] == [name for name, units in blocks if units == 4]


def test_image_and_text_share_the_channels_of_a_head() -> None:
    (group,) = (group for group in traced("sd3") if group.name == f"{BLOCK}.attn.to_q")
    writes = {piece.module.rpartition(".")[2] for piece in group.slices if piece.role == "output"}
    reads = {piece.module.removeprefix(f"{BLOCK}.attn.") for piece in group.slices if piece.role == "input"}
    assert writes == {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    assert reads == {"to_out.0", "to_add_out"} and not group.whole_heads


def test_heads_with_normalized_queries_are_removed_whole() -> None:
    """For either unit of attention. Their root mean square would change without one of their channels."""
    (group,) = (group for group in traced("sd3", "norms-and-dual-attention") if group.name == f"{BLOCK}.attn2.to_q")
    assert group.whole_heads and group.units == tuple(tuple(range(8 * head, 8 * head + 8)) for head in range(4))
    for unit in ("head_dim", "heads"):
        assert width_ladder(group, 1, 0.0, unit) == [32, 24, 16, 8]
        assert select_units(group, torch.tensor([1.0, 3, 2, 0]), 16, unit).tolist() == [False, True, True, False]
        items = Items(group, unit)
        assert items.unit_of.tolist() == [0, 1, 2, 3] and items.sizes.tolist() == [8] * 4 and items.parts.shape == (1, 4)


def test_removed_blocks_pass_on_both_streams() -> None:
    small = GFPrunedSD3Transformer2DModel(**{**SD3, "num_layers": 3}, removed_blocks=["transformer_blocks.1"])
    image, text = torch.randn(1, 4, 32), torch.randn(1, 5, 32)
    for found in (
        small.transformer_blocks[1](hidden_states=image, encoder_hidden_states=text, temb=torch.zeros(1, 32)),
        small.transformer_blocks[1](image, text, torch.zeros(1, 32), None),
    ):
        assert found[0] is text and found[1] is image
    assert small.transformer_blocks[1].context_pre_only is False


def test_samples_that_are_not_square() -> None:
    """The middle of the positions of the largest sample, also in the pruned model."""
    model = pruned("sd3")
    family = family_of(model)
    with torch.no_grad():
        assert family.predict(model, family.example_inputs(model, 6, 10)).shape == (1, 4, 6, 10)
    for height, width in ((8, 9), (8, 14)):
        with pytest.raises(ValueError, match=f"samples of {height}x{width} must have .* multiples of patch_size=2, up to 12"):
            family.example_inputs(model, height, width)


def test_fresh_models_have_positions_and_norms_as_in_diffusers() -> None:
    model, stock = GFPrunedSD3Transformer2DModel(**{**SD3, **NORMS}), SD3Transformer2DModel(**{**SD3, **NORMS})
    assert torch.equal(model.pos_embed.pos_embed, stock.pos_embed.pos_embed)
    assert "pos_embed.pos_embed" in model.state_dict()
    assert torch.equal(model.transformer_blocks[0].attn.norm_added_k.weight, torch.ones(8))


@functools.lru_cache
def published(name: str) -> SD3Transformer2DModel:
    """Stable Diffusion 3 or 3.5 medium."""
    with torch.device("meta"):
        return SD3Transformer2DModel(**PUBLISHED[name]).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters"), [("3", 2_028_328_000), ("3.5", 2_243_171_520)])
def test_published_models_are_traced(name: str, parameters: int) -> None:
    model = published(name)
    assert count_parameters(model) == parameters
    SD3Transformer2DFamily().check_arguments({key: value for key, value in model.config.items() if not key.startswith("_")})
    start = time.process_time()
    groups = trace_groups(model, "allow")
    assert time.process_time() - start < 15  # about 3 on an idle core
    seconds = {"3": 0, "3.5": 13}[name]
    assert len(groups) == 3 + (3 * 24 - 1) + seconds + 22


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_planned(name: str) -> None:
    check_plans(published(name), trace_channel_groups(published(name)), "heads")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_of_published_models(name: str) -> None:
    """By PyTorch's counter, which has the products of attention."""
    model, side = published(name), 64
    family, counter = family_of(model), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        family.predict(model, family.example_inputs(model, side, side, device="meta"))
    macs = count_macs(model, side)
    assert 2 * macs == pytest.approx(counter.get_total_flops(), rel=0.01)
    tokens = (side // 2) ** 2
    products = 2 * 1536 * (24 * (tokens + TEXT_TOKENS) ** 2 + {"3": 0, "3.5": 13}[name] * tokens**2)
    assert 0.3 * macs > products > 0.05 * macs


# --- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    *[
        (name, value)
        for name in ("num_attention_heads", "num_layers", "patch_size", "pooled_projection_dim", "joint_attention_dim")
        for value in (0, -1, 10**9, 2.0, "4", None)
    ],
    *[("attention_head_dim", value) for value in (0, -8, 8.0, 10**9, 2**15, NAN)],
    *[("in_channels", value) for value in (0, -1, 10**9, True)],
    *[("out_channels", value) for value in (0, 3, 8, "4")],
    *[("sample_size", value) for value in (0, -8, 7, 10**9, "8", [8, 8], None, 2**14)],
    *[("caption_projection_dim", value) for value in (0, None, 10**9, 24, "32", [32])],
    *[("pos_embed_max_size", value) for value in (0, None, 3, 10**9, 2**14, 6.0, "6")],
    *[("dual_attention_layers", value) for value in (None, 1, "01", [2], [-1], [0, 0], [True], [[0]], [0.0], [0] * 10**5)],
    *[("qk_norm", value) for value in ("layer_norm", "l2", "", 1, True, ["rms_norm"])],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name_before_anything_is_allocated(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=") as error, NoMemory():
        GFPrunedSD3Transformer2DModel(**{**SD3, name: value})
    assert "\n" not in str(error.value) and "must be" in str(error.value)


def test_every_argument_has_a_check() -> None:
    names = {"sample_size", "dual_attention_layers", *LIMITS.integers, *LIMITS.numbers, *LIMITS.choices}
    assert sorted(names) == sorted(FIELDS)
    defaults = {name: parameter.default for name, parameter in FIELDS.items()}
    SD3Transformer2DFamily().check_arguments({**defaults, "later": [1, "word"]})
    with pytest.raises(ValueError, match=r"^later=.* must be a finite number"):
        SD3Transformer2DFamily().check_arguments({**defaults, "later": {}})


def tables(**channels: list[int]) -> dict:
    return {"layer_channels": {f"{BLOCK}.{name.replace('__', '.')}": value for name, value in channels.items()}}


WRITES, READS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"), ("to_out__0", "to_add_out")
JOINT = {**{f"attn__{name}": [32, 16] for name in WRITES}, **{f"attn__{name}": [16, 32] for name in READS}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (tables(ff__net__0__proj=[32, 64]), f"{BLOCK}.ff.net.2 has 128 input channels, but must have 64"),
        (tables(ff_context__net__2=[128, 16]), f"{BLOCK}.ff_context.net.2 has 16 output channels, but must have 32"),
        (tables(**{**JOINT, "attn__to_k": [32, 8]}), f"{BLOCK}.attn.to_k has 8 output channels, but must have 16"),
        (tables(**{**JOINT, "attn__add_v_proj": [32, 8]}), f"{BLOCK}.attn.add_v_proj has 8 output channels, but must have 16"),
        (
            tables(**{**JOINT, "attn__add_q_proj": [16, 16]}),
            f"{BLOCK}.attn.add_q_proj has 16 input channels, but must have 32",
        ),
        (tables(**{**JOINT, "attn__to_add_out": [8, 32]}), f"{BLOCK}.attn.to_add_out has 8 input channels, but must have 16"),
        (tables(norm1__linear=[32, 96]), f"{BLOCK}.norm1.linear has 96 output channels, but must have 192"),
        (tables(norm1_context__linear=[16, 192]), f"{BLOCK}.norm1_context.linear has 16 input channels, but must have 32"),
        (
            {"layer_channels": {"time_text_embed.text_embedder.linear_2": [32, 16]}},
            "text_embedder.linear_2 has 16 output channels, but must have 32",
        ),
        ({"layer_channels": {"norm_out.linear": [32, 32]}}, "norm_out.linear has 32 output channels, but must have 64"),
        ({"layer_channels": {"context_embedder": [12, 16]}}, "context_embedder has 16 output channels, but must have 32"),
        ({"layer_channels": {"context_embedder": [6, 32]}}, "changes 12 channels that are never pruned"),
        ({"layer_channels": {"pos_embed.proj": [2, 32]}}, "changes 4 channels that are never pruned"),
        ({"layer_channels": {"proj_out": [32, 8]}}, "changes 16 channels that are never pruned"),
        ({"attention_heads": {f"{BLOCK}.attn": 3}}, "divide 32 channels"),
        ({"removed_blocks": [BLOCK]}, "which is not a block that can be removed"),
        ({"removed_blocks": ["transformer_blocks.1"]}, "which is not a block that can be removed"),
    ],
)
def test_tables_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    GFPrunedSD3Transformer2DModel(**SD3, **tables(**JOINT))
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedSD3Transformer2DModel(**SD3, **arguments)


def test_narrower_heads_with_norms_are_refused() -> None:
    """The norms are as wide as the heads of the dense model."""
    right = {**tables(**JOINT), "attention_heads": {f"{BLOCK}.attn": 2}}
    GFPrunedSD3Transformer2DModel(**SD3, **NORMS, **right)
    with (
        pytest.raises(ValueError, match="attn.to_q has 16 output channels, but must have 32 with 4 heads and qk_norm"),
        NoMemory(),
    ):
        GFPrunedSD3Transformer2DModel(**SD3, **NORMS, **tables(**JOINT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 8}, "^out_channels=8 must be in_channels=4"),
        ({"qk_norm": "layer_norm"}, "^qk_norm='layer_norm' must be None or rms_norm"),
        ({"pos_embed_max_size": 3}, "^pos_embed_max_size=3 must be at least the 4 patches"),
        ({"caption_projection_dim": 24}, "^caption_projection_dim=24 must be the hidden size 32"),
    ],
)
def test_dense_models_that_cannot_be_pruned_are_refused(change: dict, message: str) -> None:
    with torch.device("meta"):
        model = SD3Transformer2DModel(**{**SD3, **change})
    with pytest.raises(ValueError, match=message):
        trace_channel_groups(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_hidden_states": None}, "the model needs encoder_hidden_states, but the batch has none"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 8)}, r"shape \(2, 5, 8\), but .* need \(2, 5, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 12).long()}, "encoder_hidden_states have dtype torch.int64"),
        ({"pooled_projections": torch.zeros(2, 8)}, r"pooled_projections have shape \(2, 8\), .* need \(2, 10\)"),
        ({"text_embeds": torch.zeros(2, 8)}, "has text_embeds, which an SD3Transformer2DModel does not take"),
    ],
)
def test_conditioning_is_checked(change: dict, message: str) -> None:
    model = build("sd3")
    right = dict(inputs(model).conditioning)
    family_of(model).check_conditioning(model, right, 2)
    wrong = {key: value for key, value in {**right, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        family_of(model).check_conditioning(model, wrong, 2)


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(ValueError, match="a DiTPipeline has no SD3Transformer2DModel; .*: StableDiffusion3Pipeline"):
        SD3Transformer2DFamily().check_pipeline({}, "DiTPipeline")


# --- features of Diffusers ---------------------------------------------------------------------------------------------


def test_training_with_gradient_checkpointing_and_fused_projections(tmp_path: Path) -> None:
    """Without norms and second attentions, which Diffusers' fused projections leave out."""
    model = copy.deepcopy(pruned("sd3"))
    known = run(model)
    model.train().enable_gradient_checkpointing()
    family_of(model).output(model, inputs(model)).square().sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    model.eval().fuse_qkv_projections()
    torch.testing.assert_close(run(model), known, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = GFPrunedSD3Transformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded), known, rtol=1e-4, atol=1e-4)


def test_layers_can_be_skipped_and_controlled() -> None:
    """Arguments of Diffusers' skip-layer guidance and ControlNets, with a removed block."""
    model = pruned("sd3", "four-layers", seed=1, depth="allow")
    assert model.config.removed_blocks
    sample, timesteps, conditioning = inputs(model)
    residuals = [torch.ones(2, 16, 32)] * 2
    with torch.no_grad():
        known = run(model)
        found = model(sample, timestep=timesteps, **conditioning, block_controlnet_hidden_states=residuals).sample
        skipped = model(sample, timestep=timesteps, **conditioning, skip_layers=[1]).sample
    assert found.shape == skipped.shape == known.shape and not torch.equal(found, known)
