"""Train a dense DDPM from scratch: the teacher that `prune_ddpm.py` then makes smaller.

    accelerate launch --quiet training/train_ddpm.py --model_config training/digits/unet_config.json \
        --dataset_name training/digits --output_dir runs/digits-teacher --max_train_steps 8000

The loss is the simple noise-prediction loss of Ho et al., https://arxiv.org/abs/2006.11239, equation 14; the weights that
are saved are their exponential moving average. Arguments are named as in Diffusers' `train_unconditional.py`. For anything
larger than the digits, that script is the tool: whatever it writes can be pruned here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from batches import BrokenImages, train_dataloader
from diffusers_gfprune.evaluation.step_loss import StepLoss, noise_target
from image_data import DataArguments, load_images


@dataclass
class TrainArguments:
    """Model, output and optimization."""

    _argument_group_name = "training"

    model_config: str = field(metadata={"help": "JSON file with the arguments of `UNet2DModel`."})
    output_dir: str = field(metadata={"help": "Folder for the pipeline; must not exist."})
    train_batch_size: int = field(default=128, metadata={"help": "Images per step (>= 1)."})
    max_train_steps: int = field(default=8000, metadata={"help": "Optimizer steps (>= 1)."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler: str = field(default="cosine", metadata={"help": "Schedule, by its name in Diffusers."})
    lr_warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    adam_weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay of AdamW."})
    ema_max_decay: float = field(default=0.9995, metadata={"help": "Largest decay of the weight average, in (0, 1)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm above which gradients are scaled down."})
    ddpm_num_steps: int = field(default=1000, metadata={"help": "Timesteps of the diffusion process."})
    ddpm_beta_schedule: str = field(default="linear", metadata={"help": "Noise schedule of `DDPMScheduler`."})
    prediction_type: str = field(default="epsilon", metadata={"help": "What the model predicts."})
    validation_steps: int = field(default=500, metadata={"help": "Steps between two step losses on held-out images."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches, noise and timesteps (>= 0)."})

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "max_train_steps", "ddpm_num_steps", "validation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def main() -> None:
    parser = HfArgumentParser((TrainArguments, DataArguments), description=__doc__.splitlines()[0])
    args, data_args = parser.parse_args_into_dataclasses()
    if Path(args.output_dir).exists():
        raise ValueError(f"output_dir={args.output_dir} exists; name another folder")

    # 1. model, data, optimizer
    accelerator = Accelerator()
    set_seed(args.seed)
    try:
        model = UNet2DModel.from_config(json.loads(Path(args.model_config).read_text()))
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"model_config={args.model_config} makes no UNet2DModel: {error}") from error
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
    )
    conditional = model.config.num_class_embeds is not None
    if model.config.sample_size is None:
        raise ValueError(f"model_config={args.model_config} has no sample_size")
    images, (held_out_images, held_out_labels) = load_images(data_args, model.config)
    dataloader = train_dataloader(
        images,
        args.train_batch_size,
        seed=args.seed,
        num_train_timesteps=args.ddpm_num_steps,
        num_workers=data_args.dataloader_num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    broken = BrokenImages(data_args.max_broken_images)
    step_loss = StepLoss(held_out_images, noise_scheduler, held_out_labels)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.95, 0.999), weight_decay=args.adam_weight_decay
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    ema = EMAModel(model.parameters(), decay=args.ema_max_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema.to(accelerator.device)

    # 2. training loop
    progress = tqdm(total=args.max_train_steps, desc="train", disable=not accelerator.is_local_main_process)
    for step, batch in zip(range(1, args.max_train_steps + 1), dataloader):
        broken.add(batch.pop("broken"))
        batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}
        clean_images, noise, timesteps = (batch[name] for name in ("pixel_values", "noise", "timesteps"))
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
        prediction = model(noisy_images, timesteps, class_labels=batch.get("class_labels")).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise_target(noise_scheduler, clean_images, noise, timesteps))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}: lower learning_rate={args.learning_rate}")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        progress.update()
        if step % args.validation_steps == 0 and accelerator.is_main_process:
            unwrapped = accelerator.unwrap_model(model)
            ema.store(unwrapped.parameters())
            ema.copy_to(unwrapped.parameters())
            progress.write(f"step {step}: train {loss.item():.4f}, held-out (EMA) {step_loss(unwrapped):.4f}")
            ema.restore(unwrapped.parameters())

    # 3. save the averaged weights and show samples
    if broken:
        print(f"{len(broken)} images could not be read and were replaced, first {broken.to_list()[0]}", file=sys.stderr)
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        ema.copy_to(unwrapped.parameters())
        pipeline = DDPMPipeline(unet=unwrapped, scheduler=noise_scheduler)
        pipeline.save_pretrained(args.output_dir)
        if not conditional:
            pipeline.scheduler = DDIMScheduler.from_config(noise_scheduler.config)
            samples = pipeline(batch_size=32, generator=torch.Generator().manual_seed(0), num_inference_steps=100).images
            samples = [sample.resize((64, 64), 0) for sample in samples]
            make_image_grid(samples, rows=4, cols=8).save(Path(args.output_dir) / "samples.png")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_ddpm.py: error: {error}")
