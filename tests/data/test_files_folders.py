"""Folders are searched to the bottom, each once. What is passed over is counted and named, and nothing hangs."""

import errno
import glob
import logging
import os
import socket
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from modeling_dclip.data import files
from modeling_dclip.data.captions.files import read_images
from modeling_dclip.data.files import (
    FileFinder,
    describe_passed_over,
    find_files,
    is_utf8,
    list_folder,
    match_files,
    printable,
    read_json,
    read_text,
    require_file,
    require_folder,
    write_json,
)
from modeling_dclip.data.images import find_images, has_image_suffix, image_suffixes, warn_passed_over

NFC, NFD = "café.jpg", "cafe\u0301.jpg"


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names_below(root, found):
    return [path.relative_to(root).as_posix() for path in found]


def test_links_to_folders_are_followed_and_every_folder_is_searched_once(tmp_path):
    root = tmp_path / "photos"
    touch(root, "z/a.jpg", "b.jpg")
    touch(tmp_path, "elsewhere/c.jpg", "neighbour/d.jpg")
    for link, target in {
        "itself": root,
        "up": "..",
        "a_second_name_of_z": "z",
        "outside": "../elsewhere",
        "z/other": "../outside",
        "one": "two",
        "two": "one",
    }.items():
        (root / link).symlink_to(target, target_is_directory=True)
    found = find_files(root, {".jpg"})
    assert names_below(root, found.files) == ["b.jpg", "outside/c.jpg", "z/a.jpg"]
    assert {kind: names_below(root, paths) for kind, paths in found.passed_over.items()} == {
        "linked to a folder that is searched already": ["a_second_name_of_z", "itself", "up", "z/other"],
        "broken link": ["one", "two"],
    }


def test_links_that_multiply_paths_do_not_multiply_files(tmp_path):
    touch(tmp_path, "leaf/a.jpg", "leaf/a.parquet")
    for level in range(24):
        (tmp_path / f"level{level}").mkdir()
        target = f"../level{level - 1}" if level else "../leaf"
        for side in "lr":
            (tmp_path / f"level{level}" / side).symlink_to(target, target_is_directory=True)
    assert names_below(tmp_path, find_files(tmp_path, {".jpg"}).files) == ["leaf/a.jpg"]
    top = tmp_path / "level23"
    assert len(find_files(top, {".jpg"}).files) == len(match_files(f"{top}/**/*.parquet")) == 1


def test_what_is_no_regular_file_is_never_opened(tmp_path, draw):
    draw(tmp_path / "folder.jpg" / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.jpg"))
    (tmp_path / "gone").symlink_to("nowhere")
    found = find_images(tmp_path)
    assert names_below(tmp_path, found.files) == ["folder.jpg/a.jpg"]
    assert {kind: len(paths) for kind, paths in found.passed_over.items()} == {
        "pipe, socket or device": 3,
        "broken link": 1,
    }
    (tmp_path / "gone.jpg").symlink_to("nowhere")  # a picture that is missing: who opens it says so
    assert names_below(tmp_path, find_images(tmp_path).files) == ["folder.jpg/a.jpg", "gone.jpg"]
    with pytest.raises(FileNotFoundError, match="Expected a file, the table, at '.*pipe.jpg', got a pipe"):
        require_file(tmp_path / "pipe.jpg", "table")
    with pytest.raises(ValueError, match="Expected files at '.*pipe.jpg', got a pipe"):
        match_files(str(tmp_path / "pipe.jpg"))
    with pytest.raises(ValueError, match="Expected files at '.*folder.*', got a folder"):
        match_files(str(tmp_path / "folder.*"))


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, caplog, draw):
    draw(tmp_path / "open" / "a.png")
    touch(tmp_path, "closed/b.png")
    scandir = os.scandir

    def refusing(path="."):
        if "closed" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refusing)
    assert len(read_images(str(tmp_path))) == 1
    assert "passed over 1 file: 1 folder that cannot be read (first: 'closed')" in caplog.text
    with pytest.raises(PermissionError, match="closed"):
        find_files(tmp_path / "closed", {".png"})


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    def refusing(path="."):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(files.os, "scandir", refusing)
    with pytest.raises(PermissionError, match="Permission denied"):
        list_folder(tmp_path, "*.tar")
    assert list_folder(tmp_path / "none") == []


def test_reading_a_pipe_or_a_device_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="Expected a file at '.*', got a pipe, a socket or a device"):
            read_text(path)


def test_a_name_that_is_no_utf8_can_be_written_into_json(tmp_path):
    for indent in (1, 2):
        write_json(tmp_path / "a.json", {"é": "caf\udce9"}, indent=indent)
        assert read_json(tmp_path / "a.json") == {"é": "caf\udce9"}


def test_very_deep_folders_are_searched(tmp_path):
    depth, start = 300, os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        with open("a.jpg", "wb"):
            pass
    finally:
        os.chdir(start)
    found = find_files(tmp_path, {".jpg"})
    assert len(found.files) == 1 and len(found.files[0].relative_to(tmp_path).parts) == depth + 1


def test_hidden_entries_and_those_of_systems_are_passed_over_and_counted(tmp_path, draw):
    draw(tmp_path / "a.jpg")
    touch(tmp_path, ".DS_Store", "._a.jpg", "Thumbs.db", "__MACOSX/._a.jpg", ".thumbnails/a.jpg", "@eaDir/b.jpg")
    found = find_images(tmp_path)
    assert names_below(tmp_path, found.files) == ["a.jpg"]
    assert found.passed_over["hidden"] == sorted(
        tmp_path / name for name in (".DS_Store", "._a.jpg", "Thumbs.db", "__MACOSX", ".thumbnails", "@eaDir")
    )
    hidden = tmp_path / ".cache"
    draw(hidden / "b.jpg")
    assert names_below(hidden, find_images(hidden).files) == ["b.jpg"]  # asked for by name
    assert list_folder(tmp_path, "*.jpg") == [tmp_path / "a.jpg"]


def test_what_pil_reads_is_taken_and_the_rest_is_counted_and_named(tmp_path, caplog):
    Image.init()
    formats = {"jpg": "JPEG", "PNG": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF"}
    formats |= {"jfif": "JPEG", "ppm": "PPM", "pgm": "PPM", "tga": "TGA", "pcx": "PCX", "dds": "DDS"}
    formats |= {"avif": "AVIF"} if features.check("avif") else {}
    formats |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    for suffix, kind in formats.items():
        Image.new("RGB", (32, 24), (200, 40, 90)).save(tmp_path / f"picture.{suffix}", format=kind)
    touch(tmp_path, "notes.txt", "more.txt", "IMG_1.HEIC", "film.mpg", "page.pdf", "drawing.eps", "README")
    (tmp_path / "lidar.pcd").write_bytes(b"# .PCD v0.7 - Point Cloud Data file format\n")
    (tmp_path / "run.fit").write_bytes(b"\x0e\x10\xd9\x07 a workout")
    dataset = read_images(str(tmp_path))
    assert sorted(name.split(".")[1] for name in dataset["image_id"]) == sorted(formats)
    assert all(dataset[row]["image"].size == (32, 24) for row in range(len(dataset)))
    assert "passed over 9 files: 2 .txt (first: 'more.txt'), 1 .eps (first: 'drawing.eps'), 1 .fit" in caplog.text
    for other in (".heic", ".mpg", ".pdf", ".pcd", "without an ending"):
        assert f"1 {other} (first: " in caplog.text
    assert "Convert HEIC photos to JPEG" in caplog.text
    assert not {".mpg", ".pdf", ".eps", ".ps", ".wmf", ".h5"} & set(image_suffixes())
    assert (
        has_image_suffix("a.JPEG")
        and has_image_suffix("a.png ")
        and has_image_suffix("a.mpo")
        and not has_image_suffix("jpg")
    )


def test_a_folder_without_pictures_says_what_it_has(tmp_path):
    touch(tmp_path, "a.heic", "b.heic", ".DS_Store")
    with pytest.raises(ValueError, match=r"got none among 3 files: 2 \.heic .*1 hidden .*Convert HEIC photos to JPEG"):
        read_images(str(tmp_path))


def test_names_that_are_no_utf8_are_named_and_counted(tmp_path, caplog, draw):
    draw(tmp_path / "plain.jpg")
    draw(tmp_path / "日本.jpg")
    os.rename(draw(tmp_path / "x.jpg"), os.fsencode(tmp_path) + b"/caf\xe9\n.jpg")
    assert read_images(str(tmp_path))["image_id"][:] == [f"{tmp_path.name}/plain.jpg", f"{tmp_path.name}/日本.jpg"]
    assert "passed over 1 file: 1 with a name that is no UTF-8 (first: 'caf\\xe9\\n.jpg')" in caplog.text
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/f\xfc")
    os.mkdir(odd)
    draw(tmp_path / "x.jpg").rename(odd + "/y.jpg")
    for wrong, require in ((odd, require_folder), (odd + "/y.jpg", require_file)):
        with pytest.raises(
            ValueError, match=r"The path of the picture, '.*f\\xfc.*', is not encoded in UTF-8.*Rename"
        ):
            require(wrong, "picture")
    (tmp_path / "link").symlink_to(odd)
    with pytest.raises(ValueError, match="not encoded in UTF-8"):
        require_folder(tmp_path / "link", "picture")


def test_every_name_is_printed_in_one_line():
    assert printable("a b é 日本 🐶") == "a b é 日本 🐶"
    assert printable("a\nb\tc\u202e\udce9\ud800") == "a\\nb\\tc\\u202e\\xe9\\ud800"
    assert len(printable("x" * 10_000)) < 400
    assert is_utf8("é") and not is_utf8("\udce9")
    one = [f"{letter}.txt" for letter in "ab"]
    assert describe_passed_over({".txt": one, "hidden": ["c\nd"]}, ".") == (
        "3 files: 2 .txt (first: 'a.txt'), 1 hidden (first: 'c\\nd')"
    )


def test_a_long_list_of_endings_is_cut(tmp_path, caplog):
    touch(tmp_path, *(f"a.e{number}" for number in range(19)), "a.a\nb")
    warn_passed_over(find_images(tmp_path).passed_over, tmp_path)
    assert "passed over 20 files: 1 .a\\nb (first: 'a.a\\nb'), " in caplog.text and caplog.text.rstrip().endswith(
        "12 more kinds"
    )
    caplog.clear()
    warn_passed_over({}, tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    ("on_disk", "asked"),
    [
        (NFD, NFC),
        (NFC, NFD),
        ("sub/a.jpg", "sub\\a.jpg"),
        (f"Stra\u00dfe/{NFD}", f"Stra\u00dfe\\{NFC}"),
        (f"u\u0308/deep/{NFD}", f"\u00fc/deep/{NFC}"),
        ("a.jpg ", "a.jpg"),
        ("a.jpg", " a.jpg"),
        ("a.jpg", "./a.jpg"),
        ("a.jpg", "none/../a.jpg"),
        ("a\\b.jpg", "a\\b.jpg"),
    ],
)
def test_a_file_is_found_by_the_normal_form_of_its_name(tmp_path, on_disk, asked):
    touch(tmp_path, on_disk)
    (tmp_path / "none").mkdir()
    found = FileFinder().find(f"{tmp_path}/{asked}")
    assert found is not None and found.samefile(tmp_path / on_disk)


def test_an_exact_name_comes_first_and_two_that_fit_are_named(tmp_path):
    touch(tmp_path, NFC, NFD)
    finder = FileFinder()
    assert [finder.find(tmp_path / name) for name in (NFC, NFD)] == [tmp_path / NFC, tmp_path / NFD]
    with pytest.raises(
        ValueError, match="2 entries of '.*' fit the name ' caf.*jpg': 'cafe.u0301.jpg', 'caf.xe9.jpg'"
    ):
        finder.find(tmp_path / f" {NFC}")
    assert "2 entries" in finder.explain(tmp_path / f" {NFC}")


def test_a_path_that_is_given_is_found_by_its_normal_form_too(tmp_path):
    (tmp_path / "Übung").mkdir()
    (tmp_path / "Übung" / NFD).write_text("a")
    assert require_folder(unicodedata.normalize("NFD", f"{tmp_path}/Übung"), "folder") == tmp_path / "Übung"
    assert require_file(unicodedata.normalize("NFC", f"{tmp_path}/Übung/{NFC}"), "table") == tmp_path / "Übung" / NFD
    assert read_text(require_file(f"{tmp_path}\\Übung\\{NFC}", "table")) == "a"
    with pytest.raises(
        FileNotFoundError, match="No folder at '.*übung': 'Übung' there differs in case. Check the path"
    ):
        require_folder(tmp_path / "übung", "folder")


def test_a_name_that_leads_to_no_file_is_explained(tmp_path):
    touch(tmp_path, "Photo.JPG", "folder/x")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    finder = FileFinder()
    expected = {
        "photo.jpg": "'Photo.JPG' there differs in case",
        "folder": "a folder",
        "pipe.jpg": "a pipe, a socket or a device",
        "gone.jpg": "a broken link",
        "loop.jpg": "a broken link",
        "other.jpg": "",
        "FOLDER/X": "'x' there differs in case",
    }
    for name in (
        *expected,
        "",
        "\0.jpg",
        "\ud800.jpg",
        "x" * 300,
        "x" * 300 + "/y",
        "a/" * 20_000 + "b",
        "loop.jpg/y",
    ):
        assert finder.find(f"{tmp_path}/{name}") is None
    assert {name: finder.explain(f"{tmp_path}/{name}") for name in expected} == expected
    os.rename(tmp_path / "Photo.JPG", os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    assert FileFinder().explain(tmp_path / "café.jpg") == "1 names there are no UTF-8, first 'caf\\xe9.jpg'"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.txt", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("sub/**", ["sub/b.txt", "sub/deep/c.txt"]),
        ("**/deep/**/*.txt", ["sub/deep/c.txt"]),
        ("**/**/b.*", ["sub/b.txt"]),
        ("s*/**/*.txt", ["sub/b.txt", "sub/deep/c.txt"]),
        ("**/.*/*.txt", [".hidden/d.txt"]),
        ("*.txt", ["a.txt"]),
        ("*/*.txt", ["sub/b.txt"]),
    ],
)
def test_globs_are_matched_as_pythons_glob_matches_them(tmp_path, monkeypatch, pattern, expected):
    touch(tmp_path, "a.txt", "sub/b.txt", "sub/deep/c.txt", ".hidden/d.txt")
    assert names_below(tmp_path, match_files(f"{tmp_path}/{pattern}")) == expected
    monkeypatch.chdir(tmp_path)
    assert [path.as_posix() for path in match_files(pattern)] == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    names=st.lists(st.lists(st.sampled_from(["a", "b", ".h", "x.t"]), min_size=1, max_size=4), max_size=8),
    pattern=st.lists(st.sampled_from(["**", "*", "a", "b", ".*", "x.t", "[ab]", "?"]), min_size=1, max_size=4),
)
def test_any_glob_names_the_files_that_pythons_glob_names(names, pattern):
    with tempfile.TemporaryDirectory() as folder:
        for parts in names:
            path = Path(folder, *parts[:-1], f"{parts[-1]}")
            if not path.exists() and not any(parent.is_file() for parent in path.parents):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        text = os.path.join(folder, *pattern)
        expected = sorted({Path(path) for path in glob.glob(text, recursive=True) if os.path.isfile(path)})
        try:
            assert match_files(text) == sorted(expected, key=str)
        except ValueError:  # only folders fit
            assert not expected and glob.glob(text, recursive=True)


def test_pipes_beside_files_are_left_out_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "a.parquet")
    os.mkfifo(tmp_path / "b.parquet")
    for pattern in ("*.parquet", "**/*.parquet"):
        with caplog.at_level(logging.WARNING):
            assert match_files(f"{tmp_path}/{pattern}") == [tmp_path / "a.parquet"]
    assert "left out 1 pipes, sockets or devices" in caplog.text
    assert "passed over 1 file: 1 pipe, socket or device (first: 'b.parquet')" in caplog.text
