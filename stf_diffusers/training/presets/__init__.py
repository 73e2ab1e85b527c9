"""Configs of networks by name; the side of the images that each is made for is in its name."""

from pathlib import Path

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.json"))}
