from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import psutil
import pytest

from common.types import UserError
from common.video import VideoWriter, check_video


def add_all(video: VideoWriter) -> None:
    for frame in frames(10) * 20:
        video.add(frame, "")


def frames(count: int) -> list[np.ndarray]:
    """From dark to bright: the brightness tells which frame it is."""
    return [np.full((240, 320, 3), 20 + 20 * i, np.uint8) for i in range(count)]


def test_every_frame_is_there_with_its_text_above(tmp_path):
    path = tmp_path / "film.mp4"
    with VideoWriter(path, fps=20.0) as video:
        for i, frame in enumerate(frames(10)):
            video.add(frame, f"return {i}")
    reader: Any = imageio.get_reader(path)
    assert reader.get_meta_data()["fps"] == 20.0
    read = [np.asarray(reader.get_data(i)) for i in range(reader.count_frames())]
    reader.close()
    assert len(read) == 10
    assert read[0].shape == (260, 320, 3)
    for frame, original in zip(read, frames(10), strict=True):
        assert abs(frame[30:].mean() - original.mean()) < 4
        assert frame[:16].max() > 150  # white text
        assert np.median(frame[:16]) < 20  # on black


@pytest.mark.parametrize("name", ["film.gif", "film", "film.mp4.txt", ".mp4x"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"videos are written as \.mp4, not"):
        VideoWriter(tmp_path / name, 10.0)


def test_places_where_nothing_can_be_written(tmp_path):
    with pytest.raises(UserError, match=r"there is no directory .*nowhere for the video"):
        check_video(tmp_path / "nowhere" / "film.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=r"the video .*folder\.mp4 cannot be written \(Is a directory\)"):
        check_video(tmp_path / "folder.mp4")
    with pytest.raises(UserError, match="cannot be written"):
        check_video(Path("/proc/film.mp4"))


def test_the_check_leaves_no_file_and_no_file_alone(tmp_path):
    check_video(tmp_path / "film.MP4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.mp4").write_text("an older film")
    check_video(tmp_path / "old.mp4")
    assert (tmp_path / "old.mp4").read_text() == "an older film"


def test_a_machine_without_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    with pytest.raises(UserError, match="videos need ffmpeg, which is missing here"):
        check_video(tmp_path / "film.mp4")
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    monkeypatch.setattr("imageio_ffmpeg._utils._get_ffmpeg_exe", lambda: None)
    with pytest.raises(UserError, match="videos need ffmpeg"):
        check_video(tmp_path / "film.mp4")


def test_an_encoder_that_dies_is_a_clear_error(tmp_path):
    path = tmp_path / "film.mp4"
    before = psutil.Process().children()
    with VideoWriter(path, 10.0) as video:
        video.add(frames(1)[0], "")
        (encoder,) = [child for child in psutil.Process().children() if child not in before]
        encoder.kill()
        encoder.wait(10)
        with pytest.raises(UserError, match=r"the video .*film\.mp4 cannot be written"):
            add_all(video)
