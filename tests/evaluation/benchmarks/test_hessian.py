"""The Hessian is the loss's own: against the whole matrix, against differences of gradients, for every kind of model;
models come back as they were.
"""

import pytest
import torch
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from modeling_dclip import DCLIPModel, DMCLIPConfig, DMCLIPModel
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.hessian import (
    ContrastiveLoss,
    HessianOptions,
    PairBatch,
    draw_batches,
    evaluate_hessian,
    lanczos,
    restored,
)

PAIRS = 5
EIGENVALUES = ["hessian_eigenvalue_1", "hessian_eigenvalue_2", "hessian_eigenvalue_min"]


def make_batches(count, side, vocabulary=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (PAIRS, 6), generator=generator)
        ids[:, -1] = vocabulary  # the highest id: EOS
        pixels = torch.randn(PAIRS, 3, side, side, generator=generator, dtype=torch.float64)
        made.append(PairBatch(pixels, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    return made


TEXT = {"vocab_size": 41, "max_position_embeddings": 8, "eos_token_id": 40, "pad_token_id": 0, "projection_dim": 6}


@pytest.fixture(scope="module")
def small_clip():
    """A CLIP in float64 with an image encoder small enough for its whole Hessian."""
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    vision = sizes | {"hidden_size": 4, "image_size": 8, "patch_size": 4, "projection_dim": 6}
    return CLIPModel(CLIPConfig(text_config=sizes | TEXT, vision_config=vision, projection_dim=6)).double().eval()


@pytest.fixture(scope="module")
def small_dmclip():
    """A DM-CLIP in float64, moved away from its start, where much is 0."""
    torch.manual_seed(1)
    vision = {"hidden_size": 4, "stem_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "state_size": 3}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"window_sizes": (8, 8, 3, 2), "projection_dim": 6}
    model = DMCLIPModel(DMCLIPConfig(text_config=text | TEXT, vision_config=vision | sizes, projection_dim=6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.logit_scale.data.fill_(2.0)
    return model.double().eval()


def flat_gradient(loss):
    """The gradient over all batches, through whatever attention is the default."""
    total = sum(loss.of_batch(index) for index in range(len(loss.batches))) / len(loss.batches)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, loss.parameters, materialize_grads=True)])


def difference_product(loss, vector, step=1e-5):
    """The Hessian times a vector by differences of the gradient, to the fourth order of the step."""
    shares = vector.split([parameter.numel() for parameter in loss.parameters])
    start = [parameter.detach().clone() for parameter in loss.parameters]

    def gradient_at(distance):
        with torch.no_grad():
            for parameter, here, share in zip(loss.parameters, start, shares, strict=True):
                parameter.copy_(here + distance * step * share.view_as(parameter))
        return flat_gradient(loss)

    product = (8 * (gradient_at(1) - gradient_at(-1)) - (gradient_at(2) - gradient_at(-2))) / (12 * step)
    with torch.no_grad():
        for parameter, here in zip(loss.parameters, start, strict=True):
            parameter.copy_(here)
    return product


def random_vector(loss, seed=0):
    return torch.randn(loss.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_clips(small_clip):
    batches = make_batches(2, 8)
    with restored(small_clip):
        loss = ContrastiveLoss(small_clip, batches, "image")
        value = loss.value()
    expected = []
    for batch in batches:
        with torch.no_grad():
            expected.append(small_clip(pixel_values=batch.pixel_values, **batch.text_inputs, return_loss=True).loss)
    assert value == pytest.approx(float(sum(expected)) / 2, rel=1e-9)


def test_lanczos_finds_the_eigenvalues_of_the_whole_hessian(small_clip):
    with restored(small_clip):
        loss = ContrastiveLoss(small_clip, make_batches(2, 8), "image")
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            total = (loss.of_batch(0) + loss.of_batch(1)) / 2
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, loss.parameters, create_graph=True)])
            rows = torch.autograd.grad(
                gradient, loss.parameters, torch.eye(loss.size, dtype=torch.float64), is_grads_batched=True
            )
        whole = torch.cat([row.flatten(1) for row in rows], dim=1)
        assert torch.allclose(whole, whole.T, atol=1e-9)
        expected = torch.linalg.eigvalsh(whole).flip(0)
        found = lanczos(loss.hessian_product, loss.size, steps=60, dtype=torch.float64)
        vector = random_vector(loss)
        torch.testing.assert_close(loss.hessian_product(vector), whole @ vector, rtol=1e-8, atol=1e-9)
    assert expected[0] > 0 > expected[-1]  # both signs: the loss is not convex
    torch.testing.assert_close(found.values[:5], expected[:5], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.values[-3:], expected[-3:], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tower", ["image", "text", "all"])
@pytest.mark.parametrize("temperature", [None, 0.2])
def test_products_are_the_gradients_differences(small_clip, tower, temperature):
    with restored(small_clip):
        loss = ContrastiveLoss(small_clip, make_batches(2, 8), tower, temperature)
        vector = random_vector(loss)
        torch.testing.assert_close(
            loss.hessian_product(vector), difference_product(loss, vector), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("tower", ["image", "text"])
def test_products_are_the_gradients_differences_for_dmclip(small_dmclip, tower):
    with restored(small_dmclip):
        loss = ContrastiveLoss(small_dmclip, make_batches(2, 64), tower)
        vector = random_vector(loss)
        names = {id(parameter): name for name, parameter in small_dmclip.named_parameters()}
        shares = vector.split([parameter.numel() for parameter in loss.parameters])
        for parameter, share in zip(loss.parameters, shares, strict=True):
            # Differences meet the stem's ReLUs at their kinks, and what the scan reads in float32 is too coarse for
            # them.
            if ".stem." in names[id(parameter)] or names[id(parameter)].endswith(("A_log", ".D")):
                share.zero_()
        # The scan computes in float32: at 1e-5 its rounding is as large as the tolerance, with torch 2.8 larger.
        torch.testing.assert_close(
            loss.hessian_product(vector), difference_product(loss, vector, step=5e-5), rtol=1e-3, atol=1e-5
        )


def test_the_scans_own_second_derivative_is_the_plain_loops(small_dmclip):
    products = {}
    for backend in ("reference", "torch"):
        small_dmclip.config.vision_config.scan_backend = backend
        with restored(small_dmclip):
            loss = ContrastiveLoss(small_dmclip, make_batches(1, 64), "image")
            products[backend] = loss.hessian_product(random_vector(loss))
    small_dmclip.config.vision_config.scan_backend = "auto"
    assert not torch.equal(products["reference"], products["torch"])  # both were taken
    torch.testing.assert_close(products["torch"], products["reference"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["small_clip", "small_dmclip"])
def test_a_tower_is_what_its_embedding_depends_on(request, model):
    model = request.getfixturevalue(model)
    batches = make_batches(1, 64 if isinstance(model, DMCLIPModel) else 8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for tower in ("image", "text", "all"):
        with restored(model):
            loss = ContrastiveLoss(model, batches, tower)
            found[tower] = {names[id(parameter)] for parameter in loss.parameters}
    assert found["image"] == {name for name in names.values() if name.startswith("vis")}
    assert found["text"] == {name for name in names.values() if name.startswith("text")}
    assert found["all"] == set(names.values()) == found["image"] | found["text"] | {"logit_scale"}


def test_with_a_temperature_given_the_models_own_has_no_say(small_clip):
    with restored(small_clip):
        own, given = (ContrastiveLoss(small_clip, make_batches(1, 8), "all", t) for t in (None, 0.5))
        scale = [name for name, _ in small_clip.named_parameters()].index("logit_scale")
        sizes = [parameter.numel() for parameter in own.parameters]
        products = [loss.hessian_product(random_vector(loss)).split(sizes)[scale] for loss in (own, given)]
    assert float(products[0]) != 0 and float(products[1]) == 0


def checkpoint(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(tiny_clip_dir, tiny_scenes, training):
    model = DCLIPModel.from_pretrained(tiny_clip_dir).train(training)  # its text tower is frozen
    model.visual_projection.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil")
    before, flags = checkpoint(model), [parameter.requires_grad for parameter in model.parameters()]
    options = HessianOptions(k=1, steps=2, batches=1, pairs=4, tower="all")
    evaluate_hessian(Encoder(model, processor), tiny_scenes, options)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training is training and not model.text_model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    after = checkpoint(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_is_measured_and_again_the_same(tiny_clip, tiny_scenes):
    options = HessianOptions(k=2, steps=20, batches=2, pairs=4, tolerance=1e-3)
    one = evaluate_hessian(Encoder(*tiny_clip), tiny_scenes, options)
    same = evaluate_hessian(Encoder(*tiny_clip, batch_size=3, num_workers=2), tiny_scenes, options)
    assert one == same
    assert one["n"] == one["n_captions"] == 8 and one["outcomes"] == {} and one["steps"] <= 20
    assert one["hessian_eigenvalue_1"] >= one["hessian_eigenvalue_2"] > one["hessian_eigenvalue_min"]
    assert max(one["residuals"]) <= 1e-3 * one["hessian_eigenvalue_1"]
    vision = sum(p.numel() for n, p in tiny_clip[0].named_parameters() if n.startswith("vis"))
    assert one["parameters"] == vision
    other = evaluate_hessian(Encoder(*tiny_clip), tiny_scenes, options, seed=1)
    assert other["contrastive_loss"] != one["contrastive_loss"]


def test_what_the_numbers_depend_on_moves_them(tiny_clip, tiny_scenes):
    def measure(**options):
        return evaluate_hessian(Encoder(*tiny_clip), tiny_scenes, HessianOptions(k=1, steps=6, **options))

    base = measure(batches=1, pairs=8)["hessian_eigenvalue_1"]
    cold = measure(batches=1, pairs=8, temperature=1.0)
    assert cold["hessian_eigenvalue_1"] < 0.5 * base  # the model's own temperature is 0.07
    small = measure(batches=4, pairs=2)["hessian_eigenvalue_1"]
    assert small != pytest.approx(base, rel=0.05)


def test_batches_hold_different_images_with_a_caption_of_their_own(tiny_clip, tiny_scenes):
    model, processor = tiny_clip
    drawn = draw_batches(model, processor, tiny_scenes, batches=2, pairs=4, seed=3)
    pixels = torch.cat([batch.pixel_values for batch in drawn])
    every = processor(images=tiny_scenes["image"][:], return_tensors="pt")["pixel_values"]
    rows = [int((every - one).flatten(1).abs().sum(dim=1).argmin()) for one in pixels]
    assert sorted(rows) == list(range(8)) and rows != list(range(8))
    for batch, own in zip(drawn, (rows[:4], rows[4:]), strict=True):
        texts = processor.tokenizer.batch_decode(batch.text_inputs["input_ids"], skip_special_tokens=True)
        for row, text in zip(own, texts, strict=True):
            known = processor.tokenizer(tiny_scenes["captions"][row], truncation=True, max_length=77)["input_ids"]
            assert text in processor.tokenizer.batch_decode(known, skip_special_tokens=True)
    again = draw_batches(model, processor, tiny_scenes, batches=2, pairs=4, seed=3)
    for one, two in zip(drawn, again, strict=True):
        assert torch.equal(one.pixel_values, two.pixel_values)
        assert torch.equal(one.text_inputs["input_ids"], two.text_inputs["input_ids"])


def test_bad_input_is_named(tiny_clip, tiny_scenes, small_clip):
    model, processor = tiny_clip
    with pytest.raises(ValueError, match="together at most the dataset's 8, got 3 of 4"):
        evaluate_hessian(Encoder(model, processor), tiny_scenes, HessianOptions(batches=3, pairs=4))
    with pytest.raises(ValueError, match="two or more images"):
        evaluate_hessian(Encoder(model, processor), tiny_scenes, HessianOptions(batches=1, pairs=1))
    with pytest.raises(ValueError, match="Expected one of .* as the tower, got 'vision'"):
        evaluate_hessian(Encoder(model, processor), tiny_scenes, HessianOptions(batches=1, pairs=2, tower="vision"))
    with pytest.raises(ValueError, match="float32 or float64, got torch.bfloat16"):
        half = Encoder(CLIPModel(model.config).bfloat16(), processor)
        evaluate_hessian(half, tiny_scenes, HessianOptions(batches=1, pairs=2))
    empty = tiny_scenes.remove_columns("captions").add_column("captions", [["a"]] * 7 + [[" "]])
    with pytest.raises(ValueError, match=r"captions for image_id 'scenes-test-0-\d"):
        evaluate_hessian(Encoder(model, processor), empty, HessianOptions(batches=1, pairs=8))
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="dual encoder"):
        evaluate_hessian(Encoder(plain, processor), tiny_scenes, HessianOptions(batches=1, pairs=2))
    with pytest.raises(ValueError, match="Linear has no logit_scale"):
        ContrastiveLoss(plain, make_batches(1, 8), "image")
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        ContrastiveLoss(small_clip, make_batches(1, 8), "image", 0)
