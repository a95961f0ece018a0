"""Writes rendered frames as an mp4, each with the numbers that belong to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from common.types import UserError

_BAR = 20  # pixels above the picture, for the text


def check_video_path(path: Path) -> None:
    """Raises UserError where no mp4 can be written."""
    if path.suffix.lower() != ".mp4":
        raise UserError(f"videos are written as .mp4, not {path.suffix or path.name!r}")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} for the video")
    existed = path.exists()
    try:
        open(path, "ab").close()
    except OSError as error:
        raise UserError(f"the video {path} cannot be written ({error.strerror})") from None
    if not existed:
        path.unlink()


class VideoWriter:
    """`with VideoWriter(path, fps) as video: video.add(frame, "text")`.

    Raises UserError when the file cannot be written.
    """

    def __init__(self, path: Path, fps: float):
        check_video_path(path)
        self._path, self._fps = path, fps
        self._writer: Any = None

    def __enter__(self) -> Self:
        import imageio.v2 as imageio

        # imageio starts ffmpeg at the first frame by a fork, against which jax warns: it execs at once.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        self._writer = imageio.get_writer(
            self._path, format="FFMPEG", mode="I", fps=self._fps, macro_block_size=4, ffmpeg_log_level="error"
        )
        return self

    def add(self, frame: np.ndarray, text: str) -> None:
        """Appends one frame, uint8 [h, w, 3], with a line of text above it."""
        from PIL import Image, ImageDraw

        height, width = frame.shape[:2]
        canvas = Image.new("RGB", (width, height + _BAR), "black")
        canvas.paste(Image.fromarray(frame), (0, _BAR))
        ImageDraw.Draw(canvas).text((5, 4), text, fill="white")
        try:
            self._writer.append_data(np.asarray(canvas))
        except OSError as error:  # ffmpeg is gone: a full disk, for one
            raise UserError(f"the video {self._path} cannot be written: {error}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
