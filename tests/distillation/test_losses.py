"""Losses: a naive float64 reference first, then properties, then two processes against one."""

import math
from pathlib import Path

import pytest
import torch
from fixtures.processes import train_together
from safetensors.torch import load_file

from modeling_dclip.distillation.losses import (
    FalseTexts,
    contrastive_loss,
    cosine_distillation_loss,
    cosine_preservation_loss,
    gather_across_processes,
    sigmoid_contrastive_loss,
    similarity_distillation_loss,
)


def cosines(rows, columns):
    return [
        [
            sum(a * b for a, b in zip(row, column, strict=True))
            / math.sqrt(sum(a * a for a in row))
            / math.sqrt(sum(b * b for b in column))
            for column in columns
        ]
        for row in rows
    ]


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_contrastive_loss(image_embeds, text_embeds, temperature, image_to_text_weight, image_ids):
    similarities = cosines(image_embeds, text_embeds)
    total = 0.0
    for table, weight in (
        (similarities, image_to_text_weight),
        (list(zip(*similarities, strict=True)), 1 - image_to_text_weight),
    ):
        for i, row in enumerate(table):
            probabilities = softmax([value / temperature for value in row])
            right = [j for j in range(len(row)) if image_ids[j] == image_ids[i]]
            total += weight * sum(-math.log(probabilities[j]) for j in right) / len(right) / len(table)
    return total


def naive_sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids):
    total = 0.0
    for i, row in enumerate(cosines(image_embeds, text_embeds)):
        for j, cosine in enumerate(row):
            sign = 1 if image_ids[i] == image_ids[j] else -1
            total += math.log1p(math.exp(-sign * (math.exp(logit_scale) * cosine + logit_bias)))
    return total / len(image_embeds)


def naive_divergence(student, teacher, temperature, teacher_temperature):
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        p = softmax([value / teacher_temperature for value in teacher_row])
        q = softmax([value / temperature for value in student_row])
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(student)
    return total


def embeds(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("image_to_text_weight", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("image_ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_contrastive_loss_equals_the_naive_one(image_to_text_weight, image_ids):
    image_embeds, text_embeds = embeds(5, 7), embeds(5, 7, seed=1)
    expected = naive_contrastive_loss(
        image_embeds.tolist(), text_embeds.tolist(), 0.2, image_to_text_weight, image_ids
    )
    computed = contrastive_loss(image_embeds, text_embeds, 0.2, image_to_text_weight, torch.tensor(image_ids))
    assert float(computed) == pytest.approx(expected, rel=1e-5)


def test_distinct_image_ids_change_nothing():
    image_embeds, text_embeds = embeds(5, 7), embeds(5, 7, seed=1)
    plain = contrastive_loss(image_embeds, text_embeds)
    torch.testing.assert_close(contrastive_loss(image_embeds, text_embeds, image_ids=torch.arange(5)), plain)


def test_two_captions_of_one_image_do_not_repel_each_other():
    image_embeds = torch.eye(3)[[0, 0, 1]].requires_grad_()
    text_embeds = torch.eye(3)[[0, 0, 1]]
    perfect = contrastive_loss(image_embeds, text_embeds, image_ids=torch.tensor([7, 7, 9]))
    assert float(perfect.detach()) == pytest.approx(
        2 * math.log(2) / 3, rel=1e-4
    )  # two equally right answers: the entropy
    perfect.backward()
    assert image_embeds.grad.abs().max() < 1e-6


def test_contrastive_loss_trains_a_logit_scale():
    logit_scale = torch.tensor(1.0, requires_grad=True)
    contrastive_loss(embeds(4, 3), embeds(4, 3, seed=1), logit_scale.neg().exp()).backward()
    assert logit_scale.grad.abs() > 0


@pytest.mark.parametrize("scale_and_bias", [(0.0, 0.0), (2.3, -10.0), (4.7, -16.5)])  # untrained; the start; trained
@pytest.mark.parametrize("image_ids", [None, [0, 1, 0, 2, 1]])
def test_sigmoid_contrastive_loss_equals_the_naive_one(scale_and_bias, image_ids):
    image_embeds, text_embeds = embeds(5, 7), embeds(5, 7, seed=1)
    ids = image_ids or list(range(5))
    expected = naive_sigmoid_loss(image_embeds.double().tolist(), text_embeds.double().tolist(), *scale_and_bias, ids)
    given = None if image_ids is None else torch.tensor(image_ids)
    computed = sigmoid_contrastive_loss(image_embeds, text_embeds, *scale_and_bias, given)
    assert float(computed) == pytest.approx(expected, rel=1e-5)


def test_sigmoid_contrastive_loss_is_that_of_siglip_in_transformers():
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": 9, "max_position_embeddings": 4, "projection_size": 8}
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4})
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-3.0)
    outputs = model(pixel_values=embeds(3, 3, 8, 8), input_ids=torch.arange(12).reshape(3, 4) % 9, return_loss=True)
    computed = sigmoid_contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale, model.logit_bias)
    torch.testing.assert_close(computed, outputs.loss, rtol=1e-5, atol=1e-6)


def test_sigmoid_contrastive_loss_trains_scale_and_bias_and_stays_float32_under_autocast():
    scale, bias = torch.tensor([1.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    expected = sigmoid_contrastive_loss(embeds(4, 8), embeds(4, 8, seed=1), scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        computed = sigmoid_contrastive_loss(3 * embeds(4, 8), 0.5 * embeds(4, 8, seed=1), scale, bias)
    assert computed.dtype == torch.float32 and computed.shape == ()
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)
    computed.backward()
    assert scale.grad.abs() > 0 and bias.grad.abs() > 0


def test_cosine_losses_equal_the_naive_one_and_train_the_student_only():
    student_embeds, target_embeds = embeds(5, 7).requires_grad_(), embeds(5, 7, seed=1).requires_grad_()
    table = cosines(student_embeds.tolist(), target_embeds.tolist())
    expected = sum(1 - table[i][i] for i in range(5)) / 5
    for loss in (cosine_distillation_loss, cosine_preservation_loss):
        computed = loss(student_embeds, target_embeds)
        computed.backward()
        assert float(computed.detach()) == pytest.approx(expected, rel=1e-5)
    assert target_embeds.grad is None and student_embeds.grad.abs().max() > 0


def test_similarity_loss_equals_the_naive_one_in_both_directions():
    student, teacher = embeds(5, 7), embeds(5, 4, seed=1)  # another width: only relations count
    student_text, teacher_text = embeds(5, 7, seed=2), embeds(5, 4, seed=3)
    student_table = cosines(student.tolist(), student_text.tolist())
    teacher_table = cosines(teacher.tolist(), teacher_text.tolist())
    image_to_text = naive_divergence(student_table, teacher_table, 0.1, 0.3)
    text_to_image = naive_divergence(
        list(zip(*student_table, strict=True)), list(zip(*teacher_table, strict=True)), 0.1, 0.3
    )
    computed = similarity_distillation_loss(student, teacher, student_text, teacher_text, 0.1, 0.3, 0.7)
    assert float(computed) == pytest.approx(0.7 * image_to_text + 0.3 * text_to_image, rel=1e-4)


def test_similarity_loss_without_text_compares_the_embeddings_among_themselves():
    student, teacher = embeds(5, 7), embeds(5, 4, seed=1)
    expected = naive_divergence(
        cosines(student.tolist(), student.tolist()), cosines(teacher.tolist(), teacher.tolist()), 0.2, 0.2
    )
    assert float(similarity_distillation_loss(student, teacher, temperature=0.2)) == pytest.approx(expected, rel=1e-4)


def test_similarity_loss_is_zero_for_a_rotated_teacher_and_trains_the_student_only():
    student = embeds(6, 6).requires_grad_()
    rotation = torch.linalg.qr(embeds(6, 6, seed=5)).Q
    loss = similarity_distillation_loss(student, student.detach() @ rotation, temperature=0.05)
    assert abs(float(loss.detach())) < 1e-5
    teacher = embeds(6, 6, seed=2).requires_grad_()
    similarity_distillation_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


@pytest.mark.parametrize(
    "loss", [contrastive_loss, cosine_distillation_loss, cosine_preservation_loss, similarity_distillation_loss]
)
def test_losses_ignore_scale_and_stay_float32_under_autocast(loss):
    student, target = embeds(4, 8), embeds(4, 8, seed=1)
    expected = loss(student, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(3 * student, 0.5 * target)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive_loss(embeds(4, 3), embeds(5, 3)), "one B"),
        (lambda: contrastive_loss(embeds(4, 3), embeds(4, 2)), "one width"),
        (lambda: contrastive_loss(embeds(4, 3), embeds(4, 3), temperature=0.0), "temperature > 0"),
        (lambda: contrastive_loss(embeds(4, 3), embeds(4, 3), image_to_text_weight=1.5), "image_to_text_weight"),
        (lambda: sigmoid_contrastive_loss(embeds(4, 3), embeds(5, 3), 1.0, 0.0), "one B"),
        (lambda: sigmoid_contrastive_loss(embeds(4, 3), embeds(4, 2), 1.0, 0.0), "one width"),
        (lambda: cosine_distillation_loss(embeds(4, 3), embeds(4, 2)), "one width"),
        (lambda: cosine_preservation_loss(embeds(4, 3), embeds(3, 3)), "one B"),
        (lambda: similarity_distillation_loss(embeds(4, 3), embeds(3, 3)), "one B"),
        (lambda: similarity_distillation_loss(embeds(4, 3), embeds(4, 3), temperature=-1.0), "temperature > 0"),
        (lambda: similarity_distillation_loss(embeds(4, 3), embeds(4, 3), embeds(4, 3)), "or neither"),
        (lambda: gather_across_processes(embeds(4, 3), embeds(3, 3)), "one batch size"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    script = Path(__file__).with_name("run_losses.py")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        train_together(script, processes, tmp_path / str(processes))
    alone = load_file(tmp_path / "1" / "rank0.safetensors")
    for rank in (0, 1):
        shared = load_file(tmp_path / "2" / f"rank{rank}.safetensors")
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                shared[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def false_texts(rows, width, dtype=torch.float32):
    """Three places for each image: three false captions, one, none."""
    mask = torch.arange(3) < torch.tensor([3, 1, 0])[torch.arange(rows) % 3][:, None]
    return FalseTexts(embeds(rows * 3, width, seed=5).reshape(rows, 3, width).to(dtype), mask)


@pytest.mark.parametrize("image_ids", [None, [0, 1, 0, 2]])
def test_false_captions_are_wrong_answers_of_their_own_image_alone(image_ids):
    images, texts, false = embeds(4, 8).requires_grad_(), embeds(4, 8, seed=1), false_texts(4, 8)
    ids = None if image_ids is None else torch.tensor(image_ids)
    loss = contrastive_loss(images, texts, 0.2, 0.7, ids, false)
    expected = 0.0
    unit = torch.nn.functional.normalize
    for row in range(4):
        logits = unit(images.double(), dim=1)[row] @ unit(texts.double(), dim=1).T / 0.2
        more = unit(images.double(), dim=1)[row] @ unit(false.embeds[row].double(), dim=1).T[:, false.mask[row]] / 0.2
        right = [other for other in range(4) if image_ids and image_ids[other] == image_ids[row]] or [row]
        expected = expected + 0.7 / 4 * (torch.cat([logits, more]).logsumexp(0) - logits[right].mean())
    expected = expected + 0.3 * contrastive_loss(images.double(), texts.double(), 0.2, 0.0, ids)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(one, images, retain_graph=True)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_false_captions_are_wrong_pairs_of_the_sigmoid_loss():
    images, texts, false = embeds(4, 8), embeds(4, 8, seed=1), false_texts(4, 8)
    added = 0.0
    for row in range(4):
        for one in false.embeds[row][false.mask[row]]:
            cosine = torch.nn.functional.cosine_similarity(images[row].double(), one.double(), dim=0)
            added += float(torch.nn.functional.softplus(math.exp(1.5) * cosine - 2.0)) / 4
    without = sigmoid_contrastive_loss(images, texts, 1.5, -2.0)
    assert float(sigmoid_contrastive_loss(images, texts, 1.5, -2.0, None, false) - without) == pytest.approx(
        added, rel=1e-5
    )


def test_without_a_false_caption_the_losses_are_as_before_to_the_bit():
    images, texts = embeds(4, 8).requires_grad_(), embeds(4, 8, seed=1)
    none = FalseTexts(torch.zeros(4, 2, 8), torch.zeros(4, 2, dtype=torch.bool))
    for loss, options in ((contrastive_loss, (0.1, 0.5)), (sigmoid_contrastive_loss, (1.0, -1.0))):
        found = [loss(images, texts, *options, None, false) for false in (None, none)]
        gradients = [torch.autograd.grad(one, images)[0] for one in found]
        assert torch.equal(*found) and torch.equal(*gradients)
