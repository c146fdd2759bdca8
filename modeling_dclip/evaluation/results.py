"""Blocks of Markdown files that are rendered from results files.

In a README

    <!-- results:demo source=results/demo/summary.json table=demo -->
    <!-- /results:demo -->

names its source and form, and `python -m modeling_dclip.evaluation.results README.md` renders all such blocks; with
`--check` it only says which are out of date.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_text
from modeling_dclip.evaluation.records import read_results, read_results_json
from modeling_dclip.evaluation.reports.tables import BENCHMARK_TABLES, render_leakage, render_summary, render_table


def _markers(name: str) -> re.Pattern[str]:
    name = re.escape(name)
    return re.compile(rf"(<!-- results:{name}(?: [^>]*?)? ?-->\n)(.*?)(<!-- /results:{name} -->)", re.DOTALL)


def _replace_block(document: str, path: str | os.PathLike, name: str, text: str) -> str:
    found = _markers(name).findall(document)
    if len(found) != 1:
        raise ValueError(
            f"Expected the block `<!-- results:{name} -->`, a line break, ..., `<!-- /results:{name} -->` once in "
            f"{path}, got it {len(found)} times."
        )
    return _markers(name).sub(lambda match: f"{match[1]}{text.strip()}\n{match[3]}", document)


def render_block(path: str | os.PathLike, name: str, text: str) -> None:
    """Replace what stands between `<!-- results:NAME ... -->` and `<!-- /results:NAME -->`, atomically; all else
    stays.

    Args:
        path (`str` or `os.PathLike`): The Markdown file.
        name (`str`): Of the block.
        text (`str`): Markdown.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the markers are not there exactly once.
    """
    document = Path(path).read_bytes().decode("utf-8")
    write_text(path, _replace_block(document, path, name, text))


def _is_local(path: str) -> bool:
    """Whether it is a local path, not a Hub id (`ORG/NAME`), a URL (`//HOST/PATH` in a spec) or `open_clip:...`."""
    if path.startswith("//") or ":" in path:
        return False
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def shorten_paths(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Show models and benchmarks without the folders of the machine that measured them.

    A local path in a benchmark's spec keeps its last two parts. A model that is a local path and has no label loses
    the folders that all such models share. Hub ids, URLs and labels stay. If two different benchmarks would look
    equal, all stay as they are.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.records.read_results`]; not changed.

    Returns:
        `list[dict[str, Any]]`: Copies with other values of `benchmark` and `label`.

    Example:
        >>> [short] = shorten_paths([{"model": "/runs/student", "benchmark": "retrieval=disk:/data/flickr/test"}])
        >>> short["label"], short["benchmark"]
        ('student', 'retrieval=disk:flickr/test')
    """

    def shorten(match: re.Match[str]) -> str:
        return "/".join(PurePath(match[0]).parts[-2:]) if _is_local(match[0]) else match[0]

    benchmarks = {record["benchmark"]: re.sub(r"[^:=,]*/[^:=,]*", shorten, record["benchmark"]) for record in records}
    if len(set(benchmarks.values())) < len(benchmarks):
        benchmarks = dict(zip(benchmarks, benchmarks, strict=True))
    models = {record["model"] for record in records if "label" not in record and _is_local(record["model"])}
    parts = {model: PurePath(model).parts for model in models}
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts.values()]))
    labels = {model: "/".join(folders[shared:]) for model, folders in parts.items()}
    return [
        ({"label": labels[record["model"]]} if record["model"] in labels else {})
        | dict(record)
        | {"benchmark": benchmarks[record["benchmark"]]}
        for record in records
    ]


def _render_results(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    records = [record for path in paths for record in read_results(path)]
    metrics = options["metrics"].split(",") if "metrics" in options else None
    return render_table(shorten_paths(records), metrics=metrics, best=options.get("best", "false") == "true")


def _render_demo(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return "\n\n".join(render_summary(read_results_json(path), where=str(path)) for path in paths)


def _render_leakage(paths: Sequence[Path], options: Mapping[str, str]) -> str:
    return render_leakage([record for path in paths for record in read_results(path)], **options)


def _of_benchmark(render: Callable[..., str]) -> Callable[[Sequence[Path], Mapping[str, str]], str]:
    return lambda paths, options: "\n\n".join(render(read_results_json(path), **options) for path in paths)


TABLES = {
    "results": (_render_results, {"metrics", "best"}),
    "demo": (_render_demo, set()),
    "leakage": (_render_leakage, {"metric"}),
    **{name: (_of_benchmark(render), options) for name, (render, options) in BENCHMARK_TABLES.items()},
}


def _sources(readme: Path, name: str, patterns: str) -> list[Path]:
    paths = []
    for pattern in patterns.split(","):
        if not (found := sorted(readme.parent.glob(pattern))):
            raise FileNotFoundError(f"Expected files at {pattern!r} beside {readme} for its block {name!r}, got none.")
        paths += found
    return paths


def render_readme(path: str | os.PathLike, *, check: bool = False) -> list[str]:
    """Render every block that names a source.

    Options of the opening marker: `source=` files or globs, comma-separated, relative to the Markdown file;
    `table=results` (the default; with `metrics=` a comma-separated choice and `best=true` for bold), `table=demo` (a
    summary of arms), `table=leakage` (what a teacher reads off its caption; `metric=` another than text-to-teacher
    R@1), or of a benchmark one of `BENCHMARK_TABLES`.

    Args:
        path (`str` or `os.PathLike`): The Markdown file.
        check (`bool`, *optional*, defaults to `False`): Change nothing.

    Returns:
        `list[str]`: The names of the blocks that were out of date.

    Raises:
        FileNotFoundError: If the file or a source is missing.
        ValueError: If a marker, an option or a source is not valid.
    """
    path = Path(path)
    document = before = path.read_bytes().decode("utf-8")
    stale = []
    for name, attributes in re.findall(r"<!-- results:([\w-]+) (?!-->)([^>]*?) ?-->", before):
        words = [word.partition("=") for word in shlex.split(attributes)]
        options = {key: value for key, _, value in words}
        table = options.pop("table", "results")
        source = options.pop("source", None)
        if table not in TABLES or source is None or not set(options) <= TABLES[table][1]:
            raise ValueError(
                f"Expected source=FILES, table= one of {list(TABLES)} and its options in the block {name!r} of "
                f"{path}, got {attributes!r}."
            )
        text = TABLES[table][0](_sources(path, name, source), options)
        rendered = _replace_block(document, path, name, text)
        if rendered != document:
            stale.append(name)
        document = rendered
    if document != before and not check:
        write_text(path, document)
    return stale


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Render, or with `--check` only compare (exit status 1 if a block is out of date)."""
    parser = argparse.ArgumentParser(description="Render the results blocks of a Markdown file from results files.")
    parser.add_argument("readme", help="Markdown file, e.g. README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a block is out of date")
    arguments = parser.parse_args(argv)
    stale = render_readme(arguments.readme, check=arguments.check)
    if arguments.check and stale:
        command = f"`python -m modeling_dclip.evaluation.results {arguments.readme}`"
        sys.stderr.write(f"Out of date in {arguments.readme}: {', '.join(stale)}. Run {command}.\n")
        return 1
    sys.stdout.write(f"{arguments.readme}: {'rendered ' + ', '.join(stale) if stale else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
