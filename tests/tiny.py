"""Small networks and autoencoders, and runs of the training script in this process and in others."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

import train_unconditional_stf as script
from stf_diffusers.training.command_line import run

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

TINY = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.1,
}
TINY_TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
    "patch_size": 2, "norm_type": "ada_norm_zero", "attention_bias": True, "dropout": 0.0,
}  # fmt: skip


def tiny_autoencoder() -> AutoencoderKL:
    """Of colour images, halving their sides; its weights are drawn, so that its latents mean nothing."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip


def tiny_deep_compression_autoencoder() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip


def save_extractor(folder: Path, seed: int = 0) -> Path:
    """A vision model of transformers with drawn weights."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_images(folder: Path) -> Path:
    """24 colour images of 8x8 in two classes, laid out as an imagefolder."""
    rng = np.random.default_rng(0)
    for index in range(24):
        name = folder / "train" / ("bright" if index % 2 else "dark") / f"{index:02d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        base = 180 if index % 2 else 60
        Image.fromarray(rng.integers(base - 50, base + 50, (8, 8, 3), dtype=np.uint8)).save(name)
    return folder


def short_run(folder: Path, images: Path) -> list[object]:
    """Flags of a run of two steps on a folder of images, into `run` of this folder."""
    (folder / "net.json").write_text(json.dumps(TINY))
    return [
        "--train_data_dir", images, "--model_config", folder / "net.json", "--output_dir", folder / "run",
        "--train_batch_size", 4, "--max_train_steps", 2, "--num_samples", 2, "--num_inference_steps", 2,
        "--lr_warmup_steps", 0, "--learning_rate", 1e-3, "--report_to", "none",
    ]  # fmt: skip


def train(argv: Sequence[object], main: Callable[..., None] = script.main) -> None:
    """A training script in this process. Accelerate keeps its state in the process; the next run finds it new."""
    try:
        main([str(part) for part in argv])
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def mistake(argv: Sequence[object], capsys: pytest.CaptureFixture[str], main: Callable[..., None] = script.main) -> str:
    """What a training script says to flags that it refuses: one line, and exit code 2."""
    try:
        with pytest.raises(SystemExit) as end:
            run(main, [str(part) for part in argv])
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in said, said
    # Before it there may be progress bars.
    return said.strip().splitlines()[-1]


class Processes:
    """Processes on the CPU (gloo) that all run one function, forked from one that has imported what takes long."""

    def __init__(self, target: Callable[..., None], *arguments: object, processes: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["datasets", "diffusers.training_utils", "stf_diffusers.pipeline_stf", "transformers"]
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        handle, self.log = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.members = [
            context.Process(target=_be_one_of, args=(rank, processes, port, self.log, target, arguments))
            for rank in range(processes)
        ]
        for process in self.members:
            process.start()

    def wait(self, seconds: float = 300) -> tuple[list[int | None], str]:
        """How they ended, and what they said."""
        for process in self.members:
            process.join(seconds)
            process.kill()
        said = Path(self.log).read_text()
        os.unlink(self.log)
        return [process.exitcode for process in self.members], said


def _be_one_of(
    rank: int, processes: int, port: int, log: str, target: Callable[..., None], arguments: Sequence[object]
) -> None:
    os.environ.update(CPU)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()})
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)


def run_as_script(argv: Sequence[object], name: str = "train_unconditional_stf.py") -> None:
    """A training script as `python` runs it."""
    sys.argv = [name, *map(str, argv)]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def launch(argv: Sequence[object], *, processes: int = 1, name: str = "train_unconditional_stf.py") -> str:
    """A training script in processes of its own; what they said."""
    codes, said = Processes(run_as_script, argv, name, processes=processes).wait()
    assert codes == [0] * processes, said[-3000:]
    return said


def accelerate_launch(argv: Sequence[object], *, processes: int = 1, name: str = "train_unconditional_stf.py") -> str:
    """The command `accelerate launch` on a script of examples/, on the CPU; what it said."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    if processes > 1:
        # What Accelerate calls multi_gpu is its torchrun launcher; ACCELERATE_USE_CPU keeps the processes on the CPU.
        command += ["--multi_gpu", "--main_process_port", str(29500 + os.getpid() % 1000)]
    done = subprocess.run(
        [*command, str(EXAMPLES / name), *map(str, argv)], env=os.environ | CPU, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


# Samples two images of each folder as its card says, where stf_diffusers cannot be imported.
_PLAIN_DIFFUSERS = r"""
import json, re, sys
sys.modules["stf_diffusers"] = None
import numpy as np, torch
from diffusers import DiffusionPipeline
folders, seeds = json.loads(sys.argv[1])
for folder in folders:
    (call,) = re.findall(r"images = pipe\((.*num_inference_steps=\d+)\).images", open(folder + "/README.md").read())[:1]
    call = call.replace("batch_size=4", "batch_size=2")
    call = re.sub(r"class_labels=\[(.*?)\]", lambda m: "class_labels=[" + ", ".join(m[1].split(", ")[:2]) + "]", call)
    call = re.sub(r"^(class_labels=\[.*?\]), num", r"\1, guidance_scale=1.0, num", call)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = eval(f"pipe({call}, generator=generators, output_type='np')").images
    np.save(folder + "/plain.npy", images)
    print(type(pipe).__name__)
assert not [name for name in sys.modules if name.startswith("stf_diffusers.")]
"""


def sample_with_plain_diffusers(folders: Sequence[Path], seed: int) -> list[str]:
    """Leave the first two images of the training's seed in each folder's plain.npy; the classes of the pipelines."""
    seeds = [script.seed_for(seed, index) for index in range(2)]
    argument = json.dumps([[str(folder) for folder in folders], seeds])
    command = [sys.executable, "-c", _PLAIN_DIFFUSERS, argument]
    done = subprocess.run(command, env=os.environ | CPU, cwd=ROOT.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    """Those with which the training script of this seed samples its first images."""
    return [torch.Generator().manual_seed(script.seed_for(seed, index)) for index in range(count)]


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def weights(folder: Path, name: str = "unet") -> dict[str, Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def metadata(folder: Path) -> dict:
    """What a pipeline says about its training."""
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_stf"]


def grid_of(folder: Path) -> np.ndarray:
    """The two images of 8x8 in the newest grid that a training saved, (2, 8, 8, 3), from its eightfold enlargement."""
    path = max((folder / "samples").glob("step-*.png"))
    pixels = np.asarray(Image.open(path))[:64:8, ::8]  # names of classes may stand below
    return np.stack([pixels[:, :8], pixels[:, 8:16]]).astype(int)
