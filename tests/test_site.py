"""The README is short and runs; the documentation builds strictly, has every public name, and repeats nothing."""

import re
import subprocess
import sys

import pytest
import torch
from pages import DOCS, run_example
from torchvision.models import resnet18

import resnet_fast
from benchmarks import figures

ROOT = DOCS.parent
README = ROOT / "README.md"
FAMILIES = re.compile(r"(resnet|plain)\d+|__version__")  # resnet18 stands for all of them


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for name in (name for name in resnet_fast.__all__ if not FAMILIES.fullmatch(name)):
        assert f'id="resnet_fast.{name}"' in page or re.search(rf'id="resnet_fast\.[a-z_.]*\.{name}"', page), name
        assert getattr(resnet_fast, name).__doc__
    assert "doc-module" not in page  # a name of a function and of its module: mkdocs shows the module
    assert "repository/kernels/index.html" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_broken_link_fails(tmp_path):
    """The same build with a page that links nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", tmp_path / "mkdocs.yml"]
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_the_readme_is_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def sentences(text: str) -> set[str]:
    """Sentences of prose of eight words or more, without markup."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\|.*$|^    .*$", "", text, flags=re.MULTILINE)
    parts = re.split(r"(?<=[.:])\s", " ".join(text.split()))
    return {part for part in parts if len(part.split()) >= 8}


def test_the_readme_repeats_no_page():
    said = sentences(README.read_text(encoding="utf-8"))
    assert len(said) > 10
    for page in DOCS.glob("*.md"):
        assert not said & sentences(page.read_text(encoding="utf-8")), page.name


def test_the_readmes_python_runs(on_aten):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    model = resnet18(num_classes=10)
    x, residual = torch.randn(2, 2, 64, 4, 4)
    names = {"model": model, "x": x, "residual": residual, "optimizer": torch.optim.SGD(model.parameters())}
    names["train_step"] = lambda images: model(images).sum()
    exec(example, names)
    norm = torch.nn.BatchNorm2d(64)
    assert torch.equal(names["y"], torch.relu(norm(x) + residual))
    with pytest.warns(RuntimeWarning, match="not recorded"):
        assert names["step"](torch.randn(2, 3, 32, 32)).isfinite()


def test_the_layers_page_runs():
    names = run_example(DOCS / "networks.md")
    expected = torch.relu(torch.nn.BatchNorm2d(64)(names["x"]) + names["residual"])
    torch.testing.assert_close(names["y"], expected)


def test_the_passes_are_those_of_the_table():
    """Of BN+add+ReLU, forked: column B of kernels/README.md, bytes per element, forward + backward."""
    lines = (ROOT / "kernels/README.md").read_text(encoding="utf-8").splitlines()
    for name, row in (("eager", "| eager ATen |"), ("fused", "| two passes, ")):
        (line,) = (line for line in lines if line.startswith(row))
        sums = (sum(figures.PASSES[f"{name}, {direction}"].values()) for direction in ("forward", "backward"))
        assert line.split("|")[3].strip() == " + ".join(f"{int(10 * n_bytes) / 10:g}" for n_bytes in sums)


def test_the_figures_show_the_committed_files():
    for name in figures.FIGURES:
        figure = (DOCS / name).read_bytes()
        assert figures.digest().encode() in figure and len(figure) < 100_000, name
