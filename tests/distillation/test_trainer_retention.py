"""Ways to keep near the anchor: the distance of the weights as a loss, slower lower layers, averages of steps."""

import shutil

import pytest
import torch
from fixtures.training import equal, make_inputs, student_arguments, train
from safetensors.torch import load_file

from modeling_dclip import DCLIPProcessor
from modeling_dclip.data.collation import StudentBatches
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.trainer import StudentTrainer, layer_rates


@pytest.fixture
def inputs(tiny_clip_dir, distillation_data, tmp_path):
    return make_inputs(tiny_clip_dir, distillation_data, tmp_path)


def distance(folder, clip):
    start, end = load_student(clip).state_dict(), load_file(folder / "model.safetensors")
    return sum((end[name] - one).square().sum() for name, one in start.items() if one.is_floating_point())


def test_the_logged_term_is_half_the_squared_distance_and_a_larger_weight_keeps_nearer(inputs, tmp_path):
    found, logs = [], []
    for weight in (0.0, 0.01, 10.0):
        folder = tmp_path / str(weight)
        state = train("student", inputs, folder, max_steps=3, logging_steps=1, l2_sp_loss_weight=weight)
        found.append(float(distance(folder, inputs["clip"])))
        logs.append([log["l2_sp_loss"] for log in state.log_history if "l2_sp_loss" in log])
    assert logs[0] == [] and logs[1][0] == 0.0 and 0 < logs[1][1] < logs[1][2] < found[1] / 2
    assert found[0] > found[1] > 1.2 * found[2] > 0


def test_each_layer_learns_at_its_own_rate_and_all_are_scheduled(inputs, tmp_path):
    args = student_arguments(tmp_path / "student", layer_decay=0.5, learning_rate=1e-3, max_steps=2, logging_steps=1)
    model, processor = load_student(inputs["clip"]), DCLIPProcessor.from_pretrained(inputs["clip"])
    options = {"width": model.config.projection_dim}
    batches = StudentBatches(inputs["targets"], processor.image_processor, args.columns, **options)
    trainer = StudentTrainer(model, args, batches, processor, {})
    trainer.create_optimizer_and_scheduler(2)
    rates, names = layer_rates(trainer.model, 0.5), {id(one): name for name, one in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        seen |= {names[id(one)]: (group["initial_lr"], group["weight_decay"]) for one in group["params"]}
    assert seen.keys() == rates.keys() and len(set(rates.values())) >= 3
    for name, (rate, decay) in seen.items():
        assert rate == pytest.approx(1e-3 * rates[name]) and (decay > 0) == (decay == args.weight_decay), name
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 1e-3
    assert rates["visual_projection.weight"] == 1.0
    lowest = min(rates.values())
    assert rates["vision_model.embeddings.patch_embedding.weight"] == lowest == 0.5 ** (len(set(rates.values())) - 1)


def test_without_layers_all_learn_at_one_rate():
    assert set(layer_rates(torch.nn.Linear(2, 2), 0.5).values()) == {1.0}


@pytest.mark.parametrize("fields", [{"l2_sp_loss_weight": 0.1, "lora_rank": 2}])
def test_the_distance_beside_adapters_is_refused(fields, tmp_path):
    with pytest.raises(ValueError, match="l2_sp_loss_weight: expected 0 with adapters"):
        student_arguments(tmp_path, **fields)


def test_the_average_of_the_steps_is_what_is_measured_saved_and_gone_on_from(inputs, tmp_path):
    clip = load_student(inputs["clip"]).state_dict()
    plain = tmp_path / "plain"
    train("student", inputs, plain, max_steps=4, save_steps=1)
    expected = {name: one.clone() for name, one in clip.items()}
    for step in range(1, 5):
        weights = load_file(plain / f"checkpoint-{step}" / "model.safetensors")
        for name, one in expected.items():
            if one.is_floating_point():
                one.lerp_(weights[name], 0.25)
    whole = tmp_path / "whole"
    train("student", inputs, whole, max_steps=4, save_steps=1, ema_decay=0.75)
    found = load_file(whole / "model.safetensors")
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-6, msg=name)
    last = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert equal(last, load_file(plain / "checkpoint-4" / "model.safetensors"))  # training itself is the same
    (tmp_path / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train("student", inputs, tmp_path / "resumed", max_steps=4, save_steps=1, ema_decay=0.75)
    assert equal(load_file(tmp_path / "resumed" / "model.safetensors"), found)


def test_a_validation_measures_the_average_and_leaves_the_weights(inputs, tmp_path):
    args = student_arguments(tmp_path / "student", ema_decay=0.0, max_steps=2)
    model, processor = load_student(inputs["clip"]), DCLIPProcessor.from_pretrained(inputs["clip"])
    options = {"width": model.config.projection_dim}
    batches = StudentBatches(inputs["targets"], processor.image_processor, args.columns, **options)
    trainer = StudentTrainer(model, args, batches, processor, {}, batches)
    trainer.train()
    weights = {name: one.clone() for name, one in trainer.model.state_dict().items()}
    at_end = trainer.evaluate()["eval_loss"]  # without memory the average is the weights
    for one in trainer.average.average.values():
        one.mul_(1.5)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(at_end, rel=1e-3)
    assert equal(trainer.model.state_dict(), weights)
