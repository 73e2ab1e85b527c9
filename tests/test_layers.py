"""The package's shape: strict layers, light imports, an API on one screen."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import stf_diffusers

PACKAGE = Path(stf_diffusers.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# A module imports from lower rows only. A new module is a new entry here; "*" stands for any ending.
LAYERS = [
    {"prediction", "posterior", "metrics", "files"},
    {"noise", "stored_rows"},
    {"reference", "reference_set", "denoising", "solvers"},
    {"dataset_images"},
    {"bank_file"},
    {"reference_bank"},
    {"objective"},
    {"diagnostics"},
    {"plotting"},
    {"variance_report"},
    {"export", "scheduling_*", "quality"},
    {"sde"},
    {"model_card"},
    {"pipeline_*"},
]
TORCH_ALONE = (
    "prediction",
    "posterior",
    "metrics",
    "files",
    "noise",
    "reference",
    "reference_set",
    "stored_rows",
    "dataset_images",
    "bank_file",
    "reference_bank",
    "denoising",
    "solvers",
    "objective",
    "diagnostics",
)
# Packages that one function needs, and imports itself.
WHERE_USED = {
    "solvers": {"scipy"},
    "quality": {"torch_fidelity"},
    "dataset_images": {"numpy", "tqdm"},
    "reference_bank": {"datasets"},
}


def layer(module):
    found = [i for i, names in enumerate(LAYERS) if any(fnmatch(module, name) for name in names)]
    assert found, f"{module}.py is in no layer: add it to LAYERS in {Path(__file__).name}"
    return found[0]


def imported(module):
    """(names of the package's modules, top-level names of others) that a module's source imports, anywhere in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
    own |= {name.split(".")[1] for name in others if name.startswith("stf_diffusers.")}
    return own, {name.split(".")[0] for name in others} - {"stf_diffusers"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_lower_layers(module):
    own, _ = imported(module)
    assert all(layer(name) < layer(module) for name in own), f"{module} imports {sorted(own)}"


@pytest.mark.parametrize("module", [module for module in MODULES if module in TORCH_ALONE])
def test_lower_layers_need_torch_alone(module):
    _, others = imported(module)
    assert others <= {"torch", *sys.stdlib_module_names, *WHERE_USED.get(module, ())}


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
