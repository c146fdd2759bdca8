"""Checkpoints: a damaged or foreign one is passed over, and another number of processes is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from modeling_dclip.distillation.checkpoints import (
    RunNotes,
    check_processes,
    delete_old_checkpoints,
    last_checkpoint,
    reading_checkpoint,
)
from modeling_dclip.distillation.run import StageRecord

INPUTS = {"arguments": {"learning_rate": 0.1}}


def make_checkpoint(folder, step, world_size=1):
    """The files of a checkpoint, as the trainer writes them."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.full((64,), float(step))}, checkpoint / "model.safetensors")
    names = ["optimizer.pt", "scheduler.pt"]
    names += ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    for name in names:
        torch.save({"state": torch.arange(500)}, checkpoint / name)
    state = {"global_step": step, "log_history": [], "epoch": 0.5}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return checkpoint


@pytest.fixture
def folder(tmp_path):
    """A stage with checkpoints 2 and 4, of one process."""
    folder = tmp_path / "student"
    StageRecord(folder, INPUTS)
    for step in (2, 4):
        RunNotes.current(folder, 1).write(make_checkpoint(folder, step))
    return folder


def test_the_newest_checkpoint_is_gone_on_from(folder):
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


def test_old_checkpoints_are_deleted_and_no_other_folder(folder):
    (folder / "checkpoint-mine").mkdir()
    for seconds, step in enumerate((9, 2, 4, 6)):  # 9 is left over from a run that went on from 2
        path = folder / f"checkpoint-{step}"
        path.mkdir(exist_ok=True)
        os.utime(path, (1000 + seconds, 1000 + seconds))
    delete_old_checkpoints(folder, 2, newest=6, best=str(folder / "checkpoint-2"))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-mine", "checkpoint-2", "checkpoint-6"}
    delete_old_checkpoints(folder, 1, newest=6)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-mine", "checkpoint-6"}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def writes(text):
    return lambda path: path.write_text(text)


DAMAGE = {
    **{
        f"{change.__name__} {name}": (name, change)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        for change in (cut, flip, empty, os.unlink)
    },
    **{f"{change.__name__} weights": ("model.safetensors", change) for change in (cut, empty, os.unlink)},
    "no state": ("trainer_state.json", os.unlink),
    "a list as state": ("trainer_state.json", writes("[]")),
    "half a state": ("trainer_state.json", writes('{"global_step": 4')),
    "a state without history": ("trainer_state.json", writes('{"global_step": 4}')),
    "text as step": ("trainer_state.json", writes('{"global_step": "4", "log_history": []}')),
    "another step": ("trainer_state.json", writes('{"global_step": 3, "log_history": []}')),
    "a list as notes": ("stage_notes.json", writes("[]")),
    "text as world size": ("stage_notes.json", writes('{"inputs_key": "a", "world_size": "1"}')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, folder, caplog):
    name, change = DAMAGE[damage]
    change(folder / "checkpoint-4" / name)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is" in caplog.text


def test_where_every_checkpoint_is_damaged_the_stage_begins_anew_and_says_so(folder, caplog):
    for checkpoint in folder.glob("checkpoint-*"):
        empty(checkpoint / "optimizer.pt")
    assert last_checkpoint(folder) is None
    assert "begins anew" in caplog.text


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint-9-old", "checkpoint-", "checkpoint-²", "checkpoint--9"])
def test_folders_that_are_no_checkpoints_are_let_be(name, folder):
    (folder / name).mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


def test_a_file_named_as_a_checkpoint_is_let_be(folder):
    (folder / "checkpoint-9").write_text("mine")
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")


def test_a_checkpoint_of_other_inputs_is_passed_over(folder, caplog):
    foreign = make_checkpoint(folder, 6)
    RunNotes("of other inputs", 1).write(foreign)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    assert "checkpoint-6 is passed over: it was made from other inputs" in caplog.text


def test_a_checkpoint_without_notes_is_taken_only_beside_a_record_of_its_time(folder, caplog):
    make_checkpoint(folder, 6)
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    for path in folder.rglob("stage_notes.json"):
        path.unlink()
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")


def test_another_number_of_processes_is_refused(folder):
    for change in (lambda: last_checkpoint(folder, 2), lambda: check_processes(folder, 2)):
        with pytest.raises(ValueError, match=r"begun with 1 process \(checkpoint-4\), got 2.*--num_processes 1"):
            change()
    check_processes(folder, 1)


def test_the_number_of_processes_of_earlier_versions_is_told_by_their_random_states(tmp_path):
    StageRecord(tmp_path / "student", INPUTS)
    (tmp_path / "student" / "stage_notes.json").unlink()
    make_checkpoint(tmp_path / "student", 2, world_size=3)
    with pytest.raises(ValueError, match="begun with 3 processes .* got 1"):
        StageRecord(tmp_path / "student", INPUTS)
    assert last_checkpoint(tmp_path / "student", 3) == str(tmp_path / "student" / "checkpoint-2")


def test_a_state_that_cannot_be_loaded_is_named_with_what_to_delete():
    for error in (RuntimeError("two\nlines"), KeyError("state"), TypeError("odd"), EOFError()):
        with pytest.raises(ValueError, match="The checkpoint 'here' cannot be loaded .* Delete its folder"):
            with reading_checkpoint("here"):
                raise error
    with pytest.raises(torch.OutOfMemoryError), reading_checkpoint("here"):
        raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (1, None, [6]),
        (2, None, [5, 6]),
        (3, None, [4, 5, 6]),
        (1, 3, [3, 6]),
        (3, 3, [3, 5, 6]),
        (5, None, [3, 4, 5, 6]),
    ],
)
def test_the_newest_checkpoints_are_kept_by_their_steps_whatever_their_times_say(keep, best, kept, tmp_path):
    for step in (3, 4, 5, 6, 9):  # 9 is left over
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1e9 - 100 * step, 1e9 - 100 * step))
    delete_old_checkpoints(tmp_path, keep, newest=6, best=best and str(tmp_path / f"checkpoint-{best}"))
    left = [tmp_path / f"checkpoint-{step}" for step in kept + [9] * (keep == 5)]
    assert sorted(tmp_path.iterdir()) == left
