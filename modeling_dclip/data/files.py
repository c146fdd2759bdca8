"""Files that are whole or not there: the one way this package writes what a later run will read."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_new_folder(folder: str | os.PathLike) -> None:
    """Say early that an output folder is taken.

    Raises:
        FileExistsError: If it is a file, or a folder with something in it.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"Expected a new or an empty folder at {folder}, got one in use. Choose another.")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there at the end: whoever looks sees all of it or nothing.

    Folders on the way are made. A file that is replaced hands its permissions on.

    Args:
        path (`str` or `os.PathLike`): A file, or a folder that does not exist yet.

    Yields:
        `Path`: Where to write. If the writing fails, nothing stays of it and what was at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary / path.name
        if path.is_file():
            shutil.copymode(path, temporary / path.name)
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all. Folders are made."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused (`ValueError`)."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
