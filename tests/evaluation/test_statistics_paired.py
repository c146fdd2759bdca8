"""Differences of two models: against a naive loop, coverage by simulation, what pairing gains, bad input."""

import math

import pytest
import torch
from scipy.stats import norm, t

from modeling_dclip.evaluation.statistics import bootstrap_differences, unpaired_difference


def outcomes(sums, counts=None):
    sums = torch.as_tensor(sums, dtype=torch.double)
    return torch.stack([sums, torch.ones_like(sums) if counts is None else torch.as_tensor(counts).double()], dim=1)


def test_it_equals_a_naive_loop():
    counts = [1, 2, 2, 1]
    first, second = outcomes([1, 0, 1, 1], counts), outcomes([1, 1, 2, 0], counts)
    rows = torch.randint(4, (101, 4), generator=torch.Generator().manual_seed(7)).tolist()

    def share(values, row):
        return sum(float(values[i, 0]) for i in row) / sum(float(values[i, 1]) for i in row)

    naive = sorted(share(second, row) - share(first, row) for row in rows)
    found = bootstrap_differences({"m": first}, {"m": second}, resamples=101, confidence=0.9, seed=7)["m"]
    assert found.estimate == pytest.approx(4 / 6 - 3 / 6)
    widened = 2 * norm.cdf(t.ppf(0.95, 3) * math.sqrt(4 / 3)) - 1  # for four images, as Hesterberg says
    place = math.floor((1 - widened) / 2 * 100)
    assert (found.low, found.high) == pytest.approx((naive[place], naive[100 - place]))


def test_intervals_cover_the_truth_as_often_as_they_say_and_are_narrower_than_unpaired_ones():
    """Two models at 0.4 and 0.5 that mostly find the same images hard."""
    generator = torch.Generator().manual_seed(0)
    covered, wider = 0, 0
    for trial in range(200):
        luck = torch.rand(300, generator=generator)
        first, second = (outcomes(luck < share) for share in (0.4, 0.5))
        found = bootstrap_differences({"m": first}, {"m": second}, resamples=300, seed=trial)["m"]
        covered += found.low <= 0.1 <= found.high
        ends = []
        for values in (first, second):
            mean = float(values[:, 0].mean())
            half = 1.96 * math.sqrt(mean * (1 - mean) / 300)
            ends.append(
                {"estimate": mean, "low": mean - half, "high": mean + half, "confidence": 0.95, "covers": "images"}
            )
        apart = unpaired_difference(*ends)
        wider += apart.high - apart.low > found.high - found.low
    assert 0.9 <= covered / 200 <= 0.99 and wider == 200


def test_the_same_model_differs_by_nothing():
    values = outcomes((torch.arange(50) % 3 == 0).float())
    assert bootstrap_differences({"m": values}, {"m": values})["m"][:3] == (0.0, 0.0, 0.0)


def test_draws_without_anything_to_count_are_left_out():
    first, second = (outcomes([share, 0, 0], [1, 0, 0]) for share in (0.0, 1.0))
    assert bootstrap_differences({"m": first}, {"m": second})["m"][:3] == (1.0, 1.0, 1.0)


def test_chunks_say_the_same_as_one_draw_after_the_other():
    """2,000 images are drawn 1,000 times a chunk, so 1,500 draws take two."""
    generator = torch.Generator().manual_seed(5)
    first, second = (outcomes(torch.rand(2000, generator=generator) < 0.4) for _ in range(2))
    found = bootstrap_differences({"m": first}, {"m": second}, resamples=1500)["m"]
    draws, generator = [], torch.Generator().manual_seed(0)
    for size in (1000, 500):
        rows = torch.randint(2000, (size, 2000), generator=generator)
        draws += (second[rows, 0].mean(dim=1) - first[rows, 0].mean(dim=1)).tolist()
    draws.sort()
    assert (found.low, found.high) == pytest.approx((draws[37], draws[-38]))


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (
            {"a": outcomes([1, 0])},
            {"b": outcomes([1, 0])},
            {},
            r"a metric that both models have, got \['a'\] and \['b'\]",
        ),
        ({"a": outcomes([1, 0])}, {"a": outcomes([1, 0, 1])}, {}, "the same two or more images"),
        ({"a": outcomes([1])}, {"a": outcomes([1])}, {}, "the same two or more images"),
        ({"a": outcomes([1, 0], [1, 2])}, {"a": outcomes([1, 0], [1, 1])}, {}, "the same counts.*'a'"),
        ({"a": outcomes([0, 0], [0, 0])}, {"a": outcomes([0, 0], [0, 0])}, {}, "above 0 in all"),
        ({"a": outcomes([1, 0])}, {"a": outcomes([1, 0])}, {"resamples": 0}, "resamples >= 1"),
        ({"a": outcomes([1, 0])}, {"a": outcomes([1, 0])}, {"confidence": 95}, r"confidence in \(0, 1\)"),
    ],
)
def test_bad_outcomes_are_named(first, second, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_differences(first, second, **options)


def test_what_covers_other_things_has_no_unpaired_interval():
    ends = {"estimate": 0.5, "low": 0.4, "high": 0.6, "confidence": 0.95, "covers": "images"}
    assert unpaired_difference(ends, {**ends, "covers": "seeds"}) is None
    assert unpaired_difference(ends, {**ends, "confidence": 0.9}) is None
    assert unpaired_difference(ends, {**ends, "high": None}) is None
    low, high = unpaired_difference(ends, ends)[1:3]
    assert (low, high) == pytest.approx((-0.1 * math.sqrt(2), 0.1 * math.sqrt(2)))


def test_few_images_do_not_tell_two_equal_models_apart_more_often_than_one_time_in_twenty_or_so():
    """Ten images of five captions; with plain percentiles it is one time in ten."""
    generator = torch.Generator().manual_seed(0)
    apart, trials = 0, 600
    for _ in range(trials):
        chance = torch.where(torch.rand(10, 1, generator=generator) < 0.5, 0.75, 0.25)
        first, second = ((torch.rand(10, 5, generator=generator) < chance).sum(dim=1) for _ in range(2))
        both = ({"m": outcomes(hits, [5] * 10)} for hits in (first, second))
        found = bootstrap_differences(*both, resamples=400)["m"]
        apart += found.low > 0 or found.high < 0
    assert 0.03 < apart / trials < 0.075
