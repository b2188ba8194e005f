"""families/dit_transformer_2d.py: what is pruned of a DiT, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from torch import nn

from diffusers_gfprune import GFPrunedDiTTransformer2DModel
from diffusers_gfprune.families.dit_transformer_2d import LIMITS, DiTTransformer2DFamily
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from helpers.architectures import NoMemory
from helpers.families import DIT, build, inputs, pruned, run, traced
from helpers.plans import check_plans, fields

FIELDS = fields(DiTTransformer2DModel)
BLOCK = "transformer_blocks.0"
NAN, INF = float("nan"), float("inf")

# --- what is pruned ----------------------------------------------------------------------------------------------------


def test_groups_are_the_ones_worked_out_by_hand() -> None:
    """Conditioning, attention and feed-forward of each block; hidden states, patches and outputs are in no group."""
    wanted = [
        ("norm1.emb.timestep_embedder.linear_1", 32, 1),
        ("norm1.emb.timestep_embedder.linear_2", 32, 1),
        ("attn1.to_q", 32, 4),
        ("ff.net.0.proj", 128, 1),
    ]
    blocks = [(f"transformer_blocks.{index}.{name}", *rest) for index in range(2) for name, *rest in wanted]
    assert [(group.name, group.num_channels, group.heads) for group in traced("dit")] == blocks


def test_the_first_blocks_conditioning_also_belongs_to_the_output() -> None:
    groups = {group.name: group for group in traced("dit")}
    read = {piece.module for piece in groups[f"{BLOCK}.norm1.emb.timestep_embedder.linear_2"].slices if piece.role == "input"}
    assert read == {f"{BLOCK}.norm1.linear", "proj_out_1"}


@pytest.mark.parametrize("name", ["geglu", "swiglu"])
def test_values_and_gates_go_together(name: str) -> None:
    group = next(group for group in traced("dit", name) if group.name == f"{BLOCK}.ff.net.0.proj")
    rows = [piece.positions for piece in group.slices if piece.name == f"{BLOCK}.ff.net.0.proj.weight"]
    assert rows == [tuple(range(128)), tuple(range(128, 256))]
    assert [piece.positions for piece in group.slices if piece.role == "input"] == [tuple(range(128))]


def test_learned_variances_are_no_part_of_the_prediction() -> None:
    model = build("dit", "learned-variances")
    found = family_of(model).predict(model, inputs(model))
    assert torch.equal(found, run(model)[:, :4])


def test_the_published_model_is_planned() -> None:
    """facebook/DiT-XL-2-256: 749.8M parameters in Diffusers' layout."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=8)
    assert sum(parameter.numel() for parameter in model.parameters()) == 749_826_464
    start = time.process_time()
    groups = trace_channel_groups(model)
    assert time.process_time() - start < 5
    check_plans(model, groups, "heads")


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
    *[("num_embeds_ada_norm", value) for value in (0, None, 10**9)],
    *[("norm_eps", value) for value in (0, -1.0, NAN, INF, "1e-5", None)],
    *[("dropout", value) for value in (-0.1, 1.5, NAN)],
    *[("activation_fn", value) for value in ("relu", "", None, 1)],
    *[("norm_type", value) for value in ("layer_norm", "ada_norm", None)],
    *[(name, 1) for name in ("attention_bias", "upcast_attention", "norm_elementwise_affine")],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name_before_anything_is_allocated(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=") as error, NoMemory():
        GFPrunedDiTTransformer2DModel(**{**DIT, name: value})
    assert "\n" not in str(error.value) and "must be" in str(error.value)


def test_every_argument_has_a_check() -> None:
    assert sorted({"sample_size", *LIMITS.integers, *LIMITS.numbers, *LIMITS.choices}) == sorted(FIELDS)
    defaults = {name: parameter.default for name, parameter in FIELDS.items()}
    DiTTransformer2DFamily().check_arguments({**defaults, "later": [1, "word"]})
    with pytest.raises(ValueError, match=r"^later=.* must be a finite number"):
        DiTTransformer2DFamily().check_arguments({**defaults, "later": {}})


def test_a_hidden_size_without_position_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match="^attention_head_dim=3 must be an integer whose product with num_attention_heads=2"):
        GFPrunedDiTTransformer2DModel(**{**DIT, "num_attention_heads": 2, "attention_head_dim": 3})


def tables(**channels: list[int]) -> dict:
    return {"layer_channels": {f"{BLOCK}.{name.replace('__', '.')}": value for name, value in channels.items()}}


ATTENTION = {"attn1__to_q": [32, 16], "attn1__to_k": [32, 16], "attn1__to_v": [32, 16], "attn1__to_out__0": [16, 32]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (tables(ff__net__0__proj=[32, 64]), f"{BLOCK}.ff.net.2 has 128 input channels, but must have 64"),
        (tables(ff__net__0__proj=[16, 128]), f"{BLOCK}.ff.net.0.proj has 16 input channels, but must have 32"),
        (tables(ff__net__2=[128, 16]), f"{BLOCK}.ff.net.2 has 16 output channels, but must have 32"),
        (tables(**{**ATTENTION, "attn1__to_k": [32, 8]}), f"{BLOCK}.attn1.to_k has 8 output channels, but must have 16"),
        (tables(norm1__linear=[16, 192]), f"{BLOCK}.norm1.linear has 16 input channels, but must have 32"),
        (tables(norm1__linear=[32, 186]), f"{BLOCK}.norm1.linear has 186 output channels, but must have 192"),
        ({"layer_channels": {"pos_embed.proj": [4, 16]}}, "pos_embed.proj has 16 output channels, but must have 32"),
        ({"layer_channels": {"pos_embed.proj": [2, 32]}}, "changes 4 channels that are never pruned"),
        ({"layer_channels": {"proj_out_2": [32, 12]}}, "changes 16 channels that are never pruned"),
        ({"attention_heads": {f"{BLOCK}.attn1": 3}}, "divide 32 channels"),
        ({"attention_heads": {f"{BLOCK}.ff": 1}}, "which is not an attention"),
        ({"norm_group_sizes": {"norm_out": [4]}}, "which is not a group norm"),
    ],
)
def test_tables_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    GFPrunedDiTTransformer2DModel(**DIT, **tables(**ATTENTION))
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedDiTTransformer2DModel(**DIT, **arguments)


def test_half_a_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="ff.net.0.proj has 63 output channels, but must have an even number"), NoMemory():
        GFPrunedDiTTransformer2DModel(**{**DIT, "activation_fn": "geglu"}, **tables(ff__net__0__proj=[32, 63]))


@pytest.mark.parametrize(("name", "value"), [("out_channels", 6), ("sample_size", 9)])
def test_dense_models_that_cannot_be_trained_are_refused(name: str, value: int) -> None:
    model = DiTTransformer2DModel(**{**DIT, name: value})
    with pytest.raises(ValueError, match=rf"^{name}={value} must be"):
        trace_channel_groups(model)


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        ({}, "the model needs class_labels, but the batch has none"),
        ({"class_labels": torch.tensor([0, 11])}, "class_labels range from 0 to 11; .* whose null label is 10"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "class_labels have dtype torch.float32"),
        ({"class_labels": torch.tensor([0])}, r"class_labels have shape \(1,\)"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 4)}, "has encoder_hidden_states, which a DiTTransformer2DModel does not"),
    ],
)
def test_conditioning_is_checked(conditioning: dict, message: str) -> None:
    model = build("dit")
    with pytest.raises(ValueError, match=message):
        family_of(model).check_conditioning(model, conditioning, 2)
    family_of(model).check_conditioning(model, {"class_labels": torch.tensor([0, 10])}, 2)


def test_samples_that_are_not_square_are_refused() -> None:
    model = build("dit")
    with pytest.raises(ValueError, match="samples of 8x16 must be square"):
        family_of(model).example_inputs(model, 8, 16)


# --- pipelines ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_loads_with_the_package_and_samples_the_same(tmp_path: Path) -> None:
    """The transformer is named by this package in model_index.json; nothing of the repository is run."""
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipe = DiTPipeline(pruned("dit", "learned-variances"), vae, DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    assert '"diffusers_gfprune",\n    "GFPrunedDiTTransformer2DModel"' in (tmp_path / "model_index.json").read_text()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DiTPipeline and type(loaded.transformer) is GFPrunedDiTTransformer2DModel
    assert DiTPipeline.from_pipe(loaded).transformer is loaded.transformer
    assert torch.equal(run(loaded.transformer), run(pruned("dit", "learned-variances")))


def test_training_and_gradient_checkpointing_work() -> None:
    loaded = GFPrunedDiTTransformer2DModel.from_config(pruned("dit").config).train()
    loaded.enable_gradient_checkpointing()
    run_inputs = inputs(loaded)
    family_of(loaded).predict(loaded, run_inputs).square().sum().backward()
    assert not [name for name, parameter in loaded.named_parameters() if parameter.grad is None]
    assert isinstance(loaded.pos_embed.pos_embed, torch.Tensor) and not isinstance(loaded.pos_embed.pos_embed, nn.Parameter)
