"""The files that `safedreamer eval` can write besides its summary."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from common.outputs import check_output
from common.types import UserError
from common.video import check_video


class EvalFiles(NamedTuple):
    """None for those that nobody asked for."""

    video: Path | None = None
    prediction_video: Path | None = None
    prediction_plot: Path | None = None

    def lines(self) -> list[str]:
        """What was written, for the user."""
        return [f"{name.replace('_', ' ')}: {path}" for name, path in self._asdict().items() if path]


def checked_files(
    video: Path | None, prediction_video: Path | None, prediction_plot: Path | None
) -> EvalFiles:
    """The files, with a plot next to a prediction video. Raises UserError where one cannot be written."""
    for path in (video, prediction_video):
        if path is not None:
            check_video(path)
    if video is not None and prediction_video is not None and video.resolve() == prediction_video.resolve():
        raise UserError(f"--video and --prediction-video both name {video}")
    if prediction_video is not None and prediction_plot is None:
        prediction_plot = prediction_video.with_suffix(".png")
    if prediction_plot is not None:
        check_output(prediction_plot, ".png", "plot")
    return EvalFiles(video, prediction_video, prediction_plot)
