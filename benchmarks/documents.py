"""Tables in `benchmarks/README.md`: each stands between a mark of its own, `<!-- name -->`, and the next `<!-- end -->`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["README", "write_table"]

README = Path(__file__).resolve().parent / "README.md"
END = "<!-- end -->"


def write_table(name: str, table: str, document: Path = README) -> None:
    """Replace the table of a document that is marked with a name.

    Raises:
        ValueError: The document has no such part.
    """
    mark = f"<!-- {name} -->\n"
    before, found, rest = document.read_text("utf-8").partition(mark)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{document} must have a part from {mark.strip()} to {END}")
    document.write_text(f"{before}{mark}\n{table.strip()}\n\n{END}{after}", "utf-8")
