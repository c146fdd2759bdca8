"""Files that are whole or not there: the one way this package writes what a later run will read."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
