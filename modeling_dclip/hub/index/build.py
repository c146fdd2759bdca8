"""Embed a folder or a dataset and make of it an index that answers."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_dclip.data.captions import SOURCES, load_uncaptioned
from modeling_dclip.data.captions.files import read_images
from modeling_dclip.data.images import PixelReader, decode_image
from modeling_dclip.data.rows import first
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks.retrieval_index import (
    build_faiss_index,
    effort_of,
    find_faiss,
    tune_faiss_index,
)
from modeling_dclip.evaluation.embedding import embed_texts
from modeling_dclip.evaluation.records import environment
from modeling_dclip.hub.index import EMBEDDINGS, FORMAT, MANIFEST, SearchIndex, read_manifest, write_index
from modeling_dclip.hub.index.embeddings import (
    EmbeddingOptions,
    EmbeddingStore,
    embed_readable,
    fingerprint_encoder,
    hash_images,
)


def load_images(images: str) -> Dataset:
    """The pictures of a folder, or of a source of [`~modeling_dclip.data.captions`] without its captions.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no picture, or the spec is wrong.
    """
    if os.path.isdir(images):
        return read_images(images)
    if images.partition(":")[0] not in SOURCES or ":" not in images:
        forms = ", ".join(source.form for source in SOURCES.values())
        raise FileNotFoundError(
            f"Expected a folder of pictures, or a dataset ({forms}), got {images!r}. Check the path."
        )
    return load_uncaptioned([images], seed=0)


def image_paths(dataset: Dataset, rows: Sequence[int]) -> list[str | None]:
    """Where the images are, absolute; None of those that lie inside the dataset."""
    undecoded = dataset.select_columns("image").with_format(None).cast_column("image", ImageFeature(decode=False))
    stored = (row["image"] for row in undecoded.select(list(rows)))
    return [os.path.abspath(image["path"]) if image["bytes"] is None else None for image in stored]


def reason_of(dataset: Dataset, row: int) -> str:
    """Id, file and why an image cannot be read."""
    fault = describe_fault(dataset, row)
    return f"{fault['image_id']!r} ({fault['file'] or 'stored bytes'}): {fault['reason']}"


def describe_fault(dataset: Dataset, row: int) -> dict[str, str | None]:
    """`image_id`, `file` and `reason` of an image that cannot be read."""
    try:
        decode_image(dataset, row)
        reason = "it was not readable when it was embedded"
    except ValueError as error:
        reason = str(error.__cause__)
    except Image.DecompressionBombError as error:
        reason = str(error)
    image_id = dataset.select_columns("image_id")[row]["image_id"]
    return {"image_id": image_id, "file": image_paths(dataset, [row])[0], "reason": reason}


def refuse_unreadable(dataset: Dataset, rows: Sequence[int]) -> None:
    """Say which images cannot be read, and why.

    Raises:
        ValueError: Always.
    """
    examples = "; ".join(reason_of(dataset, row) for row in rows[:2])
    ids = first(dataset.select_columns("image_id")[row]["image_id"] for row in rows)
    raise ValueError(
        f"{len(rows)} of the images looked at so far cannot be read ({ids}): {examples}. Replace or remove the files, "
        "or leave such images out with on_bad_image 'skip'. What was embedded is kept."
    )


logger = logging.getLogger(__name__)

# Of FAISS's index_factory; an empty one is an inverted file whose number of cells follows from the number of images.
FACTORIES = {"exact": "Flat", "ivf": "", "hnsw": "HNSW32"}
BAD_IMAGE_MODES = ("raise", "skip")
FIRST_EFFORT = {"nprobe": 32, "efSearch": 128}  # where no queries measure it


def build_index(
    model: str,
    images: str,
    output: str | Path,
    *,
    index: str = "exact",
    queries: Sequence[str] = (),
    on_bad_image: str = "raise",
    batch_size: int = 64,
    chunk_rows: int = 1024,
    num_workers: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> SearchIndex | None:
    """Embed images into an index.

    Started again after a kill, or when images have come and gone, it computes only what is not there.

    Under several processes (`accelerate launch`) each embeds its share, and the main process writes the index.

    Args:
        model (`str`): As for [`~modeling_dclip.encoders.loading.load_dual_encoder`].
        images (`str`): A folder, searched with those below it, or a dataset's spec such as `parquet:GLOB`.
        output (`str` or `Path`): Folder of the index.
        index (`str`, *optional*, defaults to `"exact"`): `"exact"`, `"ivf"` (inverted file), `"hnsw"` (graph), or what
            FAISS's `index_factory` takes.
        queries (`Sequence[str]`, *optional*): Texts of the kind that will be asked: with them the effort of an index
            that is not exact is raised until it finds 99 % of the exact first ten of one half of them, and the other
            half measures it.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): `"skip"` leaves out images that cannot be read,
            counted and named.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        chunk_rows (`int`, *optional*, defaults to 1024): Images between two savings.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode, a GPU.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an index of another model or of other images.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with the model.

    Returns:
        [`SearchIndex`] in the main process, None in the others, which do not wait for it.

    Raises:
        FileNotFoundError: If there is no such folder or model.
        FileExistsError: If `output` is a file, or holds an index of another model or of other images.
        ImportError: If `faiss-cpu` is not installed.
        TypeError: If the model is not a dual encoder.
        ValueError: If an argument is out of range, there is no picture, one cannot be read, or a stored file is
            damaged.
    """
    _check_arguments(index, on_bad_image, batch_size, chunk_rows)
    faiss, output = find_faiss("faiss"), Path(output)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which PartialState alone does not look at
    dataset = load_images(images)
    encoder, processor, revision = load_dual_encoder(model, trust_remote_code=trust_remote_code)
    made_by = fingerprint_encoder(encoder, processor)
    images = os.path.abspath(images) if os.path.isdir(images) else images
    before = _check_output(output, made_by, images, model, overwrite)
    store = EmbeddingStore(output / EMBEDDINGS, made_by)
    encoder.to(state.device)
    options = EmbeddingOptions(batch_size, chunk_rows, num_workers)
    keys, computed = _embed(dataset, encoder, processor, store, options, on_bad_image)
    if not state.is_main_process:
        return None
    kept = [row for row, key in enumerate(keys) if store.has(key)]
    bad = sorted(set(range(len(keys))) - set(kept))
    if not kept:
        raise ValueError(f"None of the {len(keys)} pictures of {images!r} can be read: {reason_of(dataset, bad[0])}.")
    hashes = [keys[row] for row in kept]
    embeds = store.read(hashes)
    vectors = build_faiss_index(faiss, embeds, FACTORIES.get(index, index))
    texts = embed_texts(Encoder(encoder, processor), queries) if queries else None
    manifest = {
        "format": FORMAT,
        "model": os.path.abspath(model) if os.path.isdir(model) else str(model),
        **{"revision": revision, "encoder": made_by, "images": images},
        **{"n": len(kept), "dim": embeds.shape[1], "index": index},
        **_set_effort(faiss, vectors, embeds, texts),
        "computed": computed,
        "processes": state.num_processes,
        "changes": _changes(before, output, hashes),
        "skipped": [describe_fault(dataset, row) for row in bad],
        "versions": {**environment()[0], "faiss": faiss.__version__},
    }
    ids = dataset.select_columns("image_id").select(kept)["image_id"][:]
    write_index(output, vectors, {"image_id": ids, "path": image_paths(dataset, kept), "sha256": hashes}, manifest)
    return SearchIndex.load(output, model=str(model), verify=False, trust_remote_code=trust_remote_code)


def _embed(
    dataset: Dataset,
    encoder: torch.nn.Module,
    processor: Any,
    store: EmbeddingStore,
    options: EmbeddingOptions,
    on_bad_image: str,
) -> tuple[list[str | None], int]:
    """Keys of all rows, and how many images were embedded now; afterwards the store has all that can be read."""
    keys = hash_images(dataset)
    fatal = on_bad_image == "raise"
    if fatal and None in keys:
        refuse_unreadable(dataset, [row for row, key in enumerate(keys) if key is None])
    reader = PixelReader(dataset, processor.image_processor, cache_mib=0)

    def compute(rows: Sequence[int]) -> tuple[np.ndarray, list[bool]]:
        embeds, readable = embed_readable(encoder, reader, rows, options)
        if fatal and not all(readable):
            refuse_unreadable(dataset, [row for row, is_read in zip(rows, readable, strict=True) if not is_read])
        return embeds, readable

    computed = store.add(keys, compute, options.chunk_rows)
    if fatal and (bad := [row for row, key in enumerate(keys) if not store.has(key)]):
        refuse_unreadable(dataset, bad)
    return keys, computed


def _check_arguments(index: str, on_bad_image: str, batch_size: int, chunk_rows: int) -> None:
    if on_bad_image not in BAD_IMAGE_MODES:
        raise ValueError(f"Expected on_bad_image to be one of {BAD_IMAGE_MODES}, got {on_bad_image!r}.")
    if batch_size < 1 or chunk_rows < 1:
        raise ValueError(f"Expected batch_size and chunk_rows >= 1, got {batch_size} and {chunk_rows}.")
    if not index:
        raise ValueError(f"Expected an index, one of {sorted(FACTORIES)} or a factory of FAISS, got an empty text.")


def _check_output(output: Path, encoder: str, images: str, model: str, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of an index that this build may replace."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"Expected a folder for the index at '{output}', got a file. Choose another output.")
    if not (output / MANIFEST).exists() or overwrite:
        return None
    before = read_manifest(output)
    for what, expected, found in (
        ("model", before["encoder"], encoder),
        ("images", before["images"], images),
    ):
        if expected != found:
            got = model if what == "model" else images
            raise FileExistsError(
                f"'{output}' holds an index of another {what}: expected {before[what]!r}, got "
                f"{got!r}{' with other weights or settings' if what == 'model' else ''}. Choose another output, or "
                "replace it with overwrite."
            )
    return before


def _set_effort(faiss: Any, vectors: Any, embeds: torch.Tensor, texts: torch.Tensor | None) -> dict[str, Any]:
    """`effort` and `recall@10` of an index that is not exact, for the manifest."""
    knob = effort_of(faiss, vectors)
    if knob is None:
        return {"effort": None, "recall@10": None}
    holder, name, most = knob
    if texts is not None:
        recall = tune_faiss_index(faiss, vectors, embeds, texts)
        return {"effort": getattr(holder, name), "recall@10": recall}
    setattr(holder, name, min(most, FIRST_EFFORT[name]))
    logger.warning(
        "Nobody has measured what this index misses: %s is %d. Give queries of the kind that will be asked, or set "
        "the effort.",
        *(name, getattr(holder, name)),
    )
    return {"effort": getattr(holder, name), "recall@10": None}


def _changes(before: dict[str, Any] | None, output: Path, hashes: list[str]) -> dict[str, int] | None:
    """Images that came and went since the index that is there, by content."""
    if before is None:
        return None
    path = output / before["files"]["images"]["name"]
    if not path.is_file():
        return None
    old = set(pq.read_table(path, columns=["sha256"])["sha256"].to_pylist())
    return {"added": len(set(hashes) - old), "removed": len(old - set(hashes))}
