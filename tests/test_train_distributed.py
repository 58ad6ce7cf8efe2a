"""Training and evaluation on two processes that ``torchrun`` starts, over Gloo on the CPU."""
import io
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import make_rectangles

import main
from datasets.sampler import RandomBatches
from datasets.synthetic import make_panoptic, make_synthetic

MAIN = Path(main.__file__)
SMALL = ("--model tiny_detr --hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
         "--num_queries 10 --image_size 64 --num_workers 0 --device cpu --amp off --print_every 1000 ").split()
MASKS = ("--model tiny_deformable_detr --num_queries 12 --dec_layers 1 --dim_feedforward 32 --epochs 1 --image_size 64 "
         "--max_size 100 --masks --dataset_file coco_panoptic --panoptic_threshold 0 --batch_size 1 --ema_decay 0 "
         "--num_workers 0 --device cpu --amp off --print_every 1000").split()
VOID = (2, 4, 6, 8)                                                 # of 12 images: each process, and both, meet one
# main.py, which writes down what each process holds in the end.
WATCHED = """
import torch
import main
from detr import distributed

fit = main.fit

def watched(settings, training, model, *rest):
    results = fit(settings, training, model, *rest)
    torch.save(model.state_dict(), f"{settings.run.output_dir}/rank{distributed.rank()}.pth")
    return results

main.fit = watched
main.main(main.get_args_parser().parse_args())
"""

# The same, and then an evaluation on two processes, whose results each of them writes down.
WATCHED_AND_SCORED = WATCHED + f"""
import json
import os
import sys
from pathlib import Path

sys.path.append({str(Path(__file__).parent)!r})
from test_train_distributed import scoring, take_for_truth

args = main.get_args_parser().parse_args()
out = Path(args.output_dir)
if os.environ["RANK"] == "0":                                           # the other waits where they meet
    take_for_truth(out, Path(args.coco_path))
flags = scoring(out, Path(args.coco_path), out / "together") + ["--dist_url", f"file://{{out}}/meeting"]
results = main.main(main.get_args_parser().parse_args(flags))
(out / f"scores{{os.environ['RANK']}}.json").write_text(json.dumps(results))
"""


def torchrun(program: Path, *flags: str | Path, processes: int = 2,
             restarts: int = 0) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(MAIN.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         f"--max-restarts={restarts}", str(program),
         *map(str, flags)], env=environment, capture_output=True, text=True, timeout=300)


def alone(*flags: str | Path) -> dict:
    """In this process, with as many threads as torchrun's have: another number adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with redirect_stdout(io.StringIO()):
            return main.main(main.get_args_parser().parse_args(list(map(str, flags))))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of an odd number of validation images, and a training on two processes."""
    folder = tmp_path_factory.mktemp("two")
    make_rectangles(folder / "data")
    (folder / "watched.py").write_text(WATCHED)
    done = torchrun(folder / "watched.py", *SMALL, "--coco_path", folder / "data", "--output_dir", folder / "out",
                    "--batch_size", 2, "--epochs", 10, "--eval_every", 10, "--lr", 1e-3, "--lr_backbone", 1e-3,
                    "--warmup_steps", 0, "--ema_decay", 0)
    (folder / "stdout.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_training_is_told_and_logged_once(folder):
    text = (folder / "stdout.txt").read_text()
    for words in ("images per process x processes x accumulation = 2 x 2 x 1 = 4", "epochs 0 to 9 of 4 steps",
                  "16 images (3 without objects, kept)", "epoch 9 4/4", "Average Precision  (AP) @[ IoU=0.50:0.95 | "
                  "area=   all", "trained for"):
        assert text.count(words) == 1, words
    rows = [json.loads(line) for line in (folder / "out" / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(10))
    assert all(math.isfinite(row["train_loss"]) and math.isfinite(row["train_grad_norm"]) for row in rows)
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"]


def test_both_processes_have_the_same_weights(folder):
    first, second = (torch.load(folder / "out" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    written = torch.load(folder / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert first.keys() == second.keys() == written.keys()
    for name, value in written.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value), name


def test_evaluation_gives_the_numbers_of_one_process(folder):
    """Image by image, so that not even rounding differs."""
    flags = ["--eval", "--resume", folder / "out" / "checkpoint.pth", "--num_workers", 0, "--device", "cpu",
             "--batch_size", 1]
    done = torchrun(MAIN, *flags, "--output_dir", folder / "together")
    assert done.returncode == 0, done.stdout + done.stderr
    one = alone(*flags, "--output_dir", folder / "alone")
    results = [(folder / name / "results.json").read_text() for name in ("together", "alone")]
    assert results[0] == results[1]
    assert len({row["image_id"] for row in json.loads(results[0])}) == 7
    assert len(json.loads(results[0])) == 7 * 10 * 2                            # queries and classes; no image twice
    curves = [torch.load(folder / name / "eval" / "latest.pth", weights_only=False) for name in ("together", "alone")]
    assert (curves[0]["precision"] == curves[1]["precision"]).all()
    assert done.stdout.count("changed since") == done.stdout.count("--batch_size 1 (was 2)") == 1
    trained = json.loads((folder / "out" / "log.txt").read_text().splitlines()[-1])["test_coco_eval_bbox"]
    assert one["coco_eval_bbox"] == pytest.approx(trained, abs=1e-6) and trained[1] > 0.02


def test_deformable_training(folder):
    """Every parameter takes part in every step, or the processes would wait for each other; and all hold the same."""
    flags = [flag.replace("tiny_detr", "tiny_deformable_detr") for flag in SMALL]
    done = torchrun(folder / "watched.py", *flags, "--coco_path", folder / "data", "--output_dir", folder / "deformable",
                    "--batch_size", 2, "--epochs", 1, "--ema_decay", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(folder / "deformable" / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    row = json.loads((folder / "deformable" / "log.txt").read_text())
    assert math.isfinite(row["train_loss"]) and math.isfinite(row["train_loss_ce_enc"])


def panoptic_data(folder: Path) -> None:
    """Data of which some training images are void: a panoptic map without segments."""
    make_synthetic(folder, train=12, val=5)
    make_panoptic(folder)
    file = folder / "annotations" / "panoptic_train2017.json"
    content = json.loads(file.read_text())
    for row in [content["annotations"][i] for i in VOID]:
        row["segments_info"] = []
        picture = folder / "panoptic_train2017" / row["file_name"]
        Image.fromarray(np.zeros_like(np.asarray(Image.open(picture)))).save(picture)
    file.write_text(json.dumps(content))


def take_for_truth(out: Path, data: Path) -> None:
    """Make the panoptic maps of a training's last evaluation the ground truth, with another class for every third
    segment: then a model of few steps has a PQ."""
    file = data / "annotations" / "panoptic_val2017.json"
    content, found = json.loads(file.read_text()), json.loads((out / "panoptic.json").read_text())
    shutil.rmtree(data / "panoptic_val2017")
    shutil.copytree(out / "panoptic", data / "panoptic_val2017")
    ids = [category["id"] for category in content["categories"]]
    for row in found["annotations"]:
        of_pixels = np.asarray(Image.open(out / "panoptic" / row["file_name"])) @ np.array([1, 256, 65536])
        for k, segment in enumerate(row["segments_info"]):
            y, x = np.nonzero(of_pixels == segment["id"])
            left, top, right, bottom = (int(n) for n in (x.min(), y.min(), x.max() + 1, y.max() + 1))
            segment |= {"iscrowd": 0, "area": len(x), "bbox": [left, top, right - left, bottom - top]}
            if k % 3 == 0:
                segment["category_id"] = ids[ids.index(segment["category_id"]) - 1]
    file.write_text(json.dumps(content | {"annotations": found["annotations"]}))


def scoring(out: Path, data: Path, folder: Path) -> list[str]:
    """Flags to evaluate the model trained in ``out``."""
    return [*f"--eval --resume {out}/checkpoint.pth --coco_path {data} --coco_panoptic_path {data} --output_dir {folder} "
            "--num_workers 0 --device cpu".split()]


def test_masks_and_panoptic_maps(tmp_path):
    """No process waits for one whose batch has nothing in it; box AP, mask AP, PQ and all files are those of one
    process."""
    data, out = tmp_path / "data", tmp_path / "out"
    panoptic_data(data)
    steps = zip(*([draw.image for draw, in RandomBatches(12, 1, rank, 2, seed=42)] for rank in (0, 1)))
    assert {(first in VOID, second in VOID) for first, second in steps} == {(a, b) for a in (0, 1) for b in (0, 1)}
    (tmp_path / "program.py").write_text(WATCHED_AND_SCORED)
    done = torchrun(tmp_path / "program.py", *MASKS, "--output_dir", out, "--coco_path", data, "--coco_panoptic_path",
                    data)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(out / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    row = json.loads((out / "log.txt").read_text())
    assert all(math.isfinite(row[f"train_{name}"]) for name in ("loss", "loss_mask", "loss_dice", "grad_norm"))
    assert row["train_loss_mask"] > 0 and row["train_loss_dice"] > 0

    one = alone(*scoring(out, data, out / "alone"))
    assert 0 < one["PQ_all"]["pq"] < 1 and len(one["coco_eval_bbox"]) == len(one["coco_eval_masks"]) == 12
    for rank in (0, 1):
        assert json.loads((out / f"scores{rank}.json").read_text()) == one
    names = ["results.json", "results_masks.json", "panoptic.json",
             *(f"panoptic/{path.name}" for path in (out / "alone" / "panoptic").iterdir())]
    assert len(names) == 3 + 5
    for name in names:
        assert (out / "together" / name).read_bytes() == (out / "alone" / name).read_bytes(), name
