"""The notebooks: what is stored is whole and tells nothing of the machine it ran on, and their code runs from nothing.

The quick run trains for one epoch on a few images; ``-m slow`` runs them as their readers do who have no weights yet."""
import base64
import copy
import importlib.util
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.synthetic import make_synthetic

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import run_notebooks  # noqa: E402

for package in ("nbformat", "nbclient", "ipykernel"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"notebooks need {package}: pip install -e '.[dev]'", allow_module_level=True)

import nbformat  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"attention": 10, "fine_tune": 2}                    # at least
QUICK = "--epochs 1 --image_size 64x64 --num_workers 0"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in run_notebooks.outputs_of(notebook))


def source(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells)


def test_all_are_here():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


# What is stored.

@each
def test_what_is_stored_is_whole(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert run_notebooks.faults(notebook) == []
    assert pictures(notebook) >= PICTURES[path.stem]
    assert path.read_bytes() == run_notebooks.written(run_notebooks.tidy(copy.deepcopy(notebook)))
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@each
def test_what_they_link_to_is_there(path):
    for link in re.findall(r"\]\(([^)#]+)", source(path)):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    for file in re.findall(r"(?:scripts|docs|detr|notebooks)/\w+\.(?:py|md|ipynb)", source(path)):
        assert (ROOT / file).exists(), file


def spoilt(change):
    """The faults of a small notebook that had none, after ``change``."""
    code, output = nbformat.v4.new_code_cell, nbformat.v4.new_output
    notebook = nbformat.v4.new_notebook(cells=[
        code("1", execution_count=1, outputs=[output("display_data", {"image/png": "iVBORw0KGgo="})]),
        code("2", execution_count=2, outputs=[output("stream", text="weights: outputs/tiny_detr, and/or others\n")])])
    assert run_notebooks.faults(notebook) == []
    change(notebook.cells)
    return run_notebooks.faults(notebook)


@pytest.mark.parametrize("said", ["/home/ann/x", "saved: /tmp/tmpab12/x", "File /usr/lib/x.py", r"C:\Users\ann"])
def test_places_of_a_machine_are_found(said):
    fault, = spoilt(lambda cells: cells[1].outputs[0].update(text=f"all\n{said}\n"))
    assert said in fault and "code cell 2" in fault
    fault, = spoilt(lambda cells: cells[1].outputs.append(
        nbformat.v4.new_output("execute_result", {"text/plain": said}, execution_count=2)))
    assert said in fault


def test_other_faults_are_found():
    def error(cells):
        cells[1].outputs.append(nbformat.v4.new_output("error", ename="KeyError", evalue="'x'", traceback=[]))

    assert "KeyError" in spoilt(error)[0]
    assert "[1, None]" in spoilt(lambda cells: cells[1].update(execution_count=None))[0]
    assert "[2, 1]" in spoilt(lambda cells: cells.reverse())[0]
    assert "stderr" in spoilt(lambda cells: cells[1].outputs[0].update(name="stderr"))[0]
    assert "no picture" in spoilt(lambda cells: cells[0].outputs.clear())[0]
    assert "bytes" in spoilt(lambda cells: cells[0].update(source="#" * run_notebooks.LARGEST))[0]


def test_tidy_leaves_nothing_that_changes_each_time():
    rng = np.random.RandomState(0)
    noise = Image.fromarray(rng.randint(0, 255, (40, 40, 3), dtype=np.uint8))
    noise.save(file := io.BytesIO(), "PNG")
    png = base64.b64encode(file.getvalue()).decode()
    notebook = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python", "version": "3.10.1"}}, cells=[
        nbformat.v4.new_code_cell("image", execution_count=1, outputs=[nbformat.v4.new_output(
            "execute_result", {"image/png": png, "image/jpeg": "b", "text/plain": "<Image size=2x2 at 0x7F2A00bc>"},
            execution_count=1)])])
    tidy = run_notebooks.tidy(notebook).cells[0].outputs[0].data
    assert set(tidy) == {"image/png", "text/plain"} and tidy["text/plain"] == "<Image size=2x2>"
    fewer = tidy["image/png"]
    stored = Image.open(io.BytesIO(base64.b64decode(fewer)))
    assert stored.mode == "P" and len(stored.getcolors()) <= 256
    apart = np.abs(np.asarray(stored.convert("RGB"), dtype=int) - np.asarray(noise))
    assert 0 < apart.mean() < 20                                        # noise is the worst; drawings have few colours
    assert run_notebooks.tidy(notebook).cells[0].outputs[0].data["image/png"] == fewer
    assert notebook.metadata["language_info"] == {"name": "python"}


# Run.

@each
def test_from_nothing_in_a_hurry(path, tmp_path):
    """Weights are trained, for an epoch on a few small images; every line of every cell runs."""
    make_synthetic(tmp_path / "data" / "synthetic", train=16, val=8)        # with the image that is looked at
    folder = {"DETR_NOTEBOOK_FOLDER": str(tmp_path), "DETR_NOTEBOOK_FLAGS": QUICK, "OMP_NUM_THREADS": "1"}
    before = path.read_bytes()
    notebook = run_notebooks.execute(path, folder, timeout=300)
    assert run_notebooks.faults(notebook, largest=None) == []           # maps of random weights are noise: large pictures
    assert pictures(notebook) == pictures(read(path))
    assert path.read_bytes() == before and not (path.parent / "outputs").exists()
    assert list((tmp_path / "outputs").glob("tiny_*/checkpoint.pth"))


@pytest.mark.slow
@each
def test_from_nothing(path, tmp_path):
    """As for somebody who has just cloned: the data are made, the models trained."""
    notebook = run_notebooks.execute(path, {"DETR_NOTEBOOK_FOLDER": str(tmp_path), "DETR_NOTEBOOK_FLAGS": ""})
    assert run_notebooks.faults(notebook, largest=None) == []
    assert pictures(notebook) == pictures(read(path))


def test_a_cell_that_fails_is_an_error(tmp_path):
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "fails.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run_notebooks.execute(path)


def test_command_line(tmp_path, capsys):
    """Stores what runs, and leaves what has faults as it was."""
    def run(code: str, *flags: str) -> tuple[int, str]:
        path = tmp_path / "one.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
        before = path.read_bytes()
        returned = run_notebooks.main(run_notebooks.get_args_parser().parse_args([str(path), *flags]))
        assert (path.read_bytes() == before) == (returned == 1)
        return returned, capsys.readouterr().out

    drawing = "from PIL import Image\nImage.new('RGB', (4, 4))"
    assert run(drawing)[0] == 0
    assert run_notebooks.main(run_notebooks.get_args_parser().parse_args([str(tmp_path / "one.ipynb"), "--check"])) == 0
    returned, said = run("print('no picture')")
    assert returned == 1 and "there is no picture in it" in said
    returned, said = run(drawing, "--check")
    assert returned == 1 and "[None]" in said
