"""The learning rate, the gradient and the averages, against closed forms, for processes and accumulation."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.optimize import brentq

import reconstruct_ema
from oracles import images, normal
from stf_diffusers import EDM, STFTrainingObjective
from tiny import TINY, Processes, launch, train, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def scalars(folder, name):
    """A tracked number by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [EventAccumulator(str(file)).Reload() for file in folder.rglob("events.out.tfevents*")]
    (events,) = (events for events in files if name in events.Tags()["scalars"])
    return {event.step: event.value for event in events.Scalars(name)}


SCHEDULES = {
    "cosine": lambda step, steps, warmup: (
        step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    ),
    "linear": lambda step, steps, warmup: step / warmup if step < warmup else (steps - step) / (steps - warmup),
    "constant_with_warmup": lambda step, steps, warmup: min(1, step / warmup),
}


@pytest.mark.parametrize(("processes", "schedule"), [*((1, schedule) for schedule in SCHEDULES), (2, "cosine")])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_learning_rate_at_every_step(accumulation, processes, schedule, flags, tmp_path):
    """Of optimizer steps, whatever the processes and micro-batches: step k (from 1) uses the schedule at k - 1."""
    argv = flags(
        "--lr_scheduler", schedule, "--lr_warmup_steps", 3, "--max_train_steps", 9, "--learning_rate", 2e-3,
        "--gradient_accumulation_steps", accumulation, "--logging_steps", 1, "--report_to", "tensorboard",
    )  # fmt: skip
    if processes == 1:
        train(argv)
    else:
        launch(argv, processes=2)
    found = scalars(tmp_path / "run", "learning_rate")
    assert sorted(found) == list(range(1, 10))
    for step, rate in found.items():
        assert rate == pytest.approx(2e-3 * SCHEDULES[schedule](step - 1, 9, 3), rel=1e-5, abs=1e-12), step


def toy():
    torch.manual_seed(0)
    unet = UNet2DModel.from_config({**TINY, "dropout": 0.0, "sample_size": 8, "in_channels": 3, "out_channels": 3})
    return unet, torch.optim.SGD(unet.parameters(), lr=0.1)


def parts(count):
    """One batch of 8 images with its times, noise and references, in `count` parts."""
    reference, noise = images(20, 3, 8, 8), normal(8, 3, 8, 8)
    t = torch.exp(normal(8, seed=2) * 1.2)
    size = 8 // count
    for start in range(0, 8, size):
        rows = slice(start, start + size)
        yield reference[rows], {"t": t[rows], "noise": noise[rows], "reference": reference}, torch.arange(8)[rows]


def steps(accelerator, unet, optimizer, batches):
    objective = STFTrainingObjective(EDM())
    model, optimizer = accelerator.prepare(unet, optimizer)
    for clean, keywords, index in batches:
        with accelerator.accumulate(model):
            batch = objective.perturb(clean, source_index=index, **keywords)
            accelerator.backward(objective.loss(model(batch.model_input, batch.timestep).sample, batch))
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_micro_batches_equal_one_batch(accumulation):
    expected = steps(Accelerator(cpu=True), *toy(), parts(1))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    found = steps(Accelerator(cpu=True, gradient_accumulation_steps=accumulation), *toy(), parts(accumulation))
    assert (found - expected).abs().max() < 1e-6
    assert (expected - torch.cat([p.detach().flatten() for p in toy()[0].parameters()])).abs().max() > 1e-3


def half_of_a_step(path):
    """One process of two."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    result = steps(accelerator, *toy(), list(parts(2))[rank : rank + 1])
    if accelerator.is_main_process:
        torch.save(result, path)
    accelerator.end_training()


def test_two_processes_equal_one(tmp_path):
    expected = steps(Accelerator(cpu=True), *toy(), parts(1))
    codes, said = Processes(half_of_a_step, tmp_path / "weights.pt", processes=2).wait()
    assert codes == [0, 0], said[-3000:]
    assert (torch.load(tmp_path / "weights.pt", weights_only=True) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("accumulation", [1, 3])
def test_averages_are_stepped_once_per_optimizer_step(accumulation, flags, tmp_path):
    """In float32, by the decay of the warm-up 1 - (1 + k)^-3/4 at most, from the weights after each step."""
    more = ["--gradient_accumulation_steps", accumulation, "--mixed_precision", "bf16", "--report_to", "none"]
    train(
        flags(
            *more, "--max_train_steps", 4, "--checkpointing_steps", 1, "--learning_rate", 1e-2, "--lr_warmup_steps", 0
        )
    )
    average = None
    for step in range(1, 5):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        with safe_open(checkpoint / "ema.safetensors", framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            names = list(file.keys())
            saved = {name: file.get_tensor(name) for name in names}
        assert state["optimization_step"] == step
        with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
            raw = {name: file.get_tensor(name).double() for name in names}
        decay = 0 if step == 1 else min(0.9999, 1 - (1 + (step - 1)) ** -0.75)
        average = raw if average is None else {n: decay * average[n] + (1 - decay) * raw[n] for n in names}
        for name in names:
            assert saved[name].dtype == torch.float32
            torch.testing.assert_close(saved[name].double(), average[name], rtol=0, atol=1e-6)


def test_post_hoc_averages(flags, tmp_path):
    """Reconstructed at a kept width: that average. At another: the average kept with it, followed step by step here."""
    pytest.importorskip("ema_pytorch")
    steps = 40
    argv = flags(
        "--post_hoc_ema", "--checkpointing_steps", 1, "--max_train_steps", steps, "--report_to", "none",
        "--learning_rate", 3e-3, "--lr_scheduler", "constant", "--checkpoints_total_limit", 2, "--no-use_ema",
    )  # fmt: skip
    # With --no-use_ema the checkpoint's network is the raw one; each is read before it is rotated away.
    run, raw = tmp_path / "run", []
    train([*argv, "--max_train_steps", str(steps // 2)])
    train([*argv, "--resume_from_checkpoint", "latest"])
    train([*argv, "--checkpoints_total_limit", str(steps), "--output_dir", str(tmp_path / "whole")])
    snapshots = sorted((run / "post_hoc_ema").iterdir())
    assert len(snapshots) == steps, "one of each checkpoint, rotated away or not"
    for here, there in zip(snapshots, sorted((tmp_path / "whole" / "post_hoc_ema").iterdir()), strict=True):
        assert here.read_bytes() == there.read_bytes(), "a resumed run's averages are those of one that was not stopped"
    for step in range(1, steps + 1):
        raw.append(load_file(tmp_path / "whole" / f"checkpoint-{step}" / "model.safetensors"))
    for sigma_rel in (0.05, 0.10, 0.15):
        reconstruct_ema.main(
            [f"--model={run}", f"--sigma_rel={sigma_rel}", f"--output_dir={tmp_path / str(sigma_rel)}"]
        )
        found = weights(tmp_path / str(sigma_rel))
        # Equation 127: the width of an average with the weights t^gamma.
        gamma = brentq(lambda g, width=sigma_rel: (g + 1) ** 0.5 / ((g + 2) * (g + 3) ** 0.5) - width, 0, 1e3)
        # The average of the first step stands for the initial weights too, so time is one step ahead.
        expected = {name: value.double() for name, value in raw[0].items()}
        for t, now in enumerate(raw[1:], start=3):
            decay = (1 - 1 / t) ** (gamma + 1)
            expected = {name: decay * value + (1 - decay) * now[name].double() for name, value in expected.items()}
        spread = max((raw[-1][name] - raw[0][name]).abs().max().item() for name in found)
        error = max((found[name] - expected[name]).abs().max().item() for name in found)
        assert error < (1e-5 if sigma_rel in (0.05, 0.10) else 0.02) * spread, sigma_rel
        assert DiffusionPipeline.from_pretrained(tmp_path / str(sigma_rel)).unet.config.in_channels == 3
    with pytest.raises(ValueError, match=r"below 0\.288"):
        reconstruct_ema.main([f"--model={run}", "--sigma_rel=0.5", f"--output_dir={tmp_path / 'wide'}"])
    with pytest.raises(ValueError, match="Train with --post_hoc_ema"):
        reconstruct_ema.main([f"--model={tmp_path / 'none'}", "--sigma_rel=0.1", f"--output_dir={tmp_path / 'wide'}"])
