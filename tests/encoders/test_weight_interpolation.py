"""The line between two checkpoints: its ends, its middle, and what does not lie on it."""

from types import SimpleNamespace

import pytest
import torch

from modeling_dclip.encoders.weight_interpolation import interpolate_models, interpolate_weights


def make_states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        {"weight": torch.randn(5, 3, generator=generator).to(dtype), "positions": torch.arange(4)} for _ in range(2)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_of_the_line_are_exact_copies(dtype):
    anchor, student = make_states(dtype)
    for alpha, end in ((0, anchor), (1.0, student)):
        mixed = interpolate_weights(anchor, student, alpha)
        assert all(torch.equal(mixed[key], end[key]) and mixed[key].dtype == end[key].dtype for key in end)
        assert mixed["weight"].data_ptr() != end["weight"].data_ptr()


def test_the_middle_of_the_line_is_the_mean():
    anchor, student = make_states()
    mixed = interpolate_weights(anchor, student, 0.5)
    assert torch.allclose(mixed["weight"], (anchor["weight"] + student["weight"]) / 2, atol=1e-7)
    assert torch.equal(mixed["positions"], torch.arange(4))


def test_a_student_that_is_a_point_itself_keeps_its_place():
    anchor, trained = make_states(torch.float64)
    student = interpolate_weights(anchor, trained, 0.25)
    assert torch.equal(interpolate_weights(anchor, student, 0.25, 0.25)["weight"], student["weight"])
    for alpha in (0.0, 0.1, 0.75, 1.0):
        found = interpolate_weights(anchor, student, alpha, student_alpha=0.25)["weight"]
        expected = interpolate_weights(anchor, trained, alpha)["weight"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    for place in (0, 1.5):
        with pytest.raises(ValueError, match=rf"student_alpha in \(0, 1\], got {place}"):
            interpolate_weights(anchor, student, 0.5, place)


@pytest.mark.parametrize(
    ("change", "alpha", "message"),
    [
        (lambda state: state.pop("weight"), 0.5, "one only, the first 'weight'"),
        (lambda state: state.update(extra=torch.ones(1)), 0.5, "one only, the first 'extra'"),
        (lambda state: state.update(weight=torch.ones(3, 5)), 0.0, r"\(5, 3\) torch.float32.*\(3, 5\).*'weight'"),
        (lambda state: state.update(weight=state["weight"].half()), 1.0, "torch.float16'. for 'weight'"),
        (
            lambda state: state.update(positions=torch.zeros(4, dtype=torch.long)),
            0.5,
            r"equal integers, got .'.4,. torch.int64', .*'positions'",
        ),
        (lambda state: None, 1.5, r"alpha in \[0, 1\], got 1.5"),
    ],
)
def test_checkpoints_that_do_not_match_are_refused(change, alpha, message):
    anchor, student = make_states()
    change(student)
    with pytest.raises(ValueError, match=message):
        interpolate_weights(anchor, student, alpha)


def test_batch_norms_counters_may_differ_and_are_the_students():
    anchor, student = make_states()
    for state, batches in ((anchor, 3), (student, 5)):
        state["norm.num_batches_tracked"] = torch.tensor(batches)
    found = [int(interpolate_weights(anchor, student, alpha)["norm.num_batches_tracked"]) for alpha in (0, 0.5, 1)]
    assert found == [3, 5, 5]


def model_of(vision, state):
    """What [`interpolate_models`] reads of a model with these fields of its image encoder."""
    config = SimpleNamespace(vision_config=SimpleNamespace(**vision), text_config=SimpleNamespace(hidden_act="gelu"))
    return SimpleNamespace(config=config, state_dict=lambda: state)


@pytest.mark.parametrize(
    ("anchor", "student", "message"),
    [
        ({}, {"position_embedding_type": "absolute"}, None),  # a stock CLIP and a student
        ({}, {"position_embedding_type": "absolute", "rotary_base": 100.0}, None),
        ({}, {"position_embedding_type": "rope"}, "position_embedding_type 'absolute' in the anchor and 'rope' in .*"),
        *[
            ({"position_embedding_type": kind, "rotary_base": 10.0}, {"position_embedding_type": kind}, message)
            for kind, message in (("rope", "rotary_base 10.0 in the anchor and None"), ("absolute", None))
        ],
        ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}, "hidden_act 'gelu' in .*own architecture"),
    ],
)
def test_models_that_compute_otherwise_from_equal_weights_are_not_interpolated(anchor, student, message):
    ends = [model_of(vision, state) for vision, state in zip((anchor, student), make_states(), strict=True)]
    if message is None:
        assert interpolate_models(*ends, 0.5).keys() == {"weight", "positions"}
    else:
        with pytest.raises(ValueError, match=f"vision_config.{message}"):
            interpolate_models(*ends, 0.5)
