"""train.py publishes what it trained, and sees before training whether it may."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fixtures.loopback_hub import TOKEN, run_loopback_hub
from huggingface_hub import ModelCard, constants

ROOT = Path(__file__).parents[3]


@pytest.fixture
def train(monkeypatch):
    """train.py as a module, with its check in a fresh process left out: tests/test_train_script.py has that."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=lambda *words, **options: None))
    monkeypatch.setattr(module.sys, "argv", ["train.py"])
    return module


@pytest.fixture
def hub(monkeypatch):
    with run_loopback_hub() as loopback:
        monkeypatch.setattr(constants, "ENDPOINT", loopback.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield loopback


@pytest.fixture
def recipe(tmp_path):
    steps = {"use_cpu": True, "per_device_train_batch_size": 8, "max_steps": 1, "save_strategy": "no"}
    fields = {
        "output_dir": str(tmp_path / "run"),
        "clip_model": str(ROOT / "recipes" / "demo_anchor"),
        "train_datasets": ["scenes:train,n=8,captions_per_image=1"],
        "teacher": {"cross_attention": "regions", **steps},
        "student": {"contrastive_loss_weight": 0.0, **steps},
        "evaluate": ["retrieval=scenes:test,n=8,captions_per_image=1"],
        "push_to_hub": "me/first",
        "push_license": "apache-2.0",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_recipe_publishes_its_student_its_teacher_and_what_leaked(train, hub, recipe, capsys):
    train.main(["--recipe", str(recipe)])
    said = capsys.readouterr().out
    assert set(hub.repos) == {"me/first", "me/first-vision", "me/first-teacher"}
    assert all(f"{hub.url}/{repo_id}: " in said for repo_id in hub.repos)
    card = hub.files("me/first")["README.md"].decode()
    assert ModelCard(card).data.to_dict()["license"] == "apache-2.0"
    assert "another image's regions, own caption" in card and "1 step of 8 pairs" in card
    again = {repo_id: hub.commits(repo_id) for repo_id in hub.repos}
    train.main(["--recipe", str(recipe)])
    assert {repo_id: hub.commits(repo_id) for repo_id in hub.repos} == again


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        ((), "hf_wrong", "Expected a token that http"),
        (("--push_to_hub", "you/first"), TOKEN, "Expected a repository of me or lab"),
        (("--push_to_hub", "first"), TOKEN, "expected namespace/name"),
        (("--push_license", "mine"), TOKEN, "license: expected one of"),
        (("--push_license", "none"), TOKEN, "push_to_hub: expected push_license beside it"),
        (("--push_arm", "best"), TOKEN, "push_arm: expected one of the arms"),
        (("--arms", '{"a": {}, "b": {}}'), TOKEN, "push_to_hub: expected push_arm, one of"),
    ],
)
def test_what_could_not_be_published_ends_before_training(train, hub, recipe, monkeypatch, words, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=message):
        train.main(["--recipe", str(recipe), *words])
    assert not (recipe.parent / "run").exists() and not hub.repos
