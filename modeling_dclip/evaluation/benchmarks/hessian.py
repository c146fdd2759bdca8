"""How curved a checkpoint's loss is: the largest and the smallest eigenvalues of its Hessian on fixed batches.

The loss is CLIP's: cross-entropy of an image's own caption among the captions of its batch, and the other way round,
averaged over batches. Every batch holds different images with one caption each.

Compare models only where all of these are equal, because the numbers depend on them:

- the images and captions;
- the number of **pairs in a batch**: a caption competes with those of its batch;
- the **temperature** (by default the model's own): a sharper loss is more curved;
- the tower;
- the parameterisation: the same function with layers scaled against each other has another Hessian.

Models are in eval mode: BatchNorm uses its stored statistics and dropout is off.

Products with the Hessian differentiate twice through the plain form of attention, because the fused forms have no
second derivative. DM-CLIP's selective scan has its own. Lanczos needs memory for `steps + 2` copies of the tower's
parameters, and for the graph of one batch's gradient: two to three times what a training step on that batch needs.

Sources: "How Do Vision Transformers Work?", arXiv 2202.06709, reads the loss surface of image encoders off the
Hessian's eigenvalues, the negative ones too; Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Lanczos
with full reorthogonalisation as in any textbook. The poster of DM-CLIP says that Mamba's loss surface is hard and
gives no number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from modeling_dclip.data.images import PixelReader
from modeling_dclip.encoders import DualEncoder, Encoder
from modeling_dclip.encoders.families import projected, tokenize_texts
from modeling_dclip.encoders.loading import require_dual_encoder
from modeling_dclip.evaluation.records import BenchmarkResult

Product = Callable[[torch.Tensor], torch.Tensor]
HESSIAN_TOWERS = ("image", "text", "all")  # what the Hessian may be of


class Ritz(NamedTuple):
    """The eigenvalues that one run of Lanczos found, the largest first; S entries, one for each step.

    Attributes:
        values (`torch.Tensor` of shape `(S,)`): float64 estimates of eigenvalues.
        residuals (`torch.Tensor` of shape `(S,)`): An eigenvalue lies within this distance of each estimate, up to the
            precision of the products.
    """

    values: torch.Tensor
    residuals: torch.Tensor


def _ritz(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Ritz:
    """Solve the tridiagonal matrix; the last off-diagonal entry is outside it and gives the residuals."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    inner = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    matrix += torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Ritz(values.flip(0), (off_diagonal[-1] * vectors[-1]).abs().flip(0))


def _orthogonalise(vector: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Remove the basis' rows `(S, size)` from a vector `(size,)`. Two passes are enough."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def lanczos(
    product: Product,
    size: int,
    *,
    steps: int,
    k: int = 1,
    tolerance: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Ritz:
    """Run Lanczos from a random start vector.

    Holds `steps + 2` vectors of the operator's size, beyond what a product needs.

    Args:
        product (`Callable`): Takes and returns a vector `(size,)`; linear and symmetric.
        size (`int`): Of the vectors.
        steps (`int`): Most products with the operator. After `size` of them all eigenvalues are exact, and it stops.
        k (`int`, *optional*, defaults to 1): How many of the largest eigenvalues `tolerance` is about.
        tolerance (`float`, *optional*, defaults to 0): Stop early once the residuals of the k largest and of the
            smallest are at most this share of the largest magnitude. 0 makes all steps.
        seed (`int`, *optional*, defaults to 0): Of the start vector. It is drawn on the CPU: the same on every device.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Of the vectors.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the vectors.

    Returns:
        [`Ritz`]: As many entries as steps were made.

    Raises:
        ValueError: If a size, a count or the tolerance is out of range, or a product is not finite.

    Example:
        >>> lanczos(lambda v: v * torch.tensor([1.0, -2.0, 5.0]), 3, steps=3).values.round(decimals=4).tolist()
        [5.0, 1.0, -2.0]
    """
    if size < 1 or steps < 1 or not 1 <= k <= steps or tolerance < 0:
        raise ValueError(
            f"Expected size, steps >= 1, k in [1, steps] and tolerance >= 0, got {size}, {steps}, {k}, {tolerance}."
        )
    generator = torch.Generator().manual_seed(seed)
    steps = min(steps, size)
    basis = torch.empty(steps, size, device=device, dtype=dtype)
    vector = torch.randn(size, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    with tqdm(total=steps, desc="Lanczos", unit="step") as progress:
        for step in range(steps):
            basis[step] = vector / torch.linalg.vector_norm(vector)
            vector = product(basis[step])
            if not torch.isfinite(vector).all():
                raise ValueError(
                    f"Expected finite products, got NaN or infinity in step {step}. Check the model's weights."
                )
            diagonal.append(float(basis[step] @ vector))
            vector = _orthogonalise(vector, basis[: step + 1])
            off_diagonal.append(float(torch.linalg.vector_norm(vector)))
            progress.update()
            found = _ritz(diagonal, off_diagonal)
            scale = float(found.values.abs().max())
            progress.set_postfix(largest=f"{float(found.values[0]):.4g}", refresh=False)
            if off_diagonal[-1] <= 10 * torch.finfo(dtype).eps * scale:
                # The start vector reaches no further. Another one finds the rest, such as repeated eigenvalues.
                off_diagonal[-1] = 0.0
                vector = torch.randn(size, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)
                vector = _orthogonalise(vector, basis[: step + 1])
            checked = torch.cat([found.residuals[:k], found.residuals[-1:]])
            if step + 1 >= min(k + 1, steps) and (checked <= tolerance * scale).all() and tolerance:
                break
    return _ritz(diagonal, off_diagonal)


class PairBatch(NamedTuple):
    """One batch of B images with one caption each.

    Attributes:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): The images.
        text_inputs (`dict[str, torch.Tensor]`): The captions, each of shape `(B, T)`: what `get_text_features` takes.
    """

    pixel_values: torch.Tensor
    text_inputs: dict[str, torch.Tensor]

    def to(self, device: torch.device | str) -> "PairBatch":
        """Move the batch to a device."""
        texts = {name: tensor.to(device) for name, tensor in self.text_inputs.items()}
        return PairBatch(self.pixel_values.to(device), texts)

    def first(self) -> "PairBatch":
        """Take the first pair alone."""
        return PairBatch(self.pixel_values[:1], {name: tensor[:1] for name, tensor in self.text_inputs.items()})


def draw_batches(
    model: DualEncoder, processor: Any, dataset: Dataset, *, batches: int, pairs: int, seed: int = 0
) -> list[PairBatch]:
    """Draw batches of different images, one caption each.

    Args:
        model (`DualEncoder`): Decides how texts are tokenized.
        processor: The model's, with `image_processor` and `tokenizer`.
        dataset (`datasets.Dataset`): With `image_id`, `image` and `captions`.
        batches (`int`): How many, 1 or more.
        pairs (`int`): Images in each, 2 or more.
        seed (`int`, *optional*, defaults to 0): Decides images, captions and their order.

    Returns:
        `list[PairBatch]`: On the CPU.

    Raises:
        ValueError: If there are fewer images than asked for, a batch has fewer than two, or an image or a caption is
            bad; the message names the image's id.
    """
    needed = batches * pairs
    if batches < 1 or pairs < 2 or needed > len(dataset):
        raise ValueError(
            f"Expected one or more batches of two or more images, together at most the dataset's {len(dataset)}, got "
            f"{batches} of {pairs}. Lower the options batches or pairs, or give more images."
        )
    generator = np.random.default_rng(seed)
    dataset = dataset.select(generator.permutation(len(dataset))[:needed])
    texts = []
    for image_id, captions in zip(dataset["image_id"], dataset["captions"], strict=True):
        if not captions or not all(caption and caption.strip() for caption in captions):
            raise ValueError(
                f"Expected non-empty captions for image_id {image_id!r}, got {captions!r}. Remove the image."
            )
        texts.append(captions[generator.integers(len(captions))])
    reader = PixelReader(dataset, processor.image_processor, cache_mib=0)
    drawn = []
    for start in range(0, needed, pairs):
        rows = np.arange(start, start + pairs)
        drawn.append(PairBatch(reader.read(rows), tokenize_texts(model, processor, texts[start : start + pairs])))
    return drawn


def _image_embeds(model: DualEncoder, batch: PairBatch) -> torch.Tensor:
    pixel_values = batch.pixel_values.to(next(model.parameters()).dtype)
    return F.normalize(projected(model.get_image_features(pixel_values=pixel_values)), dim=-1)


def _text_embeds(model: DualEncoder, batch: PairBatch) -> torch.Tensor:
    return F.normalize(projected(model.get_text_features(**batch.text_inputs)), dim=-1)


class ContrastiveLoss:
    """A model's contrastive loss on fixed batches as a function of one tower's parameters.

    It gives the loss, and products with the loss's Hessian. Embeddings that do not depend on the tower are computed
    once. The model's weights are only read, but `requires_grad` is set: use it inside [`restored`].

    Args:
        model (`DualEncoder`): In eval mode, on the device to use, float32 or float64.
        batches (`Sequence[PairBatch]`): On that device.
        tower (`str`): `"image"` or `"text"`: the parameters that an image's or a text's embedding depends on; `"all"`:
            every parameter.
        temperature (`float`, *optional*): > 0; by default the model's own.

    Raises:
        ValueError: If the tower is unknown, the temperature is not > 0, or the model has no `logit_scale` and no
            temperature is given.
    """

    def __init__(self, model: DualEncoder, batches: Sequence[PairBatch], tower: str, temperature: float | None = None):
        if tower not in HESSIAN_TOWERS:
            raise ValueError(f"Expected one of {HESSIAN_TOWERS} as the tower, got {tower!r}.")
        logit_scale = getattr(model, "logit_scale", None)
        if temperature is None and logit_scale is None:
            raise ValueError(f"Expected a temperature, since {type(model).__name__} has no logit_scale. Give one.")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"Expected a temperature > 0, got {temperature}.")
        self.model, self.batches, self.tower, self.temperature = model, batches, tower, temperature
        self.logit_scale = cast(torch.Tensor, logit_scale)  # not used if there is a temperature
        self.parameters = self._parameters()
        self.fixed: list[torch.Tensor] = []
        if tower != "all":
            embed = _text_embeds if tower == "image" else _image_embeds
            with torch.no_grad():
                self.fixed = [embed(model, batch) for batch in batches]

    @property
    def size(self) -> int:
        """The number of entries of all parameters together."""
        return sum(parameter.numel() for parameter in self.parameters)

    def _parameters(self) -> list[torch.nn.Parameter]:
        """Find the parameters by differentiating an embedding, which needs no names of modules."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.is_floating_point()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        if self.tower != "all":
            embed = _image_embeds if self.tower == "image" else _text_embeds
            with sdpa_kernel(SDPBackend.MATH):
                found = torch.autograd.grad(
                    embed(self.model, self.batches[0].first()).sum(), parameters, allow_unused=True
                )
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.requires_grad_(gradient is not None)
        return [parameter for parameter in parameters if parameter.requires_grad]

    def of_batch(self, index: int) -> torch.Tensor:
        """The loss of one batch, a tensor of shape `()`, in nats."""
        batch = self.batches[index]
        images = self.fixed[index] if self.tower == "text" else _image_embeds(self.model, batch)
        texts = self.fixed[index] if self.tower == "image" else _text_embeds(self.model, batch)
        scale = 1 / self.temperature if self.temperature is not None else self.logit_scale.exp()
        logits = images @ texts.T * scale  # in the model's own precision: second derivatives need it
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    @torch.no_grad()
    def value(self) -> float:
        """The mean loss over all batches, in nats."""
        return sum(float(self.of_batch(index)) for index in range(len(self.batches))) / len(self.batches)

    def hessian_product(self, vector: torch.Tensor) -> torch.Tensor:
        """Multiply the Hessian with a vector `(size,)`; the result has the vector's dtype and device."""
        shares = vector.split([parameter.numel() for parameter in self.parameters])
        directions = [
            share.view_as(parameter).to(parameter.dtype)
            for share, parameter in zip(shares, self.parameters, strict=True)
        ]
        total = torch.zeros_like(vector)
        for index in range(len(self.batches)):
            with sdpa_kernel(SDPBackend.MATH):
                loss = self.of_batch(index)
                gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
                slope = sum((one * way).sum() for one, way in zip(gradients, directions, strict=True))
                products = torch.autograd.grad(slope, self.parameters, materialize_grads=True)
            total += torch.cat([product.flatten().to(vector.dtype) for product in products])
        return total / len(self.batches)


@contextmanager
def restored(model: DualEncoder) -> Iterator[None]:
    """Restore a model's mode, and which of its parameters take a gradient, at the end."""
    training, flags = model.training, [parameter.requires_grad for parameter in model.parameters()]
    try:
        yield
    finally:
        model.train(training)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


@dataclass(frozen=True, kw_only=True)
class HessianOptions:
    """What the Hessian is of, and how exactly its eigenvalues are found.

    Args:
        k (`int`, *optional*, defaults to 5): How many of the largest eigenvalues.
        steps (`int`, *optional*, defaults to 40): Most steps of Lanczos. Each is one product with the Hessian over all
            batches.
        batches (`int`, *optional*, defaults to 4): The loss is the mean over this many batches.
        pairs (`int`, *optional*, defaults to 64): Images in a batch, with one caption each; 2 or more.
        tower (`str`, *optional*, defaults to `"image"`): `"image"`, `"text"`, or `"all"`, which has `logit_scale` as a
            parameter too.
        temperature (`float`, *optional*): Of the loss, > 0; by default the model's own.
        tolerance (`float`, *optional*, defaults to 0.01): Stop once the error of every eigenvalue is at most this
            share of the largest magnitude.
    """

    k: int = 5
    steps: int = 40
    batches: int = 4
    pairs: int = 64
    tower: str = "image"
    temperature: float | None = None
    tolerance: float = 0.01


def evaluate_hessian(
    encoder: Encoder, dataset: Dataset, options: HessianOptions | None = None, *, seed: int = 0
) -> BenchmarkResult:
    """Measure the ends of the Hessian's spectrum; the module's text says what the numbers depend on.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): Its model is in float32 or float64. `batch_size` and
            `num_workers` change nothing: the batches are part of what is measured.
        dataset (`datasets.Dataset`): With `image_id`, `image` and `captions`; `batches * pairs` images are drawn from
            it.
        options ([`HessianOptions`], *optional*): By default its defaults.
        seed (`int`, *optional*, defaults to 0): Of images, captions and the start vector.

    Returns:
        `BenchmarkResult`: `hessian_eigenvalue_1` (the largest) to `hessian_eigenvalue_<k>`; `hessian_eigenvalue_min`,
            negative where the loss is not convex; `contrastive_loss` of these batches, in nats; `n` images and
            `n_captions`. Further `residuals`, in the order of the eigenvalues (an eigenvalue lies within this distance
            of each); `parameters` (`int`); and `steps` (`int`), the number made. `outcomes` is empty: no metric is a
            mean over images.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`draw_batches`], [`ContrastiveLoss`] and [`lanczos`]; also if the model is in half
            precision, whose second derivatives are noise.
    """
    options = options or HessianOptions()
    model = encoder.model
    require_dual_encoder(model)
    device = encoder.compute_device
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Expected a model in float32 or float64, got {dtype}. Load it with dtype=torch.float32.")
    drawn = draw_batches(model, encoder.processor, dataset, batches=options.batches, pairs=options.pairs, seed=seed)
    drawn = [batch.to(device) for batch in drawn]
    with restored(model):
        loss = ContrastiveLoss(model.to(device).eval(), drawn, options.tower, options.temperature)
        found = lanczos(
            loss.hessian_product,
            loss.size,
            steps=options.steps,
            k=options.k,
            tolerance=options.tolerance,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        value, size = loss.value(), loss.size
    kept = min(options.k, len(found.values))
    pairs = options.batches * options.pairs
    return {
        **{f"hessian_eigenvalue_{i + 1}": float(found.values[i]) for i in range(kept)},
        "hessian_eigenvalue_min": float(found.values[-1]),
        "contrastive_loss": value,
        "n": pairs,
        "n_captions": pairs,
        "parameters": size,
        "steps": len(found.values),
        "outcomes": {},
        "residuals": [*found.residuals[:kept].tolist(), float(found.residuals[-1])],
    }
