"""What makes Diffusers find the classes of this package, so that no code of a repository is needed to load a pruned model.

Two places of Diffusers 0.42 know them then, and both have a test that fails when Diffusers changes there:

- its pipeline modules, among which the library names in `model_index.json` are resolved (Diffusers imports nothing that a
  repository merely names);
- `AutoModel`, which asks for trust wherever `config.json` names a file of the repository (`auto_map`), needed or not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from types import ModuleType

from diffusers import AutoModel, pipelines
from diffusers.models.modeling_utils import ModelMixin

__all__ = ["register"]

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
SOURCES = ("pretrained_model_or_path", "pretrained_model_name_or_path_or_dict")


class _NotThere(AttributeError, ValueError):
    """A class that a repository cannot name."""


class _Registered(ModuleType):
    """What a repository may name in model_index.json, and nothing else of this package."""

    def __getattr__(self, name: str):
        raise _NotThere(f"{name} is no class of diffusers_gfprune that a repository can name: it has {', '.join(self.models)}")


def register(model_classes: Sequence[type[ModelMixin]], pipeline_classes: Sequence[type]) -> None:
    """Make Diffusers load repositories of pruned models with these classes. Doing so again changes nothing.

    Args:
        model_classes: Those that `config.json` and `model_index.json` name.
        pipeline_classes: Those that `model_index.json` may name.
    """
    pipelines.diffusers_gfprune = _Registered("diffusers_gfprune")
    pipelines.diffusers_gfprune.models = tuple(model.__name__ for model in model_classes)
    for found in (*model_classes, *pipeline_classes, ModelMixin):  # the last one Diffusers looks up itself
        setattr(pipelines.diffusers_gfprune, found.__name__, found)
    for name in ("from_pretrained", "from_config"):
        method = getattr(AutoModel, name).__func__
        setattr(AutoModel, name, classmethod(_with_classes(getattr(method, "of_diffusers", method), model_classes)))


def _with_classes(method, model_classes: Sequence[type[ModelMixin]]):
    """A method of `AutoModel` that leaves repositories of some classes to them, and everything else to Diffusers."""
    classes = {model.__name__: model for model in model_classes}

    @functools.wraps(method)
    def found(cls, *args, **kwargs):
        source = args[0] if args else next((kwargs[name] for name in SOURCES if name in kwargs), None)
        config = _config(source, model_classes[0], {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        model = None if config is None else classes.get(config.get("_class_name"))
        if model is None:
            return method(cls, *args, **kwargs)
        options = {name: value for name, value in kwargs.items() if name not in (*SOURCES, "trust_remote_code")}
        if method.__name__ == "from_pretrained":
            return model.from_pretrained(source, **options)
        return model.from_config(config, **{name: options[name] for name in options if name not in HUB_ARGUMENTS})

    found.of_diffusers = method
    return found


def _config(source, model: type[ModelMixin], hub_arguments: Mapping) -> Mapping | None:
    """A config, or the one in a folder or a repository, if there is one."""
    if isinstance(source, (str, os.PathLike)):
        try:
            return model.load_config(source, **hub_arguments)
        except (OSError, ValueError):  # Diffusers will say what is wrong
            return None
    return source if isinstance(source, Mapping) else None
