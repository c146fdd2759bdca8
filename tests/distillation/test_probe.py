"""Benchmarks while a student trains: they change nothing, end a run in time, and choose a point on the line."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from fixtures.training import RECIPE, TRAINER_STEPS, equal, make_inputs, student_arguments, write_recipe
from safetensors.torch import load_file
from transformers import set_seed

from modeling_dclip import DCLIPProcessor
from modeling_dclip.data.captions.parts import read_trained_images
from modeling_dclip.distillation.arguments import deciding_fields, parse_wise_ft_rule
from modeling_dclip.distillation.probe import ALPHAS
from modeling_dclip.distillation.recipes import parse_recipe
from modeling_dclip.distillation.run import SharedData, load_student
from modeling_dclip.distillation.stages import fit_student, run_stages
from modeling_dclip.distillation.trainer import StudentTrainer
from modeling_dclip.encoders.weight_interpolation import interpolate_weights

ZERO_SHOT = "zero_shot=scenes:validation"


@pytest.fixture(scope="module")
def inputs(tiny_clip_dir, distillation_data, tmp_path_factory):
    return make_inputs(tiny_clip_dir, distillation_data, tmp_path_factory.mktemp("inputs"))


class Forgetting:
    """A probe whose accuracy falls with the distance to the anchor, and which disturbs whatever it can."""

    def __init__(self, clip):
        self.start = {name: one.clone() for name, one in load_student(clip).state_dict().items()}
        self.calls = 0

    def __call__(self, model, processor):
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(3)
        model.train().eval()
        now = {name.replace(".base_layer", ""): one for name, one in model.state_dict().items()}
        for name, one in now.items():  # an adapter is a distance too
            if "lora_B" in name:
                now[name.partition(".lora_B")[0] + ".weight"] = self.start[
                    name.partition(".lora_B")[0] + ".weight"
                ] + (one.abs().sum())
        moved = sum(float((now[name].float() - one).abs().sum()) for name, one in self.start.items())
        return {ZERO_SHOT: {"top1": 0.8 / (1 + moved / 1000)}, "retrieval=a": {"text_to_image_recall@1": 0.25}}

    def image_keys(self):
        return ["ab" * 32]


def fit(inputs, folder, **options):
    """A student that is measured; validated on nine rows where it asks for that."""
    options = {**TRAINER_STEPS, "max_steps": 8, "probe": [ZERO_SHOT, "retrieval=a"], "probe_steps": 2, **options}
    set_seed(0)
    probe = Forgetting(inputs["clip"]) if options["probe"] else None
    validation = inputs["targets"].select(range(9)) if options.get("eval_strategy", "no") != "no" else None
    args, processor = student_arguments(folder, **options), DCLIPProcessor.from_pretrained(inputs["clip"])
    more = {"validation": validation, "probe": probe}
    return fit_student(load_student(inputs["clip"]), args, inputs["targets"], processor, {"student": {}}, **more)


def saved(folder):
    return load_file(folder / "model.safetensors")


def history(folder):
    times = ("runtime", "per_second")
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logs = [log for log in logs if "train_runtime" not in log]
    return [{name: value for name, value in log.items() if not any(one in name for one in times)} for log in logs]


def probes(folder):
    return {log["step"]: log for log in history(folder) if "probe_retention" in log}


def stop_at(whole, folder, step):
    folder.mkdir()
    for path in whole.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) <= step:
            shutil.copytree(path, folder / path.name)


@pytest.mark.parametrize("kind", ["lora", "ema"])
def test_a_probe_is_logged_and_changes_nothing(kind, inputs, tmp_path):
    options = {"lora": {"lora_rank": 2, "lora_dropout": 0.3}, "ema": {"ema_decay": 0.5, "min_crop_area": 0.5}}[kind]
    fit(inputs, tmp_path / "without", probe=[], **options)
    trainer = fit(inputs, tmp_path / "with", probe_steps=0.35, **options)
    assert equal(saved(tmp_path / "with"), saved(tmp_path / "without"))
    logged = history(tmp_path / "with")
    assert [log for log in logged if "probe_retention" not in log] == history(tmp_path / "without")
    assert list(probes(tmp_path / "with")) == [0, 3, 6, 8] and trainer.probing.probe.calls == 4
    first, *_, last = probes(tmp_path / "with").values()
    assert first["probe_retention"] == 1.0 and first["probe_zero_shot_top1"] == pytest.approx(0.8)
    assert last["probe_retrieval_text_to_image_recall@1"] == 0.25
    assert 0 < last["probe_retention"] == last["probe_zero_shot_top1"] / first["probe_zero_shot_top1"] < 1
    stop_at(tmp_path / "with", tmp_path / "resumed", 6)
    resumed = fit(inputs, tmp_path / "resumed", probe_steps=0.35, **options)
    assert history(tmp_path / "resumed") == logged and resumed.probing.probe.calls == 1
    assert equal(saved(tmp_path / "resumed"), saved(tmp_path / "with"))


def test_an_average_is_measured_not_the_weights_of_the_step(inputs, tmp_path):
    for decay in (None, 0.9):
        fit(inputs, tmp_path / str(decay), ema_decay=decay)
    found = [probes(tmp_path / str(decay))[8]["probe_retention"] for decay in (None, 0.9)]
    assert found[0] < found[1] < 1  # the average has moved less


@pytest.mark.parametrize(("kind", "stops"), [("plain", (3, 6)), ("ema", (5,)), ("lora", (4,))])
def test_the_first_probe_that_keeps_too_little_ends_the_run_wherever_it_was_stopped(
    kind, stops, inputs, tmp_path, caplog
):
    caplog.set_level("INFO")
    options = {"plain": {}, "ema": {"ema_decay": 0.5}, "lora": {"lora_rank": 2, "lora_dropout": 0.1}}[kind]
    fit(inputs, tmp_path / "watched", **options)
    kept = [probes(tmp_path / "watched")[step]["probe_retention"] for step in (4, 6)]
    options["keep_retention"] = sum(kept) / 2
    whole = tmp_path / "whole"
    trainer = fit(inputs, whole, **options)
    assert trainer.state.global_step == 6 and list(probes(whole)) == [0, 2, 4, 6]
    assert (
        f"stopped after step 6 of 8: retention {kept[1]:.3f} is below keep_retention {options['keep_retention']:g} "
        in (caplog.text)
    )
    assert f"Kept: step 4, the last probe that held (retention {kept[0]:.3f})." in caplog.text
    assert history(whole)[-1] == {"probe_kept_step": 4, "epoch": 1.2, "step": 6}
    if kind == "ema":
        fit(inputs, tmp_path / "short", max_steps=4, probe=[], ema_decay=0.5)
    expected = saved(tmp_path / "short" if kind == "ema" else whole / "checkpoint-4")
    assert equal(saved(whole), expected)
    for step in stops:
        stop_at(whole, tmp_path / f"from-{step}", step)
        resumed = fit(inputs, tmp_path / f"from-{step}", **options)
        assert resumed.state.global_step == 6 and resumed.probing.probe.calls == (0 if step == 6 else 1 + (step < 4))
        assert equal(saved(tmp_path / f"from-{step}"), saved(whole)), step
        assert history(tmp_path / f"from-{step}") == history(whole), step


def test_where_already_the_first_probe_keeps_too_little_the_student_is_the_anchor(inputs, tmp_path, caplog):
    fit(inputs, tmp_path / "run", keep_retention=1.0)
    assert equal(saved(tmp_path / "run"), load_student(inputs["clip"]).state_dict())
    assert "run: nothing was learned: already the first probe after the start kept too little" in caplog.text
    assert "Set run.probe_steps below 2, lower run.learning_rate or run.keep_retention" in caplog.text


@pytest.mark.parametrize(("best", "kept"), [(3, 3), (5, 4), (6, 4)])
def test_the_best_validation_is_kept_if_no_later_than_the_last_probe_that_held(
    best, kept, inputs, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")

    def measure(trainer):
        recall = 0.5 if trainer.state.global_step == best else 0.1
        return {"text_to_image_recall@1": recall, "image_to_text_recall@1": recall, "mean_recall@1": recall}

    monkeypatch.setattr(StudentTrainer, "measure", measure)
    fit(inputs, tmp_path / "watched")
    limit = sum(probes(tmp_path / "watched")[step]["probe_retention"] for step in (4, 6)) / 2
    options = {"eval_strategy": "steps", "eval_steps": 1, "keep_retention": limit}
    trainer = fit(inputs, tmp_path / "whole", **options)
    assert trainer.state.best_global_step == best
    assert equal(saved(tmp_path / "whole"), saved(tmp_path / "whole" / f"checkpoint-{kept}"))
    assert ("kept step 3 of 6, the best of 6 validations" in caplog.text) == (kept == best)
    assert ("Kept: step 3, the best validation up to the last probe that held, that of step 4." in caplog.text) == (
        kept == best
    )
    assert ("probe_kept_step" in history(tmp_path / "whole")[-1]) == (kept != best)
    stop_at(tmp_path / "whole", tmp_path / "resumed", 5)
    fit(inputs, tmp_path / "resumed", **options)
    assert equal(saved(tmp_path / "resumed"), saved(tmp_path / "whole"))
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")


def test_a_checkpoint_without_the_weights_that_held_is_named(inputs, tmp_path):
    fit(inputs, tmp_path / "run", keep_retention=0.1, max_steps=3)
    (tmp_path / "run" / "checkpoint-3" / "held.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3' cannot be loaded .*held.safetensors' is missing"):
        fit(inputs, tmp_path / "run", keep_retention=0.1, max_steps=3)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_a_rule_chooses_the_best_point_that_keeps_enough(kind, inputs, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    lora = {"lora_rank": 2} if kind == "lora" else {}
    recalls = iter([0.1 * point for point in range(11)])  # further from the anchor is better
    names = ("text_to_image_recall@1", "image_to_text_recall@1", "mean_recall@1")
    validated = {"eval_strategy": "epoch", "load_best_model_at_end": False, "max_steps": 2}
    fit(inputs, tmp_path / "trained", **validated, **lora)
    monkeypatch.setattr(StudentTrainer, "evaluate", lambda trainer, **_: {"eval_loss": 0.0})
    monkeypatch.setattr(StudentTrainer, "measure", lambda trainer: dict.fromkeys(names, next(recalls)))
    end = probes(tmp_path / "trained")[2]["probe_retention"]
    retention = 1 / (1 + 0.55 * (1 / end - 1))  # kept up to alpha 0.5
    rule = f"best mean_recall@1 at retention {retention}"
    trainer = fit(inputs, tmp_path / "run", wise_ft_rule=rule, **validated, **lora)
    told = json.loads((tmp_path / "run" / "wise_ft.json").read_text())
    assert told["rule"] == rule and told["alpha"] == 0.5 and [one["alpha"] for one in told["points"]] == list(ALPHAS)
    kept = [one["retention"] for one in told["points"]]
    assert kept[0] == 1 and kept == sorted(kept, reverse=True) and kept[10] == pytest.approx(end)
    assert told["points"][5]["probe"]["zero_shot_top1"] == pytest.approx(0.8 * kept[5])
    arguments = yaml.safe_load((tmp_path / "run" / "arguments.yaml").read_text())
    assert arguments["student"]["wise_ft_alpha"] == 0.5
    assert "wise_ft_rule chose alpha 0.5: mean_recall@1 50.0 % on the validation images at retention" in caplog.text
    assert trainer.args.wise_ft_alpha == 1  # as the stage's record has it
    anchor = load_student(inputs["clip"]).state_dict()
    expected = interpolate_weights(anchor, saved(tmp_path / "trained"), 0.5)
    if kind == "plain":
        assert equal(saved(tmp_path / "run"), expected)
        return
    for name, one in saved(tmp_path / "run").items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-6)
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("trained", "run")]
    for name, one in adapters[0].items():
        assert torch.equal(adapters[1][name], one * (0.5 if "lora_B" in name else 1)), name


def test_where_no_point_is_better_the_rule_takes_the_anchor_and_says_so(inputs, tmp_path, monkeypatch, caplog):
    names = ("text_to_image_recall@1", "image_to_text_recall@1", "mean_recall@1")
    monkeypatch.setattr(StudentTrainer, "measure", lambda trainer: dict.fromkeys(names, 0.5))
    rule = "best text_to_image_recall@1 at retention 0.2"
    fit(inputs, tmp_path / "run", wise_ft_rule=rule, eval_strategy="epoch", max_steps=2)
    assert equal(saved(tmp_path / "run"), load_student(inputs["clip"]).state_dict())
    assert "no point that keeps retention 0.2 is better than the anchor on the validation images" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["best", "best loss at retention 0.9", "best mean_recall@1 at 0.9",
     "best mean_recall@1 at retention", "best mean_recall@1 at retention 98 %",
     "best mean_recall@1 at retention 0", "best mean_recall@1 at retention 1.1",
     "best mean_recall@1 at retention nan"],
)  # fmt: skip
def test_a_rule_of_another_form_is_refused_in_one_line_that_shows_the_form(text, tmp_path):
    expected = (
        "wise_ft_rule: expected 'best METRIC at retention NUMBER' with METRIC one of mean_recall@1, "
        "text_to_image_recall@1, image_to_text_recall@1 and NUMBER above 0 and at most 1"
    )
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        student_arguments(tmp_path, probe=[ZERO_SHOT], wise_ft_rule=text)
    assert repr(text) in str(refused.value) and "\n" not in str(refused.value)


def test_a_rule_may_have_more_space_and_a_whole_number():
    assert parse_wise_ft_rule(" best  image_to_text_recall@1 at retention 1 ") == ("image_to_text_recall@1", 1.0)


RULE = "best mean_recall@1 at retention 0.9"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_retention": 0.9}, "keep_retention: expected a zero_shot benchmark in probe, .*, got none"),
        ({"wise_ft_rule": RULE, "probe": ["retrieval=a"]}, "wise_ft_rule: expected a zero_shot .* got retrieval=a"),
        ({"keep_retention": 0.0, "probe": [ZERO_SHOT]}, "keep_retention"),
        ({"keep_retention": 1.5, "probe": [ZERO_SHOT]}, "keep_retention"),
        ({"wise_ft_rule": RULE, "probe": [ZERO_SHOT], "wise_ft_alpha": 0.5}, "expected wise_ft_alpha 1 .*got 0.5"),
        ({"wise_ft_rule": RULE, "probe": [ZERO_SHOT], "lora_rank": 2, "use_dora": True}, "expected no use_dora"),
        ({"wise_ft_rule": RULE, "probe": [ZERO_SHOT]}, "wise_ft_rule: expected a validation part, .*strategy no"),
        ({"probe": [ZERO_SHOT], "probe_steps": 0}, "probe_steps"),
    ],
)
def test_a_choice_by_what_is_not_there_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        student_arguments(tmp_path, **fields)


def test_a_probe_that_is_watched_decides_nothing_and_one_that_chooses_is_recorded(tmp_path):
    plain = deciding_fields(student_arguments(tmp_path))
    assert deciding_fields(student_arguments(tmp_path, probe=[ZERO_SHOT], probe_steps=3)) == plain
    chosen = deciding_fields(student_arguments(tmp_path, probe=[ZERO_SHOT], probe_steps=3, keep_retention=0.9))
    assert chosen == plain | {"probe": [ZERO_SHOT], "probe_steps": 3, "keep_retention": 0.9}


def test_benchmarks_without_something_that_measures_them_are_refused(inputs, tmp_path):
    args, processor = student_arguments(tmp_path, probe=[ZERO_SHOT]), DCLIPProcessor.from_pretrained(inputs["clip"])
    with pytest.raises(
        ValueError, match="student.probe: expected something that measures benchmarks beside it, got none"
    ):
        fit_student(load_student(inputs["clip"]), args, inputs["targets"], processor, {})


@pytest.mark.parametrize("found", [{"zero_shot=a": {"top1": 0.0}}, {"retrieval=a": {"mrr": 0.5}}])
def test_no_share_is_kept_of_an_accuracy_of_nothing(found, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Forgetting, "__call__", lambda self, model, processor: found)
    with pytest.raises(
        ValueError, match="keep_retention: expected zero_shot benchmarks in probe of which the model knows"
    ):
        fit(inputs, tmp_path / "chosen", keep_retention=0.5)
    fit(inputs, tmp_path / "watched", max_steps=1)  # shown without a retention
    assert probes(tmp_path / "watched") == {} and len(history(tmp_path / "watched")) == 3


def test_a_rule_without_validation_images_is_refused(inputs, tmp_path):
    args = student_arguments(tmp_path, probe=[ZERO_SHOT], wise_ft_rule=RULE, eval_strategy="epoch", max_steps=1)
    args.eval_strategy, processor = "no", DCLIPProcessor.from_pretrained(inputs["clip"])
    probe = Forgetting(inputs["clip"])
    with pytest.raises(ValueError, match="wise_ft_rule: expected validation images with text_embeds, .* got none"):
        fit_student(load_student(inputs["clip"]), args, inputs["targets"], processor, {}, probe=probe)


def test_images_that_choose_count_as_seen_and_stages_without_a_measure_do_not_begin(inputs, tmp_path):
    student = {**RECIPE["student"], "cosine_distillation_loss_weight": 0, "max_steps": 1, "probe": [ZERO_SHOT]}
    opened, seen = [], []
    for name, fields in (("watched", {}), ("chosen", {"keep_retention": 0.5})):
        (tmp_path / name).mkdir()
        recipe = {"clip_model": inputs["clip"], "student": {**student, **fields}}
        recipe = parse_recipe([], write_recipe(tmp_path / name, **recipe))
        with pytest.raises(ValueError, match="student.probe: expected SharedData"):
            run_stages(recipe)
        assert not (tmp_path / name / "run").exists()
        probe = Forgetting(inputs["clip"])
        folder = run_stages(recipe, SharedData(open_probe=lambda names, one=probe: opened.append(names) or one))
        assert probe.calls == 2
        seen.append(read_trained_images(folder / "student").count_overlap(["ab" * 32]))
    assert opened == [[ZERO_SHOT], [ZERO_SHOT]] and seen == [0, 1]
