"""Trainers: what they log, what they save, what stays frozen, and two processes against one."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from fixtures.processes import train_together
from fixtures.training import make_trainer, student_arguments
from safetensors.torch import load_file

from modeling_dclip import DCLIPModel, DCLIPTeacher
from modeling_dclip.data.collation import StudentBatches, TeacherBatches
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.teacher_targets import FeatureOptions, TeacherFeatures, compute_features
from modeling_dclip.distillation.arguments import TeacherArguments
from modeling_dclip.distillation.losses import contrastive_loss, cosine_distillation_loss
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.distillation.trainer import StudentTrainer, TeacherTrainer, ValidationSplit
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.retrieval import evaluate_retrieval
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor


@pytest.fixture
def data(distillation_data):
    return load_from_disk(distillation_data)


def text_state(model):
    names = [name for name in model.state_dict() if not name.startswith(("vision_model.", "visual_projection."))]
    return {name: model.state_dict()[name].clone() for name in names}


def test_the_loss_is_the_weighted_sum_of_the_logged_terms(tiny_clip_dir, data, processor, tmp_path):
    args = student_arguments(
        tmp_path, cosine_distillation_loss_weight=2.0, contrastive_loss_weight=0.5, temperature=0.1
    )
    trainer = make_trainer(tiny_clip_dir, data, processor, args)
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "loss" in log]
    for log in (first, second):
        assert {"cosine_distillation_loss", "contrastive_loss"} <= log.keys()
        total = 2 * log["cosine_distillation_loss"] + 0.5 * log["contrastive_loss"]
        assert log["loss"] == pytest.approx(total, abs=1e-4)
    assert "cosine_preservation_loss" not in first


def test_the_first_step_has_the_loss_of_the_untouched_clip(tiny_clip_dir, data, processor, tmp_path):
    trainer = make_trainer(tiny_clip_dir, data, processor, student_arguments(tmp_path, max_steps=1, seed=3))
    seen = []
    batches = trainer.train_dataset
    collate = batches.collate
    batches.collate = lambda rows, captions: seen.append(collate(rows, captions)) or seen[-1]
    trainer.train()
    with torch.no_grad():
        model = load_student(str(tiny_clip_dir))
        image_embeds = model.get_image_features(pixel_values=seen[0]["pixel_values"]).pooler_output
    log = trainer.state.log_history[0]
    expected = cosine_distillation_loss(image_embeds, seen[0]["teacher_embeds"])
    assert log["cosine_distillation_loss"] == pytest.approx(float(expected), abs=1e-4)
    expected = contrastive_loss(image_embeds, seen[0]["text_embeds"])
    assert log["contrastive_loss"] == pytest.approx(float(expected), abs=1e-3)


def test_a_step_runs_the_image_encoder_only_and_leaves_the_rest_untouched(
    tiny_clip_dir, data, processor, tmp_path, monkeypatch
):
    args = student_arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = make_trainer(tiny_clip_dir, data, processor, args)
    model = trainer.dual_encoder

    def refuse(*args, **kwargs):
        raise AssertionError("the text tower ran in a student's step")

    monkeypatch.setattr(model.text_model, "forward", refuse)
    before, vision = text_state(model), model.vision_model.post_layernorm.weight.clone()
    trainer.train()
    assert (model.vision_model.post_layernorm.weight != vision).any()
    saved = DCLIPModel.from_pretrained(tmp_path / "checkpoint-2")
    for state in (text_state(model), text_state(saved)):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert saved.config.freeze_text
    assert not any(p.requires_grad for p in saved.train().text_model.parameters())


def test_a_checkpoint_holds_the_dual_encoder_code_processor_and_arguments_but_no_teacher(
    tiny_clip_dir, data, processor, tmp_path
):
    make_trainer(
        tiny_clip_dir, data, processor, student_arguments(tmp_path, save_strategy="steps", save_steps=2)
    ).train()
    folder = tmp_path / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "modeling_dclip.py",
        "configuration_dclip.py",
        "processing_dclip.py",
    } <= names
    assert {"tokenizer.json", "preprocessor_config.json", "processor_config.json", "arguments.yaml"} <= names
    assert "training_args.bin" not in names and "modeling_dclip_teacher.py" not in names
    assert yaml.safe_load((folder / "arguments.yaml").read_text()) == {"student": {"seed": 0}}
    assert load_file(folder / "model.safetensors").keys() == load_student(str(tiny_clip_dir)).state_dict().keys()
    config = load_student(str(tiny_clip_dir)).config.vision_config
    assert DCLIPModel.from_pretrained(folder).config.vision_config.to_dict().keys() == config.to_dict().keys()


def test_gradient_accumulation_averages_micro_batches(tiny_clip_dir, data, processor, tmp_path):
    """Two micro-batches of 8 with a loss that is a mean over rows move the weights as one batch of 16 does."""
    trained = []
    for size, steps in ((16, 1), (8, 2)):
        args = student_arguments(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            contrastive_loss_weight=0.0,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
        )
        trainer = make_trainer(tiny_clip_dir, data, processor, args)
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-4, atol=1e-6)


def test_bfloat16_checkpointing_and_freezing_go_together(tiny_clip_dir, data, processor, tmp_path):
    args = student_arguments(
        tmp_path, bf16=True, gradient_checkpointing=True, freeze=["vision_model.encoder.layers.0.*"]
    )
    model = load_student(str(tiny_clip_dir))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = fit_student(model, args, data, processor, {})
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(("vision_model.", "visual_projection.")) for name in moved)
    assert not any(name.startswith("vision_model.encoder.layers.0.") for name in moved)
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert model.vision_model.post_layernorm.weight.dtype == torch.float32


def test_stages_of_one_process_may_differ_in_precision(tiny_clip_dir, data, processor, tmp_path):
    losses = {}
    for bf16 in (False, True, False):
        trainer = make_trainer(tiny_clip_dir, data, processor, student_arguments(tmp_path, bf16=bf16, max_steps=1))
        assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
        trainer.train()
        losses.setdefault(bf16, []).append(trainer.state.log_history[0]["loss"])
    assert losses[False][0] == losses[False][1] != losses[True][0]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.05)


def test_interpolated_weights_lie_between_anchor_and_student(tiny_clip_dir, data, processor, tmp_path):
    states = {}
    for alpha in (1.0, 0.25):
        model = load_student(str(tiny_clip_dir))
        anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fit_student(model, student_arguments(tmp_path / str(alpha), wise_ft_alpha=alpha), data, processor, {})
        states[alpha] = load_file(tmp_path / str(alpha) / "model.safetensors")
    for name, weight in anchor.items():
        expected = 0.75 * weight + 0.25 * states[1.0][name]
        torch.testing.assert_close(states[0.25][name], expected, rtol=0, atol=1e-6)


EVERY_TERM = {"cosine_preservation_loss_weight": 0.5, "similarity_distillation_loss_weight": 0.5}


def terms_of(clip_dir, data, processor, args, rows):
    """The loss terms of a batch of these rows, and the image encoder."""
    trainer = make_trainer(clip_dir, data, processor, args)
    batch = trainer.train_dataset.__getitems__(rows)
    return {name: term for name, (term, _) in trainer.loss_terms(trainer.model, batch).items()}, trainer.model


def test_in_batch_terms_see_the_rows_with_a_caption_and_the_others_all(
    tiny_clip_dir, data, partly_captioned_data, processor, tmp_path
):
    args = student_arguments(tmp_path, **EVERY_TERM)
    partly = load_from_disk(partly_captioned_data)
    mixed, _ = terms_of(tiny_clip_dir, partly, processor, args, [0, 1, 2, 3, 4, 6])
    captioned, _ = terms_of(tiny_clip_dir, data, processor, args, [0, 3, 6])
    for name in ("contrastive_loss", "similarity_distillation_loss"):
        torch.testing.assert_close(mixed[name], captioned[name], rtol=1e-5, atol=1e-6)
    others, _ = terms_of(tiny_clip_dir, partly, processor, args, [1, 2, 4])
    for name in ("cosine_distillation_loss", "cosine_preservation_loss"):
        mean = (captioned[name] + others[name]) / 2
        torch.testing.assert_close(mixed[name], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [[1, 2, 4], [0, 1, 2]], ids=["none", "one"])
def test_a_batch_with_fewer_than_two_captions_has_no_in_batch_loss_and_a_gradient(
    tiny_clip_dir, partly_captioned_data, processor, tmp_path, rows
):
    args = student_arguments(tmp_path, **EVERY_TERM)
    terms, model = terms_of(tiny_clip_dir, load_from_disk(partly_captioned_data), processor, args, rows)
    for name in ("contrastive_loss", "similarity_distillation_loss"):
        assert terms[name] == 0 and terms[name].requires_grad
        model.zero_grad()
        terms[name].backward(retain_graph=True)
        assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)
        assert model.visual_projection.weight.grad is not None
    terms["cosine_distillation_loss"].backward()
    assert model.visual_projection.weight.grad.abs().max() > 0


def test_fewer_rows_than_a_batch_are_an_error(tiny_clip_dir, data, processor, tmp_path):
    with pytest.raises(ValueError, match="at least one batch of 32 rows .1 processes., got 16"):
        make_trainer(tiny_clip_dir, data, processor, student_arguments(tmp_path, per_device_train_batch_size=32))


def test_validation_logs_every_term(tiny_clip_dir, data, processor, tmp_path):
    args = student_arguments(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8)
    validation = StudentBatches(data, processor.image_processor, args.columns, width=16)
    trainer = make_trainer(tiny_clip_dir, data, processor, args, eval_batches=validation)
    trainer.train()
    (log, _) = [log for log in trainer.state.log_history if "eval_loss" in log]
    total = log["eval_cosine_distillation_loss"] + log["eval_contrastive_loss"]
    assert log["eval_loss"] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 12, 17])
def test_the_processes_share_the_validation_images_evenly(rows, processes):
    split = ValidationSplit(rows, batch_size=4, processes=processes)
    batches = list(zip(*(split.loss_batches(process) for process in range(processes)), strict=True))
    counted = [row for parts in batches for part in parts for row in part]
    assert counted == list(range(split.loss_rows))
    assert all(len(part) == len(parts[0]) for parts in batches for part in parts)
    if rows >= 4 * processes:  # as large as in training, and fewer than a batch are left over
        assert all(len(parts[0]) == 4 for parts in batches) and rows - split.loss_rows < 4 * processes
    else:
        assert len(batches) <= 1 and rows - split.loss_rows < processes
    shares = [split.shares(process, rows) for process in range(processes)]
    assert len({tuple(map(len, share)) for share in shares}) == 1  # as many batches of as many rows
    assert [row for share in shares for batch in share for row in batch][:rows] == list(range(rows))


def test_the_loss_of_validation_is_a_mean_over_batches_as_in_training(
    tiny_clip_dir, data, processor, tmp_path, caplog
):
    caplog.set_level("INFO")
    args = student_arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, per_device_train_batch_size=6)
    validation = StudentBatches(data, processor.image_processor, args.columns, width=16)
    trainer = make_trainer(tiny_clip_dir, data, processor, args, eval_batches=validation)
    found = trainer.evaluate()
    model = trainer.model.eval()
    with torch.no_grad():
        losses = [
            sum(weight * term for term, weight in trainer.loss_terms(model, validation.__getitems__(rows)).values())
            for rows in (list(range(6)), list(range(6, 12)))
        ]
    assert found["eval_loss"] == pytest.approx(float(sum(losses)) / 2, abs=1e-6)
    trainer.train()
    assert "trains on 16 images in 1 step of 6. Validation: 16 images, the loss over 12 of them, in batches of 6" in (
        caplog.text
    )


def test_validation_measures_retrieval_as_evaluation_does(tiny_clip_dir, data, processor, tmp_path):
    validation = data.select(range(13))
    student = fit_student(
        load_student(str(tiny_clip_dir)),
        student_arguments(tmp_path, eval_strategy="epoch", learning_rate=1e-2, load_best_model_at_end=False),
        data,
        processor,
        {},
        validation=validation,
    )
    (log,) = [log for log in student.state.log_history if "eval_loss" in log and log["step"] == 2]
    expected = evaluate_retrieval(Encoder(student.dual_encoder, processor), validation)
    names = ("text_to_image_recall@1", "image_to_text_recall@1")
    assert {name: log[f"eval_{name}"] for name in names} == {name: expected[name] for name in names}
    assert log["eval_mean_recall@1"] == (expected[names[0]] + expected[names[1]]) / 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_steps": 1},
            "takes all of the 1 step,.* is learned",
        ),
        (
            {"lr_scheduler_type": "linear", "warmup_steps": 3, "max_steps": 3},
            "takes all of the 3 steps,.* stays below",
        ),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_steps": 2}, None),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1, "max_steps": 1}, None),
    ],
)
def test_a_warm_up_that_takes_all_steps_is_told(options, told, tiny_clip_dir, data, processor, tmp_path, caplog):
    args = student_arguments(tmp_path, **options)
    batches = StudentBatches(data, processor.image_processor, args.columns, width=16)
    trainer = StudentTrainer(load_student(str(tiny_clip_dir)), args, batches, processor, {})
    trainer.create_optimizer_and_scheduler(args.max_steps)
    assert bool(re.search(told or "warm-up", caplog.text)) == (told is not None)


def test_training_is_told_in_lines_that_people_read(tiny_clip_dir, data, processor, tmp_path, caplog, capfd):
    caplog.set_level("INFO")
    args = student_arguments(tmp_path, eval_strategy="epoch", save_strategy="epoch", max_steps=4, disable_tqdm=False)
    fit_student(load_student(str(tiny_clip_dir)), args, data, processor, {}, validation=data)
    told = [line for line in caplog.messages if line.startswith(f"{tmp_path.name}: ")]
    number, recalls = r"\d+\.\d{3}", r"R@1 \d+\.\d % text to image, \d+\.\d % image to text"
    patterns = [
        r"trains on 16 images in 4 steps of 8\. Validation: 16 images\.",
        *[rf"step {n} of 4, epoch {n // 2}: loss {number}, validation loss {number}, {recalls}" for n in (2, 4)],
        rf"kept step \d of 4, the best of 2 validations by mean {recalls}. No test image had a say\.",
    ]
    assert len(told) == len(patterns)
    for line, pattern in zip(told, patterns, strict=True):
        assert re.fullmatch(f"{re.escape(tmp_path.name)}: {pattern}", line), line
    assert capfd.readouterr().out == ""  # no dictionaries of numbers


@pytest.mark.parametrize("cross_attention", ["bidirectional", "regions"])
def test_a_teacher_trains_its_block_and_learns(tiny_clip_dir, data, tmp_path, cross_attention):
    torch.manual_seed(0)
    teacher = DCLIPTeacher.from_clip(tiny_clip_dir, cross_attention=cross_attention)
    processor = DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)
    clip = {name: tensor.clone() for name, tensor in teacher.clip.state_dict().items()}
    paths = compute_features(data, teacher, processor, FeatureOptions(tmp_path / "cache"), keys=row_keys(data))
    args = TeacherArguments(
        output_dir=str(tmp_path / "teacher"),
        per_device_train_batch_size=16,
        max_steps=30,
        logging_steps=5,
        save_strategy="no",
        use_cpu=True,
        learning_rate=1e-2,
        disable_tqdm=True,
        loss_temperature=0.05,
    )
    trainer = TeacherTrainer(teacher, args, TeacherBatches(TeacherFeatures.load(paths)), processor, {})
    trainer.train()
    losses = [log["contrastive_loss"] for log in trainer.state.log_history if "contrastive_loss" in log]
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(tensor, clip[name]) for name, tensor in teacher.clip.state_dict().items())
    trainer.save_model()
    again = DCLIPTeacher.from_pretrained(tmp_path / "teacher")
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert not any(parameter.requires_grad for parameter in again.train().clip.parameters())


def test_two_processes_train_as_one_does(tiny_clip_dir, distillation_data, partly_captioned_data, tmp_path):
    script = Path(__file__).with_name("run_student.py")
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        train_together(script, processes, tiny_clip_dir, folder, processes, distillation_data, partly_captioned_data)
        results.append(load_file(folder / "results.safetensors"))
    alone, shared = results
    assert alone.keys() == shared.keys()
    assert sum("/loss/" in name for name in alone) >= 2 * 2 * 2 * 5
    every, some, all_texts = (alone[f"{where}/loss/contrastive_loss/1"] for where in ("batch/0", "batch/1", "bank/0"))
    assert (every - some).abs() > 0.01  # fewer texts to choose from
    assert (every - all_texts).abs() > 0.01  # more texts
    for name, value in alone.items():
        torch.testing.assert_close(
            shared[name], value, rtol=1e-4, atol=2e-6, msg=lambda message, name=name: f"{name}: {message}"
        )


def test_the_tokenizer_is_saved_alike_whatever_text_it_read_last(tiny_clip_dir, data, processor, tmp_path):
    trainer = make_trainer(tiny_clip_dir, data, processor, student_arguments(tmp_path))
    trainer.save_beside(tmp_path / "before")
    trainer.processor.tokenizer(["a red circle", "a"], truncation=True, padding=True, max_length=4)
    trainer.save_beside(tmp_path / "after")
    before, after = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("before", "after"))
    assert before == after
