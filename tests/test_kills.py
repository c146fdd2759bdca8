"""Commands that are killed, short of room, started twice or given a secret: the next run ends as an undisturbed one.

`benchmarks/kills.py` kills every command at many random points; these are a few of its points.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from fixtures.processes import run_forked

from modeling_dclip.data.files import holding

ROOT = Path(__file__).resolve().parents[1]


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


RUNS = Path(__file__).with_name("run_kills.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(what)`: a subject's folder, and the file that says what a run without a kill leaves there; run once
    each.
    """
    made = {}

    def get(what):
        if what not in made:
            made[what] = [tmp_path_factory.mktemp("kills") / name for name in (what, f"{what}.json")]
            (ended,) = run_forked(RUNS, what, *made[what])
            assert ended.returncode == 0, ended.stderr
        return made[what]

    return get


@pytest.mark.parametrize(
    ("what", "share"),
    [*((what, share) for what in ("regions", "reinforced", "index") for share in (0.0, 0.4, 0.8)), ("student", 0.7)],
)
def test_a_command_that_was_killed_ends_as_one_that_was_not(undisturbed, what, share):
    (ended,) = run_forked(RUNS, what, *undisturbed(what), "killed", share)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("what", "limit"), [("regions", 2_000), ("reinforced", 2_000), ("index", 2_000), ("student", 100_000)]
)
def test_a_full_disk_is_one_line_that_names_the_place_and_the_next_run_goes_on(undisturbed, what, limit):
    (ended,) = run_forked(RUNS, what, *undisturbed(what), "full", limit)
    assert ended.returncode == 0, ended.stderr


SECRET = "s3cr3t-V4lue_99"


@pytest.fixture
def recipe(tmp_path, tiny_clip_dir):
    steps = {"use_cpu": True, "per_device_train_batch_size": 8, "max_steps": 1, "disable_tqdm": True}
    fields = {
        "output_dir": str(tmp_path / "run"),
        "clip_model": str(tiny_clip_dir),
        "train_datasets": ["scenes:train,n=8,captions_per_image=1,image_size=32"],
        "teacher": {"cross_attention": "regions", **steps},
        "student": steps,
        "evaluate": ["retrieval=scenes:test,n=8,captions_per_image=1,image_size=32"],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_nothing_of_a_run_holds_a_token_and_each_stage_has_a_manifest(recipe, tmp_path, monkeypatch, capfd, caplog):
    words = ["--recipe", str(recipe), "--seed", "5", "--student.hub_token", SECRET, f"--teacher.hub_token={SECRET}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *words])
    monkeypatch.setenv("WANDB_API_KEY", SECRET + "-of-the-environment")
    train = script(ROOT / "train.py")
    monkeypatch.setattr(train, "RELOAD", "")
    train.main(words)
    results = tmp_path / "run" / "results"
    script(ROOT / "eval.py").main(["report", str(results), "--output", str(tmp_path / "report")])
    said = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"records.json", "leakage.json", "arguments.yaml", "manifest.json", "stage.json", "report.html"} <= {
        path.name for path in files
    }
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in said.out + said.err + caplog.text
    commands = {record["command"] for record in json.loads((results / "records.json").read_text())}
    assert commands == {f"train.py --recipe {recipe} --seed 5 --student.hub_token *** --teacher.hub_token=***"}
    for stage in ("teacher", "targets", "student"):
        told = json.loads((tmp_path / "run" / stage / "manifest.json").read_text())
        assert told["stage"] == stage and told["seed"] == 5 and told["processes"] == 1 and told["keys"]["dataset"]
        assert told["data"]["train_datasets"] == ["scenes:train,n=8,captions_per_image=1,image_size=32"]
        assert told["versions"]["torch"] and "git_revision" in told and told["created"] and "***" in told["command"]


def test_a_second_run_on_a_folder_is_refused_and_names_the_first(recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with holding(tmp_path / "run"), pytest.raises(SystemExit) as ended:
        script(ROOT / "train.py").main(["--recipe", str(recipe)])
    assert f"'{tmp_path}/run' is in use by another run: process {os.getpid()} on " in ended.value.code
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arm", ["../../x", "/abs", "a/b", "", "."])
def test_an_arm_writes_nowhere_else(recipe, tmp_path, arm):
    with pytest.raises(SystemExit) as ended:
        script(ROOT / "train.py").main(["--recipe", str(recipe), "--arms", json.dumps({arm: {}})])
    assert ended.value.code.startswith("Failed: Expected a name for an arm, got ") and not (tmp_path / "run").exists()
