"""Slow, obvious references for the built-in mixers: the formulae, token by token.

Each takes a mixer (for its weights) and one sample x (N, D), and returns (N, D); `real` (N,) says which tokens are
real. Nothing here shares code with the mixers. Shapes: N tokens, D model width, H heads, R head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Reference = Callable[[Any, Tensor, Tensor], Tensor]


def _affine(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.weight @ x
    return y if layer.bias is None else y + layer.bias


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _silu(x: Tensor) -> Tensor:
    return x * _sigmoid(x)


def _sources(n: int, real: Tensor, causal: bool) -> list[int]:
    """The tokens that token n may see."""
    return [m for m in range(len(real)) if bool(real[m]) and (m <= n or not causal)]


def _each(x: Tensor, real: Tensor, token: Callable[[int], Tensor]) -> Tensor:
    """Zeros for padding, token(n) for each real token n."""
    return torch.stack([token(n) if bool(real[n]) else torch.zeros_like(x[n]) for n in range(len(x))])


def linear(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W x_n + b."""
    return _each(x, real, lambda n: _affine(mixer.readout, x[n]))


def none(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = 0."""
    return 0 * x


def pool(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [x_n; x_first; mean of the tokens seen] + b; the mean comes before x_first if causal."""

    def token(n: int) -> Tensor:
        first = x[_sources(n, real, False)[0]]
        mean = sum((x[m] for m in _sources(n, real, mixer.causal)), torch.zeros_like(x[n]))
        mean = mean / len(_sources(n, real, mixer.causal))
        if mixer.causal:
            return _affine(mixer.readout, torch.cat((x[n], mean, first)))
        return _affine(mixer.readout, torch.cat((x[n], first, mean) if mixer.first else (x[n], mean)))

    return _each(x, real, token)


def static(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_m A_hnm V_h x_m for all h; x_n] + b."""
    values = mixer.value.weight.chunk(len(mixer.mixing))

    def token(n: int) -> Tensor:
        seen = _sources(n, real, mixer.causal)
        heads = [
            torch.stack([a[n, m] * (v @ x[m]) for m in seen]).sum(0)
            for a, v in zip(mixer.mixing, values, strict=True)
        ]
        return _affine(mixer.readout, torch.cat((*heads, x[n])))

    return _each(x, real, token)


def glu_mlp(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [2 sigmoid(G x_n + e) * sum_m A_hnm (V_h x_m + c_h) for all h; x_n] + b."""
    heads = len(mixer.mixing)

    def value_gate(n: int) -> tuple[Tensor, Tensor]:
        value, gate = _affine(mixer.value_gate, x[n]).chunk(2)
        return value, gate

    def token(n: int) -> Tensor:
        seen = _sources(n, real, mixer.causal)
        mixed = [
            torch.stack([mixer.mixing[h, n, m] * value_gate(m)[0].chunk(heads)[h] for m in seen]).sum(0)
            for h in range(heads)
        ]
        gate = 2 * _sigmoid(value_gate(n)[1])
        return _affine(mixer.readout, torch.cat((gate * torch.cat(mixed), x[n])))

    return _each(x, real, token)


def shallow_ffn(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """vec(x) -> LayerNorm -> Linear -> LeakyReLU -> LayerNorm -> Linear, padding zero before and after."""

    def norm(layer: Any, v: Tensor) -> Tensor:
        centred = v - v.mean()
        y: Tensor = layer.weight * centred / torch.sqrt((centred**2).mean() + layer.eps) + layer.bias
        return y

    first, up, _, second = mixer.body
    v = torch.cat([x[n] if bool(real[n]) else torch.zeros_like(x[n]) for n in range(len(x))])
    v = _affine(up, norm(first, v))
    v = torch.where(v > 0, v, 0.01 * v)
    y = _affine(mixer.readout, norm(second, v)).reshape(x.shape)
    return _each(x, real, lambda n: y[n])


def linear_attention(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_m f(q_n).f(k_m) v_m / (sum_m f(q_n).f(k_m) + 1e-6) for all h; x_n] + b, f = elu + 1."""

    def positive(v: Tensor) -> Tensor:
        return torch.where(v > 0, v + 1, torch.exp(v.clamp(max=0)))

    def qkv(n: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.chunk(mixer.heads)[h] for part in _affine(mixer.qkv, x[n]).chunk(3))
        return positive(q), positive(k), v

    def token(n: int) -> Tensor:
        heads = []
        for h in range(mixer.heads):
            q = qkv(n, h)[0]
            seen = [qkv(m, h)[1:] for m in _sources(n, real, mixer.causal)]
            weights = torch.stack([q @ k for k, _ in seen])
            heads.append(weights @ torch.stack([v for _, v in seen]) / (weights.sum() + 1e-6))
        return _affine(mixer.readout, torch.cat((*heads, x[n])))

    return _each(x, real, token)


def multihead_lstm(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Over the real tokens: y = W_post concat_h P_h [forward LSTM_h; backward LSTM_h] of (W_pre x)_h."""

    def run(lstm: Any, sequence: list[Tensor], suffix: str) -> list[Tensor]:
        weight_x, weight_h, bias_x, bias_h = (
            getattr(lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = torch.zeros_like(weight_h[0])
        states = []
        for v in sequence:
            i, f, g, o = (weight_x @ v + bias_x + weight_h @ hidden + bias_h).chunk(4)
            cell = _sigmoid(f) * cell + _sigmoid(i) * torch.tanh(g)
            hidden = _sigmoid(o) * torch.tanh(cell)
            states.append(hidden)
        return states

    kept = [n for n in range(len(x)) if bool(real[n])]
    heads = []
    for h, (lstm, proj) in enumerate(zip(mixer.lstm, mixer.head_proj, strict=True)):
        inputs = [_affine(mixer.pre_proj, x[n]).chunk(len(mixer.lstm))[h] for n in kept]
        states = [run(lstm, inputs, "")]
        if lstm.bidirectional:
            states.append(run(lstm, inputs[::-1], "_reverse")[::-1])
        heads.append([_affine(proj, torch.cat(both)) for both in zip(*states, strict=True)])
    mixed = {n: torch.cat(parts) for n, *parts in zip(kept, *heads, strict=True)}
    return _each(x, real, lambda n: _affine(mixer.post_proj, mixed[n]))


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_n = c_n . h_n, h_n = exp(delta_n a) h_(n-1) + delta_n u_n b_n; u, delta (N, E), a (E, S), b, c (N, S)."""
    state = torch.zeros_like(a)
    ys = []
    for n in range(len(u)):
        state = torch.exp(delta[n][:, None] * a) * state + (delta[n] * u[n])[:, None] * b[n]
        ys.append(state @ c[n])
    return torch.stack(ys)


def selective_ssm(block: Any, x: Tensor) -> Tensor:
    """One direction of Mamba, all of x (N, D) real; the formula is in the docstring of ssm.SelectiveSsm."""
    states = block.A_log.shape[1]
    us, zs = zip(*(_affine(block.in_proj, v).chunk(2) for v in x), strict=True)
    kernel = block.conv1d.weight[:, 0]  # (E, 4); its last column meets the token itself
    convolved = []
    for n in range(len(x)):
        total = block.conv1d.bias
        for back in range(min(n + 1, kernel.shape[1])):
            total = total + kernel[:, -1 - back] * us[n - back]
        convolved.append(_silu(total))
    rank = block.dt_proj.in_features
    steps, bs, cs = zip(
        *(_affine(block.x_proj, u).tensor_split([rank, rank + states]) for u in convolved), strict=True
    )
    delta = torch.stack([torch.log(1 + torch.exp(_affine(block.dt_proj, step))) for step in steps])
    u = torch.stack(convolved)
    y = selective_scan(u, delta, -torch.exp(block.A_log), torch.stack(bs), torch.stack(cs)) + block.D * u
    return torch.stack([_affine(block.out_proj, v * _silu(z)) for v, z in zip(y, zs, strict=True)])


def mamba(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Over the real tokens: y = W [M_1(x); flip(M_2(flip(x))); x] + b."""
    kept = [n for n in range(len(x)) if bool(real[n])]
    features = [selective_ssm(mixer.ahead, x[kept])]
    if mixer.back is not None:
        features.append(selective_ssm(mixer.back, x[kept[::-1]])[list(range(len(kept)))[::-1]])
    mixed = dict(zip(kept, torch.cat((*features, x[kept]), dim=1), strict=True))
    return _each(x, real, lambda n: _affine(mixer.readout, mixed[n]))


def mlp_slice(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W_2 act(W_1 x_n + b_1) + b_2."""
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "relu": lambda v: v * (v > 0),
        "silu": _silu,
        "quick_gelu": lambda v: v * _sigmoid(1.702 * v),
    }
    activation = activations[mixer.activation]
    return _each(x, real, lambda n: _affine(mixer.fc2, activation(_affine(mixer.fc1, x[n]))))


REFERENCES: Mapping[str, Reference] = {
    "linear": linear,
    "none": none,
    "pool": pool,
    "static": static,
    "glu_mlp": glu_mlp,
    "shallow_ffn": shallow_ffn,
    "linear_attention": linear_attention,
    "multihead_lstm": multihead_lstm,
    "mamba": mamba,
    "mlp_slice": mlp_slice,
}
