"""The page and its command line: what it draws, what it says of mistakes, and that it asks no other host."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image, ImageChops

from diffusers_gfprune.demo.__main__ import main
from diffusers_gfprune.demo.drawing import Settings, draw
from diffusers_gfprune.demo.models import Models, load_models
from diffusers_gfprune.demo.pictures import picture
from helpers.hub import CARD
from helpers.scripts import ROOT
from helpers.tiny_pipelines import tiny_pipeline

URL = re.compile(r"(?:https?:)?//[\w.-]+\.\w+")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    dense = tiny_pipeline()
    dense.save_pretrained(folder / "dense")
    run = dense.prune(torch.rand(4, 1, 8, 8) * 2 - 1, ratio=0.3, recovery=False)
    run.save_pretrained(folder / "run")
    (folder / "run/pruning_report.json").write_bytes((CARD / "pruning_report.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def served(folders: Path) -> Iterator[tuple[Models, str]]:
    from diffusers_gfprune.demo.page import launch, make_page

    models = load_models(str(folders / "run"), str(folders / "dense"))
    page = make_page(models)
    launch(page, prevent_thread_lock=True, quiet=True)
    yield models, page.local_url
    page.close()


def test_page_draws_both_models(served: tuple[Models, str]) -> None:
    models, url = served
    client = Client(url, verbose=False)
    dense, pruned, difference, figures = client.predict(4, 3, "DDIMScheduler", 7, api_name="/draw")
    for model, path in ((models.reference, dense), (models.pruned, pruned)):
        expected = picture(draw(model, Settings(4, 3, "DDIMScheduler", 7), models.choices).images)
        assert ImageChops.difference(Image.open(path).convert("RGB"), expected).getbbox() is None
    assert Image.open(difference).convert("RGB").getextrema() != ((0, 0),) * 3
    assert re.search(r"dense \*\*\d+\.\d\d s\*\*, pruned \*\*\d+\.\d\d s\*\*: .* times as fast", figures)
    assert "PSNR" in figures and "SSIM" in figures
    with pytest.raises(AppError, match="num_inference_steps=2.5 must be a whole number"):
        client.predict(4, 2.5, "DDIMScheduler", 7, api_name="/draw")
