"""The embedded data: fixed for good, in COCO's layout, with everything in it that COCO's reader must know."""
import colorsys
import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets import synthetic
from datasets.coco_panoptic import build_coco_panoptic

PREFIX = 60
# sha256 over the pixels and annotations of the first PREFIX images of each split.
PREFIX_CHECKSUM = "28a1c43f4e718885bcb208856a72289a89fba536ca367014eaf34b3d5f36d86a"
# The same of the panoptic part of 52 and 2 images, and of its json.
PANOPTIC_PREFIX_CHECKSUM = "92a705f6e5142745a264d816d8ba06633bb104e2580ffaa46c414c1950605ec0"


@pytest.fixture(scope="module")
def scenes():
    return {split: [synthetic.make_scene(0, split, i) for i in range(PREFIX)] for split in ("train", "val")}


def test_checksum_of_a_prefix(scenes):
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for scene in scenes[split]:
            digest.update(scene.pixels.tobytes())
            digest.update(synthetic.canonical(scene.objects))
    assert digest.hexdigest() == PREFIX_CHECKSUM


@pytest.mark.slow
def test_checksum_of_everything(tmp_path):
    synthetic.make_synthetic(tmp_path / "data")
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for file in sorted((tmp_path / "data" / f"{split}2017").glob("*.png")):
            digest.update(np.asarray(Image.open(file)).tobytes())
        digest.update((tmp_path / "data" / "annotations" / f"instances_{split}2017.json").read_bytes())
    assert digest.hexdigest() == synthetic.CHECKSUM


@pytest.mark.slow
def test_statistics_of_everything(tmp_path):
    synthetic.make_synthetic(tmp_path / "data")
    for split, count in (("train", 2000), ("val", 300)):
        data = json.loads((tmp_path / "data" / "annotations" / f"instances_{split}2017.json").read_text())
        assert len(data["images"]) == count
        check_statistics(data)
        per_class = Counter(row["category_id"] for row in data["annotations"])
        assert max(per_class.values()) < 1.3 * min(per_class.values())


def check_statistics(data: dict) -> None:
    sizes = {row["id"]: (row["width"], row["height"]) for row in data["images"]}
    objects = [row for row in data["annotations"] if not row["iscrowd"]]
    assert all(128 <= side <= 192 for size in sizes.values() for side in size)
    counts = Counter(row["image_id"] for row in objects)
    assert set(counts.values()) <= set(range(1, 11))
    assert sum(i not in counts for i in sizes) == len(sizes) // 10
    side = [np.sqrt(np.prod(row["bbox"][2:]) / np.prod(sizes[row["image_id"]])) for row in objects]
    assert np.mean(np.array(side) < 0.1) >= 1 / 3                       # small for their image
    assert np.mean(np.array(side) > 0.25) >= 0.15
    assert {row["category_id"] for row in objects} == set(synthetic.CATEGORY_IDS)
    for row in data["annotations"]:
        x, y, w, h = row["bbox"]
        width, height = sizes[row["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        assert row["iscrowd"] or min(w, h) >= synthetic.SMALLEST


def test_statistics(tmp_path):
    folder = tmp_path / "data"
    synthetic.make_synthetic(folder, train=200, val=10)
    data = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    check_statistics(data)
    segmentations = {type(row["segmentation"]) for row in data["annotations"] if not row["iscrowd"]}
    assert segmentations == {list, dict}                                # polygons and RLE
    assert sum(row["iscrowd"] for row in data["annotations"]) == 4      # one image in fifty has a crowd
    boxes: dict[int, list] = {}
    for row in data["annotations"]:
        boxes.setdefault(row["image_id"], []).append(row["bbox"])
    overlapping = sum(coco_mask.iou(b[i:i + 1], b[:i], [0] * i).max() > 0.05 for b in map(np.array, boxes.values())
                      for i in range(1, len(b)))
    assert overlapping > 20


def test_masks_and_boxes_agree_with_what_was_drawn(scenes, tmp_path):
    for scene in scenes["train"]:
        height, width = scene.owner.shape
        for k, row in enumerate(scene.objects):
            drawn = scene.owner == k
            ys, xs = drawn.nonzero()
            assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert row["area"] == drawn.sum()
            segmentation = row["segmentation"]
            if isinstance(segmentation, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                rle = segmentation
            mask = coco_mask.decode(rle).astype(bool)
            overlap = (mask & drawn).sum() / (mask | drawn).sum()
            assert overlap == 1 or isinstance(segmentation, list) and overlap > 0.85, (row, overlap)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path, scenes):
    synthetic.make_synthetic(tmp_path / "a", train=3, val=2)
    coco = COCO(tmp_path / "a" / "annotations" / "instances_train2017.json")
    assert len(coco.imgs) == 3 and [c["name"] for c in coco.cats.values()] == list(synthetic.SHAPES)
    for i, image in enumerate(coco.imgs.values()):
        pixels = np.asarray(Image.open(tmp_path / "a" / "train2017" / image["file_name"]))
        assert (pixels == scenes["train"][i].pixels).all()
    assert (synthetic.make_scene(1, "train", 0).pixels[:100, :100] != scenes["train"][0].pixels[:100, :100]).any()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """``make_synthetic`` shortened to a few images, and the checksum that these have."""
    make = synthetic.make_synthetic
    make(tmp_path / "known", train=3, val=2)
    known = json.loads((tmp_path / "known" / synthetic.MARKER).read_text())["checksum"]
    monkeypatch.setattr(synthetic, "CHECKSUM", known)
    monkeypatch.setattr(synthetic, "make_synthetic", lambda folder: make(folder, train=3, val=2))
    return tmp_path / "data"


def test_made_once(small, capsys):
    assert synthetic.synthetic_data(small) == small
    file = small / synthetic.MARKER
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    synthetic.synthetic_data(small)
    assert file.stat().st_mtime_ns == before and capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["image", "annotations", "marker", "version"])
def test_a_damaged_cache_is_set_aside_and_made_anew(small, capsys, damage):
    synthetic.synthetic_data(small)
    if damage == "image":
        next((small / "train2017").glob("*.png")).unlink()
    elif damage == "annotations":
        (small / "annotations" / "instances_val2017.json").unlink()
    elif damage == "marker":
        (small / synthetic.MARKER).write_text("{")
    else:
        (small / synthetic.MARKER).write_text(json.dumps({"version": 0, "checksum": "", "train": 3, "val": 2}))
    capsys.readouterr()
    synthetic.synthetic_data(small)
    assert "to be made anew" in capsys.readouterr().out
    assert synthetic.defect(small) is None
    assert len(list(small.parent.glob("data-set-aside-*"))) == 1


def test_an_interrupted_making_leaves_nothing(monkeypatch, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(synthetic.Image, "fromarray", stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make_synthetic(tmp_path / "data", train=3, val=2)
    assert list(tmp_path.iterdir()) == []


def test_another_checksum_of_this_very_version_is_said_and_not_made_again(small, monkeypatch, capsys):
    """A machine that computes differently must not make the data anew at every start."""
    monkeypatch.setattr(synthetic, "CHECKSUM", "0" * 64)
    for _ in range(2):
        synthetic.synthetic_data(small)
        assert "not 000000000000" in capsys.readouterr().out
    assert not list(small.parent.glob("data-set-aside-*"))
    monkeypatch.setattr(synthetic, "CHECKSUM", "1" * 64)                # a newer version
    synthetic.synthetic_data(small)
    assert "of another version; moved to" in capsys.readouterr().out


def test_a_faster_process_keeps_its_data(small, monkeypatch, tmp_path):
    known, draw = tmp_path / "known", synthetic.make_scene

    def meanwhile(seed, split, index):
        if (split, index) == ("val", 1):
            shutil.copytree(known, small)
            (small / "theirs").touch()
        return draw(seed, split, index)
    monkeypatch.setattr(synthetic, "make_scene", meanwhile)
    assert synthetic.synthetic_data(small) == small
    assert (small / "theirs").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "known"]


def test_what_is_there_is_not_written_over(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="data is not empty; move it away"):
        synthetic.make_synthetic(tmp_path / "data", train=3, val=2)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


# The panoptic part.

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """52 images, of which one has a crowd, and their panoptic part, for which nothing was drawn."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    synthetic.make_synthetic(folder, train=52, val=2)
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "make_scene", None)
        synthetic.make_panoptic(folder)
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before}
    return folder


def panoptic(root, split="train"):
    """Ids of the pixels ``[H, W]``, row of the json, and instances of each image, read without the project's reader."""
    data = json.loads((root / "annotations" / f"panoptic_{split}2017.json").read_text())
    coco = COCO(root / "annotations" / f"instances_{split}2017.json")
    assert list(coco.imgs) == [image["id"] for image in data["images"]] == [r["image_id"] for r in data["annotations"]]
    for image, row in zip(data["images"], data["annotations"]):
        colours = Image.open(root / f"panoptic_{split}2017" / row["file_name"])
        assert colours.mode == "RGB" and colours.size == (image["width"], image["height"])
        red, green, blue = np.moveaxis(np.asarray(colours).astype(int), -1, 0)
        yield red + 256 * green + 256 ** 2 * blue, row, coco.loadAnns(coco.getAnnIds(image["id"]))


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_pixel_belongs_to_a_segment_of_the_json(root, split):
    for ids, row, _ in panoptic(root, split):
        segments = row["segments_info"]
        assert set(ids.ravel().tolist()) == {segment["id"] for segment in segments}
        assert len({segment["id"] for segment in segments}) == len(segments) and not (ids == 0).any()
        for segment in segments:
            y, x = np.nonzero(ids == segment["id"])
            assert segment["area"] == len(x)
            assert segment["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]


def test_segments_are_the_instances(root):
    """In their order, then the ground; of hidden, cut and pierced objects and crowds pixel by pixel, of polygons as
    pycocotools rounds them."""
    crowds, polygons = 0, 0
    for ids, row, instances in panoptic(root):
        *things, stuff = row["segments_info"]
        assert [(s["category_id"], s["iscrowd"], s["area"], s["bbox"]) for s in things] \
            == [(s["category_id"], s["iscrowd"], s["area"], s["bbox"]) for s in instances]
        assert stuff["category_id"] in synthetic.GROUND_IDS and stuff["iscrowd"] == 0
        crowds += sum(segment["iscrowd"] for segment in things)
        coco = COCO()
        coco.imgs = {row["image_id"]: {"height": ids.shape[0], "width": ids.shape[1]}}
        for thing, instance in zip(things, instances):
            mask, seen = coco.annToMask(instance).astype(bool), ids == thing["id"]
            overlap = (mask & seen).sum() / (mask | seen).sum()
            polygon = isinstance(instance["segmentation"], list)
            polygons += polygon
            assert overlap == 1 or polygon and overlap > 0.85, (instance, overlap)
    assert crowds == 1 and polygons > 100


def test_the_json_has_what_was_drawn(root, scenes):
    grounds = Counter()
    for (ids, row, _), scene in zip(panoptic(root), scenes["train"]):
        listed = [segment["id"] for segment in row["segments_info"]]
        assert (np.array(listed)[scene.owner] == ids).all()                             # -1, the ground, is the last
        assert row["segments_info"][-1]["category_id"] == synthetic.GROUND_IDS[scene.ground]
        grounds[scene.ground] += 1
    assert min(grounds[kind] for kind in range(4)) >= 6


def test_grounds_have_the_colour_of_their_names():
    """What the classes of stuff say: grass green, sand between magenta and yellow, water blue, stone nearly grey."""
    hues: dict[int, list[float]] = {kind: [] for kind in range(4)}
    saturations: dict[int, list[float]] = {kind: [] for kind in range(4)}
    for index in range(60):
        painter = synthetic.bare_ground(0, "train", index)
        hue, saturation, _ = colorsys.rgb_to_hsv(*(painter.canvas.mean((0, 1)) / 255))
        hues[painter.ground].append(hue * 6)
        saturations[painter.ground].append(saturation)
    assert all(len(some) >= 5 for some in hues.values())
    for kind in range(3):
        middle = (2, 0, 4)[kind]
        assert all(abs((hue - middle + 3) % 6 - 3) < 1.1 for hue in hues[kind]), (kind, hues[kind])
    assert max(saturations[3]) < 0.17 and min(min(saturations[kind]) for kind in range(3)) > 0.1


def test_categories(root):
    rows = json.loads((root / "annotations" / "panoptic_val2017.json").read_text())["categories"]
    instances = json.loads((root / "annotations" / "instances_val2017.json").read_text())["categories"]
    assert [(row["id"], row["name"]) for row in rows if row["isthing"]] == [(r["id"], r["name"]) for r in instances]
    assert [row["name"] for row in rows if not row["isthing"]] == ["grass", "sand", "water", "stone"]
    assert len({row["id"] for row in rows}) == 10
    colours = {tuple(c * (16 - k) // 16 for c in row["color"]) for row in rows for k in range(11 * row["isthing"] + 1)}
    assert len(colours) == 6 * 12 + 4                                           # a crowd and ten objects of any class


def test_the_projects_reader_takes_it(root):
    data = build_coco_panoptic("train", root, root)
    assert [category.id for category in data.categories] == [*synthetic.CATEGORY_IDS, *synthetic.GROUND_IDS]
    assert [category.isthing for category in data.categories] == [True] * 6 + [False] * 4
    for i in range(len(data)):
        target = data.target(i)
        assert (target["masks"].sum(0) == 1).all() and (target["area"] == target["masks"].sum((1, 2))).all()


def panoptic_checksum(root, images):
    digest = hashlib.sha256()
    for split, count in images.items():
        for file in sorted((root / f"panoptic_{split}2017").glob("*.png"))[:count]:
            digest.update(np.asarray(Image.open(file)).tobytes())
        digest.update((root / "annotations" / f"panoptic_{split}2017.json").read_bytes())
    return digest.hexdigest()


def test_panoptic_checksum_of_a_prefix(root):
    assert panoptic_checksum(root, {"train": 52, "val": 2}) == PANOPTIC_PREFIX_CHECKSUM
    assert json.loads((root / synthetic.PANOPTIC_MARKER).read_text())["checksum"] == PANOPTIC_PREFIX_CHECKSUM


@pytest.mark.slow
def test_panoptic_checksum_of_everything(tmp_path):
    assert synthetic.synthetic_panoptic(tmp_path / "data") == tmp_path / "data"
    assert panoptic_checksum(tmp_path / "data", {"train": 2000, "val": 300}) == synthetic.PANOPTIC_CHECKSUM


@pytest.fixture
def small_panoptic(small, monkeypatch):
    """``small`` with its panoptic part, and the checksum that this has."""
    synthetic.synthetic_data(small)
    synthetic.make_panoptic(small)
    known = json.loads((small / synthetic.PANOPTIC_MARKER).read_text())["checksum"]
    monkeypatch.setattr(synthetic, "PANOPTIC_CHECKSUM", known)
    shutil.rmtree(small)
    return small


def files(folder):
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_panoptic_made_once_and_from_what_is_there(small_panoptic, capsys):
    synthetic.synthetic_data(small_panoptic)
    pictures = files(small_panoptic)
    assert len(pictures) == 5 + 2 + 1
    assert synthetic.synthetic_panoptic(small_panoptic) == small_panoptic
    everything = files(small_panoptic)
    assert len(everything) == 8 + 5 + 2 + 1 and pictures.items() <= everything.items()
    shown = capsys.readouterr().out
    assert shown.count("making the synthetic") == shown.count("making panoptic annotations") == 1
    synthetic.synthetic_panoptic(small_panoptic)
    synthetic.synthetic_data(small_panoptic)
    assert files(small_panoptic) == everything and capsys.readouterr().out == ""
    assert sorted(path.name for path in small_panoptic.parent.iterdir()) == ["data", "known"]


@pytest.mark.parametrize("damage, said", [
    ("map", "2 of 3 maps in panoptic_train2017"), ("json", "annotations/panoptic_val2017.json is missing"),
    ("marker", "no readable synthetic_panoptic.json"), ("version", "of another version"),
    ("pictures", "of other pictures")])
def test_a_damaged_panoptic_part_is_set_aside_and_made_anew(small_panoptic, capsys, damage, said):
    synthetic.synthetic_panoptic(small_panoptic)
    marker = small_panoptic / synthetic.PANOPTIC_MARKER
    content = json.loads(marker.read_text())
    if damage == "map":
        next((small_panoptic / "panoptic_train2017").glob("*.png")).unlink()
    elif damage == "json":
        (small_panoptic / "annotations" / "panoptic_val2017.json").unlink()
    elif damage == "marker":
        marker.unlink()                                                         # stopped while files were moved there
    elif damage == "version":
        marker.write_text(json.dumps({**content, "checksum": "0", "expected": "0"}))
    else:
        marker.write_text(json.dumps({**content, "pictures": "0"}))
    pictures = files(small_panoptic / "train2017")
    capsys.readouterr()
    synthetic.synthetic_panoptic(small_panoptic)
    shown = capsys.readouterr().out
    assert said in shown and "to be made anew" in shown and "making the synthetic data" not in shown
    assert synthetic.panoptic_defect(small_panoptic) is None and files(small_panoptic / "train2017") == pictures
    aside, = small_panoptic.parent.glob("data-panoptic-set-aside-*")
    assert len(list(aside.rglob("panoptic_*2017"))) == 2


def test_an_interrupted_making_of_the_panoptic_part_leaves_nothing(small_panoptic, monkeypatch):
    synthetic.synthetic_data(small_panoptic)
    before = files(small_panoptic.parent)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(synthetic, "panoptic_map", stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.synthetic_panoptic(small_panoptic)
    assert files(small_panoptic.parent) == before


def test_a_faster_process_that_made_the_panoptic_part(small_panoptic, monkeypatch):
    synthetic.synthetic_data(small_panoptic)
    make, started = synthetic.panoptic_map, []

    def meanwhile(*args):
        if not started:
            started.append(True)
            synthetic.make_panoptic(small_panoptic)
        return make(*args)
    monkeypatch.setattr(synthetic, "panoptic_map", meanwhile)
    synthetic.synthetic_panoptic(small_panoptic)
    assert synthetic.panoptic_defect(small_panoptic) is None
    assert sorted(path.name for path in small_panoptic.parent.iterdir()) == ["data", "known"]


def test_another_panoptic_checksum_is_said_and_not_made_again(small_panoptic, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "PANOPTIC_CHECKSUM", "0" * 64)
    for made in (True, False):
        synthetic.synthetic_panoptic(small_panoptic)
        shown = capsys.readouterr().out
        assert "not 000000000000: this machine computes differently" in shown
        assert ("making panoptic" in shown) == made


def test_a_panoptic_part_is_not_written_over(small_panoptic):
    synthetic.synthetic_panoptic(small_panoptic)
    with pytest.raises(FileExistsError, match="already has synthetic_panoptic.json, panoptic_train2017, .*; move that"):
        synthetic.make_panoptic(small_panoptic)
