"""The report of a batch: tables as CSV, Markdown and HTML, and one page that holds everything."""

import base64
import html
from collections.abc import Mapping, Sequence

ADVICE = {  # columns of the advice, and how they are headed
    "task": "task",
    "budget": "budget",
    "metric": "metric",
    "value": "best",
    "std": "std",
    "beta_y": "beta_y",
    "beta_z": "beta_z",
    "kl_y": "R(y|z)",
    "kl_z": "R(z)",
    "rate": "R",
    "diagonal_value": "best, beta_y = beta_z",
    "diagonal_beta": "at beta",
    "diagonal_rate": "at R",
    "gain": "gain",
}
CAPTIONS = {
    "rate_plane": "Each metric over the rate plane. A run's place is how much it stores in z (to the right) and in y "
    "given z (upwards); rings are ordinary beta-VAEs, the square has both betas 1, the star is the best run.",
    "total_rate": "Each metric against the total rate. Where the hull of all cells lies beyond the dashed line, "
    "trading between the layers buys something over an ordinary beta-VAE of the same total rate.",
    "rate_z": "What is told of the label, against R(z). z cannot hold more than R(z) nats on the label, nor more than "
    "the label's entropy; the line is that bound. It holds for samples of z, the probes read its posterior mean.",
    "heat_maps": "Rates and metrics over the grid of betas; the best cell is framed.",
    "tasks": "Three tasks against each other. The hue tells in which direction from (1, 1) a run's betas lie, the "
    "saturation how far.",
    "slopes": "Slopes of the distortion in units of the betas, from each cell's neighbours: 1 at an optimum. Far from "
    "1, a cell is under-trained; grey is where they do not tell, or D does not fall.",
    "samples": "Samples of each cell, made of the same noise.",
    "reconstructions": "Reconstructions of the same test images.",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #0072b2; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 1.5rem 0; } figcaption { max-width: 46rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.table { overflow-x: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.text { text-align: left; } thead th { position: sticky; top: 0; background: Canvas; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; overflow-wrap: anywhere; }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.parentElement, body = th.closest("table").tBodies[0];
  const up = th.ariaSort !== "ascending", value = row => row.cells[th.cellIndex].textContent;
  for (const other of th.parentElement.cells) other.ariaSort = null;
  th.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => a === "" || b === "" ? (a === "") - (b === "") :
    (up ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
};
"""


def shown(value: object) -> str:
    """A figure to four digits, a text as it is, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def columns_of(rows: Sequence[Mapping], headings: Mapping[str, str]) -> list[str]:
    """The columns that some row fills."""
    return [name for name in headings if any(row.get(name) not in (None, "") for row in rows)]


def to_markdown(rows: Sequence[Mapping], headings: Mapping[str, str]) -> str:
    columns = columns_of(rows, headings)
    lines = [[headings[name] for name in columns]]
    lines += [[shown(row.get(name)) for name in columns] for row in rows]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) + " |\n" for line in lines)


def to_html(rows: Sequence[Mapping], headings: Mapping[str, str]) -> str:
    """A table that is sorted by a click on a heading."""
    columns = columns_of(rows, headings)
    texts = {name for name in columns if any(isinstance(row.get(name), str) for row in rows)}

    def line(tag: str, row: Mapping, inner: str) -> str:
        cells = [
            f"<{tag}{' class=text' if name in texts else ''}>{inner.format(html.escape(shown(row.get(name))))}</{tag}>"
            for name in columns
        ]
        return "<tr>" + "".join(cells) + "</tr>"

    head = line("th", headings, '<button type="button">{}</button>')
    body = "\n".join(line("td", row, "{}") for row in rows)
    return f'<div class="table"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def page(
    title: str,
    settings: Mapping[str, str],
    notes: Sequence[str],
    tables: Mapping[str, str],
    images: Mapping[str, bytes],
) -> str:
    """One page that needs no other file: `tables` are HTML by heading, `images` are PNGs by figure name."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"]
    first, *others = tables.items()
    parts += [f"<h2>{html.escape(first[0])}</h2>{first[1]}", "<h2>Figures</h2>"]
    for name, png in images.items():
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        caption = f"<figcaption>{CAPTIONS[name]}</figcaption>"
        parts.append(f'<figure id="{name}"><img alt="{name}" src="{source}">{caption}</figure>')
    parts += [f"<h2>{html.escape(heading)}</h2>{table}" for heading, table in others]
    parts.append("<h2>Settings</h2><dl>")
    parts += [f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in settings.items()]
    parts.append("</dl>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    html_of = f'<html lang="en"><head>{head}</head>\n<body>\n{body}\n<script>{SCRIPT}</script></body></html>'
    return f"<!doctype html>\n{html_of}\n"
