"""Tables in Markdown, which read well in a terminal too."""

from collections.abc import Sequence

import pandas as pd


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """A table, with its header as the first row."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def markdown_of(frame: pd.DataFrame) -> str:
    """A data frame's columns and rows as a table."""
    return markdown([tuple(frame.columns), *frame.astype(str).itertuples(index=False, name=None)])
