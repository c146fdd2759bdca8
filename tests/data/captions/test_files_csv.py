"""One's own CSV: lines of an image are its captions, and what is wrong is named with its line."""

import logging

import pytest
from datasets import Image

from modeling_dclip.data.captions import load_captions, load_mix, load_uncaptioned
from modeling_dclip.data.failures import Mistakes

TABLE = 'image,caption,who\na.jpg,"a dog, a cat",me\nsub/b.jpg,two birds,me\n./a.jpg,pets,you\n'


def write(folder, text, draw=None, names=("a.jpg", "sub/b.jpg"), table="mine.csv", encoding="utf-8"):
    (folder / "photos").mkdir(exist_ok=True)
    for index, name in enumerate(names if draw else ()):
        draw(folder / "photos" / name, index)
    (folder / table).write_bytes(text.encode(encoding))
    return f"csv:{folder / table}:{folder / 'photos'}"


def test_lines_of_an_image_are_its_captions_in_the_files_order(tmp_path, draw):
    dataset = load_captions(write(tmp_path, TABLE, draw))
    assert dataset["image_id"][:] == ["photos/a.jpg", "photos/sub/b.jpg"]
    assert dataset["captions"][:] == [["a dog, a cat", "pets"], ["two birds"]]
    stored = dataset.cast_column("image", Image(decode=False))[0]["image"]
    assert stored == {"bytes": None, "path": str(tmp_path / "photos" / "a.jpg")}


def test_a_file_spelled_in_several_ways_is_one_image(tmp_path, draw):
    absolute, outside = tmp_path / "photos" / "a.jpg", tmp_path / "else" / "c.jpg"
    text = f"image,caption\na.jpg,one\n{absolute},two\nsub/../a.jpg,three\n../photos/sub/b.jpg,four\n{outside},five\n"
    spec = write(tmp_path, text, draw)
    draw(outside, 2)
    dataset = load_captions(spec)
    assert dataset["image_id"][:] == ["photos/a.jpg", "photos/sub/b.jpg", str(outside)]
    assert dataset["captions"][:] == [["one", "two", "three"], ["four"], ["five"]]
    stored = dataset.cast_column("image", Image(decode=False))["image"][:]
    assert [image["path"] for image in stored] == [str(absolute), str(tmp_path / "photos/sub/b.jpg"), str(outside)]


def test_columns_and_separator_can_be_named(tmp_path, draw):
    text = "file;note;text\r\na.jpg;x;a dog\r\n\r\nsub/b.jpg;y;birds\r\n"
    expected = [["a dog"], ["birds"]]
    spec = write(tmp_path, text, draw)
    assert load_captions(f"{spec},image=file,sep=;")["captions"][:] == expected
    assert load_captions(f"{spec},image=file,captions=note,sep=semicolon")["captions"][:] == [["x"], ["y"]]
    spec = write(
        tmp_path, text.replace(";", "\t"), encoding="utf-8-sig"
    )  # as spreadsheets save it, with a mark in front
    assert load_captions(f"{spec},image=file,sep=tab")["captions"][:] == expected


def test_a_caption_may_hold_quotes_and_line_breaks(tmp_path, draw):
    dataset = load_captions(write(tmp_path, 'image,caption\na.jpg,"a ""big""\ndog"\n', draw))
    assert dataset["captions"][:] == [['a "big"\ndog']]


def test_names_as_coco_gives_them_become_the_shared_ids(tmp_path, draw):
    spec = write(tmp_path, "image,caption\n000000000139.jpg,a room\n", draw, names=("000000000139.jpg",))
    assert load_captions(f"{spec},source=coco")["image_id"][:] == ["coco-139"]
    with pytest.raises(ValueError, match="source to be one of .'coco', 'flickr'., got 'cocoa'"):
        load_captions(f"{spec},source=cocoa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,caption\na.jpg,dog\nsub/b.jpg\n",
            r"Expected 2 values \(image, caption\) in line 3 of .*mine.csv', got 1",
        ),
        ("image,caption\na.jpg,a dog, a cat\n", "in line 2 of .*got 3: .*between double quotes"),
        ("image,caption\na.jpg,dog\n ,cat\n", "Line 3 of .*mine.csv' names no image in the column 'image'"),
        ('image,caption\na.jpg,"a dog" barks\n', r"line 2: .*inside written twice"),
        ('image,caption\na.jpg,"a dog\n', "line 2: unexpected end of data"),
        ('image,caption\na.jpg,cat\na.jpg,"a dog\na.jpg,"cow"\n', "lines 3 to 4: "),
        (
            "file,caption\na.jpg,dog\n",
            "one column 'image' in the first line .*got 0 among .'file', 'caption'.*,image=COLUMN",
        ),
        (
            "image;caption\na.jpg;dog\n",
            r"got 0 among .'image;caption'.*otherwise. Then add ',sep=semicolon'\.$",
        ),
        (
            "file; caption\na.jpg;dog\n",
            r"add ',sep=semicolon'; and name its columns .'file', 'caption'. with ',image=COLUMN'\.$",
        ),
        ("file;text 1\na.jpg;dog\n", "columns .'file', 'text 1'. with ',image=COLUMN' and ',captions=COLUMN'"),
        (
            'image\tcaption\na.jpg\t"dog", they said\nb.jpg\tx,"\n',
            "no table of values separated by ',' .*first line looks separated otherwise: add ',sep=tab'",
        ),
        ("image\tcaption\na.jpg\tdog\n", "got 0 among .*separated otherwise. Then add ',sep=tab'"),
        ("image,Captions\na.jpg,dog\n", "got 0 among .'image', 'Captions'.*Did you mean ',captions=Captions'"),
        ("image,image,caption\na.jpg,b.jpg,dog\n", "one column 'image' .* got 2 among .'image', 'image', 'caption'"),
        (",,\na.jpg,dog,\n", "got 0 among .'', '', ''"),
        (f'image,caption\na.jpg,"{"x" * 140_000}"\n', "line 2: field larger than field limit"),
        ("image,label\na.jpg,dog\n", "column 'caption' or 'captions' or 'text'.*,captions=COLUMN"),
        ("image,caption,text\na.jpg,dog,cat\n", "got 2 among"),
        ("image,caption\n", "No row with an image and a caption is left of '.*mine.csv'"),
        ("image,caption\na.jpg, \n", "No row with an image and a caption is left"),
        ("\n\n", "got 0 among "),
        ("", "is empty .0 bytes."),
    ],
)
def test_a_wrong_table_is_named_with_its_line(tmp_path, draw, text, message):
    with pytest.raises(ValueError, match=message):
        load_captions(write(tmp_path, text, draw))


def test_another_encoding_and_another_separator_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not encoded in UTF-8.*CSV UTF-8"):
        load_captions(write(tmp_path, "image,caption\na.jpg,Käse\n", encoding="latin-1"))
    with pytest.raises(ValueError, match="one character or one of .'comma', 'pipe', 'semicolon', 'tab'., got ';;'"):
        load_captions(f"{write(tmp_path, TABLE)},sep=;;")
    with pytest.raises(ValueError, match="got ''. A shell takes ';' for the end of a command: write sep=semicolon"):
        load_captions(f"{write(tmp_path, TABLE)},sep=")


def test_missing_files_are_counted_and_named(tmp_path, draw, caplog):
    spec = write(tmp_path, TABLE, draw, names=("a.jpg",))
    with pytest.raises(
        FileNotFoundError, match="1 of 2 image files are missing, first: photos/sub/b.jpg .*missing=skip"
    ):
        load_captions(spec)
    with caplog.at_level(logging.WARNING):
        assert load_captions(f"{spec},missing=skip")["image_id"][:] == ["photos/a.jpg"]
    assert "1 of 2 image files are missing" in caplog.text
    with pytest.raises(FileNotFoundError, match="No table of captions at '.*none.csv'"):
        load_captions(f"csv:{tmp_path}/none.csv:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="No image folder at"):
        load_captions(f"csv:{tmp_path}/mine.csv:{tmp_path}/none")


def test_empty_captions_are_left_out_and_their_lines_told(tmp_path, draw, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_captions(write(tmp_path, TABLE + "a.jpg,,me\n", draw))
    assert dataset["captions"][:] == [["a dog, a cat", "pets"], ["two birds"]]
    assert "left out 1 line without a caption: 5" in caplog.text


def test_the_lines_that_name_missing_files_are_told(tmp_path, draw, caplog):
    lines = [
        "image,caption",
        "a.jpg,a dog",
        "A.JPG,again",
        "gone.jpg,none",
        "gone.jpg,none",
        '"sub/b.jpg","two\nlines"',
    ]
    lines += [f"{number}.jpg,none" for number in range(30)]
    spec = write(tmp_path, "\n".join(lines), draw)
    assert load_captions(f"{spec},missing=skip")["image_id"][:] == ["photos/a.jpg", "photos/sub/b.jpg"]
    table, photos = tmp_path / "mine.csv", tmp_path / "photos"
    assert f"photos/A.JPG ({table}:3, 'A.JPG': 'a.jpg' there differs in case)" in caplog.text
    assert f"32 of 34 image files are missing, first: photos/A.JPG ({table}:3" in caplog.text
    assert f"photos/gone.jpg ({table}:4, 'gone.jpg'), photos/0.jpg ({table}:8, " in caplog.text
    assert f"photos/2.jpg ({table}:10, '2.jpg'); then {table}:11, {table}:12, " in caplog.text
    assert f"{table}:30 and 7 more; looked for in '{photos}'; left out" in caplog.text


def test_words_for_a_missing_value_are_no_captions_and_are_told(tmp_path, draw, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_captions(write(tmp_path, "image,caption\na.jpg,nan\nsub/b.jpg,None\nsub/b.jpg,a nan\n", draw))
    assert dataset["image_id"][:] == ["photos/sub/b.jpg"] and dataset["captions"][:] == [["a nan"]]
    assert "left out captions that say 'None' or 'nan', which stands for a missing value, of 2 images" in caplog.text
    assert "rejected 1 image without a caption, first ids: photos/a.jpg" in caplog.text


def test_a_mark_before_a_quoted_header_is_no_character(tmp_path, draw):
    dataset = load_captions(write(tmp_path, '"image","caption"\r\na.jpg,a dog\r\n', draw, encoding="utf-8-sig"))
    assert dataset["captions"][:] == [["a dog"]]


def test_what_is_wrong_with_several_tables_is_told_at_once(tmp_path, draw):
    specs = [
        write(tmp_path, "file,words\na.jpg,dog\n", draw),
        write(tmp_path, TABLE, table="other.csv"),
        write(tmp_path, "image,caption\ngone.jpg,dog\n", table="third.csv"),
    ]
    for load in (load_mix, load_uncaptioned):
        with pytest.raises(Mistakes) as caught:
            load(specs, seed=0)
        no_image, no_caption, missing = map(str, caught.value.errors)
        assert "one column 'image' in" in no_image and "',captions=COLUMN'" in no_caption
        assert missing.startswith(f"'{tmp_path}/third.csv': 1 of 1 image files are missing")


def test_one_image_in_two_tables_is_refused_and_a_count_draws(tmp_path, draw):
    specs = [write(tmp_path, TABLE, draw), write(tmp_path, TABLE, table="other.csv")]
    with pytest.raises(ValueError, match="2 image ids come more than once"):
        load_mix(specs, seed=0)
    assert len(load_captions(f"{specs[0]}@1")) == 1


@pytest.mark.parametrize("first", ["sep=;\r\n", "\ufeffsep=;\n", "sep=;;;\r"])
def test_a_first_line_names_the_separator_as_spreadsheets_do(tmp_path, draw, first):
    end = first[-2:] if first.endswith("\r\n") else first[-1]
    text = first + end.join(["image;caption", "a.jpg;a dog, and a cat", "sub/b.jpg;one;two", ""])
    with pytest.raises(ValueError, match="Expected 2 values .image, caption. in line 4 of"):
        load_captions(write(tmp_path, text, draw))
    dataset = load_captions(write(tmp_path, text.replace("one;two", "two birds")))
    assert dataset["captions"][:] == [["a dog, and a cat"], ["two birds"]]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("http://host/a.jpg", "an address, and none is fetched: download"),
        ("s3://bucket/a.jpg", "an address"),
        ("data:image/png;base64;iVBORw0KGgo", "perhaps a picture in base64"),
        ("iVBORw0KGgo" * 40 + "==", "perhaps a picture in base64: store its bytes"),
    ],
)
def test_an_address_or_base64_in_a_paths_place_is_called_so(tmp_path, draw, cell, reason):
    with pytest.raises(FileNotFoundError, match=f"1 of 2 image files are missing, first: .*: {reason}"):
        load_captions(write(tmp_path, f"image,caption\na.jpg,a dog\n{cell},a cat\n", draw))
