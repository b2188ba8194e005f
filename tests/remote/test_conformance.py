"""Features of Diffusers and torch that work on a stock `UNet2DModel` also work on a pruned one.

A feature is a function of a model and an empty folder. It must work on the stock model, and give a finite result of the same
structure on the pruned one, narrower or without some of its blocks as well. `test_conformance_of_families` does this for the
other families. Differences are listed with their reason; a listed difference that no longer exists fails.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoModel,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from diffusers_gfprune import GFPrunedUNet2DModel, PruneDDPMPipeline
from diffusers_gfprune.remote import unet_2d_gfpruned as shipped
from helpers.architectures import build, inputs, pruned, run
from helpers.derivatives import has_forward_mode_of_norms
from helpers.exports import Plain, agrees, dynamic, exported, forward

FEATURES: dict[str, Callable[[nn.Module, Path], object]] = {}

# Features that work on stock models only, and why. An entry goes when its difference goes.
ONLY_STOCK = {
    "pickled weights": "pruned models are saved and loaded as safetensors only",
}
# Features that work on pruned models only
ONLY_PRUNED = {
    "offloaded state dict": "Diffusers 0.42.1 leaves all weights on the meta device",
    'device_map="auto"': "UNet2DModel does not name the modules that must not be split",
}
# Features that torch 2.6 lacks on stock models, too
FORWARD_MODE = ("torch.func.jvp", "forward-mode AD")
# Features that take long: tried on one level, by `make test-slow`
SLOW = (
    *("compiled", "compiled with dynamic shapes", "torch.export", "torch.export with a dynamic batch"),
    *("torch.onnx.export", "OpenVINO, exported", "OpenVINO, traced"),
    *("offload to disk", "torch.jit.trace", "torch.jit.trace in training"),
)


def feature(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        FEATURES[name] = function
        return function

    return register


def same(model: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(run(other), run(model), rtol=tolerance, atol=tolerance)


def reloaded(model: nn.Module, folder: Path, saving: dict | None = None, **loading) -> nn.Module:
    model.save_pretrained(folder, **(saving or {}))
    return type(model).from_pretrained(folder, **loading)


# --- saving and loading ------------------------------------------------------------------------------------------------

# Options of save_pretrained and from_pretrained that give back the same model
ROUND_TRIPS: dict[str, tuple[dict, dict]] = {
    "save and load": ({}, {}),
    "shards": ({"max_shard_size": "40KB"}, {}),
    "variant": ({"variant": "ema"}, {"variant": "ema"}),
    "sharded variant": ({"variant": "ema", "max_shard_size": "40KB"}, {"variant": "ema"}),
    "pickled weights": ({"safe_serialization": False}, {"use_safetensors": False}),
    "low_cpu_mem_usage=False": ({}, {"low_cpu_mem_usage": False}),
    "disable_mmap": ({}, {"disable_mmap": True}),
    "offloaded state dict": ({}, {"low_cpu_mem_usage": True, "offload_state_dict": True}),
    "offloaded state dict in full": ({}, {"low_cpu_mem_usage": False, "offload_state_dict": True}),
    'device_map="cpu"': ({}, {"device_map": "cpu"}),
    'device_map="auto"': ({}, {"device_map": "auto"}),
    "device_map with a device": ({}, {"device_map": {"": torch.device("cpu")}}),
    "ignore_mismatched_sizes": ({}, {"ignore_mismatched_sizes": True}),
    "dtype=float32": ({}, {"dtype": torch.float32}),
    "use_safetensors": ({}, {"use_safetensors": True}),
}


def _round_trip(saving: dict, loading: dict) -> Callable[[nn.Module, Path], None]:
    return lambda model, folder: same(model, reloaded(model, folder, saving, **loading), 0)


for _name, _options in ROUND_TRIPS.items():
    FEATURES[_name] = _round_trip(*_options)


@feature("offload to disk")
def _(model: nn.Module, folder: Path) -> None:
    places = {name: "disk" if name == "mid_block" else "cpu" for name, _ in model.named_children()}
    for state_dict in (None, True):
        options = {"device_map": places, "offload_folder": folder / "offload", "offload_state_dict": state_dict}
        same(model, reloaded(model, folder, **options), 0)


@feature("dtype=")
def _(model: nn.Module, folder: Path) -> list:
    loaded = [reloaded(model, folder, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    return [(other.dtype, run(other)) for other in loaded]


@feature("loading info")
def _(model: nn.Module, folder: Path) -> dict:
    return reloaded(model, folder, output_loading_info=True)[1]


@feature("other processes")
def _(model: nn.Module, folder: Path) -> list:
    model.save_pretrained(folder / "other", is_main_process=False)
    return [path for path in folder.rglob("*") if path.name == "config.json"]


@feature("fused projections, saved")
def _(model: nn.Module, folder: Path) -> None:
    known = run(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
    torch.testing.assert_close(run(model), known)
    torch.testing.assert_close(run(reloaded(model, folder)), known)


@feature("AutoModel")
def _(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder / "unet")
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder / "pipeline")
    for source, options in (
        ("unet", {}),
        (".", {"subfolder": "unet"}),
        ("pipeline", {"subfolder": "unet"}),
        ("pipeline/unet", {}),
    ):
        found = AutoModel.from_pretrained(str(folder / source), **options)
        assert type(found) is type(model)
        same(model, found, 0)
    assert type(AutoModel.from_config(model.config)) is type(model)
    assert type(AutoModel.from_config(str(folder / "unet"))) is type(model)


@feature("config")
def _(model: nn.Module, folder: Path) -> dict:
    config = json.loads(model.to_json_string())
    assert type(model).from_config(config).state_dict().keys() == model.state_dict().keys()
    assert copy.deepcopy(model.config) == model.config and pickle.loads(pickle.dumps(dict(model.config))) == model.config
    return type(model).from_config(config, return_unused_kwargs=True, unknown=1)[1].get("unknown")


@feature("state_dict")
def _(model: nn.Module, folder: Path) -> None:
    other = type(model).from_config(model.config).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    same(model, other, 0)


@feature("deepcopy")
def _(model: nn.Module, folder: Path) -> None:
    same(model, copy.deepcopy(model), 0)


# --- pipelines ---------------------------------------------------------------------------------------------------------


@feature("from_pipe")
def _(model: nn.Module, folder: Path) -> list[str]:
    pipe, found = DDPMPipeline(model, DDPMScheduler()), []
    for kind in (DDIMPipeline, PruneDDPMPipeline, DDPMPipeline, DDIMPipeline, ConsistencyModelPipeline):
        pipe = kind.from_pipe(pipe)
        assert type(pipe) is kind and pipe.unet is model
        found.append(type(pipe.scheduler).__name__)
    return found


@feature("pipelines in half precision")
def _(model: nn.Module, folder: Path) -> torch.dtype:
    DDIMPipeline(model.half(), DDIMScheduler()).save_pretrained(folder, variant="fp16")
    return DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16).unet.dtype


# --- precision and memory ----------------------------------------------------------------------------------------------


@feature("layerwise casting")
def _(model: nn.Module, folder: Path) -> Tensor:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.conv_in.weight.dtype == torch.float8_e4m3fn and model.conv_norm_out.weight.dtype == torch.float32
    return run(model.bfloat16() if model.dtype == torch.bfloat16 else model)


@feature("group offload")
def _(model: nn.Module, folder: Path) -> None:
    known, cpu = run(model), torch.device("cpu")
    for options in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        offloaded = copy.deepcopy(model)
        apply_group_offloading(offloaded, onload_device=cpu, offload_device=cpu, **options)
        torch.testing.assert_close(run(offloaded), known)


@feature("autocast")
def _(model: nn.Module, folder: Path) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run(model)


@feature("channels_last")
def _(model: nn.Module, folder: Path) -> None:
    same(model, copy.deepcopy(model).to(memory_format=torch.channels_last), 1e-4)


@feature("attention processors")
def _(model: nn.Module, folder: Path) -> None:
    for processor in (AttnProcessor(), SlicedAttnProcessor(2)):
        other = copy.deepcopy(model)
        for module in other.modules():
            if isinstance(module, Attention):
                module.set_processor(processor)
        same(model, other, 1e-4)


@feature("ways that UNet2DModel does not have")
def _(model: nn.Module, folder: Path) -> list[bool]:
    names = ("fuse_qkv_projections", "set_attn_processor", "load_lora_adapter", "add_adapter", "set_attention_slice")
    return [hasattr(model, name) for name in names]


# --- training ----------------------------------------------------------------------------------------------------------


@feature("gradient checkpointing")
def _(model: nn.Module, folder: Path) -> None:
    found = []
    for on in (False, True):
        other = copy.deepcopy(model).train()
        if on:
            other.enable_gradient_checkpointing()
        forward(other, inputs(model)["sample"]).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in other.named_parameters()})
    torch.testing.assert_close(*found)


@feature("EMAModel")
def _(model: nn.Module, folder: Path) -> None:
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    ema.step(model.parameters())
    ema.save_pretrained(folder)
    loaded = EMAModel.from_pretrained(folder, type(model))
    for one, two in zip(loaded.shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(one, two)


@feature("double backward")
def _(model: nn.Module, folder: Path) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = forward(model, inputs(model)["sample"]).square().mean()
        first = torch.autograd.grad(loss, model.conv_in.weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), model.conv_out.bias)[0]


@feature("anomaly detection and inference mode")
def _(model: nn.Module, folder: Path) -> Tensor:
    with torch.inference_mode():
        forward(model, inputs(model)["sample"])
    with torch.autograd.detect_anomaly(check_nan=True):
        forward(model, inputs(model)["sample"]).sum().backward()
    return run(model)


# --- torch.func, compilers ---------------------------------------------------------------------------------------------


def _by_weights(model: nn.Module) -> tuple[dict, Callable]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict, sample: Tensor) -> Tensor:
        timestep = torch.full((len(sample),), 5)
        return functional_call(model, weights, (sample, timestep)).sample.square().mean()

    return weights, loss


@feature("torch.func.functional_call")
def _(model: nn.Module, folder: Path) -> Tensor:
    weights, loss = _by_weights(model)
    return loss(weights, inputs(model)["sample"])


@feature("torch.func.grad")
def _(model: nn.Module, folder: Path) -> Tensor:
    weights, loss = _by_weights(model)
    return grad(loss)(weights, inputs(model)["sample"])["conv_out.bias"]


@feature("torch.func.vmap")
def _(model: nn.Module, folder: Path) -> Tensor:
    weights, loss = _by_weights(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return vmap(grad(loss), in_dims=(None, 0))(weights, inputs(model)["sample"][:, None])["conv_out.bias"]


@feature("torch.func.jvp")
def _(model: nn.Module, folder: Path) -> Tensor:
    weights, loss = _by_weights(model)
    sample = inputs(model)["sample"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return jvp(lambda x: loss(weights, x), (sample,), (torch.ones_like(sample),))[1]


@feature("forward-mode AD")
def _(model: nn.Module, folder: Path) -> Tensor:
    sample = inputs(model)["sample"]
    with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        output = forward(model, torch.autograd.forward_ad.make_dual(sample, torch.ones_like(sample)))
        return torch.autograd.forward_ad.unpack_dual(output).tangent


def _compiled(model: nn.Module, *batch_sizes: int, **options) -> None:
    """Traced only: what a backend makes of the graph is not what differs."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, **options)
    with torch.no_grad():
        for batch_size in batch_sizes:
            sample = inputs(model, batch_size)["sample"]
            torch.testing.assert_close(forward(compiled, sample), forward(model, sample), rtol=1e-4, atol=1e-4)


@feature("compiled")
def _(model: nn.Module, folder: Path) -> None:
    _compiled(model, 2)


@feature("compiled with dynamic shapes")
def _(model: nn.Module, folder: Path) -> None:
    _compiled(model, 2, 3, dynamic=True)


@feature("torch.export")
def _(model: nn.Module, folder: Path) -> None:
    agrees(exported(model).module(), model, 2)


@feature("torch.export with a dynamic batch")
def _(model: nn.Module, folder: Path) -> None:
    agrees(dynamic(model).module(), model, 1, 2, 5)


@feature("torch.onnx.export")
def _(model: nn.Module, folder: Path) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    batch, path = torch.export.Dim("batch", min=1, max=64), folder / "model.onnx"
    shapes = {"sample": {0: batch}, "timestep": {0: batch}}
    torch.onnx.export(Plain(model), tuple(inputs(model).values()), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = reference.ReferenceEvaluator(str(path))
    names = session.input_names
    agrees(lambda *tensors: session.run(None, dict(zip(names, (x.numpy() for x in tensors))))[0], model, 1, 3)


def _openvino(model: nn.Module, source: object, **options) -> None:
    openvino = pytest.importorskip("openvino")
    converted = openvino.convert_model(source, **options)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    agrees(lambda *tensors: compiled([x.numpy() for x in tensors])[0], model, 1, 2, 3)


@feature("OpenVINO, exported")
def _(model: nn.Module, folder: Path) -> None:
    _openvino(model, dynamic(model))


@feature("OpenVINO, traced")
def _(model: nn.Module, folder: Path) -> None:
    _openvino(model, Plain(model), example_input=tuple(inputs(model).values()))


def _traced(model: nn.Module) -> None:
    arguments = inputs(model)
    traced = torch.jit.trace(Plain(model), (arguments["sample"], arguments["timestep"]))
    torch.testing.assert_close(traced(arguments["sample"], arguments["timestep"]), forward(model, **arguments))


@feature("torch.jit.trace")
def _(model: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        _traced(model.eval())


@feature("torch.jit.trace in training")
def _(model: nn.Module, folder: Path) -> None:
    _traced(model.train())


# --- the test ----------------------------------------------------------------------------------------------------------


def structure(value: object) -> object:
    """What a result looks like; every tensor in it must be finite."""
    if isinstance(value, Tensor):
        assert value.isfinite().all()
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: structure(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [structure(entry) for entry in value]
    return type(value) if isinstance(value, Path) else value


def outcome(name: str, model: nn.Module, folder: Path) -> object:
    """The structure of what a feature gives."""
    folder.mkdir()
    torch.manual_seed(0)
    return structure(FEATURES[name](model, folder))


@pytest.mark.fast_variants(12)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("depth", ["none", "allow"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in FEATURES])
def test_pruned_models_do_what_stock_models_do(name: str, depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in FORWARD_MODE and not has_forward_mode_of_norms():
        pytest.skip("this version of PyTorch has no forward-mode derivatives of these models")
    monkeypatch.chdir(tmp_path)
    architecture = "one-level" if name in SLOW else "base"
    stock, small = build(architecture), copy.deepcopy(pruned(architecture, depth=depth))
    assert type(stock) is UNet2DModel and type(small) is GFPrunedUNet2DModel
    assert bool(small.config.removed_blocks) == (depth == "allow")
    if name in ONLY_PRUNED:
        with pytest.raises((RuntimeError, ValueError)):
            outcome(name, stock, tmp_path / "stock")
        outcome(name, small, tmp_path / "pruned")
        return
    wanted = outcome(name, stock, tmp_path / "stock")
    if name in ONLY_STOCK:
        with pytest.raises((RuntimeError, ValueError, torch.jit.TracingCheckError)):
            outcome(name, small, tmp_path / "pruned")
    else:
        assert outcome(name, small, tmp_path / "pruned") == wanted


def test_what_is_written_about_loading_does_not_warn(tmp_path: Path) -> None:
    """Pipelines warn of `torch_dtype`, as Diffusers 0.42 calls it no more."""
    DDPMPipeline(copy.deepcopy(pruned()), DDPMScheduler()).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        with pytest.raises(FutureWarning, match="torch_dtype"):
            DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    root = Path(shipped.__file__).parents[2]
    texts = [path for ending in ("*.md", "*.jinja") for path in root.rglob(ending) if ".venv" not in path.parts]
    assert {"README.md", "template.md.jinja"} <= {path.name for path in texts}
    assert not [path for path in texts if "torch_dtype" in path.read_text("utf-8")]


def test_differences_are_of_features_that_are_tried() -> None:
    assert {*ONLY_STOCK, *ONLY_PRUNED, *SLOW} <= FEATURES.keys()
