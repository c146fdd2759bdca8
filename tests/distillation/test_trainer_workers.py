"""Workers of data loaders keep time: those that outlive an epoch draw as the main process does, and resume."""

import shutil

import pytest
import torch
from datasets import load_from_disk
from fixtures.training import student_arguments
from transformers import set_seed

from modeling_dclip import DCLIPProcessor
from modeling_dclip.data.reinforced import ReinforcedBatches, SampleView
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings
from modeling_dclip.data.reinforced.teachers import build_teacher
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.distillation.arguments import DMCLIPArguments
from modeling_dclip.distillation.dmclip import build_dmclip
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.distillation.trainer import BatchesTrainer, DMCLIPTrainer, train_or_resume

STEPS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 50,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "report_to": "none",
}
DMCLIP = {
    "image_size": 32,
    "vision_config": {"stem_dim": 4, "hidden_size": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "projection_dim": 8,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def shards(tiny_clip_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reinforced") / "shards"
    write_reinforced(
        load_scenes("train", n=14, image_size=32, captions_per_image=3),
        [build_teacher(str(tiny_clip_dir))],
        output=folder,
        settings=AugmentationSettings(32),
        augmentations=3,
        samples_per_shard=4,
    )
    return folder


def as_list(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def given(monkeypatch):
    """The batches that trainers were given, in order."""
    batches, compute_loss = [], BatchesTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        batches.append({name: as_list(value) for name, value in inputs.items()})
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(BatchesTrainer, "compute_loss", spy)
    return batches


def train(kind, folder, tiny_clip_dir, data, **options):
    set_seed(0)
    processor, options = DCLIPProcessor.from_pretrained(tiny_clip_dir), {**STEPS, **options}
    if kind == "student":
        args = student_arguments(folder, **{"max_steps": -1, "min_crop_area": 0.5, **options})
        fit_student(load_student(str(tiny_clip_dir)), args, load_from_disk(data), processor, {})
        return
    args = DMCLIPArguments(output_dir=str(folder), **DMCLIP, **options)
    model, processor = build_dmclip(args, processor.tokenizer)
    batches = ReinforcedBatches(data, processor.tokenizer, SampleView(image_size=32), batch_size=4, shuffle_buffer=5)
    train_or_resume(DMCLIPTrainer(model, args, batches, processor, {}), folder)


def equal_batches(some, others):
    return len(some) == len(others) and all(one == other for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", ["student", "dmclip"])
def test_workers_that_outlive_an_epoch_train_on_the_draws_of_the_main_process(
    kind, tiny_clip_dir, distillation_data, shards, given, tmp_path
):
    data = distillation_data if kind == "student" else shards
    train(kind, tmp_path / "alone", tiny_clip_dir, data)
    alone = given.copy()
    steps = len(alone) // 3
    assert len(alone) == 3 * steps and not equal_batches(alone[:steps], alone[steps : 2 * steps])
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "save_steps": steps + 1}
    given.clear()
    train(kind, tmp_path / "workers", tiny_clip_dir, data, **options)
    assert equal_batches(given, alone)
    given.clear()
    shutil.rmtree(tmp_path / "workers" / f"checkpoint-{2 * steps + 2}")
    shutil.rmtree(tmp_path / "workers" / f"checkpoint-{3 * steps}", ignore_errors=True)
    train(kind, tmp_path / "workers", tiny_clip_dir, data, **options)
    assert equal_batches(given, alone[steps + 1 :])
