"""A report as a list of blocks, and its two forms: Markdown, and one HTML page that needs nothing else.

The page has its style and pictures inside, runs no script, and is laid out for a screen, a telephone and paper.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple


class Heading(NamedTuple):
    """`level` 2 or 3; `anchor` is unique."""

    text: str
    level: int
    anchor: str
    full: str = ""  # what the text abbreviates


class Text(NamedTuple):
    """A paragraph, in which `code` stands between backticks."""

    text: str


class Warnings(NamedTuple):
    """What a reader has to know before the table that follows."""

    items: Sequence[str]


class Table(NamedTuple):
    """Markdown tables of [`~modeling_dclip.evaluation.reports.tables.markdown_table`] and paragraphs between them."""

    markdown: str


class Picture(NamedTuple):
    """A PNG file by its name among the report's pictures."""

    name: str
    alt: str


class Terms(NamedTuple):
    """Terms and their texts, small: what a table was measured on."""

    items: Sequence[tuple[str, str]]


Block = Heading | Text | Warnings | Table | Picture | Terms

STYLE = """
:root { --ink: #1f2430; --quiet: #667085; --line: #e4e7ec; --soft: #f7f8fa; --accent: #2456c7; --warn: #8a4b00; --warn-soft: #fff7e8; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 .8rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.4rem 0 .6rem; overflow-wrap: anywhere; }
h3[title] { cursor: help; }
p { margin: .6rem 0; max-width: 62rem; overflow-wrap: anywhere; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
nav { margin: 1.4rem 0; padding: .9rem 1.2rem; background: var(--soft); border-radius: 8px; font-size: .93rem; }
nav ul { margin: 0; padding: 0; list-style: none; } nav ul ul { padding-left: 1.1rem; } nav li { margin: .12rem 0; overflow-wrap: anywhere; }
nav > ul { columns: 2 20rem; column-gap: 2.5rem; } nav > ul > li { break-inside: avoid-column; margin-bottom: .5rem; }
.scroll { overflow-x: auto; margin: .9rem 0 .5rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; min-width: 100%; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; }
th, td { padding: .42rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; background: #fff; }
th { background: var(--soft); font-weight: 600; color: #475467; vertical-align: bottom; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
tbody tr:last-child td { border-bottom: 0; } tbody tr:hover td { background: #f2f6ff; }
th.number, td.number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; border-right: 1px solid var(--line); }
td small { display: block; color: var(--quiet); font-size: .86em; } td b { color: #0b1b45; }
figure { margin: 1.2rem 0; } img { display: block; max-width: min(100%, 46rem); height: auto; } figcaption { color: var(--quiet); font-size: .85rem; }
.warnings { margin: .8rem 0; padding: .6rem 1rem; background: var(--warn-soft); border-left: 3px solid #e39a2d; border-radius: 0 8px 8px 0; font-size: .92rem; color: var(--warn); }
.warnings ul { margin: 0; padding-left: 1.1rem; } .warnings li { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .8rem 0 0; font-size: .8rem; line-height: 1.45; color: var(--quiet); }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.4rem 1rem 3rem; } h1 { font-size: 1.5rem; } th, td { padding: .38rem .55rem; }
  th:first-child, td:first-child { white-space: normal; } td.long { min-width: 9.5rem; } dl { grid-template-columns: 5.5rem 1fr; column-gap: .6rem; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { break-after: page; }
  img { max-width: 12.5cm; } .scroll { overflow: visible; border: 0; } table { font-size: 7.5pt; min-width: 0; } th, td { padding: .2rem .35rem; } td { white-space: normal; }
  th:first-child, td:first-child { position: static; } td.long { min-width: 0; }
  h2, h3 { break-after: avoid; } tr, figure, dl, .warnings { break-inside: avoid; } a { color: inherit; }
}
"""  # noqa: E501


def render_markdown(title: str, intro: Sequence[str], blocks: Sequence[Block], folder: str) -> str:
    """The report as Markdown; pictures are linked in `folder`."""
    parts = [f"# {title}", *intro]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Warnings):
            parts.append("\n".join(f"> - ⚠ {item}" for item in block.items))
        elif isinstance(block, Table):
            parts.append(block.markdown)
        elif isinstance(block, Picture):
            parts.append(f"![{block.alt}]({folder}/{block.name})")
        else:
            parts.append("\n".join(f"- {term}: {text}" for term, text in block.items))
    return "\n\n".join(parts) + "\n"


def render_html(title: str, intro: Sequence[str], blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """The report as one HTML page. Everything that came from a file is escaped.

    Args:
        title (`str`): Of the page.
        intro (`Sequence[str]`): Paragraphs above the list of contents.
        blocks (`Sequence[Block]`): The report.
        pictures (`Mapping[str, bytes]`): PNG content by name, put into the page.

    Returns:
        `str`: A whole document.
    """
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{_inline(text)}</p>" for text in intro), _contents(blocks)]
    for block in blocks:
        if isinstance(block, Heading):
            full = f' title="{escape(block.full)}"' if block.full and block.full != block.text else ""
            body.append(f'<h{block.level} id="{escape(block.anchor)}"{full}>{escape(block.text)}</h{block.level}>')
        elif isinstance(block, Text):
            body.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Warnings):
            items = "".join(f"<li>{_inline(item)}</li>" for item in block.items)
            body.append(f'<div class="warnings" role="note"><ul>{items}</ul></div>')
        elif isinstance(block, Table):
            body += [
                _table(part) if part.startswith("|") else f"<p>{_inline(part)}</p>"
                for part in block.markdown.split("\n\n")
            ]
        elif isinstance(block, Picture):
            data = base64.b64encode(pictures[block.name]).decode("ascii")
            body.append(
                f'<figure><img alt="{escape(block.alt)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{escape(block.alt)}</figcaption></figure>"
            )
        else:
            items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in block.items)
            body.append(f"<dl>{items}</dl>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title>'
    )
    return (
        "<!DOCTYPE html>\n<html "
        f'lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>\n{chr(10).join(body)}\n</main></body></html>\n'
    )


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _contents(blocks: Sequence[Block]) -> str:
    """Links to the headings: those of level 2, and beneath each those of level 3."""
    sections: list[tuple[Heading, list[Heading]]] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            sections.append((block, []))
        elif isinstance(block, Heading) and sections:
            sections[-1][1].append(block)

    def link(heading: Heading) -> str:
        return f'<a href="#{escape(heading.anchor)}">{escape(heading.text)}</a>'

    items = []
    for section, parts in sections:
        below = "".join(f"<li>{link(part)}</li>" for part in parts)
        items.append(f"<li>{link(section)}{f'<ul>{below}</ul>' if below else ''}</li>")
    return f'<nav aria-label="Contents"><ul>{"".join(items)}</ul></nav>'


def _table(markdown: str) -> str:
    """A table of `markdown_table`: right-aligned columns are numbers, whose intervals go below them, small."""
    header, rule, *rows = [_cells(line) for line in markdown.splitlines()]
    numbers = [mark.endswith(":") for mark in rule]
    head = "".join(f"<th{_number(number)}>{escape(cell)}</th>" for cell, number in zip(header, numbers, strict=True))
    body = []
    for row in rows:
        cells = []
        for cell, number in zip(row, numbers, strict=True):
            long = ' class="long"' if not number and len(cell) > 28 else ""
            cells.append(f"<td{_number(number) or long}>{_value(cell) if number else _breakable(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="scroll" '
        f'tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _breakable(cell: str) -> str:
    """A path may be broken after each folder."""
    return escape(cell).replace("/", "/<wbr>")


def _number(number: bool) -> str:
    return ' class="number"' if number else ""


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _value(cell: str) -> str:
    """`**12.3** [11.0, 14.1] %`: bold, and the interval on a line of its own."""
    value, rest = re.fullmatch(r"(\S*)(.*)", cell, re.DOTALL).groups()
    bold = re.fullmatch(r"\*\*(.+)\*\*", value)
    value = f"<b>{escape(bold[1])}</b>" if bold else escape(value)
    interval = re.fullmatch(r" ((?:\[.*\]|± \S+))(.*)", rest, re.DOTALL)
    if interval is None:
        return value + escape(rest)
    return f"{value}{escape(interval[2])}<small>{escape(interval[1])}</small>"
