"""Files are read in one way: what is wrong is named with its file. They are replaced whole or not at all."""

import ast
import gzip
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
from modeling_dclip.data.labels.prompts import parse_lines, read_lines
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntw\xff\n", r"UTF-8 text in '.*a.txt', but line 2 .*0xff.* Save it as UTF-8.$"),
        ("a.txt", b"one\rtwo\r\nth\xffree\n", "but line 3 is not encoded"),
        ("a.yaml", b"a: \xff\n", "but line 1 .* Save it as UTF-8.$"),
        ("a.csv", b"a,b\n\xff,\n", "but line 2 .* Save it as UTF-8; in a spreadsheet choose 'CSV UTF-8'.$"),
        ("a.txt", "one".encode("utf-16"), "but it is saved as UTF-16. Save it as UTF-8"),
        ("a.txt", b"\xfe\xff" + "one".encode("utf-16-be"), "but it is saved as UTF-16"),
        ("a.txt", "one".encode("utf-32"), "but it is saved as UTF-32"),
        ("a.txt", "one".encode("utf-16-le"), "but line 1 holds a NUL character"),
        ("a.csv", b"one\ntwo\0", "but line 2 holds a NUL character"),
        ("a.csv", b"PK\x03\x04\x14\0\0", "but it is a zip file, as spreadsheets .* are"),
        ("a.csv", gzip.compress(b"one", mtime=0), "but it is compressed by gzip"),
    ],
)
def test_what_is_no_utf8_is_named_with_its_line_and_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)
    with pytest.raises(ValueError, match=message.replace("'.*", "'")):
        decode_text(content, name)


def test_only_line_ends_end_a_line_and_marks_are_no_characters(tmp_path, draw):
    assert decode_text(b"a\r\nb", "here", keep_newlines=True) == "a\r\nb"
    text = f"{MARK}{MARK}a\r\n{MARK}b\u2028c\x0c\x85d\re{MARK}f\n"
    assert decode_text(text.encode(), "here") == f"a\nb\u2028c\x0c\x85d\ne{MARK}f\n"
    assert parse_lines(decode_text(text.encode(), "here"), "here") == ["a", "b\u2028c\x0c\x85d", f"e{MARK}f"]
    draw(tmp_path / "a.jpg")
    for ends in ("\n", "\r\n", "\r"):
        lines = ["image_name| comment_number| comment", "a.jpg| 0| one\u2028two", "a.jpg| 1| three\x85four"]
        (tmp_path / "a.csv").write_bytes(ends.join([*lines, ""]).encode())
        flickr = read_flickr30k(str(tmp_path / "a.csv"), str(tmp_path))
        assert flickr["captions"][:] == [["one\u2028two", "three\x85four"]]
        (tmp_path / "b.csv").write_bytes(ends.join(["image,caption", "a.jpg,one\u2028two", ""]).encode())
        table = load_captions(f"csv:{tmp_path / 'b.csv'}:{tmp_path}")
        assert table["captions"][:] == [["one\u2028two"]]
        (tmp_path / "c.tsv").write_bytes(ends.join(["one\u2028two\thttp://a\ta.jpg", ""]).encode())
        conceptual = load_captions(f"conceptual:{tmp_path / 'c.tsv'}:{tmp_path}")
        assert conceptual["captions"][:] == [["one\u2028two"]]


def test_json_lines_name_the_line_that_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n{"a": 1, "a": 2}\n')
    with pytest.raises(ValueError, match="Line 2 of the list '.*a.jsonl': expected one whole JSON .*'a' comes twice"):
        list(read_json_lines(tmp_path / "a.jsonl", "list"))
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(ValueError, match="UTF-8 text in the list '.*a.jsonl', but line 2"):
        list(read_json_lines(tmp_path / "a.jsonl", "list"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The index '.*a.json' is empty"),
        (b"{", "Expected JSON in the index '.*a.json', got invalid JSON .*Repair it"),
        (b"\n\xff", "Expected UTF-8 text in the index '.*a.json', but line 2 is not encoded in UTF-8"),
        (" \n".encode("utf-16"), "Expected UTF-8 text in the index '.*a.json', but it is saved as UTF-16"),
        (gzip.compress(b"{}", mtime=0), "in the index '.*a.json', but it is compressed by gzip"),
        (b" \n", "Expected JSON in the index '.*a.json', got nothing but blanks"),
        (b"\n<!DOCTYPE html>", "got HTML or XML, perhaps the page of a failed download"),
        (b'{"a": 1}\n{"a": 2}\n', r"more than one JSON value, as in JSON Lines .the second begins in line 2.. Repair"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' comes twice in one object"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "Expected JSON in the index '.*a.json', got invalid JSON .*4300 digits"),
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
        ({"a": {}}, (int, float), "expected a number under 'a'"),
        ({"a": 1}, (str, list, type(None)), "expected text, a list or null under 'a', got 1"),
        ({"a": float("inf")}, float, "expected a number under 'a', got inf"),
        ({"a": 10**400}, (int, float), "expected a number under 'a', got 1000"),
        ({"a": None}, list, "expected a list under 'a', got None"),
        (
            {"a": "x\ud800"},
            None,
            r"expected text under 'a', got half a character or a NUL in 'x.ud800'",
        ),
        ({"a": "x\0"}, str, "got half a character or a NUL in"),
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
        (
            "coco:{}:{}",
            COCO | {"images": [1]},
            "Image at position 0 .* an object with the key 'id', got 1",
        ),
        ("coco:{}:{}", COCO | {"images": [{"id": [1], "file_name": "a"}]}, "expected a number or text under 'id'"),
        ("coco:{}:{}", COCO | {"images": [{"id": 1, "file_name": 2}]}, "expected text under 'file_name', got 2"),
        ("coco:{}:{}", COCO | {"annotations": [3]}, "Annotation at position 0 .* of '.*a.json': expected an object"),
        (
            "coco:{}:{}",
            COCO | {"annotations": [{"id": 7, "image_id": 1, "caption": ["a", 3]}]},
            "Annotation 7 of '.*a.json': expected text or null under 'caption', got 3",
        ),
        (
            "coco:{}:{}",
            COCO | {"annotations": [{"id": 7, "image_id": 1, "caption": 9}]},
            "Annotation 7 of '.*a.json': expected text, null or a list under 'caption', got 9",
        ),
        (
            "coco:{}:{}",
            COCO | {"annotations": [{"image_id": "x", "caption": "a"}]},
            "Annotation at position 0 .* expected a number, or text that ends in one, under 'image_id', got 'x'",
        ),
        ("coco:{}:{}", COCO | {"images": [{"id": -1, "file_name": "a"}]}, "expected a whole number or text .* got -1"),
        ("coco:{}:{}", COCO | {"images": [{"id": 1e30, "file_name": "a"}]}, "expected a whole number .*got 1e.30"),
        ("coco:{}:{}", COCO | {"images": [{"id": True, "file_name": "a"}]}, "a number or text under 'id', got True"),
        ("coco:{}:{}", COCO | {"images": [{"id": float("nan"), "file_name": "a"}]}, "under 'id', got nan"),
        (
            "karpathy:{}:{}:test",
            {"images": [KARPATHY["images"][0] | {"cocoid": "nine"}]},
            "Image at position 0 .from 0. of '.*a.json': expected a number, or text .* under 'cocoid', got 'nine'",
        ),
        ("karpathy:{}:{}:test", {"images": {"a": 1}}, "expected a list under 'images'"),
        ("karpathy:{}:{}:test", {"images": ["a"]}, "Image at position 0 .*: expected an object with the key 'split'"),
        ("karpathy:{}:{}:test", {"images": [KARPATHY["images"][0] | {"sentences": 1}]}, "a list under 'sentences'"),
        ("karpathy:{}:{}:test", {"images": [KARPATHY["images"][0] | {"sentences": [["a"]]}]}, "A sentence of a.jpg"),
        (
            "karpathy:{}:{}:test",
            {"images": [KARPATHY["images"][0] | {"filepath": 1}]},
            "or null under 'filepath', got 1",
        ),
    ],
)
def test_caption_files_with_fields_of_other_types_are_named(tmp_path, draw, spec, content, message):
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_captions(spec.format(tmp_path / "a.json", tmp_path))


@pytest.mark.parametrize(
    ("spec", "content"),
    [
        ("coco:{}:{}", COCO | {"annotations": [{"id": 7, "image_id": 1, "caption": ["a cat", None, "a pet"]}]}),
        (
            "coco:{}:{}",
            {
                "images": [{"id": 1.0, "file_name": "a.jpg"}],
                "annotations": [{"image_id": "1", "caption": "a cat"}, {"image_id": "0001", "caption": "a pet"}],
            },
        ),
        (
            "karpathy:{}:{}:test",
            {"images": [KARPATHY["images"][0] | {"cocoid": "1", "sentences": ["a cat", "a pet"]}]},
        ),
        (
            "karpathy:{}:{}:test",
            {
                "images": [
                    KARPATHY["images"][0]
                    | {"cocoid": 1.0, "filepath": None, "sentences": [{"raw": "a cat"}, {"raw": None}, "a pet"]}
                ]
            },
        ),
    ],
)
def test_caption_files_are_read_where_only_one_reading_is_possible(tmp_path, draw, spec, content):
    draw(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = load_captions(spec.format(tmp_path / "a.json", tmp_path))
    assert dataset["image_id"][:] == ["coco-1"] and dataset["captions"][:] == [["a cat", "a pet"]]


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
    hidden, pictures = tmp_path / "c" / ".hidden.jpg", [tmp_path / "b.JPG", tmp_path / "c" / "a.jpg"]
    assert find_files(tmp_path, {".jpg"}) == (pictures, {".txt": [tmp_path / "a.txt"], "hidden": [hidden]})
    assert find_files(tmp_path) == (sorted([*pictures, hidden, tmp_path / "a.txt"]), {})


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
    "data/failures.py": {"os.open"},  # os.devnull, for output that nobody reads
    "data/images.py": {"Image.open", "open"},  # the door for pictures
    "data/reinforced/shards.py": {"open"},  # members of tar files, by their offsets
    "data/reinforced/writer.py": {"tarfile.open"},  # to write
    "data/labels/webdataset.py": {"path.open"},  # tar files, mapped into memory
    "encoders/fingerprints.py": {"path.open", "folder.glob"},  # below the door: hashes files of any kind
    "encoders/loading.py": {"folder.glob"},  # below the door: whether a folder has weights
    "evaluation/records.py": {"os.open"},  # a lock
    "hub/export/readers.py": {"Image.open"},  # as the programs open pictures that an export is made for
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
