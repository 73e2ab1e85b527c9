"""Which examples are read together: exchangeable lists of indices, the sources first."""

import itertools
from collections import Counter, defaultdict
from fractions import Fraction
from math import comb

import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from oracles import images
from stf_diffusers import ReferenceBatchCollator, ReferenceBatchSampler

SIZES = [(20, 4, 10), (20, 4, 4), (20, 4, 20), (23, 4, 10), (7, 7, 7), (5, 1, 1), (5, 1, 5), (1000, 16, 64)]


def epoch_of(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch, start)
    return list(sampler)


# ---- the sampler


@pytest.mark.parametrize(("examples", "batch", "n"), SIZES)
def test_an_epoch_is_one_pass_over_the_sources(examples, batch, n):
    sampler = ReferenceBatchSampler(examples, batch, n)
    lists = epoch_of(sampler)
    assert len(lists) == len(sampler) == examples // batch
    sources = [i for indices in lists for i in indices[:batch]]
    assert len(set(sources)) == len(sources) == examples // batch * batch
    for indices in lists:
        assert len(indices) == len(set(indices)) == n  # no image twice
        assert all(type(i) is int and 0 <= i < examples for i in indices)


def test_every_epoch_leaves_out_others():
    """23 = 5 x 4 + 3: over 200 epochs every image is a source about 20/23 of the time (|z| < 4.5 for each of 23)."""
    sampler = ReferenceBatchSampler(23, 4, 10)
    counts = torch.zeros(23)
    for _ in range(200):
        counts[[i for indices in sampler for i in indices[:4]]] += 1
    z = (counts - 200 * 20 / 23) / (200 * 20 / 23 * 3 / 23) ** 0.5
    assert z.abs().max() < 4.5


def test_others_are_uniform_over_the_rest():
    """Chi-square, p > 0.001: the first other, the ordered pair of the first two, and every position of the list.

    Given the sources, the rank of an other among the N - B images that are no sources is uniform, and independent
    from batch to batch.
    """
    sampler = ReferenceBatchSampler(12, 3, 7)
    first, pairs, last = torch.zeros(9), torch.zeros(9, 9), torch.zeros(9)
    for _ in range(2000):
        for indices in sampler:
            rest = sorted(set(range(12)) - set(indices[:3]))
            ranks = [rest.index(i) for i in indices[3:]]
            first[ranks[0]] += 1
            last[ranks[-1]] += 1
            pairs[ranks[0], ranks[1]] += 1
    assert first.sum() == 8000
    for counts in (first, last, pairs[~torch.eye(9, dtype=torch.bool)]):
        assert counts.min() > 0 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert pairs.diagonal().sum() == 0


def test_sources_are_uniform_and_in_random_order():
    """Chi-square, p > 0.001, of the first source, and of the pairs of sources that share a batch."""
    sampler = ReferenceBatchSampler(10, 2, 3)
    first, pairs = torch.zeros(10), torch.zeros(10, 10)
    for epoch in range(4000):
        a, b, _ = epoch_of(sampler, epoch)[0]
        first[a] += 1
        pairs[a, b] += 1
    assert stats.chisquare(first.numpy()).pvalue > 1e-3
    assert stats.chisquare(pairs[~torch.eye(10, dtype=torch.bool)].numpy()).pvalue > 1e-3


def test_fresh_in_each_step_and_epoch():
    sampler = ReferenceBatchSampler(500, 5, 50)
    lists = epoch_of(sampler, 0) + epoch_of(sampler, 1)
    others = [frozenset(indices[5:]) for indices in lists]
    assert len(set(others)) == len(others) == 200
    assert [indices[:5] for indices in lists[:100]] != [indices[:5] for indices in lists[100:]]
    # Two lists share about 45 * 45 / 495 = 4 of their others, as independent draws do.
    shared = torch.tensor([len(a & b) for a, b in itertools.pairwise(others)]).double()
    assert abs(shared.mean() - 4.05) < 0.6


def test_epochs_are_functions_of_the_seed():
    """Any order of visits, any instance: the same (seed, epoch) gives the same lists; iterating goes to the next."""
    first, second = ReferenceBatchSampler(50, 5, 20, seed=1), ReferenceBatchSampler(50, 5, 20, seed=1)
    epochs = [list(first), list(first), list(first)]
    state = torch.get_rng_state()
    assert [epoch_of(second, e) for e in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert torch.equal(torch.get_rng_state(), state)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(ReferenceBatchSampler(50, 5, 20, seed=2)) != epochs[0]
    # (seed 1, epoch 0) and (seed 0, epoch 1) are different draws, of sources and of others
    collision = epoch_of(ReferenceBatchSampler(50, 5, 20, seed=0), 1)
    for part in (slice(5), slice(5, None)):
        assert [indices[part] for indices in collision] != [indices[part] for indices in epochs[0]]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_can_be_entered_anywhere(processes):
    for index in range(processes):
        sampler = ReferenceBatchSampler(60, 5, 20, num_processes=processes, process_index=index)
        whole = epoch_of(sampler, 3)
        for start in range(len(whole) + 1):
            resumed = ReferenceBatchSampler(60, 5, 20, num_processes=processes, process_index=index)
            assert epoch_of(resumed, 3, start) == whole[start:]
            assert list(resumed) == epoch_of(sampler, 4)  # the next epoch is whole again


def test_a_start_belongs_to_its_epoch():
    """Announcing the chosen epoch again keeps the start; choosing another epoch, or a start, replaces it."""
    sampler = ReferenceBatchSampler(50, 5, 20)
    for again, expected in (((3,), (3, 2)), ((4,), (4, 0)), ((3, 0), (3, 0)), ((3, 5), (3, 5))):
        sampler.set_epoch(3, start=2)
        sampler.set_epoch(*again)
        assert list(sampler) == epoch_of(ReferenceBatchSampler(50, 5, 20), *expected)


def test_an_iterator_keeps_its_epoch():
    """As a prefetching DataLoader needs it: set_epoch in the middle of an epoch belongs to the next one."""
    sampler = ReferenceBatchSampler(50, 5, 20)
    expected = epoch_of(sampler, 0)
    sampler.set_epoch(0)
    lists = []
    for indices in sampler:
        lists.append(indices)
        sampler.set_epoch(7)
    assert lists == expected


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(processes):
    """Disjoint sources that together are the single-process epoch, in its order, with the same others."""
    single = epoch_of(ReferenceBatchSampler(65, 4, 20), 2)
    shards = [
        epoch_of(ReferenceBatchSampler(65, 4, 20, num_processes=processes, process_index=i), 2)
        for i in range(processes)
    ]
    assert {len(shard) for shard in shards} == {65 // (4 * processes)}  # the same number of steps on all
    interleaved = [indices for step in zip(*shards, strict=True) for indices in step]
    assert interleaved == single[: len(interleaved)]
    sources = [i for indices in interleaved for i in indices[:4]]
    assert len(set(sources)) == len(sources)


# ---- class-aware lists

# (labels, B, n): many and few of a class, odd shares, a class that cannot fill its share, none that can, one image each.
CLASS_CASES = {
    "two classes": (torch.arange(60) % 2, 4, 20),
    "many classes": (torch.arange(60) % 7, 4, 21),
    "any numbers": (torch.arange(60) % 3 * 1000 + 5, 4, 20),
    "rare class": ((torch.arange(60) % 20 > 0).long(), 4, 30),
    "rare classes alone": (torch.arange(60) // 3, 2, 40),
    "one image each": (torch.arange(60), 4, 30),
    "one class": (torch.zeros(60, dtype=torch.int32), 4, 20),
    "everything": (torch.arange(60) % 4, 4, 60),
    "sources alone": (torch.arange(60) % 4, 5, 5),
    "one more": (torch.arange(60) % 4, 5, 6),
}


def shares_by_filling(free, count):
    """{class: images}: one at a time, to a class that has the fewest so far among those that still have some."""
    shares = dict.fromkeys(free, 0)
    while count and any(shares[c] < free[c] for c in free):
        shares[min((c for c in free if shares[c] < free[c]), key=shares.get)] += 1
        count -= 1
    return shares


@pytest.mark.parametrize("case", CLASS_CASES)
def test_class_aware_lists(case):
    """[B sources][u of all images][the sources' classes, evenly, as far as they go][any]: no repeats, length n."""
    labels, batch, n = CLASS_CASES[case]
    sampler, plain = ReferenceBatchSampler(60, batch, n, labels=labels), ReferenceBatchSampler(60, batch, n)
    unconditional = sampler.num_unconditional
    assert unconditional == batch + (n - batch) // 2 and plain.num_unconditional == n
    assert sampler.batch_size == n and len(sampler) == len(plain)
    for epoch in range(3):
        for indices, uniform in zip(epoch_of(sampler, epoch), epoch_of(plain, epoch), strict=True):
            assert len(indices) == len(set(indices)) == n
            assert all(type(i) is int and 0 <= i < 60 for i in indices)
            assert indices[:batch] == uniform[:batch]  # the sources do not depend on the labels
            needed = set(labels[indices[:batch]].tolist())
            before = Counter(labels[indices[:unconditional]].tolist())
            free = {c: int((labels == c).sum()) - before[c] for c in needed}
            drawn = Counter(labels[indices[unconditional:]].tolist())
            got = {c: drawn[c] for c in needed}
            expected = shares_by_filling(free, n - unconditional)
            assert sum(got.values()) == sum(expected.values())
            assert sorted(got.values()) == sorted(expected.values())
            assert all(got[c] <= free[c] for c in needed)
            if drawn.total() > sum(got.values()):  # others only where nothing of these classes is left
                assert got == free


def test_class_aware_lists_are_functions_of_seed_and_epoch():
    labels = torch.arange(60) % 7

    def sampler(**arguments):
        return ReferenceBatchSampler(60, 4, 20, labels=labels, **arguments)

    first = sampler(seed=1)
    epochs = [list(first), list(first)]
    second = sampler(seed=1)
    assert [epoch_of(second, e) for e in (1, 0)] == [epochs[1], epochs[0]] and epochs[0] != epochs[1]
    assert list(sampler(seed=2)) != epochs[0]
    for start in range(len(epochs[1]) + 1):
        assert epoch_of(sampler(seed=1), 1, start) == epochs[1][start:]
    shards = [epoch_of(sampler(seed=1, num_processes=3, process_index=i), 1) for i in range(3)]
    assert [indices for step in zip(*shards, strict=True) for indices in step] == epochs[1]


TINY = torch.tensor([0, 0, 0, 1, 1, 2])


def tiny_law(batch, n):
    """{(sources in order, the u uniform, the class part, any): exact probability} for the classes of TINY.

    Written from the description: each stage is uniform over all sets of its kind.
    """
    u, law = (n - batch) // 2, defaultdict(Fraction)
    everything = set(range(6))
    for sources in itertools.permutations(range(6), batch):
        for uniform in itertools.combinations(sorted(everything - {*sources}), u):
            left = everything - {*sources, *uniform}
            needed = list(dict.fromkeys(TINY[list(sources)].tolist()))
            of_class = {c: sorted(i for i in left if TINY[i] == c) for c in needed}
            shares, count = {}, n - batch - u
            for k, c in enumerate(sorted(needed, key=lambda c: len(of_class[c]))):
                shares[c] = min(len(of_class[c]), count // (len(needed) - k))
                count -= shares[c]
            for parts in itertools.product(*(itertools.combinations(of_class[c], shares[c]) for c in needed)):
                part = frozenset(itertools.chain(*parts))
                for rest in itertools.combinations(sorted(left - part), count):
                    chance = Fraction(1, 30 if batch == 2 else 6) / comb(6 - batch, u) / comb(len(left - part), count)
                    for c in needed:
                        chance /= comb(len(of_class[c]), shares[c])
                    law[sources, frozenset(uniform), part | {*rest}] += chance
    assert sum(law.values()) == 1
    return law


@pytest.mark.parametrize(("batch", "n"), [(1, 4), (2, 4), (2, 5)])
def test_class_aware_lists_have_their_law(batch, n):
    """Chi-square, p > 0.001, against the exact probabilities of all lists of six images; no list is impossible."""
    law, counts = tiny_law(batch, n), Counter()
    sampler = ReferenceBatchSampler(6, batch, n, labels=TINY)
    for epoch in range(6000):
        sampler.set_epoch(epoch, start=0)
        indices = next(iter(sampler))  # the first alone: batches of an epoch have different sources
        unconditional = sampler.num_unconditional
        counts[tuple(indices[:batch]), frozenset(indices[batch:unconditional]), frozenset(indices[unconditional:])] += 1
    assert set(counts) <= set(law)
    expected = [6000 * float(p) for p in law.values()]
    assert stats.chisquare([counts[key] for key in law], expected).pvalue > 1e-3


@pytest.mark.parametrize(("batch", "n"), [(1, 4), (2, 4), (2, 5)])
def test_class_aware_lists_are_exchangeable(batch, n):
    """Exactly: given a class's images in the list, each is the source equally often; of all among the first B + u too."""
    conditional, unconditional = defaultdict(Fraction), defaultdict(Fraction)
    for (sources, uniform, part), chance in tiny_law(batch, n).items():
        everyone = {*sources, *uniform, *part}
        for place, source in enumerate(sources):
            same = frozenset(i for i in everyone if TINY[i] == TINY[source])
            conditional[place, same, source] += chance
            unconditional[place, frozenset({*sources, *uniform}), source] += chance
    for law in (conditional, unconditional):
        for place, members in {key[:2] for key in law}:
            assert len({law[place, members, source] for source in members}) == 1


SAMPLER_ERRORS = {
    "no sources": ((10, 0, 5), {}, "1 <= batch_size <= reference_batch_size; got 0 and 5"),
    "fewer references than sources": ((10, 4, 3), {}, "got 4 and 3. Raise reference_batch_size"),
    "more references than images": ((10, 4, 11), {}, "reference_batch_size 11 exceeds the 10 images.*Use at most 10"),
    "process index": ((10, 2, 4), dict(num_processes=2, process_index=2), r"process_index must lie in \[0, 2\); got 2"),
    "negative process index": ((10, 2, 4), dict(process_index=-1), r"process_index must lie in \[0, 1\); got -1"),
    "shared with labels": (
        (10, 2, 6),
        dict(num_processes=2, share_references=True, labels=torch.zeros(10, dtype=torch.int64)),
        "cannot be shared by processes: .*use a ReferenceBank, or leave labels out",
    ),
    "labels of others": ((10, 2, 4), dict(labels=torch.arange(9)), r"labels must have shape \(10,\).*got \(9,\)"),
    "one-hot labels": ((3, 2, 3), dict(labels=torch.eye(3).long()), r"labels must have shape \(3,\).*got \(3, 3\)"),
    "dropped labels": ((10, 2, 4), dict(labels=torch.arange(10) - 1), "at least 0; got -1. Pass the true classes"),
    "no step for all": (
        (10, 4, 4),
        dict(num_processes=3),
        "3 processes times batch_size 4 exceeds the 10.*Lower batch",
    ),
}


@pytest.mark.parametrize("case", SAMPLER_ERRORS)
def test_sampler_errors(case):
    arguments, keywords, message = SAMPLER_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        ReferenceBatchSampler(*arguments, **keywords)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(10), "labels must be integers; got torch.float32"),
        (torch.zeros(10, dtype=torch.bool), "labels must be integers; got torch.bool"),
        ([0] * 10, r"tensor of integers; got list. Pass torch.tensor\(labels\)"),
    ],
)
def test_sampler_label_types(labels, message):
    with pytest.raises(TypeError, match=message):
        ReferenceBatchSampler(10, 2, 4, labels=labels)


@pytest.mark.parametrize("arguments", [(10.0, 2, 4), (10, 2.0, 4), (10, 2, 4.0)])
def test_sampler_takes_whole_numbers(arguments):
    with pytest.raises(TypeError, match="must be an integer; got"):
        ReferenceBatchSampler(*arguments)


# ---- through torch and Accelerate


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_data_loader(workers):
    data, labels = images(40, 1, 2, 2), torch.arange(40)
    sampler, collate = ReferenceBatchSampler(40, 4, 12), ReferenceBatchCollator(4, "x", "y")
    rows = [{"x": x, "y": int(y)} for x, y in zip(data, labels, strict=True)]
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
    for epoch in (5, 0):
        expected = epoch_of(ReferenceBatchSampler(40, 4, 12), epoch)
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(loader) == len(batches) == 10
        for batch, indices in zip(batches, expected, strict=True):
            assert torch.equal(batch["reference_images"], data[indices])
            assert torch.equal(batch["images"], data[indices[:4]])
            assert batch["reference_labels"].tolist() == indices and batch["labels"].tolist() == indices[:4]


@pytest.mark.parametrize("examples", [40, 43, 47])
def test_sharded_by_accelerate(examples):
    """Accelerate's shards are the sampler's own, follow set_epoch, and have equal lengths."""
    accelerate = pytest.importorskip("accelerate.data_loader")
    for index in range(2):
        own = ReferenceBatchSampler(examples, 4, 12, num_processes=2, process_index=index)
        shard = accelerate.BatchSamplerShard(
            ReferenceBatchSampler(examples, 4, 12), num_processes=2, process_index=index
        )
        assert len(shard) == len(own)
        assert list(shard) == epoch_of(own, 0)
        loader = DataLoader(TensorDataset(torch.arange(examples)), batch_sampler=ReferenceBatchSampler(examples, 4, 12))
        prepared = accelerate.prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False)
        assert len(prepared) == len(own)
        for epoch in (0, 1, 6, 2):  # as a loop with resuming calls it
            prepared.set_epoch(epoch)
            assert [batch[0].tolist() for batch in prepared] == epoch_of(own, epoch)


def prepared_by_accelerate(sampler, **processes):
    accelerate = pytest.importorskip("accelerate.data_loader")
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_sampler=sampler)
    return accelerate, accelerate.prepare_data_loader(loader, put_on_device=False, **processes)


def test_resumed_by_accelerate():
    """skip_first_batches on a prepared loader enters the epoch where set_epoch(epoch, start) does."""
    accelerate, prepared = prepared_by_accelerate(ReferenceBatchSampler(40, 4, 12), num_processes=2, process_index=1)
    prepared.set_epoch(3)
    own = ReferenceBatchSampler(40, 4, 12, num_processes=2, process_index=1)
    resumed = accelerate.skip_first_batches(prepared, 2)
    resumed.set_epoch(3)
    assert [batch[0].tolist() for batch in resumed] == epoch_of(own, 3, start=2)


def test_start_is_kept_by_a_prepared_loader():
    sampler = ReferenceBatchSampler(40, 4, 12)
    _, prepared = prepared_by_accelerate(sampler, num_processes=1, process_index=0)
    prepared.set_epoch(3)
    sampler.set_epoch(3, start=2)
    assert [batch[0].tolist() for batch in prepared] == epoch_of(ReferenceBatchSampler(40, 4, 12), 3, start=2)
