"""Search your own pictures: embed a folder or a dataset once, then search it with words or with a picture.

    python -m modeling_dclip.hub.index --model MODEL --images FOLDER_OR_DATASET --output INDEX
    python -m modeling_dclip.hub.index search "a dog on a beach" --index INDEX --top_k 10
    python -m modeling_dclip.hub.index search photo.jpg --index INDEX

MODEL is any dual encoder: of this package, of transformers, or `open_clip:NAME:PRETRAINED`. A build that was killed
continues when it is started again, and a second build embeds only new images. To build on several GPUs, start it with
`accelerate launch -m modeling_dclip.hub.index`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import (
    MANIFEST_NAME,
    printable,
    read_text,
    write_manifest,
)
from modeling_dclip.data.images import has_image_suffix
from modeling_dclip.data.specs import BATCH, WORKERS, CommandParser, Range
from modeling_dclip.hub.index import Hit, SearchIndex
from modeling_dclip.hub.index.build import EmbeddingOptions, build_index

COMMAND = "python -m modeling_dclip.hub.index"
_MANY = Range(1, 10**6, whole=True)
SHOWN = 10  # images that could not be read


@dataclass
class BuildArguments:
    """Arguments of building; the word `build` may stand before them."""

    model: str = field(metadata={"help": "Folder or Hub id of a dual encoder, or open_clip:NAME:PRETRAINED."})
    images: str = field(
        metadata={"help": "A folder, searched with its subfolders, or a dataset's spec such as parquet:GLOB."}
    )
    output: str = field(metadata={"help": "Folder of the index."})
    index: str = field(
        default="exact",
        metadata={"help": "exact; ivf (inverted file) or hnsw (graph) for millions; or a factory string of FAISS."},
    )
    queries: str | None = field(
        default=None,
        metadata={"help": "Text file with one typical query in a line, to tune and measure an approximate index."},
    )
    on_bad_image: str = field(default="raise", metadata={"help": "raise or skip, for images that cannot be read."})
    batch_size: int = field(default=64, metadata={"help": "Images in one forward pass.", "range": BATCH})
    chunk_rows: int = field(default=1024, metadata={"help": "Images in one file of embeddings.", "range": _MANY})
    num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images, for each GPU.", "range": WORKERS}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an index of another model or of other images."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class SearchArguments:
    """Arguments of searching."""

    index: str = field(metadata={"help": "Folder of the index."})
    top_k: int = field(default=10, metadata={"help": "Number of pictures to show.", "range": _MANY})
    effort: int | None = field(
        default=None,
        metadata={
            "help": "Cells (ivf) or candidates (hnsw) to look at; more finds more and is slower.",
            "range": _MANY,
        },
    )
    model: str | None = field(default=None, metadata={"help": "Where the model is now, if it has moved."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object in a line, for other programs."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def _read_queries(path: str | None) -> list[str]:
    if path is None:
        return []
    lines = read_text(path).split("\n")
    queries = [line.strip() for line in lines if line.strip()]
    if len(queries) < 2:
        raise ValueError(f"Expected at least two queries in '{path}', one in a line, got {len(queries)}.")
    return queries


def describe_build(index: SearchIndex) -> str:
    """Say what was built, and which images were left out."""
    manifest = index.manifest
    lines = [
        f"{manifest['n']} images of width {manifest['dim']} in {index.folder}: {manifest['computed']} embedded now, "
        f"index {manifest['index']}."
    ]
    if manifest["changes"] is not None:
        lines.append(
            "Compared with the index before: {added} images added, {removed} removed.".format(**manifest["changes"])
        )
    if manifest["recall@10"] is not None:
        lines.append(
            f"It finds {100 * manifest['recall@10']:.1f}% of the exact first 10, measured on queries that it was not "
            f"tuned on, at an effort of {manifest['effort']}."
        )
    skipped = manifest["skipped"]
    if skipped:
        lines.append(f"Left out {len(skipped)} images that cannot be read:")
        lines += [
            f"    {printable(one['image_id'])} ({printable(one['file'] or 'stored bytes')}): {one['reason']}"
            for one in skipped[:SHOWN]
        ]
        if len(skipped) > SHOWN:
            lines.append(f"    and {len(skipped) - SHOWN} more, all listed in {index.folder / 'index.json'}")
    return "\n".join(lines)


def describe_hits(hits: Sequence[Hit], as_json: bool = False) -> str:
    """Write the found pictures in lines: rank, cosine, and the file, or the id where there is no file."""
    if as_json:
        return "\n".join(json.dumps(hit._asdict()) for hit in hits)
    names = [printable(hit.path or hit.image_id) for hit in hits]
    return "\n".join(f"{rank:3d}  {hit.score:.4f}  {names[rank - 1]}" for rank, hit in enumerate(hits, 1))


def _build(argv: Sequence[str]) -> str | None:
    parser = CommandParser(BuildArguments, prog=COMMAND, description=__doc__)
    (arguments,) = parser.parse(argv)
    index = build_index(
        arguments.model,
        arguments.images,
        arguments.output,
        index=arguments.index,
        queries=_read_queries(arguments.queries),
        on_bad_image=arguments.on_bad_image,
        options=EmbeddingOptions(arguments.batch_size, arguments.chunk_rows, arguments.num_workers),
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
    )
    if index is None:  # not the main process
        return None
    about = {name: getattr(arguments, name) for name in ("model", "index", "on_bad_image")}
    processes = index.manifest["processes"]
    manifest = index.folder / MANIFEST_NAME
    write_manifest(
        manifest, processes=processes, seed=None, data=arguments.images, key=index.manifest["encoder"], **about
    )
    return describe_build(index)


def _search(argv: Sequence[str]) -> str:
    parser = CommandParser(SearchArguments, prog=f"{COMMAND} search", description="Search an index.")
    parser.add_argument("query", help="Words, or the path of a picture.")
    arguments, asked = parser.parse(argv)
    index = SearchIndex.load(arguments.index, model=arguments.model, trust_remote_code=arguments.trust_remote_code)
    if arguments.effort is not None:
        index.set_effort(arguments.effort)
    query = Path(asked.query) if has_image_suffix(asked.query) else asked.query
    if isinstance(query, str) and "/" in query and Path(query).exists():
        raise ValueError(f"Expected words or the path of a picture, got '{query}', which is a folder or another file.")
    return describe_hits(index.search(query, arguments.top_k), arguments.json)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Build or search, by the first word; print the answer."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.disable_progress_bar()  # of loading weights; embedding has its own bar
    answer: str | None
    if words[:1] == ["search"]:
        answer = _search(words[1:])
    else:
        answer = _build(words[1:] if words[:1] == ["build"] else words)
    if answer is not None:
        sys.stdout.write(answer + "\n")


if __name__ == "__main__":
    main()
