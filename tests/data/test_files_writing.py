"""Writing: whole or not at all, in a folder of one run at a time, nothing left behind, and errors that say where."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from modeling_dclip.data import files
from modeling_dclip.data.files import (
    LOCK_NAME,
    check_name,
    check_new_folder,
    check_output_folder,
    git_revision,
    holding,
    remove_leftovers,
    replacing,
    temporary_folder,
    write_manifest,
    write_text,
    writing,
)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "...",
        "../../x",
        "/abs",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        " a",
        "a ",
        "a.",
        "con",
        "NUL.txt",
        "é" * 101,
        "\udcff",
    ],
    ids=ascii,
)
def test_a_name_that_is_no_single_name_is_refused(name):
    with pytest.raises(ValueError, match="Expected a name for an arm, got "):
        check_name(name, "an arm")


@pytest.mark.parametrize("name", ["a", "rank=8,lr=1e-6", "é", "猫 1", ".a", "a.b", "console", "x" * 200])
def test_a_single_name_is_taken_as_it_is(name, tmp_path):
    (tmp_path / check_name(name, "an arm")).mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
@pytest.mark.parametrize("check", [check_new_folder, check_output_folder])
def test_an_output_without_a_name_is_refused(check, name):
    with pytest.raises(ValueError, match="Expected the path of a folder to write to"):
        check(name)


def test_the_working_folder_is_no_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="the working folder. Name a folder in it"):
        check_new_folder(".")


def in_child(work):
    """Run a function in a forked process; what it was killed by, or 0."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_me(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_in_use(tmp_path):
    def write_half():
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            kill_me()

    def stop_before_the_lock():
        files.tempfile.mkdtemp = lambda **names: (real(**names), kill_me())
        write_text(tmp_path / "b.txt", "b")

    real = files.tempfile.mkdtemp
    assert in_child(write_half) == in_child(stop_before_the_lock) == signal.SIGKILL
    (tmp_path / ".others.tmp").mkdir()
    assert len(list(tmp_path.iterdir())) == 2, "the second removed what the first left"
    with replacing(tmp_path / "c.txt") as temporary:  # looks once for leftovers
        temporary.write_text("c")
        assert remove_leftovers(tmp_path) == 0, "this process uses its own"
        assert in_child(lambda: (remove_leftovers(tmp_path), temporary.exists() or kill_me())) == 0, "nor does another"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".others.tmp", "c.txt"]


def test_leftovers_in_folders_below_are_found(tmp_path):
    def write_half():
        with replacing(tmp_path / "ab" / "a.npy"):
            kill_me()

    assert in_child(write_half) == signal.SIGKILL
    assert remove_leftovers(tmp_path) == 0 and remove_leftovers(tmp_path, below=True) == 1
    assert remove_leftovers(tmp_path / "nowhere") == 0 and list((tmp_path / "ab").iterdir()) == []


@pytest.mark.parametrize("moment", ["before it is locked", "while it is locked by the other", "between"])
def test_a_folder_that_another_process_takes_for_a_leftover_is_made_again(moment, tmp_path, monkeypatch):
    """The other process looks after the folder was made, and before its maker holds the lock in it."""
    real, seen = files._lock, []

    def sweep(path, **options):
        if not seen and not options:  # the maker's first attempt
            seen.append(path.parent)
            if moment == "before it is locked":
                remove_leftovers(tmp_path)
                return real(path)  # raises: the folder has vanished
            path.touch()
            if moment == "between":  # the maker has opened the file, and the other is done before its lock
                handle = os.open(path, os.O_RDWR)
                remove_leftovers(tmp_path)
                os.close(handle)
                return real(path)
            with monkeypatch.context() as patched:
                patched.setattr(files.shutil, "rmtree", lambda folder: None)  # not finished yet
                remove_leftovers(tmp_path)
            return None
        return real(path, **options)

    monkeypatch.setattr(files, "_lock", sweep)
    with temporary_folder(tmp_path) as folder:
        assert folder not in seen and not seen[0].exists()
        (folder / "a").write_text("a")
        assert remove_leftovers(tmp_path) == (moment == "while it is locked by the other")
        assert (folder / "a").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_held_folder_is_refused_with_its_holder_and_free_after_any_end(tmp_path):
    output = tmp_path / "runs" / "mine"

    def hold_and_die():
        with holding(output):
            kill_me()

    assert in_child(hold_and_die) == signal.SIGKILL
    assert (output / LOCK_NAME).exists(), "the file stays, the lock does not"
    with holding(output):
        with pytest.raises(BlockingIOError, match=rf"mine' is in use .*process {os.getpid()} on .*started 20\d\d-"):
            holding(output).__enter__()
        assert in_child(lambda: None) == 0, "a forked process ends and does not free it"
        with pytest.raises(BlockingIOError, match="is in use"):
            holding(output).__enter__()
    assert list(output.iterdir()) == [], "the lock's file is gone after a plain end"
    output.rmdir()
    output.parent.rmdir()
    with holding(tmp_path / "new", beside=True), pytest.raises(BlockingIOError, match="new' is in use"):
        holding(tmp_path / "new", beside=True).__enter__()
    with holding(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == [], "nor is an empty folder left"


def test_a_forked_process_does_not_keep_a_lock_of_a_dead_one(tmp_path):
    read, write = os.pipe()

    def hold_fork_and_die():
        with holding(tmp_path):
            if not os.fork():  # as a data loader's worker, which lives on a while
                os.close(write)
                os.read(read, 1)
                os._exit(0)
            kill_me()

    assert in_child(hold_fork_and_die) == signal.SIGKILL
    with holding(tmp_path):
        os.write(write, b"x")
    os.close(read), os.close(write)


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with holding(tmp_path / "a"):
        write_text(tmp_path / "a" / "b.txt", "b")
    assert "cannot be locked (No locks available)" in caplog.text
    assert [entry.name for entry in (tmp_path / "a").iterdir() if entry.name != LOCK_NAME] == ["b.txt"]


@pytest.fixture
def small_files(tmp_path):
    """No file may grow beyond 4 KiB, as on a full disk; `FULL` names the file that was asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_table(path):
    Dataset.from_dict({"a": list(range(5000))}).save_to_disk(path)


def save_words(path):
    tokenizer = Tokenizer(WordLevel({f"word{number}": number for number in range(900)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


WRITERS = {
    "bytes": lambda path: path.write_bytes(bytes(5000)),
    "torch": lambda path: torch.save(torch.zeros(5000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(5000)}, path),
    "numpy": lambda path: np.save(path, np.zeros(5000)),
    "parquet": lambda path: pq.write_table(pa.table({"a": np.random.default_rng(0).normal(size=5000)}), path),
    "dataset": save_table,
    "tokenizer": save_words,
    "picture": lambda path: Image.effect_noise((99, 99), 9).save(path, format="PNG"),
    "tar": lambda path: tarfile.open(path, "w").add(__file__),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_error_that_names_the_place_whichever_library_writes(tmp_path, small_files, write):
    path = tmp_path / "a.x"
    with (
        pytest.raises(OSError, match=rf"^Cannot write '{path}': .* Make room, then run the same"),
        replacing(path) as new,
    ):
        write(new)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_vanishes_or_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="^Cannot write '.*file/a': .* Make it writable, or name another"):
        write_text(tmp_path / "file" / "a", "a")
    with pytest.raises(FileNotFoundError, match="^Cannot write '.*gone': No such file"), writing(tmp_path / "gone"):
        torch.save(1, tmp_path / "gone" / "a")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "a", "/other/a"), RuntimeError("shapes"), ValueError("a")])
def test_an_error_of_something_else_passes_through_a_writer(tmp_path, error):
    with pytest.raises(type(error)) as raised, writing(tmp_path / "a"):
        raise error
    assert raised.value is error


def test_a_manifest_says_what_made_an_output_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--hub_token", "s3cr3t", "--seed", "3"])
    data = {"train_datasets": ["csv:https://me:s3cr3t@host/a.csv"], "hub_token": "s3cr3t"}
    write_manifest(tmp_path / "manifest.json", processes=2, seed=3, data=data)
    text = (tmp_path / "manifest.json").read_text()
    told = json.loads(text)
    assert "s3cr3t" not in text and told["command"] == "python train.py --hub_token *** --seed 3"
    assert told["seed"] == 3 and told["processes"] == 2 and "csv:https://***@host/a.csv" in text
    assert torch.__version__.startswith(told["versions"]["torch"]) and told["versions"]["python"] and told["created"]
    write_manifest(tmp_path / "again.json", processes=2, seed=3, data=data)
    again = json.loads((tmp_path / "again.json").read_text())
    assert told | {"created": ""} == again | {"created": ""}


def test_the_revision_is_of_this_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words], check=True)

    package = tmp_path / "modeling_dclip"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(files, "__file__", str(package / "data" / "files.py"))
    revision = git_revision.__wrapped__
    assert revision() is None, "no repository"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "a")
    assert revision() is None, "installed into a folder of another repository"
    git("add", "-A")
    git("commit", "-q", "-m", "b")
    assert re.fullmatch("[0-9a-f]{40}", revision())
    (package / "__init__.py").write_text("1")
    assert revision().endswith("-dirty")
    monkeypatch.setenv("PATH", "")
    assert revision() is None, "no git"
