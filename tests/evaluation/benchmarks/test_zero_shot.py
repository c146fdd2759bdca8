"""Zero-shot classification: CLIP's ensembling, the transformers pipeline as reference, bad input."""

import pytest
import torch
from datasets import Value
from transformers import pipeline

from modeling_dclip.data.scenes import CLASS_NAMES, load_single_objects
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.zero_shot import (
    ClassifierCache,
    average_precision,
    build_classifier,
    evaluate_zero_shot,
)
from modeling_dclip.evaluation.embedding import embed_images

NAMES = ["red circle", "blue square", "dog", "photo of the left", "small and large", "right dog"]


@pytest.fixture(scope="module")
def objects():
    dataset = load_single_objects("test", n=12, image_size=40)
    return dataset.cast_column("label", Value("int64")).map(lambda row: {"label": row["label"] % len(NAMES)})


def test_a_class_is_the_normalised_mean_of_normalised_prompts(tiny_clip):
    model, processor = tiny_clip
    templates = ["a {}", "photo of the {} , large"]
    classifier = build_classifier(Encoder(model, processor, batch_size=1), NAMES, templates)
    for row, name in enumerate(NAMES):
        prompts = processor(text=[t.format(name) for t in templates], return_tensors="pt", padding=True)
        with torch.no_grad():
            embeds = model.get_text_features(**prompts).pooler_output
        mean = (embeds / embeds.norm(dim=1, keepdim=True)).mean(dim=0)
        assert torch.allclose(classifier[row], mean / mean.norm(), atol=1e-6)


def test_predictions_equal_the_transformers_pipeline(tiny_clip, objects):
    model, processor = tiny_clip
    pipe = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    answers = pipe(list(objects["image"]), candidate_labels=NAMES, hypothesis_template="a photo of a {}.")
    result = evaluate_zero_shot(Encoder(model, processor, batch_size=5), objects, NAMES, ["a photo of a {}."])
    for k in (1, 5):
        hits = [
            NAMES[label] in [answer["label"] for answer in found[:k]]
            for label, found in zip(objects["label"], answers, strict=True)
        ]
        assert result["outcomes"][f"top{k}"].tolist() == [[float(hit), 1.0] for hit in hits]
        assert result[f"top{k}"] == pytest.approx(sum(hits) / len(hits))
    assert result["n"] == 12


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (NAMES, [], "at least 1 templates"),
        (NAMES, "a {}", "at least 1 templates, got 'a {}'"),
        (NAMES, ["a {}", "no place"], "hold '{}' once.*got 'no place'"),
        (NAMES, ["{} and {}"], "hold '{}' once"),
        (["dog"], ["a {}"], "at least 2 class names"),
        (NAMES, ["{c} {}"], "hold '{}' once.*got '{c} {}'"),
        (["dog", " "], ["a {}"], "non-empty class names, got an empty one for class 1"),
    ],
)
def test_bad_prompts_are_named(tiny_clip, names, templates, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(Encoder(*tiny_clip), names, templates)


def test_a_label_out_of_range_is_named(tiny_clip, objects):
    with pytest.raises(ValueError, match=r"integer labels in \[0, 4\), got 4 in row 4"):
        evaluate_zero_shot(Encoder(*tiny_clip), objects, NAMES[:4], ["a {}"])


def test_a_label_that_is_no_integer_is_named(tiny_clip, objects):
    for value, feature in ((0.5, "float32"), (None, "int64")):
        labels = [0] * 11 + [value]
        odd = objects.remove_columns("label").add_column("label", labels, feature=Value(feature))
        with pytest.raises(ValueError, match=r"integer labels in \[0, 6\), got (0.0 in row 0|None in row 11)"):
            evaluate_zero_shot(Encoder(*tiny_clip), odd, NAMES, ["a {}"])


def test_another_number_of_classes_is_refused(tiny_clip):
    dataset = load_single_objects("test", n=2, image_size=40)
    with pytest.raises(ValueError, match=f"Expected {len(CLASS_NAMES)} class names.*got 6"):
        evaluate_zero_shot(Encoder(*tiny_clip), dataset, NAMES, ["a {}"])


def test_a_dataset_without_labels_is_refused(tiny_clip, objects):
    with pytest.raises(ValueError, match="column 'label'"):
        evaluate_zero_shot(Encoder(*tiny_clip), objects.remove_columns("label"), NAMES, ["a {}"])


def test_classes_of_one_name_share_a_row_and_are_told_of(tiny_clip):
    model, processor = tiny_clip
    with pytest.warns(UserWarning, match="1 of 3 classes have the name of another one, e.g. 'dog'"):
        twice = build_classifier(Encoder(model, processor), ["dog", "red", "dog "], ["a {c}", "the {}"])
    once = build_classifier(Encoder(model, processor), ["dog", "red"], ["a {}", "the {}"])
    assert torch.equal(twice, once[[0, 1, 0]])


def test_few_classes_have_no_top5(tiny_clip, objects):
    few = objects.filter(lambda label: label < 4, input_columns="label")
    result = evaluate_zero_shot(Encoder(*tiny_clip), few, NAMES[:4], ["a {}"])
    assert {"top1", "mean_per_class", "n", "outcomes", "chance"} == set(result)
    assert result["chance"] == {"top1": 0.25, "mean_per_class": 0.25}
    assert set(result["outcomes"]) == {"top1", "mean_per_class"}


def test_several_labels_an_image_give_average_precision(tiny_clip, objects):
    model, processor = tiny_clip
    vectors = [[int(column <= label) for column in range(len(NAMES))] for label in objects["label"]]
    several = objects.remove_columns("label").add_column("label", vectors)
    encoder = Encoder(model, processor)
    result = evaluate_zero_shot(encoder, several, NAMES, ["a {}"])
    scores = embed_images(encoder, several) @ build_classifier(encoder, NAMES, ["a {}"]).T
    each = [average_precision(scores[:, k], torch.tensor(vectors)[:, k]) for k in range(len(NAMES))]
    assert result == {"map": pytest.approx(sum(each) / len(each), abs=1e-6), "n": 12}
    with pytest.raises(ValueError, match="Expected 4 zeros and ones an image.*got 6 in row 0"):
        evaluate_zero_shot(Encoder(model, processor), several, NAMES[:4], ["a {}"])


def test_a_cached_classifier_gives_the_same_result(tiny_clip, objects, tmp_path):
    arguments = (Encoder(*tiny_clip), objects, NAMES, ["a {}", "the {}"])
    plain = evaluate_zero_shot(*arguments)
    for _ in range(2):
        found = evaluate_zero_shot(*arguments, classifiers=ClassifierCache(tmp_path))
        assert {name: found[name] for name in ("top1", "top5", "mean_per_class")} == {
            name: plain[name] for name in ("top1", "top5", "mean_per_class")
        }
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
