"""Conditioning from prompts, by the frozen text encoders of a pipeline.

| pipeline | text encoders | conditioning |
|---|---|---|
| `StableDiffusionPipeline` | `text_encoder` | `encoder_hidden_states` |
| `LDMTextToImagePipeline` | `bert` | `encoder_hidden_states` |
| `StableDiffusionXLPipeline` | `text_encoder`, `text_encoder_2` | `encoder_hidden_states`, `text_embeds`, `time_ids` |
| `PixArtSigmaPipeline` | `text_encoder` (T5) | `encoder_hidden_states`, `encoder_attention_mask` |
| `PixArtAlphaPipeline` | `text_encoder` (T5) | the same, and `resolution` and `aspect_ratio` at 1024 pixels |
| `StableDiffusion3Pipeline` | two of CLIP, and T5 or none | `encoder_hidden_states`, `pooled_projections` |

`encoder_hidden_states` are the last states of the text encoder; for SDXL, the last but one states of both, side by side.
`text_embeds` are the projected states of its second text encoder. `time_ids` are the sizes of the image and of its crop.
`encoder_attention_mask` is 1 for tokens of the prompt and 0 for padding, which PixArt is the only one to tell apart.

For Stable Diffusion 3, the tokens of CLIP are followed by those of T5, or by as many zeros if the pipeline has no T5. Those of
CLIP are again the last but one states of both encoders side by side, with zeros up to the width of the model.
`pooled_projections` are the projected states of both encoders of CLIP.

Prompts are encoded as these pipelines do. They are padded and cut to the tokenizer's limit, or to the pipeline's own, so all
have the same shape. Those of PixArt are written in lower case, without spaces at the ends, as with `clean_caption=False`.
Classifier-free guidance needs the conditioning of "no prompt": that of the empty prompt, or, for SDXL, zeros, if
`force_zeros_for_empty_prompt` is set in the pipeline. Training for guidance replaces prompts by it, see `class_labels`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..fingerprints import model_fingerprint
from .placement import moved

__all__ = ["SIZES", "PromptEncoder"]

logger = logging.getLogger(__name__)

# Supported text encoders: one, or the first and the second one
ONE_ENCODER = ("CLIPTextModel", "LDMBertModel", "T5EncoderModel")
TWO_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
THREE_ENCODERS = ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel")  # the last may be missing
# Conditioning that is a property of the image, not of its prompt
SIZES = ("time_ids", "resolution", "aspect_ratio")
MASK = "encoder_attention_mask"
BATCH_SIZE = 64  # prompts of one forward pass
TOKENIZED = 10_000  # prompts of one call of a tokenizer that counts tokens


class PromptEncoder:
    """Frozen tokenizers and text encoders of a pipeline, in float32 and in evaluation mode.

    Args:
        tokenizers: One tokenizer for each text encoder.
        text_encoders: A `CLIPTextModel`, `LDMBertModel` or `T5EncoderModel`, or, for SDXL, a `CLIPTextModel` and a
            `CLIPTextModelWithProjection`, or, with `joined_width`, two of the latter and possibly a `T5EncoderModel`. They are
            frozen, and converted to float32.
        image_size: Height and width of images in pixels; SDXL and `with_sizes` need it.
        max_length: Maximum number of tokens (default: the tokenizer's); never more than the text encoder has positions. With
            `joined_width`: number of tokens of T5, or of the zeros in its place, which is required.
        zeros_for_empty: Whether the conditioning of "no prompt" is zero, for SDXL.
        with_sizes: Whether `resolution` and `aspect_ratio` belong to the conditioning.
        joined_width: Width of the model's tokens if those of several text encoders follow one another (Stable Diffusion 3).

    Attributes:
        max_length: Number of tokens of every encoded prompt, with those at its start and end.
        limits: Number of tokens that each text encoder reads.

    Raises:
        ValueError: The text encoders are not supported, or `image_size` is missing.
    """

    def __init__(
        self,
        tokenizers: Sequence,
        text_encoders: Sequence[nn.Module],
        *,
        image_size: tuple[int, int] | None = None,
        max_length: int | None = None,
        zeros_for_empty: bool = False,
        with_sizes: bool = False,
        joined_width: int | None = None,
    ) -> None:
        names = tuple(type(encoder).__name__ for encoder in text_encoders)
        self.is_joined = joined_width is not None
        if self.is_joined and names not in (THREE_ENCODERS, THREE_ENCODERS[:2]):
            raise ValueError(
                f"the text encoders are {', '.join(names)}, but must be {', '.join(THREE_ENCODERS)}, or without T5"
            )
        if not self.is_joined and not (len(names) == 1 and names[0] in ONE_ENCODER) and names != TWO_ENCODERS:
            raise ValueError(
                f"the text encoders are {', '.join(names)}, but must be {' or '.join(ONE_ENCODER)}, or "
                f"{' and '.join(TWO_ENCODERS)}"
            )
        if len(tokenizers) != len(names) or None in tokenizers:
            raise ValueError(f"{len(names)} text encoders need as many tokenizers")
        self.is_pooled, self.is_masked, self.with_sizes = names == TWO_ENCODERS, names == ("T5EncoderModel",), with_sizes
        if (self.is_pooled or with_sizes) and image_size is None:
            raise ValueError("image_size=None must be height and width of the images, which the model is conditioned on")
        self.tokenizers, self.image_size = tuple(tokenizers), image_size
        self.zeros_for_empty = zeros_for_empty and self.is_pooled
        self.encoders = tuple(encoder.float().eval().requires_grad_(False) for encoder in text_encoders)
        given = (None, None, max_length) if self.is_joined else (max_length,) * len(names)
        self.limits = tuple(_limit(*pair, limit) for *pair, limit in zip(self.tokenizers, self.encoders, given))
        if len(set(self.limits[:2])) > 1:
            raise ValueError(
                f"the text encoders take {self.limits[0]} and {self.limits[1]} tokens, but must take equally many"
            )
        self.max_length, self.width = self.limits[0], sum(encoder.config.hidden_size for encoder in self.encoders[:2])
        if self.is_joined:
            clip = self.width
            self.max_length += max_length
            self.width = joined_width if len(names) == 2 else self.encoders[2].config.hidden_size
            if clip > self.width:
                raise ValueError(f"the text encoders of CLIP have width {clip} side by side, more than the {self.width} of T5")

    @classmethod
    def of_pipeline(
        cls,
        components: Mapping[str, object],
        image_size: tuple[int, int] | None = None,
        force_zeros_for_empty_prompt: bool = True,
        max_length: int | None = None,
        takes: Mapping[str, Tensor] | None = None,
    ) -> PromptEncoder | None:
        """The encoder of a pipeline with these components by name; None if it has no text encoder.

        Args:
            components: Components as in `model_index.json`.
            image_size: Height and width of images in pixels.
            force_zeros_for_empty_prompt: Value in `model_index.json` of SDXL.
            max_length: Number of tokens that the pipeline cuts prompts to (default: the tokenizer's limit).
            takes: Conditioning that the denoiser takes, that of the family's `example_inputs`.

        Raises:
            ValueError: The text encoders are not supported.
        """
        if components.get("bert") is not None:
            return cls([components.get("tokenizer")], [components["bert"]], max_length=max_length)
        takes = {} if takes is None else takes
        suffixes = [suffix for suffix in ("", "_2", "_3") if components.get(f"text_encoder{suffix}") is not None]
        if not suffixes:
            return None
        return cls(
            [components.get(f"tokenizer{suffix}") for suffix in suffixes],
            [components[f"text_encoder{suffix}"] for suffix in suffixes],
            image_size=image_size,
            max_length=max_length,
            zeros_for_empty=force_zeros_for_empty_prompt,
            with_sizes="resolution" in takes,
            joined_width=takes["encoder_hidden_states"].shape[-1] if "pooled_projections" in takes else None,
        )

    @property
    def device(self) -> torch.device:
        """Device of the text encoders."""
        return next(self.encoders[0].parameters()).device

    # --- checks ---

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the conditioning of one prompt, by name."""
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (self.max_length, self.width)}
        if self.is_joined:
            return {**shapes, "pooled_projections": (sum(encoder.config.projection_dim for encoder in self.encoders[:2]),)}
        if self.is_pooled:
            shapes |= {"text_embeds": (self.encoders[1].config.projection_dim,), "time_ids": (6,)}
        if self.is_masked:
            shapes[MASK] = (self.max_length,)
        return shapes | ({"resolution": (2,), "aspect_ratio": (1,)} if self.with_sizes else {})

    def check_fits(self, conditioning: Mapping[str, Tensor]) -> None:
        """Check that a denoiser takes the conditioning.

        Args:
            conditioning: That of the family's `example_inputs`, with shapes `(batch, ..., width)`.

        Raises:
            ValueError: The denoiser takes other conditioning, or embeddings of another width.
        """
        missing = [name for name in conditioning if name not in (*self.shapes, "timestep_cond")]
        if missing:
            raise ValueError(f"the model needs {missing[0]}, which the text encoder does not make")
        for name, shape in self.shapes.items():
            if name not in conditioning:
                raise ValueError(f"the text encoder makes {name}, which the model does not take")
            if name != MASK and shape[-1] != conditioning[name].shape[-1]:
                raise ValueError(
                    f"{name} of the text encoder have width {shape[-1]}, but the model needs {conditioning[name].shape[-1]}: "
                    f"it is the text encoder of another model"
                )

    def count_long(self, prompts: Sequence[str]) -> int:
        """Number of prompts with more tokens than a text encoder reads. It encodes their first tokens only."""
        count = 0
        for start in range(0, len(prompts), TOKENIZED):
            part, long = self._written(prompts[start : start + TOKENIZED]), set()
            for tokenizer, limit in zip(self.tokenizers, self.limits):
                tokens = tokenizer(part, truncation=True, max_length=limit + 1).input_ids
                long |= {number for number, ids in enumerate(tokens) if len(ids) > limit}
            count += len(long)
        return count

    def warn_of_long(self, prompts: Sequence[str], what: str = "prompts") -> None:
        """Warn in one line if prompts are too long. Call it before a long encoding."""
        if count := self.count_long(prompts):
            logger.warning(
                "%d of %d %s are longer than the limit of %d tokens: they are cut, as in Diffusers' pipelines",
                *(count, len(prompts), what, min(self.limits)),
            )

    # --- encoding ---

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts, as the denoiser's family takes it.

        Args:
            prompts: Texts; those that are too long are cut.

        Returns:
            Tensors by name on the CPU, with one row for each prompt; see `shapes`. They are float32, masks int64.
        """
        parts = [self._encode(self._written(prompts[k : k + BATCH_SIZE])) for k in range(0, len(prompts), BATCH_SIZE)]
        if not parts:
            return {name: self._zeros(name, 0) for name in self.shapes}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _written(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the pipeline writes them before it tokenizes them."""
        return [prompt.lower().strip() for prompt in prompts] if self.is_masked else list(prompts)

    def _zeros(self, name: str, count: int) -> Tensor:
        return torch.zeros(count, *self.shapes[name], dtype=torch.long if name == MASK else torch.float32)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        outputs = []
        for tokenizer, encoder, limit in zip(self.tokenizers, self.encoders, self.limits):
            options = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
            tokens = tokenizer(prompts, **options).to(self.device)
            masked = self.is_masked or (getattr(encoder.config, "use_attention_mask", False) and len(self.encoders) == 1)
            options = {"attention_mask": tokens.attention_mask} if masked else {}
            states = self.is_pooled or self.is_joined
            outputs.append(encoder(tokens.input_ids, output_hidden_states=states, return_dict=True, **options))
        if self.is_joined:
            return self._joined(outputs, len(prompts))
        if not self.is_pooled:
            mask = {MASK: tokens.attention_mask.long().cpu()} if self.is_masked else {}
            states = outputs[0].last_hidden_state.float().cpu()
            return {"encoder_hidden_states": states, **mask, **(self._image_sizes(len(prompts)) if self.with_sizes else {})}
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {
            "encoder_hidden_states": states.float().cpu(),
            "text_embeds": outputs[1].text_embeds.float().cpu(),
            "time_ids": self._time_ids(len(prompts)),
        }

    def _joined(self, outputs: Sequence, count: int) -> dict[str, Tensor]:
        """Tokens of CLIP, then those of T5."""
        clip = torch.cat([output.hidden_states[-2] for output in outputs[:2]], dim=-1).float().cpu()
        tokens = torch.zeros(count, *self.shapes["encoder_hidden_states"])
        tokens[:, : clip.shape[1], : clip.shape[2]] = clip
        if len(outputs) > 2:
            tokens[:, clip.shape[1] :] = outputs[2].last_hidden_state.float().cpu()
        pooled = torch.cat([output.text_embeds for output in outputs[:2]], dim=-1)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled.float().cpu()}

    def _time_ids(self, count: int) -> Tensor:
        """Those of whole images: original size, upper left corner of the crop, and size of the crop."""
        return torch.tensor([[*self.image_size, 0, 0, *self.image_size]], dtype=torch.float32).expand(count, -1)

    def _image_sizes(self, count: int) -> dict[str, Tensor]:
        """Height and width in pixels, and their ratio."""
        height, width = self.image_size
        sizes = {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
        return {name: torch.tensor(row, dtype=torch.float32).expand(count, -1) for name, row in sizes.items()}

    def null(self) -> dict[str, Tensor]:
        """Conditioning of "no prompt" for classifier-free guidance, as `encode` returns it, with one row."""
        if not self.zeros_for_empty:
            return self.encode([""])
        return {**{name: self._zeros(name, 1) for name in self.shapes}, "time_ids": self._time_ids(1)}

    # --- place and identity ---

    def to(self, device: torch.device | str) -> PromptEncoder:
        """Move the text encoders to a device."""
        for encoder in self.encoders:
            encoder.to(device)
        return self

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[PromptEncoder]:
        """Context in which the text encoders are on a device; then they return to where they were."""
        with moved(self.encoders, device):
            yield self

    @functools.cached_property
    def _identity(self) -> dict:
        return {
            "encoders": [model_fingerprint(encoder) for encoder in self.encoders],
            "tokenizers": [_tokenizer_fingerprint(tokenizer) for tokenizer in self.tokenizers],
            "max_length": self.max_length,
            "zeros_for_empty": self.zeros_for_empty,
            **({"width": self.width} if self.is_joined else {}),
        }

    def identity(self) -> dict:
        """Everything that the conditioning depends on, except the size of images, as JSON values for cache keys."""
        return dict(self._identity)


def _limit(tokenizer, encoder: nn.Module, max_length: int | None) -> int:
    """Maximum number of tokens of a prompt."""
    given = tokenizer.model_max_length if max_length is None else max_length
    positions = getattr(encoder.config, "max_position_embeddings", None)  # T5 has relative ones, for any length
    return given if positions is None else min(given, positions)


def _tokenizer_fingerprint(tokenizer) -> str:
    """Hash of a tokenizer's rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}  # set by every call
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([type(tokenizer).__name__, rules, tokenizer.get_vocab(), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
