"""Embeddings are those of the plain transformers calls, whatever the batching; bad rows are named."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from modeling_dclip.evaluation.embedding import PixelReader, embed_dataset, embed_images, embed_texts, look_up


def image_rows(*images):
    return [{"image_id": f"image {i}", "image": Image().encode_example(image)} for i, image in enumerate(images)]


def noise_image(width, height, mode="RGB", seed=0):
    channels = len(PILImage.new(mode, (1, 1)).getbands())
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height * width * channels,), generator=generator, dtype=torch.uint8)
    return PILImage.frombytes(mode, (width, height), pixels.numpy().tobytes())


@pytest.mark.parametrize("options", [{}, {"do_center_crop": False, "size": {"height": 24, "width": 40}}])
def test_fast_pixels_are_bit_equal_to_the_pil_processor(options):
    processor = CLIPImageProcessorPil(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **options}
    )
    images = [
        noise_image(50, 41),
        noise_image(20, 70),
        noise_image(33, 33, "L"),
        noise_image(30, 30, "RGBA"),
        noise_image(32, 32),
    ]
    reader = PixelReader(processor)
    raw = reader(image_rows(*images))
    assert raw.dtype == torch.uint8
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(look_up(raw, reader.table), expected)


class PaddingProcessor(CLIPImageProcessorPil):
    """Pads after normalising: its zeros are no value of the table."""

    do_pad = True
    pad_size = {"height": 200, "width": 200}


def test_a_processor_the_table_cannot_reproduce_is_called_as_it_is():
    processor = PaddingProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    reader = PixelReader(processor)
    image = noise_image(40, 40)
    assert reader.table is None
    assert torch.equal(reader(image_rows(image)), processor(images=[image], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("options", [{"do_normalize": False}, {"do_rescale": False}])
def test_a_processor_without_both_steps_is_called_as_it_is(options):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **options)
    image = noise_image(40, 40)
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(PixelReader(processor)(image_rows(image)), expected)


def test_the_torchvision_processor_is_called_as_it_is():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert PixelReader(CLIPImageProcessor()).table is None


def test_batching_and_workers_change_nothing(tiny_clip, tiny_scenes):
    one = embed_dataset(*tiny_clip, tiny_scenes, batch_size=1)
    for options in ({"batch_size": 5}, {"batch_size": 3, "num_workers": 1}):
        other = embed_dataset(*tiny_clip, tiny_scenes, **options)
        assert torch.allclose(one.image_embeds, other.image_embeds, atol=1e-6)
        assert torch.allclose(one.text_embeds, other.text_embeds, atol=1e-6)
        assert torch.equal(one.image_of_caption, other.image_of_caption)


def test_embeddings_are_unit_float32_in_the_order_of_the_dataset(tiny_clip, tiny_scenes):
    embeddings = embed_dataset(*tiny_clip, tiny_scenes)
    assert embeddings.image_of_caption.tolist() == [row for row in range(8) for _ in range(2)]
    for embeds in (embeddings.image_embeds, embeddings.text_embeds):
        assert embeds.dtype == torch.float32 and not embeds.requires_grad
        assert torch.allclose(embeds.norm(dim=1), torch.ones(len(embeds)), atol=1e-6)
    alone = embed_texts(*tiny_clip, [tiny_scenes["captions"][3][1]])
    assert torch.allclose(alone[0], embeddings.text_embeds[7], atol=1e-6)


def test_the_mode_of_the_model_is_restored(tiny_clip, tiny_scenes):
    model, processor = tiny_clip
    for training in (True, False):
        model.train(training)
        embed_images(model, processor, tiny_scenes)
        embed_texts(model, processor, ["red"])
        assert model.training is training
    model.eval()


def test_a_text_longer_than_the_model_is_cut_and_embedded(tiny_clip):
    embeds = embed_texts(*tiny_clip, ["red " * 500, "red " * 600])
    assert torch.allclose(embeds[0], embeds[1], atol=1e-6)


def test_an_undecodable_image_is_named(tiny_clip):
    whole = Image().encode_example(noise_image(40, 40))
    rows = {"image_id": ["good", "broken"], "image": [whole, {"bytes": whole["bytes"][:200], "path": None}]}
    dataset = Dataset.from_dict(rows, features=Features(image_id=Value("string"), image=Image()))
    with pytest.raises(ValueError, match="Expected a readable image.*image_id 'broken'"):
        embed_images(*tiny_clip, dataset)


def test_a_missing_image_file_is_named(tiny_clip, tmp_path):
    rows = {"image_id": ["gone"], "image": [str(tmp_path / "gone.jpg")]}
    dataset = Dataset.from_dict(rows, features=Features(image_id=Value("string"), image=Image()))
    with pytest.raises(ValueError, match="gone.jpg.*image_id 'gone'"):
        embed_images(*tiny_clip, dataset)


@pytest.mark.parametrize("captions", [[], [""], ["a red circle", "  "]])
def test_an_image_without_caption_is_named(tiny_clip, tiny_scenes, captions):
    rows = [*tiny_scenes["captions"][:3], captions, *tiny_scenes["captions"][4:]]
    dataset = tiny_scenes.remove_columns("captions").add_column("captions", rows)
    with pytest.raises(ValueError, match="captions for image_id 'scenes-test-0-3'"):
        embed_dataset(*tiny_clip, dataset)


def test_nan_weights_are_named_by_the_first_image(tiny_clip_dir, tiny_clip, tiny_scenes):
    model = type(tiny_clip[0]).from_pretrained(tiny_clip_dir)
    model.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="8 bad ones of 8; the first belongs to the image 'scenes-test-0-0'"):
        embed_images(model, tiny_clip[1], tiny_scenes)


def test_one_tower_is_refused(tiny_clip, tiny_scenes):
    with pytest.raises(TypeError, match="dual encoder"):
        embed_images(tiny_clip[0].vision_model, tiny_clip[1], tiny_scenes)


def test_empty_input_is_refused(tiny_clip, tiny_scenes):
    with pytest.raises(ValueError, match="empty dataset"):
        embed_images(*tiny_clip, tiny_scenes.select([]))
    with pytest.raises(ValueError, match="non-empty texts, got 0"):
        embed_texts(*tiny_clip, [])
    with pytest.raises(ValueError, match=r"empty: rows \[1\]"):
        embed_texts(*tiny_clip, ["red", " "])
    with pytest.raises(ValueError, match="column 'image'"):
        embed_images(*tiny_clip, tiny_scenes.remove_columns("image"))
    with pytest.raises(ValueError, match="column 'captions'"):
        embed_dataset(*tiny_clip, tiny_scenes.remove_columns("captions"))
