"""Arguments: each field says what it is, and what decides a result is told from what does not."""

import dataclasses

import pytest
from transformers import TrainingArguments

from modeling_dclip import DCLIPTeacherConfig
from modeling_dclip.data.reinforced.__main__ import ReinforcedWriterArguments
from modeling_dclip.distillation import arguments
from modeling_dclip.distillation.arguments import (
    SECTIONS,
    DMCLIPArguments,
    ReinforceArguments,
    StudentArguments,
    TeacherArguments,
    deciding_fields,
)
from modeling_dclip.distillation.recipes import describe_fields
from train import FIELDS


@pytest.mark.parametrize("kind", [arguments.RunArguments, *SECTIONS.values()], ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_is(kind):
    for field in dataclasses.fields(kind):
        assert not field.init or len(field.metadata.get("help", "")) > 5, f"{kind.__name__}.{field.name}"


def test_help_lists_every_field_of_ours():
    text = describe_fields()
    for name in (
        "--seed",
        "--anchor.vision_config",
        "--teacher.text_share",
        "--student.wise_ft_alpha",
        "--targets.chunk_rows",
    ):
        assert f"{name} (default" in text


def test_the_help_that_train_py_shows_is_up_to_date():
    assert FIELDS.read_text("utf-8") == describe_fields() + "\n", "run python -m modeling_dclip.distillation.recipes"


def test_help_begins_with_what_people_set_and_shows_choices_and_defaults():
    lines = describe_fields().splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert shown[:4] == ["--clip_model", "--train_datasets", "--output_dir", "--train_fraction"]
    assert "  --regions.on_bad_image {raise,skip} (default raise)" in lines
    assert "  --student.lora_rank (default none)" in lines
    assert max(map(len, lines)) <= 120 and len(shown) == len(set(shown))


def test_the_teachers_section_holds_every_choice_of_its_config():
    own = {f.name for f in dataclasses.fields(DCLIPTeacherConfig)} - {"clip_config", "layer_norm_eps"}
    inherited = {f.name for f in dataclasses.fields(DCLIPTeacherConfig.__mro__[1])}
    architecture = TeacherArguments(output_dir="x").architecture()
    assert architecture.keys() == own - inherited
    config = DCLIPTeacherConfig()
    assert architecture == {name: getattr(config, name) for name in architecture}


def test_only_fields_that_decide_the_result_count():
    plain = deciding_fields(StudentArguments(output_dir="a"))
    loud = StudentArguments(
        output_dir="b", logging_steps=1, save_strategy="no", dataloader_num_workers=2, image_cache_mib=1
    )
    assert deciding_fields(loud) == plain
    for change in (
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"freeze": ["a"]},
        {"temperature": 0.1},
        {"bf16": True, "use_cpu": True},
    ):
        assert deciding_fields(StudentArguments(output_dir="a", **change)) != plain


@pytest.mark.parametrize(
    ("weights", "columns"),
    [
        ({}, ["teacher_embeds", "text_embeds"]),
        ({"cosine_distillation_loss_weight": 0.0}, ["text_embeds"]),
        ({"contrastive_loss_weight": 0.0}, ["teacher_embeds"]),
        ({"cosine_preservation_loss_weight": 0.3}, ["teacher_embeds", "text_embeds", "anchor_embeds"]),
        (
            {
                "cosine_distillation_loss_weight": 0.0,
                "contrastive_loss_weight": 0.0,
                "similarity_distillation_loss_weight": 1.0,
            },
            ["teacher_embeds", "text_embeds"],
        ),
    ],
)
def test_only_the_columns_that_a_loss_reads_are_asked_for(weights, columns):
    assert StudentArguments(output_dir="x", **weights).columns == columns


def test_the_writers_command_line_has_the_sections_names_and_defaults():
    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(kind)}
        for kind in (ReinforceArguments, ReinforcedWriterArguments)
    )
    shared = ours.keys() & theirs.keys() - {
        "teachers",
        "image_size",
    }  # a list in a recipe; by default dmclip.image_size
    assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}
    assert theirs.keys() - ours.keys() == {"dataset", "output"} and ours.keys() - theirs.keys() == {"folder"}
    assert theirs["image_size"] == DMCLIPArguments(output_dir="x").image_size


def test_several_gpus_of_one_process_are_not_used_by_data_parallel(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    args = StudentArguments(output_dir=str(tmp_path), per_device_train_batch_size=8)
    assert args.n_gpu == 1 and args.train_batch_size == 8
