"""Arguments for the measurements of a run: sample quality and speed. Evaluations share those for speed."""

from __future__ import annotations

from dataclasses import dataclass

from ..argument_fields import NOT_NEGATIVE, argument, at_least, check_fields, expand_home
from ..diffusion.process import TIMESTEP_SPACINGS
from ..metrics.speed import DTYPES, SpeedSetting, parse_settings
from ..runtimes.requirements import check_runtimes

__all__ = ["EvaluationArguments", "SpeedArguments"]


@dataclass
class SpeedArguments:
    """Settings for measuring speed: every combination of these lists."""

    speed_batch_sizes: list[int] = argument([1, 16], "Batch sizes to measure speed at (0: speed is not measured).")
    speed_dtypes: list[str] = argument(["float32"], f"Dtypes to measure speed in: {', '.join(DTYPES)}.")
    speed_modes: list[str] = argument(
        ["eager"],
        "Modes to measure speed in: eager, compiled (by torch.compile), onnxruntime, openvino (exported, on the CPU).",
    )
    speed_memory_formats: list[str] = argument(
        ["contiguous"], "Memory formats to measure speed in: contiguous, channels_last, or both."
    )

    def __post_init__(self) -> None:
        for size in self.speed_batch_sizes:
            if size < 1 and self.speed_batch_sizes != [0]:
                raise ValueError(f"speed_batch_sizes={size} must be at least 1, or 0 alone")
        check_runtimes(setting.mode for setting in self.speed_settings())

    def speed_settings(self) -> list[SpeedSetting]:
        """Settings to measure speed in; empty if speed is not measured.

        Raises:
            ValueError: A value is not one of the choices, or a list is empty.
        """
        if self.speed_batch_sizes == [0]:
            return []
        try:
            return parse_settings(self.speed_batch_sizes, self.speed_dtypes, self.speed_modes, self.speed_memory_formats)
        except ValueError as error:
            raise ValueError(f"speed_{error}") from error


@dataclass
class EvaluationArguments(SpeedArguments):
    """Measurements during the run and at its end."""

    _argument_group_name = "evaluation"

    validation_steps: int = argument(500, "Steps between measurements of the step loss on held-out images (>= 1).")
    eval_steps: int = argument(
        0,
        "Steps between measurements of sample quality (Fréchet distance, SSIM), with averaged weights if EMA is used (0: at "
        "the end only).",
    )
    eval_images: int = argument(1000, "Samples of each model for the Fréchet distance and SSIM (0: no sampling).")
    eval_features: str = argument(
        "auto",
        "Features of the Fréchet distance: raw pixels, EfficientNet-Lite0, Inception (FID) or DINOv2; auto: pixels for "
        "images of up to 1,024 values, if samples and real images outnumber these, else none. Use evaluate.py with many "
        "images for a FID to publish.",
        choices=["auto", "none", "pixels", "efflite0", "inception", "dinov2"],
    )
    eval_reference_images: int = argument(10_000, "Maximum number of training images that samples are compared with (>= 2).")
    inception_weights: str | None = argument(
        None, "Inception's TorchScript file, for eval_features=inception (default: downloaded)."
    )
    evaluation_cache_dir: str | None = argument(
        None,
        "Folder that keeps samples of the dense model, features of real images and times of layers for later runs (default: "
        "none of the samples and features; times next to the Hub's cache).",
    )
    eval_batch_size: int = argument(128, "Number of samples in one forward pass (>= 1).")
    ddim_num_inference_steps: int | None = argument(
        None, "Number of sampling steps for these samples (>= 1; default: 100 DDIM steps, 1 for consistency models, else 50)."
    )
    timestep_spacing: str = argument("leading", "How DDIM spaces its timesteps.", choices=TIMESTEP_SPACINGS)
    eval_seed: int = argument(1234, "Seed for the samples' noise (>= 0).")
    guidance_scale: float = argument(
        1.0, "Scale of classifier-free guidance for these samples, of models with a null label or of text (>= 0; 1: none)."
    )
    speed_modes: list[str] = argument(
        ["eager", "compiled"],
        "Modes to measure speed in: eager, compiled (takes half a minute or more per model and batch size), onnxruntime, "
        "openvino (exported, on the CPU).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, at_least(1), "validation_steps", "eval_batch_size", "ddim_num_inference_steps")
        check_fields(self, at_least(2), "eval_reference_images")
        expand_home(self, "evaluation_cache_dir")
        if self.inception_weights is not None and self.eval_features != "inception":
            raise ValueError(f"inception_weights={self.inception_weights} needs eval_features=inception")
        if self.eval_steps and not self.eval_images:
            raise ValueError(f"eval_steps={self.eval_steps} needs eval_images, which is 0")
        check_fields(self, NOT_NEGATIVE, "eval_steps", "eval_images", "eval_seed", "guidance_scale")
