"""model.py, runtimes.py: what is loaded is one export, and it takes its own inputs only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusers_gfprune.export import load_exported
from diffusers_gfprune.export.model import ExportedModel
from diffusers_gfprune.families.lookup import family_of
from helpers.tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of two models, of greyscale images and of colours."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_pipeline().export(folder / "grey", format="torch")
    tiny_pipeline(in_channels=3, out_channels=3).export(folder / "rgb", format="torch")
    return folder


@pytest.fixture(scope="module")
def grey(exports: Path) -> ExportedModel:
    return load(exports / "grey")


@pytest.fixture
def folder(exports: Path, tmp_path: Path) -> Path:
    """A copy of an export, to damage."""
    return shutil.copytree(exports / "grey", tmp_path / "grey")


def load(folder: Path) -> ExportedModel:
    return load_exported(folder, trust_remote_code=True)


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.slow
def test_it_is_like_the_model_for_pipelines(exports: Path) -> None:
    exported = load(exports / "rgb")
    assert exported.config.in_channels == 3 and exported.config["_class_name"] == "UNet2DModel"
    assert exported.dtype == torch.float32 and exported.device == torch.device("cpu")
    assert family_of(exported).dense_class.__name__ == "UNet2DModel"
    sample = torch.randn(2, 3, 8, 8)
    output = exported(sample, 3)
    assert type(output).__name__ == "UNet2DOutput"
    for timestep in (3, 3.0, torch.tensor(3), torch.tensor([3, 3]), torch.tensor(3.0)):
        assert torch.equal(exported(sample, timestep, return_dict=False)[0], output.sample)
    assert exported(sample.half(), 3).sample.dtype == torch.float16
    with pytest.raises(ValueError, match="^an exported model cannot be saved"):
        exported.save_pretrained("anywhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(1, 3, 8, 8), 1),
            r"sample has shape \(1, 3, 8, 8\), but .* a UNet2DModel takes \(1, 1, 8, 8\)$",
        ),
        ((torch.zeros(1, 1, 8, 8), 0.5), "timestep=0.5 must be whole"),
        ((torch.zeros(2, 1, 8, 8), torch.zeros(3)), r"timestep has shape \(3,\), but"),
        (
            (torch.zeros(1, 1, 8, 8), 1, torch.zeros(1, 8, 16)),
            "this export of a UNet2DModel takes sample, timestep, not encoder_hidden_states",
        ),
    ],
)
def test_other_inputs_are_refused(arguments: tuple, message: str, grey: ExportedModel) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        grey(*arguments)


def test_archives_of_pytorch_need_trust(exports: Path) -> None:
    with pytest.raises(ValueError, match="^model.pt2 is an archive of PyTorch, and loading one can run code: pass trust_"):
        load_exported(exports / "grey")


def test_saved_archives_have_no_pickles(exports: Path) -> None:
    """Weights are raw bytes, and the example inputs that PyTorch would pickle are left out."""
    import zipfile

    with zipfile.ZipFile(exports / "grey/model.pt2") as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        assert [size for name, size in sizes.items() if "sample_inputs" in name] == [0]
        for name in sizes:
            if name.endswith("_config.json"):
                assert not any(entry["use_pickle"] for entry in json.loads(archive.read(name))["config"].values())


def test_a_folder_that_is_no_export_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^folder=.* is not an export: it has no export.json$"):
        load(tmp_path)


def test_files_of_another_export_are_one_line(exports: Path, folder: Path) -> None:
    shutil.copy(exports / "rgb/model.pt2", folder)
    with pytest.raises(ValueError, match=r"model.pt2 is of another model or batch size: .* \[None, 1, 8, 8\], the file has"):
        load(folder)
    edit(folder / "config.json", _class_name="DiTTransformer2DModel")
    with pytest.raises(ValueError, match="^folder=.* mixes two exports: config.json is of a DiTTransformer2DModel"):
        load(folder)


def test_damaged_exports_are_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no compiled.pt2"):
        load_exported(folder, trust_remote_code=True, compiled=True)
    model = (folder / "model.pt2").read_bytes()
    (folder / "model.pt2").write_bytes(model[:1000])
    with pytest.raises(ValueError, match="model.pt2 cannot be loaded by its runtime: "):
        load(folder)
    (folder / "model.pt2").unlink()
    with pytest.raises(ValueError, match="^folder=.* has no model.pt2, which its export.json names$"):
        load(folder)
    edit(folder / "export.json", format_version=2)
    with pytest.raises(ValueError, match="export.json does not describe an export: format_version=2 must be 1"):
        load(folder)
    edit(folder / "export.json", format_version=1, format="tflite")
    with pytest.raises(ValueError, match="does not describe an export: format=tflite must be one of"):
        load(folder)
    (folder / "export.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe an export: "):
        load(folder)
