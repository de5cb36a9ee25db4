"""Where the Hopper engine runs, with the reason for each place where it does not, and what doctor makes of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from children import HUNG_S

from powerplan import doctor
from powerplan.kernels.call import CallShape
from powerplan.kernels.triton import support
from powerplan.kernels.triton.shapes import uses_hopper
from powerplan.kernels.triton.support import hopper_lacking, miscompiles, takes_untried

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    hopper_lacking.cache_clear()
    takes_untried.cache_clear()
    yield
    hopper_lacking.cache_clear()
    takes_untried.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be one GPU of capability 9.0, and triton 3.6.0."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("POWERPLAN_HOPPER", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(support, "triton_version", lambda: "3.6.0")
    one = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: one)


@pytest.mark.usefixtures("hopper")
def test_the_hopper_engine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = "runs on NVIDIA GPUs of compute capability 9.0 (Hopper), and"

    def reason(device: torch.device = GPU) -> str | None:
        hopper_lacking.cache_clear()
        return hopper_lacking(device)

    assert reason() is None
    assert reason(torch.device("cpu")) == f"{gpus} the device is cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason() == "does not run under TRITON_INTERPRET=1: Triton's interpreter does not know Gluon"
    monkeypatch.delenv("TRITON_INTERPRET")
    for version in ("3.5.1", "3.2.0+git1a2b", "unknown"):
        monkeypatch.setattr(support, "triton_version", lambda version=version: version)
        assert reason() == f"needs triton 3.6 or newer for its Gluon, and {version} is installed"
    for version in ("3.6.0", "3.6.1+git1a2b", "3.10.0", "4.0"):
        monkeypatch.setattr(support, "triton_version", lambda version=version: version)
        assert reason() is None
    monkeypatch.setattr(support, "triton_version", lambda: None)
    assert reason() == "needs triton 3.6 or newer, which is not installed (on Linux: pip install 'triton>=3.6')"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert reason() == f"{gpus} torch is built for AMD GPUs"
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in ((8, 0), (9, 4), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert reason() == f"{gpus} cuda:0 has {capability[0]}.{capability[1]}"


@pytest.mark.usefixtures("hopper")
def test_a_device_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hopper_lacking(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("looked again"))
    assert hopper_lacking(GPU) is None


def test_asking_imports_no_triton() -> None:
    script = "import sys, torch; from powerplan.kernels.triton.support import hopper_lacking as lacking\n"
    script += "assert lacking(torch.device('cpu')); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=HUNG_S)


def test_versions_that_miscompile() -> None:
    wrong = [version for version in ("3.3.1", "3.4.0", "3.6.0", "3.7.0", "3.7.1", "3.9.0") if miscompiles(version)]
    assert wrong == ["3.4.0", "3.6.0", "3.7.0"]


@pytest.mark.usefixtures("hopper")
def test_doctor_looks_at_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def findings() -> dict[str, doctor.Finding]:
        hopper_lacking.cache_clear()
        return {finding.what: finding for finding in doctor.examine()}

    found = findings()
    assert found["accelerator 0"].found == "H100, sm_90, 80 GiB"
    assert found["Hopper engine, 0"] == doctor.Finding("Hopper engine, 0", "can run p = 2 in bf16", ok=True)
    assert found["Hopper compiler"].found.startswith("triton 3.6.0 miscompiles products whose left operand")
    assert found["Hopper compiler"].remedy is not None
    assert "a triton after 3.7.0" in found["Hopper compiler"].remedy
    monkeypatch.setattr(support, "triton_version", lambda: "3.9.0")
    assert "Hopper compiler" not in findings()
    monkeypatch.setattr(support, "triton_version", lambda: "3.3.0")
    lacking = findings()["Hopper engine, 0"]
    assert lacking.ok is False
    assert lacking.found == "needs triton 3.6 or newer for its Gluon, and 3.3.0 is installed"
    older = SimpleNamespace(name="A100", major=8, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: older)
    assert not [what for what in findings() if what.startswith("Hopper")]


def takes(p: int, key_dim: int, value_dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    takes_untried.cache_clear()
    q, v = (1, 64, 2, key_dim), (1, 64, 2, value_dim)
    return uses_hopper(CallShape.of(q, q, v, p, 1.0, 64, False), dtype, GPU)


@pytest.mark.usefixtures("hopper")
def test_kernels_that_no_gpu_has_run_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "all"):
        monkeypatch.setenv("POWERPLAN_HOPPER", value)
        asked = value == "all"
        assert takes(2, 128, 128)
        assert takes(1, 128, 128) == takes(1, 1, 5) == asked
        assert takes(3, 64, 128) == takes(4, 32, 128) == takes(3, 1, 1) == asked
        assert not takes(1, 129, 64)
        assert not takes(3, 65, 64)
        assert not takes(4, 33, 64)
        assert not takes(1, 64, 129)
        assert not takes(1, 64, 64, torch.float16)
        assert takes(2, 128, 128, torch.float16) == asked
        assert not takes(2, 64, 64, torch.float32)
        assert not takes(5, 16, 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    hopper_lacking.cache_clear()
    assert not takes(1, 64, 64)


@pytest.mark.usefixtures("hopper")
def test_what_is_asked_for_holds_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass reads what the forward pass has saved, in the layout of its engine."""
    assert not takes_untried()
    monkeypatch.setenv("POWERPLAN_HOPPER", "all")
    assert not takes_untried()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("value", ["ALL", "1", "p1", " all"])
def test_another_value_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERPLAN_HOPPER", value)
    remedy = "set it to all, or not at all"
    with pytest.raises(ValueError, match=f"^POWERPLAN_HOPPER is {value!r}: {remedy}$"):
        takes(2, 64, 64)
    found = {finding.what: finding for finding in doctor.examine()}["POWERPLAN_HOPPER"]
    assert found == doctor.Finding("POWERPLAN_HOPPER", f"{value!r} is not known", ok=False, remedy=remedy)


@pytest.mark.usefixtures("hopper")
def test_doctor_says_what_no_gpu_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> doctor.Finding:
        takes_untried.cache_clear()
        return {finding.what: finding for finding in doctor.examine()}["POWERPLAN_HOPPER"]

    degrees = "p = 1, 3 and 4 in bf16 and p = 2 in fp16, which no GPU has run"
    assert found() == doctor.Finding("POWERPLAN_HOPPER", f"not set; all adds {degrees}")
    monkeypatch.setenv("POWERPLAN_HOPPER", "all")
    assert found() == doctor.Finding("POWERPLAN_HOPPER", f"all: also {degrees}")
