"""Only what this tool made is ever removed."""

import pytest

from mlx_blockskip.engine import owned
from mlx_blockskip.engine.errors import UserError

NAMES = ("*.png", "deep")


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_what_was_made_from_something_else_goes_and_the_rest_of_the_same_stays(tmp_path):
    path = tmp_path / "a"
    owned.begin(path, NAMES, {"seed": 1})
    (path / "1.png").touch()
    (path / "deep").mkdir()
    owned.begin(path, NAMES, {"seed": 1})
    assert names(path) == ["1.png", "deep", "made_from.json"]
    owned.begin(path, NAMES, {"seed": 2})
    assert names(path) == ["made_from.json"]


@pytest.mark.parametrize("name", ["1.png", "notes.txt", "made_from.json", "deep"])
def test_a_directory_of_the_users_is_refused_and_left_as_it_is(tmp_path, name):
    path = tmp_path / "cache"
    (path / "deep").mkdir(parents=True) if name == "deep" else path.mkdir()
    if name != "deep":
        (path / name).write_text("{}")
    with pytest.raises(UserError, match=f"cache: holds {name}, which mlx-blockskip did not make; move it elsewhere"):
        owned.begin(path, NAMES)
    owned.clear(path, NAMES)
    assert names(path) == [name]


def test_a_file_of_the_users_among_ours_is_refused_and_never_removed(tmp_path):
    owned.begin(tmp_path, NAMES)
    (tmp_path / "1.png").touch()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds mine\.txt"):
        owned.begin(tmp_path, NAMES, {"seed": 2})
    owned.clear(tmp_path, NAMES)
    assert names(tmp_path) == ["made_from.json", "mine.txt"]


def test_hidden_files_do_not_stand_in_the_way(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".DS_Store").touch()
    owned.begin(tmp_path / "a", NAMES)
    owned.clear(tmp_path / "a", NAMES)
    assert (tmp_path / "a" / ".DS_Store").exists()


def test_companions_go_with_what_is_removed_and_stand_in_no_ones_way(tmp_path):
    path = tmp_path / "a"
    owned.begin(path, NAMES, {"seed": 1})
    (path / "deep").mkdir()
    for name in ("1.png", "._1.png", "._deep", "._made_from.json", "deep/x", "deep/._x"):
        (path / name).touch()
    owned.begin(path, NAMES, {"seed": 1})
    owned.begin(path, NAMES, {"seed": 2})
    assert names(path) == ["._made_from.json", "made_from.json"]
    for name in ("2.png", "._2.png", "._3.png", "._mine.txt"):
        (path / name).touch()
    owned.clear(path, NAMES)
    assert names(path) == ["._made_from.json", "._mine.txt", "made_from.json"]
    (path / "._mine.txt").unlink()
    owned.clear(path, NAMES)
    assert not path.exists()


def test_an_empty_directory_is_taken_and_removed_when_it_is_empty_again(tmp_path):
    (tmp_path / "a").mkdir()
    owned.begin(tmp_path / "a", NAMES)
    owned.clear(tmp_path / "a", NAMES)
    assert not (tmp_path / "a").exists()


def test_a_link_inside_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo.png").touch()
    owned.begin(tmp_path / "a", NAMES)
    (tmp_path / "a" / "deep").symlink_to(tmp_path / "theirs")
    owned.clear(tmp_path / "a", NAMES)
    assert names(tmp_path / "theirs") == ["photo.png"]


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        owned.begin(tmp_path / "a", NAMES)
    assert (tmp_path / "a").read_text() == "mine"
