"""One run of the study: a script with its arguments, and what the teacher predicts kept for the runs after it.

    python benchmarks/study_run.py --teacher_cache runs/study/cache training/prune_ddpm.py --recipe digits --output_dir DIR

Runs of one seed train on the same noisy images step by step, whatever they prune, and so ask the dense model the same
questions: its answers, a quarter of a run's time, are kept in files named by what was asked. What comes from a file is what
the model would say, bit for bit; only the seconds in a run's curves are not those of a run by itself (`study_time.py`).
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

from diffusers_gfprune.metrics.cache import TensorCache, tensors_fingerprint
from diffusers_gfprune.objectives.objective import Objective

__all__ = ["RememberedTeacher", "remembered"]

# Modules that have a `main`, by the path of the script
SCRIPTS = {
    "training/prune_ddpm.py": "diffusers_gfprune.scripts.prune_ddpm",
    "benchmarks/study_baselines.py": "study_baselines",
}


class RememberedTeacher(nn.Module):
    """A frozen model whose predictions are kept.

    Args:
        teacher: A `NoisePrediction` of the dense model, in evaluation mode.
        cache: Where predictions are kept.
    """

    def __init__(self, teacher: nn.Module, cache: TensorCache) -> None:
        super().__init__()
        self.teacher, self.cache = teacher, cache
        # Threads decide in which order sums are taken, and so the last bit.
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


def remembered(folder: Path, objective: Objective) -> nn.Module | None:
    """The teacher of a loss, with its predictions kept in a folder if it is compared by these alone, on the CPU."""
    teacher = objective.teacher
    if teacher is None or objective.needs_features or objective.needs_directions:
        return teacher
    on_cpu = next(teacher.parameters()).device.type == "cpu"
    return RememberedTeacher(teacher, TensorCache(folder)) if on_cpu else teacher


def main(argv: list[str] | None = None) -> None:
    """Run a script with its teacher's predictions kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher_cache", type=Path, required=True, help="Folder of the predictions that are kept.")
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="Its arguments.")
    options = parser.parse_args(argv)
    script = importlib.import_module(SCRIPTS[options.script])
    script.main(options.words, teacher=functools.partial(remembered, options.teacher_cache.resolve()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, SafetensorError, ImportError) as error:
        sys.exit(f"study_run.py: error: {' '.join(str(error).split())}")
