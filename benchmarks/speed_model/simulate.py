"""Simulates one multiprocessor that runs a kernel's machine code, and predicts the kernel's time.

Warps issue in order, one instruction per scheduler and cycle, and wait for registers, units, barriers and memory.
Memory is a latency and a queue at the multiprocessor's share of the bandwidth. A multiprocessor's four schedulers run
alike, so one is simulated, whose accesses count four times.

Not modelled: the instruction cache, bank conflicts, the memory's turns between reading and writing, and the waits that
the compiler writes into the instructions.
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
# Cycles. Assumed: a program's start where another one ended, a barrier, how far the queue of loads and stores is ahead.
PROGRAM_START, BARRIER, QUEUE = 300, 20, 24
FILL_BYTES = 64  # that a multiprocessor takes from the L2 cache in a cycle (A100 whitepaper; assumed for all)
LINE_BYTES = 128  # that it moves between its cache or shared memory and registers in a cycle
# Cycles that a unit is busy with a warp's instruction; with 32 lanes for fp32 there are two halves of 16.
CYCLES = {"alu": 2, "fma": 2, "imad": 2, "xu": 8}
WAVES = 4  # of resident programs are simulated; later ones take as long as the middle ones


class Work(NamedTuple):
    """What one launch has to do.

    grid: programs.
    image_parameters: where pointers to image-sized tensors lie in the constant bank (`launches.parameter_offsets`);
        only their accesses use memory bandwidth, what else is loaded comes from the L2 cache.
    image_bytes: bytes of images that the launch has to read and write, ReLU bits included.
    program_reads: bytes that one program reads in a pass over a tensor, by the pointer's offset in the constant bank,
        for every tensor over which a program may loop: images (bytes / grid) and partial results (their columns,
        whole). A loop that loads from such a tensor takes as many trips as that needs; another loop takes one.
    """

    grid: int
    image_parameters: frozenset[int]
    image_bytes: float
    program_reads: dict[int, float]


class Prediction(NamedTuple):
    """us: the kernel's time, without its launch. bound: "bytes", "issue", "pipe" or "latency", the first three where
    the time is at most a quarter above what they alone would take.

    roof: the share of the time that the bytes alone would take.
    registers: a thread. resident: programs that a multiprocessor holds. waves: grid / (resident · multiprocessors).
    bytes_in_flight: of images, the most that a multiprocessor's programs have asked for before they wait.
    instructions: of all threads. serial_steps: how often a program waits for memory.
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

    source: what serves an access: "memory", "cache" or "" for neither. pending: groups of asynchronous copies that a
    wait leaves on their way.
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
    """Predict a launch; `in_l2`: whether the L2 cache serves the images."""
    steps = _steps(code, work)
    resident = _resident_programs(code, gpu)
    programs = -(-work.grid // gpu.multiprocessors)  # of the busiest multiprocessor
    bandwidth = (gpu.l2_gb_s if in_l2 else gpu.memory_gb_s) / gpu.clock_ghz  # bytes in a cycle
    machine = Machine(
        gpu,
        # Whoever has more programs than others in the end has more of the bandwidth.
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
    """The instructions that a warp executes, in order."""
    accesses = follow_pointers(code.instructions, work.image_parameters | work.program_reads.keys())
    path = follow(code, accesses, work.program_reads)
    decoded = [decode(instruction.text) for instruction in code.instructions]
    # A row that programs share or a tile that is partly outside is in the instructions' bytes, not in the memory's.
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
    """How many programs fit on a multiprocessor: registers go to warps by 256, each scheduler has a quarter of them."""
    architecture = gpu.architecture
    warp_registers = -(-code.registers * 32 // 256) * 256
    by_registers = REGISTERS // SCHEDULERS // warp_registers * SCHEDULERS // code.warps
    reserved = 1024 if gpu.capability >= 80 else 0  # by the driver, of every program's shared memory
    by_shared = architecture.shared_kb * 1024 // max(1, code.shared + reserved)
    return max(1, min(by_registers, by_shared, architecture.max_warps // code.warps, architecture.max_programs))


def _busy(steps: list[Step], fp32_lanes: int) -> float:
    """Cycles of a scheduler that a warp keeps the busiest unit busy."""
    n = Counter(step.pipe for step in steps)
    multiply_adds = n["fma"] + n["imad"]
    fma = 2 * multiply_adds if fp32_lanes == 16 else max(multiply_adds, 2 * n["imad"])
    return max(fma, 2 * n["alu"], 8 * n["xu"], SCHEDULERS * sum(step.lines for step in steps))


def _waits(steps: list[Step]) -> tuple[float, int]:
    """The most bytes of images that a warp has asked for before it waits, and how often it waits for memory."""
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
    """`ready`: when a register has its value. `copies`: when groups of asynchronous copies have arrived."""

    def __init__(self, program: int) -> None:
        self.program, self.position, self.ready = program, 0, {}
        self.copies: list[float] = []
        self.copied = 0.0


class Machine(NamedTuple):
    """A multiprocessor's scheduler and its share of what all share, in bytes and cycles."""

    gpu: Gpu
    memory_share: float
    cache_share: float
    memory_latency: float
    cache_latency: float

    def run(self, steps: list[Step], programs: int, resident: int, warps: int) -> float:
        """Return the cycles that `programs` programs take, of which `resident` run at once."""
        # Programs of less than four warps share the schedulers: several make one of four.
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
        """Return when programs end, in order; `warps`: of a program, on one scheduler."""
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
