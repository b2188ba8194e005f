"""Results of the study and of its time measurements, with figures that tell rows apart."""

from __future__ import annotations

from study_records import widths_key


def run_of(name: str, seed: int, ssim: float, distance: float = 0.04, width: int = 48) -> dict:
    """What a run leaves, as far as these scripts read it."""
    pruned = {"macs": 50_000_000, "parameters": 7, "step_loss": 0.07, "fd_pixels": distance, "ssim_to_dense": ssim}
    distances = {"fd_pixels": {"title": "FD-pixels"}}
    return {
        **{"setting": name, "seed": seed, "evaluation": {"distances": distances}, "widths": {"conv_in": width}},
        **{"pruned": {**pruned, "psnr_to_dense": 20.0}, "steps": 100},
        "dense": {"macs": 100_000_000, "step_loss": 0.06, "fd_pixels": 0.03},
    }


def row_of(run: dict, speedup: float) -> dict:
    """Its measurement at batch 16, with an interval of 0.1 to either side."""
    one = {"speedup": speedup, "interval": [speedup - 0.1, speedup + 0.1], "rounds": 60}
    return {"widths": widths_key(run["widths"]), "speed": {"16": one}}
