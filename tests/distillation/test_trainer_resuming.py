"""Resuming: from every checkpoint of every trainer a run ends as if it had never stopped."""

import json
import os
import shutil

import pytest
from datasets import load_from_disk
from fixtures.training import equal, student_arguments
from safetensors.torch import load_file
from transformers import AutoTokenizer, set_seed

from modeling_dclip import DCLIPProcessor, DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.collation import AnchorBatches, TeacherBatches
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.reinforced import ReinforcedBatches, SampleView
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings
from modeling_dclip.data.reinforced.teachers import build_teacher
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.data.teacher_targets import FeatureOptions, TeacherFeatures, compute_features
from modeling_dclip.distillation.arguments import AnchorArguments, DMCLIPArguments, TeacherArguments
from modeling_dclip.distillation.dmclip import build_dmclip
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.distillation.trainer import AnchorTrainer, DMCLIPTrainer, TeacherTrainer, train_or_resume

STEPS = {
    "per_device_train_batch_size": 3,  # of 16 rows: five batches an epoch
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": None,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "report_to": "none",
}
DMCLIP = {
    "image_size": 32,
    "vision_config": {
        **{"stem_dim": 4, "hidden_size": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
        "drop_path_rate": 0.5,  # draws from torch's generator in every step
    },
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "projection_dim": 8,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def inputs(tiny_clip_dir, distillation_data, tmp_path_factory):
    """What the trainers read: a CLIP, rows with targets, features and shards of 16 scenes."""
    folder = tmp_path_factory.mktemp("inputs")
    scenes = load_scenes("train", n=16, image_size=32, captions_per_image=2)
    write_reinforced(
        scenes,
        [build_teacher(str(tiny_clip_dir))],
        output=folder / "shards",
        settings=AugmentationSettings(32),
        augmentations=2,
        samples_per_shard=4,
    )
    teacher = DCLIPTeacher.from_clip(tiny_clip_dir)
    processor = DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir)
    features = compute_features(scenes, teacher, processor, FeatureOptions(folder / "cache"), keys=row_keys(scenes))
    return {
        "clip": str(tiny_clip_dir),
        "scenes": scenes,
        "targets": load_from_disk(distillation_data),
        "features": TeacherFeatures.load(features),
        "shards": folder / "shards",
    }


def train(kind, inputs, folder, **options):
    """Train or resume in a folder, and save the model there."""
    options, processor = {**STEPS, **options}, DCLIPProcessor.from_pretrained(inputs["clip"])
    set_seed(0)
    if kind in ("student", "lora"):
        lora = {"lora_rank": 2, "lora_dropout": 0.1} if kind == "lora" else {"min_crop_area": 0.5}
        args = student_arguments(folder, **{"max_steps": -1, **options, **lora})
        return fit_student(load_student(inputs["clip"]), args, inputs["targets"], processor, {}).state
    if kind == "anchor":
        args = AnchorArguments(output_dir=str(folder), **options)
        model = load_student(inputs["clip"])
        trainer = AnchorTrainer(model, args, AnchorBatches(inputs["scenes"], processor), processor, {})
    elif kind == "teacher":
        args = TeacherArguments(output_dir=str(folder), **options)
        teacher = DCLIPTeacher.from_clip(inputs["clip"])
        trainer = TeacherTrainer(teacher, args, TeacherBatches(inputs["features"]), processor, {})
    else:
        args = DMCLIPArguments(output_dir=str(folder), **DMCLIP, **options)
        model, processor = build_dmclip(args, AutoTokenizer.from_pretrained(inputs["clip"]))
        view = SampleView(image_size=32)
        batches = ReinforcedBatches(inputs["shards"], processor.tokenizer, view, batch_size=3, shuffle_buffer=5)
        trainer = DMCLIPTrainer(model, args, batches, processor, {})
    train_or_resume(trainer, folder)
    trainer.save_model()
    return trainer.state


def weights(folder):
    return {
        f"{path.parent.name}/{name}" if path.parent != folder else name: tensor
        for path in (folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors")
        if path.is_file()
        for name, tensor in load_file(path).items()
    }


def history(folder):
    """Step, losses, epoch and norm of each log, without times."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [
        {name: value for name, value in log.items() if "runtime" not in name and "per_second" not in name}
        for log in state["log_history"]
        if "train_runtime" not in log
    ]


def stop_at(whole, folder, step):
    """A copy of a run as it was when its checkpoint at this step had been written."""
    folder.mkdir()
    for path in whole.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) <= step:
            shutil.copytree(path, folder / path.name)


SCHEDULES = {
    "two epochs": {"num_train_epochs": 2},
    "one and a half epochs": {"num_train_epochs": 1.5},
    "steps to an epoch's end": {"max_steps": 6},
    "steps into an epoch": {"max_steps": 7},
}


def sweep(kind, accumulation, schedule, inputs, tmp_path, checkpoints=None):
    options = {**SCHEDULES[schedule], "gradient_accumulation_steps": accumulation}
    whole = tmp_path / "whole"
    state = train(kind, inputs, whole, **options)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in whole.glob("checkpoint-*"))
    assert steps == list(range(1, state.max_steps + 1)) and state.global_step == state.max_steps
    for step in steps if checkpoints is None else checkpoints:
        folder = tmp_path / f"from-{step}"
        stop_at(whole, folder, step)
        resumed = train(kind, inputs, folder, **options)
        assert resumed.global_step == state.global_step, step
        assert equal(weights(folder), weights(whole)), step
        assert history(folder) == history(whole), step


@pytest.mark.parametrize(
    ("kind", "accumulation", "schedule", "checkpoints"),
    [
        ("dmclip", 2, "steps into an epoch", [1, 4, 7]),  # five batches in twos: the third step of an epoch has one
        ("dmclip", 1, "one and a half epochs", [5, 8]),
        ("student", 2, "one and a half epochs", [4, 5]),
        ("lora", 1, "steps into an epoch", [6, 7]),
        ("anchor", 1, "steps into an epoch", [7]),
        ("teacher", 1, "steps into an epoch", [7]),
    ],
)
def test_a_checkpoint_leads_to_the_same_weights(kind, accumulation, schedule, checkpoints, inputs, tmp_path):
    sweep(kind, accumulation, schedule, inputs, tmp_path, checkpoints)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(inputs, tmp_path, caplog):
    train("teacher", inputs, tmp_path / "whole", max_steps=4)
    stop_at(tmp_path / "whole", tmp_path / "damaged", 3)
    os.truncate(tmp_path / "damaged" / "checkpoint-3" / "optimizer.pt", 100)
    train("teacher", inputs, tmp_path / "damaged", max_steps=4)
    assert "checkpoint-3 is incomplete" in caplog.text
    assert equal(weights(tmp_path / "damaged"), weights(tmp_path / "whole"))
    assert history(tmp_path / "damaged") == history(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif("RESUME_EVERYWHERE" not in os.environ, reason="set RESUME_EVERYWHERE=1: takes minutes")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["anchor", "teacher", "student", "lora", "dmclip"])
def test_every_checkpoint_leads_to_the_same_weights(kind, accumulation, schedule, inputs, tmp_path):
    sweep(kind, accumulation, schedule, inputs, tmp_path)
