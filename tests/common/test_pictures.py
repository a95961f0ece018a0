from __future__ import annotations

import numpy as np
import pytest

from common.pictures import encodable, enlarge, episode_frame, prediction_frame, with_text

GREEN, RED = (0, 158, 115), (213, 94, 0)
RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), np.uint8)


def position(picture: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Top and left of the only place where `part` stands in `picture`."""
    height, width = part.shape[:2]
    corners = np.argwhere((picture == part[0, 0]).all(-1))
    (found,) = [
        (int(y), int(x)) for y, x in corners if np.array_equal(picture[y : y + height, x : x + width], part)
    ]
    return found


def test_pixels_become_squares():
    np.testing.assert_array_equal(
        enlarge(np.array([[[1] * 3, [2] * 3]], np.uint8), 2)[..., 0], [[1, 1, 2, 2], [1, 1, 2, 2]]
    )


def test_a_line_of_text_stands_above():
    picture = np.full((240, 320, 3), 90, np.uint8)
    written, blank = with_text(picture, "return 1.0"), with_text(picture, "")
    np.testing.assert_array_equal(written[-240:], picture)
    assert written.shape == (260, 320, 3)
    assert written[:20].max() > 200
    assert blank[:20].max() == 0
    assert with_text(noise(480, 640), "").shape == (508, 640, 3)  # letters grow with the picture


def test_the_outside_view_alone_is_left_as_it_is():
    outside = noise(240, 320)
    assert episode_frame(outside, {}) is outside


@pytest.mark.parametrize(("names", "factor"), [(["vision"], 7), (["vision", "vision_back"], 3)])
def test_cameras_stand_to_the_right_below_their_names(names, factor):
    outside = noise(240, 320)
    cameras = {name: noise(64, 64) for name in names}
    frame = episode_frame(outside, cameras)
    assert position(frame, enlarge(outside, 2)) == (0, 0)
    bottom = 0
    for picture in cameras.values():
        top, left = position(frame, enlarge(picture, factor))
        assert left > 640
        assert top >= bottom + 20
        assert frame[bottom:top, left : left + 200].max() > 200  # its name
        bottom = top + 64 * factor
    assert frame.shape[0] == 480
    assert frame.shape[1] % 4 == 0


def test_predictions_stand_between_the_truth_and_their_error():
    true, model = noise(8, 8), noise(8, 8)
    error = np.abs(true.astype(int) - model).astype(np.uint8)
    frame = prediction_frame({"a": (true, model), "b": (model, true)}, step=2, context=5, length=50)
    (top, left), (lower, middle) = both(frame, true)  # camera b has them the other way round
    assert both(frame, model) == [(top, middle), (lower, left)]
    (_, right), (_, also_right) = both(frame, error)
    assert right == also_right > middle > left
    assert both(frame, error)[0][0] == top


def both(frame: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where a picture stands in each of two rows."""
    half = frame.shape[0] // 2
    upper, lower = position(frame[:half], enlarge(picture, 4)), position(frame[half:], enlarge(picture, 4))
    return [upper, (lower[0] + half, lower[1])]


@pytest.mark.parametrize(("step", "color"), [(0, GREEN), (4, GREEN), (5, RED), (49, RED)])
def test_it_is_marked_where_open_loop_begins(step, color):
    true, model = noise(8, 8), noise(8, 8)
    frame = prediction_frame({"a": (true, model)}, step, context=5, length=50)
    top, left = position(frame, enlarge(model, 4))
    assert (frame[top - 1, left : left + 32] == color).all()
    assert (frame[top : top + 32, left + 32] == color).all()

    bar = frame[-4]
    assert {tuple(int(v) for v in pixel) for pixel in bar} <= {GREEN, RED, (255,) * 3, (70,) * 3, (0, 0, 0)}
    done = ((bar == GREEN) | (bar == RED)).all(-1) | (bar == 255).all(-1)
    np.testing.assert_allclose(done.mean(), (step + 1) / 50, atol=0.03)
    assert (bar == 255).all(-1).sum() == 2


def test_sides_are_what_encoders_take():
    assert encodable(noise(9, 12)).shape == (12, 12, 3)
