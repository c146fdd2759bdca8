"""Freezing: by whole name, reported, and never in silence."""

import doctest

import pytest
from torch import nn

from modeling_dclip.distillation import freezing
from modeling_dclip.distillation.freezing import freeze_parameters


def make_model():
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(12)]), "head": nn.Linear(2, 3)})


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_docstring_examples_hold():
    assert doctest.testmod(freezing).failed == 0


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
