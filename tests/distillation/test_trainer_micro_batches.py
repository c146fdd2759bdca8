"""Micro-batches: the gradient of the whole batch, with the same random numbers and statistics, in less memory."""

import copy
import weakref

import pytest
import torch
from fixtures.training import TINY_DMCLIP, equal, make_inputs, train
from safetensors.torch import load_file
from transformers import AutoTokenizer

from modeling_dclip.distillation.arguments import DMCLIPArguments
from modeling_dclip.distillation.dmclip import build_dmclip
from modeling_dclip.distillation.losses import contrastive_loss
from modeling_dclip.distillation.run import load_student
from modeling_dclip.distillation.trainer import ImageSide, run_in_micro_batches


def gradients(model):
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.fixture
def student(tiny_clip_dir):
    torch.manual_seed(0)
    return ImageSide(load_student(tiny_clip_dir)).train()


def pixels(count, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 2), (5, 1), (4, 8)])
def test_a_students_gradient_is_that_of_the_whole_batch(student, count, size):
    width = student(pixel_values=pixels(1)).shape[-1]
    texts = torch.randn(count, width, generator=torch.Generator().manual_seed(2))
    expected = contrastive_loss(student(pixel_values=pixels(count)), texts)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    run_in_micro_batches(student, size)
    loss = contrastive_loss(student(pixel_values=pixels(count)), texts)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    largest = max(one.abs().max() for one in wanted.values())
    for name, one in gradients(student).items():
        torch.testing.assert_close(one, wanted[name], rtol=0, atol=float(1e-5 * largest), msg=name)
    assert wanted and largest > 0


def test_only_the_last_micro_batch_keeps_its_activations(student):
    kept, seen = [], []

    def remember(module, inputs, output):
        seen.append(len(inputs[0]))
        kept.append(weakref.ref(output))

    layer = next(
        module for module in student.modules() if isinstance(module, torch.nn.GELU) or "MLP" in type(module).__name__
    )
    layer.register_forward_hook(remember)
    run_in_micro_batches(student, 2)
    embeds = student(pixel_values=pixels(6))
    assert seen == [2, 2, 2] and [one() is not None for one in kept][:2] == [False, False]
    embeds.sum().backward()
    assert seen == [2] * 5  # the first two anew


def test_in_evaluation_and_without_gradient_the_batch_stays_whole(student):
    seen = []
    next(student.children()).register_forward_hook(lambda module, inputs, output: seen.append(1))
    run_in_micro_batches(student, 2)
    with torch.no_grad():
        student(pixel_values=pixels(6))
    student.eval()(pixel_values=pixels(6))
    assert seen == [1, 1]


@pytest.fixture
def dmclip(tiny_clip_dir):
    torch.manual_seed(0)
    arguments = DMCLIPArguments(output_dir="x", use_cpu=True, **TINY_DMCLIP)
    model, _ = build_dmclip(arguments, AutoTokenizer.from_pretrained(tiny_clip_dir))
    return model.train()


def test_drop_path_and_batch_norm_are_those_of_micro_batches_that_ran_once(dmclip):
    images, ids = pixels(6), torch.randint(3, 60, (12, 7), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = dmclip.config.text_config.eos_token_id
    inputs = {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    once, twice = copy.deepcopy(dmclip), dmclip
    run_in_micro_batches(twice, 2)

    def step(model, run):
        torch.manual_seed(4)
        image_embeds, text_embeds = run()
        contrastive_loss(image_embeds, text_embeds[:6]).backward()
        return gradients(model), {name: one.clone() for name, one in model.named_buffers()}, torch.rand(1)

    def plain():
        parts = [once(**{name: one.tensor_split(3)[part] for name, one in inputs.items()}) for part in range(3)]
        return torch.cat([one.image_embeds for one in parts]), torch.cat([one.text_embeds for one in parts])

    for (name, expected), found in zip(
        [("gradients", step(once, plain)[0]), ("buffers", dict(once.named_buffers()))],
        step(twice, lambda: twice(**inputs))[:2],
        strict=True,
    ):
        assert equal(found, expected), name
    assert any("running_mean" in name for name, _ in twice.named_buffers())


@pytest.mark.parametrize("kind", ["student", "bank"])
def test_a_training_ends_with_the_weights_of_one_in_whole_batches(kind, tiny_clip_dir, distillation_data, tmp_path):
    inputs, ends = make_inputs(tiny_clip_dir, distillation_data, tmp_path), []
    for size in (None, 1):
        options = {"max_steps": 2, "optim": "sgd", "micro_batch_size": size, "save_strategy": "no"}
        train(kind, inputs, tmp_path / f"{kind}-{size}", **options)
        ends.append(load_file(tmp_path / f"{kind}-{size}" / "model.safetensors"))
    for name, one in ends[0].items():
        torch.testing.assert_close(ends[1][name], one, rtol=1e-4, atol=1e-6, msg=name)
