"""The reinforced loss: a naive float64 reference first, then properties. Two processes against one: test_losses.py."""

import math

import pytest
import torch

from modeling_dclip.distillation.losses import distillation_loss, similarity_distillation_loss, teacher_probabilities

WIDTHS, SCALES = [4, 2], [100.0, 20.0]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def cosines(rows, columns):
    return [[cosine(row, column) for column in columns] for row in rows]


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def embeds(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_distillation_loss(image, text, teacher_image, teacher_text, widths, scales, temperature, share):
    """In Python's floats, which are float64: every teacher's softmax, their mean, the cross-entropy row by row."""

    def transpose(table):
        return [list(column) for column in zip(*table, strict=True)]

    student = [[value / temperature for value in row] for row in cosines(image, text)]
    teachers, start = [], 0
    for width, scale in zip(widths, scales, strict=True):
        part = slice(start, start + width)
        table = cosines([row[part] for row in teacher_image], [row[part] for row in teacher_text])
        teachers.append([[scale * value for value in row] for row in table])
        start += width
    total = 0.0
    for turn, weight in ((lambda table: table, share), (transpose, 1 - share)):
        for i, row in enumerate(turn(student)):
            each = [softmax(turn(teacher)[i]) for teacher in teachers]
            mean = [sum(column) / len(teachers) for column in zip(*each, strict=True)]
            total -= weight * sum(p * math.log(q) for p, q in zip(mean, softmax(row), strict=True)) / len(student)
    return total


def batch(size=5, width=7):
    return (embeds(size, width), embeds(size, width, seed=1), embeds(size, 6, seed=2), embeds(size, 6, seed=3))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
@pytest.mark.parametrize(("widths", "scales"), [([6], [100.0]), (WIDTHS, SCALES), ([1, 2, 3], [100.0, 100.0, 1.0])])
def test_the_loss_equals_the_naive_one(widths, scales, share):
    tensors = batch()
    expected = naive_distillation_loss(*(tensor.tolist() for tensor in tensors), widths, scales, 0.1, share)
    assert float(distillation_loss(*tensors, widths, scales, 0.1, share)) == pytest.approx(expected, rel=1e-5)


def test_probabilities_are_averaged_not_similarities():
    image = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    text = torch.tensor(
        [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
    )  # the second teacher says the opposite, at half the scale
    image_to_text, text_to_image = teacher_probabilities(image, text, [2, 2], [100.0, 50.0])
    torch.testing.assert_close(image_to_text, torch.full((2, 2), 0.5))
    torch.testing.assert_close(text_to_image, torch.full((2, 2), 0.5))


def test_each_teachers_slice_is_normalised_on_its_own():
    image, text, teacher_image, teacher_text = batch()
    louder = torch.cat([teacher_image[:, :4], 9 * teacher_image[:, 4:]], dim=1)
    expected = distillation_loss(image, text, teacher_image, teacher_text, WIDTHS, SCALES, 0.1)
    torch.testing.assert_close(distillation_loss(image, text, louder, teacher_text, WIDTHS, SCALES, 0.1), expected)


def test_with_one_teacher_it_is_the_divergence_plus_the_teachers_entropy():
    image, text, teacher_image, teacher_text = batch()
    divergence = similarity_distillation_loss(image, teacher_image, text, teacher_text, 0.1, 1 / 20)
    tables = teacher_probabilities(teacher_image, teacher_text, [6], [20.0])
    entropy = -sum((table * table.log()).sum(dim=1).mean() / 2 for table in tables)
    computed = distillation_loss(image, text, teacher_image, teacher_text, [6], [20.0], 0.1)
    torch.testing.assert_close(computed, divergence + entropy)


def test_the_student_and_its_scale_train_and_the_teachers_do_not():
    tensors = [tensor.requires_grad_() for tensor in batch()]
    logit_scale = torch.tensor(2.0, requires_grad=True)
    distillation_loss(*tensors, WIDTHS, SCALES, logit_scale.neg().exp()).backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in (*tensors[:2], logit_scale))
    assert tensors[2].grad is tensors[3].grad is None


def test_it_stays_float32_under_autocast_and_takes_half_precision_targets():
    image, text, teacher_image, teacher_text = batch()
    teacher_image, teacher_text = teacher_image.half(), teacher_text.half()
    expected = distillation_loss(image, text, teacher_image.float(), teacher_text.float(), WIDTHS, SCALES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        computed = distillation_loss(3 * image, text, teacher_image, teacher_text, WIDTHS, SCALES)
    assert computed.dtype == torch.float32
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, t, a, b: distillation_loss(i, t, a, b, [3, 2], SCALES), r"teachers \[3, 2\] together \(5\), got 6"),
        (lambda i, t, a, b: distillation_loss(i, t, a, b, [], []), "Give the widths of the teachers"),
        (lambda i, t, a, b: distillation_loss(i, t, a, b, WIDTHS, [100.0]), "one logit scale > 0 for each of 2"),
        (lambda i, t, a, b: distillation_loss(i, t, a, b, WIDTHS, [100.0, 0.0]), "one logit scale > 0"),
        (lambda i, t, a, b: distillation_loss(i, t, a[:3], b[:3], WIDTHS, SCALES), "one B"),
        (lambda i, t, a, b: distillation_loss(i, t[:, :3], a, b, WIDTHS, SCALES), "one width"),
        (lambda i, t, a, b: distillation_loss(i, t, a, b, WIDTHS, SCALES, temperature=0.0), "temperature > 0"),
        (lambda i, t, a, b: distillation_loss(i, t, a, b, WIDTHS, SCALES, 0.1, 2.0), "image_to_text_weight"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*batch())
