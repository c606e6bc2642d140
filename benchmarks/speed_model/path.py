"""Finds the path of a program through its machine code: which branches it takes, and how often it runs a loop.

Branches are decided by rules, not by values. A conditional branch forward is not taken, except one that leaves a loop
behind its last trip and one over a call (the slow path of a division); of two alternatives, the one with more accesses
of memory is taken. A loop runs until its loads have read what a
program has to read of their tensor. Of nested loops that read the same tensor, the outer one is a retry (overflow) and
runs once.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .sass import Code, Decoded, Instruction, decode


class Loop(NamedTuple):
    """From the target of a branch backwards to the branch."""

    first: int
    last: int

    def holds(self, position: int) -> bool:
        return self.first <= position <= self.last


def find_loops(instructions: tuple[Instruction, ...]) -> list[Loop]:
    """Return the loops, inner ones first. A span with an exit in it is a block out of line, and no loop."""
    loops = []
    for position, (text, target) in enumerate(instructions):
        if target is not None and target < position and decode(text).name == "BRA":
            body = [decode(other.text) for other in instructions[target:position]]
            if not any(other.name == "EXIT" and not other.conditional for other in body):
                loops.append(Loop(target, position))
    return sorted(loops, key=lambda loop: loop.last - loop.first)


def follow_pointers(instructions: tuple[Instruction, ...], pointers: Iterable[int]) -> dict[int, int]:
    """Return the pointer, by its offset in the constant bank, that each access of global memory goes through.

    Accesses through other pointers are left out.
    """
    known = frozenset(pointers)
    derived: dict[str, frozenset[int]] = {}
    accesses = {}
    for position, (text, _) in enumerate(instructions):
        decoded = decode(text)
        origins = decoded.constants & known
        for register in decoded.reads - decoded.writes if "@" in text else decoded.reads:
            origins |= derived.get(register, frozenset())
        if decoded.bytes and decoded.name in ("LDG", "STG", "LDGSTS") and origins:
            accesses[position] = min(origins)
        is_load = decoded.pipe == "lsu"
        for register in decoded.writes:
            derived[register] = frozenset() if is_load else origins
    return accesses


def count_trips(code: Code, loops: list[Loop], accesses: dict[int, int], reads: dict[int, float]) -> dict[Loop, int]:
    """Return how often each loop runs, so that a program reads `reads` bytes through each pointer."""
    decoded = [decode(instruction.text) for instruction in code.instructions]
    trips = dict.fromkeys(loops, 1)
    for pointer, n_bytes in reads.items():
        loads = [at for at, origin in accesses.items() if origin == pointer and decoded[at].name != "STG"]
        innermost = {at: next((loop for loop in loops if loop.holds(at)), None) for at in loads}
        reading = [loop for loop in loops if loop in innermost.values()]
        retries = {outer for outer in reading for inner in reading if outer != inner and outer.holds(inner.first)}
        reading = [loop for loop in sorted(reading) if loop not in retries]
        if not reading:
            continue
        size = Counter()
        for at, loop in innermost.items():
            outside = loop not in reading
            if not outside or at > reading[0].last or _is_carried(decoded, at, reading[0]):
                size[None if outside else loop] += decoded[at].bytes * 32 * code.warps
        left = n_bytes - size[None]
        if len({size[loop] for loop in reading}) == 1:  # as many passes over the tensor
            counts = [math.ceil(left / len(reading) / size[loop] - 0.01) for loop in reading]
        else:  # an unrolled loop, and what it leaves over
            counts = []
            for loop in reading:
                counts.append(math.floor(left / size[loop] + 0.01))
                left -= counts[-1] * size[loop]
        for loop, count in zip(reading, counts, strict=True):
            trips[loop] = max(trips[loop], count)
    return trips


def _is_carried(decoded: list[Decoded], load: int, loop: Loop) -> bool:
    """Whether a value loaded before a loop is first used in it, or behind it: then the loop loads ahead."""
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


def follow(instructions: tuple[Instruction, ...], trips: dict[Loop, int]) -> list[int]:
    """Return the positions of the instructions that a warp executes, in order."""
    path, position = [], 0
    done: Counter[Loop] = Counter()  # branches backwards since the loop was entered
    while True:
        path.append(position)
        text, target = instructions[position]
        decoded = decode(text)
        if decoded.name == "EXIT" and (not decoded.conditional or _is_over(instructions, position, trips, done)):
            return path
        taken = False
        if target is not None and decoded.name == "BRA":
            if target <= position:
                loop = Loop(target, position)
                done[loop] += 1
                taken = not decoded.conditional or done[loop] < trips[loop]
                if done[loop] > trips[loop]:
                    raise ValueError(f"no way out of the loop at {position}: {text}")
                if not taken:
                    done[loop] = 0
            else:
                taken = not decoded.conditional or _leaves(instructions, position, target, trips, done)
        position = target if taken and target is not None else position + 1


def _leaves(
    instructions: tuple[Instruction, ...], position: int, target: int, trips: dict[Loop, int], done: Counter[Loop]
) -> bool:
    """Whether a conditional branch forward is taken."""
    left = [loop for loop in trips if loop.holds(position) and target > loop.last]
    if not left:
        skipped = [decode(other.text) for other in instructions[position + 1 : target]]
        end = instructions[target - 1].target or 0
        if end > target and not decode(instructions[target - 1].text).conditional:  # an if and its else
            otherwise = [decode(other.text) for other in instructions[target:end]]
            return sum(other.bytes for other in otherwise) > sum(other.bytes for other in skipped)
        return any(other.name == "CALL" for other in skipped)
    # A loop that ends in an unconditional branch is tested at its top, once more than it runs.
    ends_in_test = decode(instructions[left[-1].last].text).conditional
    is_over = done[left[-1]] >= trips[left[-1]] - ends_in_test
    if is_over:
        done.subtract({loop: done[loop] for loop in left})
    return is_over


def _is_over(instructions: tuple[Instruction, ...], position: int, trips: dict[Loop, int], done: Counter[Loop]) -> bool:
    """Whether a conditional exit is the way out of a loop that has run."""
    return any(
        loop.holds(position) and not decode(instructions[loop.last].text).conditional and done[loop] >= trips[loop]
        for loop in trips
    )
