"""docs/quickstart.ipynb: it runs from its first cell to its last, with and without the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.hub_server import WRITE, HubServer
from helpers.scripts import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_ten_cells_at_most() -> None:
    assert len(cells()) <= 10 and len({cell["id"] for cell in cells()}) == len(cells())


def test_notebook_prunes_looks_and_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITE)
        for cell in cells():
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
        pushed = server.files("alice/ddpm-digits-gfpruned")
    saved = tmp_path / "ddpm-digits-gfpruned"
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(pushed)
    assert (saved / "unet/config.json").read_bytes() == pushed["unet/config.json"]
    first, second = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("MACs")]
    dense, small = (int(words[3].replace(",", "")) for words in (first, second))
    assert abs(small / dense - 0.7) < 0.01
    draw, pipes = names["draw"], (names["small"], names["again"])
    small_images, loaded_images = (draw(pipe, 4) for pipe in pipes)
    assert [image.tobytes() for image in small_images] == [image.tobytes() for image in loaded_images]
