"""train.py as users start it: through accelerate, with help, with a recipe, and with a word that is wrong."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modeling_dclip import DCLIPModel
from modeling_dclip.evaluation.records import read_results

ROOT = Path(__file__).parents[1]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def train(*words, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def test_help_names_every_section_and_starts_nothing():
    shown = train("--help")
    assert shown.returncode == 0, shown.stderr[-2000:]
    for name in (
        "--recipe FILE",
        "--stages",
        "Section anchor:",
        "Section student:",
        "--student.temperature (default 0.05)",
    ):
        assert name in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student.learning_rat", "1"], "Did you mean 'student.learning_rate'?"),
        (["--learning_rte", "1"], ".learning_rate'?"),
        (["--seed", "-1"], "Failed: seed: expected an integer from 0 to 4294967295, got '-1'."),
        (
            ["--teacher.num_train_epochs", "-2"],
            "teacher.num_train_epochs: expected a number above 0 and up to 1000000",
        ),
        (["--evaluate", "retrieval=nope"], "Unknown kind 'nope' in the spec 'nope'"),
        (["--output_dir", __file__], "test_train_script.py' is a file"),
        (["--recipe", "nowhere.yaml"], "No recipe at 'nowhere.yaml'"),
        (["--recipe"], "Expected a file after --recipe"),
    ],
)
def test_a_wrong_word_ends_with_one_clear_line(words, message):
    if "--recipe" not in words:
        words = ["--recipe", ROOT / "recipes" / "dclip_vitb16.yaml", *words]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("train").main([*map(str, words)])
    assert any(message in line for line in ended.value.code.splitlines())


def test_several_mistakes_have_a_line_each_and_no_traceback():
    ended = train("--clip_model", "nowhere/at/all", "--output_dir", __file__, "--evaluate", "retrieval=csv:a.csv:b")
    first, *lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and first.startswith("Failed: 3 mistakes, found before any work")
    begins = ["1. evaluate: retrieval=csv:a.csv:b: No TABLE.csv", "2. output_dir: expected", "3. clip_model: expected"]
    assert len(lines) == 3
    assert all(line.strip().startswith(begin) for line, begin in zip(lines, begins, strict=True))


def test_a_recipe_runs_through_accelerate_and_says_where_it_wrote(tmp_path):
    steps = {"use_cpu": True, "per_device_train_batch_size": 8, "max_steps": 1, "save_strategy": "no"}
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "train_datasets": ["scenes:train,n=8,image_size=32,captions_per_image=1"],
        "anchor": {"vision_config": {**TOWER, "image_size": 32, "patch_size": 16}, "text_config": TOWER, **steps},
        "student": {"cosine_distillation_loss_weight": 0.0, **steps},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    ended = train("--recipe", path, launcher=launcher)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for stage in ("anchor", "targets", "student"):
        assert f"{stage}: wrote {tmp_path / 'run' / stage}" in ended.stderr
    assert DCLIPModel.from_pretrained(tmp_path / "run" / "student").config.freeze_text
    again = train("--recipe", path, "--stages", "student")
    assert again.returncode == 0 and "student: already finished" in again.stderr


@pytest.mark.parametrize(
    ("benchmark", "titles", "absent"),
    [
        ("retrieval=scenes:test,n=8,captions_per_image=1", ["T→I R@1", "I→T mAP"], "top-1"),
        ("zero_shot=scenes:test,n=64", ["top-1", "top-5"], "R@1"),
    ],
)
def test_a_recipe_with_one_kind_of_benchmark_prints_its_table(tmp_path, benchmark, titles, absent):
    steps = {"use_cpu": True, "per_device_train_batch_size": 8, "max_steps": 1, "save_strategy": "no"}
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "clip_model": str(ROOT / "recipes" / "demo_anchor"),
        "train_datasets": ["scenes:train,n=8,captions_per_image=1"],
        "student": {"cosine_distillation_loss_weight": 0.0, **steps},
        "evaluate": [benchmark],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    ended = train("--recipe", path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    header, _, anchor, student = [line for line in ended.stdout.splitlines() if line.startswith("|")]
    assert all(title in header for title in titles) and absent not in header
    assert anchor.startswith("| anchor ") and student.startswith("| student, seed 0 ")
    results = tmp_path / "run" / "results"
    assert sorted(file.name for file in results.iterdir()) == [
        "records.json",
        "records.outcomes.safetensors",
        "summary.json",
    ]  # no trade-off of one axis
    assert {record["benchmark"] for record in read_results(results / "records.json")} == {benchmark}


def test_an_error_in_a_stage_ends_with_one_clear_line_and_writes_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "captions.csv").write_text("image;caption\na.png;a dog\n")
    words = [
        "--clip_model",
        ROOT / "recipes" / "demo_anchor",
        "--regions.detector",
        "grid:2x2",
        "--output_dir",
        tmp_path / "run",
    ]
    words += [
        "--train_datasets",
        f"csv:{tmp_path / 'captions.csv'}:{tmp_path / 'photos'}",
        "--student.lora_rank",
        "none",
    ]
    ended = train("--recipe", ROOT / "recipes" / "finetune.yaml", *words)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert last.startswith("Failed: Expected one column 'image'") and "captions.csv" in last and "',sep=;'" in last
    assert "TRANSFORMERS_VERBOSITY=info" in last and not (tmp_path / "run").exists()


def test_the_processes_part_together_before_the_main_one_reports(tmp_path, monkeypatch):
    script, done = importlib.import_module("train"), []

    class State:
        is_main_process = True

        def wait_for_everyone(self):
            done.append("wait")

        def destroy_process_group(self):
            done.append("part")

    monkeypatch.setattr(script, "PartialState", State)
    monkeypatch.setattr(script, "train_runs", lambda *args: done.append("train"))
    monkeypatch.setattr(script, "draw_training_curves", lambda folder: done.append("draw"))
    monkeypatch.setattr(script, "report", lambda *args: done.append("report"))
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path / 'run'}\nevaluate: ['retrieval=scenes:test,n=8']\n")
    script.run_recipe(script.parse_recipe([], tmp_path / "recipe.yaml"))
    assert done == ["train", "wait", "part", "draw", "report"]
    done.clear()
    State.is_main_process = False
    script.run_recipe(script.parse_recipe([], tmp_path / "recipe.yaml"))
    assert done == ["train", "wait", "part"]
