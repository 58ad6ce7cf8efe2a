"""``scripts/compare_models.py``: medians, bands and table are those of the logs, trainings are taken, resumed and refused
as they should be, a failure stops no other, and the picture shows what the table says. ``main.py`` is a stand-in here,
but in one slow test."""
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from detr.visualize import SAFE, read_log
from scripts import compare_models
from scripts.compare_models import apart, done_before, learnings, parse, plan, read_run, table, target_of

STAND_IN = textwrap.dedent("""
    import argparse, json, os, shutil, sys, time
    from pathlib import Path
    parser = argparse.ArgumentParser()
    for name in ("model", "seed", "epochs", "eval_every", "num_workers", "output_dir", "resume"):
        parser.add_argument("--" + name, required=True)
    args = parser.parse_args()
    here, folder, key = Path(__file__).parent, Path(args.output_dir), args.model + "-" + args.seed
    said = json.loads((here / "said.json").read_text()).get(key, {})
    with open(here / "begun.txt", "a") as file:
        print(key, os.environ["OMP_NUM_THREADS"], args.resume, args.eval_every, os.getpid(), file=file)
    shutil.copy(here / "checkpoint.pth", folder / "checkpoint.pth")
    log = folder / "log.txt"
    there = len(log.read_text().splitlines()) if log.exists() else 0
    for epoch in range(there, min(int(args.epochs), said.get("until", 99))):
        ap = said.get("ap", 0.5) * (epoch + 1) / int(args.epochs)
        row = {"epoch": epoch, "seconds": said.get("pace", 10) * (epoch + 1), "n_parameters": 1234567,
               "test_coco_eval_bbox": [ap, 1.5 * ap] + [0.0] * 10}
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\\n")
    time.sleep(said.get("sleep", 0))
    if "fails" in said:
        print("\\n".join("line %d" % i for i in range(30)))
        sys.exit(said["fails"])
""")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Runs the script with a stand-in for main.py, which trains as ``says`` has it; returns exit code and what began."""
    place = tmp_path / "stand-in"
    place.mkdir()
    (place / "main.py").write_text(STAND_IN)
    torch.save({"model": {}, "position": {"epoch": 1, "step": 0, "steps_per_epoch": 25, "images_per_step": 8,
                                          "processes": 1}}, place / "checkpoint.pth")
    monkeypatch.setattr(compare_models, "MAIN", place / "main.py")
    monkeypatch.setattr(compare_models, "POLL", 0.02)
    monkeypatch.setattr(compare_models, "synthetic_data", lambda: None)

    def run(*words, says=None) -> tuple[int, list[list[str]]]:
        (place / "said.json").write_text(json.dumps(says or {}))
        (place / "begun.txt").write_text("")
        folder = [] if "--plot_only" in words else ["--output_dir", str(tmp_path / "out")]
        code = compare_models.main([*folder, *map(str, words)])
        return code, [line.split() for line in (place / "begun.txt").read_text().splitlines()]
    return run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures, figure = [], compare_models.Figure

    def kept(*words, **more):
        figures.append(figure(*words, **more))
        return figures[-1]
    monkeypatch.setattr(compare_models, "Figure", kept)
    return figures


TWO = ("--models", "tiny_detr", "tiny_deformable_detr", "--epochs", "4")
SAYS = {**{f"tiny_detr-{seed}": {"ap": ap, "pace": pace} for seed, (ap, pace) in enumerate(((0.3, 10), (0.1, 20),
                                                                                             (0.2, 12)))},
        **{f"tiny_deformable_detr-{seed}": {"ap": ap, "pace": 30} for seed, ap in enumerate((0.6, 0.5, 0.8))}}


def curve(model="tiny_detr", seed=0, ap=(0.1, 0.2), seconds=(10.0, 20.0), epochs=2, data=None, more=None, revision="a",
          **machine):
    facts = {"more": more or {}, "revision": revision, "settings": {"train": {"epochs": epochs}, "data": {"data": data}},
             "machine": {"jobs": 2, "threads": 1, "num_workers": 0, "device": "CPU", "cpu": "a", "torch": "2"} | machine}
    return compare_models.Curve(model, seed, 1000, [100 * (i + 1) for i in range(len(ap))], list(seconds), list(ap),
                                [2 * value for value in ap], facts)


# What is run.

def test_all_tiny_presets_and_three_seeds_by_default(tmp_path):
    runs = plan(parse(["--output_dir", str(tmp_path)]))
    tiny = [name for name in compare_models.list_models() if name.startswith("tiny_")]
    assert [(run.model, run.seed) for run in runs] == [(name, seed) for seed in (0, 1, 2) for name in tiny]
    assert len({run.folder for run in runs}) == len(runs) and {run.epochs for run in runs} == {compare_models.EPOCHS}
    for run in runs:                                            # main.py's own words for what each does
        settings = compare_models.command_line.settle(compare_models.command_line.get_args_parser().parse_args(run.flags))
        assert settings.name == run.model and settings.train.seed == run.seed and settings.train.eval_every == 1
        assert settings.run.num_workers == 0 and settings.model.from_scratch


def test_flags_for_all_trainings(tmp_path):
    runs = plan(parse([*TWO, "--data", str(tmp_path), "--", "--num_queries", "60", "--image_size", "256x320"]))
    for run in runs:
        assert run.facts["settings"]["model"]["num_queries"] == 60
        assert run.facts["settings"]["data"]["image_size"] == "256x320"
        assert run.facts["settings"]["data"]["data"] == str(tmp_path)


@pytest.mark.parametrize("words, said", [
    (["--epochs", "0"], "--epochs 0: give at least 1"),
    (["--jobs", "0"], "--jobs 0: give at least 1"),
    (["--seeds", "1", "1"], "--seeds 1 1: name each once"),
    (["--plot_only", "x", "--seeds", "0"], "--seeds has no effect with --plot_only"),
    (["--plot_only", "x", "--", "--lr", "1"], "-- has no effect with --plot_only"),
    (["--data", "nowhere"], "nowhere"),
    (["--models", "tiny_det"], "tiny_det is not known; did you mean tiny_detr"),
    (["--models", "detr_resnet50"], "detr_resnet50 would begin with a pretrained backbone.*add -- --from_scratch"),
    ([*TWO, "--", "--seed", "3"], "--seed after --: --seeds, before the --, says it"),
    ([*TWO, "--", "--coco_path", "x"], "--coco_path after --: --data, before the --, says it"),
    ([*TWO, "--", "--eval_every", "3"], "--eval_every after --: these trainings decide it themselves"),
    ([*TWO, "--", "--two_stage"], "--two_stage: tiny_detr has no such option"),
])
def test_what_cannot_be_compared_is_refused_before_anything_begins(words, said, trained, tmp_path):
    with pytest.raises((ValueError, OSError), match=said):
        trained(*words)
    assert not (tmp_path / "out").exists()


def test_a_drop_that_never_comes_is_said(capsys):
    plan(parse(["--models", "detr_resnet50", "--", "--from_scratch", "--backbone_norm", "batch"]))
    assert "its learning rate would drop after 200 epochs, and there are 8" in capsys.readouterr().out


# Trainings and their folders.

def test_each_once_one_folder_each_with_its_threads(trained, tmp_path, capsys):
    code, begun = trained(*TWO, "--jobs", 3, "--threads", 2, says=SAYS)
    assert code == 0
    assert Counter(line[0] for line in begun) == dict.fromkeys(SAYS, 1)
    assert {tuple(line[1:4]) for line in begun} == {("2", "auto", "1")}
    said = capsys.readouterr().out
    assert all(f"{name}, seed {seed}: begins" in said for name in TWO[1:3] for seed in range(3))
    assert "tiny_detr, seed 1: 4 of 4 epochs, AP 0.100, 80 s of training; in all " in said
    assert all(read_log(tmp_path / "out" / f"{key[:-2]}-seed{key[-1]}" / "log.txt")[-1]["epoch"] == 3 for key in SAYS)


def test_no_more_at_a_time_than_jobs(trained, monkeypatch):
    living, most = [], []
    started = compare_models.start

    def counted(run, threads):
        living.append(started(run, threads))
        most.append(sum(process.poll() is None for process in living))
        return living[-1]
    monkeypatch.setattr(compare_models, "start", counted)
    trained(*TWO, "--jobs", 2, says={key: {"sleep": 0.2} for key in SAYS})
    assert max(most) == 2 and len(most) == 6


def test_finished_ones_are_taken_and_broken_ones_go_on(trained, tmp_path, capsys):
    says = {key: dict(value) for key, value in SAYS.items()}
    says["tiny_detr-1"] |= {"until": 2, "fails": 7}
    code, _ = trained(*TWO, says=says)
    first = capsys.readouterr().out
    assert code == 1 and "FAILED: tiny_detr, seed 1: exit code 7, 2 of 4 epochs" in first
    assert "\n    line 29\n" in first and "    line 18\n" in first and "line 17\n" not in first
    assert "1 of 6 trainings failed: tiny_detr, seed 1." in first and "tiny_detr (2 of 3 seeds)" in first
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["failed"].keys() == {"tiny_detr, seed 1"}

    before = (tmp_path / "out" / "tiny_detr-seed0" / "log.txt").stat().st_mtime_ns
    code, begun = trained(*TWO, says=SAYS)
    said = capsys.readouterr().out
    assert code == 0 and [line[0] for line in begun] == ["tiny_detr-1"]
    assert "tiny_detr, seed 1: goes on, 2 of 4 epochs are there" in said
    assert said.count("finished before, taken as it is") == 5 and "3 of 4 epochs" in said and "1 of 4" not in said
    assert (tmp_path / "out" / "tiny_detr-seed0" / "log.txt").stat().st_mtime_ns == before
    assert not json.loads((tmp_path / "out" / "compare.json").read_text())["failed"]


def test_a_training_that_ends_early_without_a_word_has_failed(trained, capsys):
    code, _ = trained(*TWO, "--seeds", 0, says={"tiny_detr-0": {"until": 3}})
    assert code == 1 and "FAILED: tiny_detr, seed 0: exit code 0, 3 of 4 epochs" in capsys.readouterr().out


def test_where_all_fail_nothing_is_drawn(trained, tmp_path):
    code, begun = trained(*TWO, "--seeds", 0, says={f"{name}-0": {"until": 0, "fails": 1} for name in TWO[1:3]})
    assert code == 1 and len(begun) == 2 and not list((tmp_path / "out").glob("compare.*"))


@pytest.mark.parametrize("words, changed", [
    (["--epochs", "5"], "settings.train.epochs 4, not 5"),
    (["--epochs", "4", "--jobs", "1"], "machine.jobs 2, not 1"),
    (["--epochs", "4", "--threads", "2"], "machine.threads 1, not 2"),
    (["--epochs", "4", "--", "--lr", "0.1"], "settings.train.lr 0.002, not 0.1; more None, not {'lr': 0.1}"),
])
def test_a_training_with_other_settings_is_never_taken(words, changed, trained, tmp_path):
    trained(*TWO, "--seeds", 0)
    where = tmp_path / "out" / "tiny_detr-seed0"
    kept = {path: path.read_bytes() for path in where.iterdir()}
    with pytest.raises(ValueError, match=f"tiny_detr-seed0 was made with {changed}: give the same flags"):
        trained("--models", "tiny_detr", "--seeds", 0, *words)
    assert {path: path.read_bytes() for path in where.iterdir()} == kept


def test_a_folder_of_another_making_is_left_alone(tmp_path):
    run, = plan(parse(["--models", "tiny_detr", "--seeds", "0", "--output_dir", str(tmp_path)]))
    assert done_before(run) == (0, "begins")
    run.folder.mkdir()
    (run.folder / "checkpoint.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="has a training that this script has not made: give another --output_dir"):
        done_before(run)


def test_a_log_that_is_being_written_and_one_without_its_last_evaluation(tmp_path):
    run, = plan(parse(["--models", "tiny_detr", "--seeds", "0", "--epochs", "2", "--output_dir", str(tmp_path)]))
    run.folder.mkdir()
    compare_models.write_facts(run.folder, run.facts)
    (run.folder / "checkpoint.pth").write_bytes(b"")
    row = {"epoch": 0, "test_coco_eval_bbox": [0.1] * 12}
    (run.folder / "log.txt").write_text(json.dumps(row) + '\n{"epoch": 1, "test_co')
    assert done_before(run)[0] == 1 and done_before(run)[1].startswith("goes on, 1 of 2 epochs are there")
    (run.folder / "log.txt").write_text(json.dumps(row) + '\n{"epoch": 1}\n')
    assert done_before(run)[1].startswith("goes on, 2 of 2") and read_run(run.folder) is None
    (run.folder / "checkpoint.pth").unlink()
    assert done_before(run) == (0, "begins anew, since its checkpoints are gone")


def test_two_comparisons_never_train_in_one_folder(trained, tmp_path, capsys):
    run, = plan(parse(["--models", "tiny_detr", "--seeds", "0", "--epochs", "4", "--output_dir", str(tmp_path / "out")]))
    (tmp_path / "stand-in" / "said.json").write_text('{"tiny_detr-0": {"until": 1, "sleep": 60}}')
    other, begun = compare_models.start(run, 1), tmp_path / "stand-in" / "begun.txt"
    try:
        while not (begun.exists() and begun.read_text()) and other.poll() is None:      # it has read what it is to do
            time.sleep(0.01)
        code, begun = trained(*TWO, "--seeds", 0)
        assert code == 1 and [line[0] for line in begun] == ["tiny_deformable_detr-0"]
        assert "tiny_detr-seed0: another process trains there" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()


def test_who_is_asked_to_leave_tells_the_trainings(trained, monkeypatch, tmp_path, capsys):
    def asked(seconds):
        if len((tmp_path / "stand-in" / "begun.txt").read_text().splitlines()) == 2:
            monkeypatch.setattr(compare_models.time, "sleep", sleep)
            raise KeyboardInterrupt
        sleep(seconds)
    sleep = compare_models.time.sleep
    monkeypatch.setattr(compare_models.time, "sleep", asked)
    with pytest.raises(KeyboardInterrupt):
        trained(*TWO, "--seeds", 0, says={f"{name}-0": {"sleep": 60} for name in TWO[1:3]})
    pids = [int(line.split()[4]) for line in (tmp_path / "stand-in" / "begun.txt").read_text().splitlines()]
    assert len(pids) == 2 and "2 trainings told to save and leave" in capsys.readouterr().out
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# What is made of them.

def test_medians_bands_and_table(trained, tmp_path, capsys):
    """By hand: AP grows in equal steps of a quarter to what SAYS says, so medians are of 0.3, 0.1, 0.2 and 0.6, 0.5, 0.8;
    90% of the best, 0.54, is reached by the better model after the last of its four epochs alone."""
    trained(*TWO, says=SAYS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines == [
        "| model | parameters | images seen | seconds | AP (lowest to highest) | AP50 | images to AP 0.540 | seconds to "
        "it |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| tiny_deformable_detr | 1,234,567 | 800 | 120 | 0.600 (0.500 to 0.800) | 0.900 | 800 | 120 |",
        "| tiny_detr | 1,234,567 | 800 | 48 | 0.200 (0.100 to 0.300) | 0.300 | not reached |  |"]
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    small, large = found["models"]
    assert small["ap"] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert small["low"] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert small["high"] == pytest.approx([0.075, 0.15, 0.225, 0.3]) and small["seconds"] == [12, 24, 36, 48]
    assert small["images"] == large["images"] == [200, 400, 600, 800] and large["seeds"] == [0, 1, 2]
    assert found["epochs"] == 4 and found["data"] == "synthetic" and found["machine"]["jobs"] == 2
    assert [run["seconds"][-1] for run in small["runs"]] == [40, 80, 48]


def test_an_even_number_of_seeds_and_the_first_epoch_that_reaches_it():
    curves = [curve("tiny_a", 0, (0.1, 0.5, 0.4), (1, 2, 3)), curve("tiny_a", 1, (0.3, 0.3, 0.8), (3, 4, 7)),
              curve("tiny_b", 0, (0.5, 0.55, 0.1), (5, 6, 7))]
    a, b = learnings(curves)
    assert a.ap == pytest.approx([0.2, 0.4, 0.6]) and a.low == [0.1, 0.3, 0.4] and a.high == [0.3, 0.5, 0.8]
    assert a.seconds == [2, 3, 5] and target_of([a, b]) == pytest.approx(0.54)
    rows = table([a, b], 2, 0.54).splitlines()[2:]
    assert rows[0].startswith("| tiny_a | 1,000 | 300 | 5 | 0.600 (0.400 to 0.800) | 1.200 | 300 | 5 |")
    assert rows[1].startswith("| tiny_b (1 of 2 seeds) | 1,000 | 300 | 7 | 0.100 (0.100 to 0.100) | 0.200 | 200 | 6 |")


@pytest.mark.parametrize("other, said", [(dict(epochs=3), "epochs 3, not 2"), (dict(jobs=1), "jobs 1, not 2"),
                                         (dict(cpu="b"), "cpu b, not a"), (dict(data="/x"), "data /x, not None"),
                                         (dict(more={"lr": 1}), "flags after -- {'lr': 1}, not None")])
def test_other_budgets_are_not_drawn_together(other, said, tmp_path):
    with pytest.raises(ValueError, match=f"tiny_b, seed 4, does not compare with tiny_detr, seed 0: {said}"):
        compare_models.report([curve(), curve("tiny_b", 4, **other)], 1, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_code_is_said(tmp_path, capsys):
    compare_models.report([curve(), curve("tiny_b", 4)], 1, {}, tmp_path)
    assert "different code" not in capsys.readouterr().out
    compare_models.report([curve(), curve("tiny_b", 4, revision="b")], 1, {}, tmp_path)
    assert "trained with different code, revisions a, b" in capsys.readouterr().out


def test_drawing_again(trained, tmp_path, capsys, drawn):
    says = {key: dict(value) for key, value in SAYS.items()}
    says["tiny_deformable_detr-2"] |= {"until": 1, "fails": 1}
    trained(*TWO, says=says)
    before, out = (tmp_path / "out" / "compare.json").read_text(), tmp_path / "out"
    for path in [*out.glob("compare.*"), *out.glob("*/checkpoint.pth")]:
        path.unlink()
    capsys.readouterr()
    code, begun = trained("--plot_only", out)
    said = capsys.readouterr().out
    assert code == 0 and not begun and "left out: " in said and "tiny_deformable_detr-seed2 is not finished" in said
    assert {**json.loads(before), "failed": {}} == json.loads((out / "compare.json").read_text())
    assert Image.open(out / "compare.png").width > 1000

    trained("--plot_only", out, "--models", "tiny_detr")
    assert [row["model"] for row in json.loads((out / "compare.json").read_text())["models"]] == ["tiny_detr"]
    with pytest.raises(ValueError, match="there is no finished training of tiny_dab"):
        trained("--plot_only", out, "--models", "tiny_dab")
    with pytest.raises(ValueError, match="there is no finished training; name"):
        trained("--plot_only", tmp_path)


# The picture.

def test_the_picture_is_the_medians_and_the_bands(trained, drawn):
    trained(*TWO, says=SAYS)
    images, seconds = drawn[0].axes
    for axes, x in ((images, [[200, 400, 600, 800]] * 2), (seconds, [[12, 24, 36, 48], [30, 60, 90, 120]])):
        lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
        assert [list(line.get_xdata()) for line in lines] == x
        assert [list(line.get_ydata()) for line in lines] == [pytest.approx([0.05, 0.1, 0.15, 0.2]),
                                                              pytest.approx([0.15, 0.3, 0.45, 0.6])]
        bands = [band.get_paths()[0].vertices for band in axes.collections]
        assert [(band[:, 1].min(), band[:, 1].max()) for band in bands] == [pytest.approx((0.025, 0.3)),
                                                                           pytest.approx((0.125, 0.8))]
        looks = [(line.get_color(), line._unscaled_dash_pattern) for line in lines]
        assert len(set(map(str, looks))) == 2
        assert [tuple(band.get_facecolor()[0][:3]) for band in axes.collections] == [to_rgb(look[0]) for look in looks]
    assert [text.get_text() for text in images.texts[:2]] == ["0.200  detr", "0.600  deformable_detr"]
    assert [text.get_text() for text in seconds.texts[:2]] == ["48 s  detr", "120 s  deformable_detr"]
    said = " ".join(text.get_text() for text in drawn[0].texts)
    assert "medians over 3 seeds; bands" in said and "2 trainings at a time, 1 thread each" in said


def test_many_models_with_like_ends_can_be_told_apart_and_read(tmp_path, drawn):
    """Labels overlap neither each other nor the picture's edge, nor the other panel's numbers."""
    names = ["tiny_detr", "tiny_dab_deformable_detr", *(f"tiny_model_{k}" for k in range(9))]
    models = learnings([curve(name, 0, (0.1, 0.70 + 0.002 * (k % 3))) for k, name in enumerate(names)])
    compare_models.draw(models, "synthetic data", curve().facts, tmp_path / "a.png")
    figure, = drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for axes in figure.axes for text in axes.texts     # without arrows
             if "  " in text.get_text()]
    boxes += [tick.get_window_extent(renderer) for axes in figure.axes for tick in axes.get_yticklabels()]
    boxes += [axes.yaxis.label.get_window_extent(renderer) for axes in figure.axes]
    assert len(boxes) > 2 * len(names)
    for box in boxes:
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height
    for one, other in itertools.combinations(boxes, 2):
        assert min(one.x1, other.x1) - max(one.x0, other.x0) < 1 or min(one.y1, other.y1) - max(one.y0, other.y0) < 1
    styles = {str((line.get_color(), line._unscaled_dash_pattern)) for line in figure.axes[0].lines
              if len(line.get_xdata()) > 1}
    assert len(styles) == len(names)
    safe = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in SAFE} | {"#000000"}
    assert {line.get_color().lower() for line in figure.axes[0].lines} <= safe


def test_one_seed_has_no_band(tmp_path, drawn):
    compare_models.draw(learnings([curve()]), "x", curve().facts, tmp_path / "a.png")
    assert not drawn[0].axes[0].collections and "bands" not in drawn[0].texts[0].get_text()


@pytest.mark.parametrize("lowest, highest", [(-9, 9), (0, 1), (0.2, 0.6)])
@pytest.mark.parametrize("places", [[0.1], [0.5, 0.1, 0.9], [0.5, 0.5, 0.5], [0.3, 0.32, 0.28], [0.0, 0.0, 0.02]])
def test_labels_are_as_near_as_they_can_be(places, lowest, highest):
    """No places of a grid are better."""
    gap = 0.1
    found = apart(places, gap, lowest, highest)
    order = sorted(range(len(places)), key=places.__getitem__)
    spread = [found[k] for k in order]
    assert all(later - earlier >= gap - 1e-9 for earlier, later in zip(spread, spread[1:]))
    assert lowest - 1e-9 <= spread[0] and spread[-1] <= highest + 1e-9
    grid = [place / 50 for place in range(-20, 71) if lowest - 1e-9 <= place / 50 <= highest + 1e-9]
    best = min(sum((place - places[k]) ** 2 for place, k in zip(some, order))
               for some in itertools.combinations(grid, len(order))
               if all(later - earlier >= gap - 1e-9 for earlier, later in zip(some, some[1:])))
    assert sum((place - places[k]) ** 2 for place, k in zip(spread, order)) <= best + 1e-9


# In earnest.

@pytest.mark.slow
def test_small_trainings_end_to_end(tmp_path):
    """Two models and two seeds, then the same again, which trains nothing."""
    from datasets.synthetic import make_synthetic
    make_synthetic(tmp_path / "data", train=32, val=8)
    words = [sys.executable, Path(compare_models.__file__), *TWO[:3], "--seeds", "0", "1", "--epochs", "2", "--data",
             tmp_path / "data", "--output_dir", tmp_path / "out", "--", "--image_size", "64x64", "--device", "cpu"]
    first = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["model"] for row in found["models"]] == list(TWO[1:3])
    for row in found["models"]:
        assert row["images"] == [32, 64] and row["seeds"] == [0, 1] and 0 < row["seconds"][0] < row["seconds"][1]
        logs = [read_log(tmp_path / "out" / f"{row['model']}-seed{seed}" / "log.txt") for seed in (0, 1)]
        assert row["ap"][-1] == pytest.approx(sum(log[-1]["test_coco_eval_bbox"][0] for log in logs) / 2)
    again = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("finished before, taken as it is") == 4
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
