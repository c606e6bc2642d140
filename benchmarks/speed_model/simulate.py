"""Simulate one multiprocessor that runs a kernel's machine code, and predict the kernel's time.

Warps issue in order, one instruction per scheduler and cycle, and wait for registers, units, barriers and memory.
Memory is a latency and a queue at the multiprocessor's share of the bandwidth. The four schedulers of a multiprocessor
behave alike, so one is simulated, and its accesses count four times.

Not modeled: the instruction cache, bank conflicts, the memory's turnarounds between reads and writes, and waits encoded
in the instructions by the compiler.
"""

from collections import Counter
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from .gpus import Gpu
from .path import follow, follow_pointers
from .sass import Code, Instruction, decode, read_code

__all__ = ["Code", "Instruction", "Prediction", "Work", "predict", "read_code"]

SCHEDULERS = 4
REGISTERS = 65536
# Cycles, assumed: to start a program after another one, for a barrier, and of work that the load/store queue can hold.
PROGRAM_START, BARRIER, QUEUE = 300, 20, 24
FILL_BYTES = 64  # per cycle from the L2 cache to a multiprocessor (A100 whitepaper; assumed for all)
LINE_BYTES = 128  # per cycle between a multiprocessor's cache or shared memory and its registers
# Cycles for which a warp's instruction keeps a unit busy; with 32 fp32 lanes the unit has two halves of 16.
CYCLES = {"alu": 2, "fma": 2, "imad": 2, "xu": 8}
WAVES = 4  # waves of resident programs to simulate; later ones take as long as the middle ones


class Work(NamedTuple):
    """The work of one launch.

    grid: number of programs.
    image_parameters: offsets of pointers to image-sized tensors in the constant bank (`launches.parameter_offsets`).
        Only accesses through them use memory bandwidth; all other loads come from the L2 cache.
    image_bytes: bytes of images that the launch reads and writes, including ReLU bits.
    program_reads: bytes that one program reads in a pass over a tensor, by the offset of its pointer, for every tensor
        over which a program may loop: images (bytes / grid) and partial results (its columns, completely). A loop that
        loads from such a tensor takes the trips that these bytes need. Other loops take one trip.
    """

    grid: int
    image_parameters: frozenset[int]
    image_bytes: float
    program_reads: dict[int, float]


class Prediction(NamedTuple):
    """A kernel's predicted time, and its causes.

    us: time in microseconds, without the launch. bound: "bytes", "issue" or "pipe" if the time is less than 1.25 times
    the largest of what these alone would take, else "latency". roof: share of the time that the bytes alone would take.
    registers: per thread. resident: programs that a multiprocessor holds. waves: grid / (resident · multiprocessors).
    bytes_in_flight: most bytes of images that a multiprocessor's programs request before they wait.
    instructions: over all threads. serial_steps: how often a program waits for memory.
    """

    us: float
    bound: str
    roof: float
    registers: int
    resident: int
    waves: float
    bytes_in_flight: float
    instructions: float
    serial_steps: int


class Step(NamedTuple):
    """An instruction on a program's path.

    source: "memory" or "cache", whichever serves an access, or "" for neither. pending: number of groups of
    asynchronous copies that may be unfinished after a wait.
    """

    name: str
    registers: tuple[str, ...]
    writes: tuple[str, ...]
    pipe: str
    latency: int
    lines: float
    bytes: float
    source: str
    pending: int


def predict(code: Code, work: Work, gpu: Gpu, in_l2: bool) -> Prediction:
    """Return the prediction for a launch; `in_l2` tells whether the L2 cache serves the images."""
    steps = _steps(code, work)
    resident = _resident_programs(code, gpu)
    programs = -(-work.grid // gpu.multiprocessors)  # on the busiest multiprocessor
    bandwidth = (gpu.l2_gb_s if in_l2 else gpu.memory_gb_s) / gpu.clock_ghz  # bytes in a cycle
    machine = Machine(
        gpu,
        # A multiprocessor with more programs than others ends up with more of the bandwidth.
        memory_share=min(bandwidth * programs / work.grid, FILL_BYTES),
        cache_share=min(gpu.l2_gb_s / gpu.clock_ghz * programs / work.grid, FILL_BYTES),
        memory_latency=(gpu.l2_ns if in_l2 else gpu.memory_ns) * gpu.clock_ghz,
        cache_latency=gpu.l2_ns * gpu.clock_ghz,
    )
    cycles = machine.run(steps, programs, resident, code.warps)

    warps = programs * code.warps / SCHEDULERS
    lanes = gpu.architecture.fp32_lanes
    roofs = {"bytes": work.image_bytes / bandwidth, "issue": warps * len(steps), "pipe": warps * _busy(steps, lanes)}
    bound = max(roofs, key=roofs.__getitem__)
    in_flight, serial_steps = _waits(steps)
    return Prediction(
        us=cycles / gpu.clock_ghz / 1000,
        bound=bound if cycles < 1.25 * roofs[bound] else "latency",
        roof=roofs["bytes"] / cycles,
        registers=code.registers,
        resident=resident,
        waves=work.grid / resident / gpu.multiprocessors,
        bytes_in_flight=in_flight * code.warps * min(resident, programs),
        instructions=len(steps) * 32 * code.warps * work.grid,
        serial_steps=serial_steps,
    )


def _steps(code: Code, work: Work) -> list[Step]:
    """Return the instructions that a warp executes, in order."""
    accesses = follow_pointers(code.instructions, work.image_parameters | work.program_reads.keys())
    path = follow(code, accesses, work.program_reads)
    decoded = [decode(instruction.text) for instruction in code.instructions]
    # Instructions also count rows that programs share and the outside of tiles, which the memory does not move.
    is_image = {at for at, pointer in accesses.items() if pointer in work.image_parameters}
    asked = work.grid * code.warps * 32 * sum(decoded[at].bytes for at in path if at in is_image)
    if work.image_bytes > 1.3 * asked:
        raise ValueError(f"the kernel's path moves {asked:.0f} bytes of images, it has to move {work.image_bytes:.0f}")
    share = work.image_bytes / asked if asked else 1.0
    steps = {}
    for at in set(path):
        name, _, reads, writes, _, pipe, latency, n_bytes = decoded[at]
        moved = 32 * n_bytes
        steps[at] = Step(
            name=name,
            registers=tuple(reads | writes),
            writes=tuple(writes),
            pipe=pipe,
            latency=latency,
            lines=max(1.0, moved / LINE_BYTES) if pipe == "lsu" else 0.0,
            bytes=moved * (share if at in is_image else 1.0),
            source="memory" if at in is_image else "cache" if at in accesses else "",
            pending=int(code.instructions[at].text.split()[-1], 16) if name == "DEPBAR" else 0,
        )
    return [steps[at] for at in path]


def _resident_programs(code: Code, gpu: Gpu) -> int:
    """Return how many programs fit on a multiprocessor; registers are allocated by 256, a quarter per scheduler."""
    architecture = gpu.architecture
    warp_registers = -(-code.registers * 32 // 256) * 256
    by_registers = REGISTERS // SCHEDULERS // warp_registers * SCHEDULERS // code.warps
    reserved = 1024 if gpu.capability >= 80 else 0  # by the driver, of every program's shared memory
    by_shared = architecture.shared_kb * 1024 // max(1, code.shared + reserved)
    return max(1, min(by_registers, by_shared, architecture.max_warps // code.warps, architecture.max_programs))


def _busy(steps: list[Step], fp32_lanes: int) -> float:
    """Return the cycles for which a warp keeps its scheduler's busiest unit busy."""
    n = Counter(step.pipe for step in steps)
    multiply_adds = n["fma"] + n["imad"]
    fma = 2 * multiply_adds if fp32_lanes == 16 else max(multiply_adds, 2 * n["imad"])
    return max(fma, 2 * n["alu"], 8 * n["xu"], SCHEDULERS * sum(step.lines for step in steps))


def _waits(steps: list[Step]) -> tuple[float, int]:
    """Return the most bytes of images that a warp requests before it waits, and how often it waits for memory."""
    loading: set[str] = set()  # registers
    asked, most, waits, copies = 0.0, 0.0, 0, False
    for step in steps:
        if not loading.isdisjoint(step.registers) or (step.name == "DEPBAR" and copies):
            loading.clear()
            asked, copies = 0.0, False
            waits += 1
        if step.name in ("LDG", "LDGSTS"):
            loading.update(step.writes)
            copies |= step.name == "LDGSTS"
            asked += step.bytes * (step.source == "memory")
            most = max(most, asked)
    return most, waits


class Warp:
    """A warp. `ready`: when registers get their values. `copies`: when groups of asynchronous copies arrive."""

    def __init__(self, program: int) -> None:
        self.program, self.position, self.ready = program, 0, {}
        self.copies: list[float] = []
        self.copied = 0.0


class Machine(NamedTuple):
    """A multiprocessor's scheduler, its shares of bandwidth in bytes per cycle, and latencies in cycles."""

    gpu: Gpu
    memory_share: float
    cache_share: float
    memory_latency: float
    cache_latency: float

    def run(self, steps: list[Step], programs: int, resident: int, warps: int) -> float:
        """Return the cycles of `programs` programs, of which `resident` run at once."""
        # Programs with fewer than four warps share the schedulers: several count as one program with four.
        together = max(1, SCHEDULERS // warps)
        programs, resident = -(-programs // together), max(1, resident // together)
        simulated = min(programs, WAVES * resident)
        ends = self._simulate(steps, simulated, resident, max(1, warps // SCHEDULERS))
        cycles = ends[-1]
        if programs > simulated:
            pace = (ends[simulated - resident - 1] - ends[resident - 1]) / (simulated - 2 * resident)
            cycles += (programs - simulated) * pace
        return cycles

    def _simulate(self, steps: list[Step], programs: int, resident: int, warps: int) -> list[float]:
        """Return the end times of programs, in order; `warps` is a program's number of warps on the scheduler."""
        halves = 2 if self.gpu.architecture.fp32_lanes == 32 else 1
        free: dict[str, float] = dict.fromkeys(("alu", "xu", "heavy", "light"), 0.0)
        queues = {"memory": 0.0, "cache": 0.0}
        lines = clock = 0.0
        order = count()
        heap: list[tuple[float, int, Warp]] = []
        running: Counter[int] = Counter()
        waiting: dict[int, list[Warp]] = {}
        ends: list[float] = []

        def start(program: int, at: float) -> None:
            running[program], waiting[program] = warps, []
            for _ in range(warps):
                heappush(heap, (at, next(order), Warp(program)))

        for program in range(min(resident, programs)):
            start(program, 8.0 * program)
        started = min(resident, programs)
        while heap:
            at, _, warp = heappop(heap)
            step = steps[warp.position]
            now = max(at, clock)
            pipe = step.pipe
            if pipe == "fma":
                pipe = "light" if halves == 2 and free["light"] <= free["heavy"] else "heavy"
            elif pipe == "imad":
                pipe = "heavy"
            earliest = lines - QUEUE if pipe == "lsu" else free.get(pipe, 0.0)
            if earliest > now:
                heappush(heap, (earliest, next(order), warp))
                continue
            clock = now + 1
            done = now + step.latency
            if pipe in free:
                free[pipe] = now + CYCLES[step.pipe]
            elif pipe == "lsu":
                lines = max(lines, now) + SCHEDULERS * step.lines
                if step.source:
                    share = self.memory_share if step.source == "memory" else self.cache_share
                    queues[step.source] = max(queues[step.source], now) + SCHEDULERS * step.bytes / share
                if step.name in ("LDG", "LDGSTS"):
                    latency = self.memory_latency if step.source == "memory" else self.cache_latency
                    done = latency + (queues[step.source] if step.source else now)
                elif step.name in ("ATOMG", "ATOM"):
                    done = now + 1.5 * self.cache_latency
                else:
                    done = lines + step.latency
            for register in step.writes:
                warp.ready[register] = done
            warp.position += 1
            if warp.position == len(steps):
                running[warp.program] -= 1
                if not running[warp.program]:
                    ends.append(max(clock, queues["memory"]))
                    if started < programs:
                        start(started, now + PROGRAM_START)
                        started += 1
                continue
            following = steps[warp.position]
            at = clock
            if step.name == "LDGSTS":
                warp.copied = max(warp.copied, done)
            elif step.name == "LDGDEPBAR":
                warp.copies.append(warp.copied)
            elif step.name == "DEPBAR" and len(warp.copies) > step.pending:
                at = max(at, warp.copies[-1 - step.pending])
            for register in following.registers:
                at = max(at, warp.ready.get(register, 0.0))
            if step.name != "BAR":
                heappush(heap, (at, next(order), warp))
                continue
            waiting[warp.program].append(warp)
            if len(waiting[warp.program]) == running[warp.program]:
                for other in waiting[warp.program]:
                    heappush(heap, (max(at, clock + BARRIER), next(order), other))
                waiting[warp.program] = []
        return ends
