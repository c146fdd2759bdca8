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
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from modeling_dclip.data.files import list_folder, match_files, read_json
from modeling_dclip.data.images import open_image, read_header

INDEX_NAME = "reinforced.json"
_BLOCK = 512  # bytes of a tar header; members are padded to a multiple


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
        remedy = "Download or write the shard again, or pass on_bad_sample='skip' to leave out what is damaged."
        error = cls(f"{place}: {problem}. {remedy}")
        error.shard, error.key, error.member, error.problem = shard, key, member, problem
        return error


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

    def read(self, place: SamplePlace, member: str) -> bytes:
        """The bytes of a member.

        Raises:
            DamagedSampleError: If the sample lacks the member or has it twice, or the file ends before it.
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
        ValueError: If the index is malformed or its dataset is not finished.
    """
    folder = Path(spec)
    names: list[Path] = []
    if folder.is_dir():
        index = read_index(folder / INDEX_NAME) if (folder / INDEX_NAME).is_file() else None
        names = list_folder(folder, "*.tar") if index is None else [folder / one["file"] for one in index["shards"]]
    else:
        index = None
        for pattern in _expand_braces(str(spec)):
            found = match_files(pattern)
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
        index = read_json(path, "index")
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
    """Name and size of an ordinary file, or an empty name and the size of a header for the whole archive.

    `None` for anything else, which tarfile reads. It would read these two as well, at a quarter of the speed.
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
    """The rest of a tar from a header that is not plain: the end of the archive, a long name, or damage."""
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
        if not file.read(_BLOCK).strip(b"\0"):  # else tarfile took damage for the end
            return
    except tarfile.TarError as error:
        problem = str(error)
    raise DamagedSampleError.at(
        path, f"expected an uncompressed tar, got damage at or after byte {offset} ({problem})"
    )


def scan_shard(path: Path) -> Iterator[SamplePlace]:
    """The places of a shard's samples, in its order; only the headers are read.

    Raises:
        DamagedSampleError: If the tar is damaged, after the samples before the damage; or if it holds no sample.
    """
    current = ""
    members: dict[str, tuple[int, int]] = {}
    try:
        for name, offset, size in _members(path):
            key, kind = _split_name(name)
            if not kind or not key or key.endswith("/"):
                continue  # no member of a sample: a name without a dot, or a hidden file
            if key != current:
                if members:
                    yield SamplePlace(path, current, members)
                current, members = key, {}
            # A second member of the same name would hide the first one, so it gets a name that no reader expects.
            members[kind if kind not in members else f"{kind} (repeated)"] = (offset, size)
    except DamagedSampleError as error:
        if members and error.key != current:
            yield SamplePlace(path, current, members)
        raise
    if not members:
        raise DamagedSampleError.at(path, "expected samples, got an empty shard")
    yield SamplePlace(path, current, members)


IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
ARRAY_MEMBERS = ("npz", "pth.gz")
SYNTHETIC_KEYS = r"syn_text.*"
_UNREADABLE_ARRAYS = (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error),
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


def _texts(value: Any) -> list[str] | None:
    """The stripped texts, or `None` if the value is no list of texts with words."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        return None
    return [text.strip() for text in value]


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
        try:
            return json.loads(self.files.read(place, member))
        except ValueError as error:
            if isinstance(error, DamagedSampleError):
                raise
            raise DamagedSampleError.at(place.shard, f"expected JSON, got {error}", place.key, member) from error

    def _captions(self, place: SamplePlace) -> list[str]:
        member = "txt" if "txt" in place.members else _present(place, ("txt", "json"), "captions")
        if member == "txt":
            text = self.files.read(place, member).decode("utf-8", errors="replace").strip()
            found: Any = [text]
            if text.startswith("["):
                try:
                    found = json.loads(text)
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
            problem += (
                repr(sorted(stored) if isinstance(stored, dict) else stored) if wrong is None else repr(stored[wrong])
            )
            raise DamagedSampleError.at(place.shard, problem, place.key, "syn.json")
        return synthetic

    def _augmentations(self, place: SamplePlace) -> list[Any]:
        stored = self._json(place, "paug.json")
        augmentations = stored.get("param_aug") if isinstance(stored, dict) else None
        if isinstance(augmentations, str):
            try:
                augmentations = json.loads(augmentations)
            except ValueError as error:
                raise DamagedSampleError.at(
                    place.shard, f"expected JSON, got {error}", place.key, "paug.json"
                ) from error
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
        content = self.files.read(place, member)
        try:
            content = gzip.decompress(content) if member == "pth.gz" else content
            if not content.startswith(b"PK"):
                raise ValueError("not a zip file, which both npz and torch's files are")
            if member == "pth.gz":
                stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                return stored if isinstance(stored, dict) else {}
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except _UNREADABLE_ARRAYS as error:
            problem = f"expected arrays of numbers, got {type(error).__name__}: {error}"
            raise DamagedSampleError.at(place.shard, problem, place.key, member) from error
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind == "f"}


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
