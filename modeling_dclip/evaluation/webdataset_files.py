"""The files of a `clip-benchmark/wds_*` set, in a folder or behind http: small texts are read, shards are fetched once.

    ROOT/classnames.txt  ROOT/zeroshot_classification_templates.txt  ROOT/dataset_type.txt (multilabel, retrieval, or no file)
    ROOT/SPLIT/nshards.txt  ROOT/SPLIT/0.tar  ROOT/SPLIT/1.tar ...

A shard is streamed to a folder of the user's cache, a block at a time, and is there whole or not at all: a run that was cut off goes on at
the shard it was at, and another model or run finds all of them. Its key is the address with what the server says of the content.
"""

import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from modeling_dclip.data.columns import combine_keys
from modeling_dclip.data.files import replacing

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_URL = re.compile(r"https?://")
# A dataset's page on the Hub, with or without a branch: its files are elsewhere.
_HUB_PAGE = re.compile(r"(https?://[^/]+/datasets/[^/]+/[^/]+)(?:/tree/([^/]+))?")
_NO_FILE = (401, 404, 410)  # 401 is the Hub's answer for a dataset that does not exist


def is_url(root: str) -> bool:
    """Whether a root is read over http."""
    return bool(_URL.match(root))


def default_cache_dir() -> Path:
    """`modeling_dclip/shards` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modeling_dclip" / "shards"


class WebdatasetFiles:
    """Where a set is, and how to get at its files.

    Args:
        root (`str`): A folder, or an address that begins with `http://` or `https://`: of the folder, or of a dataset's page on the Hub.
        cache_dir (`str` or `Path`, *optional*): Where shards that come over http are kept; [`default_cache_dir`] if not given.
    """

    def __init__(self, root: str, cache_dir: str | os.PathLike | None = None):
        self.root = root.rstrip("/")
        self.remote = is_url(root)
        if page := _HUB_PAGE.fullmatch(self.root):
            self.root = f"{page[1]}/resolve/{page[2] or 'main'}"
            self.name = page[1].rsplit("/", 1)[1]
        else:
            self.name = self.root.rsplit("/", 1)[-1] if self.remote else Path(root).resolve().name
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()

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
            content = path.read_bytes()
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected UTF-8 text in '{self.place(name)}', got other bytes ({error}).") from error

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
