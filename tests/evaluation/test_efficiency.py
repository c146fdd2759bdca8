"""Costs that are known beforehand come out: sleeps, products, tensors of a known size, powers."""

import doctest
import time

import pytest
import torch
import torch.nn.functional as F

from modeling_dclip.evaluation import efficiency
from modeling_dclip.evaluation.efficiency import count_flops, growth_exponent, interleaved_times, peak_memory_mib


def test_examples_are_true():
    assert doctest.testmod(efficiency).failed == 0


def test_calls_take_turns_and_each_round_is_kept():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved_times(calls, rounds=3, warmups=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert [len(taken) for taken in times.values()] == [3, 3, 3]


def test_times_tell_a_long_call_from_a_short_one():
    times = interleaved_times({"long": lambda: time.sleep(0.02), "short": lambda: None}, rounds=2, min_ms=0.1)
    for long, short in zip(times["long"], times["short"], strict=True):
        assert long["latency_ms"] >= 20 > 10 > short["latency_ms"]
        assert long["cpu_ms"] < long["latency_ms"]  # sleeping costs the wall clock only


def test_short_calls_are_repeated():
    count = [0]

    def call():
        count[0] += 1
        time.sleep(0.001)

    interleaved_times({"call": call}, rounds=1, min_ms=10)
    assert 5 <= count[0] <= 12  # once to warm up, then as many as fill 10 ms


def test_a_slow_set_stops_after_three_rounds():
    times = interleaved_times({"slow": lambda: time.sleep(0.01)}, rounds=50, max_seconds=0)
    assert len(times["slow"]) == 3


@pytest.mark.parametrize("calls, rounds", [({}, 1), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_an_error(calls, rounds):
    with pytest.raises(ValueError, match="Expected one or more calls and rounds"):
        interleaved_times(calls, rounds=rounds)


def test_attention_counts_as_two_products():
    queries = torch.randn(1, 2, 10, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(queries, queries, queries)) == 2 * (2 * 2 * 10 * 10 * 8)


def test_a_convolution_counts_its_products():
    images, kernel = torch.randn(1, 3, 8, 8), torch.randn(5, 3, 3, 3)
    assert count_flops(lambda: F.conv2d(images, kernel, padding=1)) == 2 * 5 * 3 * 9 * 64


def test_peak_memory_is_what_lives_at_once():
    x = torch.ones(256, 1024)  # 1 MiB

    def call():
        y = x + 1  # 1 MiB
        y = y * 2  # 2 at once, then 1
        return y + y  # 2 at once

    assert peak_memory_mib(call) == pytest.approx(2, abs=0.1)
    assert peak_memory_mib(call) == peak_memory_mib(call)


@pytest.mark.parametrize("sizes, costs", [([1], [1]), ([1, 2], [1]), ([2, 2], [1, 2]), ([1, 2], [0, 1])])
def test_growth_needs_two_sizes_and_positive_costs(sizes, costs):
    with pytest.raises(ValueError, match="Expected two or more positive sizes"):
        growth_exponent(sizes, costs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_and_time_on_cuda():
    x = torch.ones(256, 1024, device="cuda")
    assert peak_memory_mib(lambda: x + 1, "cuda") == pytest.approx(1, abs=0.1)
    assert interleaved_times({"add": lambda: x + 1}, rounds=1, device="cuda")["add"][0]["latency_ms"] > 0
