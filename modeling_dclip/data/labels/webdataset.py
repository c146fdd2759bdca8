"""Images out of `clip-benchmark/wds_*` sets, labelled or captioned: tar files (shards) in a folder, on the Hub or
behind http.

A dataset's rows point into the tar files. The tars are mapped into memory, not read: the bytes of a picture are
touched when its row is read. So memory does not grow with the set, and nothing is copied to disk. (Worker processes
that are spawned, not forked, get copies; decode with `num_workers=0` there.)

A sample is a picture `KEY.{jpg,jpeg,png,webp}` and its label. The label is `KEY.cls` with the number of its class.
Where `dataset_type.txt` says `multilabel`, it is a vector of zeros and ones, one per class: `KEY.npy`, or text in
`KEY.cls`. Where it says `retrieval`, captions take the place of the label: `KEY.txt`, one a line, or `KEY.json`.

Beside the folders of the splits lie `classnames.txt`, `zeroshot_classification_templates.txt` and, in some sets,
`dataset_type.txt`. A split's folder holds `nshards.txt` and `0.tar`, `1.tar`, ...
"""

import logging
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
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
from modeling_dclip.data.files import (
    decode_text,
    parse_json,
    read_bytes,
    replacing,
    temporary_folder,
    user_cache_dir,
    writing,
)
from modeling_dclip.data.labels.prompts import NAMES_FILE, TEMPLATES_FILE, parse_lines
from modeling_dclip.data.reinforced.shards import (
    IMAGE_MEMBERS,
    MOST_TEXT_BYTES,
    UNREADABLE_ARRAYS,
    DamagedSampleError,
    SamplePlace,
    as_problem,
    is_plain_text,
    read_array,
    scan_shard,
)
from modeling_dclip.data.rows import CAPTION_FEATURES, clean_captions, require_rows, require_unique
from modeling_dclip.data.specs import require_open_address
from modeling_dclip.encoders.fingerprints import combine_keys

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fsspec.implementations.http import HTTPFileSystem

_TIMEOUT_S = 60
_SETTLED_S = 60  # between a file's last change and its fetch, clocks of two machines included
_CHUNK_BYTES = 1 << 20
_SLOWEST_BYTES_PER_S = 1 << 10
_URL = re.compile(r"https?://")
# The page of a dataset on the Hub, or on a server like it, with or without a branch.
_HUB_PAGE = re.compile(r"(https?://[^/]+)/datasets/([^/]+/[^/]+)(?:/tree/([^/]+))?")
_HUB = "https://huggingface.co"
_TYPE_FILE = "dataset_type.txt"
_MULTILABEL, _RETRIEVAL = "multilabel", "retrieval"  # what it may say
_LABELLED = ("", "classification", _MULTILABEL)
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

    Raises:
        ValueError: If the address holds a password or a token.
    """

    def __init__(self, root: str, cache_dir: str | os.PathLike | None = None):
        require_open_address(root)
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
            ValueError: If it is not UTF-8, or too large for a text.
        """
        place = self.place(name)
        if self._hub is not None:
            content = read_bytes(self._fetch_from_hub(self._hub, name))
        elif self.remote:
            with _naming(place):
                content = _receive_text(_http_files(), place)
        else:
            path = Path(self.root, name)
            if not path.is_file():
                raise FileNotFoundError(f"No file '{path}'. Check the path and the split.")
            if path.stat().st_size > MOST_TEXT_BYTES:
                raise ValueError(f"Expected a text of at most {MOST_TEXT_BYTES >> 20} MiB at '{path}', got more.")
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
            ConnectionError: If the server cannot be reached, refuses, is too slow, or sends less than it said.
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

    def forget(self, path: Path) -> None:
        """Drop a fetched shard that is damaged, so that the next run fetches it again. A local one stays."""
        if self.remote and self._hub is None:
            path.unlink(missing_ok=True)

    def _fetch_over_http(self, name: str) -> Path:
        url, files = self.place(name), _http_files()
        with _naming(url):
            answer = files.info(url)
            version = _Version(answer.get("ETag"), answer.get("Last-Modified"), answer["size"])
        path = self._kept(url, name, version)
        if version.is_of(path):
            return path
        bar: dict[str, Any] = {"desc": f"Fetching {path.name}", "unit": "B", "unit_scale": True, "total": version.size}
        with writing(self.cache_dir):
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with temporary_folder(self.cache_dir, ".fetching.") as folder, tqdm(**bar) as progress:
                with _naming(url):
                    found = _receive_file(files, url, folder / path.name, progress)
                path = self._kept(url, name, found)  # another one, if the file changed after the question
                with replacing(path) as temporary:
                    shutil.move(folder / path.name, temporary)
        return path

    def _kept(self, url: str, name: str, version: "_Version") -> Path:
        tag = str(version.etag or version.modified)
        return self.cache_dir / combine_keys([url, tag, str(version.size)]) / Path(name).name


class _Version(NamedTuple):
    """What a server says of the state of a file."""

    etag: str | None
    modified: str | None
    size: int | None

    def is_of(self, path: Path) -> bool:
        """Whether a file that was fetched under this version is what the server has now.

        A time alone says so only if the file was fetched well after it: within one second a file may change twice.
        """
        if not path.is_file() or self.size not in (None, path.stat().st_size):
            return False
        if self.etag or not self.modified:
            return bool(self.etag)
        try:
            modified = parsedate_to_datetime(self.modified).timestamp()
        except (ValueError, TypeError, OverflowError):
            return False
        return path.stat().st_mtime - modified > _SETTLED_S


async def _receive(files: "HTTPFileSystem", url: str, keep: Callable[[bytes], Any], most: int) -> _Version:
    session = await files.set_session()
    async with session.get(files.encode_url(url)) as answer:
        answer.raise_for_status()
        total, begun = 0, time.monotonic()
        async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
            keep(chunk)
            total, passed = total + len(chunk), time.monotonic() - begun
            if total > most:
                raise ConnectionError(f"Expected at most {most >> 20} MiB at '{url}', got more. Check the address.")
            if passed > _TIMEOUT_S and total < passed * _SLOWEST_BYTES_PER_S:
                raise ConnectionError(f"'{url}' came too slowly ({total} bytes in {passed:.0f} s). Try again later.")
        plain = answer.headers.get("Content-Encoding", "identity") in ("identity", "")
        size = answer.content_length if plain else None
        return _Version(answer.headers.get("ETag"), answer.headers.get("Last-Modified"), size)


def _receive_text(files: "HTTPFileSystem", url: str) -> bytes:
    from fsspec.asyn import sync

    content = bytearray()
    sync(files.loop, _receive, files, url, content.extend, MOST_TEXT_BYTES)
    return bytes(content)


def _receive_file(files: "HTTPFileSystem", url: str, path: Path, progress: tqdm) -> _Version:
    from fsspec.asyn import sync

    with path.open("wb") as file:

        def keep(chunk: bytes) -> None:
            file.write(chunk)
            progress.update(len(chunk))

        return sync(files.loop, _receive, files, url, keep, sys.maxsize)


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
    except (aiohttp.ClientError, FSTimeoutError, FileNotFoundError, UnicodeError) as error:
        # `info` of fsspec raises FileNotFoundError for every failure; the cause says which one it was.
        reason = (error.__cause__ or error) if isinstance(error, FileNotFoundError) else error
        status = reason.status if isinstance(reason, aiohttp.ClientResponseError) else None
        if isinstance(reason, FileNotFoundError) or status in _NO_FILE:
            raise FileNotFoundError(
                f"No file at '{url}' (HTTP status {status or 404}). Check the address and the split."
            ) from error
        if isinstance(reason, (aiohttp.InvalidURL, UnicodeError)):
            raise ValueError(f"Expected an address, got '{url}' ({one_line(reason)}). Check it.") from error
        if isinstance(reason, aiohttp.TooManyRedirects):
            raise ConnectionError(f"'{url}' is redirected in a circle. Check the address.") from error
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


def _count_shards(files: WebdatasetFiles, split: str) -> int:
    counted = f"{split}/nshards.txt"
    count = files.text(counted).strip()
    if not re.fullmatch(r"[0-9]{1,9}", count) or int(count) < 1:
        raise ValueError(f"Expected the number of shards in '{files.place(counted)}', got {count[:40]!r}.")
    if not files.remote and Path(files.root, split, f"{int(count)}.tar").is_file():
        logger.warning("'%s' says %s, so that '%s.tar' beside it is not read", files.place(counted), count, int(count))
    return int(count)


def _dataset_type(files: WebdatasetFiles) -> str:
    return (files.find_text(_TYPE_FILE) or "").strip().lower()


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
    count, kind = _count_shards(files, split), _dataset_type(files)
    if kind == _RETRIEVAL:
        raise ValueError(
            f"'{files.place(_TYPE_FILE)}' says 'retrieval': the set has captions and no classes. Evaluate it with "
            f"retrieval=wds:{files.root}:{split} instead of zero_shot."
        )
    if kind not in _LABELLED:
        raise ValueError(f"Expected one of {_LABELLED[1:]} in '{files.place(_TYPE_FILE)}', got {kind[:40]!r}.")
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
        n_shards=count,
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
    feature = List(Value("int8"), length=classes) if description.multilabel else label_feature(description.class_names)
    features = Features(image_id=Value("string"), image=Image(), label=feature)

    def read(place: SamplePlace, content: pa.Buffer) -> _Sample:
        return _read_sample(place, content, description.multilabel, classes)

    return _read_rows(files, split, description.n_shards, read, features)


def read_captioned(root: str, split: str = "test", *, cache_dir: str | None = None) -> Dataset:
    """Read the images and captions of a `clip-benchmark/wds_*` set for retrieval.

    The captions are the lines of `KEY.txt`, or where a sample has none what `KEY.json` holds under `captions` (a list
    of texts) or `caption`.

    Args:
        root (`str`): A folder or an address, as in [`WebdatasetFiles`].
        split (`str`, *optional*, defaults to `"test"`): The folder of the shards.
        cache_dir (`str`, *optional*): Where fetched files are kept, as in [`WebdatasetFiles`].

    Returns:
        `datasets.Dataset`: `image_id` (`NAME/SPLIT/N.tar/MEMBER`), `image`, `captions`, in the order of the shards.

    Raises:
        ConnectionError: If a server cannot be reached or refuses.
        FileNotFoundError: If there is no `nshards.txt`, or a shard is missing.
        ValueError: If the set is one for classification, a shard is damaged, or a sample has not exactly one picture
            with its captions. The message names shard and sample.
    """
    files = WebdatasetFiles(root, cache_dir)
    count, kind = _count_shards(files, split), _dataset_type(files)
    if kind not in ("", _RETRIEVAL):
        raise ValueError(
            f"Expected 'retrieval' in '{files.place(_TYPE_FILE)}', got {kind[:40]!r}: the set has classes and no "
            f"captions. Evaluate it with zero_shot=wds:{files.root}:{split} instead."
        )
    dataset = _read_rows(files, split, count, _read_captions, CAPTION_FEATURES)
    ids, name = dataset["image_id"][:], f"'{files.place(split)}'"
    keep = clean_captions(ids, dataset["captions"][:], name)[1]
    require_rows(len(keep), name)
    return dataset if len(keep) == len(ids) else dataset.select(keep)


class _Sample(NamedTuple):
    member: str  # of the picture
    start: int
    end: int
    value: int | np.ndarray | list[str]  # its label or its captions


def _read_rows(
    files: WebdatasetFiles,
    split: str,
    n_shards: int,
    read: Callable[[SamplePlace, pa.Buffer], _Sample],
    features: Features,
) -> Dataset:
    """The rows of all shards: id, picture, and the value that `read` gives."""
    tables, rows, identity, start = [], [], [], 0
    seen: list[str] = []
    for number in range(n_shards):
        path = files.shard(f"{split}/{number}.tar")
        status = path.stat()
        identity.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
        try:
            content = _map(path)
            samples = [read(place, content) for place in _scan(path)]
        except ValueError as error:
            files.forget(path)
            if not files.remote:
                raise
            raise ValueError(f"{error} It came from '{files.place(f'{split}/{number}.tar')}'.") from error
        ids = [f"{files.name}/{split}/{number}.tar/{sample.member}" for sample in samples]
        seen += ids
        for part in _within_reach(samples, path):
            tables.append(_table(content, samples[part], ids[part], features))
            rows.append(np.arange(start, start + len(tables[-1]), 2))
            start += len(tables[-1])
    require_unique(seen, f"'{files.place(split)}'")
    # The default fingerprint would read all that the table points at, so this one is made from the files' states. It
    # names no cache: what is kept between runs is keyed by the pictures' bytes.
    info, fingerprint = DatasetInfo(features=features), combine_keys(identity)
    return Dataset(pa.concat_tables(tables), info=info, fingerprint=fingerprint).select(np.concatenate(rows))


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


def _picture(place: SamplePlace, kinds: Sequence[str], what: str) -> tuple[str, str]:
    """The members of a sample's one picture and of what belongs to it, the first of the kinds that is there."""
    pictures = [kind for kind in IMAGE_MEMBERS if kind in place.members]
    other = next((kind for kind in kinds if kind in place.members), None)
    repeated = [kind for kind in place.members if kind.endswith(" (repeated)")]
    if len(pictures) != 1 or other is None or repeated:
        problem = f"expected one picture ({', '.join(IMAGE_MEMBERS)}) and {what}, got {sorted(place.members)}"
        raise _damaged(place.shard, problem, place.key)
    return pictures[0], other


def _content(place: SamplePlace, member: str, content: pa.Buffer) -> bytes:
    offset, size = place.members[member]
    if size > MOST_TEXT_BYTES:
        raise _wrong_member(place, member, f"expected at most {MOST_TEXT_BYTES >> 20} MiB, got {size} bytes")
    return content[offset : offset + size].to_pybytes()


def _sample(place: SamplePlace, picture: str, value: int | np.ndarray | list[str]) -> _Sample:
    start, size = place.members[picture]
    return _Sample(f"{place.key}.{picture}", start, start + size, value)


def _read_sample(place: SamplePlace, content: pa.Buffer, multilabel: bool, classes: int) -> _Sample:
    kinds = ("npy", "cls") if multilabel else ("cls",)
    what = (
        f"one label ({' or '.join(kinds)}; a set with several labels per image says '{_MULTILABEL}' in {_TYPE_FILE}, "
        f"one with captions '{_RETRIEVAL}')"
    )
    picture, label = _picture(place, kinds, what)
    read = _read_vector if multilabel else _read_class
    return _sample(place, picture, read(place, label, _content(place, label, content), classes))


def _read_captions(place: SamplePlace, content: pa.Buffer) -> _Sample:
    picture, member = _picture(place, ("txt", "json"), "captions (txt or json)")
    stored = _content(place, member, content)
    try:
        if member == "txt":
            captions: Any = decode_text(stored, member).split("\n")
        else:
            source = parse_json(stored, "it", "")
            captions = source.get("captions", [source.get("caption")]) if isinstance(source, dict) else None
    except ValueError as error:
        raise _wrong_member(place, member, as_problem(error)) from error
    if not isinstance(captions, list) or not all(map(is_plain_text, captions)):
        raise _wrong_member(place, member, f"expected captions, got {captions!r:.80}")
    return _sample(place, picture, [text.strip() for text in captions if text.strip()])


def _wrong_member(place: SamplePlace, member: str, problem: str) -> ValueError:
    return _damaged(place.shard, problem, place.key, member)


def _read_class(place: SamplePlace, member: str, content: bytes, classes: int) -> int:
    if not re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", content):
        problem = (
            f"expected the number of a class, got {content[:40]!r}; a set with several labels per image says "
            f"'{_MULTILABEL}' in {_TYPE_FILE}"
        )
        raise _wrong_member(place, member, problem)
    label = int(content)
    if not 0 <= label < classes:
        problem = f"expected a label in [0, {classes}), one per line of classnames.txt, got {label}"
        raise _wrong_member(place, member, problem)
    return label


def _read_vector(place: SamplePlace, member: str, content: bytes, classes: int) -> np.ndarray:
    try:
        if member == "npy":
            vector = read_array(content)
        else:
            vector = np.array([int(one) for one in re.findall(r"[^\s,\[\]]+", content.decode())])
    except UNREADABLE_ARRAYS as error:
        problem = f"expected a vector of zeros and ones, got damage ({one_line(error)})"
        raise _wrong_member(place, member, problem) from error
    if vector.shape != (classes,):
        problem = f"expected {classes} values, one per line of classnames.txt, got the shape {vector.shape}"
        raise _wrong_member(place, member, problem)
    if not np.isin(vector, (0, 1)).all():
        raise _wrong_member(place, member, f"expected zeros and ones, got {vector[~np.isin(vector, (0, 1))][0]!r}")
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
    values = _column([sample.value for sample in samples])
    columns = {"image_id": pa.array(ids).take(pa.array(spread)), "image": images}
    columns[next(name for name in features if name not in columns)] = values.take(pa.array(spread))
    return pa.table(columns, schema=features.arrow_schema)


def _column(values: list[Any]) -> pa.Array:
    if isinstance(values[0], np.ndarray):
        return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(values)), len(values[0]))
    return pa.array(values, pa.list_(pa.string()) if isinstance(values[0], list) else pa.int64())
