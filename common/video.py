"""Writes rendered frames as an mp4, each with the numbers that belong to it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from common.outputs import check_output
from common.pictures import with_text
from common.types import UserError


def check_video(path: Path) -> None:
    """Raises UserError where no mp4 can be written, or nothing can encode one."""
    check_output(path, ".mp4", "video")
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        found = shutil.which(get_ffmpeg_exe())  # what IMAGEIO_FFMPEG_EXE names is taken unseen
    except RuntimeError:
        found = None
    if found is None:
        raise UserError(
            "videos need ffmpeg, which is missing here: reinstall imageio-ffmpeg (`make setup`), or name "
            "the program in IMAGEIO_FFMPEG_EXE"
        )


class VideoWriter:
    """`with VideoWriter(path, fps) as video: video.add(frame, "text")`.

    Raises UserError when the file cannot be written.
    """

    def __init__(self, path: Path, fps: float):
        check_video(path)
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
        try:
            self._writer.append_data(with_text(frame, text))
        except OSError as error:  # ffmpeg is gone: a full disk, for one
            raise UserError(f"the video {self._path} cannot be written: {error}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
