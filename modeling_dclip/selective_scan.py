"""The selective scan of Mamba: one function, several ways to compute it, all equal in value and gradient.

Source: docs/papers.md, selective scan. Letters in shape comments: B batch, D channels, L scan length, N state,
R rows of S positions.
"""

import math
import re

import torch
import torch.nn.functional as F

from .selective_scan_chunked import chunked_backward, chunked_forward, chunked_starts_shape

try:
    from .selective_scan_triton import INTERPRETED, triton_backward, triton_forward, triton_starts_shape
except ImportError:  # Triton comes with CUDA builds of torch
    triton_forward, INTERPRETED = None, False

BACKENDS = ("auto", "reference", "torch", "triton", "mamba_ssm")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_TENSORS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus"


def selective_scan(x, delta, A, B, C, D=None, *, delta_bias=None, delta_softplus=False, backend="auto"):
    """Run a linear recurrence along the sequence whose decay, input and output depend on the position.

    For each channel, from `h = 0`: `h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t` and `y_t = C_t . h_t + D x_t`, in
    float32, or float64 where `x` is. Autocast changes nothing. `"auto"` takes the Triton kernel for CUDA tensors and
    PyTorch's operators elsewhere.

    - `"reference"`: the definition, a step at a time.
    - `"torch"`: on the CPU a chunk at a time, one operator to `torch.compile`; on other devices, and while exporting,
      in two levels.
    - `"triton"`: a fused kernel for CUDA, compiled at its first call. No float64.
    - `"mamba_ssm"`: the kernel of that package, where it is installed. Never taken unasked. No float64.

    Source: docs/papers.md, selective scan. Deviation: none.

    Args:
        x (`torch.Tensor` of shape `(B, D, L)`): Input. Gradient flows to it and to every other tensor, in the tensor's
            dtype.
        delta (`torch.Tensor` of shape `(B, D, L)`): Step sizes, >= 0; with `delta_softplus` any value.
        A (`torch.Tensor` of shape `(D, N)`): Rates of decay, <= 0.
        B (`torch.Tensor` of shape `(B, N, L)`): How the input enters the state.
        C (`torch.Tensor` of shape `(B, N, L)`): How the state is read.
        D (`torch.Tensor` of shape `(D,)`, *optional*): The share of `x` that goes past the state.
        delta_bias (`torch.Tensor` of shape `(D,)`, *optional*): Added to `delta`.
        delta_softplus (`bool`, *optional*, defaults to `False`): Make the steps `softplus(delta + delta_bias)`.
        backend (`str`, *optional*, defaults to `"auto"`): How to compute it.

    Returns:
        `torch.Tensor` of shape `(B, D, L)`: In `x`'s dtype. Memory may be laid out with the channels innermost.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or if the backend is unknown or cannot run here.

    Example:
        >>> ones = torch.ones(1, 1, 3)
        >>> selective_scan(ones, ones, torch.zeros(1, 1), ones, ones).flatten().tolist()  # no decay: a running sum
        [1.0, 2.0, 3.0]
    """
    _check_tensors(x, delta, A, B, C, D, delta_bias)
    arguments = (x, delta, A, B, C, D, delta_bias, bool(delta_softplus))
    backend = _choose_backend(backend, x)
    if backend == "mamba_ssm":
        return _scan_mamba_ssm(*arguments)
    if backend == "reference":
        return _scan_reference(*arguments)
    if backend == "two_level":
        return scan_two_level(*arguments)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in arguments[:-1]
    )
    scan = _triton_scan if backend == "triton" else _chunked_scan
    return scan(*arguments, needs_grad)[0]


def _check_tensors(x, delta, A, B, C, D, delta_bias):
    if x.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"Expected x of shape (batch, channels, length) and A of shape (channels, state), got {tuple(x.shape)} "
            f"and {tuple(A.shape)}."
        )
    batch, channels, length = x.shape
    state = A.shape[1]
    if length == 0 or state == 0:
        raise ValueError(f"Expected at least one position and one state, got {length} and {state}.")
    shapes = {
        "x": (x, (batch, channels, length)),
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, state)),
        "B": (B, (batch, state, length)),
        "C": (C, (batch, state, length)),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None and name in ("D", "delta_bias"):
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"Expected {name} of shape {shape}, after x and A, got {tuple(tensor.shape)}.")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"Expected {name} in one of {FLOATS}, got {tensor.dtype}. Cast it first.")
        if tensor.device != x.device:
            raise ValueError(f"Expected {name} on x's device {x.device}, got {tensor.device}. Move it first.")


def _choose_backend(backend, x):
    """The name of the function to run: a backend that was asked for, or `"chunked"` or `"two_level"`."""
    on_cuda = x.device.type == "cuda"
    if backend == "auto":
        backend = "triton" if on_cuda and triton_forward and x.dtype != torch.float64 and not _exporting() else "torch"
    if backend == "torch":
        return "chunked" if x.device.type == "cpu" and not _exporting() else "two_level"
    if backend not in BACKENDS:
        raise ValueError(f"Expected one of {BACKENDS} as the backend, got {backend!r}.")
    if backend == "triton" and triton_forward is None:
        raise ValueError("Expected Triton for the backend 'triton', but it is not installed. Take 'auto' or 'torch'.")
    if backend in ("triton", "mamba_ssm"):
        if not on_cuda and not (backend == "triton" and INTERPRETED):
            raise ValueError(
                f"Expected tensors on a CUDA device for the backend {backend!r}, got {x.device}. Take 'auto' or "
                "'torch'."
            )
        if x.dtype == torch.float64:
            raise ValueError(f"Expected at most float32 for the backend {backend!r}, got float64. Take 'torch'.")
    return backend


def _exporting():
    """Whether the graph is for other programs, which lack the operators below."""
    # Before torch 2.12 dynamo takes `is_exporting()` for true under `torch.compile` too.
    dynamo_knows = torch.__version__ >= "2.12" or not torch.compiler.is_dynamo_compiling()
    return (torch.compiler.is_exporting() and dynamo_knows) or torch.onnx.is_in_onnx_export()


def _inputs_and_steps(x, delta, delta_bias, delta_softplus):
    """`x` and the step sizes in the dtype of the state."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = delta.to(dtype)
    if delta_bias is not None:
        steps = steps + delta_bias.to(dtype)[:, None]
    return x.to(dtype), F.softplus(steps) if delta_softplus else steps


def _scan_reference(x, delta, A, B, C, D, delta_bias, delta_softplus):
    """The definition, a step at a time."""
    inputs, steps = _inputs_and_steps(x, delta, delta_bias, delta_softplus)
    A, B, C = (tensor.to(inputs.dtype) for tensor in (A, B, C))
    state = torch.zeros_like(A).expand(len(x), -1, -1)  # (B, D, N)
    outputs = []
    for x_t, step, B_t, C_t in zip(*(tensor.unbind(-1) for tensor in (inputs, steps, B, C)), strict=True):
        step = step[..., None]
        state = torch.exp(step * A) * state + step * B_t[:, None] * x_t[..., None]
        outputs.append((state * C_t[:, None]).sum(dim=-1))
    outputs = torch.stack(outputs, dim=-1)
    if D is not None:
        outputs = outputs + D.to(inputs.dtype)[:, None] * inputs
    return outputs.to(x.dtype)


def scan_two_level(x, delta, A, B, C, D, delta_bias, delta_softplus):
    """The square root of L steps, twice: along all rows of S positions at once, then from row to row.

    The fewest launches that plain operators need without dividing by a decay, at the price of all states in memory.
    """
    inputs, steps = _inputs_and_steps(x, delta, delta_bias, delta_softplus)
    length = x.shape[-1]
    side = math.isqrt(length - 1) + 1
    rows = -(-length // side)

    def fold(tensor):  # (B, ..., L) to (B, R, S, ...); a step of 0 passes the state on
        tensor = F.pad(tensor.to(inputs.dtype), (0, rows * side - length))
        return tensor.unflatten(-1, (rows, side)).permute(0, 2, 3, 1).contiguous()

    rates = A.to(inputs.dtype).T  # (N, D)
    steps_, driven = fold(steps)[..., None, :], fold(steps * inputs)[..., None, :]
    decays = torch.exp(steps_ * rates)  # (B, R, S, N, D)
    inflows = driven * fold(B)[..., None]
    states = [inflows[:, :, 0]]
    # unbind, not indexing: the gradient of an index is a tensor of the whole's size
    for decay, inflow in zip(decays.unbind(2)[1:], inflows.unbind(2)[1:], strict=True):
        states.append(torch.addcmul(inflow, decay, states[-1]))
    row_ends, row_decays = states[-1], torch.exp(steps_.sum(dim=2) * rates)  # (B, R, N, D)
    starts = [torch.zeros_like(row_ends[:, 0])]
    for decay, row_end in zip(row_decays.unbind(1)[:-1], row_ends.unbind(1)[:-1], strict=True):
        starts.append(torch.addcmul(row_end, decay, starts[-1]))
    decays_since_start = torch.exp(steps_.cumsum(dim=2) * rates)
    states = torch.stack(states, dim=2) + decays_since_start * torch.stack(starts, dim=1)[:, :, None]
    outputs = (states * fold(C)[..., None]).sum(dim=-2).flatten(1, 2)[:, :length].transpose(1, 2)
    if D is not None:
        outputs = outputs + D.to(inputs.dtype)[:, None] * inputs
    return outputs.to(x.dtype)


def _scan_mamba_ssm(x, delta, A, B, C, D, delta_bias, delta_softplus):
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ValueError(
            "Expected the package mamba-ssm for the backend 'mamba_ssm', but it cannot be imported. Install it on a "
            "machine with CUDA (`pip install mamba-ssm --no-build-isolation`), or take 'auto'."
        ) from error
    A, D, delta_bias = (None if tensor is None else tensor.float() for tensor in (A, D, delta_bias))
    delta, B, C = (tensor.to(x.dtype) for tensor in (delta, B, C))  # its kernel takes one dtype
    return selective_scan_fn(x, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus)


def _define_operator(name, forward, backward, starts_shape, empty_like):
    """Register a forward and a backward function as operators that `torch.compile` keeps whole."""
    # The Hub's copy of this file lives beside the installed one: each has its own namespace.
    name = f"{re.sub(r'[^0-9A-Za-z_]', '_', __name__)}::{name}"
    library = torch.library

    @library.custom_op(name, mutates_args=(), schema=f"({_TENSORS}, bool keep_starts) -> (Tensor, Tensor)")
    def scan(x, *arguments):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, *arguments)

    returns = ", ".join(["Tensor"] * 7)
    schema = f"(Tensor grad, Tensor starts, {_TENSORS}) -> ({returns})"

    @library.custom_op(f"{name}_backward", mutates_args=(), schema=schema)
    def scan_backward(grad, *arguments):
        with torch.autocast(grad.device.type, enabled=False):
            return backward(grad, *arguments)

    @scan.register_fake
    def _(x, delta, A, B, C, D, delta_bias, delta_softplus, keep_starts):
        shape = starts_shape(*x.shape, A.shape[1]) if keep_starts else (0,)
        return empty_like(x), x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))

    @scan_backward.register_fake
    def _(grad, starts, x, delta, A, B, C, D, delta_bias, delta_softplus):
        A, D, delta_bias = (
            x.new_empty(0) if tensor is None else _empty_contiguous(tensor) for tensor in (A, D, delta_bias)
        )
        return empty_like(x), empty_like(delta), A, empty_like(B), empty_like(C), D, delta_bias

    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.delta_softplus = inputs[7]
        ctx.save_for_backward(output[1], *inputs[:7])

    def differentiate(ctx, grad, _):
        if grad is None:
            return (None,) * 9
        starts, *tensors = ctx.saved_tensors
        grads = scan_backward(grad, starts, *tensors, ctx.delta_softplus)
        return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)), None, None

    scan.register_autograd(differentiate, setup_context=keep)

    def keep_backward(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.delta_softplus = inputs[9]
        ctx.save_for_backward(inputs[0], *inputs[2:9])

    scan_backward.register_autograd(_differentiate_twice, setup_context=keep_backward)
    return scan


def _empty_rows(tensor):
    """`(B, K, L)` with K innermost in memory, as the operators return it."""
    return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)


def _empty_contiguous(tensor):
    return tensor.new_empty(tensor.shape)


def _differentiate_twice(ctx, *grads_of_grads):
    """Gradients of the gradients, for Hessian-vector products:
    through the plain operators, a path that is slower and needs more memory.
    """
    grad, *tensors = (None if saved is None else saved.detach().requires_grad_() for saved in ctx.saved_tensors)
    given = [tensor for tensor in tensors if tensor is not None]
    weights = [weight for tensor, weight in zip(tensors, grads_of_grads, strict=True) if tensor is not None]
    if all(weight is None for weight in weights):
        return (None,) * 10
    with torch.enable_grad():
        outputs = scan_two_level(*tensors, ctx.delta_softplus)
        grads = torch.autograd.grad(outputs, given, grad, create_graph=True)
        pairs = [(first, weight) for first, weight in zip(grads, weights, strict=True) if weight is not None]
        firsts, weights = zip(*pairs, strict=True)
        by_grad, *by_tensor = torch.autograd.grad(firsts, [grad, *given], weights, allow_unused=True)
    by_tensor = iter(by_tensor)
    return by_grad, None, *(None if tensor is None else next(by_tensor) for tensor in tensors), None


_chunked_scan = _define_operator("chunked", chunked_forward, chunked_backward, chunked_starts_shape, _empty_rows)
if triton_forward:
    _triton_scan = _define_operator("triton", triton_forward, triton_backward, triton_starts_shape, _empty_contiguous)
