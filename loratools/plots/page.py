"""A figure and its table as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape

from loratools.plots.drawing import Drawing, legible
from loratools.plots.svg import svg_of

_CSS = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; --ink: #1a1a1a; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #262626; --ink: #e6e6e6; --page: #161616; }
}
body { margin: 1.5rem; font: 14px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
figure { margin: 0 0 1.5rem; overflow-x: auto; background: #fff; border-radius: 6px; }
figure svg { max-width: none; }
figure g[id^="cell"]:hover path { stroke: #d00; stroke-width: 1.5; }
input { font: inherit; padding: .25rem .5rem; width: 22rem; max-width: 100%; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin-top: .75rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
th { position: sticky; top: 0; background: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
"""

_JS = """
const table = document.querySelector("table"), body = table.tBodies[0];
const value = (row, i) => {
  const text = row.cells[i].dataset.value ?? row.cells[i].textContent;
  return text !== "" && !isNaN(text) ? +text : text;
};
table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th");
  if (!head) return;
  const i = head.cellIndex, down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map(row => [value(row, i), row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = typeof a === "number" && typeof b === "number"
      ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
    return down ? -order : order;
  });
  body.append(...rows.map(([, row]) => row));
});
document.querySelector("input").addEventListener("input", event => {
  const word = event.target.value.toLowerCase();
  for (const row of body.rows)
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(word);
});
"""


def page_of(drawing: Drawing) -> str:
    """Return the page: figure with tooltips, and a table that sorts and filters by name."""
    title = escape(legible(drawing.title))
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(column)}</button></th>'
        for column in drawing.columns
    )
    rows = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in drawing.rows)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<figure>\n{svg_of(drawing)}</figure>\n"
        '<label>Show modules whose name holds <input type="search"></label>\n'
        f'<div class="table"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n<script>{_JS}</script>\n</body>\n</html>\n"
    )


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        return f'<td data-value="{value!r}">{value:.4g}</td>'
    return f"<td>{escape(legible(str(value)))}</td>"
