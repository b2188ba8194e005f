"""What tests of `prune_ddpm.py` share: the arguments of a short run, and the files that a run leaves."""

SHORT = [
    *("--max_train_steps", "20", "--train_batch_size", "16", "--calibration_batches", "1", "--eval_images", "80"),
    *("--ddim_num_inference_steps", "4", "--validation_steps", "10", "--validation_images", "16"),
]
RUN_FILES = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "pruning.png",
    "pruning_report.json",
    "results.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusers_gfprune.py",
    "unet/diffusion_pytorch_model.safetensors",
    "widths.png",
}
