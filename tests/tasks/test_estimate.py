import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from mlx_blockskip import estimate
from mlx_blockskip.cli import app
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Table
from mlx_blockskip.tasks import estimate as task
from support.models import assets

QUICK = {"iters": 20, "batch_size": 1, "train_resolution": 32, "resolution": 32, "width": 64, "height": 64, "steps": 2}


@pytest.fixture(scope="module")
def told():
    events = []
    return estimate(model="tiny-flux", memory="8GB", **QUICK, on_event=events.append), events


def test_a_row_for_every_precision_and_ratio(told):
    rows, events = told
    assert [(row.precision, row.ratio) for row in rows] == [(p, r) for p in task.PRECISIONS for r in task.RATIOS]
    assert [len(event.rows) for event in events if isinstance(event, Table)] == [12, 12]
    assert [phase.name for phase in rows[0].phases] == [
        *("encode prompts", "encode images", "precompute", "train", "generate", "decode")
    ]
    for row in rows:
        assert row.seconds > 0
        assert row.hours > 0
        assert row.cache_bytes > 0


def test_what_must_shrink_shrinks(told):
    rows, _ = told
    by = {(row.precision, row.ratio): row for row in rows}
    for ratio in task.RATIOS:
        sizes = [by[precision, ratio].model_bytes for precision in task.PRECISIONS]
        assert sizes == sorted(sizes, reverse=True)
    for precision in task.PRECISIONS:
        train = [next(p for p in by[precision, ratio].phases if p.name == "train") for ratio in task.RATIOS]
        # between them it depends on the plan: the model's own for 40 % retains one double block more than for 30 %
        for of in ("read", "seconds"):
            values = [getattr(p, of) for p in train]
            assert values[0] == max(values) > min(values) == values[-1]


def test_the_size_is_that_of_the_converted_model(told, tmp_path):
    from mlx_blockskip import convert

    path = convert(hf_path=str(assets() / "tiny-flux"), mlx_path=str(tmp_path / "m"), quantize=True, dtype="bfloat16")
    on_disk = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    assert told[0][8].model_bytes == pytest.approx(on_disk, rel=0.02)  # but for headers


def test_the_finest_precision_that_fits_is_recommended(told):
    rows, events = told
    assert any("--dtype bfloat16" in event.message for event in events if isinstance(event, Note))
    heavy = [replace(row, phases=(replace(row.phases[0], peak=n),)) for n, row in zip((90, 90, 50, 40), rows[::3])]
    assert task.recommended(heavy, 60) is heavy[2]
    assert task.recommended(heavy, 55) is heavy[3], "it has to fit with the margin"
    assert task.recommended(heavy, 30) is None


def test_too_little_memory_names_the_least():
    events = []
    estimate(model="tiny-flux", memory="1MB", **QUICK, on_event=events.append)
    assert any(
        "nothing fits" in event.message and "GiB with" in event.message for event in events if isinstance(event, Note)
    )


@pytest.mark.parametrize("name", ["flux1-dev", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev"])
def test_known_checkpoints_need_no_download(name):
    subject = task.find(name)
    assert subject.configs["transformer"]["num_single_layers"] == 38
    assert subject.defaults["guidance"] == 3.5


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *(("flux1-schnell", 4), ("FLUX.1-schnell", 4), ("sana-sprint-1.6b", 2)),
        *(("flux2-klein-4b", 4), ("FLUX.2-klein-9B", 4), ("black-forest-labs/FLUX.2-klein-base-4B", 50)),
        *((name, 20) for name in ("sana-0.6b", "sana-1.6b", "sana1.5-1.6b", "SANA1.5-4.8B")),
    ],
)
def test_every_preset_is_found_by_its_name(name, steps):
    subject = task.find(name)
    assert subject.defaults["steps"] == steps
    assert {"transformer", "text_encoder", "vae", "scheduler"} <= set(subject.configs)
    assert (subject.beside / "tokenizer").is_dir()


def test_directories_of_both_layouts(tiny_flux):
    theirs, ours = task.find(str(assets() / "tiny-flux")), task.find(str(tiny_flux))
    assert theirs.configs == ours.configs
    assert theirs.defaults == ours.defaults


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "owner/else"}, "not one of flux1-dev"),
        ({"memory": "0"}, "--memory 0"),
        ({"memory": "lots"}, "not a size"),
    ],
)
def test_bad_input_is_one_clear_error(options, match):
    with pytest.raises(UserError, match=match):
        estimate(**options)


def test_tables_are_drawn_as_text_and_as_json():
    flags = [part for key, value in QUICK.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    plain = CliRunner().invoke(app, ["estimate", "--memory", "2GB", *flags])
    assert plain.exit_code == 0
    assert "| weights | skipped |" in plain.output
    found = CliRunner().invoke(app, ["estimate", "--memory", "2GB", "--json", *flags])
    records = [json.loads(line) for line in found.output.splitlines()]
    assert [len(record["rows"]) for record in records if record["event"] == "table"] == [12, 12]
