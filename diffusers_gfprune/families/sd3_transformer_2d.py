"""The family of `SD3Transformer2DModel`: multimodal diffusion transformers (Stable Diffusion 3 and 3.5, arXiv 2403.03206).

Image and text are two streams of tokens with layers of their own. They meet in joint attention: queries, keys and values of
both are concatenated along the tokens, so that a channel of a head is one channel of the layers of both streams. Prunable are
these channels, those of the second attention of SD 3.5, which reads the image only, the hidden channels of the feed-forward
layers of both streams, and the embedding of time and pooled text, which all blocks read. The hidden states of both streams
keep their width, since layer norms read all of their channels.

With `qk_norm`, queries and keys of each head are divided by their root mean square, which depends on all channels of the head.
Heads are then removed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs
from ..remote.sd3_transformer_2d_gfpruned import GFPrunedSD3Transformer2DModel
from . import dit_transformer_2d
from .limits import MAX_WIDTH, ConfigLimits, check_patches, is_int, refuse

__all__ = ["LIMITS", "SD3Transformer2DFamily"]

TEXT_TOKENS = 77 + 256  # of example inputs: StableDiffusion3Pipeline joins those of CLIP and of T5
MAX_POSITION_VALUES = 2**28  # of the largest sample, which are saved with the weights

# Accepted values for each argument of `SD3Transformer2DModel`
LIMITS = ConfigLimits(
    integers={
        **{
            name: dit_transformer_2d.LIMITS.integers[name]
            for name in (
                "num_attention_heads",
                "attention_head_dim",
                "in_channels",
                "out_channels",
                "num_layers",
                "patch_size",
            )
        },
        "joint_attention_dim": (1, MAX_WIDTH),
        "caption_projection_dim": (1, MAX_WIDTH),
        "pooled_projection_dim": (1, MAX_WIDTH),
        "pos_embed_max_size": (1, 2**14),
    },
    numbers={},
    choices={"qk_norm": ("rms_norm",)},
    lists=frozenset(),
    optional=frozenset({"out_channels", "qk_norm"}),
)


class SD3Transformer2DFamily(dit_transformer_2d.DiTTransformer2DFamily):
    """`SD3Transformer2DModel`, with and without norms of queries and keys and second attentions."""

    dense_class = SD3Transformer2DModel
    pruned_class = GFPrunedSD3Transformer2DModel
    pipelines = ("StableDiffusion3Pipeline",)
    earlier_names = ()
    boundary = {"pos_embed.proj": 0, "context_embedder": 0, "proj_out": 1}

    # --- configurations ---

    def check_arguments(self, config: Mapping[str, Any]) -> None:
        LIMITS.check(config)
        check_patches(config)
        self._check_layers(config["dual_attention_layers"], config["num_layers"])
        hidden, most = config["num_attention_heads"] * config["attention_head_dim"], config["pos_embed_max_size"]
        if most**2 * hidden > MAX_POSITION_VALUES:
            wanted = f"an integer whose square is at most {MAX_POSITION_VALUES // hidden}, with a hidden size of {hidden}"
            refuse("pos_embed_max_size", most, wanted)
        self.check_supported(config)

    @staticmethod
    def _check_layers(layers: object, count: int) -> None:
        """Check the table of blocks with a second attention."""
        given = layers if isinstance(layers, (list, tuple)) else [None]
        if not all(is_int(layer) and 0 <= layer < count for layer in given) or len(set(given)) < len(given):
            refuse("dual_attention_layers", layers, f"a list of different integers from 0 to {count - 1}")

    def check_supported(self, config: Mapping[str, Any]) -> None:
        reads, writes, size, patch = (config[name] for name in ("in_channels", "out_channels", "sample_size", "patch_size"))
        if writes not in (None, reads):
            refuse("out_channels", writes, f"in_channels={reads}")
        if size % patch:
            refuse("sample_size", size, f"a multiple of patch_size={patch}")
        hidden, most = config["num_attention_heads"] * config["attention_head_dim"], config["pos_embed_max_size"]
        if config["caption_projection_dim"] != hidden:
            refuse("caption_projection_dim", config["caption_projection_dim"], f"the hidden size {hidden}")
        if not is_int(most) or most < size // patch:
            refuse("pos_embed_max_size", most, f"at least the {size // patch} patches of a side of the sample")
        if config["qk_norm"] not in (None, "rms_norm"):
            refuse("qk_norm", config["qk_norm"], "None or rms_norm")

    # --- inputs and outputs ---

    def example_inputs(
        self,
        model: nn.Module,
        height: int,
        width: int,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ModelInputs:
        patch, most = model.config.patch_size, model.config.patch_size * model.config.pos_embed_max_size
        if height % patch or width % patch or max(height, width) > most:
            raise ValueError(
                f"samples of {height}x{width} must have sides that are multiples of patch_size={patch}, up to {most}"
            )
        shapes = self._embedding_shapes(model.config)
        conditioning = {name: torch.zeros(batch_size, *shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        sample = torch.zeros(batch_size, model.config.in_channels, height, width, device=device, dtype=dtype)
        return ModelInputs(sample, torch.zeros(batch_size, device=device, dtype=torch.long), conditioning)

    def tracing_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        side = min(2, config["pos_embed_max_size"]) * config["patch_size"]
        return side, side

    @staticmethod
    def _embedding_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of conditioning, without the batch."""
        return {
            "encoder_hidden_states": (TEXT_TOKENS, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        shapes = self._embedding_shapes(model.config)
        if other := [name for name in conditioning if name not in shapes]:
            raise ValueError(f"the batch has {other[0]}, which an SD3Transformer2DModel does not take")
        if missing := [name for name in shapes if name not in conditioning]:
            raise ValueError(f"the model needs {missing[0]}, but the batch has none")
        tokens = conditioning["encoder_hidden_states"].shape[1:2]
        shapes["encoder_hidden_states"] = (*tokens, shapes["encoder_hidden_states"][1])
        for name, values in conditioning.items():
            wanted = (size, *shapes[name])
            if tuple(values.shape) != wanted:
                raise ValueError(f"{name} have shape {tuple(values.shape)}, but the model and the batch need {wanted}")
            if not values.is_floating_point():
                raise ValueError(f"{name} have dtype {values.dtype}; they must be in floating point")

    def class_labels(self, config: Mapping[str, Any]) -> None:
        """The model takes none."""

    def output(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        return model(inputs.sample, timestep=inputs.timesteps, **inputs.conditioning).sample

    # --- parts ---

    def removable_blocks(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        # The first block reads the text. The last one reads it for the last time: without it, the block before would write
        # text that nothing reads
        last = len(model.transformer_blocks) - 1
        layers = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
        return {
            f"transformer_blocks.{index}": tuple(
                f"transformer_blocks.{index}.{layer}"
                for layer in (*layers, *(["attn2.to_out.0"] if index in model.config.dual_attention_layers else ()))
            )
            for index in range(1, last)
        }

    def stream(self, output: tuple[Tensor | None, Tensor]) -> Tensor:
        return output[1]  # after that of the text, which the last block does not have
