"""What examples/bench/mutants.py changes, and what it leaves alone."""

import re
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "examples" / "bench"

SOURCE = '''"""A module of 3 lines."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 5


def f(x: "int | 4", n: int = 2, how: str = "a", *, on: bool = True) -> "tuple[1]":
    """Not 7."""
    assert x > 8
    if not x or n < 3 and x != n:
        raise ValueError(f"{x + 9} is too large", 10)
    print(x, end="")
    x += é[n]
    return min(x - 1, n) if on else -x
'''

CHANGES = {
    'how: str = "a"': "how: str = 'another'",
    "on: bool = True": "on: bool = False",
    "n: int = 2": "n: int = 3",
    "if not x or": "if (x) or",
    "or n < 3": "and n < 3",
    "n < 3": "n <= 3",
    "3 and x": "3 or x",
    "x != n": "x == n",
    'print(x, end="")': "pass",
    ', end=""': "",
    "x += ": "x -= ",
    "é[n]": "é[n + 1]",
    "return min(x - 1, n) if on else -x": "return None",
    "min(x - 1, n) if on else -x": "(-x)",
    "min": "max",
    "x - 1": "x + 1",
    "- 1": "- 2",
    "-x": "x",
}


@pytest.fixture(scope="module", autouse=True)
def _bench():
    sys.path.append(str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def test_every_kind_of_change_is_made_by_itself():
    from mutants import Finder

    made = {mutant.source(SOURCE.encode()).decode() for mutant in Finder("a.py", SOURCE.encode()).all()}
    assert SOURCE not in made
    for before, after in CHANGES.items():
        assert SOURCE.count(before) == 1, before
        assert SOURCE.replace(before, after) in made, (before, after)


def test_sentences_annotations_and_what_is_for_mypy_alone_are_left():
    from mutants import Finder

    kept = ("of 3 lines", "LIMIT = 5", '"int | 4"', '"tuple[1]"', "Not 7", "assert x > 8", '{x + 9} is too large", 10')
    for mutant in Finder("a.py", SOURCE.encode()).all():
        changed = mutant.source(SOURCE.encode()).decode()
        assert all(text in changed for text in kept), mutant
        assert mutant.line(SOURCE.encode()) >= 8
        assert "\n" not in mutant.difference(SOURCE.encode())


def test_mutants_are_drawn_evenly_and_more_of_them_hold_the_fewer():
    from mutants import sample

    files = ["mlx_blockskip/blockskip/patches.py", "mlx_blockskip/blockskip/masking.py", "mlx_blockskip/lora.py"]
    few, many = sample(files, 30, 0), sample(files, 60, 0)
    counts = [sum(mutant.file == file for mutant in few) for file in files]
    assert counts == [13, 4, 13], "one file has four in all"
    assert set(few) < set(many)
    assert sample(files, 30, 0) == few
    assert set(sample(files, 30, 1)) != set(few)


def test_every_file_that_is_changed_has_tests_that_are_there():
    from mutants import DEFAULT, ROOT, chosen, tests_of

    files = chosen(DEFAULT)
    assert len(files) > 10
    for file in files:
        assert tests_of(file)
        for path, words in ((path, words.split()) for path, _, words in (one.partition(":") for one in tests_of(file))):
            names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.MULTILINE)
            assert names
            assert all(any(word in name for name in names) for word in words), (file, words)


def test_of_a_files_tests_those_are_run_that_are_named():
    from mutants import LARGE, selection

    files, expression = selection(("tests/test_flow.py", "tests/tasks/test_train.py: plan_is_said not_finite"))
    assert files == ["tests/test_flow.py", "tests/tasks/test_train.py"]
    assert expression.startswith("(test_flow or plan_is_said or not_finite) and not tiny_")
    assert expression.count(" and not ") == len(LARGE)
