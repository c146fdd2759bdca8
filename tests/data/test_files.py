"""Files are read in one way: what is wrong is named with its file. They are replaced whole or not at all."""

import ast
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

import modeling_dclip
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.captions.files import read_flickr30k
from modeling_dclip.data.files import (
    check_new_folder,
    check_output_folder,
    check_writable,
    decode_text,
    entry_names,
    find_files,
    list_folder,
    load_parquet,
    match_files,
    match_parquet,
    read_json,
    read_json_lines,
    read_table,
    read_text,
    read_yaml,
    replacing,
    require_field,
    require_file,
    require_folder,
    temporary_folder,
    user_cache_dir,
    write_json,
    write_text,
)
from modeling_dclip.data.labels.prompts import read_lines
from modeling_dclip.data.questions.files import read_entries

MARK = "\ufeff"


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary != path
        assert path.read_text() == text
        path.chmod(0o640)
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_moved_whole(tmp_path):
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").touch()
        assert not (tmp_path / "folder").exists()
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["a"]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(str(path)) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mark", ["", MARK])
def test_a_byte_order_mark_is_no_character_for_any_reader(tmp_path, mark, draw):
    def write(name, text):
        (tmp_path / name).write_bytes((mark + text).encode("utf-8"))
        return tmp_path / name

    assert read_text(write("a.txt", "é\r\nb\rc\n")) == "é\nb\nc\n"
    assert read_lines(write("names.txt", "cat\ndog\n")) == ["cat", "dog"]
    assert read_json(write("a.json", '{"a": 1}')) == {"a": 1}
    assert read_entries(write("b.json", '[{"a": 1}]'), "file") == [("Item 0", {"a": 1})]
    assert list(read_json_lines(write("a.jsonl", '{"a": 1}\n\n2\n'))) == [(1, {"a": 1}), (3, 2)]
    assert read_yaml(write("a.yaml", "a: 1\n")) == {"a": 1}
    assert read_table(write("a.csv", 'image,text\n\na.jpg,"two\r\nlines"\n'), ",") == [
        (1, ["image", "text"]),
        (4, ["a.jpg", "two\r\nlines"]),
    ]
    draw(tmp_path / "a.jpg")
    table = write("results.csv", "image_name| comment_number| comment\na.jpg| 0| a cat\n")
    assert read_flickr30k(str(table), str(tmp_path))["captions"][0] == ["a cat"]


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntw\xff\n")
    with pytest.raises(ValueError, match=r"UTF-8 text in '.*a.txt', but line 2 .*0xff.*Save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"UTF-8 text in 'here', but line 1"):
        decode_text(b"\xff", "here")
    assert decode_text(b"a\r\nb", "here", keep_newlines=True) == "a\r\nb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The index '.*a.json' is empty"),
        (b"{", "Expected JSON in the index '.*a.json', got invalid JSON .*Repair it"),
        (b"\xff", "Expected JSON in the index '.*a.json', got invalid JSON .*Repair it"),
        (b"[" * 100_000, "Expected JSON in the index '.*a.json', got invalid JSON .*Repair it"),
        (b"[]", r"Expected a JSON object with \('a',\) in the index '.*a.json', got a list. Repair it"),
        (b'{"b": 1}', r"The index '.*a.json' has no key 'a'; it has \['b'\]"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json", "index", ("a",), "Repair it.")
    with pytest.raises(FileNotFoundError, match="No index at '.*b.json'"):
        read_json(tmp_path / "b.json", "index")


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (None, str, "Item 1 of 'f': expected an object with the key 'a', got None"),
        ([1], str, "expected an object with the key 'a', got"),
        ({"b": 1}, str, r"has no key 'a'; it has \['b'\]"),
        ({"a": ["x"]}, str, r"Item 1 of 'f': expected text under 'a', got \['x'\]"),
        ({"a": True}, int, "expected an integer under 'a', got True"),
        ({"a": {}}, (int, float), "expected an integer or a number under 'a'"),
        ({"a": None}, list, "expected a list under 'a', got None"),
    ],
)
def test_a_field_of_another_type_is_named_with_file_and_entry(entry, kind, message):
    with pytest.raises(ValueError, match=message):
        require_field(entry, "a", "Item 1", "f", kind)


def test_a_field_of_the_right_type_is_returned():
    assert require_field({"a": 0}, "a", "Item 1", "f", (int, str)) == 0
    assert require_field({"a": True}, "a", "Item 1", "f") is True


COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 7, "image_id": 1, "caption": "a cat"}]}
KARPATHY = {"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a cat"}]}]}


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("coco:{}:{}", COCO | {"images": 1}, "The object of '.*a.json': expected a list under 'images', got 1"),
        ("coco:{}:{}", COCO | {"images": [1]}, "An image of '.*a.json': expected an object with the key 'id', got 1"),
        ("coco:{}:{}", COCO | {"images": [{"id": [1], "file_name": "a"}]}, "expected an integer or text under 'id'"),
        ("coco:{}:{}", COCO | {"images": [{"id": 1, "file_name": 2}]}, "expected text under 'file_name', got 2"),
        ("coco:{}:{}", COCO | {"annotations": [3]}, "An annotation of '.*a.json': expected an object"),
        (
            "coco:{}:{}",
            COCO | {"annotations": [{"id": 7, "image_id": 1, "caption": ["a"]}]},
            r"Annotation 7 of '.*a.json': expected text or null under 'caption', got \['a'\]",
        ),
        ("karpathy:{}:{}:test", {"images": {"a": 1}}, "expected a list under 'images'"),
        ("karpathy:{}:{}:test", {"images": ["a"]}, "An image of '.*a.json': expected an object with the key 'split'"),
        ("karpathy:{}:{}:test", {"images": [KARPATHY["images"][0] | {"sentences": 1}]}, "a list under 'sentences'"),
        ("karpathy:{}:{}:test", {"images": [KARPATHY["images"][0] | {"sentences": ["a"]}]}, "A sentence of a.jpg"),
        ("karpathy:{}:{}:test", {"images": [KARPATHY["images"][0] | {"filepath": 1}]}, "text under 'filepath', got 1"),
    ],
)
def test_caption_files_with_fields_of_other_types_are_named(tmp_path, draw, spec, content, message):
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_captions(spec.format(tmp_path / "a.json", tmp_path))


def test_a_file_is_read_as_it_is_where_its_folder_has_brackets(tmp_path):
    for folder in ("set[1]", "set1"):
        (tmp_path / folder).mkdir()
        Dataset.from_dict({"name": [folder]}).to_parquet(tmp_path / folder / "data.parquet")
    pattern = str(tmp_path / "set[1]" / "data.parquet")
    files = match_parquet(pattern)
    assert files == [(tmp_path / "set[1]" / "data.parquet", 1)]
    assert load_parquet([path for path, _ in files], pattern)["name"][:] == ["set[1]"]
    both = match_files(str(tmp_path / "**" / "*.parquet"))
    assert both == [tmp_path / "set1" / "data.parquet", tmp_path / "set[1]" / "data.parquet"]
    assert load_parquet(both, "both")["name"][:] == ["set1", "set[1]"]


def test_folders_are_listed_in_order_and_files_are_told_apart(tmp_path):
    for name in ("b.JPG", "a.txt", "c/a.jpg", "c/.hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_folder(tmp_path) == [tmp_path / "a.txt", tmp_path / "b.JPG", tmp_path / "c"]
    assert list_folder(tmp_path, "*.txt") == [tmp_path / "a.txt"]
    assert entry_names(tmp_path) == {"a.txt", "b.JPG", "c"} and entry_names(tmp_path / "no") == set()
    pictures = [tmp_path / "b.JPG", tmp_path / "c" / ".hidden.jpg", tmp_path / "c" / "a.jpg"]
    assert find_files(tmp_path, {".jpg"}) == (pictures, [tmp_path / "a.txt"])
    assert find_files(tmp_path) == (sorted([*pictures, tmp_path / "a.txt"]), [])


def test_the_two_forms_of_json_are_bytes_that_do_not_change(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert (tmp_path / "a.json").read_bytes() == '{\n "a": [\n  1,\n  "é"\n ]\n}\n'.encode()
    write_json(tmp_path / "b.json", {"a": [1, "é"], "b": float("inf")}, indent=2)
    assert (tmp_path / "b.json").read_bytes() == b'{\n  "a": [\n    1,\n    "\\u00e9"\n  ],\n  "b": Infinity\n}\n'
    write_json(tmp_path / "c.json", {"a": tmp_path}, indent=2, default=str)
    assert read_json(tmp_path / "c.json") == {"a": str(tmp_path)}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    write_text(tmp_path / "d" / "a.txt", "é\n")
    assert (tmp_path / "d" / "a.txt").read_bytes() == b"\xc3\xa9\n"


def test_temporary_folders_vanish_and_caches_have_a_place(tmp_path, monkeypatch):
    with temporary_folder(beside=tmp_path, prefix=".new.") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".new.") and folder.is_dir()
    assert os.listdir(tmp_path) == []
    check_writable(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        check_writable(tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir("regions") == tmp_path / "modeling_dclip" / "regions"


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="The table '.*a' is empty"):
        require_file(tmp_path / "a", "table")
    with pytest.raises(FileNotFoundError, match="No table at '.*b'"):
        require_file(tmp_path / "b", "table")
    with pytest.raises(FileNotFoundError, match="Expected a file, the table, at '.*', got a folder"):
        require_file(tmp_path, "table")
    with pytest.raises(FileNotFoundError, match="Expected a folder, the image folder, at '.*a', got a file"):
        require_folder(tmp_path / "a", "image folder")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="Expected YAML in the recipe '.*c.yaml', got invalid YAML .*line 1"):
        read_yaml(tmp_path / "c.yaml", "recipe")


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_made(tmp_path):
    (tmp_path / "a").touch()
    for check in (check_new_folder, check_output_folder):
        check(tmp_path / "new" / "folder")
        with pytest.raises(OSError, match="Expected a folder to write at '.*a/b', but '.*a' is a file"):
            check(tmp_path / "a" / "b")
    with pytest.raises(OSError, match="Expected a folder to write at '.*a', but '.*a' is a file"):
        check_output_folder(tmp_path / "a")
    assert list_folder(tmp_path) == [tmp_path / "a"]


# Calls that open or list what a user gave. They belong to data/files.py (text, tables, folders) and data/images.py
# (pictures).
READS = {"read_text", "read_bytes", "open", "glob", "iglob", "rglob", "iterdir", "scandir", "listdir", "walk"}
READERS = {"json.load", "csv.reader", "csv.DictReader", "yaml.safe_load", "yaml.load"}
OTHER_READS = {
    "data/images.py": {"Image.open"},  # the door for pictures
    "data/reinforced/shards.py": {"open", "tarfile.open"},  # members of tar files, by their offsets
    "data/reinforced/writer.py": {"tarfile.open"},
    "data/labels/webdataset.py": {"path.open"},  # tar files, mapped into memory
    "encoders/fingerprints.py": {"path.open", "folder.glob"},  # below the door: hashes files of any kind
    "encoders/loading.py": {"folder.glob"},  # below the door: whether a folder has weights
    "evaluation/records.py": {"os.open"},  # a lock
}


def reads(tree):
    """The calls of a module that open or list files, e.g. `path.read_text`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {ast.unparse(call.func) for call in calls}
    found = {
        name
        for name in found
        if (name.split(".")[-1] in READS and name not in ("read_bytes", "read_text", "ast.walk", "files.walk"))
        or name in READERS
        or name.startswith("tempfile.")
    }
    nested = [call for call in calls if ast.unparse(call.func) == "json.loads" and call.args]
    return found | {"json.loads" for call in nested if "read_text(" in ast.unparse(call.args[0])}


PACKAGE = Path(modeling_dclip.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "data/files.py"])
def test_files_are_opened_through_one_door(name):
    wrong = reads(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))) - OTHER_READS.get(name, set())
    assert not wrong, f"{name} calls {sorted(wrong)}; use data/files.py, or data/images.py for pictures"


def test_the_walk_sees_what_opens_a_file():
    code = "open(a); path.read_text(); json.load(f); tempfile.mkdtemp(); json.loads(read_text(a)); os.walk(b)"
    assert reads(ast.parse(f"{code}; PIL.Image.open(c)")) == {
        "open", "path.read_text", "json.load", "tempfile.mkdtemp", "json.loads", "os.walk", "PIL.Image.open",
    }  # fmt: skip
    assert not reads(ast.parse("read_text(a)\nread_json(b)\njson.loads(word)"))
