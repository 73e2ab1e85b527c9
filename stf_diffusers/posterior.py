"""The posterior mean over a set of reference images: the only softmax in the package.

For ``x_t = alpha x0 + sigma noise`` and references x_1 .. x_n,

    E[x0 | x_t, references] = sum_i w_i x_i,   w = softmax_i( -|x_t - alpha x_i|^2 / (2 sigma^2) ),

the Stable Target Field's estimator (Xu, Tong & Jaakkola 2023, arXiv 2302.00670, eq. 5). The set {x0} gives denoising
score matching; the whole data set gives the exact empirical posterior. References are streamed in chunks, and the
states of chunks merge exactly, as in streaming softmax, so no (B, n, D) tensor is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of the largest temporary per chunk: 32 MiB in float32, 64 MiB in float64.
_CHUNK_ELEMENTS = 2**23


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Autocast off and float32 matrix products in IEEE float32, whatever the caller's settings, which come back after.

    ``autocast(enabled=False)`` alone leaves TF32 (CUDA) and bf16 (oneDNN) products on.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    previous = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, previous, strict=True):
            # "none" inherits from torch.backends.fp32_precision; what was inherited must go on following it.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def pixels_to_float(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1] by ``x / 127.5 - 1``; half precision to float32; float32 and float64 as is.

    Raises:
        TypeError: any other dtype, whose range is not known.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(127.5).sub_(1)
    if images.dtype in (torch.float16, torch.bfloat16):
        return images.to(torch.float32)
    if images.dtype in (torch.float32, torch.float64):
        return images
    raise TypeError(
        f"Images must be floating point in [-1, 1] or uint8 pixels (read as x / 127.5 - 1); got {images.dtype}. "
        "Convert them with .to(torch.uint8) or .float() first."
    )


class PosteriorMean(NamedTuple):
    """Result of `posterior_mean`: `mean` (B, ...) and `effective_sample_size` (B,), 1 / sum of squared weights."""

    mean: Tensor
    effective_sample_size: Tensor


@dataclass
class PosteriorState:
    """A softmax-weighted sum that can be merged with that of other references.

    `maximum` (B,): the largest logit; `normalizer`, `squares` (B,): the sums of exp(logit - maximum) and of its
    square; `weighted_sum` (B, D): the sum of exp(logit - maximum) x_i. Logits and normalisers are float64.
    """

    maximum: Tensor
    normalizer: Tensor
    squares: Tensor
    weighted_sum: Tensor

    def merge(self, other: PosteriorState) -> PosteriorState:
        """The state of both sets of references together."""
        maximum = torch.maximum(self.maximum, other.maximum)
        # A row for which every logit is -inf (all masked) has no maximum to subtract.
        shift = maximum.masked_fill(maximum.isneginf(), 0)
        left, right = (self.maximum - shift).exp(), (other.maximum - shift).exp()
        dtype = self.weighted_sum.dtype
        return PosteriorState(
            maximum,
            self.normalizer * left + other.normalizer * right,
            self.squares * left**2 + other.squares * right**2,
            self.weighted_sum * left.to(dtype)[:, None] + other.weighted_sum * right.to(dtype)[:, None],
        )

    def result(self) -> PosteriorMean:
        """The normalised mean, (B, D), and the effective sample size, (B,)."""
        mean = self.weighted_sum / self.normalizer.to(self.weighted_sum.dtype)[:, None]
        return PosteriorMean(mean, (self.normalizer**2 / self.squares).to(mean.dtype))


def _chunk_state(query: Tensor, half_scale: Tensor, reference: Tensor, mask: Tensor | None) -> PosteriorState:
    """State of one chunk: `query` (B, D) is alpha x_t / sigma^2 in float64, `half_scale` (B,) is alpha^2 / (2 sigma^2).

    The logit is reduced by |x_t|^2 / (2 sigma^2), which is common to all references. Its remaining terms are divided
    by sigma^2 after they have nearly cancelled, so the product is float64: a float32 product errs by up to 8e-3 in
    the mean when two references are within a few sigma of each other.
    """
    exact = reference.to(torch.float64)
    logits = query @ exact.T - half_scale[:, None] * exact.square().sum(1)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    maximum = logits.amax(1)
    weights = (logits - maximum.masked_fill(maximum.isneginf(), 0)[:, None]).exp_()
    return PosteriorState(maximum, weights.sum(1), weights.square().sum(1), weights.to(reference.dtype) @ reference)


def _as_row_vector(value: Tensor | float, name: str, noisy: Tensor) -> Tensor:
    """`alpha` or `sigma` as a float64 (B,) vector on the device of `noisy`."""
    vector = torch.as_tensor(value, dtype=torch.float64, device=noisy.device)
    if vector.ndim == 0:
        vector = vector.expand(noisy.shape[0])
    if vector.shape != noisy.shape[:1]:
        raise ValueError(
            f"{name} must have one value per row, shape ({noisy.shape[0]},); got {tuple(vector.shape)}. "
            "Pass the (B,) vector itself, not one expanded over the pixels."
        )
    return vector


@torch.no_grad()
def posterior_mean(
    noisy: Tensor,
    reference: Tensor,
    *,
    alpha: Tensor | float,
    sigma: Tensor | float,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> PosteriorMean:
    """Posterior mean of x0 given ``x_t = alpha x0 + sigma noise`` over a set of references.

    Xu, Tong & Jaakkola 2023 (arXiv 2302.00670), eq. 5. When the set contains the source of each row and is otherwise
    exchangeable with it, the result is an exactly unbiased estimate of E[x0 | x_t] (Bertrand et al. 2025,
    arXiv 2506.03719, Prop. 2). Logits are float64; the mean is within 1e-5 of float64 arithmetic throughout.

    Args:
        noisy: (B, ...) floating point, the noised images x_t. Any shape after the first dimension.
        reference: (n, ...) images of the same shape; floating point in the data's range, or uint8 pixels, read as
            ``x / 127.5 - 1``. May lie on another device than `noisy`: chunks are moved.
        alpha, sigma: (B,) or a number; the process's coefficients at each row's time. `sigma` is positive.
        mask: (B, n) bool, which references a row may use. Default: all.
        chunk_size: references handled at a time. Default: so that a chunk's temporaries stay under about 200 MiB.

    Returns:
        mean (B, ...) in float32 (float64 when `noisy` and `reference` both are), and effective_sample_size (B,),
        between 1 and n.

    Raises:
        TypeError: a dtype that is neither floating point nor (for `reference`) uint8, or a mask that is not bool.
        ValueError: shapes that do not fit, an empty reference set, or, on the CPU, a sigma that is not positive or a
            row whose mask leaves nothing (elsewhere those rows are NaN: checking would wait for the device).
    """
    if not noisy.is_floating_point():
        raise TypeError(
            f"noisy must be floating point; got {noisy.dtype}. Scale images to [-1, 1] before adding noise."
        )
    if reference.ndim == 0 or noisy.ndim == 0 or reference.shape[1:] != noisy.shape[1:]:
        raise ValueError(
            f"noisy (B, ...) and reference (n, ...) must agree after the first dimension; got {tuple(noisy.shape)} and "
            f"{tuple(reference.shape)}. Crop or resize the references as the sources were."
        )
    n = reference.shape[0]
    if n == 0 or noisy.shape[0] == 0:
        raise ValueError(
            f"noisy and reference must not be empty; got {noisy.shape[0]} and {n} rows. The sources alone as references "
            "give the DSM target."
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool; got {mask.dtype}. Compare to make one, for instance `weights > 0`.")
        if mask.shape != (noisy.shape[0], n):
            raise ValueError(f"mask must be (B, n) = ({noisy.shape[0]}, {n}); got {tuple(mask.shape)}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}. Leave it out to have it chosen.")
    alpha, sigma = _as_row_vector(alpha, "alpha", noisy), _as_row_vector(sigma, "sigma", noisy)
    if noisy.device.type == "cpu":
        if not bool((sigma > 0).all()):
            raise ValueError(
                f"sigma must be positive; got {sigma.min().item()}. At sigma = 0 the posterior is x_t itself."
            )
        if mask is not None and not bool(mask.any(1).all()):
            rows = (~mask.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"mask leaves no reference for rows {rows}; every row may at least use its own source.")

    batch_size, dimension = noisy.shape[0], noisy[0].numel()
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_ELEMENTS // max(dimension, batch_size, 1))
    dtype = torch.float64 if noisy.dtype == reference.dtype == torch.float64 else torch.float32
    with full_precision(noisy.device.type):
        query = noisy.reshape(batch_size, -1).to(torch.float64) * (alpha / sigma**2)[:, None]
        half_scale = alpha**2 / (2 * sigma**2)

        def chunk_state(start: int) -> PosteriorState:
            rows = slice(start, start + chunk_size)
            images = pixels_to_float(reference[rows].to(noisy.device)).to(dtype).flatten(1)
            return _chunk_state(query, half_scale, images, None if mask is None else mask[:, rows].to(noisy.device))

        state = reduce(PosteriorState.merge, map(chunk_state, range(0, n, chunk_size)))
        mean, effective_sample_size = state.result()
    return PosteriorMean(mean.reshape(noisy.shape), effective_sample_size)
