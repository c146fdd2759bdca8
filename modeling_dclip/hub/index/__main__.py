"""Search your own pictures: embed a folder or a dataset once, then search it with words or with a picture.

    python -m modeling_dclip.hub.index --model MODEL --images FOLDER_OR_DATASET --output INDEX
    python -m modeling_dclip.hub.index search "a dog on a beach" --index INDEX --page results.html
    python -m modeling_dclip.hub.index search photo.jpg --index INDEX --top_k 5

MODEL compares pictures and words: your own (outputs/mine/student), any CLIP or SigLIP of transformers
(openai/clip-vit-base-patch16), or open_clip:NAME:PRETRAINED. A build that was killed continues when it is started
again, and a second build embeds only new pictures. `search --help` lists the options of a search. To build on several
GPUs, start it with `accelerate launch -m modeling_dclip.hub.index`.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers.utils import logging

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import MANIFEST_NAME, printable, read_text, write_manifest
from modeling_dclip.data.specs import BATCH, WORKERS, CommandParser, Range
from modeling_dclip.hub.index import Change, SearchIndex, read_query
from modeling_dclip.progress import count_of

COMMAND = "python -m modeling_dclip.hub.index"
_MANY = Range(1, 10**6, whole=True)
NEUTRAL_WORDS = "something red"
SHOWN = 10  # images that could not be read, or are copies


@dataclass
class BuildArguments:
    """Arguments of building; the word `build` may stand before them."""

    model: str = field(
        metadata={"help": "Model that compares pictures and words: a folder, a Hub id, or open_clip:NAME:PRETRAINED."}
    )
    images: str = field(
        metadata={"help": "Your pictures: a folder with its subfolders, or a dataset such as parquet:GLOB."}
    )
    output: str = field(metadata={"help": "Folder to write the index to."})
    index: str = field(
        default="exact",
        metadata={
            "help": "exact; for millions of pictures ivf (inverted file) or hnsw (graph); or FAISS's factory string."
        },
    )
    queries: str | None = field(
        default=None,
        metadata={"help": "Text file with one typical query in a line, to tune and measure an approximate index."},
    )
    on_bad_image: str = field(
        default="raise",
        metadata={
            "help": "What to do with a picture that cannot be read: raise (stop and name it) or skip (leave it out)."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Pictures embedded at once.", "range": BATCH})
    chunk_rows: int = field(default=1024, metadata={"help": "Pictures between two saves.", "range": _MANY})
    num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images, for each GPU.", "range": WORKERS}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace an index of another model or of other pictures."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


SEARCH_DESCRIPTION = """Search an index with words or with a picture. The nearest pictures come first.

    python -m modeling_dclip.hub.index search "a dog on a beach" --index my_index
    python -m modeling_dclip.hub.index search "a dog on a beach" --index my_index --page results.html
    python -m modeling_dclip.hub.index search photo.jpg --index my_index --top_k 5

Each line shows rank, cosine (higher is nearer, 1 is the same) and file. A search takes some seconds, most of them to
load the model.
"""


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
    page: str | None = field(
        default=None, metadata={"help": "Also write the pictures as an HTML page, to open in a browser."}
    )
    model: str | None = field(default=None, metadata={"help": "Where the model is now, if it has moved."})
    images: str | None = field(
        default=None,
        metadata={"help": "Where the pictures are now, if they have moved: a folder, or a dataset."},
    )
    keep_same: bool = field(
        default=False,
        metadata={"help": "When you search with a picture that is in the index, also show it and its copies."},
    )
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


def _names(names: Sequence[str], count: int) -> str:
    more = f", and {count - len(names):,} more" if count > len(names) else ""
    return ", ".join(map(printable, names)) + more


def _describe_changes(changes: dict[str, Change]) -> str:
    parts = [
        f"{one['count']:,} {kind} ({_names(one['first'], one['count'])})" if one["count"] else f"0 {kind}"
        for kind, one in changes.items()
        if kind != "kept"
    ]
    return f"Since the last build: {', '.join(parts)}, {changes['kept']['count']:,} kept."


def _describe_copies(index: SearchIndex) -> Iterator[str]:
    """Name the pictures whose files have the same content as one before them."""
    first: dict[str, str] = {}
    copies = []
    for name, digest in zip(*(index.rows[column].to_pylist() for column in ("image_id", "sha256")), strict=True):
        if digest in first:
            copies.append((name, first[digest]))
        else:
            first[digest] = name
    if copies:
        is_are = "is a copy" if len(copies) == 1 else "are copies"
        yield f"{count_of(len(copies), 'picture')} {is_are} of another, and will be found beside it:"
        yield from (f"    {printable(copy)} = {printable(name)}" for copy, name in copies[:SHOWN])
        if len(copies) > SHOWN:
            yield f"    and {len(copies) - SHOWN:,} more"


def _suggest_words(index: SearchIndex) -> str:
    """Words to try: a short caption of the pictures; where they have none, what fits any."""
    from modeling_dclip.hub.index.suggestions import find_captions, short_captions

    return next(iter(short_captions(find_captions(index), 1)), NEUTRAL_WORDS)


def describe_build(index: SearchIndex) -> str:
    """Say what was built, what has changed, which images were left out, and what to do next."""
    manifest = index.manifest
    lines = [
        f"{count_of(manifest['n'], 'picture')} in {printable(index.folder)}, {manifest['computed']:,} embedded now. "
        f"Index: {manifest['index']}, width {manifest['dim']}."
    ]
    if manifest["changes"] is not None:
        lines.append(_describe_changes(manifest["changes"]))
    lines += _describe_copies(index)
    lines += manifest["notes"]
    skipped = manifest["skipped"]
    if skipped:
        lines.append(f"Left out {count_of(len(skipped), 'picture')} that cannot be read:")
        lines += [
            f"    {printable(one['image_id'])} ({printable(one['file'] or 'stored bytes')}): {one['reason']}"
            for one in skipped[:SHOWN]
        ]
        if len(skipped) > SHOWN:
            lines.append(f"    and {len(skipped) - SHOWN} more, all listed in {index.folder / 'index.json'}")
    folder, words = (shlex.quote(text) for text in (str(index.folder), _suggest_words(index)))
    lines.append(f"Search it: {COMMAND} search {printable(words)} --index {printable(folder)} --page results.html")
    return "\n".join(lines)


def _build(argv: Sequence[str]) -> str | None:
    parser = CommandParser(BuildArguments, prog=COMMAND, description=__doc__)
    (arguments,) = parser.parse(argv)
    from modeling_dclip.hub.index.build import EmbeddingOptions, build_index

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
    parser = CommandParser(SearchArguments, prog=f"{COMMAND} search", description=SEARCH_DESCRIPTION)
    parser.add_argument("query", help='Words between quotes ("a dog on a beach"), or the file of a picture.')
    arguments, asked = parser.parse(argv)
    from modeling_dclip.hub.index.answers import (
        check_page,
        describe_hits,
        describe_left_out,
        describe_query,
        write_page,
    )

    query = read_query(asked.query)
    if arguments.page is not None:
        check_page(arguments.page)
    places = {"model": arguments.model, "images": arguments.images}
    index = SearchIndex.load(arguments.index, **places, trust_remote_code=arguments.trust_remote_code)
    if arguments.effort is not None:
        index.set_effort(arguments.effort)
    hits = index.search(asked.query, arguments.top_k, keep_same=arguments.keep_same)
    lines = [describe_hits(index, describe_query(query, asked.query), hits, arguments.json)]
    if warning := index.warning():
        if arguments.json:  # other programs read the answers alone
            logging.get_logger(__name__).warning(warning)
        lines.append(warning)
    same = [] if arguments.keep_same else [hit.name for hit in index.copies_of(asked.query)]
    if same:
        names = _names(same[:SHOWN], len(same))
        them = "it" if len(same) == 1 else "them"
        lines.append(f"{describe_left_out(names, len(same))} --keep_same shows {them} too.")
    if arguments.page is not None:
        tiles = write_page(index, query, hits, arguments.page, asked.query, left_out=same)
        unread = [tile.hit.name for tile in tiles if tile.reason]
        if unread:
            lines.append(
                f"{count_of(len(unread), 'picture')} cannot be read any more: {_names(unread[:SHOWN], len(unread))}."
            )
        lines.append(f"Pictures: {printable(arguments.page)} (open it in a browser)")
    return "\n".join(lines[:1] if arguments.json else lines)


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
