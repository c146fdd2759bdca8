"""The selective scan as Triton kernels, parallel along the sequence, forward and backward.

Importing this file needs Triton.

A program scans a channel's positions in blocks with an associative scan. The backward pass computes the states anew
from the one at the block's start, shifts by loading the neighbour's inputs, and sums over channels in registers and in
partial sums: no atomics, so that a step gives the same gradient twice.

Source: docs/papers.md, selective scan. Letters in shape comments: B batch, D channels, L scan length, N state.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "Expected Triton, which comes with CUDA builds of torch; selective_scan.py does without."
    ) from error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK_STATES = 2048  # N x L of a block: twice that spills registers in the backward pass, compiled for sm_90
WARP_STATES = 512  # of which a warp takes so many, half in the backward pass
PROGRAMS = 512  # enough for any device; beyond it a program of the backward pass takes several channels
LOG2_E = tl.constexpr(1.4426950408889634)


def _block_length(state):
    return max(16, min(256, BLOCK_STATES // triton.next_power_of_2(state)))


def triton_starts_shape(batch, channels, length, state):
    """Shape of the kept states, `(L / block, B, D, N)`."""
    return (-(-length // _block_length(state)), batch, channels, state)


@triton.jit
def _follow(decay, state, next_decay, next_state):
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def _load_steps(delta, at, mask, bias, SOFTPLUS: tl.constexpr):
    """Step sizes and their slope; both 0 outside, so that the state passes on unchanged."""
    raw = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32) + bias
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        small = tl.exp(-tl.abs(raw))
        above = 1.0 + small
        # log1p(small) to full precision: the rounding of `above` cancels in the quotient.
        log1p = tl.where(above == 1.0, small, tl.log(above) * (small / (above - 1.0)))
        slope = tl.where(raw >= 0.0, 1.0, small) / above
        raw = tl.maximum(raw, 0.0) + log1p
    return tl.where(mask, raw, 0.0), tl.where(mask, slope, 0.0)


@triton.jit
def _forward_kernel(
    x, delta, A, B, C, D, bias, y, starts, batch, channels, length, state,
    x_b, x_d, x_l, delta_b, delta_d, delta_l, B_b, B_n, B_l, C_b, C_n, C_l,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    d, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, offsets = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_L)
    n_mask = n < state
    rates = tl.load(A + d * state + n, mask=n_mask, other=0.0) * LOG2_E
    shift = tl.load(bias + d).to(tl.float32) if HAS_BIAS else 0.0
    skip = tl.load(D + d).to(tl.float32) if HAS_D else 0.0
    carry = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, length, BLOCK_L):
        t = first + offsets
        mask = t < length
        tile_mask = n_mask[:, None] & mask[None, :]
        steps, _ = _load_steps(delta + b * delta_b + d * delta_d, t * delta_l, mask, shift, SOFTPLUS)
        inputs = tl.load(x + b * x_b + d * x_d + t * x_l, mask=mask, other=0.0).to(tl.float32)
        B_tile = tl.load(B + b * B_b + n[:, None] * B_n + t[None, :] * B_l, mask=tile_mask, other=0.0).to(tl.float32)
        C_tile = tl.load(C + b * C_b + n[:, None] * C_n + t[None, :] * C_l, mask=tile_mask, other=0.0).to(tl.float32)
        if KEEP:
            row = ((first // BLOCK_L) * batch + b) * channels + d
            tl.store(starts + row * state + n, carry, mask=n_mask)
        decays = tl.exp2(rates[:, None] * steps[None, :])
        inflows = B_tile * (steps * inputs)[None, :]
        inflows += tl.where(offsets[None, :] == 0, decays * carry[:, None], 0.0)
        _, states = tl.associative_scan((decays, inflows), 1, _follow)
        outputs = tl.sum(states * C_tile, axis=0) + skip * inputs
        tl.store(y + (b * channels + d) * length + t, outputs.to(y.dtype.element_ty), mask=mask)
        carry = tl.sum(tl.where(offsets[None, :] == BLOCK_L - 1, states, 0.0), axis=1)


@triton.jit
def _backward_kernel(
    grad, starts, x, delta, A, B, C, D, bias, carries, grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
    first, batch, channels, length, state, channels_each,
    grad_b, grad_d, grad_l, x_b, x_d, x_l, delta_b, delta_d, delta_l, B_b, B_n, B_l, C_b, C_n, C_l,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One block of positions, from `first`; the blocks behind it left their
    part in `carries` and added to the sums.
    """
    group, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, offsets = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_L)
    t = first + offsets
    n_mask, mask, before, behind = n < state, t < length, (offsets > 0) & (t <= length), t + 1 < length
    tile_mask = n_mask[:, None] & mask[None, :]
    B_at = B + b * B_b + n[:, None] * B_n + t[None, :] * B_l
    B_tile = tl.load(B_at, mask=tile_mask, other=0.0).to(tl.float32)
    B_before = tl.load(B_at - B_l, mask=n_mask[:, None] & before[None, :], other=0.0).to(tl.float32)
    C_tile = tl.load(C + b * C_b + n[:, None] * C_n + t[None, :] * C_l, mask=tile_mask, other=0.0).to(tl.float32)
    sum_B, sum_C = tl.zeros_like(B_tile), tl.zeros_like(B_tile)
    for d in range(group * channels_each, min((group + 1) * channels_each, channels)):
        row = b * channels + d  # (B, D)
        rates = tl.load(A + d * state + n, mask=n_mask, other=0.0)
        shift = tl.load(bias + d).to(tl.float32) if HAS_BIAS else 0.0
        skip = tl.load(D + d).to(tl.float32) if HAS_D else 0.0
        delta_at, x_at = delta + b * delta_b + d * delta_d, x + b * x_b + d * x_d + t * x_l
        steps, slopes = _load_steps(delta_at, t * delta_l, mask, shift, SOFTPLUS)
        steps_before, _ = _load_steps(delta_at, (t - 1) * delta_l, before, shift, SOFTPLUS)
        steps_behind, _ = _load_steps(delta_at, (t + 1) * delta_l, behind, shift, SOFTPLUS)
        inputs = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        inputs_before = tl.load(x_at - x_l, mask=before, other=0.0).to(tl.float32)
        grads = tl.load(grad + b * grad_b + d * grad_d + t * grad_l, mask=mask, other=0.0).to(tl.float32)

        start = tl.load(starts + row * state + n, mask=n_mask, other=0.0)
        inflows = tl.where(offsets[None, :] == 0, start[:, None], B_before * (steps_before * inputs_before)[None, :])
        decays_before = tl.exp2((rates * LOG2_E)[:, None] * steps_before[None, :])
        _, states_before = tl.associative_scan((decays_before, inflows), 1, _follow)
        decays = tl.exp2((rates * LOG2_E)[:, None] * steps[None, :])
        driven = steps * inputs
        sum_C += (decays * states_before + B_tile * driven[None, :]) * grads[None, :]

        carry = tl.load(carries + row * state + n, mask=n_mask, other=0.0)
        adjoints = C_tile * grads[None, :] + tl.where(offsets[None, :] == BLOCK_L - 1, carry[:, None], 0.0)
        decays_behind = tl.exp2((rates * LOG2_E)[:, None] * steps_behind[None, :])
        _, adjoints = tl.associative_scan((decays_behind, adjoints), 1, _follow, reverse=True)
        carry = tl.sum(tl.where(offsets[None, :] == 0, decays * adjoints, 0.0), axis=1)
        tl.store(carries + row * state + n, carry, mask=n_mask)
        sum_B += adjoints * driven[None, :]

        by_driven = tl.sum(adjoints * B_tile, axis=0)
        by_exponents = adjoints * states_before * decays
        by_raw = (tl.sum(by_exponents * rates[:, None], axis=0) + by_driven * inputs) * slopes
        by_x = (by_driven * steps + skip * grads).to(grad_x.dtype.element_ty)
        tl.store(grad_x + row * length + t, by_x, mask=mask)
        tl.store(grad_delta + row * length + t, by_raw.to(grad_delta.dtype.element_ty), mask=mask)
        by_A = tl.sum(by_exponents * steps[None, :], axis=1)
        by_A += tl.load(grad_A + row * state + n, mask=n_mask, other=0.0)
        tl.store(grad_A + row * state + n, by_A, mask=n_mask)
        if HAS_D:
            tl.store(grad_D + row, tl.load(grad_D + row) + tl.sum(grads * inputs, axis=0))
        if HAS_BIAS:
            tl.store(grad_bias + row, tl.load(grad_bias + row) + tl.sum(by_raw, axis=0))
    part = ((group.to(tl.int64) * batch + b) * state + n[:, None]) * length + t[None, :]  # (group, B, N, L)
    tl.store(grad_B + part, sum_B, mask=tile_mask)
    tl.store(grad_C + part, sum_C, mask=tile_mask)


def _blocks(state, length, warp_states):
    """Sizes of a program's block, and its warps."""
    block_n = triton.next_power_of_2(state)
    block_l = min(_block_length(state), max(16, triton.next_power_of_2(length)))
    return {"BLOCK_N": block_n, "BLOCK_L": block_l, "num_warps": max(1, min(8, block_n * block_l // warp_states))}


def _parameters(A, D, delta_bias):
    """Contiguous parameters, and a stand-in for one that is None."""
    A = A.float().contiguous()
    return (A, *(A if vector is None else vector.contiguous() for vector in (D, delta_bias)))


def triton_forward(x, delta, A, B, C, D, delta_bias, delta_softplus, keep_starts):
    """Scan on a CUDA device.

    Args:
        x, delta, A, B, C, D, delta_bias, delta_softplus: As of [`selective_scan`].
        keep_starts (`bool`): Return what [`triton_backward`] needs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The outputs of shape `(B, D, L)`, contiguous, and the states at the
            blocks' starts of [`triton_starts_shape`], empty without `keep_starts`.
    """
    batch, channels, length = x.shape
    state = A.shape[1]
    outputs = x.new_empty(x.shape)
    starts = x.new_empty(triton_starts_shape(*x.shape, state) if keep_starts else (0,), dtype=torch.float32)
    if not outputs.numel():
        return outputs, starts
    rates, skip, bias = _parameters(A, D, delta_bias)
    with torch.cuda.device_of(x):
        _forward_kernel[channels, batch](
            x, delta, rates, B, C, skip, bias, outputs, starts, batch, channels, length, state,
            *x.stride(), *delta.stride(), *B.stride(), *C.stride(),
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, KEEP=keep_starts,
            **_blocks(state, length, WARP_STATES),
        )  # fmt: skip
    return outputs, starts


def triton_backward(grad, starts, x, delta, A, B, C, D, delta_bias, delta_softplus):
    """Gradients of [`triton_forward`]'s outputs.

    Args:
        grad (`torch.Tensor` of shape `(B, D, L)`): Of the loss by the outputs.
        starts (`torch.Tensor`): The second output of [`triton_forward`].
        x, delta, A, B, C, D, delta_bias, delta_softplus: As then.

    Returns:
        `tuple[torch.Tensor, ...]`: By x, delta, A, B, C, D and delta_bias, contiguous, in their dtypes; empty for one
            that is None.
    """
    batch, channels, length = x.shape
    state = A.shape[1]
    each = max(1, min(16, batch * channels // PROGRAMS))
    groups = -(-channels // each)
    blocks = _blocks(state, length, WARP_STATES // 2)
    rates, skip, bias = _parameters(A, D, delta_bias)
    grad_x, grad_delta = x.new_empty(x.shape), delta.new_empty(delta.shape)
    carries, grad_A = rates.new_zeros(2, batch, channels, state)
    grad_D, grad_bias = rates.new_zeros(2, batch, channels)
    grad_B, grad_C = rates.new_empty(2, groups, batch, state, length)
    with torch.cuda.device_of(x):
        for index in reversed(range(len(starts) if grad_x.numel() else 0)):
            _backward_kernel[groups, batch](
                grad, starts[index], x, delta, rates, B, C, skip, bias, carries,
                grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias,
                index * blocks["BLOCK_L"], batch, channels, length, state, each,
                *grad.stride(), *x.stride(), *delta.stride(), *B.stride(), *C.stride(),
                HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, **blocks,
            )  # fmt: skip
    vectors = [
        x.new_empty(0) if vector is None else total.sum(dim=0).to(vector.dtype)
        for total, vector in ((grad_D, D), (grad_bias, delta_bias))
    ]
    by_B, by_C = grad_B.sum(dim=0).to(B.dtype), grad_C.sum(dim=0).to(C.dtype)
    return grad_x, grad_delta, grad_A.sum(dim=0).to(A.dtype), by_B, by_C, *vectors
