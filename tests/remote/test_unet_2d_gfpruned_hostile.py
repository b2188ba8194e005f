"""The pruned model with invalid, broken and hostile configurations and files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_gfprune import GFPrunedUNet2DModel
from helpers.architectures import ARCHITECTURES, BASE, NoMemory, pruned, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
RESNET = "down_blocks.0.resnets.0"
ATTENTION = "mid_block.attentions.0"
HOSTILE_INTEGERS = [10**9, -1, 0, True, 2.0, float("nan"), "16", [16], {}]


def table_arguments(**tables) -> dict:
    """Arguments of a model with the dense config of 'base'."""
    return {**BASE, **tables}


def edit_config(folder: Path, **changes) -> None:
    """Change entries of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace, add, or (None) drop tensors of a saved weights file."""
    path = folder / WEIGHTS
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata={"format": "pt"})


def narrowed(**changes) -> dict:
    """A valid table of layers that narrows one resnet to 8 channels, with changes."""
    return {f"{RESNET}.conv1": [16, 8], f"{RESNET}.time_emb_proj": [64, 8], f"{RESNET}.conv2": [8, 16], **changes}


def narrowed_attention(width: int = 16, **changes) -> dict:
    """A valid table of layers that narrows one attention, with changes."""
    inner = {f"{ATTENTION}.to_{letter}": [32, width] for letter in "qkv"}
    return {**inner, f"{ATTENTION}.to_out.0": [width, 32], **changes}


def test_the_valid_tables_that_hostile_ones_are_made_of():
    """Or the refusals below would prove nothing."""
    norms = {f"{RESNET}.norm2": [2, 2, 3, 1]}
    model = GFPrunedUNet2DModel(
        **table_arguments(
            layer_channels={**narrowed(), **narrowed_attention()}, norm_group_sizes=norms, attention_heads={ATTENTION: 2}
        )
    )
    assert run(model).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        *[({"layer_channels": narrowed(**{f"{RESNET}.conv1": [16, width]})}, r"conv1'\]") for width in HOSTILE_INTEGERS],
        *[({"layer_channels": narrowed(**{f"{RESNET}.conv1": [width, 8]})}, r"conv1'\]") for width in HOSTILE_INTEGERS],
        ({"layer_channels": {f"{RESNET}.conv1": [16, 17]}}, r"from 1 to the dense \[16, 16\]"),
        ({"layer_channels": {f"{RESNET}.conv1": []}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": [16]}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": [16, 8, 3]}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": 8}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": "88"}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": None}}, "two integers"),
        ({"layer_channels": {f"{RESNET}.conv1": {"0": 16, "1": 8}}}, "two integers"),
        ({"layer_channels": {"nowhere": [16, 8]}}, "'nowhere', which is not a convolution"),
        ({"layer_channels": {"": [16, 8]}}, "'', which is not a convolution"),
        ({"layer_channels": {RESNET: [16, 8]}}, "which is not a convolution"),
        ({"layer_channels": {f"{RESNET}.norm1": [16, 8]}}, "which is not a convolution"),
        ({"layer_channels": {f"{RESNET}.conv1.weight": [16, 8]}}, "which is not a convolution"),
        ({"layer_channels": {"__class__": [16, 8]}}, "which is not a convolution"),
        ({"in_channels": 3, "layer_channels": {"conv_in": [2, 16]}}, "changes 3 channels that are never pruned"),
        ({"out_channels": 3, "layer_channels": {"conv_out": [16, 2]}}, "changes 3 channels that are never pruned"),
        ({"num_class_embeds": 10, "layer_channels": {"class_embedding": [9, 64]}}, "changes 10 channels"),
        ({"layer_channels": {f"{RESNET}.conv1": [16, 8]}}, "do not fit together"),
        ({"layer_channels": {"time_embedding.linear_1": [8, 64]}}, "do not fit together"),
        ({"layer_channels": narrowed_attention(**{f"{ATTENTION}.to_q": [32, 8]})}, "do not fit together"),
        ({"layer_channels": narrowed_attention(**{f"{ATTENTION}.to_k": [32, 8]})}, "do not fit together"),
        ({"layer_channels": narrowed_attention(**{f"{ATTENTION}.to_v": [32, 8]})}, "do not fit together"),
        *[({"norm_group_sizes": {"conv_norm_out": [4, 4, size, 4]}}, "conv_norm_out") for size in HOSTILE_INTEGERS],
        ({"norm_group_sizes": {"conv_norm_out": []}}, "list of integers"),
        ({"norm_group_sizes": {"conv_norm_out": 16}}, "list of integers"),
        ({"norm_group_sizes": {"conv_norm_out": "4444"}}, "list of integers"),
        ({"norm_group_sizes": {"conv_norm_out": [5, 4, 4, 3]}}, "up to 4 sizes from 1 to 4"),
        ({"norm_group_sizes": {"conv_norm_out": [2] * 8}}, "up to 4 sizes from 1 to 4"),
        ({"norm_group_sizes": {"conv_norm_out": [4, 4, 4]}}, "do not fit together"),
        ({"norm_group_sizes": {"conv_norm_out": [4, 4, 4, 3]}}, "do not fit together"),
        ({"layer_channels": narrowed(), "norm_group_sizes": {f"{RESNET}.norm2": [2, 2, 2, 1]}}, "do not fit together"),
        ({"layer_channels": narrowed(), "norm_group_sizes": {f"{RESNET}.norm2": [3, 3, 3]}}, "do not fit together"),
        ({"norm_group_sizes": {"nowhere": [4]}}, "'nowhere', which is not a group norm"),
        ({"norm_group_sizes": {"conv_in": [4]}}, "'conv_in', which is not a group norm"),
        *[({"attention_heads": {ATTENTION: heads}}, "attention_heads") for heads in HOSTILE_INTEGERS],
        ({"attention_heads": {ATTENTION: 5}}, "from 1 to 4"),
        ({"attention_heads": {ATTENTION: 3}}, "divide 32 channels"),
        ({"attention_heads": {"nowhere": 1}}, "'nowhere', which is not an attention"),
        ({"attention_heads": {"conv_in": 1}}, "'conv_in', which is not an attention"),
        *[
            ({table: value}, f"{table} must map module names")
            for table in ("layer_channels", "norm_group_sizes", "attention_heads")
            for value in ([["conv_in", 1]], "conv_in", 7, 0.5, True, {1: [1, 1]})
        ],
        *[({"block_out_channels": (16, width)}, "block_out_channels") for width in HOSTILE_INTEGERS],
        *[({"block_out_channels": value}, "block_out_channels") for value in (16, "16", [], {}, [16] * 17, None)],
        *[({"layers_per_block": value}, "layers_per_block") for value in HOSTILE_INTEGERS],
        *[({"in_channels": value}, "in_channels") for value in HOSTILE_INTEGERS],
        *[({"out_channels": value}, "out_channels") for value in HOSTILE_INTEGERS],
        *[({"norm_num_groups": value}, "norm_num_groups") for value in HOSTILE_INTEGERS],
        *[({"attention_head_dim": value}, "attention_head_dim") for value in HOSTILE_INTEGERS],
        *[({"time_embedding_dim": value}, "time_embedding_dim") for value in HOSTILE_INTEGERS],
        *[({"num_class_embeds": value}, "num_class_embeds") for value in HOSTILE_INTEGERS],
        ({"time_embedding_type": "learned", "num_train_timesteps": 10**9}, "num_train_timesteps"),
    ],
)
def test_hostile_configurations_are_refused_before_anything_is_allocated(tables: dict, message: str):
    """A config comes from the Hub: it must not crash the process, exhaust memory, or build what never ran."""
    with pytest.raises(ValueError, match=message), NoMemory():
        GFPrunedUNet2DModel(**table_arguments(**tables))


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (f"{RESNET}.time_emb_proj", [64, 1]),
        (f"{RESNET}.conv2", [16, 1]),
        ("down_blocks.1.resnets.0.conv_shortcut", [16, 1]),
    ],
)
def test_widths_that_broadcast_are_refused(layer: str, channels: list[int]):
    """One channel added to sixteen runs without an error, but is not a pruned model."""
    with pytest.raises(ValueError, match="do not fit together"):
        GFPrunedUNet2DModel(**table_arguments(layer_channels={layer: channels}))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_channels": {"conv_in": [1, 10**9]}},
        {"block_out_channels": [16, 10**9]},
        {"layers_per_block": 10**9},
        {"norm_group_sizes": {"conv_norm_out": [float("nan")]}},
        {"attention_heads": {ATTENTION: 0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_hostile_config_files_are_refused(change: dict, tmp_path: Path):
    """The same through config.json and `from_pretrained`."""
    pruned().save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)


SMALL = {**BASE, **ARCHITECTURES["one-level"]}  # the quickest to build
MODULE_NAMES = [name for name, _ in GFPrunedUNet2DModel(**SMALL).named_modules()]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = JSON | st.lists(st.integers(0, 34), min_size=1, max_size=4) | st.integers(1, 4)
TABLES = JSON | st.dictionaries(st.sampled_from(MODULE_NAMES) | st.text(max_size=8), ENTRIES, max_size=3)


def build_or_refuse(arguments: dict) -> GFPrunedUNet2DModel | ValueError:
    """What a configuration comes to; any other exception passes through, and fails the test."""
    try:
        return GFPrunedUNet2DModel(**arguments)
    except ValueError as error:
        return error


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(layer_channels=TABLES, norm_group_sizes=TABLES, attention_heads=TABLES)
def test_arbitrary_tables_build_or_raise_value_error(layer_channels, norm_group_sizes, attention_heads):
    """Whatever JSON holds: a model that runs, or a ValueError with a message."""
    result = build_or_refuse(
        {
            **SMALL,
            "layer_channels": layer_channels,
            "norm_group_sizes": norm_group_sizes,
            "attention_heads": attention_heads,
        }
    )
    if isinstance(result, ValueError):
        assert str(result)
    else:
        assert run(result.eval()).shape == (2, 1, 8, 8)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_one_entry_changed_builds_or_raises_value_error(data):
    """Near a valid configuration, where a wrong width gets furthest."""
    tables = {
        table: copy.deepcopy(dict(pruned("one-level").config[table]))
        for table in ("layer_channels", "norm_group_sizes", "attention_heads")
    }
    table = data.draw(st.sampled_from([name for name, entries in tables.items() if entries]))
    name = data.draw(st.sampled_from(sorted(tables[table])))
    tables[table][name] = data.draw(ENTRIES)
    result = build_or_refuse({**SMALL, **tables})
    if isinstance(result, ValueError):
        assert str(result)
    else:
        assert run(result.eval()).shape == (2, 1, 8, 8)


# --- files that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_in.weight": None}, "missing keys, first conv_in.weight"),
        ({f"{RESNET}.norm2.bias": None, "conv_in.weight": None}, "2 missing keys"),
        ({"intruder.weight": torch.zeros(3)}, "unexpected keys, first intruder.weight"),
        ({"conv_in.bias": torch.zeros(3)}, "conv_in.bias"),
    ],
    ids=["missing", "two-missing", "unexpected", "another-shape"],
)
def test_weights_that_do_not_fit_the_config_are_refused(changes: dict, message: str, low_cpu_mem_usage: bool, tmp_path: Path):
    """Diffusers warns, and leaves what is missing random: samples would be noise."""
    pruned().save_pretrained(tmp_path)
    edit_weights(tmp_path, changes)
    with pytest.raises((ValueError, RuntimeError), match=message):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_shapes_that_do_not_fit_are_refused_even_if_told_to_ignore_them(tmp_path: Path):
    """`ignore_mismatched_sizes` would leave random weights."""
    pruned().save_pretrained(tmp_path)
    edit_weights(tmp_path, {"conv_in.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="mismatched keys.*conv_in.bias"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_config_without_its_tables_is_refused(low_cpu_mem_usage: bool, tmp_path: Path):
    """Somebody replaced config.json by that of the dense model."""
    pruned().save_pretrained(tmp_path)
    edit_config(tmp_path, layer_channels={}, norm_group_sizes={}, attention_heads={})
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size mismatch"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9999])
def test_truncated_weights_are_refused(share: float, tmp_path: Path):
    """An interrupted download."""
    pruned().save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=WEIGHTS):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)


class _CreatesAFile:
    """Unpickling an instance creates a file: code that a weights file must never run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose only weights are a malicious pickle, and the file that its unpickling would create."""
    folder, marker = tmp_path / "unet", tmp_path / "marker"
    pruned().save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    torch.save({**pruned().state_dict(), "payload": _CreatesAFile(marker)}, folder / "diffusion_pytorch_model.bin")
    return folder, marker


def test_the_malicious_pickle_works(tmp_path: Path):
    """Or the absence of its marker would prove nothing."""
    marker = tmp_path / "marker"
    content = pickle.dumps(_CreatesAFile(marker))
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, OSError),
        ({"low_cpu_mem_usage": False}, OSError),
        ({"use_safetensors": None}, OSError),
        ({"use_safetensors": True}, OSError),
        ({"use_safetensors": False}, ValueError),
    ],
    ids=str,
)
def test_pickles_are_never_unpickled(pickled: tuple[Path, Path], options: dict, error: type):
    """Loading a model runs no code from its weights, whatever is asked for."""
    folder, marker = pickled
    with pytest.raises(error, match="safetensors"):
        GFPrunedUNet2DModel.from_pretrained(folder, **options)
    assert not marker.exists()


def test_a_shard_index_cannot_name_a_pickle(pickled: tuple[Path, Path]):
    """An index file is free text: it may point at another kind of file."""
    folder, marker = pickled
    weight_map = dict.fromkeys(pruned().state_dict(), "diffusion_pytorch_model.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is not a safetensors file"):
        GFPrunedUNet2DModel.from_pretrained(folder)
    assert not marker.exists()


def test_use_safetensors_false_is_refused(tmp_path: Path):
    """Even if safetensors exist: a request for pickles is refused, not silently replaced."""
    pruned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path, use_safetensors=False)
