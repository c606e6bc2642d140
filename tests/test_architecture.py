"""The house stands as drawn: imports point one way, kernels know no torch, the wheel holds what it must."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "resnet_fast"

# From the bottom up; a module may import from its own layer and from those below. `data` stands beside the network, on
# the kernel that augments, and on what all checks share.
LAYERS = (
    *(
        "checks",
        "files",
        "terminal",
        "signature",
        "archive",
        "machine",
        "timing",
        "kernels",
        "ops",
        "convolution",
        "functional",
        "nn",
        "checkpoints",
        "models",
    ),
    *(
        "conversion",
        "data",
        "evaluation",
        "training",
        "study",
        "inference",
        "profiling",
        "tuning",
        "parity",
        "doctor",
        "cli",
    ),
)
DATA_MAY_IMPORT = {"checks", "data", "ops"}
MADE_UP_TABLE = "resnet_fast/ops/tuned/made-up.json"
THE_ONE_CHOICE = PACKAGE / "ops/batch_norm.py"


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "kernels").glob("*.py"))]


def _is_module(name: str) -> bool:
    return (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()


def imported_layers(path: Path) -> set[str]:
    """The layers of resnet_fast that a module imports from."""
    package = ["resnet_fast", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [module + [alias.name] for alias in node.names] if len(module) == 1 else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        inside = [name for name in names if name[0] == "resnet_fast" and len(name) > 1]
        # The package's own names, as in `from resnet_fast import resnet18`, are those of its models and below.
        found |= {name[1] if _is_module(name[1]) else "models" for name in inside}
    return found & set(LAYERS)


def test_imports_point_one_way():
    for path in sources():
        layer = layer_of(path)
        if layer not in LAYERS:
            continue
        allowed = DATA_MAY_IMPORT if layer == "data" else set(LAYERS[: LAYERS.index(layer) + 1])
        assert imported_layers(path) <= allowed, path.relative_to(ROOT)


def test_the_test_above_sees_imports():
    assert imported_layers(PACKAGE / "functional.py") == {"checks", "ops"}
    assert imported_layers(PACKAGE / "models/blocks.py") == {"convolution", "nn"}
    assert imported_layers(PACKAGE / "models/resnet.py") == {"checks", "nn", "models"}
    assert imported_layers(PACKAGE / "models/pretrained.py") == {"checks"}
    assert imported_layers(PACKAGE / "training/evaluation.py") == {"checks", "data", "evaluation", "training"}
    assert "models" in imported_layers(PACKAGE / "training/config.py")
    assert "ops" in imported_layers(PACKAGE / "data/dataset.py")


def test_kernels_import_triton_and_nothing_else():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] == "triton" for alias in node.names), path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module == "typing", path.name


def test_the_backend_is_chosen_in_one_place():
    for path in sources():
        if path != THE_ONE_CHOICE:
            source = path.read_text()
            assert "is_cuda" not in source and "TRITON_INTERPRET" not in source, path.relative_to(ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    folder, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "resnet_fast"
    # A copy: building leaves a build/ behind, whose old modules would get into the next wheel.
    for name in ("kernels", "resnet_fast"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / MADE_UP_TABLE).write_text("{}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl"))).namelist()


def test_the_wheel_holds_every_module(wheel):
    expected = {f"resnet_fast/{path.relative_to(PACKAGE)}" for path in sources()} | {"resnet_fast/py.typed"}
    assert expected <= set(wheel)


def test_the_wheel_holds_the_tables_of_choices(wheel):
    assert MADE_UP_TABLE in wheel


def test_the_wheel_has_no_top_level_kernels(wheel):
    """A package of that name is Hugging Face's."""
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"resnet_fast"}
