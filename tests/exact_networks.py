"""Exact denoisers, and the networks that training would converge to, written without the package's code."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from stf_diffusers import EDM, VE, VP, FlowMatching


def denoise_points(points: Tensor, x: Tensor, sigma: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """E[x0 | x0 + sigma noise = x] for x0 uniform on `points` (n, ...), or on those that a row's `mask` (B, n) allows."""
    flat, refs = x.flatten(1), points.to(x).flatten(1)
    logits = -(flat[:, None] - refs).square().sum(2) / (2 * torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(1) @ refs).reshape(x.shape)


def denoise_gaussian(mean: Tensor, covariance: Tensor, x: Tensor, sigma: Tensor | float) -> Tensor:
    """E[x0 | x0 + sigma noise = x] for x0 normal with `mean` (D,) and `covariance` (D, D)."""
    noisy = covariance + float(sigma) ** 2 * torch.eye(len(mean), dtype=x.dtype)
    return (mean + (x.flatten(1) - mean) @ torch.linalg.solve(noisy, covariance)).reshape(x.shape)


class ExactNetwork(nn.Module):
    """The network of `process` ("edm" with sigma_data 0.6, "ve", "vp", "flow") on `points`, with `classes` classes.

    Class k is the points k, k + classes, ...; the class after the last one is the dropped condition. Runs in float64.
    """

    def __init__(self, process: str, points: Tensor, classes: int | None = None) -> None:
        super().__init__()
        self.process, self.points, self.classes = process, points.double(), classes
        self.evaluations = 0

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> SimpleNamespace:
        self.evaluations += 1
        assert timestep.shape == (len(sample),) and timestep.is_floating_point()
        t = timestep.double().reshape(-1, *[1] * (sample.ndim - 1))
        if self.process == "edm":
            ratio = (4 * t).exp()
            scale = 1 / (ratio**2 + 0.36).sqrt()
        elif self.process == "ve":
            ratio = 0.02 * (100 / 0.02) ** (t / 999)
            scale = 1 / (1 + ratio**2).sqrt()
        elif self.process == "vp":
            time = (t + 1) / 1000
            ratio = torch.expm1(19.9 * time**2 / 2 + 0.1 * time).sqrt()
            scale = 1 / (1 + ratio**2).sqrt()
        else:
            ratio, scale = t / 1000 / (1 - t / 1000), 1 - t / 1000
        x, mask = sample.double() / scale, None
        if class_labels is not None:
            assert self.classes is not None
            owner = torch.arange(len(self.points)) % self.classes
            mask = (owner == class_labels[:, None]) | (class_labels[:, None] == self.classes)
        denoised = denoise_points(self.points, x, ratio.flatten(), mask)
        noise = (x - denoised) / ratio
        output = {"edm": (denoised - 0.36 * scale**2 * x) / (ratio * 0.6 * scale), "flow": noise - denoised}
        return SimpleNamespace(sample=output.get(self.process, noise).to(sample.dtype))


# Those that the exact networks are of.
PROCESSES = {"edm": EDM(sigma_data=0.6), "ve": VE(), "vp": VP(), "flow": FlowMatching()}


def small_unet(channels: int = 1, size: int = 4, classes: int | None = None) -> UNet2DModel:
    """An untrained network of Diffusers with the same weights at each call."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        num_class_embeds=classes,
    )


def noise_to_signal(name: str, timestep: Tensor) -> Tensor:
    """sigma/alpha at the network's timestep, from the formulas of the papers."""
    t = timestep.double()
    if name == "edm":
        return (4 * t).exp()
    if name == "ve":
        return 0.02 * (100 / 0.02) ** (t / 999)
    if name == "cosine":
        return torch.tan((0.008 + 0.984 * t / 999) * torch.pi / 2)
    time = (t + 1) / 1000
    return torch.expm1(19.9 * time**2 / 2 + 0.1 * time).sqrt()


class ExactUNet(UNet2DModel):
    """As `ExactNetwork`, as a class that pipelines take: ``ExactUNet.from_config(config).attach("edm", points)``."""

    def attach(self, name: str, points: Tensor) -> ExactUNet:
        self.name, self.points = name, points.double()
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor] | None:
        timestep = torch.as_tensor(timestep).reshape(-1)[:1].expand(len(sample))
        if self.name == "flow":
            return UNet2DOutput(sample=self.velocity(sample, timestep.double() / 1000)) if return_dict else None
        ratio = noise_to_signal(self.name, timestep)[:, None]
        data_std = 0.6 if self.name == "edm" else 1.0
        unscaled = sample.double().flatten(1) * (ratio**2 + data_std**2).sqrt()  # x0 + ratio * noise
        distance = (unscaled[:, None] - self.points.flatten(1)).square().sum(2)
        denoised = torch.softmax(-distance / (2 * ratio**2), 1) @ self.points.flatten(1)
        if self.name == "edm":
            total = ratio**2 + 0.36
            output = (denoised - 0.36 / total * unscaled) * total.sqrt() / (ratio * 0.6)
        else:
            output = (unscaled - denoised) / ratio
        output = output.reshape(sample.shape).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def velocity(self, sample: Tensor, t: Tensor) -> Tensor:
        """noise - x0, also at t = 1, where nothing of the image is left."""
        x, t = sample.double().flatten(1), t[:, None]
        distance = (x[:, None] - (1 - t[:, None]) * self.points.flatten(1)).square().sum(2)
        denoised = torch.softmax(-distance / (2 * t**2), 1) @ self.points.flatten(1)
        return ((x - (1 - t) * denoised) / t - denoised).reshape(sample.shape).to(sample.dtype)
