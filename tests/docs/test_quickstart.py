"""docs/quickstart.ipynb: it runs from its first cell to its last, with and without the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.hub_server import WRITE, HubServer
from helpers.scripts import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"
# Fewer steps, to save time
SMALLER = {"num_inference_steps=50": "num_inference_steps=4"}


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def code_cells() -> Iterator[str]:
    """The code of the cells, made smaller."""
    text = "\0".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    for found, smaller in SMALLER.items():
        assert text.count(found) == 1
        text = text.replace(found, smaller)
    yield from text.split("\0")


def sizes(text: str) -> dict[str, list[int]]:
    """Parameters and MACs of each model in the output of the cells."""
    rows = [line.replace(",", "").split() for line in text.splitlines() if line.endswith("MACs")]
    return {name: [int(parameters), int(macs)] for name, parameters, _, macs, _ in rows}


def test_ten_cells_at_most() -> None:
    assert len(cells()) <= 10 and len({cell["id"] for cell in cells()}) == len(cells())


def test_notebook_prunes_looks_and_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITE)
        for code in code_cells():
            exec(compile(code, str(NOTEBOOK), "exec"), names)
        pushed = server.files("alice/ddpm-digits-gfpruned")
    saved = tmp_path / "ddpm-digits-gfpruned"
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(pushed)
    assert (saved / "unet/config.json").read_bytes() == pushed["unet/config.json"]
    printed = sizes(capsys.readouterr().out)
    assert abs(printed["pruned"][1] / printed["dense"][1] - 0.7) < 0.01
    shown = sizes("".join("".join(output.get("text", "")) for cell in cells() for output in cell.get("outputs", [])))
    assert shown["dense"] == printed["dense"]
    assert shown["pruned"] == pytest.approx(printed["pruned"], rel=0.02)  # rounding may choose other units elsewhere
    draw, pipes = names["draw"], (names["small"], names["again"])
    small_images, loaded_images = (draw(pipe, 4) for pipe in pipes)
    assert [image.tobytes() for image in small_images] == [image.tobytes() for image in loaded_images]
