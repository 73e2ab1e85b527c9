"""A mistake is one line and exit code 2; a defect keeps its traceback; flags are parsed before the slow imports."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers.optimization import SchedulerType

import train_unconditional_stf as script
from stf_diffusers import posterior_mean
from stf_diffusers.training import flags
from stf_diffusers.training.command_line import explained, in_flags, run
from tiny import CPU, EXAMPLES, ROOT

TRAINER = EXAMPLES / "train_unconditional_stf.py"


def error_of(call):
    with pytest.raises(Exception) as raised:
        call()
    return raised.value


def test_errors_that_the_package_raises_are_explained():
    assert explained(error_of(lambda: posterior_mean(torch.zeros(1, 2), torch.zeros(1, 3), alpha=1.0, sigma=1.0)))


@pytest.mark.parametrize(
    "call",
    [lambda: torch.zeros(2) + torch.zeros(3), lambda: int("x"), lambda: (lambda a: a)(), lambda: [][1]],
    ids=["torch", "not by a statement", "wrong call", "index"],
)
def test_other_errors_are_not(call):
    assert not explained(error_of(call))


def failing(error):
    def main():
        raise error

    return main


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError("of ours")))
    with pytest.raises(SystemExit) as left:
        run(failing(KeyboardInterrupt()))
    assert left.value.code == 130


def trainer(*flags):
    done = subprocess.run(
        [sys.executable, TRAINER, *map(str, flags)], cwd=ROOT, env={**CPU, "PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stderr.strip().splitlines()


def test_a_mistake_is_one_line(tmp_path):
    code, said = trainer("--train_data_dir", tmp_path / "nothing", "--output_dir", tmp_path / "run")
    assert code == 2 and len(said) == 1, said
    assert said[0].startswith("train_unconditional_stf: error: --train_data_dir") and "cannot be read" in said[0]
    assert not (tmp_path / "run").exists()


SCRIPTS = ("train_unconditional_stf", "generate", "quality_report", "variance_report", "reconstruct_ema")


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_are_parsed_before_the_slow_imports(name):
    program = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    slow = [name for name in ("accelerate", "datasets", "diffusers", "transformers") if name in sys.modules]
    print(end.code, slow)
"""
    for flag, code in (("--help", 0), ("--no_such_flag", 2)):
        argv = json.dumps([str(EXAMPLES / f"{name}.py"), flag])
        done = subprocess.run([sys.executable, "-c", program, argv], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{code} []"
        assert len(done.stderr.splitlines()) == (code == 2), done.stderr


# Every flag of train_unconditional.py in Diffusers 0.42, with a value that it takes.
DIFFUSERS_FLAGS = """
--dataset_name x --dataset_config_name x --model_config_name_or_path x --output_dir x --overwrite_output_dir --cache_dir x
--resolution 64 --center_crop --random_flip --train_batch_size 16 --eval_batch_size 16 --dataloader_num_workers 0
--num_epochs 100 --save_images_epochs 10 --save_model_epochs 10 --gradient_accumulation_steps 1 --learning_rate 1e-4
--lr_scheduler cosine --lr_warmup_steps 500 --adam_beta1 0.95 --adam_beta2 0.999 --adam_weight_decay 1e-6
--adam_epsilon 1e-8 --use_ema --ema_inv_gamma 1.0 --ema_power 0.75 --ema_max_decay 0.9999 --push_to_hub --hub_token x
--hub_model_id x --hub_private_repo --logger none --logging_dir logs --local_rank -1 --mixed_precision no
--prediction_type epsilon --ddpm_num_steps 1000 --ddpm_beta_schedule linear --ddpm_num_inference_steps 1000
--checkpointing_steps 500 --checkpoints_total_limit 2
"""


def test_the_command_line_of_diffusers_script():
    args = script.parse_args(DIFFUSERS_FLAGS.split())
    assert args.model_config == "x" and args.report_to == "none" and args.num_inference_steps == 1000
    assert args.save_images_epochs == args.save_model_epochs == 10 and args.eval_batch_size == 16
    script.parse_args(["--train_data_dir", "x", "--resume_from_checkpoint", "latest"])


@pytest.mark.parametrize("flag", flags.REFUSED_FLAGS)
def test_what_diffusers_script_has_and_this_one_has_not(flag, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([flag])
    assert flags.REFUSED_FLAGS[flag] in capsys.readouterr().err


def test_learning_rate_schedules_are_those_of_diffusers():
    for kind in SchedulerType:
        if kind.value != "piecewise_constant":
            script.parse_args(["--lr_scheduler", kind.value])


@pytest.mark.parametrize(
    ("message", "translated"),
    [
        ("Pass image_mode='RGBA' to keep it.", "Pass --image_mode RGBA to keep it."),
        ("pass resolution=.", "pass --resolution."),
        ("resolution=(8, 8, 8): pass one", "--resolution 8 8 8: pass one"),
        ("/data/seed=3/x cannot be read", "/data/seed=3/x cannot be read"),
        ("Lower batch_size= or num_workers=;", "Lower --train_batch_size or --dataloader_num_workers;"),
        ("class_conditional=True: no labels", "--class_conditional: no labels"),
        ("levels of VE(sigma_min=0.02, sigma_max=100.0)", "levels of VE(sigma_min=0.02, sigma_max=100.0)"),
        ("p_mean= is not a parameter", "--p_mean is not a parameter"),
    ],
)
def test_messages_name_flags(message, translated):
    names = vars(script.parse_args([]))
    assert in_flags(message, names, flags.FLAG_OF, printed=flags.process_flags()) == translated
