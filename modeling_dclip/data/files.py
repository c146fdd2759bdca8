"""The door for files: the one place of this package that opens text, JSON, YAML and tables, walks folders, writes
whole files, locks folders, and names temporary folders and caches.

Text is UTF-8, with or without a byte order mark. An error names the file and, where there is one, the line or the
entry. What a later run will read is written beside its place and moved there, so that it is whole or not there. A
temporary folder is locked by the process that uses it, so the next run can remove those of killed processes.
"""

import csv
import errno
import fnmatch
import functools
import glob
import heapq
import io
import json
import logging
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_dclip.data.failures import one_line, recorded_command, redact_values
from modeling_dclip.encoders.fingerprints import combine_keys, hash_file

try:
    import fcntl
except ImportError:  # not on this system: then nothing is locked, and leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# What JSON calls the types of Python.
_KINDS = {str: "text", list: "a list", dict: "an object", int: "an integer", float: "a number", type(None): "null"}
NULLABLE_TEXT = (str, type(None))
MOST_YAML_BYTES = 1 << 20
MOST_YAML_VALUES = 100_000  # with those that aliases repeat
_WHOLE_FLOATS = 2**53  # above it a float skips whole numbers
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # the byte order mark that some programs write before UTF-8
SEPARATORS = {"tab": "\t", "semicolon": ";", "pipe": "|", "comma": ","}  # as specs name them
_NAMED_SEPARATOR = re.compile(r"sep=([^\w\s]|\t)[,;\t]*(?:\r\n|\r|\n)")
# As what stands in a path's place may look: an address (of which `Path` leaves one `/`), and a picture as text.
_ADDRESS = re.compile(r"(?:^|/)(?:https?|ftp|s3|gs|hf|file|zip):+/")
_BASE64 = re.compile(r"(?:^|/)data:image/|[A-Za-z0-9+/]{200}[A-Za-z0-9+/=\s]*$")
_LINE_BREAK = re.compile(rb"\r\n|\r|\n")
# How files begin that are no UTF-8 text.
_FIRST_BYTES = {
    b"\xff\xfe\0\0": "saved as UTF-32",
    b"\0\0\xfe\xff": "saved as UTF-32",
    b"\xff\xfe": "saved as UTF-16",
    b"\xfe\xff": "saved as UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip file, as spreadsheets (.xlsx) are",
    b"\xd0\xcf\x11\xe0": "a file of an old office program (.xls)",
    b"PAR1": "a parquet file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF",
}
_LONGEST_SHOWN = 400  # characters of a name in a message
_KINDS_SHOWN = 8
_LONGEST_PATH = 16_384  # characters; four times what systems open


def printable(name: str | os.PathLike) -> str:
    r"""A name or path in one line of plain text, for messages.

    Bytes that are no UTF-8, line breaks and other characters that nobody sees are written as escapes; of a very long
    text the middle is left out.

    Example:
        >>> printable("caf\udce9\n.jpg")
        'caf\\xe9\\n.jpg'
    """
    parts = []
    for character in os.fspath(name):
        if character.isprintable():
            parts.append(character)
        elif "\udc80" <= character <= "\udcff":  # how Python holds a byte of a file name that is no UTF-8
            parts.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            parts.append(character.encode("unicode_escape").decode("ascii"))
    text = "".join(parts)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN // 2]}...{text[-_LONGEST_SHOWN // 4 :]}"


def is_utf8(name: str | os.PathLike) -> bool:
    """Whether a name or path can be written as UTF-8, as tables, JSON and pages need it."""
    try:
        os.fspath(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _require_utf8(path: Path, what: str) -> None:
    if not is_utf8(path.absolute()):
        raise ValueError(
            f"The path of the {what}, '{printable(path.absolute())}', is not encoded in UTF-8, so that no table can "
            "hold it. Rename the file or folder, e.g. with `convmv -f latin1 -t utf8 --notest`."
        )


# A path of a recipe or of a table may be no longer; temporary names add to it, and file systems take 255.
_LONGEST_NAME = 200
_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}


def require_file(path: str | os.PathLike, what: str) -> Path:
    """The path of a file that is there and not empty; as it is on disk, see [`FileFinder`].

    Raises:
        FileNotFoundError: If there is no such file, or there is a folder, a pipe or a device.
        ValueError: If it has 0 bytes, or its path is no UTF-8.
    """
    path = Path(path)
    _require_utf8(path, what)
    if path.is_dir():
        raise FileNotFoundError(f"Expected a file, the {what}, at '{path}', got a folder. Check the path.")
    if path.exists() and not path.is_file():
        raise FileNotFoundError(
            f"Expected a file, the {what}, at '{path}', got a pipe, a socket or a device. Write it to a file first."
        )
    if not path.is_file():
        path = _spelled_otherwise(path, what, is_folder=False)
    if path.stat().st_size == 0:
        raise ValueError(f"The {what} '{path}' is empty (0 bytes). Download or write it again.")
    return path


def require_folder(path: str | os.PathLike, what: str) -> Path:
    """The path of a folder that is there; as it is on disk, see [`FileFinder`].

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If its path is no UTF-8.
    """
    path = Path(path)
    _require_utf8(path, what)
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"Expected a folder, the {what}, at '{path}', got a file. Check the path.")
    if not path.is_dir():
        path = _spelled_otherwise(path, what, is_folder=True)
    _require_utf8(path.resolve(), what)
    return path


def _spelled_otherwise(path: Path, what: str, *, is_folder: bool) -> Path:
    """What is there under another spelling of a path that is not there."""
    finder = FileFinder()
    try:
        found = finder.find(path, is_folder=is_folder)
        reason = finder.explain(path, is_folder=is_folder) if found is None else ""
    except OSError:  # a folder on the way cannot be listed
        found, reason = None, ""
    if found is None:
        raise FileNotFoundError(f"No {what} at '{printable(path)}'{': ' if reason else ''}{reason}. Check the path.")
    return found


def check_name(name: str, what: str) -> str:
    """A name that will become a file or a folder, if it is one name: one that leads nowhere else and any system takes.

    Args:
        name (`str`): The name.
        what (`str`): What has this name, for the message, e.g. `"an arm"`.

    Returns:
        `str`: The name.

    Raises:
        ValueError: If it is empty, a dot, has a separator, a control character or a space at an end, is reserved by
            Windows, no UTF-8, or longer than 200 bytes.

    Example:
        >>> check_name("../a", "an arm")
        Traceback (most recent call last):
        ...
        ValueError: Expected a name for an arm, got '../a', which has '/' in it. Use letters, digits, '.', '-' and '_'.
    """
    odd = next((one for one in name if one in "/\\" or not one.isprintable()), None)
    if not name or name.strip(".") == "":
        fault = "no name"
    elif odd is not None:
        fault = f"which has {odd!r} in it"
    elif name != name.strip() or name.endswith("."):
        fault = "which begins or ends with a space or ends with a dot"
    elif name.partition(".")[0].lower() in _RESERVED_NAMES:
        fault = "which Windows reserves"
    elif len(name.encode()) > _LONGEST_NAME:
        fault = f"which is longer than {_LONGEST_NAME} bytes"
    else:
        return name
    raise ValueError(f"Expected a name for {what}, got {name!r:.80}, {fault}. Use letters, digits, '.', '-' and '_'.")


def _check_path(path: str | os.PathLike) -> None:
    if not os.fspath(path).strip() or "\0" in os.fspath(path):
        raise ValueError(f"Expected the path of a folder to write to, got {os.fspath(path)!r}. Name one.")


def check_output_folder(folder: str | os.PathLike) -> None:
    """Say early that an output folder, there or not, cannot be written. Nothing is made.

    Raises:
        OSError: If it or a folder above it is a file, or nothing can be written there.
        ValueError: If its name is empty or has a NUL in it.
    """
    _check_path(folder)
    folder = Path(folder).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        check_writable(nearest)
    except OSError as error:
        reason = f"nothing can be written in '{nearest}'" if nearest.is_dir() else f"'{nearest}' is a file"
        raise OSError(f"Expected a folder to write at '{folder}', but {reason}. Choose another.") from error


def check_new_folder(folder: str | os.PathLike) -> None:
    """Say early that an output folder is taken or cannot be written. What killed processes left beside it is removed.

    Raises:
        FileExistsError: If it is a file, a folder with something in it, or the working folder.
        OSError: If nothing can be written there.
        ValueError: As [`check_output_folder`].
    """
    _check_path(folder)
    folder = Path(folder)
    remove_leftovers(folder.parent)
    if folder.is_file() or entry_names(folder):
        raise FileExistsError(
            f"Expected a new or an empty folder at {folder}, got one in use. Delete it, or name another."
        )
    if folder.is_dir() and folder.samefile(Path.cwd()):
        raise FileExistsError(f"Expected a new folder, got {folder}, the working folder. Name a folder in it.")
    check_output_folder(folder)


# Text.


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file as it is.

    Raises:
        OSError: If it cannot be read, or is a pipe, a socket or a device, which may never end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(f"Expected a file at '{printable(path)}', got a pipe, a socket or a device. Write it to a file.")
    return Path(path).read_bytes()


def decode_text(content: bytes, place: str, *, keep_newlines: bool = False) -> str:
    """Text from UTF-8 bytes, without the byte order mark if there is one, nor one that joined files left at the start
    of a line.

    Args:
        content (`bytes`): What a file holds.
        place (`str`): The file, for messages.
        keep_newlines (`bool`, *optional*, defaults to `False`): Leave line breaks as they are; by default each of
            `\\n`, `\\r\\n` and `\\r` becomes `\\n`. No other character breaks a line.

    Raises:
        ValueError: If it is no UTF-8 or holds a NUL character, as UTF-16 and binary files do; the message names the
            line, and what the file is if its first bytes tell.
    """
    return _decode(content, f"'{place}'", keep_newlines)


def _decode(content: bytes, named: str, keep_newlines: bool = False) -> str:
    try:
        text = content.decode("utf-8")
        reason, at = "holds a NUL character", content.find(b"\0")
    except UnicodeDecodeError as error:
        reason, at = f"is not encoded in UTF-8 ({error})", error.start
    if at >= 0:
        line = len(_LINE_BREAK.findall(content[:at])) + 1
        kind = next((kind for start, kind in _FIRST_BYTES.items() if content.startswith(start)), None)
        problem = f"it is {kind}" if kind else f"line {line} {reason}"
        advice = "Save it as UTF-8"
        if Path(named.strip("'")).suffix.lower() in (".csv", ".tsv"):
            advice += "; in a spreadsheet choose 'CSV UTF-8'"
        raise ValueError(f"Expected UTF-8 text in {named}, but {problem}. {advice}.")
    if "\ufeff" in text:
        text = _MARKS.sub("", text)
    return text if keep_newlines else text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | os.PathLike, *, keep_newlines: bool = False) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
        path (`str` or `os.PathLike`): The file.
        keep_newlines (`bool`, *optional*, defaults to `False`): As in [`decode_text`].

    Raises:
        OSError: If it cannot be read.
        ValueError: As [`decode_text`]; the message names file and line.
    """
    return decode_text(read_bytes(path), os.fspath(path), keep_newlines=keep_newlines)


# JSON and YAML.


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {repeated!r} comes twice in one object")
    return content


def _json_fault(text: str, error: Exception) -> str:
    """What a text is that could not be read as JSON."""
    if not text.strip():
        return "nothing but blanks"
    if text.lstrip().startswith("<"):
        return "HTML or XML, perhaps the page of a failed download or of a login"
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
        return f"more than one JSON value, as in JSON Lines (the second begins in line {error.lineno})"
    return f"invalid JSON ({error})"


def parse_json(text: str | bytes, place: str, advice: str = "Write it again.") -> Any:
    """What a JSON text says.

    Args:
        text (`str` or `bytes`): UTF-8.
        place (`str`): Where it is from, e.g. `"the index 'a.json'"`.
        advice (`str`, *optional*): What to do where it is damaged.

    Raises:
        ValueError: If it is no JSON in UTF-8, a key comes twice in one object, or lists and objects are nested too
            deep.
    """
    text = _decode(text, place, keep_newlines=True) if isinstance(text, bytes) else text
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {place}, got {_json_fault(text, error)}. {advice}") from error


def read_json(
    path: str | os.PathLike, what: str = "file", keys: Sequence[str] | None = None, advice: str = "Download it again."
) -> Any:
    """What a JSON file says.

    Args:
        path (`str` or `os.PathLike`): The file.
        what (`str`, *optional*, defaults to `"file"`): What it is, for messages.
        keys (`Sequence[str]`, *optional*): It must be an object with these keys.
        advice (`str`, *optional*): What to do where it is damaged.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is empty, no JSON, no object, or lacks a key; the message names file and what is there.
    """
    content = parse_json(read_bytes(require_file(path, what)), f"the {what} '{path}'", advice)
    if keys is None:
        return content
    if not isinstance(content, dict):
        expected = f"a JSON object with {tuple(keys)}" if keys else "a JSON object"
        raise ValueError(f"Expected {expected} in the {what} '{path}', got a {type(content).__name__}. {advice}")
    for key in keys:
        if key not in content:
            raise ValueError(f"The {what} '{path}' has no key {key!r}; it has {sorted(content)}.")
    return content


def read_json_lines(path: str | os.PathLike, what: str = "file") -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each line of a file with one JSON value a line. Blank lines are passed over.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is empty or a line is no JSON; the message names it.
    """
    text = _decode(read_bytes(require_file(path, what)), f"the {what} '{path}'")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_unique_keys)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"Line {number} of the {what} '{path}': expected one whole JSON value in each line, got "
                    f"{_json_fault(line, error)}."
                ) from error


def require_field(
    entry: Any, key: str, where: str, path: str | os.PathLike, kind: type | tuple[type, ...] | None = None
) -> Any:
    """The value under a key of a JSON object.

    Args:
        entry (`dict`): The object.
        key (`str`): Which.
        where (`str`): The object's name in the file, e.g. `"Annotation 3"`.
        path (`str` or `os.PathLike`): The file.
        kind (`type` or `tuple`, *optional*): What the value must be. `True` and `False` are of no kind; a number is
            finite. Text holds no NUL and no half of a character (`\\ud800`), which JSON can name.

    Raises:
        ValueError: If the entry is no object, has no such key, or the value is of another kind; the message names file
            and entry.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} of '{path}': expected an object with the key {key!r}, got {entry!r:.80}.")
    if key not in entry:
        raise ValueError(f"{where} of '{path}' has no key {key!r}; it has {sorted(entry)}.")
    value = entry[key]
    kinds = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
    if kinds and (not isinstance(value, kinds) or isinstance(value, bool) or not _is_finite(value)):
        names = [_KINDS[one] for one in kinds if one is not int or float not in kinds]
        expected = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        raise ValueError(f"{where} of '{path}': expected {expected} under {key!r}, got {value!r:.80}.")
    if isinstance(value, str) and (not is_utf8(value) or "\0" in value):
        raise ValueError(
            f"{where} of '{path}': expected text under {key!r}, got half a character or a NUL in {value!a:.80}."
        )
    return value


def _is_finite(value: Any) -> bool:
    """Whether a value is no number, or one that a float can hold."""
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def name_entry(what: str, entry: Any, position: int) -> str:
    """What messages call an entry of a list in a JSON file: by its `id` where it has one, e.g. `"Annotation 7"`."""
    number = entry.get("id") if isinstance(entry, Mapping) else None
    known = isinstance(number, int | str) and not isinstance(number, bool)
    return f"{what} {number}" if known else f"{what} at position {position} (from 0)"


def require_id(entry: Any, key: str, where: str, path: str | os.PathLike) -> int | str:
    """The id under a key of a JSON object: a text, or a whole number that is not negative (`64.0` is 64).

    Raises:
        ValueError: As [`require_field`], or if it is another number.
    """
    value = require_field(entry, key, where, path, (int, float, str))
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE_FLOATS:
        value = int(value)
    if isinstance(value, float) or (isinstance(value, int) and value < 0):
        raise ValueError(f"{where} of '{path}': expected a whole number or text under {key!r}, got {value!r:.80}.")
    return value


def read_yaml(path: str | os.PathLike, what: str = "file", advice: str = "Correct it.") -> Any:
    """What a YAML file says.

    Args:
        path (`str` or `os.PathLike`): The file.
        what (`str`, *optional*, defaults to `"file"`): What it is, for messages.
        advice (`str`, *optional*): What to do where it is damaged.

    Raises:
        FileNotFoundError: If it is missing.
        OSError: If it cannot be read.
        ValueError: If it is empty, too large, no YAML in UTF-8, names a key twice, or its aliases make it too large;
            the message names file, line and column.
    """
    if (size := require_file(path, what).stat().st_size) > MOST_YAML_BYTES:
        raise ValueError(
            f"Expected YAML of at most {MOST_YAML_BYTES >> 20} MiB in the {what} '{path}', got {size >> 20} MiB. "
            f"{advice}"
        )
    text = read_text(path)
    try:
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # also a date or a number that is none
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected YAML in the {what} '{path}', got invalid YAML ({reason}). {advice}") from error


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuse YAML whose keys are named twice, or that aliases make large or endless. Each node is visited once."""
    sizes: dict[int, int] = {}

    def visit(node: yaml.Node, above: frozenset[int]) -> int:
        place = f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
        if id(node) in above:
            raise ValueError(f"{place}: an alias of a value inside this value")
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(visit(child, above | {id(node)}) for child in _children(node))
            if sizes[id(node)] > MOST_YAML_VALUES:
                raise ValueError(f"{place}: more than {MOST_YAML_VALUES} values, with those that aliases repeat")
        return sizes[id(node)]

    if root is not None:
        visit(root, frozenset())


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if not isinstance(node, yaml.MappingNode):
        return []
    lines: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"line {line}: the key {key.value!r} twice, before on line {lines[key.value]}")
        lines[key.value] = line
    return [one for pair in node.value for one in pair]


# Tables.

_FORM = "rows of parquet files, 1"  # a part of the copies' names: changes with how a copy is made
_BATCH_BYTES = 64 * 2**20
_MOST_ROWS = 10_000  # of a batch
_READ_AHEAD = 2**20  # bytes of a column that are read at once
# What Arrow raises for a damaged file, or for one in a form that it does not know.
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)
# Files of a folder whose content a dataset may hold; of others it holds the paths.
_TABLES = {".arrow", ".csv", ".gz", ".json", ".jsonl", ".md", ".parquet", ".tar", ".tsv", ".txt", ".zip", ".zst"}
_PATTERN = set("*?[]{}")  # what `datasets` takes for a pattern in a folder's name
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_FLOATS = ("float16", "float32", "float64")


class TableRow(NamedTuple):
    """A row of a table and the line of the file it ends in."""

    number: int
    cells: list[str]


def read_table(path: str | os.PathLike, separator: str) -> list[TableRow]:
    """The rows of a CSV or TSV file that are not blank, the header first.

    A first line `sep=;`, which spreadsheets write and read, names the separator in place of the one given.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no such table or no UTF-8; the message names the line.
    """
    text = read_text(path, keep_newlines=True)
    if match := _NAMED_SEPARATOR.match(text):
        separator, text = match[1], text[match.end() :]
        text = "\n" + text  # lines keep their numbers
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, begins = [], 1
    try:
        for cells in reader:
            if cells:
                rows.append(TableRow(reader.line_num, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        other = find_separator(text.lstrip("\r\n").splitlines()[0], separator)
        lines = f"line {begins}" if reader.line_num <= begins else f"lines {begins} to {reader.line_num}"
        advice = (
            "Put a text with the separator, a quote or a line break between double quotes, a quote inside written "
            'twice ("").'
        )
        if other is not None:
            advice = f"Its first line looks separated otherwise: add ',sep={other}'."
        raise ValueError(
            f"'{path}' is no table of values separated by {separator!r} ({lines}: {error}). {advice}"
        ) from error
    return rows


def find_separator(header: str, separator: str) -> str | None:
    """The separator that splits the first line of a table into more columns than the one that was tried.

    Args:
        header (`str`): The line.
        separator (`str`): What was tried, one character.

    Returns:
        `str`, *optional*: As a spec names it; `None` if no other one splits it into more.

    Example:
        >>> find_separator("image\\tcaption", ","), find_separator("image;caption", ","), find_separator("a,b;c", ",")
        ('tab', 'semicolon', None)
    """
    found = {name: header.count(one) for name, one in SEPARATORS.items()}
    name = max(found, key=lambda one: found[one])
    return name if found[name] > header.count(separator) else None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that [`plain_array`] gives: Arrow has several forms of text, bytes and lists, and this package reads
    one of each.

    Example:
        >>> plain_type(pa.large_list(pa.string_view())) == pa.list_(pa.string())
        True
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if isinstance(kind, (pa.DictionaryType, pa.RunEndEncodedType)):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_map(kind):
        return pa.list_(pa.struct([("key", plain_type(kind.key_type)), ("value", plain_type(kind.item_type))]))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if any(is_kind(kind) for is_kind in _LISTS):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in kind])
    return kind


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)


def plain_array(array: pa.Array) -> pa.Array:
    """The same values in the plain type of their kind: text as `string`, bytes as `binary`, lists of any length as
    `list`, without dictionaries and extension types.

    Lists are rebuilt by their lengths: pyarrow 26 casts a `list_view` to a `list` with wrong entries.

    Raises:
        pyarrow.ArrowException: If texts or bytes together exceed 2 GiB, or a text is no UTF-8.
    """
    kind, plain = array.type, plain_type(array.type)
    if kind == plain:
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return plain_array(array.storage)
    if isinstance(kind, pa.DictionaryType):
        return plain_array(array.dictionary_decode())
    if isinstance(kind, pa.RunEndEncodedType):
        return plain_array(pc.run_end_decode(array))
    if pa.types.is_fixed_size_list(kind):  # `values` knows nothing of a slice, `flatten` leaves out entries of nulls
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return pa.FixedSizeListArray.from_arrays(plain_array(values), kind.list_size, mask=array.is_null())
    if pa.types.is_map(kind):
        pairs = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return plain_array(array.cast(pa.list_(pairs)))
    if any(is_kind(kind) for is_kind in _LISTS):
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, plain_array(array.flatten()), mask=array.is_null())
    if pa.types.is_struct(kind):
        fields = [plain_array(array.field(position)) for position in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, [field.name for field in kind], mask=array.is_null())
    return array.cast(plain)


def match_parquet(pattern: str) -> list[tuple[Path, int]]:
    """The parquet files that a path or a pattern names, in order, each with its number of rows.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: If a file is no parquet; it is named.
    """
    files = [(path, _open_parquet(path).metadata.num_rows) for path in match_files(pattern)]
    if not files:
        raise FileNotFoundError(f"No parquet file matches '{pattern}'. Check the path or glob in the spec.")
    return files


def load_parquet(paths: Sequence[Path], pattern: str) -> Dataset:
    """The rows of parquet files of one schema, one file after the other.

    Features that `datasets` notes in a file (pictures, names of classes) are taken from there. Columns of a type that
    `datasets` cannot hold are left out and reported. Files may differ in the order of their columns and in the width
    of integers and of floats.

    Args:
        paths (`Sequence[Path]`): Of [`match_parquet`].
        pattern (`str`): What named them, for messages.

    Raises:
        OSError: If the copy cannot be written.
        ValueError: If a file is damaged (the message names file and rows), the schemas or the names of classes differ
            (file and column are named), or a file changes while it is read.
    """
    before = [_file_state(path) for path in paths]
    key = combine_keys([_FORM, *(hash_file(path) for path in paths)])
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "modeling_dclip_parquet" / f"{key}.arrow"
    rows = sum(_open_parquet(path).metadata.num_rows for path in paths)
    dataset = _open_copy(copy, rows)
    if dataset is None:
        remove_leftovers(copy.parent)
        with replacing(copy) as temporary:
            _convert(paths, temporary)
            if [_file_state(path) for path in paths] != before:
                raise ValueError(f"A file of '{pattern}' changed while it was read. Read it again when it is whole.")
        dataset = _open_copy(copy, rows)
    if dataset is None:
        raise ValueError(f"The copy '{copy}' of '{pattern}' is damaged right after it was written. Check the disk.")
    return dataset


def load_hub(name: str, split: str, *, config: str | None = None, revision: str | None = None) -> Dataset:
    """A split of a dataset of the Hub, or of a local folder that `datasets.load_dataset` understands.

    A local folder is read by its content as it is now: what `datasets` keeps of it lies under a hash of its tables'
    content and its pictures' names.

    Args:
        name (`str`): The dataset's id or folder.
        split (`str`): The split.
        config (`str`, *optional*): The dataset's configuration.
        revision (`str`, *optional*): A commit, branch or tag of the Hub.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If there is no such split, the dataset is a script, or cannot be read as one table; it is named.
    """
    source, cache = name, None
    if Path(name).is_dir():
        cache = _folder_cache(Path(name))
        source = name if not _PATTERN & set(str(Path(name).resolve())) else str(_link(Path(name), cache))
    try:
        return load_dataset(source, config, split=split, revision=revision, cache_dir=cache and str(cache))
    except DatasetGenerationError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"The dataset '{name}', split {split!r}, cannot be read as one table ({reason}).") from error
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        raise ValueError(
            f"The dataset '{name}' is a program that loads data ({one_line(error)}), and none is run. Name a folder "
            "or a revision with the data as parquet, such as refs/convert/parquet of the Hub."
        ) from error
    except ValueError as error:
        raise ValueError(f"The dataset '{name}', split {split!r}: {one_line(error)}") from error


def _folder_cache(folder: Path) -> Path:
    parts = []
    for path in find_files(folder).files:
        # Rows of pictures are their paths.
        content = hash_file(path) if path.suffix.lower() in _TABLES else str(path.stat().st_size)
        parts.append(f"{path.relative_to(folder).as_posix()} {content}")
    key = combine_keys([str(folder.resolve()), *parts])
    return Path(datasets.config.HF_DATASETS_CACHE) / "modeling_dclip_folders" / key


def _link(folder: Path, cache: Path) -> Path:
    """A folder of links to the files, under a name that `datasets` does not take for a pattern. It would resolve a
    link to the folder itself.
    """
    links = cache / "files"
    if not links.is_dir():
        with replacing(links) as temporary:
            temporary.mkdir()
            for path in find_files(folder).files:
                link = temporary / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.absolute())
    return links


def _file_state(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        # Checksums are compared where the file has them.
        file = pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False, page_checksum_verification=True)
        list(file.schema_arrow.names)  # decodes them
        return file
    except _DAMAGED as error:
        raise ValueError(f"'{path}' is not readable as parquet ({error}). Write or download it again.") from error


def _open_copy(copy: Path, rows: int) -> Dataset | None:
    """The copy, mapped into memory; `None` if there is none or it is damaged."""
    if not copy.is_file():
        return None
    try:
        dataset = Dataset.from_file(str(copy))
    except _DAMAGED as error:
        logger.warning("'%s' is damaged (%s) and is made again", copy, error)
        return None
    return dataset if len(dataset) == rows else None


def _convert(paths: Sequence[Path], target: Path) -> None:
    features = _plain_features(paths[0])
    for path in paths[1:]:
        features = _join_files(features, _plain_features(path), paths[0], path)
    schema = features.arrow_schema
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for path in paths:
            for batch in _batches(path, schema):
                writer.write_batch(batch)


def _plain_features(path: Path) -> Features:
    """What a file holds, in plain types."""
    schema = _open_parquet(path).schema_arrow
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ValueError(f"'{path}' has the column {repeated[0]!r} twice. Write it again with one column of a name.")
    fields, left_out = [], []
    for field in schema:
        try:
            fields.append(pa.field(field.name, plain_type(field.type)))
            Features.from_arrow_schema(pa.schema(fields[-1:]))
        except ValueError:
            left_out.append(f"{field.name} ({field.type})")
            fields = [kept for kept in fields if kept.name != field.name]
    if left_out:
        logger.warning("'%s': left out columns of types that datasets cannot hold: %s", path, ", ".join(left_out))
    try:
        return Features.from_arrow_schema(pa.schema(fields, schema.metadata))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{path}': the types of columns that datasets noted in the file cannot be read ({error}). Write it "
            "again with this version of datasets."
        ) from error


def _join_files(features: Features, others: Features, first: Path, path: Path) -> Features:
    if missing := sorted(set(features) ^ set(others)):
        has, lacks = (first, path) if missing[0] in features else (path, first)
        raise ValueError(
            f"Expected parquet files with the same columns, but '{has}' has a column {missing[0]!r} and '{lacks}' has "
            "none. Read them one by one, or write them with one schema."
        )
    joined = {}
    for name, feature in features.items():
        joined[name] = _join_features(feature, others[name])
        if joined[name] is None:
            raise ValueError(
                f"Expected parquet files with the same types of columns, but {name!r} is {feature} in '{first}' and "
                f"{others[name]} in '{path}'. Read them one by one, or write them with one schema."
            )
    return Features(joined)


def _join_features(one: object, other: object) -> object | None:
    """The type of a column that holds the values of both, or `None`."""
    if one == other:
        return one
    if isinstance(one, Value) and isinstance(other, Value):
        kinds = {one.dtype, other.dtype}
        if kinds <= set(_INTEGERS):
            return Value("int64")
        if kinds <= set(_FLOATS):
            return Value("float64")
    for none, some in ((one, other), (other, one)):
        if isinstance(none, Value) and none.dtype == "null":
            return some
    if isinstance(one, List) and isinstance(other, List) and one.length == other.length:
        entry = _join_features(one.feature, other.feature)
        return None if entry is None else List(entry, length=one.length)
    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        fields = {name: _join_features(feature, other[name]) for name, feature in one.items()}
        return None if None in fields.values() else fields
    return None


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of a file in the types of the schema, some MiB at a time."""
    file = _open_parquet(path)
    stored = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
    rows = max(1, min(_MOST_ROWS, _BATCH_BYTES * file.metadata.num_rows // max(1, stored)))
    start = 0
    for group in range(file.num_row_groups):
        first, count = start, file.metadata.row_group(group).num_rows
        batches = file.iter_batches(rows, row_groups=[group])
        while True:
            try:
                batch = next(batches, None)
            except _DAMAGED as error:
                raise ValueError(
                    f"'{path}' is not readable as parquet in row group {group}, rows {first} to {first + count - 1} "
                    f"({error}). Write or download it again."
                ) from error
            if batch is None:
                break
            columns = [_column(batch, field, path, start) for field in schema]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
            start += batch.num_rows


def _column(batch: pa.RecordBatch, field: pa.Field, path: Path, start: int) -> pa.Array:
    column = batch.column(field.name)
    try:
        column = plain_array(column)
        column = column if column.type == field.type else column.cast(field.type)
        column.validate(full=True)
        return column
    except pa.ArrowException as error:
        raise ValueError(
            f"'{path}', column {field.name!r}, rows {start} to {start + batch.num_rows - 1}: expected {field.type}, "
            f"got other values ({error}). Write it again."
        ) from error


# Folders.


def list_folder(folder: str | os.PathLike, pattern: str = "*") -> list[Path]:
    """What lies in a folder, in order of names; hidden entries too, but not the `._NAME` that macOS puts beside NAME.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        pattern (`str`, *optional*, defaults to `"*"`): Which entries, as of `Path.glob`.

    Raises:
        PermissionError: If the folder cannot be read. `Path.glob` would find nothing in it.
    """
    if os.path.isdir(folder):
        os.scandir(os.fspath(folder)).close()
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith(_APPLE_DOUBLE))


def entry_names(folder: str | os.PathLike) -> set[str]:
    """The names of what lies in a folder, without temporary folders; none if it is no folder. One call however many
    files are asked for.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return {name for name in names if not is_temporary(name)}


# What systems and programs put beside pictures; hidden are also all names that begin with a point.
_APPLE_DOUBLE = "._"
_SYSTEM_NAMES = frozenset(
    ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir")
)
HIDDEN, IRREGULAR, LINKED_TWICE = "hidden", "pipe, socket or device", "linked to a folder that is searched already"
BROKEN_LINK, UNREADABLE_FOLDER, NOT_UTF8 = "broken link", "folder that cannot be read", "with a name that is no UTF-8"
NO_ENDING = "without an ending"


class FoundFiles(NamedTuple):
    """What the search of a folder found.

    Attributes:
        files (`list[Path]`): What was looked for, in order of paths.
        passed_over (`dict[str, list[Path]]`): All else, in order of paths, by its kind: an ending such as `".txt"`, or
            one of the kinds above.
    """

    files: list[Path]
    passed_over: dict[str, list[Path]]


def suffix_of(path: str | os.PathLike) -> str:
    """The ending of a name with its point, in lower case and without blanks after it: `.jpg` of `A.JPG `."""
    return PurePath(path).suffix.lower().rstrip()


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system made for itself (`Thumbs.db`, `__MACOSX`)."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def describe_passed_over(passed_over: Mapping[str, Sequence[Path]], below: str | os.PathLike) -> str:
    """Count and name what a search passed over: `3 files: 2 .txt (first: 'notes.txt'), 1 .heic (first: 'a.heic')`.

    Args:
        passed_over (`Mapping[str, Sequence[Path]]`): Of [`FoundFiles`].
        below (`str` or `os.PathLike`): Paths are named from here.
    """
    total = sum(map(len, passed_over.values()))
    kinds = sorted(passed_over.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    parts = [
        f"{len(paths)} {printable(kind)} (first: '{printable(os.path.relpath(paths[0], below))}')"
        for kind, paths in kinds[:_KINDS_SHOWN]
    ]
    more = [f"{len(kinds) - _KINDS_SHOWN} more kinds"] if len(kinds) > _KINDS_SHOWN else []
    return f"{total} {'file' if total == 1 else 'files'}" + (f": {', '.join([*parts, *more])}" if total else "")


def _entry_kind(entry: os.DirEntry) -> str:
    """`"folder"`, `"linked folder"`, `"file"`, `BROKEN_LINK` or `IRREGULAR`. Nothing is opened."""
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    if entry.is_file(follow_symlinks=False):
        return "file"
    try:
        mode = entry.stat().st_mode
    except OSError:  # it leads nowhere, or to itself
        return BROKEN_LINK
    return "linked folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else IRREGULAR


class _FolderSearch:
    """The walk behind [`find_files`]: real folders first, then links, each folder once."""

    def __init__(self, root: Path, suffixes: Collection[str] | None):
        self.suffixes = suffixes
        self.found = FoundFiles([], {})
        # A link to a folder above would lead through the root again, and to its neighbours.
        self.seen = {self._identity(folder) for folder in root.resolve().parents}
        self.waiting = [root]
        self.links: list[Path] = []

    def run(self) -> FoundFiles:
        while self.waiting or self.links:
            folder = self.waiting.pop() if self.waiting else heapq.heappop(self.links)
            try:
                identity = self._identity(folder)
                if identity in self.seen:
                    self._pass_over(LINKED_TWICE, folder)
                    continue
                self.seen.add(identity)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        self._sort_in(Path(entry.path), _entry_kind(entry))
            except OSError:
                self._pass_over(UNREADABLE_FOLDER, folder)
        self.found.files.sort()
        for paths in self.found.passed_over.values():
            paths.sort()
        return self.found

    @staticmethod
    def _identity(folder: Path) -> tuple[int, int]:
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    def _pass_over(self, kind: str, path: Path) -> None:
        self.found.passed_over.setdefault(kind, []).append(path)

    def _sort_in(self, path: Path, kind: str) -> None:
        if self.suffixes is not None and is_hidden(path.name):
            self._pass_over(HIDDEN, path)
        elif kind == "folder":
            self.waiting.append(path)
        elif kind == "linked folder":
            heapq.heappush(self.links, path)
        elif kind == IRREGULAR:
            self._pass_over(kind, path)
        elif self.suffixes is None or suffix_of(path) in self.suffixes:
            # A broken link is a file that is missing: whoever opens it says so.
            if self.suffixes is None or is_utf8(path):
                self.found.files.append(path)
            else:
                self._pass_over(NOT_UTF8, path)
        else:
            self._pass_over(kind if kind == BROKEN_LINK else suffix_of(path) or NO_ENDING, path)


def find_files(folder: str | os.PathLike, suffixes: Collection[str] | None = None) -> FoundFiles:
    """The files of a folder and of those below it. Links to folders are followed, and each folder is searched once.

    Passed over, and told by kind: what has another ending; hidden entries; links to a folder that is searched already
    or that holds this one; pipes, sockets and devices; folders that cannot be read; names that are no UTF-8. Without
    `suffixes` all files are taken, hidden ones and those of any name too.

    Args:
        folder (`str` or `os.PathLike`): Where to begin.
        suffixes (`Collection[str]`, *optional*): Endings to take in any case, given in lower case with the point.

    Raises:
        OSError: If the folder itself cannot be read.
    """
    os.scandir(os.fspath(folder)).close()
    return _FolderSearch(Path(folder), suffixes).run()


def _same_name(name: str) -> str:
    """What two spellings of one name share: macOS writes letters and accents apart, and blanks get lost in tables."""
    return unicodedata.normalize("NFC", name).strip()


def _same_letters(name: str) -> str:
    return _same_name(name).casefold()


class FileFinder:
    """Finds the files that tables and annotations name.

    A name is first looked for as it is. If there is no such file, then by its normal form (`é` as one character or as
    two), without blanks around it, and with `\\` read as `/`. Upper and lower case are told apart. Each folder is
    listed once, so that a hundred thousand files are quick.
    """

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, bool] | None] = {}  # of a folder: its files (False) and folders (True)
        self._by_key: dict[tuple[str, Callable[[str], str]], dict[str, list[str]]] = {}

    def find(self, path: str | os.PathLike, *, is_folder: bool = False) -> Path | None:
        """The file, or the folder, of that path, or `None`.

        Raises:
            OSError: If a folder cannot be read.
            ValueError: If two files fit and neither has exactly this name.
        """
        return self._find(os.fspath(path), _same_name, is_folder)

    def explain(self, path: str | os.PathLike, *, is_folder: bool = False) -> str:
        """Why a path leads to no file, or no folder, as far as one can tell; an empty text if not."""
        text = os.fspath(path)
        if _ADDRESS.search(text):
            return "an address, and none is fetched: download the pictures and give their paths"
        if _BASE64.search(text):
            return "perhaps a picture in base64: store its bytes instead"
        try:
            other = self._find(text, _same_letters, is_folder)
        except ValueError as error:
            return str(error)
        if other is not None:
            return f"'{printable(other.name)}' there differs in case"
        if os.path.islink(text):
            return "a broken link"
        if os.path.exists(text):
            return "a folder" if os.path.isdir(text) else "a pipe, a socket or a device"
        odd = [name for name in self._list(os.path.dirname(text)) or () if not is_utf8(name)]
        return f"{len(odd)} names there are no UTF-8, first '{printable(odd[0])}'" if odd else ""

    def _find(self, text: str, key: Callable[[str], str], is_folder: bool) -> Path | None:
        for spelling in dict.fromkeys((text, text.replace("\\", "/"))):
            if (found := self._resolve(spelling, key, is_folder)) is not None:
                return Path(found)
        return None

    def _resolve(self, text: str, key: Callable[[str], str], is_folder: bool) -> str | None:
        """The file or folder of a path. Only folders that are not there as they are written are looked for by key."""
        if len(text) > _LONGEST_PATH or not is_utf8(text) or "\0" in text:
            return None
        place, name = os.path.split(text)
        missing: list[str] = []
        while self._list(place) is None:
            place, last = os.path.split(place)
            if not last:
                return None
            missing.append(last)
        for part in reversed(missing):
            found = os.path.join(place, part) if part == os.pardir else self._entry(place, part, key, is_folder=True)
            if found is None or self._list(found) is None:
                return None
            place = found
        return self._entry(place, name, key, is_folder=is_folder)

    def _list(self, folder: str) -> dict[str, bool] | None:
        if folder not in self._listed:
            try:
                with os.scandir(folder or os.curdir) as entries:
                    kinds = {entry.name: _entry_kind(entry) for entry in entries}
                found = {name: kind != "file" for name, kind in kinds.items() if kind not in (BROKEN_LINK, IRREGULAR)}
                self._listed[folder] = found
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                    raise
                self._listed[folder] = None
        return self._listed[folder]

    def _entry(self, folder: str, name: str, key: Callable[[str], str], *, is_folder: bool) -> str | None:
        entries = self._list(folder) or {}
        if entries.get(name) is is_folder:
            return os.path.join(folder, name)
        if (folder, key) not in self._by_key:
            names = self._by_key[folder, key] = {}
            for one in entries:
                names.setdefault(key(one), []).append(one)
        fitting = [one for one in self._by_key[folder, key].get(key(name), []) if entries[one] is is_folder]
        if len(fitting) > 1:
            raise ValueError(
                f"{len(fitting)} entries of '{printable(folder)}' fit the name '{printable(name)}': "
                f"{', '.join(ascii(one) for one in sorted(fitting)[:_KINDS_SHOWN])}. Rename all but one."
            )
        return os.path.join(folder, fitting[0]) if fitting else None


def match_files(pattern: str) -> list[Path]:
    """The files that a path or a glob of the command line names, in order; `**` goes into subfolders.

    A file of exactly this name is taken as it is, also where its name or a folder's holds brackets; so are the folders
    before the first part of the pattern that names nothing there. `**` follows links as [`find_files`] does. Folders
    that match are left out; pipes, sockets and devices too, with a warning.

    Raises:
        ValueError: If what matches is no file.
    """
    if Path(pattern).is_file():
        return [Path(pattern)]
    matches = _match_below(pattern) if "**" in Path(pattern).parts else glob.glob(_escape_names(pattern))
    files = sorted(path for path in matches if os.path.isfile(path))
    others = sorted(path for path in matches if os.path.exists(path) and not os.path.isdir(path) and path not in files)
    folders = sorted(path for path in matches if os.path.isdir(path))
    if not files and (others or folders):
        found = "a pipe, a socket or a device" if others else "a folder"
        raise ValueError(
            f"Expected files at '{printable(pattern)}', got {found}, '{printable([*others, *folders][0])}'. "
            "Name the files, e.g. FOLDER/*.parquet."
        )
    if others:
        logger.warning("'%s': left out %d pipes, sockets or devices", printable(pattern), len(others))
    return [Path(path) for path in files]


def _escape_names(pattern: str) -> str:
    """The pattern with the names of folders that are there taken as they are, up to the first that is none."""
    parts = Path(pattern).parts
    names = 0
    while names < len(parts) and Path(*parts[: names + 1]).exists():
        names += 1
    return os.path.join("", *map(glob.escape, parts[:names]), *parts[names:])


def _match_below(pattern: str) -> list[str]:
    """The files that a glob with `**` names. Unlike `glob.glob`, links never lead to a file twice, or in circles."""
    parts = Path(pattern).parts
    first = parts.index("**")
    start = os.path.join(*parts[:first]) if first else ""
    steps = parts[first:]
    wanted = [part for place, part in enumerate(steps) if part != "**" or steps[place - 1 : place] != ("**",)]
    tops = glob.glob(_escape_names(start)) if glob.has_magic(start) and not os.path.isdir(start) else [start]
    matches = set()
    for top in filter(os.path.isdir, [top or "." for top in tops]):
        found = find_files(top)
        matches |= {str(path) for path in found.files if _fits(path.relative_to(top).parts, wanted)}
        if found.passed_over:
            logger.warning("'%s': passed over %s", printable(pattern), describe_passed_over(found.passed_over, top))
    return list(matches)


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a glob; hidden ones have to be named by a pattern with a point."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        if len(patterns) == 1:
            return bool(names) and not any(name.startswith(".") for name in names)
        if _fits(names, patterns[1:]):
            return True
        return bool(names) and not names[0].startswith(".") and _fits(names[1:], patterns)
    if not names or (names[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def check_writable(folder: str | os.PathLike) -> None:
    """Say early that nothing can be written into a folder.

    Raises:
        OSError: If a file cannot be made there.
    """
    tempfile.TemporaryFile(dir=Path(folder)).close()


def user_cache_dir(name: str) -> Path:
    """`modeling_dclip/NAME` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`).

    Args:
        name (`str`): What is kept there: `"regions"`, `"shards"`, `"classifiers"`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modeling_dclip" / name


# Locks. A lock ends with the process that holds it, however that ends.

LOCK_NAME = ".modeling_dclip.lock"
_held: set[int] = set()  # handles of locked files


def _forget_locks() -> None:
    """In a forked process, e.g. a data loader's worker: the locks are the parent's, and end with the parent."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _lock(path: Path, *, make: bool = True) -> int | None:
    """The handle of a file, locked; `None` if another process has it.

    Raises:
        FileNotFoundError: If its folder has vanished, or without `make` the file.
        OSError: If it cannot be opened, or this file system has no locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
        _held.add(handle)
        try:
            if fcntl is None:
                return handle
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(handle)):
                    return handle
            _unlock(handle)  # its last holder has removed it meanwhile
        except BlockingIOError:
            _unlock(handle)
            return None
        except OSError:
            _unlock(handle)
            raise


def _unlock(handle: int) -> None:
    if handle in _held:  # not in a forked process
        _held.remove(handle)
        os.close(handle)


@contextmanager
def holding(output: str | os.PathLike, *, beside: bool = False) -> Iterator[None]:
    """Keep an output folder to this process until the end. A second process that asks for it is refused.

    Args:
        output (`str` or `os.PathLike`): The folder. It is made, and removed again if it stays empty.
        beside (`bool`, *optional*, defaults to `False`): The lock is a file beside the folder, for one that must be
            new, in place of one in it.

    Raises:
        BlockingIOError: If another process holds it; the message names its number, its machine and its start.
        OSError: If nothing can be written there.
    """
    output = Path(output)
    folder = output.parent if beside else output
    path = folder / f".{output.name}.lock" if beside else folder / LOCK_NAME
    made = [] if beside else [one for one in (folder, *folder.parents) if not one.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(path, output)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(FileNotFoundError):
                path.unlink()
            _unlock(handle)
        for one in made:
            with suppress(OSError):  # not empty
                one.rmdir()


def _take(path: Path, output: Path) -> int | None:
    """Lock an output and note who holds it; `None` where the file system has no locks."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        handle = _lock(path)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logger.warning("'%s' cannot be locked (%s). Start no second run on it.", output, error.strerror)
            return None
        raise
    if handle is None:
        raise BlockingIOError(
            f"'{output}' is in use by another run{_describe_holder(path)}. Wait for its end, stop it, or name another "
            "folder."
        )
    os.truncate(handle, 0)
    with suppress(OSError):  # a full disk: the lock holds without the note
        os.write(handle, json.dumps([os.getpid(), socket.gethostname(), started]).encode())
    return handle


def _describe_holder(path: Path) -> str:
    try:
        process, host, started = json.loads(path.read_bytes())
    except (OSError, ValueError):  # it ends just now, or has not noted itself yet
        return ""
    return f": process {process} on {host}, which started {started}"


# Temporary folders.

_HOLDER = ".in_use"  # locked by the process that uses a temporary folder
_SUFFIX = ".modeling_dclip"  # of temporary folders
_swept: set[Path] = set()  # where this process has looked for leftovers


@contextmanager
def temporary_folder(beside: str | os.PathLike | None = None, prefix: str = "tmp.") -> Iterator[Path]:
    """A folder that is removed at the end; the next one in the same place removes those of killed processes.

    Args:
        beside (`str` or `os.PathLike`, *optional*): The folder to make it in; the system's own by default.
        prefix (`str`, *optional*, defaults to `"tmp."`): How its name begins.
    """
    place = Path(tempfile.gettempdir() if beside is None else beside)
    if place not in _swept:
        _swept.add(place)
        remove_leftovers(place)
    folder: Path | None = None
    handle = None
    while folder is None:
        made = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=place))
        try:
            handle = _lock(made / _HOLDER)
            folder = None if handle is None else made  # or another process takes it for a leftover, and removes it
        except FileNotFoundError:  # it has done so
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                shutil.rmtree(made)
                raise
            folder = made
    try:
        yield folder
    finally:
        if handle is not None:
            _unlock(handle)  # first, for a file in use cannot be removed from a folder of NFS
        with suppress(FileNotFoundError):  # another process removes it already
            shutil.rmtree(folder)


def is_temporary(path: str | os.PathLike) -> bool:
    """Whether a path has the name of a temporary folder of this package."""
    return os.fspath(path).endswith(_SUFFIX)


def remove_leftovers(folder: str | os.PathLike, *, below: bool = False) -> int:
    """Remove the temporary folders that killed processes left in a folder. Those in use stay.

    Args:
        folder (`str` or `os.PathLike`): The folder; it may be missing.
        below (`bool`, *optional*, defaults to `False`): In the folders in it, too.

    Returns:
        `int`: How many were removed.
    """
    folder, removed = Path(folder), 0
    if fcntl is None or not folder.is_dir():
        return 0
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir(follow_symlinks=False):
            continue
        if is_temporary(entry.name):
            with suppress(OSError):  # of another user, or just removed
                removed += _remove_leftover(Path(entry.path))
        elif below:
            removed += remove_leftovers(entry.path)
    return removed


def _remove_leftover(folder: Path) -> bool:
    if not any(folder.iterdir()):
        folder.rmdir()  # killed before it was locked; or its process is about to, and makes another
        return True
    handle = _lock(folder / _HOLDER, make=False)
    if handle is None:
        return False
    doomed = folder.with_name(f"{folder.name.removesuffix(_SUFFIX)}.old{_SUFFIX}")
    try:
        folder.rename(doomed)  # while it is locked: who made it just now finds it gone, and makes another
    finally:
        _unlock(handle)
    shutil.rmtree(doomed)
    return True


# Writing whole files.

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# What writers that are no Python say where the system refuses to write.
_CANNOT = "Cannot write"
_WITHOUT_REASON = re.compile(r"PytorchStreamWriter|inline_container|\d+ requested and \d+ written")  # torch, numpy
_NO_PARENT = re.compile(r"Parent directory .* does not exist")  # torch
_OF_RUST = re.compile(r"\(os error (\d+)\)")


class writing:
    """Name the place where writing failed, whichever library writes: `with writing(path): model.save(path)`.

    Errors that have nothing to do with the place pass through.

    Args:
        path (`str` or `os.PathLike`): The file or folder that is written.

    Raises:
        OSError: If the disk is full or read-only, or the place cannot be written; the message names it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise the error with the place's name in place of the writer's."""
        number = None if error is None else self._find_number(error)
        if number is None:
            return
        path = self.path.absolute()
        nearest = next(place for place in (path, *path.parents) if place.exists())
        reason, remedy = os.strerror(number) if number else "the writing failed", "Make it writable, or name another"
        if number in _FULL or not number:
            reason += f" ({shutil.disk_usage(nearest).free // 2**20} MiB free)"
            remedy = "Make room, then run the same command again"
        raise type(OSError(number, ""))(f"{_CANNOT} '{path}': {reason}. {remedy}.") from error

    def _find_number(self, error: BaseException) -> int | None:
        """The system's number of an error that comes from writing here; 0 if unknown, `None` for other errors."""
        if isinstance(error, OSError) and error.errno is not None:
            here = error.filename is not None and self._is_here(os.fsdecode(error.filename))
            return error.errno if here or error.errno in (*_FULL, errno.EROFS) else None
        text = str(error)
        if text.startswith(_CANNOT):
            return None  # named already
        if match := _OF_RUST.search(text):
            return int(match[1])
        if known := [number for number in (*_FULL, errno.EROFS) if os.strerror(number) in text]:
            return known[0]
        if _NO_PARENT.fullmatch(text.rstrip(".")):
            return errno.ENOENT
        return 0 if _WITHOUT_REASON.search(text) else None

    def _is_here(self, name: str) -> bool:
        """Whether a path is in this one, in a temporary folder for it, or above it."""
        path, found = self.path.absolute(), Path(os.path.abspath(name))
        if found == path or found in path.parents or path in found.parents:
            return True
        beside = found.relative_to(path.parent).parts[:1] if path.parent in found.parents else ()
        return any(part.startswith(f".{path.name[:100]}.") and part.endswith(_SUFFIX) for part in beside)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` and move it there at the end. A reader sees the whole file or the old one.

    Missing folders are made. A replaced file keeps its permissions.

    Args:
        path (`str` or `os.PathLike`): A file, or a folder that does not exist yet.

    Yields:
        `Path`: Where to write. If the writing fails, it is removed, and what was at `path` is untouched.

    Raises:
        OSError: If it cannot be written; the message names `path`.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent, f".{path.name[:100]}.") as temporary:
            yield temporary / path.name
            if path.is_file():
                shutil.copymode(path, temporary / path.name)
            os.replace(temporary / path.name, path)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all. Folders are made."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically. A byte of a file name that is no UTF-8 becomes an escape, which JSON knows too."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(
    path: str | os.PathLike, content: Any, *, indent: Literal[1, 2] = 1, default: Callable[[Any], Any] | None = None
) -> None:
    """Write JSON atomically, in one of the two forms in use.

    Args:
        path (`str` or `os.PathLike`): The file.
        content (`Any`): What `json.dumps` takes.
        indent (`int`, *optional*, defaults to 1): 1 as results files are written: UTF-8, without NaN and infinity. 2
            as transformers writes configurations: ASCII.
        default (`Callable`, *optional*): What to write in place of a value that JSON has no form for.

    Raises:
        ValueError: If a number is NaN or infinite, with `indent` 1.
    """
    results = indent == 1
    text = json.dumps(content, indent=indent, ensure_ascii=not results, allow_nan=not results, default=default)
    write_text(path, text + "\n")


# What made an output.

MANIFEST_NAME = "manifest.json"
ARGUMENTS_NAME = "arguments.yaml"  # of a training, beside the weights
PACKAGES = ("modeling_dclip", "torch", "transformers", "accelerate", "datasets", "numpy", "pillow", "open_clip_torch")


@functools.cache
def package_version(package: str) -> str:
    """The version of an installed package, else `"not installed"`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def show_script(name: str) -> str:
    """Where a script of this checkout is, as to type it: relative below the working folder, else absolute.

    Args:
        name (`str`): `eval.py` or `train.py`.
    """
    path, here = Path(__file__).resolve().parents[2] / name, Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@functools.cache
def git_revision() -> str | None:
    """The commit of this package, with `-dirty` if files were changed since; `None` if it is no checkout of git."""
    own = Path(__file__).parents[1]
    described = []
    for words in (("ls-files", "--error-unmatch", "__init__.py"), ("describe", "--always", "--abbrev=40", "--dirty")):
        options = ("--exclude=*",) if words[0] == "describe" else ()
        try:
            done = subprocess.run(["git", "-C", own, *words, *options], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        described.append(done.stdout.strip())
    return described[-1]


def describe_run(processes: int = 1) -> dict[str, Any]:
    """What an output's manifest says of the run that made it: command, time, processes, commit and versions.

    Args:
        processes (`int`, *optional*, defaults to 1): Of the run.

    Returns:
        `dict[str, Any]`: Without secrets. Equal runs differ in `created` alone.
    """
    return {
        "command": recorded_command("python", sys.orig_argv[1:]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processes": processes,
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES},
    }


def write_manifest(path: str | os.PathLike, *, processes: int = 1, **told: Any) -> None:
    """Write beside an output what made it.

    Args:
        path (`str` or `os.PathLike`): The file, e.g. `FOLDER/manifest.json`.
        processes (`int`, *optional*, defaults to 1): Of the run.
        told: What else decided it: `seed`, `data` (specs and keys), and so on. Secrets are left out.
    """
    write_json(path, {**redact_values(told), **describe_run(processes)}, indent=2)
