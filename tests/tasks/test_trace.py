"""`--trace-memory`: what it writes, that it changes nothing, and that it writes however a run ends."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import generate, train
from mlx_blockskip.engine import timeline
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.timeline import Point, Visit
from mlx_blockskip.events import PhaseEnd, Saved, Step, listening
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import GenerateSettings
from mlx_blockskip.tasks.memory import trace
from support.compare import assert_same_adapter
from support.models import HEDGEHOG


def written(path):
    """What the trace file beside `path` says, after a look at whether it is one: phases, points, and what is of the
    whole run.
    """
    trace = json.loads(path.with_name(path.name + ".json").read_text())
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "C", "X"}
    assert all(type(event["ts"]) is int and event["ts"] >= 0 for event in events if event["ph"] != "M")
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in slices)
    phases = [{"name": event["name"], **event["args"]} for event in slices if "highest" in event["args"]]
    points = [event["args"] for event in slices if "number" in event["args"]]
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert counters == [{"active": point["active"], "peak": point["peak"]} for point in points]
    return {**trace["otherData"], "phases": phases, "points": points}


def assert_explains(record, events):
    """Its phases are those of the events, and the highest point of each is the peak that was reported."""
    ends = [event for event in events if isinstance(event, PhaseEnd)]
    assert [phase["name"] for phase in record["phases"]] == [end.phase for end in ends]
    for index, (phase, end) in enumerate(zip(record["phases"], ends, strict=True)):
        own = [point for point in record["points"] if point["phase"] == index]
        assert max(point["peak"] for point in own) == phase["peak"] == end.peak_memory
        assert next(p for p in own if p["number"] == phase["highest"])["peak"] == end.peak_memory
        assert (own[0]["what"], own[-1]["what"]) == ("start", "end")
    assert sorted(p["number"] for p in record["points"]) == list(range(1, len(record["points"]) + 1))


def visited(record, name):
    """(direction, block) of every visit in the phases of this name."""
    phases = [i for i, phase in enumerate(record["phases"]) if phase["name"] == name]
    return [(p["direction"], p["block"]) for p in record["points"] if p["what"] == "block" and p["phase"] in phases]


@pytest.mark.parametrize("budget", [None, "0"])
def test_a_training_run_is_explained_block_by_block(quick, tmp_path, budget):
    plain = quick("plain", iters=2, skip_first=1, skip_last=1, memory_budget=budget)
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
    assert visited(record, "train") == 2 * step
    through = [("forward", b) for b in range(stack.path.start, stack.depth - 1)]
    assert visited(record, "precompute")[: len(through)] == through
    for point in record["points"]:
        if point["what"] == "block" and record["phases"][point["phase"] or 0]["name"] == "train":
            block = stack.blocks[point["block"]]
            assert (point["kind"], point["prefix"]) == (block.kind.name, block.prefix)
            assert point["weights"] > 0
    saved = [event.path for event in events if isinstance(event, Saved)]
    assert saved[-1] == tmp_path / "new" / "m.json"


def test_a_resumed_run_may_ask_for_a_timeline(quick, tmp_path):
    train(quick(iters=2))
    assert train(quick(iters=3, resume=True, trace_memory=str(tmp_path / "m"))).steps == 3
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
    assert [e.path.name for e in events if isinstance(e, Saved)] == ["m.json"]
    assert len(list((tmp_path / "a" / "checkpoints").glob("step-*"))) == 1


def test_an_error_still_writes(quick, tmp_path):
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(quick(learning_rate=1e6, clip=0.0, iters=30, trace_memory=str(tmp_path / "m")))
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
    with timeline.recording() as recorded:
        recorded.begin("work")
    with listening(events.append):
        trace._write(tmp_path / "m.json", recorded, "train", None, None)
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


@pytest.mark.parametrize(
    ("path", "name"), [("m", "m.json"), ("m.json", "m.json"), ("x/m.JSON", "x/m.JSON"), ("run.2", "run.2.json")]
)
def test_names_of_the_file(path, name):
    assert trace.trace_paths(path) == (Path(name),)
    assert trace.trace_paths(GenerateSettings().trace_memory) == ()


def test_a_slice_covers_what_was_done_since_the_point_before():
    span = Point(1, 0, "start", 0, 1.0, 10, 10)
    block = Point(2, 0, "block", 0, 1.5, 20, 30, Visit("forward", 3, "double", "blocks.3.", 7))
    later = Point(9, 0, "step", 4, 5.0, 20, 25)
    slices = [event for event in trace._points([span, block, later]) if event["ph"] == "X"]
    assert [(s["name"], s["ts"], s["dur"]) for s in slices] == [
        ("start", 1000000, 0), ("forward 3 double", 1000000, 500000), ("step", 5000000, 0)
    ]  # fmt: skip
    assert slices[1]["args"] == {
        "number": 2, "what": "block", "phase": 0, "done": 0, "weights": 7, "direction": "forward", "block": 3,
        "kind": "double", "prefix": "blocks.3.", "active": 20, "peak": 30,
    }  # fmt: skip
