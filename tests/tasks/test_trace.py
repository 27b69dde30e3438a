"""`--trace-memory`: what it writes, that it changes nothing, and that it writes however a run ends."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.compare import assert_same_adapter
from support.models import HEDGEHOG

from mlx_blockskip import generate, train
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import PhaseEnd, Saved, Step
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import GenerateSettings
from mlx_blockskip.tasks.memory import trace, trace_plot


def written(path):
    """The JSON beside `path`, after a look at the picture."""
    with Image.open(path.with_name(path.name + ".png")) as image:
        assert image.width == trace_plot.WIDTH
        assert len(image.getcolors(1 << 20)) > 5
    return json.loads(path.with_name(path.name + ".json").read_text())


def assert_explains(record, events):
    """Its phases are those of the events, and the highest point of each is the peak that was reported."""
    ends = [event for event in events if isinstance(event, PhaseEnd)]
    assert [phase["name"] for phase in record["phases"]] == [end.phase for end in ends]
    for index, (phase, end) in enumerate(zip(record["phases"], ends, strict=True)):
        own = [point for point in record["points"] if point["phase"] == index]
        assert max(point["peak_memory"] for point in own) == phase["peak_memory"] == end.peak_memory
        assert next(p for p in own if p["number"] == phase["highest"])["peak_memory"] == end.peak_memory
        assert (own[0]["what"], own[-1]["what"]) == ("start", "end")
    assert sorted(p["number"] for p in record["points"]) == list(range(1, len(record["points"]) + 1))


def visited(record, name):
    """(direction, block) of every visit in the phases of this name."""
    phases = [i for i, phase in enumerate(record["phases"]) if phase["name"] == name]
    return [(p["direction"], p["block"]) for p in record["points"] if p["what"] == "block" and p["phase"] in phases]


@pytest.mark.parametrize("budget", [None, "0"])
def test_a_training_run_is_explained_block_by_block(quick, tmp_path, budget):
    plain = quick("plain", iters=3, skip_first=1, skip_last=1, memory_budget=budget)
    events = []
    path = train(plain).adapter_path
    train(
        replace(plain, adapter_path=str(tmp_path / "b"), trace_memory=str(tmp_path / "new" / "m")),
        on_event=events.append,
    )
    assert_same_adapter(path, tmp_path / "b")
    record = written(tmp_path / "new" / "m")
    assert_explains(record, events)
    assert (record["task"], record["memory_budget"], record["stopped"]) == ("train", budget and 0, None)
    stack = open_model(Path(plain.model)).stack
    retained = range(1, stack.depth - 1)
    step = [*(("forward", b) for b in retained), *(("backward", b) for b in reversed(retained))]
    assert visited(record, "train") == 3 * step
    assert visited(record, "precompute")[: stack.depth - 1] == [("forward", b) for b in range(stack.depth - 1)]
    for point in record["points"]:
        if point["what"] == "block" and record["phases"][point["phase"] or 0]["name"] == "train":
            block = stack.blocks[point["block"]]
            assert (point["kind"], point["prefix"]) == (block.kind.name, block.prefix)
            assert point["weights"] > 0
    saved = [event.path for event in events if isinstance(event, Saved)]
    assert saved[-2:] == [tmp_path / "new" / "m.json", tmp_path / "new" / "m.png"]


def test_a_resumed_run_may_ask_for_a_timeline(quick, tmp_path):
    train(quick(iters=2))
    assert train(quick(iters=3, resume=True, trace_memory=str(tmp_path / "m.png"))).steps == 3
    assert written(tmp_path / "m")["phases"]


def test_an_image_and_its_settings_are_the_same(family_model, tmp_path):
    def make(name, **options):
        fixed = {"model": str(family_model), "prompt": ["a dog"], "steps": 2, "width": 64, "height": 64}
        (path,) = generate(**fixed, output=str(tmp_path / name), **options)
        return path

    events = []
    plain = make("a.png")
    traced = make("b.png", trace_memory=str(tmp_path / "m.json"), on_event=events.append)
    with Image.open(plain) as a, Image.open(traced) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert a.text == b.text
    record = written(tmp_path / "m")
    assert_explains(record, events)
    blocks = open_model(family_model).stack.blocks
    assert visited(record, "generate")[-len(blocks) :] == [("forward", block) for block in range(len(blocks))]
    ahead = {"modulation"} if any(block.kind.modulate for block in blocks) else set()
    assert {direction for direction, _ in visited(record, "generate")} == {"forward"} | ahead


def stopped(settings, at):
    """Events of a training run that is told to stop by Ctrl-C at a step."""
    events = []

    def press(event):
        events.append(event)
        if isinstance(event, Step) and event.phase == "train" and event.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_event=press)
    return events


def test_ctrl_c_still_writes(quick, tmp_path):
    events = stopped(quick(iters=50, trace_memory=str(tmp_path / "m")), at=2)
    record = written(tmp_path / "m")
    assert record["stopped"] == "KeyboardInterrupt"
    assert record["phases"][-1]["name"] == "train"
    assert record["points"][-2]["what"] == "end"
    assert [e.path.name for e in events if isinstance(e, Saved)] == ["m.json", "m.png"]
    assert len(list((tmp_path / "a" / "checkpoints").glob("step-*"))) == 1


def test_an_error_still_writes(quick, tmp_path):
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(quick(learning_rate=1e30, clip=0.0, iters=30, trace_memory=str(tmp_path / "m")))
    assert written(tmp_path / "m")["stopped"] == "UserError"

    def stop(event):
        if isinstance(event, PhaseEnd):
            raise RuntimeError("the caller gave up")

    with pytest.raises(RuntimeError, match="gave up"):
        train(quick("b", trace_memory=str(tmp_path / "n")), on_event=stop)
    assert written(tmp_path / "n")["stopped"] == "RuntimeError"


def test_nothing_is_written_where_nothing_was_begun(quick, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(quick(data="nowhere", trace_memory=str(tmp_path / "m")))
    assert not list(tmp_path.iterdir())


def test_a_timeline_that_cannot_be_written_in_the_end_does_not_undo_the_run(quick, tmp_path, monkeypatch):
    def full(*more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace.files, "write_json", full)
    events = []
    record = {"phases": [{}]}
    events = list(trace._written(trace.trace_paths(str(tmp_path / "m")), record))
    assert "No space left" in events[0].message


@pytest.mark.parametrize("task", ["train", "generate"])
@pytest.mark.parametrize(
    ("path", "match"),
    [("taken/m", "taken cannot be written"), ("d/m", "is a directory"), ("..", "name a file"), ("", "name a file")],
)
def test_a_path_that_cannot_be_written_is_refused_before_work_begins(tmp_path, monkeypatch, task, path, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "d" / "m.json").mkdir(parents=True)
    events = []
    with pytest.raises(UserError, match=match):
        if task == "train":
            train(data=str(HEDGEHOG), adapter_path="a", trace_memory=path, on_event=events.append)
        else:
            generate(prompt=["a dog"], trace_memory=path, on_event=events.append)
    assert events == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "taken"]


@pytest.mark.parametrize("path", ["out.png", "out", "out.json"])
def test_a_timeline_never_takes_the_place_of_an_image(tmp_path, path):
    with pytest.raises(UserError, match="image of this run"):
        generate(prompt=["a dog"], output=str(tmp_path / "out.png"), trace_memory=str(tmp_path / path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "stem"), [("m", "m"), ("m.png", "m"), ("x/m.JSON", "x/m"), ("run.2", "run.2"), ("run.2.png", "run.2")]
)
def test_names_of_the_files(path, stem):
    assert trace.trace_paths(path) == (Path(stem + ".json"), Path(stem + ".png"))
    assert trace.trace_paths(GenerateSettings().trace_memory) == ()


def made_up(phases, points, peak, budget=None):
    """A record of as many phases, each of as many points that rise to `peak` bytes."""
    found, spans = [], []
    for phase in range(phases):
        for i in range(points):
            what = "start" if i == 0 else "end" if i == points - 1 else "step"
            found.append(
                {"number": len(found) + 1, "phase": phase, "what": what, "done": i, "seconds": float(len(found)),
                 "active_memory": peak * i // points, "peak_memory": peak * (i + 1) // points}
            )  # fmt: skip
        end = found[-1]
        spans.append(
            {"name": f"phase {phase % 12}", "seconds": [0.0, None], "peak_memory": peak, "highest": end["number"]}
        )
    return {"task": "train", "memory_budget": budget, "stopped": None, "kept": "all", "phases": spans, "points": found}


@pytest.mark.parametrize(
    "record",
    [
        made_up(1, 2, 0),
        made_up(1, 2, 900, budget=0),
        made_up(3, 5, 3 << 30, budget=4 << 30),
        made_up(3, 5, 3 << 30, budget=400 << 30),
        made_up(3000, 3, 50 << 20),
        made_up(2, 20000, 5 << 40),
    ],
)
def test_any_run_can_be_drawn(record):
    image = trace_plot.draw(record)
    assert image.width == trace_plot.WIDTH
    axis = trace_plot.axis_for(record)
    highest = max(point["peak_memory"] for point in record["points"])
    assert 3 <= axis.top / axis.tick <= 8
    assert axis.top > highest
    assert axis.unit[0] == ("GiB" if highest >= 1 << 30 else "MiB")
    budget = record["memory_budget"]
    green = tuple(bytes.fromhex(trace_plot.BUDGET[1:])) in {color for _, color in image.getcolors(1 << 20)}
    assert green == (budget is not None and budget <= trace_plot.ABOVE * highest)
    bands = trace_plot.bands(record)
    assert bands[-1].right == pytest.approx(trace_plot.WIDTH - trace_plot.RIGHT)
    assert all(a.right == b.left for a, b in pairwise(bands))
