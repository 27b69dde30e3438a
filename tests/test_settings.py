"""Every setting of every command: each number has a range, and what is outside of it is refused, whoever gives it."""

import importlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlx_blockskip import settings as every
from mlx_blockskip.cli import app
from mlx_blockskip.commands import COMMANDS, TASKS
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.ranges import Range, Sizes, range_in, written
from mlx_blockskip.models.defaults import ModelDefaults
from mlx_blockskip.options import PATHS, Settings, changed, flag, from_mapping, merge, options_of

SETTINGS = [(name, field, get_type_hints(cls, include_extras=True)[field.name]) for name, cls in COMMANDS.items()
            for field in options_of(cls)]  # fmt: skip
RANGED = [(name, field.name, range_in(hint), hint) for name, field, hint in SETTINGS if range_in(hint)]
IDS = [f"{name}-{field}" for name, field, _, _ in RANGED]
NAN, INF = math.nan, math.inf


def holds(hint, *kinds):
    """Whether a type is one of these, through all that is around it."""
    return hint in kinds or any(holds(part, *kinds) for part in getattr(hint, "__args__", ()))


def outside(allowed, hint):
    """Values beyond both ends, and those that are no numbers."""
    if isinstance(allowed, Sizes):
        low = [] if allowed.least == 0 else [str(int(allowed.least) - 1)]
        return [*low, "-1", "-1GB", str(int(allowed.most) + 1), "9" * 400, "nan", "inf", "", "much", "1e9"]
    low = allowed.least if allowed.above else allowed.least - 1
    high = allowed.most if allowed.below else allowed.most + 1
    whole = holds(hint, int)
    return [int(low), int(high), -(10**30), 10**400] if whole else [low, high, 10**400, NAN, INF, -INF, "nan", "-inf"]


def inside(allowed):
    """The ends of a range."""
    if isinstance(allowed, Sizes):
        return [*allowed.words, written(int(allowed.most)), str(int(allowed.least))]
    ends = [] if allowed.above else [allowed.least]
    return [*ends, allowed.most / 2, *([] if allowed.below else [allowed.most])]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range_or_choices(name):
    cls = COMMANDS[name]
    assert issubclass(cls, Settings)
    for field, hint in ((f, h) for n, f, h in SETTINGS if n == name):
        if holds(hint, int, float) and not field.metadata["choices"]:
            assert range_in(hint), field.name
    sizes = ("budget", "limit", "memory")
    assert all(range_in(h) for n, f, h in SETTINGS if n == name and f.name.endswith(sizes) and f.name != "trace_memory")


def test_a_models_own_defaults_have_the_ranges_of_the_settings_of_their_names():
    hints = get_type_hints(ModelDefaults, include_extras=True)
    of_settings = {}
    for name in ("estimate", "generate", "train"):
        of_settings |= {field: allowed for command, field, allowed, _ in RANGED if command == name}
    shared = [field.name for field in fields(ModelDefaults) if holds(hints[field.name], int, float)]
    assert len(shared) > 12
    for name in shared:
        assert range_in(hints[name]) == of_settings[name.replace("train_guidance", "guidance")], name


@pytest.mark.parametrize(("command", "name", "allowed", "hint"), RANGED, ids=IDS)
def test_what_is_outside_is_refused_by_name_value_and_range(command, name, allowed, hint, tmp_path):
    cls = COMMANDS[command]
    for value in outside(allowed, hint):
        said = []
        for make in (
            lambda value=value: cls(**{name: value}),
            lambda value=value: from_mapping(cls, {name.replace("_", "-"): value}),
            lambda value=value: replace(cls(), **{name: value}),
            lambda value=value: changed(cls(), **{name: value}),
        ):
            with pytest.raises(UserError) as caught:
                make()
            said.append(str(caught.value))
        assert len(set(said)) == 1
        assert said[0].startswith((f"{flag(name)} ", f"{flag(name)}: ")), said[0]
        assert str(allowed) in said[0] or "write it as 2GB" in said[0] or "is not a" in said[0]
        assert len(said[0]) < 250
    if isinstance(value, float):
        (tmp_path / "c.yaml").write_text(f"{name}: .nan")
        with pytest.raises(UserError, match=f"^{flag(name)} nan: must be"):
            merge(cls, str(tmp_path / "c.yaml"), {})
    for value in inside(allowed):
        cls(**{name: value} if not holds(hint, int) else {name: int(value)})


@pytest.fixture
def idle(monkeypatch):
    """Commands that do nothing; holds the settings that they got."""
    got = []
    for name, module in TASKS.items():
        monkeypatch.setattr(importlib.import_module(module), name, got.append)
    monkeypatch.setattr("mlx_blockskip.cli.REPORTS", ())
    return got


def test_the_command_line_refuses_the_same(idle):
    for command, name, allowed, hint in RANGED:
        value = str(outside(allowed, hint)[-1])[:40]
        result = CliRunner().invoke(app, [command, flag(name), value])
        assert result.exit_code == 1, (command, name, value, result.output)
        assert result.output.startswith(f"mlx-blockskip: {flag(name)}"), result.output
        assert "Traceback" not in result.output
    assert not idle


def test_what_equals_the_default_is_given_too(idle):
    CliRunner().invoke(app, ["generate", "--seed", "0", "--n-images", "1", "--output", "out.png"])
    CliRunner().invoke(app, ["generate", "--prompt", "a"])
    assert [sorted(one.given) for one in idle] == [["n_images", "output", "seed"], ["prompt"]]
    assert changed(idle[0], seed=3).given == idle[0].given
    assert every.GenerateSettings("flux", seed=0).given == {"model", "seed"}


def test_what_is_assigned_later_counts_and_is_checked():
    made = every.TrainSettings(seed=0)
    made.rank = 8
    assert changed(made, iters=3) == every.TrainSettings(seed=0, rank=8, iters=3)
    made.rank = 0
    with pytest.raises(UserError, match="--rank 0: must be"):
        changed(made)


def test_settings_go_to_json_and_back_with_every_default():
    for cls in COMMANDS.values():
        made = cls()
        kept = json.loads(json.dumps({field.name: getattr(made, field.name) for field in options_of(cls)}))
        assert from_mapping(cls, {key: value for key, value in kept.items() if value != ""}) == made


def test_paths_are_settings():
    assert set(PATHS) <= {field.name for _, field, _ in SETTINGS}


def test_the_options_page_has_every_range():
    page = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")
    rows = dict(line.strip("| ").split(" | ")[:2] for line in page.split("## What numbers may be")[1].splitlines()
                if line.startswith("| `"))  # fmt: skip
    written_there = {name: text for names, text in rows.items() for name in names.replace("`", "").split(", ")}
    for _, name, allowed, _ in RANGED:
        assert str(allowed) in written_there[flag(name)], name


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.lists(st.one_of(st.floats(), st.integers(), st.text(max_size=4)), max_size=3), st.binary(max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2), st.dates(),
)  # fmt: skip


@how(max_examples=60)
@given(st.sampled_from(list(COMMANDS.values())), st.data())
def test_whatever_is_given_is_settings_within_their_ranges_or_one_sentence(cls, data):
    names = [field.name for field in options_of(cls)]
    mapping = data.draw(st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=3)), ANYTHING, max_size=4))
    try:
        made = from_mapping(cls, mapping)
    except UserError as error:
        assert 0 < len(str(error)) < 400
        return
    assert made.given == set(mapping)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        allowed, value = range_in(hint), getattr(made, name)
        for one in value if isinstance(value, list) else [value]:
            if allowed and one is not None:
                assert isinstance(allowed, Sizes) or one in allowed
            assert not isinstance(one, float) or math.isfinite(one)


WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
AS_WORDS = st.one_of(
    WORDS, st.integers().map(str), st.floats().map(str), st.sampled_from(["nan", "-inf", "1e999", "0x1"])
)


@how(max_examples=60)
@given(st.sampled_from(SETTINGS), AS_WORDS)
def test_whatever_is_typed_is_taken_or_one_sentence(setting, word):
    command, field, _ = setting
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_blockskip.cli.REPORTS", ())
        patch.setattr("mlx_blockskip.cli.function_of", lambda name: lambda settings: None)
        option = [word] if field.metadata["positional"] else [f"{flag(field.name)}={word}"]
        result = CliRunner().invoke(app, [command, *option])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    assert (result.exit_code == 1) <= result.output.startswith("mlx-blockskip: ")


def test_a_range_says_what_it_takes():
    assert str(Range(1, 8)) == "at least 1 and at most 8"
    assert str(Range(0, 1, above=True, below=True)) == "above 0 and below 1"
    assert str(Sizes(0, 2**50)) == "at least 0 and at most 1024TB"
    assert [value in Range(0, 1, above=True) for value in (0, 0.5, 1, 1.1, NAN, INF)] == [
        False,
        True,
        True,
        *[False] * 3,
    ]
