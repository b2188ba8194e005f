"""Registration of this package's classes with Diffusers, so that pruned models load without running code of a repository.

The classes are registered in two places of Diffusers 0.42, each with a test that fails if Diffusers changes there:

- its pipeline modules, in which it looks up the library names of `model_index.json` (it does not import other packages that a
  repository names);
- `AutoModel`, which requires trust if `config.json` names a file of the repository (`auto_map`), even if it is not needed.
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
    """A repository names a class that is not registered."""


class _Registered(ModuleType):
    """A module with only those classes that a repository may name in model_index.json."""

    def __getattr__(self, name: str):
        raise _NotThere(f"{name} is not a model class of diffusers_gfprune, which has {', '.join(self.models)}")


def register(model_classes: Sequence[type[ModelMixin]], pipeline_classes: Sequence[type]) -> None:
    """Make Diffusers load repositories of pruned models with these classes. Repeated calls have no effect.

    Args:
        model_classes: Model classes that `config.json` and `model_index.json` may name.
        pipeline_classes: Pipeline classes that `model_index.json` may name.
    """
    pipelines.diffusers_gfprune = _Registered("diffusers_gfprune")
    pipelines.diffusers_gfprune.models = tuple(model.__name__ for model in model_classes)
    for kind in (*model_classes, *pipeline_classes, ModelMixin):  # Diffusers itself looks up ModelMixin
        setattr(pipelines.diffusers_gfprune, kind.__name__, kind)
    for name in ("from_pretrained", "from_config"):
        method = getattr(AutoModel, name).__func__
        setattr(AutoModel, name, classmethod(_with_classes(getattr(method, "of_diffusers", method), model_classes)))


def _with_classes(method, model_classes: Sequence[type[ModelMixin]]):
    """A method of `AutoModel` that loads the given classes with their own methods, and everything else with Diffusers."""
    classes = {model.__name__: model for model in model_classes}

    @functools.wraps(method)
    def load(cls, *args, **kwargs):
        source = args[0] if args else next((kwargs[name] for name in SOURCES if name in kwargs), None)
        config = _config(source, model_classes[0], {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        model = None if config is None else classes.get(config.get("_class_name"))
        if model is None:
            return method(cls, *args, **kwargs)
        options = {name: value for name, value in kwargs.items() if name not in (*SOURCES, "trust_remote_code")}
        if method.__name__ == "from_pretrained":
            return model.from_pretrained(source, **options)
        return model.from_config(config, **{name: options[name] for name in options if name not in HUB_ARGUMENTS})

    load.of_diffusers = method
    return load


def _config(source, model: type[ModelMixin], hub_arguments: Mapping) -> Mapping | None:
    """The config: `source` itself, or the one in a folder or repository; None if there is none."""
    if isinstance(source, (str, os.PathLike)):
        try:
            return model.load_config(source, **hub_arguments)
        except (OSError, ValueError):  # Diffusers reports the error
            return None
    return source if isinstance(source, Mapping) else None
