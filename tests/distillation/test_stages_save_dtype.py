"""The type of saved weights: that of the CLIP a stage starts from, while training and checkpoints are float32."""

import json
import logging

import pytest
import torch
from datasets import load_from_disk
from fixtures.training import RECIPE, STEPS, equal, make_trainer, run, student_arguments, weights, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel

from modeling_dclip import DCLIPModel, DCLIPProcessor, DCLIPTeacher
from modeling_dclip.distillation.arguments import (
    AnchorArguments,
    DMCLIPArguments,
    StudentArguments,
    TeacherArguments,
    deciding_fields,
)
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.trainer import BatchesTrainer, cast_weights

CONTRASTIVE = {**RECIPE["student"], "cosine_distillation_loss_weight": 0.0}
WHOLE = ("--teacher.save_dtype", "float32", "--student.save_dtype", "float32")


def store_clip(tiny_clip_dir, folder, dtype):
    """A stock CLIP as others store it: every weight in one type, the logit scale too."""
    CLIPModel.from_pretrained(tiny_clip_dir, dtype=dtype).save_pretrained(folder)
    DCLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(folder)
    return folder


def check_types(folder, dtype):
    """All weights have the type, and the config says so; a logit scale is float32."""
    found = {name: tensor.dtype for name, tensor in weights(folder).items()}
    scales = {name for name in found if name.endswith("logit_scale")}
    assert len(scales) == 1 and all(found[name] == torch.float32 for name in scales)
    assert {kind for name, kind in found.items() if name not in scales} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def check_text_tower(folder, clip, prefix=""):
    saved, stored = weights(folder), weights(clip)
    texts = [name for name in stored if name.startswith("text_")]
    assert texts and all(torch.equal(saved[prefix + name], stored[name]) for name in texts)


@pytest.fixture(scope="module")
def trained(tiny_clip_dir, tmp_path_factory):
    """Teacher and student of a float16 CLIP: saved by default, and in float32."""
    folder = tmp_path_factory.mktemp("float16")
    clip = store_clip(tiny_clip_dir, folder / "clip", torch.float16)
    for name in ("auto", "float32"):
        path = write_recipe(folder, clip_model=str(clip), student=CONTRASTIVE, output_dir=str(folder / name))
        run(path, "--stages", "teacher,targets,student", *(WHOLE if name == "float32" else ()))
    return folder


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_float16_clip_gives_float16_models_of_the_same_training(trained, stage):
    saved, whole = (trained / name / stage for name in ("auto", "float32"))
    check_types(saved, torch.float16)
    check_types(whole, torch.float32)
    check_text_tower(saved, trained / "clip", "clip." if stage == "teacher" else "")
    assert equal(weights(saved), cast_weights(weights(whole), "float16"))
    checkpoints = [*saved.glob("checkpoint-*")]
    assert checkpoints and all(
        {one.dtype for one in weights(folder).values()} == {torch.float32} for folder in checkpoints
    )
    kind = DCLIPTeacher if stage == "teacher" else DCLIPModel
    loaded = dict(kind.from_pretrained(saved).named_parameters())
    assert loaded.pop("clip.logit_scale" if stage == "teacher" else "logit_scale").dtype == torch.float32
    assert {one.dtype for one in loaded.values()} == {torch.float16}  # without a word from the reader


def test_outputs_of_a_float16_student_are_those_of_the_float32_one_but_for_rounding(trained):
    first, second = (DCLIPModel.from_pretrained(trained / name / "student", dtype=torch.float32).eval() for name in
                     ("auto", "float32"))  # fmt: skip
    pixels = torch.randn(
        4, 3, *[first.config.vision_config.image_size] * 2, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        embeds = [
            torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
            for model in (first, second)
        ]
    assert 0 < (embeds[0] - embeds[1]).abs().max() < 4 * torch.finfo(torch.float16).eps


def test_a_bfloat16_clip_gives_a_bfloat16_teacher_and_a_merged_student_beside_a_float32_adapter(
    tiny_clip_dir, tmp_path, caplog
):
    clip = store_clip(tiny_clip_dir, tmp_path / "clip", torch.bfloat16)
    path = write_recipe(tmp_path, clip_model=str(clip), student={**RECIPE["student"], "lora_rank": 2})
    with caplog.at_level(logging.INFO):
        out = run(path)  # the student's targets are the saved teacher's
    for stage in ("teacher", "student"):
        check_types(out / stage, torch.bfloat16)
        assert f"{stage}: trained in float32, and saved in bfloat16, as the CLIP '{clip}' is stored" in caplog.text
    check_text_tower(out / "student", clip)
    assert {one.dtype for one in load_file(out / "student/adapter/adapter_model.safetensors").values()} == {
        torch.float32
    }
    merged = PeftModel.from_pretrained(load_student(str(clip)), out / "student" / "adapter").merge_and_unload()
    assert equal(weights(out / "student"), cast_weights(merged.state_dict(), "bfloat16"))


def test_a_run_killed_after_its_last_checkpoint_saves_the_same_bytes(trained, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, clip_model=str(trained / "clip"), student=CONTRASTIVE)

    def die(self, dtype):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BatchesTrainer, "save_result", die)
        with pytest.raises(KeyboardInterrupt):
            run(path, "--stages", "targets,student")
    assert not (tmp_path / "run/student/model.safetensors").exists()
    run(path, "--stages", "targets,student")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run/student" / name).read_bytes() == (trained / "auto/student" / name).read_bytes()


def test_a_new_anchor_and_a_teacher_without_a_block_are_saved_in_the_type_that_is_asked_for(tmp_path):
    anchor = {**RECIPE["anchor"], "save_dtype": "float16"}
    teacher = {**STEPS, "cross_attention": "none"}
    out = run(write_recipe(tmp_path, anchor=anchor, teacher=teacher), "--stages", "anchor,teacher")
    for stage in ("anchor", "teacher"):
        check_types(out / stage, torch.float16)
    again = run(tmp_path / "recipe.yaml", "--stages", "teacher", "--teacher.save_dtype", "bfloat16", "--overwrite",
                "true")  # fmt: skip
    check_types(again / "teacher", torch.bfloat16)


def test_a_teacher_saved_in_a_shorter_type_than_its_clip_still_is_its_teacher(tiny_clip_dir, tmp_path):
    path = write_recipe(tmp_path, clip_model=str(tiny_clip_dir))
    out = run(path, "--teacher.save_dtype", "bfloat16")
    check_types(out / "teacher", torch.bfloat16)
    check_types(out / "student", torch.float32)


def test_a_weight_that_overflows_is_refused_before_anything_is_written(
    tiny_clip_dir, distillation_data, processor, tmp_path
):
    args = student_arguments(tmp_path / "student")
    trainer = make_trainer(tiny_clip_dir, load_from_disk(distillation_data), processor, args)
    with torch.no_grad():
        trainer.dual_encoder.visual_projection.weight[0, 0] = -65519  # rounds to the largest number of float16
        trainer.save_result("float16")
        before = weights(tmp_path / "student")
        trainer.dual_encoder.visual_projection.weight[0, 0] = -65520
    told = r"\+-65504 .* float16, got 1 .*visual_projection.weight \(65520\). Nothing was saved. Set student.save_"
    with pytest.raises(ValueError, match=told + "dtype to float32 or bfloat16"):
        trainer.save_result("float16")
    assert before["visual_projection.weight"][0, 0] == -65504 and equal(weights(tmp_path / "student"), before)
    trainer.save_result("bfloat16")
    assert weights(tmp_path / "student")["visual_projection.weight"].dtype == torch.bfloat16


def test_a_type_decides_the_result_only_where_it_is_named():
    for kind in (StudentArguments, TeacherArguments, DMCLIPArguments):
        assert "save_dtype" not in deciding_fields(kind(output_dir="x", use_cpu=True))
        named = deciding_fields(kind(output_dir="x", use_cpu=True, save_dtype="float32"))
        assert named["save_dtype"] == "float32"
    assert deciding_fields(AnchorArguments(output_dir="x", use_cpu=True))["save_dtype"] == "float32"


def test_a_type_for_an_adapter_alone_is_refused():
    with pytest.raises(ValueError, match="save_dtype: expected auto or float32 without merge_adapter.*got float16"):
        StudentArguments(output_dir="x", use_cpu=True, lora_rank=2, merge_adapter=False, save_dtype="float16")
