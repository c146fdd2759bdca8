"""False captions: what the rules exchange and what they leave alone, and where datasets name their own."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from modeling_dclip.data.captions import load_captions, load_mix
from modeling_dclip.data.captions.false_captions import collect_negatives, swap_words


@pytest.mark.parametrize(
    "caption, made",
    [
        (
            "A red car behind a blue bus.",
            {
                "colours": "A blue car behind a red bus.",
                "direction": "A red car in front of a blue bus.",
                "order": "A blue bus behind a red car.",
            },
        ),
        ("a man in a red shirt and blue jeans", {"colours": "a man in a blue shirt and red jeans"}),
        ("An orange square near a red circle", {"colours": "A red square near an orange circle"}),
        ("two dogs and three cats", {"numbers": "three dogs and two cats"}),
        ("These four people stand outside with 3 dogs", {"numbers": "These 3 people stand outside with four dogs"}),
        ("a dog on the left and a cat on the right", {"direction": "a dog on the right and a cat on the left"}),
        ("from left to right : a ring and a star", {"direction": "from right to left : a ring and a star"}),
        ("a ring at the bottom and stars over it", {"direction": "a ring at the top and stars over it"}),
        ("A dog is sitting on a couch .", {"order": "A couch is sitting on a dog ."}),
        ("a boy stands on a rocky mountain", {"order": "a rocky mountain stands on a boy"}),
        ("Four dogs jumping over a hurdle", {"order": "A hurdle jumping over four dogs"}),
    ],
)
def test_rules_exchange_two_things(caption, made):
    assert swap_words(caption) == made


@pytest.mark.parametrize(
    "caption",
    [
        "a black and white cat near a dog",  # one cat
        "black, white and brown dogs",
        "a red car and a blue car",  # the same claim
        "two dogs and two cats",
        "one dog with two cats",  # "two dog with one cats"
        "a man left the room",  # no place
        "he looks left and right",
        "two dogs are lying on a couch",  # "a couch are"
        "two people fly kites in a field",  # not known which word is the verb
        "the solitude boat floats on the lake",
        "a woman with a dog near a tree",  # holds both ways
        "ein roter Ball auf einem blauen Tisch",
        "",
    ],
)
def test_rules_leave_a_caption_alone_where_the_outcome_is_not_surely_false(caption):
    assert swap_words(caption) == {}


def rows(captions, negatives=None):
    columns = {"image_id": [f"image-{i}" for i in range(len(captions))], "captions": captions}
    return Dataset.from_dict(columns | ({} if negatives is None else {"negatives": negatives}))


def test_false_captions_of_a_column_and_of_the_rules_are_counted_and_true_ones_left_out(caplog):
    dataset = rows(
        [["A red car behind a blue bus.", "a BLUE car  behind a red bus."], ["a dog"]],
        [["a cat", "a cat"], ["A  dog", "two dogs"]],
    )
    with caplog.at_level(logging.INFO):
        found = collect_negatives(dataset, "both", "training images")
    assert found.lengths.tolist() == [5, 1] and found.values[-1] == "two dogs"
    assert found.values[:5].tolist() == [
        "a cat",
        "A red car in front of a blue bus.",
        "A blue bus behind a red car.",
        "a BLUE car in front of a red bus.",
        "a red bus behind a BLUE car.",
    ]
    assert "6 false captions, of 2 of 2 training images; by rule colours 2, direction 2, order 2" in caplog.text
    assert "1 caption of these images allow none by rule, of image-1" in caplog.text
    assert "left out 3 false captions that an image has as a true one" in caplog.text
    assert collect_negatives(dataset, "column", "training images").values.tolist() == ["a cat", "two dogs"]
    assert collect_negatives(dataset, "swap", "training images").values.tolist() == found.values[1:5].tolist()


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="a column of false captions of the training images, got none.*negatives=COL"):
        collect_negatives(rows([["a dog"]]), "column", "training images")
    with pytest.raises(ValueError, match="of some of the 1 training images, got none.*English"):
        collect_negatives(rows([["ein Hund"]]), "swap", "training images")


def write_csv(folder, draw, text, name="mine.csv"):
    for index, image in enumerate(("a.jpg", "b.jpg")):
        draw(folder / "photos" / image, index)
    (folder / name).write_text(text)
    return f"csv:{folder / name}:{folder / 'photos'}"


def test_a_table_names_false_captions_one_a_line_or_as_a_list(tmp_path, draw):
    text = 'image,caption,wrong\na.jpg,a dog,a cat\na.jpg,pets,\nb.jpg,birds,"[""a bee"", ""an ant""]"\n'
    spec = write_csv(tmp_path, draw, text)
    dataset = load_captions(f"{spec},negatives=wrong")
    assert dataset["negatives"][:] == [["a cat"], ["a bee", "an ant"]]
    assert dataset["captions"][:] == load_captions(spec)["captions"][:] == [["a dog", "pets"], ["birds"]]
    assert "negatives" not in load_captions(spec).column_names
    with pytest.raises(ValueError, match="Expected one column 'worng' in the first line of .*negatives=COLUMN"):
        load_captions(f"{spec},negatives=worng")


def test_parquet_and_hub_name_false_captions_and_rows_of_an_image_share_them(tmp_path, draw):
    picture = str(draw(tmp_path / "a.png"))
    columns = {"image": [picture] * 3, "caption": ["x", "y", "z"], "not": ["u", None, "w"], "key": [1, 1, 2]}
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "folder" / "train.parquet")
    options = "captions=caption,negatives=not,image_id=key"
    for spec in (f"parquet:{tmp_path}/folder/train.parquet", f"hub:{tmp_path}/folder:train"):
        assert load_captions(f"{spec},{options}")["negatives"][:] == [["u"], ["w"]]
    with pytest.raises(ValueError, match="has no column 'nota'.*',negatives=COLUMN'"):
        load_captions(f"parquet:{tmp_path}/folder/train.parquet,captions=caption,negatives=nota")
    with pytest.raises(ValueError, match="Unknown option 'negative'"):
        load_captions(f"parquet:{tmp_path}/folder/train.parquet,captions=caption,negative=not")


def test_a_mix_keeps_the_false_captions_of_the_sources_that_have_some(tmp_path, draw):
    spec = write_csv(tmp_path, draw, "image,caption,wrong\na.jpg,a dog,a cat\n")
    mixed = load_mix([f"{spec},negatives=wrong", "scenes:train,n=2,image_size=32"], seed=0)
    assert mixed["negatives"][:] == [["a cat"], [], []]


def test_a_saved_dataset_keeps_them_and_another_type_is_refused(tmp_path):
    scenes = load_captions("scenes:train,n=2,image_size=32,negatives=true")
    scenes.save_to_disk(tmp_path / "right")
    assert load_captions(f"disk:{tmp_path}/right")["negatives"][:] == scenes["negatives"][:]
    texts = [json.dumps(row) for row in scenes["negatives"][:]]
    scenes.remove_columns("negatives").add_column("negatives", texts).save_to_disk(tmp_path / "wrong")
    with pytest.raises(ValueError, match="Expected the column 'negatives' of .* as lists of text"):
        load_captions(f"disk:{tmp_path}/wrong")


def test_scenes_have_false_sentences_beside_the_same_pictures_and_captions():
    options = {"n": "6", "image_size": "32", "singles": "0.3"}
    spec = "scenes:train," + ",".join(f"{name}={value}" for name, value in options.items())
    plain, more = load_captions(spec), load_captions(f"{spec},negatives=true")
    assert plain["captions"][:] == more["captions"][:]
    assert [image.tobytes() for image in plain["image"][:]] == [image.tobytes() for image in more["image"][:]]
    groups = [len({tuple(box) for box in boxes}) for boxes in more["boxes"][:]]
    assert any(more["negatives"][:]) and all(
        bool(false) or count <= 3 for false, count in zip(more["negatives"][:], groups, strict=True)
    )
    assert all(5 <= len(false) <= 7 for false in more["negatives"][:] if false)
    assert not any(set(false) & set(true) for false, true in zip(more["negatives"], more["captions"], strict=True))
