"""Pictures: one door opens them all, and a batch has the image processor's own values bit for bit, cached or not."""

import http.server
import io
import os
import pickle
import struct
import threading
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from fixtures.pictures import png
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from modeling_dclip.data.columns import dataset_fingerprint, hash_images, row_keys
from modeling_dclip.data.images import (
    MissingImageError,
    PixelReader,
    UnreadableImageError,
    decode_image,
    find_images,
    find_suspects,
    find_unreadable,
    open_image,
    random_resized_crop,
    read_encoded,
    read_header,
    undecoded_images,
)
from modeling_dclip.data.regions import add_regions, build_detector
from modeling_dclip.data.reinforced.shards import storable_image
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.encoders.open_clip import OpenClipImageProcessor
from modeling_dclip.processing_dclip import as_rgb, cut_long

SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def image_processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


@pytest.fixture(scope="module")
def scenes():
    return load_scenes("test", n=6, image_size=40)


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_pixels_equal_the_image_processors(scenes, image_processor, cache_mib):
    reader = PixelReader(scenes, image_processor, cache_mib)
    assert (reader.cache is None) == (cache_mib == 0)
    expected = image_processor(images=[scenes[row]["image"] for row in (4, 1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(reader.read(np.array([4, 1])), expected)


def noise_images(*sizes_and_modes):
    images = []
    for seed, (size, mode) in enumerate(sizes_and_modes):
        channels = len(PILImage.new(mode, (1, 1)).getbands())
        pixels = np.random.default_rng(seed).integers(0, 256, size[0] * size[1] * channels, np.uint8)
        images.append(PILImage.frombytes(mode, size, pixels.tobytes()))
    return images


def as_dataset(images):
    rows = {"image_id": [f"image {row}" for row in range(len(images))], "image": images}
    return Dataset.from_dict(rows, features=Features(image_id=Value("string"), image=Image()))


@pytest.mark.parametrize("options", [{}, {"do_center_crop": False, "size": {"height": 24, "width": 40}}])
@pytest.mark.parametrize("cache_mib", [0, 64])
def test_pixels_of_any_size_and_mode_are_bit_equal_to_the_processors(options, cache_mib):
    processor = CLIPImageProcessorPil(**{**SQUARE, **options})
    images = noise_images(((50, 41), "RGB"), ((20, 70), "RGB"), ((33, 33), "L"), ((30, 30), "RGBA"), ((32, 32), "RGB"))
    reader = PixelReader(as_dataset(images), processor, cache_mib)
    raw = reader.decode(range(5))
    assert raw.dtype == torch.uint8
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(reader.normalise(raw), expected) and torch.equal(reader.read(np.arange(5)), expected)


class PaddingProcessor(CLIPImageProcessorPil):
    """Pads after normalising: its zeros are no value of the table."""

    do_pad = True
    pad_size = {"height": 200, "width": 200}


@pytest.mark.parametrize(
    "processor",
    [
        PaddingProcessor(size={"shortest_edge": 32}, do_center_crop=False),
        CLIPImageProcessorPil(**SQUARE, do_normalize=False),
        CLIPImageProcessorPil(**SQUARE, do_rescale=False),
    ],
    ids=["pads", "does not normalise", "does not rescale"],
)
def test_a_processor_the_table_cannot_reproduce_is_called_as_it_is(processor):
    images = noise_images(((40, 40), "RGB"), ((40, 40), "RGB"))
    reader = PixelReader(as_dataset(images), processor)
    assert reader.table is None and reader.cache is None
    assert torch.equal(reader.read(np.array([1])), processor(images=images[1:], return_tensors="pt")["pixel_values"])


def test_the_torchvision_processor_is_called_as_it_is():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert PixelReader(as_dataset(noise_images(((40, 40), "RGB"))), CLIPImageProcessor()).table is None


def test_reading_a_batch_twice_gives_the_same(scenes, image_processor):
    reader = PixelReader(scenes, image_processor)
    torch.testing.assert_close(reader.read(np.array([0, 1])), reader.read(np.array([0, 1])), rtol=0, atol=0)


def test_pixels_stay_out_of_memory_beyond_the_bound(scenes, image_processor):
    rows = Dataset.from_dict(
        {"image_id": ["a"] * 700, "image": [scenes.with_format(None).to_dict()["image"][0]] * 700},
        features=scenes.select_columns(["image_id", "image"]).features,
    )
    assert PixelReader(rows, image_processor, cache_mib=1).cache is None  # 700 * 3 * 24 * 24 bytes are 1.15 MiB
    assert PixelReader(rows, image_processor, cache_mib=2).cache.shape == (700, 3, 24, 24)


def test_a_truncated_image_is_named(scenes, image_processor):
    rows = scenes.with_format(None).to_dict()
    rows["image"][3]["bytes"] = rows["image"][3]["bytes"][:200]
    broken = Dataset.from_dict(rows, features=scenes.features)
    with pytest.raises(ValueError, match=r"'scenes-test-0-3' \(row 3\) cannot be read"):
        PixelReader(broken, image_processor)


def test_a_crop_of_the_whole_area_changes_nothing_and_a_smaller_one_zooms():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = random_resized_crop(images, np.ones(2), np.full((2, 2), 0.3))
    torch.testing.assert_close(whole, images, rtol=0, atol=1e-5)
    quarter = random_resized_crop(images, np.full(2, 0.25), np.zeros((2, 2)))  # the upper left quarter
    halved = torch.nn.functional.interpolate(images[..., :8, :8], size=16, mode="bilinear")
    torch.testing.assert_close(quarter[..., 2:-2, 2:-2], halved[..., 2:-2, 2:-2], rtol=0, atol=1e-5)


# --- the door ---

FORMATS = {"PNG": ("RGB", "RGBA", "LA", "L", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"),
           "TIFF": ("RGB", "L"), "BMP": ("RGB",), "GIF": ("P",)}  # fmt: skip


def encode(format, mode="RGB", orientation=None, size=(11, 7)):
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = PILImage.fromarray(pixels, "RGBA")
    image = image.convert("RGB").convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    buffer, exif = io.BytesIO(), PILImage.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    options = {} if orientation is None else {"exif": exif}
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encoded_pictures():
    pictures = []
    for format, modes in FORMATS.items():
        for mode in modes:
            pictures.append((f"{format} {mode}", encode(format, mode)))
    for format in ("PNG", "JPEG", "WEBP", "TIFF"):
        for orientation in range(10):
            pictures.append((f"{format} turned {orientation}", encode(format, "RGB", orientation)))
    return pictures


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "encoded"), encoded_pictures(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_pixels_are_those_that_datasets_decodes(tmp_path, name, encoded):
    (tmp_path / "a").write_bytes(encoded)
    stored = Image().decode_example({"bytes": encoded, "path": None})
    rgb = np.asarray(as_rgb(stored))
    for source in (encoded, tmp_path / "a", str(tmp_path / "a"), {"bytes": encoded, "path": None}):
        assert np.array_equal(np.asarray(open_image(source)), rgb)
    dataset = Dataset.from_dict({"image_id": ["a"], "image": [str(tmp_path / "a")]}).cast_column("image", Image())
    for rows in (dataset, undecoded_images(dataset)):
        assert np.array_equal(np.asarray(decode_image(rows, 0)), rgb)
    with PILImage.open(tmp_path / "a") as image:
        as_stored = np.asarray(as_rgb(image, upright=False))
        assert np.array_equal(np.asarray(open_image(encoded, upright=False)), as_stored)
        header = read_header(encoded)
        assert (header.format, header.mode) == (image.format, image.mode)
        assert header.is_upright == ("turned" not in name or name.endswith(" 1"))


def test_a_column_with_a_mode_of_its_own_keeps_it(tmp_path):
    (tmp_path / "a.png").write_bytes(encode("PNG", "RGB"))
    dataset = Dataset.from_dict({"image_id": ["a"], "image": [str(tmp_path / "a.png")]})
    grey = dataset.cast_column("image", Image(mode="L"))
    assert np.array_equal(np.asarray(decode_image(grey, 0)), np.asarray(grey[0]["image"].convert("RGB")))


def with_exif(*entries, extra=b""):
    """A JPEG whose EXIF holds these entries: tag, type, count, four bytes of a value."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    payload = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + extra
    jpeg = encode("JPEG", size=(12, 8))
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    ("encoded", "size"),
    [
        (with_exif(TURNED), (8, 12)),
        (with_exif(TURNED, (0x011A, 10, 1, struct.pack("<I", 38)), extra=struct.pack("<ii", -1, 0)), (8, 12)),
        (with_exif(TURNED, (0x0128, 2, 4, b"cm\0\0")), (8, 12)),
        (with_exif((0x0112, 2, 4, b"top\0")), (12, 8)),
        (with_exif((0x0112, 3, 1, struct.pack("<HH", 9, 0))), (12, 8)),
        (with_exif((0x0112, 3, 2, struct.pack("<HH", 6, 6))), (8, 12)),
    ],
)
def test_odd_metadata_stop_no_picture(encoded, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image(encoded).size == size


def test_whatever_is_wrong_is_one_error_that_names_the_picture(tmp_path, monkeypatch):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UnreadableImageError, match=r"^Image 'a' cannot be read: .+\. Buy a new one\.$") as raised:
            open_image(path, "Image 'a'", advice="Buy a new one.")
        assert "Image 'a'" not in raised.value.reason and isinstance(raised.value, ValueError)
        if path.name != "text.jpg":
            with pytest.raises(UnreadableImageError, match="^Image 'a' cannot be read: .+"):
                read_encoded(path, "Image 'a'")
    with pytest.raises(UnreadableImageError, match="neither bytes nor a path"):
        open_image({"bytes": None, "path": None})
    with pytest.raises(UnreadableImageError, match="neither bytes nor a path"):
        read_encoded(None)
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        read_header(b"no picture")
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 30)
    encoded = encode("PNG")  # 77 pixels: more than twice the limit
    with pytest.raises(UnreadableImageError, match="77 pixels"):
        open_image(encoded)
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UnreadableImageError, match="expected at most 76 pixels, got 11 x 7"):
        open_image(encoded, most_pixels=76)
    assert open_image(encoded).size == (11, 7)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_cut_file_is_a_suspect_and_a_whole_one_is_not(tmp_path, format):
    whole, much = encode(format, size=(40, 30)), bytes(9_000)
    half = whole[: len(whole) // 2]
    contents = [whole, whole + bytes(9), half, half + much, b"text", b"", whole + much]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    sources = [*({"bytes": None, "path": str(one)} for one in [*paths, tmp_path / "none"]), {"bytes": half}]
    images = Dataset.from_dict(
        {"image_id": [str(number) for number in range(len(sources))], "image": sources},
        features=Features({"image_id": Value("string"), "image": Image()}),
    )
    suspects = find_suspects(images, range(len(sources)))
    assert suspects == [2, 3, 4, 5, 6, 7, 8]
    unreadable = set(find_unreadable(images, suspects)) - {3}  # PIL shows a PNG's zeros as black
    assert unreadable == {2, 4, 5, 7, 8}, "bytes behind the end do no harm"


def test_a_missing_file_is_told_apart(tmp_path):
    for read in (open_image, read_encoded):
        with pytest.raises(MissingImageError, match="gone.jpg") as raised:
            read(tmp_path / "gone.jpg", "Image 'a'")
        assert isinstance(raised.value, (FileNotFoundError, ValueError)) and "Image 'a'" not in raised.value.reason
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_errors_of_our_own_code_are_not_taken_for_damage():
    with pytest.raises(TypeError, match="PathLike"):
        open_image(3)


def test_a_workers_error_keeps_its_type(tmp_path):
    dataset = Dataset.from_dict({"image_id": ["a"], "image": [{"bytes": b"no", "path": None}]})
    rows = undecoded_images(dataset.cast_column("image", Image()))
    loader = DataLoader([0], num_workers=1, collate_fn=lambda batch: decode_image(rows, batch[0]))
    with pytest.raises(UnreadableImageError, match=r"Image 'a' \(row 0\) cannot be read"):
        list(loader)


def test_pictures_of_a_folder_are_found_and_others_counted(tmp_path):
    for name in ("b.PNG", "a/c.jpeg", "d.heic", ".e.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    pictures, others = find_images(tmp_path)
    assert [path.name for path in pictures] == ["c.jpeg", "b.PNG"]
    assert others == {".heic": [tmp_path / "d.heic"], "hidden": [tmp_path / ".e.webp"]}


# --- bounds ---


class CountingServer(http.server.BaseHTTPRequestHandler):
    """Counts requests, whatever they ask."""

    requests = 0

    def do_GET(self):
        CountingServer.requests += 1
        self.send_response(404)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    """The address of a server on this machine that counts its requests."""
    CountingServer.requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CountingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.png"
        server.shutdown()


def test_an_address_in_a_row_is_never_fetched(address, tmp_path, image_processor):
    paths = [address, f"zip://a.png::{address}", f"simplecache::{address}", "hf://datasets/o/n/a.png", "s3://b/a.png",
             f"file://{tmp_path}/a.png"]  # fmt: skip
    PILImage.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for path in paths:
        for read in (open_image, read_encoded):
            with pytest.raises(UnreadableImageError, match=r"^Image 'a' cannot be read: .*got the address .*download"):
                read(path, "Image 'a'")
    rows = {
        "image_id": [str(number) for number in range(len(paths))],
        "image": paths,
        "captions": [["a"]] * len(paths),
    }
    saved = Dataset.from_dict(rows).cast_column("image", Image())
    with pytest.raises(UnreadableImageError, match=r"^Image '0' \(row 0\) cannot be read.*got the address 'http://"):
        PixelReader(saved, image_processor)
    for row in range(len(paths)):
        with pytest.raises(UnreadableImageError, match="got the address"):
            decode_image(saved, row)
    report = tmp_path / "report.json"
    options = {"cache_dir": tmp_path / "cache", "on_bad_image": "skip", "report_file": report}
    with pytest.raises(ValueError, match=f"after leaving out {len(paths)} unreadable images"):
        add_regions(saved, build_detector("grid:2x2"), **options)
    assert hash_images(saved) == [None] * len(paths)
    with pytest.raises(UnreadableImageError, match="got the address"):
        row_keys(saved)
    with pytest.raises(ValueError, match="got the address"):
        dataset_fingerprint(saved)
    assert CountingServer.requests == 0


def test_a_file_whose_name_looks_like_an_address_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("http:")
    PILImage.new("RGB", (9, 8)).save("http:/a.png")
    assert open_image("http://a.png").size == (9, 8)


def test_files_are_bounded_before_they_are_read(tmp_path, monkeypatch):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.write(encode("PNG"))
        file.truncate(100 * 2**30)
    for read in (open_image, read_encoded):
        with pytest.raises(UnreadableImageError, match=r"at most 1,073,741,824 bytes, got 107,374,182,400"):
            read(tmp_path / "sparse.png")
    monkeypatch.setattr("modeling_dclip.data.images.MOST_BYTES", 10)
    for read in (open_image, read_header):
        with pytest.raises(UnreadableImageError, match="at most 10 bytes, got"):
            read(encode("PNG"))


def test_pixels_are_bounded_before_they_are_decoded():
    chunk = (b"zTXt", b"comment\0\0" + zlib.compress(bytes(2**26)))
    profile = (b"iCCP", b"p\0\0" + zlib.compress(bytes(2**26)))
    tracemalloc.start()
    for encoded in (
        png((20_000, 20_000), 8, 2, [b"\0"]),
        png((2**31 - 1, 2**31 - 1), 8, 2, [b"\0"]),
        png((2**31 - 1, 1), 1, 0, [b"\0"]),
        png((0, 5), 8, 2, [b"\0"]),
        png((1, 1), 8, 0, [b"\0"], chunk),
        png((1, 1), 8, 0, [b"\0"], profile),
        b"P6 99999 99999 255\n" + bytes(99),
        b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 256, 4, 1, 2**31) + struct.pack("<HHII", 273, 4, 2**31, 8),
    ):
        for read in (open_image, read_header):
            with pytest.raises(UnreadableImageError):
                read(encoded)
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_transparent_pictures_are_laid_over_white_in_bands(monkeypatch):
    layer = noise_images(((40, 31), "RGBA"))[0]
    whole = np.asarray(as_rgb(layer))
    monkeypatch.setattr("modeling_dclip.processing_dclip._VALUES_A_BLOCK", 100)
    assert np.array_equal(np.asarray(as_rgb(layer)), whole)


class WholePictures(CLIPImageProcessorPil):
    """Of a backend that no table reproduces."""

    backend = "other"


def test_a_long_picture_is_cut_or_refused_by_its_name():
    images = as_dataset(noise_images(((3000, 4), "RGB"), ((40, 40), "RGB")))
    processor = CLIPImageProcessorPil(**SQUARE)
    for cache_mib in (0, 64):
        assert PixelReader(images, processor, cache_mib).read(np.arange(2)).shape == (2, 3, 32, 32)
    whole = WholePictures(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(UnreadableImageError, match=r"^Image 'image 0' \(row 0\) cannot be read: .* 3000 x 4 pixels"):
        PixelReader(images, whole, cache_mib=0).decode([0])


def test_a_long_picture_is_cut_for_open_clip_too():
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    transform = open_clip.image_transform(32, is_train=False)
    processor = OpenClipImageProcessor(transform)
    for picture in noise_images(((3000, 4), "RGB"), ((5, 3001), "RGB")):
        cut = cut_long(picture, processor)
        assert max(cut.size) < 40
        pixels = 255 * (transform(cut) - transform(picture)).abs() * torch.tensor(transform.transforms[-1].std)[0]
        assert pixels.max() <= 1.1 and (pixels > 0.1).float().mean() < 1e-2  # of 255; where a rounding is a tie
    squashed = OpenClipImageProcessor(open_clip.image_transform(32, is_train=False, resize_mode="squash"))
    assert cut_long(picture, squashed) is picture


def test_shards_store_16_bits_as_rgb_and_others_as_they_are():
    grey = noise_images(((12, 9), "L"))[0]
    deep = PILImage.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    kind, stored = storable_image(buffer.getvalue())
    with PILImage.open(io.BytesIO(stored)) as image:
        assert kind == "png" and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(grey.convert("RGB")))
    for mode in ("RGB", "L", "P", "RGBA"):
        assert storable_image(encode("PNG", mode)) == ("png", encode("PNG", mode))
