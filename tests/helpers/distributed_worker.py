"""Work of each process of test_distributed.py; a run with one process is the reference.

    python distributed_worker.py RANK WORLD_SIZE FOLDER

Every process has its rows of the same global batches. It writes `rank<RANK>.safetensors` and `rank<RANK>.json` to FOLDER.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner, register_criterion
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.distributed import (
    check_identical,
    fail_together,
    gather_rows,
    made_by_first_rank,
    mean_over_ranks,
    process_rank,
    world_size,
)
from diffusers_gfprune.one_shot import calibration_batches, recovery_batches
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.masking import dense_parameters
from diffusers_gfprune.scoring.importance import score_units, score_units_jointly
from diffusers_gfprune.training.diagnostics import compare_with_magnitude
from helpers.architectures import build

ROWS = 6  # of a global batch; three on each of two ranks, so that differences take halves of unequal size
SCHEDULER = DDPMScheduler()
CRITERIA = {
    "predictions": {"criterion": "gradient-flow"},
    "exact-mean": {"criterion": "gradient-flow-weights", "hvp": "exact", "hessian_batches": "mean"},
    "exact-each": {"criterion": "gradient-flow-weights", "hvp": "exact", "hessian_batches": "each"},
    "difference-mean": {"criterion": "gradient-flow-weights", "hvp": "finite-difference", "hessian_batches": "mean"},
    "difference-each": {"criterion": "gradient-flow-weights", "hvp": "finite-difference", "hessian_batches": "each"},
    "taylor": {"criterion": "taylor"},
    "diff-pruning": {"criterion": "diff-pruning", "diff_pruning_threshold": 0.9},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
    "own": {"criterion": "own"},
}


@register_criterion("own")
def own_criterion(context) -> dict[str, Tensor]:
    """A user's, which knows nothing of processes."""
    total = {name: torch.zeros_like(parameter) for name, parameter in context.parameters.items()}
    for batch in context.batches:
        for name, gradient in context.gradients(context.loss(batch)).items():
            total[name] += gradient
    return context.reduce({name: value.abs() for name, value in total.items()}, "sum_abs")


def global_batches(count: int = 2) -> list[DiffusionBatch]:
    """Batches of all ranks together, in double precision; losses differ from row to row by their timesteps."""
    images = torch.rand(count * ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1
    return calibration_batches(images, SCHEDULER, ROWS, seed=6)


def rows(batches: list[DiffusionBatch], rank: int, ranks: int) -> list[DiffusionBatch]:
    """This rank's part of every batch."""
    return [DiffusionBatch.of([column.chunk(ranks)[rank] for column in batch.tensors()]) for batch in batches]


def train(rank: int, ranks: int) -> tuple[GradientFlowPruner, nn.Module]:
    """Prune while training, as DDP does it."""
    torch.manual_seed(0)
    unet = build("fine-units").train()
    options = {"total_steps": 10, "soft_fraction": 0.4, "hard_fraction": 0.7, "update_interval": 2}
    pruner = GradientFlowPruner(unet, GFPruneConfig(**options), SCHEDULER)
    engine = DistributedDataParallel(unet) if ranks > 1 else unet
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
    calibration = [dataclasses.replace(b, clean=b.clean.float(), noise=b.noise.float()) for b in global_batches(1)]
    for step in range(10):
        pruner.step(step, rows(calibration, rank, ranks))
        if pruner.finished:
            break
        clean, noise, timesteps = rows(calibration, rank, ranks)[0].tensors()
        prediction = engine(SCHEDULER.add_noise(clean, noise, timesteps), timesteps).sample
        optimizer.zero_grad()
        nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
    return pruner, unet


def recover(batches: list[DiffusionBatch]) -> dict[str, Tensor]:
    """Weights after pruning in one shot and recovery."""
    dense = build("fine-units")
    config = GFPruneConfig.from_preset("one-shot", total_steps=1, ratio=0.3)
    pruner = GradientFlowPruner(copy.deepcopy(dense), config, SCHEDULER)
    pruner.step(0, batches)
    pruner.recover(dense, batches)
    return dense_parameters(pruner.unet)


def message(function: Callable[[], object]) -> str:
    """What a function refuses with."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(rank: int) -> dict[str, str]:
    """Messages where rank 1 is not like rank 0."""
    other, found = float(rank == 1), {}
    batches = rows(global_batches(), rank, 2)
    first = GradientFlowPruner(build("fine-units").double(), GFPruneConfig.from_preset("one-shot", total_steps=1), SCHEDULER)

    def pruner(weights: float = 0.0, **options) -> GradientFlowPruner:
        found = copy.deepcopy(first, {id(group): group for group in first.groups})  # tracing again would take its time
        found.config = found.ranking.config = dataclasses.replace(found.config, **options)
        with torch.no_grad():
            dense_parameters(found.unet)["mid_block.resnets.0.conv1.weight"][3, 0, 0, 0] += weights
        return found

    def score(batches: list, weights: float = 0.0, **options) -> object:
        unet = pruner(weights).unet
        return score_units(unet, first.groups, batches, SCHEDULER, GFPruneConfig(**options))

    found["weights"] = message(lambda: pruner(1e-3 * other).step(0, batches))
    found["weights, magnitude"] = message(lambda: pruner(1e-3 * other, criterion="magnitude").step(0, []))
    averaged = pruner(criterion="random")
    averaged.ranking.scores = {group.name: torch.full((group.num_units,), 1.0 + other) for group in first.groups}
    found["averaged scores"] = message(lambda: averaged.step(0, []))
    by_hand = pruner(criterion="random")
    by_hand.set_masks({"conv_in": torch.ones(32) - other * (torch.arange(32) < 4)})
    found["masks"] = message(lambda: by_hand.step(0, []))
    seeds = pruner(criterion="random", pruning_seed=rank)
    found["seeds"] = message(lambda: seeds.step(0, []))
    nan = [dataclasses.replace(batches[0], clean=batches[0].clean * (float("nan") if rank == 1 else 1)), batches[1]]
    for criterion in ("gradient-flow", "taylor", "diff-pruning"):
        found[f"NaN images, {criterion}"] = message(lambda criterion=criterion: score(nan, criterion=criterion))
    found["NaN weights"] = message(lambda: score([], float("nan") if rank == 1 else 0.0, criterion="magnitude"))
    found["rows"] = message(lambda: score([batch.split(3 - rank)[0] for batch in batches]))
    found["batches"] = message(lambda: score(batches[: 2 - rank]))
    found["no batches"] = message(lambda: score(batches[: 2 - 2 * rank]))
    found["names"] = message(lambda: check_identical({name: torch.ones(1) for name in ("a", "b")[: 1 + rank]}))
    found["types"] = message(lambda: check_identical({"values of a": torch.ones(2, dtype=(torch.int32, torch.float32)[rank])}))
    found["shapes"] = message(lambda: check_identical({"values of a": torch.zeros(2, 2 + rank)}))
    found["the same"] = message(lambda: check_identical({"a": torch.ones(3), "b": torch.tensor(True)}))
    return found


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    tensors, values = {}, {"world_size": world_size()}
    values["made by first rank"] = made_by_first_rank(lambda: {"rank": rank, "third": 1 / 3, "text": "3 µs"})
    values["failed on first rank"] = message(lambda: made_by_first_rank(lambda: {"never": int("none of it")}))

    last = ValueError("of the last rank") if process_rank() == ranks - 1 else None
    values["failed on last rank"] = message(lambda: fail_together(last))
    values["failed on no rank"] = message(lambda: fail_together(None))

    unet, batches = build("fine-units").double(), rows(global_batches(), rank, ranks)
    groups = trace_channel_groups(unet)
    for name, options in CRITERIA.items():
        scores = score_units(unet, groups, batches, SCHEDULER, GFPruneConfig(**options))
        tensors |= {f"scores/{name}/{group}": value for group, value in scores.items()}
    joint = score_units_jointly(unet, groups, batches, SCHEDULER, GFPruneConfig())
    tensors |= {f"changes/{group}": value for group, value in joint.changes.items()}

    pruner, trained = train(rank, ranks)
    tensors |= {f"trained/{name}": value.clone() for name, value in trained.state_dict().items()}
    values["history"] = [update.to_dict() for update in pruner.history]
    single = [dataclasses.replace(batch, clean=batch.clean.float(), noise=batch.noise.float()) for batch in batches]
    values["comparison"] = compare_with_magnitude(pruner, single)
    tensors |= {f"recovered/{name}": weight.detach() for name, weight in recover(single).items()}
    repeated = recovery_batches(single, SCHEDULER)
    values["recovery batches"] = len(repeated)
    tensors |= {f"repeated/{index}": column.contiguous() for index, column in enumerate(repeated[-1].tensors())}

    mixed = [torch.full((5,), rank + 1.0), torch.full((2, 3), rank + 1.0, dtype=torch.float64)]
    mixed += [torch.full((4,), 60000.0 + 32 * rank, dtype=torch.float16), torch.full((1, 2, 3, 2), rank + 3.0)]
    mixed[-1] = mixed[-1].contiguous(memory_format=torch.channels_last)
    mean_over_ranks(mixed)
    tensors |= {f"mean/{index}": value.contiguous() for index, value in enumerate(mixed)}
    tensors["gathered"] = gather_rows(torch.tensor([[rank, 1], [rank, 2]], dtype=torch.int16))
    tensors["gathered flags"] = gather_rows(torch.tensor([rank == 0]))

    values["refusals"] = refusals(rank) if ranks > 1 else {}
    save_file(tensors, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(values))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
