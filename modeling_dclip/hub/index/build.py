"""Build a search index: embed the pictures of a folder or a dataset, and make a FAISS index of the embeddings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset

from modeling_dclip.data.captions import CAPTION_SOURCES, load_uncaptioned
from modeling_dclip.data.captions.files import read_images
from modeling_dclip.data.columns import hash_images
from modeling_dclip.data.files import check_output_folder
from modeling_dclip.data.images import PixelReader, UnreadableImageError, decode_image, undecoded_images
from modeling_dclip.data.rows import FIRST_IDS, first
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks.retrieval_index import (
    LEAST_CELLS,
    POINTS_PER_CELL,
    build_faiss_index,
    effort_of,
    find_faiss,
    tune_faiss_index,
)
from modeling_dclip.evaluation.embedding import embed_texts
from modeling_dclip.evaluation.records import environment
from modeling_dclip.hub.index import (
    EMBEDDINGS,
    MANIFEST,
    MANIFEST_FORMAT,
    Change,
    Manifest,
    SearchIndex,
    UnreadableImage,
    read_manifest,
    write_index,
)
from modeling_dclip.hub.index.embeddings import EmbeddingStore, embed_readable, fingerprint_encoder
from modeling_dclip.progress import count_of

# Factory strings of FAISS's `index_factory`. The empty one is an inverted file whose number of cells follows from the
# number of images.
FACTORIES = {"exact": "Flat", "ivf": "", "hnsw": "HNSW32"}
BAD_IMAGE_MODES = ("raise", "skip")
FIRST_EFFORT = {"nprobe": 32, "efSearch": 128}  # used if no queries measure the effort
ENOUGH_QUERIES = 100  # half of them measure: their share is then known to a few points


@dataclass(frozen=True)
class EmbeddingOptions:
    """How images are embedded.

    Args:
        batch_size (`int`, *optional*, defaults to 64): Images in one forward pass.
        chunk_rows (`int`, *optional*, defaults to 1024): Images in one file; a killed build loses at most that many.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode images, for each GPU.

    Raises:
        ValueError: If `batch_size` or `chunk_rows` is less than 1.
    """

    batch_size: int = 64
    chunk_rows: int = 1024
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.chunk_rows < 1:
            raise ValueError(f"Expected batch_size and chunk_rows >= 1, got {self.batch_size} and {self.chunk_rows}.")


def build_index(
    model: str,
    images: str,
    output: str | Path,
    *,
    index: str = "exact",
    queries: Sequence[str] = (),
    on_bad_image: str = "raise",
    options: EmbeddingOptions | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> SearchIndex | None:
    """Embed images and build an index of them. Images that an earlier or a killed build embedded are not embedded
    again.

    Under several processes (`accelerate launch`) each embeds its share, and the main process writes the index.

    Args:
        model (`str`): A dual encoder, as for [`~modeling_dclip.encoders.loading.load_dual_encoder`].
        images (`str`): A folder, searched with its subfolders, or a dataset's spec such as `parquet:GLOB`.
        output (`str` or `Path`): The folder of the index.
        index (`str`, *optional*, defaults to `"exact"`): `"exact"`, `"ivf"` (inverted file), `"hnsw"` (graph), or a
            factory string of FAISS's `index_factory`.
        queries (`Sequence[str]`, *optional*): Typical queries, to tune an approximate index. Half of them raise its
            effort until it finds 99 % of the exact first ten; the other half measure it.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out images that cannot be read, and
            names them in the manifest.
        options ([`EmbeddingOptions`], *optional*): How images are embedded.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an index of another model or of other images.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        [`SearchIndex`] in the main process, `None` in the others, which do not wait for it.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        FileExistsError: If `output` is a file, or holds an index of another model or of other images.
        ImportError: If `faiss-cpu` is not installed.
        ValueError: If an argument is out of range, the model is not a dual encoder, there is no picture, one cannot be
            read, or a stored file is damaged.
    """
    _check_arguments(index, on_bad_image)
    options = options or EmbeddingOptions()
    faiss, output = find_faiss("faiss"), Path(output)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # PartialState alone ignores the variable
    dataset = load_pictures(images)
    dual_encoder, processor, revision = load_dual_encoder(model, trust_remote_code=trust_remote_code)
    made_by = fingerprint_encoder(dual_encoder, processor)
    images = os.path.abspath(images) if os.path.isdir(images) else images
    before = _check_output(output, made_by, images, model, overwrite)
    store = EmbeddingStore(output / EMBEDDINGS, made_by)
    encoder = Encoder(dual_encoder.to(state.device), processor, options.batch_size, num_workers=options.num_workers)
    keys, computed = _embed(dataset, encoder, store, options.chunk_rows, on_bad_image)
    if not state.is_main_process:
        return None
    kept = [row for row, key in enumerate(keys) if store.has(key)]
    bad = sorted(set(range(len(keys))) - set(kept))
    if not kept:
        raise ValueError(
            f"Expected pictures that can be read in {images!r}, got {len(keys)} of which none can: "
            f"{reason_of(dataset, bad[0])}."
        )
    hashes = [key for key in keys if key is not None and store.has(key)]
    embeds = store.read(hashes)
    vectors = build_faiss_index(faiss, embeds, FACTORIES.get(index, index))
    ids = dataset.select_columns("image_id").select(kept)["image_id"][:]
    effort, notes = _set_effort(faiss, vectors, index, embeds, encoder, queries)
    manifest = {
        "format": MANIFEST_FORMAT,
        "model": os.path.abspath(model) if os.path.isdir(model) else str(model),
        **{"revision": revision, "encoder": made_by, "images": images},
        **{"n": len(kept), "dim": embeds.shape[1], "index": index},
        **effort,
        "computed": computed,
        "processes": state.num_processes,
        "changes": _changes(before, output, dict(zip(ids, hashes, strict=True))),
        "skipped": [describe_fault(dataset, row) for row in bad],
        "notes": notes,
        "versions": {**environment()[0], "faiss": faiss.__version__},
    }
    write_index(output, vectors, {"image_id": ids, "path": image_paths(dataset, kept), "sha256": hashes}, manifest)
    return SearchIndex.load(output, model=str(model), verify=False, trust_remote_code=trust_remote_code)


def load_pictures(images: str) -> Dataset:
    """Load the pictures of a folder, or of a dataset without its captions.

    Args:
        images (`str`): A folder, or a spec of [`~modeling_dclip.data.captions`].

    Returns:
        `datasets.Dataset`: With `image_id` and `image`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture, or the spec is wrong.
    """
    if os.path.isdir(images):
        return read_images(images)
    if images.partition(":")[0] not in CAPTION_SOURCES or ":" not in images:
        forms = ", ".join(source.form for source in CAPTION_SOURCES.values())
        raise FileNotFoundError(
            f"Expected a folder of pictures, or a dataset ({forms}), got {images!r}. Check the path."
        )
    return load_uncaptioned([images], seed=0)


def image_paths(dataset: Dataset, rows: Sequence[int]) -> list[str | None]:
    """The absolute paths of images, `None` for those whose bytes the dataset holds."""
    stored = (row["image"] for row in undecoded_images(dataset).select(list(rows)))
    return [os.path.abspath(image["path"]) if image["bytes"] is None else None for image in stored]


def describe_fault(dataset: Dataset, row: int) -> UnreadableImage:
    """Say which image cannot be read, and why."""
    try:
        decode_image(dataset, row)
        reason = "it was not readable when it was embedded"
    except UnreadableImageError as error:
        reason = error.reason
    image_id = dataset.select_columns("image_id")[row]["image_id"]
    return UnreadableImage(image_id=image_id, file=image_paths(dataset, [row])[0], reason=reason)


def reason_of(dataset: Dataset, row: int) -> str:
    """The same in one line: id, file and reason."""
    fault = describe_fault(dataset, row)
    return f"{fault['image_id']!r} ({fault['file'] or 'stored bytes'}): {fault['reason']}"


def refuse_unreadable(dataset: Dataset, rows: Sequence[int]) -> NoReturn:
    """Stop over images that cannot be read.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`.
        rows (`Sequence[int]`): The rows that cannot be read.

    Raises:
        ValueError: Always; it names the images and the reasons.
    """
    examples = "; ".join(reason_of(dataset, row) for row in rows[:2])
    ids = first(dataset.select_columns("image_id")[row]["image_id"] for row in rows)
    raise ValueError(
        f"{len(rows)} of the images read so far cannot be read ({ids}): {examples}. Replace or remove the files, or "
        "leave such images out with --on_bad_image skip. The embeddings that were computed are kept."
    )


def _embed(
    dataset: Dataset, encoder: Encoder, store: EmbeddingStore, chunk_rows: int, on_bad_image: str
) -> tuple[list[str | None], int]:
    """The keys of all rows and the number of images embedded now. The store then has every image that can be read."""
    keys = hash_images(dataset)
    fatal = on_bad_image == "raise"
    if fatal and None in keys:
        refuse_unreadable(dataset, [row for row, key in enumerate(keys) if key is None])
    reader = PixelReader(dataset, encoder.processor.image_processor, cache_mib=0)

    def compute(rows: Sequence[int]) -> tuple[np.ndarray, list[bool]]:
        embeds, readable = embed_readable(encoder, reader, rows)
        if fatal and not all(readable):
            refuse_unreadable(dataset, [row for row, is_read in zip(rows, readable, strict=True) if not is_read])
        return embeds, readable

    computed = store.add(keys, compute, chunk_rows)
    if fatal and (bad := [row for row, key in enumerate(keys) if not store.has(key)]):
        refuse_unreadable(dataset, bad)
    return keys, computed


def _check_arguments(index: str, on_bad_image: str) -> None:
    if on_bad_image not in BAD_IMAGE_MODES:
        raise ValueError(f"Expected on_bad_image to be one of {BAD_IMAGE_MODES}, got {on_bad_image!r}.")
    if not index:
        raise ValueError(
            f"Expected an index, one of {sorted(FACTORIES)} or a factory string of FAISS, got an empty text."
        )


def _check_output(output: Path, encoder: str, images: str, model: str, overwrite: bool) -> Manifest | None:
    """The manifest of the index that this build may replace, `None` if there is none or anything may be replaced."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"Expected a folder for the index at '{output}', got a file. Choose another output.")
    check_output_folder(output)
    if not (output / MANIFEST).exists() or overwrite:
        return None
    before = read_manifest(output)
    if before["encoder"] != encoder:
        raise FileExistsError(
            f"'{output}' holds an index of another model: it was built with {before['model']!r}, and {model!r} has "
            "other weights or settings. Choose another --output, or replace the index with --overwrite."
        )
    if before["images"] != images:
        raise FileExistsError(
            f"'{output}' holds an index of other images: it was built from {before['images']!r}, not from {images!r}. "
            "Choose another --output, or replace the index with --overwrite."
        )
    return before


def _set_effort(
    faiss: ModuleType, vectors: Any, index: str, embeds: torch.Tensor, encoder: Encoder, queries: Sequence[str]
) -> tuple[dict[str, int | float | None], list[str]]:
    """Set the effort of an approximate index; `effort` and `recall@10` for the manifest, and notes."""
    n, knob = len(embeds), effort_of(faiss, vectors)
    if knob is None:
        notes = ["The queries were not used: an exact index has nothing to tune."] if queries else []
        if index == "ivf":
            notes.insert(
                0,
                f"An inverted file begins at {LEAST_CELLS * POINTS_PER_CELL:,} pictures, and these are {n:,}: the "
                "index is exact, and as fast.",
            )
        return {"effort": None, "recall@10": None}, notes
    holder, name, most = knob
    notes = []
    if name == "nprobe" and n < most * POINTS_PER_CELL:
        notes.append(
            f"FAISS asks for {most * POINTS_PER_CELL:,} pictures for {count_of(most, 'cell')}, and these are {n:,}. "
            "Take fewer cells, or an exact index."
        )
    if not queries:
        setattr(holder, name, min(most, FIRST_EFFORT[name]))
        notes.append(
            f"How much this approximate index finds was not measured; its effort is {getattr(holder, name)}. Measure "
            f"and tune it with --queries FILE, {ENOUGH_QUERIES} typical queries or more, or set --effort in a search."
        )
        return {"effort": getattr(holder, name), "recall@10": None}, notes
    recall = tune_faiss_index(faiss, vectors, embeds, embed_texts(encoder, queries))
    measured = len(queries) // 2
    notes.append(
        f"It finds {100 * recall:.1f}% of the exact first 10, at an effort of {getattr(holder, name)}: measured on "
        f"{measured} of the queries, tuned on the other {len(queries) - measured}."
    )
    if len(queries) < ENOUGH_QUERIES:
        notes.append(f"{len(queries)} queries are few for such a number. Give {ENOUGH_QUERIES} or more.")
    return {"effort": getattr(holder, name), "recall@10": recall}, notes


def _changes(before: Manifest | None, output: Path, now: Mapping[str, str]) -> dict[str, Change] | None:
    """What happened to the images since the index that is there, by id and content."""
    if before is None:
        return None
    path = output / before["files"]["images"]["name"]
    if not path.is_file():
        return None
    table = pq.read_table(path, columns=["image_id", "sha256"]).to_pydict()
    old = dict(zip(table["image_id"], table["sha256"], strict=True))
    parts = {
        "new": [name for name in now if name not in old],
        "changed": [name for name, digest in now.items() if old.get(name, digest) != digest],
        "gone": [name for name in old if name not in now],
        "kept": [name for name, digest in now.items() if old.get(name) == digest],
    }
    return {kind: Change(count=len(names), first=names[:FIRST_IDS]) for kind, names in parts.items()}
