"""DM-CLIP's trainer: its loss against the losses' own, and two processes against one."""

import math
from pathlib import Path

import pytest
import torch
from fixtures.processes import train_together
from safetensors.torch import load_file
from transformers import AutoTokenizer, set_seed

from modeling_dclip import DCLIPModel, DCLIPProcessor
from modeling_dclip.data.collation import AnchorBatches
from modeling_dclip.data.reinforced import ReinforcedBatches, SampleView
from modeling_dclip.data.reinforced.augmentations import AugmentationSettings
from modeling_dclip.data.reinforced.teachers import build_teacher
from modeling_dclip.data.reinforced.writer import write_reinforced
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.distillation.arguments import AnchorArguments, DMCLIPArguments
from modeling_dclip.distillation.dmclip import build_dmclip
from modeling_dclip.distillation.losses import contrastive_loss, distillation_loss
from modeling_dclip.distillation.trainer import MAX_LOGIT_SCALE, AnchorTrainer, DMCLIPTrainer

SIZES = {
    "image_size": 32,
    "vision_config": {"stem_dim": 4, "hidden_size": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "projection_dim": 8,
}


@pytest.fixture(scope="module")
def shards(tiny_clip_dir, tmp_path_factory):
    """Eight scenes in two files, embedded by the tiny CLIP twice."""
    folder = tmp_path_factory.mktemp("reinforced") / "shards"
    teachers = [build_teacher(str(tiny_clip_dir)) for _ in range(2)]
    options = {"augmentations": 2, "samples_per_shard": 4, "synthetic_captions": "coarse_caption"}
    scenes = load_scenes("train", n=8, image_size=32, captions_per_image=2)
    write_reinforced(scenes, teachers, output=folder, settings=AugmentationSettings(32), **options)
    return folder


def make_trainer(clip_dir, shards, folder, **options):
    steps = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = DMCLIPArguments(output_dir=str(folder), per_device_train_batch_size=8, **{**SIZES, **steps, **options})
    set_seed(0)
    model, processor = build_dmclip(args, AutoTokenizer.from_pretrained(clip_dir))
    batches = ReinforcedBatches(shards, processor.tokenizer, SampleView(image_size=32), batch_size=8)
    return DMCLIPTrainer(model, args, batches, processor, {})


@pytest.mark.parametrize("weights", [(0.25, 0.75), (1.0, 0.0), (0.0, 1.0)])
def test_the_first_step_has_the_loss_of_the_untouched_model(tiny_clip_dir, shards, tmp_path, weights):
    names = ("contrastive_loss_weight", "distillation_loss_weight")
    options = {
        **dict(zip(names, weights, strict=True)),
        "vision_config": {**SIZES["vision_config"], "drop_path_rate": 0.0},
    }
    trainer = make_trainer(tiny_clip_dir, shards, tmp_path, teacher_logit_scale=50.0, **options)
    model = trainer.model.train()
    (batch,) = trainer.train_dataset
    image_embeds = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    temperature = math.exp(-model.config.logit_scale_init_value)
    expected = {}
    for text in ("", "synthetic_"):
        tokens = {name: batch[f"{text}{name}"] for name in ("input_ids", "attention_mask")}
        text_embeds = model.get_text_features(**tokens).pooler_output
        teachers = batch["teacher_image_embeds"], batch[f"teacher_{text}text_embeds"]
        contrastive = contrastive_loss(image_embeds, text_embeds, temperature)
        distilled = distillation_loss(image_embeds, text_embeds, *teachers, [16, 16], [50.0, 50.0], temperature)
        expected |= {f"{text}contrastive_loss": contrastive.item(), f"{text}distillation_loss": distilled.item()}
    trainer.train_dataset.resume(0, 0)
    trainer.train()
    log, total = trainer.state.log_history[0], 0.0
    for text in ("", "synthetic_"):
        for name, weight in zip(("contrastive_loss", "distillation_loss"), weights, strict=True):
            assert (f"{text}{name}" in log) == (weight > 0)
            total += weight * expected[f"{text}{name}"]
            if weight:
                assert log[f"{text}{name}"] == pytest.approx(expected[f"{text}{name}"], abs=1e-3)
    assert log["loss"] == pytest.approx(total, abs=1e-3)


def test_teachers_are_scaled_as_trained_unless_a_scale_is_given(tiny_clip_dir, shards, tmp_path):
    trained = math.exp(build_teacher(str(tiny_clip_dir)).logit_scale)
    assert make_trainer(tiny_clip_dir, shards, tmp_path).teacher_logit_scales == pytest.approx([trained, trained])
    given = make_trainer(tiny_clip_dir, shards, tmp_path, teacher_logit_scale=100.0)
    assert given.teacher_logit_scales == [100.0, 100.0]


def test_the_scans_rates_and_skips_do_not_decay(tiny_clip_dir, shards, tmp_path):
    trainer = make_trainer(tiny_clip_dir, shards, tmp_path)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert any(name.endswith("in_proj.weight") for name in decayed)
    assert not any(name.endswith((".A_log", ".D", ".bias", "logit_scale")) for name in decayed)


def test_the_scale_is_learned_and_the_model_trains(tiny_clip_dir, shards, tmp_path):
    trainer = make_trainer(tiny_clip_dir, shards, tmp_path, max_steps=30, learning_rate=1e-2, warmup_steps=0)
    before = float(trainer.model.logit_scale)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.3
    assert float(trainer.model.logit_scale) != before


def make_anchor_trainer(clip_dir, folder, **options):
    steps = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "warmup_steps": 0}
    args = AnchorArguments(output_dir=str(folder), per_device_train_batch_size=8, **{**steps, **options})
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    scenes = load_scenes("train", n=8, image_size=32, captions_per_image=1)
    return AnchorTrainer(DCLIPModel.from_pretrained(clip_dir), args, AnchorBatches(scenes, processor), processor, {})


@pytest.mark.parametrize("kind", ["anchor", "dmclip"])
@pytest.mark.parametrize("start", [MAX_LOGIT_SCALE, 5.0])  # at the bound, and from a checkpoint that is past it
def test_the_scale_is_saved_within_its_bound_and_comes_down_again(kind, start, tiny_clip_dir, shards, tmp_path):
    bound = torch.tensor(MAX_LOGIT_SCALE)

    def step(start, direction):
        # SGD on one gradient: a step of 0.5 in the direction asked for, whatever the batch says.
        options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "weight_decay": 0.0}
        if kind == "anchor":
            trainer = make_anchor_trainer(tiny_clip_dir, tmp_path, lr_scheduler_type="constant", **options)
        else:
            options |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
            trainer = make_trainer(tiny_clip_dir, shards, tmp_path, **options)
        scale, gradients = trainer.model.logit_scale, []
        scale.data.fill_(start)
        scale.register_hook(lambda gradient: gradients.append(gradient) or torch.full_like(gradient, -direction))
        trainer.train()
        trainer.save_model()
        assert gradients[0] != 0  # the bound lets it through
        return load_file(tmp_path / "model.safetensors")["logit_scale"]

    up = step(start, 1.0)
    torch.testing.assert_close(up, bound, rtol=0, atol=0)
    torch.testing.assert_close(step(float(up), -1.0), bound - 0.5)


def test_two_processes_train_as_one_does(tiny_clip_dir, shards, tmp_path):
    script = Path(__file__).with_name("run_dmclip.py")
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        train_together(script, processes, tiny_clip_dir, shards, folder, processes)
        results.append(load_file(folder / "results.safetensors"))
    alone, shared = results
    assert alone.keys() == shared.keys()
    assert sum(name.startswith("loss/") for name in alone) >= 2 * 5
    for name, value in alone.items():
        torch.testing.assert_close(
            shared[name], value, rtol=1e-4, atol=2e-6, msg=lambda message, name=name: f"{name}: {message}"
        )
