"""Features of Diffusers and torch on every family: they work on the stock model, and on a narrower one without some blocks.

`test_conformance` has more features for `UNet2DModel`. As there, a feature is a function of a model and a folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, JointAttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_gfprune.diffusion.batch import ModelInputs
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.runtimes.conversion import remove_idle_squeezes
from diffusers_gfprune.runtimes.program import TensorModel, to_tensors
from helpers import architectures, families
from helpers.derivatives import has_forward_mode_of_norms

UNET = "unet"
ARCHITECTURES = {UNET: "base", **{family: families.removable(family) for family in families.BASES}}
FEATURES: dict[str, Callable[[nn.Module, Path], object]] = {}
SLOW: set[str] = set()


def feature(name: str, slow: bool = False) -> Callable:
    def register(function: Callable) -> Callable:
        FEATURES[name] = function
        SLOW.update({name} if slow else ())
        return function

    return register


def stock(family: str) -> nn.Module:
    name = ARCHITECTURES[family]
    return architectures.build(name) if family == UNET else families.build(family, name)


def without_blocks(family: str) -> nn.Module:
    """A narrower model without some of its blocks."""
    if family == UNET:
        return copy.deepcopy(architectures.pruned(ARCHITECTURES[family], depth="allow"))
    return copy.deepcopy(families.pruned(family, ARCHITECTURES[family], seed=1, depth="allow"))


def inputs(model: nn.Module, batch_size: int = 2) -> ModelInputs:
    if family_of(model).dense_class is not UNet2DModel:
        return families.inputs(model, batch_size)
    given = architectures.inputs(model, batch_size)
    return ModelInputs(given.pop("sample"), given.pop("timestep"), given)


def output(model: nn.Module, given: ModelInputs | None = None) -> Tensor:
    return family_of(model).output(model, inputs(model) if given is None else given)


@torch.no_grad()
def same(model: nn.Module, other: nn.Module, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(output(other), output(model), rtol=tolerance, atol=tolerance)


# --- files and pipelines -----------------------------------------------------------------------------------------------


@feature("save and load")
def _(model: nn.Module, folder: Path) -> None:
    """As a whole, in shards, as a variant, by AutoModel and from the config."""
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    model.save_pretrained(folder / "variant", variant="ema")
    same(model, type(model).from_pretrained(folder / "whole"), 0)
    same(model, AutoModel.from_pretrained(str(folder / "whole")), 0)
    same(model, type(model).from_pretrained(folder / "shards"), 0)
    same(model, type(model).from_pretrained(folder / "variant", variant="ema"), 0)
    other = type(model).from_config(model.config).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    same(model, other, 0)


@feature("dtypes")
def _(model: nn.Module, folder: Path) -> list:
    model.save_pretrained(folder)
    return [type(model).from_pretrained(folder, dtype=dtype).dtype for dtype in (torch.float16, torch.bfloat16)]


@feature("from_pipe")
def _(model: nn.Module, folder: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    text = dict.fromkeys(("text_encoder", "tokenizer"))
    three = {name + suffix: None for name in text for suffix in ("", "_2", "_3")}
    others = {**dict.fromkeys(("safety_checker", "feature_extractor")), "requires_safety_checker": False}
    pipelines = {
        "UNet2DConditionModel": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, {**text, **others}),
        "DiTTransformer2DModel": (DiTPipeline, DiTPipeline, {}),
        "PixArtTransformer2DModel": (PixArtAlphaPipeline, PixArtSigmaPipeline, text),
        "SD3Transformer2DModel": (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, three),
    }
    family = family_of(model)
    if family.dense_class.__name__ in pipelines:
        kind, other, rest = pipelines[family.dense_class.__name__]
        pipe = kind(vae=vae, scheduler=DDIMScheduler(), **{family.component: model}, **rest)
        assert getattr(other.from_pipe(pipe), family.component) is model


# --- memory and precision ----------------------------------------------------------------------------------------------


@feature("group offload")
def _(model: nn.Module, folder: Path) -> None:
    if not model._supports_group_offloading:
        with pytest.raises(ValueError, match="does not support group offloading"):
            model.enable_group_offload(onload_device=torch.device("cpu"))
        assert family_of(model).dense_class.__name__ == "DiTTransformer2DModel"  # docs/supported.md
        return
    for how in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        offloaded = copy.deepcopy(model)
        offloaded.enable_group_offload(onload_device=torch.device("cpu"), **how)
        same(model, offloaded)


@feature("layerwise casting")
def _(model: nn.Module, folder: Path) -> Tensor:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        return output(model)


@feature("autocast and channels_last")
def _(model: nn.Module, folder: Path) -> Tensor:
    same(model, copy.deepcopy(model).to(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return output(model)


@feature("attention processors")
def _(model: nn.Module, folder: Path) -> None:
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, JointAttnProcessor2_0):  # there is no other
            module.set_processor(AttnProcessor())
    same(model, other)


# --- training ----------------------------------------------------------------------------------------------------------


@feature("gradient checkpointing")
def _(model: nn.Module, folder: Path) -> None:
    found = []
    for on in (False, True):
        other = copy.deepcopy(model).train()
        if on:
            other.enable_gradient_checkpointing()
        family_of(model).prepare_training(other)
        output(other, inputs(model)).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in other.named_parameters()})
    torch.testing.assert_close(*found)


@feature("EMAModel")
def _(model: nn.Module, folder: Path) -> None:
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    ema.step(model.parameters())
    ema.save_pretrained(folder)
    loaded = EMAModel.from_pretrained(folder, type(model))
    assert all(torch.equal(one, two) for one, two in zip(loaded.shadow_params, ema.shadow_params, strict=True))


@feature("LoRA")
def _(model: nn.Module, folder: Path) -> bool:
    """Adapters are trained, switched off, saved and loaded, on classes of Diffusers that have them."""
    if not hasattr(model, "add_adapter"):
        return False
    peft = pytest.importorskip("peft")
    known, other = output(model).detach(), copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert (output(model) - known).abs().max() > 1e-3
    output(model).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    model.save_lora_adapter(folder)
    other.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    same(model, other)
    model.disable_adapters()
    torch.testing.assert_close(output(model), known)
    return True


# --- torch.func --------------------------------------------------------------------------------------------------------


@feature("torch.func")
def _(model: nn.Module, folder: Path) -> list[Tensor]:
    """functional_call, grad, vmap over samples, and jvp where PyTorch has it."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    given = inputs(model)

    def loss(weights: dict, sample: Tensor) -> Tensor:
        conditioning = {name: values[: len(sample)] for name, values in given.conditioning.items()}
        rows = ModelInputs(sample, given.timesteps[: len(sample)], conditioning)
        return (
            family_of(model)
            .output(lambda *args, **kwargs: functional_call(model, weights, args, kwargs), rows)
            .square()
            .mean()
        )

    key = next(name for name in weights if name.endswith("to_q.weight"))
    with sdpa_kernel(SDPBackend.MATH):
        found = [loss(weights, given.sample), grad(loss)(weights, given.sample)[key].sum()]
        found.append(vmap(grad(loss), in_dims=(None, 0))(weights, given.sample[:, None])[key].sum())
        if has_forward_mode_of_norms():
            found.append(jvp(lambda x: loss(weights, x), (given.sample,), (torch.ones_like(given.sample),))[1])
    return found


# --- compilers and exports ---------------------------------------------------------------------------------------------


def _compiled(model: nn.Module, *batch_sizes: int, **options) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, **options)
    with torch.no_grad():
        for batch_size in batch_sizes:
            given = inputs(model, batch_size)
            torch.testing.assert_close(family_of(model).output(compiled, given), output(model, given), rtol=1e-4, atol=1e-4)


@feature("compiled", slow=True)
def _(model: nn.Module, folder: Path) -> None:
    _compiled(model, 2)


@feature("compiled with dynamic shapes", slow=True)
def _(model: nn.Module, folder: Path) -> None:
    _compiled(model, 2, 3, dynamic=True)


def program_of(model: nn.Module, dynamic: bool = True) -> torch.export.ExportedProgram:
    given = to_tensors(inputs(model))
    plain, axes = TensorModel(model, list(given)[2:]).eval(), {0: torch.export.Dim("batch", min=1, max=16)}
    shapes = {"sample": axes, "timestep": axes, "conditioning": (axes,) * (len(given) - 2)}
    shapes = {name: value for name, value in shapes.items() if value != ()}
    program = torch.export.export(plain, tuple(given.values()), dynamic_shapes=shapes if dynamic else None)
    remove_idle_squeezes(program.graph_module)
    return program


@torch.no_grad()
def agrees(function: Callable, model: nn.Module, *batch_sizes: int) -> None:
    for batch_size in batch_sizes:
        given = inputs(model, batch_size)
        found = torch.as_tensor(function(*to_tensors(given).values()))
        torch.testing.assert_close(found, output(model, given), rtol=1e-3, atol=1e-3)


@feature("torch.export with a dynamic batch", slow=True)
def _(model: nn.Module, folder: Path) -> None:
    agrees(program_of(model).module(), model, 1, 2, 5)


@feature("torch.onnx.export", slow=True)
def _(model: nn.Module, folder: Path) -> None:
    runtime, path = pytest.importorskip("onnxruntime"), folder / "model.onnx"
    torch.onnx.export(program_of(model), (), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]
    agrees(lambda *given: session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})[0], model, 1, 3)


@feature("OpenVINO", slow=True)
def _(model: nn.Module, folder: Path) -> None:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(openvino.convert_model(program_of(model)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    agrees(lambda *given: compiled([x.numpy() for x in given])[0], model, 1, 3)


@feature("torch.jit.trace", slow=True)
def _(model: nn.Module, folder: Path) -> None:
    given = to_tensors(inputs(model))
    plain = TensorModel(model, list(given)[2:]).eval()
    with torch.no_grad():
        agrees(torch.jit.trace(plain, tuple(given.values())), model, 2)


# --- the tests ---------------------------------------------------------------------------------------------------------


def structure(value: object) -> object:
    """What a result looks like; every tensor in it must be finite."""
    if isinstance(value, Tensor):
        assert value.isfinite().all()
        return tuple(value.shape), value.dtype
    return [structure(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.fast_variants(12)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in FEATURES])
def test_models_without_blocks_do_what_stock_models_do(name: str, family: str, tmp_path: Path) -> None:
    found = []
    for model in (stock(family), without_blocks(family)):
        folder = tmp_path / type(model).__name__
        folder.mkdir()
        torch.manual_seed(0)
        found.append(structure(FEATURES[name](model, folder)))
    assert found[0] == found[1]


def test_blocks_are_removed() -> None:
    """Otherwise nothing would be compared."""
    for family in ARCHITECTURES:
        small = without_blocks(family)
        assert small.config.removed_blocks and small.config.layer_channels


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_pruned_program_has_fewer_operations_than_the_dense_one(family: str) -> None:
    """Whatever reads an exported program, runtimes and compilers, has less to do without blocks, and no more with widths."""
    narrow = architectures.pruned() if family == UNET else families.pruned(family, ARCHITECTURES[family])
    dense, narrow, short = (
        [node.op for node in program_of(model, dynamic=False).graph.nodes].count("call_function")
        for model in (stock(family), narrow, without_blocks(family))
    )
    assert 50 < short < dense and narrow <= dense
