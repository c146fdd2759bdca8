"""Eigenvalues at the ends of a symmetric operator, and its spectral density, from products with vectors alone.

Lanczos with full reorthogonalisation: without it, rounding lets converged eigenvalues come again as ghosts.

Sources: Golub and Van Loan, "Matrix Computations", chapter 10 (Lanczos); stochastic Lanczos quadrature for Hessians, "An Investigation into
Neural Net Optimization via Hessian Eigenvalue Density", arXiv 1901.10159.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

Product = Callable[[torch.Tensor], torch.Tensor]


class Ritz(NamedTuple):
    """What one run of Lanczos says of an operator, by descending eigenvalue; S entries, one a step.

    Attributes:
        values (`torch.Tensor` of shape `(S,)`): float64 estimates of eigenvalues.
        residuals (`torch.Tensor` of shape `(S,)`): Within this distance of each estimate lies an eigenvalue (to the precision of products).
        weights (`torch.Tensor` of shape `(S,)`): Squared share of the start vector in each; they sum to 1. For the spectral density.
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
        tolerance (`float`, *optional*, defaults to 0): Stop early once the residuals of the k largest and of the smallest are at most this
            share of the largest magnitude. 0: all steps.
        seed (`int`, *optional*, defaults to 0): Of the start vector, which is drawn on the CPU, the same for every device.
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
                # What the start vector can reach is exhausted; another one finds what it left out, such as repeated eigenvalues.
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
        width (`float`, *optional*, defaults to 0.01): Deviation of the Gaussian as a share of the spectrum's width, > 0.

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
