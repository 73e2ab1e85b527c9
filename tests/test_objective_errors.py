"""What the training objective refuses, and the remedy that it names."""

import warnings

import pytest
import torch

from oracles import images, normal, worst
from processes import PROCESSES
from stf_diffusers import (
    EDM,
    VP,
    FlowMatching,
    ReferenceBank,
    SchedulerProcess,
    STFTrainingObjective,
)

diffusers = pytest.importorskip("diffusers")


# ---- errors, each with its remedy

X = images(4, 3, 4, 4)
R = torch.cat([X, images(8, 3, 4, 4, seed=1)])
ONE_PIXEL = R.clone()
ONE_PIXEL[2, 1, 3, 0] += 1e-3
I4, I12 = torch.zeros(4, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)
CAT = r"reference=torch.cat\(\[clean, others\]\)"
ERRORS = {
    "other images": (dict(reference=R[4:]), ValueError, CAT),
    "permuted sources": (dict(reference=torch.cat([X.flip(0), R[4:]])), ValueError, f"must equal clean.*{CAT}"),
    "sources at the end": (dict(reference=R.flip(0)), ValueError, f"(?s)source_index.*{CAT}"),
    "one pixel changed": (dict(reference=ONE_PIXEL), ValueError, "largest difference is 0.001"),
    "one pixel of float64": (dict(clean=X.double(), reference=ONE_PIXEL.double()), ValueError, CAT),
    "horizontally flipped": (dict(clean=X.flip(-1), reference=R), ValueError, "after any augmentation"),
    "too few": (dict(reference=X[:3]), ValueError, r"got 3 references for 4 images.*torch.cat\(\[clean, others\]\)"),
    "other size": (dict(reference=R[..., :2]), ValueError, "must have one shape. Resize and crop them alike"),
    "no tensor": (dict(reference=[X]), TypeError, "reference must be a tensor .* got list"),
    "integer images": (dict(clean=X.int()), TypeError, "floating point in .* or uint8 pixels"),
    "integer references": (dict(reference=R.int()), TypeError, "floating point in .* or uint8 pixels"),
    "images no tensor": (dict(clean=[X]), TypeError, "clean must be a tensor .* got list. Stack the images first"),
    "no batch": (dict(clean=X[0, 0, 0]), ValueError, "clean must be a batch"),
    "index to others": (dict(reference=R, source_index=I4 + 5), ValueError, r"reference\[source_index\]"),
    "index beyond": (dict(reference=R, source_index=I4 + 12), ValueError, r"source_index must lie in \[0, 12\)"),
    "index negative": (dict(reference=R, source_index=I4 - 1), ValueError, r"source_index must lie in \[0, 12\)"),
    "index shape": (dict(reference=R, source_index=I12), ValueError, r"source_index must have shape \(4,\)"),
    "index bool": (dict(reference=R, source_index=I4.bool()), TypeError, "source_index must be integers; got torch.bool"),
    "labels alone": (dict(reference=R, labels=I4), ValueError, "labels need reference_labels: rows use references of"),
    "reference labels alone": (dict(reference=R, reference_labels=I12), ValueError, "reference_labels need labels"),
    "labels shape": (dict(reference=R, labels=I4[:3], reference_labels=I12), ValueError, r"labels must have shape \(4,"),
    "reference labels shape": (
        dict(reference=R, labels=I4, reference_labels=I4), ValueError, r"reference_labels must have shape \(12,\)"
    ),
    "float labels": (
        dict(reference=R, labels=I4.float(), reference_labels=I12), TypeError, "labels must be integers; got torch.float32"
    ),
    "one-hot labels": (
        dict(reference=R, labels=torch.eye(4).long(), reference_labels=I12), ValueError, "labels must have shape"
    ),
    "mismatched labels": (
        dict(reference=R, labels=I4 + 1, reference_labels=I12), ValueError, "labels differ from .* or -1 where the condition"
    ),
    "mismatched labels by index": (
        dict(reference=R, labels=I4, source_index=torch.arange(4), reference_labels=I12 + 1), ValueError, "labels differ"
    ),
    "unconditional without labels": (
        dict(reference=R, num_unconditional=8), ValueError, "num_unconditional needs labels and reference_labels"
    ),
    "unconditional below B": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=3), ValueError, r"\[B, n\] = \[4, 12\]; got 3"
    ),
    "unconditional above n": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=13), ValueError, r"\[4, 12\]; got 13"
    ),
    "unconditional no number": (
        dict(reference=R, labels=I4, reference_labels=I12, num_unconditional=8.0), TypeError, "must be an int; got float"
    ),
    "unconditional of a bank": (
        dict(reference=ReferenceBank(R, I12), labels=I4, num_unconditional=8),
        ValueError, "in a ReferenceBank, rows of label -1 use all. Leave it out"
    ),
    "a list of labels": (dict(reference=R, labels=[0] * 4, reference_labels=I12), TypeError, "labels must be a tensor"),
    "a list of reference labels": (
        dict(reference=R, labels=I4, reference_labels=[0] * 12), TypeError, "reference_labels must be a tensor .* got list"
    ),
    "a list of labels for a bank": (dict(reference=ReferenceBank(R, I12), labels=[0] * 4), TypeError, "labels must be a tensor"),
    "a list of positions": (dict(reference=R, source_index=[0] * 4), TypeError, "source_index must be a tensor"),
    "a list of positions in a bank": (
        dict(reference=ReferenceBank(R), source_index=[0] * 4), TypeError, "source_index must be a tensor .* got list"
    ),
    "boolean labels": (
        dict(reference=R, labels=I4.bool(), reference_labels=I12), TypeError, "labels must be integers; got torch.bool"
    ),
    "labels of others without references": (dict(labels=I12), ValueError, r"labels must have shape \(4,\), one for each"),
    "a list of times": (dict(t=[1.0] * 4), TypeError, r"times must be a tensor \(4,\); got list"),
    "a number as time": (dict(t=1.0), TypeError, r"times must be a tensor \(4,\); got float"),
    "a list of noise": (dict(noise=[0.0] * 4), TypeError, "noise must be a tensor of shape .* got list"),
    "noise shape": (dict(noise=normal(4, 1, 4, 4)), ValueError, r"noise must have the images' shape \(4, 3, 4, 4\)"),
    "one time": (dict(t=torch.tensor(1.0)), ValueError, r"one per image, shape \(4,\); got \(\)"),
    "times expanded": (dict(t=torch.ones(4, 1, 1, 1)), ValueError, r"one per image, shape \(4,\)"),
    "no noise": (dict(t=torch.tensor([1.0, 0.0, 1.0, 1.0])), ValueError, r"times of EDM lie above 0 .*got \[0.0\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    """At the first call, and after any number of good ones; by perturb and by target."""
    change, error, message = ERRORS[case]
    objective = STFTrainingObjective(EDM())
    arguments = {"clean": X, "noise": torch.zeros_like(X), "t": torch.ones(4), **change}
    for _ in range(2):
        with pytest.raises(error, match=message):
            objective.perturb(**arguments)
        with pytest.raises(error, match=message):
            objective.target(**{"timesteps" if key == "t" else key: value for key, value in arguments.items()})
        objective.perturb(X, reference=R)
        objective.perturb(X, reference=R, labels=I4, reference_labels=I12)


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
