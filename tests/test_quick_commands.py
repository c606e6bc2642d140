"""Help and refusals answer at once: they import neither torch nor anything else that takes long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "train",
    "eval",
    "predict",
    "export",
    "profile",
    "convert",
    "study",
    "study skip",
    "summary",
    "tune",
    "doctor",
)
HELP = ("--help", *(f"{command} --help" for command in COMMANDS))
REFUSED = (
    "nothing",
    "train --bath-size 8",
    "train --epochs 0",
    "train --epochs many",
    "train --lr -1",
    "train --momentum 1",
    "train --schedule cyclic",
    "train --model resnt18",
    "train --stem cifar --model article",
    "train --dataset mnist",
    "train --recipe fast",
    "train --precision fp8",
    "train --device gpu",
    "train --device cpu --graph",
    "train --device cpu --sync-bn --backend eager",
    "train --ghost-batch-size 8 --sync-bn",
    "train --accumulate 9 --batch-size 16",
    "train --weights x --dirac",
    "train --images stream",
    "train --time-budget soon",
    "train --seed 4294967295 --repeat 2",
    "train --out taken",
    "train --repeat 2 --out taken",
    "train --resume nowhere",
    "train --resume taken",
    "train --resume nowhere --epochs 3",
    "train --resume run --device gpu",
    "train --resume run --workers -1",
    "eval nowhere",
    "eval taken",
    "eval run --split all",
    "eval run --precision fp8",
    "eval run --device gpu",
    "predict nowhere x.png",
    "predict run x.png --top 0",
    "predict run x.png --device gpu",
    "export nowhere",
    "export run --format tf",
    "profile --model resnt18",
    "profile --batch-size 1",
    "profile --steps 0",
    "profile --device gpu",
    "profile --out taken",
    "convert resnet18",
    "convert nowhere.py:f",
    "study skip --seeds 0",
    "study skip --epochs 0",
    "study skip --device gpu",
    "study skip --out taken",
    "summary resnt18",
    "summary article --stem cifar",
    "tune --model resnt18",
    "tune --batch-size 1",
    "tune --precision fp32",
    "tune --rounds 0",
    "tune --device gpu",
    "doctor --device gpu",
)
SLOW = ("torch", "torchvision", "triton", "numpy", "matplotlib", "sklearn", "PIL", "rich.console")
# All in one process: what one imports shows in every later line, so the first such line is the culprit.
SCRIPT = f"""
import json, sys
from typer.testing import CliRunner
from resnet_fast.cli import app
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, line.split())
    print(json.dumps([line, result.exit_code, [name for name in {SLOW} if name in sys.modules]]))
"""


def python(script: str, *args: str, cwd: Path = ROOT) -> str:
    """Run a script in a process of its own."""
    command, env = [sys.executable, "-c", script, *args], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize(("lines", "code"), [(HELP, 0), (REFUSED, 2)], ids=["help", "refused"])
def test_nothing_slow_is_imported(lines: tuple[str, ...], code: int, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    output = python(SCRIPT, json.dumps(lines), cwd=tmp_path)
    assert [json.loads(line) for line in output.splitlines()] == [[line, code, []] for line in lines]


def test_the_package_offers_its_names_before_it_imports_them():
    python("import sys, resnet_fast as r; assert {*r.__all__} <= {*dir(r)} and 'torch' not in sys.modules")


@pytest.mark.parametrize("package", ["", ".data", ".models", ".profiling", ".study", ".training", ".tuning"])
def test_every_name_that_is_offered_is_there(package: str):
    exec(f"from resnet_fast{package} import *", {})


def test_a_function_is_not_replaced_by_the_module_of_its_name():
    python("import resnet_fast.models.article; from resnet_fast.models import article; article(num_classes=2)")
