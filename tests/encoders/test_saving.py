"""A saved folder is read by transformers alone as its model was trained."""

import pytest
import torch
from fixtures.tiny_dual_encoders import save_dual_encoder, save_fixed_siglip2
from transformers import AutoProcessor

from modeling_dclip.encoders import saving
from modeling_dclip.encoders.families import tokenize_texts
from modeling_dclip.encoders.loading import load_pair
from modeling_dclip.encoders.saving import save_processor

TEXTS = ["A Red Circle", "two blue stars"]


def save(model, processor, folder):
    folder.mkdir()
    model.save_pretrained(folder)
    save_processor(model, processor, folder)
    return folder


def read_alone(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False).tokenizer(
        TEXTS, padding="max_length", truncation=True, return_tensors="pt"
    )["input_ids"]


def test_capitals_of_siglip_2_stay_small_after_every_save(tmp_path):
    model, processor = load_pair(str(save_fixed_siglip2(tmp_path / "published")))
    ids = tokenize_texts(model, processor, TEXTS)["input_ids"]
    assert torch.equal(ids, tokenize_texts(model, processor, [text.lower() for text in TEXTS])["input_ids"])
    for name in ("once", "twice", "thrice"):  # as a student that is trained further is
        folder = save(model, processor, tmp_path / name)
        assert torch.equal(read_alone(folder), ids)
        model, processor = load_pair(str(folder))
        assert torch.equal(tokenize_texts(model, processor, TEXTS)["input_ids"], ids)


def test_a_model_with_code_is_saved_as_its_processor_saves_itself(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "AutoTokenizer", None)  # is not asked
    model, processor = tiny_clip
    folder = save(model, processor, tmp_path / "saved")
    processor.save_pretrained(tmp_path / "plain")
    for path in sorted((tmp_path / "plain").iterdir()):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_that_no_saving_keeps_is_refused(tmp_path, monkeypatch):
    model, processor = load_pair(str(save_dual_encoder("vision_text", tmp_path / "start")))
    monkeypatch.setattr(saving, "tokenize_texts", lambda *_, **__: {"input_ids": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="transformers alone reads as the model was trained"):
        save(model, processor, tmp_path / "saved")
