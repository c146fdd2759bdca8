"""Columns: out of Arrow and back without loss, whatever rows are selected, and keys that follow content alone."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image as PILImage

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.columns import (
    BOXES_FEATURE,
    Ragged,
    attach_columns,
    check_finite,
    check_regions,
    flat_column,
    ragged_column,
    read_regions,
    row_keys,
    with_flat_embeds,
    with_images,
    with_plain_regions,
    with_ragged_embeds,
)
from modeling_dclip.data.images import decode_image
from modeling_dclip.data.labels import load_classification
from modeling_dclip.data.questions import load_fine_grained
from modeling_dclip.data.scenes import load_scenes


def numbers(n=4):
    return Dataset.from_dict({"image_id": [f"i{row}" for row in range(n)]})


def test_embeddings_go_in_and_come_out_the_same_for_selected_rows():
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16)
    embeds = Ragged.from_lengths(values, np.array([2, 0, 4, 1]))
    dataset = with_flat_embeds(with_ragged_embeds(numbers(), "text_embeds", embeds), "anchor_embeds", values[:4])
    assert dataset[2]["text_embeds"] == values[2:6].tolist()
    picked = dataset.select([3, 0])
    read = ragged_column(picked, "text_embeds")
    assert read.values.dtype == np.float16 and read.lengths.tolist() == [1, 2]
    np.testing.assert_array_equal(read.values, values[[6, 0, 1]])
    np.testing.assert_array_equal(flat_column(picked, "anchor_embeds"), values[[3, 0]])


def test_padding_keeps_every_entry_and_masks_the_rest():
    ragged = Ragged.from_lengths(np.arange(1, 7), np.array([3, 1, 2]))
    padded, mask = ragged.pad(np.array([2, 0]), fill=-1)
    assert padded.tolist() == [[5, 6, -1], [1, 2, 3]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="Expected a column 'boxes'"):
        ragged_column(numbers(), "boxes")


def test_keys_follow_content_and_not_names():
    dataset = load_scenes("test", n=4, image_size=32)
    keys = row_keys(dataset)
    assert len(set(keys)) == 4
    renamed = dataset.remove_columns("image_id").add_column("image_id", [f"other{row}" for row in range(4)])
    assert row_keys(renamed) == keys
    assert row_keys(dataset.select([2, 1])) == [keys[2], keys[1]]


@pytest.mark.parametrize("column", ["captions", "boxes", "image"])
def test_a_change_of_any_content_changes_that_rows_key_alone(column):
    dataset = load_scenes("test", n=4, image_size=32)
    rows = dataset.with_format(None).to_dict()
    rows[column][1] = rows[column][0]
    changed = row_keys(Dataset.from_dict(rows, features=dataset.features))
    assert [a == b for a, b in zip(row_keys(dataset), changed, strict=True)] == [True, False, True, True]


def test_a_missing_image_file_is_named(tmp_path):
    dataset = load_scenes("test", n=1, image_size=32)
    rows = {**dataset.with_format(None).to_dict(), "image": [{"path": str(tmp_path / "gone.png"), "bytes": None}]}
    with pytest.raises(FileNotFoundError, match="gone.png"):
        row_keys(Dataset.from_dict(rows, features=dataset.features))


def test_attached_columns_stand_beside_their_rows_and_leave_out_the_others():
    stored = with_flat_embeds(numbers().select([0, 2, 3]), "anchor_embeds", np.eye(3, dtype=np.float16))
    joined = attach_columns(numbers().add_column("n", range(4)), stored)
    assert joined["n"][:] == [0, 2, 3] and joined["anchor_embeds"][1] == [0, 1, 0]
    with pytest.raises(ValueError, match="'i0' out of place"):
        attach_columns(numbers(), stored.select([1, 0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_is_told_with_its_row_image_and_entry(bad):
    values = np.zeros((5, 2), np.float16)
    values[3, 1] = bad
    embeds = Ragged.from_lengths(values, np.array([1, 1, 3]))
    with pytest.raises(ValueError, match=r"'teacher_embeds', row 2 \(image 'i2'\), entry 1"):
        check_finite(numbers(3), "teacher_embeds", embeds)


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("stored", ["path", "bytes", "struct"])
def test_every_table_reader_takes_every_form_of_texts_and_pictures(tmp_path, text, stored):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        PILImage.new("RGB", (4, 4), (90 * number, 0, 0)).save(path)
    large = text == pa.large_string()
    encoded = pa.array([path.read_bytes() for path in paths], pa.large_binary() if large else pa.binary())
    names = pa.array([str(path) for path in paths], text)
    pictures = {
        "path": names,
        "bytes": encoded,
        "struct": pa.StructArray.from_arrays([encoded.cast(pa.binary()), names.cast(pa.string())], ["bytes", "path"]),
    }
    words = pa.array(["a cat", "a dog"], text)
    table = {"picture": pictures[stored], "caption": words, "negative_caption": words[::-1], "kind": words}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = f"parquet:{tmp_path}/a.parquet,image=picture"
    captioned = load_captions(f"{source},captions=caption")
    asked = load_fine_grained(source)
    labelled = load_classification(f"{source},label=kind")
    assert captioned["captions"][:] == asked["captions"][:] == [["a cat"], ["a dog"]]
    assert labelled.class_names == ["a cat", "a dog"] and labelled.dataset["label"][:] == [0, 1]
    for dataset in (captioned, asked, labelled.dataset):
        assert [np.asarray(decode_image(dataset, row))[0, 0, 0] for row in (0, 1)] == [0, 90]


def test_a_column_of_numbers_is_no_column_of_pictures():
    with pytest.raises(ValueError, match=r"Expected pictures .* in the column 'n' of the table, got Value\('int64'\)"):
        with_images(Dataset.from_dict({"n": [1]}), "n", "the table")


# --- boxes -----------------------------------------------------------------------------------------------------------

BOXES = [[[1, 2, 3, 4], [5, 6, 7, 8]], [], None, [[0, 0, 2.5, 4]]]
FIXED = pa.list_(pa.list_(pa.float32(), 4))


def corners(names, sized=False):
    """The boxes as objects with these fields."""
    return [
        None
        if boxes is None
        else [dict(zip(names, [x1, y1, x2 - x1 * sized, y2 - y1 * sized], strict=True)) for x1, y1, x2, y2 in boxes]
        for boxes in BOXES
    ]


@pytest.mark.parametrize(
    "boxes",
    [
        pa.array(BOXES, FIXED),
        pa.array(BOXES, pa.list_(pa.list_(pa.float64()))),
        pa.array(BOXES, pa.large_list(pa.large_list(pa.float64()))),
        pa.array(BOXES, pa.list_view(pa.list_(pa.float16()))),
        pa.array([[[0, 0, 1, 1]], *BOXES], FIXED)[1:],
        pa.array(corners(["x1", "y1", "x2", "y2"])),
        pa.array(corners(["xmin", "ymin", "xmax", "ymax"])),
        pa.array(corners(["x", "y", "width", "height"], sized=True)),
    ],
    ids=lambda boxes: str(boxes.type),
)
@pytest.mark.parametrize("scores", [None, [[0.5, 0.25], None, [], [1]], [None, [], None, [1.0]], [None] * 4], ids=str)
def test_boxes_of_every_form_are_read_with_their_own_scores(tmp_path, boxes, scores):
    PILImage.new("RGB", (9, 9)).save(tmp_path / "a.png")
    columns = {"image": [str(tmp_path / "a.png")] * 4, "captions": list("abcd"), "boxes": boxes}
    columns |= {} if scores is None else {"box_scores": scores}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    dataset = load_captions(f"parquet:{tmp_path}/a.parquet")
    assert dataset["boxes"][:] == BOXES and dataset.features["boxes"] == BOXES_FEATURE
    first = [0.5, 0.25] if scores is not None and scores[0] else [1, 1]
    for rows in (dataset, dataset.select([3, 2, 0])):
        read, read_scores = read_regions(rows)
        expected = {"a": (BOXES[0], first), "d": (BOXES[3], [1])}
        for row, (text,) in enumerate(rows["captions"][:]):
            own = slice(read.offsets[row], read.offsets[row + 1])
            assert (read.values[own].tolist(), read_scores.values[own].tolist()) == expected.get(text, ([], []))
        assert read.values.dtype == read_scores.values.dtype == np.float32


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (
            [[[1, 2, 3, 4]], [[1, 2, 3]]],
            None,
            r"row 1, entry 0 of 'boxes': .* four numbers, got .1, 2, 3.",
        ),
        ([[[1, 2, 3, 4]], [[1, 2, 3, 4], None]], None, "row 1, entry 1 of 'boxes': expected a box of four .*got None"),
        ([[[1, 2, 3, 4], [1, None, 3, 4]], []], None, r"row 0, entry 1 of 'boxes': .*got .1, None, 3, 4."),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], None, "expected boxes of four numbers in the column 'boxes', got int64"),
        (["[[1, 2, 3, 4]]", ""], None, "'a.parquet': expected a list in each row of the column 'boxes', got str"),
        ([[["1", "2", "3", "4"]], []], None, "expected boxes of four numbers .*got list<"),
        ([[{"x1": 1, "y1": 2, "z": 3}], []], None, "expected boxes of four numbers .*got struct<"),
        ([[{"x1": 1, "y1": 2, "x2": 3, "y2": None}], []], None, "row 0, entry 0 of 'boxes': .*'y2': None"),
        ([[[1, 2, 3, 4]], []], [[0.5], [0.5]], "row 1: expected one score for each of 0 boxes, got 1 in 'box_scores'"),
        ([[[1, 2, 3, 4]], []], [[], []], "row 0: expected one score for each of 1 boxes, got 0"),
        ([[[1, 2, 3, 4]], []], [[None], []], "row 0, entry 0 of 'box_scores': expected a number, got None"),
        (
            [[[1, 2, 3, 4]], []],
            [["x"], []],
            "lists of numbers in the column 'box_scores', got lists of string",
        ),
        (None, [[0.5], []], "has a column 'box_scores' and no 'boxes'"),
    ],
    ids=str,
)
def test_what_is_no_box_is_named_with_its_row(tmp_path, boxes, scores, message):
    columns = {"image_id": ["a", "b"], "boxes": boxes, "box_scores": scores}
    dataset = Dataset(pa.table({name: values for name, values in columns.items() if values is not None}))
    with pytest.raises(ValueError, match=message):
        with_plain_regions(dataset, "'a.parquet'")


def test_empty_entries_do_not_move_the_rows_after_them():
    column = pa.array([[[1.0, 2.0], None], [[3.0, 4.0]]], pa.list_(pa.list_(pa.float32(), 2)))
    with pytest.raises(ValueError, match="Expected no empty entry in the column 'e', got 1 that are null"):
        ragged_column(Dataset(pa.table({"e": column})), "e")
    with pytest.raises(ValueError, match="Expected no empty entry in the column 'e', got 1 that are null"):
        flat_column(Dataset(pa.table({"e": pa.array([None, [1.0]], pa.list_(pa.float32(), 1))})), "e")
    with pytest.raises(ValueError, match="Expected entries of one shape in the column 'e'"):
        ragged_column(Dataset(pa.table({"e": [[[1.0], [2.0, 3.0]]]})), "e")


def test_boxes_that_are_fractions_of_the_image_are_refused():
    dataset = Dataset.from_dict({"image_id": ["a", "b"], "boxes": [[[0.1, 0.2, 0.5, 1.0]], [[0.0, 0.0, 1.0, 1.0]]]})
    with pytest.raises(
        ValueError, match="in pixels, got 2 boxes within one pixel, first .0.1.* image 'a' .row 0.*fractions of"
    ):
        check_regions(dataset, *read_regions(dataset))
    pixels = Dataset.from_dict({"image_id": ["a", "b"], "boxes": [[[0.1, 0.2, 0.5, 1.0]], [[0.0, 0.0, 2.0, 1.0]]]})
    check_regions(pixels, *read_regions(pixels))
