"""Two processes with B images each match one with 2B: same masks at every ranking, same weights to float tolerance."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from diffusers_gfprune.training.run_setup import check_distributed_type
from helpers.resume import TEACHER, assert_same_result, run_here, start, wait_for_checkpoint

# On machines without a GPU, processes talk over gloo.
LAUNCH = (
    *(str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no"),
)
ONE = (*LAUNCH, "--num_processes", "1")
TWO = (*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
# Of 50 steps 20 prune, of 20 steps 12, with rankings in between; fine-tuning follows on the compacted model
STEPS = ("--max_train_steps", 50, "--soft_fraction", 0.2, "--hard_fraction", 0.4, "--checkpointing_steps", 0)
FORMS = {
    "predictions": ("--distillation_weight", 0),
    "exact": ("--criterion", "gradient-flow-weights", "--hvp", "exact", "--distillation_weight", 0),
    "finite differences": (
        *("--criterion", "gradient-flow-weights", "--hvp", "finite-difference", "--hessian_batches", "mean"),
        *("--distillation_weight", 0.5),
    ),
    "recovery": ("--recovery", "rankings", "--distillation_weight", 0),
}


def finished(process: subprocess.Popen) -> str:
    printed, said = process.communicate()
    assert process.returncode == 0, said
    return printed


def without_dropout(folder: Path) -> Path:
    """The digits teacher, with nothing left that each process draws for itself.

    Its loss has noise in it: against its own prediction alone there is none at step 0, and Adam makes whole steps of rounding
    errors.
    """
    shutil.copytree(TEACHER, folder)
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.0}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_do_what_one_does(tmp_path: Path, form: str) -> None:
    model = ("--pretrained_model_name_or_path", without_dropout(tmp_path / "model"))
    run_here(tmp_path / "one", *model, *STEPS, *FORMS[form], "--train_batch_size", 16)
    printed = finished(start(tmp_path / "two", *model, *STEPS, *FORMS[form], "--train_batch_size", 8, launcher=TWO))
    assert printed.count("plan: remove 50.0% of macs") == 1
    reports = [json.loads((tmp_path / name / "pruning_report.json").read_text()) for name in ("one", "two")]
    one_updates, two_updates = (report["mask_updates"] for report in reports)
    assert len(one_updates) >= 5 and one_updates == two_updates
    assert (tmp_path / "one/unet/config.json").read_text() == (tmp_path / "two/unet/config.json").read_text()
    one_weights, two_weights = (load_file(tmp_path / n / "unet/diffusion_pytorch_model.safetensors") for n in ("one", "two"))
    for name, weight in one_weights.items():
        torch.testing.assert_close(
            two_weights[name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert [report["num_processes"] for report in reports] == [1, 2]
    batches = [re.search(r"batch (\d+)", (tmp_path / name / "README.md").read_text())[1] for name in ("one", "two")]
    assert batches == ["16", "16"]
    losses = [report["curves"]["validation_loss"] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_process_that_dies(tmp_path: Path) -> None:
    """The launcher ends the other one; the run resumes from its last checkpoint and gives the same result."""
    finished(start(tmp_path / "whole", launcher=TWO))
    process = start(tmp_path / "run", launcher=TWO)
    wait_for_checkpoint(process, tmp_path / "run", 8)
    ranks = [c for c in psutil.Process(process.pid).children(recursive=True) if "prune_ddpm.py" in " ".join(c.cmdline())]
    max(ranks, key=lambda rank: int(rank.environ()["RANK"])).kill()
    process.communicate()
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    finished(start(tmp_path / "run", "--resume_from_checkpoint", "latest", launcher=TWO))
    assert_same_result(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one process", "two"])
def test_a_launcher_that_is_told_to_stop(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """Whether or not it forwards the signal, the run saves, ends, and can be resumed."""
    process = start(tmp_path / "run", "--checkpointing_steps", 7, launcher=launcher)
    wait_for_checkpoint(process, tmp_path / "run", 7)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, said = process.communicate()  # until the last of them closes its end
    assert "stopped by SIGTERM after step " in said and "Traceback" not in said.split("stopped by SIGTERM")[0]
    assert not psutil.wait_procs(processes, timeout=30)[1]
    assert {path.name for path in tmp_path.iterdir()} == {"run.training"}
    finished(start(tmp_path / "run", "--checkpointing_steps", 7, "--resume_from_checkpoint", "latest", launcher=launcher))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"distributed_type={name} is not supported: double backward, masks and compaction"):
        check_distributed_type(DistributedType[name])


@pytest.mark.parametrize("name", ["NO", "MULTI_GPU"])
def test_replicated_training_is_not(name: str) -> None:
    check_distributed_type(DistributedType[name])
