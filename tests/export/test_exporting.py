"""exporting.py: exports are complete, equal to PyTorch, and run in stock pipelines and by their runtimes alone."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_gfprune.export import exporting, load_exported
from diffusers_gfprune.export.description import FORMATS
from helpers.scripts import ROOT, files_limited_to
from helpers.tiny_pipelines import stock_samples, tiny_pipeline

FILES = {"onnx": {"model.onnx"}, "openvino": {"model.xml", "model.bin"}, "torch": {"model.pt2"}}
COMMON = {"README.md", "config.json", "export.json", "scheduler/scheduler_config.json"}
ROUNDING = 1e-5  # relative, in float32


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def code_of(text: Path) -> list[str]:
    """Examples in a text."""
    return re.findall(r"```python\n(.*?)```", text.read_text(), re.DOTALL)


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_samples_in_the_stock_pipeline_and_runs_alone(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, folder = tiny_pipeline(), tmp_path / "exports/digits"
    description = pipe.export(folder, format=format)
    assert files(folder) == COMMON | FILES[format]
    assert files(tmp_path) == {f"exports/digits/{name}" for name in files(folder)}
    assert {(row["batch_size"], row["timestep"]) for row in description.checks} >= {(1, 0), (3, 0), (1, 999), (3, 999)}
    assert description.max_relative_error < ROUNDING
    assert json.loads((folder / "export.json").read_text())["max_relative_error"] == description.max_relative_error

    exported = load_exported(folder, trust_remote_code=True)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(
        stock_samples(exported, scheduler), stock_samples(pipe.unet, pipe.scheduler), rtol=1e-4, atol=1e-4
    )
    assert exported.config.sample_size == 8 and "_name_or_path" not in exported.config
    assert str(tmp_path) not in (folder / "config.json").read_text()

    # More samples than a traced program takes at once
    sample = torch.randn(65, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(exported(sample, 7).sample, pipe.unet(sample, 7).sample, rtol=1e-4, atol=1e-4)

    # Examples: of the export, in its folder, and of the documentation, where the export is `exports/digits`
    in_pipeline, alone = code_of(folder / "README.md")
    in_docs = [code for code in code_of(ROOT / "docs/guides/export.md") if f"/{description.file}" in code]
    assert len(in_docs) == (0 if format == "torch" else 1)
    for code, place in [(in_pipeline, folder), (alone, folder), *((code, tmp_path) for code in in_docs)]:
        monkeypatch.chdir(place)
        names: dict = {}
        exec(code, names)
        if "prediction" in names:
            with torch.no_grad():
                wanted = pipe.unet(torch.from_numpy(names["inputs"]["sample"]), torch.tensor([999])).sample
            np.testing.assert_allclose(names["prediction"], wanted.numpy(), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(names["unet"](sample, 7).sample, exported(sample, 7).sample)


INTERRUPTED = """
import gc, os, signal, sys
from diffusers_gfprune.export import load_exported
signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel tests run with SIGINT ignored
for _ in range(2):
    first, second = load_exported(sys.argv[1]), load_exported(sys.argv[1])
    del first
    gc.collect()
    del second
    gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_ctrl_c_works_after_exports_were_freed(tmp_path: Path) -> None:
    """With one OpenVINO core for each export, it is a segmentation fault (OpenVINO 2026.4.1)."""
    tiny_pipeline().export(tmp_path / "export", format="openvino")
    run = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path / "export"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "interrupted\n"), run.stderr


@pytest.mark.slow
def test_fp16_with_a_fixed_number_of_samples(tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline(), tmp_path / "export"
    pipe.unet.train()
    before = copy.deepcopy(pipe.unet.state_dict())
    folder.mkdir()
    (folder / "mine").write_text("mine")
    options = {"format": "torch", "dtype": "fp16", "batch": 2, "num_images": 3, "num_inference_steps": 2}
    for overwrite, message in ((False, "already exists"), (True, "holds mine and no export.json: it is not an earlier")):
        with pytest.raises(ValueError, match=message):
            pipe.export(folder, **options, overwrite_output_dir=overwrite)
    assert files(folder) == {"mine"}
    (folder / "mine").unlink()
    pipe.export(folder, format="torch", overwrite_output_dir=True)

    description = pipe.export(folder, **options, overwrite_output_dir=True)
    assert files(folder) == COMMON | FILES["torch"]
    assert {row["batch_size"] for row in description.checks} == {2}
    assert ROUNDING < description.max_relative_error < 0.01
    assert description.similarity["num_images"] == 4 and description.similarity["ssim_to_fp32"] > 0.99
    assert pipe.unet.training and pipe.unet.dtype == torch.float32 and not pipe.unet._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())

    exported = load_exported(folder, trust_remote_code=True)
    assert exported(torch.randn(2, 1, 8, 8), 7).sample.dtype == torch.float32
    with pytest.raises(ValueError, match=r"^sample has shape \(3, 1, 8, 8\), but this export .* takes \(2, 1, 8, 8\); export"):
        exported(torch.randn(3, 1, 8, 8), 7)


def test_an_export_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is larger by a hundredth."""
    trace = exporting.trace

    def another(parts, denoiser, batch_size):
        other = copy.deepcopy(denoiser)
        with torch.no_grad():
            other.conv_out.weight *= 1.01
        return trace(parts, other, batch_size)

    monkeypatch.setattr(exporting, "trace", another)
    with pytest.raises(
        ValueError, match=r"^the export differs from PyTorch by a relative error of 1.\de-02, but must differ by"
    ):
        tiny_pipeline().export(tmp_path / "export", format="torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1e5, -1e5])
def test_values_that_half_precision_does_not_hold_are_told(size: float, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(size)
    options = {"format": "torch", "dtype": "fp16", "num_images": 1, "num_inference_steps": 1}
    message = "^dtype=fp16: the export gives values that are not finite at timestep 0: use fp32$"
    with pytest.raises(ValueError, match=message):
        pipe.export(tmp_path / "export", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_no_number_is_not_hidden_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"batch_size": 1, "timestep": timestep, "max_relative_error": error}
        for timestep, error in ((0, 0.5), (333, math.nan), (999, 0.25))
    ]
    monkeypatch.setattr(exporting, "relative_errors", lambda *_: rows)
    with pytest.raises(ValueError, match="^dtype=fp32: the export gives values that are not finite at timestep 333$"):
        tiny_pipeline().export(tmp_path / "export", format="torch")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with files_limited_to(2**12), pytest.raises((ValueError, OSError)) as error:
        tiny_pipeline().export(tmp_path / "export", format="torch")
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format=tflite must be one of onnx, openvino, torch"),
        ({"dtype": "bf16"}, "dtype=bf16 must be one of fp32, fp16, int8"),
        ({"format": "torch", "dtype": "int8"}, "dtype=int8 must be fp32 or fp16 with format=torch"),
        ({"batch": 0}, "batch=0 must be dynamic or a number of samples"),
        ({"batch": "all"}, "batch=all must be dynamic or a number of samples"),
        ({"compile": True}, "compile=True must be False with format=onnx"),
        ({"num_images": 3}, "num_images=3 needs dtype=fp16 or int8: no samples are drawn for fp32"),
        ({"num_inference_steps": 3}, "num_inference_steps=3 needs dtype=fp16 or int8"),
        ({"prompts": ["a cat"]}, r"prompts=\('a cat',\) needs dtype=fp16 or int8"),
        ({"prompts": ["a cat"], "dtype": "fp16"}, r"prompts=\('a cat',\) must be left out: this UNet2DModel is not a"),
        ({"prompts": "a cat"}, "prompts='a cat' must be a list of texts"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
    ],
)
def test_wrong_options_are_one_line(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny_pipeline().export(tmp_path / "export", **options)
    assert list(tmp_path.iterdir()) == []


def test_models_too_large_for_nncf_are_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    monkeypatch.setattr(exporting, "PROTOBUF_LIMIT", 4 * pipe.unet.num_parameters())
    monkeypatch.setattr(exporting, "sampled_reference", lambda *_: pytest.fail("samples are drawn"))
    with pytest.raises(ValueError, match="^dtype=int8 with format=onnx takes models of less than 2 GiB .* format=openvino$"):
        pipe.export(tmp_path / "export", format="onnx", dtype="int8")


def test_other_pipelines_are_refused(tmp_path: Path) -> None:
    class OtherPipeline(DiffusionPipeline):
        def __init__(self, scheduler: DDIMScheduler) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(ValueError, match="^a OtherPipeline is not supported; supported: DDPMPipeline"):
        exporting.export_pipeline(OtherPipeline(DDIMScheduler()), tmp_path / "export", format="torch")


def test_only_the_installed_format_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command that installs what is missing."""
    from diffusers_gfprune.runtimes import requirements

    find = requirements.importlib.util.find_spec
    absent = {"onnxruntime", "openvino", "nncf"}
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    for format, dtype, message in (
        ("onnx", "fp32", r"^onnxruntime not installed: pip install 'diffusers-gfprune\[onnx\]'$"),
        ("openvino", "int8", r"^openvino, nncf not installed: pip install 'diffusers-gfprune\[openvino\]'$"),
    ):
        with pytest.raises(ImportError, match=message):
            tiny_pipeline().export(tmp_path / "export", format=format, dtype=dtype)
    requirements.check_runtime("torch", "fp32")
