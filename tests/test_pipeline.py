"""The whole path on few drawn scenes: arms and seeds from one recipe, evaluated, drawn, loaded back;
a second run does nothing again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures.processes import run_forked

from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.evaluation.records import read_results

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    fields = {
        "output_dir": str(tmp_path / "out"),
        "clip_model": str(ROOT / "recipes" / "demo_anchor"),
        "train_datasets": ["scenes:train,n=32"],
        "seeds": [0, 1],
        "baseline": "no_teacher",
        "arms": {
            "no_teacher": {"student": {"cosine_distillation_loss_weight": 0}},
            "leak_free": {"teacher": {"cross_attention": "regions"}},
        },
        "teacher": {"num_train_epochs": 1, "per_device_train_batch_size": 16},
        "student": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 1e-4},
        "evaluate": ["retrieval=scenes:test,n=40", "zero_shot=scenes:test,n=64"],
    }
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def test_arms_differ_in_their_own_fields_and_folders_and_share_the_rest(recipe, tmp_path):
    runs = expand_arms(parse_recipe(["--student.learning_rate", "3e-4"], recipe))
    assert [(run.arm, run.seed) for run in runs] == [
        ("no_teacher", 0),
        ("no_teacher", 1),
        ("leak_free", 0),
        ("leak_free", 1),
    ]
    assert len({run.recipe.run.output_dir for run in runs}) == 4
    assert {run.recipe.run.cache_dir for run in runs} == {str(tmp_path / "out" / "cache")}
    assert {run.recipe.student.learning_rate for run in runs} == {3e-4}  # the command line goes before all
    assert [run.recipe.student.seed for run in runs] == [0, 1, 0, 1]
    assert [run.recipe.student.cosine_distillation_loss_weight for run in runs] == [0, 0, 1, 1]
    assert [run.recipe.teacher.cross_attention for run in runs][1:3] == ["bidirectional", "regions"]


def test_an_unknown_baseline_and_a_wrong_field_of_an_arm_are_named(recipe):
    with pytest.raises(ValueError, match="baseline to be one of the arms"):
        expand_arms(parse_recipe(["--baseline", "nobody"], recipe))
    fields = yaml.safe_load(recipe.read_text())
    fields["arms"]["leak_free"] = {"teacher": {"cross_atention": "regions"}}
    recipe.write_text(yaml.safe_dump(fields, sort_keys=False))
    with pytest.raises(ValueError, match="Did you mean 'teacher.cross_attention'"):
        expand_arms(parse_recipe([], recipe))


def test_one_command_trains_evaluates_draws_and_reloads_and_a_second_skips(recipe, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--recipe", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    first = subprocess.run(command, **options)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "leak_free minus no_teacher" in first.stdout
    loaded = "DCLIPModel with DCLIPProcessor and DCLIPTeacher with DCLIPTeacherProcessor"
    assert f"A process without this package loaded {loaded}." in first.stdout
    out = tmp_path / "out"
    records = read_results(out / "results" / "records.json")
    assert len(records) == (1 + 4) * 2
    assert {record["label"] for record in records} >= {"anchor", "no_teacher, seed 0", "leak_free, seed 1"}
    for path in ("results/summary.json", "results/tradeoff.png", "leak_free/seed-0/teacher_attention.png"):
        assert (out / path).stat().st_size > 0
    leakage = read_results(out / "results" / "leakage.json")
    assert {record["label"] for record in leakage} == {"leak_free"} and len(leakage) == 2 * 7
    assert "leak_free (2 trained)" in first.stdout and leakage[0]["benchmark"] == "leakage=scenes:test,n=40"
    assert not (out / "no_teacher" / "seed-0" / "teacher").exists()
    weights = out / "leak_free" / "seed-1" / "student" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    words = ["--recipe", recipe]
    (again,) = run_forked(ROOT / "train.py", *words, cwd=ROOT, environments=[{"ACCELERATE_USE_CPU": "true"}])
    assert again.returncode == 0 and weights.stat().st_mtime_ns == made
    assert again.stderr.count("already finished") == 2 * 2 + 2 * 3


@pytest.fixture
def reinforced_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    teacher = str(ROOT / "recipes" / "demo_anchor")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {
        "output_dir": str(tmp_path / "out"),
        "clip_model": teacher,
        "train_datasets": ["scenes:train,n=24"],
        "baseline": "contrastive",
        "arms": {
            "contrastive": {"dmclip": {"contrastive_loss_weight": 1, "distillation_loss_weight": 0}},
            "distillation": {"dmclip": {"contrastive_loss_weight": 0, "distillation_loss_weight": 1}},
        },
        "reinforce": {"teachers": [teacher, teacher], "augmentations": 2, "synthetic_captions": "coarse_caption"},
        "dmclip": {
            "image_size": 32,
            "vision_config": {"stem_dim": 4, "hidden_size": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
            "text_config": {**tower, "mask_padding": True},
            "projection_dim": 16,
            "per_device_train_batch_size": 12,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
        },
        "evaluate": ["retrieval=scenes:test,n=40", "zero_shot=scenes:test,n=64"],
    }
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def test_a_mamba_clip_is_taught_evaluated_beside_its_teacher_and_reloaded_by_one_command(reinforced_recipe, tmp_path):
    options = {"cwd": ROOT, "environments": [{"ACCELERATE_USE_CPU": "true"}]}
    (ended,) = run_forked(ROOT / "train.py", "--recipe", reinforced_recipe, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "distillation minus contrastive" in ended.stdout and "loaded DMCLIPModel" in ended.stdout
    out = tmp_path / "out"
    records = read_results(out / "results" / "records.json")
    assert [record["label"] for record in records[::2]] == ["anchor", "contrastive, seed 0", "distillation, seed 0"]
    assert all(record["benchmark"] == "zero_shot=scenes:test,n=64" and record["n"] == 64 for record in records[1::2])
    anchor, *students = [record["metrics"]["top1"] for record in records[1::2]]
    assert anchor > 0.5 > max(students)  # a trained CLIP beside two that saw 24 images
    ranks = [record["metrics"]["text_to_image_mrr"] for record in records[::2]]
    assert len(set(ranks)) == 3  # three models, not one three times
    assert (out / "results" / "tradeoff.png").stat().st_size > 0
    assert (out / "reinforce" / "shards" / "reinforced.json").is_file() and not (out / "anchor").exists()
    student = str(out / "distillation" / "seed-0" / "dmclip")
    evaluated = ["--model", student, "--benchmark", "retrieval=scenes:test,n=40", "--output", str(tmp_path / "r.json")]
    (ended,) = run_forked(ROOT / "eval.py", *evaluated, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (alone,) = read_results(tmp_path / "r.json")
    assert alone["metrics"] == records[4]["metrics"]
