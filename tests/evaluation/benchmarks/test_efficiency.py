"""Costs that are known beforehand come out: seconds of a made-up clock, products, tensors of a known size, powers."""

import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_dual_encoders import save_dual_encoder
from torch import nn

from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.benchmarks import efficiency
from modeling_dclip.evaluation.benchmarks.efficiency import (
    count_flops,
    evaluate_efficiency,
    growth_exponent,
    interleaved_times,
    peak_memory_mib,
    scan_formulas,
)
from modeling_dclip.selective_scan import selective_scan


def test_calls_take_turns_and_each_round_is_kept():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved_times(calls, rounds=3, warmups=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert [len(taken) for taken in times.values()] == [3, 3, 3]


@pytest.fixture
def clock(monkeypatch):
    """The clocks that `efficiency` reads, which only what is called moves on:
    no machine is too busy for these tests.
    """

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


@torch.no_grad()
def test_the_fused_attention_of_eval_mode_is_counted_like_that_of_training():
    attention, tokens = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 10, 8)
    for mode in (True, False):
        attention.train(mode)
        assert count_flops(lambda: attention(tokens, tokens, tokens)) == 2 * (4 * 10 * 8 * 8 + 2 * 10 * 10 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


@torch.no_grad()
def test_a_selective_scan_counts_with_its_formula():
    x, delta, A, B = torch.randn(2, 6, 10), torch.rand(2, 6, 10), -torch.rand(6, 4), torch.randn(2, 4, 10)
    assert count_flops(lambda: selective_scan(x, delta, A, B, B)) == 0
    assert count_flops(lambda: selective_scan(x, delta, A, B, B), scan_formulas()) == 9 * 2 * 6 * 10 * 4


def test_latency_is_of_the_smallest_batch_and_throughput_of_the_largest(tiny_clip, clock, monkeypatch):
    model, processor = tiny_clip
    lengths = []

    def embed_images(pixel_values):
        clock.pass_by(0.030 + 0.001 * len(pixel_values))
        return torch.zeros(len(pixel_values), 4)

    def embed_texts(input_ids, attention_mask):
        lengths.append(input_ids.shape[1])
        clock.pass_by(0.025)
        return torch.zeros(len(input_ids), 4)

    monkeypatch.setattr(model, "get_image_features", embed_images)
    monkeypatch.setattr(model, "get_text_features", embed_texts)
    result = evaluate_efficiency(Encoder(model, processor), batch_sizes=(1, 20), rounds=4)
    assert result["n"] == 4
    assert result["image_latency_ms"] == pytest.approx(31) and result["text_latency_ms"] == pytest.approx(25)
    assert result["image_throughput_per_s"] == pytest.approx(20 / 0.050)
    assert result["text_throughput_per_s"] == pytest.approx(20 / 0.025)
    times = [name for name in result if name.endswith(("_ms", "_per_s"))]
    assert set(times) == set(result["spread"]) and len(times) == 4
    for name in times:
        assert result["spread"][name]["min"] <= result[name] <= result["spread"][name]["max"]
    assert set(lengths) == {77}  # the model's positions, filled


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2_naflex"])
def test_costs_of_a_model_are_those_of_its_parts(family, tmp_path):
    model, processor, _ = load_dual_encoder(save_dual_encoder(family, tmp_path))
    model.train()
    result = evaluate_efficiency(Encoder(model, processor), batch_sizes=[4, 2], rounds=1)
    shape = [16, 192] if family == "siglip2_naflex" else [3, 32, 32]
    settings = {"device": "cpu", "dtype": "float32", "batch_sizes": [2, 4], "image_shape": shape, "text_tokens": 16}
    assert model.training and result["measured_with"] == settings | {"torch_threads": torch.get_num_threads()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert result["parameters_millions"] == parameters / 1e6
    assert result["peak_memory_mib"] > 4 * parameters / 2**20
    # Two layers of width 16 over 16 patches (17 tokens with CLIP's class token), and what is before and after them.
    tokens, width = (17 if family == "clip" else 16), 16
    layers = 2 * 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 2 * width)
    patches = 2 * 16 * (3 * 8 * 8) * width
    assert layers + patches < 1e9 * result["image_gflop"] < 1.4 * (layers + patches)
    assert all(result[name] > 0 for name in result if isinstance(result[name], float))


def test_what_cannot_be_measured_is_refused(tiny_clip):
    with pytest.raises(ValueError, match="batch sizes of at least 1, got .0, 4."):
        evaluate_efficiency(Encoder(*tiny_clip), batch_sizes=(0, 4))
    with pytest.raises(ValueError, match="Expected one or more calls and rounds"):
        evaluate_efficiency(Encoder(*tiny_clip), rounds=0)
    with pytest.raises(TypeError, match="dual encoder"):
        evaluate_efficiency(Encoder(tiny_clip[0].vision_model, tiny_clip[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_is_measured_on_cuda(tiny_clip_dir):
    model, processor, _ = load_dual_encoder(tiny_clip_dir)
    result = evaluate_efficiency(Encoder(model, processor, device="cuda"), batch_sizes=(1, 64), rounds=3)
    assert result["measured_with"]["device"] == "cuda" and result["image_latency_ms"] > 0
    assert result["peak_memory_mib"] > 4 * result["parameters_millions"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_and_time_on_cuda():
    x = torch.ones(256, 1024, device="cuda")
    assert peak_memory_mib(lambda: x + 1, "cuda") == pytest.approx(1, abs=0.1)
    assert interleaved_times({"add": lambda: x + 1}, rounds=1, device="cuda")["add"][0]["latency_ms"] > 0
