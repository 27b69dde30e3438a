"""What a configuration takes from a file: defaults, what is ignored, what is refused and in which words."""

from dataclasses import dataclass, replace
from typing import Annotated

import pytest

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import schedulers
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, Unset


@dataclass(frozen=True)
class Inner(Config):
    kind: Annotated[str, OneOf("plain")] = "plain"


@dataclass(frozen=True)
class Example(Config):
    width: PositiveInt
    depth: NonNegativeInt = 3
    eps: PositiveFloat = 1e-6
    act: Annotated[str | None, OneOf("silu", None)] = "silu"
    kinds: Annotated[str, OneOf("a", "b")] | tuple[Annotated[str, OneOf("a", "b")], ...] = "a"
    scales: tuple[tuple[PositiveInt, ...], ...] = ()
    bias: bool = False
    mean: Unset = None
    inner: Inner = Inner()
    sides: PositiveInt | tuple[PositiveInt, PositiveInt] = 1

    def contradiction(self) -> str | None:
        return "width and depth are the same" if self.width == self.depth else None


def test_what_is_left_out_is_the_default_and_what_is_unknown_is_ignored():
    config = Example.from_dict({"width": 4, "_class_name": "Example", "torch_dtype": "bfloat16", "dropout": 0.1})
    assert config == Example(4)
    assert (config.depth, config.eps, config.inner.kind) == (3, 1e-6, "plain")


def test_lists_become_tuples_and_whole_numbers_may_have_a_point():
    config = Example.from_dict({"width": 4.0, "kinds": ["a", "b"], "scales": [[], [3, 5]], "eps": 1})
    assert config == Example(4, kinds=("a", "b"), scales=((), (3, 5)), eps=1)
    assert isinstance(config.width, int)
    assert {config: 1}[config] == 1  # nothing in it can change


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "lacks width, which has no default; download the checkpoint again"),
        ({"width": "4"}, 'width is "4", where a whole number of at least 1 is needed; get the file again'),
        ({"width": 0}, "width is 0, where a whole number of at least 1 is needed"),
        ({"width": 4.5}, "width is 4.5, where a whole number of at least 1 is needed"),
        ({"width": True}, "width is true, where a whole number of at least 1 is needed"),
        ({"width": None}, "width is null, where a whole number of at least 1 is needed"),
        ({"width": 4, "depth": -1}, "depth is -1, where a whole number of at least 0 is needed"),
        ({"width": 4, "eps": 0}, "eps is 0, where a number above 0 is needed"),
        ({"width": 4, "eps": "1e-6"}, 'eps is "1e-6", where a number above 0 is needed'),
        ({"width": 4, "bias": 1}, "bias is 1, where true or false is needed"),
        ({"width": 4, "act": "relu"}, 'act="relu" is not implemented; choose a checkpoint with "silu" or null'),
        ({"width": 4, "act": 3}, "act is 3, where text or null is needed"),
        ({"width": 4, "kinds": ["a", "c"]}, 'kinds=["a", "c"] is not implemented; choose a checkpoint with "a" or "b"'),
        ({"width": 4, "kinds": 1}, "kinds is 1, where text or a list (each of it text) is needed"),
        (
            {"width": 4, "scales": [3]},
            "scales is [3], where a list (each of it a whole number of at least 1) is needed",
        ),
        ({"width": 4, "sides": [3]}, "sides is [3], where a whole number of at least 1 or a list of 2"),
        ({"width": 4, "mean": [0.5]}, "mean=[0.5] is not implemented; choose a checkpoint with null"),
        ({"width": 4, "inner": {"kind": "odd"}}, 'Inner: kind="odd" is not implemented'),
        ({"width": 4, "inner": "odd"}, 'inner is "odd", where an object is needed'),
        ({"width": 3}, "width and depth are the same; get the file again, or choose another checkpoint"),
        ([1], "holds a list, and an object is needed"),
        ({"width": 10**9}, "width is 1000000000, and 100000000 is the most of any network; get the file again"),
        ({"width": "x" * 300}, f'width is "{"x" * 199}..., where a whole number'),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence_with_the_file(tmp_path, given, sentence):
    files.write_json(tmp_path / "config.json", given)
    with pytest.raises(UserError) as caught:
        Example.read(tmp_path / "config.json")
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {sentence}")


def test_a_change_is_checked_too():
    with pytest.raises(UserError, match="depth is -1"):
        replace(Example(4), depth=-1)


def test_the_infinity_in_a_published_scheduler_is_read(tmp_path):
    """`lambda_min_clipped` of SANA's, which is not JSON."""
    (tmp_path / "scheduler").mkdir()
    text = '{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "use_flow_sigmas": true, '
    (tmp_path / "scheduler" / schedulers.FILE).write_text(text + '"prediction_type": "flow_prediction"}')
    assert isinstance(schedulers.read(tmp_path), schedulers.DPMSolverMultistepConfig)


def test_a_scheduler_option_is_refused_with_the_file(tmp_path):
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / schedulers.FILE
    for content, sentence in (
        ({"use_karras_sigmas": True}, "use_karras_sigmas=true is not implemented; use false or null"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler is not implemented; use a checkpoint with"),
        ([1], "holds a list, and an object is needed"),
    ):
        files.write_json(path, content)
        with pytest.raises(UserError) as caught:
            schedulers.read(tmp_path)
        assert str(caught.value).startswith(f"{path}: {sentence}")
