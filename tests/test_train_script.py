"""train.py as users start it: through accelerate, with help, with a recipe, and with a word that is wrong."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fixtures.processes import run_forked
from huggingface_hub import constants

from modeling_dclip import DCLIPModel
from modeling_dclip.data.failures import Mistakes
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.evaluation.records import read_results

ROOT = Path(__file__).parents[1]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def train(*words):
    """train.py in a process of its own, which is spared the imports."""
    (done,) = run_forked(ROOT / "train.py", *words, cwd=ROOT, environments=[{"ACCELERATE_USE_CPU": "true"}])
    return done


def start(*words, launcher=()):
    """train.py in an interpreter of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def test_help_names_every_section_and_starts_nothing():
    shown = start("--help")
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
def test_a_wrong_word_ends_with_one_clear_line(words, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the recipe's CLIP is on the Hub
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
    ended = start("--recipe", path, launcher=launcher)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for stage in ("anchor", "targets", "student"):
        assert f"{stage}: wrote {tmp_path / 'run' / stage}" in ended.stderr
    assert DCLIPModel.from_pretrained(tmp_path / "run" / "student").config.freeze_text
    again = train("--recipe", path, "--stages", "student")
    assert again.returncode == 0 and "student: already finished" in again.stderr


def captioned_files(folder, count):
    """A table of captions and a folder of pictures, as users have them."""
    (folder / "photos").mkdir(parents=True)
    lines = ["image,caption"]
    for row in load_scenes("train", n=count, captions_per_image=2):
        row["image"].save(folder / "photos" / f"{row['image_id'].rpartition('/')[2]}.png")
        lines += [f'{row["image_id"].rpartition("/")[2]}.png,"{caption}"' for caption in row["captions"]]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return f"csv:{folder / 'captions.csv'}:{folder / 'photos'}"


def test_fine_tuning_ends_with_an_answer_and_is_quiet_until_then(tmp_path):
    anchor, out = "recipes/demo_anchor", tmp_path / "run"
    spec = captioned_files(tmp_path / "mine", 40)
    words = ["--recipe", "recipes/finetune.yaml", "--clip_model", anchor]
    words += ["--train_datasets", spec, "--output_dir", out]
    words += ["--student.lora_rank", "4", "--student.per_device_train_batch_size", "8"]
    words += ["--student.num_train_epochs", "1", "--evaluate"]
    ended = start(*words, "zero_shot=scenes:test,n=64")
    assert ended.returncode == 0, ended.stderr[-3000:]
    answer = ended.stdout
    header, _, *rows = [line for line in answer.splitlines() if line.startswith("|")]
    assert header.split() == "| | measured on | n | before | after | change |".split()
    assert [row.split("|")[1].strip() for row in rows] == ["T→I R@1", "I→T R@1", "top-1"]
    assert all("test part" in row and "4 images" in row for row in rows[:2]) and "64 images" in rows[2]
    assert all(row.count("[") == 3 for row in rows) and "95% bootstrap interval" in answer
    assert f"Before: {anchor}. After: {out / 'student'}." in answer
    assert answer.index(f"run/student and {anchor}") > answer.index(rows[2])  # the verdict, with the names of eval.py
    for path in ("student", "student/adapter", "student/training_curves.png", "results/records.json"):
        assert str(out / path) in answer and (out / path).exists()
    records = read_results(out / "results" / "records.json")
    assert [record["model"] for record in records] == [anchor] * 2 + [str(out / "student")] * 2
    assert not any("label" in record for record in records)
    commands = [shlex.split(line) for line in answer.splitlines() if line.startswith("  python ")]
    assert [command[1:3] for command in commands] == [
        ["eval.py", "--model"],
        ["-m", "modeling_dclip.hub.index"],
        ["-m", "modeling_dclip.hub.index"],
        ["-m", "modeling_dclip.hub.publish"],
    ]
    assert commands[0][3:7] == [str(out / "student"), "--anchor", anchor, "--benchmark"]
    assert f"retrieval=held_out:{out}" in commands[0] and spec in commands[1]
    said = ended.stderr + ended.stdout
    assert not re.search(r"%\||it/s|FutureWarning|had no length|e-0\d|-0\.000|\b1 (?:lines|images|steps)\b", said)
    assert len(ended.stderr.splitlines()) <= 15 and len(answer.splitlines()) <= 40


@pytest.mark.parametrize(
    ("evaluate", "titles"),
    [
        (["retrieval=scenes:test,n=8,captions_per_image=1"], ["T→I R@1", "I→T R@1"]),
        ([], []),
    ],
)
def test_a_run_without_a_test_part_says_how_to_get_one_unless_it_is_evaluated(tmp_path, evaluate, titles, capsys):
    script = importlib.import_module("train")
    anchor = ROOT / "recipes" / "demo_anchor"
    shutil.copytree(anchor, tmp_path / "run" / "student")
    recipe = {"output_dir": str(tmp_path / "run"), "clip_model": str(anchor), "evaluate": evaluate}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "train_datasets": ["scenes:train,n=8@4"]}))
    (run,) = script.expand_arms(script.parse_recipe([], tmp_path / "recipe.yaml"))
    script.report_run(run, tmp_path / "run", began=time.monotonic() - 75)
    answer = capsys.readouterr().out
    rows = [line for line in answer.splitlines() if line.startswith("| ")][2:]
    assert [row.split("|")[1].strip() for row in rows] == titles
    assert ("no images were kept for that. --test_fraction 0.1 --train_fraction 0.8" in answer) is not bool(evaluate)
    assert "All took 1 minute 1" in answer and "--images scenes:train,n=8 " in answer
    results = tmp_path / "run" / "results"
    assert results.exists() is bool(evaluate)
    if evaluate:  # no trade-off of one axis
        assert sorted(file.name for file in results.iterdir()) == ["records.json", "records.outcomes.safetensors"]


@pytest.mark.parametrize(("here", "script"), [(ROOT, "eval.py"), (ROOT / "docs", str(ROOT / "eval.py"))])
def test_the_next_commands_run_from_the_folder_that_they_were_printed_in(tmp_path, monkeypatch, here, script):
    monkeypatch.chdir(here)
    train_script = importlib.import_module("train")
    fields = {"clip_model": str(ROOT / "recipes" / "demo_anchor"), "train_datasets": ["scenes:train,n=8"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    recipe = train_script.parse_recipe([], tmp_path / "recipe.yaml")
    told = train_script.describe_next(recipe, tmp_path / "my run ü!", "student")
    look, search, _, publish = [shlex.split(line) for line in told.splitlines() if line.startswith("  python ")]
    skipping = train_script.parse_recipe(["--on_bad_image", "skip"], tmp_path / "recipe.yaml")
    assert "--on_bad_image" not in search
    assert "/index' --on_bad_image skip\n" in train_script.describe_next(skipping, tmp_path / "my run ü!", "student")
    assert look[1] == script and Path(script).is_file()
    assert publish[publish.index("--repo_id") + 1] == "me/my-run-u"


def test_an_error_in_a_stage_ends_with_one_clear_line_and_writes_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "captions.csv").write_text("image;caption\na.png;a dog\n")
    words = [
        "--clip_model",
        ROOT / "recipes" / "demo_anchor",
        "--output_dir",
        tmp_path / "run",
        "--train_datasets",
        f"csv:{tmp_path / 'captions.csv'}:{tmp_path / 'photos'}",
    ]
    ended = train("--recipe", ROOT / "recipes" / "finetune.yaml", *words)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        last.startswith("Failed: Expected one column 'image'")
        and "captions.csv" in last
        and "',sep=semicolon'" in last
    )
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
    monkeypatch.setattr(script, "report_run", lambda *args: done.append("report"))
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path / 'run'}\nevaluate: ['retrieval=scenes:test,n=8']\n")
    script.run_recipe(script.parse_recipe([], tmp_path / "recipe.yaml"))
    assert done == ["train", "wait", "part", "draw", "report"]
    done.clear()
    State.is_main_process = False
    script.run_recipe(script.parse_recipe([], tmp_path / "recipe.yaml"))
    assert done == ["train", "wait", "part"]


CHOSEN = {"keep_retention": 0.9, "probe": ["zero_shot=scenes:validation"]}


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (CHOSEN, None),
        ({"probe": ["zero_shot", "retrieval=held_out:RUN", "retrieval=scenes:test,n=8"]}, None),  # watched
        ({**CHOSEN, "probe": ["zero_shot"]}, r"what evaluate reports \(zero_shot=scenes:test\) beside keep_retention"),
        ({**CHOSEN, "probe": ["zero_shot=scenes:validation", "retrieval=held_out:RUN"]}, "than the run's test part"),
        (
            {"wise_ft_rule": "best mean_recall@1 at retention 0.9", "eval_strategy": "epoch", "probe": ["zero_shot"]},
            "beside wise_ft_rule, which chooses by it, got zero_shot. Name other images",
        ),
    ],
)
def test_what_is_reported_chooses_nothing(student, message, tmp_path):
    script, folder = importlib.import_module("train"), tmp_path / "run"
    student = {**student, "probe": [one.replace("RUN", str(folder)) for one in student["probe"]]}
    recipe = {"output_dir": str(folder), "evaluate": ["retrieval=scenes:test,n=8", "zero_shot=scenes:test"]}
    recipe |= {"arms": {"a": {"student": student}, "b": {}}, "train_fraction": 0.5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs = script.expand_arms(script.parse_recipe([], tmp_path / "recipe.yaml"))
    script.check_choices(runs[1].recipe, runs, folder)
    if message is None:
        script.check_choices(runs[0].recipe, runs, folder)
    else:
        with pytest.raises(ValueError, match=message):
            script.check_choices(runs[0].recipe, runs, folder)


def test_points_on_a_line_whose_end_a_rule_chooses_are_refused(tmp_path):
    script = importlib.import_module("train")
    student = {"wise_ft_rule": "best mean_recall@1 at retention 0.9", "eval_strategy": "epoch"}
    recipe = {"evaluate": ["zero_shot"], "alphas": [0.5], "seeds": [0, 1], "train_fraction": 0.5}
    recipe |= {"student": {**student, "probe": CHOSEN["probe"]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs = script.expand_arms(script.parse_recipe([], tmp_path / "recipe.yaml"))
    with pytest.raises(ValueError, match=r"alphas: expected none beside student.wise_ft_rule, .* got \[0.5\]"):
        script.check_choices(runs[0].recipe, runs, tmp_path / "run")


def test_a_wrong_probe_is_told_with_the_other_mistakes_before_any_work(tmp_path):
    script = importlib.import_module("train")
    words = ["--output_dir", str(tmp_path / "run"), "--evaluate", "retrieval=nope:a", "--student.probe", "hessian"]
    recipe = script.parse_recipe([*words, f"zero_shot=imagefolder:{tmp_path / 'none'}"], script.DEMO)
    with pytest.raises(Mistakes) as found:
        script.check_all(recipe, script.expand_arms(recipe), script.SharedData())
    begins = ("evaluate: retrieval=nope:a: ", "student.probe: hessian: ", "student.probe: zero_shot=imagefolder:")
    assert all(str(one).startswith(begin) for one, begin in zip(found.value.errors, begins, strict=True))
    assert not (tmp_path / "run").exists()
