"""The noise process of a training: given, measured, or that of the pipeline that is trained further."""

import pytest
from accelerate import Accelerator

from stf_diffusers import EDM, VE, VP, FlowMatching
from stf_diffusers.export import process_to_config
from stf_diffusers.training.noise_process import choose_process


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
