"""Work of each process of a test of test_shards.py: encode images, and write the first batch of all ranks.

python encoding_worker.py RANK WORLD_SIZE FOLDER
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from diffusers_gfprune.data import shards
from diffusers_gfprune.data.batches import train_dataloader
from helpers.latent_data import latent_spec, load_latents, prompt_encoder
from helpers.processes import ddpm


def main(rank: int, ranks: int, folder: Path) -> None:
    """See the module."""
    torch.set_num_threads(1)
    shards.SHARD_ROWS = 4
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    images, _ = load_latents(folder / "data", latent_spec(prompts=prompt_encoder(folder / "tokens")))
    batch, *_ = next(iter(train_dataloader(images, 8 // ranks, seed=0, process=ddpm(10), rank=rank, world_size=ranks)))
    save_file({"clean": batch.clean, **batch.conditioning}, folder / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
