"""Samplers of the probability-flow ODE of Karras et al. 2022 (arXiv 2206.00364), and the likelihood it gives.

A sampler knows a model only as ``denoise(x, sigma) -> D`` in unscaled space, ``x = x0 + sigma noise``
(`denoising.network_denoiser`); x and sigma are float64 whatever the network's precision. Processes differ in their
noise levels and in the curve sigma(t), s(t) along which the ODE is stepped: a `Discretization` is that, as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from .noise import VP

Function = Callable[[Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """(num_steps,) float64 noise levels from sigma_max down to sigma_min (Karras et al. 2022, eq. 5, without the 0)."""
    check_noise_levels(num_steps, sigma_min, sigma_max)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + _ramp(num_steps) * (low - high)) ** rho


def check_noise_levels(num_steps: int, low: float, high: float) -> None:
    """Raise TypeError or ValueError unless there is a whole number of steps, and 0 < low < high < infinity."""
    if not isinstance(num_steps, SupportsIndex):
        raise TypeError(f"the number of steps must be an integer; got {num_steps!r}.")
    if num_steps < 1:
        raise ValueError(f"at least one step is needed; got {num_steps}.")
    if not 0 < low < high < math.inf:
        raise ValueError(f"the least noise must be positive and below the largest, and finite; got {low} and {high}.")


def _ramp(num_steps: int) -> Tensor:
    # i / (N - 1); a single step starts at the top.
    return torch.arange(num_steps, dtype=torch.float64, device="cpu") / max(num_steps - 1, 1)


def _then_zero(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])


@dataclass(frozen=True)
class Discretization:
    """Where a fixed-step sampler steps: a row of Karras et al. 2022, Table 1.

    Along it ``x(t) = s(t) (x0 + sigma(t) noise)``.

    Args:
        times: (N + 1,) float64, decreasing, the last one 0: N steps.
        sigma, sigma_derivative: the noise level as a function of time, and its derivative.
        scale, scale_derivative: s(t), and its derivative. s(0) is 1.
        time_of: the inverse of `sigma`.
    """

    times: Tensor
    sigma: Function
    sigma_derivative: Function
    scale: Function
    scale_derivative: Function
    time_of: Function

    @classmethod
    def edm(cls, num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Discretization:
        """Karras et al.'s own: ``sigma(t) = t``, levels evenly spaced in ``sigma^(1 / rho)``."""
        times = _then_zero(karras_sigmas(num_steps, sigma_min, sigma_max, rho))
        return cls(times, lambda t: t, torch.ones_like, torch.ones_like, torch.zeros_like, lambda sigma: sigma)

    @classmethod
    def ve(cls, num_steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Discretization:
        """The original VE sampler: ``sigma(t) = sqrt(t)``, levels in geometric progression."""
        check_noise_levels(num_steps, sigma_min, sigma_max)
        times = sigma_max**2 * (sigma_min / sigma_max) ** (2 * _ramp(num_steps))
        return cls(
            times=_then_zero(times),
            sigma=torch.sqrt,
            sigma_derivative=lambda t: 0.5 * t.rsqrt(),
            scale=torch.ones_like,
            scale_derivative=torch.zeros_like,
            time_of=torch.square,
        )

    @classmethod
    def vp(cls, num_steps: int, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_s: float = 1e-3) -> Discretization:
        """The original VP sampler: times evenly spaced from 1 to epsilon_s, ``s(t) = 1 / sqrt(1 + sigma(t)^2)``."""
        check_noise_levels(num_steps, epsilon_s, 1.0)
        process = VP(beta_d, beta_min)

        def beta(t: Tensor) -> Tensor:
            return beta_min + beta_d * t

        def sigma(t: Tensor) -> Tensor:
            return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()

        return cls(
            times=_then_zero(1 + _ramp(num_steps) * (epsilon_s - 1)),
            sigma=sigma,
            sigma_derivative=lambda t: 0.5 * beta(t) * (sigma(t) + 1 / sigma(t)),
            scale=process.alpha,
            scale_derivative=lambda t: -0.5 * beta(t) * process.alpha(t),
            time_of=process.time_of,
        )


@dataclass(frozen=True)
class Churn:
    """Noise added before each step, as the noise level is raised by gamma (Karras et al. 2022, Algorithm 2).

    Args:
        s_churn: gamma is ``min(s_churn / N, sqrt(2) - 1)``. 0: no noise, the sampler is deterministic.
        s_min, s_max: only at noise levels in [s_min, s_max].
        s_noise: standard deviation of the noise added, relative to what the higher level calls for.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (self.s_churn >= 0 and self.s_noise >= 0):
            raise ValueError(f"s_churn and s_noise must not be negative; got {self.s_churn} and {self.s_noise}.")
        if not self.s_min <= self.s_max:
            raise ValueError(f"s_min must not be above s_max; got {self.s_min} and {self.s_max}.")

    def gamma(self, sigma: float, num_steps: int) -> float:
        """By how much the level `sigma` is raised, relative to itself, in a sampler of `num_steps` steps."""
        if not self.s_min <= sigma <= self.s_max:
            return 0.0
        return min(self.s_churn / num_steps, math.sqrt(2) - 1)


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise ValueError unless `generator` is one generator, None, or a sequence with one for each image."""
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators for {batch_size} images: pass one generator, or one per image.")


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of that shape and dtype, drawn where the generator is: a seed is the same on every device."""
    if isinstance(generator, Sequence):
        rows = [torch.randn(like.shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
        return torch.stack([row.to(like.device) for row in rows])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


# Weights of the slopes at the start and at the end of a step.
_METHODS = {"euler": (1.0, 0.0), "heun": (0.5, 0.5)}


@torch.no_grad()
def sample_ode(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    discretization: Discretization,
    *,
    method: Literal["heun", "euler"] = "heun",
    churn: Churn | None = None,
    generator: Generators = None,
    step_noise: Tensor | None = None,
    on_step_end: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Fixed-step samples: Karras et al. 2022, Algorithm 1, and with `churn` Algorithm 2, on any of Table 1's rows.

    N steps call `denoise` 2N - 1 times with Heun's method and N times with Euler's: the last step, to zero noise, is
    Euler's. Image k depends on row k of `latents` alone (with churn, on its own generator too), not on the batch.

    Args:
        denoise: D(x; sigma), x (B, ...) float64 and sigma () float64 on the CPU.
        latents: (B, ...), standard normal.
        discretization: the steps.
        method: "heun" (second order) or "euler" (first order).
        churn: noise to add before each step. None: none.
        generator: source of that noise: one generator, or a sequence with one for each image. Drawn from only at steps
            that add noise.
        step_noise: (N, B, ...) standard normal noise to use instead, one slice for each step.
        on_step_end: called after step i with (i, state): the state is (B, ...) float64, in the discretisation's scale.
            A tensor that it returns is the state from there on.

    Returns:
        (B, ...) float64 images, at zero noise.

    Raises:
        ValueError: unknown method, or not one generator for each image.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}.")
    check_generators(generator, len(latents))
    churn = churn or Churn()
    start_weight, end_weight = _METHODS[method]
    sigma, scale = discretization.sigma, discretization.scale
    num_steps = len(discretization.times) - 1

    def slope(x: Tensor, t: Tensor) -> Tensor:
        # Karras et al. 2022, Algorithm 1, line 4 (eq. 81).
        growth = discretization.sigma_derivative(t) / sigma(t)
        shrinkage = discretization.scale_derivative(t) / scale(t)
        denoised = denoise(x / scale(t), sigma(t)).to(torch.float64)
        return (growth + shrinkage) * x - growth * scale(t) * denoised

    start = discretization.times[0]
    x = sigma(start) * scale(start) * latents.to(torch.float64)
    for i, (t, t_next) in enumerate(pairwise(discretization.times)):
        gamma = churn.gamma(sigma(t).item(), num_steps)
        if gamma > 0:
            # Algorithm 2, lines 4 to 6, in scaled space: a higher noise level is an earlier time.
            noise = step_noise[i].to(x) if step_noise is not None else draw_noise(x, generator)
            raised = (1 + gamma) * sigma(t)
            added = churn.s_noise * (raised**2 - sigma(t) ** 2).sqrt()
            x, t = x / scale(t) + added * noise, discretization.time_of(raised)
            x = scale(t) * x
        step, first = t_next - t, slope(x, t)
        x_next = x + step * first
        if end_weight and sigma(t_next) > 0:
            x_next = x + step * (start_weight * first + end_weight * slope(x_next, t_next))
        x = x_next
        if on_step_end is not None:
            replaced = on_step_end(i, x)
            x = x if replaced is None else replaced.to(x)
    return x / scale(discretization.times[-1])


class AdaptiveSample(NamedTuple):
    """`images` (B, ...) float64, and how many `evaluations` of the denoiser they took."""

    images: Tensor
    evaluations: int


@torch.no_grad()
def sample_rk45(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> AdaptiveSample:
    """Samples of the probability-flow ODE by the adaptive Runge-Kutta method of Dormand and Prince, order 5(4).

    In unscaled space the paths are the same for every process, so the process enters through `denoise` and the two
    noise levels alone. They are followed from sigma_max to sigma_min in the angle ``theta = arctan(sigma)``, as
    ``y = x cos(theta) = x0 cos(theta) + noise sin(theta)``, which has unit scale at both ends and the bounded slope
    ``dy / dtheta = (y cos(theta) - D) / sin(theta)``, an estimate of ``noise cos(theta) - x0 sin(theta)`` (the
    velocity of Salimans & Ho 2022, appendix D). One last evaluation gives D at sigma_min, the Euler step to zero noise.

    Args:
        denoise: D(x; sigma), x (B, ...) float64 and sigma () float64.
        latents: (B, ...), standard normal.
        sigma_min, sigma_max: extremes of the noise-to-signal ratio that the network was trained on.
        rtol, atol: tolerance of a step, relative and absolute, in root mean square over the batch. All images take
            the same steps: image k depends on the others in its batch, within the tolerance.

    Raises:
        ValueError: sigma_min is not in (0, sigma_max).
        RuntimeError: the solver cannot reach the tolerance.
    """
    check_noise_levels(1, sigma_min, sigma_max)
    theta_min, theta_max = math.atan(sigma_min), math.atan(sigma_max)

    def velocity(theta: float, state: Tensor) -> Tensor:
        y = state.to(latents.device).reshape(latents.shape)
        denoised = denoise(y / math.cos(theta), _level(theta)).to(torch.float64)
        return ((math.cos(theta) * y - denoised) / math.sin(theta)).flatten()

    initial = (math.sin(theta_max) * latents.to(torch.float64)).flatten()
    state, evaluations = _rk45(velocity, initial, theta_max, theta_min, rtol, atol)
    x = state.to(latents.device).reshape(latents.shape) / math.cos(theta_min)
    return AdaptiveSample(denoise(x, _level(theta_min)).to(torch.float64), evaluations + 1)


def _level(theta: float) -> Tensor:
    return torch.tensor(math.tan(theta), dtype=torch.float64, device="cpu")


def _rk45(
    slope: Callable[[float, Tensor], Tensor], initial: Tensor, start: float, stop: float, rtol: float, atol: float
) -> tuple[Tensor, int]:
    """Solve ``dy/dt = slope(t, y)`` from y(start) = `initial`, (n,) float64. Returns y(stop) and the slopes taken."""
    from scipy.integrate import RK45

    def function(t: float, y: Any) -> Any:
        value = slope(float(t), torch.from_numpy(y)).detach().cpu()
        # scipy would look for a step size for ever.
        if not bool(value.isfinite().all()):
            raise RuntimeError(f"the denoiser gave values that are not finite at sigma = {math.tan(t):.6g}.")
        return value.numpy()

    # The class behind scipy.integrate.solve_ivp: that function keeps the state of every step.
    solver = RK45(function, start, initial.cpu().numpy(), stop, rtol=rtol, atol=atol)
    while solver.status == "running":
        message = solver.step()
    if solver.status == "failed":
        raise RuntimeError(
            f"the adaptive solver stopped at angle {solver.t:.6g} of [{start:.6g}, {stop:.6g}]: {message} Loosen rtol "
            "and atol, or run the network in a higher precision: its rounding may exceed the tolerance."
        )
    return torch.from_numpy(solver.y), solver.nfev


class LogLikelihood(NamedTuple):
    """Log-likelihoods of B images.

    `nats` (B,) float64 is ln p(x), the density per unit volume of image space. `bits_per_dimension` (B,) is
    ``-log2 p(x) / D + log2(127.5)``: the code length per pixel and channel of an 8-bit image v seen as
    ``x = v / 127.5 - 1``. Works that map 256 levels to [-1, 1] at a spacing of 1 / 128 report 0.0056 more.
    `latents` (B, ...) are the images carried to standard normal noise, and `evaluations` counts the denoiser's.
    """

    nats: Tensor
    bits_per_dimension: Tensor
    latents: Tensor
    evaluations: int


def log_likelihood(
    denoise: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    divergence: Literal["hutchinson", "exact"] = "hutchinson",
    generator: Generators = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> LogLikelihood:
    """The log-likelihood of images under the probability-flow ODE (Song et al. 2021, arXiv 2011.13456, eq. 39).

    The images are taken as they are at noise level sigma_min and carried to sigma_max by `sample_rk45`'s ODE, where
    their density is the normal one; the change of volume on the way is the integral of the slope's divergence,
    accumulated in float64 by the same solver.

    Args:
        denoise: D(x; sigma), differentiable in x, image by image.
        images: (B, ...) floating point in [-1, 1].
        sigma_min, sigma_max, rtol, atol: as in `sample_rk45`.
        divergence: "hutchinson": an unbiased estimate from one random vector of signs for each image, kept along the
            path (Hutchinson 1990; average several calls to narrow it), one backward pass an evaluation. "exact": as
            many backward passes as an image has values.
        generator: source of the signs: one generator, or a sequence with one for each image.

    Raises:
        TypeError: images that are not floating point.
        ValueError: no images, unknown divergence, sigma_min not in (0, sigma_max), or not one generator for each image.
        RuntimeError: the solver cannot reach the tolerance, or gradients are off for good (`torch.inference_mode`).
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("log_likelihood takes gradients, which torch.inference_mode() forbids. Use torch.no_grad().")
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floating point in [-1, 1]; got {images.dtype}. Pass (pixels + noise) / 127.5 - 1, with "
            "noise uniform in [-0.5, 0.5) for a bound on the likelihood of pixels."
        )
    if not images.ndim or not len(images):
        raise ValueError(f"images must be (B, ...), one image at least; got {tuple(images.shape)}.")
    if divergence not in ("hutchinson", "exact"):
        raise ValueError(f"divergence must be 'hutchinson' or 'exact'; got {divergence!r}.")
    check_noise_levels(1, sigma_min, sigma_max)
    check_generators(generator, len(images))
    batch_size, dimension = len(images), images[0].numel()
    theta_min, theta_max = math.atan(sigma_min), math.atan(sigma_max)
    if divergence == "hutchinson":
        probes = [draw_noise(images.to(torch.float64), generator).sign()]
    else:
        basis = torch.eye(dimension, dtype=torch.float64, device=images.device)
        probes = [row.reshape(images.shape[1:]).expand(images.shape) for row in basis]

    def velocity_and_divergence(theta: float, state: Tensor) -> Tensor:
        y = state[:-batch_size].to(images.device).reshape(images.shape)
        with torch.enable_grad():
            x = (y / math.cos(theta)).requires_grad_()
            denoised = denoise(x, _level(theta)).to(torch.float64)
            trace = torch.zeros(batch_size, dtype=torch.float64, device=images.device)
            for i, probe in enumerate(probes):
                (product,) = torch.autograd.grad(denoised, x, probe, retain_graph=i + 1 < len(probes))
                trace += (product * probe).flatten(1).sum(1)
        velocity = (math.cos(theta) * y - denoised.detach()) / math.sin(theta)
        change = (dimension * math.cos(theta) - trace / math.cos(theta)) / math.sin(theta)
        return torch.cat([velocity.flatten(), change])

    start = math.cos(theta_min) * images.to(torch.float64)
    initial = torch.cat([start.flatten(), start.new_zeros(batch_size)])
    state, evaluations = _rk45(velocity_and_divergence, initial, theta_min, theta_max, rtol, atol)
    change_of_volume = state[-batch_size:].to(images.device)
    # y = x cos(theta) = latents sin(theta) at sigma_max.
    latents = state[:-batch_size].to(images.device).reshape(images.shape) / math.sin(theta_max)
    normal = -0.5 * (latents.square().flatten(1).sum(1) + dimension * math.log(2 * math.pi))
    nats = normal + change_of_volume + dimension * math.log(math.cos(theta_min) / math.sin(theta_max))
    bits = -nats / (dimension * math.log(2)) + math.log2(127.5)
    return LogLikelihood(nats, bits, latents, evaluations)
