"""Pipelines of other packages: their scheduler tells what the network was trained on, and the exact network agrees."""

import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from scipy import stats

from exact_networks import small_unet
from stf_diffusers import EDM, FlowMatching, ReferenceBank, SchedulerProcess, STFPipeline, STFTrainingObjective
from stf_diffusers.export import (
    diffusers_pipeline,
    process_from_config,
    process_to_config,
    read_metadata,
    save_pipeline,
)
from stf_diffusers.model_card import model_card
from stf_diffusers.stock_schedulers import process_of_scheduler, scheduler_from_config

POINTS = (torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double() * 1.6 - 0.8


def betas_of(schedule):
    """In float64, from the papers."""
    steps = torch.arange(1000, dtype=torch.float64)
    if schedule == "squaredcos_cap_v2":
        signal = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    if schedule == "zero snr":  # Lin et al. 2023 (arXiv 2305.08891), algorithm 1
        root = torch.cumprod(1 - betas_of("linear"), 0).sqrt()
        signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return 1 - signal / torch.cat([torch.ones(1), signal[:-1]])
    if schedule == "trained":
        return 0.0002 + 0.012 * steps / 999
    return 1e-4 + (0.02 - 1e-4) * steps / 999


SETTINGS = {
    "linear": {},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "trained": {"trained_betas": betas_of("trained").tolist()},
}
CASES = [
    ("linear", "epsilon"),
    ("linear", "v_prediction"),
    ("linear", "sample"),
    ("squaredcos_cap_v2", "v_prediction"),
    ("zero snr", "v_prediction"),
    ("zero snr", "sample"),
    ("trained", "epsilon"),
]
cases = pytest.mark.parametrize(("schedule", "predicts"), CASES, ids=lambda part: part.replace(" ", "-"))


class ExactDDPM(UNet2DModel):
    """The network that a DDPM on the points converges to; class k is the points k, k + 2, ... Between integer timesteps
    ln(sigma / alpha) is linear.
    """

    def attach(self, schedule, predicts):
        self.signal, self.predicts = torch.cumprod(1 - betas_of(schedule), 0), predicts
        return self

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        t = torch.as_tensor(timestep).double().reshape(-1).expand(len(sample))
        low = t.floor().long()
        level = torch.log((1 - self.signal) / self.signal) / 2
        ratio = torch.where(t == low, level[low], level[low].lerp(level[(low + 1).clamp(max=999)], t - low)).exp()
        alpha = (1 + ratio**2).rsqrt()[:, None]
        sigma = torch.where(alpha > 0, (1 - alpha**2).sqrt(), 1)
        x, points = sample.double().flatten(1), POINTS.flatten(1)
        logits = -(x[:, None] - alpha[..., None] * points).square().sum(2) / (2 * sigma**2)
        if class_labels is not None:
            logits = logits.masked_fill((torch.arange(len(points)) % 2) != class_labels[:, None], -torch.inf)
        x0 = logits.softmax(1) @ points
        noise = (x - alpha * x0) / sigma
        output = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[self.predicts]
        output = output.reshape(sample.shape).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def exact(schedule, predicts, classes=None):
    return ExactDDPM.from_config(small_unet(classes=classes).config).attach(schedule, predicts)


def stock(schedule, predicts, kind=DDPMScheduler):
    return kind(prediction_type=predicts, **SETTINGS[schedule])


def are_the_points(images, points=POINTS):
    """Each sample is one of the points, all equally often; a right sampler fails one time in 10^4."""
    distance = torch.cdist((images.double() * 2 - 1).flatten(1), points.flatten(1))
    nearest, which = distance.min(1)
    counts = torch.bincount(which, minlength=len(points)).numpy()
    return nearest.max() < 2e-2 and stats.chisquare(counts).pvalue > 1e-4


@cases
def test_the_first_loss_of_an_exact_network_is_zero(schedule, predicts):
    """With all of the data as references the target is what the network returns; on EDM it is not."""
    network, generator = exact(schedule, predicts), torch.Generator().manual_seed(1)
    clean, losses = POINTS[torch.arange(64) % 6].float(), {}
    for name, process in (("own", process_of_scheduler(stock(schedule, predicts))), ("edm", EDM())):
        objective = STFTrainingObjective(process)
        t = None
        if name == "own":
            t = torch.cat([torch.tensor([0, 1, 998, 999]), process.sample_t(60, generator)])
        index = torch.arange(64) % 6
        batch = objective.perturb(
            clean,
            reference=ReferenceBank(POINTS.float(), dtype=torch.float32),
            source_index=index,
            t=t,
            generator=generator,
        )
        timestep = batch.timestep.clamp(0, 999)
        losses[name] = float(objective.loss(network(batch.model_input, timestep).sample, batch))
    assert losses["own"] < 1e-7 and losses["edm"] > 0.1, losses


@cases
def test_plain_diffusers_samples_the_saved_folder_right(schedule, predicts, tmp_path):
    """`DDPMPipeline` with the folder's own scheduler; with classes DPM-Solver++ in a few tens of steps."""
    process = process_of_scheduler(stock(schedule, predicts))
    pipeline = diffusers_pipeline(exact(schedule, predicts), process, metadata={"steps": 3})
    assert type(pipeline) is DDPMPipeline and type(pipeline.scheduler) is DDPMScheduler
    assert pipeline.scheduler.config.clip_sample, "the folder's"
    labelled = diffusers_pipeline(exact(schedule, predicts, classes=2), process)
    assert type(labelled.scheduler).__name__ == "DPMSolverMultistepScheduler"
    generator = torch.Generator().manual_seed(1)
    for pipe in (pipeline, labelled):
        pipe.set_progress_bar_config(disable=True)
    images = pipeline(300, generator=generator, output_type="np").images
    assert are_the_points(torch.from_numpy(images).permute(0, 3, 1, 2))
    images = labelled(300, class_labels=[1] * 300, generator=generator, num_inference_steps=50, output_type="np").images
    assert are_the_points(torch.from_numpy(images).permute(0, 3, 1, 2), POINTS[1::2])


@cases
def test_every_solver_of_ours_samples_it_right(schedule, predicts):
    """Also without metadata: the folder of another package."""
    network, scheduler = exact(schedule, predicts), stock(schedule, predicts)
    generator = torch.Generator().manual_seed(2)
    for pipeline in (
        STFPipeline(network, scheduler),
        STFPipeline(network, diffusers_pipeline(network, process_of_scheduler(scheduler)).scheduler),
    ):
        pipeline.set_progress_bar_config(disable=True)
        for solver, steps in (("heun", 40), ("scheduler", 1000)):
            images = pipeline(200, steps, solver=solver, generator=generator, output_type="pt").images
            assert are_the_points(images), solver


@cases
def test_config_round_trip(schedule, predicts):
    for kind in (DDPMScheduler, DDIMScheduler):
        process = process_of_scheduler(stock(schedule, predicts, kind))
        config = process_to_config(process)
        assert json.loads(json.dumps(config)) == config, "as a resumed run compares it"
        found = process_from_config(config)
        assert process_to_config(found) == config and found.scheduler_name == kind.__name__
        t = process.timesteps
        assert torch.equal(found.alpha(t), process.alpha(t)) and found.prediction_type == predicts
    with pytest.raises(ValueError, match="saved scheduler 'Trap' is not one of DDPMScheduler, DDIMScheduler"):
        scheduler_from_config({"_class_name": "Trap"})


def test_one_folder_two_readers(tmp_path):
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    scheduler.save_pretrained(tmp_path / "stock" / "scheduler")
    saved = read_metadata(tmp_path / "stock")
    assert saved["process"]["scheduler"]["_class_name"] == "DDIMScheduler" and saved["sampling_range"] == {}
    process = process_from_config(saved["process"])
    pipeline = diffusers_pipeline(small_unet(), process, metadata={"steps": 3})
    save_pipeline(pipeline, tmp_path / "ours")
    plain, ours = DiffusionPipeline.from_pretrained(tmp_path / "ours"), STFPipeline.from_pretrained(tmp_path / "ours")
    assert type(plain.scheduler) is DDIMScheduler
    assert not plain.scheduler.config.clip_sample and plain.scheduler.config.steps_offset == 1
    assert process_to_config(ours.process) == saved["process"]
    ours.save_pretrained(tmp_path / "again")
    assert read_metadata(tmp_path / "again") == {"steps": 3, "process": saved["process"]}
    card = str(model_card(pipeline, repository="r", num_inference_steps=35))
    assert "DISCRETE (timesteps = 1000, betas = linear, prediction = v_prediction)" in card
    assert "can be at most the number of timesteps above" in card and "1,000 steps" not in card


@pytest.mark.parametrize("name", ["PNDM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete"])
def test_schedulers_in_the_place_of_a_ddpm(name):
    """The same betas and prediction type; none of them clips, so the saved scheduler does not."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type="v_prediction")
    process = process_of_scheduler(scheduler)
    assert process.scheduler_name == "DDPMScheduler" and process.prediction_type == "v_prediction"
    assert torch.equal(process.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert not process.scheduler.config.clip_sample


def test_schedulers_of_other_families():
    assert process_of_scheduler(diffusers.EDMEulerScheduler(sigma_data=0.7)) == EDM(sigma_data=0.7)
    assert process_of_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)) == FlowMatching()
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert process_of_scheduler(flow) == FlowMatching()


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
        diffusers.ScoreSdeVeScheduler(),
        diffusers.CMStochasticIterativeScheduler(),
        diffusers.LCMScheduler(),
        diffusers.CogVideoXDDIMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_that_do_not_tell_are_refused(scheduler, tmp_path):
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} .* does not say which noise process"):
        process_of_scheduler(scheduler)
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match="does not say which noise process"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["DDPM", "DPMSolverMultistep"])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variances_are_refused(name, variance, tmp_path):
    """Diffusers splits the output of such a network, and would split ours."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(variance_type=variance)
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=f"{name}Scheduler with variance_type '{variance}' .* to 'fixed_small'"):
        read_metadata(tmp_path)


def test_a_folder_whose_scheduler_was_exchanged_or_is_unknown(tmp_path):
    save_pipeline(diffusers_pipeline(small_unet(), EDM(sigma_data=0.7)), tmp_path)
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    assert read_metadata(tmp_path) == {"process": process_to_config(EDM(sigma_data=0.7))}, "the network's own word"
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    for name in ("MyScheduler", "UNet2DModel", "utils"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
        with pytest.raises(ValueError, match=f"{name} is not a scheduler of Diffusers"):
            read_metadata(tmp_path)


def test_an_exchanged_scheduler_must_have_the_same_table_and_prediction():
    network = small_unet()
    own = diffusers_pipeline(network, SchedulerProcess(DDPMScheduler())).scheduler
    STFPipeline(network, diffusers.DPMSolverMultistepScheduler.from_config(own.config))
    for other in (
        DDPMScheduler(prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="scaled_linear"),
        DDPMScheduler(50),
    ):
        with pytest.raises(ValueError, match="would give garbage"):
            STFPipeline(network, other)
