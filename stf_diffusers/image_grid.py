"""Grids of images, with the names of their classes beneath them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Pixels that an image with a name beneath it is wide at least: room for about ten letters.
_LEGIBLE = 64


def names_of_labels(labels: Sequence[int], class_names: Sequence[str] | None) -> list[str] | None:
    """The names of the classes with these numbers, as far as Pillow's own font can write them; None without `class_names`.

    That font knows ASCII: accents are left out, and a name in another script is the class's number.
    """
    if not class_names:
        return None
    written = []
    for label in labels:
        name = class_names[label] if label < len(class_names) else ""
        plain = "".join(part for part in unicodedata.normalize("NFKD", name) if not unicodedata.combining(part))
        written.append(plain if plain.isascii() and plain.isprintable() and plain.strip() else str(label))
    return written


def image_grid(
    images: Sequence[Image.Image], columns: int, names: Sequence[str] | None = None, *, min_width: int = 1
) -> Image.Image:
    """Images in rows from left to right, RGB; black where the last row is short.

    Args:
        images: of one size.
        columns: images per row.
        names: what stands beneath each image, cut where it is too long. None: the images alone.
        min_width: narrower images are enlarged by the largest whole factor up to it; with names, up to 64 at least.
    """
    width, height = images[0].size
    scale = max(1, max(min_width, _LEGIBLE if names else 1) // width)
    cell = (width * scale, height * scale)
    font = ImageFont.load_default(max(10, cell[0] // 14))
    margin = sum(font.getmetrics()) + 2 if names and isinstance(font, ImageFont.FreeTypeFont) else 13 if names else 0
    grid = Image.new("RGB", (columns * cell[0], -(-len(images) // columns) * (cell[1] + margin)))
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        left, top = index % columns * cell[0], index // columns * (cell[1] + margin)
        grid.paste(image.resize(cell, Image.Resampling.NEAREST), (left, top))
        if names:
            draw.rectangle((left, top + cell[1], left + cell[0] - 1, top + cell[1] + margin - 1), fill="white")
            text = _fitting(names[index], cell[0] - 4, draw, font)
            draw.text((left + cell[0] // 2, top + cell[1] + 1), text, fill="black", font=font, anchor="ma")
    return grid


def _fitting(
    name: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    """The name, or as much of its beginning as fits into so many pixels with dots after it."""
    if draw.textlength(name, font) <= width:
        return name
    lengths = range(len(name) - 1, 0, -1)
    return next((f"{name[:n]}.." for n in lengths if draw.textlength(f"{name[:n]}..", font) <= width), name[:1])
