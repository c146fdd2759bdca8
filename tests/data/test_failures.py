"""A user's mistake ends every command in one line on stderr and status 1; an error in the code keeps its traceback."""

import argparse
import contextlib
import csv
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, StrictDataclassError
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers.utils import logging

from modeling_dclip.data.failures import (
    BENCHMARK_FAILURES,
    FAILURES,
    HelpFormatter,
    HTTPError,
    MistakeCollector,
    Mistakes,
    TransportError,
    check_launcher,
    command,
    describe_failure,
    is_mistake,
    naming,
    one_line,
    recorded_command,
    redact,
)
from modeling_dclip.interruption import INTERRUPTED, SIGNALS, is_command

ROOT = Path(__file__).resolve().parents[2]


@command
def fail(error):
    """A command that raises what it is given."""
    raise error


def fail_to_connect():
    raise BrokenPipeError(32, "Broken pipe")


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


OF_MACHINE = {
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you": "too little",
    "[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22": "Is the disk full, or the file damaged?",
    "DataLoader worker (pid 12) is killed by signal: Killed. ": "Set num_workers to 0",
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly": "Set num_workers to 0",
    "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:24297: Connection reset by peer.": "Another process of",
    "NCCL error in: ProcessGroupNCCL.cpp:3384, remote process exited or there was a network error": "Another process",
    "Error in virtual void faiss::Clustering::train_encoded(...) at Clustering.cpp:275: Error: 'nx >= k'": "FAISS",
}


@pytest.mark.parametrize("text", OF_MACHINE)
def test_what_a_library_tells_of_the_machine_is_one_line_with_a_remedy(text):
    with pytest.raises(SystemExit, match=f"^Failed: .*{re.escape(OF_MACHINE[text])}") as ended:
        fail(RuntimeError(text))
    assert text.split()[0] in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize(
    "error",
    [
        zlib.error("a"),
        tarfile.ReadError("a"),
        zipfile.BadZipFile("a"),
        gzip.BadGzipFile("a"),
        lzma.LZMAError("a"),
        csv.Error("a"),
        LocalEntryNotFoundError("a"),
        OfflineModeIsEnabled("a"),
        HTTPError("a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_damaged_file_and_a_server_that_is_not_there_are_one_line(error):
    with pytest.raises(SystemExit, match="^Failed: "):
        fail(error)


class Undecodable(torch.utils.data.Dataset):
    """A row whose error no loader can make again from its text."""

    def __len__(self):
        return 1

    def __getitem__(self, row):
        if row:
            raise KeyError(row)
        b"\xff".decode("utf-8")


def test_an_error_that_a_worker_passes_on_as_another_type_counts_as_what_it_was():
    (error,) = [None]
    try:
        list(DataLoader(Undecodable(), num_workers=1))
    except (RuntimeError, ValueError) as raised:
        error = raised
    assert is_mistake(error) and one_line(error).startswith("'utf-8' codec can't decode byte 0xff")
    other = RuntimeError("Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most):\nKeyError: 1")
    assert not is_mistake(other)


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
    assert ended.value.code == 130 and capsys.readouterr().err == f"\n{INTERRUPTED}\n"


@pytest.mark.parametrize("unbuffered", [False, True], ids=["found at its end", "found while it prints"])
@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: 0, 141),
        (lambda: sys.exit(0), 141),
        (lambda: sys.exit("Failed: a"), "Failed: a"),
        (fail_to_connect, None),
    ],
    ids=["returns", "help", "mistake", "other pipe"],
)
def test_a_command_whose_reader_has_gone_ends_quietly(end, status, unbuffered, monkeypatch, capsys):
    """As `| head`. A mistake keeps its line, and a broken connection of which nobody prints is a mistake."""
    read, write = os.pipe()
    stream = io.TextIOWrapper(os.fdopen(write, "wb", 0 if unbuffered else -1), write_through=unbuffered)
    monkeypatch.setattr(sys, "stdout", stream)

    @command
    def report():
        if status != "Failed: a" or not unbuffered:
            print("a line")
        return end()

    if status is not None:
        os.close(read)
    with pytest.raises(SystemExit) as caught:
        report()
    if status is None:
        os.close(read)
        assert caught.value.code.startswith("Failed: [Errno 32] Broken pipe")
    else:
        assert caught.value.code == status
        stream.flush()  # as Python does at its end
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_what_a_command_returns_and_its_name_are_its_own():
    assert command(lambda value: value + 1)(2) == 3
    assert fail.__name__ == "fail" and fail.__doc__ == "A command that raises what it is given."


@pytest.mark.parametrize("asked", [False, True])
def test_the_traceback_of_a_benchmark_is_logged_only_where_it_is_asked_for(asked, monkeypatch, caplog):
    monkeypatch.setattr(logging, "get_verbosity", lambda: logging.INFO if asked else logging.WARNING)
    caplog.set_level(logging.WARNING)
    describe_failure("a set", ValueError("a"))
    assert ("a set failed here" in caplog.text) == asked


def test_a_name_that_the_terminals_encoding_lacks_stops_no_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    command(lambda: sys.stdout.write("日本 caf\udce9"))()
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u65e5\\u672c caf\\udce9"


def test_help_shows_the_defaults_that_there_are_and_the_description_as_it_is():
    parser = argparse.ArgumentParser("a", description="One.\n\n    two", formatter_class=HelpFormatter)
    parser.add_argument("--must", required=True, help="First.")
    parser.add_argument("--may", help="Second.")
    parser.add_argument("--number", default=0, help="Third.")
    shown = parser.format_help()
    assert "One.\n\n    two" in shown
    assert shown.count("default") == 1 and "Third. (default: 0)" in shown


def test_an_error_without_a_message_is_named():
    assert one_line(ValueError()) == "ValueError"
    assert "too little memory" in one_line(MemoryError())
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
def test_every_command_answers_each_wrong_file_in_one_line(name, tmp_path):
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
    first, *others = ended.value.code.splitlines()
    assert first.startswith("Failed: ")
    assert all(re.match(r"- |  \d+\. ", line) and str(tmp_path) in line for line in others), "one for each of several"
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


def in_child(main, *signals, env=()):
    """Run a command in a forked process and send it signals when it is ready; its exit status and stderr."""
    (ready, tell), (err, write) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.environ.update(env)
        os.dup2(write, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        try:
            command(main)(lambda: os.write(tell, b"."))
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        os._exit(0)
    os.close(write)
    for number in signals:
        os.read(ready, 1)
        os.kill(child, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(err) as stream:
        return status, stream.read()


def wait(ready):
    ready()
    time.sleep(30)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=lambda one: str(one)
)
def test_a_signal_ends_a_command_in_one_line_with_its_usual_status(number, status):
    assert in_child(wait, number) == (status, f"\n{INTERRUPTED}\n")


def test_a_second_signal_ends_a_command_that_is_slow_to_clean_up(monkeypatch):
    def cling(ready):
        try:
            wait(ready)
        finally:
            wait(ready)

    assert in_child(cling, signal.SIGTERM, signal.SIGINT) == (143, f"\n{INTERRUPTED}\n")


def test_a_signal_that_comes_in_a_callback_is_not_lost():
    class Slow:
        def __del__(self):
            wait(self.ready)

    def drop(ready):
        slow = Slow()
        slow.ready = ready
        del slow
        time.sleep(30)

    assert in_child(drop, signal.SIGTERM) == (143, f"\n{INTERRUPTED}\n")


def test_a_worker_leaves_ctrl_c_to_the_main_process():
    def fork(ready):
        if not (worker := os.fork()):
            os.kill(os.getpid(), signal.SIGINT)  # as a terminal sends it to all
            os._exit(7 if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7

    assert in_child(fork) == (0, "")


def test_what_the_starter_ignores_stays_ignored_and_handlers_are_given_back():
    def hang_up(ready):
        os.kill(os.getpid(), signal.SIGHUP)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert in_child(hang_up) == (0, "")
    signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    command(lambda: None)()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_only_the_first_process_of_a_launch_says_that_it_was_interrupted():
    assert in_child(wait, signal.SIGTERM, env={"LOCAL_RANK": "1"}) == (143, "")


def test_a_command_ends_when_its_launcher_is_gone(tmp_path):
    """`accelerate launch` does not pass SIGTERM on to its one process."""
    launcher = tmp_path / "accelerate.py"
    launcher.write_text(
        "import os, subprocess, sys, time\n"
        "os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]])\ntime.sleep(60)\n"
    )
    work = (
        "import sys, time\n"
        "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'modeling_dclip.hub.index']\n"  # which needs no PyTorch
        "from modeling_dclip.data.failures import command\n"
        "command(lambda: (print('up', flush=True), time.sleep(50)))()"
    )
    with subprocess.Popen(
        [sys.executable, launcher, work], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launched:
        assert launched.stdout.readline() == "up\n"
        launched.terminate()
        assert launched.wait() == -signal.SIGTERM
        assert launched.stderr.read() == f"\n{INTERRUPTED}\n"  # until the process that it started has ended, too


@pytest.mark.parametrize("words", [["train.py"], ["-m", "modeling_dclip.evaluation.results", "x.md"]])
def test_ctrl_c_while_the_imports_run_is_one_line(words, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )  # within `import torch`
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"\n{INTERRUPTED}\n")


def test_a_process_that_only_uses_the_package_keeps_its_signals():
    assert not is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler


SECRET = "s3cr3t-V4lue_99"


@pytest.mark.parametrize(
    "words",
    [
        ["--student.hub_token", SECRET],
        ["--student.hub-token", SECRET],
        [f"--hub_token={SECRET} {SECRET}"],
        ["--hub_token", SECRET, SECRET],
        ["--API_KEY", SECRET],
        ["--x.kwargs", f'{{"token": "{SECRET}", "a": 1}}'],
        ["--x.kwargs", json.dumps(json.dumps({"password": SECRET}))],
        ["--data", f"https://me:{SECRET}@host/a.tar"],
        ["--data", f"wds:https://host/a.tar?x=1&token={SECRET}&y=2"],
        ["--data", f"https://host/a?X-Amz-Signature={SECRET}"],
        ["--data", f"hub:name,token={SECRET},split=test"],
        ["--header", f"Authorization: Bearer {SECRET}"],
        ["--name", "hf_AbCdEfGhIjKlMn"],
        ["--name", "the-value-of-HF_TOKEN"],
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_no_secret_is_in_a_recorded_command(words, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-value-of-HF_TOKEN")
    told = recorded_command("train.py", ["--seed", "3", *words, "--output_dir", "a b"])
    assert told.startswith("train.py --seed 3 ") and told.endswith(" --output_dir 'a b'") and "***" in told
    for text in (
        told,
        redact(told),
        redact(" ".join(words[:2])) if words.count(SECRET) < 2 and " " not in words[0] else "",
    ):
        assert not any(secret in text for secret in (SECRET, "hf_Ab", "the-value"))


@pytest.mark.parametrize(
    "text",
    [
        "Expected at most 77 tokens: got 80.",
        "train.py --dmclip.tokenizer recipes/demo_anchor --student.max_grad_norm 1",
        "coco:a.json:val2017@5000,captions=5 https://host/a/b.tar?x=1",
        "pad_token_id=0, num_tokens=3, key: value, sha256:0123456789abcdef",
        "Expected a token for the Hub, got none. Run `hf auth login`.",
    ],
)
def test_words_that_are_no_secret_stay(text):
    assert redact(text) == text


def test_a_failure_says_no_secret(capsys):
    with pytest.raises(SystemExit) as ended:
        fail(OSError(f"403 Forbidden: https://me:{SECRET}@host/a"))
    assert SECRET not in ended.value.code and "host/a" in ended.value.code


def test_one_process_where_accelerate_was_asked_for_several_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    check_launcher()  # a cluster may set the address for other programs
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch --num_processes 2 --cpu` does
    with pytest.raises(ValueError, match="as many processes as --num_processes says, got one"):
        check_launcher()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launcher()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("MASTER_PORT")  # and `--num_processes 1`
    check_launcher()


def test_several_mistakes_have_a_line_each():
    with pytest.raises(SystemExit) as ended:
        fail(Mistakes([ValueError("Expected one,\n  got two."), OSError("No file.")]))
    first, *others = ended.value.code.splitlines()
    assert first.startswith("Failed: 2 mistakes") and others == ["  1. Expected one, got two.", "  2. No file."]


def test_a_collector_tells_each_mistake_once_and_lets_bugs_pass():
    found = MistakeCollector()
    for error in (ValueError("a"), OSError("b"), ValueError("a"), Mistakes([ValueError("c"), ValueError("a")])):
        with found.collecting():
            raise error
    assert [str(one) for one in found.errors] == ["a", "b", "c"]
    with pytest.raises(KeyError), found.collecting():
        raise KeyError("a bug")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ValueError("Expected one, got two."), ValueError, "seed: expected one, got two."),
        (FileNotFoundError("No file."), FileNotFoundError, "seed: No file."),
        (PermissionError("No."), OSError, "seed: No."),
        (ImportError("No package."), ImportError, "seed: No package."),
        (ValueError("seed: no."), ValueError, "seed: no."),
    ],
)
def test_a_field_stands_in_front_of_what_is_wrong_with_its_value(error, kind, told):
    with pytest.raises(kind, match=f"^{re.escape(told)}$"), naming("seed"):
        raise error
