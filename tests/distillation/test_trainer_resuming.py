"""Resuming: from every checkpoint of every trainer a run ends as if it had never stopped."""

import json
import os
import shutil

import pytest
from fixtures.training import TRAINER_STEPS, equal, make_inputs, student_arguments, train
from safetensors.torch import load_file
from transformers import set_seed

from modeling_dclip import DCLIPProcessor
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.distillation.trainer import StudentTrainer
from modeling_dclip.encoders.weight_interpolation import interpolate_weights

MEAN = "eval_mean_recall@1"


@pytest.fixture(scope="module")
def inputs(tiny_clip_dir, distillation_data, tmp_path_factory):
    return make_inputs(tiny_clip_dir, distillation_data, tmp_path_factory.mktemp("inputs"))


def weights(folder):
    return {
        f"{path.parent.name}/{name}" if path.parent != folder else name: tensor
        for path in (folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors")
        if path.is_file()
        for name, tensor in load_file(path).items()
    }


def history(folder):
    """Step, losses, epoch and norm of each log, without times."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [
        {name: value for name, value in log.items() if "runtime" not in name and "per_second" not in name}
        for log in state["log_history"]
        if "train_runtime" not in log
    ]


def stop_at(whole, folder, step):
    """A copy of a run as it was when its checkpoint at this step had been written."""
    folder.mkdir()
    for path in whole.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) <= step:
            shutil.copytree(path, folder / path.name)


SCHEDULES = {
    "two epochs": {"num_train_epochs": 2},
    "one and a half epochs": {"num_train_epochs": 1.5},
    "steps to an epoch's end": {"max_steps": 6},
    "steps into an epoch": {"max_steps": 7},
}


def sweep(kind, accumulation, schedule, inputs, tmp_path, checkpoints=None):
    options = {**SCHEDULES[schedule], "gradient_accumulation_steps": accumulation}
    whole = tmp_path / "whole"
    state = train(kind, inputs, whole, **options)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in whole.glob("checkpoint-*"))
    assert steps == list(range(1, state.max_steps + 1)) and state.global_step == state.max_steps
    for step in steps if checkpoints is None else checkpoints:
        folder = tmp_path / f"from-{step}"
        stop_at(whole, folder, step)
        resumed = train(kind, inputs, folder, **options)
        assert resumed.global_step == state.global_step, step
        assert equal(weights(folder), weights(whole)), step
        assert history(folder) == history(whole), step


@pytest.mark.parametrize(
    ("kind", "accumulation", "schedule", "checkpoints"),
    [
        ("dmclip", 2, "steps into an epoch", [1, 4, 7]),  # five batches in twos: the third step of an epoch has one
        ("dmclip", 1, "one and a half epochs", [5, 8]),
        ("student", 2, "one and a half epochs", [4, 5]),
        ("bank", 1, "one and a half epochs", [3, 8]),
        ("lora", 1, "steps into an epoch", [6, 7]),
        ("anchor", 1, "steps into an epoch", [7]),
        ("teacher", 1, "steps into an epoch", [7]),
    ],
)
def test_a_checkpoint_leads_to_the_same_weights(kind, accumulation, schedule, checkpoints, inputs, tmp_path):
    sweep(kind, accumulation, schedule, inputs, tmp_path, checkpoints)


@pytest.mark.parametrize("kind", ["teacher", "dmclip"])
def test_a_log_over_several_steps_is_the_same_where_a_run_was_stopped_between(kind, inputs, tmp_path):
    options = {"max_steps": 7, "logging_steps": 3}
    train(kind, inputs, tmp_path / "whole", **options)
    for step in (2, 4):
        stop_at(tmp_path / "whole", tmp_path / f"from-{step}", step)
        train(kind, inputs, tmp_path / f"from-{step}", **options)
        assert history(tmp_path / f"from-{step}") == history(tmp_path / "whole")
    assert [log["step"] for log in history(tmp_path / "whole")] == [3, 6]


@pytest.mark.parametrize(("then", "now"), [(0.5, 0.5), (3, 1)])
def test_a_resumed_run_logs_as_often_as_it_is_asked_to_now(then, now, inputs, tmp_path, caplog):
    train("teacher", inputs, tmp_path / "whole", max_steps=4, logging_steps=then)
    stop_at(tmp_path / "whole", tmp_path / "resumed", 2)
    train("teacher", inputs, tmp_path / "resumed", max_steps=4, logging_steps=now)
    assert [log["step"] for log in history(tmp_path / "resumed")] == ([2, 4] if now == then else [3, 4])
    assert "do not match" not in caplog.text


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(inputs, tmp_path, caplog):
    train("teacher", inputs, tmp_path / "whole", max_steps=4)
    stop_at(tmp_path / "whole", tmp_path / "damaged", 3)
    os.truncate(tmp_path / "damaged" / "checkpoint-3" / "optimizer.pt", 100)
    train("teacher", inputs, tmp_path / "damaged", max_steps=4)
    assert "checkpoint-3 is incomplete ('" in caplog.text and "); goes on from checkpoint-2" in caplog.text
    assert equal(weights(tmp_path / "damaged"), weights(tmp_path / "whole"))
    assert history(tmp_path / "damaged") == history(tmp_path / "whole")


def train_validated(inputs, folder, **options):
    """A student that is measured on nine rows."""
    options = {**TRAINER_STEPS, "max_steps": -1, "num_train_epochs": 2, "per_device_eval_batch_size": 4, **options}
    set_seed(0)
    processor, rows = DCLIPProcessor.from_pretrained(inputs["clip"]), inputs["targets"]
    args = student_arguments(folder, **options)
    return fit_student(load_student(inputs["clip"]), args, rows, processor, {}, validation=rows.select(range(9)))


def test_measuring_and_logging_at_an_epochs_end_is_not_left_out_where_a_run_was_stopped_there(inputs, tmp_path):
    options = {"eval_strategy": "epoch", "logging_strategy": "epoch", "lora_rank": 2, "lora_dropout": 0.1}
    train_validated(inputs, tmp_path / "whole", **options)
    logged = [(log["step"], "eval_loss" in log, MEAN in log) for log in history(tmp_path / "whole")]
    assert logged == [(5, False, False), (5, True, True), (10, False, False), (10, True, True)]
    for step in (5, 10):
        stop_at(tmp_path / "whole", tmp_path / f"from-{step}", step)
        train_validated(inputs, tmp_path / f"from-{step}", **options)
        assert history(tmp_path / f"from-{step}") == history(tmp_path / "whole")
        assert equal(weights(tmp_path / f"from-{step}"), weights(tmp_path / "whole"))


def measure_as(monkeypatch, mean):
    """Let validations find these recalls: a function of the step."""

    def measure(trainer):
        recall = mean(trainer.state.global_step)
        return {"text_to_image_recall@1": recall, "image_to_text_recall@1": recall, "mean_recall@1": recall}

    monkeypatch.setattr(StudentTrainer, "measure", measure)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_student_of_the_best_validation_is_kept_wherever_a_run_was_stopped(
    alpha, inputs, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    measure_as(monkeypatch, {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4, 10: 0.2}.get)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch", "save_total_limit": 10}
    options |= {"wise_ft_alpha": alpha}  # validations are at other steps than the recipe's checkpoints
    train_validated(inputs, tmp_path / "whole", **options)
    best = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    anchor = load_student(inputs["clip"]).state_dict()
    assert equal(weights(tmp_path / "whole"), best if alpha == 1 else interpolate_weights(anchor, best, alpha))
    assert "kept step 4 of 10, the best of 5 validations by mean R@1 50.0 % text to image, 50.0 %" in caplog.text
    assert ("measured before its weights are averaged with the anchor's (wise_ft_alpha 0.5)" in caplog.text) == (
        alpha < 1
    )
    for step in (2, 8):
        stop_at(tmp_path / "whole", tmp_path / f"from-{step}", step)
        train_validated(inputs, tmp_path / f"from-{step}", **options)
        assert history(tmp_path / f"from-{step}") == history(tmp_path / "whole")
        assert equal(weights(tmp_path / f"from-{step}"), weights(tmp_path / "whole"))


def test_of_equal_validations_that_of_the_lower_loss_is_kept(inputs, tmp_path, monkeypatch):
    measure_as(monkeypatch, lambda step: 0.5)
    state = train_validated(inputs, tmp_path / "run", eval_strategy="steps", eval_steps=1, max_steps=4).state
    losses = {log["step"]: log["eval_loss"] for log in state.log_history if "eval_loss" in log}
    assert state.best_global_step == min(losses, key=losses.get) > 1


def test_validation_changes_no_weight(inputs, tmp_path):
    options = {"max_steps": 6, "lora_rank": 2, "lora_dropout": 0.3}
    train_validated(inputs, tmp_path / "without", **options)
    train_validated(
        inputs, tmp_path / "with", **options, eval_strategy="steps", eval_steps=1, load_best_model_at_end=False
    )
    assert equal(weights(tmp_path / "without"), weights(tmp_path / "with"))


# The first checkpoint is the best, because the loss is asked to grow small in the wrong sense.
BEST_IS_FIRST = {
    **{"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True},
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def best_is_first(inputs, tmp_path_factory):
    """A run of four steps as it ended. Its folder is not there any more: each test copies it to a place of its own."""
    folder = tmp_path_factory.mktemp("best_is_first")
    assert train_validated(inputs, folder / "run", **BEST_IS_FIRST).state.best_global_step == 1
    return (folder / "run").rename(folder / "ended")


@pytest.mark.parametrize("step", [2, 4])
def test_the_best_model_is_found_where_the_folder_was_moved(step, best_is_first, inputs, tmp_path):
    expected = load_file(best_is_first / "checkpoint-1" / "model.safetensors")
    assert equal(weights(best_is_first), expected)
    stop_at(best_is_first, tmp_path / "moved", step)
    train_validated(inputs, tmp_path / "moved", **BEST_IS_FIRST, save_total_limit=1)
    assert equal(weights(tmp_path / "moved"), expected)


def test_a_best_checkpoint_that_is_missing_is_said_before_training(best_is_first, inputs, tmp_path):
    shutil.copytree(best_is_first, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ValueError, match="The best checkpoint so far, '.*/checkpoint-1', is missing"):
        train_validated(inputs, tmp_path / "run", **BEST_IS_FIRST)


@pytest.mark.slow
@pytest.mark.skipif("RESUME_EVERYWHERE" not in os.environ, reason="set RESUME_EVERYWHERE=1: takes minutes")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["anchor", "teacher", "student", "lora", "dmclip"])
def test_every_checkpoint_leads_to_the_same_weights(kind, accumulation, schedule, inputs, tmp_path):
    sweep(kind, accumulation, schedule, inputs, tmp_path)
