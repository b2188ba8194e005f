"""One run of the study: runs a script and caches the teacher's predictions for later runs.

    python benchmarks/study_run.py --teacher_cache runs/study/cache training/prune_ddpm.py --recipe digits --output_dir DIR

Runs of the same seed train on the same noisy images step by step, whatever they prune, so the dense model makes the same
predictions. These take a quarter of a run's time and are cached by a hash of their inputs. Results are bit-identical; only the
seconds in a run's curves differ from those of a run without the cache (see `study_time.py`).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusers_gfprune.fingerprints import tensors_fingerprint
from diffusers_gfprune.metrics.cache import TensorCache
from diffusers_gfprune.objectives.objective import Objective

__all__ = ["RememberedTeacher", "remembered"]

# Modules with a `main`, by path of the script
SCRIPTS = {
    "training/prune_ddpm.py": "diffusers_gfprune.scripts.prune_ddpm",
    "benchmarks/study_baselines.py": "study_baselines",
    "benchmarks/study_trajectory.py": "study_trajectory",
}


class RememberedTeacher(nn.Module):
    """A frozen model with cached predictions.

    Args:
        teacher: A `NoisePrediction` of the dense model, in evaluation mode.
        cache: Cache of the predictions.
    """

    def __init__(self, teacher: nn.Module, cache: TensorCache) -> None:
        super().__init__()
        self.teacher, self.cache = teacher, cache
        # The number of threads affects the order of sums, and so the last bit.
        self.identity = {
            "teacher": tensors_fingerprint(teacher.state_dict()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def forward(self, noisy_images: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor] | None = None, **options):
        """The prediction, of the shape of `noisy_images` `(batch, channels, height, width)`."""
        asked = hashlib.sha256()
        for tensor in (noisy_images, timesteps, *(conditioning or {}).values()):
            asked.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
        key = {**self.identity, "inputs": asked.hexdigest()}
        answer = functools.partial(self.teacher, noisy_images, timesteps, conditioning, **options)
        return self.cache.get("teacher", key, lambda: {"prediction": answer()})["prediction"]


def remembered(folder: Path, objective: Objective) -> Objective:
    """A loss whose teacher's predictions are cached in a folder, if it uses only these, on the CPU."""
    teacher = objective.teacher
    if teacher is None or objective.arguments.needs_features or objective.arguments.needs_directions:
        return objective
    if next(teacher.parameters()).device.type == "cpu":
        objective.teacher = RememberedTeacher(teacher, TensorCache(folder))
    return objective


def main(argv: list[str] | None = None) -> None:
    """Run a script with cached predictions of the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher_cache", type=Path, required=True, help="Folder of the cached predictions.")
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="Arguments of the script.")
    options = parser.parse_args(argv)
    script = importlib.import_module(SCRIPTS[options.script])
    script.main(options.words, loss=functools.partial(remembered, options.teacher_cache.resolve()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, SafetensorError, ImportError) as error:
        sys.exit(f"study_run.py: error: {' '.join(str(error).split())}")
