"""datasets/drawn.py: the sizes that are told beforehand are those that images have once they are read, in whichever
process; and nobody else's randomness changes."""
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import make_rectangles
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from datasets.coco import CocoDetection
from datasets.drawn import Draw, Drawn, SizeOnly, drawn_sizes
from datasets.images import height_width
from datasets.sampler import TrainingBatches
from datasets.transforms import Preprocessing, ToTensor, make_transforms, train_transforms

TRANSFORMS = {
    "published": train_transforms(),
    "no crop": train_transforms(crop=False),
    "exact size": make_transforms("train", Preprocessing((96, 160))),
    "tiny": make_transforms("train", Preprocessing(32, 48)),
    "one scale": make_transforms("train", Preprocessing(64, None), scales=(64,), flip=False),
}
SIZES = [(480, 640), (640, 480), (427, 640), (33, 37), (500, 375), (300, 900), (1, 1), (64, 64), (350, 351), (17, 90)]


@pytest.fixture(params=TRANSFORMS)
def transforms(request):
    return TRANSFORMS[request.param]


class Blank(Dataset):
    """Black images of these sizes, in the kinds that readers give: PIL RGB, PIL grey, tensors."""

    def __init__(self, sizes, transforms, kind="RGB"):
        self.sizes, self.transforms, self.kind = sizes, transforms, kind

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        height, width = self.sizes[i]
        if self.kind == "tensor":
            image = torch.zeros(3, height, width, dtype=torch.uint8)
        else:
            image = Image.new(self.kind, (width, height))
        boxes = torch.tensor([[0.0, 0.0, width / 2, height]])
        return self.transforms(image, {"boxes": boxes, "labels": torch.tensor([1]), "image_id": torch.tensor([i]),
                                       "masks": torch.ones(1, height, width, dtype=torch.bool)})


def spatial(item):
    return tuple(item[0].shape[-2:])


def draws_for(count, seed=0):
    chance = random.Random(seed)
    return [Draw(i, chance.randrange(2**32)) for i in range(count)]


def told(dataset, draws):
    return drawn_sizes(dataset.transforms, [dataset.sizes[draw.image] for draw in draws], [draw.seed for draw in draws])


@pytest.mark.parametrize("kind", ["RGB", "tensor"])
def test_sizes_are_those_of_the_images(transforms, kind):
    dataset = Blank(SIZES, transforms, kind)
    draws = [draw for seed in range(2) for draw in draws_for(len(SIZES), seed)]
    items = [Drawn(dataset)[draw] for draw in draws]
    assert list(map(spatial, items)) == told(dataset, draws)
    assert [int(target["image_id"]) for _, target in items] == [draw.image for draw in draws]


def test_grey_images():
    dataset = Blank(SIZES, make_transforms("train", Preprocessing(48, 64, (0.5,), (0.2,))), "L")
    draws = draws_for(len(SIZES))
    assert [spatial(Drawn(dataset)[draw]) for draw in draws] == told(dataset, draws)


@pytest.mark.parametrize("channels", [3, 5])
def test_files(tmp_path, transforms, channels):
    if channels == 5:
        transforms = make_transforms("train", Preprocessing(40, 50, (0.5,) * 5, (0.2,) * 5))
    make_rectangles(tmp_path, channels=channels)
    data = CocoDetection(tmp_path / "train2017", tmp_path / "annotations" / "instances_train2017.json", transforms,
                         channels=channels)
    draws = draws_for(len(data))
    assert [spatial(Drawn(data)[draw]) for draw in draws] == told_of_files(data, draws)


def told_of_files(data, draws):
    return drawn_sizes(data.transforms, [tuple(data.sizes[draw.image].tolist()) for draw in draws],
                       [draw.seed for draw in draws])


@pytest.mark.parametrize("name", ["published", "no crop", "tiny"])
def test_photographs(real_data, name):
    folder = real_data / "coco_mini"
    data = CocoDetection(folder / "train2017", folder / "annotations" / "instances_train2017.json", TRANSFORMS[name])
    draws = draws_for(len(data), seed=1)[:12 if name != "tiny" else None]
    sizes = [spatial(Drawn(data)[draw]) for draw in draws]
    assert sizes == told_of_files(data, draws) and len(set(sizes)) > 5


def same_items(a, b):
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_draw_the_same(workers):
    """Pixels, too: batches of a loader against items that are got one by one, in another order, from a copy such as
    workers that are started anew are sent."""
    transforms = TRANSFORMS["tiny"]
    dataset = Blank(SIZES * 2, transforms)
    sampler = TrainingBatches(dataset.sizes, transforms, 4, seed=3)
    loader = DataLoader(Drawn(dataset), batch_sampler=sampler, num_workers=workers, collate_fn=list)
    copy = pickle.loads(pickle.dumps(Drawn(dataset)))
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)
        batches, draws = list(loader), list(sampler)
        alone = {draw: copy[draw] for batch in reversed(draws) for draw in batch}
        assert len(batches) == len(draws) == 5
        for batch, batch_draws in zip(batches, draws):
            assert all(same_items(item, alone[draw]) for item, draw in zip(batch, batch_draws, strict=True))
            assert list(map(spatial, batch)) == told(dataset, batch_draws)


def test_items_are_those_of_the_data_set_after_the_seed():
    dataset = Blank(SIZES, TRANSFORMS["tiny"])
    for draw in draws_for(len(SIZES)):
        torch.manual_seed(draw.seed)
        assert same_items(Drawn(dataset)[draw], dataset[draw.image])
    assert len(Drawn(dataset)) == len(SIZES)


def test_the_randomness_of_others_stays(monkeypatch):
    dataset = Blank(SIZES, TRANSFORMS["tiny"])
    torch.manual_seed(5)
    expected = torch.rand(6)
    torch.manual_seed(5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were seeded"))
    found = [torch.rand(2)]
    told(dataset, draws_for(4))
    found.append(torch.rand(2))
    Drawn(dataset)[Draw(2, 7)]
    found.append(torch.rand(2))
    assert torch.equal(torch.cat(found), expected)
    state = torch.get_rng_state()
    with pytest.raises(IndexError):
        Drawn(dataset)[Draw(99, 7)]
    with pytest.raises(TypeError):
        drawn_sizes(v2.Compose([v2.Grayscale(), ToTensor()]), [(3, 3)], [0])
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_draw_independently():
    """First and second number that seeds draw: uniform, and without relation to each other or to the next image's."""
    class Numbers(Dataset):
        def __getitem__(self, i):
            return torch.rand(2)

    count = 4000
    numbers = torch.stack([Drawn(Numbers())[draw] for draw in draws_for(count)])                # [images, 2]
    cells = (numbers * 10).long()
    for a, b in ((cells[:, 0], cells[:, 1]), (cells[:-1, 0], cells[1:, 0]), (cells[:-1, 1], cells[1:, 0])):
        counts = torch.bincount(10 * a + b, minlength=100).double()
        expected = counts.sum() / 100
        assert float(((counts - expected) ** 2 / expected).sum()) < 155         # 99 degrees of freedom: 1 in 4000


def test_a_picture_without_pixels_has_the_sizes_of_one_with_pixels():
    operations = [lambda image, method=method: image.transpose(method) for method in Image.Transpose]
    operations += [lambda image: image.resize((7, 20)), lambda image: image.crop((2, 1, 9, 12))]
    for first, second in itertools.product(operations, repeat=2):
        with_pixels, without = Image.new("RGB", (12, 15)), SizeOnly(15, 12)
        for operation in (first, second):
            with_pixels, without = operation(with_pixels), operation(without)
        assert (without.size, without.width, without.height) == (with_pixels.size, *with_pixels.size)
        assert height_width(without) == height_width(with_pixels)


def test_steps_that_cannot_be_run_on_sizes_are_refused():
    for step in (v2.Grayscale(), v2.GaussianBlur(3), v2.ColorJitter(0.5), lambda image, target: np.array(image)):
        with pytest.raises(TypeError, match="reads pixels before ToTensor.*; put it behind ToTensor, or leave --bucket"):
            drawn_sizes(v2.Compose([step, ToTensor()]), [(30, 40)], [1])
    with pytest.raises(ValueError, match="have no ToTensor.*make them with datasets.transforms, or leave --bucket_train"):
        drawn_sizes(v2.Compose([v2.RandomHorizontalFlip()]), [(30, 40)], [1])
    behind = v2.Compose([*TRANSFORMS["no crop"].transforms, v2.ColorJitter(0.5)])
    assert drawn_sizes(behind, SIZES, range(len(SIZES))) == drawn_sizes(TRANSFORMS["no crop"], SIZES, range(len(SIZES)))
    assert drawn_sizes(behind, [], []) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_numpys_and_pythons_generators_follow_from_the_draw_too(workers):
    """Data sets from Python may draw from any of them; those of the program are left as they were."""
    class Chance(Dataset):
        def __getitem__(self, i):
            return i, float(torch.rand(())), random.random(), float(np.random.rand())

    draws = [Draw(1, 7), Draw(2, 7), Draw(1, 8)]
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), float(np.random.rand())
    random.seed(0)
    np.random.seed(0)
    loader = DataLoader(Drawn(Chance()), batch_sampler=[[draw] for draw in draws * 2], collate_fn=list,
                        num_workers=workers)
    items = [item for item, in loader]
    assert items[:3] == items[3:] and items[0][1:] == items[1][1:]
    assert not set(items[0][1:]) & set(items[2][1:]) and len(set(items[0][1:])) == 3
    assert (random.random(), float(np.random.rand())) == expected
