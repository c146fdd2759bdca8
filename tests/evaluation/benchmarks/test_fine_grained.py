"""Fine-grained questions: a naive reference, Winoground's definitions, units of the outcomes, bad input."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image as PILImage

from modeling_dclip.data.questions import load_fine_grained
from modeling_dclip.data.questions.rows import CROP_FEATURE, PAIR_FEATURE, QUESTION_FEATURES
from modeling_dclip.data.scenes import encode_png
from modeling_dclip.data.scenes.hard_negatives import CATEGORIES
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import TIE_TOLERANCE
from modeling_dclip.evaluation.benchmarks.fine_grained import (
    evaluate_fine_grained,
    pair_hits,
    paired_cosines,
    question_hits,
    questions_fingerprint,
)

WORDS = ["red", "blue", "small", "large", "circle", "square", "dog", "photo", "left", "right"]


def noise(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PILImage.fromarray(pixels)


def random_questions(rows=6, seed=0):
    """Pictures of noise with one to three questions each, of one to three false captions."""
    rng = np.random.default_rng(seed)
    columns = {name: [] for name in QUESTION_FEATURES}
    for row in range(rows):
        asked = rng.integers(1, 4)
        texts = [[" ".join(rng.choice(WORDS, 4)) for _ in range(1 + rng.integers(1, 4))] for _ in range(asked)]
        columns["image_id"].append(f"noise-{row}")
        columns["image"].append(encode_png(noise(row)))
        columns["captions"].append([own[0] for own in texts])
        columns["negative_captions"].append([own[1:] for own in texts])
        columns["categories"].append([str(name) for name in rng.choice(["on", "To the left-of", ""], asked)])
    return Dataset.from_dict(columns, features=QUESTION_FEATURES)


def embed(model, processor, *, image=None, text=None):
    """One picture or text alone, in float64, of length one."""
    with torch.no_grad():
        if image is not None:
            output = model.get_image_features(**processor(images=image, return_tensors="pt"))
        else:
            output = model.get_text_features(**processor(text=[text], return_tensors="pt"))
    vector = output.pooler_output[0].double()
    return vector / vector.norm()


def test_accuracies_equal_a_naive_loop(tiny_clip):
    model, processor = tiny_clip
    dataset = random_questions(rows=12)
    expected = {}
    for row in dataset:
        image = embed(model, processor, image=row["image"])
        for true, wrong, category in zip(row["captions"], row["negative_captions"], row["categories"], strict=True):
            scores = [float(image @ embed(model, processor, text=text)) for text in (true, *wrong)]
            hit = all(scores[0] > score for score in scores[1:])
            name = {"on": "on_accuracy", "To the left-of": "to_the_left_of_accuracy", "": None}[category]
            for metric in {"accuracy", name} - {None}:
                expected.setdefault(metric, []).append((hit, 1 / len(scores)))
    result = evaluate_fine_grained(Encoder(model, processor, batch_size=5), dataset)
    assert 0.1 < result["accuracy"] < 0.9
    for metric, pairs in expected.items():
        hits, chances = zip(*pairs, strict=True)
        assert result[metric] == pytest.approx(np.mean(hits), abs=1e-12)
        assert result["chance"][metric] == pytest.approx(np.mean(chances), abs=1e-12)
    assert result["n"] == len(expected["accuracy"])
    both = [result["on_accuracy"], result["to_the_left_of_accuracy"]]
    assert result["mean_category_accuracy"] == pytest.approx(np.mean(both), abs=1e-12)
    floats = {name for name, value in result.items() if isinstance(value, float)}
    assert floats == {*expected, "mean_category_accuracy"} == set(result["chance"])


def test_outcomes_have_a_row_a_picture_and_give_the_metrics(tiny_clip):
    dataset = random_questions(rows=9)
    result = evaluate_fine_grained(Encoder(*tiny_clip), dataset)
    assert set(result["outcomes"]) == {"accuracy", "on_accuracy", "to_the_left_of_accuracy"}
    for metric, sums in result["outcomes"].items():
        assert sums.shape == (9, 2) and sums.dtype == torch.float64
        assert float(sums[:, 0].sum() / sums[:, 1].sum()) == result[metric]
    assert result["outcomes"]["accuracy"][:, 1].tolist() == [len(own) for own in dataset["captions"]]


def test_nothing_depends_on_batches_or_on_the_order_of_rows(tiny_clip):
    dataset = random_questions(rows=9)
    first, second = (evaluate_fine_grained(Encoder(*tiny_clip, batch_size=size), dataset) for size in (2, 64))
    order = [4, 0, 8, 2, 1, 3, 7, 5, 6]
    third = evaluate_fine_grained(Encoder(*tiny_clip), dataset.select(order))
    for metric, sums in first["outcomes"].items():
        assert torch.equal(sums, second["outcomes"][metric])
        assert torch.equal(sums[order], third["outcomes"][metric])


def test_every_picture_and_every_text_is_embedded_once(tiny_clip, monkeypatch):
    model, processor = tiny_clip
    seen = {"images": 0, "texts": 0}
    images, texts = model.get_image_features, model.get_text_features

    def count_images(pixel_values, **kwargs):
        seen["images"] += len(pixel_values)
        return images(pixel_values=pixel_values, **kwargs)

    def count_texts(input_ids, **kwargs):
        seen["texts"] += len(input_ids)
        return texts(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "get_image_features", count_images)
    monkeypatch.setattr(model, "get_text_features", count_texts)
    dataset = load_fine_grained("scenes:test,n=3,image_size=48")
    evaluate_fine_grained(Encoder(model, processor), dataset)
    different = {row["captions"][0] for row in dataset} | {t for row in dataset for (t,) in row["negative_captions"]}
    assert seen == {"images": 3, "texts": len(different)} and len(different) < sum(
        2 * len(c) for c in dataset["captions"]
    )


def test_a_tie_counts_against_the_model():
    true, question = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0, 1, 2])
    false = torch.tensor([0.5, 0.5 - TIE_TOLERANCE / 2, 0.5 - 4 * TIE_TOLERANCE])
    assert question_hits(true, false, question).tolist() == [False, False, True]
    assert not any(hit.any() for hit in pair_hits(torch.full((3, 2, 2), 0.3)).values())


def test_one_false_caption_above_is_enough_to_be_wrong():
    false, question = torch.tensor([0.1, 0.7, 0.2, 0.3]), torch.tensor([0, 0, 1, 1])
    assert question_hits(torch.tensor([0.5, 0.4]), false, question).tolist() == [False, True]
    with pytest.raises(ValueError, match="none for question 1"):
        question_hits(torch.tensor([0.5, 0.4]), false, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="question_of_false"):
        question_hits(torch.tensor([0.5, 0.4]), false, question[:2])


def test_pairs_are_scored_as_winoground_defines_it():
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20000, 2, 2, generator=generator)
    hits = pair_hits(cosines)
    for row in range(200):
        s = {(caption, image): float(cosines[row, image, caption]) for caption in (0, 1) for image in (0, 1)}
        text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        assert [bool(hits[f"{name}_score"][row]) for name in ("text", "image", "group")] == [
            text,
            image,
            text and image,
        ]
    for name, chance in (("text", 1 / 4), ("image", 1 / 4), ("group", 1 / 6)):
        assert float(hits[f"{name}_score"].double().mean()) == pytest.approx(chance, abs=0.015)
    with pytest.raises(ValueError, match=r"shape \(pairs, 2, 2\)"):
        pair_hits(cosines[0])


def pairs(number=5, **changes):
    """Two pictures and two captions a pair, second pictures last, as the table reader orders them."""
    ids = [f"{pair}" for pair in range(number)]
    texts = [
        [f"red circle {WORDS[pair]}" for pair in range(number)],
        [f"blue square {WORDS[pair]}" for pair in range(number)],
    ]
    columns = {
        "image_id": [f"{pair}-{side}" for side in (0, 1) for pair in ids],
        "image": [encode_png(noise(seed)) for seed in range(2 * number)],
        "captions": [[text] for side in (0, 1) for text in texts[side]],
        "negative_captions": [[[text]] for side in (1, 0) for text in texts[side]],
        "categories": [["Object" if row % number < 3 else "Relation"] for row in range(2 * number)],
        "pair_id": ids * 2,
    } | changes
    return Dataset.from_dict(columns, features=Features({**QUESTION_FEATURES, "pair_id": PAIR_FEATURE}))


def test_pairs_of_a_dataset_equal_a_naive_loop(tiny_clip):
    model, processor = tiny_clip
    dataset = pairs()
    result = evaluate_fine_grained(Encoder(model, processor, batch_size=3), dataset)
    for pair in range(5):
        rows = [dataset[pair], dataset[5 + pair]]
        images = [embed(model, processor, image=row["image"]) for row in rows]
        texts = [embed(model, processor, text=row["captions"][0]) for row in rows]
        s = [[float(image @ text) for text in texts] for image in images]
        text, image = s[0][0] > s[0][1] and s[1][1] > s[1][0], s[0][0] > s[1][0] and s[1][1] > s[0][1]
        for name, hit in (("text", text), ("image", image), ("group", text and image)):
            assert result["outcomes"][f"{name}_score"][pair].tolist() == [float(hit), 1.0]
            own = "object" if pair < 3 else "relation"
            assert result["outcomes"][f"{own}_{name}_score"][pair].tolist() == [float(hit), 1.0]
    assert result["n"] == 5 and "accuracy" not in result
    assert result["outcomes"]["relation_text_score"][:, 1].tolist() == [0, 0, 0, 1, 1]
    assert result["chance"]["group_score"] == result["chance"]["object_group_score"] == 1 / 6


def cropped(boxes, size=(40, 36)):
    """One picture of noise a box, asked about the part inside it."""
    columns = {
        "image_id": [f"part-{row}" for row in range(len(boxes))],
        "image": [encode_png(noise(row, size)) for row in range(len(boxes))],
        "captions": [["red circle"]] * len(boxes),
        "negative_captions": [[["blue square"]]] * len(boxes),
        "categories": [["on"]] * len(boxes),
        "crop_box": boxes,
    }
    return Dataset.from_dict(columns, features=Features({**QUESTION_FEATURES, "crop_box": CROP_FEATURE}))


def test_only_the_part_in_the_box_is_looked_at(tiny_clip, monkeypatch):
    model, processor = tiny_clip
    seen, features = [], model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixel_values: seen.append(pixel_values) or features(pixel_values)
    )
    boxes = [[row, 2, 20 + row, 30] for row in range(12)]
    evaluate_fine_grained(Encoder(model, processor, batch_size=5), cropped(boxes))
    parts = [noise(row).crop(tuple(box)) for row, box in enumerate(boxes)]
    assert torch.equal(torch.cat(seen), processor(images=parts, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    "box", [[40, 0, 50, 9], [0, 36, 9, 50], [-9, 0, 0, 9], [5, 5, 5, 9], [0, 0, 9, 1e30], [-200, 0, 9, 9]]
)
def test_a_box_outside_the_picture_is_named(tiny_clip, box):
    with pytest.raises(ValueError, match="'part-1'.*meets the picture of 40 x 36 pixels"):
        evaluate_fine_grained(Encoder(*tiny_clip), cropped([[0, 0, 9, 9], box]))


def test_chosen_cosines_equal_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (7, 11))
    i, t = (torch.randint(0, n, (20000,), generator=generator) for n in (7, 11))
    assert torch.allclose(paired_cosines(images, texts, i, t), (images @ texts.T)[i, t], atol=1e-6)


def test_scenes_ask_every_category_at_even_odds(tiny_clip):
    result = evaluate_fine_grained(Encoder(*tiny_clip), load_fine_grained("scenes:test,n=12,image_size=48"))
    assert {f"{name}_accuracy" for name in CATEGORIES} <= set(result["outcomes"])
    assert set(result["chance"].values()) == {0.5}
    assert result["n"] == int(result["outcomes"]["accuracy"][:, 1].sum()) > 60


def test_the_fingerprint_sees_all_that_is_asked():
    dataset = random_questions()
    prints = [
        questions_fingerprint(dataset),
        questions_fingerprint(pairs()),
        questions_fingerprint(cropped([[0, 0, 9, 9]])),
    ]
    for column, value in (("negative_captions", [["other"]]), ("categories", ["other"])):
        rows = dataset[column][:]
        changed = dataset.remove_columns(column).add_column(
            column, [value * len(rows[0]), *rows[1:]], feature=QUESTION_FEATURES[column]
        )
        prints.append(questions_fingerprint(changed))
    prints += [
        questions_fingerprint(pairs(pair_id=["0", "2", "1", "3", "4"] * 2)),
        questions_fingerprint(cropped([[0, 0, 9, 8]])),
    ]
    assert len(set(prints)) == len(prints)
    assert questions_fingerprint(random_questions()) == prints[0]
    assert prints[0].startswith("sha256:")


def test_bad_datasets_are_named(tiny_clip):
    dataset = random_questions(rows=3)
    with pytest.raises(ValueError, match="without \\['categories'\\].*load_fine_grained"):
        evaluate_fine_grained(Encoder(*tiny_clip), dataset.remove_columns("categories"))
    uneven = {name: dataset[name][:] for name in ("image_id", "captions", "negative_captions", "categories")}
    uneven["image"] = [encode_png(noise(row)) for row in range(3)]
    for column, value in (("captions", []), ("categories", []), ("negative_captions", [[]])):
        columns = uneven | {column: [*uneven[column][:1], value, uneven[column][2]]}
        with pytest.raises(ValueError, match="image_id 'noise-1'"):
            evaluate_fine_grained(Encoder(*tiny_clip), Dataset.from_dict(columns, features=QUESTION_FEATURES))
    with pytest.raises(
        ValueError, match="Expected two rows of one caption each with pair_id '0', got rows \\[0, 1, 5\\]"
    ):
        evaluate_fine_grained(Encoder(*tiny_clip), pairs(pair_id=["0", "0", "2", "3", "4", "0", "1", "2", "3", "4"]))
    columns = uneven | {"image": [*uneven["image"][:2], {"bytes": b"no picture", "path": None}]}
    with pytest.raises(ValueError, match="noise-2"):
        evaluate_fine_grained(Encoder(*tiny_clip), Dataset.from_dict(columns, features=QUESTION_FEATURES))


@pytest.mark.real_data
def test_sugarcrepes_form_is_answered_over_real_photographs(tiny_clip, tmp_path, pytestconfig):
    folder = pytestconfig.rootpath.parent / "shared" / "data" / "coco_val_sample"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    content = json.loads((folder / "annotations" / "captions_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"][:20]}
    owned = [a for a in content["annotations"] if a["image_id"] in names]
    entries = {}
    for index, annotation in enumerate(owned):  # the caption of another photograph is the false one
        other = next(a for a in owned[index:] + owned if a["image_id"] != annotation["image_id"])
        texts = {"caption": annotation["caption"], "negative_caption": other["caption"]}
        entries[str(index)] = {"filename": names[annotation["image_id"]], **texts}
    path = tmp_path / "replace_obj.json"
    path.write_text(json.dumps(entries))
    result = evaluate_fine_grained(Encoder(*tiny_clip), load_fine_grained(f"sugarcrepe:{path}:{folder / 'val2017'}"))
    assert result["n"] == len(entries) and result["outcomes"]["accuracy"].shape == (20, 2)
    assert result["replace_obj_accuracy"] == result["accuracy"] and 0.2 < result["accuracy"] < 0.8
