"""Run the tests on the GPU with compiled kernels if there is one, else on the CPU with interpreted kernels."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported
    import interpreter

    interpreter.mend()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

else:
    torch.backends.cudnn.allow_tf32 = False  # fp32 tolerances allow only fp32's roundings

# After the interpreter is chosen, before any test imports torchvision.
from resnet_fast import functional  # noqa: E402

# Interpreted kernels need no deadline, and the phase "explain" would trace each of their lines. -m gpu selects the
# profile "gpu", so that few kernels are compiled; --hypothesis-profile=long selects "long".
PROFILE = {"deadline": None, "print_blob": True, "phases": tuple(phase for phase in Phase if phase != Phase.explain)}
settings.register_profile("default", max_examples=20, derandomize=True, **PROFILE)
settings.register_profile("gpu", max_examples=5, derandomize=True, **PROFILE)
settings.register_profile("long", max_examples=20_000, derandomize=False, **PROFILE)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not config.getoption("--hypothesis-profile"):
        settings.load_profile("gpu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` ignore files without such tests: they take time, and packages that a GPU's machine may lack."""
    is_file = collection_path.suffix == ".py" and config.option.markexpr == "gpu"
    return True if is_file and "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_aten(monkeypatch) -> None:
    """Make modules run ATen's operators, because interpreted kernels take minutes for a whole network."""
    monkeypatch.setattr(functional, "choose_backend", lambda x, requested=None: "aten")
    monkeypatch.setattr(functional, "_calls", {})


@pytest.fixture(params=("triton", "aten"))
def either_backend(request) -> str:
    """Run a test of modules, which do not choose a backend, on both backends."""
    if request.param == "aten":
        request.getfixturevalue("on_aten")
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread.

    A convolution's roundings depend on the number of threads, and with them the side of ReLU's kink on which a value
    lies. With tiny tensors threads also wait for each other longer than they compute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """Fill torch.empty with NaN (bytes: 255), so that an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
