"""datasets/transforms.py: the published numbers, the published lists, and what they must not do."""
import json

import numpy as np
import pytest
import torch
from cases import load_case
from PIL import Image
from torchvision.transforms import functional, v2

from datasets.coco import CocoDetection
from datasets.drawn import Draw, Drawn, drawn_sizes
from datasets.transforms import (
    CROP_RESIZES,
    CROP_SIZES,
    SCALES,
    BoxesToFractions,
    Normalize,
    Preprocessing,
    RandomSizeCrop,
    ToTensor,
    crop,
    eval_transforms,
    hflip,
    into_batch,
    make_transforms,
    normalisation,
    pad,
    resize,
    resized,
    train_transforms,
)
from detr.boxes import masks_to_boxes
from detr.nested_tensor import nested_tensor_from_tensor_list

PIXELS = 3 / 255            # what another JPEG decoder or resampling may do


@pytest.fixture(scope="module")
def preprocess():
    return load_case("detr_preprocess")


@pytest.fixture(scope="module")
def coco_mini(real_data):
    folder = real_data / "coco_mini"
    return CocoDetection(folder / "val2017", folder / "annotations" / "instances_val2017.json", return_masks=True)


def published_step(operation, image, target, arguments):
    """One entry of the case's ``steps``; it gives exact sizes as (width, height), this project as (height, width)."""
    if operation == "normalize":
        for step in (ToTensor(), Normalize(), BoxesToFractions()):
            image, target = step(image, target)
        return image, target
    if operation == "resize" and isinstance(arguments[0], list):
        (width, height), = arguments
        return resize(image, target, (height, width))
    return {"hflip": hflip, "crop": crop, "resize": resize, "pad": pad}[operation](image, target, *arguments)


def compare(case, name, image, target):
    expected, what = case.expected, case.spec["expected"]
    pixels = image if isinstance(image, torch.Tensor) else ToTensor()(image, {})[0]
    tolerance = PIXELS / 0.225 if isinstance(image, torch.Tensor) else PIXELS
    assert list(pixels.shape[1:]) == expected[f"{name}.image_size"].tolist(), name
    sample = pixels.flatten()[::what[f"{name}.image.sample"]["sample_of"]["stride"]]
    torch.testing.assert_close(sample, expected[f"{name}.image.sample"], atol=tolerance, rtol=0)
    torch.testing.assert_close(pixels.mean(), expected[f"{name}.image.mean"], atol=tolerance / 10, rtol=0)
    torch.testing.assert_close(pixels.std(correction=0), expected[f"{name}.image.std"], atol=tolerance / 10, rtol=0)
    for key in ("boxes", "labels", "area", "iscrowd", "orig_size", "size", "image_id"):
        assert target[key].dtype == expected[f"{name}.{key}"].dtype, (name, key)
        torch.testing.assert_close(target[key], expected[f"{name}.{key}"], atol=1e-4, rtol=1e-6, msg=f"{name} {key}")
    assert target["masks"].dtype == torch.bool and target["masks"].shape[1:] == pixels.shape[1:]
    assert target["masks"].flatten(1).sum(1).tolist() == expected[f"{name}.mask_area"].tolist(), name
    assert masks_to_boxes(target["masks"]).tolist() == expected[f"{name}.mask_boxes"].tolist(), name


@pytest.mark.parametrize("number", range(4))
def test_the_published_numbers(preprocess, coco_mini, number):
    index = coco_mini.files.index(preprocess.spec["files"][number][1])
    image, target = coco_mini[index]
    compare(preprocess, f"{number}.plain", image, target)
    compare(preprocess, f"{number}.val", *make_transforms("val")(image, target))
    for name, operations, arguments in preprocess.spec["steps"][number]:
        out = image, target
        for operation, values in zip(operations, arguments):
            out = published_step(operation, *out, values)
        compare(preprocess, f"{number}.{name}", *out)
    compare(preprocess, f"{number}.plain", image, target)                               # nothing was changed in place


@pytest.mark.parametrize("size, wanted", [
    ((480, 640), (800, 1066)),              # floors 1066.67
    ((640, 480), (1066, 800)),
    ((320, 640), (666, 1332)),              # the long side's limit: 666.5 becomes the even 666, then 2 * 666
    ((100, 1000), (133, 1330)),
    ((800, 800), (800, 800)),
    ((800, 1000), (800, 1000)),
])
def test_sizes_round_as_published(size, wanted):
    assert resized(*size, 800, 1333) == wanted


def picture(width, height):
    return Image.effect_noise((width, height), 80).convert("RGB")


def one_box(*corners, width=640, height=480):
    return {"boxes": torch.tensor([corners], dtype=torch.float32).reshape(-1, 4), "labels": torch.ones(1).long(),
            "area": torch.tensor([50.0]), "iscrowd": torch.zeros(1).long(), "size": torch.tensor([height, width])}


def test_a_crop_drops_objects_it_leaves_nothing_of_and_resets_the_area():
    target = one_box(10, 10, 60, 40)
    _, cut = crop(picture(100, 80), target, (20, 30, 60, 70))
    assert cut["boxes"].tolist() == [[0, 0, 30, 20]] and cut["area"].tolist() == [600.0]
    target["masks"] = torch.ones(1, 80, 100, dtype=torch.bool)
    _, gone = crop(picture(100, 80), target, (40, 0, 40, 100))          # touches the box's lower edge: no height left
    assert {key: len(gone[key]) for key in ("boxes", "labels", "area", "iscrowd", "masks")} == dict.fromkeys(
        ("boxes", "labels", "area", "iscrowd", "masks"), 0)
    assert gone["masks"].shape == (0, 40, 100)


def test_images_without_objects_or_without_ground_truth_pass_through_every_step():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "area": torch.zeros(0),
             "iscrowd": torch.zeros(0).long(), "masks": torch.zeros(0, 480, 640, dtype=torch.bool)}
    torch.manual_seed(0)
    for _ in range(8):
        image, target = make_transforms("train", Preprocessing(160, 256))(picture(640, 480), empty)
        assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, *image.shape[1:])
    image, target = make_transforms("val", Preprocessing(160, 256))(picture(640, 480), {})
    assert image.shape == (3, 160, 213) and target["size"].tolist() == [160, 213] and "boxes" not in target


def test_the_published_training_list():
    torch.manual_seed(3)
    sizes, mirrored, cropped, n = set(), 0, 0, 150
    transforms = train_transforms()
    to_corners = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
    for _ in range(n):
        image, target = transforms(picture(32, 24).resize((640, 480)), one_box(0, 0, 400, 480))
        height, width = image.shape[1:]
        assert target["size"].tolist() == [height, width] and max(height, width) <= 1333
        short = min(height, width)
        is_whole = (height, width) == resized(480, 640, height)
        cropped += not is_whole
        assert short in SCALES or max(height, width) > 1320, short
        sizes.add(short)
        corners = target["boxes"] @ to_corners
        assert (corners > -1e-6).all() and (corners < 1 + 1e-6).all()
        if is_whole:
            mirrored += bool(target["boxes"][0, 0] > 0.5)
    assert sizes >= set(SCALES), sorted(sizes)
    assert 0.35 < cropped / n < 0.6 and 0.3 < mirrored / (n - cropped) < 0.7


def test_crops_have_sides_within_their_range_and_within_the_image():
    torch.manual_seed(0)
    sides = []
    for _ in range(200):
        image, target = RandomSizeCrop(*CROP_SIZES)(picture(8, 8).resize((533, 400)), one_box(0, 0, 533, 400))
        assert target["size"].tolist() == [image.height, image.width]
        assert target["boxes"].tolist() == [[0, 0, image.width, image.height]]
        sides.append(image.size)
    widths, heights = zip(*sides)
    assert 384 <= min(widths) <= 392 and 525 <= max(widths) <= 533
    assert min(heights) == 384 and max(heights) == 400
    image, _ = RandomSizeCrop(384, 600)(picture(100, 50), {})               # smaller than the smallest crop: as it is
    assert image.size == (100, 50)


def test_other_sizes_scale_all_lengths_in_proportion():
    published, small = str(make_transforms("train")), str(make_transforms("train", Preprocessing(160, 267)))
    assert str(SCALES) in published and str(CROP_RESIZES) in published and "least=384, greatest=600" in published
    assert "(96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160)" in small and "(80, 100, 120)" in small
    assert "least=77, greatest=120" in small and "max_size=267" in small
    assert published == str(train_transforms())


def test_an_exact_resolution_stretches():
    exact = Preprocessing((256, 320), None)
    torch.manual_seed(0)
    for _ in range(10):
        image, target = make_transforms("train", exact)(picture(640, 480), one_box(0, 0, 640, 480))
        assert image.shape == (3, 256, 320)
        torch.testing.assert_close(target["boxes"], torch.tensor([[0.5, 0.5, 1, 1]]))
    image, target = eval_transforms(exact)(picture(300, 500), one_box(30, 50, 150, 250, width=300, height=500))
    assert image.shape == (3, 256, 320)
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.3, 0.3, 0.4, 0.4]]))
    torch.testing.assert_close(target["area"], torch.tensor([50.0 * 320 / 300 * 256 / 500]))


def test_flip_crop_and_scales_can_be_chosen():
    transforms = make_transforms("train", Preprocessing(160, 256), scales=[128], flip=False, crop=False)
    image, target = transforms(picture(64, 64), one_box(0, 0, 32, 64))
    assert image.shape == (3, 128, 128)
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.25, 0.5, 0.5, 1]]))
    assert "Random" not in str(transforms).replace("RandomResize(sizes=(128,), max_size=256)", "")
    with pytest.raises(ValueError, match="split 'test'.*'train' and 'val'"):
        make_transforms("test")


def test_a_seed_fixes_what_is_drawn():
    transforms = make_transforms("train", Preprocessing(160, 256))
    image = picture(200, 160)

    def draw(seed):
        torch.manual_seed(seed)
        return [transforms(image, one_box(20, 20, 150, 150))[0] for _ in range(4)]

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1)))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(draw(1), draw(2)))


def test_preprocessing_survives_a_checkpoint():
    for preprocessing in (Preprocessing(), Preprocessing((256, 320), None, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
                          Preprocessing(640, 800, (0.1,), (0.2,)), Preprocessing(mean=(0.5,) * 7, std=(0.2,) * 7)):
        values = preprocessing.as_dict()
        assert Preprocessing.from_dict(values) == preprocessing
        assert Preprocessing.from_dict(json.loads(json.dumps(values))) == preprocessing
    with pytest.raises(ValueError, match="needs exactly.*'sise'"):
        Preprocessing.from_dict({"sise": 800})
    old = {"size": 800, "max_size": 1333, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert Preprocessing.from_dict(old) == Preprocessing()
    for wrong in ({"size": 0}, {"size": (1, 2, 3)}, {"max_size": 0}, {"std": (0.1, 0.1, 0.0)}, {"std": (0.1,)},
                  {"std": (), "mean": ()}):
        with pytest.raises(ValueError, match="preprocessing " + next(iter(wrong)).replace("std", "mean")):
            Preprocessing(**wrong)


# Images that are tensors, because they have another number of channels.

def planes(image):
    """A PIL image as ``read_image`` would give it, were it not RGB: uint8 ``[C, H, W]``."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def with_masks(target):
    masks = torch.zeros(1, *target["size"].tolist(), dtype=torch.bool)
    left, top, right, bottom = target["boxes"][0].int().tolist()
    masks[0, top:bottom, left:right] = True
    return {**target, "masks": masks}


def same_targets(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("step", [
    lambda *given: hflip(*given), lambda *given: crop(*given, (11, 7, 40, 61)), lambda *given: pad(*given, (5, 9)),
    lambda *given: RandomSizeCrop(30, 50)(*given)], ids=["hflip", "crop", "pad", "random crop"])
def test_steps_do_the_same_to_tensors_as_to_pil_images(step):
    image, target = picture(100, 80), with_masks(one_box(10, 10, 60, 40, width=100, height=80))
    before = planes(image)
    given = before.clone()
    torch.manual_seed(1)
    want, wanted_target = step(image, target)
    torch.manual_seed(1)
    found, found_target = step(given, target)
    assert torch.equal(found, planes(want)) and same_targets(wanted_target, found_target)
    assert torch.equal(given, before)                                                   # not changed in place


@pytest.mark.parametrize("size, max_size", [(40, None), (37, 45), ((33, 90), None), (200, 333), (80, None)])
def test_tensors_are_resized_by_the_same_rule(size, max_size):
    """Pillow rounds after each direction, and so differs by one step of 255 here and there."""
    image, target = picture(100, 80), with_masks(one_box(10, 10, 60, 40, width=100, height=80))
    want, wanted_target = resize(image, target, size, max_size)
    found, found_target = resize(planes(image), target, size, max_size)
    assert found.dtype == torch.uint8 and found.shape == planes(want).shape
    assert same_targets(wanted_target, found_target)
    difference = (found.int() - planes(want).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.25


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_channels_do_not_mix(channels):
    """Each comes out as if it were an image of its own, in training and evaluation."""
    mean, std = tuple(0.1 * (c + 1) for c in range(channels)), tuple(0.2 + 0.1 * c for c in range(channels))
    image = torch.cat([planes(picture(64, 48).convert("L")) for _ in range(channels)])
    for split in ("train", "val"):
        transforms = make_transforms(split, Preprocessing(40, 66, mean, std))
        torch.manual_seed(2)
        found, target = transforms(image, one_box(5, 6, 30, 40, width=64, height=48))
        assert found.dtype == torch.float32 and len(found) == channels
        assert target["size"].tolist() == list(found.shape[1:])
        for c in range(channels):
            torch.manual_seed(2)
            alone, _ = make_transforms(split, Preprocessing(40, 66, mean[c:c + 1], std[c:c + 1]))(
                Image.fromarray(image[c].numpy()), one_box(5, 6, 30, 40, width=64, height=48))
            assert (found[c] - alone[0]).abs().max() * std[c] <= 1.01 / 255


def test_grey_images_and_their_numbers():
    black_and_white = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    image, _ = ToTensor()(black_and_white, {})
    assert image.shape == (1, 1, 2) and image.flatten().tolist() == [0, 1]
    assert Normalize((0.25,), (0.5,))(image, {})[0].flatten().tolist() == [-0.5, 1.5]


@pytest.mark.parametrize("channels, numbers", [(1, 3), (3, 1), (5, 3)])
def test_numbers_for_another_number_of_channels_are_refused(channels, numbers):
    with pytest.raises(ValueError, match=f"an image with {channels} channels, but mean and std for {numbers}; "
                                         f".*--in_channels"):
        Normalize((0.5,) * numbers, (0.5,) * numbers)(torch.zeros(channels, 4, 4), {})


def test_statistics_of_rgb_for_other_channels():
    mean, std = (0.1, 0.2, 0.6), (1.0, 2.0, 6.0)
    assert normalisation(mean, std, 3) == (mean, std)
    assert normalisation(mean, std, 1) == ((pytest.approx(0.3),), (pytest.approx(3.0),))
    assert normalisation(mean, std, 2) == ((0.1, 0.2), (1.0, 2.0))
    assert normalisation(mean, std, 7) == ((0.1, 0.2, 0.6, 0.1, 0.2, 0.6, 0.1), (1, 2, 6, 1, 2, 6, 1))
    assert normalisation([0.5] * 4, [0.1] * 4, 4) == ((0.5,) * 4, (0.1,) * 4)           # the images' own
    with pytest.raises(ValueError, match=r"mean \(0.5, 0.5\) and std .* for --in_channels 5: three numbers each .*or 5"):
        normalisation((0.5, 0.5), (0.1, 0.1), 5)
    with pytest.raises(ValueError, match="three numbers each"):
        normalisation((0.5,) * 3, (0.1,), 1)


def test_images_too_long_for_their_short_side():
    assert resized(1, 5000, 800, 1333) == (1, 1333)
    assert resized(5000, 1, 800, 1333) == (1333, 1)
    assert resized(2, 5000, 800, 1333) == (1, 2500)                  # rounded up: as published, longer


# In less time: what may not change, and by how much the rest may.

IN_255 = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def training_data(real_data, fast_images="off", transforms=None, masks=False):
    folder = real_data / "coco_mini"
    return CocoDetection(folder / "train2017", folder / "annotations" / "instances_train2017.json", transforms, masks,
                         fast_images=fast_images)


def test_draws_are_those_of_always(real_data):
    """Recorded before images were read in other ways: (image, seed), size, objects, first box, sum of all boxes. The
    published list with its crop, and without the choice of it, whose draws differ from one PyTorch to another."""
    flip, size_or_crop, *rest = train_transforms().transforms
    transforms = v2.Compose([flip, *size_or_crop.transforms[1].transforms, *rest])
    for fast_images in ("off", "on"):
        data = Drawn(training_data(real_data, fast_images, transforms))
        for draw, size, count, first, total in (
                ((0, 1), (649, 640), 26, "0x1.35614a0000000p-4 0x1.e317400000000p-3 0x1.35614a0000000p-3 "
                 "0x1.e317400000000p-2", "0x1.254cf5af60000p+5"),
                ((1, 2), (800, 898), 5, "0x1.9b96180000000p-1 0x1.9a929a0000000p-1 0x1.81b6aa0000000p-3 "
                 "0x1.fa42700000000p-3", "0x1.0b328f5000000p+3"),
                ((2, 4), (480, 530), 2, "0x1.01b5c60000000p-1 0x1.c11f460000000p-2 0x1.d0ddc00000000p-3 "
                 "0x1.321e8a0000000p-1", "0x1.9d838ae000000p+1"),
                ((3, 7), (531, 480), 3, "0x1.e8c0ce0000000p-2 0x1.6ed61a0000000p-1 0x1.2ba80a0000000p-1 "
                 "0x1.0ea4740000000p-1", "0x1.bb88322000000p+2")):
            image, target = data[Draw(*draw)]
            assert tuple(image.shape[1:]) == size and len(target["boxes"]) == count
            assert target["boxes"][0].tolist() == [float.fromhex(number) for number in first.split()]
            assert float(target["boxes"].double().sum()) == float.fromhex(total)


def in_single_steps(transforms):
    """The list, to tensors and normalised as the published one does it: by torchvision, one step after the other."""
    def normalise(image, target):
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        return functional.normalize(functional.to_tensor(image), mean, std), target

    def run(image, target):
        for step in (*transforms.transforms[:-3], normalise, BoxesToFractions()):
            image, target = step(image, target)
        return image, target

    return run


@pytest.mark.parametrize("fast_images, most, share", [("off", 1e-4, 0), ("on", 2, 0.01), ("reduced", 2, 0.01)])
def test_a_training_image_is_the_published_one(real_data, fast_images, most, share):
    """Targets to the bit; values, in 255, to rounding, or by as little as is promised. Nothing is reduced here: the
    photographs are no larger than what is made of them."""
    published = Drawn(training_data(real_data, transforms=in_single_steps(train_transforms()), masks=True))
    data = Drawn(training_data(real_data, fast_images, train_transforms(), masks=True))
    changed, cropped = [], 0
    for i in range(12):
        (want, wanted_target), (image, target) = published[Draw(i, i)], data[Draw(i, i)]
        assert same_targets(wanted_target, target) and image.shape == want.shape and image.is_contiguous()
        difference = ((image - want) * IN_255).abs()
        assert difference.max() <= most + 1e-4
        changed.append((difference > 0.5).float().mean())
        cropped += abs(image.shape[1] / image.shape[2] - target["orig_size"][0] / target["orig_size"][1]) > 0.01
    assert torch.stack(changed).mean() <= share and 2 < cropped < 11
    assert fast_images == "off" or torch.stack(changed).max() > 0           # it is another way


def test_fast_images_without_transforms_are_numbers_of_8_bits(real_data):
    plain, fast = training_data(real_data), training_data(real_data, "on")
    for i in (0, 5):
        assert fast[i][0].dtype == torch.uint8 and torch.equal(fast[i][0], planes(plain[i][0]))
        assert same_targets(plain[i][1], fast[i][1])
    assert isinstance(fast.image(0), Image.Image) and fast.image(0).mode == "RGB"         # for those who draw on it


def test_sizes_of_fast_images_are_told(real_data):
    data = training_data(real_data, "on", make_transforms("train", Preprocessing(80, 133)))
    draws = [Draw(i, i + 9) for i in range(20)]
    sizes = [tuple(Drawn(data)[draw][0].shape[1:]) for draw in draws]
    assert sizes == drawn_sizes(data.transforms, [tuple(data.sizes[draw.image].tolist()) for draw in draws],
                                [draw.seed for draw in draws])


def test_images_that_pillow_made_smaller_may_be_decoded_smaller(real_data):
    """Where a short side of 100 is wanted; less than 2 of 255 on average, and another picture would be 40 off."""
    transforms = make_transforms("val", Preprocessing(100, None))
    whole, reduced = (training_data(real_data, fast, transforms) for fast in ("off", "reduced"))
    for i in range(8):
        (want, wanted_target), (image, target) = whole[i], reduced[i]
        assert same_targets(wanted_target, target) and want.shape == image.shape
        assert 0.02 < ((want - image) * IN_255).abs().mean() < 2


@pytest.mark.parametrize("color_jitter", [0.0, 0.4])
def test_normalised_in_the_batch_is_normalised(color_jitter):
    """Bit by bit; in workers, too, where the batch lies in shared memory."""
    sizes = [(64, 48), (33, 80), (80, 80)]
    batches = []
    for in_batch in (False, True):
        transforms = make_transforms("train", Preprocessing(40, 66), color_jitter=color_jitter, in_batch=in_batch)
        items = [(picture_of(k, *size), one_box(5, 6, 30, 40, width=size[1], height=size[0]))
                 for k, size in enumerate(sizes)]
        data = Drawn(Listed(items, transforms))
        loaders = [torch.utils.data.DataLoader(data, batch_sampler=[[Draw(k, k + 5) for k in range(3)]],
                                               num_workers=workers, collate_fn=batch_and_targets) for workers in (0, 1)]
        batches += [batch for loader in loaders for batch in loader]
    want = nested_tensor_from_tensor_list([Drawn(Listed(items, make_transforms(
        "train", Preprocessing(40, 66), color_jitter=color_jitter)))[Draw(k, k + 5)][0] for k in range(3)])
    for found, targets in batches:
        assert torch.equal(found.tensors, want.tensors) and torch.equal(found.mask, want.mask)
        assert found.sizes == want.sizes and found.tensors.dtype == torch.float32 and found.mask.any()
        assert all(same_targets(a, b) for a, b in zip(targets, batches[0][1], strict=True))


class Listed(torch.utils.data.Dataset):
    def __init__(self, items, transforms):
        self.items, self.transforms = items, transforms

    def __getitem__(self, i):
        return self.transforms(*self.items[i])


def batch_and_targets(items):
    images, targets = zip(*items)
    return into_batch(images), targets


def picture_of(seed, height, width):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def test_a_batch_of_both_kinds_and_batches_that_are_none():
    one, = (Normalize(in_batch=True)(planes(picture(9, 7)), {})[0],)
    other = torch.rand(3, 5, 11)
    mixed = into_batch([one, other])
    assert torch.equal(mixed.tensors, nested_tensor_from_tensor_list([Normalize()(one.planes, {})[0], other]).tensors)
    with pytest.raises(ValueError, match="at least one image"):
        into_batch([])
    grey = Normalize((0.5,), (0.5,), in_batch=True)(planes(picture(9, 7).convert("L")), {})[0]
    with pytest.raises(ValueError, match="image 1 of the batch has shape .*same C"):
        into_batch([one, grey])
