"""datasets/report.py: the page's numbers are pycocotools', nothing in it reaches outside, and any data has one."""
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_detections import small_detections
from test_errors import pycocotools

import main
from datasets.coco_eval import CocoEvaluator
from datasets.errors import SIGNS, judge
from datasets.report import page, write_report
from detr.structures import Category
from detr.visualize import viewable


class Reader(HTMLParser):
    """Sections of a page: title -> rows of cells; complains of tags that are not closed in order."""
    empty = {"meta", "image", "use", "rect", "path", "polyline", "circle", "br"}

    def __init__(self, text):
        super().__init__()
        self.tables, self.open, self.text, self.section = {}, [], "", ""
        self.addresses, self.tags = [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("href", "src", "srcset", "action")]
        if tag not in self.empty:
            self.open.append(tag)
        if tag in ("h2", "td", "th"):
            self.text = ""
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])

    def handle_endtag(self, tag):
        if tag not in self.empty:
            assert self.open.pop() == tag
        if tag == "h2":
            self.section = self.text
        if tag in ("td", "th"):
            self.tables[self.section][-1].append(self.text.replace("\xa0", " ").strip())

    def handle_data(self, data):
        self.text += data


class Images:
    """A data set's images; remembers which were read, and has lost ``lost``."""

    def __init__(self, ids, lost=(), size=(220, 220)):
        self.ids, self.lost, self.read, self.size = list(ids), lost, [], size

    def image(self, i):
        self.read.append(self.ids[i])
        if self.ids[i] in self.lost:
            raise OSError(f"image {self.ids[i]} <is> not there")
        return Image.new("RGB", self.size, (9 * i % 256, 60, 90))


def evaluated(coco, found, masks=None):
    """An evaluator that has summarized, and what it said."""
    table = [Category(k, id, coco.cats[id]["name"]) for k, id in enumerate(sorted(coco.cats))]
    label = {category.id: category.label for category in table}
    evaluator = CocoEvaluator(coco, table, len(table))
    for image_id, one in found.items():
        boxes = torch.tensor(one.boxes_xywh)
        boxes[:, 2:] += boxes[:, :2]
        evaluator.update({image_id: {"scores": torch.tensor(one.scores), "boxes": boxes, "labels": torch.tensor(
            [label[id] for id in one.category_ids.tolist()], dtype=torch.int64)}})
    return evaluator, evaluator.summarize()


def report_of(coco, found, **options):
    evaluator, results = evaluated(coco, found)
    images = Images(found)
    return Reader(page(evaluator, results, images, viewable, **options)), images, results, evaluator


def test_numbers_are_pycocotools():
    coco, found = small_detections(1, images=30, crowds=0.1)
    reader, _, results, evaluator = report_of(coco, found)
    reference = pycocotools(coco, evaluator.found)
    reference.summarize()
    head, boxes = reader.tables["COCO's numbers"]
    assert head[1:4] == ["AP", "AP50", "AP75"] and boxes[0] == "boxes" and len(boxes) == 13
    assert boxes[1:] == [f"{value:.3f}" if value >= 0 else "–" for value in reference.stats]
    head, *rows = reader.tables["Classes"]
    assert head == ["class", "objects", "AP", "AP50", "AR", "best F1", "at score", "precision", "recall"]
    precision, recall = reference.eval["precision"][:, :, :, 0, -1], reference.eval["recall"][:, :, 0, -1]
    expected = {f"class {id}": [f"{value:.3f}" for value in (precision[:, :, k].mean(), precision[0, :, k].mean(),
                                                             recall[:, k].mean())]
                for k, id in enumerate(reference.params.catIds)}
    assert {row[0]: row[2:5] for row in rows} == expected
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)                   # the lowest AP first
    judged = judge(coco, evaluator.found)
    for name, objects, *_, f1, threshold, sure, complete in rows:
        k = reference.params.catIds.index(int(name.split()[1]))
        kept = (judged.category == k) & (judged.score >= float(threshold)) & (judged.kind != 6)
        right = int((judged.kind[kept] == 0).sum())
        assert int(objects) == judged.positives[k]
        assert (sure, complete) == (f"{right / kept.sum():.3f}", f"{right / int(objects):.3f}")
        assert float(f1) == pytest.approx(2 * right / (kept.sum() + int(objects)), abs=6e-4)


def test_counts_add_up():
    coco, found = small_detections(2, images=30)
    reader, _, _, evaluator = report_of(coco, found, threshold=0.4)
    judged = judge(coco, evaluator.found)
    counts = {row[0].split()[-1]: int(row[2]) for row in reader.tables["Kinds of errors"][1:]}
    assert sum(counts.values()) == judged.errors_of_images(0.4).sum()
    assert counts["missed"] == judged.missed(0.4).sum()
    sizes = reader.tables["Sizes"][1:]
    assert len(sizes) == 6
    for buckets in (sizes[:3], sizes[3:]):
        assert sum(int(row[1]) for row in buckets) == judged.positives.sum()
        found_there = sum(float(row[2].rstrip("%")) / 100 * int(row[1]) for row in buckets if row[2] != "–")
        assert round(found_there) == judged.found(0.4).sum()


def test_only_the_worst_images_are_read():
    coco, found = small_detections(3, images=40)
    reader, images, _, evaluator = report_of(coco, found, threshold=0.5, worst=5)
    errors = dict(zip(sorted(found), judge(coco, evaluator.found).errors_of_images(0.5).tolist()))
    assert images.read == sorted(found, key=lambda id: (-errors[id], id))[:5]


def test_nothing_reaches_outside():
    coco, found = small_detections(0)
    for category in coco.cats.values():
        category["name"] = f"<script>alert({category['id']})</script> & 'x' \"y\""
    for image in coco.imgs.values():
        image["file_name"] = "<img src=http://example.org/x.png>"
    evaluator, results = evaluated(coco, found)
    text = page(evaluator, results, Images(found), viewable, {"model": "</title><script>", "weights": "<b>"})
    reader = Reader(text)
    assert not reader.tags & {"script", "img", "link", "iframe", "b onload"}
    assert reader.addresses and all(re.match(r"(data:image/(png|jpeg);base64,|#image\d+$)", a) for a in reader.addresses)
    assert "url(" not in text and "@import" not in text
    assert any("<script>alert(2)</script> & 'x' \"y\"" == row[0] for row in reader.tables["Classes"])


@pytest.mark.parametrize("change", ["no objects", "no detections", "only crowds", "one class", "many classes",
                                    "30 classes", "no sizes", "perfect"])
def test_any_data_has_a_page(change):
    coco, found = small_detections(0, images=30 if "classes" in change else 6, crowds=float(change == "only crowds"),
                                   classes={"one class": 1, "many classes": 150, "30 classes": 30}.get(change, 4))
    if change == "no objects":
        coco.imgToAnns.clear()
        coco.anns.clear()
        coco.dataset["annotations"].clear()
    if change in ("no detections", "perfect"):
        for id, one in found.items():
            rows = coco.imgToAnns[id] if change == "perfect" else []
            found[id] = one._replace(category_ids=np.array([gt["category_id"] for gt in rows], dtype=np.int64),
                                     boxes_xywh=np.array([gt["bbox"] for gt in rows]).reshape(-1, 4),
                                     scores=np.linspace(0.9, 0.8, len(rows)))
    if change == "no sizes":
        for image in coco.imgs.values():
            del image["width"], image["height"]
    reader, images, _, _ = report_of(coco, found)
    assert {"COCO's numbers", "Kinds of errors", "Classes", "Sizes"} <= set(reader.tables)
    assert len(reader.tables["Sizes"]) == (7 if change not in ("no objects", "only crowds", "no sizes") else 4)
    assert len(reader.tables["Classes"]) == 1 + len(coco.cats)
    assert (images.read == []) == (change == "perfect")
    assert ("details" in reader.tags) == (change in ("many classes", "30 classes"))


def test_colours_are_those_of_every_other_page():
    coco, found = small_detections(1, images=30, crowds=0.1)
    evaluator, results = evaluated(coco, found)
    text = page(evaluator, results, Images(found), viewable, threshold=0.3, worst=30)
    drawn = set(re.findall(r"<title>([^:<]*)[^<]*</title><rect [^>]*/><rect [^>]* stroke='(#\w+)'", text))
    assert drawn == {(sign.words, sign.colour) for sign in SIGNS.values()}
    assert len({sign.colour for sign in SIGNS.values()}) == len({sign.words for sign in SIGNS.values()}) == len(SIGNS)


def test_an_image_that_is_gone_is_said():
    coco, found = small_detections(0)
    evaluator, results = evaluated(coco, found)
    text = page(evaluator, results, Images(found, lost=[10]), viewable, worst=99)
    assert "cannot be shown: image 10 &lt;is&gt; not there" in text
    assert text.count("data:image/jpeg") == text.count("<use ") > 3


def test_pictures_of_other_channels():
    coco, found = small_detections(0)
    evaluator, results = evaluated(coco, found)
    images = SimpleNamespace(ids=list(found), image=lambda i: torch.zeros(5, 220, 220, dtype=torch.uint8))
    assert "data:image/jpeg" in page(evaluator, results, images, viewable)


def test_masks_have_their_numbers():
    coco, found = small_detections(0)
    evaluator, results = evaluated(coco, found)
    per_class = {name: {**row, "AP": 0.125 * k} for k, (name, row) in enumerate(results["per_class"].items())}
    results |= {"coco_eval_masks": [k / 16 for k in range(12)], "per_class_masks": per_class}
    tables = Reader(page(evaluator, results, Images(found), viewable)).tables
    assert tables["COCO's numbers"][2] == ["masks", *(f"{k / 16:.3f}" for k in range(12))]
    expected = {name: f"{row['AP']:.3f}" for name, row in per_class.items()}
    assert {row[0]: row[5] for row in tables["Classes"][1:]} == expected
    assert tables["Classes"][0][5] == "mask AP"


def test_before_summarize():
    coco, _ = small_detections(0)
    with pytest.raises(RuntimeError, match="call it first"):
        page(CocoEvaluator(coco, [], 1), {}, Images([]), viewable)


# As --eval writes it.

def settings():
    return SimpleNamespace(name="tiny", run=SimpleNamespace(resume=None, coco_eval="fast"),
                           data=SimpleNamespace(data=None, coco_path="there"), model=SimpleNamespace(padding="exact"),
                           train=SimpleNamespace(batch_size=2))


def judged_in(folder):
    coco, found = small_detections(0)
    evaluator, results = evaluated(coco, found)
    return SimpleNamespace(folder=folder, evaluators=[evaluator], validation=Images(found)), results


def test_main_writes_it(tmp_path, capsys):
    judge, results = judged_in(tmp_path)
    assert main.report(settings(), judge, results, torch.device("cpu"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "tiny" in text and "--batch_size 2, --padding exact, --coco_eval fast; float32 on cpu" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    write_report(tmp_path / "again.html", judge.evaluators[0], results, judge.validation, viewable)
    assert len((tmp_path / "again.html").read_bytes()) > 10_000


def test_main_says_why_it_cannot(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    judge, results = judged_in(tmp_path / "file")
    capsys.readouterr()
    assert not main.report(settings(), judge, results, torch.device("cpu"))
    assert "NOT SAVED: cannot write" in (said := capsys.readouterr().out) and "report.html" in said


def test_main_writes_it_once_and_where_there_is_a_folder(tmp_path, monkeypatch):
    judge, results = judged_in(None)
    assert not main.report(settings(), judge, results, torch.device("cpu"))
    monkeypatch.setattr(main.distributed, "is_main", lambda: False)
    judge.folder = tmp_path
    assert not main.report(settings(), judge, results, torch.device("cpu"))
    assert not any(tmp_path.iterdir())
