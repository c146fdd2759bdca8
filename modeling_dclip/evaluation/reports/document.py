"""What a report shows, as values, and the two forms of it: Markdown, and HTML from the templates in `templates/`.

A table is rows of cells, a report is a list of blocks. Each is made once and rendered to both forms; nothing reads
Markdown back. Whatever came from a file is escaped: in HTML by the templates (autoescape), in Markdown by
[`escape_markdown`] and [`code_markdown`]. Characters that nobody sees or that no file can hold are written out by
[`show_text`] in every form.

A page has its style and pictures inside, runs no script, and is laid out for a screen, a telephone and paper.
"""

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup

PICTURE_DPI = 200  # pixels an inch
_TEMPLATES = Path(__file__).with_name("templates")


class Code(str):
    """A part of a [`Text`] that is set as code."""


class Heading(NamedTuple):
    """A heading of the report.

    Attributes:
        text (`str`): What it says.
        level (`int`): 1 for the title, 2 for a part of the report, 3 for a section of a part.
        anchor (`str`): Unique in the report; links in the list of contents point to it.
        full (`str`, *optional*): The text in full, where `text` is a short form. HTML shows it as a tooltip.
    """

    text: str
    level: int
    anchor: str
    full: str = ""
    kind: Literal["heading"] = "heading"  # which block of the template shows it


@dataclass(frozen=True, init=False)
class Text:
    """A paragraph: parts that follow each other, plain strings and [`Code`]."""

    parts: tuple[str, ...]

    kind = "text"

    def __init__(self, *parts: str):
        object.__setattr__(self, "parts", parts)


class Findings(NamedTuple):
    """What was found, for a reader who reads nothing else.

    Attributes:
        items (`Sequence[tuple[str, Sequence[str]]]`): A sentence, and the lines of numbers behind it.
        more (`Sequence[tuple[str, Sequence[str]]]`, *optional*): The same for a second look; HTML folds them.
    """

    items: Sequence[tuple[str, Sequence[str]]]
    more: Sequence[tuple[str, Sequence[str]]] = ()
    kind: Literal["findings"] = "findings"  # which block of the template shows it


class Links(NamedTuple):
    """Files that lie beside the report.

    Attributes:
        groups (`Sequence[tuple[str, Sequence[tuple[str, str]]]]`): What they are; for each its name, and its path
            from the report's folder.
    """

    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    kind: Literal["links"] = "links"  # which block of the template shows it


class Warnings(NamedTuple):
    """What a reader has to know before the table that follows; one sentence each."""

    items: Sequence[str]
    kind: Literal["warnings"] = "warnings"  # which block of the template shows it


class Cell(NamedTuple):
    """A number in a table, as text: `12.3 [11.0, 14.1] %`.

    Attributes:
        value (`str`): The number.
        interval (`str`, *optional*): `± 0.4` or `[11.0, 14.1]`. HTML shows it small below the number.
        unit (`str`, *optional*): Stands last.
        is_best (`bool`, *optional*): Sets the number in bold.
    """

    value: str
    interval: str = ""
    unit: str = ""
    is_best: bool = False

    @property
    def text(self) -> str:
        """The cell in one line, without bold: `12.3 [11.0, 14.1] %`."""
        return " ".join(part for part in (self.value, self.interval, self.unit) if part)

    @property
    def markdown(self) -> str:
        """The cell in one line, the best number between asterisks."""
        return self._replace(value=f"**{self.value}**", is_best=False).text if self.is_best else self.text


class Table(NamedTuple):
    """A table.

    Attributes:
        header (`Sequence[str]`): A title for each column.
        rows (`Sequence[Sequence[str | Cell]]`): A cell for each column.
        left (`int`, *optional*, defaults to 1): The first so many columns are names and aligned to the left; the
            others are numbers and aligned to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    left: int = 1
    kind: Literal["table"] = "table"  # which block of the template shows it


class Picture(NamedTuple):
    """A PNG file.

    Attributes:
        name (`str`): Of the file.
        alt (`str`): What it shows, in words; also its caption.
        content (`bytes`): Of the file.
    """

    name: str
    alt: str
    content: bytes
    kind: Literal["picture"] = "picture"  # which block of the template shows it

    @property
    def width(self) -> int:
        """In CSS pixels, of which an inch has 96: texts have the size that they were drawn in."""
        return int.from_bytes(self.content[16:20], "big") * 96 // PICTURE_DPI


class Terms(NamedTuple):
    """Terms and their texts, small: what a table was measured on."""

    items: Sequence[tuple[str, str]]
    kind: Literal["terms"] = "terms"  # which block of the template shows it


Block = Heading | Text | Findings | Links | Warnings | Table | Picture | Terms


class Report(NamedTuple):
    """A whole report.

    Attributes:
        title (`str`): Above all.
        intro (`Sequence[Block]`): What stands between the title and the list of contents.
        blocks (`Sequence[Block]`): The rest, in order.
    """

    title: str
    intro: Sequence[Block]
    blocks: Sequence[Block]

    @property
    def all_blocks(self) -> list[Block]:
        """Title, introduction and the rest as one list, for Markdown, which has no list of contents."""
        return [Heading(self.title, 1, "title"), *self.intro, *self.blocks]

    @property
    def contents(self) -> list[tuple[Heading, list[Heading]]]:
        """The headings of level 2, each with those of level 3 below it."""
        parts: list[tuple[Heading, list[Heading]]] = []
        for block in self.blocks:
            if isinstance(block, Heading) and block.level == 2:
                parts.append((block, []))
            elif isinstance(block, Heading) and parts:
                parts[-1][1].append(block)
        return parts


# Characters that no page should hold: controls (not the white space among them), lone surrogates, which UTF-8 cannot
# write, marks that turn the direction of writing around, and what is no character.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def show_text(text: str) -> str:
    r"""Write out what cannot be shown: control characters, bytes of a file name that are no UTF-8, marks that turn the
    direction of writing around.

    Example:
        >>> show_text("caf\udce9 \x1b[1m")
        'caf\\xe9 \\x1b[1m'
    """

    def write_out(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is no UTF-8
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNSEEN.sub(write_out, text)


_BEFORE_PUNCTUATION = re.compile(r"\\(?=[!-/:-@\[-`{-~]|$)")


def _in_one_line(text: str) -> str:
    return " ".join(show_text(text).splitlines())


def escape_markdown(text: str, *, in_table: bool = False) -> str:
    """Write text so that Markdown shows it as it is and never as a tag, an entity, code, a link or a picture.

    Only what would become one of these changes: most names stay as they are, in a terminal too. Line breaks become
    spaces.

    Args:
        text (`str`): Any.
        in_table (`bool`, *optional*, defaults to `False`): The text is a cell: a pipe does not end it.

    Example:
        >>> escape_markdown("<b>R&D</b> &lt; ![x](y)")
        '&lt;b>R&D&lt;/b> &amp;lt; ![x]\\\\(y)'
    """
    text = re.sub(r"&(?=#?\w+;)", "&amp;", _in_one_line(text))
    text = _BEFORE_PUNCTUATION.sub(
        "&#92;", text
    )  # such a backslash would vanish, or take the effect of one below away
    text = text.replace("<", "&lt;").replace("`", "\\`").replace("](", "]\\(").replace("][", "]\\[")
    text = re.sub(r"^(\s*\[[^\]]*\]):", r"\1\\:", text)  # the place of a link
    return text.replace("|", "\\|") if in_table else text


def code_markdown(text: str, *, in_table: bool = False) -> str:
    """Write text as code, between more backticks than the text has in a row. Line breaks become spaces.

    Args:
        text (`str`): Any.
        in_table (`bool`, *optional*, defaults to `False`): The text is a cell: a pipe does not end it.

    Example:
        >>> code_markdown("a `b`")
        '`` a `b` ``'
    """
    text = _in_one_line(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    if in_table and "\\|" in text:  # no cell can hold this as code
        return escape_markdown(text, in_table=True)
    text = text.replace("|", "\\|") if in_table else text
    return f"{fence}{space}{text}{space}{fence}"


def _table_markdown(table: Table) -> str:
    """All lines equally wide, pipes escaped."""
    lines = [
        table.header,
        *([cell.markdown if isinstance(cell, Cell) else cell for cell in row] for row in table.rows),
    ]
    cells = [[escape_markdown(cell, in_table=True) for cell in line] for line in lines]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(table.header))]
    rule = ["-" * (width - (i >= table.left)) + ":" * (i >= table.left) for i, width in enumerate(widths)]

    def pad(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(pad(line) for line in (cells[0], rule, *cells[1:]))


def link_address(path: str) -> str:
    """Write a relative path as the address of a link, byte for byte: no part of it is a scheme, a query or an entity.

    Example:
        >>> link_address("a b/javascript:x.html")
        'a%20b/javascript%3Ax.html'
    """
    return quote(os.fsencode(path))


def _link_markdown(text: str, path: str) -> str:
    text = escape_markdown(text).replace("\\[", "[").replace("[", "&#91;").replace("]", "&#93;")
    return f"[{text}]({link_address(path)})"


def _block_markdown(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escape_markdown(block.text)}"
    if isinstance(block, Text):
        return "".join(
            code_markdown(part) if isinstance(part, Code) else escape_markdown(part) for part in block.parts
        )
    if isinstance(block, Findings):
        return "\n".join(
            "\n".join([f"- **{escape_markdown(found)}**", *(f"  - {escape_markdown(line)}" for line in numbers)])
            for found, numbers in [*block.items, *block.more]
        )
    if isinstance(block, Links):
        return "\n".join(
            f"- {escape_markdown(what)}: {', '.join(_link_markdown(*link) for link in links)}"
            for what, links in block.groups
        )
    if isinstance(block, Warnings):
        return "\n".join(f"> - ⚠ {escape_markdown(item)}" for item in block.items)
    if isinstance(block, Table):
        return _table_markdown(block)
    if isinstance(block, Picture):
        return f"!{_link_markdown(block.alt, f'{folder}/{block.name}')}"
    return "\n".join(f"- {escape_markdown(term)}: {escape_markdown(text)}" for term, text in block.items)


def render_markdown(blocks: Sequence[Block], folder: str = "plots") -> str:
    """Render blocks as Markdown, with an empty line between two.

    Args:
        blocks (`Sequence[Block]`): What to show.
        folder (`str`, *optional*, defaults to `"plots"`): Where pictures lie, relative to the Markdown file.

    Returns:
        `str`: Without a line break at the end.

    Example:
        >>> print(render_markdown([Table(["Model", "R@1"], [["a", Cell("12.3", "± 0.4", is_best=True)]])]))
        | Model |            R@1 |
        | ----- | -------------: |
        | a     | **12.3** ± 0.4 |
    """
    return "\n\n".join(_block_markdown(block, folder) for block in blocks)


def _finalize(value: Any) -> Any:
    """What a template shows, before it is escaped; what a macro made was shown before."""
    return show_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    environment.filters["address"] = link_address
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.tests["code"] = lambda part: isinstance(part, Code)
    return environment


def render_page(template: str, **values: Any) -> str:
    """Render an HTML page from a template in `templates/`. Every value is escaped.

    Args:
        template (`str`): Name of the file.
        values: What the template names.

    Returns:
        `str`: A whole HTML document.

    Raises:
        jinja2.UndefinedError: If the template names a value that is not given.
    """
    return _environment().get_template(template).render(**values)


def render_html(report: Report) -> str:
    """Render a report as one HTML page with its style and pictures inside.

    Args:
        report ([`Report`]): What to show.

    Returns:
        `str`: A whole HTML document.
    """
    return render_page("report.html.jinja", report=report)
