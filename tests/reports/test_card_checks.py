"""reports/model_card.py: cards that the Hub would show wrongly are refused by the name of the field."""

from __future__ import annotations

import re

import pytest
import yaml

from diffusers_gfprune.reports.model_card import check_card

HEADER = {
    "license": "mit",
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["diffusers"],
}


def card_with(**changes: object) -> str:
    data = {key: value for key, value in {**HEADER, **changes}.items() if value is not None}
    return f"---\n{yaml.safe_dump(data)}---\n\n# A model\n"


def test_a_plain_card_passes():
    check_card(card_with())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"license": "Apache 2"}, "license='Apache 2'"),
        ({"license": None}, "license=None"),
        ({"pipeline_tag": "image-making"}, "pipeline_tag='image-making'"),
        ({"library_name": "torch"}, "library_name='torch'"),
        ({"tags": ["two words"]}, "tags"),
        ({"tags": "diffusers"}, "tags"),
        ({"base_model": "/home/me/model"}, "'/home/me/model'"),
        ({"datasets": ["a/b/c"]}, "'a/b/c'"),
        ({"datasets": "a/b/c"}, "'a/b/c'"),
        ({"license": ["mit"]}, "license=['mit']"),
        ({"model-index": [{"name": "x", "results": []}]}, "model-index"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_cards_that_the_hub_would_show_wrongly(changes, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        check_card(card_with(**changes))


@pytest.mark.parametrize("card", ["# no metadata\n", "---\nlicense: [mit\n---\n# broken\n"], ids=["none", "broken"])
def test_cards_without_readable_metadata(card):
    with pytest.raises(ValueError, match="metadata"):
        check_card(card)


@pytest.mark.parametrize("changes", [{"base_model": ["org/a", "org/b"]}, {"datasets": []}, {"datasets": "org/x"}], ids=str)
def test_metadata_that_people_write(changes):
    check_card(card_with(**changes))
