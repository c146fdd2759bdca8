"""Intervals against tables, coverage by simulation, pairing, bad input."""

import math

import pytest
import torch
from scipy.stats import binom, binomtest, norm, t

from modeling_dclip.evaluation.statistics import (
    GAIN_METRIC,
    Interval,
    bootstrap_outcomes,
    bootstrap_ratio,
    compare_to_anchor,
    differences_to_anchor,
    exact_interval,
    seed_interval,
    t_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 9, 2.26216), (0.95, 3, 2.35336),
     (0.995, 5, 4.03214), (0.975, 30, 2.04227), (0.975, 1000, 1.96234)],
)  # fmt: skip
def test_t_quantiles_equal_the_printed_table(probability, degrees, expected):
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=3e-6)


def test_seed_interval_equals_the_textbook_formula():
    values = [0.20, 0.23, 0.22, 0.25, 0.21]
    interval = seed_interval(values)
    tensor = torch.tensor(values, dtype=torch.double)
    half = 2.776445 * float(tensor.std()) / math.sqrt(5)
    assert interval.estimate == pytest.approx(float(tensor.mean()))
    assert (interval.low, interval.high) == pytest.approx((float(tensor.mean()) - half, float(tensor.mean()) + half))
    assert interval.covers == "seeds"


def test_seed_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 3, generator=generator) + 5
    covered = [low <= 5 <= high for _, low, high, *_ in (seed_interval(row.tolist()) for row in draws)]
    assert 0.92 <= sum(covered) / len(covered) <= 0.98


def test_one_run_has_no_interval():
    assert seed_interval([0.4]) == Interval(0.4, None, None, 0.95, "nothing")


@pytest.mark.parametrize("values", [[], [0.1, math.nan]])
def test_runs_must_be_finite_and_there(values):
    with pytest.raises(ValueError, match="one or more finite values"):
        seed_interval(values)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (1, 1), (37, 400)])
def test_the_exact_interval_equals_scipys(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert exact_interval(hits, n)[:3] == pytest.approx((hits / n, expected.low, expected.high), abs=1e-9)


def test_a_share_is_above_a_level_where_the_binomial_test_says_so():
    for hits in range(1, 31):
        assert (exact_interval(hits, 100).low > 0.1) == (binom.sf(hits - 1, 100, 0.1) < 0.025)


@pytest.mark.parametrize(("hits", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_hits_must_be_in_the_number_of_images(hits, n):
    with pytest.raises(ValueError, match="hits in"):
        exact_interval(hits, n)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_all_images_have_still_has_an_interval(share):
    counts = torch.tensor([2.0, 1.0, 3.0, 0.0])  # an image without a count says nothing
    found = bootstrap_outcomes({"recall": torch.stack([share * counts, counts], dim=1)})["recall"]
    assert found == exact_interval(share * 3, 3)


def test_a_ratio_of_models_is_no_share():
    assert bootstrap_ratio(torch.zeros(10), torch.ones(10))[:3] == (0.0, 0.0, 0.0)
    assert bootstrap_ratio(torch.ones(10), torch.ones(10))[:3] == (1.0, 1.0, 1.0)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    """Hits with a true ratio of 0.5 / 0.4, correlated between the two models."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        luck = torch.rand(300, generator=generator)
        interval = bootstrap_ratio((luck < 0.5).float(), (luck < 0.4).float(), resamples=300, seed=trial)
        covered += interval.low <= 0.5 / 0.4 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_pairing_makes_the_interval_of_equal_models_a_point():
    hits = (torch.arange(50) % 3 == 0).float()
    interval = bootstrap_ratio(hits, hits)
    assert (interval.estimate, interval.low, interval.high, interval.covers) == (1.0, 1.0, 1.0, "images")


def test_bootstrap_equals_a_naive_loop():
    numerators, denominators = torch.tensor([1.0, 0.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 2.0, 1.0])
    rows = torch.randint(4, (101, 4), generator=torch.Generator().manual_seed(7))
    ratios = sorted(
        sum(float(numerators[i]) for i in row) / sum(float(denominators[i]) for i in row) for row in rows.tolist()
    )
    interval = bootstrap_ratio(numerators, denominators, resamples=101, confidence=0.9, seed=7)
    widened = 2 * norm.cdf(t.ppf(0.95, 3) * math.sqrt(4 / 3)) - 1  # for four images, as Hesterberg says
    place = math.floor((1 - widened) / 2 * 100)
    assert (interval.low, interval.high) == pytest.approx((ratios[place], ratios[100 - place]))


def test_a_gain_and_a_difference_of_few_images_agree_on_what_is_beyond_noise():
    """Thirty pairs of models on 10 images of 5 captions, some of them just apart and some just not."""
    generator, apart = torch.Generator().manual_seed(0), 0
    for _ in range(30):
        hits = [(torch.rand(10, 5, generator=generator) < share).double().sum(dim=1) for share in (0.4, 0.6)]
        anchor, student = (torch.stack([own, torch.full_like(own, 5)], dim=1) for own in hits)
        both = {GAIN_METRIC: student}, {GAIN_METRIC: anchor}
        (gain,), (difference,) = (found(*both).values() for found in (compare_to_anchor, differences_to_anchor))
        assert (gain["low"] > 0, gain["high"] < 0) == (difference["low"] > 0, difference["high"] < 0)
        apart += gain["low"] > 0
    assert 5 < apart < 25


def test_the_same_seed_gives_the_same_interval():
    hits = (torch.rand(100, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    assert bootstrap_ratio(hits, hits.flip(0), seed=3) == bootstrap_ratio(hits, hits.flip(0), seed=3)
    assert bootstrap_ratio(hits, hits.flip(0), seed=3) != bootstrap_ratio(hits, hits.flip(0), seed=4)


def test_draws_without_a_reference_hit_open_the_interval_above():
    interval = bootstrap_ratio(torch.ones(3), torch.tensor([1.0, 0.0, 0.0]))
    assert interval.high == math.inf
    assert interval.to_dict()["high"] is None


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        ((torch.ones(3), torch.ones(4)), {}, r"got \(3,\) and \(4,\)"),
        ((torch.ones(1), torch.ones(1)), {}, "length >= 2"),
        ((torch.ones(3), torch.zeros(3)), {}, "at least one hit"),
        ((torch.ones(3), torch.ones(3)), {"confidence": 95}, r"confidence in \(0, 1\), got 95"),
        ((torch.ones(3), torch.ones(3)), {"resamples": 0}, "resamples >= 1"),
    ],
)
def test_bad_bootstraps_are_named(pair, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ratio(*pair, **options)


@pytest.mark.parametrize(("probability", "degrees"), [(0.5, 3), (1.0, 3), (0.9, 0)])
def test_bad_quantiles_are_refused(probability, degrees):
    with pytest.raises(ValueError, match="probability in"):
        t_quantile(probability, degrees)
