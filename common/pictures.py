"""Puts pictures together: enlarged, side by side, under a line of text. All are uint8 [h, w, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

Color = tuple[int, int, int]

_TEXT = (255, 255, 255)
_BACKGROUND = (0, 0, 0)
_LINES = 16  # a line of text takes one part in so many of the picture below it
_SMALLEST_BAR = 20  # pixels
_LABEL_BAR = 20
_GAP = 8  # pixels between pictures
_ENCODED = 4  # video frames have sides that are multiples of this


def with_text(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture below one line of text, whose letters grow with the picture."""
    height, width = picture.shape[:2]
    return np.concatenate([text_bar(text, width, max(_SMALLEST_BAR, height // _LINES // 4 * 4)), picture])


def text_bar(text: str, width: int, height: int) -> np.ndarray:
    """One line of white text on black."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    place = (height // 4, height // 2)
    ImageDraw.Draw(canvas).text(place, text, fill=_TEXT, font=_font(round(0.65 * height)), anchor="lm")
    return np.asarray(canvas)


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel becomes a square of pixels: nothing is smoothed."""
    return picture.repeat(factor, 0).repeat(factor, 1)


def framed(picture: np.ndarray, color: Color, width: int = 4) -> np.ndarray:
    """A picture inside a border of one colour."""
    height, across = picture.shape[:2]
    canvas = np.full((height + 2 * width, across + 2 * width, 3), color, np.uint8)
    canvas[width:-width, width:-width] = picture
    return canvas


def labelled(picture: np.ndarray, label: str) -> np.ndarray:
    """A picture below its name."""
    return np.concatenate([text_bar(label, picture.shape[1], _LABEL_BAR), picture])


def row(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side, aligned at the top, with gaps between them."""
    height = max(picture.shape[0] for picture in pictures)
    filled = [_padded(picture, height, picture.shape[1]) for picture in pictures]
    return np.concatenate(_with_gaps(filled, (height, _GAP, 3)), 1)


def column(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below one another, aligned at the left, with gaps between them."""
    width = max(picture.shape[1] for picture in pictures)
    filled = [_padded(picture, picture.shape[0], width) for picture in pictures]
    return np.concatenate(_with_gaps(filled, (_GAP, width, 3)), 0)


def episode_frame(outside: np.ndarray, cameras: Mapping[str, np.ndarray]) -> np.ndarray:
    """The outside view and, to its right and below one another, what the agent's cameras see.

    Without cameras the outside view as it is. With them it is twice as large, and they are as large as its
    height allows.

    Args:
        cameras: name -> small picture.
    """
    if not cameras:
        return outside
    outside = enlarge(outside, 2)
    sides = [picture.shape[0] for picture in cameras.values()]
    room = outside.shape[0] - len(sides) * _LABEL_BAR - (len(sides) - 1) * _GAP
    factor = max(1, room // sum(sides))
    views = [labelled(enlarge(picture, factor), name) for name, picture in cameras.items()]
    return encodable(row([outside, column(views)]))


_SEEN, _IMAGINED, _AHEAD = (0, 158, 115), (213, 94, 0), (70, 70, 70)  # Okabe and Ito's green and vermilion
_PROGRESS = 8  # pixels, height of the bar below the pictures
_PREDICTION_FACTOR = 4


def prediction_frame(
    cameras: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int, context: int, length: int
) -> np.ndarray:
    """True picture, the model's, and the absolute difference of both; one row per camera.

    The model's pictures stand in a green frame while it sees the true ones, in a red one when it has to
    imagine them. The bar below shows how far the sequence is; a white mark where imagination begins.

    Args:
        cameras: name -> (true, predicted), small pictures.
        step: of the sequence, from 0; `context` is the first imagined one, `length` the number of all.
    """
    color = _SEEN if step < context else _IMAGINED
    rows = []
    for name, (true, predicted) in cameras.items():
        error = np.abs(true.astype(np.int16) - predicted).astype(np.uint8)
        views = {
            f"true: {name}": (true, _BACKGROUND),
            "model": (predicted, color),
            "error": (error, _BACKGROUND),
        }
        rows.append(
            row(
                [
                    labelled(framed(enlarge(x, _PREDICTION_FACTOR), c), label)
                    for label, (x, c) in views.items()
                ]
            )
        )
    pictures = column(rows)
    return encodable(column([pictures, _progress(pictures.shape[1], step, context, length)]))


def _progress(width: int, step: int, context: int, length: int) -> np.ndarray:
    """A bar that fills from the left."""
    edges = np.linspace(0, width, length + 1).astype(int)
    bar = np.full((_PROGRESS, width, 3), _AHEAD, np.uint8)
    bar[:, : edges[min(step + 1, context)]] = _SEEN
    bar[:, edges[context] : edges[max(step + 1, context)]] = _IMAGINED
    bar[:, edges[context] - 2 : edges[context]] = _TEXT
    return bar


def encodable(picture: np.ndarray) -> np.ndarray:
    """A picture with a black rim at the right and below, where its sides are no multiples of 4."""
    height, width = (-(-side // _ENCODED) * _ENCODED for side in picture.shape[:2])
    return _padded(picture, height, width)


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = np.full((height, width, 3), _BACKGROUND, np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas


def _with_gaps(pictures: Sequence[np.ndarray], shape: tuple[int, int, int]) -> list[np.ndarray]:
    gap = np.full(shape, _BACKGROUND, np.uint8)
    return [part for picture in pictures for part in (gap, picture)][1:]


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
