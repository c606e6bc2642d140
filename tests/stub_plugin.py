"""A pytest plugin, `-p stub_plugin`: tests launch on the stub driver, and the kernels that they load are counted.

Nothing is computed, so that assertions have to be left out: python -O, --assert=plain.
"""

from typing import Any

import pytest
import torch

from benchmarks import stub_driver

stub_driver.put_in_place()

from triton.runtime import driver  # noqa: E402

UTILS: Any = driver.active.utils
LOAD, LOADED = UTILS.load_binary, []


def load_binary(name: str, *others: Any) -> Any:
    LOADED.append(name)
    return LOAD(name, *others)


UTILS.load_binary = load_binary
torch.testing.assert_close = lambda *tensors, **tolerances: None  # type: ignore[assignment]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"kernels loaded: {len(LOADED)}")
