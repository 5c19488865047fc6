"""The tour runs from its first cell to its last, from any folder, and is committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent.parent
TOUR = ROOT / "experiments" / "notebooks" / "00_tour.ipynb"


def executed(cells, folder, tmp_path):
    """The cells of the tour after they ran in a fresh kernel in `folder`."""
    notebook = nbformat.read(TOUR, as_version=4)
    notebook.cells = notebook.cells[:cells]
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    # As a person's: one device, figures in the page; what the tour writes goes where pytest clears it away.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "MPLBACKEND")}
    client.execute(env=environment | {"TMPDIR": str(tmp_path), "WANDB_MODE": "disabled"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_the_tour_runs(tmp_path):
    cells = executed(None, TOUR.parent, tmp_path)
    shown = [set(output.data) for cell in cells for output in cell.outputs if "data" in output]
    assert sum("image/png" in kinds for kinds in shown) >= 5 and sum("text/html" in kinds for kinds in shown) >= 2
    said = "".join(map(printed, cells))
    for words in ("kept,", "dropped:", "tokens/s", "pairs ranked right", "bits per byte", "int4:", "answer:", "agent:"):
        assert words in said, words
    assert (folders := list(tmp_path.glob("internjax_tour_*"))) and (folders[0] / "export" / "internjax.json").is_file()


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests" / "golden"], ids=["checkout", "elsewhere in it"])
def test_it_finds_the_checkout(folder, tmp_path):
    *_, last = executed(3, folder, tmp_path)
    assert f"everything is written below {tmp_path}" in printed(last)


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 12 and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert len([cell for cell in notebook.cells if cell.cell_type == "markdown"]) >= 12
    assert notebook.metadata.kernelspec.name == "python3"
