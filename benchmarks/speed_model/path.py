"""Find a program's path through its machine code: which branches it takes, and how often it runs a loop.

Branches are decided by rules, not by values:

- A program reads a tensor in passes of a known number of bytes. A loop or block runs while the pass has bytes left for
  its loads. If none are left, a loop starts a new pass if threads have exchanged values since the last load. Otherwise
  it is the remainder of an unrolled loop, and does not run.
- Of nested loops that read the same tensor, the outer one is a retry (overflow) and runs once.
- Other conditional forward branches are not taken, except one that leaves a loop after its last trip and one over a
  call (the slow path of a division). Of two alternatives, the one that accesses more memory is taken.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .sass import Code, Decoded, Instruction, decode

ADDRESS = re.compile(r"\[(R\d+)")


class Loop(NamedTuple):
    """A loop, from the target of a backward branch to the branch."""

    first: int
    last: int

    def holds(self, position: int) -> bool:
        return self.first <= position <= self.last


def find_loops(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """Return the loops, inner ones first. A span that contains an exit is an out-of-line block, not a loop."""
    loops = []
    for position, (text, target) in enumerate(instructions):
        if target is not None and target < position and decode(text).name == "BRA":
            body = [decode(other.text) for other in instructions[target:position]]
            if not any(other.name == "EXIT" and not other.conditional for other in body):
                loops.append(Loop(target, position))
    return sorted(loops, key=lambda loop: loop.last - loop.first)


def follow_pointers(instructions: tuple[Instruction, ...], pointers: Iterable[int]) -> dict[int, int]:
    """Return, by the position of each global memory access, the offset of its pointer in the constant bank.

    Accesses through other pointers are left out.
    """
    known = frozenset(pointers)
    derived: dict[str, frozenset[int]] = {}
    accesses = {}
    for position, (text, _) in enumerate(instructions):
        decoded = decode(text)
        origins = decoded.constants & known
        # `decode` counts a predicated instruction's old result as read; only its inputs and its address matter here.
        reads = decoded.reads - decoded.writes | set(ADDRESS.findall(text)) if "@" in text else decoded.reads
        for register in reads:
            origins |= derived.get(register, frozenset())
        if decoded.bytes and decoded.name in ("LDG", "STG", "LDGSTS") and origins:
            accesses[position] = min(origins)
        is_load = decoded.pipe == "lsu"
        for register in decoded.writes:
            derived[register] = frozenset() if is_load else origins
    return accesses


class Reads:
    """The bytes left in a program's pass over each tensor.

    Args:
        code: the program.
        loops: its loops, of `find_loops`.
        accesses: pointers by position, of `follow_pointers`.
        bytes_of_pass: bytes that one program reads in a pass, by pointer.
    """

    def __init__(
        self, code: Code, loops: list[Loop], accesses: dict[int, int], bytes_of_pass: dict[int, float]
    ) -> None:
        self.instructions, self.loops, self.bytes_of_pass = code.instructions, loops, bytes_of_pass
        self.decoded = [decode(instruction.text) for instruction in code.instructions]
        self.loads = {
            at: (pointer, self.decoded[at].bytes * 32 * code.warps)
            for at, pointer in accesses.items()
            if pointer in bytes_of_pass and self.decoded[at].name != "STG"
        }
        self.sizes = {loop: self._trip_sizes(loop) for loop in loops}
        self.least = self._needs(0, len(self.decoded))
        self.left = dict(bytes_of_pass)
        self.reduced: set[int] = set()  # tensors since whose last load threads have exchanged values

    def execute(self, at: int) -> None:
        if self.decoded[at].name in ("SHFL", "BAR"):
            self.reduced = set(self.left)
        if at in self.loads:
            pointer, n_bytes = self.loads[at]
            first = min((loop for loop in self.loops if pointer in self.sizes[loop]), default=None)
            if first is None or at >= first.first or _is_carried(self.decoded, at, first):
                self.left[pointer] -= n_bytes
            self.reduced.discard(pointer)

    def _trip_sizes(self, loop: Loop) -> dict[int, int]:
        """Return the bytes that a trip of the loop loads of each tensor that no inner loop loads."""
        sizes: Counter[int] = Counter()
        inner = set()
        for at, (pointer, n_bytes) in self.loads.items():
            if loop.holds(at):
                if loop == next(other for other in self.loops if other.holds(at)):
                    sizes[pointer] += n_bytes
                else:
                    inner.add(pointer)
        return {pointer: size for pointer, size in sizes.items() if pointer not in inner}

    def plan(self, loop: Loop) -> int:
        """Return the trips of a loop that the path enters."""
        trips = 1
        for pointer, size in self.sizes[loop].items():
            if self._is_over(pointer, size) and pointer in self.reduced:
                self.left[pointer] = self.bytes_of_pass[pointer]
            n = self.left[pointer] / size
            trips = max(trips, math.floor(n + 0.01) if self._has_rest(loop, pointer) else math.ceil(n - 0.01))
        return trips

    def skips(self, first: int, end: int) -> bool:
        """Return whether the block from `first` to `end` has nothing left to do."""
        needs = self._needs(first, end)
        return bool(needs) and all(
            self._is_over(pointer, need) and pointer not in self.reduced for pointer, need in needs.items()
        )

    def _needs(self, first: int, end: int) -> dict[int, int]:
        """Return the fewest bytes of each tensor that the block loads between two branches."""
        needs: dict[int, int] = {}
        at_once: Counter[int] = Counter()
        for at in range(first, end + 1):
            if at == end or self.decoded[at].name == "BRA":
                for pointer, n_bytes in at_once.items():
                    needs[pointer] = min(n_bytes, needs.get(pointer, n_bytes))
                at_once.clear()
            elif at in self.loads:
                at_once[self.loads[at][0]] += self.loads[at][1]
        return needs

    def _is_over(self, pointer: int, need: float) -> bool:
        left, whole = self.left[pointer], self.bytes_of_pass[pointer]
        # The smallest block also reads a tensor of less than half a tile.
        return left <= need / 2 and (left < whole or need > self.least[pointer])

    def _has_rest(self, loop: Loop, pointer: int) -> bool:
        """Return whether the loop is unrolled: loads of its remainder follow before threads exchange values."""
        for at in range(loop.last + 1, len(self.decoded)):
            if self.decoded[at].name in ("SHFL", "BAR"):
                return False
            if self.loads.get(at, (None,))[0] == pointer:
                return True
        return False


def _is_carried(decoded: list[Decoded], load: int, loop: Loop) -> bool:
    """Return whether a value loaded before a loop is first used in or after it, so that the loop prefetches."""
    values = decoded[load].writes
    if not values:  # into shared memory
        return True
    for position in range(load + 1, loop.first):
        if values & decoded[position].writes:
            return False
    for position in range(loop.first, loop.last):
        if values & (decoded[position].reads - decoded[position].writes):
            return True
        if values & decoded[position].writes:
            return False
    return not any(values & decoded[position].reads for position in range(load + 1, loop.first))


def follow(code: Code, accesses: dict[int, int], bytes_of_pass: dict[int, float]) -> list[int]:
    """Return the positions of the instructions that a warp executes, in order."""
    loops = find_loops(code.instructions)
    reads = Reads(code, loops, accesses, bytes_of_pass)
    trips: dict[Loop, int] = {}  # of the loops that the path is in
    done: Counter[Loop] = Counter()  # branches backwards since the loop was entered
    path, position = [], 0
    while True:
        for loop in loops:
            if position == loop.first and loop not in trips:
                trips[loop], done[loop] = reads.plan(loop), 0
        path.append(position)
        reads.execute(position)
        target, decoded = code.instructions[position].target, reads.decoded[position]
        if decoded.name == "EXIT" and (not decoded.conditional or _ends(reads, position, trips, done)):
            return path
        taken = False
        if target is not None and decoded.name == "BRA":
            if target <= position:
                loop = Loop(target, position)
                done[loop] += 1
                if done[loop] > trips[loop]:
                    raise ValueError(f"no way out of the loop at {position}: {code.instructions[position].text}")
                taken = not decoded.conditional or done[loop] < trips[loop]
            else:
                taken = not decoded.conditional or _is_taken(reads, position, target, trips, done)
        position = target if taken and target is not None else position + 1
        trips = {loop: n for loop, n in trips.items() if loop.holds(position)}


def _is_taken(reads: Reads, position: int, target: int, trips: dict[Loop, int], done: Counter[Loop]) -> bool:
    """Return whether a conditional forward branch is taken."""
    left = [loop for loop in trips if target > loop.last]
    if left:
        # A loop that ends in an unconditional branch is tested at its top, once more than its trips, or before its end.
        return all(done[loop] >= trips[loop] - _is_behind(reads, position, loop) for loop in left)
    if reads.skips(position + 1, target):
        return True
    skipped = reads.decoded[position + 1 : target]
    end = reads.instructions[target - 1].target or 0
    if end > target and not reads.decoded[target - 1].conditional:  # an if and its else
        otherwise = reads.decoded[target:end]
        return sum(other.bytes for other in otherwise) > sum(other.bytes for other in skipped)
    return any(other.name == "CALL" for other in skipped)


def _is_behind(reads: Reads, position: int, loop: Loop) -> bool:
    """Return whether the branch at `position` is after all accesses of a trip, or the loop has an exit at its end."""
    end = reads.decoded[loop.last]
    return end.conditional or not any(reads.decoded[at].bytes for at in range(position, loop.last))


def _ends(reads: Reads, position: int, trips: dict[Loop, int], done: Counter[Loop]) -> bool:
    """Return whether a conditional exit leaves a loop that has run: at its top, or after all of its accesses."""
    return any(
        loop.holds(position)
        and not reads.decoded[loop.last].conditional
        and done[loop] >= n - _is_behind(reads, position, loop)
        for loop, n in trips.items()
    )
