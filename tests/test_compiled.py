"""`torch.compile` and `torch.func` around the objective and the pipeline: what the FAQ says can be compiled."""

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch.func import functional_call, grad, vmap

from exact_networks import small_unet
from oracles import images, normal
from stf_diffusers import EDM, ReferenceBank, STFPipeline, STFTrainingObjective, posterior_mean

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about the rest of the world
X, NOISE, T = images(12, 1, 4, 4), normal(4, 1, 4, 4), torch.tensor([0.05, 0.5, 3.0, 20.0])


def network():
    torch.manual_seed(0)
    return small_unet(1)


def step(forward, module, reference=X):
    """The loss of one step, and its gradients."""
    objective = STFTrainingObjective(EDM())
    batch = objective.perturb(X[:4], reference=reference, t=T, noise=NOISE)
    loss = objective.loss(forward(batch.model_input, batch.timestep).sample, batch)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.parameters()]


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_compiled_network():
    plain, compiled = network(), network()
    whole = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for reference in (None, X, ReferenceBank(X)):
        same(step(whole, compiled, reference), step(plain, plain, reference))


def test_a_compiled_step():
    """The target may be inside: what Dynamo cannot trace of it runs as it is."""
    plain, compiled = network(), network()
    objective, expected = STFTrainingObjective(EDM()), step(plain, plain)

    def whole_step():
        batch = objective.perturb(X[:4], reference=X, t=T, noise=NOISE)
        return objective.loss(compiled(batch.model_input, batch.timestep).sample, batch)

    loss = torch.compile(whole_step, backend="eager")()
    loss.backward()
    same((loss.detach(), [parameter.grad for parameter in compiled.parameters()]), expected)


def test_a_pipeline_with_a_compiled_network(tmp_path):
    def pictures(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(2, 3, generator=torch.Generator().manual_seed(0), output_type="pt").images

    pipeline = STFPipeline(network(), EDMEulerScheduler())
    expected = pictures(pipeline)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    same(pictures(pipeline), expected)
    pipeline.save_pretrained(tmp_path)
    same(pictures(STFPipeline.from_pretrained(tmp_path)), expected)


def test_gradients_of_each_sample():
    """The targets of a batch are computed once; `vmap` then runs over its rows."""
    model, objective = network(), STFTrainingObjective(EDM())
    batch = objective.perturb(X[:4], reference=X, t=T, noise=NOISE)

    def loss_of_row(parameters, model_input, timestep, target):
        output = functional_call(model, parameters, (model_input[None], timestep[None])).sample
        return (output - target[None]).square().mean()

    rows = vmap(grad(loss_of_row), in_dims=(None, 0, 0, 0))(
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        batch.model_input, batch.timestep, batch.target,
    )  # fmt: skip
    same([gradient.mean(0) for gradient in rows.values()], step(model, model)[1])


def test_the_posterior_mean_has_its_own_batch_dimension():
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda noisy: posterior_mean(noisy[None], X, alpha=1.0, sigma=1.0).mean)(NOISE)
