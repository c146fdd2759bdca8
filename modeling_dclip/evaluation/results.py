"""Blocks of a Markdown page that are rendered from results files.

In a page

    <!-- results:demo source=results/demo/summary.json table=demo -->
    <!-- /results:demo -->

names its source and its kind of table. `python -m modeling_dclip.evaluation.results README.md` renders all such
blocks; with `--check` it says which are out of date, and changes nothing.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import list_folder, read_json, read_text, require_file, write_text
from modeling_dclip.data.specs import CommandParser
from modeling_dclip.evaluation.equal_retention import render_at_retention
from modeling_dclip.evaluation.records import read_results
from modeling_dclip.evaluation.reports.benchmark_tables import BENCHMARK_TABLES
from modeling_dclip.evaluation.reports.document import escape_markdown, render_markdown
from modeling_dclip.evaluation.reports.report import merge_rows
from modeling_dclip.evaluation.reports.tables import (
    render_leakage,
    render_summary,
    render_table,
    tabulate_twins,
)
from modeling_dclip.evaluation.reports.verdict import judge

# The opening marker of a block, with its name and what it says: `<!-- results:NAME OPTIONS -->`.
_OPENING = re.compile(r"<!-- results:([\w-]+) (?!-->)([^>]*?) ?-->")


def _read(path: Path) -> Any:
    return read_json(path, "results file", advice="Make it again.")


def _render_results(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    records = [record for path in paths for record in read_results(path)]
    if options.get("arms", "false") == "true":
        rows, _ = merge_rows(
            [(str(path), one) for path in paths for one in read_results(path) if "condition" not in one]
        )
        records = list(rows)
    metrics = options["metrics"].split(",") if "metrics" in options else None
    return render_table(records, metrics=metrics, best=options.get("best", "false") == "true")


def _render_demo(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return "\n\n".join(render_summary(_read(path), where=str(path)) for path in paths)


def _render_at_retention(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return "\n\n".join(render_at_retention(_read(path)) for path in paths)


def _render_verdict(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    verdicts = judge([record for path in paths for record in read_results(path)])
    chosen = [verdict for verdict in verdicts if options.get("model", verdict.model) == verdict.model]
    if not chosen:
        names = ", ".join(verdict.model for verdict in verdicts)
        raise ValueError(
            f"Expected a model beside its anchor, {options.get('model', 'any')!r}, got {names or 'none'}."
        )
    return "\n\n".join("\n- ".join(map(escape_markdown, (one.headline, *one.details))) for one in chosen)


def _render_leakage(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return render_leakage([record for path in paths for record in read_results(path)], **options)


def _render_benchmark(name: str) -> Callable[[Sequence[Path], Mapping[str, str]], str]:
    tabulate = BENCHMARK_TABLES[name][0]
    return lambda paths, options: "\n\n".join(render_markdown(tabulate(_read(path), **options)) for path in paths)


def _render_twins(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    if len(paths) != 2:
        raise ValueError(f"Expected two files, of teachers with regions and of their twins, got {[*map(str, paths)]}.")
    return render_markdown(tabulate_twins(*map(read_results, paths)))


# By the name of the table: the function that renders it from files and options, and the options it knows.
TABLES: dict[str, tuple[Callable[[Sequence[Path], Mapping[str, str]], str], set[str]]] = {
    "results": (_render_results, {"metrics", "best", "arms"}),
    "demo": (_render_demo, set()),
    "equal_retention": (_render_at_retention, set()),
    "verdict": (_render_verdict, {"model"}),
    "leakage": (_render_leakage, {"metric"}),
    "twins": (_render_twins, set()),
    **{name: (_render_benchmark(name), options) for name, (_, options) in BENCHMARK_TABLES.items()},
}


def _find_sources(page: Path, name: str, patterns: str) -> list[Path]:
    """The files of a block, relative to its page."""
    paths = []
    for pattern in patterns.split(","):
        exact = page.parent / pattern  # a name with brackets is a file before it is a pattern
        if not (found := [exact] if exact.is_file() else list_folder(page.parent, pattern)):
            raise FileNotFoundError(f"Expected files at {pattern!r} beside {page} for its block {name!r}, got none.")
        paths += found
    return paths


def _render_block(page: Path, name: str, attributes: str) -> str:
    """The text of one block, from what its opening marker says."""
    words = [word.partition("=") for word in shlex.split(attributes)]
    options = {key: value for key, _, value in words}
    table, source = options.pop("table", "results"), options.pop("source", None)
    if table not in TABLES or source is None or not set(options) <= TABLES[table][1]:
        raise ValueError(
            f"Expected source=FILES, table= one of {list(TABLES)} and its options in the block {name!r} of {page}, "
            f"got {attributes!r}."
        )
    return TABLES[table][0](_find_sources(page, name, source), options)


def _replace_block(document: str, page: Path, name: str, text: str) -> str:
    """The document with another text between the two markers of a block."""
    marked = re.compile(
        rf"(<!-- results:{re.escape(name)}(?: [^>]*?)? ?-->\n)(.*?)(<!-- /results:{re.escape(name)} -->)", re.DOTALL
    )
    if (count := len(marked.findall(document))) != 1:
        raise ValueError(
            f"Expected the block `<!-- results:{name} -->`, a line break, ..., `<!-- /results:{name} -->` once in "
            f"{page}, got it {count} times."
        )
    return marked.sub(lambda match: f"{match[1]}{text.strip()}\n{match[3]}", document)


def render_readme(path: str | os.PathLike, *, check: bool = False) -> list[str]:
    """Render every block of a Markdown page that names a source; all other text stays.

    Options of the opening marker: `source=` files or globs, comma-separated, relative to the page; `table=results`
    (the default; with `metrics=` a comma-separated choice, `best=true` for bold and `arms=true` for one row an arm,
    without the points on its line), `table=demo` (a summary of arms),
    `table=equal_retention` (arms at equal retention, which `eval.py equal_retention --output` wrote),
    `table=verdict` (whether a model is better than its anchor; `model=` for one of them),
    `table=leakage` (what a teacher reads off its caption; `metric=` for another metric than text-to-teacher R@1),
    `table=twins` (teachers beside those that see the whole image, of two files in this order), or one of
    `BENCHMARK_TABLES`.

    Args:
        path (`str` or `os.PathLike`): The Markdown page. It is written whole or not at all, and only if a block
            changed.
        check (`bool`, *optional*, defaults to `False`): Change nothing.

    Returns:
        `list[str]`: The names of the blocks that were out of date.

    Raises:
        FileNotFoundError: If the page or a source is missing.
        ValueError: If a marker, an option or a source is not valid, or the markers of a block are not there exactly
            once.
    """
    page = Path(path)
    document = before = read_text(require_file(page, "page"), keep_newlines=True)
    stale = []
    for name, attributes in _OPENING.findall(before):
        rendered = _replace_block(document, page, name, _render_block(page, name, attributes))
        if rendered != document:
            stale.append(name)
        document = rendered
    if document != before and not check:
        write_text(page, document)
    return stale


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Render, or with `--check` only compare (exit status 1 if a block is out of date)."""
    parser = CommandParser(
        prog="python -m modeling_dclip.evaluation.results",
        description="Render the results blocks of a Markdown file from results files.",
    )
    parser.add_argument("readme", help="Markdown file, e.g. README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a block is out of date")
    arguments = parser.parse_args(argv)
    stale = render_readme(arguments.readme, check=arguments.check)
    if arguments.check and stale:
        remedy = f"`python -m modeling_dclip.evaluation.results {arguments.readme}`"
        sys.stderr.write(f"Out of date in {arguments.readme}: {', '.join(stale)}. Run {remedy}.\n")
        return 1
    sys.stdout.write(f"{arguments.readme}: {'rendered ' + ', '.join(stale) if stale else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
