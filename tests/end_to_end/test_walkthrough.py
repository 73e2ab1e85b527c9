"""docs/walkthrough.md, block after block in an empty folder, with fewer steps."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from test_documents import blocks_of

pytestmark = pytest.mark.xdist_group("walkthrough")


def test_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks_of(ROOT / "docs" / "walkthrough.md"):
        if block.language == "bash":
            command = re.sub(r"(--max_train_steps) \d+", r"\1 12", block.text.replace("\\\n", " "))
            command = re.sub(r"(--lr_warmup_steps) \d+", r"\1 2", command)
            command += " --eval_num_samples 8"  # of the search for a level
            # In the wheel the examples are modules of the package.
            program, as_module, module, *flags = shlex.split(command)
            assert (program, as_module) == ("python", "-m")
            arguments = [ROOT / "examples" / f"{module.rpartition('.')[2]}.py", *flags]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            exec(compile(block.text, f"{block.document.name}:{block.line}", "exec"), names)  # noqa: S102
    pictures = {path.name: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}
    assert set(pictures) == {"edm-35.png", "edm-1.png", "consistency-1.png", "consistency-2.png"}
    for name, picture in pictures.items():
        assert picture.shape[:2] == (96, 384) and picture.std() > 1, name
