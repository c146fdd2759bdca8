"""Pixels: a batch at a time gives the image processor's own values bit for bit, cached or not."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from modeling_dclip.data.images import PixelReader, random_resized_crop
from modeling_dclip.data.scenes import load_scenes

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
