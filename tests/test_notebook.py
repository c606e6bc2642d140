"""examples/cifar10.ipynb is stored without outputs, and runs from the first cell to the last, here on digits."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/cifar10.ipynb"

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def test_no_outputs_are_stored():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id
        assert len(cell.source.splitlines()) <= 30, cell.id


@pytest.mark.slow
def test_it_runs_to_the_end(tmp_path: Path):
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # As it is for a reader: without interpreted kernels, and the package installed already.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # One thread: beside other tests, threads wait for each other longer than they compute.
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)
    printed = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert printed["install"] == "" and printed["setup"].endswith("on cpu, data set digits\n")
    assert float(re.search(r"^([\d.]+)% after the last epoch", printed["train"], re.M)[1]) > 90  # by chance: 10
    assert re.search(r"largest difference of a loss: (\S+)", printed["compare"])[1] == "0.0e+00"
    difference, largest = map(float, re.search(r"logit: (\S+), of logits up to (\S+)", printed["convert"]).groups())
    assert difference < 1e-5 * largest + 1e-5 and "converted 36 " in printed["convert"]
