"""`cache list` and `cache clear`: what the tool converted for itself, and nothing else."""

import os
import time

import pytest
from typer.testing import CliRunner

from mlx_blockskip import cache
from mlx_blockskip.cli import app
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Table
from mlx_blockskip.settings import CacheSettings
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint import cache as task
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory, resolve
from support.tasks import drive

DAY = 86400


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache with two conversions, one of 40 days ago, and what is not ours."""
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path / "cache"))
    directory = cache_directory()
    for name, days in (("old-bfloat16-0123456789ab", 40), ("new-float32-0123456789ab", 0)):
        files.write_json(directory / name / "config.json", {"format": 1, "source": f"someone/{name[:3]}@abc"})
        (directory / name / "block-000.safetensors").write_bytes(bytes(3 << 20))
        (directory / f"{name}.lock").touch()
        os.utime(directory / name, times=(time.time() - days * DAY,) * 2)
    for name in ("mine", "hf"):
        (directory / name).mkdir()
        (directory / name / "notes.txt").write_text("mine")
    (directory / "hf" / "config.json").write_text('{"model_type": "clip"}')
    (directory / ".left.x1.tmp").mkdir()
    (directory / "commits.json").write_text("{}")
    (directory / "link").symlink_to(directory / "new-float32-0123456789ab")
    return directory


def names(directory):
    return {path.name for path in directory.iterdir() if not path.name.endswith(".lock")}


FOREIGN = {"mine", "hf", ".left.x1.tmp", "commits.json", "link"}
OLD, NEW = "old-bfloat16-0123456789ab", "new-float32-0123456789ab"


def test_conversions_are_listed_with_size_age_and_source(kept):
    _, (table,) = drive(task.cache, CacheSettings())
    assert isinstance(table, Table)
    assert table.rows == (
        (NEW, "3.0 MiB", "today", "someone/new@abc"),
        (OLD, "3.0 MiB", "40 days ago", "someone/old@abc"),
    )
    assert "6.0 MiB" in table.title


def test_all_are_cleared_and_nothing_else(kept):
    drive(task.cache, CacheSettings("clear"))
    assert names(kept) == FOREIGN
    assert not list(kept.glob("*.lock"))
    _, (note,) = drive(task.cache, CacheSettings())
    assert isinstance(note, Note)


def test_only_what_is_named_or_old_is_cleared(kept):
    drive(task.cache, CacheSettings("clear", older_than=41))
    assert names(kept) == FOREIGN | {OLD, NEW}
    drive(task.cache, CacheSettings("clear", [NEW], older_than=30))
    assert names(kept) == FOREIGN | {OLD, NEW}
    drive(task.cache, CacheSettings("clear", older_than=30))
    assert names(kept) == FOREIGN | {NEW}
    drive(task.cache, CacheSettings("clear", [NEW]))
    assert names(kept) == FOREIGN


def test_what_a_killed_conversion_left_is_cleared_too(kept):
    (kept / f".{OLD}.x2.blockskip-tmp").mkdir()
    _, (table,) = drive(task.cache, CacheSettings())
    assert (f".{OLD}.x2.blockskip-tmp", "a conversion that was killed") in {(row[0], row[-1]) for row in table.rows}
    drive(task.cache, CacheSettings("clear"))
    assert names(kept) == FOREIGN


def test_what_is_being_made_is_left_alone(kept):
    with alone(kept / f"{OLD}.lock"), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        drive(task.cache, CacheSettings("clear", [OLD]))
    assert OLD in names(kept)


def test_a_wrong_name_or_age_is_named(kept):
    for name in ("mine", "../cache", "link", ""):
        with pytest.raises(UserError, match="is no conversion in"):
            drive(task.cache, CacheSettings("clear", [name]))
    with pytest.raises(UserError, match="--older-than -1"):
        drive(task.cache, CacheSettings("clear", older_than=-1.0))
    assert names(kept) == FOREIGN | {OLD, NEW}


def test_using_a_conversion_makes_it_young_again(kept):
    path = resolve("tiny-flux")
    os.utime(path, times=(0, 0))
    assert resolve("tiny-flux") == path
    (found,) = [one for one in cache() if one.path == path]
    assert found.age < DAY
    assert found.source == "tiny-flux"


@pytest.mark.parametrize("arguments", [[], ["list"], ["list", "--older-than", "1"], ["clear", OLD], ["clear"]])
def test_the_command_line(kept, arguments):
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == 0, result.output
    assert (OLD in names(kept)) == ("clear" not in arguments)
    assert (OLD in result.output) == ("clear" not in arguments)


def test_an_unknown_action_is_named(kept):
    result = CliRunner().invoke(app, ["cache", "remove"])
    assert result.exit_code == 1
    assert "'remove' is not one of list, clear" in result.output
