"""datasets/coco_panoptic.py: json and PNGs become the right targets, and what is wrong with them is said by name."""
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from small_data import damaged
from torch.utils.data import DataLoader

from datasets import collate
from datasets.coco_panoptic import (
    CocoPanoptic,
    PanopticAnnotations,
    build_coco_panoptic,
    encode_ids,
    panoptic_class_table,
    panoptic_num_classes,
    read_ids,
)
from datasets.transforms import Preprocessing, make_transforms
from detr.coco_classes import COCO_CATEGORIES, COCO_PANOPTIC, COCO_STUFF
from detr.structures import Category

CAT, GRASS, CROWD, THIN = 7 + 256 * 5 + 65536 * 3, 65536 * 200, 256 * 9, 12       # ids that need all three bytes


def save_png(path, ids):
    """Ids ``[H, W]`` as COCO says: R + 256 G + 256² B."""
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def segment(id, category_id, area, **more):
    return {"id": id, "category_id": category_id, "area": area, "iscrowd": 0, "bbox": [0, 0, 1, 1], **more}


def id_map():
    """48 x 64 pixels: grass above, a cat in it, a crowd below, a line one pixel wide, void between."""
    ids = np.zeros((48, 64), dtype=np.int64)
    ids[:20] = GRASS
    ids[5:15, 10:31] = CAT
    ids[30:, 40:] = CROWD
    ids[35:40, 2] = THIN
    return ids


@pytest.fixture
def data():
    """Three images, not in the order of their ids; image 5 has no segments."""
    return {"images": [{"id": 7, "file_name": "b.jpg", "width": 50, "height": 40},
                       {"id": 3, "file_name": "a.jpg", "width": 64, "height": 48},
                       {"id": 5, "file_name": "c.jpg", "width": 50, "height": 40}],
            "categories": [{"id": 56, "name": "grass", "isthing": 0}, {"id": 1, "name": "cat", "isthing": 1},
                           {"id": 23, "name": "dog", "isthing": 1}, {"id": 24, "name": "sky", "isthing": 0}],
            "annotations": [{"image_id": 7, "file_name": "b.png", "segments_info": [segment(1, 23, 2000)]},
                            {"image_id": 5, "file_name": "c.png", "segments_info": []},
                            {"image_id": 3, "file_name": "a.png", "segments_info": [
                                segment(CROWD, 1, 432, iscrowd=1), segment(GRASS, 56, 1070), segment(THIN, 23, 5),
                                segment(CAT, 1, 209.5)]}]}


@pytest.fixture
def dataset(tmp_path):
    """``dataset(json or text)`` writes it with images and PNGs in COCO's layout, and opens it."""
    images, pngs = tmp_path / "coco" / "val2017", tmp_path / "panoptic" / "panoptic_val2017"
    for folder in (images, pngs, tmp_path / "panoptic" / "annotations"):
        folder.mkdir(parents=True)
    for name, size in (("a", (64, 48)), ("b", (50, 40)), ("c", (50, 40))):
        Image.effect_noise(size, 50).convert("RGB").save(images / f"{name}.jpg")
    save_png(pngs / "a.png", id_map())
    save_png(pngs / "b.png", np.ones((40, 50), dtype=np.int64))
    save_png(pngs / "c.png", np.zeros((40, 50), dtype=np.int64))

    def write_and_open(content, **options):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "panoptic" / "annotations" / "panoptic_val2017.json").write_text(text)
        return build_coco_panoptic("val", tmp_path / "coco", tmp_path / "panoptic", **options)

    return write_and_open


@pytest.fixture
def png(tmp_path):
    return tmp_path / "panoptic" / "panoptic_val2017" / "a.png"


# -- what is read -----------------------------------------------------------------------------------------------------

def test_what_a_dataset_is(dataset, data, capsys):
    opened = dataset(data)
    assert capsys.readouterr().out.endswith("panoptic_val2017.json: 3 images (1 without segments, kept), 5 segments (1 "
                                            "crowd) of 4 classes (2 things; 1 without segments, kept)\n")
    assert opened.ids == [3, 5, 7] and len(opened) == 3 and opened.files == ["a.jpg", "c.jpg", "b.jpg"]
    assert opened.sizes.tolist() == [[48, 64], [40, 50], [40, 50]]
    assert opened.categories == [Category(0, 1, "cat", True), Category(1, 23, "dog", True),
                                 Category(2, 24, "sky", False), Category(3, 56, "grass", False)]
    assert opened.num_classes == 4
    image, target = opened[0]
    assert image.size == (64, 48) and image.mode == "RGB"
    assert target["labels"].tolist() == [0, 3, 1, 0] and target["iscrowd"].tolist() == [1, 0, 0, 0]
    assert target["area"].tolist() == [432, 1070, 5, 209.5]                         # the json's
    assert target["boxes"].tolist() == [[40, 30, 63, 47], [0, 0, 63, 19], [2, 35, 2, 39], [10, 5, 30, 14]]
    assert target["orig_size"].tolist() == target["size"].tolist() == [48, 64] and target["image_id"].tolist() == [3]
    for mask, id in zip(target["masks"], (CROWD, GRASS, THIN, CAT)):
        assert torch.equal(mask, torch.from_numpy(id_map() == id))
    assert {key: value.dtype for key, value in target.items()} == {
        "boxes": torch.float32, "area": torch.float32, "labels": torch.int64, "iscrowd": torch.int64,
        "image_id": torch.int64, "orig_size": torch.int64, "size": torch.int64, "masks": torch.bool}
    assert opened[2][1]["labels"].tolist() == [1] and opened[2][1]["image_id"].tolist() == [7]


def test_the_sample_is_read_as_published(real_data):
    """The published steps, by their definition: a comparison with each id, and extreme pixels."""
    folder = real_data / "coco_panoptic_sample"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    opened = CocoPanoptic(folder / "input_images", folder / "panoptic_examples", folder / "panoptic_examples.json")
    assert opened.categories == COCO_PANOPTIC and opened.num_classes == 250
    rows = {row["image_id"]: row for row in json.loads((folder / "panoptic_examples.json").read_text())["annotations"]}
    for i in range(len(opened)):
        image, target = opened[i]
        row = rows[int(target["image_id"])]
        pixels = np.asarray(Image.open(folder / "panoptic_examples" / row["file_name"])).astype(np.int64)
        ids = pixels @ [1, 256, 65536]
        assert image.size == ids.shape[::-1]
        for key, name in (("labels", "category_id"), ("area", "area"), ("iscrowd", "iscrowd")):
            assert target[key].tolist() == [segment[name] for segment in row["segments_info"]]
        for k, segment in enumerate(row["segments_info"]):
            assert torch.equal(target["masks"][k], torch.from_numpy(ids == segment["id"]))
            y, x = np.nonzero(ids == segment["id"])
            assert target["boxes"][k].tolist() == [x.min(), y.min(), x.max(), y.max()]
    assert sum(len(row["segments_info"]) for row in rows.values()) == len(opened.annotations._columns.ids) == 50


def test_coco_keeps_its_ids_as_labels_and_others_have_no_gaps():
    assert len(COCO_PANOPTIC) == 133 and panoptic_class_table(reversed(COCO_PANOPTIC)) == COCO_PANOPTIC
    assert [row.id for row in COCO_PANOPTIC if row.isthing] == list(COCO_CATEGORIES)
    assert [row.id for row in COCO_PANOPTIC if not row.isthing] == list(COCO_STUFF)
    assert panoptic_num_classes(COCO_PANOPTIC) == 250
    renamed = panoptic_class_table([*COCO_PANOPTIC[:-1], Category(0, 200, "mat", False)])
    counted = panoptic_class_table([*COCO_PANOPTIC[:-1], COCO_PANOPTIC[-1]._replace(isthing=True)])
    for table in (renamed, counted):
        assert [row.label for row in table] == list(range(133)) and panoptic_num_classes(table) == 133
    assert panoptic_class_table([Category(9, 5, "b", False), Category(9, 0, "a")]) == [
        Category(0, 0, "a", True), Category(1, 5, "b", False)]


def test_a_given_class_table_is_used_or_the_difference_named(dataset, data):
    table = [Category(0, 56, "grass", False), Category(4, 1, "cat"), Category(5, 2, "hen"), Category(6, 23, "dog"),
             Category(7, 24, "sky", False)]
    opened = dataset(data, categories=table)
    assert opened.categories == table and opened.num_classes == 8
    assert opened.target(0)["labels"].tolist() == [4, 0, 6, 4]
    with pytest.raises(ValueError, match=r"panoptic_val2017.json: categories 1 'cat' \(thing\), 56 'grass' \(stuff\) are "
                                         r"not in the class table.*1 'cat' \(stuff\).*same ids and names"):
        dataset(data, categories=[Category(0, 1, "cat", False), *table[2:]])


def test_images_without_segments_are_kept(dataset, data, capsys):
    image, target = dataset(data)[1]
    assert image.size == (50, 40) and target["image_id"].tolist() == [5] and target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 40, 50) and target["masks"].dtype == torch.bool
    assert all(target[key].shape == (0,) for key in ("labels", "area", "iscrowd"))
    capsys.readouterr()
    del data["annotations"][:2]
    assert dataset(data).target(2)["masks"].shape == (0, 40, 50)
    capsys.readouterr()
    opened = dataset(data, transforms=make_transforms("train", Preprocessing(32, 64)))
    said = capsys.readouterr().out
    assert "3 images (2 without segments, kept)" in said
    assert "2 images without a row in 'annotations', taken as without segments (image id 5, 7)" in said
    images, targets = next(iter(DataLoader(opened, batch_size=3, collate_fn=collate)))
    assert images.tensors.shape[0] == 3 and targets[2]["masks"].shape[0] == 0 and targets[2]["boxes"].shape == (0, 4)
    data["annotations"] = []
    assert len(dataset(data).target(0)["labels"]) == 0


def test_masks_are_left_out_where_not_asked_for_and_boxes_are_not(dataset, data):
    with_masks, without = dataset(data).target(0), dataset(data, return_masks=False).target(0)
    assert set(with_masks) - set(without) == {"masks"}
    assert all(torch.equal(value, with_masks[key]) for key, value in without.items())


def test_iscrowd_and_area_may_be_missing(dataset, data, capsys):
    for row in data["annotations"][2]["segments_info"]:
        del row["iscrowd"]
    del data["annotations"][2]["segments_info"][1]["area"]
    target = dataset(data).target(0)
    assert target["iscrowd"].tolist() == [0] * 4 and target["area"].tolist() == [432, 20 * 64 - 210, 5, 209.5]
    assert "1 segment without 'area', which becomes the number of pixels" in capsys.readouterr().out


@pytest.mark.parametrize("count", [255, 256, 700])
def test_many_segments(dataset, data, png, count):
    ids = np.zeros((48, 64), dtype=np.int64)
    ids.flat[:4 * count] = np.random.RandomState(0).permutation(np.repeat(np.arange(1, count + 1) * 23 + 65536, 4))
    save_png(png, ids)
    data["annotations"][2]["segments_info"] = [segment((k + 1) * 23 + 65536, 1, 4) for k in range(count)]
    target = dataset(data).target(0)
    listed = np.arange(1, count + 1) * 23 + 65536
    assert torch.equal(target["masks"], torch.from_numpy(ids == listed[:, None, None]))


def test_alpha_is_ignored(dataset, data, png):
    opened = dataset(data)
    before = opened.target(0)["masks"]
    picture = Image.open(png).convert("RGBA")
    picture.putalpha(Image.effect_noise(picture.size, 90))
    picture.save(png)
    assert torch.equal(opened.target(0)["masks"], before)


def test_ids_are_read_as_they_were_written(tmp_path):
    ids = np.random.RandomState(0).randint(0, 1 << 24, (37, 53))
    ids[0, :2] = 0, (1 << 24) - 1
    save_png(tmp_path / "a.png", ids)
    assert (read_ids(tmp_path / "a.png") == ids).all()
    assert (np.asarray(Image.open(io.BytesIO(encode_ids(ids)))).astype(int) @ [1, 256, 65536] == ids).all()


def test_targets_are_the_callers_own(dataset, data):
    opened = dataset(data)
    for key in ("labels", "boxes", "area", "orig_size", "masks"):
        opened.target(0)[key].zero_()
    assert opened.target(0)["labels"].tolist() == [0, 3, 1, 0] and opened.target(0)["area"][0] == 432
    assert opened.target(0)["orig_size"].tolist() == [48, 64] and opened.target(0)["masks"].sum() > 0
    assert len(opened.coco.anns) == 4
    sent = pickle.dumps(opened)                                                 # what each spawned worker receives
    assert len(sent) < 10_000 and torch.equal(pickle.loads(sent).target(0)["masks"], opened.target(0)["masks"])


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_images_and_segments_are_the_same_bits(dataset, data, tmp_path, workers):
    """With no file left to read; image 5 has no PNG."""
    del data["annotations"][1]
    transforms = make_transforms("val", Preprocessing(48, 64))
    plain = dataset(data, transforms=transforms)
    want = [plain[i] for i in range(3)]
    cached = dataset(data, transforms=transforms, cache_mode=True)
    for folder in (tmp_path / "coco" / "val2017", tmp_path / "panoptic" / "panoptic_val2017"):
        for path in folder.iterdir():
            path.unlink()
    found = list(DataLoader(cached, None, num_workers=workers))
    for (image, target), (other, other_target) in zip(want, found, strict=True):
        assert torch.equal(image, other)
        assert all(torch.equal(value, other_target[key]) for key, value in target.items())
    with pytest.raises(FileNotFoundError, match=r"a\.jpg is not there"):
        plain[0]
    with pytest.raises(FileNotFoundError, match=r"a\.png \(image id 3 of .*json\) is not there; correct the name"):
        plain.target(0)


def test_things_as_instances_for_pycocotools(dataset, data, capsys):
    coco = dataset(data).coco
    capsys.readouterr()
    assert [row["name"] for row in coco.cats.values()] == ["cat", "dog"] and sorted(coco.imgs) == [3, 5, 7]
    rows = coco.loadAnns(coco.getAnnIds(imgIds=3))
    assert [(row["category_id"], row["iscrowd"], row["area"]) for row in rows] == [(1, 1, 432), (23, 0, 5), (1, 0, 210)]
    assert [row["bbox"] for row in rows] == [[40, 30, 24, 18], [2, 35, 1, 5], [10, 5, 21, 10]]
    for row, id in zip(rows, (CROWD, THIN, CAT)):
        assert (rle.decode(row["segmentation"]) == (id_map() == id)).all()
    assert len({row["id"] for row in coco.anns.values()}) == 4 and 0 not in coco.anns


# -- what is wrong ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("annotations"), "has no list 'annotations'.*'images', 'annotations' and 'categories'"),
    (lambda d: d.update(images={}), "has no list 'images'"),
    (lambda d: d.update(categories=[]), "the list 'categories' is empty"),
    (lambda d: d.update(images=[], annotations=[]), "the list 'images' is empty"),
    (lambda d: d["images"][1].update(id=7), "'images' has several rows with the same id: 7"),
    (lambda d: d["images"][1].pop("width"), r"image id 3 \(a.jpg\) has width None; a whole number of pixels"),
    (lambda d: d["images"].append(3), r"row 3 \(counted from 0\) of 'images' has no 'id'"),
    (lambda d: d["categories"][1].update(id=56), "'categories' has several rows with the same id: 56"),
    (lambda d: d["categories"][1].pop("isthing"),
     r"category id 1 \(cat\) has isthing None; 1 is needed for things, which can be counted, or 0 for stuff"),
    (lambda d: d["categories"][1].update(isthing="yes"), r"category id 1 \(cat\) has isthing 'yes'"),
    (lambda d: d["categories"][1].pop("name"), "category id 1 has no 'name'"),
    (lambda d: d["annotations"][1].pop("segments_info"),
     r"row 1 \(counted from 0\) of 'annotations' has no list 'segments_info'.*--dataset_file coco"),
    (lambda d: d["annotations"].append(1), r"row 3 \(counted from 0\) of 'annotations' has no list 'segments_info'"),
    (lambda d: d["annotations"][1].pop("image_id"), r"row 1 .*is of image id None, which 'images' does not list"),
    (lambda d: d["annotations"][1].update(image_id=4), r"row 1 .*is of image id 4, which 'images' does not list; add"),
    (lambda d: d["annotations"][1].update(image_id=3), "'annotations' has several rows of the same image id: 3; each"),
    (lambda d: d["annotations"][1].pop("file_name"), "the annotation of image id 5 has no 'file_name'; add it"),
    (lambda d: d["annotations"][2]["segments_info"][1].pop("id"),
     "the annotation of image id 3 has a segment whose id is not a whole number from 1 to 16777215"),
    (lambda d: d["annotations"][2]["segments_info"][1].update(id=0), "image id 3 has a segment whose id is not"),
    (lambda d: d["annotations"][2]["segments_info"][1].update(id=1 << 24), "image id 3 has a segment whose id is not"),
    (lambda d: d["annotations"][2]["segments_info"].append([]), "image id 3 has a segment whose id is not"),
    (lambda d: d["annotations"][2]["segments_info"][1].update(id=THIN),
     "the annotation of image id 3 has several segments with the same id: 12; give each its own, in the PNG too"),
    (lambda d: d["annotations"][2]["segments_info"][2].pop("category_id"), "segment id 12, has category_id None"),
    (lambda d: d["annotations"][2]["segments_info"][2].update(category_id=4),
     "image id 3, segment id 12, has category_id 4, which 'categories' does not list; its ids are 1, 23, 24, 56; "),
    (lambda d: d["annotations"][2]["segments_info"][2].update(iscrowd=2), "segment id 12, has iscrowd 2; it is 0 or 1"),
    (lambda d: d["annotations"][2]["segments_info"][2].update(area="5"), "segment id 12, has area '5'; a finite number"),
    (lambda d: d["annotations"][2]["segments_info"][2].update(area=float("inf")), "segment id 12, has area inf"),
])
def test_bad_annotations_are_named(dataset, data, change, message):
    with pytest.raises(ValueError, match=rf"panoptic_val2017\.json: .*{message}"):
        dataset(damaged(data, change))


def test_a_json_cut_short_is_located(dataset, data):
    text = json.dumps(data)
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json: no valid json at line 1, column \d+.*cut short"):
        dataset(text[:len(text) // 2])


def test_what_is_no_json(dataset):
    """Is said as of a json of instances."""
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json: no valid json, but Git LFS's pointer.*git lfs pull"):
        dataset("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json: no valid json.*again"):
        dataset("[" * 200_000)


def test_missing_folders_and_files_are_named_with_the_layout(dataset, data, tmp_path, png):
    dataset(data)
    coco, panoptic = tmp_path / "coco", tmp_path / "panoptic"
    with pytest.raises(ValueError, match=r"needs --coco_panoptic_path.*\n.*\n.*panoptic_train2017/  panoptic_val2017/"):
        build_coco_panoptic("val", coco, None)
    with pytest.raises(FileNotFoundError, match=r"--coco_path .*nowhere: there is no such folder.*\n.*train2017/"):
        build_coco_panoptic("val", tmp_path / "nowhere", panoptic)
    with pytest.raises(FileNotFoundError, match=r"--coco_panoptic_path .*nowhere: there is no such folder.*\n"):
        build_coco_panoptic("val", coco, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"image folder .*train2017 is not there"):
        build_coco_panoptic("train", coco, panoptic)
    (coco / "train2017").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder of panoptic PNGs .*panoptic_train2017 is not there.*\n"):
        build_coco_panoptic("train", coco, panoptic)
    (panoptic / "panoptic_train2017").mkdir()
    with pytest.raises(FileNotFoundError, match=r"annotations .*panoptic_train2017\.json are not there. COCO.s panoptic"):
        build_coco_panoptic("train", coco, panoptic)
    png.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the PNGs that .*panoptic_val2017\.json lists are not in "
                                                r".*panoptic_val2017: a.png \(image id 3\); copy them there"):
        dataset(data)
    (coco / "val2017" / "b.jpg").unlink()
    save_png(png, id_map())
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images.*b.jpg \(image id 7\)"):
        dataset(data)


NAMED = r"panoptic PNG .*a\.png \(image id 3 of .*panoptic_val2017\.json\) "


def test_segments_that_only_png_or_json_has_are_named(dataset, data, png):
    opened = dataset(damaged(data, lambda d: d["annotations"][2]["segments_info"].pop(0)))
    with pytest.raises(ValueError, match=NAMED + rf"has 1 segment id that 'segments_info' does not list: {CROWD} "
                                                 r"\(432 pixels\); list them, or make these pixels void"):
        opened[0]
    assert len(opened[2][1]["labels"]) == 1                                 # other images are as good as before
    opened = dataset(damaged(data, lambda d: d["annotations"][2]["segments_info"].insert(1, segment(99, 1, 1))))
    with pytest.raises(ValueError, match=NAMED + "has no pixel of 1 segment that 'segments_info' lists: id 99; take"):
        opened.target(0)
    opened = dataset(damaged(data, lambda d: d["annotations"][2].update(segments_info=[])))
    with pytest.raises(ValueError, match=NAMED + rf"has 4 segment ids .*: 12 \(5 pixels\), {CROWD} "):
        opened.target(0)


def test_sizes_that_disagree_are_named(dataset, data, tmp_path, png):
    opened = dataset(data)
    save_png(png, id_map().T)
    with pytest.raises(ValueError, match=NAMED + "has 48 x 64 pixels, but the json says 64 x 48; resize it.*nearest"):
        opened.target(0)
    save_png(png, id_map())
    Image.new("RGB", (63, 48)).save(tmp_path / "coco" / "val2017" / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg has 63 x 48 pixels.*json says 64 x 48 for image id 3"):
        opened[0]


@pytest.mark.parametrize("mode, depth, kind", [("L", 8, "grey"), ("1", 1, "grey"), ("P", 8, "palette"),
                                               ("I;16", 16, "grey"), ("LA", 8, "grey with alpha")])
def test_a_png_of_another_kind_is_refused(dataset, data, png, mode, depth, kind):
    opened = dataset(data)
    picture = Image.open(png)
    (Image.fromarray(id_map().astype(np.uint16)) if mode == "I;16" else picture.convert(mode)).save(png)
    with pytest.raises(ValueError, match=NAMED + rf"is a {kind} PNG with {depth} bits? a channel, but RGB with 8 is "
                                                 r"needed, where R \+ 256 G \+ 256² B is the id"):
        opened.target(0)


def test_a_png_of_16_bit_rgb_is_refused(dataset, data, png):
    """Pillow would read it as 8 bits, and say nothing of the rest."""
    opened, content = dataset(data), bytearray(png.read_bytes())
    content[24] = 16
    png.write_bytes(content)
    with pytest.raises(ValueError, match=NAMED + "is a RGB PNG with 16 bits a channel"):
        opened.target(0)


def test_a_png_that_cannot_be_read_is_named(dataset, data, png):
    opened = dataset(data)
    whole = png.read_bytes()
    png.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(OSError, match=NAMED + r"\(\d+ bytes\) cannot be read.*cut short, copy it again"):
        opened[0]
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(png, format="JPEG")
    with pytest.raises(OSError, match=NAMED + r"\(\d+ bytes\) is no PNG; copy it again, or write it anew as PNG"):
        opened[0]
    png.write_bytes(b"")
    with pytest.raises(OSError, match=NAMED + r"\(0 bytes\) is no PNG"):
        opened[0]


def test_annotations_alone_need_no_images(dataset, data, tmp_path):
    dataset(data)
    alone = PanopticAnnotations(tmp_path / "panoptic" / "panoptic_val2017",
                                tmp_path / "panoptic" / "annotations" / "panoptic_val2017.json")
    assert alone.ids == [3, 5, 7] and alone.segments(0).ids.tolist() == [CROWD, GRASS, THIN, CAT]
    assert np.unique(alone.numbers(0)).tolist() == [0, 1, 2, 3, 4] and (alone.numbers(0)[id_map() == CAT] == 4).all()
