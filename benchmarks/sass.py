"""Reads SASS, the machine code of NVIDIA GPUs, as nvdisasm prints it: counts, and operands of wgmma that are not kept.

Usage: python benchmarks/sass.py FILE... (what `nvdisasm -c` printed). Exits with 1 where an operand is not kept.

A Hopper product (HGMMA, PTX's wgmma) runs asynchronously and reads a left operand from registers while it runs. HGMMA
with gsb0 closes a group of products. WARPGROUP.DEPBAR.LE gsb0, N waits until all but the N newest groups are complete.
Two faults of compiled code give wrong results that no test without a Hopper GPU sees:

- `overwritten`: an instruction writes registers of a product that may still run, as left operand or as accumulator, or
  reads its accumulator. PTX leaves that undefined. It comes from a loop at run time that makes the left operand anew in
  each iteration while the product of the iteration before is outstanding.
- `lost`: a left operand made before a loop has its registers reused in the loop and not restored, so that the second
  iteration multiplies something else. Triton 3.4 to 3.7.0 compiles some loops to this.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PREDICATE_FIRST = ("SHFL", "LOP3", "ATOM", "ATOMG", "ATOMS", "LDS", "LDG", "LD", "FSWZADD")
"""Instructions that may name a predicate before the register that they write. Others then write no register."""

OLDEST = 8
"""Groups of this age and older are not told apart: no kernel leaves so many outstanding."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address in bytes, predicate ("" if it always runs), name with suffixes, and operands."""

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.name.split(".", 1)[0]

    @cached_property
    def writes(self) -> int:
        """Registers that it writes, one bit each."""
        operands = self.operands
        if operands and re.fullmatch(r"U?PT?\d?", operands[0]) and self.base in PREDICATE_FIRST:
            operands = operands[1:]
        found = re.fullmatch(r"R(\d+)", operands[0]) if operands else None
        return 0 if found is None else _bits(int(found[1]), self._width)

    @cached_property
    def reads(self) -> int:
        """Registers that it may read, one bit each; of an accumulator only where it is no product."""
        texts = self.operands if self.writes == 0 else self.operands[1:]
        wide = self._stored_width if self.writes == 0 else 1
        found = 0
        for text in texts:
            for number, suffix in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", text):
                found |= _bits(int(number), max(2 if suffix else 1, wide if "[" not in text else 1))
        return found

    @property
    def _width(self) -> int:
        base, name = self.base, self.name
        if base == "HGMMA":
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)(\.F16)?", name)
            assert shape is not None, name
            return int(shape[2]) // (4 if shape[4] else 2)
        if base == "HMMA":
            return 4 if ".F32" in name else 2
        if base == "LDSM":
            return int(name[-1]) if name[-2:] in (".2", ".4") else 1
        if ".128" in name:
            return 4
        if ".64" in name or ".WIDE" in name or base in ("DADD", "DMUL", "DFMA") or name == "CS2R":
            return 2
        return 1

    @property
    def _stored_width(self) -> int:
        if self.base == "STSM":
            return int(self.name[-1]) if self.name[-2:] in (".2", ".4") else 1
        return 4 if ".128" in self.name else 2 if ".64" in self.name else 1

    @cached_property
    def left(self) -> int:
        """Registers of the left operand of a product; 0 where it lies in shared memory, or this is none."""
        if self.base != "HGMMA":
            return 0
        found = re.fullmatch(r"R(\d+)(?:\.reuse)?", self.operands[1])
        return 0 if found is None else _bits(int(found[1]), 4)

    def __str__(self) -> str:
        name = f"{self.predicate} {self.name}".strip()
        return f"{self.address:#06x} {name} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Fault:
    """A product whose registers are not kept.

    Attributes:
        kind: "overwritten" or "lost".
        product: The product.
        by: The instruction that writes its registers, or reads its accumulator.
        why: What is wrong, in words.
    """

    kind: str
    product: Instruction
    by: Instruction
    why: str

    def __str__(self) -> str:
        return f"{self.kind} operand: [{self.product}]: {self.why} [{self.by}]"


@dataclass
class Block:
    """Instructions that run one after another, by index, and the blocks that may run before and after."""

    start: int
    stop: int
    after: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)


class Listing:
    """The instructions of one kernel and the paths between them.

    Jumps name a label, or, in a listing without labels (`nvdisasm --binary`), an address.

    Raises:
        ValueError: The text has no instruction, or jumps to a place that it has not got.
    """

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\w+):", line):
                labels[label[1]] = len(self.instructions)
            elif made := _parsed(line):
                self.instructions.append(made)
        if not self.instructions:
            raise ValueError("no instruction of SASS in this text: want the output of nvdisasm -c")
        self.blocks = self._split(labels)

    def counts(self) -> Counter[str]:
        """Return how often each instruction occurs, by its name without suffixes."""
        return Counter(x.base for x in self.instructions)

    def faults(self) -> list[Fault]:
        """Return the products whose registers are not kept, each with the first instruction that shows it."""
        return [*self._overwritten(), *self._lost()]

    def _split(self, labels: dict[str, int]) -> list[Block]:
        code = self.instructions
        labels |= {f"{x.address:#x}": i for i, x in enumerate(code)}
        jumps: dict[int, list[int]] = {}
        starts = {0}
        meeting: dict[str, int] = {}
        for i, x in enumerate(code):
            place = x.operands[-1].strip("`()") if x.base in ("BRA", "BSSY") else ""
            if place and place not in labels:
                raise ValueError(f"[{x}] leads to {place}, which is not in the listing")
            always = not x.predicate and len(x.operands) < 2
            if x.base == "BSSY":
                meeting[x.operands[0]] = labels[place]
            elif x.base == "BRA":
                jumps[i] = [labels[place]] + ([] if always else [i + 1])
            elif x.base == "BSYNC":
                jumps[i] = [i + 1] + [meeting[name] for name in x.operands[:1] if name in meeting]
            elif x.base in ("EXIT", "RET", "BRX", "JMX"):
                jumps[i] = [] if not x.predicate else [i + 1]
        starts |= {i + 1 for i in jumps} | {place for places in jumps.values() for place in places}
        order = sorted(place for place in starts if place < len(code))
        blocks = [Block(a, b) for a, b in zip(order, [*order[1:], len(code)], strict=True)]
        number = {block.start: n for n, block in enumerate(blocks)}
        for n, block in enumerate(blocks):
            follow = jumps.get(block.stop - 1, [block.stop])
            block.after = sorted({number[place] for place in follow if place in number})
            for m in block.after:
                blocks[m].before.append(n)
        return blocks

    def _first(self) -> list[int]:
        """Return the blocks that nothing leads to: where kernels, or functions that they call, begin."""
        return [n for n, block in enumerate(self.blocks) if n == 0 or not block.before]

    def _overwritten(self) -> Iterator[Fault]:
        """Yield what touches registers of products that may be outstanding.

        What may be outstanding is a mask of products (one bit an instruction) for the group that is open, for the
        newest closed group, the one before, and so on. Where paths meet, a product may be what it is on either.
        """
        code = self.instructions
        begin: list[tuple[int, ...]] = [(0,) * (OLDEST + 2)] * len(self.blocks)
        waiting = self._first()
        seen = set(waiting)
        while waiting:
            n = waiting.pop()
            state = begin[n]
            for i in range(self.blocks[n].start, self.blocks[n].stop):
                state = _step(state, i, code[i])
            for m in self.blocks[n].after:
                both = tuple(a | b for a, b in zip(begin[m], state, strict=True))
                if both != begin[m] or m not in seen:
                    begin[m] = both
                    seen.add(m)
                    waiting.append(m)
        found: set[int] = set()
        for n, block in enumerate(self.blocks):
            state = begin[n]
            for i in range(block.start, block.stop):
                for k, why in self._touched(state, code[i]):
                    if k not in found:
                        found.add(k)
                        yield Fault("overwritten", code[k], code[i], why)
                state = _step(state, i, code[i])

    def _touched(self, state: tuple[int, ...], x: Instruction) -> Iterator[tuple[int, str]]:
        outstanding = 0
        for group in state:
            outstanding |= group
        if outstanding == 0:
            return
        product = x.base == "HGMMA"
        reads = x.left if product else x.reads
        # Products run in order: one may go on with the accumulator of another.
        writes = 0 if product else x.writes
        for k in _members(outstanding):
            other = self.instructions[k]
            if writes & other.left:
                yield k, "its left operand is written while it may still run, by"
            elif (writes | reads) & other.writes:
                yield k, "its accumulator is used before a wait, by"

    def _lost(self) -> Iterator[Fault]:
        """Yield left operands made before a loop and overwritten in it.

        A value carried from one iteration to the next is written in the loop too. It differs: what writes it in the
        loop is of the same kind as what writes it before, unless one of them only copies, and no other product of the
        same iteration takes it.
        """
        code = self.instructions
        for head, body in self._loops():
            outside = [(m, self.blocks[m].stop) for m in self.blocks[head].before if m not in body]
            tails = [(m, self.blocks[m].stop) for m in self.blocks[head].before if m in body]
            for n in sorted(body):
                for i in range(self.blocks[n].start, self.blocks[n].stop):
                    for register in _members(code[i].left):
                        _, through = self._written(register, [(n, i)], body, head)
                        if not through:
                            continue
                        inner, _ = self._written(register, tails, body, head)
                        outer, _ = self._written(register, outside, None, head)
                        last = max(stop for _, stop in tails)
                        wrong = [k for k in inner if self._clobbers(k, i, outer, register, last)]
                        if wrong:
                            why = f"R{register}, made before the loop, is overwritten in it and not restored, by"
                            yield Fault("lost", code[i], code[max(wrong)], why)
                            break

    def _clobbers(self, inner: int, product: int, outer: set[int], register: int, last: int) -> bool:
        """Return whether what is written in the loop, whose end is `last`, is another value than the one before it."""
        code = self.instructions
        if _copies(code[inner]):
            return False
        before = {code[k].base for k in outer if not _copies(code[k])}
        if before and code[inner].base not in before:
            return True
        for k in range(inner + 1, last):
            if code[k].left >> register & 1:
                return k != product
            if code[k].writes >> register & 1:
                return False
        return False

    def _written(
        self, register: int, places: list[tuple[int, int]], within: set[int] | None, head: int
    ) -> tuple[set[int], bool]:
        """Return what last wrote a register before places (block, index), and whether a path from head has none."""
        found: set[int] = set()
        through, seen = False, set()
        waiting = list(places)
        while waiting:
            n, stop = waiting.pop()
            for i in range(stop - 1, self.blocks[n].start - 1, -1):
                if self.instructions[i].writes >> register & 1:
                    found.add(i)
                    break
            else:
                through |= n == head
                for m in self.blocks[n].before if within is None or n != head else ():
                    if m not in seen and (within is None or m in within):
                        seen.add(m)
                        waiting.append((m, self.blocks[m].stop))
        return found, through

    def _loops(self) -> Iterator[tuple[int, set[int]]]:
        """Yield the first block and all blocks of each loop.

        A loop's back-edges lead to a block that every path to them passes: not so the jumps back from the blocks that
        spin on a barrier, which ptxas puts at the end.
        """
        passed = [(1 << len(self.blocks)) - 1] * len(self.blocks)
        first = self._first()
        for n in first:
            passed[n] = 1 << n
        reached, waiting = set(first), list(first)
        while waiting:
            new = [m for m in self.blocks[waiting.pop()].after if m not in reached]
            reached.update(new)
            waiting += new
        changed = True
        while changed:
            changed = False
            for n, block in enumerate(self.blocks):
                if n in first:
                    continue
                common = passed[n]
                for m in block.before:
                    common &= passed[m]
                if passed[n] != common | 1 << n:
                    passed[n], changed = common | 1 << n, True
        for head, block in enumerate(self.blocks):
            tails = [m for m in block.before if m in reached and passed[m] >> head & 1]
            if tails:
                body, waiting = {head}, list(tails)
                while waiting:
                    n = waiting.pop()
                    if n not in body:
                        body.add(n)
                        waiting = [*waiting, *self.blocks[n].before]
                yield head, body


def _step(state: tuple[int, ...], index: int, x: Instruction) -> tuple[int, ...]:
    """Return what may be outstanding after an instruction: the open group, then closed ones, the newest first."""
    if x.base == "HGMMA":
        opened, *closed = state
        opened |= 1 << index
        if x.operands[-1] != "gsb0":
            return (opened, *closed)
        return (0, opened, *closed[:-2], closed[-2] | closed[-1])
    if x.name == "WARPGROUP.DEPBAR.LE" and not x.predicate:
        kept = int(x.operands[1], 16)
        return tuple(group if age <= kept else 0 for age, group in enumerate(state))
    return state


def _copies(x: Instruction) -> bool:
    """Return whether an instruction copies a register, sets a constant, or reloads what was put in local memory."""
    return x.base in ("MOV", "CS2R", "LDL") or x.name.startswith(("IMAD.MOV", "HFMA2.MMA"))


def _bits(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def _members(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _parsed(line: str) -> Instruction | None:
    found = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?PT?\d?)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
    if found is None:
        return None
    operands = tuple(x.strip().removesuffix(".reuse") for x in found[4].split(",")) if found[4] else ()
    return Instruction(int(found[1], 16), found[2] or "", found[3], operands)


def main() -> int:
    wrong = 0
    for name in sys.argv[1:]:
        listing = Listing(Path(name).read_text(encoding="utf-8"))
        found = listing.faults()
        wrong += len(found)
        print(f"{name}: {listing.counts()['HGMMA']} products, {len(found)} faults", *found, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
