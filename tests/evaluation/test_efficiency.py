"""Costs that are known beforehand come out: seconds of a made-up clock, products, tensors of a known size, powers."""

import doctest

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


@pytest.fixture
def clock(monkeypatch):
    """The clocks that `efficiency` reads, which only what is called moves on: no machine is too busy for these tests."""

    class Clock:
        wall = cpu = 1000.0

        def pass_by(self, wall, cpu=0.0):
            self.wall += wall
            self.cpu += cpu

        def perf_counter(self):
            return self.wall

        def process_time(self):
            return self.cpu

    clock = Clock()
    monkeypatch.setattr(efficiency, "time", clock)
    return clock


def test_each_call_is_charged_its_own_time_by_both_clocks(clock):
    calls = {"waits": lambda: clock.pass_by(0.02), "works": lambda: clock.pass_by(0.004, cpu=0.003)}
    times = interleaved_times(calls, rounds=2, min_ms=8)  # the second takes two to fill it, and is averaged
    for waits, works in zip(times["waits"], times["works"], strict=True):
        assert waits == {"latency_ms": pytest.approx(20), "cpu_ms": pytest.approx(0)}
        assert works == {"latency_ms": pytest.approx(4), "cpu_ms": pytest.approx(3)}


def test_short_calls_are_repeated(clock):
    count = [0]

    def call():
        count[0] += 1
        clock.pass_by(2**-10)

    interleaved_times({"call": call}, rounds=2, min_ms=10)
    assert count[0] == 1 + 2 * 11  # once to warm up, then as many of 0.98 ms as fill 10


def test_a_slow_set_stops_after_three_rounds_and_a_quick_one_does_not(clock):
    assert len(interleaved_times({"slow": lambda: clock.pass_by(5)}, rounds=50, max_seconds=12)["slow"]) == 3
    assert len(interleaved_times({"quick": lambda: clock.pass_by(0.01)}, rounds=50, max_seconds=12)["quick"]) == 50


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
