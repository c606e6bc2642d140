"""A machine without triton imports the package, trains on ATen, and says why Triton cannot be had."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


STEP = """
import torch
from resnet_fast import resnet18
model = resnet18(num_classes=10, stem="cifar")
loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([1, 2]))
loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
from resnet_fast.functional import batch_norm_add_relu
try:
    batch_norm_add_relu(torch.randn(2, 3, 4, 4), None, None, training=True, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_hidden_triton():
    done = run("import sys; sys.modules['triton'] = None\n" + STEP)
    assert done.returncode == 0, done.stderr
    assert "backend 'triton' was asked for, but triton cannot be imported" in done.stdout


def test_cpu_tensors_run_on_aten_unless_interpreted():
    done = run(STEP)
    assert done.returncode == 0, done.stderr
    assert "backend 'triton' was asked for, but CPU tensors need Triton's interpreter" in done.stdout
    choice = "import torch\nfrom resnet_fast.ops import choose_backend\nprint(choose_backend(torch.ones(1)))"
    done = run(choice, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "triton", done.stderr
