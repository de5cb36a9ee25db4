"""Machine code of wgmma: operands that are overwritten while they are read, or lost in a loop, are found."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """Return a module of the benchmarks. Their folder is on no path: it has a recommend.py, and so have the tests."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sass, cubin = benchmark("sass"), benchmark("cubin")

ROLLED = """
        /*0000*/                   CS2R R24, SRZ ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.2 R20, [R22] ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11+0x14000], R105 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0040*/                   HMUL2.BF16_V2 R88, R8.H0_H0, R20.reuse ;
        /*0050*/                   HMUL2.BF16_V2 R89, R4.reuse.H0_H0, R21 ;
        /*0060*/                   WARPGROUP.ARRIVE ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00c0*/                   F2FP.BF16.F32.PACK_AB R24, R25, R24 ;
        /*00d0*/                   EXIT ;
.L_x_0:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11+0x14000], R105 ;
        /*00f0*/              @!P0 BRA `(.L_x_0) ;
        /*0100*/                   BRA `(.L_x_3) ;
"""
"""A loop that makes the left operand R88..R95 anew while the product of the iteration before is outstanding."""

LOST = """
        /*0000*/                   PRMT R136, R136, 0x5410, R41 ;
        /*0010*/                   BRA 0x20 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R136, gdesc[UR28], RZ, !UPT, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   FMUL R24, R24, R24 ;
        /*0050*/                   F2FP.BF16.F32.PACK_AB R136, R24, R43 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R56, R136, gdesc[UR28], R56, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/               @P1 BRA 0x20 ;
        /*0090*/                   EXIT ;
"""
"""A loop whose left operand R136, loaded before it, is overwritten by another one; addresses instead of labels."""


def kinds(text: str) -> list[str]:
    return [fault.kind for fault in sass.Listing(text).faults()]


def test_an_operand_made_again_too_early() -> None:
    (fault,) = sass.Listing(ROLLED).faults()
    assert str(fault) == (
        "overwritten operand: [0x0070 HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24]: its left operand is "
        "written while it may still run, by [0x0040 HMUL2.BF16_V2 R88, R8.H0_H0, R20]"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gsb0, 0x1 ;", "gsb0, 0x0 ;"),  # a wait for all
        ("R88, gdesc", "gdesc[UR4], gdesc"),  # a left operand in shared memory
        ("HMUL2.BF16_V2 R8", "HMUL2.BF16_V2 R6"),  # other registers
        ("@P1 BRA", "@P1 NOP"),  # no loop
    ],
)
def test_what_is_no_fault(old: str, new: str) -> None:
    assert kinds(ROLLED.replace(old, new).replace("@P1 NOP `(.L_x_1)", "NOP")) == []


def test_iterations_with_registers_of_their_own() -> None:
    one = ROLLED[ROLLED.index(".L_x_3") : ROLLED.index("        /*00a0*/")].splitlines()[1:]
    two = [f"        /*0{900 + i * 10}*/{line.split('*/')[1]}" for i, line in enumerate(one)]
    second = "\n".join(two).replace("R88", "R96").replace("R89", "R97").replace("R92", "R100")
    unrolled = ROLLED.replace("        /*00a0*/", f"{second}\n        /*00a0*/")
    assert unrolled.count("HGMMA") == 4
    assert kinds(unrolled) == []
    assert kinds(unrolled.replace("R96", "R88")) == ["overwritten", "overwritten"]


@pytest.mark.parametrize(
    "early", ["FADD R30, R1, R2 ;", "FADD R1, R2, R31 ;", "STG.E.128 desc[UR6][R2.64], R52 ;", "LDS.64 R54, [R2] ;"]
)
def test_an_accumulator_used_before_the_wait(early: str) -> None:
    text = ROLLED.replace("HMUL2.BF16_V2 R8", "HMUL2.BF16_V2 R6").replace("WARPGROUP.ARRIVE ;", early)
    (fault, _) = sass.Listing(text).faults()
    assert fault.kind == "overwritten"
    assert fault.why == "its accumulator is used before a wait, by"
    # R24 to R55 hold it, and STG.128 reads four registers.
    assert kinds(text.replace("HGMMA.64x64x16", "HGMMA.64x8x16").replace("R24", "R120")) == []


def test_an_operand_lost_in_a_loop() -> None:
    (fault,) = sass.Listing(LOST).faults()
    assert fault.kind == "lost"
    assert (fault.product.address, fault.by.address) == (0x20, 0x50)
    assert "R136, made before the loop, is overwritten in it and not restored" in str(fault)


def test_an_operand_that_is_restored_or_carried_is_not_lost() -> None:
    restored = LOST.replace("        /*0080*/", "        /*0078*/  MOV R136, R200 ;\n        /*0080*/")
    assert kinds(restored) == []
    # Made the same way before the loop and in it, and read by no other product: the next iteration's value.
    carried = LOST.replace("PRMT R136, R136, 0x5410, R41", "F2FP.BF16.F32.PACK_AB R136, R1, R2")
    assert kinds(carried) == ["lost"]
    assert kinds(carried.replace("R56, R136, gdesc", "R56, R140, gdesc")) == []


def test_counts() -> None:
    counts = sass.Listing(ROLLED).counts()
    assert (counts["HGMMA"], counts["HMUL2"], counts["LDL"]) == (2, 2, 0)


def test_a_text_that_is_no_listing() -> None:
    with pytest.raises(ValueError, match="no instruction of SASS in this text: want the output of nvdisasm -c"):
        sass.Listing("__global__ void kernel() {}")
    with pytest.raises(ValueError, match=r"leads to \.L_x_1, which is not in the listing"):
        sass.Listing(ROLLED.replace(".L_x_1:", ""))


def test_command(tmp_path: Path) -> None:
    (tmp_path / "rolled.sass").write_text(ROLLED, encoding="utf-8")
    command = [sys.executable, BENCHMARKS / "sass.py", tmp_path / "rolled.sass"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rolled.sass: 2 products, 1 faults\n  overwritten operand: " in done.stdout


def test_what_ptxas_says() -> None:
    log = (
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x\n"
        "ptxas info    : (C7519) warpgroup.arrive is injected in around line 2072 by compiler\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 58 registers, used 0 barriers\n"
    )
    assert cubin.resources(log) == {"registers": 58, "stack": 8, "spills": 16}
    (remark,) = cubin.remarks(log)
    assert remark.startswith("(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized")
    with pytest.raises(ValueError, match="ptxas did not say how many registers it used"):
        cubin.resources("")
