"""A picture of example crops in labelled rows, so that a person can judge what a rule does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ...crops import open_crop, save_image
from ...errors import DataError
from ...shards import open_atomically


# Pixels.
_CELL = (96, 192)
_GAP = 8
_LINE = 18
_FONT_SIZE = 12
_COLUMNS = 8
_PAPER, _INK, _GREY = "white", "black", "#b0b0b0"


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One row of a contact sheet.

    Attributes:
        label: the line above the row.
        cells: (image file, text below it), at most 8.
    """

    label: str
    cells: Sequence[tuple[Path, str]]


def draw_contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Return an RGB picture of the rows; an image that cannot be read is a grey box.

    Crops are scaled to fit 96 x 192 pixels, their shape kept.
    """
    height = 2 * _LINE + _CELL[1] + _GAP
    sheet = Image.new("RGB", (_GAP + _COLUMNS * (_CELL[0] + _GAP), _GAP + height * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, row in enumerate(rows):
        top = _GAP + height * number
        draw.text((_GAP, top), row.label, _INK, font)
        for column, (path, text) in enumerate(row.cells[:_COLUMNS]):
            left = _GAP + column * (_CELL[0] + _GAP)
            sheet.paste(_draw_cell(path), (left, top + _LINE))
            draw.text((left, top + _LINE + _CELL[1]), text, _INK, font)
    return sheet


def _draw_cell(path: Path) -> Image.Image:
    try:
        crop = open_crop(path)
    except DataError:
        return Image.new("RGB", _CELL, _GREY)
    return ImageOps.pad(crop, _CELL, color=_PAPER)


def write_contact_sheet(path: Path, rows: Sequence[SheetRow]) -> None:
    """Write a contact sheet as PNG, atomically."""
    with open_atomically(path) as temporary:
        save_image(draw_contact_sheet(rows), temporary, format="PNG")
