"""A YAML file of settings is read within bounds, whatever it holds."""

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from mlx_blockskip import yaml_files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.yaml_files import MOST_BYTES, read_yaml


def written(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "c.yaml")


def test_dates_and_times_are_text_and_numbers_numbers(tmp_path):
    text = "\ufeffprompt: [2024-01-01, 2024-01-01 10:00:00]\niters: 3\nlearning-rate: 1e-4\nresume: yes\nplan: ~\n"
    found = read_yaml(written(tmp_path, text))
    assert found["prompt"] == ["2024-01-01", "2024-01-01 10:00:00"]
    assert found == {**found, "iters": 3, "learning_rate": "1e-4", "resume": True, "plan": None}
    assert read_yaml(written(tmp_path, "")) == {}


def test_aliases_do_not_grow(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = written(tmp_path, "\n".join(lines))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"aliases \(\*name\) are not read"):
        read_yaml(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("part", ["[", "{a: ", "- ", "a\n", "'", "x: y\n", "? ", "&a ", "!!str ", "|\n", "\\"])
def test_the_largest_file_is_answered_soon(tmp_path, part, monkeypatch):
    monkeypatch.setattr(yaml_files, "MOST_BYTES", 16 << 10)  # a quarter
    path = written(tmp_path, (part * MOST_BYTES)[: 16 << 10])
    begun = time.process_time()
    with pytest.raises(UserError, match=r"c\.yaml: "):
        read_yaml(path)
    assert time.process_time() - begun < 3


@how(max_examples=60)
@given(st.one_of(st.text(max_size=40), st.text("[]{}&*!|>'\"%@`-:?#, \n\tab01.", max_size=40)))
def test_any_text_is_settings_or_one_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        assert isinstance(read_yaml(str(path)), dict)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
