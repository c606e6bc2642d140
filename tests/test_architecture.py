"""Imports point in one direction, kernels do not use torch, and wheel and sdist hold the right files."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "resnet_fast"

# From the bottom up; a module may import from its own layer and from those below. `data` stands beside the network, on
# the kernel that augments.
LAYERS = (
    "common kernels ops functional nn pairs checkpoints models conversion data evaluation training study "
    "inference hub profiling tuning doctor cli"
).split()
DATA_MAY_IMPORT = {"common", "data", "ops"}
THE_ONE_CHOICE = PACKAGE / "ops/backend.py"


def parts(path: Path) -> tuple[str, ...]:
    """The parts of a module's name; the kernels are imported as resnet_fast.kernels, a link where there are links."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return ("resnet_fast", *names) if names[0] == "kernels" else names


def sources() -> dict[str, Path]:
    """The files of the package by the name of their module."""
    paths = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))
    return {".".join(parts(path)).removesuffix(".__init__"): path for path in paths}


SOURCES = sources()


def imports(path: Path) -> set[str]:
    """The modules of resnet_fast that a file imports, at any place in it."""
    package = parts(path)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            module = module if node.level else node.module
            names = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if name in SOURCES else module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & {*SOURCES, "resnet_fast.kernels"}


def layers(modules: Iterable[str]) -> set[str]:
    return {module.split(".")[1] for module in modules if module != "resnet_fast"} & set(LAYERS)


def test_imports_point_one_way():
    for module, path in SOURCES.items():
        for layer in layers([module]):
            allowed = DATA_MAY_IMPORT if layer == "data" else set(LAYERS[: LAYERS.index(layer) + 1])
            assert layers(imports(path)) <= allowed, module


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports(path) - {module} for module, path in SOURCES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_tests_above_see_imports():
    assert set(LAYERS) == layers(SOURCES)
    assert layers(imports(PACKAGE / "functional.py")) == {"common", "ops"}
    assert layers(imports(PACKAGE / "models/blocks.py")) == {"nn", "pairs"}
    assert layers(imports(PACKAGE / "training/evaluation.py")) == {"common", "data", "evaluation", "training"}
    assert "resnet_fast.models.registry" in imports(PACKAGE / "training/config.py")
    assert "resnet_fast.ops.launch" in imports(PACKAGE / "ops/conv3x3.py")  # from . import launch
    assert "resnet_fast.kernels.tiles" in imports(PACKAGE / "ops/launch.py")


def test_kernels_import_triton_and_nothing_else():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] == "triton" for alias in node.names), path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module == "typing", path.name


def test_the_backend_is_chosen_in_one_place():
    for path in SOURCES.values():
        if path != THE_ONE_CHOICE:
            source = path.read_text()
            assert "is_cuda" not in source and "TRITON_INTERPRET" not in source, path.relative_to(ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel built where git makes no links, as on Windows: of resnet_fast/kernels it makes a file."""
    folder, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "resnet_fast"
    # A copy: building leaves a build/ behind, whose old modules would get into the next wheel.
    for name in ("kernels", "resnet_fast"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    link = copy / "resnet_fast/kernels"
    link.unlink(missing_ok=True)
    link.write_text("../kernels")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, copy]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl"))).namelist()


def test_the_wheel_holds_every_module(wheel):
    expected = {f"{'/'.join(parts(path))}.py" for path in SOURCES.values()} | {"resnet_fast/py.typed"}
    assert expected <= set(wheel)


def test_the_wheel_has_no_top_level_kernels(wheel):
    """A package of that name is Hugging Face's."""
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"resnet_fast"}


def test_the_sdist_is_the_checkout(tmp_path):
    """It has the documentation, the benchmarks and the modules that the tests read and import."""
    folders = ("benchmarks", "docs", "examples", "kernels", "resnet_fast", "tests")
    copy = tmp_path / "checkout"
    for name in folders:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    expected = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    build = [sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('.')"]
    done = subprocess.run(build, capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(copy.glob("*.tar.gz"))) as sdist:
        names = {file.name.partition("/")[2] for file in sdist if file.isfile()}
        links = {link.name.partition("/")[2]: link.linkname for link in sdist if link.issym()}
    assert links == {"resnet_fast/kernels": "../kernels"}, "it works in place, as a checkout does"
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("resnet_fast.egg-info/")}
    assert names - made == expected - made
