"""The pruned model: construction, saving and loading."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import GaussianFourierProjection
from torch import nn

from diffusers_gfprune import GFPrunedUNet2DModel
from helpers.architectures import BASE, NoMemory, build, inputs, pruned, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = ["config.json", "diffusers_gfprune.py", WEIGHTS]
RESNET = "down_blocks.0.resnets.0"
ATTENTION = "mid_block.attentions.0"


def table_arguments(**tables) -> dict:
    """Arguments of a model with the dense config of 'base'."""
    return {**BASE, **tables}


# --- building from a configuration -------------------------------------------------------------------------------------


def test_tables_narrow_the_layers_they_name():
    """Everything else is as wide as in the dense model."""
    model = GFPrunedUNet2DModel(
        **table_arguments(
            layer_channels={
                f"{RESNET}.conv1": [16, 7],
                f"{RESNET}.time_emb_proj": [64, 7],
                f"{RESNET}.conv2": [7, 16],
                f"{ATTENTION}.to_q": [32, 6],
                f"{ATTENTION}.to_k": [32, 6],
                f"{ATTENTION}.to_v": [32, 6],
                f"{ATTENTION}.to_out.0": [6, 32],
            },
            norm_group_sizes={f"{RESNET}.norm2": [1, 2, 4]},
            attention_heads={ATTENTION: 3},
        )
    )
    resnet, attention = model.get_submodule(RESNET), model.get_submodule(ATTENTION)
    assert resnet.conv1.weight.shape == (7, 16, 3, 3)
    assert resnet.norm2.group_sizes == (1, 2, 4)
    assert (attention.heads, attention.inner_dim, attention.scale) == (3, 6, 2**-0.5)
    assert model.down_blocks[1].resnets[0].conv1.weight.shape == (32, 16, 3, 3)
    assert run(model).shape == (2, 1, 8, 8)


def test_without_tables_it_is_the_dense_model():
    """Dense weights fit, with the same outputs bit for bit."""
    dense = build()
    model = GFPrunedUNet2DModel(**BASE).eval()
    model.load_state_dict(dense.state_dict())
    assert torch.equal(run(model), run(dense))


def test_dense_arguments_may_be_positional():
    """As for `UNet2DModel`: sample_size, in_channels, out_channels."""
    rest = {key: value for key, value in BASE.items() if key not in ("sample_size", "in_channels", "out_channels")}
    model = GFPrunedUNet2DModel(12, 3, 2, **rest)
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == (12, 3, 2)
    assert model.conv_in.in_channels == 3


def test_unknown_arguments_are_refused():
    """A misspelt table would leave the model dense."""
    with pytest.raises(TypeError, match="layer_chanels"):
        GFPrunedUNet2DModel(**BASE, layer_chanels={})


@pytest.mark.parametrize("name", ["base", "fourier-time", "learned-time", "class-embedding"])
def test_fresh_weights_are_initialized_as_torch_does(name: str):
    """The model is built without memory first: every weight must be drawn afterwards."""
    model = GFPrunedUNet2DModel.from_config(pruned(name).config)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= bound
            assert module.bias.abs().max() <= bound
            assert module.weight.abs().max() > bound / 4
        elif isinstance(module, nn.GroupNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.Embedding):
            assert 0.8 < module.weight.std() < 1.2
        elif isinstance(module, GaussianFourierProjection):
            assert 8 < module.weight.std() < 32  # the scale is 16
            assert not module.weight.requires_grad
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.isfinite(run(model)).all()


def test_meta_device_context_allocates_nothing():
    """How accelerate and Diffusers plan a model that may not fit."""
    config = pruned().config
    with torch.device("meta"), NoMemory():
        model = GFPrunedUNet2DModel.from_config(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in pruned().named_parameters()}


def test_building_leaves_the_mode_alone():
    """The check of the widths runs in evaluation mode, without a trace of it."""
    model = GFPrunedUNet2DModel(**BASE)
    assert {module.training for module in model.modules()} == {True}


# --- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["base", "scale-shift", "class-embedding", "class-identity", "fourier-time", "learned-time", "resnet-samplers"]
)
def test_from_pretrained_reproduces_the_outputs_bit_for_bit(name: str, tmp_path: Path):
    """Invariant 5: what is saved is what was measured."""
    pruned(name).save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(run(loaded), run(pruned(name)))


def test_saved_files(tmp_path: Path):
    """Weights, configuration, and the module that builds the model, byte for byte."""
    pruned().save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert (tmp_path / "diffusers_gfprune.py").read_bytes() == GFPrunedUNet2DModel.source().encode()


def test_config_round_trip(tmp_path: Path):
    """config.json is the dense configuration and three tables, and comes back equal."""
    pruned().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_class_name"] == "GFPrunedUNet2DModel"
    for table in ("layer_channels", "norm_group_sizes", "attention_heads"):
        assert written[table]
        assert written[table] == pruned().config[table]
    for key, value in BASE.items():
        assert written[key] == (list(value) if isinstance(value, tuple) else value)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    visible = {key: value for key, value in pruned().config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in visible} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in visible.items()
    }


def test_the_shipped_module_loads_the_model_by_itself(tmp_path: Path):
    """Without this package, Diffusers runs the file beside the weights: it must need nothing else of ours."""
    pruned().save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("shipped_module", tmp_path / "diffusers_gfprune.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    assert shipped.GFPrunedUNet2DModel is not GFPrunedUNet2DModel
    loaded = shipped.GFPrunedUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(pruned()))
    loaded.save_pretrained(tmp_path)  # copies its own file onto itself
    assert (tmp_path / "diffusers_gfprune.py").read_bytes() == GFPrunedUNet2DModel.source().encode()


@pytest.mark.parametrize("method", ["save_pretrained", "from_pretrained"])
def test_overrides_show_the_signature_of_diffusers(method: str):
    """Pipelines look for `variant` and others in the signature, and pass on only what they find."""
    assert inspect.signature(getattr(GFPrunedUNet2DModel, method)) == inspect.signature(getattr(UNet2DModel, method))


def test_variant_is_saved_beside_the_main_weights(tmp_path: Path):
    """Without its signature, the override would hide `variant`, and half precision overwrite the main weights."""
    half = copy.deepcopy(pruned()).half()
    pruned().save_pretrained(tmp_path)
    main = (tmp_path / WEIGHTS).read_bytes()
    half.save_pretrained(tmp_path, variant="fp16")
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES, "diffusion_pytorch_model.fp16.safetensors"])
    assert (tmp_path / WEIGHTS).read_bytes() == main
    assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), run(pruned()))
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float16
        assert torch.equal(value, half.state_dict()[name])


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_shards_round_trip(low_cpu_mem_usage: bool, tmp_path: Path):
    """Large models come in several files and an index."""
    pruned().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(name for name in os.listdir(tmp_path) if "-of-" in name)
    assert len(shards) > 2
    assert sorted(os.listdir(tmp_path)) == sorted([*FILES[:2], f"{WEIGHTS}.index.json", *shards])
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(loaded), run(pruned()))


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {}), ({}, {"max_shard_size": "50KB"}), ({"max_shard_size": "50KB"}, {}), ({"max_shard_size": "20KB"},) * 2],
    ids=["whole-whole", "whole-sharded", "sharded-whole", "sharded-sharded"],
)
def test_saving_again_into_the_same_folder(first: dict, second: dict, tmp_path: Path):
    """The later model is what loads, whatever the earlier one left there."""
    pruned(seed=1).save_pretrained(tmp_path, **first)
    pruned(seed=0).save_pretrained(tmp_path, **second)
    assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), run(pruned(seed=0)))


def test_a_loaded_model_saves_into_its_own_folder(tmp_path: Path):
    """Fine-tune, save in place: the module file is the source and the target of the copy."""
    pruned().save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert torch.equal(run(GFPrunedUNet2DModel.from_pretrained(tmp_path)), run(pruned()))


def test_other_processes_write_no_module_file(tmp_path: Path):
    """In distributed training, only the main process writes what is not a shard of weights."""
    pruned().save_pretrained(tmp_path, is_main_process=False)
    assert "diffusers_gfprune.py" not in os.listdir(tmp_path)
    assert "config.json" not in os.listdir(tmp_path)


@pytest.mark.filterwarnings("error:.*torch_dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_by_its_new_and_its_old_name(name: str, dtype: torch.dtype, tmp_path: Path):
    """Weights are cast on loading, to what casting the model would give; a model warns of neither name."""
    pruned().save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, **{name: dtype})
    expected = copy.deepcopy(pruned()).to(dtype)
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, expected.state_dict()[name])
    assert torch.equal(run(loaded), run(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"use_safetensors": True},
        {"use_safetensors": None},
    ],
    ids=str,
)
def test_ways_of_loading_give_the_same_model(options: dict, tmp_path: Path):
    """Through an empty model or not: no weight may stay on the meta device, or random."""
    pruned("fourier-time").save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path, **options)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(run(loaded), run(pruned("fourier-time")))


def test_loading_info_is_returned_when_asked_for(tmp_path: Path):
    """The override looks at the info itself, and must hand it on."""
    pruned().save_pretrained(tmp_path)
    loaded, info = GFPrunedUNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, GFPrunedUNet2DModel)
    assert set(info["missing_keys"]) == set(info["unexpected_keys"]) == set()


def test_a_loaded_model_trains(tmp_path: Path):
    """Fine-tuning starts from what was published."""
    pruned().save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path).train()
    loaded.enable_gradient_checkpointing()
    loaded(**inputs(loaded)).sample.square().sum().backward()
    without = {name for name, parameter in loaded.named_parameters() if parameter.grad is None}
    assert without == set()
