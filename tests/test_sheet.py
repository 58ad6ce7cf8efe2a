"""The sheet of pictures of a training set: what it hands to the drawing function is what the data and training have."""
import numpy as np
import pytest
import torch
from PIL import Image
from small_data import annotation_file, make_rectangles, read_annotations, write_annotations
from test_augment import Rectangles, together
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets.augment import Mosaic
from datasets.coco import CocoDetection
from datasets.sheet import as_seen, hatched, picture, sheet
from datasets.transforms import BOXES, Preprocessing, make_transforms, resize
from detr import visualize

NAMES = {0: "ring", 1: "left shoe"}
DRAWING = visualize.draw_detections, visualize.side_by_side


@pytest.mark.parametrize("kind, channels", [("RGB", 3), ("L", 1), ("tensor", 5)])
def test_what_training_sees_can_be_undone(kind, channels):
    """Back to pixels and corners: those of the same steps before normalisation."""
    preprocessing = Preprocessing(48, 70, (0.4, 0.3, 0.2, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25, 0.2, 0.1)[:channels])
    data = Rectangles(kind)
    for i in range(len(data)):
        image, target = as_seen(*make_transforms("val", preprocessing)(*data[i]), preprocessing)
        expected, same = resize(*data[i], 48, 70)
        together(image, target)
        assert torch.equal(image, expected if kind == "tensor" else pil_to_tensor(expected))
        for name in ("boxes", "ignore"):
            torch.testing.assert_close(target[name], same[name], atol=1e-3, rtol=0)
        later, of_later = as_seen(*make_transforms("val", preprocessing, in_batch=True)(*data[i]), preprocessing)
        assert torch.equal(later, image) and all(torch.equal(of_later[name], target[name]) for name in BOXES)


@pytest.mark.parametrize("in_batch", [False, True])
def test_pairs_of_what_is_and_what_training_gets(in_batch):
    """All that is drawn, caught on its way: pictures, boxes, labels, masks."""
    preprocessing = Preprocessing(48, 70)
    transforms = make_transforms("train", preprocessing, in_batch=in_batch)

    class Items(Rectangles):
        def __getitem__(self, i):
            return transforms(self.image(i), self.target(i))

    data = Rectangles()
    for dataset in (Items(), Mosaic(data, transforms)):
        drawn, arranged = [], []

        def draw(image, boxes, labels, names, masks, drawn=drawn):
            assert names is NAMES and len(boxes) == len(labels) == len(masks)
            drawn.append((image, boxes, labels, masks))
            return Image.new("RGB", (4, 4))

        def arrange(rows, titles, captions, arranged=arranged):
            arranged.append((rows, titles, captions))
            return Image.new("RGB", (8, 8))

        state = torch.get_rng_state()
        sheet(dataset, preprocessing, NAMES, draw, arrange, count=3)
        assert torch.equal(torch.get_rng_state(), state)
        (rows, titles, captions), = arranged
        assert len(rows) == 3 and titles == ("as in the data", "as in training")
        assert captions == [f"image id {i}: 2 objects, 1 ignore region" for i in (0, 2, 4)]         # spread evenly
        for i, (image, boxes, _, masks) in zip((0, 2, 4), drawn[::2]):
            height, width = image.shape[-2:]
            scale = torch.tensor([width, height] * 2) / torch.tensor([*data.sizes[i][::-1]] * 2)
            torch.testing.assert_close(boxes, data.target(i)["boxes"] * scale)
            assert max(height, width) <= 640 and min(height, width) <= 420 and masks.shape[1:] == (height, width)
        first = [boxes for _, boxes, _, _ in drawn]
        drawn.clear()
        sheet(dataset, preprocessing, NAMES, draw, arrange, count=3)
        assert all(torch.equal(a, b) for a, (_, b, _, _) in zip(first, drawn))                      # the same seed
        drawn.clear()
        sheet(dataset, preprocessing, NAMES, draw, arrange, images=[5], seed=1)
        assert len(drawn) == 2 and arranged[-1][2] == ["image id 5: 2 objects, 1 ignore region"]


def test_hatches_lie_on_ignore_regions_alone():
    image = Image.new("RGB", (200, 100), (90, 90, 90))
    pixels = hatched(image, torch.tensor([[20.0, 10, 120, 70], [150, 0, 400, 30]]))
    changed = (pixels != 90).any(0)
    inside = torch.zeros(100, 200, dtype=torch.bool)
    inside[10:70, 20:120] = inside[0:30, 150:200] = True
    assert not (changed & ~inside).any() and 0.1 < changed[inside].float().mean() < 0.5
    assert set(pixels[:, changed].unique().tolist()) == {0, 255}                    # seen on dark and on bright ground
    assert (pixels[:, 10, 20:120] == 255).all() and (pixels[:, 10:70, 20] == 255).all()                     # outlines
    assert np.array(image).min() == 90                                                                  # as it was
    assert len(hatched(torch.zeros(5, 10, 10, dtype=torch.uint8), torch.tensor([[0.0, 0, 5, 5]]))) == 5


def test_a_picture_with_real_drawing(tmp_path):
    folder = make_rectangles(tmp_path / "data")
    content = read_annotations(folder, "train")
    content["annotations"][0]["iscrowd"] = 1
    write_annotations(folder, "train", content)
    data = CocoDetection(folder / "train2017", annotation_file(folder, "train"),
                         make_transforms("train", Preprocessing(64, 96)), ignore_regions=True)
    found = sheet(data, Preprocessing(64, 96), {c.label: c.name for c in data.categories}, *DRAWING, count=99)
    assert found.mode == "RGB" and found.width > 1500
    assert len(set(np.array(found).reshape(-1, 3)[::97].ravel().tolist())) > 20
    assert picture(Image.new("RGB", (30, 20)), {}, {}, visualize.draw_detections).size == (630, 420)     # no ground truth
    with pytest.raises(ValueError, match="no picture for a sheet: count 0 of 16 images"):
        sheet(data, Preprocessing(64, 96), {}, *DRAWING, count=0)
