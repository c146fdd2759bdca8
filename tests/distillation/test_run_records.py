"""Records of stages: deleted whole or not at all, and finished only as long as their files are there."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from modeling_dclip.distillation.run import StageRecord, finished_inputs

OLD, NEW = {"rate": 1}, {"rate": 2}


def make_stage(folder, finished=True):
    record = StageRecord(folder, OLD)
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "train").mkdir()
    (folder / "train" / "data-00000-of-00001.arrow").write_bytes(b"rows")
    (folder / "checkpoint-3").mkdir()
    for name in ("trainer_state.json", "optimizer.pt", "rng_state.pth", "model.safetensors"):
        (folder / "checkpoint-3" / name).write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    if finished:
        record.finish()
    return record


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    pass


def kill_after(monkeypatch, steps):
    """Stop at this number of deletions, as SIGKILL does; whatever would clean up afterwards is stopped too."""
    left = [steps]
    for name in ("unlink", "rmdir"):
        real = getattr(os, name)

        def dies(*args, real=real, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **options)

        monkeypatch.setattr(os, name, dies)


def assert_made_again(folder, inputs, caplog):
    """With --overwrite true: what was wrong is told, and no advice to do what was done already."""
    caplog.clear()
    assert not StageRecord(folder, inputs, overwrite=True).finished
    (told,) = caplog.messages
    assert told.startswith("student: made again, as --overwrite asks. ") and told.endswith(".")
    assert not re.search("--overwrite true|Delete|Put it back|--output_dir|Go on with", told)


def test_a_stage_of_other_inputs_is_made_again_without_the_advice_that_was_taken(tmp_path, caplog):
    make_stage(tmp_path / "student")
    assert_made_again(tmp_path / "student", NEW, caplog)
    make_stage(other := tmp_path / "notes" / "student")
    (other / "stage_notes.json").write_text("[")
    assert_made_again(other, OLD, caplog)


def test_a_deletion_that_was_stopped_at_any_step_is_ended_and_nothing_old_is_gone_on_from(tmp_path, monkeypatch):
    make_stage(tmp_path / "whole")
    whole, stops = files(tmp_path / "whole"), 0
    for steps in range(100):
        folder = tmp_path / f"{steps}" / "student"
        shutil.copytree(tmp_path / "whole", folder)
        with monkeypatch.context() as patched:
            kill_after(patched, steps)
            try:
                StageRecord(folder, NEW, overwrite=True)
            except Killed:
                stops += 1
            else:
                break
        if files(folder) >= whole and json.loads((folder / "stage.json").read_text())["inputs"] == OLD:
            assert steps == 0  # nothing was deleted: the old stage is as it was
            continue
        again = StageRecord(folder, NEW)  # without overwrite: the decision was made
        assert not again.finished
        assert files(folder) == {"stage.json", "stage_notes.json"}
        assert not list(folder.glob("checkpoint-*"))
    assert stops > 10


def test_a_deletion_that_was_stopped_is_no_old_stage_either(tmp_path, monkeypatch):
    folder = tmp_path / "student"
    make_stage(folder)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, 4)
        StageRecord(folder, NEW, overwrite=True)
    with pytest.raises(ValueError, match="did not finish"):
        finished_inputs(folder)
    assert not StageRecord(folder, OLD).finished
    assert files(folder) == {"stage.json", "stage_notes.json"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 10), "model.safetensors has 10 bytes in place of"),
        (lambda folder: (folder / "config.json").write_text(""), "config.json has 0 bytes"),
        (lambda folder: shutil.rmtree(folder / "train"), "train/data-00000-of-00001.arrow is missing"),
    ],
)
def test_a_finished_stage_whose_files_are_gone_is_named_or_made_again(damage, message, tmp_path, caplog):
    folder = tmp_path / "student"
    make_stage(folder)
    assert StageRecord(folder, OLD).finished and finished_inputs(folder) == OLD
    damage(folder)
    for read in (lambda: StageRecord(folder, OLD), lambda: finished_inputs(folder)):
        with pytest.raises(ValueError, match=f"is finished, but {message}.*Put it back, or delete the folder"):
            read()
    assert_made_again(folder, OLD, caplog)
    assert files(folder) == {"stage.json", "stage_notes.json"}


def test_edited_settings_and_deleted_checkpoints_leave_a_stage_finished(tmp_path):
    make_stage(tmp_path / "student")
    (tmp_path / "student" / "config.json").write_text('{"mine": 1}')
    (tmp_path / "student" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "student" / "checkpoint-3")
    assert StageRecord(tmp_path / "student", OLD).finished


def test_the_weights_of_a_stage_that_finished_before_its_files_were_noted_are_checked(tmp_path):
    folder = tmp_path / "student"
    make_stage(folder)
    (folder / "stage_notes.json").unlink()
    assert StageRecord(folder, OLD).finished
    os.truncate(folder / "model.safetensors", 200)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        StageRecord(folder, OLD)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        StageRecord(folder, OLD)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"finished": true}', '{"inputs": {}}', '{"finished": 1, "inputs": {}}', "[" * 100_000]
    + ['{"finished": true, "inputs": []}', '{"finished": "true", "inputs": {}}', "\0"],
)
def test_a_damaged_record_is_named_with_what_to_do(text, tmp_path, caplog):
    folder = tmp_path / "student"
    make_stage(folder)
    (folder / "stage.json").write_text(text)
    for read in (lambda: StageRecord(folder, OLD), lambda: finished_inputs(folder)):
        with pytest.raises(ValueError, match="The record of the stage in .* is damaged: .* Delete the folder"):
            read()
    assert_made_again(folder, OLD, caplog)


def test_an_unfinished_stage_of_another_number_of_processes_is_refused_or_made_again(tmp_path, caplog):
    folder = tmp_path / "student"
    make_stage(folder, finished=False)
    (folder / "stage_notes.json").unlink()
    (folder / "checkpoint-3" / "rng_state.pth").unlink()
    for index in range(2):
        (folder / "checkpoint-3" / f"rng_state_{index}.pth").write_text("")
    with pytest.raises(ValueError, match="begun with 2 processes"):
        StageRecord(folder, OLD)
    assert_made_again(folder, OLD, caplog)
    assert not list(folder.glob("checkpoint-*"))


def test_a_finished_stage_serves_any_number_of_processes(tmp_path):
    folder = tmp_path / "student"
    make_stage(folder)
    notes = json.loads((folder / "stage_notes.json").read_text())
    (folder / "stage_notes.json").write_text(json.dumps({**notes, "world_size": 8}))
    assert StageRecord(folder, OLD).finished


def test_a_field_that_went_back_to_its_default_is_said_so(tmp_path):
    StageRecord(tmp_path / "student", {"arguments": {"num_train_epochs": 2.0}})
    with pytest.raises(ValueError, match=r"\(arguments.num_train_epochs: 2.0 -> its default\)"):
        StageRecord(tmp_path / "student", {"arguments": {}})
