"""datasets/sampler.py: every image once in evaluation, the same orders again in training; batches of images alike in
shape: no image twice or lost, like work for all processes, little padding, and enough chance."""
import itertools
import math
import random
import statistics
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from datasets.drawn import drawn_sizes
from datasets.sampler import (
    WINDOW,
    EvaluationBatches,
    EvaluationShard,
    RandomBatches,
    TrainingBatches,
    padded_share,
    repeat_factors,
)
from datasets.transforms import Preprocessing, ToTensor, make_transforms, resized, train_transforms
from detr.nested_tensor import nested_tensor_from_tensor_list


class Dealt(RandomBatches):
    """The images of a random order that a process gets, one after the other."""

    def __init__(self, length, rank=0, world_size=1, seed=0, repeats=None):
        super().__init__(length, 1, rank, world_size, seed, repeats)

    def __iter__(self):
        return (draw.image for batch in super().__iter__() for draw in batch)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 79, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_shards_have_every_image_once_and_in_order(length, world_size):
    shards = [list(EvaluationShard(length, rank, world_size)) for rank in range(world_size)]
    assert sum(shards, []) == list(range(length))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert [len(EvaluationShard(length, rank, world_size)) for rank in range(world_size)] == list(map(len, shards))


@pytest.mark.parametrize("length, world_size", [(8, 1), (8, 2), (9, 2), (103, 4)])
def test_training_deals_each_image_to_one_process_at_most(length, world_size):
    samplers = [Dealt(length, rank, world_size, seed=5) for rank in range(world_size)]
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {length // world_size} == set(map(len, samplers))
    seen = sum(parts, [])
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(length))


def test_training_orders_follow_from_seed_and_epoch():
    def order(seed, epoch, rank=0, world_size=1):
        sampler = Dealt(50, rank, world_size, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert sorted(order(1, 3)) == list(range(50)) != order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    sampler = Dealt(50, seed=1)
    assert list(sampler) == list(sampler) == order(1, 0)                # the epoch does not pass by itself


def test_processes_together_see_the_batches_of_one_process():
    whole = list(Dealt(24, seed=9))
    parts = [list(Dealt(24, rank, 2, seed=9)) for rank in range(2)]
    for step in range(4):                                               # 3 images a process, 6 together
        together = sum((part[3 * step:3 * step + 3] for part in parts), [])
        assert sorted(together) == sorted(whole[6 * step:6 * step + 6])


def test_left_out_images_change_with_the_epoch():
    left_out = set()
    for epoch in range(20):
        samplers = [Dealt(5, rank, 2) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        left_out |= set(range(5)) - {i for sampler in samplers for i in sampler}
    assert len(left_out) > 1


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="--batch_size 1 on 4 processes needs 4 training images, and there are 3"):
        Dealt(3, 0, 4)
    for kind in (Dealt, EvaluationShard):
        with pytest.raises(ValueError, match="rank 2 is not one of 2 processes; ranks are 0 to 1"):
            kind(10, 2, 2)


# Batches of images alike in shape.

EXTREMES = [(1, 1), (3000, 5000), (5000, 3000), (1, 3000), (5000, 1), (2, 2), (640, 480), (480, 640)]


def formats(count, seed):
    """Sizes like those of photographs: three of four wide, most 4:3 or 3:2, the others anything from 1:3 to 3:1."""
    chance = random.Random(seed)
    sizes = []
    for _ in range(count):
        ratio = chance.choice([4 / 3, 4 / 3, 3 / 2, 3 / 2, 16 / 9, math.exp(chance.uniform(0, math.log(3)))])
        short = chance.randint(200, 700)
        sizes.append((short, round(short * ratio)) if chance.random() < 0.75 else (round(short * ratio), short))
    return sizes


def any_sizes(count, seed):
    """Sizes of all kinds, the extremes among them."""
    chance = random.Random(seed)
    kinds = [lambda: chance.choice(EXTREMES), lambda: (480, 640),
             lambda: (chance.randint(1, 999), chance.randint(1, 999))]
    return [chance.choice(kinds)() for _ in range(count)]


def cases(count, seed):
    """Numbers of images, processes and images in a batch, at random."""
    chance = random.Random(seed)
    return [(chance.choice([1, 2, 3, chance.randint(1, 200)]), chance.choice([1, 2, 3, 8]), chance.choice([1, 2, 5, 8]))
            for _ in range(count)]


AS_THEY_ARE = v2.Compose([ToTensor()])                                  # draws nothing
PUBLISHED = train_transforms()


def all_draws(sizes, batch_size, world_size=1, seed=0, epoch=0, transforms=AS_THEY_ARE):
    """[process][step] -> draws."""
    samplers = [TrainingBatches(sizes, transforms, batch_size, rank, world_size, seed) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def all_training(*args, **kwargs):
    """[process][step] -> images."""
    return [[[draw.image for draw in batch] for batch in part] for part in all_draws(*args, **kwargs)]


def seeds_of(parts):
    return {draw.image: draw.seed for part in parts for batch in part for draw in batch}


def partitions(images, batch_size):
    """All ways to form batches of them."""
    if not images:
        yield []
        return
    for others in itertools.combinations(images[1:], batch_size - 1):
        for rest in partitions([i for i in images[1:] if i not in others], batch_size):
            yield [[images[0], *others], *rest]


def all_evaluation(sizes, batch_size, world_size=1, equal=False):
    return [list(EvaluationBatches(sizes, batch_size, rank, world_size, equal)) for rank in range(world_size)]


def pixels(batch, sizes):
    return len(batch) * max(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch)


def in_order(batch_size, order):
    return [order[k:k + batch_size] for k in range(0, len(order), batch_size)]


def test_training_batches_are_whole_and_no_image_comes_twice():
    tried = 0
    for number, (length, world_size, batch_size) in enumerate(cases(150, seed=0)):
        sizes = any_sizes(length, number)
        if length < world_size * batch_size:
            with pytest.raises(ValueError, match=f"--batch_size {batch_size} on {world_size} processes needs "
                                                 f"{world_size * batch_size} training images, and there are {length}"):
                TrainingBatches(sizes, PUBLISHED, batch_size, 0, world_size)
            continue
        parts = all_training(sizes, batch_size, world_size, seed=number, epoch=number % 3)
        steps = length // (world_size * batch_size)
        assert {len(part) for part in parts} == {steps}
        assert len(TrainingBatches(sizes, PUBLISHED, batch_size, world_size - 1, world_size)) == steps
        assert {len(batch) for part in parts for batch in part} == {batch_size}
        seen = [i for part in parts for batch in part for i in batch]
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(length)) and {type(i) for i in seen} == {int}
        tried += 1
    assert tried > 50


@pytest.mark.parametrize("world_size, batch_size", [(2, 4), (4, 2)])
def test_processes_together_see_the_training_batches_of_one_process(world_size, batch_size):
    sizes = formats(8 * 2 * WINDOW, seed=1)                             # two windows
    whole, = all_draws(sizes, 8, seed=3, epoch=2, transforms=PUBLISHED)
    parts = all_draws(sizes, batch_size, world_size, seed=3, epoch=2, transforms=PUBLISHED)
    assert [sorted(sum(step, [])) for step in zip(*parts)] == [sorted(batch) for batch in whole]


def test_training_batches_follow_from_seed_and_epoch():
    sizes = formats(60, seed=2)

    def batches(seed, epoch):
        return all_draws(sizes, 4, 2, seed, epoch, PUBLISHED)

    assert batches(1, 3) == batches(1, 3)
    assert len({str(batches(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    sampler = TrainingBatches(sizes, PUBLISHED, 4, 1, 2, seed=1)
    assert list(sampler) == list(sampler) == batches(1, 0)[1]                       # the epoch does not pass by itself
    sampler.set_epoch(5)
    assert list(sampler) == batches(1, 5)[1]
    assert all_draws(torch.tensor(sizes), 4, 2, 1, 5, PUBLISHED) == batches(1, 5)


def test_training_batches_and_the_randomness_of_others_leave_each_other_alone():
    sizes = formats(WINDOW * 4 * 2, seed=2)
    torch.manual_seed(0)
    undisturbed = torch.rand(300)
    expected, = all_draws(sizes, 4, transforms=PUBLISHED)
    torch.manual_seed(0)
    iterator, drawn, batches = iter(TrainingBatches(sizes, PUBLISHED, 4)), [], []
    for batch in iterator:                                              # draws between all batches
        drawn.append(torch.rand(1))
        batches.append(batch)
    assert batches == expected and torch.equal(torch.cat(drawn), undisturbed[:len(batches)])


def test_what_an_image_draws_depends_on_seed_and_epoch_and_on_no_other_image():
    sizes = formats(96, seed=3)
    seeds = seeds_of(all_draws(sizes, 4, 2, 1, 7, PUBLISHED))
    assert len(seeds) == len(set(seeds.values())) == 96
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds.values())
    assert seeds == seeds_of(all_draws(sizes, 32, 1, 1, 7, PUBLISHED)) == seeds_of(all_draws(sizes, 1, 3, 1, 7))
    assert seeds == seeds_of(all_draws(any_sizes(96, seed=0), 4, 2, 1, 7))
    for other in (seeds_of(all_draws(sizes, 4, 2, 1, 8)), seeds_of(all_draws(sizes, 4, 2, 2, 7))):
        assert not set(seeds.values()) & set(other.values())
    assert len(set(seeds_of(all_draws(formats(3 * WINDOW, seed=3), 1)).values())) == 3 * WINDOW         # of all windows
    left_over = seeds_of(all_draws(sizes, 36, 1, 1, 7, PUBLISHED))
    assert len(left_over) == 72 and left_over.items() <= seeds.items()


def test_sizes_keep_the_distribution_of_the_transforms():
    """Scales of uncropped images are as likely as each other, and so are the pairs that an image has in two epochs."""
    count = 3000
    transforms = train_transforms(crop=False)
    draws = [seeds_of(all_draws([(100, 100)] * count, 8, epoch=epoch, transforms=transforms)) for epoch in (0, 1)]
    sides = [[h for h, _ in drawn_sizes(transforms, [(100, 100)] * count, [seeds[i] for i in range(count)])]
             for seeds in draws]
    for found in sides:
        chi_square = sum((n - count / 11) ** 2 / (count / 11) for n in Counter(found).values())
        assert len(set(found)) == 11 and chi_square < 30                # 10 degrees of freedom: 1 in 1000
    both = Counter(zip(*sides))
    assert sum((both[pair] - count / 121) ** 2 / (count / 121) for pair in itertools.product(set(found), repeat=2)) < 180
    neighbours = Counter(itertools.pairwise(sides[0]))                  # 120 degrees of freedom: 1 in 2000
    assert sum((neighbours[pair] - count / 121) ** 2 / (count / 121)
               for pair in itertools.product(set(found), repeat=2)) < 180


@pytest.mark.parametrize("world_size", [1, 4])
def test_training_batches_go_by_the_sizes_that_are_drawn(world_size):
    """All files have one size, half of the images come out small and half large: none meets one of the other kind."""
    sizes, steps = [(100, 100)] * 400, 0
    transforms = train_transforms(Preprocessing(20, 60), scales=(10, 20), crop=False)
    parts = all_draws(sizes, 4, world_size, transforms=transforms)
    large = {draw.image: drawn_sizes(transforms, [(100, 100)], [draw.seed]) == [(20, 20)]
             for part in parts for batch in part for draw in batch}
    assert 150 < sum(large.values()) < 250
    steps = [{large[draw.image] for batch in step for draw in batch} for step in zip(*parts)]
    assert sum(len(kinds) > 1 for kinds in steps) <= 1 + (len(steps) > WINDOW)              # at most one in a window


def test_windows_are_drawn_one_after_the_other():
    """An epoch does not begin with all of its images; and a window has images of the whole random order."""
    seen = []

    def note(image, target):
        seen.append((image.height, image.width))
        return image, target

    sizes = [(100, i + 1) for i in range(4 * 5 * WINDOW)]
    first, *_ = iter(TrainingBatches(sizes, v2.Compose([note, ToTensor()]), 2, 1, 2))
    assert len(seen) == len(set(seen)) == len(sizes)
    seen.clear()
    assert next(iter(TrainingBatches(sizes, v2.Compose([note, ToTensor()]), 2, 1, 2))) == first
    assert len(seen) == 4 * WINDOW
    widths = sorted(width for _, width in seen)
    assert widths[0] < 100 and widths[-1] > len(sizes) - 100 and len(set(widths)) == len(widths)


def test_windows_are_alike_in_length():
    for steps in (1, WINDOW - 1, WINDOW + 1, WINDOW * 3 // 2 + 1, 10 * WINDOW + 5):
        seen, lengths = [], []
        transforms = v2.Compose([lambda image, target, seen=seen: (seen.append(0), (image, target))[1], ToTensor()])
        for _ in TrainingBatches([(9, 9)] * steps, transforms, 1):
            lengths.append(len(seen))
        windows = sorted(Counter(lengths).values())
        assert sum(windows) == steps and len(lengths) == steps
        assert windows[-1] - windows[0] <= 1 and windows[-1] <= 1.5 * WINDOW


def test_images_of_one_size_meet_by_chance_alone():
    """No trace of the order of the file in batches, nor in steps: as in a random order."""
    transforms = make_transforms("train", Preprocessing((32, 48)))
    sizes, met, apart, drift = formats(400, seed=5), set(), [], []
    for epoch in range(30):
        batches, = all_training(sizes, 4, epoch=epoch, transforms=transforms)
        for batch in batches:
            met |= set(batch) if 7 in batch else set()
            apart += [abs(a - b) for a, b in itertools.combinations(batch, 2)]
        drift += [abs(sum(a) - sum(b)) / 4 for a, b in itertools.pairwise(batches)]
    assert len(met - {7}) > 65                                          # 90 draws among 399 give 81 on average
    assert abs(statistics.mean(apart) - 401 / 3) < 4                    # of two numbers among 400
    assert abs(statistics.mean(drift) - 2 / math.sqrt(math.pi) * 400 / math.sqrt(12) / 2) < 5           # of two means


def test_an_image_meets_others_in_each_epoch():
    """Wide images meet all kinds of wide ones, and the few tall ones that are cropped to like sizes."""
    sizes = [(480, 640 + i % 30) for i in range(200)] + [(640 + i % 30, 480) for i in range(200)]
    met = Counter()
    for epoch in range(15):
        for batch in all_training(sizes, 4, epoch=epoch, transforms=PUBLISHED)[0]:
            if 7 in batch:
                met.update(set(batch) - {7})
    assert sum(met.values()) == 45 and len(met) > 33 and max(met.values()) <= 4
    assert 1 <= sum(count for i, count in met.items() if i >= 200) <= 15


def test_no_shape_is_left_out_more_often():
    sizes = [(10 + 3 ** k, 100) for k in range(11)]
    left_out = Counter()
    for epoch in range(400):
        left_out.update(set(range(11)) - {i for batch in all_training(sizes, 4, epoch=epoch)[0] for i in batch})
    assert sum(left_out.values()) == 400 * 3
    assert all(abs(left_out[i] - 400 * 3 / 11) < 40 for i in range(11)), left_out           # 4.5 standard deviations


def test_training_steps_come_in_random_order():
    sizes = [(100, 100 + 40 * i) for i in range(40)]
    places = Counter()
    for epoch in range(100):
        batches, = all_training(sizes, 4, epoch=epoch)
        widest = [max(sizes[i][1] for i in batch) for batch in batches]
        places[widest.index(max(widest))] += 1
    assert len(places) == 10 and max(places.values()) < 25


@pytest.mark.parametrize("turned", [False, True])
def test_training_batches_are_the_best_there_are_for_one_varying_side(turned):
    """Six images of one height, two in a batch, against all ways to make pairs."""
    for seed in range(20):
        widths = random.Random(seed).sample(range(100, 900), 6)
        sizes = [(w, 100) if turned else (100, w) for w in widths]
        best = min(padded_share(batches, sizes) for batches in partitions(list(range(6)), 2))
        assert padded_share(all_training(sizes, 2)[0], sizes) == best > 0


@pytest.mark.parametrize("batch_size", [2, 4])
def test_training_batches_are_nearly_the_best_there_are(batch_size):
    """Of the padding that no way to form batches of eight images needs, less than a fourteenth remains."""
    avoidable = remaining = 0
    for seed in range(12):
        scales = random.Random(seed).choices(range(480, 801, 32), k=8)
        sizes = [resized(*size, scale, 1333) for size, scale in zip(formats(8, seed), scales)]
        shares = [padded_share(batches, sizes) for batches in partitions(list(range(8)), batch_size)]
        found = padded_share(all_training(sizes, batch_size)[0], sizes)
        assert len(shares) == {2: 105, 4: 35}[batch_size] and any(abs(found - share) < 1e-12 for share in shares)
        avoidable += statistics.mean(shares) - min(shares)
        remaining += found - min(shares)
    assert avoidable > 12 * 0.1 and remaining < 0.07 * avoidable


@pytest.mark.parametrize("transforms", [PUBLISHED, train_transforms(crop=False)], ids=["published", "no crop"])
@pytest.mark.parametrize("batch_size, world_size, limit", [(2, 1, 0.16), (8, 1, 0.16), (2, 4, 0.065)])
def test_training_batches_leave_a_part_of_the_padding(transforms, batch_size, world_size, limit):
    sizes = formats(512, seed=3)
    parts = all_draws(sizes, batch_size, world_size, transforms=transforms)
    seeds = seeds_of(parts)
    drawn = drawn_sizes(transforms, sizes, [seeds[i] for i in range(512)])
    batches = [[draw.image for draw in batch] for part in parts for batch in part]
    random_share = padded_share(in_order(batch_size, list(Dealt(512))), drawn)
    assert 0 < padded_share(batches, drawn) < limit * random_share


def test_processes_have_like_work_in_each_step():
    sizes = formats(1024, seed=6)
    parts = all_draws(sizes, 4, 4, transforms=PUBLISHED)
    seeds = seeds_of(parts)
    drawn = drawn_sizes(PUBLISHED, sizes, [seeds[i] for i in range(1024)])
    work = [[pixels([draw.image for draw in batch], drawn) for batch in step] for step in zip(*parts)]
    waited = 1 - sum(map(sum, work)) / sum(4 * max(step) for step in work)
    alone = [[pixels(batch, drawn) for batch in step] for step in
             zip(*(in_order(4, list(Dealt(1024, rank, 4))) for rank in range(4)))]
    assert waited < 0.08 < 0.2 < 1 - sum(map(sum, alone)) / sum(4 * max(step) for step in alone)
    totals = list(map(sum, zip(*work)))                                 # no process has the large ones always
    assert max(totals) < 1.02 * min(totals)


def test_evaluation_batches_have_every_image_once():
    for equal in (False, True):
        for number, (length, world_size, batch_size) in enumerate(cases(150, seed=1) + [(0, 2, 4), (80, 8, 8)]):
            sizes = any_sizes(length, number)
            parts = all_evaluation(sizes, batch_size, world_size, equal)
            assert parts == all_evaluation(sizes, batch_size, world_size, equal)
            assert [len(EvaluationBatches(sizes, batch_size, rank, world_size, equal)) for rank in range(world_size)] \
                == list(map(len, parts))
            batches = sum(parts, [])
            assert sorted(sum(batches, [])) == list(range(length))
            assert all(1 <= len(batch) <= batch_size for batch in batches)
            if not equal and batches:
                assert max(map(len, batches)) - min(map(len, batches)) <= 1
                assert len(batches) < length / batch_size + world_size


def test_evaluation_is_dealt_out_evenly_and_begins_with_the_largest_batches():
    for equal in (False, True):
        for number, (length, world_size, batch_size) in enumerate(cases(150, seed=2)):
            sizes = any_sizes(length, number)
            work = [[pixels(batch, sizes) for batch in part]
                    for part in all_evaluation(sizes, batch_size, world_size, equal)]
            largest = max(sum(work, []))
            totals = list(map(sum, work))
            assert max(totals) - min(totals) <= largest
            assert all(part == sorted(part, reverse=True) for part in work)
            assert max(totals) <= sum(totals) / world_size + largest * (1 - 1 / world_size)         # Graham (1966)
    alike = all_evaluation([(480, 640)] * 80, 8, 8)
    assert [sum(map(len, part)) for part in alike] == [10] * 8              # not 16 for two of them, 8 for the others
    sizes = [resized(*size, 800, 1333) for size in formats(500, seed=4)]
    totals = [sum(pixels(batch, sizes) for batch in part) for part in all_evaluation(sizes, 8, 8)]
    assert max(totals) < 1.05 * statistics.mean(totals)
    one_large = [(80, 100)] + [(10, 100 + i) for i in range(8)]             # as much work as the eight others together
    assert list(map(len, all_evaluation(one_large, 1, 2))) == [1, 8]


@pytest.mark.parametrize("turned", [False, True])
def test_evaluation_batches_are_the_best_there_are_for_one_varying_side(turned):
    """Six images of one height, two in a batch, against all ways to make pairs."""
    for seed in range(20):
        widths = random.Random(seed).sample(range(100, 900), 6)
        sizes = [(w, 100) if turned else (100, w) for w in widths]
        best = min(padded_share(in_order(2, order), sizes) for order in itertools.permutations(range(6)))
        assert padded_share(all_evaluation(sizes, 2)[0], sizes) == best > 0


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_evaluation_batches_leave_a_third_of_the_padding_at_most(batch_size, world_size):
    sizes = [resized(*size, 800, 1333) for size in formats(160, seed=5)]
    order = random.Random(0).sample(range(160), 160)
    bucketed = padded_share(sum(all_evaluation(sizes, batch_size, world_size), []), sizes)
    assert 0 < bucketed < padded_share(in_order(batch_size, order), sizes) / 3


def test_evaluation_goes_by_ratio_then_size():
    assert padded_share(all_evaluation([(10, 10), (100, 100)] * 4, 4)[0], [(10, 10), (100, 100)] * 4) == 0
    found, by_height, by_width = [], [], []
    for seed in range(20):
        sizes = [resized(*size, 800, 1333) for size in formats(80, seed)]   # either side may be the one that is limited
        found.append(padded_share(all_evaluation(sizes, 8)[0], sizes))
        by_height.append(padded_share(in_order(8, sorted(range(80), key=lambda i: sizes[i])), sizes))
        by_width.append(padded_share(in_order(8, sorted(range(80), key=lambda i: sizes[i][::-1])), sizes))
    assert statistics.mean(found) < 0.9 * min(statistics.mean(by_height), statistics.mean(by_width))


def test_equal_sizes_share_batches_and_no_others():
    sizes = any_sizes(120, seed=6) + EXTREMES
    for world_size in (1, 3):
        batches = sum(all_evaluation(sizes, 4, world_size, equal=True), [])
        assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
        assert padded_share(batches, sizes) == 0
        assert Counter(sizes[batch[0]] for batch in batches) == {size: math.ceil(count / 4)
                                                                 for size, count in Counter(sizes).items()}
    assert padded_share(all_evaluation(sizes, 4)[0], sizes) > 0
    assert all_evaluation(torch.tensor(sizes), 4, 3) == all_evaluation(sizes, 4, 3)


def test_padded_share_is_that_of_the_tensors():
    assert padded_share([[0, 1]], [(2, 3), (4, 1)]) == 14 / 24
    assert padded_share([[0], [1]], [(2, 3), (4, 1)]) == padded_share([], []) == 0
    sizes = [(height % 9 + 1, width % 7 + 1) for height, width in any_sizes(20, seed=7)]
    batches = [[0, 5, 19], [1], [2, 3, 4, 6], [7, 7]]                       # not all images, one of them twice
    masks = [nested_tensor_from_tensor_list([torch.ones(3, *sizes[i]) for i in batch]).mask for batch in batches]
    padded = sum(int(mask.sum()) for mask in masks)
    assert padded > 0
    assert padded_share(iter(batches), sizes) == padded / sum(mask.numel() for mask in masks)


def test_loaders_take_the_batches():
    sizes = formats(23, seed=8)
    sampler = TrainingBatches(sizes, PUBLISHED, 4, seed=2)
    loader = DataLoader({draw: draw for epoch in (0, 1) for part in all_draws(sizes, 4, 1, 2, epoch, PUBLISHED)
                         for batch in part for draw in batch}, batch_sampler=sampler, collate_fn=list)
    assert len(loader) == 5
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert [list(loader)] == all_draws(sizes, 4, 1, 2, epoch, PUBLISHED)
    shards = [DataLoader(range(23), batch_sampler=EvaluationBatches(sizes, 4, rank, 2), collate_fn=list)
              for rank in range(2)]
    assert list(map(list, shards)) == all_evaluation(sizes, 4, 2)
    assert list(map(len, shards)) == [3, 3]
    assert list(DataLoader(range(1), batch_sampler=EvaluationBatches(sizes[:1], 4, 1, 2))) == []


def training(sizes, *args):
    return TrainingBatches(sizes, PUBLISHED, *args)


def test_what_makes_no_batches_is_refused():
    for kind in (training, EvaluationBatches):
        with pytest.raises(ValueError, match="rank 2 is not one of 2 processes; ranks are 0 to 1"):
            kind([(1, 1)] * 10, 2, 2, 2)
        with pytest.raises(ValueError, match="--batch_size 0: at least 1 is needed"):
            kind([(1, 1)] * 10, 0)
        with pytest.raises(ValueError, match=r"image 1 has size \(0, 1333\); height and width must be at least 1 pixel"):
            kind([(1, 1), (0, 1333), (3, 3)], 1)
    assert all_training([(7, 3)], 1) == all_evaluation([(7, 3)], 8) == [[[0]]]


# Images with rare classes come several times.

def test_repeat_factors_by_their_definition():
    chance = random.Random(0)
    labels = [[c for c in range(5) if chance.random() < (0.9, 0.3, 0.05, 0.02, 0.0)[c]] * chance.randint(1, 2)
              for _ in range(300)]
    labels[7] = [3, 0]
    threshold = 0.2
    frequency = {c: sum(c in image for image in labels) / 300 for c in range(4)}
    expected = [max([1.0] + [math.sqrt(threshold / frequency[c]) for c in image]) for image in labels]
    assert repeat_factors(labels, threshold).tolist() == pytest.approx(expected)
    assert repeat_factors([torch.tensor(image, dtype=torch.int64) for image in labels], threshold).tolist() == \
        pytest.approx(expected)
    assert len(set(expected)) == 3 and expected[7] > 2.7 and min(map(len, labels)) == 0
    assert repeat_factors(labels, min(frequency.values())).tolist() == [1.0] * 300       # no class is rarer than that
    assert repeat_factors([[], []], 0.5).tolist() == [1, 1] and len(repeat_factors([], 0.5)) == 0
    for wrong in (0, -1, 1.1):
        with pytest.raises(ValueError, match=f"--repeat_threshold {wrong}: .*above 0 and at most 1"):
            repeat_factors(labels, wrong)


FACTORS = [1.0, 1.0, 1.25, 2.0, 2.7, 1.0, 3.6, 1.5]                                                         # 14.05


def repeated(kind, seed=0, rank=0, world_size=1, factors=FACTORS):
    if kind == "order":
        return Dealt(len(factors), rank, world_size, seed, factors)
    return TrainingBatches([(40 + i, 50) for i in range(len(factors))], AS_THEY_ARE, 2, rank, world_size, seed, factors)


def seen(sampler, epoch):
    sampler.set_epoch(epoch)
    return [i for item in sampler for i in ([draw.image for draw in item] if isinstance(item, list) else [item])]


@pytest.mark.parametrize("kind", ["order", "batches"])
def test_images_come_as_often_as_their_factor_says(kind):
    """Rounded down or up, never further, in every epoch; the factor on average; and as many images in each epoch."""
    epochs, counts = 600, Counter()
    sampler = repeated(kind)
    for epoch in range(epochs):
        images = Counter(seen(sampler, epoch))
        assert images.total() == len(sampler.order(torch.Generator().manual_seed(epoch))) == 14
        assert all(images[i] <= math.ceil(factor) for i, factor in enumerate(FACTORS))
        short = sum(max(0, math.floor(factor) - images[i]) for i, factor in enumerate(FACTORS))
        assert short <= 1                                                           # the one too many, which is left out
        counts += images
    share = 14 / sum(FACTORS)                                                       # and so are as many of all
    for i, factor in enumerate(FACTORS):
        assert counts[i] / epochs == pytest.approx(share * factor, abs=4 * 0.5 / math.sqrt(epochs)), i
    assert len(sampler) == (14 if kind == "order" else 7)


@pytest.mark.parametrize("kind", ["order", "batches"])
def test_repeats_follow_from_seed_and_epoch(kind):
    orders = {(seed, epoch): tuple(seen(repeated(kind, seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert tuple(seen(repeated(kind, 2), 1)) == orders[2, 1]
    sampler = repeated(kind, 2)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("kind", ["order", "batches"])
def test_processes_share_the_repeats(kind):
    for epoch in range(5):
        whole = seen(repeated(kind), epoch)
        for world_size in (2, 3):
            parts = [seen(repeated(kind, rank=rank, world_size=world_size), epoch) for rank in range(world_size)]
            assert len({len(part) for part in parts}) == 1
            together = Counter(sum(parts, []))
            assert together <= Counter(whole) and together.total() > 14 - world_size * 2


def test_a_repeated_image_is_augmented_anew():
    sampler = repeated("batches")
    draws = [draw for batch in sampler for draw in batch]
    assert len({draw.seed for draw in draws}) == len(draws) == 14 > len({draw.image for draw in draws})


def test_factors_of_one_are_no_repeats():
    for epoch in range(3):
        for kind in ("order", "batches"):
            assert sorted(seen(repeated(kind, factors=[1.0] * 6), epoch)) == list(range(6))


def test_awkward_factors_still_fill_every_epoch(monkeypatch):
    """Sums in different orders differ in their last digits; an epoch never lacks an image for it."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.zeros(*size, dtype=torch.float64))
    chance = random.Random(0)
    for _ in range(30):
        factors = [1 + chance.randrange(10) / 10 for _ in range(30)]
        factors[0] += -sum(round(10 * factor) for factor in factors) % 10 / 10                      # to a whole sum
        sampler = Dealt(30, repeats=factors)
        for epoch in range(3):
            assert len(seen(sampler, epoch)) == len(sampler) == int(torch.tensor(factors, dtype=torch.float64).sum())


@pytest.mark.parametrize("factors", [[1.0], [1.0, 0.5], [1.0, float("nan")]])
def test_what_are_no_factors_is_refused(factors):
    with pytest.raises(ValueError, match="repeats .* for 2 images: a factor of at least 1 is needed for each"):
        Dealt(2, repeats=factors)
