"""Options of every command: a number outside its range, an abbreviation and a place are told before any work."""

import importlib

import pytest

from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.labels import load_classification
from modeling_dclip.data.specs import CommandParser, Range, parse_spec

REGIONS = "data.regions.__main__ --dataset scenes:test,n=1 --detector grid:1x1 --output OUT"
REINFORCED = "data.reinforced.__main__ --dataset scenes:test,n=1 --teachers x --output OUT"
LEAKAGE = "evaluation.leakage --teacher x --dataset scenes:test,n=1 --output OUT"
INDEX = "hub.index.__main__ --model x --images y --output OUT"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{REGIONS} --batch_size 0", "--batch_size: expected an integer from 1 to 1048576, got '0'"),
        (f"{REGIONS} --max_regions -1", "--max_regions: expected an integer from 1 to 1000000000, got '-1'"),
        (f"{REGIONS} --seed nan", "--seed: expected an integer from 0 to 4294967295, got 'nan'"),
        (f"{REGIONS} --batch 3", "unrecognized arguments: --batch 3. Did you mean"),
        (f"{REGIONS} --cache_dir FILE", "'.*FILE' is a file"),
        (f"{REINFORCED} --batch_size 0", "batch_size: expected an integer from 1"),
        (f"{REINFORCED} --num_workers 1000", "num_workers: expected an integer from 0 to 256, got"),
        (f"{LEAKAGE} --draws 0", "--draws: expected an integer from 1 to 1000, got '0'"),
        (f"{LEAKAGE} --num_workers 1000", "--num_workers: expected an integer from 0 to 256, got '1000'"),
        (f"{LEAKAGE} --cache_dir FILE/x", "'.*FILE' is a file"),
        (f"{LEAKAGE} --device cuda:99", "expected a device of this machine, got 'cuda:99'"),
        (f"{INDEX} --batch_size -1", "--batch_size: expected an integer from 1 to 1048576, got '-1'"),
        (f"{INDEX} --chunk_rows 0", "--chunk_rows: expected an integer from 1 to 1000000, got '0'"),
        (f"{INDEX} --output", "--output: expected one argument"),
        (
            "hub.index.__main__ search dog --index x --top_k 0",
            "--top_k: expected an integer from 1 to 1000000, got '0'",
        ),
        ("hub.index.__main__ search dog --index x --effort 0", "--effort: expected an integer from 1"),
        ("hub.export.__main__ onnx --model x --output OUT --image_size 0", "--image_size: expected an integer from 1"),
        ("hub.export.__main__ onxx --model x --output OUT", "invalid choice: 'onxx'"),
        (
            "hub.convert.__main__ mambavision --checkpoint x --output OUT --projection_dim -4",
            "--projection_dim: expected",
        ),
        (
            "hub.publish.__main__ --model x --results y --repo_id a/b --license mit --emissions_grams nan",
            "grams: expected",
        ),
        ("evaluation.results", "the following arguments are required: readme"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_work(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a file")
    module, *words = words.split()
    with pytest.raises(SystemExit, match=f"^Failed: .*{message}") as ended:
        importlib.import_module(f"modeling_dclip.{module}").main(words)
    assert "\n" not in ended.value.code and capsys.readouterr().err == ""  # no usage, which would hide it
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_an_option_has_its_range_in_the_help():
    parser = CommandParser(prog="a")
    for told in ("one word", "one word."):
        with pytest.raises(ValueError, match="^one word. `a --help` lists all options.$"):
            parser.error(told)
    parser.add_argument("--share", range=Range(0, 1, above=True), help="How much.")
    assert "How much. Expected: a number above 0 and up to 1." in " ".join(parser.format_help().split())
    assert parser.parse_args(["--share", "0.25"]).share == 0.25


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "scenes:train,n=100000000000000000000",
            "The option 'n' in .*: expected an integer from 1 to 10000000, got 1000",
        ),
        ("scenes:train,n=-1", "The option 'n' in .*, got -1"),
        ("scenes:train,n=1e3", "Expected an integer for the option 'n' in .*, got '1e3'"),
        ("scenes:train,n=" + "9" * 5000, "Expected an integer for the option 'n'"),
        ("scenes:train,n=2,image_size=100000", "The option 'image_size' in .*: expected an integer from 8 to 4096"),
        ("scenes:train,n=2,singles=nan", "The option 'singles' in .*: expected a number from 0 to 1, got nan"),
        ("scenes:train,n=2,captions_per_image=0", "The option 'captions_per_image' in .*, got 0"),
        ("scenes:train,n=2,size=3", "Unknown option 'size'"),
        ("scenes:train,n=2@99999999999999999999", "Expected a count up to 1000000000"),
    ],
)
def test_a_spec_that_asks_for_too_much_draws_nothing(spec, message):
    with pytest.raises(ValueError, match=message):
        load_captions(spec)


def test_single_objects_are_bounded_too():
    with pytest.raises(ValueError, match="n: expected an integer from 1 to 10000000|The option 'n'"):
        load_classification("scenes:test,n=100000000000")


def test_a_parsed_count_is_a_number():
    from modeling_dclip.data.captions import CAPTION_SOURCES

    assert parse_spec("scenes:train,n=20@3", CAPTION_SOURCES, counted=True).count == 3
