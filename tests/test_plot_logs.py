"""``scripts/plot_logs.py``: what is drawn is what the logs say, and no two runs look alike."""
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from detr import compare_runs
from scripts import plot_logs

PUBLISHED = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"}   # Okabe and Ito


@pytest.fixture(scope="module")
def script():
    return plot_logs


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures, figure = [], compare_runs.Figure

    def kept(*words, **more):
        figures.append(figure(*words, **more))
        return figures[-1]
    monkeypatch.setattr(compare_runs, "Figure", kept)
    return figures


def log(place: Path, epochs: int = 3, scale: float = 1.0, **more) -> Path:
    """A log with an evaluation every second epoch; ``more`` values of all rows, functions of the epoch."""
    place.mkdir(parents=True)
    rows = []
    for epoch in range(epochs):
        row = {"epoch": epoch, "train_loss": scale * (9 - epoch), "train_loss_ce": scale / (epoch + 1)}
        if epoch % 2 == 0:
            row |= {"test_loss": scale * (8 - epoch), "test_coco_eval_bbox": [0.1 * epoch, 0.2 * epoch, -1] + [0.0] * 9}
        rows.append(row | {name: value(epoch) for name, value in more.items()})
    (place / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def call(script, *words) -> None:
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))


def panels(figure) -> dict[str, list]:
    """Lines of each panel, in the order of the runs, by title; those over hours by title and unit."""
    return {axes.get_title(loc="left") + (" over hours" if "hours" in axes.get_xlabel() else ""): list(axes.lines)[::-1]
            for axes in figure.axes if axes.axison}


def test_lines_are_the_logs(script, drawn, tmp_path, capsys):
    one = log(tmp_path / "one", seconds=lambda epoch: 1800 * (epoch + 1))
    two = log(tmp_path / "two", epochs=5, scale=2.0, test_loss_ce=lambda epoch: 0.5)
    call(script, one, two / "log.txt", "--output", tmp_path / "new" / "both.png")
    shown = panels(drawn[0])
    assert set(shown) == {"Total loss, training", "Total loss, validation", "AP", "AP50", "Class loss, validation",
                          "Total loss, training over hours", "Total loss, validation over hours", "AP over hours"}
    points = {name: [(list(line.get_xdata()), pytest.approx(list(line.get_ydata()))) for line in lines]
              for name, lines in shown.items()}
    assert points["Total loss, training"] == [([0, 1, 2], [9, 8, 7]), ([0, 1, 2, 3, 4], [18, 16, 14, 12, 10])]
    assert points["AP"] == [([0, 2], [0, 0.2]), ([0, 2, 4], [0, 0.2, 0.4])]
    assert points["AP50"] == [([0, 2], [0, 0.4]), ([0, 2, 4], [0, 0.4, 0.8])]
    assert points["AP over hours"] == [([0.5, 1.5], [0, 0.2])]
    assert points["Class loss, validation"] == [([0, 1, 2, 3, 4], [0.5] * 5)]
    said = capsys.readouterr().out
    assert "one: the log has no Class loss, validation\n" in said and "two: the log has no times\n" in said
    assert f"2 runs in {tmp_path / 'new' / 'both.png'}" in said
    assert Image.open(tmp_path / "new" / "both.png").width > 1000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["both.png"]


def test_a_run_looks_the_same_everywhere_and_like_no_other(script, drawn, tmp_path):
    runs = [log(tmp_path / f"run {k}", scale=k + 1.0) for k in range(9)]
    call(script, *runs, "--output", tmp_path / "runs.png")
    looks = [[(line.get_color(), line._unscaled_dash_pattern) for line in lines] for lines in panels(drawn[0]).values()]
    assert all(one == looks[0] for one in looks) and len(set(map(str, looks[0]))) == 9
    legend = drawn[0].legends[0]
    assert [(line.get_color(), line._unscaled_dash_pattern) for line in legend.get_lines()] == looks[0]
    assert [text.get_text().split("   ")[0] for text in legend.get_texts()] == [f"run {k}" for k in range(9)]
    assert {colour.upper() for colour in compare_runs.OKABE_ITO} <= PUBLISHED


def test_what_the_legend_says(tmp_path, drawn):
    """The best is named with its epoch; -1, no objects, is no precision."""
    folder = log(tmp_path / "run", epochs=5)
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    rows[4]["test_coco_eval_bbox"] = [0.15] + [-1.0] * 11
    (folder / "log.txt").write_text("\n".join(map(json.dumps, rows)))
    compare_runs.draw_comparison({"run": folder / "log.txt"}, tmp_path / "run.png")
    assert drawn[0].legends[0].get_texts()[0].get_text() == "run   5 epochs;  AP 0.150, best 0.200 (epoch 2)"
    assert len(panels(drawn[0])["AP50"][0].get_xdata()) == 2


@pytest.mark.parametrize("folders, names", [
    (["out/a", "out/b"], ["a", "b"]),
    (["x/tiny", "y/tiny", "y/other"], ["x/tiny", "y/tiny", "other"]),
    (["a", "b/a"], None),
])
def test_names(folders, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = compare_runs.short_names([Path(folder) for folder in folders])
    assert len(set(got)) == len(got) and got == (names or [f"{tmp_path.name}/a", "b/a"])


def test_the_same_run_twice_is_one(script, tmp_path, capsys):
    run = log(tmp_path / "run")
    call(script, run, run / "log.txt", str(tmp_path / "r*"), "--output", tmp_path / "a.png")
    assert "1 run in" in capsys.readouterr().out


def test_what_is_no_log(script, tmp_path):
    log(tmp_path / "outputs" / "run")
    with pytest.raises(FileNotFoundError, match="there is no .*outputs/log.txt; .*outputs/run has one"):
        call(script, tmp_path / "outputs")
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere; give folders of trainings"):
        call(script, tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt: there is no epoch in it to draw"):
        call(script, tmp_path / "empty.txt")
    (tmp_path / "half.txt").write_text('{"epoch": 0, "train_')
    with pytest.raises(ValueError, match="half.txt, line 1: no complete JSON object"):
        call(script, tmp_path / "half.txt", "--output", tmp_path / "half.png")
    (tmp_path / "bare.txt").write_text('{"epoch": 0}')
    with pytest.raises(ValueError, match="neither losses nor precision"):
        call(script, tmp_path / "bare.txt", "--output", tmp_path / "bare.png")
    with pytest.raises(ValueError, match="--output a.jpg: a PNG is written"):
        call(script, tmp_path / "bare.txt", "--output", "a.jpg")
    assert not list(tmp_path.glob("*.png")) and sys.modules.get("plot_logs") is None
