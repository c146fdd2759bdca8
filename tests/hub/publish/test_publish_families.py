"""Students of other families than CLIP are published as models of transformers, with cards that read them aright."""

import re

import pytest
import torch
from fixtures.loopback_hub import find_fault
from fixtures.publications import make_arguments, make_dmclip, make_native_student, make_teacher, write_records
from fixtures.tiny_dual_encoders import save_dual_encoder, save_first_siglip, save_fixed_siglip2
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

from modeling_dclip.encoders.families import tokenize_texts
from modeling_dclip.encoders.loading import load_pair
from modeling_dclip.hub.publish import publish
from modeling_dclip.hub.publish.facts import FAMILIES

STARTS = {
    "altclip": ("BAAI/AltCLIP", "AltCLIPModel"),
    "chinese_clip": ("OFA-Sys/chinese-clip-vit-base-patch16", "ChineseCLIPModel"),
    "metaclip_2": ("facebook/metaclip-2-worldwide-s16", "MetaClip2Model"),
    "siglip": ("google/siglip-base-patch16-224", "SiglipModel"),
    "siglip2": ("google/siglip2-base-patch16-224", "SiglipModel"),
    "vision_text": ("me/pair", "VisionTextDualEncoderModel"),
    "timm": ("me/timm-pair", "VisionTextDualEncoderModel"),
}


def save(family, folder):
    special = {"siglip": save_first_siglip, "siglip2": save_fixed_siglip2}
    return special[family](folder) if family in special else save_dual_encoder(family, folder)


def stage(family, root, *words, **fields):
    (root / "results").mkdir(parents=True)
    student = make_native_student(root / "student", lambda folder: save(family, folder), *words)
    results = write_records(root / "results", student)
    dry = {"dry_run": True, "staging": str(root / "staged"), "license": "cc-by-nc-sa-4.0", **fields}
    return student, publish(make_arguments(student, results, **dry))


@pytest.mark.parametrize("family", STARTS)
def test_a_student_of_another_family_goes_out_as_a_model_of_transformers(family, tmp_path):
    if family == "siglip":
        pytest.importorskip("sentencepiece", reason="makes the first SigLIP's tokenizer")
    if family == "timm":
        pytest.importorskip("timm")
    start, class_name = STARTS[family]
    student, (repo,) = stage(family, tmp_path, "--clip_model", start)
    assert repo.kind == "dual" and not list(repo.folder.glob("*.py"))
    card = (repo.folder / "README.md").read_text()
    data = ModelCard(card).data.to_dict()
    assert find_fault(card) is None and data["base_model"] == [start] and data["license"] == "cc-by-nc-sa-4.0"
    assert data["model-index"][0]["results"] and "dclip" not in data["tags"]
    has_pipeline = class_name != "VisionTextDualEncoderModel"
    assert (data.get("pipeline_tag") == "zero-shot-image-classification") == has_pipeline == ("pipeline(" in card)
    for text in (f"The model is a `{class_name}` of transformers", f"fine-tuned from `{start}`", "get_text_features("):
        assert text in card
    assert any(card.split("# tiny\n\n")[1].startswith(f"{words} that was") for words in FAMILIES.values())
    assert "trust_remote_code" not in card and "The code beside them" not in card and "published in" not in card
    score = "sigmoid()" if class_name == "SiglipModel" else "softmax(dim=-1)"
    assert f"logits_per_image.{score}" in card and ("zhai2023siglip" in card) == (class_name == "SiglipModel")
    # The options that the card's code gives the processor read as the model was trained.
    (options,) = set(re.findall(r'text=\[[^\]]*\], (.*), return_tensors="pt"\)', card))
    texts = ["A Red dog", "two small blue circles " * 40]
    read = AutoProcessor.from_pretrained(repo.folder)(text=texts, return_tensors="pt", **eval(f"dict({options})"))
    model, processor = load_pair(student)
    expected = tokenize_texts(model, processor, texts)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)
    stored = AutoModel.from_pretrained(repo.folder)
    assert type(stored).__name__ == class_name
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_licence_of_a_familys_start_holds(tmp_path):
    with pytest.raises(ValueError, match="facebook/metaclip-2-worldwide-s16 limits the licence .* got 'mit'"):
        stage("metaclip_2", tmp_path, "--clip_model", STARTS["metaclip_2"][0], license="mit")


def test_a_teacher_of_another_family_goes_out_beside_its_student(tmp_path):
    teacher = make_teacher(tmp_path / "teacher", save("siglip2", tmp_path / "start"), num_attention_heads=2)
    words = ("--clip_model", STARTS["siglip2"][0], "--student.cosine_distillation_loss_weight", "1")
    _, staged = stage("siglip2", tmp_path, *words, teacher=str(teacher))
    assert [repo.kind for repo in staged] == ["teacher", "dual"]
    cards = [(repo.folder / "README.md").read_text() for repo in staged]
    assert "the frozen model that training started from with a small cross-modal block" in cards[0]
    assert "The code beside them is under Apache-2.0" in cards[0]
    assert (
        "| [me/tiny](https://huggingface.co/me/tiny) | image encoder and text encoder | no custom code |" in cards[1]
    )
    assert "A SigLIP whose image encoder was fine-tuned from `google/siglip2" in cards[1] and "dclip2025" in cards[1]


def test_a_dmclip_that_was_a_student_is_described_as_one(tiny_clip_dir, tmp_path):
    words = ("--clip_model", "me/dmclip", "--student.cosine_distillation_loss_weight", "0")
    folder = make_native_student(tmp_path / "student", lambda folder: make_dmclip(folder, tiny_clip_dir), *words)
    (tmp_path / "results").mkdir()
    results = write_records(tmp_path / "results", folder, anchor=tiny_clip_dir)
    staged = publish(make_arguments(folder, results, dry_run=True, staging=str(tmp_path / "staged")))
    assert [repo.kind for repo in staged] == ["vision", "dual"]
    card = (staged[-1].folder / "README.md").read_text()
    assert "A DM-CLIP (a CLIP with a MambaVision as its image encoder) that was fine-tuned from `me/dmclip`" in card
    assert (
        "larger CLIPs" not in card
        and "| before training |" in card
        and 'AutoModel.from_pretrained("me/tiny", trust' in card
    )
