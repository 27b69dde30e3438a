"""Scores of an evaluation, against hand-made embeddings in the plane."""

from pathlib import Path

import numpy as np
import pytest

from mlx_blockskip.tasks.evaluate.scores import Picture, drift, similarity

HALF = 0.5**0.5


def at(degrees):
    """A row of unit length."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def picture(prompt, seed, adapted=True):
    return Picture(prompt, f"about {prompt}", seed, adapted, Path(f"{prompt}-{seed}-{adapted}.png"))


def test_similarity_by_image_by_prompt_and_in_all():
    pictures = [picture("p", 0), picture("p", 1), picture("q", 0), picture("q", 1)]
    real = {"real1": at(0), "real2": at(90)}
    dino = real | {str(p.path): at(degrees) for p, degrees in zip(pictures, (0, 45, 90, 180))}
    clip_i = real | {str(p.path): at(0) for p in pictures}
    clip_t = {"about p": at(60), "about q": at(180)}
    found = similarity(pictures, list(real), dino, clip_i, clip_t)
    p, q = found["prompts"]
    assert [image["dino"] for image in p["images"]] == pytest.approx([0.5, HALF])
    assert [image["dino"] for image in q["images"]] == pytest.approx([0.5, -0.5])
    assert (p["dino"], q["dino"]) == pytest.approx(((0.5 + HALF) / 2, 0.0))
    assert (p["clip_t"], q["clip_t"]) == pytest.approx((0.5, -1.0))
    assert found["means"] == pytest.approx({"dino": (0.5 + HALF) / 4, "clip_i": 0.5, "clip_t": -0.25})
    assert found["real"] == pytest.approx({"dino": 0.0, "clip_i": 0.0}, abs=1e-7)
    assert (p["prompt"], p["compared_with"]) == ("p", "about p")
    assert [image["file"] for image in q["images"]] == ["images/q-0-True.png", "images/q-1-True.png"]


def test_one_real_image_is_like_no_other():
    one = picture("p", 0)
    rows = {"real": at(0), str(one.path): at(60)}
    found = similarity([one], ["real"], rows, rows, {"about p": at(0)})
    assert found["real"] == {"dino": None, "clip_i": None}
    assert found["means"]["dino"] == pytest.approx(0.5)


def test_drift_pairs_images_of_the_same_prompt_and_seed():
    before, after = ([picture(name, 3, adapted) for name in "pq"] for adapted in (False, True))
    dino = {str(p.path): at(d) for p, d in zip([*before, *after], (0, 0, 60, 90))}
    clip_i = {str(p.path): at(d) for p, d in zip([*before, *after], (0, 0, 0, 180))}
    found = drift(before, after, dino, clip_i, {"about p": at(0), "about q": at(0)})
    assert found["means"] == pytest.approx({"dino": 0.25, "clip_i": 0.0, "clip_t_base": 1.0, "clip_t": 0.0}, abs=1e-7)
    (image,) = found["prompts"][1]["images"]
    assert (image["base"], image["file"], image["seed"]) == ("images/q-3-False.png", "images/q-3-True.png", 3)
