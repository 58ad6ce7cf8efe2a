"""The doctor on a small model and small data: that it says what is so, and that every verdict can be a bad one."""
import importlib.util
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import make_rectangles, read_annotations, write_annotations
from torch import nn

import main
from detr.config import RunConfig
from detr.presets import PRESETS

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "doctor.py"
SMALL = ("--device cpu --model tiny_detr --image_size 64 --batch_size 4 --hidden_dim 32 --nheads 2 --dim_feedforward 32 "
         "--num_queries 6 --num_workers 0 --amp off --seconds 0.1").split()
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def doctor():
    spec = importlib.util.spec_from_file_location("doctor", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor"] = module                                  # where NamedTuple looks for the names of types
    spec.loader.exec_module(module)
    assert module.BROKEN is None
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_rectangles(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture(autouse=True)
def quick(doctor, monkeypatch):
    """No second processes, but where a test asks for them."""
    monkeypatch.setattr(doctor, "two_processes", lambda report, numbers: report.ok("gloo", "not asked"))


def call(doctor, capsys, data: Path | None, line: str = "--no_overfit") -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit code, verdict and text by title, and all that was printed."""
    place = ["--coco_path", str(data)] if data else []
    code = doctor.run([*SMALL, *place, *line.split()])
    shown = capsys.readouterr().out
    verdicts: dict[str, tuple[str, str]] = {}
    for row in shown.splitlines():
        if row.startswith(("OK ", "NOTE ", "PROBLEM ")):
            verdict, rest = row.split(maxsplit=1)
            title, text = rest.split(": ", 1)
            verdicts[title] = verdict, text
        elif row.startswith(" " * 9) and verdicts:
            verdicts[title] = verdicts[title][0], f"{verdicts[title][1]}\n{row.strip()}"
    problems = [title for title, (verdict, _) in verdicts.items() if verdict == "PROBLEM"]
    last = shown.splitlines()[-1]
    assert last.startswith("doctor: ") and f"{len(problems)} problem" in last and all(one in last for one in problems)
    assert code == (1 if problems else 0)
    return code, verdicts, shown


def test_all_is_well(doctor, data, tmp_path, capsys):
    code, verdicts, shown = call(doctor, capsys, data, f"--overfit 2 --lr 3e-3 --lr_backbone 3e-3 --overfit_steps 200 "
                                                       f"--output_dir {tmp_path / 'out'}")
    assert code == 0, shown
    assert f"torch {torch.__version__.split('+')[0]}" in verdicts["packages"][1]
    assert "2 of 3 boxes kept" in verdicts["torchvision"][1]
    assert "16 training images (3 without objects)" in verdicts["data"][1]
    assert "as [4, 3, 64, " in verdicts["batch"][1]
    assert verdicts["gradients"][0] == verdicts["step"][0] == verdicts["repeated"][0] == verdicts["padding"][0] == "OK"
    assert verdicts["padding"][1].startswith("exact; ") and " 0% of them by more than 0.0001" in verdicts["padding"][1]
    assert "at most 200 steps" in shown and "overfit: images 100, 101, all in each step" in shown
    assert float(verdicts["overfit"][1].split("AP50 ")[1].split()[0]) > 0.9
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["doctor.png"]
    with Image.open(tmp_path / "out" / "doctor.png") as picture:
        assert picture.width > 500


def test_gradients_of_every_parameter(doctor, data, capsys, monkeypatch):
    built = PRESETS["tiny_detr"].model.__class__.build

    def build(self, num_classes):
        model, *others = built(self, num_classes)
        model.forgotten = nn.Linear(2, 2)
        return model, *others

    monkeypatch.setattr(PRESETS["tiny_detr"].model.__class__, "build", build)
    _, verdicts, _ = call(doctor, capsys, data)
    assert verdicts["gradients"][0] == "PROBLEM"
    assert "2 of " in verdicts["gradients"][1] and "forgotten.weight, forgotten.bias" in verdicts["gradients"][1]
    assert "step" in verdicts                                       # the rest is looked at all the same


@pytest.mark.parametrize("where, said", [
    ("input", "the input has values that are no numbers: image 0 of the batch (image_id 1"),
    ("weight", "class_embed"),
])
def test_values_that_are_no_numbers(doctor, data, capsys, monkeypatch, where, said):
    if where == "input":
        to_tensor = main.make_transforms

        def make_transforms(split, *args, **kwargs):
            steps = to_tensor(split, *args, **{**kwargs, "in_batch": False})
            steps.transforms.append(lambda image, target: (image * torch.nan, target))
            return steps
        monkeypatch.setattr(main, "make_transforms", make_transforms)
    else:
        build = main.build

        def broken(*args):
            model, *others = build(*args)
            for name, parameter in model.named_parameters():
                if name.endswith("class_embed.weight") or "class_embed" in name and name.endswith("weight"):
                    parameter.data[0, 0] = torch.inf
            return model, *others
        monkeypatch.setattr(main, "build", broken)
    _, verdicts, _ = call(doctor, capsys, data)
    assert verdicts["losses"][0] == "PROBLEM" and said in verdicts["losses"][1]
    assert "step" not in verdicts


def test_missing_and_damaged_files(doctor, tmp_path, capsys):
    data = make_rectangles(tmp_path / "data")
    (data / "train2017" / "103.png").unlink()
    _, verdicts, _ = call(doctor, capsys, data)
    assert verdicts["data"][0] == "PROBLEM" and "103.png" in verdicts["data"][1] and "model" not in verdicts
    _, verdicts, _ = call(doctor, capsys, tmp_path / "nowhere")
    assert verdicts["data"][0] == "PROBLEM" and "nowhere" in verdicts["data"][1]


def test_data_without_objects(doctor, tmp_path, capsys):
    data = make_rectangles(tmp_path / "data")
    write_annotations(data, "train", read_annotations(data, "train") | {"annotations": []})
    _, verdicts, _ = call(doctor, capsys, data, "--overfit 2")
    assert verdicts["data"][0] == "PROBLEM"


def test_what_cannot_be_learnt(doctor, tmp_path, capsys):
    """The same picture again and again, with other objects each time."""
    data = make_rectangles(tmp_path / "data")
    random = np.random.RandomState(0)
    for file in (data / "train2017").iterdir():
        Image.fromarray(np.full((64, 72, 3), 120, np.uint8)).save(file)
    content = read_annotations(data, "train")
    for row in content["annotations"]:
        x, y, w, h = (int(n) for n in random.randint((0, 0, 8, 8), (40, 36, 30, 28)))
        row |= {"bbox": [x, y, w, h], "area": w * h}
    write_annotations(data, "train", content)
    _, verdicts, shown = call(doctor, capsys, data, "--overfit 6 --overfit_steps 50 --freeze backbone")
    verdict, text = verdicts["overfit"]
    assert verdict == "PROBLEM" and " after 50 steps" in text and "above 0.9 is expected" in text
    assert "do not train (backbone" in text and "--overfit_steps 200" in text
    assert "the model gives the same boxes for every image" in text or "boxes are far off" in text, shown


def test_too_few_images(doctor, data, capsys):
    _, verdicts, _ = call(doctor, capsys, data, "--no_overfit --batch_size 17")
    assert verdicts["batch"][0] == "PROBLEM" and "needs 17 training images" in verdicts["batch"][1]
    _, verdicts, _ = call(doctor, capsys, data, "--overfit 14")
    assert verdicts["overfit"][0] == "PROBLEM" and "only 13 have 1 to 6 objects" in verdicts["overfit"][1]


@pytest.mark.parametrize("line, said", [
    ("--eval", "--eval: this program is about a training"),
    ("--overfit 0", "--overfit 0: at least 1 is needed"),
    ("--resume nowhere.pth", "nowhere.pth"),
    ("--resume https://example.org/weights.pth", "this program fetches nothing"),
    ("--with_box_refine", "--with_box_refine: tiny_detr has no such option"),
])
def test_settings_that_cannot_be(doctor, data, capsys, line, said):
    _, verdicts, _ = call(doctor, capsys, data, line)
    assert verdicts["settings"][0] == "PROBLEM" and said in verdicts["settings"][1] and "data" not in verdicts


def test_weights_that_main_would_fetch(doctor, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code = doctor.run(["--device", "cpu", "--model", "detr_resnet50", "--backbone", "resnet18", "--coco_path", str(data),
                       *"--image_size 64 --hidden_dim 32 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 1 "
                       "--num_queries 6 --num_workers 0 --seconds 0".split()])
    shown = capsys.readouterr().out
    assert "NOTE     model: detr_resnet50: " in shown and "resnet18-f37072fd.pth" in shown, shown
    assert f"put it at {tmp_path}/hub/checkpoints" in shown and "--from_scratch" in shown
    assert "NOTE     overfit: left out, since it would begin with a random backbone" in shown
    assert "legacy; next to a larger image" in shown and code == 0
    assert not list(tmp_path.rglob("*.pth"))


def test_padding_that_changes_what_is_seen(doctor, data, capsys, monkeypatch):
    seen, most = {}, {}
    for padding in ("legacy", "exact"):
        if padding == "exact":                                      # as if the little that rounding changes counted
            monkeypatch.setattr(doctor, "SAME", -1.0)
        seen[padding] = call(doctor, capsys, data, f"--no_overfit --padding {padding}")[1]["padding"]
        most[padding] = float(seen[padding][1].split("up to ")[1].split(",")[0])
    assert most["legacy"] > 1e-4 > 1e-5 > most["exact"]
    assert seen["legacy"][0] == "NOTE" and "as published; with --padding exact they would not" in seen["legacy"][1]
    assert seen["exact"][0] == "PROBLEM" and "a fault" in seen["exact"][1]


def test_a_forward_pass_that_is_not_repeated(doctor, data, capsys, monkeypatch):
    kept = doctor.set_random_states
    monkeypatch.setattr(doctor, "set_random_states", lambda states: None)
    _, verdicts, _ = call(doctor, capsys, data, "--no_overfit --dropout 0.5")
    assert verdicts["repeated"][0] == "NOTE" and "--deterministic makes them the same" in verdicts["repeated"][1]
    monkeypatch.setattr(doctor, "set_random_states", kept)
    _, verdicts, _ = call(doctor, capsys, data, "--no_overfit --dropout 0.5")
    assert verdicts["repeated"][0] == "OK"


def test_memory_that_runs_out(doctor, data, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(doctor, "learn", full)
    _, verdicts, _ = call(doctor, capsys, data, "--overfit 2")
    assert verdicts["overfit"][0] == "PROBLEM" and "a smaller --batch_size" in verdicts["overfit"][1]
    monkeypatch.setattr(doctor, "forward", full)
    _, verdicts, _ = call(doctor, capsys, data)
    assert verdicts["memory of a step"][0] == "PROBLEM" and "--batch_size" in verdicts["memory of a step"][1]


def test_an_operation_that_fails(doctor, data, capsys, monkeypatch):
    def unsupported(*_):
        raise RuntimeError("this device has no such operation")
    monkeypatch.setattr(doctor, "forward", unsupported)
    _, verdicts, _ = call(doctor, capsys, data)
    assert verdicts["step"] == ("PROBLEM", "RuntimeError: this device has no such operation")
    assert "reading" not in verdicts


def test_disk_and_shared_memory(doctor, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(100, 100, 0))
    _, verdicts, _ = call(doctor, capsys, data, f"--no_overfit --num_workers 1 --output_dir {tmp_path}")
    assert verdicts["disk"][0] == "PROBLEM" and f"0.00 GB free at {tmp_path}" in verdicts["disk"][1]
    if Path("/dev/shm").is_dir():
        assert verdicts["shared memory"][0] == "PROBLEM" and "--shm-size" in verdicts["shared memory"][1]


@pytest.fixture
def report(doctor):
    return doctor.Report()


def settings(doctor, *line: str):
    return main.settle(main.get_args_parser().parse_args([*SMALL[:-2], *line]))


def verdict(report, title: str) -> str:
    return next(name for name, titles in report.titles.items() if title in titles)


def test_an_installation_that_is_broken(doctor, report, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "BROKEN", RuntimeError("operator torchvision::nms does not exist"))
    with pytest.raises(doctor.Stop):
        doctor.installation(report)
    assert verdict(report, "packages") == "PROBLEM"
    monkeypatch.setattr(doctor, "BROKEN", None)
    monkeypatch.setattr(doctor, "LEAST_PYTHON", (99, 0))
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "a-package-that-nobody-has"))

    def missing(*_):
        raise RuntimeError("no such operator")
    monkeypatch.setattr(doctor.torchvision.ops, "nms", missing)
    report = doctor.Report()
    doctor.installation(report)
    assert report.titles["PROBLEM"] == ["python", "packages", "torchvision"]
    shown = capsys.readouterr().out
    assert "nms does not exist" in shown and "a-package-that-nobody-has: not installed; pip install" in shown
    assert report.last() == 1


def test_precision(doctor, report, capsys, monkeypatch):
    cpu, speeds = torch.device("cpu"), {torch.float32: 10.0, torch.bfloat16: 3.0, torch.float16: 0.0}
    monkeypatch.setattr(doctor, "product_speed", lambda device, dtype: speeds[dtype])
    for amp, expected in (("bf16", "NOTE"), ("fp16", "PROBLEM"), ("off", "OK")):
        report = doctor.Report()
        doctor.precision(report, settings(doctor, "--amp", amp), cpu)
        assert verdict(report, "precision") == expected, amp
    speeds[torch.bfloat16] = 40.0
    report = doctor.Report()
    doctor.precision(report, settings(doctor), cpu)
    assert verdict(report, "precision") == "NOTE" and "--amp bf16 might be faster" in capsys.readouterr().out


def test_optional_packages_open_files_and_cores(doctor, report, capsys, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(doctor, "installed", lambda name: "")
    doctor.optional_packages(report, settings(doctor), cpu)
    assert verdict(report, "optional packages") == ("PROBLEM" if RunConfig.coco_eval == "fast" else "OK")
    report = doctor.Report()
    doctor.optional_packages(report, settings(doctor, "--tensorboard", "--coco_eval", "pycocotools"), cpu)
    assert verdict(report, "optional packages") == "PROBLEM" and "pip install tensorboard" in capsys.readouterr().out
    busy = settings(doctor, "--num_workers", "500")
    doctor.cores_and_workers(report, busy, cpu)
    assert verdict(report, "cores") == "NOTE" and "500 workers" in capsys.readouterr().out
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    doctor.open_files(report, busy)
    assert verdict(report, "open files") == "NOTE" and "ulimit -n 4096" in capsys.readouterr().out


def test_torchrun(doctor, report, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    doctor.processes(report)
    assert verdict(report, "processes") == "PROBLEM" and "not RANK, LOCAL_RANK" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    report = doctor.Report()
    doctor.processes(report)
    assert verdict(report, "processes") == "NOTE"
    monkeypatch.setenv("RANK", "1")
    assert doctor.run(["--no_such_flag"]) == 0 and capsys.readouterr().out.count("doctor:") == 0


def test_reading_against_computing(doctor, report, capsys, monkeypatch):
    rates = {0: 10.0, 2: 20.0}
    monkeypatch.setattr(doctor, "images_a_second", lambda made, workers, seconds: rates[workers])
    monkeypatch.setattr(doctor, "cores", lambda: 64)

    def look(workers: int, step: float) -> str:
        report = doctor.Report()
        of_run = settings(doctor, "--num_workers", str(workers))
        made = doctor.Prepared(of_run, None, None, None, None, {}, (), "off", torch.device("cpu"), True)
        doctor.reading(report, made, step, 0.1)
        return verdict(report, "reading")

    assert look(2, 4 / 100) == "NOTE"                               # a batch of 4: 100 images a second
    shown = capsys.readouterr().out
    assert "80% of the time" in shown and "about 11 workers would do" in shown
    assert look(2, 4 / 19) == "OK" and look(0, 4 / 1) == "OK"
    assert look(0, 4 / 100) == "NOTE" and "91% of the time" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("program, expected", [(None, "OK"), ("raise SystemExit('no network')", "NOTE")])
def test_two_processes(doctor, capsys, monkeypatch, program, expected):
    monkeypatch.undo()
    report = doctor.Report()
    if program:
        monkeypatch.setattr(doctor, "GLOO", program)
    doctor.two_processes(report, 1000)
    assert verdict(report, "gloo") == expected
    assert ("no network" in capsys.readouterr().out) == bool(program)
