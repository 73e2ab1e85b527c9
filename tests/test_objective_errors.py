"""What the training objective refuses, and the remedy that it names."""

import warnings

import pytest
import torch

from oracles import worst
from processes import PROCESSES
from stf_diffusers import (
    EDM,
    VP,
    FlowMatching,
    ReferenceBank,
    SchedulerProcess,
    SharedReferences,
    STFTrainingObjective,
)
from stf_diffusers.reference_set import ReferenceBatch
from wrong_calls import CALLS, I4, I12, SET_CALLS, SETS, R, X, set_call

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("case", CALLS)
def test_errors_say_what_to_do(case):
    """At the first call, and after any number of good ones; by perturb and by target."""
    change, error, message = CALLS[case]
    objective = STFTrainingObjective(EDM())
    arguments = {"clean": X, "noise": torch.zeros_like(X), "t": torch.ones(4), **change}
    for _ in range(2):
        with pytest.raises(error, match=message):
            objective.perturb(**arguments)
        with pytest.raises(error, match=message):
            objective.target(**{"timesteps" if key == "t" else key: value for key, value in arguments.items()})
        objective.perturb(X, reference=R)
        objective.perturb(X, reference=R, labels=I4, reference_labels=I12)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("case", SET_CALLS)
def test_reference_sets_called_directly_say_what_to_do(case, kind):
    _, error, message = SET_CALLS[case]
    with pytest.raises(error, match=message):
        set_call(case, kind)()


def test_what_only_one_kind_of_reference_set_can_be_told():
    bank, batch = ReferenceBank(R), ReferenceBatch(R)
    index = torch.arange(4)
    for size in (8.0, True, "8"):
        with pytest.raises(TypeError, match="subset_size must be an int; got"):
            bank.posterior_mean(X, 1.0, 1.0, source_index=index, subset_size=size)
    for wrong in (index + 9, index - 1):
        for references in (bank, batch):
            with pytest.raises(ValueError, match=r"source_index must lie in \[0, 12\)"):
                references.posterior_mean(X, 1.0, 1.0, source_index=wrong)
    with pytest.raises(ValueError, match="labels need reference_labels"):
        batch.posterior_mean(X, 1.0, 1.0, labels=I4)
    for images, kinds in (([X], (ReferenceBatch, SharedReferences)), (X.int(), (SharedReferences,))):
        for kind in kinds:
            with pytest.raises(TypeError, match=r"images must be a tensor|floating point"):
                kind(images)
    assert bank.posterior_mean(X, [1.0] * 4, [1.0] * 4).mean.equal(bank.posterior_mean(X, 1, torch.ones(4)).mean)


@pytest.mark.parametrize("process", [VP(), FlowMatching()], ids=repr)
def test_times_beyond_the_end_are_refused(process):
    """As the integer timesteps of a scheduler would be."""
    objective = STFTrainingObjective(process)
    objective.target(X, torch.zeros_like(X), torch.ones(4))
    for t in (torch.tensor([0.5, 1.01, 0.5, 0.5]), torch.tensor([1, 20, 300, 999])):
        with pytest.raises(ValueError, match=r"lie above 0 and up to 1; got .*STFTrainingObjective.from_scheduler"):
            objective.target(X, torch.zeros_like(X), t)


ADD_NOISE = [
    "DDPM",
    "DDIM",
    "PNDM",
    "LCM",
    "EulerDiscrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DEISMultistep",
]


@pytest.mark.parametrize("name", [*ADD_NOISE, "UniPCMultistep", "SASolver"])
def test_warns_where_add_noise_is_not_the_schedulers_process(name):
    """Some solvers read their noise table backwards until set_timesteps is called."""
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    process, t = SchedulerProcess(scheduler), torch.tensor([0, 10, 500, 999])
    wrong = worst(scheduler.add_noise(X, R[4:8], t), process.add_noise(X, R[4:8], t)) > 1e-3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        STFTrainingObjective.from_scheduler(scheduler)
    said = [w for w in caught if "does not add the noise that belongs to a timestep" in str(w.message)]
    assert bool(said) == wrong


@pytest.mark.parametrize("name", ["EulerDiscrete", "DDPM", "DDIM"])
def test_warns_where_get_velocity_is_not_the_target(name):
    """Euler's reads products of alphas that ascend at positions of timesteps that descend."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type="v_prediction")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = STFTrainingObjective.from_scheduler(scheduler)
    said = [w for w in caught if "get_velocity reads the noise of another timestep" in str(w.message)]
    t, noise = objective.process.timesteps[[0, 10, 500, 999]], R[4:8]
    differs = worst(scheduler.get_velocity(X, noise, t), objective.target(X, noise, t)) > 1e-3
    assert bool(said) == differs == (name == "EulerDiscrete")
    # Ours is what the scheduler's own step reads: see test_network_output_is_the_schedulers_own.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STFTrainingObjective.from_scheduler(getattr(diffusers, f"{name}Scheduler")())


def test_unknown_timesteps_of_a_scheduler_are_refused():
    objective = STFTrainingObjective(PROCESSES["DDPM"])
    with pytest.raises(ValueError, match="are not among the 1000 training timesteps"):
        objective.target(X, torch.zeros_like(X), torch.tensor([0, 1, 2, 1000]))


@pytest.mark.parametrize("shape", [(4, 1, 4, 4), (4, 6, 4, 4), (1, 3, 4, 4), (4, 3, 4), (4, 48)])
def test_loss_refuses_to_broadcast(shape):
    objective = STFTrainingObjective(EDM())
    with pytest.raises(ValueError, match=r"the network returned .* for a target of .*`.sample`.*out_channels"):
        objective.loss(torch.zeros(shape), objective.perturb(X))


@pytest.mark.parametrize("output", [X.tolist(), {"sample": X}, (X,)], ids=lambda output: type(output).__name__)
def test_loss_takes_a_tensor(output):
    objective = STFTrainingObjective(EDM())
    with pytest.raises(TypeError, match=r"output must be a tensor; got .*`\.sample`"):
        objective.loss(output, objective.perturb(X))


def test_constructor_errors():
    with pytest.raises(TypeError, match=r"got DDPMScheduler.*STFTrainingObjective.from_scheduler\(scheduler\)"):
        STFTrainingObjective(diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        STFTrainingObjective(EDM(), "eps")
    with pytest.raises(TypeError, match="needs a Diffusers scheduler"):
        STFTrainingObjective.from_scheduler(EDM())
