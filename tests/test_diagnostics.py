"""Variances of targets against quadrature, enumeration and a plain Monte Carlo; what is 0 is 0, what is equal is equal."""

import io
import math
from itertools import combinations

import pytest
import torch

import stf_diffusers.diagnostics as diagnostics
from oracles import SHARED, images, normal, posterior
from stf_diffusers import EDM, VE, VP, FlowMatching, ReferenceBank, SchedulerProcess, target_variance
from stf_diffusers.prediction import edm_preconditioning

CIFAR10 = SHARED / "data" / "cifar10" / "train-00000-of-00001.parquet"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def z_score(estimate, expected):
    """How many stated standard errors an estimate is off."""
    return abs(estimate.value - expected) / estimate.standard_error


def density(grid, centres, variance):
    """N(x; centre, variance) for a grid (G,) and centres (k,), (G, k)."""
    return (-((grid[:, None] - centres) ** 2) / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)


def exact(points, alpha, sigma, sizes=()):
    """V_DSM, D, effective sample size and V_STF by n of points (N,), by quadrature over x_t and all sets."""
    points, total = points.double(), len(points)
    reach = 9 * sigma
    grid = torch.linspace(alpha * points.min().item() - reach, alpha * points.max().item() + reach, 8001).double()
    joint = density(grid, alpha * points, sigma**2) / total
    marginal = joint.sum(1)
    w = joint / marginal[:, None].clamp_min(1e-300)
    mean = w @ points
    y = 1 / (total * w)
    f = torch.where(y < 1.5, (1 / y - 1) ** 2, 8 * y / 27 - 1 / 3)
    terms = torch.where(w > 0, w * f, 8 / (27 * total))
    by_row = {
        "dsm": (w * (points - mean[:, None]) ** 2).sum(1),
        "divergence": terms.sum(1),
        "effective": 1 / (w**2).sum(1),
    }
    for n in sizes:
        members = [list(rest) for rest in combinations(range(total), n)]
        error = torch.zeros_like(grid)
        for chosen in members:
            inside = w[:, chosen]
            share = inside / inside.sum(1, keepdim=True).clamp_min(1e-300)
            # The source is each member with its weight; a set with a given source is one of C(N - 1, n - 1).
            chance = inside.sum(1) / math.comb(total - 1, n - 1)
            error += chance * (share @ points[chosen] - mean) ** 2
        by_row[n] = error
    return {name: torch.trapezoid(marginal * row, grid).item() for name, row in by_row.items()}


@pytest.mark.parametrize(
    "process, t", [(EDM(), 0.3), (EDM(), 0.8), (VE(), 3.0), (VP(), 0.3), (FlowMatching(), 0.45)], ids=str
)
def test_few_points_against_quadrature_and_enumeration(process, t):
    points = torch.tensor([-1.3, -0.4, -0.35, 0.2, 0.9, 1.0], dtype=torch.float64)
    time = torch.tensor([t], dtype=torch.float64)
    expected = exact(points, process.alpha(time).item(), process.sigma(time).item(), sizes=(1, 2, 4, 6))
    (found,) = target_variance(
        process, points[:, None], [t], reference_batch_sizes=(1, 2, 4, 6), num_samples=4000, generator=seeded()
    )
    assert z_score(found.dsm, expected["dsm"]) < 4
    assert z_score(found.divergence, expected["divergence"]) < 4
    assert z_score(found.effective_sample_size, expected["effective"]) < 4
    for n in (1, 2, 4):
        assert z_score(found.stf[n], expected[n]) < 4, n
        assert z_score(found.stf_share[n], expected[n] / expected["dsm"]) < 4, n
        assert found.stf[n].standard_error < 0.05 * expected["dsm"]
    assert expected[1] == pytest.approx(expected["dsm"], rel=1e-9)
    assert found.stf[6].value < 1e-25 and expected[6] < 1e-12


@pytest.mark.parametrize("process", [EDM(), VP(), FlowMatching()], ids=str)
def test_two_gaussians_against_quadrature(process):
    # Equally likely quantiles stand for the continuous law; x_t and x0 given x_t and the component are Gaussian.
    spread, centres = 0.15, torch.tensor([-1.0, 1.0], dtype=torch.float64)
    ranks = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    quantiles = spread * math.sqrt(2) * torch.erfinv(2 * ranks - 1)
    points = (centres[:, None] + quantiles).reshape(-1, 1)
    times = process.time_of(torch.tensor([0.2, 0.7, 2.0], dtype=torch.float64))
    found = target_variance(process, points, times, num_samples=3000, generator=seeded())
    for t, row in zip(times, found, strict=True):
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
        marginal_variance = alpha**2 * spread**2 + sigma**2
        grid = torch.linspace(-alpha - 9, alpha + 9, 20001).double()
        parts = density(grid, alpha * centres, marginal_variance) / 2
        weights = parts / parts.sum(1, keepdim=True).clamp_min(1e-300)
        means = centres + (grid[:, None] - alpha * centres) * alpha * spread**2 / marginal_variance
        within = spread**2 * sigma**2 / marginal_variance
        variance = within + (weights * means**2).sum(1) - (weights * means).sum(1) ** 2
        expected = torch.trapezoid(parts.sum(1) * variance, grid).item()
        assert z_score(row.dsm, expected) < 4
        assert row.dsm.standard_error < 0.05 * expected


def test_standard_errors_are_those_of_repetition():
    points = torch.tensor([-1.3, -0.4, -0.35, 0.2, 0.9, 1.0], dtype=torch.float64)
    expected = exact(points, 1.0, 0.4, sizes=(2,))
    squares = []
    for seed in range(60):
        (found,) = target_variance(
            EDM(), points[:, None], [0.4], reference_batch_sizes=(1, 2), num_samples=200, generator=seeded(seed)
        )
        z = [z_score(found.dsm, expected["dsm"]), z_score(found.stf[2], expected[2])]
        z += [z_score(found.stf_share[1], 1.0), z_score(found.stf_share[2], expected[2] / expected["dsm"])]
        squares.append(z)
    # Means of 60 squared standard normals: 1 with a standard deviation of 0.18.
    means = torch.tensor(squares).square().mean(0)
    assert bool(((means > 0.5) & (means < 1.6)).all()), means


def test_quotients_are_of_paired_draws():
    # With two images the other source is the other image: both numbers are the same for each x_t.
    (found,) = target_variance(EDM(), images(2, 3), [0.5], reference_batch_sizes=(1,), generator=seeded())
    assert found.stf[1] == pytest.approx(found.dsm) and found.dsm.standard_error > 1e-3
    assert found.stf_share[1].value == pytest.approx(1) and found.stf_share[1].standard_error < 1e-9


def test_images_against_a_plain_monte_carlo():
    data = images(40, 3, 4, 4, dtype=torch.float64)
    data[1] = data[0] + 0.02 * images(3, 4, 4, seed=1, dtype=torch.float64)
    draw, sigma, errors = seeded(1), 0.9, {1: [], 8: []}
    for _ in range(1500):
        order = torch.randperm(40, generator=draw)
        noisy = data[order[:1]] + sigma * torch.randn(1, 3, 4, 4, generator=draw, dtype=torch.float64)
        coefficients = torch.ones(1), torch.full((1,), sigma, dtype=torch.float64)
        mean = posterior(noisy, data, *coefficients)[1]
        for n, found in errors.items():
            found.append((posterior(noisy, data[order[:n]], *coefficients)[1] - mean).square().sum())
    (found,) = target_variance(
        EDM(), data, [sigma], reference_batch_sizes=(1, 8), num_samples=1500, generator=seeded(2)
    )
    for n, squares in errors.items():
        plain = torch.stack(squares)
        for estimate in (found.stf[n], found.dsm) if n == 1 else (found.stf[n],):
            combined = math.hypot(estimate.standard_error, plain.std().item() / math.sqrt(len(plain)))
            assert abs(estimate.value - plain.mean().item()) < 4 * combined, n
    alone = torch.stack(errors[1]).std().item() / math.sqrt(len(errors[1]))
    assert found.dsm.standard_error < 0.8 * alone, "all sources of an x_t say more than one"


def test_theorem_2_holds_at_high_noise():
    data, sizes = normal(4000, 3, dtype=torch.float64), (8, 16, 32, 64, 128, 256)
    (found,) = target_variance(EDM(), data, [60.0], reference_batch_sizes=sizes, num_samples=1200, generator=seeded())
    logs = [math.log(n - 1) for n in sizes]
    # Drawn without replacement from 4,000: the finite population's factor is taken out.
    values = [math.log(found.stf[n].value * 3999 / (4000 - n)) for n in sizes]
    centre, level = sum(logs) / len(logs), sum(values) / len(values)
    slope = sum((x - centre) * (y - level) for x, y in zip(logs, values, strict=True)) / sum(
        (x - centre) ** 2 for x in logs
    )
    assert slope == pytest.approx(-1, abs=0.05)
    for n in sizes:
        assert found.stf[n].value < found.dsm.value / (n - 1) + 3 * found.stf[n].standard_error
    assert found.divergence.value < 0.05


def test_low_noise_has_no_variance_and_high_noise_all_of_it():
    data = images(200, 1, 4, 4, dtype=torch.float64)
    low, high = target_variance(EDM(), data, [1e-3, 1e4], reference_batch_sizes=(16, 200), generator=seeded())
    assert low.dsm.value == low.stf[16].value == 0 and low.effective_sample_size.value == 1
    assert low.divergence.value == pytest.approx(199**2, rel=2e-4) and math.isnan(low.stf_share[16].value)
    whole = (data - data.mean(0)).square().flatten(1).sum(1).mean().item()
    assert high.dsm.value == pytest.approx(whole, rel=1e-6) and high.effective_sample_size.value > 199.9
    assert high.divergence.value < 1e-4 and high.stf[200].value < 1e-25


def test_copies_share_the_posterior_and_have_no_variance():
    data = images(20, 1, 4, 4)
    (found,) = target_variance(EDM(), torch.cat([data, data]), [1e-3], reference_batch_sizes=(1, 7), generator=seeded())
    assert found.dsm.value < 1e-12 and found.stf[1].value < 1e-12 and found.stf[7].value < 1e-12
    assert found.effective_sample_size.value == pytest.approx(2, rel=1e-6)


def test_classes_have_the_conditional_law():
    points = torch.tensor([-1.3, -0.4, -0.35, 0.2, 0.9, 1.0, 5.0], dtype=torch.float64)
    labels = torch.tensor([0, 3, 0, 3, 3, 0, 7])  # the last is alone in its class
    of_class = [exact(points[labels == c], 1.0, 0.5, sizes=(2,)) for c in (0, 3)]
    expected = {name: sum(3 * found[name] for found in of_class) / 7 for name in ("dsm", 2, "effective")}
    arguments = {"reference_batch_sizes": (2,), "num_samples": 4000}
    (found,) = target_variance(EDM(), points[:, None], [0.5], labels=labels, generator=seeded(), **arguments)
    assert z_score(found.dsm, expected["dsm"]) < 4 and z_score(found.stf[2], expected[2]) < 4
    assert z_score(found.effective_sample_size, expected["effective"] + 1 / 7) < 4
    (every,) = target_variance(EDM(), points[:, None], [0.5], generator=seeded(), **arguments)
    assert z_score(every.dsm, expected["dsm"]) > 10, "without labels it is another law"
    bank = ReferenceBank(points[:, None], labels)
    assert target_variance(EDM(), bank, [0.5], generator=seeded(), **arguments) == [found]


def test_blocks_and_chunks_do_not_matter(monkeypatch):
    data, labels = images(90, 3, 4, 4), torch.arange(90) % 2
    arguments = {"reference_batch_sizes": (4, 20), "num_samples": 16}
    for classes in (None, labels):
        whole = target_variance(EDM(), data, [0.5, 2.0], labels=classes, generator=seeded(), **arguments)
        with monkeypatch.context() as patch:
            patch.setattr(diagnostics, "_CHUNK_ELEMENTS", 7 * 48)
            patch.setattr(diagnostics, "_BLOCK_ELEMENTS", 3 * 5 * 90)
            parts = target_variance(EDM(), data, [0.5, 2.0], labels=classes, generator=seeded(), **arguments)
        for one, other in zip(whole, parts, strict=True):
            for name in ("dsm", "divergence", "effective_sample_size"):
                assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-10)
            for n in (4, 20):
                assert other.stf[n] == pytest.approx(one.stf[n], rel=1e-10)


def test_pixels_floats_and_files_agree(tmp_path):
    pixels = torch.randint(256, (60, 3, 4, 4), generator=seeded(), dtype=torch.uint8)
    ReferenceBank(pixels).save(tmp_path / "bank.safetensors")
    sources = [
        pixels,
        (pixels.float() / 127.5) - 1,
        ReferenceBank(pixels),
        ReferenceBank.open(tmp_path / "bank.safetensors"),
    ]
    results = [
        target_variance(VP(), data, [0.4], reference_batch_sizes=(8,), num_samples=20, generator=seeded())
        for data in sources
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    data = images(500, 3, 8, 8)
    arguments = {"reference_batch_sizes": (32,), "num_samples": 40}
    (cpu,) = target_variance(EDM(), data, [2.0], generator=seeded(), **arguments)
    for gpu in (
        target_variance(EDM(), data.cuda(), [2.0], generator=seeded(), **arguments)[0],
        target_variance(EDM(), data, [2.0], generator=seeded(), device="cuda", **arguments)[0],
    ):
        assert gpu.dsm == pytest.approx(cpu.dsm, rel=1e-9) and gpu.stf[32] == pytest.approx(cpu.stf[32], rel=1e-9)


def test_factors_translate_to_other_targets():
    (row,) = target_variance(VP(), images(10, 1, 2, 2), [0.5], num_samples=2, generator=seeded())
    alpha, sigma = row.alpha, row.sigma
    assert row.noise_level == sigma / alpha
    assert row.factor("sample") == 1 and row.factor("epsilon") == pytest.approx(alpha**2 / sigma**2)
    assert row.factor("score") == pytest.approx(alpha**2 / sigma**4)
    assert row.factor("v_prediction") == pytest.approx(1 / sigma**2)  # alpha^2 + sigma^2 = 1
    assert row.output_factor == pytest.approx(row.factor("epsilon"))
    (row,) = target_variance(EDM(), images(10, 1, 2, 2), [2.0], num_samples=2, generator=seeded())
    # F = (D - c_skip x) / c_out, and D is x0.
    assert row.output_factor == pytest.approx(
        1 / edm_preconditioning(torch.tensor(2.0), 0.5).c_out.item() ** 2, rel=1e-6
    )


def test_scheduler_timesteps():
    from diffusers import DDPMScheduler

    process = SchedulerProcess(DDPMScheduler())
    rows = target_variance(process, images(30, 1, 4, 4), process.timesteps[[99, 900]], generator=seeded())
    assert rows[0].alpha == pytest.approx(process.alpha(torch.tensor([99])).item())
    assert 0 <= rows[0].dsm.value < rows[1].dsm.value


DATA = images(12, 3, 4, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"reference_batch_sizes": (4, 13)}, r"\[1, 12\]"),
        ({"reference_batch_sizes": (0,)}, r"\[1, 12\]"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"times": []}, "times must be a list"),
        ({"times": [[1.0]]}, "times must be a list"),
        ({"times": [0.0]}, "positive sigma"),
        ({"times": [math.nan]}, "positive sigma"),
        ({"data": DATA[:0]}, "at least one image"),
        ({"data": DATA * math.nan}, "not finite"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "shape"),
        ({"data": ReferenceBank(DATA), "labels": torch.zeros(12, dtype=torch.int64)}, "its own labels"),
        ({"data": ReferenceBank(DATA, augmentation="horizontal_flip")}, r"torch\.cat"),
        ({"data": ReferenceBank(DATA, process_shard=(0, 2))}, "sharded"),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        target_variance(**{"process": EDM(), "data": DATA, "times": [1.0], **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": DATA.tolist()}, "images must be a tensor"),
        ({"labels": [0] * 12}, "labels must be a tensor"),
        ({"num_samples": 4.0}, "num_samples must be whole numbers; got 4.0"),
        ({"reference_batch_sizes": [2.5]}, "reference_batch_sizes must be whole numbers; got 2.5"),
    ],
)
def test_wrong_types_say_what_to_do(arguments, message):
    with pytest.raises(TypeError, match=message):
        target_variance(**{"process": EDM(), "data": DATA, "times": [1.0], **arguments})


@pytest.mark.skipif(not CIFAR10.is_file(), reason="needs CIFAR-10 beside the repository")
def test_cifar10_has_the_variances_that_were_measured_before():
    """An earlier measurement by other code, all 50,000 images: V_DSM, and V_STF at 1,024 to within its 1 to 5 %."""
    import numpy as np
    from PIL import Image
    from pyarrow import parquet

    table = {
        2.8: (9.8, 0.9, None),
        5.5: (250, 3, 130),
        10.7: (517, 3, 42),
        20.9: (655, 3, 3.4),
        40.9: (720, 2, 1.1),
        80.0: (745, 1, 0.81),
    }
    column = parquet.read_table(CIFAR10, columns=["img"])["img"].to_pylist()
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(entry["bytes"]))) for entry in column]))
    bank = ReferenceBank(pixels.permute(0, 3, 1, 2))
    for sigma, (variance, error, stf) in table.items():
        # At 2.8 one x_t in ten has more than one likely source.
        draws, sizes = (200, ()) if sigma < 3 else (32, (1024,))
        (row,) = target_variance(
            EDM(), bank, [sigma], reference_batch_sizes=sizes, num_samples=draws, generator=seeded()
        )
        assert abs(row.dsm.value - variance) < 3 * math.hypot(row.dsm.standard_error, error), row
        assert row.dsm.standard_error < 0.2 * variance
        for estimate in row.stf.values():
            assert abs(estimate.value - stf) < 3 * math.hypot(estimate.standard_error, 0.05 * stf), row
