"""The help names every kind of benchmark with the forms that its sources state, and waits for no model."""

import subprocess
import sys
from pathlib import Path

import pytest

from modeling_dclip.data.captions import CAPTION_SOURCES
from modeling_dclip.data.labels import LABEL_SOURCES
from modeling_dclip.data.questions import QUESTION_SOURCES
from modeling_dclip.evaluation.benchmarks.forms import KIND_HELP, describe_kinds
from modeling_dclip.evaluation.benchmarks.kinds import KINDS

ROOT = Path(__file__).resolve().parents[3]
CAPTIONED = [source.form for name, source in CAPTION_SOURCES.items() if name != "images"]  # these have no captions


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        *((kind, CAPTIONED) for kind in ("retrieval", "diagnostics", "hessian")),
        ("zero_shot", [*(source.form for source in LABEL_SOURCES.values()), "suite:ROOT[:SPLIT]"]),
        ("fine_grained", [source.form for source in QUESTION_SOURCES.values()]),
        ("efficiency", [""]),
    ],
)
def test_a_kind_has_the_forms_of_its_sources(kind, forms):
    assert KIND_HELP[kind].forms == ", ".join(forms)


def test_every_kind_is_described():
    assert list(KINDS) == list(KIND_HELP)
    assert all(f"  {kind}" in describe_kinds() for kind in KINDS)


def test_the_help_loads_no_pytorch():
    loaded = "import sys; from modeling_dclip.evaluation import command_line; sys.exit('torch' in sys.modules)"
    script = f"import sys; sys.modules['__main__'].__file__ = {str(ROOT / 'eval.py')!r}; {loaded}"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0  # a process without pytest's own
