"""The paper's pieces that are plain arithmetic: plans, patches, masks, Eq. 3."""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from support.compare import same_bits

from mlx_blockskip.blockskip import masking, patches, residuals
from mlx_blockskip.blockskip import plan as plans
from mlx_blockskip.blockskip.patches import PatchSettings
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.attention import IMAGE_TO_TEXT
from mlx_blockskip.models.family import Tokens


@pytest.mark.parametrize(("ratio", "n", "m"), [(0.0, 0, 0), (0.3, 9, 8), (0.4, 12, 11), (0.5, 15, 14)])
def test_a_ratio_gives_the_papers_budget_split_evenly(ratio, n, m):
    plan = SkipPlan.from_ratio(ratio, 57)
    assert (plan.n, plan.m, plan.k) == (n, m, n + m)
    assert plan.retained == tuple(range(n, 57 - m))


def test_runs_are_sorted_merged_and_told_apart():
    plan = SkipPlan(12, ((10, 12), (4, 5), (0, 2), (5, 6), (7, 7)))
    assert plan.runs == ((0, 2), (4, 6), (10, 12))
    assert (plan.n, plan.m, plan.k) == (2, 2, 6)
    assert plan.later == ((4, 6), (10, 12))
    assert plan.retained == (2, 3, 6, 7, 8, 9)
    assert SkipPlan(12, ((4, 6),)).later == ((4, 6),)
    assert plans.from_json(json.loads(json.dumps(plan.to_json())), 12, "x").runs == plan.runs


@pytest.mark.parametrize("runs", [((0, 12),), ((0, 6), (6, 12)), ((0, 5), (4, 6)), ((-1, 2),), ((3, 13),), ((5, 4),)])
def test_a_plan_that_cannot_be_is_refused(runs):
    with pytest.raises(UserError, match="skip plan"):
        SkipPlan(12, runs)


def test_the_ways_of_giving_a_plan_exclude_each_other(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"n": 5, "m": 1}')
    assert plans.choose(12, file=str(path)).runs == ((0, 5), (11, 12))
    assert plans.choose(12, first=3).runs == ((0, 3),)
    assert plans.choose(12).k == 6
    recorded = plans.choose(12, ratio=0.5, recorded={"0.5": {"n": 6, "m": 0}})
    assert recorded.runs == ((0, 6),)
    assert "the model's plan" in recorded.source
    for options in ({"ratio": 0.5, "first": 1}, {"ratio": 0.5, "file": str(path)}, {"last": 1, "file": str(path)}):
        with pytest.raises(UserError, match="give only one"):
            plans.choose(12, **options)
    for text, match in (("{}", "not a skip plan"), ('{"depth": 9, "runs": []}', "model of 9 blocks"), ("[", "JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            plans.choose(12, file=str(path))


DYNAMIC = PatchSettings("dynamic", 256, 512, 16)


def test_equation_one():
    sides = [patches.crop_side(s, 0.0, DYNAMIC) for s in (1e-4, 0.25, 0.5, 1.0)]
    assert sides == [256, 320, 384, 512]
    reverse = PatchSettings("high-to-low", 256, 512, 16)
    assert [patches.crop_side(s, 0.0, reverse) for s in (1e-4, 0.5, 1.0)] == [512, 384, 256]
    drawn = {patches.crop_side(0.3, u, PatchSettings("random", 256, 512, 16)) for u in np.linspace(0, 0.999, 50)}
    assert {min(drawn), max(drawn)} == {256, 512}
    assert patches.crop_side(0.1, 0.0, PatchSettings("resize", 256, 512, 16)) == 512


@pytest.mark.parametrize("mode", patches.MODES)
@pytest.mark.parametrize("size", [(512, 512), (900, 512), (512, 1333)])
def test_a_patch_lies_in_the_image_and_modes_draw_the_same_place(mode, size):
    settings = PatchSettings(mode, 256, 512, 16)
    for k in range(50):
        rng = philox.generator(0, k)
        patch = patches.draw_patch(size, 0.7, settings, rng)
        assert patch.side % 16 == 0
        assert 0 <= patch.left <= size[0] - patch.side
        assert 0 <= patch.top <= size[1] - patch.side
        after = rng.random()
        reference = philox.generator(0, k)
        reference.random(3)
        assert after == reference.random(), "every mode draws three uniforms"


@pytest.mark.parametrize("size", [(64, 64), (30, 90), (1000, 37), (17, 16)])
def test_images_of_any_size_and_aspect(size):
    settings = PatchSettings("dynamic", 32, 64, 16)
    image = patches.resize_shorter(Image.new("RGB", size, "red"), 64)
    assert min(image.size) == 64
    patch = patches.draw_patch(image.size, 0.4, settings, philox.generator(0))
    assert patches.cut(image, patch, settings).size == (32, 32)
    whole = PatchSettings("none", 32, 64, 16)
    assert patches.cut(image, patches.draw_patch(image.size, 0.4, whole, philox.generator(0)), whole).size == (64, 64)
    assert 0 < patches.coverage([patch], image.size) <= 1


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (("dynamic", 100, 512, 16), "nearest is 96"),
        (("dynamic", 256, 500, 16), "nearest is 496"),
        (("dynamic", 512, 256, 16), "must not be above"),
        (("spiral", 256, 512, 16), "spiral"),
        (("dynamic", 0, 512, 16), "nearest is 16"),
    ],
)
def test_patch_settings_that_cannot_be_are_refused(values, match):
    with pytest.raises(UserError, match=match):
        PatchSettings(*values)


def test_equation_three_is_exact_while_nothing_has_changed():
    first, last = (
        Tokens(mx.array(philox.normal(0, i, shape=(2, 3))), mx.array(philox.normal(1, i, shape=(2, 3)))) for i in (0, 1)
    )
    crossed = residuals.cross(first, last, first)
    assert same_bits(crossed.image, last.image)
    assert same_bits(crossed.text, last.text)
    moved = residuals.cross(first, last, Tokens(first.image + 1, first.text))
    assert np.allclose(np.array(moved.image), np.array(last.image + 1), atol=1e-6)
    text_dropped = residuals.cross(Tokens(first.image), Tokens(last.image), first)
    assert same_bits(text_dropped.text, first.text)


def test_the_trailing_run_keeps_image_tokens_only():
    plan = SkipPlan(12, ((0, 2), (4, 6), (10, 12)))
    assert residuals.boundaries(plan, "base") == {
        2: ["entry"], 4: ["run4.start"], 6: ["run4.stop"], 10: ["run10.start"], 12: ["run10.stop"],
    }  # fmt: skip
    assert residuals.boundaries(plan, "none") == {0: ["entry"]}
    assert [residuals.keeps_text(plan, b) for b in (2, 4, 6, 10, 12)] == [True, True, True, False, False]


def test_masks_name_their_blocks():
    assert masking.image_to_text([3, 1]) == {3: IMAGE_TO_TEXT, 1: IMAGE_TO_TEXT}
    assert masking.image_to_text([]) == {}
