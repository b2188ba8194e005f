"""A served demo page of tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_gfprune.demo.models import Models, load_models
from helpers.hub import CARD
from helpers.tiny_pipelines import tiny_pipeline


def demo_run(folder: Path) -> tuple[Path, Path]:
    """A pruned pipeline with a report, and the dense one."""
    dense = tiny_pipeline()
    dense.save_pretrained(folder / "dense")
    run = dense.prune(torch.rand(4, 1, 8, 8) * 2 - 1, ratio=0.3, recovery=False)
    run.save_pretrained(folder / "run")
    (folder / "run/pruning_report.json").write_bytes((CARD / "pruning_report.json").read_bytes())
    return folder / "run", folder / "dense"


@contextlib.contextmanager
def serve_demo(run: Path, dense: Path) -> Iterator[tuple[Models, str]]:
    """The models and the address of a page that is served in this process."""
    from diffusers_gfprune.demo.page import launch, make_page  # importing gradio takes seconds

    models = load_models(str(run), str(dense))
    page = make_page(models)
    launch(page, block=False)
    try:
        yield models, page.local_url
    finally:
        page.close()
