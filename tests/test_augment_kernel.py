"""The augmentation kernel is bit-identical to plain PyTorch, which matches torchvision's transforms within rounding."""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from guard import guarded_memory
from ledger import ledger
from torch import Tensor

from resnet_fast.ops import augment as augment_module
from resnet_fast.ops.augment import augment

# isort: split
import torchvision.transforms.functional as tvf

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {4: torch.int32, 2: torch.int16}
N_IMAGES = 5


class Case(NamedTuple):
    """A size, and what is done; `plan`: rows of index, shift_y, shift_x, mirror, cut_y, cut_x, or None: random ones."""

    height: int
    width: int
    padding: int = 0
    reflect: bool = False
    cutout: int = 0
    plan: list[tuple[int, ...]] | None = None

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (N_IMAGES, self.height, self.width, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        labels = torch.randint(-(2**62), 2**62, (N_IMAGES,), generator=generator)
        if self.plan is None:
            corners = [max(side - self.cutout, 0) + 1 for side in (self.height, self.width)]
            bounds = (N_IMAGES, 2 * self.padding + 1, 2 * self.padding + 1, 2, *corners)
            plan = torch.stack([torch.randint(bound, (7,), generator=generator) for bound in bounds], 1)
        else:
            plan = torch.tensor(self.plan)
        return images.to(device), labels.to(device), plan.int().to(device)

    @property
    def settings(self) -> dict[str, Any]:
        return {"padding": self.padding, "reflect": self.reflect, "cutout": self.cutout}


CORNERS = [
    (i % N_IMAGES, shift_y, shift_x, mirror, 0, 0)
    for i, (shift_y, shift_x, mirror) in enumerate(itertools.product((0, 3, 6), (0, 3, 6), (0, 1)))
]
CASES = {
    "normalized alone": Case(8, 8),
    "every corner": Case(8, 8, padding=3, plan=CORNERS),
    "every corner, reflected": Case(7, 9, padding=3, reflect=True, plan=CORNERS),
    "reflected as far as can be": Case(7, 9, padding=6, reflect=True),
    "shifted out of the image": Case(7, 9, padding=12, plan=[(0, 0, 0, 0, 0, 0), (1, 24, 24, 1, 0, 0)]),
    "odd cutout": Case(7, 9, cutout=3),
    "cutout of the whole image": Case(8, 8, cutout=8),
    "cutout in the last corner": Case(7, 9, cutout=2, plan=[(0, 0, 0, 1, 5, 7)]),
    "an index repeated": Case(7, 9, padding=1, plan=[(3, 0, 1, 0, 0, 0), (3, 2, 1, 1, 0, 0), (3, 0, 1, 0, 0, 0)]),
    "a batch of one": Case(7, 9, padding=1, plan=[(4, 2, 0, 1, 0, 0)]),
    "one pixel": Case(1, 1, padding=1),
    "several blocks and a rest": Case(17, 31, padding=4, reflect=True, cutout=12),
}
by_name = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(backend: str, inputs: tuple[Tensor, Tensor, Tensor], settings: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    with mock.patch.object(augment_module, "choose_backend", lambda x: backend):
        images, labels = augment(*inputs, MEAN, STD, **settings, dtype=dtype)
    return {"images": images, "labels": labels}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, torch.float32, id=name) for name, case in CASES.items()]
    + [pytest.param(CASES["several blocks and a rest"], dtype, id=str(dtype)) for dtype in DTYPES[1:]],
)
def test_the_kernel_has_the_bits_of_plain_pytorch(case: Case, dtype: torch.dtype, device: torch.device):
    inputs = case.inputs(device)
    found, expected = (run(backend, inputs, case.settings, dtype) for backend in ("triton", "aten"))
    bits = BITS[dtype.itemsize]
    assert torch.equal(found["images"].view(bits), expected["images"].view(bits))
    assert torch.equal(found["labels"], expected["labels"])
    for images in (found["images"], expected["images"]):
        assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)


def oracle(case: Case, images: Tensor, plan: Tensor) -> Tensor:
    """torchvision's transforms of one image after the other, in fp64."""
    results = []
    for index, shift_y, shift_x, mirror, cut_y, cut_x in plan.tolist():
        mode = "reflect" if case.reflect else "constant"
        x = tvf.pad(images[index].double() / 255, [case.padding] * 4, padding_mode=mode)
        x = tvf.crop(x, shift_y, shift_x, case.height, case.width)
        x = tvf.normalize(tvf.hflip(x) if mirror else x, list(MEAN), list(STD))
        results.append(tvf.erase(x, cut_y, cut_x, case.cutout, case.cutout, torch.zeros(())) if case.cutout else x)
    return torch.stack(results)


@by_name
def test_plain_pytorch_is_torchvisions_within_a_rounding(case: Case, device: torch.device):
    inputs = case.inputs(device)
    exact = oracle(case, inputs[0].cpu(), inputs[2])
    for dtype in DTYPES:
        found = run("aten", inputs, case.settings, dtype)["images"].cpu()
        # 255·mean, the difference, 1/(255·std) and the product are rounded in fp32, each by 2^-24 of 1/std at the most.
        allowed = 4 * 2.0**-24 / min(STD) + exact.abs() * torch.finfo(dtype).eps / 2
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [CASES["shifted out of the image"], CASES["several blocks and a rest"]])
def test_all_of_the_outputs_is_written_and_nothing_else(case: Case, device: torch.device):
    inputs = case.inputs(device)
    function = functools.partial(run, "triton", inputs, case.settings, torch.bfloat16)
    with ledger() if triton.knobs.runtime.interpret else contextlib.nullcontext(), guarded_memory() as kernels:
        found = function()
    assert kernels == {"augment_kernel"}
    expected = function()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not found["images"].isnan().any()


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_images_beyond_2_gib_are_read_where_they_are(backend: str, tmp_path: Path):
    """From a file of which only the last image is on the disk."""
    n_images = 2**31 // (3 * 32 * 32) + 3
    path = tmp_path / "images"
    with open(path, "wb") as file:
        file.truncate(3 * 32 * 32 * n_images)
    flat = torch.from_file(str(path), shared=True, size=3 * 32 * 32 * n_images, dtype=torch.uint8)
    images = flat.view(n_images, 32, 32, 3).permute(0, 3, 1, 2)
    images[-1] = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(n_images)
    plan = torch.tensor([(n_images - 1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)], dtype=torch.int32)
    found = run(backend, (images, labels, plan), {}, torch.float32)
    shift, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    expected = torch.stack([(images[i] / 255 - shift) / std for i in (-1, 0)])
    torch.testing.assert_close(found["images"], expected, rtol=1e-5, atol=1e-5)  # 1/2 of a grey level is 8e-3
    assert found["labels"].tolist() == [n_images - 1, 0]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """A process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("compile_augment.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_it_compiles_without_stack(compiled: dict[str, dict]):
    assert [name for name, code in compiled.items() if code["stack"]] == []


@pytest.mark.slow
def test_offsets_to_pixels_are_64_bits_wide(compiled: dict[str, dict]):
    """Of the images and of the batch, each a pointer to which the pixel is added and then the channel, 0 to 3."""
    for name, code in compiled.items():
        assert code["offsets"] == ["i64", "i32"] * 2, name


GOOD = Case(8, 8).inputs(torch.device("cpu"))


@pytest.mark.parametrize(
    ("images", "plan", "settings", "message"),
    [
        pytest.param(GOOD[0].float(), None, {}, r"uint8, got \[5, 3, 8, 8\], torch.float32", id="float images"),
        pytest.param(GOOD[0][:, :1], None, {}, r"\[N, 3, H, W\].*got \[5, 1, 8, 8\]", id="grey"),
        pytest.param(GOOD[0][0], None, {}, r"\[N, 3, H, W\].*got \[3, 8, 8\]", id="one image"),
        pytest.param(GOOD[0].contiguous(), None, {}, r"channels_last, got strides \(192, 64, 8, 1\)", id="NCHW"),
        pytest.param(None, GOOD[2].long(), {}, r"int32, got \[7, 6\], torch.int64", id="long plan"),
        pytest.param(None, GOOD[2][:, :5], {}, r"plan must be \[B, 6\].*got \[7, 5\]", id="narrow plan"),
        pytest.param(None, GOOD[2][0], {}, r"plan must be \[B, 6\].*got \[6\]", id="one row"),
        pytest.param(None, None, {"padding": 8, "reflect": True}, "below 8 with reflect, got 8", id="padding"),
    ],
)
def test_wrong_arguments_are_named(images: Tensor | None, plan: Tensor | None, settings: dict, message: str):
    images = GOOD[0] if images is None else images
    plan = GOOD[2] if plan is None else plan
    with pytest.raises(ValueError, match=message):
        augment(images, GOOD[1], plan, MEAN, STD, **settings)


def test_an_empty_plan_is_an_empty_batch(device: torch.device):
    images, labels, plan = Case(8, 8).inputs(device)
    for backend in ("triton", "aten"):
        found = run(backend, (images, labels, plan[:0]), {}, torch.float32)
        assert (found["images"].shape, found["labels"].shape) == ((0, 3, 8, 8), (0,))
