"""datasets/sampler.py: every image once in evaluation, the same orders again in training."""
import pytest

from datasets.sampler import EvaluationShard, TrainingSampler


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 79, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_shards_have_every_image_once_and_in_order(length, world_size):
    shards = [list(EvaluationShard(length, rank, world_size)) for rank in range(world_size)]
    assert sum(shards, []) == list(range(length))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert [len(EvaluationShard(length, rank, world_size)) for rank in range(world_size)] == list(map(len, shards))


@pytest.mark.parametrize("length, world_size", [(8, 1), (8, 2), (9, 2), (103, 4)])
def test_training_deals_each_image_to_one_process_at_most(length, world_size):
    samplers = [TrainingSampler(length, rank, world_size, seed=5) for rank in range(world_size)]
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {length // world_size} == set(map(len, samplers))
    seen = sum(parts, [])
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(length))


def test_training_orders_follow_from_seed_and_epoch():
    def order(seed, epoch, rank=0, world_size=1):
        sampler = TrainingSampler(50, rank, world_size, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert sorted(order(1, 3)) == list(range(50)) != order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    sampler = TrainingSampler(50, seed=1)
    assert list(sampler) == list(sampler) == order(1, 0)                # the epoch does not pass by itself


def test_processes_together_see_the_batches_of_one_process():
    whole = list(TrainingSampler(24, seed=9))
    parts = [list(TrainingSampler(24, rank, 2, seed=9)) for rank in range(2)]
    for step in range(4):                                               # 3 images a process, 6 together
        together = sum((part[3 * step:3 * step + 3] for part in parts), [])
        assert sorted(together) == sorted(whole[6 * step:6 * step + 6])


def test_left_out_images_change_with_the_epoch():
    left_out = set()
    for epoch in range(20):
        samplers = [TrainingSampler(5, rank, 2) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        left_out |= set(range(5)) - {i for sampler in samplers for i in sampler}
    assert len(left_out) > 1


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="3 training images cannot be shared by 4 processes; add images"):
        TrainingSampler(3, 0, 4)
    for kind in (TrainingSampler, EvaluationShard):
        with pytest.raises(ValueError, match="rank 2 is not one of 2 processes; ranks are 0 to 1"):
            kind(10, 2, 2)
