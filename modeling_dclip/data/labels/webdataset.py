"""Labelled images out of `clip-benchmark/wds_*` shards, as a dataset whose rows point into the tar files.

The tars are mapped into memory, not read: a picture's bytes are touched when its row is, so memory does not grow with
the set and nothing is copied to disk. (Workers that are spawned, not forked, get copies; decode with `num_workers=0`
there.)

A sample is a picture `KEY.{jpg,jpeg,png,webp}` and its label: `KEY.cls` with the number of its class; or, where
`dataset_type.txt` says `multilabel`, a vector of zeros and ones, one per class, as `KEY.npy` or as text in `KEY.cls`.
"""

import io
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
from tqdm.auto import tqdm

from modeling_dclip.data.files import decode_text, read_bytes, replacing, user_cache_dir
from modeling_dclip.data.labels.prompts import NAMES_FILE, TEMPLATES_FILE, parse_lines
from modeling_dclip.data.reinforced.shards import DamagedSampleError, SamplePlace, scan_shard
from modeling_dclip.encoders.fingerprints import combine_keys

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_URL = re.compile(r"https?://")
# A dataset's page on the Hub, with or without a branch: its files are elsewhere.
_HUB_PAGE = re.compile(r"(https?://[^/]+/datasets/[^/]+/[^/]+)(?:/tree/([^/]+))?")
_NO_FILE = (401, 404, 410)  # 401 is the Hub's answer for a dataset that does not exist


def is_url(root: str) -> bool:
    """Whether a root is read over http."""
    return bool(_URL.match(root))


class WebdatasetFiles:
    """Where a set is, and how to get at its files.

    Args:
        root (`str`): A folder, or an address that begins with `http://` or `https://`: of the folder, or of a
            dataset's page on the Hub.
        cache_dir (`str` or `Path`, *optional*): Where shards that come over http are kept; by default in the user's
            cache folder.
    """

    def __init__(self, root: str, cache_dir: str | os.PathLike | None = None):
        self.root = root.rstrip("/")
        self.remote = is_url(root)
        if page := _HUB_PAGE.fullmatch(self.root):
            self.root = f"{page[1]}/resolve/{page[2] or 'main'}"
            self.name = page[1].rsplit("/", 1)[1]
        else:
            self.name = self.root.rsplit("/", 1)[-1] if self.remote else Path(root).resolve().name
        self.cache_dir = Path(cache_dir) if cache_dir is not None else user_cache_dir("shards")

    def place(self, name: str) -> str:
        """Path or address of a file, for messages."""
        return f"{self.root}/{name}"

    def text(self, name: str) -> str:
        """A small file.

        Raises:
            ConnectionError: If the server cannot be reached or refuses.
            FileNotFoundError: If there is no such file.
            ValueError: If it is not UTF-8.
        """
        if self.remote:
            with self._open(self.place(name)) as answer:
                content = answer.read()
        else:
            path = Path(self.root, name)
            if not path.is_file():
                raise FileNotFoundError(f"No file '{path}'. Check the path and the split.")
            content = read_bytes(path)
        return decode_text(content, self.place(name))

    def has(self, name: str) -> bool:
        """Whether there is a file.

        Raises:
            ConnectionError: If the server cannot be reached or refuses.
        """
        if not self.remote:
            return Path(self.root, name).is_file()
        try:
            self._open(self.place(name)).close()
        except FileNotFoundError:
            return False
        return True

    def shard(self, name: str) -> Path:
        """A tar on this machine, fetched if it is not.

        Raises:
            ConnectionError: If the server cannot be reached, refuses, or sends less than it said.
            FileNotFoundError: If there is no such shard.
        """
        if not self.remote:
            path = Path(self.root, name)
            if not path.is_file():
                raise FileNotFoundError(f"Shard '{path}' is missing. Copy it there, or correct nshards.txt beside it.")
            return path
        url = self.place(name)
        with self._open(url) as answer:
            length = answer.headers.get("Content-Length")
            validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            path = self.cache_dir / combine_keys([url, str(validator), str(length)]) / Path(name).name
            if validator is not None and path.is_file():
                return path
            with replacing(path) as temporary:
                _copy(answer, temporary, url, None if length is None else int(length))
        return path

    def _open(self, url: str):
        try:
            return urlopen(Request(url, headers={"User-Agent": "modeling_dclip"}), timeout=_TIMEOUT_S)
        except HTTPError as error:
            if error.code in _NO_FILE:
                raise FileNotFoundError(f"No file at '{url}' ({error}). Check the address and the split.") from error
            raise ConnectionError(
                f"Expected '{url}' to be served, got {error}. Try again, or copy the set."
            ) from error
        except (URLError, TimeoutError) as error:
            raise ConnectionError(f"Cannot reach '{url}': {error}. Try again, or copy the set to a folder.") from error


def _copy(answer, path: Path, url: str, length: int | None) -> None:
    """Write what a server sends to a file, a block at a time."""
    received = 0
    bar = {"desc": f"Fetching {path.name}", "unit": "B", "unit_scale": True, "total": length}
    with path.open("wb") as file, tqdm(**bar) as progress:
        try:
            while block := answer.read(_BLOCK):
                file.write(block)
                received += len(block)
                progress.update(len(block))
        except (HTTPException, TimeoutError) as error:
            raise ConnectionError(f"'{url}' broke off after {received} bytes: {error}. Run again.") from error
    if length is not None and received != length:
        raise ConnectionError(
            f"Expected {length} bytes from '{url}', got {received}. Run again: whole shards are kept."
        )


PICTURES = ("webp", "png", "jpg", "jpeg")
MULTILABEL, RETRIEVAL = "multilabel", "retrieval"
_REACH = (1 << 31) - 1  # Arrow's offsets into a binary column are 32 bits wide


class WebdatasetDescription(NamedTuple):
    """What the texts beside the shards say."""

    class_names: list[str]
    templates: list[str] | None
    multilabel: bool
    n_shards: int


def read_description(files: WebdatasetFiles, split: str) -> WebdatasetDescription:
    """Read the texts of a set.

    Args:
        files ([`WebdatasetFiles`]): The set.
        split (`str`): The folder of the shards.

    Returns:
        [`WebdatasetDescription`]: `templates` is `None` where there is no such file.

    Raises:
        ConnectionError, FileNotFoundError: As [`WebdatasetFiles`]; there must be `nshards.txt` and `classnames.txt`.
        ValueError: If one of the texts is malformed, or the set is one for retrieval.
    """
    text = files.text(f"{split}/nshards.txt").strip()
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"Expected the number of shards in '{files.place(f'{split}/nshards.txt')}', got {text[:40]!r}."
        )
    kind = files.text("dataset_type.txt").strip().lower() if files.has("dataset_type.txt") else ""
    if kind == RETRIEVAL:
        raise ValueError(
            f"'{files.place('dataset_type.txt')}' says 'retrieval'. Evaluate it as such, not as zero_shot."
        )
    if not files.has(NAMES_FILE):
        raise FileNotFoundError(
            f"No file '{files.place(NAMES_FILE)}': the classes of '{files.name}' have no names. Put one name a line "
            "there, in the order of the labels."
        )
    names = parse_lines(files.text(NAMES_FILE), files.place(NAMES_FILE))
    templates = None
    if files.has(TEMPLATES_FILE):
        templates = parse_lines(files.text(TEMPLATES_FILE), files.place(TEMPLATES_FILE))
    return WebdatasetDescription(names, templates, kind == MULTILABEL, int(text))


def label_feature(class_names: Sequence[str]) -> Any:
    """A `ClassLabel` of the names; an integer where names repeat, which a `ClassLabel` cannot have."""
    distinct = len(set(class_names)) == len(class_names)
    return ClassLabel(names=list(class_names)) if distinct else Value("int64")


def read_images(files: WebdatasetFiles, split: str, description: WebdatasetDescription) -> Dataset:
    """The images and labels of a split.

    Args:
        files ([`WebdatasetFiles`]): The set; shards are fetched where it is remote.
        split (`str`): The folder of the shards.
        description ([`WebdatasetDescription`]): Of the split.

    Returns:
        `datasets.Dataset`: `image_id` (`NAME/SPLIT/N.tar/MEMBER`), `image`, `label` (a number, or for a multi-label
            set a list of K zeros and ones), in the order of the shards.

    Raises:
        ConnectionError, FileNotFoundError: As [`WebdatasetFiles.shard`].
        ValueError: If a shard is damaged, a sample has not one picture and one label, or a label is malformed or of no
            class; the message names shard and member. A damaged picture is found, and named, when it is decoded.
    """
    classes = len(description.class_names)
    tables, rows, identity, start = [], [], [], 0
    feature = List(Value("int8"), length=classes) if description.multilabel else label_feature(description.class_names)
    features = Features(image_id=Value("string"), image=Image(), label=feature)
    for number in range(description.n_shards):
        path = files.shard(f"{split}/{number}.tar")
        status = path.stat()
        identity.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
        content = _map(path)
        samples = [_read_sample(place, content, description.multilabel, classes) for place in _scan(path)]
        ids = [f"{files.name}/{split}/{number}.tar/{sample.member}" for sample in samples]
        for part in _within_reach(samples, path):
            tables.append(_table(content, samples[part], ids[part], features))
            rows.append(np.arange(start, start + len(tables[-1]), 2))
            start += len(tables[-1])
    # A fingerprint of our own: the one by default would read all that the table points at.
    info, fingerprint = DatasetInfo(features=features), combine_keys(identity)
    return Dataset(pa.concat_tables(tables), info=info, fingerprint=fingerprint).select(np.concatenate(rows))


class _Sample(NamedTuple):
    member: str  # of the picture
    start: int
    end: int
    label: Any


def _map(path: Path) -> pa.Buffer:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"Shard '{path}': expected samples, got an empty file. Fetch the shard again.")
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _scan(path: Path) -> Iterator[SamplePlace]:
    try:
        yield from scan_shard(path)
    except DamagedSampleError as error:
        problem = str(error).partition(". Download or write the shard")[0]  # the rest is advice for training
        raise ValueError(f"{problem}. Fetch the shard again.") from error


def _wrong(place: SamplePlace, member: str, problem: str) -> ValueError:
    return ValueError(
        f"Shard '{place.shard}', member '{place.key}.{member}': {problem}. Fetch or write the shard again."
    )


def _read_sample(place: SamplePlace, content: pa.Buffer, multilabel: bool, classes: int) -> _Sample:
    pictures = [kind for kind in PICTURES if kind in place.members]
    kinds = ("npy", "cls") if multilabel else ("cls",)
    label = next((kind for kind in kinds if kind in place.members), None)
    repeated = [kind for kind in place.members if kind.endswith(" (repeated)")]
    if len(pictures) != 1 or label is None or repeated:
        raise ValueError(
            f"Shard '{place.shard}', sample {place.key!r}: expected one picture ({', '.join(PICTURES)}) and one label "
            f"({' or '.join(kinds)}), got {sorted(place.members)}. Write the shard again; a set with several labels "
            f"an image says '{MULTILABEL}' in dataset_type.txt."
        )
    offset, size = place.members[label]
    read = _read_vector if multilabel else _read_class
    value = read(place, label, content[offset : offset + size].to_pybytes(), classes)
    start, size = place.members[pictures[0]]
    return _Sample(f"{place.key}.{pictures[0]}", start, start + size, value)


def _read_class(place: SamplePlace, member: str, content: bytes, classes: int) -> int:
    try:
        label = int(content)
    except ValueError as error:
        remedy = f"the number of a class; a set with several labels an image says '{MULTILABEL}' in dataset_type.txt"
        raise _wrong(place, member, f"expected {remedy}; got {content[:40]!r}") from error
    if not 0 <= label < classes:
        raise _wrong(place, member, f"expected a label in [0, {classes}), as classnames.txt has lines, got {label}")
    return label


def _read_vector(place: SamplePlace, member: str, content: bytes, classes: int) -> np.ndarray:
    try:
        if member == "npy":
            vector = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            vector = np.array([int(one) for one in re.findall(r"[^\s,\[\]]+", content.decode())])
    except (ValueError, EOFError, OSError) as error:
        raise _wrong(place, member, f"expected a vector of zeros and ones, got damage ({error})") from error
    if vector.shape != (classes,):
        problem = f"expected {classes} values, one per line of classnames.txt, got the shape {vector.shape}"
        raise _wrong(place, member, problem)
    if not np.isin(vector, (0, 1)).all():
        raise _wrong(place, member, f"expected zeros and ones, got {vector[~np.isin(vector, (0, 1))][0]!r}")
    return vector.astype(np.int8)


def _within_reach(samples: Sequence[_Sample], path: Path) -> Iterator[slice]:
    """Runs of samples that 32-bit offsets from the first can span."""
    first = 0
    for index, sample in enumerate(samples):
        if sample.end - sample.start > _REACH:
            raise ValueError(f"Shard '{path}', member '{sample.member}': expected a picture below 2 GiB.")
        if sample.end - samples[first].start > _REACH:
            yield slice(first, index)
            first = index
    yield slice(first, len(samples))


def _table(content: pa.Buffer, samples: Sequence[_Sample], ids: Sequence[str], features: Features) -> pa.Table:
    """Rows 0, 2, 4... are the samples; those between hold the tar's bytes between pictures,
    as a column has no gaps.
    """
    base = samples[0].start
    bounds = (
        np.array([(sample.start, sample.end) for sample in samples]).reshape(-1) - base
    )  # start, end, start, end...
    count = len(bounds) - 1
    buffers = [None, pa.py_buffer(bounds.astype(np.int32)), content.slice(base)]
    images = pa.StructArray.from_arrays(
        [pa.BinaryArray.from_buffers(pa.binary(), count, buffers), pa.nulls(count, pa.string())],
        names=["bytes", "path"],
    )
    spread = np.repeat(np.arange(len(samples)), 2)[:count]
    labels = np.stack([sample.label for sample in samples])[spread]
    if labels.ndim == 2:
        column = pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), labels.shape[1])
    else:
        column = pa.array(labels, pa.int64())
    names = pa.array(ids).take(pa.array(spread))
    return pa.table({"image_id": names, "image": images, "label": column}, schema=features.arrow_schema)
