"""families/pixart_transformer_2d.py: what is pruned of PixArt, and what is refused."""

from __future__ import annotations

import copy
import functools
import json
import time
from pathlib import Path

import pytest
import torch
import torch_pruning
from diffusers import PixArtTransformer2DModel, Transformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_gfprune import GFPrunedPixArtTransformer2DModel
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.families.pixart_transformer_2d import LIMITS, TEXT_TOKENS, PixArtTransformer2DFamily
from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.pruning.blocks import trace_groups
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from helpers.architectures import NoMemory, random_masks
from helpers.families import PIXART, SIZES, build, inputs, pruned, run, traced
from helpers.plans import check_plans, fields

FIELDS = fields(PixArtTransformer2DModel)
BLOCK = "transformer_blocks.0"
NAN, INF = float("nan"), float("inf")
# PixArt-alpha/PixArt-XL-2-1024-MS and PixArt-Sigma-XL-2-1024-MS, by all that differs from the defaults
ALPHA = {"caption_channels": 4096}
SIGMA = {"caption_channels": 4096, "use_additional_conditions": False}

# --- what is pruned ----------------------------------------------------------------------------------------------------


def test_groups_are_the_ones_worked_out_by_hand() -> None:
    """Both attentions and the feed-forward layer of each block, and the embeddings of time, sizes and text."""
    wanted = [("attn1.to_q", 24, 3), ("attn2.to_q", 24, 3), ("ff.net.0.proj", 96, 1)]
    blocks = [(f"transformer_blocks.{index}.{name}", *rest) for index in range(2) for name, *rest in wanted]
    embedders = [("timestep", 24), ("resolution", 8), ("aspect_ratio", 8)]
    shared = [(f"adaln_single.emb.{name}_embedder.linear_1", width, 1) for name, width in embedders]
    found = [(group.name, group.num_channels, group.heads) for group in traced("pixart", "sizes")]
    assert found == [*blocks, *shared, ("caption_projection.linear_1", 24, 1)]


def test_hidden_states_and_the_projected_text_keep_their_width() -> None:
    """The model views the text as tokens of the width of its hidden states; text that is not projected is given."""
    for name in ("base", "text-as-it-is"):
        sides = {(piece.module, piece.role) for group in traced("pixart", name) for piece in group.slices}
        assert not [module for module, role in sides if role == "input" and module.endswith(("attn2.to_k", "attn1.to_q"))]
        kept = ("caption_projection.linear_2", "adaln_single.linear", "pos_embed.proj", f"{BLOCK}.ff.net.2")
        assert not [module for module, role in sides if role == "output" and module in kept]


def test_a_removed_block_takes_its_table_with_it() -> None:
    """The tables of offsets are parameters of the blocks themselves."""
    small = GFPrunedPixArtTransformer2DModel(**PIXART, removed_blocks=["transformer_blocks.1"])
    names = [name for name, _ in small.named_parameters() if name.endswith("scale_shift_table")]
    assert names == ["scale_shift_table", f"{BLOCK}.scale_shift_table"]
    table = small.transformer_blocks[0].scale_shift_table
    assert table.shape == (6, 32) and 0.5 * 32**-0.5 < table.std() < 2 * 32**-0.5


def test_learned_variances_are_no_part_of_the_prediction() -> None:
    model = build("pixart")
    found = family_of(model).predict(model, inputs(model))
    assert torch.equal(found, run(model)[:, :4])


def test_samples_that_are_not_square() -> None:
    """Positions are computed anew for other sizes, also in the pruned model."""
    model = pruned("pixart")
    family = family_of(model)
    with torch.no_grad():
        assert family.predict(model, family.example_inputs(model, 6, 10)).shape == (1, 4, 6, 10)
    with pytest.raises(ValueError, match="samples of 8x9 must have sides that are multiples of patch_size=2"):
        family.example_inputs(model, 8, 9)


@functools.lru_cache
def published(name: str) -> PixArtTransformer2DModel:
    """PixArt-XL-2-1024-MS, or PixArt-Sigma-XL-2-1024-MS."""
    with torch.device("meta"):
        return PixArtTransformer2DModel(**(ALPHA if name == "alpha" else SIGMA)).eval()


@pytest.mark.parametrize(("name", "parameters"), [("alpha", 611_349_152), ("sigma", 610_856_096)])
def test_published_models_are_traced(name: str, parameters: int) -> None:
    model = published(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    start = time.process_time()
    groups = trace_groups(model, "allow")
    assert time.process_time() - start < 5
    assert len(groups) == 3 * 28 + {"alpha": 4, "sigma": 2}[name] + 27


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_published_models_are_planned(name: str) -> None:
    check_plans(published(name), trace_channel_groups(published(name)), "heads")


def test_macs_of_the_published_model() -> None:
    """PyTorch's counter has the products of attention on the meta device, Torch-Pruning's leaves them out."""
    model, side = published("alpha"), 64
    family = family_of(model)
    given = family.example_inputs(model, side, side, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        family.predict(model, given)
    macs = count_macs(model, side)
    assert 2 * macs == pytest.approx(counter.get_total_flops(), rel=0.01)
    tokens = (side // 2) ** 2
    products = 28 * 2 * 1152 * tokens * (tokens + TEXT_TOKENS)
    small = PixArtTransformer2DModel(**{**PIXART, "num_layers": 1}).eval()
    assert 0.3 * macs > products > 0.05 * macs
    text = family.example_inputs(small, 8, 8)
    theirs, _ = torch_pruning.utils.count_ops_and_params(
        small, {"hidden_states": text.sample, "timestep": text.timesteps, **text.conditioning}
    )
    products = 2 * 32 * 16 * (16 + TEXT_TOKENS)
    assert count_macs(small) - products == pytest.approx(theirs, rel=0.01)


# --- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    *[
        (name, value)
        for name in ("num_attention_heads", "num_layers", "patch_size")
        for value in (0, -1, 10**9, 2.0, "4", None)
    ],
    *[("attention_head_dim", value) for value in (0, -8, 8.0, 10**9, 2**15, NAN)],
    *[("in_channels", value) for value in (0, -1, 10**9, True)],
    *[("out_channels", value) for value in (0, 3, 5, 12, "8")],
    *[("sample_size", value) for value in (0, -8, 7, 10**9, "8", [8, 8], None, 2**14)],
    *[("cross_attention_dim", value) for value in (0, None, 10**9, 24, "32", [32])],
    *[("caption_channels", value) for value in (0, -1, 10**9, 1.5, "12")],
    *[("num_embeds_ada_norm", value) for value in (0, None, 10**9)],
    *[("interpolation_scale", value) for value in (0, -1, NAN, INF, "2")],
    *[("use_additional_conditions", value) for value in (1, "yes", True)],  # a hidden size of 32 has no thirds
    *[("norm_eps", value) for value in (0, -1.0, NAN, INF, "1e-5", None)],
    *[("dropout", value) for value in (-0.1, 1.5, NAN)],
    *[("activation_fn", value) for value in ("relu", "", None, 1)],
    *[("attention_type", value) for value in ("gated", "gated-text-image", 1)],
    *[("norm_type", value) for value in ("layer_norm", "ada_norm_zero", None)],
    *[(name, 1) for name in ("attention_bias", "upcast_attention", "norm_elementwise_affine")],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name_before_anything_is_allocated(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=") as error, NoMemory():
        GFPrunedPixArtTransformer2DModel(**{**PIXART, name: value})
    assert "\n" not in str(error.value) and "must be" in str(error.value)


def test_every_argument_has_a_check() -> None:
    assert sorted({"sample_size", *LIMITS.integers, *LIMITS.numbers, *LIMITS.choices}) == sorted(FIELDS)
    defaults = {name: parameter.default for name, parameter in FIELDS.items()}
    PixArtTransformer2DFamily().check_arguments({**defaults, "later": [1, "word"]})
    with pytest.raises(ValueError, match=r"^later=.* must be a finite number"):
        PixArtTransformer2DFamily().check_arguments({**defaults, "later": {}})


def tables(**channels: list[int]) -> dict:
    return {"layer_channels": {f"{BLOCK}.{name.replace('__', '.')}": value for name, value in channels.items()}}


TEXT = {"attn2__to_q": [32, 16], "attn2__to_k": [32, 16], "attn2__to_v": [32, 16], "attn2__to_out__0": [16, 32]}
PROJECTION = {"caption_projection.linear_1": [12, 20], "caption_projection.linear_2": [20, 32]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (tables(ff__net__0__proj=[32, 64]), f"{BLOCK}.ff.net.2 has 128 input channels, but must have 64"),
        (tables(ff__net__2=[128, 16]), f"{BLOCK}.ff.net.2 has 16 output channels, but must have 32"),
        (tables(**{**TEXT, "attn2__to_k": [32, 8]}), f"{BLOCK}.attn2.to_k has 8 output channels, but must have 16"),
        (tables(**{**TEXT, "attn2__to_v": [16, 16]}), f"{BLOCK}.attn2.to_v has 16 input channels, but must have 32"),
        (
            {"layer_channels": {"adaln_single.linear": [32, 186]}},
            "adaln_single.linear has 186 output channels, but must have 192",
        ),
        (
            {"layer_channels": {"adaln_single.emb.timestep_embedder.linear_2": [32, 16]}},
            "has 16 output channels, but must have 32",
        ),
        (
            {"layer_channels": {**PROJECTION, "caption_projection.linear_2": [20, 16]}},
            "linear_2 has 16 output channels, but must",
        ),
        (
            {"layer_channels": {**PROJECTION, "caption_projection.linear_1": [8, 20]}},
            "linear_1 has 8 input channels, but must",
        ),
        ({"layer_channels": {"pos_embed.proj": [4, 16]}}, "pos_embed.proj has 16 output channels, but must have 32"),
        ({"layer_channels": {"pos_embed.proj": [2, 32]}}, "changes 4 channels that are never pruned"),
        ({"layer_channels": {"proj_out": [32, 16]}}, "changes 32 channels that are never pruned"),
        ({"attention_heads": {f"{BLOCK}.attn2": 3}}, "divide 32 channels"),
        ({"removed_blocks": [BLOCK]}, "which is not a block that can be removed"),
        ({"removed_blocks": [f"{BLOCK}.attn2"]}, "which is not a block that can be removed"),
    ],
)
def test_tables_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    right = tables(**TEXT)
    GFPrunedPixArtTransformer2DModel(**PIXART, layer_channels={**right["layer_channels"], **PROJECTION})
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedPixArtTransformer2DModel(**PIXART, **arguments)


def test_embeddings_of_sizes_that_do_not_fit_are_refused() -> None:
    name = "adaln_single.emb.resolution_embedder.linear_2"
    with pytest.raises(ValueError, match=f"{name} has 6 output channels, but must have 8"), NoMemory():
        GFPrunedPixArtTransformer2DModel(**{**PIXART, **SIZES}, layer_channels={name: [8, 6]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": None, "caption_channels": None}, "^cross_attention_dim=None must be an integer"),
        ({"attention_type": "gated"}, "^attention_type=gated must be default"),
        ({"out_channels": 6}, "^out_channels=6 must be"),
        ({"sample_size": 9}, "^sample_size=9 must be"),
    ],
)
def test_dense_models_that_cannot_be_pruned_are_refused(change: dict, message: str) -> None:
    model = PixArtTransformer2DModel(**{**PIXART, **change})
    with pytest.raises(ValueError, match=message):
        trace_channel_groups(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("base", {"encoder_hidden_states": None}, "the model needs encoder_hidden_states, but the batch has none"),
        ("base", {"encoder_hidden_states": torch.zeros(2, 5, 8)}, r"shape \(2, 5, 8\), but .* need \(2, 5, 12\)"),
        ("base", {"encoder_hidden_states": torch.zeros(2, 120, 12).long()}, "encoder_hidden_states have dtype torch.int64"),
        ("base", {"encoder_attention_mask": torch.ones(2, 4).long()}, r"have shape \(2, 4\), .* need \(2, 120\)"),
        ("base", {"encoder_attention_mask": torch.ones(2, 120)}, "encoder_attention_mask have dtype torch.float32"),
        ("base", {"encoder_attention_mask": torch.full((2, 120), 2)}, "encoder_attention_mask range from 2 to 2"),
        ("base", {"resolution": torch.zeros(2, 2)}, "has resolution, which this PixArtTransformer2DModel does not take"),
        ("base", {"class_labels": torch.zeros(2)}, "has class_labels, which this PixArtTransformer2DModel does not take"),
        ("sizes", {"aspect_ratio": None}, "the model needs aspect_ratio, but the batch has none"),
        ("sizes", {"resolution": torch.zeros(2, 1)}, r"resolution have shape \(2, 1\), .* need \(2, 2\)"),
    ],
)
def test_conditioning_is_checked(name: str, change: dict, message: str) -> None:
    model = build("pixart", name)
    right = dict(inputs(model).conditioning)
    family_of(model).check_conditioning(model, right, 2)
    without = {key: value for key, value in right.items() if key != "encoder_attention_mask"}
    family_of(model).check_conditioning(model, without, 2)
    wrong = {key: value for key, value in {**right, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        family_of(model).check_conditioning(model, wrong, 2)


@pytest.mark.parametrize(
    ("pipeline", "size", "given", "reason"),
    [
        ("PixArtAlphaPipeline", 128, None, None),
        ("PixArtAlphaPipeline", 64, None, None),
        ("PixArtAlphaPipeline", 64, True, "the PixArtAlphaPipeline passes no resolution for sample_size=64"),
        ("PixArtSigmaPipeline", 128, False, None),
        ("PixArtSigmaPipeline", 128, None, "the PixArtSigmaPipeline passes no resolution"),
    ],
)
def test_pipelines_that_pass_no_sizes_are_refused(pipeline: str, size: int, given: bool | None, reason: str | None) -> None:
    config = {"sample_size": size, "use_additional_conditions": given}
    if reason is None:
        PixArtTransformer2DFamily().check_pipeline(config, pipeline)
        return
    with pytest.raises(ValueError, match=f"^use_additional_conditions={given} must be False: {reason}$"):
        PixArtTransformer2DFamily().check_pipeline(config, pipeline)


# --- features of Diffusers ---------------------------------------------------------------------------------------------


def test_models_of_the_earlier_class_are_the_same(tmp_path: Path) -> None:
    """Published repositories name it, with further arguments, which pruned models do not have."""
    model = build("pixart")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    earlier = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "only_cross_attention": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **earlier}))
    assert type(Transformer2DModel.from_pretrained(tmp_path)) is PixArtTransformer2DModel
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(model))
    groups = list(traced("pixart"))
    small = compact(loaded, plan_compaction(loaded, groups, random_masks(groups, 0)))
    assert small.config.keys() >= FIELDS.keys() and not small.config.keys() & earlier.keys() - {"_class_name"}


def test_training_with_gradient_checkpointing_and_fused_projections(tmp_path: Path) -> None:
    model = copy.deepcopy(pruned("pixart", "sizes"))
    known = run(model)
    model.train().enable_gradient_checkpointing()
    family_of(model).output(model, inputs(model)).square().sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    model.eval().fuse_qkv_projections()
    torch.testing.assert_close(run(model), known, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = GFPrunedPixArtTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded), known, rtol=1e-4, atol=1e-4)
    assert not isinstance(loaded.pos_embed.pos_embed, nn.Parameter)
