"""The streaming posterior mean against float64 arithmetic by exact differences."""

import io
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from oracles import SHARED, images, load_golden, normal, posterior, rows, worst
from stf_diffusers import posterior_mean
from stf_diffusers.posterior import PosteriorState

SIGMAS = torch.tensor([0.002, 0.02, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0, 80.0])
CONTEXTS = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def problem(n=50, shape=(3, 8, 8), dtype=torch.float32, sigmas=SIGMAS, alpha=1.0):
    """(noisy, reference, alpha, sigma): one row per sigma, sources first, two references duplicated."""
    reference = images(n, *shape, dtype=dtype)
    if n > len(sigmas) + 1:
        reference[-1], reference[-2] = reference[0], reference[3] + 1e-3
    x0, alpha = reference[: len(sigmas)], torch.full_like(sigmas, alpha)
    if n < len(sigmas):
        x0 = reference[:1].expand(len(sigmas), *shape)
    noisy = (rows(alpha, x0) * x0 + rows(sigmas, x0) * normal(*x0.shape, seed=1)).to(dtype)
    return noisy, reference, alpha, sigmas


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


@pytest.mark.parametrize("arithmetic", ["int8", "float64"])
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


# ---- dtypes


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_close_to_float64(dtype, alpha, context):
    """Half-precision inputs cost their own rounding and nothing more."""
    noisy, reference, alpha, sigma = problem(dtype=dtype, alpha=alpha)
    with CONTEXTS[context]():
        result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma)
    weights, expected = posterior(noisy, reference, alpha, sigma)
    assert result.mean.dtype == result.effective_sample_size.dtype == torch.float32
    assert worst(result.mean, expected) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_float64_in_float64_out(chunk_size):
    noisy, reference, alpha, sigma = problem(dtype=torch.float64, sigmas=SIGMAS.double())
    result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, chunk_size=chunk_size)
    weights, expected = posterior(noisy, reference, alpha, sigma)
    assert result.mean.dtype == result.effective_sample_size.dtype == torch.float64
    # At sigma 0.002 the logits are about 1e8, so that a rounding of them moves near duplicates by 1e-8 at most.
    error = (result.mean - expected).abs().flatten(1).amax(1)
    assert error[sigma >= 0.3].max() < 1e-12 and error.max() < 1e-10
    torch.testing.assert_close(result.effective_sample_size, 1 / weights.square().sum(1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_references_mean_x_over_127_5_minus_1(dtype):
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[0, 0, 0, :2] = torch.tensor([0, 255])
    exact = pixels.double() / 127.5 - 1
    noisy = (exact[:10] + rows(SIGMAS, exact) * normal(10, 3, 8, 8)).to(dtype)
    alpha = torch.ones(10)
    result = posterior_mean(noisy, pixels, alpha=alpha, sigma=SIGMAS)
    assert result.mean.dtype == torch.float32
    assert worst(result.mean, posterior(noisy, exact, alpha, SIGMAS)[1]) < 1e-6
    assert result.mean[0, 0, 0, :2].tolist() == [-1, 1]


def test_alpha_and_sigma_may_be_numbers_or_half_precision():
    noisy, reference, _, _ = problem(sigmas=torch.full((4,), 2.0))
    vectors = posterior_mean(noisy, reference, alpha=torch.full((4,), 0.5), sigma=torch.full((4,), 2.0))
    for alpha, sigma in ((0.5, 2), (torch.tensor(0.5), torch.full((4,), 2.0, dtype=torch.bfloat16))):
        assert torch.equal(posterior_mean(noisy, reference, alpha=alpha, sigma=sigma).mean, vectors.mean)


def test_numbers_are_float64():
    noisy, reference, alpha, sigma = problem(
        shape=(2,), dtype=torch.float64, sigmas=torch.full((4,), 0.7, dtype=torch.float64), alpha=0.9
    )
    expected = posterior(noisy, reference, alpha, sigma)[1]
    assert worst(posterior_mean(noisy, reference, alpha=alpha, sigma=sigma).mean, expected) < 1e-12
    assert worst(posterior_mean(noisy, reference, alpha=0.9, sigma=0.7).mean, expected) < 1e-12


def test_settings_of_the_caller():
    """TF32 and bf16 products, set by either API, reach no product of the estimator, and are there again afterwards."""
    script = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
sys.path.insert(0, sys.argv[2])
from oracles import posterior
from test_posterior import problem
from stf_diffusers import posterior_mean

def settings():
    backends = torch.backends
    state = [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.fp32_precision]
    return state + ([torch.get_float32_matmul_precision()] if sys.argv[1] == "legacy" else [])

class Products(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return function(*args, **(kwargs or {}))

def legacy_medium():
    torch.set_float32_matmul_precision("medium")
def legacy_high():
    torch.set_float32_matmul_precision("high")
def legacy_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
def new():
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = "tf32", "bf16"
def new_global():
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"

noisy, reference, alpha, sigma = problem(n=300, shape=(3, 16, 16))
expected = posterior(noisy, reference, alpha, sigma)[1]
for change in {"legacy": (legacy_medium, legacy_high, legacy_tf32), "new": (new, new_global)}[sys.argv[1]]:
    before = settings()
    change()
    changed = settings()
    assert change is legacy_tf32 or changed != before
    Products.seen.clear()
    with Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        mean = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma).mean
        assert torch.is_autocast_enabled("cpu")
    assert Products.seen and set(Products.seen) == {("ieee", "ieee")}, Products.seen
    assert (mean - expected).abs().max() < 1e-5
    assert settings() == changed, (changed, settings())
    try:
        posterior_mean(noisy, reference.int(), alpha=alpha, sigma=sigma)
    except TypeError:
        assert settings() == changed, (changed, settings())
    else:
        raise AssertionError("int32 references are refused where the settings are changed")
"""
    tests = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(tests), *sys.path])}
    jobs = {
        case: subprocess.Popen([sys.executable, "-c", script, case, tests], env=environment, stderr=subprocess.PIPE)
        for case in ("legacy", "new")
    }
    errors = {case: job.communicate()[1].decode() for case, job in jobs.items()}
    assert not any(job.returncode for job in jobs.values()), errors


def test_inherited_settings_stay_inherited():
    """A later change of torch.backends.fp32_precision still reaches the products of the caller."""
    script = """
import torch
from stf_diffusers import posterior_mean
torch.backends.fp32_precision = "tf32"
posterior_mean(torch.zeros(1, 2), torch.zeros(1, 2), alpha=1.0, sigma=1.0)
torch.backends.fp32_precision = "ieee"
assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, stderr=subprocess.DEVNULL)


# ---- the result depends on the set alone


@pytest.mark.parametrize("chunk_size", [1, 7, 49, 50, 10_000])
def test_chunks_do_not_matter(chunk_size):
    noisy, reference, alpha, sigma = problem()
    whole = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, chunk_size=50)
    chunked = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, chunk_size=chunk_size)
    assert worst(chunked.mean, whole.mean) < 1e-6
    torch.testing.assert_close(chunked.effective_sample_size, whole.effective_sample_size, rtol=1e-6, atol=0)


def test_default_chunks():
    """Without a chunk size, images of 2^21 pixels are read one at a time."""
    noisy, reference, alpha, sigma = problem(n=6, shape=(2**21,), sigmas=torch.tensor([1.0, 800.0, 3000.0]))
    expected = posterior(noisy, reference, alpha, sigma)[1]
    assert worst(posterior_mean(noisy, reference, alpha=alpha, sigma=sigma).mean, expected) < 1e-5


@pytest.mark.parametrize("arithmetic", ["int8", "float64"])
@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("alpha", [1.0, 0.02])
@pytest.mark.parametrize("kind", ["uniform", "black and white", "nearly constant"])
def test_pixels(kind, alpha, chunk_size, arithmetic):
    """uint8 references in both arithmetics, with masks and rows that some chunks have nothing for."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 9, 7), generator=generator, dtype=torch.uint8)
    if kind == "black and white":
        pixels = (pixels > 127).to(torch.uint8) * 255
    if kind == "nearly constant":
        pixels = 255 - (pixels > 250).to(torch.uint8)
    exact = pixels.double() / 127.5 - 1
    sigma, alphas = SIGMAS, torch.full_like(SIGMAS, alpha)
    noisy = (alpha * exact[: len(sigma)] + rows(sigma, exact) * normal(len(sigma), 3, 9, 7, seed=1)).float()
    mask = torch.rand(len(sigma), 60, generator=generator) < 0.7
    mask[torch.arange(len(sigma)), torch.arange(len(sigma))] = True
    result = posterior_mean(
        noisy, pixels, alpha=alphas, sigma=sigma, mask=mask, chunk_size=chunk_size, arithmetic=arithmetic
    )
    weights, expected = posterior(noisy, exact, alphas, sigma, mask)
    assert worst(result.mean, expected) < 1e-5
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)
    alone = posterior_mean(noisy[:1], pixels[:1], alpha=alpha, sigma=sigma[:1], arithmetic=arithmetic)
    assert torch.equal(alone.mean, pixels[:1].float() / 127.5 - 1), "one reference: that image, bit for bit"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_many_like_references(batch, dtype):
    """The mean of 30,000 equal images is that image, also in a batch with a single row that all of them matter to."""
    pixel = torch.tensor([[230]], dtype=torch.uint8).expand(30_000, 64)
    reference = pixel if dtype == torch.uint8 else (pixel.float() / 127.5 - 1)
    exact = 230 / 127.5 - 1
    sigma = torch.ones(batch)
    sigma[1:-1] = 0.002
    noisy = exact + sigma[:, None] * normal(batch, 64)
    for arithmetic in (None, "float64"):
        result = posterior_mean(noisy, reference, alpha=1.0, sigma=sigma, arithmetic=arithmetic)
        assert (result.mean - exact).abs().max() < 1e-6


def test_ties_between_distant_pixels():
    """A query half way between two far images at low noise: its last bits decide."""
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exact = pixels.double() / 127.5 - 1
    sigma = torch.full((3,), 0.002)
    noisy = ((exact[:3] + exact[3:]) / 2).float()
    expected = posterior(noisy, exact, torch.ones(3), sigma)[1]
    for chunk_size in (1, None):
        assert worst(posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma, chunk_size=chunk_size).mean, expected) < 1e-5


def test_many_small_weights():
    """One near image and 65,535 others of weight about 2^-32: together they matter."""
    pixels = torch.zeros(65_536, 64, dtype=torch.uint8)
    pixels[1:, 0] = 128
    exact = pixels[[0, 1]].double() / 127.5 - 1
    distance = (exact[1] - exact[0]).square().sum()
    sigma = (distance / (2 * 32.05 * torch.tensor(2.0).log())).sqrt().view(1).float()
    noisy = exact[:1].float()
    weights = torch.tensor([0.0, -distance / (2 * sigma.double() ** 2)]).double().exp() * torch.tensor([1.0, 65_535.0])
    expected = (weights / weights.sum()) @ exact
    assert worst(posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma).mean[0], expected) < 1e-5


def test_a_reference_that_is_not_a_number_is_not_passed_over():
    reference = images(10, 3)
    reference[9] = torch.nan
    for chunk_size in (5, None):
        assert posterior_mean(reference[:2], reference, alpha=1.0, sigma=1.0, chunk_size=chunk_size).mean.isnan().all()


@pytest.mark.parametrize("sigma", [0.1, 100.0])
@pytest.mark.parametrize("n", [1, 2, 17, 18, 19, 36, 40])
def test_slivers_of_pixels(n, sigma):
    """Chunks and batches of one, few or many references that matter, at the bounds between them."""
    pixels = torch.randint(0, 256, (n, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exact = pixels.double() / 127.5 - 1
    for batch in {1, min(2, n), n}:
        level = torch.full((batch,), sigma)
        noisy = (exact[:batch] + sigma * normal(batch, 7)).float()
        expected = posterior(noisy, exact, torch.ones(batch), level)[1]
        for chunk_size in (1, 17, 18, None):
            result = posterior_mean(noisy, pixels, alpha=1.0, sigma=level, chunk_size=chunk_size, arithmetic="int8")
            assert worst(result.mean, expected) < 1e-5


@pytest.mark.parametrize("dimension", [1, 511, 513, 2**17 + 5])
def test_pixels_of_any_number(dimension):
    """More than 2^17 pixels would overflow 32-bit sums of 8-bit products: float64 takes over."""
    pixels = (torch.rand(5, dimension, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8) * 255
    pixels[3], pixels[4] = 0, 255
    exact = pixels.double() / 127.5 - 1
    sigma = torch.tensor([0.5, 50.0, 5000.0, 0.5, 0.5])
    noisy = (exact + rows(sigma, exact) * normal(5, dimension)).float()
    expected = posterior(noisy, exact, torch.ones(5), sigma)[1]
    assert worst(posterior_mean(noisy, pixels, alpha=1.0, sigma=sigma).mean, expected) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter(seed):
    noisy, reference, alpha, sigma = problem()
    permutation = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))
    first = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma)
    second = posterior_mean(noisy, reference[permutation], alpha=alpha, sigma=sigma, chunk_size=13)
    assert worst(first.mean, second.mean) < 1e-6


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_mask(chunk_size):
    """Masked references have weight 0, also where whole chunks are masked: the first, the last, all but one."""
    noisy, reference, alpha, sigma = problem()
    mask = torch.rand(10, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, :8], mask[1, -12:], mask[2], mask[3] = False, False, False, True
    mask[2, 27] = True
    mask[0, 20] = True
    result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, mask=mask, chunk_size=chunk_size)
    weights, expected = posterior(noisy, reference, alpha, sigma, mask)
    assert worst(result.mean, expected) < 1e-5
    assert torch.equal(result.mean[2], reference[27]) and result.effective_sample_size[2] == 1
    torch.testing.assert_close(result.effective_sample_size.double(), 1 / weights.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_states_merge_in_any_grouping(seed):
    """(max, normaliser, squares, sum) of random parts, merged along a random tree, is the whole softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 12, generator=generator, dtype=torch.float64) * 300 - 5000
    logits[0, :6] = -torch.inf
    values = torch.randn(12, 5, generator=generator, dtype=torch.float64)

    def state(part):
        maximum = logits[:, part].amax(1)
        weights = (logits[:, part] - maximum[:, None]).exp().nan_to_num(0)  # -inf - -inf: all masked
        return PosteriorState(maximum, weights.sum(1), weights.square().sum(1), weights @ values[part])

    states = [state(part) for part in torch.randperm(12, generator=generator).split([1, 4, 2, 5])]
    states.append(state([0]))  # row 0 masked in it; its other rows count index 0 twice
    while len(states) > 1:
        left, right = torch.randperm(len(states), generator=generator)[:2].tolist()
        merged = states[left].merge(states[right])
        states = [s for i, s in enumerate(states) if i not in (left, right)] + [merged]
    doubled = logits.clone()
    doubled[:, 0] += torch.tensor(2.0).log()
    weights = torch.cat([logits, logits[:, :1]], 1).softmax(1)
    result = states[0].result(torch.float64)
    assert worst(result.mean, doubled.softmax(1) @ values) < 1e-12
    torch.testing.assert_close(result.effective_sample_size, 1 / weights.square().sum(1), rtol=1e-10, atol=0)


def test_inputs_are_not_modified():
    noisy, reference, alpha, sigma = problem()
    mask = torch.ones(10, 50, dtype=torch.bool)
    inputs = (noisy, reference, alpha, sigma, mask)
    copies = [tensor.clone() for tensor in inputs]
    result = posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, mask=mask, chunk_size=9)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    result.mean.zero_()
    assert torch.equal(reference, copies[1]) and torch.equal(noisy, copies[0])


def test_nothing_is_recorded_for_gradients():
    noisy, reference, alpha, sigma = problem()
    result = posterior_mean(noisy.requires_grad_(), reference.requires_grad_(), alpha=alpha, sigma=sigma)
    assert not result.mean.requires_grad and not result.effective_sample_size.requires_grad


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


# ---- errors, each with its remedy

X, R = torch.zeros(4, 3, 2, 2), torch.zeros(6, 3, 2, 2)
ERRORS = {
    "integer noisy": (dict(noisy=X.int()), TypeError, "noisy must be floating point.*Scale images"),
    "integer references": (dict(reference=R.int()), TypeError, r"uint8 pixels.*\.to\(torch.uint8\) or \.float\(\)"),
    "other image shape": (dict(reference=R[:, :2]), ValueError, r"must agree.*\(6, 2, 2, 2\).*Crop or resize"),
    "other rank": (dict(reference=R.flatten(1)), ValueError, "must agree after the first dimension"),
    "scalar": (dict(noisy=torch.tensor(1.0), reference=torch.tensor(1.0)), ValueError, "must agree after the first"),
    "no references": (dict(reference=R[:0]), ValueError, "must not be empty; got 4 and 0 rows. The sources alone"),
    "no rows": (dict(noisy=X[:0]), ValueError, "must not be empty; got 0 and 6 rows"),
    "float mask": (dict(mask=torch.ones(4, 6)), TypeError, "mask must be bool; got torch.float32. Compare"),
    "mask shape": (dict(mask=torch.ones(6, 4, dtype=torch.bool)), ValueError, r"\(B, n\) = \(4, 6\); got \(6, 4\)"),
    "row without references": (
        dict(mask=torch.tensor([True, True, False, True])[:, None].expand(4, 6)),
        ValueError,
        r"no reference for rows \[2\]; every row may at least use its own source",
    ),
    "arithmetic": (dict(arithmetic="float32"), ValueError, "arithmetic must be 'int8', 'float64' or None"),
    "int8 of floats": (dict(arithmetic="int8"), TypeError, "uint8 references; got torch.float32. Leave it out"),
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
