"""Targets of `from_scheduler` in loops of other kinds: half precision, other shapes, denoisers, adapters."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)

from oracles import images, normal, posterior, rows, worst
from stf_diffusers import SchedulerProcess, STFTrainingObjective

FAMILIES = {
    "DDPM epsilon": DDPMScheduler(),
    "DDPM sample": DDPMScheduler(prediction_type="sample"),
    "DDPM v": DDPMScheduler(prediction_type="v_prediction"),
    "zero terminal SNR": DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "EDM Euler": EDMEulerScheduler(),
    "Euler": EulerDiscreteScheduler(),
    "Euler v": EulerDiscreteScheduler(prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
every_family = pytest.mark.parametrize("scheduler", FAMILIES.values(), ids=FAMILIES)


@pytest.mark.parametrize("name", ["DDPM epsilon", "DDPM sample", "DDPM v", "flow, shifted"])
def test_half_precision_targets(name):
    """A loop in bf16: targets within one unit in the last place of the float32 ones; epsilon, sample, flow exactly."""
    scheduler = FAMILIES[name]
    reference, noise = images(4, 3, 8, 8).bfloat16(), normal(4, 3, 8, 8).bfloat16()
    objective = STFTrainingObjective.from_scheduler(scheduler)
    timesteps = objective.process.timesteps[[10, 300, 600, 990]]
    for i in range(4):  # one reference each
        arguments = reference[i : i + 1], noise[i : i + 1], timesteps[i : i + 1]
        x0, e, t = arguments
        target = objective.target(*arguments, reference=x0)
        script = {
            "DDPM epsilon": lambda e=e: e,
            "DDPM sample": lambda x0=x0: x0,
            "DDPM v": lambda x0=x0, e=e, t=t: scheduler.get_velocity(x0.float(), e.float(), t),
            "flow, shifted": lambda x0=x0, e=e: e - x0,
        }[name]().bfloat16()
        one_ulp = torch.nextafter(script, torch.tensor(torch.inf, dtype=torch.bfloat16)).float() - script.float()
        assert ((target.bfloat16().float() - script.float()).abs() <= one_ulp.abs()).all()
        assert name == "DDPM v" or torch.equal(target.bfloat16(), script)


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 3, 2, 2), (6, 8)], ids=["image", "video", "packed sequence"])
@every_family
def test_shapes_and_timesteps(scheduler, shape):
    """Images, video latents (C, T, H, W) and packed sequences (L, C), which differ in nothing but their shape."""
    objective = STFTrainingObjective.from_scheduler(scheduler)
    times = objective.process.timesteps
    t = times[torch.linspace(1, len(times) - 1, 5).long()]
    flat, noise = images(20, 48), normal(5, 48)
    expected = objective.target(flat[:5], noise, t, reference=flat)
    shaped, shaped_noise = flat.view(20, *shape), noise.view(5, *shape)
    target = objective.target(shaped[:5], shaped_noise, t, reference=shaped)
    assert torch.equal(target, expected.view(5, *shape))
    # The target belongs to what the scheduler's own noising gives.
    add_noise = getattr(scheduler, "add_noise", None) or (lambda x0, e, t: scheduler.scale_noise(x0, t, e))
    noisy = objective.process.add_noise(shaped[:5], shaped_noise, t)
    torch.testing.assert_close(add_noise(shaped[:5], shaped_noise, t), noisy, rtol=1e-6, atol=1e-6)
    assert not torch.equal(target, objective.target(shaped[:5], shaped_noise, t))
    for dtype in (torch.float64, torch.int64) if bool((t == t.round()).all()) else (torch.float64,):
        assert torch.equal(objective.target(shaped[:5], shaped_noise, t.to(dtype), reference=shaped), target)


def test_denoiser_form_of_edm():
    """Scripts that precondition compare the denoised images with the clean ones: prediction type "sample"."""
    scheduler = FAMILIES["EDM Euler"]
    objective = STFTrainingObjective(SchedulerProcess(scheduler), prediction_type="sample")
    reference, noise, t = images(20, 3, 4, 4), normal(5, 3, 4, 4), scheduler.timesteps[[0, 200, 400, 600, 800]]
    sigma = (4 * t.double()).exp()
    noisy = reference[:5].double() + rows(sigma, reference) * noise
    expected = posterior(noisy, reference, torch.ones(5), sigma)[1]
    assert worst(objective.target(reference[:5], noise, t, reference=reference), expected) < 1e-5
    assert torch.equal(objective.target(reference[:5], noise, t), reference[:5])


def test_lora():
    """Adapters in bf16 on a frozen transformer: they alone have gradients, and one reference is the DSM target."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=4,
    )  # fmt: skip
    model.to(torch.bfloat16).requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    model.to(torch.bfloat16)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = FAMILIES["flow, shifted"]
    objective = STFTrainingObjective.from_scheduler(scheduler)
    latents, embeddings = normal(12, 4, 8, 8, seed=1).bfloat16(), normal(2, 5, 16, seed=2).bfloat16()
    for step in range(3):
        clean, noise = latents[:2], normal(2, 4, 8, 8, seed=10 + step).bfloat16()
        steps = torch.tensor([5, 500])
        timesteps, sigmas = scheduler.timesteps[steps], scheduler.sigmas[steps].view(-1, 1, 1, 1)
        noisy = ((1 - sigmas) * clean + sigmas * noise).bfloat16()
        target = objective.target(clean, noise, timesteps, reference=latents)
        dsm = objective.target(clean[:1], noise[:1], timesteps[:1], reference=latents[:1])
        assert torch.equal(dsm.bfloat16(), noise[:1] - clean[:1])
        assert (target - (noise - clean).float()).abs().max() > 0.1
        output = model(noisy, embeddings, embeddings[:, 0], timesteps).sample
        F.mse_loss(output.float(), target).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert all(not torch.equal(after[name], p) for name, p in adapters.items())
