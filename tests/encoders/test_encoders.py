"""The interface of a dual encoder, and the value that carries one with its processor."""

import subprocess
import sys

import pytest
import torch
from fixtures.tiny_dual_encoders import FAMILIES
from torch import nn

from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.modeling_dclip import DCLIPModel


class Tiny(nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config, self.layer = None, nn.Linear(2, 2)

    def get_image_features(self, pixel_values):
        return pixel_values

    def get_text_features(self, input_ids):
        return input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_interface(family):
    assert isinstance(FAMILIES[family]()[0], DualEncoder)


def test_a_student_has_the_interface(tiny_clip_dir):
    assert isinstance(DCLIPModel.from_pretrained(tiny_clip_dir), DualEncoder)


def test_one_tower_does_not_have_the_interface():
    assert not isinstance(nn.Linear(2, 2), DualEncoder)
    assert not isinstance(FAMILIES["clip"]()[0].vision_model, DualEncoder)


def test_an_encoder_computes_where_the_model_is_unless_told():
    model = Tiny()
    assert Encoder(model, None).compute_device == torch.device("cpu")
    assert Encoder(model, None, device="meta").compute_device == torch.device("meta")
    assert Encoder(model, None) == Encoder(model, None, batch_size=64, device=None, num_workers=0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_moves_the_model_and_restores_its_mode(training):
    model = Tiny().train(training)
    with Encoder(model, None, device="meta").evaluating() as device:
        assert device == torch.device("meta")
        assert model.layer.weight.device == device
        assert not model.training
    assert model.training == training


def test_evaluating_restores_the_mode_after_an_error():
    model = Tiny().train()
    with pytest.raises(KeyError), Encoder(model, None).evaluating():
        raise KeyError
    assert model.training


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_workers": -1}])
def test_an_encoder_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="batch_size >= 1 and num_workers >= 0"):
        Encoder(Tiny(), None, **wrong)


def test_the_interface_imports_no_other_module_of_the_room():
    code = "import sys, modeling_dclip.encoders; print(*(name for name in sys.modules if 'dclip.' in name))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "modeling_dclip.encoders" in found
    assert not [name for name in found if name.startswith(("modeling_dclip.encoders.", "modeling_dclip.data"))]
