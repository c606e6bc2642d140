"""What the kernel that augments compiles to, as JSON: "dtype, reflect or zero, target" to stack, offsets and more.

Run without TRITON_INTERPRET.
"""

import json
import re
from unittest import mock

import torch
from compile_kernels import TARGETS, compile_for
from triton.compiler import ASTSource

from resnet_fast.ops import augment_launch, launch

TYPES = {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"} | {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
ALIGNED = [["tt.divisibility", 16]]


def record_launch(dtype: torch.dtype, reflect: bool) -> tuple:
    """The kernel and its arguments for a batch of CIFAR-10."""
    recorded = []
    images = torch.empty(1000, 3, 32, 32, dtype=torch.uint8, device="meta").to(memory_format=torch.channels_last)
    labels = torch.empty(1000, dtype=torch.int64, device="meta")
    plan = torch.empty(512, 6, dtype=torch.int32, device="meta")
    with mock.patch.object(
        launch, "launch_kernel", lambda kernel, grid, **arguments: recorded.append((kernel, arguments))
    ):
        augment_launch.augment(images, labels, plan, [125.0] * 3, [1 / 63] * 3, 4, reflect, 12, dtype)
    return recorded[0]


def source(kernel, arguments: dict) -> ASTSource:
    """As Triton's launcher specializes the arguments, but for the integers: any image size and padding."""
    types, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(position,)] = ALIGNED
        else:
            types[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


if __name__ == "__main__":
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for padding in ("zero", "reflect"):
            kernel, arguments = record_launch(dtype, padding == "reflect")
            for target in ("sm_90", "gfx942"):
                options = launch.compiler_options(arguments, 90 if target == "sm_90" else None)
                compiled, code = compile_for(source(kernel, arguments), TARGETS[target], options)
                # Offsets of whole tiles are those to pixels; the plan's and the labels' are scalars.
                offsets = re.findall(r"tt\.addptr.*tensor<\S+!tt\.ptr<\w+>>, tensor<\w+x(i\d+)>", compiled.asm["ttir"])
                found[f"{TYPES[dtype]}, {padding}, {target}"] = {"stack": code.stack, "offsets": offsets}
    print(json.dumps(found))
