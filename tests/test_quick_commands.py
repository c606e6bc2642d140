"""Help and usage errors appear at once, because they import neither torch nor other slow modules."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "train",
    "eval",
    "predict",
    "export",
    "push",
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
    "train --epochs many",
    "train --lr -1",
    "train --model resnt18",
    "train --dataset mnist",
    "train --device gpu",
    "train --device cpu --graph",
    "train --weights x --dirac",
    "train --out taken",
    "train --resume nowhere",
    "train --resume taken",
    "train --resume run --device gpu",
    "eval nowhere",
    "eval run --split all",
    "predict nowhere x.png",
    "predict run x.png --device gpu",
    "export nowhere",
    "export run --format tf",
    "push nowhere me/model",
    "profile --batch-size 1",
    "profile --out taken",
    "convert resnet18",
    "convert nowhere.py:f",
    "study skip --seeds 0",
    "study skip --out taken",
    "summary resnt18",
    "tune --precision fp32",
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


def test_nothing_slow_is_imported(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    expected = [[line, 0, []] for line in HELP] + [[line, 2, []] for line in REFUSED]
    output = python(SCRIPT, json.dumps(HELP + REFUSED), cwd=tmp_path)
    assert [json.loads(line) for line in output.splitlines()] == expected


def test_the_package_offers_its_names_before_it_imports_them():
    python("import sys, resnet_fast as r; assert {*r.__all__} <= {*dir(r)} and 'torch' not in sys.modules")


def test_every_name_that_is_offered_is_there():
    for package in ("", ".data", ".models", ".profiling", ".study", ".training", ".tuning"):
        exec(f"from resnet_fast{package} import *", {})


def test_a_function_is_not_replaced_by_the_module_of_its_name():
    import_module("resnet_fast.models.article")
    assert callable(import_module("resnet_fast.models").article)
