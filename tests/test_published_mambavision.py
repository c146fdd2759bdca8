"""The published MambaVision as a contender of the encoder benchmark:
found or told how to fetch it, its scan named, its outputs ours.
"""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GATE = 2e-6  # relative, as in tests/conformance/test_mambavision.py


@pytest.fixture
def contender(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import published_mambavision

    yield published_mambavision
    for name in [name for name in sys.modules if name.startswith(("mambavision", "published_mambavision"))]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path):
    """A package that imports mamba-ssm as the published one does."""
    (tmp_path / "mambavision" / "models").mkdir(parents=True)
    for folder in ("mambavision", "mambavision/models"):
        (tmp_path / folder / "__init__.py").touch()
    line = "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n"
    (tmp_path / "mambavision" / "models" / "mamba_vision.py").write_text(line)
    return str(tmp_path)


def test_the_package_imports_on_a_cpu_and_leaves_no_stand_in_behind(contender, package):
    before = {name for name in sys.modules if name.startswith("mamba_ssm")}
    module = contender.import_published(package, "cpu")
    assert module.selective_scan_fn is contender.STAND_INS["reference"][0]
    assert {name for name in sys.modules if name.startswith("mamba_ssm")} == before


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_a_package_that_is_not_there_is_told_with_its_remedy(contender, folder):
    with pytest.raises(SystemExit, match=r"--published_package: expected a folder .* got .*pip install --no-deps"):
        contender.import_published(folder, "cpu")


def test_on_cuda_a_stand_in_would_be_a_weak_rival(contender, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # not installed, wherever this runs
    with pytest.raises(SystemExit, match="Expected mamba_ssm beside the published MambaVision on CUDA"):
        contender.import_published(package, "cuda")


def test_what_was_measured_computes_our_function_and_says_what_ran_the_scan():
    rows = json.loads((BENCHMARKS / "results" / "image_encoders_published.json").read_text())["rows"]
    published = [row for row in rows if row["encoder"].startswith("published_")]
    assert {row["encoder"].partition(":")[0][-2:] for row in published} == {"_t", "_b"}
    for row in published:
        path = "our fast CPU path" if row["encoder"].endswith(":our_scan") else "our plain reference loop"
        assert row["scan"].startswith(f"{path}, in place of mamba-ssm's CUDA kernel")
    for row in rows:
        assert row["difference_to_eager"] <= GATE, row["encoder"]
