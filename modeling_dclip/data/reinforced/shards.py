"""Read, check and pack the samples of a reinforced dataset.

| member | what |
|---|---|
| `jpg`, `jpeg`, `png` or `webp` | the stored image |
| `txt` | one caption, or a JSON list of captions |
| `json` | about the source; a list under `captions` is read where `txt` is missing |
| `syn.json` | `{"syn_text": [synthetic captions]}`, maybe more such keys |
| `paug.json` | `{"param_aug": [augmentations]}`, or a JSON string of that list; one is [`StoredAugmentation`] |
| `npz` or `pth.gz` | `image_emb (augmentations, W)` and `text_emb (captions + synthetic captions, W)` |

`text_emb` may hold the captions only; then each key of synthetic captions has a `<key>_emb` beside it.
"""

import gzip
import io
import json
import math
import pickle
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from modeling_dclip.data.failures import one_line
from modeling_dclip.data.files import (
    decode_text,
    is_utf8,
    list_folder,
    match_files,
    parse_json,
    read_json,
    require_field,
)
from modeling_dclip.data.images import open_image, read_header
from modeling_dclip.progress import count_of

INDEX_NAME = "reinforced.json"
MOST_SHARDS = 100_000  # that one pattern may name; DataCompDR-1B has 65,536
# Bytes of a member, and of what it holds unpacked. A sample of DataCompDR has 100 KB of embeddings and 2 KB of texts.
MOST_TEXT_BYTES, MOST_ARRAY_BYTES = 16 << 20, 256 << 20
_BLOCK = 512  # bytes of a tar header; members are padded to a multiple
_MOST_NAME_BYTES = 1 << 20  # of the headers that hold a long name or more of a member's fields


class DamagedSampleError(ValueError):
    """A shard, sample or member that cannot be used; the message names all three, what was expected and what came."""

    # Set by `at`, not by the constructor: a data loader's worker rebuilds its error from the message alone.
    shard: Path | None = None
    key: str | None = None
    member: str | None = None
    problem: str = ""

    @classmethod
    def at(cls, shard: Path, problem: str, key: str | None = None, member: str | None = None) -> "DamagedSampleError":
        """The error of a shard, a sample or a member."""
        place = f"Shard '{shard}'"
        place += f", sample {key!r}" if key is not None else ""
        place += f", member {member!r}" if member is not None else ""
        remedy = "Download or write the shard again, or leave out what is damaged with --dmclip.on_bad_sample skip."
        error = cls(f"{place}: {problem}. {remedy}")
        error.shard, error.key, error.member, error.problem = shard, key, member, problem
        return error


def as_problem(error: ValueError) -> str:
    """What a reader of texts or JSON says, as a part of a message that names the member."""
    message = one_line(error).rstrip(". ")
    return message[:1].lower() + message[1:]


def _unreadable(error: OSError) -> str:
    return f"expected a file that can be read, got {error.strerror or error}"


class SamplePlace(NamedTuple):
    """Where a sample is.

    Args:
        shard (`Path`): The tar file.
        key (`str`): The sample's.
        members (`dict[str, tuple[int, int]]`): Offset and size in bytes of each member, by its name after the key.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]


class ShardFiles:
    """Open shards, to read members by their places. Each process needs its own.

    Args:
        limit (`int`, *optional*, defaults to 32): Files kept open. Beyond it, the file opened first is closed.
    """

    def __init__(self, limit: int = 32):
        self.limit = limit
        self._open: dict[Path, io.BufferedReader] = {}

    def read(self, place: SamplePlace, member: str, most: int = MOST_ARRAY_BYTES) -> bytes:
        """The bytes of a member.

        Args:
            place ([`SamplePlace`]): The sample.
            member (`str`): Which.
            most (`int`, *optional*): Bytes that it may have; nothing is read of a larger one.

        Raises:
            DamagedSampleError: If the sample lacks the member or has it twice, it is too large, or the file ends
                before it or cannot be read.
        """
        if f"{member} (repeated)" in place.members:
            raise DamagedSampleError.at(place.shard, "expected it once, got it twice", place.key, member)
        if member not in place.members:
            raise DamagedSampleError.at(place.shard, f"expected it, got {sorted(place.members)}", place.key, member)
        offset, size = place.members[member]
        if size > most:
            problem = f"expected at most {most >> 20} MiB, got {size} bytes"
            raise DamagedSampleError.at(place.shard, problem, place.key, member)
        try:
            if place.shard not in self._open:
                while len(self._open) >= self.limit:
                    self._open.pop(next(iter(self._open))).close()
                self._open[place.shard] = open(place.shard, "rb")
            self._open[place.shard].seek(offset)
            content = self._open[place.shard].read(size)
        except OSError as error:
            raise DamagedSampleError.at(place.shard, _unreadable(error), place.key, member) from error
        if len(content) < size:
            raise DamagedSampleError.at(place.shard, f"expected {size} bytes, got {len(content)}", place.key, member)
        return content

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()


def find_shards(spec: str | Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The shards a spec names.

    Args:
        spec (`str` or `Path`): A folder, a tar file, or a pattern: `*` and `?` as in a shell, `{0000..0123}` for
            numbers, `{a,b}` for alternatives.

    Returns:
        `tuple`: Paths in order of name, and the index written beside them (`reinforced.json`) if the spec is its
            folder.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If the index is malformed or its dataset is not finished, or a pattern names too many shards.
    """
    folder = Path(spec)
    names: list[Path] = []
    if folder.is_dir():
        index = read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
        names = list_folder(folder, "*.tar") if index is None else [folder / one["file"] for one in index["shards"]]
    else:
        index = None
        for pattern in [str(spec)] if folder.is_file() else _expand_braces(str(spec)):
            found = match_files(pattern)
            if not found:
                raise FileNotFoundError(f"No shard '{pattern}' (of the spec {str(spec)!r}). Check the path.")
            names += found
    names = list(dict.fromkeys(names))  # two patterns may name one shard
    if not names:
        raise FileNotFoundError(f"No *.tar in the folder '{spec}'. Check the path.")
    missing = [path for path in names if not path.is_file()]
    if missing:
        is_missing = "is missing" if len(missing) == 1 else "are missing"
        raise FileNotFoundError(
            f"{len(missing):,} of {count_of(len(names), 'shard')} {is_missing}, first: '{missing[0]}'."
        )
    return names, index


def _require_count(entry: Any, key: str, where: str, path: Path, least: int) -> int:
    number = require_field(entry, key, where, path, int)
    if not least <= number < 1 << 40:
        raise ValueError(f"{where} of '{path}': expected {key!r} of at least {least}, got {number}.")
    return number


def read_index(path: Path) -> dict[str, Any]:
    """The index of a dataset that is finished.

    Raises:
        ValueError: If it is malformed, names a file outside its folder, or its dataset is not finished.
    """
    try:
        index = read_json(path, "index", ("shards", "teachers", "settings"), "Write the dataset again.")
        if not require_field(index, "shards", "The index", path, list):
            raise ValueError(
                f"The dataset of '{path}' is not finished. Run its command again: it goes on where it stopped."
            )
        for number, shard in enumerate(index["shards"]):
            name = require_field(shard, "file", f"Shard {number}", path, str)
            if name != Path(name).name or name in ("", "..") or "\0" in name:
                raise ValueError(
                    f"Shard {number} of '{path}': expected the name of a file beside it under 'file', got {name!r}."
                )
            _require_count(shard, "samples", f"Shard {number}", path, 0)
        for number, teacher in enumerate(require_field(index, "teachers", "The index", path, list)):
            _require_count(teacher, "width", f"Teacher {number}", path, 1)
            scale = require_field(teacher, "logit_scale", f"Teacher {number}", path, (int, float))
            if not abs(scale) < math.log(1e6):
                raise ValueError(f"Teacher {number} of '{path}': expected a logarithm as logit_scale, got {scale}.")
        _require_count(require_field(index, "settings", "The index", path, dict), "image_size", "Settings", path, 1)
        counts = require_field(index, "counts", "The index", path, dict)
        _require_count(counts, "synthetic_captions", "Counts", path, 0)
    except ValueError as error:
        if "is not finished" in str(error):
            raise
        raise ValueError(f"The index '{path}' is malformed: {error} Write the dataset again.") from error
    return index


def _alternatives(inside: str) -> list[str] | None:
    """What stands for a pair of braces with this inside; `None` where braces are to be read as they are."""
    numbers = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ValueError(f"Expected {{FIRST..LAST}} with FIRST <= LAST, got '{{{inside}}}'. Swap the numbers.")
        if last - first >= MOST_SHARDS:
            raise ValueError(f"Expected at most {MOST_SHARDS} shards, got '{{{inside}}}'. Check the last number.")
        padded = any(len(one) > 1 and one.startswith("0") for one in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        return [str(number).zfill(width) for number in range(first, last + 1)]
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            parts.append(inside[start:place])
            start = place + 1
    return [*parts, inside[start:]] if parts else None


def _closing(pattern: str, start: int) -> int | None:
    depth = 0
    for place in range(start, len(pattern)):
        depth += (pattern[place] == "{") - (pattern[place] == "}")
        if not depth:
            return place
    return None


def _expand_braces(pattern: str) -> list[str]:
    """The patterns that braces stand for, as in a shell: `{0000..0123}` and `{a,b}`, one inside another too.

    Raises:
        ValueError: If they are more than [`MOST_SHARDS`], or numbers go down.
    """
    if pattern.count("{") > 20:
        raise ValueError(f"Expected at most 20 pairs of braces, got {pattern.count('{')} in '{pattern:.80}'.")
    for match in re.finditer(r"\{", pattern):
        start, end = match.start(), _closing(pattern, match.start())
        parts = None if end is None else _alternatives(pattern[start + 1 : end])
        if end is not None and parts is not None:
            heads = [one for part in parts for one in _expand_braces(part)]
            tails = _expand_braces(pattern[end + 1 :])
            if len(heads) * len(tails) > MOST_SHARDS:
                raise ValueError(f"Expected at most {MOST_SHARDS} shards, got more by the braces of '{pattern}'.")
            return [pattern[:start] + head + tail for head in heads for tail in tails]
    return [pattern]


_OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)


class _Header(NamedTuple):
    """A header of a tar: what it is of, its name, and the bytes of content that follow."""

    kind: bytes
    name: str
    size: int


def _decode_name(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _read_number(field: bytes) -> int:
    """A number of a header: octal digits, or where the first bit is set bytes.

    Raises:
        ValueError: If it is neither, or negative.
    """
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise ValueError(f"no number: {field!r}")
    return int(digits[1] or b"0", 8)


def _read_tar_header(header: bytes) -> _Header:
    """Take a header apart.

    Raises:
        ValueError: If it is none.
    """
    if len(header) < _BLOCK:
        raise ValueError("no header of a member")
    checksum, total = _read_number(header[148:156]), sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if checksum != total and (total - checksum) % 256:  # old tars summed signed bytes
        raise ValueError("no header of a member: its checksum is wrong")
    name, kind = _decode_name(header[:100]), header[156:157]
    if header[257:263] == b"ustar\0" and kind not in b"LKS" and header[345:346] != b"\0":
        name = f"{_decode_name(header[345:500])}/{name}"
    if kind == b"\0" and name.endswith("/"):
        kind = b"5"  # as old tars write a folder
    return _Header(kind, name, _read_number(header[124:136]))


def _pax_fields(content: bytes) -> dict[bytes, bytes]:
    """The fields of an extended header: `LENGTH KEY=VALUE` and a line break, one after the other.

    Raises:
        ValueError: If it has another form.
    """
    fields: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        end = int(length) if re.fullmatch(rb"[0-9]{1,7}", length) else 0
        record = content[len(length) + 1 : end]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(content):
            raise ValueError("a malformed extended header")
        fields[key], content = value[:-1], content[end:]
    return fields


_FILE_KINDS = (b"0", b"\0", b"7")
_NO_FILES = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a sparse file"}


class _Member(NamedTuple):
    """A member of a tar that has a name: where its content is, and what it is if it is no ordinary file."""

    name: str
    offset: int
    size: int
    what: str = ""


def _truncated(path: Path, name: str, size: int) -> DamagedSampleError:
    return DamagedSampleError.at(path, f"expected {size} bytes, got the end of the file", *_split_name(name))


def _members(path: Path) -> Iterator[_Member]:
    """The members of a tar, folders left out, by its headers alone; no content is read."""
    fields: dict[bytes, bytes] = {}  # of the next member: a long name, a size
    with open(path, "rb", buffering=0) as file:
        end, offset = path.stat().st_size, 0
        while offset < end:
            file.seek(offset)
            block = file.read(_BLOCK)
            if block[:1] == b"\0" and len(block) == _BLOCK and not block.strip(b"\0"):
                return
            try:
                kind, name, size = _read_tar_header(block)
                if kind in b"xLKg" and size > _MOST_NAME_BYTES:
                    raise ValueError(f"a header of {size} bytes")
                if fields:
                    size = _read_number(b"%o" % int(fields.get(b"size", size)))
                    name = _decode_name(fields[b"path"]) if b"path" in fields else name
                start, next_offset = offset + _BLOCK, offset + _BLOCK + -(-size // _BLOCK) * _BLOCK
                if kind in b"123456":
                    next_offset = start  # a size there is of no content
                elif start + size > end:
                    raise _truncated(path, name, size)
                if kind in b"xL":
                    content = file.read(size)
                    fields |= _pax_fields(content) if kind == b"x" else {b"path": content}
            except DamagedSampleError:
                raise
            except ValueError as error:
                problem = f"expected an uncompressed tar, got damage at or after byte {offset} ({error})"
                raise DamagedSampleError.at(path, problem) from error
            offset = next_offset
            if kind in b"xLKg":
                continue
            if kind != b"5":
                sparse = fields and any(key.startswith(b"GNU.sparse.") for key in fields)
                yield _Member(name, start, size, "a sparse file" if sparse else _NO_FILES.get(kind, ""))
            fields = {}
    raise DamagedSampleError.at(path, f"expected the archive's closing zeros, got the end of the file at byte {end}")


def read_shard_fields(path: Path) -> dict[str, str]:
    """The fields of the header for a whole shard; none if the shard is missing, has none or is damaged there."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        try:
            header = _read_tar_header(file.read(_BLOCK))
            fields = _pax_fields(file.read(min(header.size, _MOST_NAME_BYTES))) if header.kind == b"g" else {}
            return {key.decode(): value.decode() for key, value in fields.items()}
        except ValueError:
            return {}


def _split_name(name: str) -> tuple[str, str]:
    """Key and kind of a member: `folder/000.syn.json` is `folder/000` and `syn.json`."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def scan_shard(path: Path) -> Iterator[SamplePlace]:
    """The places of a shard's samples, in its order; only the headers are read.

    A member that cannot be read as it is gets a name that no reader expects, so that it is missed and named:
    `jpg (a link)`, and `txt (repeated)` where a sample has it twice or its key came before.

    Raises:
        DamagedSampleError: If the tar is damaged, after the samples before the damage; or if it holds no sample or
            cannot be read.
    """
    current = ""
    before: set[str] = set()
    members: dict[str, tuple[int, int]] = {}
    try:
        for name, offset, size, what in _members(path):
            key, kind = _split_name(name)
            if not kind or not key or key.endswith("/"):
                continue  # no member of a sample: a name without a dot, or a hidden file
            if key != current:
                if members:
                    yield SamplePlace(path, current, members)
                before.add(current)
                current, members = key, {}
            repeated = kind in members or key in before
            members[f"{kind} ({what})" if what else f"{kind} (repeated)" if repeated else kind] = (offset, size)
    except DamagedSampleError as error:
        if members and error.key != current:
            yield SamplePlace(path, current, members)
        raise
    except OSError as error:
        raise DamagedSampleError.at(path, _unreadable(error)) from error
    if not members:
        raise DamagedSampleError.at(path, "expected samples, got an empty shard")
    yield SamplePlace(path, current, members)


def _unpack(content: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked = file.read(MOST_ARRAY_BYTES + 1)
    if len(unpacked) > MOST_ARRAY_BYTES:
        raise ValueError(f"more than {MOST_ARRAY_BYTES >> 20} MiB unpacked")
    return unpacked


def read_array(content: bytes) -> np.ndarray:
    """The array of a `.npy` file. No object is unpickled, and nothing is allocated before the sizes fit.

    Raises:
        Any of [`UNREADABLE_ARRAYS`]: If it is damaged, or its header asks for more than follows it.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"expected the .npy format 1 or 2, got {version}")
    read_head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read_head(file)
    if dtype.hasobject:
        raise ValueError("objects, which are not unpickled (allow_pickle is False)")
    count, there = math.prod(shape), len(content) - file.tell()
    if min(shape, default=1) < 0 or count * dtype.itemsize != there:
        raise ValueError(f"expected {count * dtype.itemsize} bytes for the shape {shape}, got {there}")
    array = np.frombuffer(content, dtype, count, file.tell())
    return array.reshape(shape, order="F" if by_columns else "C").copy()


def _check_archive(archive: zipfile.ZipFile) -> None:
    """Refuse a zip file that would unpack to more than [`MOST_ARRAY_BYTES`]."""
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    if total > MOST_ARRAY_BYTES:
        raise ValueError(f"expected at most {MOST_ARRAY_BYTES >> 20} MiB unpacked, got {total} bytes")
    if wrong := [entry for entry in entries if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]:
        raise ValueError(f"{wrong[0].filename!r} is compressed in a way that is not read ({wrong[0].compress_type})")


IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
ARRAY_MEMBERS = ("npz", "pth.gz")
SYNTHETIC_KEYS = r"syn_text.*"
# What numpy, zipfile and torch raise for damaged arrays.
UNREADABLE_ARRAYS = (
    *(OSError, EOFError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error),
    *(SyntaxError, tokenize.TokenError, MemoryError, AssertionError),  # odd headers of .npy, odd pickles
)


class Sample(NamedTuple):
    """A sample as stored, its counts checked.

    Args:
        image (`bytes`): Encoded.
        image_member (`str`): The name of the image's member, for messages.
        captions (`list[str]`): C >= 1 captions.
        synthetic_captions (`list[str]`): S >= 0 synthetic captions.
        augmentations (`list`): A >= 1 augmentations, as JSON holds them.
        image_embeds (`torch.Tensor` of shape `(A, W)`): Of the augmented images; finite, any float type.
        text_embeds (`torch.Tensor` of shape `(C + S, W)`): Of the captions, then of the synthetic captions; finite,
            any float type.
    """

    image: bytes
    image_member: str
    captions: list[str]
    synthetic_captions: list[str]
    augmentations: list[Any]
    image_embeds: torch.Tensor
    text_embeds: torch.Tensor


def _present(place: SamplePlace, members: Sequence[str], what: str) -> str:
    found = [member for member in members if member in place.members]
    if not found:
        problem = f"expected {what}, got the members {sorted(place.members)}"
        raise DamagedSampleError.at(place.shard, problem, place.key, " or ".join(members))
    return found[0]


def is_plain_text(value: Any) -> bool:
    """Whether a value of JSON is a text that a file can hold: JSON may write half a character, and NUL."""
    return isinstance(value, str) and is_utf8(value) and "\0" not in value


def _texts(value: Any) -> list[str] | None:
    """The stripped texts, or `None` if the value is no list of texts with words."""
    if not isinstance(value, list) or not all(is_plain_text(text) and text.strip() for text in value):
        return None
    return [text.strip() for text in value]


def _as_tensor(array: np.ndarray) -> torch.Tensor | None:
    """A tensor of this machine's byte order; `None` for numbers that torch lacks (128 bits)."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(array) if array.dtype.itemsize <= 8 else None


class SampleReader:
    """Read samples from their places.

    Args:
        width (`int`): W, the width of all teachers together.
        synthetic_keys (`str`, *optional*, defaults to `"syn_text.*"`): Regular expression; the keys of `syn.json` that
            match whole are read.
    """

    def __init__(self, width: int, synthetic_keys: str = SYNTHETIC_KEYS):
        self.width, self.synthetic_keys, self.files = width, re.compile(synthetic_keys), ShardFiles()

    def read(self, place: SamplePlace) -> Sample:
        """Read and check one sample.

        Raises:
            DamagedSampleError: If a member is missing or malformed, counts disagree, an embedding has another width or
                is not finite.
        """
        image_member = _present(place, IMAGE_MEMBERS, "an image")
        captions, synthetic = self._captions(place), self._synthetic_captions(place)
        augmentations = self._augmentations(place)
        image_embeds, text_embeds = self._embeds(place, len(augmentations), len(captions), synthetic)
        return Sample(
            image=self.files.read(place, image_member),
            image_member=image_member,
            captions=captions,
            synthetic_captions=[text for texts in synthetic.values() for text in texts],
            augmentations=augmentations,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def _json(self, place: SamplePlace, member: str) -> Any:
        return self._parse(self.files.read(place, member, MOST_TEXT_BYTES), place, member)

    def _parse(self, text: str | bytes, place: SamplePlace, member: str) -> Any:
        try:
            return parse_json(text, "it", "")
        except ValueError as error:
            raise DamagedSampleError.at(place.shard, as_problem(error), place.key, member) from error

    def _captions(self, place: SamplePlace) -> list[str]:
        member = "txt" if "txt" in place.members else _present(place, ("txt", "json"), "captions")
        if member == "txt":
            try:
                text = decode_text(self.files.read(place, member, MOST_TEXT_BYTES), member).strip()
            except DamagedSampleError:
                raise
            except ValueError as error:
                raise DamagedSampleError.at(place.shard, as_problem(error), place.key, member) from error
            found: Any = [text]
            if text.startswith("["):
                try:
                    found = parse_json(text, member)
                except ValueError:
                    pass  # a caption that begins with a bracket
        else:
            source = self._json(place, member)
            found = source.get("captions", [source.get("caption")]) if isinstance(source, dict) else None
        captions = _texts(found)
        if not captions:
            problem = f"expected one or more captions with words, got {str(found)[:80]!r}"
            raise DamagedSampleError.at(place.shard, problem, place.key, member)
        return captions

    def _synthetic_captions(self, place: SamplePlace) -> dict[str, list[str]]:
        if "syn.json" not in place.members:
            return {}
        stored = self._json(place, "syn.json")
        keys = [key for key in stored if self.synthetic_keys.fullmatch(key)] if isinstance(stored, dict) else []
        texts_of = {key: _texts(stored[key]) for key in keys}
        synthetic = {key: texts for key, texts in texts_of.items() if texts is not None}
        wrong = next((key for key in keys if key not in synthetic), None)
        if not keys or wrong is not None:
            problem = f"expected lists of captions with words under keys like {self.synthetic_keys.pattern!r}, got "
            shown = stored[wrong] if wrong is not None else sorted(stored) if isinstance(stored, dict) else stored
            problem += f"{shown!r:.120}"
            raise DamagedSampleError.at(place.shard, problem, place.key, "syn.json")
        return synthetic

    def _augmentations(self, place: SamplePlace) -> list[Any]:
        stored = self._json(place, "paug.json")
        augmentations = stored.get("param_aug") if isinstance(stored, dict) else None
        if isinstance(augmentations, str):
            augmentations = self._parse(augmentations, place, "paug.json")
        if not isinstance(augmentations, list) or not augmentations:
            problem = f'expected {{"param_aug": [augmentations]}}, got {str(stored)[:80]}'
            raise DamagedSampleError.at(place.shard, problem, place.key, "paug.json")
        return augmentations

    def _embeds(
        self, place: SamplePlace, augmentations: int, captions: int, synthetic: Mapping[str, list[str]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        member = _present(place, ARRAY_MEMBERS, "embeddings")
        arrays = self._arrays(place, member)
        counts = {key: len(texts) for key, texts in synthetic.items()}
        beside = [f"{key}_emb" for key in counts if f"{key}_emb" in arrays]
        if len(beside) < len(counts):  # all embeddings follow those of the captions, in the order of the keys
            expected = {"image_emb": augmentations, "text_emb": captions + sum(counts.values())}
        else:
            expected = {"image_emb": augmentations, "text_emb": captions}
            expected |= {f"{key}_emb": count for key, count in counts.items()}
        for name, rows in expected.items():
            problem = self._problem(arrays.get(name), rows)
            if problem is not None:
                of = (
                    "augmentations"
                    if name == "image_emb"
                    else f"captions ({captions}) and synthetic captions ({counts})"
                )
                raise DamagedSampleError.at(place.shard, f"array {name!r} of the {of}: {problem}", place.key, member)
        return arrays["image_emb"], torch.cat([arrays[name] for name in expected if name != "image_emb"])

    def _problem(self, array: Any, rows: int) -> str | None:
        if not isinstance(array, torch.Tensor) or not array.is_floating_point():
            return f"expected floating point numbers of shape ({rows}, {self.width}), got {type(array).__name__}"
        if array.shape != (rows, self.width):
            return f"expected the shape ({rows}, {self.width}), got {tuple(array.shape)}"
        if not bool(torch.isfinite(array).all()):
            row = int((~torch.isfinite(array).all(dim=1)).nonzero()[0])
            return f"expected finite numbers, got NaN or infinity in row {row}"
        return None

    def _arrays(self, place: SamplePlace, member: str) -> dict[str, Any]:
        content = self.files.read(place, member, MOST_ARRAY_BYTES)
        try:
            content = _unpack(content) if member == "pth.gz" else content
            if not content.startswith(b"PK"):
                raise ValueError("not a zip file, which both npz and torch's files are")
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                _check_archive(archive)
                if member == "npz":
                    named = [(one, one.filename.removesuffix(".npy")) for one in archive.infolist()]
                    arrays = {name: read_array(archive.read(one)) for one, name in named}
            if member == "pth.gz":
                stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                return stored if isinstance(stored, dict) else {}
        except UNREADABLE_ARRAYS as error:
            problem = f"expected arrays of numbers, got {type(error).__name__}: {one_line(error)}"
            raise DamagedSampleError.at(place.shard, problem, place.key, member) from error
        return {name: _as_tensor(array) for name, array in arrays.items() if array.dtype.kind == "f"}


def storable_image(encoded: bytes) -> tuple[str, bytes]:
    """The form that an image is stored in: unchanged if it is an upright JPEG, PNG or WebP of 8 bits, else a PNG in
    RGB.

    Returns:
        `tuple[str, bytes]`: The kind of member (`jpg`, `png`, `webp`) and its bytes.

    Raises:
        UnreadableImageError: If it cannot be decoded.
    """
    header = read_header(encoded)
    kind = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(header.format or "")
    # Readers of shards do not look at the orientation, and PIL turns 16 bits to white.
    if kind is not None and header.is_upright and header.mode[0] not in "IF":
        return kind, encoded
    buffer = io.BytesIO()
    open_image(encoded).save(buffer, format="PNG")
    return "png", buffer.getvalue()


def pack_sample(
    image: tuple[str, bytes],
    captions: Sequence[str],
    synthetic_captions: Sequence[str],
    augmentations: Sequence[Any],
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    source: Mapping[str, Any],
) -> dict[str, bytes]:
    """Pack a sample into members that [`SampleReader`] and readers of DataCompDR read.

    Equal arguments give equal bytes. With several captions, the synthetic captions' embeddings are in `syn_text_emb`;
    with one, they follow the caption's in `text_emb`.

    Args:
        image (`tuple[str, bytes]`): See [`storable_image`].
        captions (`Sequence[str]`): C >= 1 captions.
        synthetic_captions (`Sequence[str]`): S >= 0 synthetic captions.
        augmentations (`Sequence`): A augmentations, encoded.
        image_embeds (`np.ndarray` of shape `(A, W)`): Any float type.
        text_embeds (`np.ndarray` of shape `(C + S, W)`): The captions first.
        source (`Mapping`): The content of `json`.

    Returns:
        `dict[str, bytes]`: The members, by what follows the key in their names.
    """
    arrays: dict[str, Any] = {"image_emb": image_embeds, "text_emb": text_embeds}
    if len(captions) > 1 and synthetic_captions:
        arrays |= {"text_emb": text_embeds[: len(captions)], "syn_text_emb": text_embeds[len(captions) :]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    plain = len(captions) == 1 and not captions[0].startswith("[")
    members = {
        image[0]: image[1],
        "txt": (captions[0] if plain else json.dumps(list(captions))).encode(),
        "json": json.dumps(dict(source)).encode(),
        "syn.json": json.dumps({"syn_text": list(synthetic_captions)}).encode(),
        "paug.json": json.dumps({"param_aug": list(augmentations)}).encode(),
        "npz": buffer.getvalue(),
    }
    if not synthetic_captions:
        del members["syn.json"]
    return members
