"""mean, rstd and the running statistics use correctly rounded divisions and square roots, like numpy.

NVIDIA GPUs have faster ones that are 2 ulp off, which `/`, tl.sqrt and tl.rsqrt of fp32 compile to. No GPU is needed.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import triton
from triton.compiler import ASTSource

pytestmark = pytest.mark.slow

KERNELS = {"statistics_kernel", "combine_statistics_kernel", "normalize_kernel"}


def instructions() -> dict[str, list[str]]:
    """PTX's divisions and roots of every kernel of the forward, with many splits and with few."""
    from compile_kernels import TARGETS, Operation, record_launches

    target, found = TARGETS["sm_90"], {}
    for n_channels, width in ((64, 32), (512, 4)):
        for recorded in record_launches(Operation("bf16", "channels_last", n_channels, width, "bn")):
            types, constants, attributes = recorded.signature(target)
            source = ASTSource(fn=recorded.kernel, signature=types, constexprs=constants, attrs=attributes)
            compiled = triton.compile(source, target=target, options=recorded.options(target))
            name = f"{recorded.kernel.__name__}, {n_channels} channels"
            found[name] = re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.[\w.]+", compiled.asm["ptx"])
    return found


def test_divisions_and_roots_of_the_statistics_are_correctly_rounded():
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: codes for name, codes in json.loads(done.stdout).items() if name.split(",")[0] in KERNELS}
    assert {code for codes in found.values() for code in codes} == {"div.rn.f32", "div.rn.f64", "sqrt.rn.f32"}
    assert "sqrt.rn.f32" in found["combine_statistics_kernel, 64 channels"]
    assert "sqrt.rn.f32" in found["normalize_kernel, 512 channels"]  # which merges few partial results itself
    assert "div.rn.f32" in found["statistics_kernel, 64 channels"]


if __name__ == "__main__":
    print(json.dumps(instructions()))
