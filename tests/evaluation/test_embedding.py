"""Embeddings are those of the plain transformers calls, whatever the batching; bad rows are named."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.embedding import embed_dataset, embed_images, embed_texts


def noise_image(width, height):
    pixels = torch.randint(
        0, 256, (height * width * 3,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return PILImage.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def test_batching_and_workers_change_nothing(tiny_clip, tiny_scenes):
    one = embed_dataset(Encoder(*tiny_clip, batch_size=1), tiny_scenes)
    for options in ({"batch_size": 5}, {"batch_size": 3, "num_workers": 1}):
        other = embed_dataset(Encoder(*tiny_clip, **options), tiny_scenes)
        assert torch.allclose(one.image_embeds, other.image_embeds, atol=1e-6)
        assert torch.allclose(one.text_embeds, other.text_embeds, atol=1e-6)
        assert torch.equal(one.image_of_caption, other.image_of_caption)


def test_embeddings_are_unit_float32_in_the_order_of_the_dataset(tiny_clip, tiny_scenes):
    embeddings = embed_dataset(Encoder(*tiny_clip), tiny_scenes)
    assert embeddings.image_of_caption.tolist() == [row for row in range(8) for _ in range(2)]
    for embeds in (embeddings.image_embeds, embeddings.text_embeds):
        assert embeds.dtype == torch.float32 and not embeds.requires_grad
        assert torch.allclose(embeds.norm(dim=1), torch.ones(len(embeds)), atol=1e-6)
    alone = embed_texts(Encoder(*tiny_clip), [tiny_scenes["captions"][3][1]])
    assert torch.allclose(alone[0], embeddings.text_embeds[7], atol=1e-6)


def test_models_of_one_text_tower_embed_a_text_once(tiny_clip, monkeypatch):
    model, processor = tiny_clip
    student, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        student.visual_projection.weight.mul_(2)
        other.text_projection.weight.mul_(-1)
    calls = Counter()
    for name, one in (("anchor", model), ("student", student), ("other", other)):
        counted = partial(
            lambda name, call, **tokens: calls.update([name]) or call(**tokens), name, one.get_text_features
        )
        monkeypatch.setattr(one, "get_text_features", counted)
    kept = {}
    anchor, taught, apart = (Encoder(one, processor, kept_texts=kept) for one in (model, student, other))
    embeds = embed_texts(anchor, ["red", "a blue square"])
    assert torch.equal(embed_texts(taught, ["red", "a blue square"]), embeds)
    assert torch.equal(embed_texts(taught, ["a blue square", "red"]), embeds.flip(0))
    assert calls == {"anchor": 1, "student": 1} and len(kept) == 2
    assert torch.allclose(embed_texts(apart, ["red", "a blue square"]), -embeds)
    assert calls["other"] == 1 and len(kept) == 1  # those of another tower make room


def test_the_mode_of_the_model_is_restored(tiny_clip, tiny_scenes):
    model, processor = tiny_clip
    for training in (True, False):
        model.train(training)
        embed_images(Encoder(model, processor), tiny_scenes)
        embed_texts(Encoder(model, processor), ["red"])
        assert model.training is training
    model.eval()


def test_a_text_longer_than_the_model_is_cut_and_embedded(tiny_clip):
    embeds = embed_texts(Encoder(*tiny_clip), ["red " * 500, "red " * 600])
    assert torch.allclose(embeds[0], embeds[1], atol=1e-6)


def test_an_undecodable_image_is_named(tiny_clip):
    whole = Image().encode_example(noise_image(40, 40))
    rows = {"image_id": ["good", "broken"], "image": [whole, {"bytes": whole["bytes"][:200], "path": None}]}
    dataset = Dataset.from_dict(rows, features=Features(image_id=Value("string"), image=Image()))
    with pytest.raises(ValueError, match=r"Image 'broken' \(row 1\) cannot be read"):
        embed_images(Encoder(*tiny_clip), dataset)


def test_a_missing_image_file_is_named(tiny_clip, tmp_path):
    rows = {"image_id": ["gone"], "image": [str(tmp_path / "gone.jpg")]}
    dataset = Dataset.from_dict(rows, features=Features(image_id=Value("string"), image=Image()))
    with pytest.raises(ValueError, match=r"Image 'gone' \(row 0\) cannot be read.*gone.jpg"):
        embed_images(Encoder(*tiny_clip), dataset)


@pytest.mark.parametrize("captions", [[], [""], ["a red circle", "  "]])
def test_an_image_without_caption_is_named(tiny_clip, tiny_scenes, captions):
    rows = [*tiny_scenes["captions"][:3], captions, *tiny_scenes["captions"][4:]]
    dataset = tiny_scenes.remove_columns("captions").add_column("captions", rows)
    with pytest.raises(ValueError, match="captions for image_id 'scenes-test-0-3'"):
        embed_dataset(Encoder(*tiny_clip), dataset)


def test_nan_weights_are_named_by_the_first_image(tiny_clip_dir, tiny_clip, tiny_scenes):
    model = type(tiny_clip[0]).from_pretrained(tiny_clip_dir)
    model.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="8 bad ones of 8; the first belongs to the image 'scenes-test-0-0'"):
        embed_images(Encoder(model, tiny_clip[1]), tiny_scenes)


def test_one_tower_is_refused(tiny_clip, tiny_scenes):
    with pytest.raises(TypeError, match="dual encoder"):
        embed_images(Encoder(tiny_clip[0].vision_model, tiny_clip[1]), tiny_scenes)


def test_empty_input_is_refused(tiny_clip, tiny_scenes):
    with pytest.raises(ValueError, match="empty dataset"):
        embed_images(Encoder(*tiny_clip), tiny_scenes.select([]))
    with pytest.raises(ValueError, match="non-empty texts, got 0"):
        embed_texts(Encoder(*tiny_clip), [])
    with pytest.raises(ValueError, match=r"empty: rows \[1\]"):
        embed_texts(Encoder(*tiny_clip), ["red", " "])
    with pytest.raises(ValueError, match="column 'image'"):
        embed_images(Encoder(*tiny_clip), tiny_scenes.remove_columns("image"))
    with pytest.raises(ValueError, match="column 'captions'"):
        embed_dataset(Encoder(*tiny_clip), tiny_scenes.remove_columns("captions"))
