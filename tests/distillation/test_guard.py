"""The guard: a step that is not finite changes nothing, is named with its images, and is never saved."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from fixtures.processes import train_together
from fixtures.training import equal, make_inputs, make_trainer, student_arguments, train, weights
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from modeling_dclip.data.columns import Ragged
from modeling_dclip.distillation import guard
from modeling_dclip.distillation.guard import TrainingGuard, nonfinite_weights, odd_columns
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.distillation.trainer import DMCLIPTrainer, train_or_resume


@pytest.fixture(scope="module")
def inputs(tiny_clip_dir, distillation_data, tmp_path_factory):
    return make_inputs(tiny_clip_dir, distillation_data, tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def data(distillation_data):
    return load_from_disk(distillation_data)


@pytest.mark.parametrize("kind", ["anchor", "teacher", "student", "lora", "dmclip"])
def test_a_run_that_diverges_stops_names_its_images_and_saves_no_model(kind, inputs, tmp_path):
    options = {"max_steps": 4, "logging_steps": 50, "max_grad_norm": 0.0}
    options |= {"save_strategy": "no"} if kind == "lora" else {}
    with pytest.raises(FloatingPointError) as stopped:
        train(kind, inputs, tmp_path, rate=1e30, **options)
    message = str(stopped.value)
    assert f"{tmp_path.name}: " in message and "is not finite at step " in message and "(3 images: " in message
    assert "learning_rate (1e+30)" in message and "_loss " in message
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "adapter").exists()
    for path in tmp_path.glob("checkpoint-*"):
        assert not nonfinite(path)


def nonfinite(checkpoint):
    return [name for name, tensor in weights(checkpoint).items() if not finite(tensor)]


def finite(tensor):
    return bool(torch.isfinite(tensor).all())


def test_one_single_step_that_diverges_is_no_finished_model(inputs, tmp_path):
    with pytest.raises(FloatingPointError, match="After the last step, .* is not finite at step 1"):
        train("student", inputs, tmp_path, rate=1e30, max_steps=1)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["teacher", "student", "lora", "dmclip"])
def test_a_run_that_diverged_at_its_last_step_says_so_again_when_it_is_started_again(kind, inputs, tmp_path):
    rate = 1e18 if kind == "lora" else 1e30  # finite weights with a loss that is not
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="After the last step, .* is not finite at step 1"):
            train(kind, inputs, tmp_path, rate=rate, max_steps=1)
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model.safetensors").exists()


def test_weights_whose_loss_is_not_finite_replace_no_checkpoint(tiny_clip_dir, data, processor, tmp_path):
    for number in (2, 3):  # started again, it goes on from the last good checkpoint and ends alike
        trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, "huge", steps=(number,), save_total_limit=1)
        trainer.remove_callback(type(trainer.callback_handler.callbacks[-1]))
        trainer.callback_handler.callbacks.insert(0, Spoil(trainer, (number,), "huge"))
        with pytest.raises(FloatingPointError, match=f"the loss is not finite at step {number}"):
            train_or_resume(trainer, tmp_path)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{number - 1}"]


def test_a_last_batch_that_is_left_out_does_not_end_the_run(tiny_clip_dir, data, processor, tmp_path):
    trainer = spoilt_trainer(
        *(tiny_clip_dir, data, processor, tmp_path, "batch"), steps=(3,), on_nonfinite="skip", max_steps=3
    )
    train_or_resume(trainer, tmp_path)
    assert trainer.guard.skipped == 1 and (tmp_path / "checkpoint-3").is_dir()


def test_an_adapter_that_makes_the_merged_weights_infinite_is_not_saved(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingGuard, "check_loss", lambda *_: None)  # which would say it before
    with pytest.raises(FloatingPointError, match="with its adapter merged in holds NaN or infinity"):
        train("lora", inputs, tmp_path, rate=1e30, max_steps=4)
    assert not list(tmp_path.glob("*/model.safetensors"))


class Spoil(TrainerCallback):
    """Makes the loss, or a gradient, or the weights NaN at some steps (from 1)."""

    def __init__(self, trainer, steps, what):
        self.trainer, self.steps, self.what = trainer, steps, what
        if what == "loss":
            terms = trainer.loss_terms

            def spoilt(model, batch):
                odd = model.training and trainer.state.global_step + 1 in steps
                return {name: (term * math.nan if odd else term, w) for name, (term, w) in terms(model, batch).items()}

            trainer.loss_terms = spoilt
        if what == "batch":
            training_step = trainer.training_step

            def with_nan(model, inputs, *args):
                if trainer.state.global_step + 1 in steps:
                    inputs["pixel_values"] = inputs["pixel_values"] * math.nan
                return training_step(model, inputs, *args)

            trainer.training_step = with_nan
        if what == "gradient":
            weight = trainer.model.visual_projection.weight
            weight.register_hook(lambda g: g * math.inf if trainer.state.global_step + 1 in steps else g)

    def on_step_end(self, args, state, control, **kwargs):
        if self.what in ("weights", "huge") and state.global_step in self.steps:
            with torch.no_grad():
                for weight in self.trainer.model.parameters():
                    weight.mul_(1e30) if self.what == "huge" else weight.fill_(math.inf)


def spoilt_trainer(clip_dir, data, processor, folder, what, steps=(2,), **options):
    args = student_arguments(folder, **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **options})
    trainer = make_trainer(clip_dir, data, processor, args)
    trainer.add_callback(Spoil(trainer, steps, what))
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}, {"bf16": True}])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_it_changes_a_weight(
    what, options, tiny_clip_dir, data, processor, tmp_path
):
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, what, save_total_limit=1, **options)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert ("the loss is not finite at step 2" if what == "loss" else "the gradient (norm ") in message
    value = "nan" if what == "loss" else "[0-9]"
    assert re.search(f"cosine_distillation_loss {value}.*contrastive_loss {value}", message)
    rows = 8 * options.get("gradient_accumulation_steps", 1)
    assert f"({rows} images: " in message
    assert trainer.state.global_step == 1 and not nonfinite_weights(trainer.model)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]  # the last good one


def test_the_images_are_those_of_the_batch(tiny_clip_dir, data, processor, tmp_path):
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, "loss", steps=(1,))
    seen, collate = [], trainer.train_dataset.collate
    trainer.train_dataset.collate = lambda rows, captions: seen.append(rows) or collate(rows, captions)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    images = ", ".join(repr(data[int(row)]["image_id"]) for row in seen[0])
    assert f"(8 images: {images})" in str(stopped.value)


def test_a_column_with_nan_is_named_with_its_image(tiny_clip_dir, data, processor, tmp_path):
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, None)
    embeds = trainer.train_dataset.columns["teacher_embeds"]
    values = embeds.values.copy()
    values[embeds.offsets[5] : embeds.offsets[6]] = math.nan
    trainer.train_dataset.columns["teacher_embeds"] = Ragged(values, embeds.offsets)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train()
    assert f"The data are the cause: teacher_embeds of image {data[5]['image_id']!r} holds NaN" in str(stopped.value)


def test_a_weight_of_a_term_that_makes_it_infinite_is_named(tiny_clip_dir, data, processor, tmp_path):
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, None)
    trainer.args.contrastive_loss_weight = 1e39
    with pytest.raises(FloatingPointError, match=r"contrastive_loss [0-9.]+ \(weight 1e\+39\)"):
        trainer.train()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_weights_as_they_were_and_is_counted(
    what, tiny_clip_dir, data, processor, tmp_path, caplog
):
    options = {"on_nonfinite": "skip", "max_steps": 2, "weight_decay": 0.5}
    skipping = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path / "skip", what, **options)
    skipping.train()
    one = make_trainer(
        tiny_clip_dir, data, processor, student_arguments(tmp_path / "one", max_steps=1, weight_decay=0.5)
    )
    one.train()
    assert equal(skipping.model.state_dict(), one.model.state_dict())
    assert skipping.guard.skipped == 1 and "left out 1 step of 2" in caplog.text
    assert "Left out, step number 1 of this kind: " in caplog.text and "is not finite at step 2" in caplog.text


def test_the_log_after_a_skipped_step_is_finite(tiny_clip_dir, data, processor, tmp_path):
    options = {"on_nonfinite": "skip", "logging_steps": 2, "max_steps": 4}
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, "loss", **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and [log["skipped_steps"] for log in logs] == [1, 1]
    for log in logs:
        assert log["loss"] == pytest.approx(log["cosine_distillation_loss"] + log["contrastive_loss"], abs=1e-3)


def test_a_log_of_skipped_steps_alone_has_no_loss(tiny_clip_dir, data, processor, tmp_path):
    options = {"on_nonfinite": "skip", "logging_steps": 1, "max_steps": 3}
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, "loss", **options)
    trainer.train()
    log = next(log for log in trainer.state.log_history if log["step"] == 2)
    assert log["skipped_steps"] == 1 and not {"loss", "contrastive_loss", "grad_norm"} & log.keys()


def test_batch_norms_keep_their_statistics_where_a_step_is_skipped(inputs, tmp_path, monkeypatch):
    real = DMCLIPTrainer.loss_terms

    def spoilt(self, model, batch):
        if self.state.global_step == 1 and model.training:
            batch["pixel_values"] = batch["pixel_values"] * math.nan
        return real(self, model, batch)

    monkeypatch.setattr(DMCLIPTrainer, "loss_terms", spoilt)
    train("dmclip", inputs, tmp_path / "two", max_steps=2, on_nonfinite="skip")
    monkeypatch.undo()
    train("dmclip", inputs, tmp_path / "one", max_steps=1)
    two, one = (weights(tmp_path / name) for name in ("two", "one"))
    assert [name for name in one if name.endswith("running_var")]
    assert equal(two, one)


def test_many_skipped_steps_in_a_row_stop_the_run(tiny_clip_dir, data, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_SKIPPED_IN_A_ROW", 3)
    options = {"on_nonfinite": "skip", "max_steps": 9, "save_strategy": "no"}
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, "loss", steps=range(2, 9), **options)
    with pytest.raises(FloatingPointError, match="3 steps in a row were left out; the last: .* at step 4"):
        trainer.train()


@pytest.mark.parametrize("end", [False, True])
def test_weights_that_are_not_finite_replace_no_checkpoint_and_no_model(end, tiny_clip_dir, data, processor, tmp_path):
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, "weights", save_total_limit=1)
    if end:
        trainer.train_dataset.names([0])
        with torch.no_grad():
            trainer.model.visual_projection.weight[0, 0] = math.nan
        with pytest.raises(
            FloatingPointError, match="visual_projection.weight holds NaN .* at step 0, so it is not saved"
        ):
            trainer.save_model()
        assert not list(tmp_path.iterdir())
        return
    # Spoilt after the step and before its checkpoint is written.
    trainer.remove_callback(type(trainer.callback_handler.callbacks[-1]))
    trainer.callback_handler.callbacks.insert(0, Spoil(trainer, (2,), "weights"))
    with pytest.raises(FloatingPointError, match="at step 2, so it is not saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not nonfinite(tmp_path / "checkpoint-1")


def test_a_model_that_holds_nan_is_refused_before_it_trains(tiny_clip_dir, data, processor, tmp_path):
    trainer = spoilt_trainer(tiny_clip_dir, data, processor, tmp_path, None)
    with torch.no_grad():
        trainer.model.visual_projection.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="visual_projection.weight holds NaN or infinity before training"):
        trainer.train()


def test_infinite_gradients_are_left_to_the_scaler_of_fp16_until_its_scale_is_below_1():
    def scaler(scale):
        return SimpleNamespace(get_scale=lambda: scale)

    accelerator = SimpleNamespace(
        scaler=scaler(1024.0), optimizer_step_was_skipped=True, num_processes=1, device=torch.device("cpu")
    )
    watch = TrainingGuard(accelerator, None, "student", lambda terms, loss: None)
    args, state = SimpleNamespace(on_nonfinite="stop"), SimpleNamespace(global_step=4)
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), math.inf)
    watch.begin({})
    watch.record({"contrastive_loss": (torch.tensor(0.5), 1.0)}, torch.tensor(0.5))
    watch.on_pre_optimizer_step(args, state, None, model=model)
    watch.on_optimizer_step(args, state, None)
    accelerator.scaler = scaler(0.5)
    with pytest.raises(FloatingPointError, match="student: the gradients at step 5 .* loss scale of 0.5"):
        watch.on_optimizer_step(args, state, None)
    accelerator.optimizer_step_was_skipped = False
    watch.on_optimizer_step(args, state, None)


def test_nonfinite_weights_and_columns_are_named():
    model = nn.BatchNorm1d(2)
    assert nonfinite_weights(model) == []
    model.running_var[1] = math.inf
    model.weight.data[0] = math.nan
    assert nonfinite_weights(model) == ["weight", "running_var"]
    batch = {"a": torch.tensor([[1.0], [math.nan]]), "b": torch.tensor([math.inf, 1]), "ids": torch.tensor([1, 2])}
    assert odd_columns(batch, ["x", "y"]) == ["a of image 'y'", "b of image 'x'"]
    assert odd_columns(batch, []) == ["a of row 1", "b of row 0"]


@pytest.mark.parametrize("freeze", [[], ["vision_model.embeddings.*", "vision_model.pre_layrnorm.*"]])
def test_reentrant_checkpoints_train_every_layer_or_are_refused(freeze, tiny_clip_dir, data, processor, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    model = load_student(str(tiny_clip_dir))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = student_arguments(tmp_path, freeze=freeze, **options)
    if freeze:
        with pytest.raises(ValueError, match="expected use_reentrant false beside frozen weights .*, got true"):
            fit_student(model, args, data, processor, {})
        assert equal(model.state_dict(), before)
        return
    fit_student(model, args, data, processor, {})
    layers = [name for name in before if "encoder.layers" in name and not name.endswith("k_proj.bias")]
    assert layers and not [
        name for name in layers if name.startswith("vision") and torch.equal(model.state_dict()[name], before[name])
    ]


def test_all_processes_decide_alike_and_name_the_images_of_all(tiny_clip_dir, distillation_data, tmp_path):
    train_together(Path(__file__).with_name("run_guard.py"), 2, tiny_clip_dir, distillation_data, tmp_path)
    results = [load_file(tmp_path / f"{index}.safetensors") for index in range(2)]
    assert equal(*results)
    message = bytes(results[0]["message"].tolist()).decode()
    assert "the loss is not finite at step 2" in message and "(8 images: " in message and message.count("scenes-") == 8
    assert results[0]["skipped"] == 1
    assert all(finite(tensor) for name, tensor in results[0].items() if name.startswith("weights/"))
