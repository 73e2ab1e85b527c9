"""Without a checkout: the package from its wheel, the scripts as modules of it and as copies in another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "train_unconditional_stf", "train_consistency_stf", "generate", "quality_report", "variance_report", "reconstruct_ema",
)  # fmt: skip
TRAINING = [
    "--max_train_steps", "2", "--checkpointing_steps", "1", "--num_samples", "1", "--num_inference_steps", "2",
    "--train_batch_size", "8", "--report_to", "none", "--post_hoc_ema",
]  # fmt: skip

# Both tests use the wheel, which is built once.
pytestmark = pytest.mark.xdist_group("installed")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and of this environment nothing but its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("stf_diffusers", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True
    )
    # Not its .pth files: through them an editable install would lead back to the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Run:
    """Runs the interpreter in an empty folder outside the checkout; returns what was said."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    away = tmp_path / "away"
    away.mkdir()

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(python), *map(str, command)],
            cwd=away,
            env={**kept, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONSAFEPATH": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    return run


LAUNCH = [
    "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no",
]  # fmt: skip


def test_scripts_run_where_they_are_copied(run: Run, tmp_path: Path, extractor: Path) -> None:
    """Train the digits, sample, measure, report and reconstruct, each with a script that lies alone in its folder."""
    away, copies = tmp_path / "away", {}
    for name in SCRIPTS:
        copies[name] = tmp_path / "copies" / name / f"{name}.py"
        copies[name].parent.mkdir(parents=True)
        shutil.copy(ROOT / "examples" / f"{name}.py", copies[name])
    run(*LAUNCH, copies["train_unconditional_stf"], *TRAINING, "--output_dir", "run")
    assert (away / "run" / "model_index.json").is_file() and (away / "run" / "checkpoint-2").is_dir()
    run(copies["train_consistency_stf"], "--pretrained_model_name_or_path", "run", "--output_dir", "tuned",
        "--max_train_steps", 2, "--num_samples", 1, "--no-search_levels", "--report_to", "none")  # fmt: skip
    assert (away / "tuned" / "model_index.json").is_file()
    run(copies["generate"], "--model", "run", "--output_dir", "samples", "--num_images", 6, "--num_inference_steps", 2)
    assert len(list((away / "samples" / "images").glob("*.png"))) == 6
    with Image.open(away / "samples" / "images" / "000000.png") as image:
        assert image.size == (12, 12)
    run(copies["quality_report"], "--samples", "samples", "--extractor", extractor, "--output_dir", "quality",
        "--cache_dir", tmp_path / "cache")  # fmt: skip
    assert json.loads((away / "quality" / "quality.json").read_text())["num_samples"] == 6
    run(copies["variance_report"], "--max_images", 64, "--num_samples", 4, "--num_levels", 3, "--output_dir", "variance",
        "--reference_batch_sizes", 16, "--quiet")  # fmt: skip
    assert "Variance of the training targets" in (away / "variance" / "index.html").read_text()
    run(copies["reconstruct_ema"], "--model", "run", "--sigma_rel", 0.1, "--output_dir", "averaged")
    assert (away / "averaged" / "model_index.json").is_file()
    where = run("-c", "import stf_diffusers; print(stf_diffusers.__file__)")
    assert str(ROOT) not in where, "the package is that of the wheel"


def test_scripts_are_modules_of_the_wheel(run: Run, tmp_path: Path) -> None:
    run(*LAUNCH, "-m", "stf_diffusers.examples.train_unconditional_stf", *TRAINING, "--output_dir", "run")
    run("-m", "stf_diffusers.examples.generate", "--model", "run", "--output_dir", "samples", "--num_images", 1,
        "--num_inference_steps", 2)  # fmt: skip
    assert (tmp_path / "away" / "samples" / "grid.png").is_file()
    names = [f"stf_diffusers.examples.{name}" for name in SCRIPTS]
    found = run("-c", f"import importlib.util as u; print(*(u.find_spec(name).origin for name in {names}))").split()
    for name, place in zip(SCRIPTS, found, strict=True):
        assert Path(place).read_text() == (ROOT / "examples" / f"{name}.py").read_text()
