"""The package's shape: strict layers, light imports, an API on one screen."""

import ast
import configparser
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import stf_diffusers

PACKAGE = Path(stf_diffusers.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))

# A module imports from earlier rows only. A new module is a new entry here; "*" stands for any ending.
CORE = [
    {"prediction", "noise_distribution", "integer_products", "metrics", "files", "precision", "logit_errors"},
    {"chunk_states"},
    {"arithmetic_choice", "sparse_states"},
    {"posterior", "forward_process"},
    {"noise", "stored_rows", "adaptive_noise", "reference_classes"},
    {"scheduler_process", "reference_batch", "reference_set", "denoising", "solvers"},
    {"dataset_images", "consistency_sampling"},
    {"bank_file"},
    {"reference_bank"},
    {"source_checks"},
    {"objective", "consistency"},
    {"diagnostics"},
]
ABOVE_DIFFUSERS = [
    {"noise_profile", "image_grid"},
    {"plotting"},
    {"variance_report", "stock_schedulers"},
    {"export", "scheduling_*", "feature_extractors", "quality", "sampling_call"},
    {"sde"},
    {"model_card"},
    {"upload"},
    {"pipeline_*"},
    {"__init__"},
    {"evaluate_modules.*"},
]
# The parts of a training script, in the order in which they may import each other; nothing else imports them.
TRAINING: list[set[str]] = [
    {"training.__init__", "training.presets.__init__"},
    {f"training.{name}" for name in ("command_line", "launch", "run_lock", "run_folder", "stop_signal", "hub_upload")},
    {"training.flags"},
    {f"training.{name}" for name in ("sources", "image_column", "data_files", "autoencoder", "conditioning")},
    {
        f"training.{name}"
        for name in ("noise_process", "sampling", "training_log", "references", "averages", "network", "optimizer")
    },
    {f"training.{name}" for name in ("image_reader", "data_set", "device_images", "checkpoints", "adaptive_levels")},
    {"training.image_cache"},
    {"training.image_data"},
    {f"training.{name}" for name in ("streaming", "latents", "evaluation")},
    {"training.validation"},
    {"training.consistency_levels", "training.pipeline_saver"},
]
LAYERS = [*CORE, *ABOVE_DIFFUSERS, *TRAINING]

# Packages that one function needs, and imports itself.
WHERE_USED = {
    "solvers": {"scipy"},
    "arithmetic_choice": {"huggingface_hub"},
    "dataset_images": {"numpy", "tqdm"},
    "reference_bank": {"datasets"},
}


def layer(module):
    found = [i for i, names in enumerate(LAYERS) if any(fnmatch(module, name) for name in names)]
    assert found, f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}"
    return found[0]


def module_at(*parts):
    """The module that a dotted name stands for: a file, or a package's own."""
    for names in (parts, (*parts, "__init__")):
        if PACKAGE.joinpath(*names).with_suffix(".py").is_file():
            return ".".join(names)
    return None


def imported(module):
    """(the package's modules, top-level names of others) that a module's source imports, anywhere in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name.split("."), []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The package that a relative name starts from: that of the module, and one further up for each dot more.
            start = ["stf_diffusers", *module.split(".")][: -node.level] if node.level else []
            targets = [
                (start + (node.module or "").split(".") if node.module else start, [alias.name for alias in node.names])
            ]
        else:
            continue
        for parts, names in targets:
            if parts[0] != "stf_diffusers":
                others.add(parts[0])
                continue
            # What is imported from a package may be one of its modules, or a name in it.
            own |= {module_at(*parts[1:], name) or module_at(*parts[1:]) for name in names} or {module_at(*parts[1:])}
    return own, others


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_lower_layers(module):
    own, _ = imported(module)
    assert None not in own, f"{module} imports what is not there"
    assert all(layer(name) < layer(module) for name in own), f"{module} imports {sorted(own)}"


@pytest.mark.parametrize("module", sorted(set.union(*CORE)))
def test_lower_layers_need_torch_alone(module):
    _, others = imported(module)
    assert others <= {"torch", *sys.stdlib_module_names, *WHERE_USED.get(module, ())}


# numpy and Pillow come with Diffusers, tqdm with the Hub's client.
COME_ALONG = {"numpy", "PIL", "tqdm"}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_is_declared(module):
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    extras = dict(setup["options.extras_require"])
    listed = "\n".join(
        [setup["options"]["install_requires"], *(extras[name] for name in extras.keys() - {"test", "dev"})]
    )
    declared = set(re.findall(r"^([\w-]+)", listed, re.MULTILINE))
    _, others = imported(module)
    needed = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in others - sys.stdlib_module_names - COME_ALONG}
    assert needed <= declared


def test_importing_the_package_imports_torch_and_no_more():
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import stf_diffusers
heavy = ["diffusers", "datasets", "matplotlib", "transformers", "accelerate", "evaluate", "sklearn", "scipy", "PIL"]
assert "torch" in sys.modules
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script, str(PACKAGE.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_api_fits_on_one_screen():
    names = stf_diffusers.__all__
    assert len(names) == len(set(names)) <= 25
    for name in names:
        assert getattr(stf_diffusers, name) is not None


def test_imports_are_found_however_they_are_written(tmp_path, monkeypatch):
    """The checks above can fail: modules of subpackages, and names that the package itself offers."""
    (tmp_path / "training").mkdir()
    for name in ("__init__", "noise", "training/__init__", "training/data"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "training" / "loop.py").write_text(
        "import os.path\nfrom . import data\nfrom ..noise import EDM\nfrom .. import ReferenceBank\n"
        "import stf_diffusers.noise\nfrom stf_diffusers import training\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    own, others = imported("training.loop")
    assert own == {"training.data", "noise", "__init__", "training.__init__"} and others == {"os"}


ROOT = PACKAGE.parent
SOURCES = [
    path for folder in ("stf_diffusers", "examples", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert source.count("\n") <= 400 or path.name in ("train_unconditional_stf.py", "train_consistency_stf.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("parse_args", "main"):
            assert node.end_lineno - node.lineno < 80, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_the_package_names_no_flags():
    """Messages name arguments; a script puts its flags in their place. Launchers' and pip's flags are theirs, and
    training/flags.py defines flags.
    """
    others = ("accelerate launch", "torchrun", "pip ", "--include", "--multi_gpu", "--[a-z", "-- ")
    found = [
        f"{path.name}: {node.value[:80]}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"(?<![\w-])--[a-z]", node.value)
        and not any(other in node.value for other in others) and path.name not in ("variance_report.py", "command_line.py", "flags.py")
    ]  # fmt: skip
    assert not found, found


def test_every_part_of_a_training_is_documented():
    page = (PACKAGE.parent / "docs" / "parts.md").read_text()
    parts = {name.removeprefix("training.") for name in MODULES if name.startswith("training.") and "__" not in name}
    missing = [name for name in parts if f"automodule:: stf_diffusers.training.{name}\n" not in page]
    assert not missing and all(f"[`{name}`](#{name})" in page for name in parts)
