"""Classifiers on disk: keyed by content, shared where the text side is, bounded,
safe against kills and other processes.
"""

import os

import pytest
import torch

from modeling_dclip.data.files import user_cache_dir
from modeling_dclip.evaluation.benchmarks.zero_shot import ClassifierCache

NAMES, TEMPLATES = ["dog", "red circle"], ["a {}", "the {}"]


class Builder:
    """Counts how often a classifier is built."""

    def __init__(self, rows=2):
        self.calls, self.rows = 0, rows

    def __call__(self):
        self.calls += 1
        return torch.full((self.rows, 16), float(self.calls))


@pytest.fixture
def get(tiny_clip):
    """Ask a cache for the classifier of the tiny CLIP, or of another model."""

    def ask(cache, build, names=NAMES, templates=TEMPLATES, model=None, processor=None):
        return cache.get(model or tiny_clip[0], processor or tiny_clip[1], names, templates, build)

    return ask


def test_it_is_built_once_and_kept_in_memory_and_on_disk(get, tmp_path):
    build = Builder()
    cache = ClassifierCache(tmp_path)
    first = get(cache, build)
    assert get(cache, build) is first
    assert torch.equal(get(ClassifierCache(tmp_path), build), first)
    assert build.calls == 1 and [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_without_a_folder_it_is_kept_in_memory_alone(get, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build, cache = Builder(), ClassifierCache()
    assert get(cache, build) is get(cache, build)
    assert build.calls == 1 and not list(tmp_path.iterdir())


def test_other_names_templates_and_orders_are_other_classifiers(get):
    build, cache = Builder(), ClassifierCache()
    get(cache, build)
    get(cache, build, names=NAMES[::-1])
    get(cache, build, templates=TEMPLATES[:1])
    get(cache, build, names=["dog red", "circle"])  # as many letters in as many prompts
    assert build.calls == 4


def test_a_build_that_fails_leaves_nothing(get, tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        get(ClassifierCache(tmp_path), fail)
    assert not list(tmp_path.iterdir())
    build = Builder()
    get(ClassifierCache(tmp_path), build)
    assert build.calls == 1


def test_those_used_longest_ago_go_first(get, tmp_path):
    rows = 2**20 // 64 // 3  # a third of a MiB of float32 (rows, 16), with its header a little more
    cache = ClassifierCache(tmp_path, limit_mib=1)
    paths = []
    for number in range(2):
        get(cache, Builder(rows), names=[f"dog {number}", "red"])
        (path,) = set(tmp_path.iterdir()) - set(paths)
        os.utime(path, (number + 1, number + 1))
        paths.append(path)
    get(ClassifierCache(tmp_path, limit_mib=1), Builder(rows), names=["dog 0", "red"])  # used: now the newest
    get(cache, Builder(rows), names=["dog 2", "red"])  # more than a MiB with it
    assert paths[0].exists() and not paths[1].exists() and len(list(tmp_path.iterdir())) == 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2**20


def test_a_file_deleted_by_another_process_is_built_again(get, tmp_path):
    build = Builder()
    get(ClassifierCache(tmp_path), build)
    for path in tmp_path.iterdir():
        path.unlink()
    get(ClassifierCache(tmp_path), build)
    assert build.calls == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_named(get, tmp_path):
    get(ClassifierCache(tmp_path), Builder())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"classifier '{path}' is damaged.*Delete the file"):
        get(ClassifierCache(tmp_path), Builder())


def test_clearing_deletes_files_and_forgets(get, tmp_path):
    cache, build = ClassifierCache(tmp_path), Builder()
    get(cache, build)
    assert cache.clear() == 1 and not list(tmp_path.iterdir())
    get(cache, build)
    assert build.calls == 2
    assert ClassifierCache().clear() == 0


def test_a_bound_below_one_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="limit_mib >= 1, got 0"):
        ClassifierCache(limit_mib=0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir("classifiers") == tmp_path / "modeling_dclip" / "classifiers"
