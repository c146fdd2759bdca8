"""A file is replaced whole or not at all."""

import pytest

from modeling_dclip.data.files import replacing


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
