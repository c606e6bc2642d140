"""`resnet-fast summary` prints a network's layer table in 80 columns, and totals that say what they count."""

import re

import pytest
import torch
from torch import nn
from trained_run import assert_is_plain, invoke

from resnet_fast import resnet18
from resnet_fast.models.summary import summarize


def table_of(output: str) -> list[list[str]]:
    """Layer with its number, shape and parameters of every row."""
    rows = [re.split(r"  +", line) for line in output.splitlines()]
    return [row for row in rows if len(row) == 3 and re.fullmatch(r"\w+-\d+", row[0])]


def test_the_article_has_73_rows_and_three_totals():
    result = invoke("summary", "article")
    assert result.exit_code == 0 and result.stdout.startswith(
        "article (article), imagenet stem, images of 3x32x32, 10 "
    )
    assert_is_plain(result)
    rows = table_of(result.stdout)
    assert [int(row[0].split("-")[1]) for row in rows] == list(range(1, 74))
    assert rows[0] == ["Conv2d-1", "64 x 14 x 14", "9,472"] and rows[-1] == ["Linear-73", "10", "5,130"]
    text = " ".join(result.stdout.split())
    assert "8,522,186 trainable parameters" in text
    assert "8,525,130 all rows added up: 8 modules run in several places and count in each, which is 2,944 more" in text
    assert "8,525,258 trainable parameters and the 3,072 running statistics, a mean and a variance for each" in text
    assert sum(int(row[2].replace(",", "")) for row in rows) == 8_525_130


def test_where_no_module_runs_twice_the_rows_have_no_total_of_their_own():
    result = invoke("summary", "--image-size", 64, "--num-classes", 7, "--stem", "imagenet")
    assert result.stdout.startswith("resnet18 (torchvision), imagenet stem, images of 3x64x64, 7 classes\n")
    assert "rows added up" not in result.stdout
    parameters = sum(parameter.numel() for parameter in resnet18(num_classes=7).parameters())
    assert f"{parameters:,}  trainable parameters\n" in result.stdout
    assert table_of(result.stdout)[0] == ["Conv2d-1", "64 x 32 x 32", "9,408"]


@pytest.mark.parametrize("name", ["resnet152", "plain20"])
def test_every_network_fits_80_columns(name: str):
    result = invoke("summary", name, "--num-classes", 100000)
    assert result.exit_code == 0
    assert_is_plain(result)
    total = sum(int(row[2].replace(",", "")) for row in table_of(result.stdout))
    assert f"{total:,}  " in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["artcle"], "model must be one of resnet18, .*, got 'artcle'; did you mean article?"),
        (["article", "--stem", "cifar"], "stem must be imagenet for article, which has no other, got 'cifar'"),
        (["article", "--image-size", "3"], "article does not support images of 3x3 pixels: "),
        (["--image-size", "0"], "--image-size"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused(args: list[str], message: str):
    result = invoke("summary", *args)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert re.search(message.replace("?", r"\?"), result.stderr)


def test_a_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [tuple(row) for row in summarize(model, 4).rows] == [
        ("Conv2d", (2, 4, 4), 8),
        ("BatchNorm2d", (2, 4, 4), 4),
        ("Dropout", (2, 4, 4), 0),
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False]
    assert not any(module._forward_hooks for module in model.modules())


def test_parameters_that_are_frozen_are_not_trainable():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 5, 1))
    model[0].requires_grad_(False)
    assert summarize(model, 4).trainable == 15
