"""The posterior mean in every dtype, whatever the precision that the caller has set for products."""

import os
import subprocess
import sys

import pytest
import torch

from oracles import CONTEXTS, SIGMAS, normal, posterior, problem, rows, worst
from stf_diffusers import posterior_mean

# ---- float32 products, on CPUs


@pytest.mark.parametrize("dimension", [3, 64, 784, 3072, 50_000])
@pytest.mark.parametrize("kind", ["opposite", "background", "near"])
@pytest.mark.parametrize(
    ("dtype", "arithmetic"), [(torch.uint8, "float32"), (torch.uint8, "int8"), (torch.float32, "float32")]
)
def test_groups_of_duplicates(dimension, kind, dtype, arithmetic):
    """Rounding errors of duplicates are equal and do not average: two groups of them, between which next to nothing decides."""
    draws = torch.Generator().manual_seed(dimension)
    first = torch.randint(0, 2, (1, dimension), generator=draws) * 255
    second = 255 - first
    if kind == "background":  # most pixels white in both, so that sums grow all along
        same = torch.rand(dimension, generator=draws) < 0.8
        same[0] = False
        first[:, same] = second[:, same] = 255
    if kind == "near":  # apart by a level in a few pixels
        first, second = first.clamp(1, 254), first.clamp(1, 254)
        second[:, :: max(1, dimension // 8)] += 1
    pixels = torch.cat([first.expand(40, -1), second.expand(40, -1)]).to(torch.uint8)
    exact = pixels.double() / 127.5 - 1
    reference = pixels if dtype == torch.uint8 else exact.float()
    between = exact[0] - exact[-1]
    sigma = torch.tensor([0.002, 0.05, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 80.0]).repeat(8)
    noise = normal(len(sigma), dimension).double()
    noise -= 0.999 * (noise @ between / between.square().sum())[:, None] * between
    noisy = ((exact[0] + exact[-1]) / 2 + sigma[:, None] * noise).float()
    values = exact if dtype == torch.uint8 else reference
    expected = posterior(noisy, values, torch.ones(len(sigma)), sigma)[1]
    for rows_used in (slice(None), slice(4, 5), slice(7, 9)):
        found = posterior_mean(
            noisy[rows_used], reference, alpha=1.0, sigma=sigma[rows_used], arithmetic=arithmetic
        ).mean
        assert worst(found, expected[rows_used]) < 1e-5


def test_float32_products_decide_little():
    """Many likely references at moderate noise are the float64 product's; at high noise float32 is enough."""
    noisy, reference, alpha, sigma = problem(n=2000, shape=(3, 16, 16), sigmas=torch.tensor([0.5, 2.0, 8.0, 50.0]))
    by_float32, by_float64 = (
        posterior_mean(noisy, reference, alpha=alpha, sigma=sigma, arithmetic=arithmetic).mean
        for arithmetic in ("float32", "float64")
    )
    assert worst(by_float32, by_float64.double()) < 3e-6


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
    """TF32 and bf16 products, set by either API, reach no product of the estimator, and stay as they are; within
    `full_precision` they are off."""
    script = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
sys.path.insert(0, sys.argv[2])
from oracles import posterior, problem
from stf_diffusers import posterior_mean
from stf_diffusers.precision import full_precision

def settings():
    backends = torch.backends
    state = [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision, backends.fp32_precision]
    return state + ([torch.get_float32_matmul_precision()] if sys.argv[1] == "legacy" else [])

class Products(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            exact = args[0].dtype == torch.float64 or all(backend.fp32_precision == "ieee" for backend in backends)
            self.seen.append(exact)
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
    assert Products.seen and all(Products.seen), Products.seen
    assert (mean - expected).abs().max() < 1e-5
    assert settings() == changed, (changed, settings())
    try:
        with full_precision("cpu"), full_precision("cpu"):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise TypeError
    except TypeError:
        assert settings() == changed, (changed, settings())
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
from stf_diffusers.precision import full_precision
torch.backends.fp32_precision = "tf32"
with full_precision("cpu"):
    pass
torch.backends.fp32_precision = "ieee"
assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, stderr=subprocess.DEVNULL)


def test_overlapping_threads_leave_the_settings_behind():
    """Two threads, of which either may leave first; inside both, products are exact."""
    script = """
import threading, torch
from stf_diffusers.precision import full_precision
torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "tf32"
wrong = []

def enter_and_leave():
    for _ in range(300):
        with full_precision("cpu"):
            if torch.backends.cuda.matmul.fp32_precision != "ieee":
                wrong.append(1)

for _ in range(20):
    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "tf32"
assert not wrong
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
