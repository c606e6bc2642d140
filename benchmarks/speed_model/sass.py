"""Parse cuobjdump's listing of NVIDIA machine code: what each instruction reads, writes, occupies and moves."""

import re
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Instruction(NamedTuple):
    """An instruction; `target` is the position of a branch's destination."""

    text: str
    target: int | None = None


class Code(NamedTuple):
    """A program's machine code, its registers per thread, and its bytes of shared memory and warps."""

    instructions: tuple[Instruction, ...]
    registers: int
    shared: int
    warps: int


class Decoded(NamedTuple):
    """The properties of an instruction that the model needs.

    name: opcode without suffixes. conditional: whether a predicate guards it.
    reads, writes: registers and predicates. constants: offsets into the constant bank, rounded down to 8 bytes.
    pipe: unit that executes it. latency: cycles until its result is available, except from memory.
    bytes: bytes that a thread loads or stores; 0 if it does not access memory.
    """

    name: str
    conditional: bool
    reads: frozenset[str]
    writes: frozenset[str]
    constants: frozenset[int]
    pipe: str
    latency: int
    bytes: int


# Units of opcodes; the others use "alu". "fma" can use both halves of the multiply-add unit, "imad" only one.
PIPES = {
    "fma": "FADD FMUL FFMA HADD2 HMUL2 HFMA2",
    "imad": "IMAD",
    "xu": "MUFU I2F F2I FLO POPC F2F FRND BREV DADD DMUL DFMA DSETP",
    "lsu": "LDG STG LDS STS SHFL ATOMG ATOM RED LDSM STSM LDGSTS LDL STL ATOMS",
    "uniform": "R2UR S2UR",
    "control": "BRA EXIT BSSY BSYNC CALL RET BAR WARPSYNC NOP DEPBAR LDGDEPBAR BREAK MEMBAR ERRBAR CCTL YIELD ELECT",
    "special": "S2R CS2R LDC",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}

# Cycles until a dependent instruction can issue, rounded from microbenchmarks of these architectures (arXiv 1804.06826,
# 1903.07486, 2208.11174).
LATENCIES = {"alu": 5, "fma": 4, "imad": 5, "xu": 20, "lsu": 30, "uniform": 10, "control": 1, "special": 6}
OPCODE_LATENCIES = {"SHFL": 24, "S2R": 25, "S2UR": 25, "LDC": 30}

WITHOUT_RESULT = {"STG", "STS", "STSM", "STL", "RED", "LDGSTS", *PIPES["control"].split()}
PREDICATE = re.compile(r"U?P(?:\d|T)")


class Listing(NamedTuple):
    """The instructions of a cubin, and a thread's registers and bytes of stack."""

    registers: int
    stack: int
    instructions: tuple[Instruction, ...]


@lru_cache(1)
def read_cubin(cubin: bytes) -> Listing:
    """Return the listing of a cubin by Triton's cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing, re.MULTILINE)
    positions = {int(address, 16): position for position, (address, _) in enumerate(lines)}
    instructions = []
    for position, (_, text) in enumerate(lines):
        branch = re.search(r"\b(BRA|CALL\.REL\.NOINC)\b.*\b0x([0-9a-f]+)$", text)
        target = positions[int(branch[2], 16)] if branch else None
        if re.match(r"@!PT |BRA\.DIV", text):  # never taken, or taken only by divergent warps
            target = None
        elif branch and branch[1] != "BRA":
            if target == position + 2:  # over a backward branch: how ptxas leaves loops for sm_80
                text = text.replace(branch[1], "BRA")
            else:
                target = None
        instructions.append(Instruction(text, target))
    registers, stack = (int(n) for n in re.findall(r"\b(?:REG|STACK):(\d+)", usage)[:2])
    return Listing(registers, stack, tuple(instructions))


def read_code(cubin: bytes, warps: int, shared: int) -> Code:
    """Return the machine code of a cubin; `warps` and `shared` are a program's warps and bytes of shared memory."""
    listing = read_cubin(cubin)
    return Code(listing.instructions, listing.registers, shared, warps)


@cache
def decode(text: str) -> Decoded:
    """Return the properties of an instruction, given as text."""
    match = re.match(r"(?:@!?(U?P\w+)\s+)?(\S+)\s*(.*)", text)
    assert match is not None
    predicate, opcode, rest = match.groups()
    name = opcode.split(".")[0]
    arguments = [argument.strip() for argument in rest.split(",")]
    pipe = PIPE.get(name, "uniform" if name.startswith("U") else "alu")
    n_bytes = _access_bytes(opcode) if pipe == "lsu" and name != "SHFL" else 0
    width = max(1, n_bytes // 4) if n_bytes else 2 if re.search(r"\.64|WIDE|F64", opcode) or name[0] == "D" else 1
    if name == "CS2R" and ".32" not in opcode:
        width = 2
    if name == "LDSM":
        width = int(opcode[-1]) if opcode[-2:] in (".2", ".4") else 1
    n_results = _count_results(name, arguments)
    writes = _registers(arguments[:n_results], width)
    reads = _registers(arguments[n_results:], 1)
    if name.startswith("ST") or "WIDE" in opcode or name[0] == "D":  # the last operand is as wide as the result
        reads |= _registers(arguments[-1:], width)
    if predicate is not None:  # if it is false, the old value remains
        reads |= writes | {predicate}
    conditional = predicate is not None or (name == "BRA" and re.match(r"!?U?P\d", arguments[0]) is not None)
    offsets = re.findall(r"c\[0x0\]\[0x([0-9a-f]+)\]", rest)
    return Decoded(
        name=name if opcode != "BRA.DIV" else opcode,
        conditional=conditional or opcode == "BRA.DIV",
        reads=frozenset(reads - {"RZ", "URZ", "PT", "UPT"}),
        writes=frozenset(writes - {"RZ", "URZ", "PT", "UPT"}),
        constants=frozenset(int(offset, 16) & ~7 for offset in offsets),
        pipe=pipe,
        latency=OPCODE_LATENCIES.get(name, LATENCIES[pipe]),
        bytes=n_bytes,
    )


def _access_bytes(opcode: str) -> int:
    bits = re.search(r"\.[US]?(128|64|16|8)\b", opcode)
    return int(bits[1]) // 8 if bits else 4


def _count_results(name: str, arguments: list[str]) -> int:
    """Return how many operands are results: a register and the predicates after it, or one or two predicates."""
    if name in WITHOUT_RESULT:
        return 0
    if PREDICATE.fullmatch(arguments[0]):
        return 1 if name == "FCHK" else 2
    n_results = 1
    while n_results < min(3, len(arguments)) and PREDICATE.fullmatch(arguments[n_results]):
        n_results += 1
    return n_results


def _registers(arguments: list[str], width: int) -> set[str]:
    """Return the predicates and registers, of `width` words each, that operands name."""
    names = set()
    for argument in arguments:
        names |= set(re.findall(r"\bU?P\d\b", argument))
        for kind, number, is_wide in re.findall(r"\b(U?R)(\d+)(\.64)?", argument):
            names |= {f"{kind}{int(number) + word}" for word in range(2 if is_wide else width)}
    return names
