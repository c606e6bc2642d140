"""Without Triton the package imports, computes gradients on ATen, and says why Triton is unavailable."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

STEP = """
import os, sys
import torch

def run():
    from resnet_fast import resnet20
    from resnet_fast.functional import batch_norm_add_relu
    model = resnet20(num_classes=10)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([1, 2]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    try:
        batch_norm_add_relu(torch.randn(2, 3, 4, 4), None, None, training=True, backend="triton")
    except RuntimeError as error:
        print(error, flush=True)

torch.set_num_threads(1)
child = os.fork()  # torch is imported once
if child == 0:
    sys.modules["triton"] = None
    run()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
run()
"""


def test_hidden_triton_and_triton_without_a_gpu():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STEP], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hidden, on_a_cpu = done.stdout.splitlines()
    assert hidden.startswith("backend 'triton' was asked for, but triton cannot be imported")
    assert on_a_cpu.startswith("backend 'triton' was asked for, but CPU tensors need Triton's interpreter")
