"""MambaVision a second time, naive, over its published keys.

It shares nothing with the model: plain tensor operations in float64, a loop for the scan. `mistake` makes one of the
errors an implementation could make; the tests show that each would be noticed.
"""

import math

import torch
import torch.nn.functional as F

TINY = {
    "depths": [1, 2, 3, 2],
    "dim": 8,
    "in_dim": 6,
    "num_heads": [1, 2, 4, 8],
    "window_size": [8, 8, 3, 2],
    "mlp_ratio": 3,
    "resolution": 64,
}
STATE, KERNEL = 8, 3
MISTAKES = (
    "exact GELU in a conv block",
    "tanh GELU in an MLP",
    "dt bias added once",
    "causal convolution",
    "no skip of the scan's input",
    "gate instead of concatenation",
    "no SiLU on z",
    "attention before mixers",
    "column-major tokens",
    "padding on top and left",
    "padding masked",
    "wrong epsilon in the stem",
    "wrong epsilon in a layer norm",
    "no second gamma",
    "pooled before the norm's shift",
    "B and C swapped",
)


def random_checkpoint(config, *, layer_scale=True, conv_layer_scale=False, classes=10, seed=0):
    """Published keys with random values under which every parameter matters:
    gains and statistics away from 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def normal(*shape, mean=0.0, deviation=1.0):
        return mean + deviation * torch.randn(*shape, generator=generator)

    def linear(key, rows, *columns, bias=True):
        weights[f"{key}.weight"] = normal(rows, *columns, deviation=math.prod(columns) ** -0.5)
        if bias:
            weights[f"{key}.bias"] = normal(rows, deviation=0.3)

    def norm(key, width, statistics):
        weights[f"{key}.weight"] = normal(width, mean=1.0, deviation=0.2)
        weights[f"{key}.bias"] = normal(width, deviation=0.3)
        if statistics:
            weights[f"{key}.running_mean"] = normal(width, deviation=0.3)
            weights[f"{key}.running_var"] = 0.5 + torch.rand(width, generator=generator)
            weights[f"{key}.num_batches_tracked"] = torch.tensor(7)

    def mamba(key, width):
        half, rank = width // 2, math.ceil(width / 16)
        linear(f"{key}.in_proj", width, width, bias=False)
        linear(f"{key}.x_proj", rank + 2 * STATE, half, bias=False)
        linear(f"{key}.dt_proj", half, rank)
        linear(f"{key}.out_proj", width, width, bias=False)
        for name in ("conv1d_x", "conv1d_z"):
            linear(f"{key}.{name}", half, 1, KERNEL, bias=False)
        weights[f"{key}.A_log"] = torch.arange(1.0, STATE + 1).log() + normal(half, STATE, deviation=0.2)
        weights[f"{key}.D"] = normal(half, mean=1.0, deviation=0.3)

    stem, dim = config["in_dim"], config["dim"]
    linear("patch_embed.conv_down.0", stem, 3, 3, 3, bias=False)
    norm("patch_embed.conv_down.1", stem, statistics=True)
    linear("patch_embed.conv_down.3", dim, stem, 3, 3, bias=False)
    norm("patch_embed.conv_down.4", dim, statistics=True)
    for stage, depth in enumerate(config["depths"]):
        width = dim * 2**stage
        for index in range(depth):
            block = f"levels.{stage}.blocks.{index}"
            norm(f"{block}.norm1", width, statistics=stage < 2)
            norm(f"{block}.norm2", width, statistics=stage < 2)
            if stage < 2:
                linear(f"{block}.conv1", width, width, 3, 3)
                linear(f"{block}.conv2", width, width, 3, 3)
                if conv_layer_scale:
                    weights[f"{block}.gamma"] = normal(width, mean=1.0, deviation=0.2)
                continue
            if index < depth - depth // 2:
                mamba(f"{block}.mixer", width)
            else:
                linear(f"{block}.mixer.qkv", 3 * width, width)
                linear(f"{block}.mixer.proj", width, width)
            hidden = int(config["mlp_ratio"] * width)
            linear(f"{block}.mlp.fc1", hidden, width)
            linear(f"{block}.mlp.fc2", width, hidden)
            if layer_scale:
                weights[f"{block}.gamma_1"] = normal(width, mean=1.0, deviation=0.2)
                weights[f"{block}.gamma_2"] = normal(width, mean=1.0, deviation=0.2)
        if stage < 3:
            linear(f"levels.{stage}.downsample.reduction.0", 2 * width, width, 3, 3, bias=False)
    norm("norm", 8 * dim, statistics=True)
    linear("head", classes, 8 * dim)
    return weights


class NaiveMambaVision:
    """The published model over a dict of its weights, in float64."""

    def __init__(self, weights, config, mistake=None):
        self.weights = {key: value.double() for key, value in weights.items()}
        self.config, self.mistake = config, mistake

    def __call__(self, pixel_values):
        """`(features, logits)` of images `(B, 3, H, W)`."""
        hidden_states = pixel_values.double()
        epsilon = 1e-5 if self.mistake == "wrong epsilon in the stem" else 1e-4
        for convolution, norm in ((0, 1), (3, 4)):
            hidden_states = self._convolve(hidden_states, f"patch_embed.conv_down.{convolution}", stride=2)
            hidden_states = self._batch_norm(hidden_states, f"patch_embed.conv_down.{norm}", epsilon).clamp(min=0)
        for stage, depth in enumerate(self.config["depths"]):
            run = self._conv_stage if stage < 2 else self._hybrid_stage
            hidden_states = run(hidden_states, stage, depth)
            if stage < 3:
                hidden_states = self._convolve(hidden_states, f"levels.{stage}.downsample.reduction.0", stride=2)
        features = self._batch_norm(hidden_states, "norm", 1e-5).mean(dim=(2, 3))
        if self.mistake == "pooled before the norm's shift":
            features = features - self.weights["norm.bias"]
        return features, self._linear(features, "head")

    def _linear(self, states, key):
        product = states @ self.weights[f"{key}.weight"].T
        return product + self.weights[f"{key}.bias"] if f"{key}.bias" in self.weights else product

    def _convolve(self, states, key, stride=1):
        return F.conv2d(
            states, self.weights[f"{key}.weight"], self.weights.get(f"{key}.bias"), stride=stride, padding=1
        )

    def _batch_norm(self, states, key, epsilon):
        weight, bias, mean, variance = (
            self.weights[f"{key}.{name}"][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (states - mean) / (variance + epsilon).sqrt() * weight + bias

    def _layer_norm(self, states, key):
        epsilon = 1e-6 if self.mistake == "wrong epsilon in a layer norm" else 1e-5
        centred = states - states.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.weights[f"{key}.weight"] + self.weights[f"{key}.bias"]

    def _conv_stage(self, states, stage, depth):
        approximate = "none" if self.mistake == "exact GELU in a conv block" else "tanh"
        for index in range(depth):
            block = f"levels.{stage}.blocks.{index}"
            inner = self._batch_norm(self._convolve(states, f"{block}.conv1"), f"{block}.norm1", 1e-5)
            inner = self._convolve(F.gelu(inner, approximate=approximate), f"{block}.conv2")
            inner = self._batch_norm(inner, f"{block}.norm2", 1e-5)
            if f"{block}.gamma" in self.weights:
                inner = inner * self.weights[f"{block}.gamma"][:, None, None]
            states = states + inner
        return states

    def _hybrid_stage(self, states, stage, depth):
        window = self.config["window_size"][stage]
        height, width = states.shape[-2:]
        down, right = -height % window, -width % window
        before = self.mistake == "padding on top and left"
        padded = F.pad(states, (right, 0, down, 0) if before else (0, right, 0, down))
        real = F.pad(torch.ones(1, 1, height, width, dtype=torch.bool), (0, right, 0, down))
        output = torch.empty_like(padded)
        for top in range(0, padded.shape[2], window):
            for left in range(0, padded.shape[3], window):
                here = (..., slice(top, top + window), slice(left, left + window))
                cut = padded[here]
                if self.mistake == "column-major tokens":
                    cut = cut.transpose(2, 3)
                tokens = cut.flatten(2).transpose(1, 2)
                for index in range(depth):
                    tokens = self._hybrid_block(tokens, stage, index, depth, real[here].flatten())
                cut = tokens.transpose(1, 2).unflatten(2, (window, window))
                output[here] = cut.transpose(2, 3) if self.mistake == "column-major tokens" else cut
        return output[..., down:, right:] if before else output[..., :height, :width]

    def _hybrid_block(self, tokens, stage, index, depth, real):
        if self.mistake == "attention before mixers":
            index = (index + depth - depth // 2) % depth
        block = f"levels.{stage}.blocks.{index}"
        normed = self._layer_norm(tokens, f"{block}.norm1")
        if f"{block}.mixer.qkv.weight" in self.weights:
            mixed = self._attention(normed, f"{block}.mixer", self.config["num_heads"][stage], real)
        else:
            mixed = self._mamba(normed, f"{block}.mixer")
        tokens = tokens + self.weights.get(f"{block}.gamma_1", 1.0) * mixed
        inner = self._linear(self._layer_norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1")
        inner = F.gelu(inner, approximate="tanh" if self.mistake == "tanh GELU in an MLP" else "none")
        gamma = 1.0 if self.mistake == "no second gamma" else self.weights.get(f"{block}.gamma_2", 1.0)
        return tokens + gamma * self._linear(inner, f"{block}.mlp.fc2")

    def _attention(self, tokens, key, heads, real):
        queries, keys, values = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self._linear(tokens, f"{key}.qkv").chunk(3, -1)
        )
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        if self.mistake == "padding masked" and real.any():
            scores = scores.masked_fill(~real, float("-inf"))
        return self._linear((scores.softmax(-1) @ values).transpose(1, 2).flatten(2), f"{key}.proj")

    def _mamba(self, tokens, key):
        x, z = self._linear(tokens, f"{key}.in_proj").transpose(1, 2).chunk(2, dim=1)  # (B, half, L)
        sides = (KERNEL - 1, 0) if self.mistake == "causal convolution" else (KERNEL // 2, KERNEL // 2)
        x, z = (
            F.conv1d(F.pad(part, sides), self.weights[f"{key}.conv1d_{name}.weight"], groups=part.shape[1])
            for name, part in (("x", x), ("z", z))
        )
        x = x * x.sigmoid()
        if self.mistake != "no SiLU on z":
            z = z * z.sigmoid()
        steps, B, C = self._linear(x.transpose(1, 2), f"{key}.x_proj").split(
            [self.weights[f"{key}.dt_proj.weight"].shape[1], STATE, STATE], dim=-1
        )
        if self.mistake == "B and C swapped":
            B, C = C, B
        steps = self._linear(steps, f"{key}.dt_proj")
        if self.mistake != "dt bias added once":
            steps = steps + self.weights[f"{key}.dt_proj.bias"]
        y = self._scan(x, F.softplus(steps).transpose(1, 2), key, B, C)
        if self.mistake == "gate instead of concatenation":
            return self._linear(torch.cat([y * z, z], dim=1).transpose(1, 2), f"{key}.out_proj")
        return self._linear(torch.cat([y, z], dim=1).transpose(1, 2), f"{key}.out_proj")

    def _scan(self, x, delta, key, B, C):
        decay = -self.weights[f"{key}.A_log"].exp()
        state, outputs = 0.0, []
        for t in range(x.shape[-1]):
            step = delta[..., t, None]
            state = (step * decay).exp() * state + step * B[:, t, None] * x[..., t, None]
            outputs.append((state * C[:, t, None]).sum(-1))
        y = torch.stack(outputs, dim=-1)
        skip = 0.0 if self.mistake == "no skip of the scan's input" else self.weights[f"{key}.D"][:, None]
        return y + skip * x


def relative_error(found, expected):
    """Largest difference over largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
