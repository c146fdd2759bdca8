"""Where a student lies on the line from its anchor, and what is on that line."""

import pytest
import torch
import yaml
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.line import find_line, read_training


@pytest.fixture(scope="module")
def models(tiny_clip_dir):
    """The anchor and a student: another image encoder, the same text encoder."""
    anchor, student = (DCLIPModel.from_pretrained(tiny_clip_dir) for _ in range(2))
    with torch.no_grad():
        student.visual_projection.weight.mul_(2)
    return anchor, student


def save(folder, model, tiny_clip_dir, **arguments):
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil").save_pretrained(folder)
    if arguments:
        (folder / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    return str(folder)


def test_alpha_is_a_share_of_the_way_to_what_training_reached(models, tiny_clip_dir, tmp_path):
    anchor, student = models
    arguments = {"clip_model": str(tiny_clip_dir), "student": {"wise_ft_alpha": 0.5}}
    name = save(tmp_path / "student", student, tiny_clip_dir, **arguments)
    line = find_line(str(tiny_clip_dir), name, anchor, student)
    assert line.student_alpha == 0.5 and line.arguments == arguments
    assert line.described == (
        f"alpha counts from {tiny_clip_dir} (0) to the fine-tuned weights (1); {name} is alpha 0.5"
    )
    start = anchor.visual_projection.weight
    for alpha in (0, 0.25, 0.5, 0.75, 1):  # the student doubled the weight on half of the way: 1 + 2 * alpha
        found = line.weights(anchor, student, alpha)["visual_projection.weight"]
        torch.testing.assert_close(found, start * (1 + 2 * alpha), rtol=1e-6, atol=0)
    assert torch.equal(
        line.weights(anchor, student, 0.5)["visual_projection.weight"], student.visual_projection.weight
    )


@pytest.mark.parametrize(
    ("folder", "expected", "told"),
    [
        ("student", 0.5, "is alpha 0.5"),
        ("checkpoint-4", 1, "to the fine-tuned weights (1)"),  # saved before the weights were averaged
        ("without", 1, "which has no record of a training"),
        ("teacher", 1, "which has no record of a training"),  # another stage of a run that trains a student too
    ],
)
def test_a_student_without_averaged_weights_lies_at_the_end(models, tiny_clip_dir, tmp_path, folder, expected, told):
    arguments = {"student": {"wise_ft_alpha": 0.5}} if folder != "without" else {}
    name = save(tmp_path / folder, models[1], tiny_clip_dir, **arguments)
    if folder == "teacher":
        write_json(tmp_path / folder / "manifest.json", {"stage": "teacher"})
    line = find_line(str(tiny_clip_dir), name, *models)
    assert line.student_alpha == expected and line.described.endswith(told)


def test_training_counts_only_if_it_started_from_this_anchor(models, tiny_clip_dir, tmp_path):
    anchor, student = models
    half = {"student": {"wise_ft_alpha": 0.5}}
    copy = save(tmp_path / "copy", anchor, tiny_clip_dir)
    gone = str(tmp_path / "gone")
    first = save(tmp_path / "first", student, tiny_clip_dir, clip_model=copy, **half)
    second = save(tmp_path / "second", student, tiny_clip_dir, clip_model=first, **half)
    third = save(tmp_path / "third", student, tiny_clip_dir, clip_model=gone, **half)
    found = [find_line(str(tiny_clip_dir), name, anchor, student) for name in (first, second, third)]
    assert [line.student_alpha for line in found] == [0.5, 1, 0.5]  # a copy; a student of a student; only the texts
    assert found[1].described.endswith("second (1), whose training started from another model")
    assert found[1].arguments is None
    other = DCLIPModel.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        other.text_projection.weight.add_(1)
    assert find_line("elsewhere/clip", third, other, student).student_alpha == 1
    assert find_line(gone, third, other, student).student_alpha == 0.5  # a student whose text encoder learned too


def test_what_training_kept_nothing_of_has_no_line(models, tiny_clip_dir, tmp_path):
    name = save(tmp_path / "student", models[1], tiny_clip_dir, student={"wise_ft_alpha": 0})
    with pytest.raises(ValueError, match="got wise_ft_alpha 0 in .*arguments.yaml': its weights are those before"):
        find_line(str(tiny_clip_dir), name, *models)


def test_a_damaged_record_of_training_is_refused(tmp_path):
    for text, message in (
        ("student: {wise_ft_alpha: half}", "from 0 to 1 under student.wise_ft_alpha in .*arguments.yaml', got 'half'"),
        ("student: {wise_ft_alpha: 2}", "got 2"),
        ("student: [", "training's arguments"),
    ):
        (tmp_path / "arguments.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_training(tmp_path)
    (tmp_path / "arguments.yaml").write_text("dmclip: {}")
    assert read_training(tmp_path) is None and read_training("open_clip:a:b") is None
