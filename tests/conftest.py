"""What several test files share: the repository's folders, a small folder of images, the flags of a short run."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(ROOT / "benchmarks")]

# Nothing in the tests may reach a hub.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 colour images of 8x8 in two classes, laid out as an imagefolder."""
    from tiny import save_images

    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_extractor

    return save_extractor(tmp_path_factory.mktemp("extractor") / "tiny-resnet")


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows of wrong_inputs.py name."""
    from wrong_inputs import make_places

    return make_places(tmp_path_factory.mktemp("places"))


@pytest.fixture
def flags(tmp_path: Path, image_folder: Path) -> Callable[..., list[str]]:
    """Flags of a run of two steps on the small folder of images into `run`, to which a test adds its own."""
    from tiny import short_run

    base = short_run(tmp_path, image_folder)
    return lambda *more: [str(flag) for flag in (*base, *more)]


@pytest.fixture
def fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state in the process; a test that makes an Accelerator leaves none behind."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
