"""Check that the packages of the extra `training` are installed."""

from __future__ import annotations

import importlib.util

__all__ = ["check_extra"]

# Import names
TRAINING = ("accelerate", "cleanfid", "datasets", "matplotlib", "psutil", "skimage", "torchvision", "transformers")


def check_extra() -> None:
    """Check for the packages that data, training and evaluation need.

    Raises:
        ImportError: A package is not installed. The message contains the command that installs them.
    """
    missing = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'diffusers-gfprune[training]'")
