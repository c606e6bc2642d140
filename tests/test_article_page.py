"""docs/article.md is true: its example runs, its figures are the network's, and its commands exist."""

import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from pages import DOCS, run_example
from trained_run import invoke

from resnet_fast.models import article
from resnet_fast.training import TrainConfig

pytestmark = pytest.mark.usefixtures("on_aten")

PAGE = (DOCS / "article.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_the_page_says(capsys):
    run_example(DOCS / "article.md")
    [said] = re.findall(r"^prints (.*) and (.*)\.$", PAGE, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == [*said[0].rsplit(", ", 1), said[1]]


def test_its_totals_are_those_of_the_command():
    printed = invoke("summary", "article").stdout
    for total in re.findall(r"\*\*([\d,]+)\*\*", PAGE):
        assert f"{total}  " in printed, total
    for figure in ("73 rows", "2,944", "3,072"):
        assert figure in PAGE


def test_on_a_map_of_one_pixel_only_the_centre_of_a_filter_has_a_gradient():
    torch.manual_seed(0)
    model = article()
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([3, 1, 4, 1])).backward()
    idle = 0
    for i, block in enumerate(model.residual_blocks, 1):
        for conv in (block.conv1, block.conv2):
            gradient = conv.weight.grad.clone()
            gradient[:, :, 1, 1] = 0
            assert (gradient.count_nonzero() == 0) == (i >= 4)
            idle += conv.weight.numel() * 8 // 9 if i >= 4 else 0
    assert f"{idle:,} of the parameters have no effect" in PAGE


@pytest.mark.parametrize("line", re.findall(r"^    resnet-fast (train .*?)(?:  +#.*)?$", PAGE, re.MULTILINE))
def test_its_training_is_the_articles(line: str):
    arguments = shlex.split(line)[1:]
    settings = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
    config = TrainConfig(**settings)
    assert (config.model, config.stem, config.dataset) == ("article", "imagenet", "cifar10")
    assert (config.epochs, config.batch_size, config.optimizer, config.lr) == (50, 32, "adam", 0.001)
    assert (config.schedule, config.normalize, config.crop, config.flip) == ("constant", "half", 0, "none")
