"""Wrong and unusual command lines, data, files and arguments, each with what it has to lead to.

    python tests/wrong_inputs.py > table.md

tries them all and prints what really happens; it ends with exit code 1 where that is not what is expected. A wrong input
is one line on stderr, exit code 2, and not a file changed. The tests in end_to_end/test_bad_input.py,
end_to_end/test_refused_flags.py, test_objective_errors.py and test_bank_file.py read the same rows, which are in
wrong_flags.py, wrong_data.py, wrong_files.py and wrong_calls.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

import conftest  # noqa: F401  # where the scripts are
import generate
import quality_report
import reconstruct_ema
import train_unconditional_stf
import variance_report
from stf_diffusers import EDM, ReferenceBank, STFTrainingObjective
from stf_diffusers.training.command_line import run
from tiny import TINY_TRANSFORMER, save_extractor, save_images, short_run, tiny_autoencoder, train
from wrong_calls import BANK_FILES, CALLS, SET_CALLS, SETS, X, contents, set_call
from wrong_data import DATA, UNUSUAL
from wrong_files import FOLDERS, GENERATE, OTHER_SCRIPTS, QUALITY, RECONSTRUCT, VARIANCE
from wrong_flags import COMBINATIONS, PLACES, TRAINER, VALUE_ROWS, Row

SCRIPTS = {
    script.__name__: script
    for script in (train_unconditional_stf, generate, quality_report, reconstruct_ema, variance_report)
}
WRONG: dict[str, dict[str, Row]] = {
    "Values": VALUE_ROWS,
    "Combinations": COMBINATIONS,
    "Data": DATA,
    "Files and folders": FOLDERS,
    "Other scripts": OTHER_SCRIPTS,
}

# ---- what happens


def make_places(root: Path) -> Path:
    """What the rows' flags name: images, networks, autoencoders, an extractor, a run with two checkpoints, one with classes."""
    images = save_images(root / "images")
    tiny_autoencoder().save_pretrained(root / "vae")
    save_extractor(root / "extractor")
    (root / "dit").write_text(json.dumps(TINY_TRANSFORMER))
    constant = ["--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    train([*short_run(root, images), *constant, "--post_hoc_ema"])
    train([*short_run(root, images), "--output_dir", root / "classes", "--max_train_steps", 1, "--class_conditional"])
    return root


def command_line(row: Row, root: Path, places: Path) -> list[str]:
    """The flags of the script's short run and those of the row."""
    if row.script == TRAINER:
        base = short_run(root, places / "images")
    else:
        base = ["--output_dir", root / "run"]
        base += {
            GENERATE: ["--model", places / "classes", "--num_images", 2, "--num_inference_steps", 2],
            QUALITY: ["--samples", root / "samples", "--train_data_dir", places / "images", "--cache_dir", places / "cache"],
            VARIANCE: ["--train_data_dir", places / "images", "--num_levels", 2, "--num_samples", 2, "--quiet"],
            RECONSTRUCT: ["--model", places / "run", "--sigma_rel", 0.1],
        }[row.script]  # fmt: skip
    left_out = set(row.without)
    if "--dataset_name" in row.typed:
        left_out.add("--train_data_dir")
    if "--pretrained_model_name_or_path" in row.typed:
        left_out.add("--model_config")
    kept = [str(part) for at, part in enumerate(base) if not {base[at], base[at - 1]} & left_out]
    names = {path.name: path for path in places.iterdir()} | {"root": root}
    return kept + [part.format(**names) for part in shlex.split(row.typed)]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: its exit code (None: a traceback), its last line and log, and the files that it changed."""

    code: int | None
    said: str
    log: str
    changed: list[str]


def attempt(row: Row, root: Path, places: Path) -> Outcome:
    """Lay out the row's files in a fresh folder and run the script."""
    (root / PLACES).symlink_to(places)
    argv = command_line(row, root, places)
    if row.make is not None:
        row.make(root)
    before, errors, log = snapshot(root), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    code: int | None = 0
    own, sys.argv = sys.argv, [f"{row.script}.py", *argv]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run(SCRIPTS[row.script].main, argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        code = None
        errors.write("\n" + traceback.format_exc())
    finally:
        sys.argv = own
        logging.getLogger().removeHandler(handler)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    # Before the message there may be progress bars.
    said = (errors.getvalue().strip().splitlines() or [""])[-1]
    after = snapshot(root)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return Outcome(code, said, log.getvalue(), changed)


def snapshot(root: Path) -> dict[str, bytes | None]:
    """The files and folders below this one, but not what `PLACES` leads to."""
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if PLACES not in path.parts}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def complaint(row: Row, outcome: Outcome) -> str:
    """What is not as the row says; empty where nothing is."""
    says = (row.says,) if isinstance(row.says, str) else row.says
    text = outcome.log if row.code == 0 else outcome.said
    missing = [words for words in says if words not in text]
    if outcome.code != row.code:
        return f"exit code {outcome.code} for {row.code}: {outcome.said}"
    if missing:
        return f"{missing} not said: {text}"
    if row.code and outcome.changed:
        return f"changed: {outcome.changed}"
    return ""


def refused_call(case: str) -> str:
    """The error of the objective for a call."""
    change, error, message = CALLS[case]
    arguments = {"clean": X, "noise": torch.zeros_like(X), "t": torch.ones(4), **change}
    return _raised(lambda: STFTrainingObjective(EDM()).perturb(**arguments), error, message)


def refused_bank(case: str, root: Path) -> str:
    """The error of opening a bank's file."""
    change, message = BANK_FILES[case]
    tensors = contents()
    change(tensors)
    save_file(tensors, root / "bank.safetensors", {"fingerprint": "abc"})
    said = _raised(lambda: ReferenceBank.open(root / "bank.safetensors"), ValueError, re.escape(message))
    return said.replace(str(root), "…")


def _raised(call: Callable[[], object], error: type[Exception], message: str) -> str:
    try:
        call()
    except error as caught:
        return f"{type(caught).__name__}: {caught}" + ("" if re.search(message, str(caught)) else " **unexpected**")
    except Exception as caught:
        return f"{type(caught).__name__}: {caught} **unexpected**"
    return "nothing **unexpected**"


# ---- the table


def lines_of_rows(rows: Mapping[str, Row], places: Path) -> list[tuple[str, str]]:
    """Each row's input and what happens."""
    found = []
    for case, row in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            outcome = attempt(row, Path(folder), places)
        happens = f"exit code {outcome.code}" + ("" if outcome.code == 0 else f": {outcome.said}")
        if row.code == 0:
            happens = (
                "trains; says: " + (row.says if isinstance(row.says, str) else ", ".join(row.says))
                if outcome.code == 0
                else happens
            )
        wrong = complaint(row, outcome)
        happens = happens.replace(str(places), "…").replace(folder, "…") + (
            f" **unexpected: {wrong}**" if wrong else ""
        )
        name = Path(SCRIPTS[row.script].__file__ or "").name
        typed = re.sub(r"\{root\}|\{(?=\w)|(?<=\w)\}", lambda part: "…" if "root" in part[0] else "", row.typed)
        found.append((case if case == row.typed else f"{case}: `{name} {typed}`", happens))
    return found


def table() -> dict[str, list[tuple[str, str]]]:
    """By kind, each input and what happens."""
    with tempfile.TemporaryDirectory() as folder:
        places = make_places(Path(folder))
        found = {kind: lines_of_rows(rows, places) for kind, rows in (*WRONG.items(), ("Unusual, and right", UNUSUAL))}
        found["Arguments of STFTrainingObjective"] = [(case, refused_call(case)) for case in CALLS]
        found["Arguments of posterior_mean of a reference set"] = [
            (f"{kind}: {case}", _raised(set_call(case, kind), *SET_CALLS[case][1:]))
            for case in SET_CALLS
            for kind in SETS
        ]
        found["Files of ReferenceBank"] = [(case, refused_bank(case, Path(folder))) for case in BANK_FILES]
    return found


def markdown(found: Mapping[str, list[tuple[str, str]]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    lines = [f"# {sum(map(len, found.values()))} wrong and unusual inputs"]
    for kind, rows in found.items():
        lines += ["", f"## {kind}", "", "| input | what happens |", "|---|---|"]
        lines += [f"| {cell(typed)} | {cell(happens)} |" for typed, happens in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = markdown(table())
    print(text, end="")
    sys.exit("**unexpected" in text)
