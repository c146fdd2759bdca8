"""Files of names and templates, and what no classifier can be made of."""

import pytest

from modeling_dclip.data.labels.prompts import PHOTO_TEMPLATES, check_prompts, parse_lines, read_lines, read_names


def test_places_are_written_one_way_and_spaces_go():
    assert check_prompts([" dog", "cat "], ["a {c}.", " the {} "]) == (["dog", "cat"], ["a {}.", "the {}"])
    assert all(template.count("{}") == 1 for template in PHOTO_TEMPLATES)


def test_names_may_repeat():
    assert check_prompts(["missile", "dog", "missile"], ["a {}"])[0] == ["missile", "dog", "missile"]


def test_lines_keep_their_order_and_the_end_is_no_line():
    assert parse_lines("b\n a \nc\n\n\n", "here") == ["b", "a", "c"]
    with pytest.raises(ValueError, match="'here', but line 2 is empty"):
        parse_lines("b\n\nc\n", "here")
    with pytest.raises(ValueError, match="'here', but the file is empty"):
        parse_lines("\n", "here")


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="UTF-8 text in '.*names.txt'"):
        read_lines(tmp_path / "names.txt")


@pytest.mark.parametrize("text", ['["red fox", " dog "]', '{"1": "dog", "0": "red fox"}'])
def test_a_json_list_and_an_object_by_numbers_are_lines(tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    assert read_names(str(tmp_path / "names.json"), ["a", "b"]) == ["red fox", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dog": 0, "red fox": 1}', "Expected a list of texts, or an object with the keys '0', '1'.*got {'dog': 0"),
        ("[]", "Expected a list of texts"),
        ('["dog", 3]', "Entry 1 of '.*names.json': expected text under 'text', got 3"),
        ('{"0": "dog", "0": "fox"}', "the key '0' comes twice"),
    ],
)
def test_other_json_is_no_list_of_names(tmp_path, text, message):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "names.json")


def test_without_a_source_the_datas_own_names_are_taken():
    assert read_names(None, ["dog", "cat"]) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("id,name\n0,dog\n1,cat\n", "line 1 is 'id,name', the header of a table"),
        ("\ufeffName\ndog\ncat\n", "line 1 is 'Name', the header of a table"),
        ("names:\n  0: dog\n  1: cat\n", "line 1 is 'names:', the header"),
        ("class name\ndog\ncat\n", "line 1 is 'class name', the header"),
        ("# my classes\ndog\ncat\n", "line 1 is the comment '# my classes'"),
        ("dog\n// birds\ncat\n", "line 2 is the comment '// birds'"),
        ('{"0": "dog",\n"1": "cat"}\n', "line 1 is .*as in JSON. Call the file NAME.json"),
        ("['dog', 'cat']\n", "line 1 is .*as in JSON"),
        (
            "lambda c: f'a photo of a {c}.',\n",
            "line 1 is .lambda c.*, a line of Python. Write a text with a place, {}",
        ),
        ('"dog",\n"cat"\n', "its lines stand between quotes .line 1 is"),
    ],
)
def test_lines_that_would_shift_the_classes_or_misname_them_are_refused(tmp_path, text, fault):
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"one name or template a line in '.*names.txt', but {fault}"):
        read_names(str(tmp_path / "names.txt"), ["0", "1"])


@pytest.mark.parametrize(
    "text", ["{} on a desk\na {}", "label maker\nclass ring", "#1 shirt\ndog", '"a" {}\n{}', "id"]
)
def test_lines_that_only_look_like_a_header_stay(text):
    assert parse_lines(text, "here") == text.split("\n")
