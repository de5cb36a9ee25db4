"""`--mixer`: what a new mixer takes over from the old one, and what it says about the rest."""

from __future__ import annotations

import pytest

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Attention, Convention, Power
from powerplan.whatif import with_mixer


def test_the_same_mixer_changes_nothing() -> None:
    spec = catalogue_spec("power-coder-3b")
    same, notes = with_mixer(spec, "power:p=2")
    assert Accounting(same).total_parameters == Accounting(spec).total_parameters
    assert notes == []
    more, _ = with_mixer(spec, "power:p=3")
    assert Accounting(more).weight_flops == Accounting(spec).weight_flops


def test_what_gets_lost_is_said() -> None:
    linear, notes = with_mixer(catalogue_spec("gpt-oss-20b"), "linear")
    assert notes == ["sinks is left out, linear has none"]
    assert Accounting(linear).wsfr(1) is not None
    _, notes = with_mixer(catalogue_spec("power-coder-3b"), "attention")
    assert notes == ["gated is left out, attention has none"]


def test_sinks_stay_and_windows_go() -> None:
    full, notes = with_mixer(catalogue_spec("gpt-oss-20b"), "attention")
    (use,) = full.layer_uses()
    assert isinstance(use.layer.mixer, Attention)
    assert use.layer.mixer.sinks
    assert use.layer.mixer.window is None
    assert notes == []


def test_settings_go_before_what_the_model_has() -> None:
    spec, _ = with_mixer(catalogue_spec("llama-3-8b"), "power:p=2,gated=true,chunk_size=1k,kv_heads=4")
    (use,) = spec.layer_uses()
    assert use.layer.mixer == Power(heads=32, kv_heads=4, head_dim=128, p=2, gated=True, chunk_size=1024)


@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_takes_every_mixer(name: str) -> None:
    for mixer in ("attention", "window:4096", "power:p=2", "linear"):
        spec, _ = with_mixer(catalogue_spec(name), mixer)
        assert Accounting(spec).state_flops(8192) > 0


def test_the_library_refuses_what_the_command_line_cannot_ask() -> None:
    with pytest.raises(InputError, match="form must be recurrent or chunked, and is 'recurent'"):
        Convention(form="recurent")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="causal must be exact or full, and is 'exakt'"):
        Convention(causal="exakt")  # type: ignore[arg-type]
    accounting = Accounting(catalogue_spec("gpt2-small"))
    with pytest.raises(InputError, match=r"a context is 1 to [0-9,]+ tokens, and is 0"):
        accounting.row(0)
    with pytest.raises(InputError, match="dtype must be fp32, bf16, fp16, fp8, int4, and is 'bf61'"):
        accounting.row(5, "bf61")
