#!/usr/bin/env python3
"""Execute the notebooks anew and store them with their outputs, or say what is wrong with those that are stored.

    python scripts/run_notebooks.py                                     # all of notebooks/
    python scripts/run_notebooks.py notebooks/attention.ipynb
    python scripts/run_notebooks.py --check                             # executes and writes nothing

They use the checkpoints in outputs/ (``python main.py --model tiny_detr``, ``make demo``) and train those that are not
there. A notebook with an error or another fault is not stored. Two environment variables are for tests:
``DETR_NOTEBOOK_FOLDER``, in which outputs/ and data/ are looked for and made, and ``DETR_NOTEBOOK_FLAGS``, further flags
of main.py for every training. Needs ``pip install -e '.[dev]'``.
"""
from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1_500_000                             # bytes of a stored notebook
PLACES = re.compile(r"(?<![\w./:~-])/(?:home|root|tmp|work|mnt|opt|usr|var|srv|data|private|Users|Volumes|content)/"
                    r"|\b[A-Za-z]:\\\\?\w")     # where files lie on somebody's machine
ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


def execute(path: Path, environment: Mapping[str, str] | None = None, timeout: int = 3600) -> Any:
    """The notebook at ``path``, executed from its first cell to its last by a kernel of this Python, as Jupyter would in
    its folder. ``environment``: variables besides those of this process; ``timeout``: seconds for each cell. Raises
    ImportError where a package is missing, and nbclient's CellExecutionError, which shows the cell, where one fails."""
    try:
        import ipykernel  # noqa: F401, the kernel
        import nbformat
        from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
        from nbclient import NotebookClient
        from traitlets.config import Config
    except ImportError as error:
        raise ImportError(f"{error}; pip install -e '.[dev]' has what notebooks need") from error
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:               # for what a kernel would leave in the user's
        config = Config({"KernelManager": {"connection_file": f"{folder}/kernel.json"}})
        if os.name == "posix":
            config.KernelManager.transport = "ipc"              # no ports, which others on the machine could connect to
        client = NotebookClient(notebook, timeout=timeout, kernel_name=NATIVE_KERNEL_NAME, record_timing=False,
                                coalesce_streams=True, config=config,
                                resources={"metadata": {"path": str(path.resolve().parent)}})
        client.execute(env={**os.environ, "IPYTHONDIR": folder, **(environment or {})})
    return tidy(notebook)


def tidy(notebook: Any) -> Any:
    """Without what would differ each time or is there twice, addresses of objects, jpegs beside pngs, versions; and with
    pictures in 256 colours."""
    notebook.metadata["language_info"] = {"name": "python"}
    for output in outputs_of(notebook):
        data = output.get("data", {})
        if "image/png" in data:
            data.pop("image/jpeg", None)
            data["image/png"] = in_few_colours(data["image/png"])
        if isinstance(data.get("text/plain"), str):
            data["text/plain"] = ADDRESS.sub("", data["text/plain"])
    return notebook


def in_few_colours(png: str) -> str:
    """A picture in base64, in the 256 colours that suit it best: a third of the bytes, and the eye sees no difference in
    drawings such as these. One that has so few is left as it is."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P":
        return png
    out = io.BytesIO()
    picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "PNG",
                                                                                                 optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def faults(notebook: Any, largest: int | None = LARGEST) -> list[str]:
    """What keeps a notebook from being stored: cells without their outputs or not in order, errors, warnings, paths of
    somebody's machine, no pictures, more than ``largest`` bytes."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"code cells were executed in the order {counts}, not each once from first to last")
    for number, cell in enumerate(code, start=1):
        for output in cell.outputs:
            text = text_of(output)
            if output.output_type == "error":
                found.append(f"code cell {number}: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"code cell {number} wrote to stderr: {text.strip().splitlines()[-1]}")
            found += [f"code cell {number} prints a place of the machine it ran on: {line.strip()}"
                      for line in text.splitlines() if PLACES.search(line)]
    if not any("image/png" in output.get("data", {}) for output in outputs_of(notebook)):
        found.append("there is no picture in it")
    if largest is not None and len(written(notebook)) > largest:
        sizes = [sum(len(str(output.get("data", ""))) for output in cell.outputs) for cell in code]
        found.append(f"it has {len(written(notebook)):,} bytes, and {largest:,} are the most; code cell "
                     f"{sizes.index(max(sizes)) + 1} shows {max(sizes):,} of them")
    return found


def outputs_of(notebook: Any) -> list[Any]:
    """All outputs of all cells."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(output: Any) -> str:
    """What there is to read in an output."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *output.get("traceback", []),
                      *(value for kind, value in data.items() if kind.startswith("text/") and isinstance(value, str))])


def written(notebook: Any) -> bytes:
    """The file's content."""
    import nbformat

    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="FILE", help="by default all of notebooks/")
    parser.add_argument("--check", action="store_true", help="only say what is wrong with the stored ones")
    parser.add_argument("--timeout", type=int, default=3600, metavar="SECONDS", help="of a cell (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Returns what to exit with: 1 where a notebook has faults. Raises OSError, ValueError, ImportError and nbclient's
    errors."""
    paths = args.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    faulty = False
    for path in paths:
        if args.check:
            import nbformat

            notebook = nbformat.read(path, as_version=4)
        else:
            print(f"{path}: executing", flush=True)
            notebook = execute(path, timeout=args.timeout)
        wrong = faults(notebook)
        faulty |= bool(wrong)
        if not args.check and not wrong:
            path.write_bytes(written(notebook))
        print(f"{path}: " + ("not right" + "".join(f"\n  {line}" for line in wrong) if wrong else
                             "right" if args.check else f"stored, {path.stat().st_size:,} bytes"), flush=True)
    return int(faulty)


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
