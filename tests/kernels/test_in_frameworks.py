"""What docs/kernels.md says of a layer within torch's own tools: export, autocast, saved states, beams."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F  # noqa: N812
from children import HUNG_S
from torch import Tensor, nn

from powerplan.kernels import PowerState, power_attention, power_attention_step, spow
from powerplan.kernels.testing import Case, arguments

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "kernels.md"


class Layer(nn.Module):
    """The layer of docs/kernels.md, with a norm of queries in float32."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.qkv, self.gate, self.out, self.normed = nn.Linear(24, 48), nn.Linear(24, 2), nn.Linear(16, 24), normed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)) for part in self.qkv(x).chunk(3, -1))
        if self.normed:
            q, k = (F.normalize(part.float(), dim=-1).type_as(v) for part in (q, k))
        out: Tensor = self.out(power_attention(q, k, v, F.logsigmoid(self.gate(x)), p=2, chunk_size=16).flatten(-2))
        return out


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_any_length(strict: bool) -> None:
    layer, tokens = Layer(), torch.export.Dim("tokens", min=2, max=512)
    with torch.no_grad():
        exported = torch.export.export(
            layer, (torch.randn(2, 40, 24),), dynamic_shapes={"x": {1: tokens}}, strict=strict
        )
        for length in (2, 33, 200):
            x = torch.randn(2, length, 24)
            torch.testing.assert_close(exported.module()(x), layer(x))


def test_autocast_takes_queries_that_a_norm_left_in_float32() -> None:
    """As `type_as` makes them; without it the message names both dtypes."""
    layer, x = Layer(normed=True), torch.randn(2, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out - layer(x)).abs().max() < 0.05
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^k is torch.bfloat16 on cpu, and q"):
        power_attention(q, k, k)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_state_is_saved_as_its_parts(normalize: bool) -> None:
    inputs = Case(normalize=normalize).inputs(torch.float32)
    *_, state = power_attention(*arguments(inputs), normalize=normalize, return_state=True)
    file = io.BytesIO()
    torch.save(state._asdict(), file)
    file.seek(0)
    loaded = PowerState(**torch.load(file))  # weights_only, which is torch's default
    torch.testing.assert_close(loaded, state)


@pytest.mark.parametrize("normalize", [True, False])
def test_beams_go_on_from_their_own_states(normalize: bool) -> None:
    """Sequences are reordered, repeated and dropped; a step equals the definition over the whole of each."""
    case = Case(batch=3, tokens=20, normalize=normalize)
    inputs = case.inputs(torch.float64)
    q, k, v = (x.detach() for x in arguments(inputs))
    assert inputs["log_g"] is not None
    log_g = inputs["log_g"].detach()
    rows = torch.tensor([2, 0, 0, 1, 2])
    _, state = power_attention(q[:, :19], k[:, :19], v[:, :19], log_g[:, :19], normalize=normalize, return_state=True)
    last = (x[rows, 19] for x in (q, k, v, log_g))
    out, _ = power_attention_step(*last, state.select(rows), normalize=normalize)
    whole = power_attention(q, k, v, log_g, normalize=normalize, impl="reference")
    torch.testing.assert_close(out, whole[rows, 19])
    assert state.kv.shape[0] == 3


def test_nothing_of_torch_compile_is_imported_before_it_is_asked_for() -> None:
    """It takes as long as torch itself."""
    code = "import sys; from powerplan.kernels import power_attention; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HUNG_S)


@pytest.mark.parametrize("p", [2, 3])
def test_features_are_constants_of_a_trace(p: int) -> None:
    """By the mark of torch.compiler.assume_constant_result, which `multisets` has without its import."""
    torch._dynamo.reset()
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.compile(spow, fullgraph=True, backend="eager")(x, p), spow(x, p))


def test_the_page_names_what_is_tested_here() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for words in (
        "torch.export",
        "type_as(v)",
        "state.select(rows)",
        "state._asdict()",
        "PowerState(**torch.load(file))",
    ):
        assert words in text, words
