"""The selective scan: the definition in plain numbers, every path against it in value and gradient, then compilers and
bad input.

The Triton kernels run on a GPU (marker `gpu`) and, without one, in a process of their own under Triton's interpreter.
"""

import importlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_dclip import selective_scan as scan_module
from modeling_dclip.selective_scan import _chunked_scan, scan_two_level, selective_scan
from modeling_dclip.selective_scan_chunked import CHUNK, chunked_forward

NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias")
# By the dtype of what is compared, of the largest number in it. Everything is summed in float32 (float64 for float64),
# where the paths differ by a few roundings; a half type is rounded to once, at the end, by at most half of its
# epsilon.
TOLERANCE = {
    torch.float64: 16 * torch.finfo(torch.float64).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}
SHAPES = [  # batch, channels, length, state
    (1, 1, 1, 1),
    (2, 3, 7, 5),
    (1, 2, CHUNK, 8),
    (2, 5, CHUNK + 1, 3),
    (3, 4, 49, 8),
    (2, 6, 196, 8),
    (1, 2, 1000, 16),
    (1, 1, 4096, 8),
]
on_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or scan_module.INTERPRETED),
    reason="needs a CUDA device, or Triton's interpreter: see test_triton_kernels_pass_under_the_interpreter",
)
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(shape, dtype=torch.float64, device="cpu", parameter_dtype=None, seed=0):
    """Random tensors in the order of NAMES, of a mixer's size; x, delta, B and C in `dtype`."""
    batch, channels, length, state = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, channels, length)] * 2 + [(channels, state)] + [(batch, state, length)] * 2 + [(channels,)] * 2
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[2] = -tensors[2].abs() * 2 - 0.1
    tensors[1] = tensors[1] - 1
    parameter_dtype = parameter_dtype or torch.promote_types(dtype, torch.float32)
    dtypes = [dtype, dtype, parameter_dtype, dtype, dtype, parameter_dtype, parameter_dtype]
    return [tensor.to(device, kind) for tensor, kind in zip(tensors, dtypes, strict=True)]


def scan(tensors, delta_softplus=True, backend="reference"):
    x, delta, A, B, C, D, delta_bias = tensors
    if backend == "two_level":  # what "torch" takes where operators are launched, and while exporting
        return scan_two_level(*tensors, delta_softplus)
    return selective_scan(x, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, backend=backend)


def values_and_gradients(tensors, **options):
    """Outputs, then a gradient for each tensor that is there."""
    given = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    outputs = scan(given, **options)
    weights = torch.arange(outputs.numel(), device=outputs.device) % 7 - 2  # exact in every dtype
    weights = weights.view(outputs.shape).to(outputs.dtype)
    gradients = torch.autograd.grad(outputs, [tensor for tensor in given if tensor is not None], weights)
    return [outputs.detach(), *gradients]


def assert_equal(found, expected, where=""):
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        error = (one.double() - other.double()).abs().max().item()
        largest = other.double().abs().max().item()
        assert error <= TOLERANCE[one.dtype] * largest, f"{where} tensor {index}: {error} of {largest}"


def assert_equals_the_reference(tensors, delta_softplus=True, backend="torch"):
    """Compare with the reference in float64 on the same numbers."""
    options = {"delta_softplus": delta_softplus}
    found = values_and_gradients(tensors, backend=backend, **options)
    exact = [None if tensor is None else tensor.double() for tensor in tensors]
    kinds = [found[0].dtype, *(tensor.dtype for tensor in tensors if tensor is not None)]
    assert [tensor.dtype for tensor in found] == kinds
    assert_equal(found, values_and_gradients(exact, **options), backend)


def test_the_reference_is_the_recurrence_written_in_plain_numbers():
    tensors = make_inputs((2, 3, 6, 4))
    x, delta, A, B, C, D, delta_bias = (tensor.tolist() for tensor in tensors)
    found = scan(tensors)
    for b in range(2):
        for d in range(3):
            state = [0.0] * 4
            for t in range(6):
                step = math.log1p(math.exp(delta[b][d][t] + delta_bias[d]))
                state = [math.exp(step * A[d][n]) * state[n] + step * B[b][n][t] * x[b][d][t] for n in range(4)]
                expected = sum(C[b][n][t] * state[n] for n in range(4)) + D[d] * x[b][d][t]
                assert found[b, d, t].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", ["torch", "two_level"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paths_equal_the_reference_in_value_and_gradient(shape, backend):
    assert_equals_the_reference(make_inputs(shape, torch.float32), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "two_level"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_paths_equal_the_reference_in_every_dtype(dtype, backend):
    assert_equals_the_reference(make_inputs((2, 4, 70, 8), dtype), backend=backend)
    assert_equals_the_reference(make_inputs((2, 4, 70, 8), dtype, parameter_dtype=dtype), backend=backend)


OPTIONS = [(D, bias, softplus) for D in (True, False) for bias in (True, False) for softplus in (True, False)]


def take_options(tensors, with_D, with_bias, delta_softplus):
    *tensors, D, bias = tensors
    if not delta_softplus:
        tensors[1] = tensors[1].abs()
    return [*tensors, D if with_D else None, bias if with_bias else None]


@pytest.mark.parametrize("backend", ["torch", "two_level"])
@pytest.mark.parametrize("with_D, with_bias, delta_softplus", OPTIONS)
def test_paths_equal_the_reference_with_and_without_what_is_optional(with_D, with_bias, delta_softplus, backend):
    tensors = take_options(make_inputs((2, 3, 40, 4), torch.float32), with_D, with_bias, delta_softplus)
    assert_equals_the_reference(tensors, delta_softplus, backend)


def other_strides(tensors):
    """The same numbers: channels innermost, every second position, a batch expanded from one sample."""
    x, delta, A, B, C, D, delta_bias = tensors
    x = x.mT.contiguous().mT
    delta = delta.repeat_interleave(2, dim=-1)[..., ::2]
    return [x, delta, A.T.contiguous().T, B[:1].expand_as(B), C.mT.contiguous().mT, D, delta_bias]


@pytest.mark.parametrize("backend", ["torch", "two_level"])
def test_strides_change_nothing(backend):
    tensors = other_strides(make_inputs((2, 3, 50, 4), torch.float32))
    contiguous = [tensor.contiguous() for tensor in tensors]
    found = values_and_gradients(tensors, backend=backend)
    assert_equal(found, values_and_gradients(contiguous, backend=backend))
    assert_equals_the_reference(tensors, backend=backend)


def large_steps(shape, dtype=torch.float32):
    """Steps over which every state dies, between steps that leave it alone."""
    tensors = make_inputs(shape, dtype)
    tensors[1] = torch.where(torch.arange(shape[2]) % 3 == 0, 1e4, -1e4).expand_as(tensors[1]).to(dtype).clone()
    return tensors


@pytest.mark.parametrize("backend", ["reference", "torch", "two_level"])
def test_large_steps_give_no_nan(backend):
    tensors = large_steps((2, 3, 70, 4))
    assert all(torch.isfinite(tensor).all() for tensor in values_and_gradients(tensors, backend=backend))
    assert_equals_the_reference(tensors, backend=backend)


def test_many_samples_are_scanned_in_groups():
    shape = (5, 700, 40, 8)  # 5 samples of 5,600 states: groups of 2, 2 and 1
    assert_equals_the_reference(make_inputs(shape, torch.float32), backend="torch")


def test_a_batch_of_no_samples_gives_no_outputs():
    found = values_and_gradients(make_inputs((0, 3, 5, 2), torch.float32), backend="torch")
    assert found[0].shape == (0, 3, 5) and not found[3].any()


def test_gradients_are_those_of_finite_differences():
    tensors = [tensor.requires_grad_() for tensor in make_inputs((1, 2, CHUNK + 2, 2))]
    assert torch.autograd.gradcheck(lambda *given: scan(given, backend="torch"), tensors)


def test_second_derivatives_are_those_of_finite_differences():
    tensors = [tensor.requires_grad_() for tensor in make_inputs((1, 2, 5, 2))]
    assert torch.autograd.gradgradcheck(lambda *given: scan(given, backend="torch"), tensors)
    some = [tensor.requires_grad_(index == 0) for index, tensor in enumerate(make_inputs((1, 2, 5, 2)))]
    some[5] = some[6] = None
    assert torch.autograd.gradgradcheck(lambda x: scan([x, *some[1:]], delta_softplus=False, backend="torch"), some[0])


def test_only_the_states_at_the_chunks_starts_are_kept():
    tensors = make_inputs((2, 3, 2 * CHUNK + 1, 4), torch.float32)
    _, starts = chunked_forward(*tensors, True, keep_starts=True)
    assert starts.shape == (3, 2, 4, 3) and not starts[0].any() and starts[1].any()
    assert chunked_forward(*tensors, True, keep_starts=False)[1].numel() == 0
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()), lambda _: None):
        scan([tensor.requires_grad_() for tensor in tensors], backend="torch")
    assert sum(saved) == sum(tensor.numel() for tensor in tensors) + starts.numel()


@pytest.mark.parametrize("backend", ["reference", "torch", "two_level"])
def test_autocast_changes_nothing(backend):
    tensors = make_inputs((2, 3, 40, 4), torch.float32)
    expected = values_and_gradients(tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(tensors, backend=backend)  # backward too
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("complete", [True, False])
def test_the_operator_keeps_torchs_contract(complete):
    tensors = [tensor.requires_grad_() for tensor in make_inputs((2, 3, CHUNK + 1, 4), torch.float32)]
    if not complete:
        tensors = take_options([tensor.detach() for tensor in tensors], False, False, False)
        tensors[0].requires_grad_()
    torch.library.opcheck(_chunked_scan, (*tensors, complete, True))


def assert_foretold(operator, tensors):
    """Inductor takes sizes, strides and dtypes from the fake kernels and stops where the real ones differ."""
    backward = getattr(getattr(torch.ops, operator._namespace), f"{operator._name}_backward")
    outputs, starts = operator(*tensors, True, True)
    grads = backward(torch.ones_like(outputs), starts, *tensors, True)
    with FakeTensorMode() as mode:
        fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        fake_outputs, fake_starts = operator(*fakes, True, True)
        fake_grads = backward(torch.ones_like(fake_outputs), fake_starts, *fakes, True)
    real, foretold = (outputs, starts, *grads), (fake_outputs, fake_starts, *fake_grads)
    for index, (one, other) in enumerate(zip(real, foretold, strict=True)):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_and_strides_are_foretold(dtype):
    tensors = make_inputs((2, 3, CHUNK + 1, 4), dtype)
    assert_foretold(_chunked_scan, tensors)
    assert_foretold(_chunked_scan, other_strides(tensors))
    assert_foretold(_chunked_scan, [*tensors[:5], None, None])


class Mixer(torch.nn.Module):
    """The scan between operators."""

    def forward(self, x, delta, A, B, C, D, delta_bias):
        return selective_scan(x.sin(), delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True).cos()


def test_compiling_sees_one_operator_and_no_break():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    tensors = make_inputs((2, 3, 40, 4), torch.float32)
    compiled = torch.compile(Mixer(), fullgraph=True, backend=keep)
    assert torch.equal(compiled(*tensors), Mixer()(*tensors))
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("chunked" in operator for operator in operators) == 1 and len(operators) <= 5, operators


def test_compiled_gradients_are_the_eager_ones():
    tensors = [tensor.requires_grad_() for tensor in make_inputs((2, 3, 40, 4), torch.float32)]
    expected = torch.autograd.grad(Mixer()(*tensors).sum(), tensors)
    compiled = torch.compile(Mixer(), fullgraph=True, backend="aot_eager")
    assert_equal(torch.autograd.grad(compiled(*tensors).sum(), tensors), expected)


def test_exporting_takes_plain_operators_and_any_batch():
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} if index in (0, 1, 3, 4) else None for index in range(7))
    exported = torch.export.export(
        Mixer(), tuple(make_inputs((2, 3, 49, 4), torch.float32)), dynamic_shapes=dynamic, strict=False
    )
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets and all(target.startswith(("aten.", "<built-in function")) for target in targets), targets
    tensors = make_inputs((5, 3, 49, 4), torch.float32, seed=1)
    assert_equal([exported.module()(*tensors)], [Mixer()(*tensors)])


def test_onnx_gives_the_same_outputs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is the extra [export]")
    pytest.importorskip("onnxscript", reason="ONNX is the extra [export]")
    tensors = make_inputs((1, 2, 20, 3), torch.float32)
    torch.onnx.export(Mixer().eval(), tuple(tensors), tmp_path / "scan.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "scan.onnx")
    feeds = {place.name: tensor.numpy() for place, tensor in zip(session.get_inputs(), tensors, strict=True)}
    (outputs,) = session.run(None, feeds)
    assert_equal([torch.from_numpy(outputs)], [Mixer()(*tensors)])


def test_the_hubs_copy_and_the_installed_file_live_in_one_process(tmp_path, monkeypatch):
    folder = tmp_path / "copy-of_the_hub"  # as transformers may name it: not an identifier
    folder.mkdir()
    for path in Path(scan_module.__file__).parent.glob("selective_scan*.py"):
        shutil.copy(path, folder)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("copy-of_the_hub.selective_scan")
    tensors = make_inputs((1, 2, 9, 3), torch.float32)
    x, delta, A, B, C, D, bias = tensors
    found = copy.selective_scan(x, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    assert copy._chunked_scan is not _chunked_scan and torch.equal(found, scan(tensors, backend="torch"))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.ones(2, 3), "x of shape"),
        ("A", torch.ones(3), "A of shape"),
        ("delta", torch.ones(2, 3, 4), r"delta of shape \(2, 3, 5\).*got \(2, 3, 4\)"),
        ("A", torch.ones(4, 2), r"A of shape \(3, 2\)"),
        ("B", torch.ones(2, 3, 5), r"B of shape \(2, 2, 5\)"),
        ("C", torch.ones(2, 1, 2, 5), r"C of shape \(2, 2, 5\)"),
        ("D", torch.ones(1, 3), r"D of shape \(3,\)"),
        ("delta_bias", torch.ones(2), r"delta_bias of shape \(3,\)"),
        ("x", torch.ones(2, 3, 5, dtype=torch.int64), "x in one of.*int64"),
        ("A", torch.ones(3, 2, dtype=torch.complex64), "A in one of.*complex64"),
        ("C", torch.ones(2, 2, 5, device="meta"), "C on x's device cpu, got meta"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, value, message):
    tensors = dict(zip(NAMES, make_inputs((2, 3, 5, 2), torch.float32), strict=True))
    tensors[name] = value
    with pytest.raises(ValueError, match=message):
        selective_scan(**tensors)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="at least one position"):
        scan(make_inputs((2, 3, 0, 2)))


def test_a_backend_that_is_unknown_or_elsewhere_is_refused(monkeypatch):
    tensors = make_inputs((1, 2, 3, 2), torch.float32)
    with pytest.raises(ValueError, match="Expected one of.*'cuda'"):
        scan(tensors, backend="cuda")
    with pytest.raises(ValueError, match="CUDA device.*'mamba_ssm'.*cpu"):
        scan(tensors, backend="mamba_ssm")
    monkeypatch.setattr(scan_module, "INTERPRETED", False)
    if scan_module.triton_forward:
        with pytest.raises(ValueError, match="CUDA device.*'triton'.*cpu"):
            scan(tensors, backend="triton")
    monkeypatch.setattr(scan_module, "triton_forward", None)
    with pytest.raises(ValueError, match="Triton.*not installed"):
        scan(tensors, backend="triton")


def test_each_device_gets_its_backend(monkeypatch):
    def choose(device, dtype=torch.float32, backend="auto"):
        return scan_module._choose_backend(backend, SimpleNamespace(device=torch.device(device), dtype=dtype))

    monkeypatch.setattr(scan_module, "triton_forward", lambda: None)
    assert choose("cpu") == choose("cpu", backend="torch") == "chunked"
    assert choose("mps") == choose("cuda", backend="torch") == choose("cuda", torch.float64) == "two_level"
    assert choose("cuda") == choose("cuda", torch.bfloat16) == "triton"
    for backend in ("triton", "mamba_ssm"):
        with pytest.raises(ValueError, match="float64"):
            choose("cuda", torch.float64, backend)
    monkeypatch.setattr(scan_module, "triton_forward", None)
    assert choose("cuda") == "two_level"


def test_mamba_ssm_is_asked_in_its_own_terms(monkeypatch):
    """A stand-in for the package, which needs CUDA: the dtypes its kernel takes, and its argument names."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert {tensor.dtype for tensor in (u, delta, B, C)} == {torch.bfloat16} and z is None
        assert {tensor.dtype for tensor in (A, D, delta_bias)} == {torch.float32}
        return scan([u, delta, A, B, C, D, delta_bias], delta_softplus)

    tensors = make_inputs((1, 2, 9, 3), torch.bfloat16, parameter_dtype=torch.bfloat16)
    tensors[1] = tensors[1].float()
    with pytest.raises(ValueError, match="mamba-ssm.*cannot be imported"):
        monkeypatch.setitem(sys.modules, "mamba_ssm", None)
        scan_module._scan_mamba_ssm(*tensors, True)
    interface = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    assert_equal([scan_module._scan_mamba_ssm(*tensors, True)], [scan([tensor.bfloat16() for tensor in tensors])])


KERNEL_SHAPES = [(1, 1, 1, 1), (2, 2, 20, 5), (1, 2, 49, 8)]
KERNEL_SHAPES_GPU = [(2, 3, 1024, 8), (8, 512, 196, 8), (2, 5, 4096, 8), (3, 7, 33, 64)]


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("shape", KERNEL_SHAPES + KERNEL_SHAPES_GPU * torch.cuda.is_available(), ids=str)
def test_triton_equals_the_reference_in_value_and_gradient(shape):
    assert_equals_the_reference(make_inputs(shape, torch.float32, KERNEL_DEVICE), backend="triton")


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_equals_the_reference_in_half_precision(dtype):
    tensors = make_inputs((2, 2, 20, 3), dtype, KERNEL_DEVICE, parameter_dtype=dtype)
    assert_equals_the_reference(tensors, backend="triton")


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("with_D, with_bias, delta_softplus", [(True, False, False), (False, True, True)])
def test_triton_equals_the_reference_with_other_options_and_strides(with_D, with_bias, delta_softplus):
    tensors = other_strides(make_inputs((2, 2, 20, 4), torch.float32, KERNEL_DEVICE))
    tensors = take_options(tensors, with_D, with_bias, delta_softplus)
    assert_equals_the_reference(tensors, delta_softplus, "triton")


@pytest.mark.gpu
@on_kernels
def test_triton_large_steps_give_no_nan():
    tensors = [tensor.to(KERNEL_DEVICE) for tensor in large_steps((1, 2, 40, 3))]
    assert all(torch.isfinite(tensor).all() for tensor in values_and_gradients(tensors, backend="triton"))
    assert_equals_the_reference(tensors, backend="triton")


@pytest.mark.gpu
@on_kernels
@pytest.mark.parametrize("length", [32, 37])
def test_triton_blocks_hand_their_state_over(length, monkeypatch):
    from modeling_dclip import selective_scan_triton

    monkeypatch.setattr(selective_scan_triton, "BLOCK_STATES", 32)  # blocks of 16 positions
    assert_equals_the_reference(make_inputs((1, 2, length, 2), torch.float32, KERNEL_DEVICE), backend="triton")


@pytest.mark.gpu
@on_kernels
def test_triton_programs_may_take_several_channels(monkeypatch):
    from modeling_dclip import selective_scan_triton

    monkeypatch.setattr(selective_scan_triton, "PROGRAMS", 3)  # 2 x 5 channels: 3 a program, the last has 2
    assert_equals_the_reference(make_inputs((2, 5, 20, 3), torch.float32, KERNEL_DEVICE), backend="triton")


@pytest.mark.gpu
@on_kernels
def test_triton_operator_keeps_torchs_contract():
    tensors = make_inputs((1, 2, 5, 2), torch.float32, KERNEL_DEVICE)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        scan_module._triton_scan, (*(t.requires_grad_() for t in tensors), True, True), test_utils=tests
    )
    tensors = [tensor.detach() for tensor in tensors]
    assert_foretold(scan_module._triton_scan, tensors)
    assert_foretold(scan_module._triton_scan, [*other_strides(tensors)[:5], None, None])


def test_triton_kernels_pass_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch")
    if scan_module.INTERPRETED:
        pytest.skip("this process is the interpreter's")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_triton_", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed == len(KERNEL_SHAPES) + 9, done.stdout[-2000:]


@pytest.mark.parametrize("kernel, warps", [("_forward_kernel", 4), ("_backward_kernel", 8)])
def test_triton_kernels_compile_for_hopper_without_a_gpu(kernel, warps, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch")
    if scan_module.INTERPRETED:
        pytest.skip("the interpreter does not compile")
    from triton.backends.compiler import GPUTarget

    from modeling_dclip import selective_scan_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(selective_scan_triton, kernel)
    constants = dict.fromkeys(("HAS_D", "HAS_BIAS", "SOFTPLUS", "KEEP"), True) | {"BLOCK_N": 8, "BLOCK_L": 256}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    wide = {"A", "starts", "carries", "grad_A", "grad_B", "grad_C", "grad_D", "grad_bias"}
    half = {"x", "delta", "B", "C", "D", "bias", "y", "grad", "grad_x", "grad_delta"}
    kinds = dict.fromkeys(constants, "constexpr") | dict.fromkeys(wide, "*fp32") | dict.fromkeys(half, "*bf16")
    signature = {name: kinds.get(name, "i32") for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(function, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"] and ".target sm_90" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mamba_ssms_kernel_equals_the_reference(dtype):
    pytest.importorskip("mamba_ssm", reason="needs the extra [mamba]")
    assert_equals_the_reference(make_inputs((2, 8, 196, 8), dtype, "cuda", torch.float32), backend="mamba_ssm")
