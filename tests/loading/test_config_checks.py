"""Every field of a pruned model's config and every tensor of its files: invalid values are refused by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_gfprune import GFPrunedUNet2DModel
from diffusers_gfprune.families.unet_2d import LIMITS, UNet2DFamily
from diffusers_gfprune.loading.config_checks import MAX_DEPTH
from diffusers_gfprune.loading.weight_checks import check_weights
from helpers.architectures import ARCHITECTURES, BASE, NoMemory, pruned, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {**BASE, **ARCHITECTURES["one-level"]}
FIELDS = [name for name in inspect.signature(UNet2DModel.__init__).parameters if name != "self"]
NAN, INF = float("nan"), float("inf")

WRONG = [
    *[("norm_eps", value) for value in (0, -1.0, "1e-5", NAN, INF, 2.0, 1e-300, True, None)],
    *[("sample_size", value) for value in (-8, 0, 10**9, 8.0, "8", [8], [8, 8, 8], [8, -8], [8, 10**9], True, NAN, 7)],
    *[("freq_shift", value) for value in (1e12, -1, 8, NAN, INF, "0", None, False)],
    *[("mid_block_scale_factor", value) for value in (0, -1, 1e-30, INF, NAN, "1", None)],
    *[("downsample_padding", value) for value in (-1, 2, 1.0, True, None)],
    *[("dropout", value) for value in (-0.1, 1.5, NAN, "0", None)],
    *[("attention_head_dim", value) for value in (0, -8, 8.0, 10**9)],
    *[("norm_num_groups", value) for value in (3, 0, None)],
    *[("attn_norm_num_groups", value) for value in (3, 0)],
    *[("time_embedding_dim", value) for value in (0, -1, 10**9)],
    *[("num_class_embeds", value) for value in (0, -1, 1.5)],
    *[("act_fn", value) for value in ("swiglu", "", None, 1, ["silu"], "UNetRessilu")],
    *[("down_block_types", value) for value in (["DownBlock2D"], "DownBlock2D", ["a", "b"], [None, None])],
    ("down_block_types", ["SkipDownBlock2D", "DownBlock2D"]),
    *[("up_block_types", value) for value in (["UpBlock2D"] * 3, None, [["UpBlock2D"], "UpBlock2D"])],
    *[(name, "other") for name in ("mid_block_type", "time_embedding_type", "downsample_type", "class_embed_type")],
    *[(name, "ada_group") for name in ("resnet_time_scale_shift", "upsample_type")],
    *[(name, value) for name in ("center_input_sample", "flip_sin_to_cos", "add_attention") for value in (1, "true", None)],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_refused_by_name_before_anything_is_allocated(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=") as error, NoMemory():
        GFPrunedUNet2DModel(**{**BASE, name: value})
    assert "\n" not in str(error.value) and "must be" in str(error.value)


def test_values_that_depend_on_others() -> None:
    with pytest.raises(ValueError, match="^num_train_timesteps=None must be"):
        GFPrunedUNet2DModel(**{**BASE, "time_embedding_type": "learned"})
    with pytest.raises(ValueError, match=r"^sample_size=\[16384, 16384\] must be .* 16384 pixels in all"):
        GFPrunedUNet2DModel(**{**BASE, "in_channels": 2**16, "sample_size": [2**14, 2**14]})
    with pytest.raises(ValueError, match="^layers_per_block=64 must be at most 16 in 16 blocks"):
        blocks = {"down_block_types": ["DownBlock2D"] * 16, "up_block_types": ["UpBlock2D"] * 16}
        GFPrunedUNet2DModel(**{**BASE, **blocks, "block_out_channels": [16] * 16, "layers_per_block": 64})
    GFPrunedUNet2DModel(**{**BASE, "freq_shift": 7})  # the largest of which frequencies of 16 channels are finite


def test_every_field_has_a_check() -> None:
    """One that a later Diffusers adds must be plain JSON until somebody decides."""
    known = {"sample_size", *LIMITS.integers, *LIMITS.numbers, *LIMITS.choices}
    assert sorted(known) == sorted(FIELDS)
    defaults = {name: inspect.signature(UNet2DModel.__init__).parameters[name].default for name in FIELDS}
    for value in (1, 0.5, "word", None, True, [1, "word"]):
        UNet2DFamily().check_arguments({**defaults, "later": value})
    for value in (NAN, [INF], {}, [[1]], [0] * 65):
        with pytest.raises(ValueError, match=r"^later=.* must be a finite number"):
            UNet2DFamily().check_arguments({**defaults, "later": value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from([word for choices in LIMITS.choices.values() for word in choices])
NEAR = st.integers(-1, 40) | st.floats(-2, 2) | st.floats(1e-12, 1e-3) | WORDS
VALUES = NEAR | st.lists(st.integers(1, 32) | WORDS, max_size=3) | JSON


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_field_makes_a_finite_model_or_one_line_that_names_it(changes: dict) -> None:
    arguments = {**SMALL, **changes}
    try:
        with NoMemory(), torch.device("meta"):
            model = GFPrunedUNet2DModel(**arguments)
    except ValueError as error:
        assert "\n" not in str(error) and any(name in str(error) for name in (*changes, "the config describes"))
        return
    sizes = arguments["sample_size"]
    sides = sizes if isinstance(sizes, (list, tuple)) else [sizes]
    if None not in sides and max(sides) <= 32 and sum(p.numel() for p in model.parameters()) < 10**6:
        model = GFPrunedUNet2DModel(**arguments).eval()
        if model.class_embedding is None or model.config.num_class_embeds is None or model.config.num_class_embeds >= 10:
            assert run(model).isfinite().all()


# --- tensors -----------------------------------------------------------------------------------------------------------


def saved(folder: Path, change: dict[str, Tensor], **options) -> Path:
    """The pruned model, saved with `options`, and with changed tensors in its last file of weights."""
    pruned().save_pretrained(folder, **options)
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    save_file({**tensors, **change}, path, metadata={"format": "pt"})
    return folder


def poisoned(value: float) -> Tensor:
    """Weights of `up_blocks.1.resnets.1.norm1`, the last of which is `value`; they lie in the last of two shards."""
    weight = pruned().up_blocks[1].resnets[1].norm1.weight.detach().clone()
    weight[-1] = value
    return weight


NAME = "up_blocks.1.resnets.1.norm1.weight"
WAYS = {
    "one file": ({}, {}),
    "shards": ({"max_shard_size": "40KB"}, {}),
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}),
    "sharded variant": ({"variant": "fp16", "max_shard_size": "40KB"}, {"variant": "fp16"}),
    "in full": ({}, {"low_cpu_mem_usage": False}),
    "as another dtype": ({}, {"dtype": torch.bfloat16}),
    "on a device": ({}, {"device_map": {"": "cpu"}}),
    "read, not mapped": ({}, {"disable_mmap": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_not_finite_are_refused(way: str, tmp_path: Path) -> None:
    saving, loading = WAYS[way]
    saved(tmp_path, {NAME: poisoned(NAN)}, **saving)
    with pytest.raises(ValueError, match=rf"^the weight {NAME} holds values that are not finite"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, **loading)


@pytest.mark.parametrize("value", [INF, -INF])
def test_infinite_weights_are_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"the weight {NAME} holds"):
        GFPrunedUNet2DModel.from_pretrained(saved(tmp_path, {NAME: poisoned(value)}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Diffusers would round them, or read them as numbers."""
    with pytest.raises(ValueError, match=f"^the weight {NAME} is {dtype}, but must be floating point"):
        GFPrunedUNet2DModel.from_pretrained(saved(tmp_path, {NAME: poisoned(1).to(dtype)}))


def test_weights_that_are_not_finite_in_the_dtype_asked_for_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, {NAME: poisoned(70000.0)})
    assert GFPrunedUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match=rf"^the weight {NAME} holds a value of size 70000, which is too large for torch.float16$"
    ):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, dtype=torch.float16)
    saved(tmp_path, {NAME: poisoned(1.0).double() * 1e300})
    with pytest.raises(ValueError, match="holds a value of size .*e.300, which is too large for torch.float32"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 3e38), (torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float64, 1e308)]
)
def test_large_weights_are_finite_though_their_sum_is_not(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    check({"x": torch.full((40,), -value, dtype=dtype)}, dtype, tmp_path)
    for wrong in (INF, -INF, NAN):
        with pytest.raises(ValueError, match="the weight x holds values that are not finite"):
            check({"x": torch.tensor([value, wrong, value], dtype=dtype)}, dtype, tmp_path)


def check(tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    save_file(tensors, folder / WEIGHTS)
    check_weights([folder / WEIGHTS], dtype)


@pytest.mark.parametrize("at", [0, 2**15 - 1, 2**18 - 1, 2**18, 300_000 - 1])
def test_every_value_is_looked_at(at: int, tmp_path: Path) -> None:
    """Files are read in buffers of 2^18 values, and those in pieces of 2^15 - 1, across the borders of tensors."""
    values = torch.zeros(300_000)
    values[at] = NAN
    with pytest.raises(ValueError, match=f"the weight {'y' if at >= 260_000 else 'x'} holds values that are not finite"):
        check(
            {"a": torch.zeros(3, dtype=torch.float64), "x": values[:260_000], "y": values[260_000:]}, torch.float32, tmp_path
        )


def test_weights_of_eight_bits_are_read(tmp_path: Path) -> None:
    check({"x": torch.ones(3).to(torch.float8_e4m3fn), "y": torch.zeros(0)}, torch.float32, tmp_path)
    with pytest.raises(ValueError, match="the weight x holds"):
        check({"x": torch.tensor([1, NAN]).to(torch.float8_e5m2)}, torch.float32, tmp_path)


def test_fused_projections_of_a_second_stream_are_compared(tmp_path: Path) -> None:
    """Those of SD3 are of its text."""
    parts = {f"a.add_{letter}_proj.weight": torch.rand(2, 3) for letter in "qkv"}
    whole = torch.cat(list(parts.values()))
    check({**parts, "a.to_added_qkv.weight": whole}, torch.float32, tmp_path)
    with pytest.raises(ValueError, match="a.to_added_qkv.weight differs from add_q_proj, add_k_proj and add_v_proj: unfuse"):
        check({**parts, "a.to_added_qkv.weight": whole + 1}, torch.float32, tmp_path)


@pytest.mark.parametrize(("trained", "message"), [(False, None), (True, r"to_qkv.weight differs from to_q, to_k and to_v")])
def test_fused_projections_are_loaded_unless_trained_alone(trained: bool, message: str | None, tmp_path: Path) -> None:
    """What Diffusers loads are to_q, to_k and to_v, which fused training leaves behind."""
    model = GFPrunedUNet2DModel.from_config(pruned().config)
    known = run(model.eval())
    attention = model.mid_block.attentions[0]
    attention.fuse_projections()
    with torch.no_grad():
        attention.to_qkv.weight.add_(float(trained))
    model.save_pretrained(tmp_path)
    assert any("to_qkv" in name for name in load_file(tmp_path / WEIGHTS))
    if message is None:
        assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), known)
    else:
        with pytest.raises(ValueError, match=message):
            GFPrunedUNet2DModel.from_pretrained(tmp_path)


def nested(levels: int) -> str:
    """A configuration with a list of lists."""
    return f'{{"act_fn": {"[" * levels}{"]" * levels}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "^config.json must hold a JSON object"),
        ('"alice/another"', "^config.json must hold a JSON object"),  # Diffusers would fetch that repository
        *(  # levels below the object: more than Python reads, more than Python 3.12 reads, and one more than is accepted
            (nested(levels), "^config.json must hold a JSON object that is not nested too deeply")
            for levels in (20_000, 5000, MAX_DEPTH)
        ),
        (nested(MAX_DEPTH - 1), "^act_fn="),
        ('{"quantization_config": [1]}', r"^quantization_config=\[1\] must be a JSON object"),
    ],
    ids=["list", "string", "deepest", "deeper", "deep", "accepted depth", "quantization"],
)
def test_config_json_of_another_kind(text: str, message: str, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)


def test_through_config_json(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm_eps": NAN}))
    with pytest.raises(ValueError, match="^norm_eps=nan must be a number from 1e-12 to 1$"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)
