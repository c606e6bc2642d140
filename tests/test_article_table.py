"""The layer table of the article's network: its 73 rows and its three totals."""

import torch
from torch import nn

from resnet_fast import FusedBatchNorm2d
from resnet_fast.models import article
from resnet_fast.models.summary import Summary, summarize

# The layer, its output for an image of 3x32x32, its parameters. A convolution of k x k has k * k * in * out + out, a
# batch norm 2 * channels, a linear layer in * out + out; a block counts none of its own.
TABLE = [
    ("Conv2d", (64, 14, 14), 9_472),
    ("BatchNorm2d", (64, 14, 14), 128),
    ("ReLU", (64, 14, 14), 0),
    ("MaxPool2d", (64, 7, 7), 0),
    # 64 -> 64, identity
    ("Conv2d", (64, 7, 7), 36_928),
    ("BatchNorm2d", (64, 7, 7), 128),
    ("ReLU", (64, 7, 7), 0),
    ("Conv2d", (64, 7, 7), 36_928),
    ("BatchNorm2d", (64, 7, 7), 128),
    ("Conv2d", (64, 4, 4), 4_160),
    ("ReLU", (64, 4, 4), 0),
    ("ResidualBlock", (64, 4, 4), 0),
    # 64 -> 64, identity
    ("Conv2d", (64, 4, 4), 36_928),
    ("BatchNorm2d", (64, 4, 4), 128),
    ("ReLU", (64, 4, 4), 0),
    ("Conv2d", (64, 4, 4), 36_928),
    ("BatchNorm2d", (64, 4, 4), 128),
    ("Conv2d", (64, 2, 2), 4_160),
    ("ReLU", (64, 2, 2), 0),
    ("ResidualBlock", (64, 2, 2), 0),
    # 64 -> 128, a convolution as the shortcut
    ("Conv2d", (64, 2, 2), 36_928),
    ("BatchNorm2d", (64, 2, 2), 128),
    ("ReLU", (64, 2, 2), 0),
    ("Conv2d", (64, 2, 2), 36_928),
    ("BatchNorm2d", (64, 2, 2), 128),
    ("Conv2d", (64, 2, 2), 4_160),
    ("Conv2d", (128, 1, 1), 8_320),
    ("ReLU", (128, 1, 1), 0),
    ("ResidualBlock", (128, 1, 1), 0),
    # 128 -> 128, identity
    ("Conv2d", (128, 1, 1), 147_584),
    ("BatchNorm2d", (128, 1, 1), 256),
    ("ReLU", (128, 1, 1), 0),
    ("Conv2d", (128, 1, 1), 147_584),
    ("BatchNorm2d", (128, 1, 1), 256),
    ("Conv2d", (128, 1, 1), 16_512),
    ("ReLU", (128, 1, 1), 0),
    ("ResidualBlock", (128, 1, 1), 0),
    # 128 -> 256, a convolution as the shortcut
    ("Conv2d", (128, 1, 1), 147_584),
    ("BatchNorm2d", (128, 1, 1), 256),
    ("ReLU", (128, 1, 1), 0),
    ("Conv2d", (128, 1, 1), 147_584),
    ("BatchNorm2d", (128, 1, 1), 256),
    ("Conv2d", (128, 1, 1), 16_512),
    ("Conv2d", (256, 1, 1), 33_024),
    ("ReLU", (256, 1, 1), 0),
    ("ResidualBlock", (256, 1, 1), 0),
    # 256 -> 256, identity
    ("Conv2d", (256, 1, 1), 590_080),
    ("BatchNorm2d", (256, 1, 1), 512),
    ("ReLU", (256, 1, 1), 0),
    ("Conv2d", (256, 1, 1), 590_080),
    ("BatchNorm2d", (256, 1, 1), 512),
    ("Conv2d", (256, 1, 1), 65_792),
    ("ReLU", (256, 1, 1), 0),
    ("ResidualBlock", (256, 1, 1), 0),
    # 256 -> 512, a convolution as the shortcut
    ("Conv2d", (256, 1, 1), 590_080),
    ("BatchNorm2d", (256, 1, 1), 512),
    ("ReLU", (256, 1, 1), 0),
    ("Conv2d", (256, 1, 1), 590_080),
    ("BatchNorm2d", (256, 1, 1), 512),
    ("Conv2d", (256, 1, 1), 65_792),
    ("Conv2d", (512, 1, 1), 131_584),
    ("ReLU", (512, 1, 1), 0),
    ("ResidualBlock", (512, 1, 1), 0),
    # 512 -> 512, identity
    ("Conv2d", (512, 1, 1), 2_359_808),
    ("BatchNorm2d", (512, 1, 1), 1_024),
    ("ReLU", (512, 1, 1), 0),
    ("Conv2d", (512, 1, 1), 2_359_808),
    ("BatchNorm2d", (512, 1, 1), 1_024),
    ("Conv2d", (512, 1, 1), 262_656),
    ("ReLU", (512, 1, 1), 0),
    ("ResidualBlock", (512, 1, 1), 0),
    ("Flatten", (512,), 0),
    ("Linear", (10,), 5_130),
]


def summary_of_article() -> Summary:
    with torch.device("meta"):
        return summarize(article(norm_layer=nn.BatchNorm2d), 32)


def test_the_layer_table_has_the_articles_73_rows():
    rows = summary_of_article().rows
    assert len(TABLE) == 73
    assert [tuple(row) for row in rows] == TABLE


def test_on_fused_batch_norms_it_is_the_same_table(on_aten):
    fused = [(layer.removeprefix("Fused"), *rest) for layer, *rest in summarize(article(), 32).rows]
    assert fused == TABLE


def test_the_three_totals():
    found, model = summary_of_article(), article()
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 8_522_186
    # Each block's batch norm has two rows, and its parameters count in both.
    twice = sum(2 * block.num_channels for block in model.residual_blocks)
    assert (twice, found.n_repeated) == (2_944, 8)
    assert found.row_total == 8_522_186 + twice == 8_525_130
    # TensorFlow counts a mean and a variance for every channel as parameters that are not trained.
    norms = [module for module in model.modules() if isinstance(module, FusedBatchNorm2d)]
    assert found.running == sum(2 * norm.num_features for norm in norms) == 3_072
    assert found.trainable + found.running == 8_525_258
