"""The files of a reinforced dataset: which there are, and which samples each holds.

A shard is a tar in the webdataset layout: the members of a sample follow each other and share a key, which is their
name up to the first dot. Members are found by their headers alone and read when their sample is drawn, so neither
shuffling nor resuming reads pictures.
"""

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

INDEX_NAME = "reinforced.json"
_BLOCK = 512  # bytes of a tar header; members are padded to a multiple


class DamagedSampleError(ValueError):
    """A shard, sample or member that cannot be used; the message names all three, what was expected and what came."""

    # Not in the constructor: a data loader's worker hands its error over by the message alone.
    shard: Path | None = None
    key: str | None = None
    member: str | None = None

    @classmethod
    def at(cls, shard: Path, problem: str, key: str | None = None, member: str | None = None) -> "DamagedSampleError":
        """The error of a place."""
        place = f"Shard '{shard}'"
        place += f", sample {key!r}" if key is not None else ""
        place += f", member {member!r}" if member is not None else ""
        remedy = "Download or write the shard again, or pass on_bad_sample='skip' to leave out what is damaged."
        error = cls(f"{place}: {problem}. {remedy}")
        error.shard, error.key, error.member = shard, key, member
        return error


class SamplePlace(NamedTuple):
    """Where a sample is.

    Args:
        shard (`Path`): The tar file.
        key (`str`): The sample's.
        members (`dict[str, tuple[int, int]]`): Offset and size in bytes, by what follows the key.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]


class ShardFiles:
    """Open shards, to read members by their places. Not to be shared by processes.

    Args:
        limit (`int`, *optional*, defaults to 32): Files kept open; the one opened first is closed for another.
    """

    def __init__(self, limit: int = 32):
        self.limit = limit
        self._open: dict[Path, io.BufferedReader] = {}

    def read(self, place: SamplePlace, member: str) -> bytes:
        """The bytes of a member.

        Raises:
            DamagedSampleError: If the sample lacks it, has it twice, or the file ends before it.
        """
        if f"{member} (repeated)" in place.members:
            raise DamagedSampleError.at(place.shard, "expected it once, got it twice", place.key, member)
        if member not in place.members:
            raise DamagedSampleError.at(place.shard, f"expected it, got {sorted(place.members)}", place.key, member)
        if place.shard not in self._open:
            while len(self._open) >= self.limit:
                self._open.pop(next(iter(self._open))).close()
            self._open[place.shard] = open(place.shard, "rb")
        offset, size = place.members[member]
        self._open[place.shard].seek(offset)
        content = self._open[place.shard].read(size)
        if len(content) < size:
            raise DamagedSampleError.at(place.shard, f"expected {size} bytes, got {len(content)}", place.key, member)
        return content

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._open.popitem()[1].close()


def find_shards(spec: str | Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The shards a spec names.

    Args:
        spec (`str` or `Path`): A folder, a tar file, or a pattern: `*` and `?` as in a shell, `{0000..0123}` for
            numbers, `{a,b}` for alternatives.

    Returns:
        `tuple`: Paths in order of name, and the index written beside them (`reinforced.json`) if the spec is its folder.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the index is malformed or its dataset is not finished.
    """
    folder = Path(spec)
    if folder.is_dir():
        index = read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
        names = sorted(folder.glob("*.tar")) if index is None else [folder / one["file"] for one in index["shards"]]
    else:
        index = None
        names = []
        for pattern in _expand_braces(str(spec)):
            found = sorted(map(Path, glob.glob(pattern)))  # a plain name finds itself
            if not found:
                raise FileNotFoundError(f"No shard '{pattern}' (of the spec {str(spec)!r}). Check the path.")
            names += found
    if not names:
        raise FileNotFoundError(f"No *.tar in the folder '{spec}'. Check the path.")
    missing = [path for path in names if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} shards are missing, first: '{missing[0]}'.")
    return names, index


def read_index(path: Path) -> dict[str, Any]:
    """The index of a dataset that is finished.

    Raises:
        ValueError: If it is malformed, or its dataset is not finished.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards, _ = index["shards"], [(one["width"], one["logit_scale"]) for one in index["teachers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The index '{path}' is malformed ({error!r}). Write the dataset again.") from error
    if not shards:
        raise ValueError(
            f"The dataset of '{path}' is not finished. Run its command again: it goes on where it stopped."
        )
    return index


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    parts = match[1].split(",")
    if numbers is not None:
        parts = [str(n).zfill(len(numbers[1])) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    return [one for part in parts for one in _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def _plain_member(header: bytes) -> tuple[str, int] | None:
    """Name and size of an ordinary file, or of a header for the whole archive, for which the name is empty.

    `None` for anything else: tarfile had better read that. It reads these too, at a quarter of the speed.
    """
    if header[156:157] not in (b"0", b"\0", b"g") or header[345:346] != b"\0":
        return None
    try:
        name, size = header[:100].rstrip(b"\0").decode(), int(header[124:136].rstrip(b"\0 "), 8)
        checksum = int(header[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    if sum(header) - sum(header[148:156]) + 256 != checksum:
        return None
    return "" if header[156:157] == b"g" else name, size


def _split_name(name: str) -> tuple[str, str]:
    """Key and kind of a member: `folder/000.syn.json` is `folder/000` and `syn.json`."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def _truncated(path: Path, name: str, size: int) -> DamagedSampleError:
    return DamagedSampleError.at(path, f"expected {size} bytes, got the end of the file", *_split_name(name))


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar, by its headers."""
    with open(path, "rb", buffering=0) as file:
        end, offset = path.stat().st_size, 0
        while offset < end:
            file.seek(offset)
            member = _plain_member(file.read(_BLOCK))
            if member is None:
                yield from _other_members(path, file, offset)
                return
            name, size = member
            if offset + _BLOCK + size > end:
                raise _truncated(path, name, size)
            if name:
                yield name, offset + _BLOCK, size
            offset += _BLOCK + -(-size // _BLOCK) * _BLOCK
    raise DamagedSampleError.at(path, f"expected the archive's closing zeros, got the end of the file at byte {end}")


def _other_members(path: Path, file: io.FileIO, offset: int) -> Iterator[tuple[str, int, int]]:
    """The rest of a tar, from a header on that is not plain: the end of the archive, long names, or damage."""
    end = path.stat().st_size
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isreg() and info.offset_data + info.size > end:
                    raise _truncated(path, info.name, info.size)
                if info.isreg():
                    yield info.name, info.offset_data, info.size
            offset = tar.offset
        problem = "no header of a member"
        file.seek(offset)
        if not file.read(_BLOCK).strip(b"\0"):  # tarfile takes damage after the first member for the end
            return
    except tarfile.TarError as error:
        problem = str(error)
    raise DamagedSampleError.at(
        path, f"expected an uncompressed tar, got damage at or after byte {offset} ({problem})"
    )


def scan_shard(path: Path) -> Iterator[SamplePlace]:
    """The samples of a shard, in its order, without reading them.

    Raises:
        DamagedSampleError: If the tar is damaged or holds no sample; after the samples that come before the damage.
    """
    current, members = None, {}
    try:
        for name, offset, size in _members(path):
            key, kind = _split_name(name)
            if not kind or not key or key.endswith("/"):
                continue  # no member of a sample: a name without a dot, or a hidden file
            if key != current:
                if members:
                    yield SamplePlace(path, current, members)
                current, members = key, {}
            # A second member of a name would hide the first; no reader of a sample expects this one.
            members[kind if kind not in members else f"{kind} (repeated)"] = (offset, size)
    except DamagedSampleError as error:
        if members and error.key != current:
            yield SamplePlace(path, current, members)
        raise
    if not members:
        raise DamagedSampleError.at(path, "expected samples, got an empty shard")
    yield SamplePlace(path, current, members)
