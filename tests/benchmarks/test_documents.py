"""documents.py: a table replaces what stood between its marks, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import write_table

PAGE = "before\n\n<!-- one -->\n\nold\n\n<!-- end -->\n\n<!-- other -->\n\nkept\n\n<!-- end -->\n\nafter\n"


def test_a_table_replaces_what_stood_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(PAGE)
    write_table("one", "| new |\n", document)
    assert document.read_text() == PAGE.replace("old", "| new |")
    write_table("one", "| new |", document)
    assert document.read_text() == PAGE.replace("old", "| new |")


@pytest.mark.parametrize("page", ["nothing", "<!-- end -->\n<!-- one -->\nno end"])
def test_a_document_without_the_part_stays_as_it_is(page: str, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(page)
    with pytest.raises(ValueError, match=r"README.md must have a part from <!-- one --> to <!-- end -->$"):
        write_table("one", "| new |", document)
    assert document.read_text() == page
