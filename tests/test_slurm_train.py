"""The job script: its command line, and what it does when the job's time is over; with stand-ins for Slurm's programs."""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import main

SCRIPT = Path(main.__file__).parent / "scripts" / "slurm_train.sh"
# Runs until it is told to leave, and leaves as a training that has saved does.
# On SIGTERM srun kills its tasks, as Slurm's does; what scancel sends goes to the tasks.
SRUN = """#!/bin/bash
trap 'echo killed its tasks; exit 137' TERM
trap 'echo asked to leave; exit 143' USR2
echo $$ > "$TOLD.srun"
echo started
while true; do sleep 0.05; done
"""
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=TERM 40007" ]] && kill -USR2 "$(cat "$TOLD.srun")"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo first; echo second; else echo "$@" >> "$TOLD"; fi
"""
SMALL = ("--model tiny_detr --hidden_dim 32 --nheads 2 --dim_feedforward 32 --dec_layers 1 --num_queries 10 "
         "--image_size 64 --num_workers 0 --device cpu --amp off --print_every 0 --epochs 2 --eval_every 2").split()


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a job of two nodes of four GPUs."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {**without_slurm(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told"),
            "SLURM_JOB_ID": "40007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes", "SLURM_GPUS_ON_NODE": "4"}


def without_slurm() -> dict[str, str]:
    ours = ("PYTHON", "PROCESSES", "PORT", "RESTARTS", "GRACE", "DRY_RUN")
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name not in ours}


def said(environment: dict[str, str], *flags: str) -> tuple[int, str]:
    done = subprocess.run(["bash", SCRIPT, *flags], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_command_line(slurm, tmp_path):
    """As torchrun and main.py read it."""
    code, line = said(slurm | {"DRY_RUN": "1"}, "--output_dir", str(tmp_path / "a folder"), "--fsdp")
    words = shlex.split(line)
    assert code == 0 and words[:4] == ["srun", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert words[4:7] == ["python", "-m", "torch.distributed.run"]
    torchrun = get_args_parser().parse_args(words[7:])
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.max_restarts) == ("2", "4", 3)
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("c10d", "first:20007", "40007")
    assert Path(torchrun.training_script) == Path(main.__file__)
    args = main.get_args_parser().parse_args(torchrun.training_script_args)
    assert (args.resume, args.output_dir, args.fsdp) == ("auto", str(tmp_path / "a folder"), True)


def test_on_this_machine_alone():
    code, line = said(without_slurm() | {"DRY_RUN": "1", "PROCESSES": "2"}, "--output_dir=x")
    torchrun = get_args_parser().parse_args(shlex.split(line)[3:])
    assert code == 0 and torchrun.standalone and (torchrun.nnodes, torchrun.nproc_per_node) == ("1", "2")


@pytest.mark.parametrize("environment, flags, message", [
    ({"PROCESSES": "2"}, ["--epochs", "3"], "--output_dir"),
    ({"PROCESSES": "0"}, ["--output_dir", "x"], "PROCESSES=N"),
    ({"PROCESSES": "2", "SLURM_SUBMIT_DIR": "/nowhere"}, ["--output_dir", "x"], "/nowhere/main.py")])
def test_what_is_missing_is_named(environment, flags, message):
    code, text = said(without_slurm() | environment, *flags)
    assert code == 2 and message in text


@pytest.mark.parametrize("name, told", [("SIGUSR1", "requeue 40007\n"), ("SIGTERM", None)])
def test_the_end_of_the_time(slurm, name, told):
    """The job saves, and is queued again where Slurm does not do that itself."""
    job = subprocess.Popen(["bash", SCRIPT, "--output_dir", "x"], env=slurm, stdout=subprocess.PIPE, text=True)
    lines = [job.stdout.readline(), job.stdout.readline()]
    assert lines[1] == "started\n", lines
    job.send_signal(getattr(signal, name))
    rest = job.communicate(timeout=30)[0]
    assert "asked to leave" in rest and job.returncode == 143
    file = Path(slurm["TOLD"])
    assert (file.read_text() if file.exists() else None) == told


@pytest.mark.slow
def test_two_processes_save_and_go_on(tmp_path):
    environment = without_slurm() | {"PROCESSES": "2", "PYTHON": sys.executable, "GRACE": "60"}
    command = ["bash", str(SCRIPT), *SMALL, "--output_dir", str(tmp_path / "out")]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in job.stdout:
            if line.startswith("epoch 0 "):
                break
        job.send_signal(signal.SIGUSR1)
        text = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode != 0 and (tmp_path / "out" / "checkpoint.pth").exists(), text
    assert "saved at epoch" in text
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout and (tmp_path / "out" / "final.pth").exists()
