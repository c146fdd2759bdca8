"""What training and evaluation leave behind, tiny: folders of a student, a teacher, a DM-CLIP,
with arguments and results.
"""

import json

import torch
import yaml
from transformers import AutoModel

from modeling_dclip import (
    DCLIPModel,
    DCLIPProcessor,
    DCLIPTeacher,
    DCLIPTeacherProcessor,
    DMCLIPConfig,
    DMCLIPModel,
)
from modeling_dclip.distillation.recipes import parse_recipe
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.evaluation.records import make_record, write_results
from modeling_dclip.hub.publish.facts import PublishArguments

RETRIEVAL = "retrieval=scenes:test,n=8"
HOME = "/home/somebody/secret"  # a place on the machine that trained, which no card may tell
STATE = {"global_step": 12, "epoch": 2.0, "log_history": [{"loss": 1.0}, {"train_runtime": 90.0}]}


def _finish(folder, sections, *words):
    arguments = parse_recipe(
        ["--train_datasets", "scenes:train,n=8", f"coco:{HOME}/captions.json:{HOME}/images@8", *words]
    ).resolved(*sections)
    (folder / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    (folder / "trainer_state.json").write_text(json.dumps(STATE))


def make_student(
    folder, clip_dir, *, seed=1, dtype=torch.float32, words=("--clip_model", "openai/clip-vit-base-patch16")
):
    """A student whose image encoder has moved."""
    model = DCLIPModel.from_pretrained(clip_dir)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    scale = model.logit_scale.data
    model.to(dtype).logit_scale.data = scale
    model.save_pretrained(folder)
    DCLIPProcessor.from_pretrained(clip_dir).save_pretrained(folder)
    _finish(folder, ("regions", "teacher", "targets", "student"), *words)
    return folder


def make_teacher(folder, clip_dir, **config):
    DCLIPTeacher.from_clip(str(clip_dir), **config).save_pretrained(folder)
    DCLIPTeacherProcessor.from_pretrained(clip_dir).save_pretrained(folder)
    _finish(folder, ("regions", "teacher"))
    return folder


def make_dmclip(folder, clip_dir, *words):
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    tokenizer = processor.tokenizer
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"hidden_size": 8, "stem_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "image_size": 32}
    torch.manual_seed(3)
    DMCLIPModel(DMCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    processor.save_pretrained(folder)
    _finish(folder, ("reinforce", "dmclip"), "--reinforce.teachers", "openai/clip-vit-large-patch14", *words)
    return folder


def write_records(path, *models, anchor=None, teacher=None):
    """Results of models, of the anchor they are compared with, and of what a teacher leaks."""
    records = []
    shared = {"n": 8, "seed": 0, "split": "test", "dataset_fingerprint": "sha256:00", "command": "eval.py"}
    revisions = {
        folder: model_revision(folder, AutoModel.from_pretrained(folder))
        for folder in (*models, *filter(None, [anchor, teacher]))
    }
    for number, model in enumerate(models):
        metrics = {"text_to_image_recall@1": 0.25 + number / 8, "image_to_text_recall@1": 0.5}
        interval = {"estimate": 0.5, "low": 0.25, "high": 0.75, "confidence": 0.95, "covers": "images"}
        comparison = None
        if anchor:
            comparison = {
                "anchor": str(anchor),
                "anchor_revision": revisions[anchor],
                "text_to_image_recall@1_gain": interval,
            }
        named = {"model": str(model), "label": f"arm {number}", "revision": revisions[model], "comparison": comparison}
        records.append(make_record(benchmark=RETRIEVAL, metrics=metrics, **named, **shared))
        records.append(
            make_record(
                benchmark=f"zero_shot=parquet:{HOME}/test.parquet",
                metrics={"top1": 0.375, "top5": 1.0},
                **named,
                **shared,
            )
        )
    if anchor:
        fields = {"model": str(anchor), "label": "anchor", "revision": revisions[anchor], **shared}
        metrics = {"text_to_image_recall@1": 0.125, "image_to_text_recall@1": 0.25}
        records.append(make_record(benchmark=RETRIEVAL, metrics=metrics, **fields))
    write_results(path / "records.json", records)
    (path / "summary.json").write_text("{}")
    if teacher:
        leaks = [
            make_record(
                model=str(teacher),
                benchmark="leakage=scenes:test,n=8",
                revision=revisions[teacher],
                condition=condition,
                metrics={"text_to_teacher_recall@1": value},
                **shared,
            )
            for condition, value in (("as_trained", 0.875), ("regions_shuffled", 0.625), ("chance", 0.125))
        ]
        write_results(path / "leakage.json", leaks)
    return path


def make_arguments(model, results, **fields):
    defaults = {"repo_id": "me/tiny", "license": "mit"}
    return PublishArguments(model=str(model), results=[str(results)], **{**defaults, **fields})
