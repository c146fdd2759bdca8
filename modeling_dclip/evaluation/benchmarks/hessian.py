"""How curved a checkpoint's loss is: the largest eigenvalues of its Hessian, and the smallest, on fixed batches of
captioned images.

The loss is CLIP's: cross-entropy of an image's own caption among those of its batch, and the other way round, averaged
over batches. Every batch holds different images with one caption each.

What the numbers depend on, and so has to be equal where models are compared: the images and captions, the number of
**pairs a batch** (a caption competes with those of its batch), the **temperature** (the model's own unless given;
sharper is more curved), the tower, and how the model is parameterised (the same function with layers scaled up and
down against each other has another Hessian). Models are in eval mode: BatchNorm uses its stored statistics, nothing is
dropped.

Products with the Hessian come from differentiating twice, through the plain form of attention: the fused ones have no
second derivative. DM-CLIP's selective scan has its own. Memory: `(steps + 2)` times the parameters of the tower for
Lanczos, and the graph of one batch's gradient, two to three times what a training step of that batch needs.

Sources: "How Do Vision Transformers Work?", arXiv 2202.06709, reads the loss surface of image encoders off the
Hessian's eigenvalues, the negative ones too; products with the Hessian, Pearlmutter 1994, "Fast exact multiplication
by the Hessian". The poster of DM-CLIP says that Mamba's surface is hard and gives no number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from modeling_dclip.data.images import PixelReader
from modeling_dclip.encoders.families import projected, tokenize_texts
from modeling_dclip.encoders.loading import require_dual_encoder

Product = Callable[[torch.Tensor], torch.Tensor]


class Ritz(NamedTuple):
    """What one run of Lanczos says of an operator, by descending eigenvalue; S entries, one a step.

    Attributes:
        values (`torch.Tensor` of shape `(S,)`): float64 estimates of eigenvalues.
        residuals (`torch.Tensor` of shape `(S,)`): Within this distance of each estimate lies an eigenvalue (to the
            precision of products).
        weights (`torch.Tensor` of shape `(S,)`): Squared share of the start vector in each; they sum to 1. For the
            spectral density.
    """

    values: torch.Tensor
    residuals: torch.Tensor
    weights: torch.Tensor


def _ritz(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Ritz:
    """Of the tridiagonal matrix; the last off-diagonal entry leads out of it."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    inner = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    matrix += torch.diag(inner, 1) + torch.diag(inner, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Ritz(values.flip(0), (off_diagonal[-1] * vectors[-1]).abs().flip(0), vectors[0].square().flip(0))


def _orthogonalise(vector: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Remove the basis' rows from a vector; twice is enough."""
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
        steps (`int`): At most so many products; no more than `size` are made, and then all eigenvalues are exact.
        k (`int`, *optional*, defaults to 1): How many of the largest eigenvalues `tolerance` is about.
        tolerance (`float`, *optional*, defaults to 0): Stop early once the residuals of the k largest and of the
            smallest are at most this share of the largest magnitude. 0: all steps.
        seed (`int`, *optional*, defaults to 0): Of the start vector, which is drawn on the CPU, the same for every
            device.
        device, dtype (*optional*): Of the vectors.

    Returns:
        [`Ritz`]

    Raises:
        ValueError: If a size, a count or the tolerance does not fit, or a product is not finite.

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
                # What the start vector can reach is exhausted; another one finds what it left out, such as repeated
                # eigenvalues.
                off_diagonal[-1] = 0.0
                vector = torch.randn(size, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)
                vector = _orthogonalise(vector, basis[: step + 1])
            checked = torch.cat([found.residuals[:k], found.residuals[-1:]])
            if step + 1 >= min(k + 1, steps) and (checked <= tolerance * scale).all() and tolerance:
                break
    return _ritz(diagonal, off_diagonal)


def spectral_density(
    runs: Sequence[Ritz], *, points: int = 400, width: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread the eigenvalues' share over the axis: stochastic Lanczos quadrature, smoothed by a Gaussian.

    Args:
        runs (`Sequence[Ritz]`): One or more, from different seeds; the average over them is the estimate.
        points (`int`, *optional*, defaults to 400): Places on the axis.
        width (`float`, *optional*, defaults to 0.01): Deviation of the Gaussian as a share of the spectrum's width, >
            0.

    Returns:
        `tuple`: Eigenvalues and density, each float64 `(points,)`; the density's integral is 1.

    Raises:
        ValueError: If there is no run, or a count or the width is too small.
    """
    if not runs or points < 2 or width <= 0:
        raise ValueError(
            f"Expected runs, two points or more and a width > 0, got {len(runs)} runs, {points}, {width}."
        )
    low = min(float(run.values[-1]) for run in runs)
    high = max(float(run.values[0]) for run in runs)
    extent = (high - low) or max(abs(high), 1.0)
    deviation = width * extent
    places = torch.linspace(low - 5 * deviation, high + 5 * deviation, points, dtype=torch.float64)
    density = torch.zeros_like(places)
    for run in runs:
        distances = (places[:, None] - run.values) / deviation
        density += (torch.exp(-(distances**2) / 2) * run.weights).sum(dim=1)
    return places, density / (len(runs) * deviation * (2 * torch.pi) ** 0.5)


TOWERS = ("image", "text", "all")


class PairBatch(NamedTuple):
    """One batch of B images with one caption each: `pixel_values` (B, 3, H, W), and what `get_text_features` takes,
    each (B, T).
    """

    pixel_values: torch.Tensor
    text_inputs: dict[str, torch.Tensor]

    def to(self, device: torch.device | str) -> "PairBatch":
        """On another device."""
        texts = {name: tensor.to(device) for name, tensor in self.text_inputs.items()}
        return PairBatch(self.pixel_values.to(device), texts)

    def first(self) -> "PairBatch":
        """The first pair alone."""
        return PairBatch(self.pixel_values[:1], {name: tensor[:1] for name, tensor in self.text_inputs.items()})


def draw_batches(
    model: torch.nn.Module, processor: Any, dataset: Dataset, *, batches: int, pairs: int, seed: int = 0
) -> list[PairBatch]:
    """Draw batches of different images, one caption each.

    Args:
        model (`torch.nn.Module`): Says how it reads text.
        processor: The model's, with `image_processor` and `tokenizer`.
        dataset (`datasets.Dataset`): With `image_id`, `image` and `captions`.
        batches, pairs (`int`): How many, and of how many images, 2 or more.
        seed (`int`, *optional*, defaults to 0): Decides images, captions and their order.

    Returns:
        `list[PairBatch]`: On the CPU.

    Raises:
        ValueError: If there are fewer images than asked for, a batch has fewer than two, or an image or a caption is
            bad, naming it.
    """
    needed = batches * pairs
    if batches < 1 or pairs < 2 or needed > len(dataset):
        raise ValueError(
            f"Expected one or more batches of two or more images, together at most the dataset's {len(dataset)}, got "
            f"{batches} of {pairs}. Lower them or give more images."
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


def _image_embeds(model: torch.nn.Module, batch: PairBatch) -> torch.Tensor:
    pixel_values = batch.pixel_values.to(next(model.parameters()).dtype)
    return F.normalize(projected(model.get_image_features(pixel_values=pixel_values)), dim=-1)


def _text_embeds(model: torch.nn.Module, batch: PairBatch) -> torch.Tensor:
    return F.normalize(projected(model.get_text_features(**batch.text_inputs)), dim=-1)


class ContrastiveLoss:
    """A model's contrastive loss on fixed batches as a function of one tower's parameters: its value, and products
    with its Hessian.

    What the tower does not change is computed once. The model is read, not changed, but for `requires_grad` and its
    mode: use it inside [`frozen_but`] or on a model of one's own.

    Args:
        model (`torch.nn.Module`): A dual encoder, in eval mode, on the device to use, float32 or float64.
        batches (`Sequence[PairBatch]`): On that device.
        tower (`str`): `"image"` or `"text"`, what an image's or a text's embedding depends on; `"all"`, every
            parameter.
        temperature (`float`, *optional*): > 0; the model's own if not given.

    Raises:
        ValueError: If the tower is unknown, the temperature is not > 0, or there is none and no `logit_scale` either.
    """

    def __init__(
        self, model: torch.nn.Module, batches: Sequence[PairBatch], tower: str, temperature: float | None = None
    ):
        if tower not in TOWERS:
            raise ValueError(f"Expected one of {TOWERS} as the tower, got {tower!r}.")
        if temperature is None and getattr(model, "logit_scale", None) is None:
            raise ValueError(f"Expected a temperature, since {type(model).__name__} has no logit_scale. Give one.")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"Expected a temperature > 0, got {temperature}.")
        self.model, self.batches, self.tower, self.temperature = model, batches, tower, temperature
        self.parameters = self._parameters()
        self.fixed: list[torch.Tensor] | None = None
        if tower != "all":
            embed = _text_embeds if tower == "image" else _image_embeds
            with torch.no_grad():
                self.fixed = [embed(model, batch) for batch in batches]

    @property
    def size(self) -> int:
        """How many numbers the parameters are."""
        return sum(parameter.numel() for parameter in self.parameters)

    def _parameters(self) -> list[torch.nn.Parameter]:
        """Those the loss is a function of, by following an embedding back: no names of modules are needed."""
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
        """The loss of one batch, `()`."""
        batch = self.batches[index]
        images = self.fixed[index] if self.tower == "text" else _image_embeds(self.model, batch)
        texts = self.fixed[index] if self.tower == "image" else _text_embeds(self.model, batch)
        scale = 1 / self.temperature if self.temperature is not None else self.model.logit_scale.exp()
        logits = images @ texts.T * scale  # in the model's own precision, for second derivatives need it
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    @torch.no_grad()
    def value(self) -> float:
        """The loss, in nats."""
        return sum(float(self.of_batch(index)) for index in range(len(self.batches))) / len(self.batches)

    def hessian_product(self, vector: torch.Tensor) -> torch.Tensor:
        """The Hessian times a vector `(size,)`, in the vector's type and place."""
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
def frozen_but(model: torch.nn.Module) -> Iterator[None]:
    """Give a model back as it came: its mode, and which parameters take a gradient."""
    training, flags = model.training, [parameter.requires_grad for parameter in model.parameters()]
    try:
        yield
    finally:
        model.train(training)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def evaluate_hessian(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    *,
    k: int = 5,
    steps: int = 40,
    batches: int = 4,
    pairs: int = 64,
    tower: str = "image",
    temperature: float | None = None,
    tolerance: float = 0.01,
    probes: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Measure the ends of the Hessian's spectrum; see the module's text for what the numbers depend on.

    Args:
        model (`torch.nn.Module`): A dual encoder, in float32 or float64. Comes back as it was.
        processor: The model's, with `image_processor` and `tokenizer`.
        dataset (`datasets.Dataset`): With `image_id`, `image` and `captions`; `batches * pairs` images are drawn from
            it.
        k (`int`, *optional*, defaults to 5): How many of the largest eigenvalues.
        steps (`int`, *optional*, defaults to 40): Of Lanczos, at most: one product with the Hessian each, over all
            batches.
        batches, pairs (`int`, *optional*, default to 4 and 64): The loss is the mean over so many batches of so many
            pairs.
        tower (`str`, *optional*, defaults to `"image"`): `"image"`, `"text"` or `"all"`, where `logit_scale` is a
            parameter too.
        temperature (`float`, *optional*): Of the loss; the model's own if not given.
        tolerance (`float`, *optional*, defaults to 0.01): Stop once each number is sure to so much of the largest
            magnitude.
        probes (`int`, *optional*, defaults to 0): Runs of all `steps` from other start vectors, for the spectral
            density.
        seed (`int`, *optional*, defaults to 0): Of images, captions and start vectors.
        device (`torch.device` or `str`, *optional*): Where to compute; where the model is if not given.
        batch_size, num_workers (`int`, *optional*): Moot: no number may depend on them. Taken for likeness with other
            benchmarks.

    Returns:
        `dict[str, Any]`: `hessian_eigenvalue_1` (the largest) to `hessian_eigenvalue_<k>`, `hessian_eigenvalue_min`
            (negative where the loss is not convex), `contrastive_loss` (of these batches, in nats), `n` images,
            `n_captions`. Further `residuals` (in the order of the eigenvalues: within this distance of each lies an
            eigenvalue), `parameters` (`int`), `steps` (`int`, those made), and with probes `density` (`eigenvalues`
            and `density`, lists). `outcomes` is empty: no metric is a mean over images.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`draw_batches`], [`ContrastiveLoss`] and
            [`~modeling_dclip.evaluation.benchmarks.hessian.lanczos`]; also if a model is in half precision, whose
            second derivatives are noise.
    """
    require_dual_encoder(model)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Expected a model in float32 or float64, got {dtype}. Load it with dtype=torch.float32.")
    drawn = [
        batch.to(device) for batch in draw_batches(model, processor, dataset, batches=batches, pairs=pairs, seed=seed)
    ]
    with frozen_but(model):
        loss = ContrastiveLoss(model.to(device).eval(), drawn, tower, temperature)
        options = {"steps": steps, "k": k, "device": device, "dtype": dtype}
        found = lanczos(loss.hessian_product, loss.size, tolerance=tolerance, seed=seed, **options)
        runs = [lanczos(loss.hessian_product, loss.size, seed=seed + 1 + probe, **options) for probe in range(probes)]
        value, size = loss.value(), loss.size
    kept = min(k, len(found.values))
    result: dict[str, Any] = {f"hessian_eigenvalue_{i + 1}": float(found.values[i]) for i in range(kept)}
    result |= {"hessian_eigenvalue_min": float(found.values[-1]), "contrastive_loss": value}
    result |= {"n": batches * pairs, "n_captions": batches * pairs, "parameters": size}
    result |= {"steps": len(found.values), "outcomes": {}}
    result["residuals"] = [*found.residuals[:kept].tolist(), float(found.residuals[-1])]
    if runs:
        eigenvalues, density = spectral_density(runs)
        result["density"] = {"eigenvalues": eigenvalues.tolist(), "density": density.tolist()}
    return result
