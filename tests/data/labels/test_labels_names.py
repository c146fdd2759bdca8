"""Names are joined with classes by key, by number or by name. Where only the place in a list is left, it must be the
data's own order, or nothing is joined.
"""

import json
import sys
import types
import unicodedata

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from fixtures.webdatasets import picture

from modeling_dclip.data.labels import load_classification
from modeling_dclip.data.labels.prompts import as_numbers, order_classes, read_names

NAMES = [f"name {number}" for number in range(13)]


def write_folders(root, folders):
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        (root / folder / "0.png").write_bytes(picture(number))
    return root


def write_table(path, labels, feature):
    columns = {"image": [{"bytes": picture(n), "path": None} for n in range(len(labels))], "label": labels}
    Dataset.from_dict(columns, features=Features(image=Image(), label=feature)).to_parquet(str(path))
    return path


def name_of_label(label, found):
    """What each class of the data is called in the end."""
    return {str(own): found.class_names[number] for own, number in zip(label, found.dataset["label"], strict=True)}


def load(form, tmp_path, classes, names):
    """A set whose classes have these own names, in one of the forms that data come in."""
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    if form == "folders":
        root = write_folders(tmp_path / "set", classes)
        found = load_classification(f"imagefolder:{root},names={tmp_path}/list.txt")
        ids = found.dataset["image_id"][:]
        return {one.split("/")[1]: found.class_names[n] for one, n in zip(ids, found.dataset["label"], strict=True)}
    if form == "classnames.txt":
        root = write_folders(tmp_path / "set" / "test", classes).parent
        (root / "classnames.txt").write_text((tmp_path / "list.txt").read_text())
        found = load_classification(f"imagefolder:{root}:test")
        ids = found.dataset["image_id"][:]
        return {one.split("/")[2]: found.class_names[n] for one, n in zip(ids, found.dataset["label"], strict=True)}
    if form == "text":
        write_table(tmp_path / "a.parquet", classes, Value("string"))
    elif form == "ClassLabel":  # as `datasets` makes it of folders: in the order of the alphabet
        write_table(tmp_path / "a.parquet", classes, ClassLabel(names=sorted(classes)))
    else:
        write_table(tmp_path / "a.parquet", [int(one) for one in classes], Value("int64"))
    spec = f"parquet:{tmp_path}/a.parquet,label=label,names={tmp_path}/list.txt"
    return name_of_label(classes, load_classification(spec))


FORMS = ["folders", "classnames.txt", "text", "ClassLabel", "integers"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("classes", "names", "first"),
    [
        ([str(number) for number in range(12)], NAMES[:12], 0),
        ([str(number) for number in range(1, 13)], NAMES[:12], 1),  # as Flowers-102 counts
        ([str(number) for number in (0, 2, 10, 11)], NAMES[:12], 0),  # classes without pictures
        ([str(number) for number in (1, 2, 7, 12)], NAMES[:12], 1),
    ],
)
def test_classes_called_by_numbers_are_joined_by_number(tmp_path, form, classes, names, first, caplog):
    found = load(form, tmp_path, classes, names)
    assert found == {one: names[int(one) - first] for one in classes}
    assert "are joined with the classes by number: " in caplog.text and "= 'name 0'" in caplog.text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (["1", "2", "3"], NAMES[:5], "The classes are 1 to 3, and '.*' has 5 names: its first one may be of class 0"),
        (["0", "1", "5"], NAMES[:5], "Expected a name for each of the classes 0 to 5 .*got 5 names and none for .* 5"),
        (["-1", "0", "1"], NAMES[:2], "a name for each of the classes -1 to 1 .* none for class -1"),
        (["3", "9"], NAMES[:2], "a name for each of the classes 3 to 9 .* none for class 9"),
    ],
)
def test_numbers_that_a_list_does_not_fit_are_refused(tmp_path, form, classes, names, message):
    with pytest.raises(ValueError, match=message):
        load(form, tmp_path, classes, names)


@pytest.mark.parametrize("form", ["folders", "classnames.txt", "text"])
def test_classes_called_by_words_are_not_joined_with_a_list_by_place(tmp_path, form):
    with pytest.raises(ValueError, match="The classes are called 'cat', 'dog', 'fox', ... and '.*' is a list without"):
        load(form, tmp_path, ["dog", "fox", "cat"], ["a dog", "a fox", "a cat"])


@pytest.mark.parametrize("form", FORMS[:4])
@pytest.mark.parametrize("names", [["Red fox", "dog", "cat"], ["cat\ta cat", "red_fox\ta fox", "dog\ta dog", "x\ty"]])
def test_words_are_joined_by_name_and_by_key_in_any_order(tmp_path, form, names):
    expected = {"cat": "cat", "dog": "dog", "red_fox": "Red fox"}
    if "\t" in names[0]:
        expected = {"cat": "a cat", "dog": "a dog", "red_fox": "a fox"}
    assert load(form, tmp_path, ["dog", "red_fox", "cat"], names) == expected


def test_the_datas_own_order_is_kept_and_its_pairs_are_logged(tmp_path, caplog):
    assert load("ClassLabel", tmp_path, ["cat", "dog"], ["a cat", "a dog"]) == {"cat": "a cat", "dog": "a dog"}
    assert "by place: cat = 'a cat', dog = 'a dog', ..." in caplog.text
    (tmp_path / "list.txt").write_text("dog\na cat\n")
    with pytest.raises(ValueError, match="Name 0 of '.*' is 'dog', which the data calls class 1"):
        read_names(str(tmp_path / "list.txt"), ["cat", "dog"])


@pytest.mark.parametrize(
    ("content", "classes", "expected"),
    [
        ({"cat": "a cat", "dog": "a dog", "x": "y"}, ["dog", "cat"], ["a dog", "a cat"]),
        ({"0": "a", "1": "b", "10": "c"}, ["0", "01", "10"], ["a", "b", "c"]),
        ({"a": 0, "b": 1, "c": 10}, ["0", "1.0", "10"], ["a", "b", "c"]),
        ({"0": ["n01440764", "tench"], "1": ["n01443537", "fish"]}, ["n01443537", "n01440764"], ["fish", "tench"]),
        ({"0": ["n01440764", "tench"], "1": ["n01443537", "fish"]}, ["1", "0"], ["fish", "tench"]),
        (["a", "b", "c"], ["0", "1", "2"], ["a", "b", "c"]),
    ],
)
def test_json_gives_names_by_class(tmp_path, content, classes, expected):
    (tmp_path / "names.json").write_text(json.dumps(content))
    assert read_names(str(tmp_path / "names.json"), classes, ordered=False) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cat": "a cat"}, r"a name for every class in '.*names.json', got none for \['dog'\]"),
        ({"cat": {"name": "a"}, "dog": "b"}, "Expected the name of class 'cat' as text in '.*names.json', got"),
        ({"cat": "a", " cat": "b", "dog": "c"}, "Expected each class once in '.*names.json', got ' cat' with two"),
        ({"cat": " ", "dog": "b"}, "Expected the name of class 'cat' as text"),
        (3, "names.json"),
        (["a", 3], "names.json"),
    ],
)
def test_json_of_another_form_is_named(tmp_path, content, message):
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_names(str(tmp_path / "names.json"), ["cat", "dog"], ordered=False)


@pytest.mark.parametrize(
    "lines", ["0 a\n1 b\n2 c\n", "2: c\n0: a\n1: b\n", "0,a\n1,b\n2,c\n9,x\n", "0\ta\n1\tb\n2\tc"]
)
def test_lines_may_begin_with_the_number_of_the_class(tmp_path, lines, caplog):
    (tmp_path / "names.txt").write_text(lines)
    assert read_names(str(tmp_path / "names.txt"), ["0", "1", "2"], ordered=False) == ["a", "b", "c"]
    assert "are joined with the classes by key: 0 = 'a', 1 = 'b', 2 = 'c', ..." in caplog.text


def test_names_that_begin_with_numbers_are_no_keys(tmp_path):
    (tmp_path / "names.txt").write_text("7 up\n7 eleven\n50 cent\n")
    assert read_names(str(tmp_path / "names.txt"), ["0", "1", "2"]) == ["7 up", "7 eleven", "50 cent"]
    (tmp_path / "half.txt").write_text("cat\ta cat\ndog\n")
    with pytest.raises(ValueError, match="a class and its name in every line of '.*half.txt', got only a name in 1"):
        read_names(str(tmp_path / "half.txt"), ["cat", "dog"])
    (tmp_path / "half.txt").write_text("n01440764 tench\ngoldfish\n")
    with pytest.raises(ValueError, match="got only a name in 1"):
        read_names(str(tmp_path / "half.txt"), ["n01440764", "n01443537"])


def test_synsets_take_a_list_in_their_order_and_the_log_shows_it(tmp_path, caplog):
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    synsets = ["n01440764", "n01443537"]
    assert read_names(str(tmp_path / "names.txt"), synsets, ordered=False) == ["tench", "goldfish"]
    assert "by place: n01440764 = 'tench', n01443537 = 'goldfish', ..." in caplog.text


def test_folders_called_by_numbers_are_in_the_order_of_numbers(tmp_path, caplog):
    root = write_folders(tmp_path / "set", ["10", "9", "0", "2"])
    found = load_classification(f"imagefolder:{root}")
    assert found.class_names == ["0", "2", "9", "10"]
    assert "The classes are called by numbers ('0', '2', '9', ...)" in caplog.text
    assert order_classes(["b", "10", "9"]) == ["10", "9", "b"]
    assert as_numbers(["01", "1.0", "-3"]) == [1, 1, -3] and as_numbers(["1.5"]) is None and as_numbers([]) is None
    (tmp_path / "list.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="Expected each class once, got two called 1"):
        read_names(str(tmp_path / "list.txt"), ["01", "1"], ordered=False)


def test_a_list_of_integer_labels_gives_names_to_classes_without_rows_too(tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({str(n): f"name {n}" for n in range(1, 6)}))
    path = write_table(tmp_path / "a.parquet", [2.0, 5.0], Value("float64"))
    found = load_classification(f"parquet:{path},names={tmp_path}/names.json")
    assert found.class_names == [f"name {n}" for n in range(1, 6)] and found.dataset["label"][:] == [1, 4]
    (tmp_path / "names.json").write_text(json.dumps({"1": "a", "5": "b"}))
    with pytest.raises(ValueError, match="none for .'2'.|Expected names of the classes 1 to 5"):
        load_classification(f"parquet:{path},names={tmp_path}/names.json")


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (
            [0, -1],
            ClassLabel(names=["a", "b"]),
            r"row 1: expected a label in \[0, 2\) .*got -1. A split without labels",
        ),
        ([0, None], ClassLabel(names=["a", "b"]), "row 1: no label in the column 'label'"),
        (["a", ""], Value("string"), "row 1: an empty label"),
        ([0.0, 1.5], Value("float32"), "row 1: expected the number of a class in 'label', got 1.5"),
        ([0.0, float("nan")], Value("float32"), "row 1: expected the number of a class in 'label', got nan"),
    ],
)
def test_labels_that_are_none_are_named_by_row(tmp_path, labels, feature, message):
    (tmp_path / "names.txt").write_text("x\ny\n")
    path = write_table(tmp_path / "a.parquet", labels, feature)
    with pytest.raises(ValueError, match=message):
        load_classification(f"parquet:{path},label=label,names={tmp_path}/names.txt")


def test_texts_that_differ_in_blanks_or_normal_form_are_one_class(tmp_path):
    nfd = unicodedata.normalize("NFD", "café")
    path = write_table(tmp_path / "a.parquet", ["café", nfd, "dog ", "dog"], Value("string"))
    found = load_classification(f"parquet:{path},label=label")
    assert (found.class_names, found.dataset["label"][:]) == (["café", "dog"], [0, 0, 1, 1])


def test_folders_that_name_no_class_are_refused(tmp_path):
    nfd = unicodedata.normalize("NFD", "café")
    root = write_folders(tmp_path / "twice", [nfd, "café", "dog"])
    with pytest.raises(ValueError, match="Two folders in '.*twice' are called 'café', spelled in two ways"):
        load_classification(f"imagefolder:{root}")
    root = write_folders(tmp_path / "splits", ["train/a", "train/b", "val/a", "val/b", "extra/a"])
    with pytest.raises(
        ValueError, match=r"one folder a class in '.*', got the splits \['train', 'val'\]. Name one: imag"
    ):
        load_classification(f"imagefolder:{root}")
    root = write_folders(tmp_path / "bytes", ["a", "b", "caf\udce9"])
    with pytest.raises(ValueError, match=r"The folder 'caf\\xe9' in '.*' has a name that is no UTF-8"):
        load_classification(f"imagefolder:{root}")
    root = write_folders(tmp_path / "nfd", [nfd, "__MACOSX", "dog"])
    assert load_classification(f"imagefolder:{root}").class_names == ["café", "dog"]


def test_links_that_lead_to_no_class_of_their_own_are_passed_over(tmp_path, caplog):
    root = write_folders(tmp_path / "set", ["cat", "dog", "__MACOSX"])
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "0.png").write_bytes(picture(9))
    for name, target in {"fox": "../pool", "itself": ".", "up": "..", "kitty": "cat", "gone": "none"}.items():
        (root / name).symlink_to(target, target_is_directory=True)
    found = load_classification(f"imagefolder:{root}")
    assert (found.class_names, found.dataset["label"][:]) == (["cat", "dog", "fox"], [0, 1, 2])
    assert (
        "3 linked to a folder that is searched already (first: 'itself'), 1 broken link (first: 'gone')" in caplog.text
    )
    assert "1 hidden (first: '__MACOSX')" in caplog.text


def test_numbered_folders_take_imagenets_names_from_open_clip(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", types.SimpleNamespace(IMAGENET_CLASSNAMES=NAMES))
    root = write_folders(tmp_path / "imagenetv2", [str(number) for number in range(13)])  # 0, 1, 10, 11... as text
    assert load_classification(f"imagefolder:{root},names=open_clip").class_names == NAMES
    root = write_folders(tmp_path / "words", [f"w{number}" for number in range(13)])
    with pytest.raises(ValueError, match="joining them by place would be a guess"):
        load_classification(f"imagefolder:{root},names=open_clip")


def test_what_is_passed_over_in_classes_is_counted_and_named(tmp_path, caplog):
    root = write_folders(tmp_path / "set", ["cat", "dog"])
    for name in ("cat/a.txt", "cat/b.heic", "dog/c.txt"):
        (root / name).touch()
    (root / "beside.jpg").write_bytes(picture(0, "jpg"))
    load_classification(f"imagefolder:{root}")
    assert "passed over 3 files: 2 .txt (first: 'cat/a.txt'), 1 .heic (first: 'cat/b.heic')" in caplog.text
    assert "passed over 1 file: 1 picture beside the classes (first: 'beside.jpg')" in caplog.text
    (root / "dog" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"none in \['dog'\] among 1 file: 1 .txt .first: 'dog/c.txt'."):
        load_classification(f"imagefolder:{root}")
