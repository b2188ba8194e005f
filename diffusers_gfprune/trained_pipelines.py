"""Load trained pipelines with strict checks, and save them whole in their own class.

A pipeline can be pruned if its class and components in `model_index.json` (`loading.pipeline_layouts`) and the class of its
scheduler (`diffusion.schedulers`) are supported, and all weights that are used fit their configs (`loading.components`). Code
of the repository does not run, and pickles are not read.

A pruned pipeline is the dense one with another denoiser: the files of all other components are copied (`copy_component`).

The `scaling_factor` of a `VQModel` came with Diffusers 0.22. Models that were published before, such as those of latent
diffusion, were trained on latents as they are, while Diffusers fills in 0.18215 where a `config.json` has none. It is 1 here,
and in pipelines that are saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import transformers
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, PNDMPipeline, PNDMScheduler
from diffusers.pipelines.latent_diffusion import LDMBertModel
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from . import PruneDDPMPipeline
from .diffusion.ddpm import check_variance_type
from .diffusion.latents import LatentCodec
from .diffusion.process import DiffusionProcess
from .diffusion.prompts import PromptEncoder
from .diffusion.schedulers import (
    TRAINABLE_SCHEDULERS,
    check_scheduler_class,
    ddpm_of_euler,
    is_ddpm_sampled_by_euler,
    training_process,
)
from .errors import HUB_ERRORS, first_line
from .families.base import Family
from .families.lookup import FAMILIES, family_of
from .loading.components import (
    check_copied,
    component_folder,
    copied_files,
    copy_component,
    load_model,
    read_config,
    variant_in,
    variant_of,
    variant_to_load,
)
from .loading.pipeline_layouts import LAYOUTS, PACKAGE, PipelineLayout, check_index, check_process, components_of
from .metrics.model_size import parameter_bytes, spatial_size
from .metrics.sampling import image_shape

__all__ = ["TrainedPipeline", "load_pipeline"]

logger = logging.getLogger(__name__)

AUTOENCODERS = {name: getattr(diffusers, name) for name in ("AutoencoderKL", "VQModel")}
TEXT_ENCODERS = {
    **{name: getattr(transformers, name) for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")},
    "LDMBertModel": LDMBertModel,
}
# Tokenizer of each text encoder. Its class may also have the name with "Fast"
TOKENIZERS = {
    **dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), "CLIPTokenizer"),
    "LDMBertModel": "BertTokenizer",
    "T5EncoderModel": "T5Tokenizer",
}
# Errors that loading a malformed repository may raise
_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, HfHubHTTPError, HFValidationError),
)


class TrainedPipeline(NamedTuple):
    """A trained denoiser with the other components of its pipeline.

    Attributes:
        denoiser: The model that is pruned, on the CPU, in float32.
        scheduler: The scheduler, with the class and configuration in which it was saved, and those settings that its pipeline
            gives it (Stable Diffusion's never clips latents); for SDXL's Euler scheduler, the `DDPMScheduler` of its training.
        process: Process of the training.
        kind: Class of the pipeline.
        folder: The loaded folder, with the files of all components.
        index: Content of its `model_index.json`.
        codec: Encodes images to latents and decodes samples; None for pixels.
        prompts: Encodes captions; None unless text is the condition.
    """

    denoiser: ModelMixin
    scheduler: object
    process: DiffusionProcess
    kind: type[DiffusionPipeline]
    folder: Path
    index: dict
    codec: LatentCodec | None = None
    prompts: PromptEncoder | None = None

    def makes(self) -> str:
        """What the pipeline makes, in words, which are equal for pipelines whose images can be compared one by one."""
        denoiser, codec = self.denoiser, self.codec
        channels, height, width = image_shape(denoiser, codec)
        made = f"{height}x{width} images of {channels} channels"
        if codec is not None:
            size = "x".join(map(str, (denoiser.config.in_channels, *spatial_size(denoiser))))
            made += f" from latents of {size}"
        labels = family_of(denoiser).class_labels(denoiser.config)
        made += "" if labels is None else f", {labels.count} classes"
        if self.prompts is not None:  # prompts are encoded once for both models
            encoders = json.dumps(self.prompts.identity(), sort_keys=True)
            made += f", from text by encoders {hashlib.sha256(encoders.encode()).hexdigest()[:8]}"
        size = family_of(denoiser).vector_size(denoiser.config)
        made += "" if size is None else f", from vectors of {size} values"
        made += f" in {self.process.num_train_timesteps} timesteps"
        return made if self.process.name == "ddpm" else f"{made} of {self.process.title}"

    @property
    def stock_class(self) -> type[DiffusionPipeline]:
        """Class of Diffusers that samples the model. A DDPM of pixels is a `PNDMPipeline` if this is its scheduler, and
        otherwise a `DDPMPipeline`, which samples with any other scheduler."""
        if self.codec is not None or self.process.name != "ddpm":
            return self.kind
        return PNDMPipeline if isinstance(self.scheduler, PNDMScheduler) else DDPMPipeline

    def stock(self) -> DiffusionPipeline:
        """The pipeline as Diffusers loads it, with the loaded components."""
        if self.codec is None:
            return self.stock_class(unet=self.denoiser, scheduler=self.scheduler)
        layout = LAYOUTS[self.kind.__name__]
        loaded = {family_of(self.denoiser).component: self.denoiser, layout.autoencoder: self.codec.vae}
        if self.prompts is not None:
            for names, *parts in zip(layout.text, self.prompts.tokenizers, self.prompts.encoders):
                loaded |= zip(names, parts)
        others = [name for name in components_of(self.index) if name not in loaded and (self.folder / name).is_dir()]
        variants = {variant_in(self.folder / name, name) for name in others} - {None}
        options = {"variant": variants.pop()} if len(variants) == 1 else {}
        return self.kind.from_pretrained(self.folder, use_safetensors=True, local_files_only=True, **options, **loaded)

    def saved_bytes(self) -> int:
        """Size of what `save` writes with the dense denoiser, in bytes, without small files."""
        component = family_of(self.denoiser).component
        others = [name for name in components_of(self.index) if name != component] if self.codec is not None else []
        copied = (path for name in others for path in copied_files(self.folder, name))
        return parameter_bytes(self.denoiser) + sum(path.stat().st_size for path in copied)

    def copy_others(self, folder: Path, weights: bool = True) -> None:
        """Copy the components of a latent pipeline without its denoiser, or only their settings and vocabularies."""
        for name in components_of(self.index) if self.codec is not None else ():
            if name != family_of(self.denoiser).component:
                copy_component(self.folder, folder, name, self._settings(name), weights)

    def _settings(self, name: str) -> dict[str, object]:
        """Settings of a component that its file lacks, or that its pipeline changes.

        A pipeline in memory has them. Schedulers that are made from the configuration of its scheduler do not: settings that
        were not in a file become the defaults of Diffusers again.
        """
        layout = LAYOUTS[self.kind.__name__]
        if name == "scheduler":
            return {key: value for key, value in layout.scheduler.items() if key in self.scheduler.config}
        return _filled_in(self.folder, name, self.index[name][1]) if name == layout.autoencoder else {}

    def save(self, denoiser: ModelMixin, folder: str | os.PathLike) -> None:
        """Save the pipeline with another denoiser.

        Args:
            denoiser: The pruned model.
            folder: Output folder.
        """
        if self.codec is None:
            # It is saved as a plain DDPMPipeline, with the file of a pipeline class that can prune again
            kind = PruneDDPMPipeline if self.kind is DDPMPipeline else self.kind
            kind(unet=denoiser, scheduler=self.scheduler).save_pretrained(folder)
            return
        folder, component = Path(folder), family_of(denoiser).component
        self.copy_others(folder)
        denoiser.save_pretrained(folder / component)
        index = {name: value for name, value in self.index.items() if name != "_name_or_path"}
        index |= {component: [PACKAGE, type(denoiser).__name__], "_diffusers_version": diffusers.__version__}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load_pipeline(
    name_or_path: str,
    revision: str | None = None,
    argument: str = "pretrained_model_name_or_path",
    pruned: bool = False,
) -> TrainedPipeline:
    """Load a trained diffusion pipeline.

    Args:
        name_or_path: A Hub id or a local folder, with the components in subfolders or, as in old repositories of pixel models,
            at the root.
        revision: Branch, tag or commit on the Hub.
        argument: Name of the argument, for error messages.
        pruned: Whether a pruned model is accepted, too; it cannot be pruned again.

    Raises:
        ValueError: The pipeline does not exist or cannot be pruned, components do not fit together, or weights are missing,
            damaged, pickled, of a wrong shape or not finite.
    """
    argument = f"{argument}={name_or_path}"
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).is_dir():
        raise ValueError(f"{argument} is not a folder")
    if revision is not None and Path(name_or_path).is_dir():
        raise ValueError(f"{argument} is a folder: revision={revision} applies to Hub repositories only")
    with _one_line(argument):
        folder = Path(name_or_path) if Path(name_or_path).is_dir() else _download(name_or_path, revision)
        if not (folder / "model_index.json").is_file():
            raise ValueError("it has no model_index.json: a denoiser without its scheduler is not enough")
        index = json.loads((folder / "model_index.json").read_text())
        name, families = _families(index)
        component = families[0].component  # all models of a pipeline have the same component name
        layout = check_index(index, component)
        scheduler = _load_scheduler(folder, index, layout)
        process = training_process(scheduler)
        check_process(name, process)
        if not pruned and index[component][1] in [family.pruned_class.__name__ for family in families]:
            raise ValueError(f"its {component} is a {index[component][1]}: it has been pruned already, take the dense model")
        classes = {named: kind for family in families for named, kind in _classes(family, pruned).items()}
        denoiser = load_model(folder, component, index[component][1], classes)
        family = family_of(denoiser)
        family.check_process(denoiser.config, process)
        family.check_pipeline(denoiser.config, name)
    try:
        family.check_trainable(denoiser.config)
    except ValueError as error:
        raise ValueError(f"{argument} has {error}") from error
    with _one_line(argument):
        check_variance_type(scheduler, family.has_learned_variance(denoiser.config), layout.splits_variances)
        codec = _load_codec(folder, index, layout, denoiser)
        prompts = _load_prompts(folder, index, layout, denoiser, codec)
        for carried in components_of(index).keys() & set(layout.carried):
            check_copied(folder, carried)
    kind = getattr(diffusers, name.replace("PruneDDPM", "DDPM"))
    return TrainedPipeline(denoiser, scheduler, process, kind, folder, index, codec, prompts)


@contextlib.contextmanager
def _one_line(argument: str) -> Iterator[None]:
    """Convert errors of loading to a `ValueError` of one line with the name of the argument."""
    try:
        yield
    except _ERRORS as error:
        raise ValueError(f"{argument} cannot be loaded: {first_line(error)}") from error


def _families(index: dict) -> tuple[str, list[Family]]:
    """The class of a pipeline, and the families of its denoiser.

    Raises:
        ValueError: The class is not supported.
    """
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in LAYOUTS:
        supported = ", ".join(known for known in LAYOUTS if known != PruneDDPMPipeline.__name__)
        raise ValueError(f"its pipeline is a {name}, which is not supported; supported: {supported}")
    return name, [family for family in FAMILIES if name in family.pipelines]


def _classes(family: Family, pruned: bool) -> dict[str, type[ModelMixin]]:
    """Classes of a family's models by the names that repositories give them."""
    named = dict.fromkeys((family.dense_class.__name__, *family.earlier_names), family.dense_class)
    return {**named, family.pruned_class.__name__: family.pruned_class} if pruned else named


def _download(name: str, revision: str | None) -> Path:
    """Download the files of a pipeline. `DDPMPipeline.download` takes any pipeline, and runs no code of the repository.

    Raises:
        OSError: There is no such repository, or it cannot be read.
    """
    options = {"revision": revision, "use_safetensors": True}
    try:
        return Path(DDPMPipeline.download(name, **options))
    except OSError as error:  # Diffusers finds default weights, or those of a given variant
        with contextlib.suppress(*HUB_ERRORS):
            files = [Path(file).name for file in HfApi().list_repo_files(name, revision=revision)]
            if (variant := variant_to_load(map(variant_of, files), "repository")) is not None:
                return Path(DDPMPipeline.download(name, variant=variant, **options))
        raise OSError(f"there is no such folder, and as a repository: {first_line(error)}") from error


def _load_scheduler(folder: Path, index: dict, layout: PipelineLayout):
    """The scheduler, with the settings that its pipeline gives it; those that it does not know are left out."""
    component = index["scheduler"][1]
    config = DDPMScheduler.load_config(component_folder(folder, "scheduler"))
    if layout.autoencoder is not None and is_ddpm_sampled_by_euler(component, config):  # its files are copied as they are
        return ddpm_of_euler(config)
    check_scheduler_class(component)
    named = config.get("_class_name", component)  # Diffusers does not check the class of the configuration
    check_scheduler_class(named)
    if TRAINABLE_SCHEDULERS[named] is not TRAINABLE_SCHEDULERS[component]:
        raise ValueError(f"its scheduler is a {component}, but scheduler_config.json is of a {named}")
    kind = getattr(diffusers, component)
    known = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in layout.scheduler.items() if name in known}
    return kind.from_pretrained(component_folder(folder, "scheduler"), **given)


def _load_codec(folder: Path, index: dict, layout: PipelineLayout, denoiser: ModelMixin) -> LatentCodec | None:
    """The codec of a latent pipeline.

    Raises:
        ValueError: The autoencoder cannot be loaded, or its latents do not fit the denoiser.
    """
    if layout.autoencoder is None:
        return None
    name = layout.autoencoder
    vae = load_model(folder, name, index[name][1], AUTOENCODERS)
    if settings := _filled_in(folder, name, index[name][1]):
        logger.warning(
            "the config.json of the %s has no scaling_factor: 1 is taken, as models from before Diffusers 0.22 were trained, "
            "and is written into the pruned pipeline",
            name,
        )
        vae.register_to_config(**settings)
    codec = LatentCodec(vae)
    codec.check_fits(denoiser.config.in_channels)
    return codec


def _filled_in(folder: Path, name: str, class_name: str) -> dict[str, object]:
    """Settings of an autoencoder that its `config.json` lacks."""
    lacks = class_name == "VQModel" and "scaling_factor" not in read_config(component_folder(folder, name) / "config.json")
    return {"scaling_factor": 1.0} if lacks else {}


def _load_tokenizer(folder: Path, class_name: str, wanted: str):
    """Load a tokenizer.

    Raises:
        ValueError: It is that of another text encoder, or transformers cannot read its files.
    """
    name = folder.name
    if class_name not in (wanted, f"{wanted}Fast"):
        raise ValueError(f"its {name} is a {class_name}, not a {wanted}")
    pieces = sorted(path.name for path in folder.glob("*.model"))
    if pieces and not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"its {name} has {pieces[0]}, which the package sentencepiece reads: pip install sentencepiece protobuf"
        )
    return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)


def _load_prompts(
    folder: Path, index: dict, layout: PipelineLayout, denoiser: ModelMixin, codec: LatentCodec | None
) -> PromptEncoder | None:
    """The prompt encoder of a pipeline with text as its condition.

    Raises:
        ValueError: A tokenizer or text encoder cannot be loaded, or its embeddings do not fit the denoiser.
    """
    if not layout.text:
        return None
    components = {}
    for tokenizer, encoder in layout.text:
        name = index[encoder][1]
        if name in TOKENIZERS:
            components[tokenizer] = _load_tokenizer(folder / tokenizer, index[tokenizer][1], TOKENIZERS[name])
        components[encoder] = load_model(folder, encoder, name, TEXT_ENCODERS)
    family, latent_size = family_of(denoiser), spatial_size(denoiser)
    image_size = codec.image_shape(*latent_size)[1:]
    zeros = index.get("force_zeros_for_empty_prompt", True)
    takes = family.example_inputs(denoiser, *family.tracing_size(denoiser.config)).conditioning
    prompts = PromptEncoder.of_pipeline(components, image_size, zeros, layout.max_length, takes)
    prompts.check_fits(takes)
    return prompts
