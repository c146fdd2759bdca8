"""Zero-shot classification: CLIP's ensembling, the transformers pipeline as reference, bad input."""

import pytest
import torch
from datasets import Dataset, Value
from transformers import pipeline

from modeling_dclip.data.scenes import CLASS_NAMES, load_single_objects
from modeling_dclip.evaluation.zero_shot import (
    PHOTO_TEMPLATES,
    build_classifier,
    evaluate_zero_shot,
    label_ranks,
    load_classification,
)

NAMES = ["red circle", "blue square", "dog", "photo of the left", "small and large", "right dog"]


@pytest.fixture(scope="module")
def objects():
    dataset = load_single_objects("test", n=12, image_size=40)
    return dataset.cast_column("label", Value("int64")).map(lambda row: {"label": row["label"] % len(NAMES)})


def test_a_class_is_the_normalised_mean_of_normalised_prompts(tiny_clip):
    model, processor = tiny_clip
    templates = ["a {}", "photo of the {} , large"]
    classifier = build_classifier(model, processor, NAMES, templates, batch_size=5)
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
    result = evaluate_zero_shot(model, processor, objects, NAMES, ["a photo of a {}."], batch_size=5)
    for k in (1, 5):
        hits = [
            NAMES[label] in [answer["label"] for answer in found[:k]]
            for label, found in zip(objects["label"], answers, strict=True)
        ]
        assert result[f"top{k}_hits"].tolist() == hits
        assert result[f"top{k}"] == pytest.approx(sum(hits) / len(hits))
    assert result["n"] == 12


def test_ranks_equal_sorting_and_perfect_embeddings_come_first():
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    classifier = torch.nn.functional.normalize(torch.randn(9, 6, generator=generator), dim=1)
    labels = torch.randint(0, 9, (40,), generator=generator)
    order = (images.double() @ classifier.double().T).argsort(dim=1, descending=True)
    assert torch.equal(label_ranks(images, classifier, labels), (order == labels[:, None]).nonzero()[:, 1] + 1)
    assert label_ranks(classifier, classifier, torch.arange(9)).tolist() == [1] * 9


def test_a_collapsed_model_never_hits():
    ones = torch.nn.functional.normalize(torch.ones(7, 5), dim=1)
    assert label_ranks(ones, ones, torch.arange(7)).tolist() == [7] * 7


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (NAMES, [], "at least 1 templates"),
        (NAMES, "a {}", "at least 1 templates, got 'a {}'"),
        (NAMES, ["a {}", "no place"], "hold '{}' once.*got 'no place'"),
        (NAMES, ["{} and {}"], "hold '{}' once"),
        (["dog"], ["a {}"], "at least 2 class names"),
        (["dog", "red", "dog "], ["a {}"], "distinct, non-empty class names, got 'dog'"),
        (["dog", ""], ["a {}"], "distinct, non-empty class names, got ''"),
    ],
)
def test_bad_prompts_are_named(tiny_clip, names, templates, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(*tiny_clip, names, templates)


def test_a_label_out_of_range_is_named(tiny_clip, objects):
    with pytest.raises(ValueError, match=r"labels in \[0, 4\), got 4 in row 4"):
        evaluate_zero_shot(*tiny_clip, objects, NAMES[:4], ["a {}"])
    with pytest.raises(ValueError, match=r"labels in \[0, 3\), got -1 in row 1"):
        label_ranks(torch.eye(3), torch.eye(3), torch.tensor([0, -1, 2]))


def test_another_number_of_classes_is_refused(tiny_clip):
    dataset = load_single_objects("test", n=2, image_size=40)
    with pytest.raises(ValueError, match=f"Expected {len(CLASS_NAMES)} class names.*got 6"):
        evaluate_zero_shot(*tiny_clip, dataset, NAMES, ["a {}"])


def test_a_dataset_without_labels_is_refused(tiny_clip, objects):
    with pytest.raises(ValueError, match="column 'label'"):
        evaluate_zero_shot(*tiny_clip, objects.remove_columns("label"), NAMES, ["a {}"])


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"got \(3, 3\), \(4, 4\) and \(3,\)"):
        label_ranks(torch.eye(3), torch.eye(4), torch.arange(3))


def test_drawn_objects_load_by_spec():
    dataset, names, templates = load_classification("scenes:validation,n=5,image_size=40@3")
    assert (len(dataset), names) == (3, list(CLASS_NAMES))
    assert all("{}" in template for template in templates)


def test_parquet_loads_by_spec(tmp_path):
    load_single_objects("test", n=3, image_size=40).to_parquet(str(tmp_path / "part-0.parquet"))
    dataset, names, templates = load_classification(f"parquet:{tmp_path}/*.parquet")
    assert (len(dataset), names, templates) == (3, list(CLASS_NAMES), list(PHOTO_TEMPLATES))


def test_bad_specs_are_named(tmp_path):
    Dataset.from_dict({"image": ["a"], "label": ["dog"]}).to_parquet(str(tmp_path / "names.parquet"))
    with pytest.raises(ValueError, match="ClassLabel.*class_encode_column"):
        load_classification(f"parquet:{tmp_path}/names.parquet")
    with pytest.raises(FileNotFoundError, match="parquet files at"):
        load_classification(f"parquet:{tmp_path}/none*.parquet")
    with pytest.raises(ValueError, match="Unknown kind 'imagenet'.*scenes.*parquet"):
        load_classification("imagenet")
    with pytest.raises(ValueError, match="at least 9 rows"):
        load_classification("scenes:test,n=4,image_size=40@9")
