"""Labelled images out of `clip-benchmark/wds_*` sets: tar files (shards) in a folder, on the Hub or behind http.

A dataset's rows point into the tar files. The tars are mapped into memory, not read: the bytes of a picture are
touched when its row is read. So memory does not grow with the set, and nothing is copied to disk. (Worker processes
that are spawned, not forked, get copies; decode with `num_workers=0` there.)

A sample is a picture `KEY.{jpg,jpeg,png,webp}` and its label. The label is `KEY.cls` with the number of its class.
Where `dataset_type.txt` says `multilabel`, it is a vector of zeros and ones, one per class: `KEY.npy`, or text in
`KEY.cls`.

Beside the folders of the splits lie `classnames.txt`, `zeroshot_classification_templates.txt` and, in some sets,
`dataset_type.txt`. A split's folder holds `nshards.txt` and `0.tar`, `1.tar`, ...
"""

import io
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
from fsspec.callbacks import TqdmCallback
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm.auto import tqdm

from modeling_dclip.data.failures import TransportError, one_line
from modeling_dclip.data.files import decode_text, read_bytes, replacing, user_cache_dir
from modeling_dclip.data.labels.prompts import NAMES_FILE, TEMPLATES_FILE, parse_lines
from modeling_dclip.data.reinforced.shards import IMAGE_MEMBERS, DamagedSampleError, SamplePlace, scan_shard
from modeling_dclip.encoders.fingerprints import combine_keys

if TYPE_CHECKING:
    from fsspec.implementations.http import HTTPFileSystem

_TIMEOUT_S = 60
_URL = re.compile(r"https?://")
# The page of a dataset on the Hub, or on a server like it, with or without a branch.
_HUB_PAGE = re.compile(r"(https?://[^/]+)/datasets/([^/]+/[^/]+)(?:/tree/([^/]+))?")
_HUB = "https://huggingface.co"
_MULTILABEL, _RETRIEVAL = "multilabel", "retrieval"  # what dataset_type.txt may say
_REACH = (1 << 31) - 1  # Arrow's offsets into a binary column are 32 bits wide
_NO_FILE = (401, 404, 410)  # some servers answer 401 where there is nothing, so that private files stay unknown


def is_url(root: str) -> bool:
    """Whether a root is read over http."""
    return bool(_URL.match(root))


class _HubDataset(NamedTuple):
    endpoint: str
    repo_id: str
    revision: str


class WebdatasetFiles:
    """Where a set is, and how to get at its files.

    Args:
        root (`str`): A folder, or an address that begins with `http://` or `https://`: of the folder, or of a
            dataset's page on the Hub.
        cache_dir (`str` or `Path`, *optional*): Where fetched files are kept. By default the files of a Hub are in
            the cache of `huggingface_hub`, and shards from other addresses in the user's cache folder
            (`modeling_dclip/shards`).
    """

    def __init__(self, root: str, cache_dir: str | os.PathLike | None = None):
        self.root = root.rstrip("/")
        self.remote = is_url(root)
        self._hub: _HubDataset | None = None
        if page := _HUB_PAGE.fullmatch(self.root):
            endpoint, repo_id, revision = page[1], page[2], page[3] or constants.DEFAULT_REVISION
            self._hub = _HubDataset(endpoint, repo_id, unquote(revision))
            self.root = f"{endpoint}/datasets/{repo_id}/resolve/{revision}"
            self.name = repo_id.rsplit("/", 1)[1]
        else:
            self.name = self.root.rsplit("/", 1)[-1] if self.remote else Path(root).resolve().name
        own = Path(constants.HF_HUB_CACHE) if self._hub is not None else user_cache_dir("shards")
        self.cache_dir = own if cache_dir is None else Path(cache_dir)

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
        place = self.place(name)
        if self._hub is not None:
            content = read_bytes(self._fetch_from_hub(self._hub, name))
        elif self.remote:
            with _naming(place):
                content = _http_files().cat_file(place)
        else:
            path = Path(self.root, name)
            if not path.is_file():
                raise FileNotFoundError(f"No file '{path}'. Check the path and the split.")
            content = read_bytes(path)
        return decode_text(content, place)

    def find_text(self, name: str) -> str | None:
        """A small file, or `None` if there is no such file.

        Raises:
            ConnectionError: If the server cannot be reached or refuses.
            ValueError: If it is not UTF-8.
        """
        try:
            return self.text(name)
        except FileNotFoundError:
            return None

    def shard(self, name: str) -> Path:
        """A tar on this machine. It is fetched if it is remote and not in the cache yet.

        Raises:
            ConnectionError: If the server cannot be reached, refuses, or sends less than it said.
            FileNotFoundError: If there is no such shard.
        """
        if self._hub is not None:
            return self._fetch_from_hub(self._hub, name)
        if self.remote:
            return self._fetch_over_http(name)
        path = Path(self.root, name)
        if not path.is_file():
            raise FileNotFoundError(f"Shard '{path}' is missing. Copy it there, or correct nshards.txt beside it.")
        return path

    def _fetch_from_hub(self, hub: _HubDataset, name: str) -> Path:
        url = self.place(name)
        # The user's token is for the Hub only; another server that is laid out like it does not get it.
        token = None if hub.endpoint in (_HUB, constants.ENDPOINT) else False
        try:
            path = hf_hub_download(
                hub.repo_id,
                name,
                repo_type="dataset",
                revision=hub.revision,
                endpoint=hub.endpoint,
                token=token,
                cache_dir=self.cache_dir,
            )
        except LocalEntryNotFoundError as error:  # neither on the server nor in the cache
            raise ConnectionError(
                f"Cannot reach '{url}': {one_line(error.__cause__ or error)}. Try again, or copy the set to a folder."
            ) from error
        except GatedRepoError as error:
            raise ConnectionError(
                f"Expected '{url}' to be served, got a refusal ({one_line(error)}). Ask for access on the dataset's "
                "page and log in with `hf auth login`."
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise FileNotFoundError(
                f"No file at '{url}' ({one_line(error)}). Check the address and the split."
            ) from error
        except (HfHubHTTPError, TransportError) as error:
            raise ConnectionError(
                f"Expected '{url}' to be served, got {one_line(error)}. Try again, or copy the set to a folder."
            ) from error
        return Path(path)

    def _fetch_over_http(self, name: str) -> Path:
        url, files = self.place(name), _http_files()
        with _naming(url):
            answer = files.info(url)
            version = answer.get("ETag") or answer.get("Last-Modified")
            path = self.cache_dir / combine_keys([url, str(version), str(answer["size"])]) / Path(name).name
            if version is not None and path.is_file():
                return path
            bar = {"desc": f"Fetching {path.name}", "unit": "B", "unit_scale": True}
            with replacing(path) as temporary, TqdmCallback(bar, tqdm_cls=tqdm) as progress:
                files.get_file(url, os.fspath(temporary), callback=progress)
        return path


def _http_files() -> "HTTPFileSystem":
    import aiohttp  # its import takes half a second, which sets in folders need not wait for
    import fsspec

    session = {
        "headers": {"User-Agent": "modeling_dclip", "Accept-Encoding": "identity"},
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_TIMEOUT_S),
        "trust_env": True,  # proxies
    }
    return fsspec.filesystem("http", client_kwargs=session)


@contextmanager
def _naming(url: str) -> Iterator[None]:
    """Turn the error of a request over http into one line that names its address."""
    import aiohttp
    from fsspec.exceptions import FSTimeoutError

    try:
        yield
    except (aiohttp.ClientError, FSTimeoutError, FileNotFoundError) as error:
        # `info` of fsspec raises FileNotFoundError for every failure; the cause says which one it was.
        reason = (error.__cause__ or error) if isinstance(error, FileNotFoundError) else error
        status = reason.status if isinstance(reason, aiohttp.ClientResponseError) else None
        if isinstance(reason, FileNotFoundError) or status in _NO_FILE:
            raise FileNotFoundError(
                f"No file at '{url}' (HTTP status {status or 404}). Check the address and the split."
            ) from error
        if status is not None:
            raise ConnectionError(
                f"Expected '{url}' to be served, got the HTTP status {status}. Try again, or copy the set to a folder."
            ) from error
        if isinstance(reason, aiohttp.ClientPayloadError):
            raise ConnectionError(
                f"'{url}' broke off: {one_line(reason)}. Run again; shards that are complete are kept."
            ) from error
        raise ConnectionError(
            f"Cannot reach '{url}': {one_line(reason)}. Try again, or copy the set to a folder."
        ) from error


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
        ConnectionError: If a server cannot be reached or refuses.
        FileNotFoundError: If there is no `nshards.txt` or no `classnames.txt`.
        ValueError: If one of the texts is malformed, or the set is one for retrieval.
    """
    counted = f"{split}/nshards.txt"
    count = files.text(counted).strip()
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"Expected the number of shards in '{files.place(counted)}', got {count[:40]!r}.")
    kind = (files.find_text("dataset_type.txt") or "").strip().lower()
    if kind == _RETRIEVAL:
        raise ValueError(
            f"'{files.place('dataset_type.txt')}' says 'retrieval'. Evaluate it as such, not as zero_shot."
        )
    names, templates = files.find_text(NAMES_FILE), files.find_text(TEMPLATES_FILE)
    if names is None:
        raise FileNotFoundError(
            f"No file '{files.place(NAMES_FILE)}': the classes of '{files.name}' have no names. Put one name a line "
            "there, in the order of the labels."
        )
    return WebdatasetDescription(
        class_names=parse_lines(names, files.place(NAMES_FILE)),
        templates=None if templates is None else parse_lines(templates, files.place(TEMPLATES_FILE)),
        multilabel=kind == _MULTILABEL,
        n_shards=int(count),
    )


def label_feature(class_names: Sequence[str]) -> ClassLabel | Value:
    """A `ClassLabel` of the names; an integer where names repeat, as a `ClassLabel` cannot have them."""
    distinct = len(set(class_names)) == len(class_names)
    return ClassLabel(names=list(class_names)) if distinct else Value("int64")


def read_samples(files: WebdatasetFiles, split: str, description: WebdatasetDescription) -> Dataset:
    """The images and labels of a split.

    Args:
        files ([`WebdatasetFiles`]): The set. Its shards are fetched if it is remote.
        split (`str`): The folder of the shards.
        description ([`WebdatasetDescription`]): Of the split.

    Returns:
        `datasets.Dataset`: `image_id` (`NAME/SPLIT/N.tar/MEMBER`), `image`, `label` (a number, or for a multi-label
            set a list of K zeros and ones), in the order of the shards.

    Raises:
        ConnectionError, FileNotFoundError: As [`WebdatasetFiles.shard`].
        ValueError: If a shard is damaged, if a sample does not have exactly one picture and one label, or if a label
            is malformed or of no class. The message names shard and member. A damaged picture is found, and named,
            when it is decoded.
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
    # The default fingerprint would read all that the table points at, so this one is made from the files' states.
    info, fingerprint = DatasetInfo(features=features), combine_keys(identity)
    return Dataset(pa.concat_tables(tables), info=info, fingerprint=fingerprint).select(np.concatenate(rows))


class _Sample(NamedTuple):
    member: str  # of the picture
    start: int
    end: int
    label: int | np.ndarray


def _map(path: Path) -> pa.Buffer:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"Shard '{path}': expected samples, got an empty file. Fetch the shard again.")
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _scan(path: Path) -> Iterator[SamplePlace]:
    try:
        yield from scan_shard(path)
    except DamagedSampleError as error:
        raise _damaged(path, error.problem, error.key, error.member) from error


def _damaged(shard: Path, problem: str, key: str | None = None, member: str | None = None) -> ValueError:
    place = f"Shard '{shard}'"
    place += f", member '{key}.{member}'" if member is not None else f", sample {key!r}" if key is not None else ""
    return ValueError(f"{place}: {problem}. Fetch or write the shard again.")


def _read_sample(place: SamplePlace, content: pa.Buffer, multilabel: bool, classes: int) -> _Sample:
    pictures = [kind for kind in IMAGE_MEMBERS if kind in place.members]
    kinds = ("npy", "cls") if multilabel else ("cls",)
    label = next((kind for kind in kinds if kind in place.members), None)
    repeated = [kind for kind in place.members if kind.endswith(" (repeated)")]
    if len(pictures) != 1 or label is None or repeated:
        problem = (
            f"expected one picture ({', '.join(IMAGE_MEMBERS)}) and one label ({' or '.join(kinds)}), got "
            f"{sorted(place.members)}; a set with several labels per image says '{_MULTILABEL}' in dataset_type.txt"
        )
        raise _damaged(place.shard, problem, place.key)
    offset, size = place.members[label]
    read = _read_vector if multilabel else _read_class
    value = read(place, label, content[offset : offset + size].to_pybytes(), classes)
    start, size = place.members[pictures[0]]
    return _Sample(f"{place.key}.{pictures[0]}", start, start + size, value)


def _wrong_label(place: SamplePlace, member: str, problem: str) -> ValueError:
    return _damaged(place.shard, problem, place.key, member)


def _read_class(place: SamplePlace, member: str, content: bytes, classes: int) -> int:
    try:
        label = int(content)
    except ValueError as error:
        problem = (
            f"expected the number of a class, got {content[:40]!r}; a set with several labels per image says "
            f"'{_MULTILABEL}' in dataset_type.txt"
        )
        raise _wrong_label(place, member, problem) from error
    if not 0 <= label < classes:
        problem = f"expected a label in [0, {classes}), one per line of classnames.txt, got {label}"
        raise _wrong_label(place, member, problem)
    return label


def _read_vector(place: SamplePlace, member: str, content: bytes, classes: int) -> np.ndarray:
    try:
        if member == "npy":
            vector = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            vector = np.array([int(one) for one in re.findall(r"[^\s,\[\]]+", content.decode())])
    except (ValueError, EOFError, OSError) as error:
        raise _wrong_label(place, member, f"expected a vector of zeros and ones, got damage ({error})") from error
    if vector.shape != (classes,):
        problem = f"expected {classes} values, one per line of classnames.txt, got the shape {vector.shape}"
        raise _wrong_label(place, member, problem)
    if not np.isin(vector, (0, 1)).all():
        raise _wrong_label(place, member, f"expected zeros and ones, got {vector[~np.isin(vector, (0, 1))][0]!r}")
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
    """Rows that point into a shard.

    Rows 0, 2, 4... are the samples. The rows between them hold the tar's bytes between two pictures, as an Arrow
    column has no gaps.
    """
    base = samples[0].start
    # start, end, start, end...
    bounds = np.array([(sample.start, sample.end) for sample in samples]).reshape(-1) - base
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
