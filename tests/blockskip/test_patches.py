import dataclasses

import numpy as np
import pytest
from PIL import Image

from mlx_blockskip.blockskip import patches
from mlx_blockskip.blockskip.patches import MODES, Patch, PatchSettings, crop_side, cut, draw_patch, resize_shorter
from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError

LEVELS = (1e-6, 0.1, 0.25, 0.5, 0.77, 0.999, 1.0)


def settings(mode="dynamic", s_min=256, s_max=512, size_multiple=16):
    return PatchSettings(mode, s_min, s_max, size_multiple)


def coordinates(width, height):
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_the_side_is_eq_1():
    assert [crop_side(s, 0.3, settings()) for s in (1e-6, 0.25, 0.5, 1.0)] == [256, 320, 384, 512]
    sana = settings(s_min=512, s_max=1024, size_multiple=32)
    assert [crop_side(s, 0.3, sana) for s in (1e-6, 0.25, 0.5, 1.0)] == [512, 640, 768, 1024]


def test_the_side_is_rounded_to_the_nearest_multiple():
    assert crop_side(7.9 / 256, 0, settings()) == 256
    assert crop_side(8.1 / 256, 0, settings()) == 272


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("s_min", "s_max", "size_multiple"), [(256, 512, 16), (96, 128, 32), (64, 64, 16), (16, 528, 16)]
)
def test_every_side_is_a_multiple_within_its_bounds(mode, s_min, s_max, size_multiple):
    chosen = settings(mode, s_min, s_max, size_multiple)
    for s in LEVELS:
        for u in (0.0, 0.4, 1 - 2**-53):
            side = crop_side(s, u, chosen)
            assert side % size_multiple == 0
            assert s_min <= side <= s_max


def test_each_mode_follows_what_it_says():
    sides = {mode: [crop_side(s, 0.5, settings(mode)) for s in LEVELS] for mode in MODES}
    assert sides["dynamic"] == sorted(sides["dynamic"])
    assert (sides["dynamic"][0], sides["dynamic"][-1]) == (256, 512)
    assert sides["high-to-low"] == sorted(sides["high-to-low"], reverse=True)
    assert (sides["high-to-low"][0], sides["high-to-low"][-1]) == (512, 256)
    assert set(sides["random"]) == {384}
    assert set(sides["resize"]) == set(sides["none"]) == {512}


def test_random_sides_cover_the_range_evenly_and_the_others_do_not_draw_theirs():
    sides = [draw_patch((512, 512), 0.5, settings("random"), philox.generator(0, k)).side for k in range(2000)]
    assert (min(sides), max(sides)) == (256, 512)
    assert abs(np.mean(sides) - 384) < 6
    for mode in set(MODES) - {"random"}:
        assert len({draw_patch((512, 512), 0.5, settings(mode), philox.generator(0, k)).side for k in range(20)}) == 1


def test_the_number_of_draws_depends_on_nothing():
    after = set()
    for mode in MODES:
        for s in LEVELS:
            for size in ((512, 512), (2000, 512)):
                rng = philox.generator(4, 1)
                draw_patch(size, s, settings(mode), rng)
                after.add(rng.random())
    expected = philox.generator(4, 1)
    expected.random(3)
    assert after == {expected.random()}


def test_a_patch_is_a_function_of_the_generator():
    a, b, c = (draw_patch((900, 512), 0.4, settings(), philox.generator(1, k)) for k in (5, 5, 6))
    assert a == b
    assert a != c


@pytest.mark.parametrize("mode", MODES)
def test_patches_stay_inside_and_reach_both_edges(mode):
    chosen = settings(mode, 32, 64)
    drawn = [draw_patch((67, 64), 1 / 64, chosen, philox.generator(2, k)) for k in range(400)]
    assert all(0 <= p.left <= 67 - p.side and 0 <= p.top <= 64 - p.side for p in drawn)
    assert {p.left + p.side for p in drawn} >= {67}
    assert {p.left for p in drawn} >= {0}


@pytest.mark.parametrize("mode", ["dynamic", "resize", "none"])
def test_patches_of_one_side_lie_at_every_place_alike(mode):
    drawn = [draw_patch((67, 70), 1 / 64, settings(mode, 32, 64), philox.generator(2, k)) for k in range(600)]
    (side,) = {p.side for p in drawn}
    for length, places in ((67, [p.left for p in drawn]), (70, [p.top for p in drawn])):
        counts = np.bincount(places, minlength=length - side + 1)
        assert len(counts) == length - side + 1
        assert counts.min() > 0
        assert counts.max() < 3 * len(drawn) / len(counts) + 10
    assert abs(np.corrcoef([p.left for p in drawn], [p.top for p in drawn])[0, 1]) < 4 / len(drawn) ** 0.5


def test_crops_and_their_settings_are_values():
    assert len({Patch(1, 2, 3), Patch(1, 2, 3), Patch(2, 1, 3)}) == 2
    assert len({settings(), settings(), settings("random")}) == 2


def test_an_image_below_s_max_is_not_cut():
    with pytest.raises(ValueError, match="400 x 700"):
        draw_patch((400, 700), 0.1, settings(), philox.generator(0))


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((640, 480), 240, (320, 240)),
        ((480, 640), 240, (240, 320)),
        ((30, 40), 60, (60, 80)),
        ((1000, 333), 128, (384, 128)),
        ((333, 1000), 128, (128, 384)),
        ((3, 500), 16, (16, 2667)),
        ((1, 1), 16, (16, 16)),
    ],
)
def test_the_shorter_side_is_exact_and_the_aspect_kept(size, side, expected):
    assert resize_shorter(Image.new("RGB", size), side).size == expected


def test_an_image_of_the_right_size_is_not_touched():
    image = coordinates(90, 64)
    assert resize_shorter(image, 64) is image


@pytest.mark.parametrize("mode", MODES)
def test_the_patch_has_the_side_that_trains(mode):
    chosen = settings(mode, 32, 64)
    assert chosen.output_side == (64 if mode == "none" else 32)
    for k, s in enumerate(LEVELS):
        result = cut(coordinates(100, 64), draw_patch((100, 64), s, chosen, philox.generator(0, k)), chosen)
        assert result.size == (chosen.output_side,) * 2
        assert result.mode == "RGB"


def test_a_patch_is_the_box_in_one_lanczos_resize_and_never_flipped():
    image, chosen, patch = coordinates(100, 64), settings("dynamic", 32, 64), Patch(20, 5, 48)
    result = np.asarray(cut(image, patch, chosen), int)
    expected = image.crop((20, 5, 68, 53)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(result, np.asarray(expected))
    assert (np.diff(result[:, :, 0], axis=1) > 0).all()
    assert (np.diff(result[:, :, 1], axis=0) > 0).all()
    assert result[0, 0, :2] == pytest.approx([20, 5], abs=1)
    assert result[-1, -1, :2] == pytest.approx([67, 52], abs=1)


def test_what_needs_no_resize_keeps_its_pixels():
    image = coordinates(100, 64)
    whole = cut(image, Patch(7, 0, 64), settings("none", 32, 64))
    assert np.array_equal(np.asarray(whole), np.asarray(image)[:, 7:71])
    smallest = cut(image, Patch(7, 9, 32), settings("dynamic", 32, 64))
    assert np.array_equal(np.asarray(smallest), np.asarray(image)[9:41, 7:39])


def test_coverage_is_the_mean_share_of_the_image():
    assert patches.coverage([Patch(0, 0, 50)], (100, 50)) == 0.5
    assert patches.coverage([Patch(0, 0, 50), Patch(50, 0, 25)], (100, 50)) == pytest.approx((0.5 + 0.125) / 2)
    assert patches.coverage([], (100, 50)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "centre"}, "--patch-mode centre: is not one of dynamic, high-to-low, random, resize, none"),
        ({"s_max": 500}, "--resolution 500: must be a multiple of 16; the nearest is 496"),
        ({"s_min": 250}, "--train-resolution 250: must be a multiple of 16; the nearest is 256"),
        ({"s_min": 0}, "--train-resolution 0: must be a multiple of 16; the nearest is 16"),
        ({"s_min": -32}, "--train-resolution -32: must be a multiple of 16; the nearest is 16"),
        ({"s_min": 5}, "the nearest is 16"),
        ({"s_min": 528}, "--train-resolution 528: must not be above --resolution 512"),
        ({"size_multiple": 32, "s_min": 272}, "must be a multiple of 32"),
    ],
)
def test_sides_that_cannot_train_are_refused_with_the_nearest(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(settings(), **changes)
