"""The bank against float64 arithmetic over the set it stands for."""

import itertools

import pytest
import torch

from banks import SIGMA, SOURCES, compare, exact, expected_mean, noised, pixels, same
from oracles import normal, posterior, worst
from stf_diffusers import EDM, ReferenceBank, STFTrainingObjective
from stf_diffusers.posterior import reference_norms
from stf_diffusers.reference_classes import SelectedRows, state_by_class

# ---- the set it stands for


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flips", [False, True])
def test_mean_over_all_images(dtype, flips):
    images = pixels()
    stored = images if dtype == torch.uint8 else exact(images).to(dtype)
    bank = ReferenceBank(stored, augmentation="horizontal_flip" if flips else "none")
    members = torch.cat([stored, stored.flip(-1)]) if flips else stored
    assert len(bank) == 30 and bank.num_references == len(members) and bank.nbytes == stored.nbytes
    noisy = noised(images)
    compare(bank.posterior_mean(noisy, 1.0, SIGMA, source_index=SOURCES), expected_mean(noisy, members))


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 1, 1, 2, 2])])
def test_the_images_are_the_banks_own(labels):
    images, own = normal(6, 3), None if labels is None else labels.clone()
    bank = ReferenceBank(images, own)
    noisy, asked, index = images[:3] + normal(3, 3, seed=1), own, torch.arange(3)
    more = {} if own is None else {"labels": labels[:3].clone()}
    before = bank.posterior_mean(noisy, 1.0, 1.0, source_index=index, subset_size=6, **more)
    images.zero_()
    if asked is not None:
        asked.zero_()
    after = bank.posterior_mean(noisy, 1.0, 1.0, source_index=index, subset_size=6, **more)
    assert torch.equal(before.mean, after.mean)


def test_half_precision_of_float_images():
    images = exact(pixels()).float()
    bank = ReferenceBank(images, dtype=torch.float16)
    compare(bank.posterior_mean(noised(images), 1.0, SIGMA), expected_mean(noised(images), images.half()))


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("sort", [False, True], ids=["shuffled", "sorted"])
def test_classes(sort, flips):
    images = pixels()
    labels = torch.arange(30) % 4
    labels[29] = labels[3]
    labels = labels.sort().values if sort else labels
    asked = labels[SOURCES].clone()
    asked[5:] = -1
    bank = ReferenceBank(images, labels, augmentation="horizontal_flip" if flips else "none")
    mask = (asked[:, None] == labels[None]) | (asked == -1)[:, None]
    noisy = noised(images)
    members, mask = (torch.cat([images, images.flip(-1)]), mask.repeat(1, 2)) if flips else (images, mask)
    expected = expected_mean(noisy, members, mask=mask)
    compare(bank.posterior_mean(noisy, 1.0, SIGMA, source_index=SOURCES, labels=asked), expected)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("asked", [[3, 1, 1, -1, 0, 3, 2], [2, 2, 2, 2, 2, 2, 2], [-1] * 7, [0, 1, 2, 3, 0, 1, 2]])
def test_classes_together(asked, dtype, flips):
    """As accelerators have it, gaps between the classes and classes without images on this process among them."""
    images = pixels() if dtype == torch.uint8 else pixels() / 127.5 - 1
    noisy, asked = noised(images).double(), torch.tensor(asked)
    sigma, alpha = SIGMA.double(), torch.ones(7, dtype=torch.float64)
    class_rows = {0: range(0, 9), 1: range(9, 9), 2: range(9, 11), 3: range(11, 30)}
    norms = reference_norms(images)
    by_class, *grouped = (
        state_by_class(noisy, images, class_rows, alpha, sigma, asked, mirrors=flips, norms=norms, together=together)
        for together in (1, 11, 19, 100)
    )
    expected = by_class.result(torch.float64, centred_levels=dtype == torch.uint8)
    for together in grouped:
        result = together.result(torch.float64, centred_levels=dtype == torch.uint8)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        # Which also say how they are to be merged with others.
        total, alone = (state.maximum + state.normalizer.log() for state in (together, by_class))
        torch.testing.assert_close(total, alone, rtol=0, atol=1e-6)


def test_selected_rows():
    rows = torch.arange(100).view(50, 2)
    ranges = [range(3, 3), range(4, 7), range(7, 9), range(20, 21), range(30, 45)]
    selected, expected = (
        SelectedRows(rows, ranges, rows.device),
        torch.cat([rows[part.start : part.stop] for part in ranges]),
    )
    assert selected.shape == (21, 2) and selected.dtype == torch.int64
    for start in range(21):
        for stop in range(start, 22):
            assert selected[start:stop].equal(expected[start:stop])
    assert (
        selected[:].equal(expected) and SelectedRows(rows, [range(0, 50)], rows.device)[:].data_ptr() == rows.data_ptr()
    )


def test_other_classes_are_not_touched(monkeypatch):
    from stf_diffusers import posterior

    seen = []
    original = posterior.posterior_state

    def recording(noisy, reference, alpha, sigma, **keywords):
        seen.append(len(reference[:]))
        return original(noisy, reference, alpha, sigma, **keywords)

    monkeypatch.setattr(posterior, "posterior_state", recording)
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 3)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    bank = ReferenceBank(pixels(), labels)
    bank.posterior_mean(noised(pixels()), 1.0, SIGMA, labels=torch.tensor([1, 2, 1, 2, 1, 2, 1]))
    assert seen == [7, 3]


# ---- joined images


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_joined_images_are_references_of_their_rows(dtype, flips):
    images, labels = pixels(), torch.arange(30) % 4
    held_out = pixels(7, seed=9)
    bank = ReferenceBank(images, labels, dtype=dtype, augmentation="horizontal_flip" if flips else "none")
    noisy, asked = noised(held_out, torch.arange(7)), torch.tensor([0, 1, 2, 3, -1, -1, 2])
    found = bank.posterior_mean(noisy, 1.0, SIGMA, labels=asked, joined=held_out)
    for row in range(7):
        usable = images if asked[row] == -1 else images[labels == asked[row]]
        members = torch.cat([usable, held_out[row : row + 1]])
        members = torch.cat([members, members.flip(-1)]) if flips else members
        expected = expected_mean(noisy[row : row + 1], members, SIGMA[row : row + 1])
        compare(type(found)(*(part[row : row + 1] for part in found)), expected)


@pytest.mark.parametrize(
    ("joined", "more", "error", "said"),
    [
        (pixels(6), {}, ValueError, "an image for each"),
        (pixels(7).float(), {}, TypeError, "Pass uint8 pixels"),
        (pixels(7), {"subset_size": 9, "source_index": SOURCES}, ValueError, "leave subset_size out"),
    ],
)
def test_joined_images_that_do_not_fit(joined, more, error, said):
    with pytest.raises(error, match=said):
        ReferenceBank(pixels()).posterior_mean(noised(pixels()), 1.0, SIGMA, joined=joined, **more)


# ---- unbiased


def toy(dtype=torch.float32):
    return torch.tensor([[-1.0, 0.2], [-0.3, 0.9], [0.4, -0.6], [1.0, 0.1], [0.2, 0.3]], dtype=dtype)


def expectation(data, target, size, fixed=None, double=False):
    """E[target | x_t] by enumeration of the sources and the subsets, at a few x_t, float64.

    `target(x_t, set)` is the estimator. The posterior of the source given x_t weights them.
    """
    points = torch.tensor([[0.1, 0.2], [-0.5, 0.5], [1.2, -0.4]], dtype=torch.float64)
    weights = posterior(points, data, torch.ones(3), torch.full((3,), 0.7, dtype=torch.float64))[0]
    total = torch.zeros_like(points)
    for source in range(len(data)):
        others = [i for i in range(len(data)) if i != source]
        sets = list(itertools.combinations(others, size - 1)) if fixed is None else [tuple(fixed)]
        for rest in sets:
            members = [source, *rest] if double or source not in rest else list(rest)
            estimate = target(points, data[members])
            total += weights[:, source, None] * estimate / len(sets)
    return total, posterior(points, data, torch.ones(3), torch.full((3,), 0.7, dtype=torch.float64))[1]


def by_bank(points, members):
    return ReferenceBank(members).posterior_mean(points, 1.0, 0.7).mean


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_whole_bank_and_fresh_subsets_are_unbiased(size):
    mean, truth = expectation(toy(torch.float64), by_bank, size)
    assert (mean - truth).abs().max() < 1e-12


def test_a_source_counted_twice_and_a_fixed_subset_are_biased():
    """The checks above can fail: these two mistakes are seen."""
    data = toy(torch.float64)
    mean, truth = expectation(data, by_bank, 5, fixed=range(5), double=True)
    assert (mean - truth).abs().max() > 0.02
    mean, truth = expectation(data, by_bank, 3, fixed=[0, 1])
    assert (mean - truth).abs().max() > 0.02


@pytest.mark.parametrize("flips", [False, True])
def test_subsets_contain_the_sources_and_are_fresh(flips):
    images, sources = pixels(), torch.tensor([4, 9])
    bank = ReferenceBank(images, augmentation="horizontal_flip" if flips else "none")
    sigma = torch.tensor([0.01, 0.01])
    generator = torch.Generator().manual_seed(0)
    noisy = noised(images, sources, sigma)
    noisy = noisy.flip(-1) if flips else noisy
    for _ in range(5):
        drawn = bank.posterior_mean(
            noisy, 1.0, sigma, source_index=sources, subset_size=3, generator=generator
        )  # fmt: skip
        assert worst(drawn.mean, exact(images)[sources].flip(-1) if flips else exact(images)[sources]) < 1e-6
    high = torch.full((2,), 500.0)
    means = {
        tuple(bank.posterior_mean(noisy, 1.0, high, source_index=sources, subset_size=3, generator=generator).mean[0].flatten().tolist())
        for _ in range(20)
    }  # fmt: skip
    assert len(means) > 10
    whole = bank.posterior_mean(noisy, 1.0, high, source_index=sources, subset_size=30, generator=generator)
    same(whole, bank.posterior_mean(noisy, 1.0, high))


def test_every_other_image_is_drawn_equally_often():
    """Which third image completes the subset: chi-square over 27 of them; a fair draw fails one time in 10^4."""
    from scipy import stats

    images = torch.arange(30, dtype=torch.float32).view(30, 1, 1) / 15 - 1
    labels = torch.arange(30) % 3
    bank = ReferenceBank(images, labels)
    generator, sources = torch.Generator().manual_seed(0), torch.tensor([4, 9])
    counts = torch.zeros(30)
    for _ in range(1500):
        mean = bank.posterior_mean(
            torch.zeros(2, 1, 1), 1.0, 1e4, source_index=sources, subset_size=3, generator=generator
        ).mean[0].item()  # fmt: skip
        counts[round((3 * (mean + 1)) * 15 - 4 - 9)] += 1
    assert counts[sources].sum() == 0
    others = torch.tensor([i for i in range(30) if i not in (4, 9)])
    assert stats.chisquare(counts[others].numpy()).pvalue > 1e-4


# ---- in the objective


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_objective_takes_a_bank(with_index, flips):
    images = pixels()
    bank = ReferenceBank(images, augmentation="horizontal_flip" if flips else "none")
    clean = images[SOURCES[:4]]
    clean = torch.cat([clean[:2], clean[2:].flip(-1)]) if flips else clean
    objective, index = STFTrainingObjective(EDM()), SOURCES[:4] if with_index else None
    t, noise = torch.tensor([0.01, 0.5, 2.0, 20.0]), normal(4, 2, 5, 6)
    batch = objective.perturb(clean, reference=bank, source_index=index, t=t, noise=noise)
    members = torch.cat([images, images.flip(-1)]) if flips else images
    compare(
        type("Result", (), {"mean": batch.posterior_mean, "effective_sample_size": batch.effective_sample_size}),
        expected_mean(batch.noisy, members, sigma=t),
    )
    dsm = objective.perturb(clean, t=t, noise=noise)
    assert torch.equal(batch.target[0], dsm.target[0]), "at low noise the DSM target, bit for bit"
    assert torch.equal(batch.model_input, dsm.model_input)


@pytest.mark.parametrize("with_index", [False, True])
def test_images_that_are_not_in_the_bank_are_refused(with_index):
    images, labels = pixels(), torch.arange(30) % 3
    index = torch.tensor([4, 9]) if with_index else None
    objective = STFTrainingObjective(EDM())
    changed = images[[4, 9]].clone()
    changed[1, 0, 0, 0] ^= 1
    for bank in (ReferenceBank(images), ReferenceBank(images, augmentation="horizontal_flip")):
        with pytest.raises(ValueError, match=r"images \[1\] of the batch are not in the bank"):
            objective.perturb(changed, reference=bank, source_index=index)
    with pytest.raises(ValueError, match="augmentation='horizontal_flip'"):
        objective.perturb(images[[4, 9]].flip(-1), reference=ReferenceBank(images), source_index=index)
    bank = ReferenceBank(images, labels)
    with pytest.raises(ValueError, match=r"images \[0\] .*under their label|by source_index and label"):
        objective.perturb(images[[4, 9]], reference=bank, source_index=index, labels=torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="leave reference_labels out"):
        objective.perturb(images[[4, 9]], reference=bank, labels=labels[[4, 9]], reference_labels=labels)
    objective.perturb(images[[4, 9]], reference=bank, source_index=index, labels=torch.tensor([1, -1]))


def test_every_batch_with_an_index_is_compared():
    images, labels = pixels(), torch.arange(30) % 3
    bank, objective = ReferenceBank(images, labels), STFTrainingObjective(EDM())
    objective.perturb(images[:4], reference=bank)
    for _ in range(2):
        objective.perturb(images[:4], reference=bank, source_index=torch.arange(4), labels=labels[:4])
        with pytest.raises(ValueError, match="not in the bank where they should be"):
            objective.perturb(images[4:8], reference=bank, source_index=torch.arange(4))
        with pytest.raises(ValueError, match="not in the bank where they should be"):
            objective.perturb(images[:4], reference=bank, source_index=torch.arange(4), labels=labels[1:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_banks_of_other_ranges_and_close_neighbours_are_searched_right(dtype):
    latents = normal(500, 4, 8, 8) * 1.5
    STFTrainingObjective(EDM()).perturb(latents[:8], reference=ReferenceBank(latents, dtype=dtype))
    if dtype == torch.float32:
        points = normal(20_000, 2)
        STFTrainingObjective(EDM()).perturb(points[:64], reference=ReferenceBank(points))


# ---- wrong arguments


WRONG = {
    "float images as uint8": (lambda: ReferenceBank(torch.zeros(2, 3), dtype=torch.uint8), TypeError, "rounded to uint8"),
    "a list": (lambda: ReferenceBank([[0.0]]), TypeError, "images must be a tensor .* got list"),
    "one dimension": (lambda: ReferenceBank(torch.zeros(3)), ValueError, r"at least 2 dimensions; got \(3,\)"),
    "a list of labels": (lambda: ReferenceBank(torch.zeros(2, 3), [0, 1]), TypeError, "labels must be a tensor .* got list"),
    "boolean labels": (lambda: ReferenceBank(torch.zeros(2, 3), torch.ones(2).bool()), TypeError, "got torch.bool"),
    "integers": (lambda: ReferenceBank(torch.zeros(2, 3, dtype=torch.int32)), TypeError, "got torch.int32"),
    "empty": (lambda: ReferenceBank(torch.zeros(0, 3)), ValueError, "at least one image"),
    "labels": (lambda: ReferenceBank(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), ValueError, "one for each"),
    "float labels": (lambda: ReferenceBank(torch.zeros(2, 3), torch.zeros(2)), TypeError, "labels must be integers"),
    "negative labels": (lambda: ReferenceBank(torch.zeros(2, 3), torch.tensor([0, -1])), ValueError, "at least 0"),
    "not finite": (lambda: ReferenceBank(torch.tensor([[0.0], [torch.nan]])), ValueError, r"images \[1\] .* not finite"),
    "flips of vectors": (lambda: ReferenceBank(torch.zeros(2, 3), augmentation="horizontal_flip"), ValueError, "flips need"),
    "augmentation": (lambda: ReferenceBank(torch.zeros(2, 3), augmentation="crop"), ValueError, "'horizontal_flip'"),
    "shard": (lambda: ReferenceBank(torch.zeros(2, 3), process_shard=(2, 2)), ValueError, "process_shard must be"),
    "no processes": (
        lambda: ReferenceBank(torch.zeros(2, 3), process_shard=(0, 2)).posterior_mean(torch.zeros(1, 3), 1.0, 1.0),
        ValueError,
        "no process group",
    ),
    "shape": (lambda: ReferenceBank(torch.zeros(2, 3)).posterior_mean(torch.zeros(1, 4), 1.0, 1.0), ValueError, "noisy must be"),
    "sigma": (
        lambda: ReferenceBank(torch.zeros(2, 3)).posterior_mean(torch.zeros(1, 3), 1.0, 0.0),
        ValueError,
        "sigma must be positive",
    ),
    "no labels": (
        lambda: ReferenceBank(torch.zeros(2, 3)).posterior_mean(torch.zeros(1, 3), 1.0, 1.0, labels=torch.tensor([0])),
        ValueError,
        "the bank has no labels",
    ),
    "unknown label": (
        lambda: ReferenceBank(torch.zeros(2, 3), torch.tensor([0, 1])).posterior_mean(
            torch.zeros(1, 3), 1.0, 1.0, labels=torch.tensor([2])
        ),
        ValueError,
        r"no image of the bank has a label of \[2\]",
    ),
    "index": (
        lambda: ReferenceBank(torch.zeros(2, 3)).posterior_mean(torch.zeros(1, 3), 1.0, 1.0, source_index=torch.tensor([2])),
        ValueError,
        r"source_index must lie in \[0, 2\)",
    ),
    "subset without sources": (
        lambda: ReferenceBank(torch.zeros(2, 3)).posterior_mean(torch.zeros(1, 3), 1.0, 1.0, subset_size=1),
        ValueError,
        "needs source_index",
    ),
    "repeats": (
        lambda: ReferenceBank(torch.zeros(4, 3)).posterior_mean(
            torch.zeros(2, 3), 1.0, 1.0, subset_size=3, source_index=torch.tensor([1, 1])
        ),
        ValueError,
        "has repeats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_to_do(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
