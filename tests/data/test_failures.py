"""A user's mistake ends every command in one line on stderr and status 1; an error in the code keeps its traceback."""

import argparse
import importlib
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers.utils import logging

from modeling_dclip.data.failures import (
    BENCHMARK_FAILURES,
    FAILURES,
    HelpFormatter,
    TransportError,
    command,
    describe_failure,
    one_line,
)

ROOT = Path(__file__).resolve().parents[2]


@command
def fail(error):
    """A command that raises what it is given."""
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Expected one,\n   got two."),
        FileNotFoundError("Expected one, got two."),
        ImportError("Expected one, got two."),
        FloatingPointError("Expected one, got two."),
        MemoryError("Expected one, got two."),
        torch.OutOfMemoryError("Expected one, got two."),
        TransportError("Expected one, got two."),
        DatasetsError("Expected one, got two."),
        SafetensorError("Expected one, got two."),
        StrictDataclassError("Expected one, got two."),
        pickle.UnpicklingError("Expected one, got two."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_is_one_line(error):
    with pytest.raises(SystemExit) as ended:
        fail(error)
    assert ended.value.code == "Failed: Expected one, got two. (TRANSFORMERS_VERBOSITY=info shows where in the code)"
    assert ended.value.__context__ is error and isinstance(error, BENCHMARK_FAILURES)


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a"), AttributeError("a"), RuntimeError("a")])
def test_an_error_in_the_code_keeps_its_traceback(error):
    assert not isinstance(error, FAILURES)
    with pytest.raises(type(error)):
        fail(error)


def test_the_log_level_info_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(logging, "get_verbosity", lambda: logging.INFO)
    with pytest.raises(ValueError, match="wrong"):
        fail(ValueError("wrong"))


def test_an_interruption_ends_plainly(capsys):
    with pytest.raises(SystemExit) as ended:
        fail(KeyboardInterrupt())
    assert ended.value.code == 130 and capsys.readouterr().err == "Interrupted.\n"


def test_what_a_command_returns_and_its_name_are_its_own():
    assert command(lambda value: value + 1)(2) == 3
    assert fail.__name__ == "fail" and fail.__doc__ == "A command that raises what it is given."


@pytest.mark.parametrize("asked", [False, True])
def test_the_traceback_of_a_benchmark_is_logged_only_where_it_is_asked_for(asked, monkeypatch, caplog):
    monkeypatch.setattr(logging, "get_verbosity", lambda: logging.INFO if asked else logging.WARNING)
    caplog.set_level(logging.WARNING)
    describe_failure("a set", ValueError("a"))
    assert ("a set failed here" in caplog.text) == asked


def test_help_shows_the_defaults_that_there_are_and_the_description_as_it_is():
    parser = argparse.ArgumentParser("a", description="One.\n\n    two", formatter_class=HelpFormatter)
    parser.add_argument("--must", required=True, help="First.")
    parser.add_argument("--may", help="Second.")
    parser.add_argument("--number", default=0, help="Third.")
    shown = parser.format_help()
    assert "One.\n\n    two" in shown
    assert shown.count("default") == 1 and "Third. (default: 0)" in shown


def test_an_error_without_a_message_is_named():
    assert one_line(MemoryError()) == "MemoryError"
    assert describe_failure("a set", ValueError("a\nb")) == "a set: ValueError: a b"


class Broken(torch.utils.data.Dataset):
    """Every row is broken."""

    def __len__(self):
        return 1

    def __getitem__(self, row):
        raise ValueError("Image 'a' cannot be read:\nit is cut.")


def test_an_error_in_a_worker_reads_as_without_workers():
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker") as raised:
        list(DataLoader(Broken(), num_workers=1))
    assert one_line(raised.value) == "Image 'a' cannot be read: it is cut."


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_as_command", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRONG = "NOWHERE/wrong.json"  # not there
SPEC = f"coco:{WRONG}:NOWHERE"
OUTPUT = ("--output", "OUT")
COMMANDS = {
    "train": ["--recipe", WRONG],
    "eval": ["--model", "x", "--benchmark", "retrieval=scenes:test,n=2", "--output", "FILE/results.json"],
    "eval report": ["report", WRONG],
    "eval compare": ["compare", WRONG, WRONG],
    "modeling_dclip.data.regions.__main__": ["--dataset", SPEC, *OUTPUT],
    "modeling_dclip.data.reinforced.__main__": ["--dataset", SPEC, "--teachers", "x", *OUTPUT],
    "modeling_dclip.evaluation.leakage": ["--teacher", "x", "--dataset", SPEC, *OUTPUT],
    "modeling_dclip.evaluation.results": [WRONG],
    "modeling_dclip.hub.publish.__main__": [
        *("--model", WRONG, "--results", WRONG, "--repo_id", "a/b", "--license", "mit", "--dry_run"),
    ],
    "modeling_dclip.hub.export.__main__": ["onnx", "--model", WRONG, *OUTPUT],
    "modeling_dclip.hub.convert.__main__": ["mambavision", "--checkpoint", WRONG, *OUTPUT],
    "modeling_dclip.hub.index.__main__": ["--model", WRONG, "--images", "NOWHERE", *OUTPUT],
    "modeling_dclip.hub.index.__main__ search": ["search", "a dog", "--index", "NOWHERE"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_a_wrong_file_in_one_line(name, tmp_path):
    (tmp_path / "file").touch()
    places = {"NOWHERE": str(tmp_path / "nowhere"), "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    words = COMMANDS[name]
    for place, path in places.items():
        words = [word.replace(place, path) for word in words]
    module = name.split()[0]
    main = (script(module) if module in ("train", "eval") else importlib.import_module(module)).main
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, str), "status 1 and the text on stderr"
    assert ended.value.code.startswith("Failed: ") and len(ended.value.code.splitlines()) == 1
    assert str(tmp_path) in ended.value.code, "it names the file"
    assert not (tmp_path / "out").exists()


def test_the_interpreter_writes_the_line_and_ends_with_status_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "modeling_dclip.evaluation.results", str(tmp_path / "no.md")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Failed: ") and "no.md" in done.stderr
    assert "Traceback" not in done.stderr
