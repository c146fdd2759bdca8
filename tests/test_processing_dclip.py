"""Processors: the same pixels as CLIP's, exact crops, and boxes that are refused by name."""

import io
import logging
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, CLIPImageProcessorPil, CLIPProcessor
from transformers.utils import logging as transformers_logging

from modeling_dclip import DCLIPProcessor, DCLIPTeacherProcessor
from modeling_dclip.processing_dclip import as_rgb, check_boxes, crop_boxes, cut_long, eight_bits

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def processor(tiny_clip_dir):
    return DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)


def noise(width=50, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def quadrants():
    """A 40 x 20 picture whose quarters are red, green, blue, white."""
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:10, :20, 0] = picture[:10, 20:, 1] = picture[10:, :20, 2] = 255
    picture[10:, 20:] = 255
    return Image.fromarray(picture)


# -- student ---------------------------------------------------------------------------------------------------------


def test_images_and_short_texts_come_out_as_from_clips_processor(tiny_clip_dir):
    stock = CLIPProcessor.from_pretrained(tiny_clip_dir, backend="pil")
    stock.image_processor = CLIPImageProcessorPil.from_pretrained(tiny_clip_dir)
    arguments = {"images": [noise(), noise(33, 70)], "text": ["a red dog", "a"], "return_tensors": "pt"}
    ours, theirs = DCLIPProcessor.from_pretrained(tiny_clip_dir)(**arguments), stock(**arguments, padding=True)
    assert set(ours) == set(theirs) == {"input_ids", "attention_mask", "pixel_values"}
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_image_backend_is_pil_whatever_is_installed(tiny_clip_dir, tmp_path):
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path)
    again = DCLIPProcessor(AutoImageProcessor.from_pretrained(tmp_path), processor.tokenizer).image_processor
    for image_processor in (
        processor.image_processor,
        DCLIPProcessor.from_pretrained(tmp_path).image_processor,
        again,
    ):
        assert isinstance(image_processor, CLIPImageProcessorPil)
        assert list(image_processor.image_mean) == [0.1, 0.2, 0.3]
        assert image_processor.crop_size["height"] == 32


def test_a_caption_of_500_words_is_cut_keeping_its_end_and_said_once(tiny_clip_dir, caplog):
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    transformers_logging.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        ids = processor(text=["a", "once a red dog " * 125], return_tensors="pt")["input_ids"]
        processor(text="once more a red dog " * 100)
    assert ids.shape == (2, 77) and ids[1, -1] == processor.tokenizer.eos_token_id
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "more than the 77 tokens" in caplog.text


def test_a_caption_that_just_fits_is_not_reported(tiny_clip_dir, caplog):
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    assert len(processor(text="a " * 75)["input_ids"]) == 77
    assert not caplog.records


def test_truncation_can_be_switched_off(tiny_clip_dir):
    ids = DCLIPProcessor.from_pretrained(tiny_clip_dir)(text=["a " * 100], truncation=False)["input_ids"]
    assert len(ids[0]) == 102


# -- teacher ---------------------------------------------------------------------------------------------------------


def test_regions_are_padded_masked_and_measured_in_fractions(processor):
    boxes = [[[0, 0, 25, 20], [10, 10, 50, 40]], np.zeros((0, 4)), [[5, 5, 10, 10]]]
    features = processor(
        images=[noise(), noise(), noise()], text=["a", "red", "dog"], boxes=boxes, box_scores=[[0.9, 0.2], [], [0.4]]
    )
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "input_ids": (3, 3),
        "attention_mask": (3, 3),
        "pixel_values": (3, 3, 32, 32),
        "region_pixel_values": (3, 2, 3, 32, 32),
        "region_boxes": (3, 2, 4),
        "region_scores": (3, 2),
        "region_mask": (3, 2),
    }
    assert features["region_mask"].tolist() == [[True, True], [True, False], [True, False]]
    torch.testing.assert_close(features["region_boxes"][0, 1], torch.tensor([0.2, 0.25, 1.0, 1.0]))
    torch.testing.assert_close(features["region_scores"], torch.tensor([[0.9, 0.2], [1.0, 0.0], [0.4, 0.0]]))
    assert not features["region_pixel_values"][1:, 1].any() and not features["region_boxes"][1:, 1].any()


@pytest.mark.parametrize("boxes", [None, [None], [[]], [np.zeros((0, 4))]])
def test_no_box_means_the_whole_image_with_score_one(processor, boxes):
    image = noise()
    features = processor(images=image, boxes=boxes)
    assert features["region_boxes"].tolist() == [[[0, 0, 1, 1]]] and features["region_scores"].tolist() == [[1]]
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = torch.tensor((whole - MEAN) / DEVIATION).permute(2, 0, 1).float()
    torch.testing.assert_close(features["region_pixel_values"][0, 0], expected, rtol=0, atol=1e-5)


def test_a_crop_is_exactly_its_box_resized_without_keeping_its_aspect(processor):
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    boxes = [[0, 0, 20, 10], [20, 0, 40, 10], [0, 10, 20, 20], [20, 10, 40, 20]]
    crops = crop_boxes(quadrants(), np.array(boxes, np.float32), (8, 8))
    assert crops.shape == (4, 8, 8, 3)
    for crop, colour in zip(crops, colours, strict=True):
        assert (crop == colour).all()  # not one grey level of a neighbour
    pixels = processor(images=quadrants(), boxes=[boxes])["region_pixel_values"][0]
    for region, colour in zip(pixels, colours, strict=True):
        expected = (torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        torch.testing.assert_close(region, expected[:, None, None].expand(3, 32, 32), rtol=0, atol=1e-5)


def test_a_box_thinner_than_a_pixel_still_has_one():
    crops = crop_boxes(quadrants(), np.array([[39.9, 0, 40, 10], [3.1, 3.1, 3.2, 3.2]], np.float32), (4, 4))
    assert (crops[0] == [0, 255, 0]).all() and (crops[1] == [255, 0, 0]).all()


def test_max_regions_keeps_the_best_scored_in_their_order(processor):
    boxes = [[[0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 30, 30]]]
    features = processor(images=noise(), boxes=boxes, box_scores=[[0.5, 0.1, 0.9]], max_regions=2)
    torch.testing.assert_close(features["region_scores"], torch.tensor([[0.5, 0.9]]))
    torch.testing.assert_close(features["region_boxes"][0, :, 2], torch.tensor([0.2, 0.6]))


def test_grey_and_transparent_pictures_are_read_as_rgb(processor):
    features = processor(images=[noise().convert("L"), noise().convert("RGBA")], boxes=[[[0, 0, 9, 9]], None])
    assert features["region_pixel_values"].shape == (2, 1, 3, 32, 32)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "I;16"])
def test_a_transparent_region_shows_white_as_the_whole_image_does(processor, mode):
    picture = noise(32, 32).convert("L" if mode == "I;16" else mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)))
    if mode == "P":
        picture.info["transparency"] = 3
    if mode == "I;16":
        picture = picture.convert("I;16")
    features = processor(images=picture)  # no box: the whole image is the region
    torch.testing.assert_close(features["region_pixel_values"][:, 0], features["pixel_values"], rtol=0, atol=1e-6)


def test_texts_alone_need_no_image(processor):
    assert set(processor(text=["a dog"])) == {"input_ids", "attention_mask"}


def test_a_saved_teacher_processor_gives_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    arguments = {"images": noise(), "text": "a dog", "boxes": [[[3, 4, 30, 20]]]}
    again = DCLIPTeacherProcessor.from_pretrained(tmp_path)(**arguments)
    for name, value in processor(**arguments).items():
        assert torch.equal(again[name], value), name


def test_numpy_can_be_asked_for(processor):
    features = processor(images=noise(), return_tensors="np")
    assert isinstance(features["region_mask"], np.ndarray) and isinstance(features["pixel_values"], np.ndarray)


# -- bad boxes -------------------------------------------------------------------------------------------------------

GOOD = [[0, 0, 10, 10]]


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (
            [GOOD, [*GOOD, [10, 0, 51, 10]]],
            None,
            r"box 1 of sample 1: expected a box inside the 50 x 40 image, got \[10",
        ),
        ([GOOD, [[-1, 0, 5, 10]]], None, "box 0 of sample 1: expected a box inside"),
        ([[[10, 0, 10, 10]], GOOD], None, "box 0 of sample 0: expected x1 < x2 and y1 < y2"),
        ([[[10, 9, 20, 3]], GOOD], None, "box 0 of sample 0: expected x1 < x2 and y1 < y2, got .10.0, 9.0, 20.0, 3.0"),
        (
            [GOOD, [[0, 0, float("nan"), 5]]],
            None,
            "box 0 of sample 1: expected four finite numbers, got .0.0, 0.0, nan",
        ),
        ([GOOD, [[0, 0, float("inf"), 5]]], None, "box 0 of sample 1: expected four finite numbers"),
        ([GOOD, [[0, 0, 5]]], None, r"boxes of sample 1: expected shape \(R, 4\), got \(1, 3\)"),
        ([GOOD, [0, 0, 5, 5]], None, r"boxes of sample 1: expected shape \(R, 4\), got \(4,\)"),
        ([GOOD], None, r"boxes: expected one entry per image \(2\), got 1"),
        ([GOOD, GOOD], [[0.5], [0.5, 0.5]], r"box_scores of sample 1: expected shape \(1,\), got \(2,\)"),
        ([GOOD, GOOD], [[0.5]], r"box_scores: expected one entry per image \(2\), got 1"),
        ([GOOD, GOOD], [[0.5], [1.5]], r"box 0 of sample 1: expected a score in \[0, 1\], got 1.5"),
        ([GOOD, GOOD], [[0.5], [float("nan")]], "box 0 of sample 1: expected a score"),
        (None, [[0.5], [0.5]], "expected the boxes they belong to"),
    ],
)
def test_a_bad_box_is_refused_naming_sample_and_box(processor, boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[noise(), noise()], boxes=boxes, box_scores=scores)


def test_boxes_without_images_are_refused(processor):
    with pytest.raises(ValueError, match="images=None"):
        processor(text="a", boxes=[GOOD])


def test_max_regions_below_one_is_refused():
    with pytest.raises(ValueError, match="max_regions: expected at least 1, got 0"):
        check_boxes(GOOD, None, (50, 40), sample=0, max_regions=0)


# -- pictures of every mode ------------------------------------------------------------------------------------------


def pixels_of(picture):
    return np.asarray(as_rgb(picture)).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBX"])
def test_modes_of_8_bits_become_what_pil_makes_of_them(mode):
    smooth = Image.fromarray(np.kron(np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5), np.ones((8, 8), np.uint8)))
    picture = Image.merge("RGB", [smooth, smooth.transpose(2), smooth.transpose(3)]).convert(mode)
    rgb = as_rgb(picture)
    assert rgb.mode == "RGB" and np.array_equal(np.asarray(rgb), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBa", "La", "RGBA", "LA", "PA"])
def test_transparent_pixels_lie_over_white(mode):
    layer = Image.new("RGBA", (4, 3), (20, 20, 20, 0))
    layer.paste((20, 20, 20, 255), (0, 0, 2, 3))
    picture = layer.convert("LA" if mode == "La" else mode).convert(mode)
    assert (pixels_of(picture)[:, :2] == 20).all() and (pixels_of(picture)[:, 2:] == 255).all()


@pytest.mark.parametrize(
    "values",
    [
        np.arange(256, dtype=np.uint16) * 257,
        np.arange(256, dtype=">u2") * 257,
        np.arange(256, dtype=np.int32),
        np.arange(256, dtype=np.int64) * 257,
        np.arange(256, dtype=np.float32),
        np.arange(256, dtype=np.float64) / 255,
        np.arange(256, dtype=np.float32) * 257,
        (np.arange(256) / 255).astype(np.float16),
        np.arange(256, dtype=np.uint8),
    ],
    ids=lambda values: f"{values.dtype}-{values.max():g}",
)
def test_numbers_of_every_type_become_their_8_bits(values):
    assert eight_bits(values).tolist() == list(range(256))


def test_true_is_white_and_a_known_scale_is_kept():
    assert eight_bits(np.array([True, False])).tolist() == [255, 0]
    assert eight_bits(np.array([0, 255, 65535], np.int32), white=65535).tolist() == [0, 1, 255]
    assert eight_bits(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, np.nan], "from nan to nan"),
        ([0.5, np.inf], "to inf"),
        ([-1.0, 3.0], "from -1 to 3, expected 0 to 1, to 255 or to 65535"),
        ([0, 70000], "from 0 to 70000"),
        ([0.5] * 99 + [3.0], "whose mean is 0.525: on a scale of 0 to 255 it would be black"),
        ([10] * 999 + [40000], "on a scale of 0 to 65535 it would be black"),
        ([1j], "expected numbers, got complex128"),
    ],
)
def test_numbers_without_a_scale_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^A picture.*{message}"):
        eight_bits(np.array(values), "A picture")


def test_a_picture_is_turned_once_and_says_so_no_more(processor):
    picture = noise(30, 20)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for format in ("PNG", "TIFF"):
            buffer = io.BytesIO()
            picture.save(buffer, format, exif=exif)
            opened = Image.open(buffer)
            upright = as_rgb(opened)
            assert np.array_equal(pixels_of(upright), np.asarray(ImageOps.exif_transpose(Image.open(buffer))))
            assert as_rgb(upright) is upright and upright.getexif().get(0x0112, 1) == 1
            assert np.array_equal(pixels_of(upright.resize((9, 9))), np.asarray(upright.resize((9, 9))))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)  # turned by 90 degrees
    stored = as_rgb(Image.open(buffer), upright=False)
    assert np.array_equal(np.asarray(stored), np.asarray(picture)) and as_rgb(stored) is stored
    boxes = [[[0, 0, 20, 30]]]  # of the upright picture
    turned = processor(images=Image.open(buffer), boxes=boxes)
    plain = processor(images=upright, boxes=boxes)
    for name in ("pixel_values", "region_pixel_values"):
        assert torch.equal(turned[name], plain[name])


@pytest.mark.parametrize("make", [DCLIPProcessor, DCLIPTeacherProcessor])
def test_processors_keep_what_16_bit_and_transparent_pictures_hold(tiny_clip_dir, make):
    processor = make.from_pretrained(tiny_clip_dir)
    grey = noise().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    layer = noise()
    layer.putalpha(0)
    white = Image.new("RGB", layer.size, "white")
    features = processor(images=[grey, deep, layer, white], return_tensors="pt")
    for name in {"pixel_values", "region_pixel_values"} & set(features):
        assert torch.equal(features[name][0], features[name][1])
        assert torch.equal(features[name][2], features[name][3])


def test_arrays_of_every_type_and_layout_are_the_same_picture(tiny_clip_dir):
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    array = np.asarray(noise())
    expected = processor(images=noise(), return_tensors="pt")["pixel_values"]
    channels_first = torch.from_numpy(array.transpose(2, 0, 1).copy())
    pictures = [array, array.astype(np.uint16) * 257, array / 255, array.astype(np.float32), array.astype(np.int64)]
    pictures += [channels_first, channels_first.float() / 255, (channels_first / 255).to(torch.float64)]
    for given in (*pictures, pictures):
        found = processor(images=given, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected.expand_as(found))
    rescaled = processor(images=array.astype(np.float32) / 255, do_rescale=False, return_tensors="pt")
    torch.testing.assert_close(rescaled["pixel_values"], expected, rtol=0, atol=0.05)
    grey = processor(images=array[..., 0], return_tensors="pt")["pixel_values"]
    assert torch.equal(grey, processor(images=Image.fromarray(array[..., 0]), return_tensors="pt")["pixel_values"])


def test_what_is_no_picture_is_refused(tiny_clip_dir, processor):
    student = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    with pytest.raises(TypeError, match="got str: 'a.png'. Open it first"):
        student(images="a.png")
    with pytest.raises(ValueError, match=r"Expected pixels, got an array of shape \(0, 3, 3\)"):
        student(images=np.zeros((0, 3, 3)))
    with pytest.raises(ValueError, match="The array holds values from nan"):
        student(images=[noise(), np.full((9, 9, 3), np.nan)])
    with pytest.raises(TypeError, match="Expected pictures of PIL, got ndarray"):
        processor(images=np.zeros((9, 9, 3), np.uint8))


@pytest.mark.parametrize(
    "crop", [{"height": 32, "width": 32}, {"height": 24, "width": 40}, {"height": 48, "width": 50}]
)
@pytest.mark.parametrize("size", [(777, 5), (5, 778), (4001, 31), (30, 4000)])
def test_a_long_picture_is_cut_to_the_pixels_of_its_centre_crop(size, crop):
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    picture = noise(*size)
    cut = cut_long(picture, image_processor)
    assert max(cut.size) < 100
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    found, expected = (image_processor(images=one, **options)["pixel_values"].astype(int) for one in (cut, picture))
    differences = np.abs(found - expected)
    assert differences.max() <= 1 and (differences > 0).mean() < 1e-2  # where a rounding is a tie
    assert cut_long(picture, CLIPImageProcessorPil(size={"height": 9, "width": 9})) is picture
    assert cut_long(noise(100, 50), image_processor).size == (100, 50)


def test_a_long_picture_that_would_not_be_cut_is_refused():
    whole = CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(ValueError, match="has 777 x 5 pixels, more than 50 times as long as wide"):
        cut_long(noise(777, 5), whole)


def test_a_very_long_picture_takes_little_memory(tiny_clip_dir):
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    for size in ((100_000, 4), (4, 100_000)):
        picture = Image.new("RGB", size, (230, 30, 60))
        tracemalloc.start()
        pixels = processor(images=[picture, np.asarray(picture)], return_tensors="pt")["pixel_values"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        square = processor(images=Image.new("RGB", (40, 40), (230, 30, 60)), return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, square.expand_as(pixels)) and peak < 2**25
