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


def test_without_a_source_the_datas_own_names_are_taken():
    assert read_names(None, ["dog", "cat"]) == ["dog", "cat"]
