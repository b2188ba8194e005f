"""What the extra `training` of this package installs, and one clear line where it is not installed."""

from __future__ import annotations

import importlib.util

__all__ = ["check_extra"]

# Modules, as they are imported
TRAINING = ("accelerate", "cleanfid", "datasets", "matplotlib", "psutil", "skimage", "torchvision", "transformers")


def check_extra() -> None:
    """Refuse to go further without the packages that data, training and evaluation need.

    Raises:
        ImportError: At least one is not installed. The message has the command that installs them.
    """
    missing = [name for name in TRAINING if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'diffusers-gfprune[training]'")
