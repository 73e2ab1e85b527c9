"""Wrong data, files and weights, through the real `main(argv)`: a message that names the fix, nothing written."""

import dataclasses

import pytest

import wrong_inputs
from tiny import train
from wrong_calls import BANK_FILES, CALLS
from wrong_data import DATA, UNUSUAL
from wrong_files import FOLDERS, OTHER_SCRIPTS
from wrong_inputs import WRONG, attempt, complaint


@pytest.mark.parametrize("case", DATA)
def test_data(case, tmp_path, places):
    assert not complaint(DATA[case], attempt(DATA[case], tmp_path, places))


@pytest.mark.parametrize("case", FOLDERS)
def test_files_and_folders_that_are_there(case, tmp_path, places):
    assert not complaint(FOLDERS[case], attempt(FOLDERS[case], tmp_path, places))


@pytest.mark.parametrize("case", OTHER_SCRIPTS)
def test_other_scripts(case, tmp_path, places):
    assert not complaint(OTHER_SCRIPTS[case], attempt(OTHER_SCRIPTS[case], tmp_path, places))


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_only_looks_wrong(case, tmp_path, places):
    assert not complaint(UNUSUAL[case], attempt(UNUSUAL[case], tmp_path, places))


def test_the_table_says_what_happens_and_what_was_not_expected(places):
    assert sum(map(len, WRONG.values())) >= 190 and len(CALLS) + len(BANK_FILES) >= 60
    rows = {"right": DATA["no data"], "wrong": dataclasses.replace(DATA["no data"], says="a good day")}
    rows["runs"] = dataclasses.replace(UNUSUAL["settings without effect"], code=2)
    found = wrong_inputs.lines_of_rows(rows, places)
    text = wrong_inputs.markdown({"Data": found, "Bank": [("no norms", "a | b\nc")]})
    assert text.startswith("# 4 wrong and unusual inputs\n")
    right, wrong, runs, bank = [
        line for line in text.splitlines() if line.startswith(("| right", "| wrong", "| runs", "| no"))
    ]
    assert "`train_unconditional_stf.py --dataset_name …/nothing`" in right
    assert "exit code 2: train_unconditional_stf: error: --dataset_name …/nothing cannot be read" in right
    assert "unexpected" not in right and "**unexpected: ['a good day'] not said" in wrong
    assert "exit code 0 **unexpected: exit code 0 for 2" in runs and bank == "| no norms | a \\| b c |"


def test_a_refused_input_that_leaves_a_file_is_not_as_expected(tmp_path, places):
    row = DATA["no data"]
    outcome = dataclasses.replace(attempt(row, tmp_path, places), changed=["run"])
    assert complaint(row, outcome) == "changed: ['run']"
    before = wrong_inputs.snapshot(tmp_path)
    (tmp_path / "left").mkdir()
    assert wrong_inputs.snapshot(tmp_path).keys() - before.keys() == {"left"}


@pytest.mark.parametrize("case", ["other images", "too few"])
def test_calls_in_the_table(case):
    assert wrong_inputs.refused_call(case).startswith("ValueError: ") and "unexpected" not in wrong_inputs.refused_call(
        case
    )


def test_weights_that_are_not_finite_are_not_saved(flags, tmp_path):
    enormous = ["--learning_rate", 1e38, "--adam_weight_decay", 1e38]
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 1\. They were not saved"):
        train(flags(*enormous, "--max_train_steps", 1))
    assert [path.name for path in (tmp_path / "run").glob("*")] == ["metrics.jsonl"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_names_its_images_and_keeps_the_last_checkpoint(accumulation, flags, tmp_path):
    more = ["--learning_rate", 1e30, "--max_train_steps", 50, "--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d+.*\d \(sigma [\d.e+-]+\)") as stop:
        train(flags(*more, "--gradient_accumulation_steps", accumulation))
    failed = int(str(stop.value).split("at step ")[1].split(".")[0])
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert max(int(path.name.split("-")[1]) for path in kept) == failed - 1
    assert not (tmp_path / "run" / "model_index.json").exists()
