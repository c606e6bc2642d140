"""Every code block of README.md, CONTRIBUTING.md and docs/ is run by a test, or has a reason here why it is not."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import DOCS, blocks, python_blocks, run_example
from PIL import Image
from trained_run import invoke, make_image_folder, train_tiny, use_tiny

ROOT = DOCS.parent
TESTS = Path(__file__).parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))

# The tests that run the Python blocks of a page, in order.
PYTHON = {
    "README.md": ("test_site",),
    "article.md": ("test_article_page",),
    "augmentation.md": ("test_augmentation_page",),
    "checkpoints.md": ("test_checkpoints_page", "test_checkpoints_page"),
    "convert.md": ("test_convert_page",),
    "datasets.md": ("test_data_torchvision_sets",),
    "depth.md": ("test_depth_page",),
    "fine_tuning.md": ("test_fine_tuning", "test_fine_tuning"),
    "hubs.md": ("test_hub", "test_hub"),
    "images.md": ("test_images_page",),
    "inference.md": ("test_code_blocks",),
    "networks.md": ("test_site",),
    "own-loop.md": ("test_examples", "test_graphed"),
    "tools.md": ("test_tools", "test_tools"),
}
# Blocks that are not code, by their first words.
TEXT = {
    "x ── conv1 3x3": "a drawing",
    "theirs.pth: 122 tensors": "output; test_checkpoints_page compares it",
    "theirs.pth does not fit": "output; test_checkpoints_page compares it",
    "converted 20": "output; test_convert_page compares it",
    "images/train/<class>/": "a layout of folders",
    "('cat', 'dog')": "output; test_images_page compares it",
    "train_step is not recorded": "output; test_graphed tests the messages",
}
# Commands that no test runs, by their first words.
NOT_RUN = {
    "make": "installs, then runs for minutes; that the target exists is tested below",
    "pip install": "needs the network; that the extra exists is tested below",
    "hf": "needs an account of the Hugging Face Hub",
    "pytest benchmarks": "takes minutes; test_benchmarks runs one level of it",
    "python -m benchmarks.report": "writes files of this checkout; test_report runs it elsewhere",
    "PYTHONPATH=. python tests/numerics_page.py": "takes minutes; test_numerics runs every case",
}
FIRST_WORDS = ("make ", "pip ", "hf ", "pytest ", "python ", "PYTHONPATH=. ", "torchrun ", "resnet-fast ")
SLOW = re.compile(r"resnet-fast (convert (torchvision|timm)|doctor|export)")


class Begins(BaseException):
    """Raised where the work of a command would begin."""


def shell_lines() -> list[str]:
    pages = (page for page in PAGES if page.name != "images.md")  # test_images_page runs its commands to the end
    texts = (text for page in pages for language, text in blocks(page) if language == "")
    lines = (re.sub(r" +#.*", "", line) for text in texts for line in text.replace("\\\n", " ").splitlines())
    return sorted({" ".join(line.split()) for line in lines if line.startswith(FIRST_WORDS)})


def is_run(line: str) -> bool:
    return line.startswith(("resnet-fast ", "torchrun "))


def test_every_block_is_python_shell_or_known_text():
    for page in PAGES:
        for language, text in blocks(page):
            lines = text.replace("\\\n", " ").splitlines()
            known = text.startswith(tuple(TEXT)) or all(line.startswith(FIRST_WORDS) for line in lines if line)
            assert known if language == "" else language in ("python", "diff"), (page.name, text)


def test_every_reason_is_needed():
    texts = [text for page in PAGES for language, text in blocks(page) if language == ""]
    for first in TEXT:
        assert any(text.startswith(first) for text in texts), first
    for first in NOT_RUN:
        assert any(line.startswith(first) for line in shell_lines()), first
    assert PYTHON.keys() <= {page.name for page in PAGES}


def test_every_python_block_has_a_test():
    for page in PAGES:
        tests = PYTHON.get(page.name, ())
        assert len(python_blocks(page)) == len(tests), page.name
        for test in set(tests):
            assert f'"{page.name}"' in (TESTS / f"{test}.py").read_text().replace("docs/", ""), (page.name, test)


def test_the_readmes_diff_replaces_torchvisions_network():
    (diff,) = (text for language, text in blocks(ROOT / "README.md") if language == "diff")
    models = []
    for sign in "-+":
        names: dict = {}
        exec("\n".join(line[1:] for line in diff.splitlines() if line.startswith((sign, " "))), names)
        models.append(names["model"])
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.conv1.kernel_size == (3, 3)


def test_other_commands_have_a_reason_and_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for line in (line for line in shell_lines() if not is_run(line)):
        assert line.startswith(tuple(NOT_RUN)), line
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        for extra in re.findall(r"\[(\w+)\]", line):
            assert f"\n{extra} = " in extras, line
        for path in re.findall(r"\S+\.(?:py|txt)\b", line):
            assert (ROOT / path).is_file(), line


def test_files_that_contributing_and_guarantees_name_exist():
    for page in (ROOT / "CONTRIBUTING.md", DOCS / "guarantees.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\btest_\w+\*?", text):
            assert list(TESTS.glob(f"{name}.py")), name
        for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.[a-z]+)`", text):
            assert (ROOT / name).exists() or (ROOT / "resnet_fast" / name).exists(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that the pages' commands and examples name: runs, images, a repository of CIFAR networks."""
    folder = tmp_path_factory.mktemp("pages")
    run = train_tiny(folder / "runs/…").out
    shutil.copytree(run, folder / "runs/digits-resnet18-20261125-093000")
    make_image_folder(folder / "images", classes=("cat", "dog"))
    for name in ("photo.jpg", "scan.png"):
        Image.new("RGB", (40, 30), "orange").save(folder / name)
    (folder / "models").mkdir()
    network = "from torchvision.models.resnet import BasicBlock\n\ndef ResNet18():\n    return BasicBlock(3, 3)\n"
    (folder / "models/resnet.py").write_text(network)
    return folder


@pytest.fixture
def inside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_aten, one_thread) -> Path:
    """A copy of the folder, as the working directory."""
    shutil.copytree(folder, tmp_path / "pages")
    monkeypatch.chdir(tmp_path / "pages")
    use_tiny(monkeypatch)
    return tmp_path / "pages"


def begin(*args: object, **kwargs: object) -> None:
    raise Begins


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow if SLOW.match(line) else ()) for line in shell_lines() if is_run(line)],
)
def test_a_command_runs(line: str, inside: Path, monkeypatch: pytest.MonkeyPatch):
    """Run it, or up to where a training, study, tuning or profile begins; a command of torchrun as one process."""
    monkeypatch.setattr("resnet_fast.cli.run.run_training", begin)
    monkeypatch.setattr("resnet_fast.study.settings.SkipStudy.load", begin)
    monkeypatch.setattr("resnet_fast.cli.tune.choose_device", begin)
    monkeypatch.setattr("resnet_fast.profiling.profile_steps", begin)
    words = shlex.split(line.partition("resnet_fast.cli ")[2] if line.startswith("torchrun") else line)
    words = words[1:] if words[0] == "resnet-fast" else words
    if words[0] == "push":
        hub_mixin = pytest.importorskip("huggingface_hub.hub_mixin")
        api = SimpleNamespace(
            create_repo=lambda **_: SimpleNamespace(repo_id=words[2]), upload_folder=lambda **_: "url"
        )
        monkeypatch.setattr(hub_mixin, "HfApi", lambda token: api)
    if "timm:create_model" in words:
        pytest.importorskip("timm")
    if words[0] == "export":
        pytest.importorskip("onnxscript")
    if words[0] in ("train", "study", "tune", "profile") and "--resume" not in words:
        with pytest.raises(Begins):
            result = invoke(*words)
            raise AssertionError(result.output)
    else:
        result = invoke(*words)
        assert result.exit_code == 0, result.output


def test_the_inference_example_classifies_a_photo(inside: Path):
    names = run_example(DOCS / "inference.md")
    probabilities = names["probabilities"]
    assert probabilities.shape == (len(names["trained"].classes),)
    torch.testing.assert_close(probabilities.sum(), torch.ones(()))
