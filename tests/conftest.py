"""What several test files share: the repository's folders and a small folder of images."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(ROOT / "benchmarks")]

# Nothing in the tests may reach a hub.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 colour images of 8x8 in two classes, laid out as an imagefolder."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(24):
        name = folder / "train" / ("bright" if index % 2 else "dark") / f"{index:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        base = 180 if index % 2 else 60
        Image.fromarray(rng.integers(base - 50, base + 50, (8, 8, 3), dtype=np.uint8)).save(name)
    return folder


@pytest.fixture
def fresh_accelerate_state():
    """Accelerate keeps its state in the process; each run of a script through `main` needs it new."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
