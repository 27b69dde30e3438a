import dataclasses
import json
import re

import pytest

from mlx_blockskip.blockskip.plan import SkipPlan, choose, from_json, from_selection
from mlx_blockskip.engine.errors import UserError


def test_the_papers_case_skips_both_ends():
    plan = SkipPlan.ends(3, 2, 10)
    assert plan.runs == ((0, 3), (8, 10))
    assert plan.retained == (3, 4, 5, 6, 7)
    assert (plan.n, plan.m, plan.k) == (3, 2, 5)
    assert plan.later == ((8, 10),)


@pytest.mark.parametrize(
    ("runs", "n", "m", "later"),
    [
        ((), 0, 0, ()),
        (((0, 4),), 4, 0, ()),
        (((6, 10),), 0, 4, ((6, 10),)),
        (((2, 4),), 0, 0, ((2, 4),)),
        (((0, 1), (3, 5), (9, 10)), 1, 1, ((3, 5), (9, 10))),
    ],
)
def test_leading_trailing_and_inner_runs_are_told_apart(runs, n, m, later):
    plan = SkipPlan(10, runs)
    assert (plan.n, plan.m, plan.later) == (n, m, later)
    assert plan.k + len(plan.retained) == 10
    assert not {b for start, stop in runs for b in range(start, stop)} & set(plan.retained)


def test_runs_are_sorted_merged_and_the_empty_ones_dropped():
    assert SkipPlan(10, ((5, 7), (0, 2), (2, 3), (4, 4), (7, 8))).runs == ((0, 3), (5, 8))
    assert SkipPlan(10, ((0, 0), (10, 10))).runs == ()


def test_plans_are_values():
    assert SkipPlan(10, ((5, 7), (0, 2)), "a") == SkipPlan(10, ((0, 2), (5, 7)), "a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SkipPlan(10, ()).depth = 3


@pytest.mark.parametrize(
    ("ratio", "depth", "n", "m"),
    [
        (0.5, 57, 15, 14),  # k = floor(28.5 + 0.5) = 29
        (0.3, 57, 9, 8),
        (0.4, 57, 12, 11),
        (0.5, 6, 2, 1),
        (0.5, 8, 2, 2),
        (0.0, 8, 0, 0),
        (0.05, 8, 0, 0),
        (0.99, 57, 28, 28),
    ],
)
def test_a_ratio_is_split_evenly_and_recorded_as_such(ratio, depth, n, m):
    plan = SkipPlan.from_ratio(ratio, depth)
    assert (plan.n, plan.m) == (n, m)
    assert plan.source == f"even split of ratio {ratio:g}"


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 50, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(UserError, match=r"--skip-ratio .*: must be at least 0 and below 1"):
        SkipPlan.from_ratio(ratio, 8)


def test_a_ratio_that_leaves_no_block_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"--skip-ratio 0\.99: skips all 8 blocks"):
        SkipPlan.from_ratio(0.99, 8)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (((0, 11),), "blocks 0 to 11 are not within the model's 10 blocks"),
        (((-1, 2),), "not within"),
        (((5, 3),), "not within"),
        (((0, 4), (3, 6)), "overlap"),
        (((0, 4), (0, 4)), "overlap"),
        (((0, 10),), "all 10 blocks are skipped"),
        (((0, 5), (5, 10)), "all 10 blocks are skipped"),
    ],
)
def test_runs_that_make_no_plan_are_refused(runs, message):
    with pytest.raises(UserError, match=message):
        SkipPlan(10, runs)


@pytest.mark.parametrize(
    ("n", "m", "message"), [(-1, 0, "at least 0"), (0, -1, "at least 0"), (5, 5, "leave"), (9, 9, "leave")]
)
def test_ends_that_make_no_plan_are_refused(n, m, message):
    with pytest.raises(UserError, match=f"n = {n} and m = {m}.*{message}"):
        SkipPlan.ends(n, m, 10)


def test_a_plan_says_what_it_skips():
    assert str(SkipPlan.ends(5, 1, 12)) == "6 of 12 blocks skipped (0-4, 11-11; n = 5, m = 1)"
    assert str(SkipPlan(12, ())) == "none of 12 blocks skipped"


def test_json_and_back_is_the_same_plan():
    for plan in (SkipPlan(10, ((0, 1), (3, 5), (9, 10)), "p.json"), SkipPlan(10, (), "p.json")):
        assert from_json(json.loads(json.dumps(plan.to_json())), 10, "p.json") == plan


def test_n_and_m_are_a_plan_with_and_without_the_depth():
    expected = SkipPlan(10, ((0, 3), (8, 10)), "p.json")
    assert from_json({"n": 3, "m": 2}, 10, "p.json") == expected
    assert from_json({"n": 3, "m": 2, "depth": 10}, 10, "p.json") == expected


@pytest.mark.parametrize("value", [{"depth": 9, "runs": [[0, 2]]}, {"n": 1, "m": 1, "depth": 9}])
def test_a_plan_for_another_depth_is_refused(value):
    with pytest.raises(UserError, match=r"^p\.json: is for a model of 9 blocks, and this one has 8$"):
        from_json(value, 8, "p.json")


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "n",
        [],
        {},
        {"n": 3},
        {"m": 3},
        {"n": "3", "m": "2"},
        {"n": 1.5, "m": 1},
        {"depth": 8},
        {"runs": [[0, 2]]},
        {"depth": 8, "runs": 5},
        {"depth": 8, "runs": [5]},
        {"depth": 8, "runs": [[0, 1, 2]]},
        {"depth": 8, "runs": [[0, 2.7]]},
        {"depth": 8, "runs": [[0, float("inf")]]},
        {"depth": None, "runs": []},
    ],
)
def test_json_that_is_no_plan_is_refused_with_what_to_write(value):
    with pytest.raises(UserError, match=r"^p\.json: not a skip plan; write .*\"depth\": 8"):
        from_json(value, 8, "p.json")


@pytest.mark.parametrize("value", [{"n": 5, "m": 9}, {"depth": 8, "runs": [[0, 9]]}, {"depth": 8, "runs": [[0, 8]]}])
def test_a_plan_that_does_not_fit_names_its_file(value):
    with pytest.raises(UserError, match=r"^p\.json: skip plan: "):
        from_json(value, 8, "p.json")


def test_the_plan_is_chosen_from_what_is_given(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"depth": 8, "runs": [[2, 3]]}))
    assert choose(8, file=str(path)) == SkipPlan(8, ((2, 3),), str(path))
    assert choose(8, first=5, last=1) == SkipPlan.ends(5, 1, 8)
    assert choose(8, first=5) == SkipPlan.ends(5, 0, 8)
    assert choose(8, last=1) == SkipPlan.ends(0, 1, 8)
    assert choose(8, ratio=0.25) == SkipPlan.from_ratio(0.25, 8)
    assert choose(8, ratio=0.0).runs == ()
    assert choose(8, first=0, last=0).runs == ()
    assert choose(8) == SkipPlan.from_ratio(0.5, 8)
    assert choose(8) == SkipPlan.from_ratio(0.5, 8)


def test_a_plan_that_the_model_records_wins_over_the_even_split_of_its_ratio_only():
    recorded = {"0.5": {"n": 3, "m": 1}}
    assert choose(8, ratio=0.5, recorded=recorded) == SkipPlan.ends(3, 1, 8, "the model's plan for 0.5")
    assert choose(8, recorded=recorded).n == 3
    assert choose(8, ratio=0.25, recorded=recorded) == SkipPlan.from_ratio(0.25, 8)
    assert choose(8, first=1, recorded=recorded) == SkipPlan.ends(1, 0, 8)


SELECTION = {"depth": 8, "plans": {"2": {"n": 2, "m": 0}, "4": {"n": 1, "m": 3}}}


def test_a_selection_gives_its_plan_of_the_ratio(tmp_path):
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(SELECTION))
    assert choose(8, file=str(path)) == SkipPlan.ends(1, 3, 8, str(path)), "of a half, where none is given"
    assert choose(8, ratio=0.25, file=str(path)) == SkipPlan.ends(2, 0, 8, str(path))
    assert choose(8, ratio=0.0, file=str(path)) == SkipPlan(8, (), str(path))


@pytest.mark.parametrize(
    ("value", "ratio", "message"),
    [
        (SELECTION, 0.4, "has no plan for 3 of 8 blocks (ratio 0.4)"),
        (SELECTION | {"depth": 9}, 0.5, "is for a model of 9 blocks, and this one has 8"),
        ({"depth": 8, "plans": [[1, 3]]}, 0.5, "its `plans` are not by number of blocks"),
        (SELECTION | {"plans": {"4": {"n": 1}}}, 0.5, "not a skip plan"),
        (SELECTION | {"plans": {"4": {"n": 9, "m": 1}}}, 0.5, "skip plan: n = 9 and m = 1"),
    ],
)
def test_a_selection_without_the_plan_that_is_asked_for_is_refused_by_its_file(value, ratio, message):
    with pytest.raises(UserError, match=rf"^s\.json: {re.escape(message)}"):
        from_selection(value, ratio, 8, "s.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.0, "first": 0}, "--skip-ratio and --skip-first/--skip-last: give only one"),
        ({"last": 1, "file": "p.json"}, "--skip-first/--skip-last and --plan: give only one"),
        ({"ratio": 0.5, "first": 1, "last": 1, "file": "p.json"}, "--skip-ratio and .* and --plan: give only one"),
    ],
)
def test_ways_of_giving_a_plan_exclude_each_other(given, message):
    with pytest.raises(UserError, match=message):
        choose(8, **given)


def test_a_ratio_does_not_go_with_a_file_of_a_single_plan(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"depth": 8, "runs": [[2, 3]]}))
    with pytest.raises(UserError, match="--skip-ratio and --plan: .*give only one"):
        choose(8, ratio=0.5, file=str(path))


@pytest.mark.parametrize("text", [None, "", "{", "[1, 2"])
def test_a_plan_file_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"plan\.json"):
        choose(8, file=str(path))
