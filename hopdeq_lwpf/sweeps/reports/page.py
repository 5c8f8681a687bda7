"""What the reports share: self-contained HTML that opens offline, loads nothing, is readable in light and dark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hopdeq_lwpf.data import replacing

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #666; --line: #d8d8d8;
  --band: #f5f5f3; --warn: #a33c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17181a; --soft: #a5a5a5; --line: #3b3d41; --band: #202226;
    --warn: #ff9d5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
li { max-width: 46rem; }
.soft { color: var(--soft); }
.warn { color: var(--warn); font-weight: 600; }
figure { margin: 1rem 0 1.6rem; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.sheet { background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: .5rem;
  overflow-x: auto; }
figure svg { display: block; width: 100%; max-width: 48rem; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; }
.tall { overflow: auto; max-height: 36rem; border-bottom: 1px solid var(--line); }
.tall thead th { position: sticky; top: 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; background: var(--band); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--band); }
.glossary td { white-space: normal; text-align: left; }
pre, code { font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--band); }
pre { padding: .7rem; overflow-x: auto; border: 1px solid var(--line); }
.failures td { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.failures th { text-align: left; }
.failures td { min-width: 12rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  h1 { font-size: 1.35rem; }
  /* Letters of a figure stay readable: it scrolls in its sheet instead. */
  figure svg { width: 40rem; max-width: none; }
}
@media print { .tall { max-height: none; } }
"""
# Columns of words, by their number: a class of the cell would be as long as most cells.
STYLE += "".join(f".w{n} :is(th, td):nth-child({n}) {{ text-align: left; }}\n" for n in range(1, 25))
NUMBER = re.compile(r"(?:[-+]?[0-9.]|&lt; |-$|nan)")  # how a cell begins that holds a number, or none
TALL = 40  # lines beyond which a table scrolls in itself


def write_page(path: Path, title: str, body: Sequence[str]) -> Path:
    """Write the document whole or not at all; `body` is HTML, the title text."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")
    return path


def figures(captions: Mapping[str, str], folder: Path) -> list[str]:
    """NAME.svg of the folder for each NAME, drawn in, with its caption."""
    return [
        f'<figure id="{escape(name)}"><div class="sheet">{_inline(folder / f"{name}.svg")}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in captions.items()
    ]


def _inline(path: Path) -> str:
    """The picture as an element; its declaration and document type belong to a file of its own."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    # The names in one document must differ, or the second picture would use the first one's shapes.
    prefix = path.stem
    text = re.sub(
        r'(<image [^>]*?) id="[^"]*"', r"\1", text
    )  # equal pictures have equal names; nothing uses them
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def table(header: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of text; kind: its class in STYLE."""
    return html_table(header, [[escape(cell) for cell in line] for line in lines], kind)


def html_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "", *, tall: int = TALL
) -> str:
    """`table` whose cells are HTML already; the header is text. Columns of words stand left, those of numbers right.

    tall: lines beyond which it scrolls in itself.
    """
    words = [
        f"w{column + 1}"
        for column in range(len(header))
        if any(not NUMBER.match(line[column]) for line in lines if column < len(line))
    ]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    rows = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines]
    classes = " ".join([kind, *words]).strip()
    body = "\n".join(rows)
    return (
        f'<div class="{"tall" if len(rows) > tall else "wide"}"><table class="{classes}">'
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def settings_element(value: Any) -> str:
    """Settings for programs that read the page."""
    # "<" would allow a file name to end the element.
    text = json.dumps(value).replace("<", "\\u003c")
    return f'<script type="application/json" id="settings">{text}</script>'
