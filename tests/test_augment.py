"""Augmentation: what can be switched off and on, that boxes, masks, areas and ignore regions stay together with the
pixels, that sizes are known beforehand, and the list that says what is active."""
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from datasets.augment import Mosaic, labels_of
from datasets.drawn import Draw, Drawn, drawn_sizes
from datasets.images import height_width
from datasets.sampler import TrainingBatches
from datasets.transforms import (
    BoxesToFractions,
    ColorJitter,
    Normalize,
    Preprocessing,
    RandomHorizontalFlip,
    RandomSizeCrop,
    ScaleJitter,
    ToTensor,
    crop,
    describe,
    eval_transforms,
    hflip,
    make_transforms,
    pad,
    resize,
    train_transforms,
)
from detr.boxes import box_area, masks_to_boxes
from detr.structures import Category

SIZES = [(60, 90), (90, 60), (75, 75), (40, 120), (64, 80), (51, 50)]


class Rectangles(Dataset):
    """Noise with white rectangles as objects and a grey one, which is an ignore region; never one on another. Every
    channel shows them."""

    def __init__(self, kind="RGB", sizes=SIZES):
        self.sizes, self.kind, self.transforms = sizes, kind, None
        self.categories, self.num_classes = [Category(0, 5, "ring"), Category(1, 9, "left shoe")], 2

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return self.image(i), self.target(i)

    def corners(self, i):
        height, width = self.sizes[i]
        return [(3 + i, 4, width // 3, height // 2), (width // 2, height // 2, width - 5, height - 3 - i),
                (width // 2 + 2, 2, width - 2, height // 3)]

    def image(self, i):
        pixels = np.random.RandomState(i).randint(0, 60, (*self.sizes[i], 5)).astype(np.uint8)
        for (left, top, right, bottom), value in zip(self.corners(i), (255, 255, 160)):
            pixels[top:bottom, left:right] = value
        if self.kind == "tensor":
            return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return Image.fromarray(pixels[..., 0] if self.kind == "L" else pixels[..., :3])

    def target(self, i):
        *objects, ignore = self.corners(i)
        boxes = torch.tensor(objects, dtype=torch.float32)
        masks = torch.zeros(2, *self.sizes[i], dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, objects):
            mask[top:bottom, left:right] = True
        return {"image_id": torch.tensor([i]), "boxes": boxes, "labels": torch.tensor([0, i % 2]), "masks": masks,
                "area": box_area(boxes), "iscrowd": torch.zeros(2, dtype=torch.int64),
                "ignore": torch.tensor([ignore], dtype=torch.float32), "size": torch.tensor(self.sizes[i]),
                "orig_size": torch.tensor(self.sizes[i])}


def pixels_of(image):
    """``[H, W]`` uint8 of the first channel."""
    return image[0] if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image.getchannel(0)))


def together(image, target, grown=1.0):
    """Boxes are where pixels are white and masks lie, regions where pixels are grey, to ``grown`` pixels; nothing else
    is white or grey."""
    pixels = pixels_of(image)
    height, width = pixels.shape
    assert target["size"].tolist() == [height, width] and len({len(target[n]) for n in ("boxes", "labels", "masks")}) == 1
    assert target["masks"].shape[1:] == (height, width)
    assert (target["boxes"] >= 0).all() and (target["boxes"] <= torch.tensor([width, height] * 2)).all()
    for box, mask in zip(target["boxes"], target["masks"]):
        if mask.any():                              # a mask, by nearest pixel, can lose a box less than a pixel wide
            inclusive = masks_to_boxes(mask[None])[0] + torch.tensor([0.0, 0, 1, 1])
            assert (inclusive - box).abs().max() <= grown, (inclusive, box)
        else:
            assert (box[2:] - box[:2]).min() <= 1
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")

    def inside(boxes, by):
        """Pixels within the boxes, these grown or shrunk by so much."""
        found = torch.zeros(height, width, dtype=torch.bool)
        for left, top, right, bottom in boxes.tolist():
            found |= (x > left - by) & (x < right + by) & (y > top - by) & (y < bottom + by)
        return found

    for name, low, high in (("boxes", 215, 255), ("ignore", 110, 200)):
        assert not ((pixels > 215) & ~inside(target["boxes"], 2)).any()
        core = inside(target[name], -2)
        assert ((pixels[core] >= low) & (pixels[core] <= high)).float().mean() > 0.99 or not core.any(), name
    assert not ((pixels > 110) & ~inside(torch.cat([target["boxes"], target["ignore"]]), 2)).any()


@pytest.mark.parametrize("kind", ["RGB", "L", "tensor"])
@pytest.mark.parametrize("step", [
    hflip, lambda *given: crop(*given, (9, 7, 30, 40)), lambda *given: resize(*given, (47, 101)),
    lambda *given: pad(*given, (5, 9)), RandomSizeCrop(20, 45), ScaleJitter(50, 80, 0.3, 2.0)],
    ids=["hflip", "crop", "resize", "pad", "random crop", "scale jitter"])
def test_everything_stays_together(step, kind):
    data = Rectangles(kind)
    torch.manual_seed(0)
    for i in range(len(data)):
        image, target = data[i]
        before = {name: x.clone() for name, x in target.items()}
        together(image, target)
        together(*step(image, target))
        assert all(torch.equal(target[name], before[name]) for name in before)              # not changed in place


def test_ignore_regions_by_their_definition():
    image, target = Image.new("RGB", (100, 50)), {"ignore": torch.tensor([[10.0, 5, 40, 30], [80, 40, 90, 50]])}
    assert hflip(image, target)[1]["ignore"].tolist() == [[60, 5, 90, 30], [10, 40, 20, 50]]
    assert crop(image, target, (10, 20, 30, 50))[1]["ignore"].tolist() == [[0, 0, 20, 20]]          # one is cut, one gone
    assert crop(image, target, (10, 40, 30, 30))[1]["ignore"].shape == (0, 4)                       # its edge has no area
    assert resize(image, target, (100, 50))[1]["ignore"].tolist() == [[5, 10, 20, 60], [40, 80, 45, 100]]
    assert torch.equal(pad(image, target, (7, 3))[1]["ignore"], target["ignore"])
    fractions = BoxesToFractions()(torch.zeros(3, 50, 100), target)[1]["ignore"]
    torch.testing.assert_close(fractions, torch.tensor([[0.25, 0.35, 0.3, 0.5], [0.85, 0.9, 0.1, 0.2]]))
    boxes = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1]), **target}
    cut = crop(image, boxes, (10, 20, 30, 50))[1]
    assert len(cut["boxes"]) == len(cut["labels"]) == 0 and len(cut["ignore"]) == 1                  # each for itself


def test_without_augmentation_training_gets_what_evaluation_gets():
    data = Rectangles()
    for preprocessing in (Preprocessing(48, 70), Preprocessing((40, 56), None)):
        for i in range(len(data)):
            torch.manual_seed(i)
            image, target = make_transforms("train", preprocessing, aug="none", no_flip=(1,), least_scale=0.3)(*data[i])
            wanted, expected = make_transforms("val", preprocessing)(*data[i])
            assert torch.equal(image, wanted)
            assert target.keys() == expected.keys() and all(torch.equal(target[n], expected[n]) for n in target)
    published = make_transforms("train", Preprocessing(48, 70))(*data[0])
    assert published[0].shape != image.shape or not torch.equal(published[0], image)


@pytest.mark.parametrize("options, message", [
    ({"aug": "nothing"}, "--aug 'nothing' is not one of published, none"),
    ({"aug": "none", "color_jitter": 0.3}, "--aug none and --color_jitter.*leave one of them out"),
    ({"aug": "none", "scale_jitter": (0.1, 2.0)}, "--aug none and --scale_jitter"),
    ({"color_jitter": -0.1}, "--color_jitter -0.1: a strength from 0"), ({"color_jitter": 1.5}, "to 1 is needed"),
    ({"scale_jitter": (2.0, 0.1)}, "--scale_jitter 2.0 0.1: the least and the greatest"),
    ({"scale_jitter": (0.0, 1.0)}, "above 0, such as 0.1 2"),
    ({"preprocessing": Preprocessing(mean=(0.5,) * 5, std=(0.2,) * 5), "color_jitter": 0.3},
     "--color_jitter 0.3 is for RGB and grey images, and these have 5 channels; leave it out")])
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_transforms("train", **options)


def test_flips_can_be_forbidden_for_classes():
    flip, image = RandomHorizontalFlip(no_flip=(4, 7)), Image.new("RGB", (10, 4))
    box = torch.tensor([[0.0, 0, 3, 4]])

    def flipped(*labels):
        torch.manual_seed(1)
        targets = [flip(image, {"boxes": box, "labels": torch.tensor(labels)})[1] for _ in range(60)]
        return sum(float(target["boxes"][0, 0]) == 7 for target in targets)

    assert flipped(7) == flipped(1, 4) == 0 and 15 < flipped(1) == flipped(1, 2) < 45
    assert all(flip(image, {})[0] is not None for _ in range(4))                            # without ground truth
    for labels in ([7], [1]):                               # what is drawn afterwards is the same
        torch.manual_seed(2)
        flip(image, {"boxes": box, "labels": torch.tensor(labels)})
        after = torch.rand(3)
        torch.manual_seed(2)
        torch.rand(())
        assert torch.equal(torch.rand(3), after)
    assert "RandomHorizontalFlip" not in str(make_transforms("train", flip=False))
    categories = [Category(4, 40, "left shoe"), Category(7, 70, "right shoe"), Category(1, 10, "ring")]
    assert labels_of(["right shoe", "left shoe"], categories) == (7, 4)
    with pytest.raises(ValueError, match="--no_flip_classes left sho: the data has no class .*did you mean 'left shoe'"):
        labels_of(["left sho"], categories)


def test_scale_jitter_by_its_definition():
    """The frame has one size, the factor is uniform, and a smaller image is padded on the right and below."""
    step = ScaleJitter(40, None, 0.5, 1.5)
    white = Image.new("RGB", (120, 80), (255, 255, 255))                                            # frame: 40 x 60
    torch.manual_seed(0)
    factors = []
    for _ in range(400):
        image, target = step(white, {"boxes": torch.tensor([[0.0, 0, 120, 80]])})
        assert image.size == (60, 40) and target["size"].tolist() == [40, 60]
        box = target["boxes"][0].tolist()
        seen = pixels_of(image) > 250
        width, height = int(seen.any(0).sum()), int(seen.any(1).sum())
        assert box == pytest.approx([0, 0, width, height]) and seen[:height, :width].all()
        factors.append(box[2] / 60)
    smaller = torch.tensor(factors)
    assert 0.42 < (smaller < 1).float().mean() < 0.58 and 0.5 <= smaller.min() < 0.55
    assert abs(smaller[smaller < 1].mean() - 0.75) < 0.03
    double, corner = ScaleJitter(40, None, 2, 2), {"boxes": torch.tensor([[0.0, 0, 60, 40]])}       # its first quarter
    assert len({tuple(double(white, corner)[1]["boxes"].flatten().tolist()) for _ in range(20)}) > 10


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_is_torchvisions(channels):
    image = torch.rand(channels, 12, 15)
    torch.manual_seed(3)
    found, _ = ColorJitter(0.4)(image, {})
    torch.manual_seed(3)
    assert torch.equal(found, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(image))
    assert not torch.equal(found, image) and found.min() >= 0 and found.max() <= 1
    with pytest.raises(ValueError, match="5 channels: colours .*leave --color_jitter out"):
        ColorJitter(0.4)(torch.rand(5, 4, 4), {})


def test_colour_changes_no_box_and_no_size():
    data = Rectangles()
    for i in range(len(data)):
        items = []
        for strength in (0.0, 0.5):
            torch.manual_seed(i)
            items.append(make_transforms("train", Preprocessing(48, 70), color_jitter=strength)(*data[i]))
        (plain, target), (coloured, same) = items
        assert plain.shape == coloured.shape and not torch.equal(plain, coloured)
        assert all(torch.equal(target[name], same[name]) for name in target)


# Mosaics.

@pytest.mark.parametrize("kind", ["RGB", "L", "tensor"])
def test_mosaics_keep_everything_together(kind):
    data = Rectangles(kind)
    mosaics = Mosaic(data, None)
    torch.manual_seed(0)
    several = 0
    for _ in range(5):
        for i in range(len(data)):
            image, target = mosaics[i]
            assert height_width(image) == data.sizes[i] and type(image) is type(data.image(i))
            assert target["image_id"].tolist() == [i] and target["orig_size"].tolist() == list(data.sizes[i])
            together(image, target, 1.5)
            several += len(target["boxes"]) > 2
            torch.rand(1)                                                       # as transforms would, on to other numbers
    assert several > 20


def test_a_mosaic_has_four_different_images():
    class Plain(Rectangles):
        def image(self, i):
            return Image.new("L", self.sizes[i][::-1], 40 * i + 20)

    data = Plain("L", [(60 + 2 * i, 80) for i in range(6)])
    torch.manual_seed(0)
    meetings = set()
    for seed in range(30):
        image, _ = Drawn(Mosaic(data, None))[Draw(2, seed)]
        pixels = np.array(image)
        corners = [int(pixels[y, x]) for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1))]
        assert len(set(corners)) == 4 == len(np.unique(pixels)) and 100 in corners
        y, x = (int((pixels[:, 0] == corners[0]).sum()), int((pixels[0] == corners[0]).sum()))
        assert 0.3 * 64 - 1 <= y <= 0.7 * 64 + 1 and 0.3 * 80 - 1 <= x <= 0.7 * 80 + 1
        assert (pixels[:y, :x] == corners[0]).all() and (pixels[y:, x:] == corners[3]).all()        # no gap, no black
        meetings |= set(corners)
    assert len(meetings) == 6


def test_parts_of_mosaics_keep_their_proportions():
    """Red counts columns and green rows: both grow alike, and begin at random."""
    class Ramps(Rectangles):
        def image(self, i):
            height, width = self.sizes[i]
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            return torch.stack([2 * x, 2 * y, torch.full_like(x, i), x, x]).byte()

    data, places = Ramps("tensor", [(60, 120), (120, 50), (100, 100), (90, 120), (110, 70)]), set()
    for seed in range(20):
        image, _ = Drawn(Mosaic(data, None))[Draw(3, seed)]
        for i in image[2].unique().tolist():
            rows, columns = ((image[2] == i).any(d).sum() for d in (1, 0))
            (y, x), (last_y, last_x) = (image[2] == i).nonzero()[[0, -1]].tolist()
            (red, green), (last_red, last_green) = image[:2, y, x].tolist(), image[:2, last_y, last_x].tolist()
            along, down = (last_red - red) / (columns - 1), (last_green - green) / (rows - 1)
            assert abs(along / down - 1) < 0.12, (i, along, down)
            places.add((i, red > 12, green > 12))
    assert {place[1:] for place in places} >= {(False, False), (True, False), (False, True)}


def test_small_and_odd_images_make_mosaics():
    for sizes in ([(1, 1)] * 4, [(1, 3000), (50, 1), (2, 2)], [(300, 2)]):
        class Empty(Rectangles):
            def image(self, i):
                return Image.new("RGB", self.sizes[i][::-1], (9, 9, 9))

            def target(self, i):
                return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "area": torch.zeros(0)}

        data = Mosaic(Empty(sizes=sizes), None)
        for i in range(len(data)):
            image, target = data[i]
            assert image.size == sizes[i][::-1] and target["boxes"].shape == (0, 4) and np.array(image).min() == 9
    one = Mosaic(Rectangles(), lambda image, target: (image, target))
    one.dataset.image = lambda i: Image.new("RGB" if i else "L", SIZES[i][::-1])
    with pytest.raises(ValueError, match="--mosaic puts images together, and one has mode"):
        for _ in range(4):
            one[0]


def test_the_probability_of_a_mosaic():
    data = Rectangles()
    drawn = Drawn(Mosaic(data, None, 0.3))
    whole = sum(torch.equal(drawn[Draw(4, seed)][1]["boxes"], data.target(4)["boxes"]) for seed in range(200))
    assert 0.6 < whole / 200 < 0.8
    for wrong in (0, 1.2):
        with pytest.raises(ValueError, match=f"--mosaic {wrong}: a probability"):
            Mosaic(data, None, wrong)
    data.transforms = eval_transforms()
    with pytest.raises(ValueError, match="has transforms of its own.*transforms=None"):
        Mosaic(data, None)


OPTIONS = {"mosaic": {}, "all": {"color_jitter": 0.3, "scale_jitter": (0.2, 1.8), "no_flip": (1,)}}


@pytest.mark.parametrize("name", OPTIONS)
def test_sizes_are_known_beforehand(name):
    transforms = make_transforms("train", Preprocessing(40, 66), **OPTIONS[name])
    data = Mosaic(Rectangles(), transforms)
    draws = [Draw(i, seed) for i in range(len(data)) for seed in range(4)]
    sizes = [tuple(Drawn(data)[draw][0].shape[-2:]) for draw in draws]
    assert sizes == drawn_sizes(transforms, [data.sizes[draw.image] for draw in draws], [draw.seed for draw in draws])
    assert len(set(sizes)) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_mosaics(workers):
    """Bucketed batches of a loader against items got one by one, from a copy; the global generator stays as it was."""
    transforms = make_transforms("train", Preprocessing(32, 48), **OPTIONS["all"])
    data = Mosaic(Rectangles(), transforms)
    copy = pickle.loads(pickle.dumps(Drawn(data)))
    sampler = TrainingBatches(data.sizes, transforms, 2, seed=3)
    batches = list(DataLoader(Drawn(data), batch_sampler=sampler, num_workers=workers, collate_fn=list))
    state = torch.get_rng_state()
    for batch, draws in zip(batches, sampler, strict=True):
        for (image, target), draw in zip(batch, draws):
            again, expected = copy[draw]
            assert torch.equal(image, again) and all(torch.equal(target[n], expected[n]) for n in target)
    assert torch.equal(torch.get_rng_state(), state) and data.num_classes == 2 and data.categories[1].name == "left shoe"


def test_mosaics_differ_from_epoch_to_epoch_without_draws():
    data = Mosaic(Rectangles(), make_transforms("train", Preprocessing(40, 66), aug="none"))
    torch.manual_seed(0)
    items = [data[1][0] for _ in range(6)]
    assert len({item.sum().item() for item in items}) == 6
    torch.manual_seed(0)
    assert all(torch.equal(data[1][0], item) for item in items)


# The list of what is active.

def test_the_list():
    assert describe(make_transforms("train")) == [
        "left-right flip of 50% of the images",
        "50% resize, short side 480 to 800 (11 of them), long side 1333 at most; or 50% resize, short side 400, 500 or "
        "600, then crop to sides of 384 to 600 pixels, at any place; objects are cut at the edges, then resize, short "
        "side 480 to 800 (11 of them), long side 1333 at most",
        "numbers from 0 to 1", "minus the mean 0.485 0.456 0.406, by the standard deviation 0.229 0.224 0.225",
        "boxes as fractions of the image"]
    none = describe(make_transforms("train", aug="none"))
    assert none == describe(eval_transforms()) and none[0] == "resize, short side 800, long side 1333 at most"
    exact = describe(make_transforms("train", Preprocessing((40, 60)), crop=False, flip=False))
    assert exact[0] == "resize, height 40, width 60"
    strong = describe(train_transforms(no_flip=(3, 5), color_jitter=0.4, scale_jitter=(0.1, 2.0)), {3: "left shoe"})
    assert strong[0].endswith("never with left shoe or label 5") and "times 0.1 to 2; then crop or pad" in strong[1]
    assert strong[3] == "colours: brightness, contrast and saturation by up to 40%, hue by up to 36 degrees"
    mosaic, *rest = describe(Mosaic(Rectangles(), train_transforms(no_flip=[1]), 0.5), {1: "left shoe"})
    assert mosaic.startswith("mosaic of an image and three others, for 50%") and rest[0].endswith("with left shoe")
    data = Rectangles()
    assert describe(data) == []
    data.transforms = eval_transforms()
    assert describe(data) == none
    assert describe(None) == [] and describe(v2.Compose([v2.Grayscale()])) == ["Grayscale(num_output_channels=1)"]


def test_every_step_of_the_lists_has_words():
    for transforms in (train_transforms(color_jitter=0.1, scale_jitter=(0.5, 1)), train_transforms(), eval_transforms()):
        assert not any("(" in line and "=" in line for line in describe(transforms))
    assert describe(v2.Compose([ToTensor(), Normalize()]))[1].startswith("minus the mean")
