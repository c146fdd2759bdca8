"""Lanczos finds the ends of spectra that are known, says how sure it is, and repeats itself by seed."""

import pytest
import torch

from modeling_dclip.evaluation.benchmarks.hessian import lanczos


def symmetric(values, seed=0):
    """A full matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def run(matrix, dtype=torch.float64, **options):
    matrix = matrix.to(dtype)
    return lanczos(lambda vector: matrix @ vector, len(matrix), dtype=dtype, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_all_steps_give_the_whole_spectrum(dtype, tolerance):
    values = [9.0, 4.0, 3.5, 1.0, 0.25, 0.0, -0.5, -2.0]
    found = run(symmetric(values), dtype, steps=50)
    assert found.values.tolist() == pytest.approx(values, abs=tolerance)


def test_repeated_eigenvalues_are_all_found():
    values = [3.0, 3.0, 3.0, 1.0, 1.0, -2.0]
    assert run(symmetric(values), steps=6).values.tolist() == pytest.approx(values, abs=1e-8)
    assert run(torch.zeros(4, 4), steps=4).values.tolist() == [0, 0, 0, 0]


def test_few_steps_find_the_ends_of_a_wide_spectrum_without_ghosts():
    # 3 outliers over a bulk, as networks' Hessians have them; float32 without reorthogonalisation repeats the first
    values = [100.0, 60.0, 30.0, *torch.linspace(1, -1, 397).tolist()]
    found = run(symmetric(values), torch.float32, steps=60)
    assert found.values[:3].tolist() == pytest.approx(values[:3], rel=1e-5)
    assert float(found.values[3]) < 1.001 and float(found.values[-1]) == pytest.approx(-1, abs=0.01)


def test_residuals_bound_the_distance_to_an_eigenvalue():
    values = torch.linspace(-3, 5, 80)
    found = run(symmetric(values.tolist()), steps=15)
    distances = (found.values[:, None] - values.double()).abs().min(dim=1).values
    assert (distances <= found.residuals + 1e-9).all() and float(found.residuals[5]) > 0.01


def test_it_stops_once_all_that_was_asked_for_is_sure():
    matrix = symmetric([100.0, 60.0, 30.0, *torch.linspace(1, -1, 97).tolist()])
    products = 0

    def count(vector):
        nonlocal products
        products += 1
        return matrix @ vector

    one = lanczos(count, 100, steps=90, k=1, tolerance=1e-2, dtype=torch.float64)
    first, products = products, 0
    three = lanczos(count, 100, steps=90, k=3, tolerance=1e-8, dtype=torch.float64)
    assert first == len(one.values) < products == len(three.values) < 90
    assert float(one.values[0]) == pytest.approx(100, abs=1)
    assert three.values[:3].tolist() == pytest.approx([100, 60, 30], abs=1e-5)


def test_the_seed_decides():
    matrix = symmetric(torch.linspace(-3, 5, 80).tolist())
    one, same, other = (run(matrix, steps=6, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.allclose(one.values, other.values, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 2, "k": 3}, {"steps": 2, "k": 0}, {"steps": 2, "tolerance": -1}]
)
def test_bad_counts_are_named(options):
    with pytest.raises(ValueError, match=r"k in \[1, steps\]"):
        run(torch.eye(3), **options)


def test_a_product_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="NaN or infinity in step 0"):
        run(torch.full((3, 3), torch.nan), steps=2)
