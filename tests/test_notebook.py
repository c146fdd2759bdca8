"""The notebook: it runs from top to bottom, offline, and what it shows is what a run of it gave."""

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "finetune_on_your_captions.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def shown_text():
    return "".join(
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in CODE
        for output in cell["outputs"]
    )


def recalls(text, model):
    """Text-to-image and image-to-text R@1 of a model, in percent, from the notebook's table."""
    (row,) = re.findall(rf"^{model} +([\d.]+)% \[.*?\] +([\d.]+)% \[.*?\]$", text, flags=re.MULTILINE)
    return [float(value) for value in row]


def test_it_runs_offline_and_ends_with_a_better_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n\n".join("".join(cell["source"]) for cell in CODE), str(NOTEBOOK), "exec"), {})
    text = printed.getvalue()
    anchor, student = recalls(text, "anchor"), recalls(text, "student")
    assert all(after > before for before, after in zip(anchor, student, strict=True))
    assert "\nstudent is better than anchor at retrieval" in text
    assert "DCLIPModel: weights" in text
    # of 72 pictures and of their captions one: what the page shows is of these very pictures
    assert all(abs(now - shown) < 1.5 for now, shown in zip(anchor, recalls(shown_text(), "anchor"), strict=True))


def test_what_it_shows_comes_from_one_run_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}  # no bars
    pictures = [output for output in outputs if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 3  # pictures, curves, what a search found
    assert all(
        after > before
        for before, after in zip(recalls(shown_text(), "anchor"), recalls(shown_text(), "student"), strict=True)
    )


def test_it_shows_no_path_of_the_machine_it_ran_on():
    assert not re.search(r"/(work|tmp|home|root|Users)/", NOTEBOOK.read_text(encoding="utf-8"))
