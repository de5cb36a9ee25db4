"""Plain torch implementations of the recurrent mixers, as the papers write them, for counting what they execute.

Every product is an explicit matmul over heads in front, so torch's FlopCounterMode sees all of them; elementwise work
on whole states that the convention counts is added to a Tally by hand. q, k: [H, T, k]; v: [H, T, v].
"""

from __future__ import annotations

from math import pi
from typing import Any

import torch

Tensor = torch.Tensor


class Tally:
    """Elementwise multiplications on states, counted where they are done."""

    def __init__(self) -> None:
        self.flops = 0

    def times(self, state: Tensor, factor: Tensor) -> Tensor:
        self.flops += state.numel()
        return state * factor


def row(x: Tensor, index: int) -> Tensor:
    """[H, T, d] -> [H, 1, d], the token at `index`."""
    return x[:, index : index + 1]


def linear_steps(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, tally: Tally | None) -> Tensor:
    """S = decay S + k v, o = q S; decay: [H, T, k] or [H, T, 1]. Without a tally the decay is fixed and not counted."""
    state, outs = q.new_zeros(q.shape[0], k.shape[2], v.shape[2]), []
    for i in range(q.shape[1]):
        factor = row(decay, i).transpose(1, 2)
        state = tally.times(state, factor) if tally else state * factor
        state = state + row(k, i).transpose(1, 2) @ row(v, i)
        outs.append(row(q, i) @ state)
    return torch.cat(outs, 1)


def linear_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """The same in chunks; decay [H, T, k] or [H, T, 1] is folded into queries and keys."""
    state: Tensor | None = None
    outs = []
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc, log = (x[:, start : start + chunk] for x in (q, k, v, decay.log()))
        grown = log.cumsum(1)
        within = ((qc * grown.exp()) @ (kc * (-grown).exp()).transpose(1, 2)).tril() @ vc
        outs.append(within if state is None else within + (qc * grown.exp()) @ state)
        update = (kc * (grown[:, -1:] - grown).exp()).transpose(1, 2) @ vc
        state = update if state is None else state * grown[:, -1:].exp().transpose(1, 2) + update
    return torch.cat(outs, 1)


def delta_steps(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, tally: Tally) -> Tensor:
    """S = decay S, then S + b k (v - k S); beta: [H, T, 1]; decay: None, [H, T, 1] or [H, T, k]."""
    state, outs = q.new_zeros(q.shape[0], k.shape[2], v.shape[2]), []
    for i in range(q.shape[1]):
        if decay is not None:
            state = tally.times(state, row(decay, i).transpose(1, 2))
        predicted = row(k, i) @ state
        state = state + row(k, i).transpose(1, 2) @ (row(beta, i) * (row(v, i) - predicted))
        outs.append(row(q, i) @ state)
    return torch.cat(outs, 1)


def unit_inverse(lower: Tensor) -> Tensor:
    """(I - lower)^-1 for strictly lower triangular [H, c, c] by forward substitution, a row at a time."""
    inverse = lower.clone()
    for i in range(1, lower.shape[1]):
        inverse[:, i : i + 1, :i] += inverse[:, i : i + 1, :i].clone() @ inverse[:, :i, :i].clone()
    return inverse + torch.eye(lower.shape[1], dtype=lower.dtype)


def delta_chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """The same in chunks, in the WY form (DeltaNet, section 3.2; Kimi Linear, section 3)."""
    state: Tensor | None = None
    outs = []
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc, bc, log = (x[:, start : start + chunk] for x in (q, k, v, beta, decay.log()))
        grown = log.cumsum(1)
        up, down = grown.exp(), (-grown).exp()
        inverse = unit_inverse(-((bc * kc * up) @ (kc * down).transpose(1, 2)).tril(-1))
        corrected = inverse @ (bc * vc)
        keys = inverse @ (bc * kc * up)
        if state is not None:
            corrected = corrected - keys @ state
        within = ((qc * up) @ (kc * down).transpose(1, 2)).tril() @ corrected
        outs.append(within if state is None else within + (qc * up) @ state)
        update = (kc * (grown[:, -1:] - grown).exp()).transpose(1, 2) @ corrected
        state = update if state is None else state * up[:, -1:].transpose(1, 2) + update
    return torch.cat(outs, 1)


def rwkv7_steps(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, tally: Tally) -> Tensor:
    """S = diag(w) S + b (a S) + k v, o = q S; a, b, decay: [H, T, k]."""
    state, outs = q.new_zeros(q.shape[0], k.shape[2], v.shape[2]), []
    for i in range(q.shape[1]):
        read = row(a, i) @ state
        state = tally.times(state, row(decay, i).transpose(1, 2))
        state = state + row(b, i).transpose(1, 2) @ read + row(k, i).transpose(1, 2) @ row(v, i)
        outs.append(row(q, i) @ state)
    return torch.cat(outs, 1)


def rwkv7_chunks(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """The same in chunks: a meets the state before this token's decay, so its decay ends one token earlier."""
    state: Tensor | None = None
    outs = []
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc, ac, bc, log = (x[:, start : start + chunk] for x in (q, k, v, a, b, decay.log()))
        grown = log.cumsum(1)
        before = (grown - log).exp()
        up, down = grown.exp(), (-grown).exp()
        inverse = unit_inverse(((ac * before) @ (bc * down).transpose(1, 2)).tril(-1))
        read = inverse @ (((ac * before) @ (kc * down).transpose(1, 2)).tril(-1) @ vc)
        readers = inverse @ (ac * before)
        if state is not None:
            read = read + readers @ state
        out = ((qc * up) @ (kc * down).transpose(1, 2)).tril() @ vc
        out = out + ((qc * up) @ (bc * down).transpose(1, 2)).tril() @ read
        outs.append(out if state is None else out + (qc * up) @ state)
        last = (grown[:, -1:] - grown).exp()
        update = (kc * last).transpose(1, 2) @ vc + (bc * last).transpose(1, 2) @ read
        state = update if state is None else state * up[:, -1:].transpose(1, 2) + update
    return torch.cat(outs, 1)


def gsa_steps(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, tally: Tally) -> Tensor:
    """Slots of keys and values, written by 1 - f and read by softmax; forget: [H, T, M]."""
    keys, values = (q.new_zeros(q.shape[0], forget.shape[2], x.shape[2]) for x in (k, v))
    outs = []
    for i in range(q.shape[1]):
        kept = row(forget, i).transpose(1, 2)
        keys = tally.times(keys, kept) + (1 - kept) @ row(k, i)
        values = tally.times(values, kept) + (1 - kept) @ row(v, i)
        outs.append((row(q, i) @ keys.transpose(1, 2)).softmax(-1) @ values)
    return torch.cat(outs, 1)


def gsa_chunks(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, chunk: int) -> Tensor:
    """The same as two passes of gated linear attention, keys into slots, and slots into values."""
    keys: Tensor | None = None
    values: Tensor | None = None
    outs = []
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc, fc = (x[:, start : start + chunk] for x in (q, k, v, forget))
        grown = fc.log().cumsum(1)
        up, down, written = grown.exp(), (-grown).exp(), 1 - fc
        scores = (qc @ kc.transpose(1, 2)).tril() @ (written * down) * up
        scores = scores if keys is None else scores + qc @ keys.transpose(1, 2) * up
        read = scores.softmax(-1)
        within = ((read * up) @ (written * down).transpose(1, 2)).tril() @ vc
        outs.append(within if values is None else within + (read * up) @ values)
        last = (written * (grown[:, -1:] - grown).exp()).transpose(1, 2)
        new = (last @ kc, last @ vc)
        kept = up[:, -1:].transpose(1, 2)
        keys = new[0] if keys is None else keys * kept + new[0]
        values = new[1] if values is None else values * kept + new[1]
    return torch.cat(outs, 1)


def mamba1_steps(x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, tally: Tally) -> Tensor:
    """h = exp(step A) h + step x B, y = h C; x, step: [T, I]; rate: [I, N]; b, c: [T, N]."""
    state, outs = x.new_zeros(rate.shape), []
    for i in range(x.shape[0]):
        state = tally.times(state, tally.times(rate, step[i][:, None]).exp())
        state = state + (step[i] * x[i])[:, None] @ b[i][None]
        outs.append(state @ c[i][:, None])
    return torch.cat(outs, 1).T


def with_ones(v: Tensor) -> Tensor:
    """[H, T, v] -> [H, T, v + 1]: the normaliser of mLSTM is one more value."""
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def normalised(out: Tensor) -> Tensor:
    """[H, T, v + 1] -> [H, T, v], over the normaliser, which is at least 1 in size."""
    return out[..., :-1] / out[..., -1:].abs().clamp(min=1)


def rglru_steps(x: Tensor, decay: Tensor, tally: Tally) -> Tensor:
    """h = a h + sqrt(1 - a^2) x; x, decay: [T, I]."""
    state, outs = x.new_zeros(x.shape[1], 1), []
    for i in range(x.shape[0]):
        state = tally.times(state, decay[i][:, None])
        state = state + x[i][:, None] @ (1 - decay[i, :1, None] ** 2).sqrt()
        outs.append(state)
    return torch.cat(outs, 1).T


def rwkv4_steps(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor, tally: Tally) -> Tensor:
    """Weighted means of values; k, v: [T, I]; decay, bonus: [I]. The state is the numerator and the denominator."""
    state, outs = v.new_zeros(v.shape[1], 1, 2), []
    for i in range(v.shape[0]):
        weight, part = k[i].exp()[:, None, None], torch.stack((v[i], torch.ones_like(v[i])), -1)[:, None]
        read = state + (weight * bonus.exp()[:, None, None]) @ part
        outs.append(read[:, 0, 0] / read[:, 0, 1])
        state = tally.times(state, decay[:, None, None]) + weight @ part
    return torch.stack(outs)


def long_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """x, taps: [I, T]. Causal and token by token: each reads all inputs so far, as decoding from a cache does."""
    outs = [x[:, None, : i + 1] @ taps[:, : i + 1].flip(1)[:, :, None] for i in range(x.shape[1])]
    return torch.cat(outs, 2)[:, 0]


def modal_steps(x: Tensor, poles: Tensor, residues: Tensor, tally: Tally) -> Tensor:
    """x: [T, I]; poles, residues: complex [I, modes]. S = pole S + x, o = Re(residue S) summed over the modes.

    A complex product has 4 multiplications and 2 additions; of a residue's, the real part is needed, 3 FLOPs, and 1 to
    sum it up.
    """
    state, outs = torch.zeros_like(poles), []
    for token in x:
        state = state * poles + token[:, None]
        outs.append((state * residues).real.sum(1))
        tally.flops += (6 + 4) * state.numel()
    return torch.stack(outs)


def fft(x: Tensor, tally: Tally, inverse: bool = False) -> Tensor:
    """Radix-2 FFT of complex [..., n], unscaled. A butterfly is a complex product and two sums, 6 + 4 FLOPs."""
    n = x.shape[-1]
    if n == 1:
        return x
    even, odd = fft(x[..., ::2], tally, inverse), fft(x[..., 1::2], tally, inverse)
    angles = torch.arange(n // 2, dtype=torch.float64) * (2 if inverse else -2) * pi / n
    turns = torch.polar(torch.ones_like(angles), angles)
    tally.flops += (6 + 4) * odd.numel()
    return torch.cat([even + turns * odd, even - turns * odd], -1)


def fft_convolution(x: Tensor, taps: Tensor, tally: Tally) -> Tensor:
    """x, taps: [I, T], I even. Two real channels are one complex FFT; the taps' own FFT is not counted.

    The spectrum of a real channel has n/2 complex numbers, its two real ones together counted as one.
    """
    tokens = x.shape[1]
    n = 1 << (2 * tokens - 1).bit_length()
    padded, kernel = (torch.nn.functional.pad(part, (0, n - tokens)) for part in (x, taps))
    both = fft(torch.complex(padded[::2], padded[1::2]), tally)
    mirrored = both.roll(-1, -1).flip(-1).conj()
    spectra = torch.stack([(both + mirrored) / 2, (both - mirrored) / 2j], 1).flatten(0, 1)
    spectra = spectra * fft(kernel.to(torch.complex128), Tally())
    tally.flops += 6 * x.shape[0] * n // 2
    back = fft(spectra[::2] + 1j * spectra[1::2], tally, inverse=True) / n
    return torch.stack([back.real, back.imag], 1).flatten(0, 1)[:, :tokens]


def random_features(x: Tensor, matrix: Tensor) -> Tensor:
    """[H, T, k] to [H, T, D], one matrix for all heads."""
    return torch.relu(x @ matrix.expand(x.shape[0], *matrix.shape)) + 0.01


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution over the last W tokens; x: [T, I]; weight: [W, I]. Its products are with weights."""
    padded = torch.cat((x.new_zeros(weight.shape[0] - 1, x.shape[1]), x))
    return sum((padded[i : i + x.shape[0]] * tap for i, tap in enumerate(weight)), x.new_zeros(x.shape))


def by_group(x: Tensor, heads: int) -> Tensor:
    """[g, T, N] -> [H, T, N]: the heads of a group share B and C."""
    return x.repeat_interleave(heads // x.shape[0], 0)


def mamba2_chunks(c: Tensor, b: Tensor, x: Tensor, decay: Tensor, chunk: int) -> Tensor:
    """SSD in chunks: C B^T once per group, the rest per head; c, b: [g, T, N]; x: [H, T, v]; decay: [H, T, 1]."""
    heads = x.shape[0]
    state: Tensor | None = None
    outs = []
    for start in range(0, x.shape[1], chunk):
        cc, bc, xc, log = (y[:, start : start + chunk] for y in (c, b, x, decay.log()))
        grown = log.cumsum(1)
        span = (grown - grown.transpose(1, 2)).tril().exp().tril()
        within = (by_group(cc @ bc.transpose(1, 2), heads) * span) @ xc
        queries = by_group(cc, heads) * grown.exp()
        outs.append(within if state is None else within + queries @ state)
        update = (by_group(bc, heads) * (grown[:, -1:] - grown).exp()).transpose(1, 2) @ xc
        state = update if state is None else state * grown[:, -1:].exp() + update
    return torch.cat(outs, 1)


def log_linear_dense(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
    """By definition, all pairs: token j reaches token i through the level of the bucket of [0, i) that j lies in."""
    tokens = q.shape[1]
    grown = decay.log().cumsum(1)
    outs = []
    for i in range(tokens):
        levels = torch.zeros(i + 1, dtype=torch.long)
        end = i
        for bit in range(i.bit_length()):
            if i >> bit & 1:
                levels[end - (1 << bit) : end] = bit + 1
                end -= 1 << bit
        scores = row(q, i) @ k[:, : i + 1].transpose(1, 2)
        faded = (row(grown, i) - grown[:, : i + 1]).exp().transpose(1, 2)
        outs.append((scores * faded * row(weight, i)[:, :, levels]) @ v[:, : i + 1])
    return torch.cat(outs, 1)


def log_linear_steps(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor, tally: Tally) -> Tensor:
    """A state for each 1 bit of the token's index, merged as a binary counter carries; weight: [H, T, levels]."""
    states: dict[int, Tensor] = {}
    outs = []
    for i in range(q.shape[1]):
        states = {bit: tally.times(state, row(decay, i)) for bit, state in states.items()}
        own = row(k, i).transpose(1, 2) @ row(v, i)
        out = row(weight, i)[:, :, :1] * (row(q, i) @ own)
        for bit, state in states.items():
            out = out + row(weight, i)[:, :, bit + 1 : bit + 2] * (row(q, i) @ state)
        outs.append(out)
        bit = 0
        while bit in states:
            own, bit = own + states.pop(bit), bit + 1
        states[bit] = own
    return torch.cat(outs, 1)


def log_linear_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """The same over chunks of a power of two: pairs within a chunk densely, a state for each 1 bit of its index."""
    states: dict[int, Tensor] = {}
    outs = []
    low = chunk.bit_length() - 1
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc, wc, log = (x[:, start : start + chunk] for x in (q, k, v, weight, decay.log()))
        grown = log.cumsum(1)
        rows = qc.shape[1]
        levels = torch.zeros(rows, rows, dtype=torch.long)
        for i in range(rows):
            end = i
            for bit in range(i.bit_length()):
                if i >> bit & 1:
                    levels[i, end - (1 << bit) : end] = bit + 1
                    end -= 1 << bit
        span = (grown - grown.transpose(1, 2)).tril().exp().tril()
        weights = wc.gather(2, levels.expand(q.shape[0], -1, -1))
        out = ((qc @ kc.transpose(1, 2)) * span * weights) @ vc
        for bit, state in states.items():
            out = out + wc[:, :, low + bit + 1, None] * ((qc * grown.exp()) @ state)
        outs.append(out)
        own = (kc * (grown[:, -1:] - grown).exp()).transpose(1, 2) @ vc
        states = {bit: state * grown[:, -1:].exp() for bit, state in states.items()}
        bit = 0
        while bit in states:
            own, bit = own + states.pop(bit), bit + 1
        states[bit] = own
    return torch.cat(outs, 1)


def sse_steps(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, chosen: list[list[int]], parts: int, tally: Tally
) -> Tensor:
    """One shared state (0) and `parts` partitions (1 ...), of which token i touches chosen[i]; decay: [H, T, k]."""
    states: list[Any] = [q.new_zeros(q.shape[0], k.shape[2], v.shape[2]) for _ in range(1 + parts)]
    outs = []
    for i in range(q.shape[1]):
        out = torch.zeros_like(row(v, i))
        for index in (0, *chosen[i]):
            states[index] = tally.times(states[index], row(decay, i).transpose(1, 2))
            states[index] = states[index] + row(k, i).transpose(1, 2) @ row(v, i)
            out = out + row(q, i) @ states[index]
        outs.append(out)
    return torch.cat(outs, 1)
