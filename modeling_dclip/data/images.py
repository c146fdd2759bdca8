"""The door for pictures: the one place of this package that opens an image, and images as an encoder sees them.

[`open_image`] bounds what is read and decoded, turns a picture upright, brings any mode to 8-bit RGB with transparent
pixels over white ([`~modeling_dclip.processing_dclip.as_rgb`]), and answers whatever is wrong with one error,
[`UnreadableImageError`].

[`PixelReader`] reads a batch at a time: resized and cropped once, normalised when asked for. Pixels are those of the
image processor given, bit for bit. transformers rescales and normalises image by image in numpy: 1.1 of the 1.8 ms
that a 224 px JPEG takes on one quiet core, several times as much on a busy one. An 8-bit value has only 256 results
per channel, so the reader takes a table of them from the processor itself and looks a batch up at once, on the device
it is on: a quarter of the bytes travel.
"""

import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from modeling_dclip.data.files import (
    NOT_UTF8,
    FoundFiles,
    describe_passed_over,
    find_files,
    printable,
    read_bytes,
    suffix_of,
)
from modeling_dclip.processing_dclip import DAMAGED, as_rgb, cut_long, load_whole, orientation_of

logger = logging.getLogger(__name__)

# Formats whose endings name pictures and nothing else; HEIF and JPEGXL where a plugin of PIL is installed and active.
_COMMON_FORMATS = frozenset(
    (
        *("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JPEGXL"),
        *("JXL", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP"),
    )
)
_USUAL = (".jpg", ".jpeg", ".png", ".webp")
_APPLE_PHOTOS = (".heic", ".heif", ".hif")
IMAGES_PER_READ = 64  # enough for one call of the image processor to pay, few enough for a smooth progress bar


@cache
def _suffixes() -> dict[str, bool]:
    """Endings that PIL reads here, and whether they name pictures only."""
    readable = {*readable_formats(), "MPO"}
    known = {suffix: kind in _COMMON_FORMATS for suffix, kind in Image.EXTENSION.items() if kind in readable}
    return known | dict.fromkeys(_USUAL, True)


def image_suffixes() -> list[str]:
    """The endings of pictures that this installation of PIL reads, in lower case, the usual ones first."""
    return [*_USUAL, *sorted(suffix for suffix in _suffixes() if suffix not in _USUAL)]


def has_image_suffix(path: str | os.PathLike) -> bool:
    """Whether a name ends as those of pictures do, in any case."""
    return suffix_of(path) in _suffixes()


def find_images(folder: str | os.PathLike) -> FoundFiles:
    """Find the pictures of a folder and of the folders below it, by their endings in any case.

    All that PIL reads is taken, except films (`.mpg`) and what needs another program (`.eps`, `.pdf`). Other programs
    use some endings too (`.pcd`, `.fit`, `.im`): such a file is taken only if it begins as a picture does.

    Args:
        folder (`str` or `os.PathLike`): Searched as [`~modeling_dclip.data.files.find_files`] says.

    Returns:
        [`~modeling_dclip.data.files.FoundFiles`]: Give it to [`warn_passed_over`].

    Raises:
        OSError: If the folder cannot be read.
    """
    known = _suffixes()
    found = find_files(folder, known)
    files = []
    for path in found.files:
        if known[suffix_of(path)] or _begins_as_picture(path):
            files.append(path)
        else:
            found.passed_over.setdefault(suffix_of(path), []).append(path)
    return FoundFiles(files, found.passed_over)


def _begins_as_picture(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            _open_lazily(file)
    except Image.DecompressionBombError:  # a picture: whoever opens it says that it is too large
        return True
    except UNREADABLE:
        return False
    return True


def describe_others(passed_over: Mapping[str, Sequence[Path]], folder: str | os.PathLike) -> str:
    """Count and name what is no picture that PIL reads, and say what to do about photos of phones.

    Args:
        passed_over (`Mapping[str, Sequence[Path]]`): Of [`find_images`].
        folder (`str` or `os.PathLike`): Paths are named from here.
    """
    text = describe_passed_over(passed_over, folder)
    if any(suffix in passed_over for suffix in _APPLE_PHOTOS):
        text += ". Convert HEIC photos to JPEG first, e.g. with `magick mogrify -format jpg *.heic`"
    if NOT_UTF8 in passed_over:
        text += ". Rename files to UTF-8, e.g. with `convmv -f latin1 -t utf8 --notest -r FOLDER`"
    return text


def warn_passed_over(passed_over: Mapping[str, Sequence[Path]], folder: str | os.PathLike) -> None:
    """Count and name in one line of the log what was passed over in a folder; nothing if that is nothing."""
    if passed_over:
        logger.warning("'%s': passed over %s", printable(folder), describe_others(passed_over, folder))


class UnreadableImageError(ValueError):
    """A picture that cannot be read. This module raises no other error for a picture, whatever PIL raised.

    Args:
        message (`str`): Which picture, why it cannot be read, and what to do.
        reason (`str`, *optional*): Only why; by default the whole message.
    """

    # One argument is enough: the worker of a data loader hands an error over by its message alone.
    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = message if reason is None else reason


class MissingImageError(UnreadableImageError, FileNotFoundError):
    """A picture whose file is missing."""


# What PIL raises for damaged pictures. Only calls of PIL, and what brings a picture to RGB, stand inside the `try`
# with this list: an error in other code is not hidden by it.
UNREADABLE = (
    *DAMAGED,
    ImportError,  # an optional library of PIL that is missing
    Image.DecompressionBombError,
)
MOST_PIXELS = 178_956_970  # where PIL refuses too; 0.7 GB decoded
MOST_BYTES = 2**30  # of an encoded picture
THUMBNAIL_QUALITY = 82  # of a JPEG
# Formats that PIL opens but that run another program (Ghostscript), or that it only knows by name.
_REFUSED_FORMATS = ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF", "IPTC")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)")  # http://, hf://, zip://..::http://..
_NEITHER = "the row has neither bytes nor a path"

ImageSource = bytes | str | os.PathLike | Mapping[str, Any]


def _stored(source: ImageSource | None) -> bytes | str | None:
    """The bytes, or the path, of a source."""
    if isinstance(source, Mapping):
        return source["bytes"] if source["bytes"] is not None else source["path"]
    return source if source is None or isinstance(source, bytes) else os.fspath(source)


def _unreadable(name: str, error: BaseException | str, advice: str) -> UnreadableImageError:
    if isinstance(error, UnidentifiedImageError):  # PIL's message names an object in memory
        error = "cannot identify image file: it is damaged, or of a format that is not read"
    reason = error if isinstance(error, str) else " ".join(str(error).split()) or type(error).__name__
    reason = reason.removesuffix(", could be decompression bomb DOS attack.").rstrip(".")  # PIL's guess
    kind = MissingImageError if isinstance(error, FileNotFoundError) else UnreadableImageError
    return kind(f"{name} cannot be read: {reason}. {advice}", reason)


def _require_bounded(path: str) -> None:
    """Refuse an address, what would never end or is no file (a pipe, a device, a folder), and a file too large."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if _ADDRESS.match(path):
            raise OSError(
                f"expected a file, got the address '{path}'. Addresses in rows are never fetched: download the "
                "pictures first, and give their paths"
            ) from None
        raise
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"expected a file at '{path}', got a folder, a pipe or a device")
    _require_few_bytes(status.st_size)


def _require_few_bytes(size: int) -> None:
    if size > MOST_BYTES:
        raise OSError(f"expected at most {MOST_BYTES:,} bytes, got {size:,}")


def read_encoded(source: ImageSource | None, name: str = "The image", advice: str = "Replace the file.") -> bytes:
    """The bytes of a picture as they are stored, undecoded.

    Args:
        source: The bytes themselves, a path, or a value of an image column that is not decoded.
        name (`str`, *optional*): What messages call it, e.g. `"Image 'a'"`.
        advice (`str`, *optional*): What to do where it cannot be read.

    Raises:
        UnreadableImageError: If the row has none, the file cannot be read or has more than [`MOST_BYTES`], or an
            address stands in a path's place. [`MissingImageError`] if it is missing.
    """
    stored = _stored(source)
    if stored is None:
        raise _unreadable(name, _NEITHER, advice)
    if isinstance(stored, bytes):
        return stored
    try:
        _require_bounded(stored)
        return read_bytes(stored)
    except (OSError, ValueError) as error:  # ValueError: a null in the path
        raise _unreadable(name, error, advice) from error


@cache
def readable_formats() -> tuple[str, ...]:
    """The formats that are read, as PIL calls them: all but those that run another program or decode nothing."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - set(_REFUSED_FORMATS)))


def _open_lazily(file: io.BytesIO | io.BufferedReader) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        return Image.open(file, formats=readable_formats())


def _decode(stored: bytes | str, upright: bool, most_pixels: int) -> Image.Image:
    """Open, bound, load and bring to RGB. The file is open until the end, as PIL reads metadata late."""
    if isinstance(stored, bytes):
        _require_few_bytes(len(stored))
    else:
        _require_bounded(stored)
    with io.BytesIO(stored) if isinstance(stored, bytes) else open(stored, "rb") as file:
        image = _open_lazily(file)
        _check_size(image.size, most_pixels)
        load_whole(image)
        _check_size(image.size, most_pixels)  # an icon's is known late
        return as_rgb(image, upright)


def _check_size(size: tuple[int, int], most_pixels: int) -> None:
    width, height = size
    if min(size) < 1:
        raise OSError(f"expected pixels, got {width} x {height}")
    if width * height > most_pixels:
        raise OSError(f"expected at most {most_pixels:,} pixels, got {width} x {height}")


def open_image(
    source: ImageSource | None,
    name: str = "The image",
    *,
    upright: bool = True,
    most_pixels: int | None = None,
    advice: str = "Replace the file.",
) -> Image.Image:
    """Decode a picture whole, in RGB, as [`~modeling_dclip.processing_dclip.as_rgb`] says. Of several frames, the
    first.

    Args:
        source: Its bytes, a path, or a value of an image column that is not decoded. An address is not fetched.
        name (`str`, *optional*): What messages call it, e.g. `"Image 'a' (row 1)"`.
        upright (`bool`, *optional*, defaults to `True`): Turn it as its EXIF orientation says.
        most_pixels (`int`, *optional*): Refuse more, before they are decoded; [`MOST_PIXELS`] by default.
        advice (`str`, *optional*): What to do where it cannot be read.

    Raises:
        UnreadableImageError: If it cannot be read or decoded, or is too large. [`MissingImageError`] if the file is
            missing.
    """
    stored = _stored(source)
    if stored is None:
        raise _unreadable(name, _NEITHER, advice)
    try:
        return _decode(stored, upright, MOST_PIXELS if most_pixels is None else most_pixels)
    except UNREADABLE as error:
        raise _unreadable(name, error, advice) from error


class Thumbnail(NamedTuple):
    """A small picture: the content of a JPEG file, and its size in pixels."""

    jpeg: bytes
    width: int
    height: int


def make_thumbnail(image: Image.Image, size: int) -> Thumbnail:
    """A small copy of a picture, for a page.

    Args:
        image (`PIL.Image.Image`): In RGB, as [`open_image`] gives it. It is not changed.
        size (`int`): Longest side in pixels; a smaller picture keeps its size.
    """
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return Thumbnail(buffer.getvalue(), *small.size)


class ImageHeader(NamedTuple):
    """What a picture says of itself, read without decoding it.

    Attributes:
        format (`str`): As PIL calls it: `JPEG`, `PNG`, ...
        mode (`str`): Of its pixels, as PIL calls it: `RGB`, `I;16`, ...
        size (`tuple[int, int]`): Width and height in pixels, as stored.
        is_upright (`bool`): Whether EXIF asks for no turning.
    """

    format: str | None
    mode: str
    size: tuple[int, int]
    is_upright: bool


def read_header(encoded: bytes, name: str = "The image") -> ImageHeader:
    """Read format, size and orientation of a picture.

    Raises:
        UnreadableImageError: If it is no picture, or too large.
    """
    try:
        _require_few_bytes(len(encoded))
        image = _open_lazily(io.BytesIO(encoded))
        _check_size(image.size, MOST_PIXELS)
        return ImageHeader(image.format, image.mode, image.size, orientation_of(image) == 1)
    except UNREADABLE as error:
        raise _unreadable(name, error, "Replace it.") from error


def undecoded_images(dataset: Dataset) -> Dataset:
    """`image_id` and `image` of a dataset, the image as `{"bytes", "path"}` instead of a picture.

    Args:
        dataset (`datasets.Dataset`): With `image` of type `Image`, and if it has them `image_id`.
    """
    names = [name for name in ("image_id", "image") if name in dataset.column_names]
    images = dataset.select_columns(names).with_format(None)
    mode = getattr(images.features["image"], "mode", None)
    return images.cast_column("image", ImageFeature(mode=mode, decode=False))


def decode_image(dataset: Dataset, row: int) -> Image.Image:
    """One image of a dataset, upright, in RGB.

    Args:
        dataset (`datasets.Dataset`): With `image` and, for messages, `image_id`. Where many rows are read, give
            [`undecoded_images`]. A column of a mode of its own, such as `Image(mode="L")`, gives pictures of that mode
            in RGB.
        row (`int`): Which.

    Raises:
        UnreadableImageError: If it cannot be read or decoded; the message names id and row.
    """
    images = undecoded_images(dataset) if dataset.features["image"].decode else dataset
    stored, mode = images[row], images.features["image"].mode
    image = open_image(stored["image"], _name_of(stored, row), advice=_ADVICE)
    # Modes of more bits say how `datasets` keeps the numbers, not what the picture shows.
    return image if mode is None or mode[0] in "IF" else image.convert(mode).convert("RGB")


_ADVICE = (
    "Replace the file or drop the row; train.py and eval.py leave such images out with --on_bad_image skip (train.py "
    "also needs --overwrite true, where stages were begun)."
)


_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}  # how a whole JPEG and PNG end, by how they begin
_END_BYTES = 4096  # of a file: some programs write a little behind the end


def _looks_whole(source: ImageSource | None) -> bool:
    """Whether a picture opens and, if it is a JPEG or PNG, has its end."""
    if not (stored := _stored(source)):
        return False
    try:
        if not isinstance(stored, bytes):
            _require_bounded(stored)
        with io.BytesIO(stored) if isinstance(stored, bytes) else open(stored, "rb") as file:
            _check_size(_open_lazily(file).size, MOST_PIXELS)
            file.seek(0)
            begin = file.read(8)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            end = file.read()
    except UNREADABLE:
        return False
    return all(mark in end for head, mark in _ENDS.items() if begin.startswith(head))


def find_suspects(dataset: Dataset, rows: Sequence[int]) -> list[int]:
    """Rows whose image may be cut or is no picture, told by its two ends. Nothing is decoded.

    Damage in the middle of a file is not found, and an image that is found may still be whole: give the rows to
    [`find_unreadable`].

    Args:
        dataset (`datasets.Dataset`): With `image`.
        rows (`Sequence[int]`): Which to look at.
    """
    images, found = undecoded_images(dataset), list[int]()
    with tqdm(total=len(rows), desc="Checking files", unit="image") as progress:
        for start in range(0, len(rows), IMAGES_PER_READ):
            part = rows[start : start + IMAGES_PER_READ]
            stored = images.select(part)
            found += [row for row, one in zip(part, stored, strict=True) if not _looks_whole(one["image"])]
            progress.update(len(part))
    return found


def find_unreadable(dataset: Dataset, rows: Sequence[int]) -> dict[int, dict[str, str]]:
    """Decode images whole, several at a time, and name those that cannot be read.

    Args:
        dataset (`datasets.Dataset`): With `image`, and if it has them `image_id`.
        rows (`Sequence[int]`): Which to look at.

    Returns:
        `dict[int, dict[str, str]]`: `image_id` (of a dataset without ids, `row N`), `file` and `reason` of each such
            row.
    """
    images, found = undecoded_images(dataset), {}

    def look(row: int, stored: Mapping[str, Any]) -> None:
        try:
            open_image(stored["image"])
        except UnreadableImageError as error:
            file = (stored["image"] or {}).get("path") or "stored bytes"
            found[row] = {"image_id": stored.get("image_id", f"row {row}"), "file": file, "reason": error.reason}

    # Threads that pass through `_open_lazily` at the same time may leave its filter behind: it is taken back here.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        with tqdm(total=len(rows), desc="Checking images", unit="image") as progress:
            for start in range(0, len(rows), IMAGES_PER_READ):
                part = rows[start : start + IMAGES_PER_READ]
                list(pool.map(look, part, images.select(part)))
                progress.update(len(part))
    return {row: found[row] for row in sorted(found)}


def _name_of(stored: Mapping[str, Any], row: int) -> str:
    return f"Image {stored['image_id']!r} (row {row})" if "image_id" in stored else f"The image of row {row}"


def look_up(raw: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replace every 8-bit value by its entry: raw (B, channels, H, W) uint8, table (channels, 256) -> (B, channels, H,
    W).
    """
    offsets = 256 * torch.arange(len(table), dtype=torch.int32, device=raw.device).view(1, -1, 1, 1)
    return table.flatten().index_select(0, (raw.int() + offsets).flatten()).view(raw.shape)


class PixelReader:
    """Images as the encoder sees them: resized and cropped by the image processor once, normalised per batch.

    While all rows fit into `cache_mib`, pixels are kept as uint8 from the start on (read with a progress bar);
    otherwise each batch decodes its images, for which a data loader has workers.

    Args:
        dataset (`datasets.Dataset`): With `image_id` and `image`, at least one row.
        image_processor: Of transformers. If it is of the PIL backend, a probe decides whether a table gives its exact
            values; any other is called for everything, and its pixels are not kept.
        cache_mib (`int`, *optional*, defaults to 2048): Bound in MiB, a process; 0 turns the cache off.
    """

    def __init__(self, dataset: Dataset, image_processor: Any, cache_mib: int = 2048):
        self.images = undecoded_images(dataset)
        self.image_processor = image_processor
        # More than one where images differ in shape: SigLIP 2's NaFlex has masks and grids beside its patches.
        self.input_names = tuple(getattr(image_processor, "model_input_names", ("pixel_values",)))
        self.table = self._value_table()  # (channels, 256), or None
        self.cache: torch.Tensor | None = None
        if self.table is None or not cache_mib:
            return
        first = self.decode([0])
        if len(dataset) * first[0].numel() <= cache_mib * 2**20:
            self.cache = torch.empty(len(dataset), *first.shape[1:], dtype=torch.uint8)
            with tqdm(total=len(dataset), desc="Reading pixels", unit="image") as progress:
                for start in range(0, len(dataset), IMAGES_PER_READ):
                    rows = range(start, min(start + IMAGES_PER_READ, len(dataset)))
                    self.cache[rows.start : rows.stop] = self.decode(rows)
                    progress.update(len(rows))

    def _value_table(self) -> torch.Tensor | None:
        processor = self.image_processor
        rescales = getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False)
        pads = getattr(processor, "do_pad", False)  # comes after normalising, so its zeros are no value of the table
        if getattr(processor, "backend", None) != "pil" or not rescales or pads or len(self.input_names) > 1:
            return None
        greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # (1, 256, 3)
        keep_size = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_last"}
        table = processor(images=greys, return_tensors="pt", **keep_size)["pixel_values"][0, :, 0, :]
        generator = np.random.default_rng(0)
        probes = [generator.integers(0, 256, shape, dtype=np.uint8) for shape in ((37, 61, 3), (90, 50, 3))]
        expected = processor(images=probes, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        raw = self._bytes_of(probes, input_data_format="channels_last")
        same = raw.dtype == torch.uint8 and torch.equal(look_up(raw, table), expected)
        return table if same else None

    def _bytes_of(self, images: list[Any], **kwargs: Any) -> torch.Tensor:
        return self.image_processor(
            images=images, return_tensors="pt", do_rescale=False, do_normalize=False, **kwargs
        )["pixel_values"]

    def decode(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Read rows from the dataset; collate function of a `DataLoader` over row numbers.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`: uint8, or where there is no table the processor's pixel values.

        Raises:
            ValueError: If an image cannot be decoded; the message names its id.
        """
        if self.table is None:
            return self.decode_inputs(rows)["pixel_values"]
        return self._bytes_of(self._images(rows))

    def decode_inputs(self, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Read rows as all that the image processor makes of them, by `input_names`; a collate function too.

        Raises:
            ValueError: If an image cannot be decoded; the message names its id.
        """
        inputs = self.image_processor(images=self._images(rows), return_tensors="pt")
        return {name: inputs[name] for name in self.input_names}

    def _images(self, rows: Sequence[int] | np.ndarray) -> list[Image.Image]:
        return [self._image(int(row)) for row in rows]

    def _image(self, row: int) -> Image.Image:
        image = decode_image(self.images, row)
        try:
            return cut_long(image, self.image_processor)
        except ValueError as error:
            raise _unreadable(_name_of(self.images[row], row), error, _ADVICE) from error

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """What [`PixelReader.decode`] gave as the processor's pixel values, on the device it is on.

        They lie in memory channel by channel of each pixel (`torch.channels_last`), which convolutions are fastest on.
        """
        values = pixels if self.table is None else look_up(pixels, self.table.to(pixels.device))
        return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Rows as normalised float32 `(B, 3, H, W)`."""
        return self.normalise(
            self.decode(rows) if self.cache is None else self.cache[torch.from_numpy(np.asarray(rows))]
        )


def random_resized_crop(pixel_values: torch.Tensor, areas: np.ndarray, places: np.ndarray) -> torch.Tensor:
    """Cut a square of each image and bring it back to full size, bilinearly.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images.
        areas (`np.ndarray` of shape `(B,)`): Share of the area to keep, in (0, 1].
        places (`np.ndarray` of shape `(2, B)`): Where along x and y the square lies in what room there is, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`.
    """
    sides = np.sqrt(areas)
    theta = np.zeros((len(areas), 2, 3), np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = sides
    theta[:, :, 2] = ((2 * places - 1) * (1 - sides)).T
    grid = F.affine_grid(torch.from_numpy(theta), list(pixel_values.shape), align_corners=False)
    return F.grid_sample(pixel_values, grid, mode="bilinear", padding_mode="border", align_corners=False)
