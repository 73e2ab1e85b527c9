"""README and docs: Python blocks run, shell blocks parse, and commands have the flags that the scripts know.

A new block needs nothing here, unless it uses a name that no line of it defines: then `stand_ins` gets one.
"""

from __future__ import annotations

import configparser
import difflib
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

import stf_diffusers
from conftest import EXAMPLES, ROOT
from stf_diffusers.export import diffusers_pipeline, save_pipeline

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *EXAMPLES.glob("*.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:accelerate launch|python|pip|make) \S")
# Programs whose arguments are not looked at.
OTHERS = {"cd", "git", "pre-commit", "pytest"}


class Block(NamedTuple):
    document: Path
    line: int
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text()
    return [
        Block(document, text.count("\n", 0, found.start()) + 1, found[2], textwrap.dedent(found[3]))
        for found in FENCE.finditer(text)
    ]


def commands_in_prose(document: Path) -> list[Block]:
    """Commands between backticks; what is cut short with "..." is none, and a script without flags is but a name."""
    prose = FENCE.sub(lambda found: "\n" * found[0].count("\n"), document.read_text())
    spans = [(found.start(), " ".join(found[1].split())) for found in re.finditer(r"`([^`]+)`", prose)]
    return [
        Block(document, prose.count("\n", 0, start) + 1, "prose", span)
        for start, span in spans
        if COMMAND.match(span) and "..." not in span
    ]


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [*SHELL, *(block for document in DOCUMENTS for block in commands_in_prose(document))]


def each(blocks: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", blocks, ids=[f"{block.document.name}:{block.line}" for block in blocks])


def test_every_block_is_of_a_kind_that_is_tested():
    tested = {"python", "bash", "diff"}
    for block in BLOCKS:
        directive_or_text = block.language in ("", "bibtex") or block.language.startswith("{")
        assert block.language in tested or directive_or_text, (
            f"{block.document.name}:{block.line} is {block.language!r}"
        )
    assert {block.language for block in BLOCKS} >= tested


# ---- Python


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2,
        attention_head_dim=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks run: an untrained model in the place of a trained one, and one in the place of one on the Hub."""
    folder = tmp_path_factory.mktemp("documents")
    torch.manual_seed(0)
    save_pipeline(diffusers_pipeline(network(), stf_diffusers.EDM()), folder / "digits-stf")
    extractor = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, patch_size=4, image_size=8
    )
    Dinov2Model(extractor).save_pretrained(folder / "facebook" / "dinov2-base")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "facebook" / "dinov2-base")
    return folder


def stand_ins() -> dict[str, Any]:
    """What blocks use and do not define: the package's names, and a training script's variables, small."""
    torch.manual_seed(0)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4200, 3, 8, 8), dtype=np.uint8))
    labels, images = torch.arange(len(pixels)) % 2, pixels[:16]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    columns = {"image": pictures, "images": (images / 127.5 - 1).tolist(), "label": labels[:16].tolist()}
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.with_format("torch", columns=["images", "label"], output_all_columns=True)
    sampler = stf_diffusers.ReferenceBatchSampler(len(dataset), 4, 8)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=stf_diffusers.ReferenceBatchCollator(4))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    noise_scheduler = DDPMScheduler()
    return {name: getattr(stf_diffusers, name) for name in stf_diffusers.__all__} | {
        "pixels": pixels, "images": images, "samples": images.flip(-1), "pil_images": pictures, "data_images": pictures,
        "labels": labels, "class_labels": labels[:16], "dropped": torch.tensor([True, False, False, False]),
        "dataset": dataset, "loader": loader, "DataLoader": DataLoader, "batch": next(iter(loader)), "batch_size": 4, "n": 8,
        "noise": torch.randn(4, 3, 8, 8), "timesteps": torch.tensor([10, 300, 600, 990]), "model": network(), "vae": vae,
        "noise_scheduler": noise_scheduler, "torch": torch,
        "objective": stf_diffusers.STFTrainingObjective.from_scheduler(noise_scheduler),
    }  # fmt: skip


# Those of the walk-through need one another: tests/end_to_end/test_walkthrough.py runs them.
@each([block for block in BLOCKS if block.language == "python" and block.document.name != "walkthrough.md"])
def test_python_blocks_run(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    text = block.text if torch.cuda.is_available() else block.text.replace('"cuda"', '"cpu"')
    exec(compile(text, f"{block.document.name}:{block.line}", "exec"), stand_ins())  # noqa: S102


@each([block for block in BLOCKS if block.language == "diff"])
def test_changed_lines_of_diffs_compile(block):
    lines = [line for line in block.text.splitlines() if not line.startswith(("---", "+++", "@@"))]
    assert any(line.startswith(("+", "-")) for line in lines)
    for sign in "+-":
        runs = re.findall(rf"(?:^{re.escape(sign)}.*\n)+", "\n".join(lines) + "\n", re.MULTILINE)
        for run in runs:
            compile(
                textwrap.dedent(re.sub(r"^.", "", run, flags=re.MULTILINE)),
                f"{block.document.name}:{block.line}",
                "exec",
            )


PAIRS = ("unconditional", "class_conditional", "latent", "flow")


def diff(pair: str) -> list[str]:
    sides = [EXAMPLES / "drop_in" / f"{pair}_{side}.py" for side in ("dsm", "stf")]
    texts = [side.read_text().splitlines() for side in sides]
    lines = difflib.unified_diff(*texts, *(side.name for side in sides), lineterm="", n=1)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("pair", PAIRS)
def test_drop_in_scripts_differ_by_five_lines_at_most(pair):
    body = [line for line in diff(pair) if not line.startswith(("---", "+++"))]
    removed, added = (sum(line.startswith(sign) for line in body) for sign in "-+")
    assert 0 < max(removed, added) <= 5


def test_the_docs_have_the_diffs_of_the_drop_in_scripts():
    shown = [block.text.splitlines() for block in blocks_of(ROOT / "docs" / "drop_in.md") if block.language == "diff"]
    assert shown == [diff(pair) for pair in PAIRS]


# ---- shell


def command_lines(block: Block) -> list[list[str]]:
    """The words of each command."""
    commands = []
    for line in without_placeholders(block).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("&|;"):
                commands.append(command)
                command = []
            else:
                command.append(word)
    return [command for command in commands if command]


def without_placeholders(block: Block) -> str:
    return re.sub(r"<[a-z ]+>", "placeholder", block.text)


@cache
def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documents_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def script_of(command: list[str]) -> tuple[str, list[str]] | None:
    """The script, or module of scripts, that a command starts, and its flags; None where it starts none."""
    if command[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(command[2:])
        return launch.training_script, launch.training_script_args
    if command[0] == "python":
        name, *flags = command[2:] if command[1] == "-m" else command[1:]
        return name, flags
    return None


def check_script(name: str, flags: list[str] | None) -> None:
    package = "stf_diffusers.examples."
    path = EXAMPLES / f"{name.removeprefix(package)}.py" if name.startswith(package) else ROOT / name
    assert path.is_file(), f"there is no {path}"
    if flags is None:
        return
    try:
        load(path).parse_args(flags)
    except SystemExit as stop:
        assert stop.code in (None, 0), f"{path.name} refuses {flags}"


def check_install(arguments: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for argument in arguments:
        own = re.fullmatch(r"(?:\.|stf[-_]diffusers\S*?)\[([\w,-]+)\].*", argument)
        if own:
            assert set(own[1].split(",")) <= set(setup["options.extras_require"]), argument


def check_files(command: list[str]) -> None:
    """Files of this repository are there."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for word in command:
        path = word.removeprefix("@")
        if "/" in path and path.split("/")[0] in tops:
            assert (ROOT / path).exists(), f"there is no {path}"


@each(SHELL)
def test_shell_blocks_parse(block):
    done = subprocess.run(["bash", "-n"], input=without_placeholders(block), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each(COMMANDS)
def test_commands_name_flags_files_targets_and_extras_that_exist(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    copies: dict[str, str] = {}
    for command in command_lines(block):
        program, *arguments = [word for word in command if not re.match(r"[A-Z_]+=", word)]
        check_files(command)
        if program == "make":
            assert set(arguments) <= targets, f"the Makefile has {sorted(targets)}, not all of {arguments}"
        elif program == "pip":
            check_install(arguments)
        elif program == "cp":
            copies[arguments[-1]] = arguments[0]
        elif found := script_of([program, *arguments]):
            only_named = block.language == "prose" and not found[1]
            check_script(copies.get(found[0], found[0]), None if only_named else found[1])
        else:
            assert program in OTHERS or (ROOT / program).is_file(), f"{program} is not a command that this test knows"


@pytest.mark.parametrize(("command", "message"), [
    ("accelerate launch examples/generate.py --model x --no_such_flag", "refuses"), ("make nothing", "Makefile has"),
    ("python examples/generate.py --output_dir x", "refuses"), ("python examples/no_script.py", "there is no"),
    ("python -m stf_diffusers.examples.no_script", "there is no"), ('pip install -e ".[nothing]"', "nothing"),
    ("accelerate launch examples/generate.py --model examples/nothing", "there is no"), ("acelerate launch x.py", "knows"),
    ("cp examples/generate.py mine.py && python mine.py", "refuses"),
], ids=lambda value: value.split("/")[-1])  # fmt: skip
def test_wrong_commands_are_found(command, message, monkeypatch):
    with pytest.raises(AssertionError, match=message):
        test_commands_name_flags_files_targets_and_extras_that_exist(Block(ROOT, 0, "bash", command), monkeypatch)
