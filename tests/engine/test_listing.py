"""Hidden files, placeholders of iCloud, and names that a Mac takes for one."""

import unicodedata
from pathlib import Path

import pytest

from mlx_blockskip.engine import listing
from mlx_blockskip.engine.listing import alike


def test_hidden_files_are_not_listed_nor_what_is_in_hidden_directories(tmp_path):
    root = tmp_path / ".cache"
    for name in ("b.bin", "a.bin", "._a.bin", "c.txt", "in/d.bin", "in/._d.bin", ".in/e.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert [p.name for p in listing.visible(root, "*.bin")] == ["a.bin", "b.bin"]
    assert [p.name for p in listing.visible(root, "**/*.bin")] == ["a.bin", "b.bin", "d.bin"]
    assert listing.visible(root, "*/*.bin") == [root / "in" / "d.bin"]
    assert [p.name for p in listing.visible(root)] == ["a.bin", "b.bin", "c.txt", "in"]


def test_what_only_has_a_placeholder_is_awaited_under_its_own_name(tmp_path):
    for name in (".a.jpg.icloud", ".here.jpg.icloud", "here.jpg", ".icloud", "x.icloud", ".hidden"):
        (tmp_path / name).touch()
    assert listing.awaited(tmp_path) == [tmp_path / "a.jpg"]
    assert listing.in_icloud(tmp_path / "a.jpg")
    assert not listing.in_icloud(tmp_path / "here.jpg")
    assert not listing.in_icloud(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("other", ["Caf\u00e9.jpg", "Cafe\u0301.jpg", "CAF\u00c9.JPG", "cafE\u0301.jpg"])
def test_case_and_the_form_of_accents_make_no_other_name(other):
    assert alike(other) == alike("caf\u00e9.jpg")
    assert alike(other) not in (alike("cafe.jpg"), alike("caf\u00e9.jpeg"))
    assert alike(unicodedata.normalize("NFD", "\u0390 \u1f80 \u01f0")) == alike("\u0390 \u1f80 \u01f0")


def test_a_name_of_its_own_goes_before_one_that_is_alike():
    paths = [Path(name) for name in ("A.txt", "B.txt", "a.txt")]
    known = listing.by_spelling(paths)
    assert [str(listing.spelled(Path(n), known)) for n in ("a.txt", "A.txt", "A.TXT", "b.txt", "c.txt")] == [
        "a.txt", "A.txt", "a.txt", "B.txt", "c.txt",
    ]  # fmt: skip
