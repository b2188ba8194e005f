"""The page and its command line: what it draws, what it says of mistakes, and that it asks no other host."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image, ImageChops

from diffusers_gfprune import extras
from diffusers_gfprune.demo.drawing import Settings, draw
from diffusers_gfprune.demo.models import Models
from diffusers_gfprune.demo.pictures import picture
from helpers.demo import demo_run, serve_demo
from helpers.scripts import run_script

PROGRAM = "python -m diffusers_gfprune.demo: error: "


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Models, str]]:
    run, dense = demo_run(tmp_path_factory.mktemp("served"))
    with serve_demo(run, dense) as page:
        yield page


def test_page_draws_both_models(served: tuple[Models, str]) -> None:
    models, url = served
    client = Client(url, verbose=False)
    dense, pruned, difference, figures = client.predict(4, 3, "DDIMScheduler", 7, api_name="/draw")
    for model, path in ((models.reference, dense), (models.pruned, pruned)):
        expected = picture(draw(model, Settings(4, 3, "DDIMScheduler", 7), models.choices).images)
        assert ImageChops.difference(Image.open(path).convert("RGB"), expected).getbbox() is None
    assert Image.open(difference).convert("RGB").getextrema() != ((0, 0),) * 3
    assert re.match(r"dense \*\*\d+\.\d\d s\*\*, pruned \*\*\d+\.\d\d s\*\*\s+SSIM .*, PSNR .* dB", figures)
    with pytest.raises(AppError, match="seed=-1 must be a whole number from 0 to"):
        client.predict(4, 3, "DDIMScheduler", -1, api_name="/draw")


def test_any_error_of_a_pipeline_is_one_line(served: tuple[Models, str], monkeypatch: pytest.MonkeyPatch) -> None:
    models, url = served

    def fail(*arguments, **options):
        raise IndexError("no such\nluck")

    monkeypatch.setattr(models.pruned.pipeline.unet, "forward", fail)
    with pytest.raises(AppError, match="^no such luck$"):
        Client(url, verbose=False).predict(1, 3, "DDIMScheduler", 7, api_name="/draw")


def test_page_names_no_font_or_script_of_another_host(served: tuple[Models, str]) -> None:
    """What a browser asks for is in test_browser.py."""
    url = served[1]
    for name in ("", "theme.css"):
        with urllib.request.urlopen(url + name) as answer:
            text = answer.read().decode()
        assert not re.findall(
            r"""(?:src|href)=["'](?:https?:)?//[^"']*|@import[^;]*//[^;]*|url\(["']?(?:https?:)?//[^)]*""", text
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "./nothing"], "reference=./nothing is not a folder"),
        (["--dtype", "int8"], "dtype=int8 must be one of float32, float16, bfloat16"),
        (["--server_port", "70000"], "server_port=70000 must be from 1 to 65535"),
        (["--server_name", "192.0.2.1"], "server_name=192.0.2.1 cannot be used: "),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    run, _ = demo_run(tmp_path)
    done = run_script("diffusers_gfprune.demo", run, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(PROGRAM + message), done.stderr


def test_port_in_use_is_found_before_models_are_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run_script("diffusers_gfprune.demo", "./nothing", "--server_port", port)
    assert done.stderr.splitlines()[-1].startswith(f"{PROGRAM}server_port={port} cannot be used: ")


def test_missing_gradio_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "demo", ("gradio_is_missing",))
    done = run_script("diffusers_gfprune.demo", "./nothing")
    assert done.returncode == 1
    assert done.stderr == f"{PROGRAM}gradio_is_missing not installed: pip install 'diffusers-gfprune[demo]'\n"
