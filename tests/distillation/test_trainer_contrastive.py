"""Which contrastive loss a student is trained with: its family's own by default, and what goes with neither."""

import numpy as np
import pytest
import torch
from fixtures.tiny_dual_encoders import save_dual_encoder
from fixtures.training import student_arguments
from transformers import CLIPConfig, Siglip2Config, SiglipConfig

from modeling_dclip.data.columns import Ragged, with_ragged_embeds
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.distillation.checks import check_contrastive_loss
from modeling_dclip.distillation.losses import contrastive_loss, sigmoid_contrastive_loss
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.stages import fit_student
from modeling_dclip.encoders.families import projected
from modeling_dclip.encoders.loading import load_processor

WITHOUT_TEACHER = {"cosine_distillation_loss_weight": 0.0}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small SigLIP with the scale and the bias of a trained one."""
    folder = str(save_dual_encoder("siglip", tmp_path_factory.mktemp("siglip")))
    model = load_student(folder)
    model.logit_scale.data.fill_(2.3)
    model.logit_bias.data.fill_(-4.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    """Eight images whose two captions have one embedding, so that it does not matter which is drawn."""
    scenes = load_scenes("train", n=8, captions_per_image=2, image_size=32)
    values = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float16).repeat(2, axis=0)
    return with_ragged_embeds(scenes, "text_embeds", Ragged.from_lengths(values, np.full(8, 2)))


@pytest.mark.parametrize("asked", ["auto", "softmax"])
def test_a_siglip_is_trained_and_validated_with_the_sigmoid_loss_unless_another_is_asked_for(
    siglip, rows, tmp_path, asked
):
    model, processor = load_student(siglip), load_processor(siglip)
    pixels = processor.image_processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        images = projected(model.get_image_features(pixel_values=pixels))
    texts = torch.tensor(np.array(rows["text_embeds"])[:, 0]).float()
    expected = float(
        sigmoid_contrastive_loss(images, texts, 2.3, -4.0)
        if asked == "auto"
        else contrastive_loss(images, texts, 0.05)
    )
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-9, **WITHOUT_TEACHER}
    args = student_arguments(tmp_path, contrastive_loss=asked, load_best_model_at_end=False, **options)
    trainer = fit_student(model, args, rows, processor, {"student": {}}, validation=rows)
    logs = trainer.state.log_history
    (trained,) = (log["contrastive_loss"] for log in logs if "contrastive_loss" in log)
    (validated,) = (log["eval_contrastive_loss"] for log in logs if "eval_contrastive_loss" in log)
    assert trained == pytest.approx(expected, rel=1e-4) and validated == pytest.approx(expected, rel=1e-3)
    assert float(model.logit_scale) == pytest.approx(2.3) and float(model.logit_bias) == -4.0


def arguments(tmp_path, **options):
    return student_arguments(tmp_path, **{**WITHOUT_TEACHER, **options})


@pytest.mark.parametrize("config", [SiglipConfig(), Siglip2Config()], ids=["siglip", "siglip2"])
def test_settings_of_the_softmax_loss_are_refused_with_a_sigmoid_model(tmp_path, config):
    args = arguments(tmp_path, temperature=0.07)
    with pytest.raises(ValueError, match=r"student\.temperature: expected none.*own scale and bias.*got 0\.07"):
        check_contrastive_loss(args, config, {"temperature"})
    with pytest.raises(ValueError, match=r"student\.image_to_text_weight: expected none.*one direction"):
        check_contrastive_loss(args, config, {"image_to_text_weight"})
    check_contrastive_loss(args, config, {"learning_rate"})
    check_contrastive_loss(arguments(tmp_path, contrastive_loss="softmax"), config, {"temperature"})
    relational = arguments(tmp_path, similarity_distillation_loss_weight=1.0)
    check_contrastive_loss(relational, config, {"image_to_text_weight"})  # which that loss reads
    without = arguments(tmp_path, contrastive_loss_weight=0.0, cosine_preservation_loss_weight=1.0)
    check_contrastive_loss(without, config, {"temperature"})  # told elsewhere: nothing reads it


def test_the_sigmoid_loss_is_refused_with_a_model_that_holds_no_bias(tmp_path):
    args = arguments(tmp_path, contrastive_loss="sigmoid")
    with pytest.raises(ValueError, match=r"contrastive_loss: expected softmax or auto .*'clip', got sigmoid"):
        check_contrastive_loss(args, CLIPConfig(), {"contrastive_loss"})
    check_contrastive_loss(arguments(tmp_path), CLIPConfig(), {"temperature"})
