"""Search your own pictures: embed a folder or a dataset once, then ask in words or with a picture.

    python -m modeling_dclip.hub.index --model MODEL --images FOLDER_OR_DATASET --output INDEX
    python -m modeling_dclip.hub.index search "a dog on a beach" --index INDEX --top_k 10
    python -m modeling_dclip.hub.index search photo.jpg --index INDEX

MODEL is any dual encoder: of this package, of transformers, or `open_clip:NAME:PRETRAINED`. Building goes on where it
was when killed, and computes only images that are new when started again. On several GPUs start it with
`accelerate launch -m modeling_dclip.hub.index`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_dclip.data.failures import command
from modeling_dclip.data.images import IMAGE_SUFFIXES
from modeling_dclip.hub.index import Hit, SearchIndex
from modeling_dclip.hub.index.build import build_index

__all__ = ["Hit", "SearchIndex", "build_index"]

COMMAND = "python -m modeling_dclip.hub.index"
SHOWN = 10  # of images that cannot be read


@dataclass
class BuildArguments:
    """Of building; `build` may stand before them."""

    model: str = field(metadata={"help": "Folder or Hub id of a dual encoder, or open_clip:NAME:PRETRAINED."})
    images: str = field(
        metadata={"help": "A folder, searched with those below it, or a dataset's spec such as parquet:GLOB."}
    )
    output: str = field(metadata={"help": "Folder of the index."})
    index: str = field(
        default="exact",
        metadata={"help": "exact, ivf (inverted file) or hnsw (graph) for millions, or a factory string of FAISS."},
    )
    queries: str | None = field(
        default=None,
        metadata={"help": "Text file, a query a line: tunes an index that is not exact and measures what it misses."},
    )
    on_bad_image: str = field(
        default="raise", metadata={"help": "raise or skip: what to do about images that cannot be read."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images at a time."})
    chunk_rows: int = field(default=1024, metadata={"help": "Images between two savings."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode, a GPU."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an index of another model or other images."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class SearchArguments:
    """Of asking."""

    index: str = field(metadata={"help": "Folder of the index."})
    top_k: int = field(default=10, metadata={"help": "Answers."})
    effort: int | None = field(
        default=None, metadata={"help": "Cells (ivf) or candidates (hnsw) to look at; more finds more."}
    )
    model: str | None = field(default=None, metadata={"help": "Where the model is now, if it has moved."})
    json: bool = field(default=False, metadata={"help": "One JSON object a line, for programs."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def _read_queries(path: str | None) -> list[str]:
    if path is None:
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    queries = [line.strip() for line in lines if line.strip()]
    if len(queries) < 2:
        raise ValueError(f"Expected two or more queries in '{path}', one a line, got {len(queries)}.")
    return queries


def describe_build(index: SearchIndex) -> str:
    """What was built, and what was left out."""
    manifest = index.manifest
    lines = [
        f"{manifest['n']} images of width {manifest['dim']} in {index.folder}: {manifest['computed']} embedded now, "
        f"index {manifest['index']}."
    ]
    if manifest["changes"] is not None:
        lines.append(
            "Since the index that was there: {added} images added, {removed} removed.".format(**manifest["changes"])
        )
    if manifest["recall@10"] is not None:
        lines.append(
            f"Of the exact first 10 it finds {100 * manifest['recall@10']:.1f}% on queries it was not tuned on, at an "
            f"effort of {manifest['effort']}."
        )
    skipped = manifest["skipped"]
    if skipped:
        lines.append(f"Left out {len(skipped)} images that cannot be read:")
        lines += [
            f"    {one['image_id']} ({one['file'] or 'stored bytes'}): {one['reason']}" for one in skipped[:SHOWN]
        ]
        if len(skipped) > SHOWN:
            lines.append(f"    and {len(skipped) - SHOWN} more, all in {index.folder / 'index.json'}")
    return "\n".join(lines)


def describe_hits(hits: Sequence[Hit], as_json: bool = False) -> str:
    """Answers as lines: rank, cosine, and the file or where there is none the id."""
    if as_json:
        return "\n".join(json.dumps(hit._asdict()) for hit in hits)
    return "\n".join(f"{rank:3d}  {hit.score:.4f}  {hit.path or hit.image_id}" for rank, hit in enumerate(hits, 1))


def _build(argv: Sequence[str]) -> str | None:
    parser = HfArgumentParser(
        BuildArguments, prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    settings = asdict(arguments)
    index = build_index(**{**settings, "queries": _read_queries(arguments.queries)})
    return None if index is None else describe_build(index)


def _search(argv: Sequence[str]) -> str:
    parser = HfArgumentParser(SearchArguments, prog=f"{COMMAND} search", description="Ask an index.")
    parser.add_argument("query", help="Words, or the path of a picture.")
    arguments, asked = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    index = SearchIndex.load(arguments.index, model=arguments.model, trust_remote_code=arguments.trust_remote_code)
    if arguments.effort is not None:
        index.set_effort(arguments.effort)
    path = Path(asked.query)
    is_picture = path.suffix.lower() in IMAGE_SUFFIXES
    return describe_hits(index.search(path if is_picture else asked.query, arguments.top_k), arguments.json)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Build or search, by the first word; print the answer."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.disable_progress_bar()  # of loading weights; the images have one of their own
    if words[:1] == ["search"]:
        answer = _search(words[1:])
    else:
        answer = _build(words[1:] if words[:1] == ["build"] else words)
    if answer is not None:
        sys.stdout.write(answer + "\n")


if __name__ == "__main__":
    main()
