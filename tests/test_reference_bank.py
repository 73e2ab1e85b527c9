"""The bank against float64 arithmetic over the set it stands for, on one process and on several, in memory and in files."""

import importlib
import itertools
import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from oracles import normal, posterior, rows, worst
from stf_diffusers import EDM, ReferenceBank, ReferenceBatchSampler, SharedReferences, STFTrainingObjective
from stf_diffusers.dataset_images import pil_to_pixels

SIGMA = torch.tensor([0.002, 0.02, 0.3, 1.0, 3.0, 10.0, 80.0])
SOURCES = torch.tensor([3, 17, 0, 28, 28, 5, 11])


def pixels(n=30, shape=(2, 5, 6), seed=0):
    """Random images, two of them the same."""
    images = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[n - 1] = images[3]
    return images


def exact(images):
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()


def noised(images, index=SOURCES, sigma=SIGMA):
    x0 = exact(images)[index]
    return (x0 + rows(sigma, x0) * normal(*x0.shape, seed=1)).float()


def expected_mean(noisy, images, sigma=SIGMA, mask=None):
    weights, mean = posterior(noisy, exact(images), torch.ones_like(sigma), sigma, mask)
    return mean, 1 / weights.square().sum(1)


def compare(result, expected):
    mean, effective_sample_size = expected
    assert worst(result.mean, mean) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), effective_sample_size, rtol=1e-4, atol=0)


def same(result, other, bound=1e-6):
    assert worst(result.mean, other.mean) < bound
    torch.testing.assert_close(result.effective_sample_size, other.effective_sample_size, rtol=1e-5, atol=0)


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


def test_other_classes_are_not_touched(monkeypatch):
    from stf_diffusers import reference_bank

    seen = []
    original = reference_bank.posterior_state

    def recording(noisy, reference, alpha, sigma, **keywords):
        seen.append(len(keywords["rows"]))
        return original(noisy, reference, alpha, sigma, **keywords)

    monkeypatch.setattr(reference_bank, "posterior_state", recording)
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 3)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    bank = ReferenceBank(pixels(), labels)
    bank.posterior_mean(noised(pixels()), 1.0, SIGMA, labels=torch.tensor([1, 2, 1, 2, 1, 2, 1]))
    assert seen == [7, 3]


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


# ---- files and data sets


def test_a_replaced_file_does_not_change_an_open_bank(tmp_path):
    path, noisy = tmp_path / "bank.safetensors", noised(pixels())
    ReferenceBank(pixels()).save(path)
    bank = ReferenceBank.open(path)
    expected = bank.posterior_mean(noisy, 1.0, SIGMA)
    copy = pickle.loads(pickle.dumps(bank))  # noqa: S301
    ReferenceBank(pixels(seed=1)).save(path)
    assert torch.equal(bank.posterior_mean(noisy, 1.0, SIGMA).mean, expected.mean)
    assert torch.equal(copy.posterior_mean(noisy, 1.0, SIGMA).mean, expected.mean)
    with pytest.raises(ValueError, match="was replaced after it was opened"):
        pickle.loads(pickle.dumps(bank))  # noqa: S301


def test_a_transform_that_changed_inside_is_noticed(tmp_path, monkeypatch):
    """Its name stays, what it does does not: the fingerprint alone would not tell."""
    (tmp_path / "my_transform.py").write_text(
        "import torch\ndef read(image):\n    return torch.full((1, 2, 2), 7, dtype=torch.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_transform

    path = tmp_path / "bank.safetensors"
    ReferenceBank.from_dataset(small_dataset(), transform=my_transform.read, path=path, quiet=True)
    ReferenceBank.from_dataset(small_dataset(), transform=my_transform.read, path=path, quiet=True)
    (tmp_path / "my_transform.py").write_text(
        "import torch\ndef read(image):\n    return torch.full((1, 2, 2), 8, dtype=torch.uint8)\n\n"
    )
    importlib.reload(my_transform)
    with pytest.raises(ValueError, match="image 0 differs"):
        ReferenceBank.from_dataset(small_dataset(), transform=my_transform.read, path=path, quiet=True)


def test_two_processes_write_one_file(tmp_path):
    """Neither reads what the other has half written."""
    script = (
        "import sys; sys.path[:0] = [sys.argv[1]]; import test_reference_bank as t;"
        "b = t.ReferenceBank.from_dataset(t.small_dataset(600), path=sys.argv[2] + '/bank.safetensors', quiet=True);"
        "assert (b.images[:] == t.torch.stack([t.pil_to_pixels(i) for i in t.small_dataset(600)['image']])).all()"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]


def test_default_transform_of_unusual_modes():
    square = np.array([[0, 1], [1, 0]], dtype=bool)
    assert pil_to_pixels(Image.fromarray(square)).flatten().tolist() == [0, 255, 255, 0]
    palette = Image.new("RGB", (2, 2), (10, 20, 30)).quantize(2)
    assert palette.mode == "P" and pil_to_pixels(palette)[:, 0, 0].tolist() == [10, 20, 30]
    for mode in ("I;16", "F", "CMYK"):
        with pytest.raises(ValueError, match=f"mode '{mode}'"):
            pil_to_pixels(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("labelled", [False, True])
def test_saved_and_reopened(labelled, dtype, tmp_path):
    images = pixels() if dtype == torch.uint8 else exact(pixels()).to(dtype)
    labels = torch.arange(30) % 4 if labelled else None
    bank = ReferenceBank(images, labels)
    bank.save(tmp_path / "bank.safetensors", fingerprint="abc")
    noisy, asked = noised(pixels()), labels[SOURCES] if labelled else None
    expected = bank.posterior_mean(noisy, 1.0, SIGMA, labels=asked)
    for device in (None, "cpu"):
        opened = ReferenceBank.open(tmp_path / "bank.safetensors", device=device, fingerprint="abc")
        result = opened.posterior_mean(noisy, 1.0, SIGMA, labels=asked)
        assert torch.equal(result.mean, expected.mean)
        opened.check_sources(exact(images)[SOURCES].float(), SOURCES, asked)
    with pytest.raises(ValueError, match="made of another data set or with other preprocessing"):
        ReferenceBank.open(tmp_path / "bank.safetensors", fingerprint="other")
    assert [path.name for path in tmp_path.iterdir()] == ["bank.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "bank.safetensors", framework="pt") as file:
        assert file.get_tensor("images").shape == images.shape, "the file is safetensors to others too"


def test_damaged_files(tmp_path):
    path = tmp_path / "bank.safetensors"
    ReferenceBank(pixels()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="damaged"):
        ReferenceBank.open(path)
    path.write_bytes(b"not a bank at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        ReferenceBank.open(path)


def small_dataset(count=20, seed=0):
    draw = np.random.default_rng(seed)
    images = [Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)


def crop(image):
    return torch.from_numpy(np.array(image)[:, :4].copy()).permute(2, 0, 1)


def test_from_a_dataset(tmp_path, capsys):
    data = small_dataset()
    images = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in data])
    labels = torch.tensor(data["label"])
    reference = ReferenceBank(images, labels)
    noisy, asked = noised(images, SOURCES % 20), labels[SOURCES % 20]
    expected = reference.posterior_mean(noisy, 1.0, SIGMA, labels=asked)
    path = tmp_path / "bank.safetensors"
    for where in (None, path, path):
        bank = ReferenceBank.from_dataset(data, "image", "label", path=where)
        assert torch.equal(bank.posterior_mean(noisy, 1.0, SIGMA, labels=asked).mean, expected.mean)
        bank.check_sources(exact(images)[SOURCES % 20].float(), SOURCES % 20, asked)
    assert capsys.readouterr().err.count("Building the reference bank: 100%") == 2, "the file is used again"
    for changed in (
        lambda: ReferenceBank.from_dataset(data, "image", "label", crop, path=path),
        lambda: ReferenceBank.from_dataset(small_dataset(seed=1), "image", "label", path=path),
        lambda: ReferenceBank.from_dataset(data, "image", path=path),
    ):
        with pytest.raises(ValueError, match="made of another data set or with other preprocessing"):
            changed()


def test_images_of_different_shapes_leave_no_file(tmp_path):
    images = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))]
    data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match=r"image 1 is torch.uint8 \(3, 5, 4\)"):
        ReferenceBank.from_dataset(data, path=tmp_path / "bank.safetensors", quiet=True)
    assert not list(tmp_path.iterdir())


# ---- wrong arguments


WRONG = {
    "float images as uint8": (lambda: ReferenceBank(torch.zeros(2, 3), dtype=torch.uint8), TypeError, "rounded to uint8"),
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


# ---- shared reference batches


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shared_lists_are_one_list_without_repeats(processes):
    samplers = [
        ReferenceBatchSampler(40, 4, 23, seed=5, num_processes=processes, process_index=rank, share_references=True)
        for rank in range(processes)
    ]
    unshared = [ReferenceBatchSampler(40, 4, 4, 5, processes, rank) for rank in range(processes)]
    for lists, sources in zip(
        zip(*samplers, strict=True), zip(*unshared, strict=True), strict=True
    ):  # fmt: skip
        together = [index for one in lists for index in one]
        assert len(together) == 23 and len(set(together)) == 23
        assert [one[:4] for one in lists] == list(sources), "the sources are those without sharing"
        assert [len(one) for one in lists] == [sampler.batch_size for sampler in samplers]
    with pytest.raises(ValueError, match="hold the sources of all processes"):
        ReferenceBatchSampler(40, 4, 7, num_processes=2, share_references=True)


# ---- processes


def distributed_results(rank, world, folder):
    """Everything that is compared over processes, computed by one of them. Uneven shards, uneven batches."""
    images, labels = pixels(), torch.arange(30) % 4
    mine = torch.arange(7)[rank * 7 // world : (rank + 1) * 7 // world] if world < 4 else None
    noisy, sigma = noised(images)[mine], SIGMA[mine]
    asked = labels[SOURCES].clone()
    asked[[1, 6]] = -1
    shard = (rank, world) if world > 1 else None
    results = {}
    for flips in ("none", "horizontal_flip"):
        bank = ReferenceBank(images, augmentation=flips, process_shard=shard)
        results[f"bank {flips}"] = bank.posterior_mean(noisy, 1.0, sigma)
        bank.check_sources(exact(images)[SOURCES[mine]].float(), None, None)
        classes = ReferenceBank(images, labels, augmentation=flips, process_shard=shard)
        results[f"classes {flips}"] = classes.posterior_mean(noisy, 1.0, sigma, labels=asked[mine])
    opened = ReferenceBank.open(Path(folder) / "bank.safetensors", process_shard=shard)
    results["file"] = opened.posterior_mean(noisy, 1.0, sigma, labels=asked[mine])
    batch = STFTrainingObjective(EDM()).perturb(
        images[SOURCES[mine]], reference=bank, t=sigma, noise=normal(7, 2, 5, 6)[mine]
    )
    results["objective"] = batch.posterior_mean, batch.effective_sample_size
    if world > 1:
        order = torch.cat([SOURCES.unique(), torch.tensor([i for i in range(30) if i not in SOURCES])])
        part = torch.cat([order[: len(SOURCES.unique())][rank::world], order[len(SOURCES.unique()) :][rank::world]])
        shared = SharedReferences(images[part], labels[part])
        results["shared"] = shared.posterior_mean(noisy, 1.0, sigma, labels=asked[mine])
        with pytest.raises(ValueError, match="must be its images"):
            shared.check_sources(torch.zeros(2, 2, 5, 6), None, None)
    torch.save({name: (value[0], value[1]) for name, value in results.items()}, f"{folder}/{world}-{rank}.pt")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same_targets(world, tmp_path):
    images, labels = pixels(), torch.arange(30) % 4
    ReferenceBank(images, labels).save(tmp_path / "bank.safetensors")
    distributed_results(0, 1, tmp_path)
    single = torch.load(tmp_path / "1-0.pt", weights_only=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port"]
    command += [str(free_port()), __file__, str(tmp_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    assert len({len(part["file"][0]) for part in parts}) == 2, "the batches are uneven"
    single["shared"] = single["classes none"]
    for name, (mean, effective_sample_size) in single.items():
        assert worst(torch.cat([part[name][0] for part in parts]), mean) < 1e-6, name
        torch.testing.assert_close(
            torch.cat([part[name][1] for part in parts]), effective_sample_size, rtol=1e-5, atol=0
        )


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    random.seed(0)
    distributed_results(torch.distributed.get_rank(), torch.distributed.get_world_size(), sys.argv[1])
    torch.distributed.destroy_process_group()
