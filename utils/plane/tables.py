"""Tables as Markdown and HTML."""

import html
from collections.abc import Mapping, Sequence

ROUGH = ("se", "gain", "low", "high")  # columns of errors and differences, of which two digits say all that is known


def shown(row: Mapping, name: str) -> str:
    """A row's number to four digits, or two of ROUGH ones, a text unchanged, and an empty text for None."""
    value, digits = row.get(name), 2 if name in ROUGH else 4
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def columns_of(rows: Sequence[Mapping], headings: Mapping[str, str]) -> list[str]:
    """The columns that are not empty."""
    return [name for name in headings if any(row.get(name) not in (None, "") for row in rows)]


def to_markdown(rows: Sequence[Mapping], headings: Mapping[str, str]) -> str:
    """The rows as a Markdown table, without empty columns."""
    columns = columns_of(rows, headings)
    lines = [[headings[name] for name in columns]]
    lines += [[shown(row, name) for name in columns] for row in rows]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) + " |\n" for line in lines)


def to_html(rows: Sequence[Mapping], headings: Mapping[str, str]) -> str:
    """The rows as an HTML table, without empty columns, which a click on a heading sorts."""
    columns = columns_of(rows, headings)
    texts = {name for name in columns if any(isinstance(row.get(name), str) for row in rows)}
    kinds = {name: ' class="text"' * (name in texts) for name in columns}

    def line(tag: str, row: Mapping, inner: str) -> str:
        cells = [f"<{tag}{kinds[name]}>{inner.format(html.escape(shown(row, name)))}</{tag}>" for name in columns]
        return "<tr>" + "".join(cells) + "</tr>"

    head = line("th", headings, '<button type="button">{}</button>')
    body = "\n".join(line("td", row, "{}") for row in rows)
    return f'<div class="table" tabindex="0"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'
