"""training/prune_ddpm.py: a step of the optimizer, on a loss with a known gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.training.arguments import parse_arguments

WORDS = ["--pretrained_model_name_or_path", "model", "--dataset_name", "images"]


@pytest.mark.parametrize(("most", "used"), [(None, 1.0), (2.5, 2.5), (7.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_to_their_maximum_norm(most: float | None, used: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is 5 before; 0 means never. What is logged is the norm before."""
    words = () if most is None else ("--max_grad_norm", str(most))
    model, accelerator = nn.Linear(2, 1, bias=False), Accelerator(cpu=True)
    before = model.weight.detach().clone()

    def objective(model: nn.Module, *_) -> tuple[Tensor, dict[str, Tensor], None]:
        loss = (model.weight * torch.tensor([3.0, -4.0])).sum()
        return loss, {"noise": loss.detach()}, None

    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    state = SimpleNamespace(model=model, unet=model, optimizer=optimizer, lr_scheduler=lr_scheduler)
    state.timestep_density = state.ema = None
    run = SimpleNamespace(accelerator=accelerator, args=parse_arguments([*WORDS, *words]), objective=objective)
    batch = SimpleNamespace(noise=torch.zeros(1, 1, 2, 2))
    monkeypatch.setattr(prune_ddpm, "next_batch", lambda *_: (batch, None, None))
    _, _, norm = prune_ddpm.optimization_step(run, state, iter(()))
    assert norm.item() == pytest.approx(5)
    torch.testing.assert_close(before - model.weight.detach(), used / 5 * torch.tensor([[3.0, -4.0]]))
