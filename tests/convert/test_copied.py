"""What is copied as it is: tokenizers in every form, and schedulers as JSON."""

import json
import shutil

import pytest

from mlx_blockskip import convert
from mlx_blockskip.converters import copied
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets, schedulers
from support.models import assets


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_a_published_scheduler_with_an_infinity_is_written_as_json_and_read_by_diffusers_as_before(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = presets.folders()["sana1.5-1.6b"] / "scheduler"
    assert "-Infinity" in (theirs / schedulers.FILE).read_text()
    source = shutil.copytree(assets() / "tiny-sana", tmp_path / "hf")
    shutil.copy(theirs / schedulers.FILE, source / "scheduler")
    path = convert(hf_path=str(source), mlx_path=str(tmp_path / "mlx"))
    text = (path / "scheduler" / schedulers.FILE).read_text()
    assert "lambda_min_clipped" not in json.loads(text, parse_constant=refuse)
    kinds = [diffusers.DPMSolverMultistepScheduler.from_pretrained(folder) for folder in (theirs, path / "scheduler")]
    assert kinds[0].config.lambda_min_clipped == kinds[1].config.lambda_min_clipped == float("-inf")
    assert schedulers.read(path) == schedulers.read(theirs.parent)


def test_a_file_that_is_json_is_copied_to_the_byte(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1.0,\n\n "b": [1e3]}')
    copied.copy_file(tmp_path / "a.json", tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    (tmp_path / "a.json").write_text('{"a": {"b": NaN, "c": [1]}, "d": Infinity, "e": "é"}', encoding="utf-8")
    copied.copy_file(tmp_path / "a.json", tmp_path / "b.json")
    assert files.read_json(tmp_path / "b.json") == {"a": {"c": [1]}, "e": "é"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"tokenizer.json": None},
            "has no tokenizer, neither tokenizer.json nor vocab.json with merges.txt",
        ),
        ({"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"}, "tokenizer.json: .*git lfs pull"),
        ({"tokenizer.json": None, ".tokenizer.json.icloud": b"bplist00"}, "tokenizer.json: is in iCloud"),
        ({"tokenizer.json": None, "vocab.json": b"{}"}, "has no tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused_before_weights_are_written(tmp_path, change, match):
    source = shutil.copytree(assets() / "tiny-flux", tmp_path / "hf")
    for name, content in change.items():
        if content is None:
            (source / "tokenizer_2" / name).unlink()
        else:
            (source / "tokenizer_2" / name).write_bytes(content)
    with pytest.raises(UserError, match=match):
        convert(hf_path=str(source), mlx_path=str(tmp_path / "mlx"))
