"""What several test files share: the repository's folders, a small folder of images, the flags of a short run."""

import json
import os
import sys
from collections.abc import Callable, Iterator
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
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 colour images of 8x8 in two classes, laid out as an imagefolder."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(24):
        name = folder / "train" / ("bright" if index % 2 else "dark") / f"{index:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        base = 180 if index % 2 else 60
        Image.fromarray(rng.integers(base - 50, base + 50, (8, 8, 3), dtype=np.uint8)).save(name)
    return folder


@pytest.fixture(scope="session")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_extractor

    return save_extractor(tmp_path_factory.mktemp("extractor") / "tiny-resnet")


@pytest.fixture
def flags(tmp_path: Path, image_folder: Path) -> Callable[..., list[str]]:
    """Flags of a run of two steps on the small folder of images into `run`, to which a test adds its own."""
    from tiny import TINY

    (tmp_path / "net.json").write_text(json.dumps(TINY))
    base = [
        "--train_data_dir", image_folder, "--model_config", tmp_path / "net.json", "--output_dir", tmp_path / "run",
        "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 2, "--num_inference_steps", 2,
        "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none",
    ]  # fmt: skip
    return lambda *more: [str(flag) for flag in (*base, *more)]


@pytest.fixture
def fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state in the process; a test that makes an Accelerator leaves none behind."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
