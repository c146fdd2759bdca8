"""YAML: a key twice, aliases without end, and what is no YAML are told with their line."""

import time

import pytest

from modeling_dclip.data.files import MOST_YAML_BYTES, read_yaml
from modeling_dclip.distillation.recipes import parse_recipe, read_recipe_file


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nstudent:\n  bf16: true\n  fp16: true\n  bf16: false\n",
            "line 5: the key 'bf16' twice, before on line 3",
        ),
        ("{seed: 1, seed: 2}", "line 1: the key 'seed' twice, before on line 1"),
        ("seed: 1\n'seed': 2", "line 2: the key 'seed' twice"),
        ("a: &a [*a]", "line 1, column 4: an alias of a value inside this value"),
        (bomb(20), "more than 100000 values, with those that aliases repeat"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 2020-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("[" * 5000, "invalid YAML"),
        ("a: 1\n--- \nb: 2", "expected a single document"),
        ("a: [", "invalid YAML"),
        ("\x07", "invalid YAML"),
    ],
)
def test_yaml_that_says_two_things_or_too_much_is_refused(tmp_path, text, message):
    path, start = tmp_path / "a.yaml", time.monotonic()
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_yaml(path, "recipe")
    assert f"the recipe '{path}'" in str(raised.value) and time.monotonic() - start < 5


def test_anchors_and_merges_are_read_as_they_are(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: 1e-5\n")
    one = {"x": 1, "y": 2}
    assert read_yaml(path) == {"a": one, "b": {"x": 1, "y": 3}, "c": [one, one], "d": "1e-5"}


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.yaml"
    with path.open("wb") as file:
        file.truncate(MOST_YAML_BYTES + 1)
    with pytest.raises(ValueError, match="Expected YAML of at most 1 MiB in the recipe .*a.yaml', got 1 MiB"):
        read_yaml(path, "recipe")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00\xff", b"- a", b"3", b"null", b"a"])
def test_a_recipe_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="recipe.yaml"):
        parse_recipe([], path)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="No recipe at .*, which is a folder"):
        parse_recipe([], tmp_path)


def test_bases_in_a_circle_and_missing_ones_are_named(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ValueError, match=r"a.yaml': expected a base that ends, got a circle: .*a.yaml, .*b.yaml, .*c"):
        read_recipe_file(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"No recipe at '.*nowhere.yaml' \(the base of '.*c.yaml'\)"):
        read_recipe_file(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: [1]\n")
    with pytest.raises(ValueError, match=r"c.yaml': expected a file under 'base', got \[1\]"):
        read_recipe_file(tmp_path / "a.yaml")
