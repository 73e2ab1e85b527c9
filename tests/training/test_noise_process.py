"""The noise process of a training: given, measured, or that of the pipeline that is trained further; the levels drawn."""

import json

import pytest
import torch
from accelerate import Accelerator

from stf_diffusers import EDM, VE, VP, FlowMatching
from stf_diffusers.export import process_to_config
from stf_diffusers.noise_distribution import LogitNormal, LogNormal, Piecewise, distribution_to_config
from stf_diffusers.training.noise_process import choose_distribution, choose_process


def never():
    raise AssertionError("nothing had to be measured")


def test_given_processes():
    assert choose_process("ve", {"sigma_max": 50.0}, standard_deviation=never) == (VE(sigma_max=50.0), {})
    assert choose_process("vp", {}, standard_deviation=never) == (VP(), {})
    flow = {"time_distribution": "logit_normal", "logit_mean": 0.5}
    assert choose_process("flow", flow, standard_deviation=never)[0] == FlowMatching("logit_normal", 0.5)
    limits = {"sigma_min": 0.01, "sigma_max": 10.0}
    assert choose_process(None, limits, standard_deviation=lambda: 0.5) == (EDM(), limits), "EDM's are for sampling"


def test_sigma_data_is_measured_unless_given(caplog):
    assert choose_process("edm", {"sigma_data": "auto"}, standard_deviation=lambda: 0.61234)[0] == EDM(
        sigma_data=0.6123
    )
    assert choose_process("edm", {}, standard_deviation=lambda: 1.0)[0] == EDM(sigma_data=1.0)
    assert not caplog.records


@pytest.mark.parametrize(("measured", "told"), [(0.59, False), (0.61, True), (0.41, False), (0.39, True)])
@pytest.mark.usefixtures("fresh_accelerate_state")
def test_a_fifth_from_sigma_data_is_told(measured, told, caplog):
    Accelerator(cpu=True)  # whose logger says it once for all processes
    choose_process("edm", {"sigma_data": 0.5}, standard_deviation=lambda: measured)
    assert ("more than 20 % from sigma_data = 0.5" in caplog.text) == told


def test_a_pipeline_that_is_trained_further_says_what_it_was_trained_on():
    saved = {"process": {"name": "vp", "beta_d": 12.0, "beta_min": 0.1, "epsilon_t": 1e-5}}
    assert choose_process(None, {}, standard_deviation=never, saved=saved)[0] == VP(beta_d=12.0)
    assert choose_process("vp", {"beta_min": 0.2}, standard_deviation=never, saved=saved)[0] == VP(12.0, 0.2)
    with pytest.raises(ValueError, match="was trained on vp"):
        choose_process("edm", {}, standard_deviation=never, saved=saved)
    saved = {"process": {"name": "edm", "sigma_data": 0.7}, "sampling_range": {"sigma_max": 20.0}}
    found = choose_process(None, {}, standard_deviation=lambda: 0.7, saved=saved)
    assert found == (EDM(sigma_data=0.7), {"sigma_max": 20.0})


def test_discrete():
    """By name or by one of its parameters; a pipeline's own, which a parameter may repeat and not contradict."""
    given = {"ddpm_num_steps": 500, "ddpm_beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    plain, ranges = choose_process("discrete", {}, standard_deviation=never)
    assert (len(plain.timesteps), plain.prediction_type, ranges) == (1000, "epsilon", {})
    process, _ = choose_process(None, given, standard_deviation=never)
    assert (len(process.timesteps), process.prediction_type) == (500, "v_prediction")
    assert process.scheduler.config.beta_schedule == "squaredcos_cap_v2" and not process.scheduler.config.clip_sample
    saved = {"process": process_to_config(process)}
    for again in ({}, given):
        found, _ = choose_process(None, again, standard_deviation=never, saved=saved)
        assert process_to_config(found) == process_to_config(process)
    for name, value in (("ddpm_num_steps", 1000), ("ddpm_beta_schedule", "linear"), ("prediction_type", "sample")):
        with pytest.raises(
            ValueError, match=rf"{name}={value!r}, but the pretrained pipeline was .* Leave {name}= out"
        ):
            choose_process(None, {name: value}, standard_deviation=never, saved=saved)
    with pytest.raises(ValueError, match="was trained on discrete: on vp its network would have to be trained anew"):
        choose_process("vp", {}, standard_deviation=never, saved=saved)
    with pytest.raises(ValueError, match="prediction_type= is not a parameter of noise_process='vp'"):
        choose_process("vp", {"prediction_type": "epsilon"}, standard_deviation=never)


def test_parameters_of_other_processes():
    with pytest.raises(ValueError, match="p_mean= is not a parameter of noise_process='vp'"):
        choose_process("vp", {"p_mean": 0.0}, standard_deviation=never)
    with pytest.raises(ValueError, match="logit_std= needs time_distribution='logit_normal'"):
        choose_process("flow", {"logit_std": 1.0}, standard_deviation=never)


def test_distributions_by_name_and_from_a_file(tmp_path):
    assert choose_distribution(None, EDM()) is None
    assert choose_distribution("log_normal", VP()) == LogNormal(-1.2, 1.2), "Karras et al.'s"
    assert choose_distribution("log_normal", EDM(), noise_mean=-0.4, noise_std=1.0) == LogNormal(-0.4, 1.0)
    assert choose_distribution("log_uniform", VE(0.01, 50.0)) == Piecewise.log_uniform(0.01, 50.0)
    assert choose_distribution("logit_normal", VE(0.01, 50.0), noise_std=0.5) == LogitNormal(0.01, 50.0, 0.0, 0.5)
    saved = Piecewise((0.1, 1.0, 30.0), (1.0, 3.0))
    (tmp_path / "levels.json").write_text(json.dumps(distribution_to_config(saved)))
    assert choose_distribution(str(tmp_path / "levels.json"), FlowMatching()) == saved


@pytest.mark.parametrize("name", [None, "log_uniform", "levels.json"])
def test_a_mean_of_a_distribution_that_has_none(name):
    with pytest.raises(
        ValueError, match=r"noise_mean= needs noise_distribution='log_normal', 'logit_normal' or 'adaptive'"
    ):
        choose_distribution(name, EDM(), noise_mean=0.0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[1]", "got list"),
        ('{"mean": 1}', "None is not one of log_normal"),
        ('{"name": "log_normal", "scale": 1}', "takes mean, std; got scale"),
        ('{"name": "piecewise", "levels": [1, 2]}', "takes levels, weights; got levels"),
        ('{"name": "piecewise", "levels": [2, 1], "weights": [1]}', "increasing"),
        ('{"name": "piecewise", "levels": 3, "weights": [1]}', "not iterable"),
    ],
)
def test_files_that_are_no_distribution(content, says, tmp_path):
    path = tmp_path / "levels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError, match="is none of log_normal, logit_normal, log_uniform, profile and adaptive"
    ) as raised:
        choose_distribution(str(path), EDM())
    assert says in str(raised.value)


def test_a_distribution_beside_the_process_is_refused():
    with pytest.raises(ValueError, match="at which the process is trained"):
        choose_distribution("log_normal", VE(0.01, 50.0), noise_mean=10.0, noise_std=0.1)


@pytest.mark.parametrize("name", ["log_uniform", "logit_normal"])
def test_levels_between_those_that_are_sampled(name):
    """Also where EDM is told to be sampled between others than its own."""
    process, sampling_range = choose_process(
        "edm", {"sigma_data": 0.5, "sigma_max": 20.0}, standard_deviation=lambda: 0.5
    )
    found = choose_distribution(name, process, sampling_range=sampling_range)
    ends = found.quantile(torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)).exp().tolist()
    assert 0.002 <= ends[0] < 0.003 and 19 < ends[1] <= 20.001
