"""Readers of fine-grained questions: published forms, one row a picture, bad input named."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from modeling_dclip.data.questions import QUESTION_SOURCES, load_fine_grained
from modeling_dclip.data.questions.rows import QUESTION_FEATURES
from modeling_dclip.data.questions.tables import standardise_items

DATA = Path(__file__).parents[4] / "shared" / "data"


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def sugarcrepe_entry(number, caption="a dog", negative="a cat"):
    return {"filename": f"{number:012d}.jpg", "caption": caption, "negative_caption": negative}


@pytest.fixture
def sugarcrepe(tmp_path, draw):
    """Two categories over three pictures, one of them in both; keys with gaps, as published."""
    for number in (9, 25, 30):
        draw(tmp_path / "val2017" / f"{number:012d}.jpg", number)
    write_json(
        tmp_path / "questions" / "add_att.json", {"0": sugarcrepe_entry(9), "4": sugarcrepe_entry(25, "two dogs ")}
    )
    swapped = sugarcrepe_entry(9, "a red dog on a blue mat", "a blue dog on a red mat")
    write_json(tmp_path / "questions" / "swap_att.json", {"1": swapped, "2": sugarcrepe_entry(30)})
    return tmp_path


def test_sugarcrepe_gathers_categories_by_picture(sugarcrepe):
    dataset = load_fine_grained(f"sugarcrepe:{sugarcrepe}/questions:{sugarcrepe}/val2017")
    assert dataset.features == QUESTION_FEATURES
    assert dataset["image_id"][:] == ["coco-9", "coco-25", "coco-30"]
    assert dataset["captions"][:] == [["a dog", "a red dog on a blue mat"], ["two dogs"], ["a dog"]]
    assert dataset["negative_captions"][0] == [["a cat"], ["a blue dog on a red mat"]]
    assert dataset["categories"][:] == [["add_att", "swap_att"], ["add_att"], ["swap_att"]]
    with PILImage.open(sugarcrepe / "val2017" / f"{9:012d}.jpg") as picture:
        assert np.array_equal(np.asarray(dataset[0]["image"]), np.asarray(picture))
    one = load_fine_grained(f"sugarcrepe:{sugarcrepe}/questions/swap_att.json:{sugarcrepe}/val2017")
    assert one["categories"][:] == [["swap_att"], ["swap_att"]]


def test_missing_pictures_are_named_or_left_out_on_request(sugarcrepe, caplog):
    (sugarcrepe / "val2017" / f"{9:012d}.jpg").unlink()
    spec = f"sugarcrepe:{sugarcrepe}/questions:{sugarcrepe}/val2017"
    with pytest.raises(FileNotFoundError, match="1 of 3 image files are missing, first: coco-9"):
        load_fine_grained(spec)
    with caplog.at_level(logging.WARNING):
        assert load_fine_grained(f"{spec},missing=skip")["image_id"][:] == ["coco-25", "coco-30"]
    assert "coco-9" in caplog.text and "left out" in caplog.text


def test_questions_without_an_answer_are_left_out_and_reported(tmp_path, draw, caplog):
    draw(tmp_path / "val2017" / f"{9:012d}.jpg")
    same, good = sugarcrepe_entry(9, "a dog ", "a dog"), sugarcrepe_entry(9)
    path = write_json(tmp_path / "swap_obj.json", {"0": same, "1": good})
    with caplog.at_level(logging.WARNING):
        dataset = load_fine_grained(f"sugarcrepe:{path}:{tmp_path}/val2017")
    assert dataset["captions"][:] == [["a dog"]] and "left out 1 question " in caplog.text and "coco-9" in caplog.text
    write_json(path, {"0": same})
    with pytest.raises(ValueError, match="No row with a true and a different false caption is left"):
        load_fine_grained(f"sugarcrepe:{path}:{tmp_path}/val2017")


def winoground_entry(number, **changes):
    names = {f"image_{side}": f"ex_{number}_img_{side}" for side in (0, 1)}
    captions = {"caption_0": "an old person kisses a young person", "caption_1": "a young person kisses an old person"}
    return {"id": number, **names, **captions, "collapsed_tag": "Object", "num_main_preds": 1, **changes}


def write_winoground(folder, draw, entries):
    for number in range(3):
        for side in (0, 1):
            draw(folder / "images" / f"ex_{number}_img_{side}.png", 2 * number + side)
    (folder / "examples.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return f"winoground:{folder}/examples.jsonl:{folder}/images"


def test_winoground_gives_two_rows_a_pair(tmp_path, draw, caplog):
    entries = [
        winoground_entry(0),
        winoground_entry(1, collapsed_tag="Relation"),
        winoground_entry(2, image_1="ex_2_img_1.png"),
    ]
    dataset = load_fine_grained(write_winoground(tmp_path, draw, entries))
    assert dataset["image_id"][:4] == ["winoground-0-0", "winoground-0-1", "winoground-1-0", "winoground-1-1"]
    assert dataset["pair_id"][:] == [f"winoground-{k}" for k in (0, 0, 1, 1, 2, 2)]
    assert dataset["categories"][:] == [["Object"], ["Object"], ["Relation"], ["Relation"], ["Object"], ["Object"]]
    assert dataset["captions"][1] == ["a young person kisses an old person"]
    assert dataset["negative_captions"][1] == [["an old person kisses a young person"]]
    (tmp_path / "images" / "ex_1_img_1.png").unlink()
    spec = f"winoground:{tmp_path}/examples.jsonl:{tmp_path}/images"
    with pytest.raises(FileNotFoundError, match="winoground-1-1"):
        load_fine_grained(spec)
    assert set(load_fine_grained(f"{spec},missing=skip")["pair_id"]) == {"winoground-0", "winoground-2"}
    assert "left out 1 pictures whose pair is not whole" in caplog.text  # the partner of the missing one


def test_winoground_in_parquet_reads_alike(tmp_path, draw):
    entries = [winoground_entry(0), winoground_entry(1, collapsed_tag="Relation")]
    files = load_fine_grained(write_winoground(tmp_path, draw, entries))
    table = {key: [entry[key] for entry in entries] for key in entries[0] if not key.startswith("image")}
    for side in (0, 1):
        table[f"image_{side}"] = [str(tmp_path / "images" / f"ex_{number}_img_{side}.png") for number in (0, 1)]
    features = {"id": Value("int32"), "image_0": Image(), "image_1": Image(), "num_main_preds": Value("int64")}
    features |= {key: Value("string") for key in ("caption_0", "caption_1", "collapsed_tag")}
    Dataset.from_dict(table, features=Features({key: features[key] for key in table})).to_parquet(
        tmp_path / "test.parquet"
    )
    dataset = load_fine_grained(f"parquet:{tmp_path}/*.parquet")
    assert dataset["pair_id"][:] == ["0", "1", "0", "1"] and dataset["image_id"][:] == ["0-0", "1-0", "0-1", "1-1"]
    order = [0, 2, 1, 3]  # of the files' rows in the table's order
    for name in ("captions", "negative_captions", "categories"):
        assert dataset[name][:] == [files[name][row] for row in order]
    for row, place in enumerate(order):
        assert np.array_equal(np.asarray(dataset[row]["image"]), np.asarray(files[place]["image"]))


def relation(name="dog.jpg", word="on", box=(2, 3, 10, 8), **changes):
    fields = dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), box, strict=True)) if box else {}
    captions = {"true_caption": f"the dog is {word} the mat", "false_caption": f"the mat is {word} the dog"}
    return {"image_id": "2343540", "image_path": name, **captions, "relation_name": word, **fields, **changes}


def test_aro_boxes_make_pictures_of_their_own(tmp_path, draw):
    draw(tmp_path / "images" / "dog.jpg")
    questions = [relation(), relation(word="to the left of"), relation(box=(0, 0, 5.5, 5)), relation()]
    spec = f"aro:{write_json(tmp_path / 'vg.json', questions)}:{tmp_path}/images"
    dataset = load_fine_grained(f"{spec},min_items=1")
    assert dataset["image_id"][:] == ["dog.jpg[2,3,12,11]", "dog.jpg[0,0,5.5,5]"]
    assert dataset["crop_box"][:] == [[2, 3, 12, 11], [0, 0, 5.5, 5]]
    assert dataset["categories"][0] == ["on", "to the left of", "on"]
    assert load_fine_grained(f"{spec},min_items=3")["categories"][0] == ["on", "", "on"]


def test_aro_attributes_and_orders_are_read(tmp_path, draw):
    draw(tmp_path / "images" / "dog.jpg")
    attribution = relation(attributes=["red", "round"])
    del attribution["relation_name"]
    path = write_json(tmp_path / "attribution.json", [attribution])
    assert load_fine_grained(f"aro:{path}:{tmp_path}/images,min_items=1")["categories"][:] == [["red round"]]
    order = {"image": "dog.jpg", "caption_options": ["a dog runs fast", "dog a fast runs", "fast a dog runs"]}
    path = write_json(tmp_path / "order.json", [order, {**order, "caption_options": ["a dog", "dog a"]}])
    dataset = load_fine_grained(f"aro:{path}:{tmp_path}/images")
    assert dataset["captions"][:] == [["a dog runs fast", "a dog"]] and "crop_box" not in dataset.column_names
    assert dataset["negative_captions"][:] == [[["dog a fast runs", "fast a dog runs"], ["dog a"]]]


def test_own_questions_are_read_from_json_and_json_lines(tmp_path, draw):
    draw(tmp_path / "images" / "a" / "dog.png")
    several = {"image": "a/dog.png", "caption": "a dog", "negative_captions": ["a cat", "a cow"], "category": "animal"}
    one = {"image": "a/dog.png", "caption": "a dog sits", "negative_caption": "a dog runs"}
    as_list = write_json(tmp_path / "questions.json", [several, one])
    as_lines = tmp_path / "questions.jsonl"
    as_lines.write_text(json.dumps(several) + "\n" + json.dumps(one) + "\n")
    for path in (as_list, as_lines):
        dataset = load_fine_grained(f"json:{path}:{tmp_path}/images")
        assert dataset["image_id"][:] == ["a/dog.png"] and dataset["categories"][:] == [["animal", ""]]
        assert dataset["negative_captions"][:] == [[["a cat", "a cow"], ["a dog runs"]]]


def table_of(tmp_path, draw, rows=4, **changes):
    """Rows of two pictures in turn, stored as bytes."""
    pictures = [draw(tmp_path / f"{number}.png", number).read_bytes() for number in (0, 1)]
    columns = {
        "image": [{"bytes": pictures[row % 2], "path": None} for row in range(rows)],
        "caption": [f"true {row}" for row in range(rows)],
        "negative_caption": [f"false {row}" for row in range(rows)],
        "category": ["odd" if row % 2 else None for row in range(rows)],
    } | changes
    columns = {name: values for name, values in columns.items() if values is not None}
    dataset = Dataset.from_dict({name: values for name, values in columns.items() if name != "image"})
    return (
        dataset.add_column("image", columns["image"]).cast_column("image", Image()) if "image" in columns else dataset
    )


def test_equal_pictures_in_many_rows_of_a_table_become_one_row(tmp_path, draw):
    table_of(tmp_path, draw).to_parquet(tmp_path / "questions.parquet")
    dataset = load_fine_grained(f"parquet:{tmp_path}/questions.parquet")
    assert dataset.features == QUESTION_FEATURES and dataset["image_id"][:] == ["row-0", "row-1"]
    assert dataset["captions"][:] == [["true 0", "true 2"], ["true 1", "true 3"]]
    assert dataset["negative_captions"][:] == [[["false 0"], ["false 2"]], [["false 1"], ["false 3"]]]
    assert dataset["categories"][:] == [["", ""], ["odd", "odd"]]
    with PILImage.open(tmp_path / "1.png") as picture:
        assert np.array_equal(np.asarray(dataset[1]["image"]), np.asarray(picture))


def test_columns_of_other_names_are_named_in_the_spec(tmp_path, draw):
    changes = {"correct": [f"t {row}" for row in range(4)], "kind": ["x"] * 4, "negative_caption": None}
    changes |= {f"hard_{k}": [f"f{k} {row}" for row in range(4)] for k in (1, 2)}
    table_of(tmp_path, draw, **changes).rename_column("image", "images").to_parquet(tmp_path / "order.parquet")
    options = "image=images,caption=correct,negatives=hard_1+hard_2,category=kind"
    dataset = load_fine_grained(f"parquet:{tmp_path}/order.parquet,{options}")
    assert dataset["captions"][0] == ["t 0", "t 2"] and dataset["negative_captions"][0][1] == ["f1 2", "f2 2"]
    assert dataset["categories"][0] == ["x", "x"]


def test_a_local_folder_reads_as_the_hub_does(tmp_path, draw):
    table = table_of(tmp_path, draw, negative_captions=[[f"f {row}", f"g {row}"] for row in range(4)])
    table.to_parquet(tmp_path / "data" / "test-00000.parquet")
    dataset = load_fine_grained(f"hub:{tmp_path}/data:test")
    assert dataset["negative_captions"][0][0] == ["f 0", "g 0"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"caption": None}, {}, "no column 'caption'.*caption=COLUMN"),
        ({"negative_caption": None}, {}, "no column 'negative_captions'.*negatives=COLUMN"),
        ({}, {"category": "kind"}, "no column 'kind'.*category=COLUMN"),
        ({}, {"image": "caption"}, "4 of 4 image files are missing, first: of row 0 .'true 0'.*Fix the paths"),
        ({}, {"image": "number"}, "Expected pictures.*'number'"),
        ({"caption": ["a", " ", "b", "c"]}, {}, "row 1: expected text in the column 'caption', got ' '"),
        ({"negative_caption": [["a"], [], ["b"], ["c"]]}, {}, r"row 1: expected text.*'negative_caption', got \[\]"),
        ({"negative_caption": ["a", None, "b", "c"]}, {}, "row 1: expected text.*got None"),
        ({"caption": [["a", "b"]] * 4}, {}, "row 0: expected one true caption"),
        ({"image": [None] * 4}, {}, "image of row 0 has neither bytes nor a path"),
    ],
)
def test_bad_tables_are_named(tmp_path, draw, changes, options, message):
    table = table_of(tmp_path, draw, number=list(range(4)), **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        standardise_items(table, **options, name="the table")


def test_a_repeated_pair_is_named(tmp_path, draw):
    pictures = [{"bytes": draw(tmp_path / "0.png").read_bytes(), "path": None}] * 2
    features = Features(
        id=Value("int64"), image_0=Image(), image_1=Image(), caption_0=Value("string"), caption_1=Value("string")
    )
    columns = {
        "id": [7, 7],
        "image_0": pictures,
        "image_1": pictures,
        "caption_0": ["a", "b"],
        "caption_1": ["c", "d"],
    }
    with pytest.raises(ValueError, match="1 ids come twice, first: 7"):
        standardise_items(Dataset.from_dict(columns, features=features))


GOOD = {"image": "dog.png", "caption": "a dog", "negative_caption": "a cat"}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("json", "", "empty \\(0 bytes\\)"),
        ("json", "[{", "invalid JSON"),
        ("json", "[]", "one or more entries.*got none"),
        ("json", "3", "JSON list or object.*got a int"),
        ("json", [3], "Item 0 of .*expected a JSON object, got 3"),
        ("json", {"images": [GOOD]}, "Item 'images' of .*expected a JSON object"),
        ("json", [GOOD, {**GOOD, "caption": 3}], "Item 1 of .*expected text under 'caption', got 3"),
        ("json", [{**GOOD, "caption": " "}], "expected text under 'caption', got ' '"),
        ("json", [{**GOOD, "category": 1}], "expected text under 'category', got 1"),
        ("json", [{"image": "dog.png", "negative_caption": "a cat"}], "Item 0 of .* has no key 'caption'"),
        ("json", [{"image": "dog.png", "caption": "a"}], "neither 'negative_captions' nor 'negative_caption'"),
        ("json", [{**GOOD, "negative_captions": {}}], "list of 1 or more texts under 'negative_captions', got {}"),
        ("json", [{**GOOD, "negative_captions": []}], "list of 1 or more texts under 'negative_captions'"),
        (
            "json",
            [{**GOOD, "negative_captions": ["a cat", None]}],
            "expected text under 'negative_captions', got None",
        ),
        ("json", [{**GOOD, "image": "cat.png"}], "image files are missing, first: cat.png"),
        ("sugarcrepe", {"3": {"filename": "dog.png"}}, "Item '3' of .* has no key 'negative_caption'"),
        (
            "sugarcrepe",
            {"3": sugarcrepe_entry(1) | {"filename": "dog.png"}},
            "under 'filename', got 'dog.png'",
        ),
        ("winoground", [winoground_entry(0)], "1 of 2 image files are missing, first: winoground-0-1"),
        ("aro", [relation("dog.png", bbox_w=0)], "bbox_w and bbox_h above 0, got 0"),
        ("aro", [relation("dog.png", bbox_x="2")], "expected a number under 'bbox_x', got '2'"),
        ("aro", [{k: v for k, v in relation("dog.png").items() if k != "bbox_h"}], "no key 'bbox_h'"),
        ("aro", [relation("dog.png"), relation("dog.png", box=None)], "in all entries or in none"),
        ("aro", [relation("dog.png", bbox_x=10**400)], "expected a number under 'bbox_x', got 1000"),
        ("json", [{**GOOD, "caption": "\ud800"}], "Item 0 of .*expected text under 'caption', got half a character"),
        ("winoground", [winoground_entry(0) | {"id": [0]}], r"Item 0 of .*number or text under 'id', got \[0\]"),
        ("aro", [{"image_path": "dog.png"}], "neither 'true_caption' nor 'caption_options'"),
        ("aro", [{"image": "dog.png", "caption_options": ["a"]}], "list of 2 or more texts under 'caption_options'"),
        ("aro", [relation("dog.png", attributes="red", relation_name=" ")], "expected text under 'relation_name'"),
    ],
)
def test_bad_files_are_named(tmp_path, draw, kind, content, message):
    draw(tmp_path / "images" / "dog.png")
    draw(tmp_path / "images" / "ex_0_img_0.png")
    path = tmp_path / "questions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_fine_grained(f"{kind}:{path}:{tmp_path}/images")


@pytest.mark.parametrize("key", ["negative_caption", "negative_captions"])
@pytest.mark.parametrize("wrong", ["a cat", ["a cat", "a cow"]])
def test_one_false_caption_and_a_list_of_them_are_read_under_either_key(tmp_path, draw, key, wrong):
    draw(tmp_path / "dog.png")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "dog.png", "caption": "a dog", key: wrong}]))
    asked = load_fine_grained(f"json:{tmp_path}/a.json:{tmp_path}")
    assert asked["negative_captions"][:] == [[["a cat"] if wrong == "a cat" else wrong]]


def test_a_bad_line_of_json_lines_is_named(tmp_path, draw):
    spec = write_winoground(tmp_path, draw, [winoground_entry(0)])
    path = tmp_path / "examples.jsonl"
    good = path.read_text().strip()
    for bad, message in (
        ("{", "Line 2 of .*invalid JSON"),
        ("[1]", "Line 2 of .*a JSON object"),
        (good, "Line 2 .*repeats the id '0'"),
    ):
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=message):
            load_fine_grained(spec)
    path.write_text(json.dumps({k: v for k, v in winoground_entry(0).items() if k != "caption_1"}))
    with pytest.raises(ValueError, match="Line 1 of .* has no key 'caption_1'"):
        load_fine_grained(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scene", "Unknown kind 'scene'.*Did you mean 'scenes'.*Known kinds: .*sugarcrepe"),
        ("scenes:tset", "'tset'"),
        ("scenes:test,m=3", "Unknown option 'm'.*n, seed, image_size"),
        ("sugarcrepe:{0}", "Expected the form 'sugarcrepe"),
        ("sugarcrepe:{0}:{0}", "SugarCrepe's JSON files.*got none"),
        ("sugarcrepe:{0}/x.json:{0}", "No SugarCrepe file at"),
        ("json:{0}/x.json:{0}/y", "No image folder at"),
        ("parquet:{0}/*.parquet", "No parquet file matches"),
    ],
)
def test_wrong_specs_are_named(tmp_path, spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_fine_grained(spec.format(tmp_path))


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ValueError, match="bad.parquet' is not readable as parquet"):
        load_fine_grained(f"parquet:{tmp_path}/bad.parquet")


def test_every_source_is_in_the_table_of_the_module():
    from modeling_dclip.data import questions as fine_grained_sources

    assert all(f"`{source.form}`" in fine_grained_sources.__doc__ for source in QUESTION_SOURCES.values())
    assert load_fine_grained("scenes,n=2,image_size=48")["image_id"][:] == ["scenes-test-0-0", "scenes-test-0-1"]


def test_the_schema_names_its_types():
    assert QUESTION_FEATURES["negative_captions"] == List(List(Value("string")))


@pytest.mark.real_data
def test_sugarcrepes_form_over_real_photographs(tmp_path):
    folder = DATA / "coco_val_sample"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    content = json.loads((folder / "annotations" / "captions_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    entries = [
        {"filename": names[a["image_id"]], "caption": a["caption"], "negative_caption": f"no {a['caption']}"}
        for a in content["annotations"]
    ]
    path = write_json(tmp_path / "replace_obj.json", {str(index): entry for index, entry in enumerate(entries)})
    dataset = load_fine_grained(f"sugarcrepe:{path}:{folder / 'val2017'}")
    assert len(dataset) == len(names) and sum(map(len, dataset["captions"])) == len(entries)
    assert dataset[0]["image"].size[0] > 100
