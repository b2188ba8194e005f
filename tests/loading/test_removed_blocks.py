"""The table `removed_blocks` of a config from outside: what is wrong is refused in one line, before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import (
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffusers_gfprune import GFPrunedUNet2DModel
from diffusers_gfprune.families.lookup import family_named
from diffusers_gfprune.remote.pruned_layers import RemovedBlock
from helpers.architectures import BASE, NoMemory
from helpers.families import CONDITION, DIT, PIXART, SD3

BLOCK = "mid_block.resnets.0"
ARGUMENTS = {
    UNet2DModel: BASE,
    UNet2DConditionModel: CONDITION,
    DiTTransformer2DModel: DIT,
    PixArtTransformer2DModel: PIXART,
    SD3Transformer2DModel: {**SD3, "num_layers": 4},
}

WRONG = {
    "unknown": (["mid_block.resnets.7"], "removed_blocks names 'mid_block.resnets.7', which is not a block"),
    "path": (["../../conv_in"], "removed_blocks names '../../conv_in', which is not a block"),
    "layer": ([f"{BLOCK}.conv1"], "which is not a block that can be removed"),
    "the model": ([""], "removed_blocks names '', which is not a block"),
    "first block": (["down_blocks.0.resnets.0"], "which is not a block that can be removed"),
    "a whole level": (["down_blocks.1"], "which is not a block that can be removed"),
    "twice": ([BLOCK, BLOCK], "must name each block once, got 2 names of 1 blocks"),
    "thousands": ([BLOCK] * 10**5, "must name each block once, got 100000 names of 1 blocks"),
    "thousands of others": ([f"block {k}" for k in range(10**5)], "removed_blocks names 'block 0'"),
    "long name": (["x" * 10**6], "which is not a block that can be removed"),
    "string": (BLOCK, "must be a list of module names, got 'mid_block.resnets.0'"),
    "number": (3, "must be a list of module names, got 3"),
    "numbers": ([1, 2], "must be a list of module names"),
    "mapping": ({BLOCK: True}, "must be a list of module names"),
    "nested": ([[BLOCK]], "must be a list of module names"),
    "null inside": ([None], "must be a list of module names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_refused(case: str) -> None:
    value, message = WRONG[case]
    with pytest.raises(ValueError) as error, NoMemory():
        GFPrunedUNet2DModel(**BASE, removed_blocks=value)
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 200


def test_tables_of_what_is_removed_are_refused() -> None:
    for table in (
        {"layer_channels": {f"{BLOCK}.conv1": [32, 16]}},
        {"norm_group_sizes": {f"{BLOCK}.norm2": [8, 8]}},
        {"attention_heads": {"mid_block.attentions.0": 2}},
    ):
        with pytest.raises(ValueError, match="which is not a"), NoMemory():
            GFPrunedUNet2DModel(**BASE, removed_blocks=[BLOCK, "mid_block.attentions.0"], **table)


@pytest.mark.parametrize("dense", ARGUMENTS)
def test_every_removable_block_of_every_family_loads(dense: type) -> None:
    family = family_named(dense.__name__)
    names = list(family.removable_blocks(dense(**ARGUMENTS[dense])))
    assert names
    for removed in (names, *([name] for name in names)):
        model = family.pruned_class(**ARGUMENTS[dense], removed_blocks=removed)
        assert sorted(k for k, module in model.named_modules() if isinstance(module, RemovedBlock)) == sorted(removed)


def test_weights_of_removed_blocks_are_refused(tmp_path: Path) -> None:
    GFPrunedUNet2DModel(**BASE, removed_blocks=[]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "removed_blocks": [BLOCK]}))
    with pytest.raises(ValueError, match=f"the weights do not fit the config: 10 unexpected keys, first {BLOCK}.conv1.bias"):
        GFPrunedUNet2DModel.from_pretrained(tmp_path)
