"""Tables are read by their own bytes, in every form that Arrow has; what cannot be read is named with its place."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from modeling_dclip.data import files
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.columns import BOXES_FEATURE, plain_array, plain_type
from modeling_dclip.data.files import load_hub, load_parquet, match_parquet
from modeling_dclip.data.images import decode_image
from modeling_dclip.data.labels import load_classification
from modeling_dclip.data.questions import load_fine_grained

WORDS = ["a cat", None, "a dog", "a cow", "a cat"]


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def read(*paths):
    return load_parquet(paths, "the files")


def forms_of_text():
    texts = pa.array(WORDS)
    forms = {
        "string": texts,
        "large": texts.cast(pa.large_string()),
        "view": texts.cast(pa.string_view()),
        "dictionary": texts.dictionary_encode(),
        "large_dictionary": texts.cast(pa.large_string()).dictionary_encode(),
        "binary": texts.cast(pa.binary()),
        "large_binary": texts.cast(pa.large_binary()),
        "binary_view": texts.cast(pa.binary()).cast(pa.binary_view()),
        "sliced": pa.array(["x", *WORDS, "y"], pa.large_string()).slice(1, len(WORDS)),
        "chunked": pa.chunked_array([pa.array(WORDS[:2]), pa.array(WORDS[2:])]),
        "json": pa.ExtensionArray.from_storage(pa.json_(), texts),
    }
    return [pytest.param(form, id=name) for name, form in forms.items()]


@pytest.mark.parametrize("texts", forms_of_text())
def test_captions_ids_and_labels_are_read_in_every_form_of_text(tmp_path, draw, texts):
    pictures = [str(draw(tmp_path / f"{row}.png", row)) for row in range(len(WORDS))]
    ids = pa.array([f"i{row}" for row in range(len(WORDS))])
    ids = ids.cast(texts.type) if pa.types.is_large_string(texts.type) else ids
    path = write(tmp_path / "a.parquet", {"image": pictures, "captions": texts, "image_id": ids})
    captioned = load_captions(f"parquet:{path}")
    assert captioned["image_id"][:] == ["i0", "i2", "i3", "i4"]
    assert captioned["captions"][:] == [[text] for text in WORDS if text]
    kept = pa.table({"image": pictures, "caption": texts, "negative_caption": texts, "kind": texts}).slice(2, 2)
    path = write(tmp_path / "b.parquet", kept.set_column(2, "negative_caption", pa.array(["x", "y"])))
    labelled = load_classification(f"parquet:{path},label=kind,image=image")
    assert labelled.class_names == ["a cow", "a dog"] and labelled.dataset["label"][:] == [1, 0]
    assert load_fine_grained(f"parquet:{path}")["captions"][:] == [["a dog"], ["a cow"]]


LISTS = [["a", "b"], [], None, ["c"], [None, "d"]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.string_view()),
        pa.list_(pa.string_view()),
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [slice(0, 5), slice(1, 5), slice(3, 4)], ids=str)
def test_lists_of_every_form_keep_their_entries(tmp_path, kind, cut):
    array = pa.array(LISTS, kind)[cut]
    plain = plain_array(array)
    plain.validate(full=True)
    assert plain.type == plain_type(kind) == pa.list_(pa.string()) and plain.to_pylist() == LISTS[cut]
    assert read(write(tmp_path / "a.parquet", {"a": array}))["a"][:] == LISTS[cut]


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (
            pa.array([[["a"], None], None], pa.large_list(pa.large_list(pa.string_view()))),
            pa.list_(pa.list_(pa.string())),
        ),
        (pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.large_string(), 2))[1:], pa.list_(pa.string(), 2)),
        (pa.array([b"ab", None], pa.binary(2)), pa.binary()),
        (
            pa.array(
                [{"a": "x", "b": [1]}, None, {"a": None, "b": None}],
                pa.struct({"a": pa.large_string(), "b": pa.large_list(pa.int8())}),
            )[1:],
            pa.struct({"a": pa.string(), "b": pa.list_(pa.int8())}),
        ),
        (pa.array([1, None]), pa.int64()),
    ],
    ids=["nested", "fixed", "fixed_binary", "struct", "numbers"],
)  # fmt: skip
def test_nested_and_sliced_values_stay_the_same(array, kind):
    plain = plain_array(array)
    plain.validate(full=True)
    assert plain.type == kind == plain_type(array.type) and plain.to_pylist() == array.to_pylist()


def test_run_ends_and_maps_become_what_they_stand_for():
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", "b"]))
    assert plain_array(runs).to_pylist() == ["a", "a", "b"] and plain_type(runs.type) == pa.string()
    pairs = plain_array(pa.array([[("a", 1)], None], pa.map_(pa.string_view(), pa.int64())))
    assert pairs.to_pylist() == [[{"key": "a", "value": 1}], None]


def picture_forms(paths):
    encoded, names = pa.array([path.read_bytes() for path in paths]), pa.array(list(map(str, paths)))
    nothing = pa.nulls(len(paths))
    struct = pa.StructArray.from_arrays
    return {
        "large_bytes": encoded.cast(pa.large_binary()),
        "bytes_view": encoded.cast(pa.binary_view()),
        "path_view": names.cast(pa.string_view()),
        "path_dictionary": names.dictionary_encode(),
        "struct_large": struct([encoded.cast(pa.large_binary()), names.cast(pa.large_string())], ["bytes", "path"]),
        "struct_views": struct([encoded.cast(pa.binary_view()), names.cast(pa.string_view())], ["bytes", "path"]),
        "struct_bytes_alone": struct([encoded], ["bytes"]),
        "struct_path_alone": struct([names], ["path"]),
        "struct_null_path": struct([encoded, nothing], ["bytes", "path"]),
        "struct_null_bytes": struct([nothing, names], ["bytes", "path"]),
        "struct_turned": struct([names, encoded], ["path", "bytes"]),
        "struct_more": struct([encoded, names, pa.array([1, 2])], ["bytes", "path", "width"]),
    }


FORMS = [
    "large_bytes", "bytes_view", "path_view", "path_dictionary", "struct_large", "struct_views", "struct_bytes_alone",
    "struct_path_alone", "struct_null_path", "struct_null_bytes", "struct_turned", "struct_more",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_pictures_are_read_in_every_form_by_every_reader(tmp_path, form):
    paths = [tmp_path / f"{row}.png" for row in range(2)]
    for row, path in enumerate(paths):
        PILImage.new("RGB", (4, 4), (90 * row, 0, 0)).save(path)
    forms = picture_forms(paths)
    assert sorted(forms) == sorted(FORMS)
    words = ["a cat", "a dog"]
    table = {"picture": forms[form], "caption": words, "negative_caption": words[::-1], "kind": words}
    source = f"parquet:{write(tmp_path / 'a.parquet', table)},image=picture"
    readers = (
        load_captions(f"{source},captions=caption"),
        load_fine_grained(source),
        load_classification(f"{source},label=kind").dataset,
    )
    for dataset in readers:
        assert [np.asarray(decode_image(dataset, row))[0, 0, 0] for row in (0, 1)] == [0, 90]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2]),
        pa.array([[1, 2], [3]]),
        pa.array([0.5, None]),
        pa.array([True, False]),
        pa.array([1, 2]).cast(pa.decimal128(20, 1)),
        pa.array([1, 2]).cast(pa.timestamp("s")),
        pa.array([{"a": "x"}, None]),
        pa.nulls(2),
        pa.array([[["x"]], [[]]]),
    ],
    ids=lambda values: str(values.type),
)
def test_what_is_no_text_is_refused_as_text_by_its_type(tmp_path, draw, values):
    pictures = [str(draw(tmp_path / f"{row}.png", row)) for row in range(2)]
    path = write(tmp_path / "a.parquet", {"image": pictures, "captions": values, "caption": values})
    with pytest.raises(ValueError, match="'captions' of '.*a.parquet' to hold text or lists of text, got"):
        load_captions(f"parquet:{path}")
    with pytest.raises(ValueError, match="'caption' of '.*a.parquet' to hold text or lists of text, got"):
        load_fine_grained(f"parquet:{path},negatives=caption")


def test_bytes_that_are_no_utf8_are_no_captions(tmp_path, draw):
    picture = str(draw(tmp_path / "a.png"))
    path = write(tmp_path / "a.parquet", {"image": [picture], "captions": pa.array([b"caf\xe9"])})
    with pytest.raises(ValueError, match="Expected UTF-8 text in the column 'captions' of '.*a.parquet'"):
        load_captions(f"parquet:{path}")
    damaged = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    path = write(tmp_path / "b.parquet", {"image": [picture], "captions": damaged})
    with pytest.raises(ValueError, match="b.parquet', column 'captions', rows 0 to 0: expected string, .*UTF8"):
        load_captions(f"parquet:{path}")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([7, 8], pa.uint16()), ["7", "8"]),
        (pa.array([7.0, 8.0]), ["7", "8"]),
        (pa.array(["7", "08"]), ["7", "08"]),
        (pa.array([7.5, 8.0]), "row 0: expected text or a whole number as the id in the column 'image_id', got 7.5"),
        (pa.array([7.0, float("nan")]), "row 1: expected text or a whole number as the id .*got nan"),
        (pa.array([7, None]), "row 1 has no image id in the column 'image_id'"),
        (pa.array([True, False]), "Expected text or whole numbers as ids in the column 'image_id' .*got bool"),
        (pa.array([[1], [2]]), "Expected text or whole numbers as ids .*got list"),
    ],
    ids=str,
)
def test_ids_are_texts_or_whole_numbers(tmp_path, draw, ids, expected):
    pictures = [str(draw(tmp_path / f"{row}.png", row)) for row in range(2)]
    columns = {"image": pictures, "captions": ["a", "b"], "label": ["x", "y"], "image_id": ids}
    path = write(tmp_path / "a.parquet", columns)
    if isinstance(expected, list):
        assert load_captions(f"parquet:{path}")["image_id"][:] == expected
        assert load_classification(f"parquet:{path},label=label").dataset["image_id"][:] == expected
    else:
        for load in (load_captions, lambda spec: load_classification(f"{spec},label=label")):
            with pytest.raises(ValueError, match=expected):
                load(f"parquet:{path}")


def test_an_id_that_is_none_of_its_source_is_named_with_its_row(tmp_path, draw):
    picture = str(draw(tmp_path / "a.png"))
    columns = {"image": [picture] * 2, "captions": ["a", "b"], "image_id": ["7", "seven"]}
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match="a.parquet', row 1: Expected a COCO image id .*got 'seven'"):
        load_captions(f"parquet:{path},source=coco")
    (tmp_path / "a.csv").write_text("image,caption\na.png,a dog\n")
    with pytest.raises(ValueError, match="a.csv': Expected a COCO image id .*got 'a.png'"):
        load_captions(f"csv:{tmp_path}/a.csv:{tmp_path},source=coco")


@pytest.mark.parametrize("stored", ["path", "bytes"])
def test_rows_of_one_image_may_differ_in_captions_only(tmp_path, draw, stored):
    paths = [draw(tmp_path / "a.png", 1), draw(tmp_path / "b.png", 2, size=(8, 8))]
    pictures = [str(path) if stored == "path" else path.read_bytes() for path in paths]
    columns = {"captions": ["a", "b", "c"], "image_id": [7, 7, 8]}
    boxes = [[[0, 0, 1, 1]], [[0, 0, 1, 1]], []]
    same = {"image": [pictures[0], pictures[0], pictures[1]], "boxes": boxes, **columns}
    dataset = load_captions(f"parquet:{write(tmp_path / 'a.parquet', same)}")
    assert dataset["captions"][:] == [["a", "b"], ["c"]] and dataset["boxes"][:] == boxes[1:]
    path = write(tmp_path / "b.parquet", {"image": [pictures[0], pictures[1], pictures[1]], **columns})
    with pytest.raises(ValueError, match="rows 0 and 1 have the image id '7' and different pictures.*,image_id="):
        load_captions(f"parquet:{path}")
    path = write(tmp_path / "c.parquet", same | {"boxes": [boxes[0], None, []]})
    with pytest.raises(ValueError, match="rows 0 and 1 have the image id '7' and different boxes"):
        load_captions(f"parquet:{path}")


def test_a_saved_dataset_is_read_in_every_form_of_its_columns(tmp_path, draw):
    picture = str(draw(tmp_path / "a.png"))
    table = pa.table(
        {
            "image_id": pa.array(["i"]).cast(pa.large_string()),
            "image": pa.array([picture]).cast(pa.large_string()),
            "captions": pa.array([["a cat"]], pa.large_list(pa.large_string())),
            "boxes": pa.array([[[0.0, 0.0, 4.0, 4.0]]]),
            "box_scores": pa.array([None], pa.list_(pa.float64())),
            "more": [3],
        }
    )
    Dataset(table).save_to_disk(tmp_path / "saved")
    dataset = load_captions(f"disk:{tmp_path / 'saved'}")
    assert dataset.features["captions"] == List(Value("string")) and dataset.features["boxes"] == BOXES_FEATURE
    row = dataset[0]
    assert row.pop("image").size == (32, 24)
    assert row == {
        "image_id": "i", "captions": ["a cat"], "boxes": [[0, 0, 4, 4]], "box_scores": None, "more": 3,
    }  # fmt: skip
    Dataset(table.set_column(2, "captions", pa.array([[1]]))).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ValueError, match="Expected the column 'captions' as .*numbers"):
        load_captions(f"disk:{tmp_path / 'numbers'}")


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([2, 0, 1], "cat\ndog\ncow\n", ["cow", "cat", "dog"]),
        (pa.array([2, 0, 1], pa.uint8()), "cat\ndog\ncow\n", ["cow", "cat", "dog"]),
        (["2", "0", "1"], "cat\ndog\ncow\n", ["cow", "cat", "dog"]),
        (["002", "000", "001"], "cat\ndog\ncow\n", ["cow", "cat", "dog"]),
        (["10", "9", "10"], None, ["10", "9", "10"]),
        ([0, 1, 1], "crane\ncrane\n", ["crane", "crane", "crane"]),
        (["red_fox", "dog", "dog"], "Dog\nred fox\n", ["red fox", "Dog", "Dog"]),
        (["x", "y", "x"], "y\ta dog\nx\ta cat\n", ["a cat", "a dog", "a cat"]),
        (
            ["n02085620", "n01440764"] * 2,
            "n01440764 tench\nn02085620 Chihuahua\n",
            ["Chihuahua", "tench"] * 2,
        ),
        (["dog ", " dog", "cat"], None, ["dog", "dog", "cat"]),
    ],
    ids=str,
)
def test_each_picture_gets_the_name_of_its_label(tmp_path, draw, labels, names, expected):
    pictures = [str(draw(tmp_path / f"{row}.png", row)) for row in range(len(labels))]
    path = write(tmp_path / "a.parquet", {"image": pictures, "label": labels})
    spec = f"parquet:{path},image=image,label=label"
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
        spec += f",names={tmp_path}/names.txt"
    dataset, class_names, _ = load_classification(spec)
    assert [class_names[number] for number in dataset["label"][:]] == expected


# --- parquet files ---------------------------------------------------------------------------------------------------


def test_the_features_are_those_that_datasets_noted(tmp_path, draw):
    picture = {"bytes": draw(tmp_path / "a.png").read_bytes(), "path": None}
    features = Features(
        image=Image(), label=ClassLabel(names=["cat", "dog"]), captions=List(Value("string")),
        boxes=List(List(Value("float32"), length=4)), embeds=List(Value("float16"), length=2), n=Value("int32"),
    )  # fmt: skip
    columns = {
        "image": [picture, picture], "label": [1, 0], "captions": [["a"], []], "boxes": [[[0, 0, 1, 1]], None],
        "embeds": [[0.5, 1], [2, 3]], "n": [None, 3],
    }  # fmt: skip
    path = tmp_path / "a.parquet"
    Dataset.from_dict(columns, features=features).to_parquet(path)
    ours = read(path)
    theirs = load_dataset("parquet", data_files=str(path), split="train", cache_dir=tmp_path / "theirs")
    assert ours.features == theirs.features == features
    assert ours.cast_column("image", Image(decode=False))[:] == theirs.cast_column("image", Image(decode=False))[:]


def test_a_replaced_file_is_read_again_though_its_time_and_size_are_the_same(tmp_path):
    path = write(tmp_path / "a.parquet", {"a": ["old"]})
    status = path.stat()
    assert read(path)["a"][:] == ["old"]
    write(path, {"a": ["new"]})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert read(path)["a"][:] == ["new"]


def test_equal_files_share_a_copy_and_a_damaged_copy_is_made_again(tmp_path, caplog):
    first, other = (write(tmp_path / name, {"a": ["x" * 1000]}) for name in ("a.parquet", "b.parquet"))
    read(first), read(other)
    (copy,) = (tmp_path / "datasets_cache").rglob("*.arrow")
    for damaged in (copy.read_bytes()[:700], b"", copy.read_bytes()[:-600]):
        copy.write_bytes(damaged)
        assert read(other)["a"][:] == ["x" * 1000]


def test_what_killed_conversions_left_is_removed(tmp_path):
    left = tmp_path / "datasets_cache" / "modeling_dclip_parquet" / f".x{files._SUFFIX}"
    left.mkdir(parents=True)
    read(write(tmp_path / "a.parquet", {"a": [1]}))
    assert [path.suffix for path in left.parent.iterdir()] == [".arrow"]


def test_pictures_stay_on_disk_and_batches_join_to_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_dclip.data.files._BATCH_BYTES", 5000)
    pictures = [bytes([row]) * 1000 for row in range(40)]
    dataset = read(write(tmp_path / "a.parquet", {"a": pictures, "b": range(40)}, row_group_size=15))
    assert dataset["a"][:] == pictures and dataset["b"][:] == list(range(40))
    assert dataset[17] == {"a": pictures[17], "b": 17} and dataset.cache_files


def test_a_file_is_read_by_its_own_name_in_any_folder(tmp_path, draw):
    for folder in ("set[1]", "set1", "set*", "set?", "a,b", "{a,b}", "a b", "é"):
        picture = str(draw(tmp_path / folder / "a.png"))
        path = write(tmp_path / folder / "a.parquet", {"image": [picture], "captions": [folder], "label": [folder]})
        assert read(path)["captions"][:] == [folder]
        if "," not in folder:
            assert load_captions(f"parquet:{path}")["captions"][:] == [[folder]]
            assert load_classification(f"parquet:{path},image=image,label=label").class_names == [folder]
            (tmp_path / folder / "a.csv").write_text(f"image,caption\na.png,{folder}\n")
            captioned = load_captions(f"csv:{tmp_path / folder}/a.csv:{tmp_path / folder}")
            assert captioned["captions"][:] == [[folder]]
            assert load_captions(f"hub:{tmp_path / folder}:train")["captions"][:] == [[folder]]


def test_a_pattern_below_a_folder_with_brackets_is_read_there(tmp_path):
    for folder in ("set[1]", "set1"):
        write(tmp_path / folder / "deep" / "a.parquet", {"a": [folder]})
    for pattern in ("set[1]/deep/*.parquet", "set[1]/*/a.parquet", "set[1]/**/*.parquet"):
        paths = [path for path, _ in match_parquet(str(tmp_path / pattern))]
        assert paths == [tmp_path / "set[1]" / "deep" / "a.parquet"]
    both = [path for path, _ in match_parquet(str(tmp_path / "set*" / "deep" / "a.parquet"))]
    assert read(*both)["a"][:] == ["set1", "set[1]"]


def test_files_whose_columns_stand_in_another_order_or_width_are_one_table(tmp_path):
    first = write(
        tmp_path / "a.parquet", {"a": pa.array([1], pa.int32()), "b": [["x"]], "c": pa.array([0.5], pa.float32())}
    )
    empty = pa.array([[]], pa.list_(pa.null()))
    second = write(tmp_path / "b.parquet", {"c": [0.25], "b": empty, "a": pa.array([2**40])})
    third = write(tmp_path / "c.parquet", {"c": pa.nulls(1), "b": pa.nulls(1), "a": pa.array([3], pa.uint8())})
    dataset = read(first, second, third)
    assert dataset.to_dict() == {"a": [1, 2**40, 3], "b": [["x"], [], None], "c": [0.5, 0.25, None]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["1"], "b": [1]}, "but 'a' is Value.'int64'. in '.*1.parquet' and Value.'string'. in '.*2.parquet'"),
        ({"a": [1]}, "'.*1.parquet' has a column 'b' and '.*2.parquet' has none"),
        ({"a": [1], "b": [1], "c": [1]}, "'.*2.parquet' has a column 'c' and '.*1.parquet' has none"),
    ],
)
def test_files_of_different_schemas_are_named_with_the_column(tmp_path, columns, message):
    first = write(tmp_path / "1.parquet", {"a": [1], "b": [1]})
    with pytest.raises(ValueError, match=message):
        read(first, write(tmp_path / "2.parquet", columns))


def test_files_whose_class_names_differ_are_refused(tmp_path):
    paths = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    for path, names in zip(paths, (["cat", "dog"], ["dog", "cat"]), strict=True):
        Dataset.from_dict({"label": [0]}, features=Features(label=ClassLabel(names=names))).to_parquet(path)
    with pytest.raises(ValueError, match=r"'label' is ClassLabel\(names=\['cat', 'dog'\]\) in .*1.parquet' and Class"):
        read(*paths)


def test_damaged_and_odd_files_are_named(tmp_path, caplog):
    path = write(tmp_path / "a.parquet", {"a": [f"text {row}" * 20 for row in range(300)]}, row_group_size=100)
    content = bytearray(path.read_bytes())
    second = pq.read_metadata(path).row_group(1).column(0)
    place = second.dictionary_page_offset or second.data_page_offset
    content[place : place + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="b.parquet' is not readable as parquet in row group 1, rows 100 to 199 "):
        read(tmp_path / "b.parquet")
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    summed = write(tmp_path / "sums.parquet", {"a": ["first caption", "other caption"]}, **options)
    summed.write_bytes(summed.read_bytes().replace(b"first caption", b"worst caption"))
    with pytest.raises(ValueError, match="sums.parquet' is not readable as parquet in row group 0, rows 0 to 1 .*CRC"):
        read(summed)
    for cut in (b"", path.read_bytes()[:-1000], b"image,captions\n"):
        (tmp_path / "c.parquet").write_bytes(cut)
        with pytest.raises(ValueError, match="c.parquet' is not readable as parquet"):
            match_parquet(str(tmp_path / "c.parquet"))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ValueError, match="d.parquet' has the column 'a' twice"):
        read(write(tmp_path / "d.parquet", twice))
    noted = pa.table({"a": [1]}).replace_schema_metadata({"huggingface": '{"info": {"features": {"a": 3}}}'})
    with pytest.raises(ValueError, match="e.parquet': the types of columns that datasets noted in the file"):
        read(write(tmp_path / "e.parquet", noted))
    assert len(read(write(tmp_path / "f.parquet", pa.table({"a": pa.array([], pa.string())})))) == 0


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"a": ["old"]})
    convert = __import__("modeling_dclip.data.files", fromlist=["_convert"])._convert

    def slow(paths, target):
        convert(paths, target)
        write(path, {"a": ["newer"]})

    monkeypatch.setattr("modeling_dclip.data.files._convert", slow)
    with pytest.raises(ValueError, match="A file of 'the files' changed while it was read"):
        read(path)
    assert not list((tmp_path / "datasets_cache").rglob("*.arrow"))


def test_a_local_folder_is_read_as_it_is_now(tmp_path):
    path = write(tmp_path / "repo" / "train.parquet", {"a": ["old"]})
    status = path.stat()
    assert load_hub(str(tmp_path / "repo"), "train")["a"][:] == ["old"]
    write(path, {"a": ["new"]})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_hub(str(tmp_path / "repo"), "train")["a"][:] == ["new"]
    write(tmp_path / "repo" / "train-2.parquet", {"b": [1]})
    with pytest.raises(ValueError, match="The dataset '.*repo', split 'train', cannot be read as one table"):
        load_hub(str(tmp_path / "repo"), "train")


def test_a_dataset_that_is_a_script_or_lacks_the_split_is_named(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match="The dataset '.*mine' is a program that loads data .*mine.py.*none is run"):
        load_hub(str(tmp_path / "mine"), "train")
    (tmp_path / "mine" / "mine.py").unlink()
    (tmp_path / "mine" / "train.csv").write_text("a\nb\n")
    with pytest.raises(ValueError, match="The dataset '.*mine', split 'dev': Unknown split"):
        load_hub(str(tmp_path / "mine"), "dev")
