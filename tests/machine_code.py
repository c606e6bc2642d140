"""Reads a compiled kernel's registers, stack, access widths and inner loop, which decide its speed."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.speed_model import sass
from benchmarks.speed_model.path import follow_pointers

# Width in bits by what a mnemonic says of it; the first match counts.
NVIDIA_WIDTHS = {r"\.256": 256, r"\.128": 128, r"\.64": 64, r"\.[US]16": 16, r"\.[US]8": 8, "": 32}
AMD_WIDTHS = {
    "b128|dwordx4": 128,
    "b96|dwordx3": 96,
    "b64|dwordx2": 64,
    "b32|dword": 32,
    "short|16": 16,
    "byte|8": 8,
}
MATRIX = r"(?<![\w.])(?:(?:UTC)?[A-Z]G?MMA\b|v_\w*(?:mfma|wmma|mfmac))"


class MachineCode(NamedTuple):
    """`loads` and `stores` count the instructions on global memory by their width in bits. `loop` is the number of
    instructions in the innermost loop, the one with the most loads if there are several, and 0 if there is none.
    """

    registers: int
    stack: int
    loads: Counter[int]
    stores: Counter[int]
    instructions: int
    loop: int
    matrix: int


def read_cubin(cubin: bytes) -> MachineCode:
    """For NVIDIA; registers per thread, stack in bytes per thread."""
    registers, stack, instructions = sass.read_cubin(cubin)
    accesses = {"load": r"\bLDG\S*", "store": r"\bSTG\S*", "widths": NVIDIA_WIDTHS}
    return _summary(instructions, registers, stack, **accesses)


def loads_in_flight(instructions: Sequence[sass.Instruction], pointers: list[int]) -> int:
    """The most loads of the widest kind through these pointers that a thread issues before it waits for one of them.

    For NVIDIA; `pointers` are places in the constant bank.
    """
    decoded = [sass.decode(instruction.text) for instruction in instructions]
    loads = {at for at in follow_pointers(instructions, pointers) if decoded[at].name == "LDG"}
    widest = max((decoded[at].bytes for at in loads), default=0)
    awaited: set[str] = set()
    n_loads = most = 0
    for at, instruction in enumerate(decoded):
        if not awaited.isdisjoint(instruction.reads | instruction.writes):
            awaited, n_loads = set(), 0
        if at in loads and instruction.bytes == widest:
            awaited |= instruction.writes
            n_loads += 1
            most = max(most, n_loads)
    return most


def read_amdgcn(assembly: str) -> MachineCode:
    """For AMD; vector registers per lane, scratch memory in bytes per lane."""
    positions, lines = {}, []
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            positions[label[1]] = len(lines)
        elif re.match(r"\t[a-z]", line):
            lines.append(line.split(";")[0].strip())
    instructions = []
    for text in lines:
        branch = re.match(r"s_c?branch\w* (\.LBB\w+)", text)
        instructions.append(sass.Instruction(text, positions[branch[1]] if branch else None))
    return _summary(
        instructions,
        registers=int(re.search(r"\.vgpr_count: +(\d+)", assembly)[1]),
        stack=int(re.search(r"\.private_segment_fixed_size: +(\d+)", assembly)[1]),
        load=r"^(?:global|buffer|flat)_load_\S*",
        store=r"^(?:global|buffer|flat)_store_\S*",
        widths=AMD_WIDTHS,
    )


def _summary(
    instructions: Sequence[sass.Instruction], registers: int, stack: int, load: str, store: str, widths: dict[str, int]
) -> MachineCode:
    def count(pattern: str, among: Sequence[sass.Instruction]) -> Counter[int]:
        found = (re.search(pattern, instruction.text) for instruction in among)
        return Counter(next(widths[w] for w in widths if re.search(w, match[0])) for match in found if match)

    # A loop is what lies between a branch backwards and its target; the branch to itself behind the end is none.
    spans = {(i.target, position) for position, i in enumerate(instructions) if i.target is not None}
    spans = {(first, last) for first, last in spans if first < last}
    innermost = [
        instructions[first : last + 1]
        for first, last in spans
        if not any((first, last) != span and first <= span[0] and span[1] <= last for span in spans)
    ]
    loop = max(innermost, key=lambda body: (count(load, body).total(), len(body)), default=[])
    return MachineCode(
        registers=registers,
        stack=stack,
        loads=count(load, instructions),
        stores=count(store, instructions),
        instructions=len(instructions),
        loop=len(loop),
        matrix=sum(bool(re.search(MATRIX, instruction.text)) for instruction in instructions),
    )
