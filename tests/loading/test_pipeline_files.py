"""loading/pipeline_files.py: which files of a pipeline are pushed, and which of them pruning did not change."""

from __future__ import annotations

import fnmatch

import pytest

from diffusers_gfprune.loading.pipeline_files import file_patterns, is_unchanged, weight_patterns

INDEX = {
    "_class_name": "DiTPipeline",
    "transformer": ["diffusers_gfprune", "GFPrunedDiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "image_encoder": [None, None],
}


@pytest.mark.parametrize(
    ("name", "pushed"),
    [
        ("model_index.json", True),
        ("scheduler/scheduler_config.json", True),
        ("transformer/config.json", True),
        ("transformer/diffusers_gfprune.py", True),
        ("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", True),
        ("transformer/notes.txt", False),
        ("vae/config.json", True),
        ("vae/diffusion_pytorch_model.safetensors", True),
        ("vae/diffusion_pytorch_model.bin", False),
        ("vae/code.py", False),
        ("image_encoder/model.safetensors", False),
    ],
)
def test_files_of_a_pipeline(name: str, pushed: bool) -> None:
    assert any(fnmatch.fnmatchcase(name, pattern) for pattern in file_patterns(INDEX)) == pushed


def test_unchanged_files_are_those_of_other_components() -> None:
    assert is_unchanged(INDEX, "vae/config.json")
    for name in ("transformer/config.json", "scheduler/scheduler_config.json", "results.json"):
        assert not is_unchanged(INDEX, name)
    assert not is_unchanged({}, "vae/config.json")


def test_old_weights_are_those_of_all_folders_with_weights() -> None:
    patterns = weight_patterns(["transformer/diffusion_pytorch_model.safetensors", "results.json"])
    assert any(fnmatch.fnmatchcase("transformer/diffusion_pytorch_model.fp16.safetensors", pattern) for pattern in patterns)
    assert any(fnmatch.fnmatchcase("unet/diffusion_pytorch_model.safetensors", pattern) for pattern in patterns)
    assert not any(fnmatch.fnmatchcase("vae/diffusion_pytorch_model.safetensors", pattern) for pattern in patterns)
