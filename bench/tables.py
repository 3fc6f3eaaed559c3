"""Put a measured table between its marks in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def replace_table(name: str, table: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    text = PAGE.read_text()
    if first not in text or last not in text:
        raise SystemExit(f"{PAGE.name} has no marks for {name}")
    before, _, rest = text.partition(first)
    PAGE.write_text(before + first + table + last + rest.partition(last)[2])
