"""pruning/masking.py: masks in state dictionaries and copies, and masks that are refused."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_gfprune.pruning.masking import (
    check_mask,
    detach,
)
from helpers.architectures import build, random_masks
from helpers.compaction import relative_error, traced
from helpers.masking import CONV1, masked, run

# --- state -------------------------------------------------------------------------------------------------------------


def test_masks_are_stored_once_per_group_and_restored():
    """A checkpoint holds weights under `.original` and one mask per group; loading it brings the masks to life."""
    unet, masks = masked()
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    added = set(state) - set(build().state_dict()) - {key for key in state if key.endswith(".original")}
    assert added == {f"channel_masks.{group.name.replace('.', '/')}" for group in traced() if group.num_units}
    storages = [value.data_ptr() for value in unet.state_dict().values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses shared memory

    other, restored = masked(seed=None)
    assert restored.all_ones
    other.load_state_dict(state)
    assert not restored.all_ones
    assert all(torch.equal(mask, masks.as_dict()[name]) for name, mask in restored.as_dict().items())
    assert torch.equal(run(other), run(unet))


def test_loading_ones_brings_the_dense_model_back():
    """The flag that spares products is refreshed both ways."""
    unet, masks = masked(seed=None)
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    before = run(unet)
    masks.set(random_masks(list(traced()), seed=0))
    unet.load_state_dict(state)
    assert masks.all_ones
    assert torch.equal(run(unet), before)


def test_deepcopy_has_masks_of_its_own():
    """Evaluation copies and EMA models must not change with the masks of the original, nor the other way round."""
    unet, masks = masked(seed=1)
    twin = copy.deepcopy(unet)
    before = run(unet)
    assert torch.equal(run(twin), before)
    twin.channel_masks.set(random_masks(list(traced()), seed=2))
    assert torch.equal(run(unet), before)
    changed = run(twin)
    assert relative_error(changed, before) > 1e-2
    masks.set({group.name: torch.ones(group.num_units) for group in traced()})
    assert torch.equal(run(twin), changed)
    detach(twin)
    assert hasattr(unet, "channel_masks")


def test_suspended_masks_come_back():
    """Scoring at the dense weights must not leave the model dense, whatever happens inside."""
    unet, masks = masked()
    before = run(unet)
    with pytest.raises(RuntimeError, match="inside"), masks.suspended():
        assert torch.equal(run(unet), run(build()))
        raise RuntimeError("inside")
    assert torch.equal(run(unet), before)


def test_as_dict_gives_copies():
    """Whoever reads masks cannot change them by accident."""
    unet, masks = masked()
    before = run(unet)
    for mask in masks.as_dict().values():
        mask.zero_()
    assert torch.equal(run(unet), before)


def test_saving_while_masked_is_refused_and_writes_nothing(tmp_path):
    """Diffusers would write names that `from_pretrained` does not know, and load random weights with a warning."""
    unet, _ = masked()
    with pytest.raises(ValueError, match="masked"):
        unet.save_pretrained(tmp_path / "unet")
    assert os.listdir(tmp_path) == []
    detach(unet)
    unet.save_pretrained(tmp_path / "unet")
    assert torch.equal(run(UNet2DModel.from_pretrained(tmp_path / "unet")), run(unet))


def test_a_copy_of_a_masked_model_refuses_to_save_too(tmp_path):
    """The refusal belongs to the masks, not to the object."""
    unet, _ = masked()
    twin = copy.deepcopy(unet)
    with pytest.raises(ValueError, match="masked"):
        twin.save_pretrained(tmp_path / "unet")
    assert os.listdir(tmp_path) == []


# --- refused masks -----------------------------------------------------------------------------------------------------


def _uneven_heads() -> Tensor:
    mask = torch.ones(32)
    mask[:3] = 0  # the first of four heads has 5 channels then, the others 8
    return mask


@pytest.mark.parametrize(
    ("group", "mask", "message"),
    [
        (CONV1, torch.zeros(4), "leaves none of its 16 channels"),
        ("down_blocks.1.attentions.0.to_q", _uneven_heads(), r"heads with \[5, 8\] channels"),
        (CONV1, torch.full((4,), 1.1), r"outside \[0, 1\]"),
        (CONV1, torch.full((4,), -0.1), r"outside \[0, 1\]"),
        (CONV1, torch.full((4,), float("nan")), r"outside \[0, 1\]"),
        (CONV1, torch.full((4,), float("inf")), r"outside \[0, 1\]"),
        (CONV1, torch.ones(3), r"shape \(3,\), not \(4,\)"),
        (CONV1, torch.ones(4, 1), r"shape \(4, 1\), not \(4,\)"),
        (CONV1, torch.ones(()), r"shape \(\), not \(4,\)"),
        ("conv_inn", torch.ones(4), "conv_inn is not a channel group"),
    ],
    ids=["empty", "uneven-heads", "above", "below", "nan", "infinite", "short", "two-dims", "scalar", "unknown"],
)
def test_set_refuses_and_changes_nothing(group: str, mask: Tensor, message: str):
    """A refused mask must not leave the others half set: the good one comes first here."""
    unet, masks = masked(seed=0)
    before, output = masks.as_dict(), run(unet)
    with pytest.raises(ValueError, match=message):
        masks.set({"time_embedding.linear_1": torch.full((64,), 0.5), group: mask})
    assert all(torch.equal(value, before[name]) for name, value in masks.as_dict().items())
    assert torch.equal(run(unet), output)


@pytest.mark.parametrize("kept", [(8, 8, 8, 8), (5, 5, 5, 5), (0, 8, 0, 8), (0, 3, 3, 0), (1, 0, 0, 0)])
def test_heads_off_or_shrunk_alike_are_accepted(kept: tuple[int, ...]):
    """What is left are heads of one width, which attention can be built of."""
    (group,) = [group for group in traced() if group.name == "mid_block.attentions.0.to_q"]
    check_mask(group, torch.cat([(torch.arange(8) < width).float() for width in kept]))


def test_fixed_channels_alone_are_accepted():
    """A group with fixed channels may lose all of its units; one that has nothing else takes an empty mask."""
    groups = {group.name: group for group in traced()}
    check_mask(groups["up_blocks.0.upsamplers.0.conv"], torch.zeros(2))
    check_mask(groups["conv_in"], torch.ones(0))


def test_masks_of_other_kinds_are_taken():
    """Booleans, lists and half precision say the same."""
    unet, masks = masked(seed=None)
    pattern = [True, False] * 2
    masks.set({CONV1: torch.tensor(pattern).float()})
    expected = run(unet)
    for mask in (torch.tensor(pattern), pattern, torch.tensor(pattern).half(), torch.tensor(pattern).long()):
        masks.set({CONV1: torch.ones(4)})
        masks.set({CONV1: mask})
        assert torch.equal(run(unet), expected)


def test_masks_are_replaced_while_they_are_suspended():
    """Criteria that are taken without masks measure removals; afterwards the masks are suspended as before."""
    unet, masks = masked()
    other = random_masks(list(traced()), seed=5)
    with masks.replaced(other):
        wanted = run(unet)
    with masks.suspended():
        dense = run(unet)
        with masks.replaced(other):
            assert torch.equal(run(unet), wanted) and not torch.equal(wanted, dense)
        assert torch.equal(run(unet), dense)
