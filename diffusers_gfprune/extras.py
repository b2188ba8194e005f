"""Check that the packages of an extra are installed."""

from __future__ import annotations

import importlib.util

__all__ = ["check_extra"]

# Import names by extra
EXTRAS = {
    "training": ("accelerate", "cleanfid", "datasets", "matplotlib", "psutil", "skimage", "torchvision", "transformers"),
    "demo": ("gradio", "matplotlib", "skimage", "torchvision", "transformers"),
}


def check_extra(name: str = "training") -> None:
    """Check for the packages of an extra: those that data, training and evaluation need, or those of the demo page.

    Args:
        name: `"training"` or `"demo"`.

    Raises:
        ImportError: A package is not installed. The message contains the command that installs them.
    """
    missing = [package for package in EXTRAS[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'diffusers-gfprune[{name}]'")
