"""The selective scan by chunks, for the CPU: few memory passes forward, recomputed states backward.

A chunk's decays and states fit the cache, in buffers that every chunk uses again, channels innermost. Only the state
at each chunk's start is kept; the backward pass computes the others anew. A global cumulative sum or a scan in log
space would save the loop over the chunk and overflow; this form only ever multiplies by decays.

Source: docs/papers.md, selective scan. Letters in shape comments: B batch, G samples at a time, D channels, L scan
length, T chunk, N state.
"""

import math

import torch
import torch.nn.functional as F

CHUNK = 32  # positions; between 14 and 49 the time differs by less than 10 %
CACHED_STATE = 1 << 14  # numbers in the states of the samples scanned together: 2 MiB a chunk


def chunked_starts_shape(batch, channels, length, state):
    """Shape of the kept states, `(L / CHUNK, B, N, D)`."""
    return (-(-length // CHUNK), batch, state, channels)


def _rows(tensor, dtype):
    """`(B, D, L)` as contiguous `(B, L, D)`."""
    return tensor.transpose(1, 2).to(dtype).contiguous()


def _step_rows(delta, delta_bias, delta_softplus, dtype):
    """Step sizes `(B, L, D)`, and what they were before the softplus."""
    raw = _rows(delta, dtype)
    if delta_bias is not None:
        raw = raw + delta_bias.to(dtype)
    return (F.softplus(raw) if delta_softplus else raw), raw


class _Chunks:
    """Walk over groups of samples and chunks of positions, with the states of a chunk from the one at its start."""

    def __init__(self, inputs, steps, A, B, C, buffers):
        self.inputs, self.steps = inputs, steps  # (B, L, D)
        self.B, self.C = (_rows(tensor, inputs.dtype) for tensor in (B, C))  # (B, L, N)
        self.A = A.to(inputs.dtype).T.contiguous()  # (N, D)
        self.log2_A = self.A * math.log2(math.e)  # exp2 takes a third of exp's time
        self.batch, self.length, self.channels = inputs.shape
        self.state = len(self.A)
        self.group = max(1, min(self.batch, CACHED_STATE // max(1, self.state * self.channels)))
        size = (CHUNK + 1) * self.group * self.state * self.channels
        self.memory = [inputs.new_empty(size) for _ in range(buffers)]
        self.views = {}

    def groups(self):
        """Slices of samples."""
        return [slice(i, min(i + self.group, self.batch)) for i in range(0, self.batch, self.group)]

    def spans(self):
        """Slices of positions."""
        return [slice(t, min(t + CHUNK, self.length)) for t in range(0, self.length, CHUNK)]

    def buffer(self, index, length, samples):
        """A buffer as `(length, G, N, D)`, whole and by position;
        made once for each shape, since a view costs as much as a small product.
        """
        shape = (length, samples.stop - samples.start, self.state, self.channels)
        if (index, shape) not in self.views:
            whole = self.memory[index][: math.prod(shape)].view(shape)
            self.views[index, shape] = whole, whole.unbind()
        return self.views[index, shape]

    def fill(self, samples, span, start):
        """Compute a chunk: decays `(T, G, N, D)`; states `(T + 1, G, N, D)`, of which the first is `start`;
        its rows `(T, G, ...)`.
        """
        inputs, steps, B, C = (
            rows[samples, span].transpose(0, 1) for rows in (self.inputs, self.steps, self.B, self.C)
        )
        driven = inputs * steps
        decays, decay_at = self.buffer(0, len(steps), samples)
        states, state_at = self.buffer(1, len(steps) + 1, samples)
        torch.mul(steps[:, :, None], self.log2_A, out=decays).exp2_()
        torch.mul(driven[:, :, None], B[..., None], out=states[1:])
        states[0] = start
        for decay, previous, state in zip(decay_at, state_at[:-1], state_at[1:], strict=True):
            state.addcmul_(decay, previous)
        return decays, states, (inputs, steps, driven, B, C)


def chunked_forward(x, delta, A, B, C, D, delta_bias, delta_softplus, keep_starts):
    """Scan by chunks.

    Args:
        x, delta, A, B, C, D, delta_bias, delta_softplus: As of [`selective_scan`].
        keep_starts (`bool`): Return what [`chunked_backward`] needs.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The outputs of shape `(B, D, L)`, channels innermost in memory, and the
            states at the chunks' starts of [`chunked_starts_shape`], empty without `keep_starts`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps, _ = _step_rows(delta, delta_bias, delta_softplus, dtype)
    chunks = _Chunks(_rows(x, dtype), steps, A, B, C, buffers=2)
    outputs = torch.empty(steps.shape, dtype=x.dtype, device=x.device)
    shape = chunked_starts_shape(*x.shape, A.shape[1]) if keep_starts else (0,)
    starts = steps.new_empty(shape)
    for samples in chunks.groups():
        state = steps.new_zeros(())
        for index, span in enumerate(chunks.spans()):
            _, states, (inputs, _, _, _, C_rows) = chunks.fill(samples, span, state)
            if keep_starts:
                starts[index, samples] = states[0]
            state = states[-1].clone()  # the buffer is used again
            result = _row_products(C_rows, states[1:])
            if D is not None:
                result.addcmul_(inputs, D.to(dtype))
            outputs[samples, span] = result.transpose(0, 1)
    return outputs.transpose(1, 2), starts


def chunked_backward(grad, starts, x, delta, A, B, C, D, delta_bias, delta_softplus):
    """Gradients of [`chunked_forward`]'s outputs.

    Args:
        grad (`torch.Tensor` of shape `(B, D, L)`): Of the loss by the outputs.
        starts (`torch.Tensor`): The second output of [`chunked_forward`].
        x, delta, A, B, C, D, delta_bias, delta_softplus: As then.

    Returns:
        `tuple[torch.Tensor, ...]`: By x, delta, A, B, C, D and delta_bias, in their dtypes; empty for one that is
            None.
    """
    dtype = starts.dtype
    steps, raw_steps = _step_rows(delta, delta_bias, delta_softplus, dtype)
    chunks = _Chunks(_rows(x, dtype), steps, A, B, C, buffers=3)
    grad = _rows(grad, dtype)
    grad_x, grad_steps = torch.empty_like(steps), torch.empty_like(steps)
    grad_A, grad_B, grad_C = torch.zeros_like(chunks.A), torch.empty_like(chunks.B), torch.empty_like(chunks.C)
    for samples in chunks.groups():
        carry = None
        for index, span in reversed(list(enumerate(chunks.spans()))):
            decays, states, (inputs, steps_, driven, B_rows, C_rows) = chunks.fill(
                samples, span, starts[index, samples]
            )
            grad_rows = grad[samples, span].transpose(0, 1)
            adjoints = _adjoints(chunks, samples, grad_rows, C_rows, carry)
            carry = decays[0] * adjoints[0]
            grad_C[samples, span] = _row_products(grad_rows, states[1:].mT).transpose(0, 1)
            grad_B[samples, span] = _row_products(driven, adjoints.mT).transpose(0, 1)
            grad_driven = _row_products(B_rows, adjoints)
            grad_exponents = decays.mul_(adjoints).mul_(states[:-1])
            by_steps = torch.mul(grad_exponents, chunks.A, out=adjoints).sum(dim=2).addcmul_(grad_driven, inputs)
            grad_A += grad_exponents.mul_(steps_[:, :, None]).sum(dim=(0, 1))
            grad_x[samples, span] = (grad_driven * steps_).transpose(0, 1)
            grad_steps[samples, span] = by_steps.transpose(0, 1)
    if delta_softplus:
        grad_steps *= torch.sigmoid(raw_steps)
    grad_D = grad_bias = None
    if D is not None:
        grad_D = (grad * chunks.inputs).sum(dim=(0, 1)).to(D.dtype)
        grad_x.addcmul_(grad, D.to(dtype))
    if delta_bias is not None:
        grad_bias = grad_steps.sum(dim=(0, 1)).to(delta_bias.dtype)
    by_rows = [(grad_x, x), (grad_steps, delta), (grad_B, B), (grad_C, C)]
    grad_x, grad_delta, grad_B, grad_C = (rows.transpose(1, 2).to(like.dtype) for rows, like in by_rows)
    grad_A = grad_A.T.to(A.dtype).contiguous()
    missing = (x.new_empty(0) if grad is None else grad for grad in (grad_D, grad_bias))
    return grad_x, grad_delta, grad_A, grad_B, grad_C, *missing


def _adjoints(chunks, samples, grad_rows, C_rows, carry):
    """Gradient by each state of the chunk filled last; `carry` is what the chunk behind it hands back."""
    _, decay_at = chunks.buffer(0, len(C_rows), samples)
    adjoints, adjoint_at = chunks.buffer(2, len(C_rows), samples)
    torch.mul(grad_rows[:, :, None], C_rows[..., None], out=adjoints)
    if carry is not None:
        adjoint_at[-1].add_(carry)
    for t in range(len(adjoint_at) - 2, -1, -1):
        adjoint_at[t].addcmul_(decay_at[t + 1], adjoint_at[t + 1])
    return adjoints


def _row_products(rows, matrices):
    """Rows `(T, G, K)` times matrices `(T, G, K, M)`. As rows: the matrix times a column takes ten times as long."""
    return torch.bmm(rows.flatten(0, 1)[:, None], matrices.flatten(0, 1)).view(*rows.shape[:2], -1)
