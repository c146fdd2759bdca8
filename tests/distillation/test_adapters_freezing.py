"""Freezing: by whole name, reported, and never in silence; through accelerate and two processes not one bit moves."""

from pathlib import Path

import pytest
import torch
from fixtures.processes import train_together
from safetensors.torch import load_file
from torch import nn

from modeling_dclip.distillation.adapters import freeze_parameters


def make_model():
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(12)]), "head": nn.Linear(2, 3)})


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_a_glob_freezes_what_it_names():
    model = make_model()
    report = freeze_parameters(model, ["layers.[0-1].*", "head.bias"])
    assert frozen(model) == {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "head.bias"}
    assert report.matched == {"layers.[0-1].*": 4, "head.bias": 1}
    assert report.frozen_parameters == 2 * 6 + 3 and report.trainable_parameters == 10 * 6 + 6


def test_a_regular_expression_matches_whole_names():
    model = make_model()
    freeze_parameters(model, [r"re:layers\.1\d\.weight"])
    assert frozen(model) == {"layers.10.weight", "layers.11.weight"}


def test_no_pattern_freezes_nothing():
    model = make_model()
    assert freeze_parameters(model, []).frozen_parameters == 0 and not frozen(model)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layer.0.*"], r"'layer.0.\*' matches no parameter. There are: layers.0.weight"),
        (["bias"], "matches no parameter"),
        (["re:("], "regular expression"),
        (["*"], "nothing to train"),
    ],
)
def test_a_useless_pattern_is_an_error(patterns, message):
    with pytest.raises(ValueError, match=message):
        freeze_parameters(make_model(), patterns)


def test_two_prepared_processes_train_the_image_encoder_and_leave_every_bit_of_the_text_tower(tiny_clip_dir, tmp_path):
    train_together(Path(__file__).with_name("run_frozen.py"), 2, tiny_clip_dir, tmp_path, 2)
    first, second = (load_file(tmp_path / f"{process}.safetensors") for process in range(2))
    for results in (first, second):
        assert results["wrapped"] and results["text_has_no_gradient"] and results["text_is_in_eval_mode"]
        assert torch.equal(results["text_after"], results["text_before"])
        assert not torch.equal(results["vision_after"], results["vision_before"])
    assert torch.equal(first["text_before"], second["text_before"])
    assert torch.equal(first["vision_after"], second["vision_after"])  # they trained together
