"""The streaming posterior mean against golden numbers and planted duplicates, its shapes and errors."""

import io

import pytest
import torch

from oracles import CONTEXTS, SHARED, SIGMAS, images, load_golden, normal, posterior, problem, rows, worst
from stf_diffusers import posterior_mean

# ---- golden numbers


@pytest.fixture(scope="module", params=["slice", "whole"])
def golden(request):
    if request.param == "whole" and not (SHARED / "oracle").is_dir():
        pytest.skip(f"no {SHARED / 'oracle'}")
    return load_golden(request.param == "whole")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("process", ["edm", "vp", "fm"])
def test_golden(golden, process, context):
    """1e-5 of the reference implementations' float64 at every time, exact and near duplicates included."""
    alpha, sigma = {
        "edm": lambda: (torch.ones(12), golden["edm_sigma"]),
        "vp": lambda: (golden["vp_alpha"], golden["vp_sigma"]),
        "fm": lambda: (1 - golden["fm_t"], golden["fm_t"]),
    }[process]()
    x0, noise = golden["reference"][:12], golden["noise"]
    noisy = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
    if f"{process}_noisy" in golden:
        assert torch.equal(noisy, golden[f"{process}_noisy"])

    def compare(result, key):
        stride = golden["stride"]
        assert worst(result.mean.flatten(1)[:, ::stride], golden[key].reshape(12, -1)) < 1e-5

    with CONTEXTS[context]():
        full = posterior_mean(noisy, golden["reference"], alpha=alpha, sigma=sigma)
        compare(full, f"{process}_target_float64")
        if process == "edm":
            labels = golden["labels"]
            mask = labels[:12, None] == labels[None]
            compare(
                posterior_mean(noisy, golden["reference"], alpha=alpha, sigma=sigma, mask=mask),
                "edm_target_same_class_float64",
            )
            ess = 1 / golden["edm_weights_float64"].double().square().sum(1)
            torch.testing.assert_close(full.effective_sample_size.double(), ess, rtol=1e-5, atol=0)


# ---- planted duplicates


def cifar10():
    path = SHARED / "data/cifar10/test-00000-of-00001.parquet"
    if not path.is_file():
        pytest.skip(f"no {path}")
    numpy, parquet = pytest.importorskip("numpy"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    column = parquet.read_table(path, columns=["img"])["img"].slice(0, 4000).to_pylist()
    pixels = numpy.stack([numpy.asarray(image.open(io.BytesIO(row["bytes"]))) for row in column])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def smooth():
    coarse = torch.nn.functional.interpolate(images(400, 3, 5, 5), size=32, mode="bilinear")
    return ((coarse + 1) * 127.5).to(torch.uint8)


@pytest.mark.parametrize("arithmetic", ["int8", "float32", "float64"])
@pytest.mark.parametrize("data", [smooth, cifar10])
def test_planted_duplicates(data, arithmetic):
    """1e-5 from sigma 0.002 to 80 with 160 exact and near copies of 4 sources, 40 each: more than any fixed top-k.

    uint8 references are exactly u / 127.5 - 1, so the oracle takes them in float64.
    """
    pixels = data().clone()
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(len(pixels) - 4, generator=generator).view(4, -1)[:, :40] + 4
    for source in range(4):
        copies = pixels[source].repeat(40, 1, 1, 1).short()
        copies[5:15].view(10, -1)[torch.arange(10), torch.arange(10) * 300] += 1  # one pixel by one level
        copies[15:25] += torch.randint(-1, 2, copies[15:25].shape, generator=generator, dtype=torch.int16)
        copies[25:] += torch.arange(15).view(-1, 1, 1, 1).short() - 7  # brighter and darker
        pixels[places[source]] = copies.clamp(0, 255).to(torch.uint8)
    sigma = SIGMAS.repeat(4)
    exact = pixels.double() / 127.5 - 1
    x0 = exact[torch.arange(4).repeat_interleave(len(SIGMAS))]
    noisy = (x0 + rows(sigma, x0) * normal(*x0.shape, seed=1)).float()
    result = posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma, arithmetic=arithmetic)
    weights, expected = posterior(noisy, exact, torch.ones_like(sigma), sigma)
    assert worst(result.mean, expected) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)
    assert 1 / weights[0].square().sum() > 4.99  # the duplicates do share the posterior at sigma 0.002


# ---- shapes and extremes


@pytest.mark.parametrize(
    ("batch", "n", "shape"),
    [
        (1, 30, (3, 8, 8)),
        (10, 10, (3, 8, 8)),
        (10, 1, (3, 8, 8)),
        (10, 30, (17,)),
        (1, 1, (1,)),
        (7, 20, (2, 5, 7)),  # B = W: a (B,) vector broadcast by mistake would go unnoticed by torch
        (5, 20, (2, 5, 7)),
        *[(4, 20, (channels, 6, 6)) for channels in (1, 2, 3, 4, 5)],
        (4, 20, (3, 4, 6, 6)),
    ],
)
def test_shapes(batch, n, shape):
    noisy, reference, alpha, sigma = problem(n=n, shape=shape, sigmas=torch.linspace(0.05, 3, batch), alpha=0.8)
    result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma)
    weights, expected = posterior(noisy, reference, alpha, sigma)
    assert result.mean.shape == noisy.shape and result.effective_sample_size.shape == (batch,)
    assert worst(result.mean, expected) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)
    if n == 1:
        assert torch.equal(result.mean, reference.expand_as(noisy))


def test_memory_layout_does_not_matter():
    noisy, reference, alpha, sigma = problem()
    expected = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma).mean
    strided = torch.stack([reference, reference], -1)[..., 0]
    channels_last = noisy.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous() and not channels_last.is_contiguous()
    assert torch.equal(posterior_mean(channels_last, strided, alpha=alpha, sigma=sigma).mean, expected)


def test_limits():
    """Low noise picks the source, bit for bit; high noise, or no signal, averages everything."""
    reference = images(20, 3, 8, 8)
    low = posterior_mean(reference[:4], reference, alpha=1.0, sigma=1e-6)
    assert torch.equal(low.mean, reference[:4]) and low.effective_sample_size.tolist() == [1] * 4
    for alpha, sigma in ((1.0, 1e6), (0.0, 1.0)):
        high = posterior_mean(normal(4, 3, 8, 8), reference, alpha=alpha, sigma=sigma)
        assert worst(high.mean, reference.double().mean(0).expand(4, -1, -1, -1)) < 1e-5
        torch.testing.assert_close(high.effective_sample_size, torch.full((4,), 20.0))


def test_far_from_every_reference():
    """No underflow: a query 1e4 standard deviations from all references goes to the nearest."""
    reference = torch.tensor([[0.0], [0.5], [1.0]])
    result = posterior_mean(torch.tensor([[101.0], [-100.0]]), reference, alpha=1.0, sigma=0.01)
    assert result.mean.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("n", [8, 40])
def test_a_reference_that_is_not_finite_matters_to_the_rows_that_use_it_alone(n, sigma, value):
    reference = images(n, 3, 4, 4)
    noisy, mask = reference[:4] + sigma * normal(4, 3, 4, 4), torch.ones(4, n, dtype=torch.bool)
    mask[:2, -1] = False
    expected = posterior_mean(noisy, reference[:-1], alpha=1.0, sigma=sigma).mean
    reference[-1, 0, 0, 0] = value
    found = posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, mask=mask)
    assert worst(found.mean[:2], expected[:2]) < 1e-5
    assert found.mean[2:].isnan().all() and found.effective_sample_size[2:].isnan().all()


# ---- errors, each with its remedy

X, R = torch.zeros(4, 3, 2, 2), torch.zeros(6, 3, 2, 2)
ERRORS = {
    "integer noisy": (dict(noisy=X.int()), TypeError, "noisy must be floating point.*Scale images"),
    "integer references": (dict(reference=R.int()), TypeError, r"uint8 pixels.*\.to\(torch.uint8\) or \.float\(\)"),
    "a list": (dict(noisy=[[0.0]]), TypeError, r"noisy must be a tensor \(B, ...\); got list. Pass torch.as_tensor"),
    "a list of references": (dict(reference=[[0.0]]), TypeError, "reference must be a tensor .* got list"),
    "a list as the mask": (dict(mask=[[True] * 6] * 4), TypeError, "mask must be a tensor .* got list"),
    "one dimension": (
        dict(noisy=torch.zeros(4), reference=torch.zeros(6)),
        ValueError,
        r"at least 2 dimensions; got \(4,\).*\[:, None\]",
    ),
    "other image shape": (dict(reference=R[:, :2]), ValueError, r"must agree.*\(6, 2, 2, 2\).*Crop or resize"),
    "other rank": (dict(reference=R.flatten(1)), ValueError, "must agree after the first dimension"),
    "scalar": (dict(noisy=torch.tensor(1.0), reference=torch.tensor(1.0)), ValueError, "at least 2 dimensions"),
    "no references": (dict(reference=R[:0]), ValueError, "must not be empty; got 4 and 0 rows. The sources alone"),
    "no rows": (dict(noisy=X[:0]), ValueError, "must not be empty; got 0 and 6 rows"),
    "float mask": (dict(mask=torch.ones(4, 6)), TypeError, "mask must be bool; got torch.float32. Compare"),
    "mask shape": (dict(mask=torch.ones(6, 4, dtype=torch.bool)), ValueError, r"\(B, n\) = \(4, 6\); got \(6, 4\)"),
    "row without references": (
        dict(mask=torch.tensor([True, True, False, True])[:, None].expand(4, 6)),
        ValueError,
        r"no reference for rows \[2\]; every row may at least use its own source",
    ),
    "arithmetic": (dict(arithmetic="float16"), ValueError, "arithmetic must be 'int8', 'float32', 'float64' or None"),
    "float32 of doubles": (
        dict(noisy=torch.zeros(2, 1), reference=torch.zeros(3, 1, dtype=torch.float64), arithmetic="float32"),
        ValueError,
        "for references that are not float64",
    ),
    "int8 of floats": (
        dict(arithmetic="int8"),
        TypeError,
        "uint8 references, and on accelerators for others but float64; got torch.float32 and",
    ),
    "int8 of one value": (
        dict(noisy=torch.zeros(2, 1), reference=torch.zeros(3, 1, dtype=torch.uint8), arithmetic="int8"),
        ValueError,
        "2 to 131071 values; got 1. Leave it out",
    ),
    "chunk size": (dict(chunk_size=0), ValueError, "chunk_size must be at least 1; got 0. Leave it out"),
    "sigma expanded": (dict(sigma=torch.ones(4, 1, 1, 1)), ValueError, r"one value per row, shape \(4,\).*Pass the"),
    "alpha too long": (dict(alpha=torch.ones(6)), ValueError, r"alpha must have one value per row, shape \(4,\)"),
    "sigma zero": (dict(sigma=torch.tensor([1.0, 0.0, 1.0, 1.0])), ValueError, "sigma must be positive; got 0.0"),
    "sigma negative": (dict(sigma=-1.0), ValueError, "sigma must be positive; got -1.0"),
    "sigma nan": (dict(sigma=float("nan")), ValueError, "sigma must be positive; got nan"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    change, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        posterior_mean(**{"noisy": X, "reference": R, "alpha": 1.0, "sigma": 1.0, **change})
