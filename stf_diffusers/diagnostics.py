"""How much variance training targets have at each noise level, and how much of it references remove.

Given x_t, the target of denoising score matching (DSM) is a draw of p(x0 | x_t); that of the Stable Target Field (STF) is
the posterior mean over n references that contain this draw. Both have the expectation E[x0 | x_t]. The quantities are
those of Xu, Tong & Jaakkola 2023 (arXiv 2302.00670): V_DSM(t) of their section 3, V_STF(t) and D(t) of their section 4. The
data that are given stand for p(x0), so the law of x0 given x_t is a finite sum, and E[x0 | x_t] is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .forward_process import NoiseProcess
from .posterior import ReferenceRows, pixels_to_float, take_rows
from .precision import without_autocast
from .prediction import prediction_coefficients
from .reference_bank import ReferenceBank

# Elements of a float64 chunk of images (16 MiB), and of the weights of all images for the noisy images of a block.
_CHUNK_ELEMENTS = 2**21
_BLOCK_ELEMENTS = 2**23


class Estimate(NamedTuple):
    """An average over independent draws of x_t, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class TargetVariance:
    """What `target_variance` found at one time.

    Variances are traces over the dimensions of an image, in units of x0 squared, given x_t and averaged over x_t. At fixed
    x_t a target ``a x0 + b noise`` is linear in x0, so its variance is that of x0 times `factor` of the prediction type.

    Attributes:
        time: t.
        alpha: the process's coefficient of x0 there.
        sigma: that of the noise.
        dsm: V_DSM(t), the variance of x0.
        stf: V_STF(t; n), the variance of the posterior mean over n references, by n.
        stf_share: V_STF(t; n) / V_DSM(t), by n. NaN where V_DSM is zero.
        divergence: D(t), that of the data from the posterior; grows from 0 (the posterior is the data) to about N^2.
        effective_sample_size: 1 / sum of squared weights of the posterior over all images (of the class).
        output_factor: variance of the process's own training target, as a multiple of that of x0.
        num_samples: number of draws of x_t.
    """

    time: float
    alpha: float
    sigma: float
    dsm: Estimate
    stf: Mapping[int, Estimate]
    stf_share: Mapping[int, Estimate]
    divergence: Estimate
    effective_sample_size: Estimate
    output_factor: float
    num_samples: int

    @property
    def noise_level(self) -> float:
        """sigma / alpha, which is comparable between processes."""
        return self.sigma / self.alpha if self.alpha else math.inf

    def factor(self, prediction_type: str) -> float:
        """``(a - b alpha / sigma)^2`` for the target ``a x0 + b noise`` of "epsilon", "sample", "score", ... .

        Raises:
            ValueError: an unknown prediction type.
        """
        alpha, sigma = (torch.tensor([value], dtype=torch.float64, device="cpu") for value in (self.alpha, self.sigma))
        a, b = prediction_coefficients(prediction_type, alpha, sigma)
        return float((a - b * alpha / sigma) ** 2)


@torch.no_grad()
def target_variance(
    process: NoiseProcess,
    data: Tensor | ReferenceBank,
    times: Tensor | Sequence[float],
    *,
    reference_batch_sizes: Sequence[int] = (),
    num_samples: int = 128,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> list[TargetVariance]:
    """Variance of the targets of DSM and STF, divergence and effective sample size at each time, with standard errors.

    At each time `num_samples` pairs are drawn independently: an image x0, uniformly from the data, and its x_t. With w the
    posterior weights of all N images given x_t, and m = E[x0 | x_t] their mean, each pair gives

    - V_DSM: ``sum_i w_i |x_i - m|^2``, the trace of the covariance of x0 given x_t;
    - V_STF(n): ``w_0 |m_n(x0) - m|^2 + (1 - w_0) |m_n(x') - m|^2``, where m_n(source) is the posterior mean over the source
      and n - 1 others, drawn uniformly without replacement, for each x_t anew. The source is a draw of p(x0 | x_t), that
      is of w: it is x0 with probability w_0, and otherwise x', drawn from w without x0. (Using x0 alone would be unbiased
      too, and at low noise miss the rare x_t whose source is not the likeliest.) E[m_n | x_t] = m, so this is
      the trace of the covariance of m_n; it is zero for n = N, and for n = 1 its expectation is V_DSM;
    - D: ``sum_i w_i f(1 / (N w_i))``, the f-divergence of the data from the posterior in Theorem 2 of the paper, with
      f(y) = (1/y - 1)^2 up to y = 1.5 and 8y/27 - 1/3 above (an f that could not be checked against the paper's text);
    - the effective sample size: ``1 / sum_i w_i^2``.

    Averages over the pairs are unbiased, for a p(x0) of the N images. The standard error is their standard deviation over
    the square root of their number; a quotient's is that of its linearisation. Where large values are rare (at low noise
    few x_t have more than one likely source) it takes many draws until the standard error can be trusted. Arithmetic is
    float64; memory is that of a chunk of images, and of the weights of all images for a block of x_t.

    Args:
        process: the forward process.
        data: (N, ...) images, uint8 pixels (read as x / 127.5 - 1) or floating point; or a bank of them. A bank with
            labels is measured within classes.
        times: (T,) in the process's own unit; ``process.time_of(noise_levels)`` gives them.
        reference_batch_sizes: the n of V_STF, between 1 and N.
        num_samples: draws of x_t at each time, at least 2.
        labels: (N,) integer classes of `data`, for the law given the class: a row's posterior, and its n
            references, are of its source's class. Classes of fewer than n images are used whole.
        device: where to compute. Default: where the images are.
        generator: for the draws, made on its own device: a seed gives the same draws wherever they are used.

    Returns:
        One `TargetVariance` for each time, in order.

    Raises:
        TypeError: images or labels that are not tensors or have the wrong dtype; numbers that are not whole.
        ValueError: no images or images that are not finite; labels that do not fit, or labels beside a bank; a bank that is
            sharded or closed under flips; sizes, times or `num_samples` out of range.
    """
    bank = _bank_to_measure(data, labels)
    for name, value in (("num_samples", num_samples), *(("reference_batch_sizes", n) for n in reference_batch_sizes)):
        if not isinstance(value, SupportsIndex):
            raise TypeError(f"{name} must be whole numbers; got {value!r}.")
    sizes = sorted(set(reference_batch_sizes))
    if sizes and not 1 <= sizes[0] <= sizes[-1] <= len(bank):
        raise ValueError(f"reference_batch_sizes must lie in [1, {len(bank)}], the number of images; got {sizes}.")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, for a standard error; got {num_samples}.")
    moments, alphas, sigmas, factors = _coefficients_at(times, process)
    place = torch.device(device) if device is not None else bank.device
    found = []
    for index, time in enumerate(moments.tolist()):
        alpha, sigma = alphas[index].item(), sigmas[index].item()
        blocks = _draw_blocks(bank, sizes, num_samples, place, generator)
        with without_autocast(place.type):
            measured = [_measure(bank.images, block, alpha, sigma, sizes) for block in blocks]
        dsm, divergence, effective, *stf = torch.cat(measured, 1).cpu()
        estimates = {n: _average(rows) for n, rows in zip(sizes, stf, strict=True)}
        shares = {n: _quotient(rows, dsm) for n, rows in zip(sizes, stf, strict=True)}
        found.append(
            TargetVariance(
                time, alpha, sigma, _average(dsm), estimates, shares, _average(divergence), _average(effective),
                factors[index].item(), num_samples,
            )
        )  # fmt: skip
    return found


def _bank_to_measure(data: Tensor | ReferenceBank, labels: Tensor | None) -> ReferenceBank:
    if isinstance(data, ReferenceBank):
        if labels is not None:
            raise ValueError("a bank has its own labels: make it with labels=, or pass its images with labels= here.")
        if data.process_shard is not None:
            raise ValueError("the bank is sharded; measure on one process, with a bank that is not.")
        if data.augmentation != "none":
            raise ValueError(
                f"the bank has augmentation={data.augmentation!r}; pass torch.cat([images, images.flip(-1)]) instead."
            )
        return data
    return ReferenceBank(data, labels)


def _coefficients_at(times: Tensor | Sequence[float], process: NoiseProcess) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T,) float64 times, alphas, sigmas, and variances of the process's own target relative to that of x0."""
    moments = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if moments.ndim != 1 or not len(moments):
        raise ValueError(f"times must be a list (T,) of at least one; got shape {tuple(moments.shape)}.")
    alphas, sigmas = (coefficient(moments).to(torch.float64) for coefficient in (process.alpha, process.sigma))
    if not bool((sigmas.isfinite() & (sigmas > 0) & (alphas >= 0)).all()):
        raise ValueError(f"times must have a positive sigma; got sigma {sigmas.tolist()} at {moments.tolist()}.")
    a, b = process.output_coefficients(moments)
    return moments, alphas, sigmas, (a - b * alphas / sigmas) ** 2


class _Block(NamedTuple):
    """Draws of one class that are handled together: what is noised, and with which references.

    `images`: the class's rows; `sources` (b,): positions of x0 among them; `others` (b, n_max - 1): among those left when a
    source is taken out; `uniforms` (b,), which choose x'; `noise` (b, D). The last two are float64.
    """

    images: range
    sources: Tensor
    others: Tensor
    uniforms: Tensor
    noise: Tensor


def _draw_blocks(
    bank: ReferenceBank, sizes: list[int], num_samples: int, device: torch.device, generator: torch.Generator | None
) -> Iterator[_Block]:
    """`num_samples` draws in blocks of one class. Rows are drawn one by one: blocks may be cut anywhere."""
    place = generator.device if generator is not None else torch.device("cpu")
    dimension = bank.images.shape[1:].numel()
    drawn = torch.randint(len(bank), (num_samples,), generator=generator, device=place).sort().values
    for images in list(bank.class_rows.values()) or [range(len(bank))]:
        sources = drawn[(drawn >= images.start) & (drawn < images.stop)] - images.start
        rows = max(1, _BLOCK_ELEMENTS // (len(images) * (2 * len(sizes) + 1)))
        for part in sources.split(rows) if len(sources) else ():
            draws = []
            for _ in part:
                noise = torch.randn(dimension, generator=generator, device=place, dtype=torch.float64)
                uniform = torch.rand((), generator=generator, device=place, dtype=torch.float64)
                others = torch.randperm(len(images) - 1, generator=generator, device=place) if sizes else part[:0]
                draws.append((others[: max(sizes, default=1) - 1], uniform, noise))
            columns = (torch.stack(column).to(device) for column in zip(*draws, strict=True))
            yield _Block(images, part.to(device), *columns)


def _measure(images: ReferenceRows, block: _Block, alpha: float, sigma: float, sizes: list[int]) -> Tensor:
    """V_DSM, D, the effective sample size and V_STF by n for each draw of a block, (3 + K, b)."""
    total, device = len(block.images), block.noise.device
    sources = take_rows(images, block.images.start + block.sources)
    clean = pixels_to_float(sources).to(device, torch.float64).flatten(1)
    # |x_t - alpha x_i|^2 by what is left after the source: exact where x_i is the source, however small sigma is.
    distances = torch.empty(len(clean), total, dtype=torch.float64, device=device)
    along = torch.empty_like(distances)
    for chunk, values in _chunks(images, block.images, device):
        norms = values.square().sum(1) + clean.square().sum(1)[:, None]
        distances[:, chunk] = (norms - 2 * clean @ values.T).clamp_(min=0)
        along[:, chunk] = (block.noise * clean).sum(1)[:, None] - block.noise @ values.T
    own = block.sources[:, None]
    distances.scatter_(1, own, 0)
    along.scatter_(1, own, 0)
    logits = along.mul_(-alpha / sigma).sub_(distances, alpha=(alpha / sigma) ** 2 / 2)

    weights = logits.softmax(1)
    rest = weights.scatter(1, own, 0)
    cumulative = rest.cumsum(1)
    # The first whose sum exceeds the threshold: never one of weight zero, unless all are.
    threshold = block.uniforms[:, None] * cumulative[:, -1:]
    second = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=total - 1)
    stacked = [weights]
    for n in sizes:
        for source in (own, second):
            others = block.others[:, : n - 1]
            batch = torch.cat([source, others + (others >= source)], 1)
            stacked.append(torch.zeros_like(weights).scatter_(1, batch, logits.gather(1, batch).softmax(1)))
    every = torch.cat(stacked)
    means = torch.zeros(len(every), clean.shape[1], dtype=torch.float64, device=device)
    for chunk, values in _chunks(images, block.images, device):
        means.addmm_(every[:, chunk], values)
    mean, *of_batches = means.split(len(clean))

    variance = (weights * distances).sum(1) - (mean - clean).square().sum(1)
    ratio = total * weights  # 1 / y
    terms = torch.where(ratio > 2 / 3, weights * (ratio - 1).square(), 8 / (27 * total) - weights / 3)
    errors = [(batch - mean).square().sum(1) for batch in of_batches]
    chances = weights.gather(1, own)[:, 0], rest.sum(1)
    stf = [chances[0] * first + chances[1] * other for first, other in zip(errors[::2], errors[1::2], strict=True)]
    return torch.stack([variance.clamp_(min=0), terms.sum(1), 1 / weights.square().sum(1), *stf])


def _chunks(images: ReferenceRows, rows: range, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Those rows as float64 (c, D) on the device, and their positions among them."""
    size = max(1, _CHUNK_ELEMENTS // max(images.shape[1:].numel(), 1))
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        values = images[slice(rows.start + start, rows.start + stop)].to(device)
        yield slice(start, stop), pixels_to_float(values).to(torch.float64).flatten(1)


def _average(draws: Tensor) -> Estimate:
    return Estimate(draws.mean().item(), (draws.var() / len(draws)).sqrt().item())


def _quotient(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Mean over mean, of paired draws."""
    denominator = denominators.mean()
    quotient = numerators.mean() / denominator
    spread = (numerators - quotient * denominators).var() / len(numerators)
    return Estimate(quotient.item(), (spread.sqrt() / denominator).item())
