"""Tables as texts, for Markdown and for the page; columns that are empty are left out."""

from collections.abc import Mapping, Sequence

ROUGH = ("se", "gain", "low", "high")  # columns of errors and differences, of which two digits say all that is known


def text_of(row: Mapping, name: str) -> str:
    """A row's number to four digits, or two of ROUGH ones, a text unchanged, and an empty text for None."""
    value, digits = row.get(name), 2 if name in ROUGH else 4
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def texts_of(rows: Sequence[Mapping], headings: Mapping[str, str]) -> dict[str, list]:
    """The texts of head and lines of the columns that are not empty, and of what kind each is, "text" or "number"."""
    columns = [name for name in headings if any(row.get(name) not in (None, "") for row in rows)]
    kinds = ["text" if any(isinstance(row.get(name), str) for row in rows) else "number" for name in columns]
    lines = [[text_of(row, name) for name in columns] for row in rows]
    return {"head": [headings[name] for name in columns], "kinds": kinds, "lines": lines}


def to_markdown(rows: Sequence[Mapping], headings: Mapping[str, str]) -> str:
    """The rows as a Markdown table."""
    table = texts_of(rows, headings)
    lines = [[text.replace("|", "\\|") for text in line] for line in (table["head"], *table["lines"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) + " |\n" for line in lines)
