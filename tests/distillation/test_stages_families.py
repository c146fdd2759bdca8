"""Students of every family: one small step, what moves, what is saved, and what is refused before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from fixtures.tiny_dual_encoders import VISION, save_dual_encoder
from fixtures.training import STEPS, equal, student_arguments, write_recipe
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoProcessor,
    GPT2Config,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.captions import load_mix
from modeling_dclip.data.collation import TokenizedStudentBatches
from modeling_dclip.data.columns import Ragged, with_flat_embeds, with_ragged_embeds
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.distillation.checks import check_recipe
from modeling_dclip.distillation.recipes import parse_recipe
from modeling_dclip.distillation.run import load_matching_teacher, load_student, read_clip
from modeling_dclip.distillation.stages import fit_student, run_stages
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.families import image_modules, projected, shared_width, tokenize_texts
from modeling_dclip.encoders.loading import load_checked, load_dual_encoder, load_merged, load_processor
from modeling_dclip.evaluation.embedding import embed_images, embed_texts

NATIVE = ["siglip", "altclip", "chinese_clip", "metaclip_2", "vision_text", "timm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(family)`: of a random checkpoint, made once."""
    made = {}

    def folder(family):
        if family == "timm":
            pytest.importorskip("timm", reason="needs timm")
        if family not in made:
            made[family] = save_dual_encoder(family, tmp_path_factory.mktemp(family))
        return str(made[family])

    return folder


@pytest.fixture(scope="module")
def scenes():
    return load_scenes("train", n=8, captions_per_image=2, image_size=32)


def with_targets(scenes, width):
    """Random targets of a width, as columns."""
    draw = np.random.default_rng(1)
    for name in ("teacher_embeds", "text_embeds"):
        values = draw.standard_normal((2 * len(scenes), width)).astype(np.float16)
        scenes = with_ragged_embeds(scenes, name, Ragged.from_lengths(values, np.full(len(scenes), 2)))
    return with_flat_embeds(scenes, "anchor_embeds", draw.standard_normal((len(scenes), width)).astype(np.float16))


def fit(folder, scenes, output, **options):
    model = load_student(folder)
    args = student_arguments(output, cosine_preservation_loss_weight=1.0, **{"max_steps": 1, **options})
    trainer = fit_student(
        model, args, with_targets(scenes, shared_width(model.config)), load_processor(folder), {"student": {}}
    )
    return trainer.dual_encoder


@pytest.mark.parametrize("family", NATIVE)
def test_a_student_of_another_family_is_its_native_model(family, folders, scenes, tmp_path):
    folder = folders(family)
    before = load_student(folder).state_dict()
    model = fit(folder, scenes, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(f"{folder}/model.safetensors").keys()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(image_modules(model)) for name in moved)
    assert not any(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((Path(folder) / "config.json").read_text())
    assert "auto_map" not in config and not list(tmp_path.glob("*.py"))
    assert config.keys() == original.keys() and config["architectures"] == original["architectures"]
    loaded, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(processor) is type(AutoProcessor.from_pretrained(folder))
    pixels = processor.image_processor(images=scenes["image"][:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        first, second = (projected(one.eval().get_image_features(pixel_values=pixels)) for one in (model, loaded))
    assert torch.equal(first, second) and equal(model.state_dict(), loaded.state_dict())
    assert read_clip(str(tmp_path)).key != read_clip(folder).key


@pytest.mark.parametrize("family", ["altclip", "timm"])  # files with other names than in memory; BatchNorm
def test_a_resumed_student_ends_with_the_weights_of_an_uninterrupted_one(family, folders, scenes, tmp_path):
    folder, options = folders(family), {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    options["save_total_limit"] = 2
    options |= {"per_device_train_batch_size": 4, "gradient_checkpointing": True, "bf16": True}
    whole = fit(folder, scenes, tmp_path / "whole", **options).state_dict()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "resumed" / "checkpoint-1")
    assert equal(fit(folder, scenes, tmp_path / "resumed", **options).state_dict(), whole)


@pytest.mark.parametrize("family", ["siglip", "vision_text"])  # PyTorch's own attention in its head; BERT's text
@pytest.mark.parametrize("lora_text", [False, True])
def test_adapters_train_beside_frozen_weights_of_any_family(family, lora_text, folders, scenes, tmp_path):
    folder = folders(family)
    options = {"lora_rank": 2, "lora_text": lora_text, "wise_ft_alpha": 0.5}
    student = fit(folder, scenes, tmp_path, **options).state_dict()
    anchor = load_student(folder)
    moved = {name for name, tensor in anchor.state_dict().items() if not torch.equal(tensor, student[name])}
    towers = {name.split(".")[0] for name in moved}
    assert towers == ({"vision_model", "text_model"} if lora_text else {"vision_model"})
    assert not any(".head.attention." in name for name in moved)
    around = load_merged(tmp_path / "adapter")
    for name, tensor in around.state_dict().items():
        torch.testing.assert_close(tensor, student[name], rtol=0, atol=1e-6)


def test_texts_of_a_student_are_read_as_its_family_reads_them(folders, scenes):
    for family in ("siglip", "vision_text"):
        model, processor = load_student(folders(family)), load_processor(folders(family))
        batches = TokenizedStudentBatches(scenes, model, processor, [], width=shared_width(model.config))
        chosen = np.arange(4)
        texts = [text for captions in scenes["captions"][:2] for text in captions]
        expected, read = tokenize_texts(model, processor, texts), batches.read_tokens(chosen)
        assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


@pytest.mark.parametrize("family", ["siglip", "altclip", "vision_text"])
def test_a_run_without_a_teacher_stores_a_familys_own_embeddings(family, folders, tmp_path):
    folder = folders(family)
    spec = "scenes:train,n=8,image_size=32,captions_per_image=2"
    losses = {"cosine_distillation_loss_weight": 0.0, "cosine_preservation_loss_weight": 1.0}
    student = {**STEPS, **losses, "num_train_epochs": 1, "lora_rank": 2, "wise_ft_alpha": 0.5}
    path = write_recipe(tmp_path, clip_model=folder, train_datasets=[spec], student=student)
    recipe = parse_recipe([], path)
    check_recipe(recipe, recipe)
    out, rows = run_stages(recipe), load_mix([spec], seed=0)
    stored = load_from_disk(out / "targets" / "train")
    model, processor, _ = load_dual_encoder(folder)
    encoder = Encoder(model, processor)
    texts = embed_texts(encoder, [text for captions in rows["captions"] for text in captions])
    for found, expected in (
        (torch.tensor(np.array(stored["anchor_embeds"])), embed_images(encoder, rows)),
        (torch.tensor(np.array(stored["text_embeds"])).flatten(0, 1), texts),
    ):
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)  # stored in float16
    assert load_merged(out / "student" / "adapter").config.model_type == model.config.model_type


@pytest.mark.parametrize(("family", "cross_attention"), [("siglip", "bidirectional"), ("timm", "regions")])
def test_a_student_learns_what_its_familys_teacher_says(family, cross_attention, folders, tmp_path):
    folder, spec = folders(family), "scenes:train,n=8,image_size=32,captions_per_image=2"
    teacher = {**STEPS, "cross_attention": cross_attention, "num_attention_heads": 2, "num_train_epochs": 1}
    student = {**STEPS, "num_train_epochs": 1}
    path = write_recipe(tmp_path, clip_model=folder, train_datasets=[spec], teacher=teacher, student=student)
    recipe = parse_recipe([], path)
    check_recipe(recipe, recipe)
    out, rows = run_stages(recipe), load_mix([spec], seed=0)
    model = load_checked(DCLIPTeacher, out / "teacher")
    processor = load_processor(out / "teacher", DCLIPTeacherProcessor)
    assert equal(model.clip.state_dict(), load_student(folder).state_dict())  # frozen
    stored = load_from_disk(out / "targets" / "train")
    images = [image for image in rows["image"] for _ in range(2)]
    boxes, scores = ([row for row in rows[name] for _ in range(2)] for name in ("boxes", "box_scores"))
    texts = [text for captions in rows["captions"] for text in captions]
    with torch.no_grad():
        expected = model(**processor(images, texts, boxes=boxes, box_scores=scores))
    for name in ("teacher_embeds", "text_embeds"):
        found = torch.tensor(np.array(stored[name])).flatten(0, 1).float()
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3)  # features and targets are float16
    learned = AutoModel.from_pretrained(out / "student")
    assert learned.config.model_type == model.config.clip_config.model_type
    texts_before, texts_after = (
        {name: tensor for name, tensor in one.state_dict().items() if name.startswith("text_")}
        for one in (load_student(folder), learned)
    )
    assert equal(texts_before, texts_after)
    with pytest.raises(ValueError, match="Expected a teacher around a model of the student's type 'chinese_clip' .*"):
        load_matching_teacher(str(out / "teacher"), folders("chinese_clip"))


@pytest.mark.parametrize(
    ("family", "student", "message"),
    [
        ("siglip2_naflex", {}, "takes square images at .*, got SigLIP 2 in its NaFlex form"),
        ("align", {}, "expected a model of type dclip, .*, got 'align'"),
        ("siglip", {"position_embedding_type": "rope"}, "expected absolute for a model of type 'siglip', got rope"),
        ("siglip", {"freeze": ["visual_projection.*"]}, "'visual_projection.*' matches no parameter"),
        ("timm", {"lora_rank": 2}, r"linear layers in vision_model \(none: it has no linear layer, so train without"),
    ],
)
def test_what_a_family_cannot_do_is_refused_before_any_work(family, student, message, folders, tmp_path):
    student = {**STEPS, "cosine_distillation_loss_weight": 0.0, **student}
    recipe = parse_recipe([], write_recipe(tmp_path, clip_model=folders(family), student=student))
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe, recipe)
    assert not (tmp_path / "run").exists()


def test_towers_whose_texts_are_pooled_in_an_unknown_way_are_refused_when_read(folders, tmp_path):
    shutil.copytree(folders("vision_text"), tmp_path, dirs_exist_ok=True)
    text = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=3)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(**VISION), text, projection_dim=12)
    VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embeds a text by a pooler at its first token, .*, got GPT2Model"):
        read_clip(str(tmp_path))
