"""Every reader finds pictures by the same rules, whatever kind of file names them."""

import csv
import json
import logging
import os
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Image

from modeling_dclip.data.captions.files import (
    read_coco,
    read_conceptual,
    read_csv,
    read_flickr30k,
    read_images,
    read_karpathy,
)
from modeling_dclip.data.captions.tables import read_parquet
from modeling_dclip.data.labels import load_classification
from modeling_dclip.data.questions.files import read_aro, read_questions, read_sugarcrepe, read_winoground
from modeling_dclip.data.questions.tables import read_item_tables
from modeling_dclip.data.rows import clean_captions, coco_id, flickr_id


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def rows_of_csv(folder, names, **options):
    path = folder.parent / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((name, "a dog") for name in names)])
    return read_csv(str(path), str(folder), **options)


def rows_of_coco(folder, names, **options):
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    annotations = [{"id": n, "image_id": n, "caption": "a dog"} for n in range(len(names))]
    content = {"images": images, "annotations": annotations}
    return read_coco(write_json(folder.parent / "coco.json", content), str(folder), **options)


def rows_of_karpathy(folder, names, **options):
    images = [{"filename": name, "split": "test", "sentences": [{"raw": "a dog"}]} for name in names]
    return read_karpathy(write_json(folder.parent / "k.json", {"images": images}), str(folder), "test", **options)


def rows_of_flickr30k(folder, names, **options):
    path = folder.parent / "results.csv"
    lines = ["image_name| comment_number| comment", *(f"{name}| 0| a dog" for name in names)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_flickr30k(str(path), str(folder), **options)


def rows_of_conceptual(folder, names, **options):
    path = folder.parent / "table.tsv"
    path.write_text("\n".join(f"a dog\thttp://x/{n}\t{name}" for n, name in enumerate(names)), encoding="utf-8")
    return read_conceptual(str(path), str(folder), **options)


def questions(names, key="image"):
    return [{key: name, "caption": f"a dog {n}", "negative_caption": "a cat"} for n, name in enumerate(names)]


def rows_of_sugarcrepe(folder, names, **options):
    path = write_json(folder.parent / "swap_att.json", questions(names, "filename"))
    return read_sugarcrepe(path, str(folder), **options)


def rows_of_questions(folder, names, **options):
    return read_questions(write_json(folder.parent / "own.json", questions(names)), str(folder), **options)


def rows_of_aro(folder, names, **options):
    entries = [{"image_path": name, "caption_options": [f"a dog {n}", "a cat"]} for n, name in enumerate(names)]
    return read_aro(write_json(folder.parent / "aro.json", entries), str(folder), **options)


def rows_of_winoground(folder, names, **options):
    sides = [{"id": n, "image_0": name, "image_1": name} for n, name in enumerate(names)]
    lines = [json.dumps({**side, "caption_0": "a b", "caption_1": "b a"}) for side in sides]
    (folder.parent / "examples.jsonl").write_text("\n".join(lines))
    return read_winoground(str(folder.parent / "examples.jsonl"), str(folder), **options)


def parquet_of(folder, names, **columns):
    """Paths from the working folder, as tables hold them."""
    path = folder.parent / "rows.parquet"
    values = {"image": pa.array([f"{folder}/{name}" for name in names], pa.large_string()), **columns}
    pq.write_table(pa.table(values), path)
    return str(path)


def rows_of_caption_table(folder, names, **options):
    return read_parquet(parquet_of(folder, names, captions=["a dog"] * len(names)), **options)


def rows_of_question_table(folder, names):
    texts = {"caption": [f"a dog {n}" for n in range(len(names))], "negative_caption": ["a cat"] * len(names)}
    return read_item_tables(parquet_of(folder, names, **texts))


def rows_of_label_table(folder, names):
    labels = [["cat", "dog"][n % 2] for n in range(len(names))]
    return load_classification(f"parquet:{parquet_of(folder, names, kind=labels)},label=kind").dataset


WITH_SKIP = [
    *(rows_of_csv, rows_of_coco, rows_of_karpathy, rows_of_flickr30k, rows_of_conceptual, rows_of_sugarcrepe),
    *(rows_of_questions, rows_of_aro, rows_of_winoground, rows_of_caption_table),
]
READERS = [*WITH_SKIP, rows_of_question_table, rows_of_label_table]


def files_of(dataset):
    return {row["image"]["path"] for row in dataset.cast_column("image", Image(decode=False))}


@pytest.fixture
def photos(tmp_path, draw):
    def make(*names):
        for seed, name in enumerate(names):
            draw(tmp_path / "photos" / name, seed)
        return tmp_path / "photos"

    return make


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_found_in_either_normal_form_of_unicode(photos, read, forms):
    names = ["café 1.jpg", "Übung 2.png", "日本 3.jpg", "a&b'c 4.jpg", "🐶 5.png"]
    on_disk, named = ([unicodedata.normalize(form, name) for name in names] for form in forms)
    dataset = read(photos(*on_disk), named)
    assert files_of(dataset) == {str(photos() / name) for name in on_disk}
    assert dataset[0]["image"].size == (32, 24)


@pytest.mark.parametrize("read", READERS)
def test_separators_of_windows_and_dots_lead_to_the_file(photos, read):
    folder = photos("sub/1.jpg", "sub/deep/2.jpg", "3.jpg")
    dataset = read(folder, ["sub\\1.jpg", ".\\sub\\deep\\2.jpg", "./3.jpg"])
    found = {os.path.normpath(path) for path in files_of(dataset)}
    assert found == {str(folder / name) for name in ("sub/1.jpg", "sub/deep/2.jpg", "3.jpg")}


@pytest.mark.parametrize("read", [reader for reader in READERS if reader is not rows_of_winoground])
def test_paths_may_lead_out_of_the_folder(photos, tmp_path, draw, read):
    outside = draw(tmp_path / "other" / "2.jpg", seed=7)
    names = ["1.jpg", "../other/2.jpg"]
    assert {os.path.realpath(path) for path in files_of(read(photos("1.jpg"), names))} == {
        str(photos() / "1.jpg"),
        str(outside),
    }


@pytest.mark.parametrize("read", READERS)
def test_a_name_in_other_letters_is_missing_and_says_so(photos, read):
    with pytest.raises(FileNotFoundError, match=r"of \d image files are missing, first: .*'A1.JPG' there differs in"):
        read(photos("A1.JPG", "2.jpg"), ["a1.jpg", "2.jpg"])


@pytest.mark.parametrize("read", READERS)
def test_two_files_that_fit_one_name_are_named(photos, read):
    accents = "q\u0323\u0307", "q\u0307\u0323"  # two orders of one letter's marks; both normal forms are the first
    folder = photos(f"{accents[1]} 1.jpg", f" {accents[0]} 1.jpg")
    with pytest.raises(ValueError, match=r"2 entries of '.*photos' fit the name 'q.*Rename all but one"):
        read(folder, [f"{accents[0]} 1.jpg"])


@pytest.mark.parametrize("read", WITH_SKIP)
@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "nothing", "not UTF-8"])
def test_what_is_no_picture_file_is_missing_and_can_be_skipped(photos, read, kind, caplog):
    folder = photos("1.jpg")
    odd = folder / "2.jpg"
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    elif kind == "broken link":
        odd.symlink_to("nowhere")
    elif kind == "not UTF-8":
        (folder / "x").write_bytes((folder / "1.jpg").read_bytes())
        os.rename(folder / "x", os.fsencode(folder) + b"/caf\xe9 2.jpg")
    names = ["1.jpg", "2.jpg" if kind != "not UTF-8" else "café 2.jpg"]
    with pytest.raises(FileNotFoundError, match="image files are missing, first: .*missing=skip"):
        read(folder, names)
    assert files_of(read(folder, names, missing="skip")) == {str(folder / "1.jpg")}
    reason = {"pipe": "a pipe, a socket or a device", "nothing": "", "not UTF-8": "1 names there are no UTF-8"}
    assert "image files are missing" in caplog.text and reason.get(kind, f"a {kind}") in caplog.text


def test_lines_of_one_file_are_one_image_however_they_spell_it(photos):
    folder = photos("café.jpg", "sub/a.jpg")
    nfd = unicodedata.normalize("NFD", "café.jpg")
    dataset = rows_of_csv(folder, ["café.jpg", nfd, "sub\\a.jpg", "sub/a.jpg", "./sub/a.jpg"])
    assert dataset["image_id"][:] == ["photos/café.jpg", "photos/sub/a.jpg"]
    assert read_images(str(folder))["image_id"][:] == dataset["image_id"][:]
    assert list(map(len, dataset["captions"])) == [2, 3]


def test_ids_of_known_collections_are_the_same_with_separators_of_windows():
    assert flickr_id("Flickr8k\\1000268201_693b08cb0e.jpg") == flickr_id("1000268201.jpg") == "flickr-1000268201"
    assert coco_id("val2014\\COCO_val2014_000000391895.jpg") == "coco-391895"


def test_bytes_stay_where_paths_are_respelled(photos, tmp_path):
    folder = photos("café 1.jpg")
    content = (folder / "café 1.jpg").read_bytes()
    nfd = unicodedata.normalize("NFD", f"{folder}/café 1.jpg")
    table = {"image": [{"bytes": content, "path": "x"}, {"bytes": None, "path": nfd}], "captions": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "mixed.parquet")
    dataset = read_parquet(str(tmp_path / "mixed.parquet")).cast_column("image", Image(decode=False))
    assert dataset["image"][:] == [{"bytes": content, "path": "x"}, {"bytes": None, "path": f"{folder}/café 1.jpg"}]


def test_names_with_line_breaks_do_not_break_a_message(photos):
    with pytest.raises(FileNotFoundError) as caught:
        rows_of_coco(photos("1.jpg"), ["a\nb\t<script>|.jpg"])
    assert "a\\nb\\t<script>|.jpg" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('["a dog", "two \\"cats\\""]', ["a dog", 'two "cats"']),
        ("['a dog', \"it's\"]", ["a dog", "it's"]),
        ('["caf\\u00e9"]', ["café"]),
        ("['a dog',]", ["a dog"]),
    ],
)
def test_a_list_written_as_one_text_is_read_as_its_captions(text, captions, caplog):
    with caplog.at_level(logging.WARNING):
        cleaned, kept = clean_captions(["x", "y"], [[text], ["a bird"]], "here")
    assert cleaned == [captions, ["a bird"]] and kept == [0, 1]
    assert "here: read captions that are lists, written as one text, of 1 image, first ids: x" in caplog.text


@pytest.mark.parametrize("text", ["[a dog]", '["a dog"', '["a", 3]', "['a' b 'c']", '["a"] and ["b"]', "[]"])
def test_a_text_that_is_no_list_stays_one_caption(text, caplog):
    assert clean_captions(["x"], [[text]], "here")[0] == [[text]]
    assert "lists" not in caplog.text


def test_byte_order_marks_around_a_caption_are_no_part_of_it():
    assert clean_captions(["x"], [["\ufeffa dog", " \ufeff ", "a\ufeffb \ufeff"]], "here")[0] == [
        ["a dog", "a\ufeffb"]
    ]
