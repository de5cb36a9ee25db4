"""Takes a compiled kernel apart: its machine code as text, and what ptxas said of it."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton


def code(cubin: bytes) -> bytes:
    """Return the machine code of the one kernel in a cubin, an ELF file.

    Raises:
        ValueError: There is no kernel in it, or there are several.
    """
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # Of a section: the offset of its name, type, flags, address, offset and length.
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    base = sections[names][4]
    kernels = [x for x in sections if cubin.startswith(b".text.", base + x[0])]
    if len(kernels) != 1:
        raise ValueError(f"want one kernel in a cubin, got {len(kernels)}")
    return cubin[kernels[0][4] : kernels[0][4] + kernels[0][5]]


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """Return the SASS of cubins for compute capability arch / 10.

    All are disassembled at once: nvdisasm takes 0.3 s of CPU time to start and 0.05 s for a kernel.
    """
    codes = [code(x) for x in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.bin"
        path.write_bytes(b"".join(codes))
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    texts, stop, here = [], 0, iter(text.splitlines())
    line = next(here, None)
    for x in codes:
        stop += len(x)
        lines = []
        while line is not None:
            found = re.match(r"\s*/\*([0-9a-f]+)\*/", line)
            if found is not None:
                if int(found[1], 16) >= stop:
                    break
                lines.append(line)
            line = next(here, None)
        texts.append("\n".join(lines))
    return texts


def resources(log: str) -> dict[str, int]:
    """Return registers of a thread, and bytes of its stack and of its spills, from what `ptxas -v` printed.

    Raises:
        ValueError: ptxas printed no such thing.
    """
    registers = re.search(r"Used (\d+) registers", log)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or memory is None:
        raise ValueError(f"ptxas did not say how many registers it used: {log!r}")
    return {"registers": int(registers[1]), "stack": int(memory[1]), "spills": int(memory[2]) + int(memory[3])}


def remarks(log: str) -> list[str]:
    """Return what ptxas changed about asynchronous products: it waits for them earlier than the kernel asks it to.

    C7510 to C7518 are "wgmma.mma_async instructions are serialized due to ..." and "wgmma.wait_group is injected ...".
    C7519, "warpgroup.arrive is injected ...", costs nothing.
    """
    return [x[1] for x in re.finditer(r"info\s*: (\(C751[0-8]\) .*)", log)]
