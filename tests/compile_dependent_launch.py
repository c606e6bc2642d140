"""The machine code of the batch norm's kernels with and without programmatic dependent launch, as JSON: a row a launch.

Run without TRITON_INTERPRET.
"""

import json
import re
from unittest import mock

from compile_kernels import TARGETS, Operation, compile_for, record_launches
from triton.compiler import ASTSource

from benchmarks.speed_model.launches import Launch
from benchmarks.speed_model.sass import read_code
from resnet_fast.ops import launch

MERGED_BY_COMBINE = Operation("bf16", "channels_last", 128, 16, "add", fork=True)
MERGED_BY_SECOND_PASS = Operation("bf16", "channels_last", 512, 4, "bn", fork=True)
OPERATIONS = {True: (MERGED_BY_COMBINE, MERGED_BY_SECOND_PASS), False: (MERGED_BY_COMBINE,)}  # by PDL
PATTERNS = {
    "access": re.compile(r"\b(?:LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|UBLKCP|UTMA\w+)\b"),
    "branch": re.compile(r"\b(?:BRA|BRX|CALL|JMP|EXIT)\b"),
    "wait": re.compile(r"\bACQBULK\b"),
    "start": re.compile(r"\bPREEXIT\b"),
}


def compile_launch(recorded: Launch) -> dict:
    """Positions in sm_90's code of the first access of memory and branch, of the wait for the kernel before, and of the
    start of the next one; None where there is none.
    """
    target = TARGETS["sm_90"]
    types, constants, attributes = recorded.signature(target)
    source = ASTSource(fn=recorded.kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled, _ = compile_for(source, target, recorded.options(target))
    lines = [instruction.text for instruction in read_code(compiled.asm["cubin"], 4, 0).instructions]
    positions = {
        name: next((position for position, text in enumerate(lines) if pattern.search(text)), None)
        for name, pattern in PATTERNS.items()
    }
    return {
        "kernel": recorded.kernel.__name__,
        "PDL": recorded.arguments["PDL"],
        "launch_pdl": compiled.metadata.launch_pdl,
        **positions,
    }


if __name__ == "__main__":
    found = []
    for has_pdl, operations in OPERATIONS.items():
        record_launches.cache_clear()
        with mock.patch.object(launch, "has_pdl", lambda device, has_pdl=has_pdl: has_pdl):
            launches = [recorded for operation in operations for recorded in record_launches(operation)]
        found += [compile_launch(recorded) for recorded in launches]
    print(json.dumps(found))
