"""The notebook: it runs, with a tiny model, and the outputs that it is shown with are those of one clean run."""

import base64
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import tiny
from nbformat import NotebookNode


FOLDER = Path(__file__).parents[2] / "recipes"
NOTEBOOK = FOLDER / "quickstart.ipynb"
# A path of Unix (not the end of an HTML tag, nor a part of a URL), of Windows, or in a home folder.
LOCAL_PATH = re.compile(r"(?<![\w<:/.~…])/(?:[\w.+-]+/)+[\w.+-]+|\b[A-Z]:\\\w|~/|file://")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def displayed(cell: NotebookNode) -> list[list[str]]:
    """The mime types of what a cell displays: not its streams, in which the environment of the tests has warnings."""
    return [sorted(output["data"]) for output in cell.outputs if output.output_type != "stream"]


@pytest.fixture(scope="module")
def kept() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("saved in /home/me/run", True),
        ("'/tmp/x.json'", True),
        (r"C:\Users\me", True),
        ("~/models", True),
        ("<td>a</td>\n</tr>", False),
        ("https://huggingface.co/papers/2505.18877", False),
        ("recipes/data/tool_calls", False),
        ("reflora/cond_P", False),
    ],
)
def test_local_paths_are_recognized(text, local):
    assert bool(LOCAL_PATH.search(text)) == local


def test_the_outputs_are_those_of_one_run(kept):
    """All cells ran, in their order and once, without an error or a warning."""
    nbformat.validate(kept)
    assert [cell.execution_count for cell in code_cells(kept)] == list(range(1, len(code_cells(kept)) + 1))
    outputs = [output for cell in code_cells(kept) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert "widgets" not in kept.metadata  # progress bars


def test_the_outputs_are_small_and_tell_nothing_of_the_machine(kept):
    for cell in code_cells(kept):
        for output in cell.outputs:
            data = output.get("data", {})
            assert len(base64.b64decode(data.get("image/png", ""))) < 100_000
            text = json.dumps({**output, "data": {**data, "image/png": None}}, ensure_ascii=False)
            assert len(text) < 10_000
            assert LOCAL_PATH.search(text) is None, text
            assert "\\r" not in text  # a progress bar


@pytest.mark.slow
def test_it_runs(kept, tmp_path, monkeypatch):
    """With other parameters, and each cell displays what it is shown with."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tiny.save(tmp_path / "model", max_position_embeddings=1024)
    parameters = {"model_name": str(tmp_path / "model"), "output_dir": str(tmp_path / "adapter")}
    parameters |= {"max_steps": 2, "test_rows": 6, "max_length": 1024}
    ran = papermill.execute_notebook(
        NOTEBOOK, tmp_path / "ran.ipynb", parameters, cwd=FOLDER, progress_bar=False, kernel_name="python3"
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    record = json.loads((tmp_path / "adapter" / "run_record.json").read_text(encoding="utf-8"))
    assert record["method"] == "reflora"
    assert record["scores"]["rows"] == len(record["examples"]) + 1 == 6
    cells = [cell for cell in code_cells(ran) if "injected-parameters" not in cell.metadata.tags]
    for cell, cell_kept in zip(cells, code_cells(kept), strict=True):
        assert displayed(cell) == displayed(cell_kept), cell.source
