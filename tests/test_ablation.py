"""What examples/ablation measures and how it sums up, on pictures whose answers are known."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from support.models import HEDGEHOG

ROOT = Path(__file__).parents[1]
TEAPOT = Path(__file__).parent / "subjects" / "teapot"


@pytest.fixture(scope="module", autouse=True)
def _ablation():
    sys.path.insert(0, str(ROOT / "examples" / "ablation"))
    yield
    sys.path.remove(str(ROOT / "examples" / "ablation"))


def pictures(directory):
    return [Image.open(path) for path in sorted(directory.glob("*.png"))]


def test_the_background_is_named_and_cut_away():
    from measures import colour, cut_out, on_white

    asked = [path.read_text().split(" on a ")[1].split()[0] for path in sorted(HEDGEHOG.glob("*.txt"))]
    assert [colour(picture) for picture in pictures(HEDGEHOG)] == asked
    for picture in pictures(HEDGEHOG):
        alpha = np.asarray(cut_out(picture).getchannel("A"))
        assert (alpha[:3] == 0).all()
        assert 0.05 < (alpha > 0).mean() < 0.7
        white = np.asarray(on_white(cut_out(picture), 32))
        assert white.shape == (32, 32, 3)
        assert (white[0, 0] > 200).all()
    assert (np.asarray(on_white(cut_out(Image.new("RGB", (64, 64), "red")), 32)) == 255).all(), "nothing to cut out"


def test_ranks_count_the_others_that_are_nearer():
    from measures import Known, cut_out

    hedgehogs, teapots = ([cut_out(p) for p in pictures(d)] for d in (HEDGEHOG, TEAPOT))
    known = Known(hedgehogs[:3], teapots)
    assert known.ranks(pictures(HEDGEHOG)[3:]) == [0, 0]
    assert known.ranks(pictures(TEAPOT)) == [5] * 5


def test_models_stand_side_by_side():
    from table import beside

    models, order = {}, {}
    for model, peak in (("a", 1), ("b", 3)):
        order[model] = ["base", "plain", f"ours of {model}"]
        models[model] = [
            {
                "row": row, "subject": subject, "seed": 0, "top-1": value, "top-1 at 64 px": 0.25, "kept": 0.5,
                "DINO": 2 * value, "CLIP-I": 0.5, **({} if row == "base" else {"peak": peak * 2**20}),
            }
            for row, lift in zip(order[model], (-0.3, 0.0, 0.3), strict=True)
            for subject, value in (("x", 0.4 + lift), ("y", 0.8 + lift))
        ]  # fmt: skip
    base, plain, ours = beside(models, order).splitlines()[2:]
    assert base == "| base | 0.30 | 0.25 | 0.50 |  |  | 0.30 | 0.25 | 0.50 |  |  |"
    assert plain == "| plain | 0.60 | 0.25 | 0.50 | 1.0 |  | 0.60 | 0.25 | 0.50 | 3.0 |  |"
    own = "0.90 | 0.25 | 0.50 | {} | 150, 150, 100 %"
    assert ours == f"| ours of a or ours of b | {own.format(1.0)} | {own.format(3.0)} |"


def test_rows_are_compared_in_pairs():
    from table import difference, pictures, table

    file = sorted(HEDGEHOG.glob("*.png"))[0]
    results = [
        {
            "row": row, "subject": subject, "seed": 0, "top-1": value, "top-1 at 64 px": value, "rank": 1.0,
            "DINO": value, "CLIP-I": value,
            "CLIP-T": 0.5, "colour": 1.0, "kept": 1.0,
            **({} if row == "base" else {"peak": 2**20, "seconds a step": 0.5}),
        }
        for row, lift in (("base", -0.3), ("plain", 0.0), ("ours", 0.1))
        for subject, value in (("a", 0.4 + lift), ("b", 0.8 + lift))
    ]  # fmt: skip
    text, picture = table(results, "plain")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "+0.100 [+0.100, +0.100]" in lines["ours"]
    assert "+0." not in lines["plain"]
    assert "+0." not in lines["base"]
    assert picture.size[0] > 100
    sheet = pictures(("base", "ours"), {"a": {"base": [file, file], "ours": [file]}, "b": {"base": [file]}})
    assert sheet.size[1] > 2 * 64
    middle, low, high = difference({1: 1.0, 2: 0.0, 3: 5.0}, {1: 0.0, 2: 1.0})
    assert middle == 0
    assert low == -1
    assert high == 1


def test_a_result_is_a_line_and_on_disk_at_once(tmp_path):
    from results import TUNING, Stored, key

    first, second = (
        {"row": row, "subject": "a", "seed": 0, "model": "tiny-flux", "top-1": 0.1 + 0.2} for row in ("ours", "base")
    )
    Stored(tmp_path, TUNING).put(first)
    stored = Stored(tmp_path)
    stored.put(first)
    before = (tmp_path / "results.json").read_text().splitlines()
    stored.put(second)
    assert len(set((tmp_path / "results.json").read_text().splitlines()) - set(before)) == 1
    assert Stored(tmp_path).own == {key("base", "a", 0): second, key("ours", "a", 0): first}
    assert Stored(tmp_path, TUNING).own == {key("ours", "a", 0): first}, "the other part is as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_that_was_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    import run
    from results import Stored

    made, fails = [], {"ours"}

    def process(command, **_):
        name, _options, subject, seed, model = json.loads(command[-1])
        made.append((name, Path(subject).name))
        result = {"row": name, "subject": Path(subject).name, "seed": seed, "model": model, "seconds": 1.0}
        return SimpleNamespace(returncode=int(name in fails), stdout=f"progress\n{json.dumps(result)}\n")

    monkeypatch.setattr(subprocess, "run", process)
    table = {"plain": {"rank": 4}, "ours": {"rank": 8}}
    waiting = list(run.jobs_of(table, [Path("x/a"), Path("x/b")], range(1), "tiny-flux"))
    assert [name for name, _ in waiting][:3] == ["base, a, 0", "base, b, 0", "plain, a, 0"]
    with pytest.raises(SystemExit, match="ours, [ab], 0 failed"):
        run.run(tmp_path, Stored(tmp_path), waiting, 1)
    done = set(Stored(tmp_path).own)
    assert done == {name for name, _ in waiting if not name.startswith("ours")}
    fails.clear()
    made.clear()
    run.run(tmp_path, Stored(tmp_path), waiting, 1)
    assert sorted(made) == [("ours", "a"), ("ours", "b")]
    assert set(Stored(tmp_path).own) == {name for name, _ in waiting}


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-sana"])
@pytest.mark.parametrize("part", ["rows", "tuning"])
def test_the_tables_are_those_of_the_results_beside_them(model, part):
    from results import Stored
    from subjects import SUBJECTS
    from table import table

    directory = ROOT / "examples" / "ablation" / model
    tuned, plain = part == "tuning", "plain LoRA, 128 px"
    written = (directory / "tuning" / "table.md" if tuned else directory / "table.md").read_text()
    order = [line.split(" | ")[0].strip("| ") for line in written.splitlines()[2:] if line]
    subjects = [*SUBJECTS, "hedgehog", "teapot"]
    results = sorted(
        Stored(directory, part).own.values(), key=lambda r: (order.index(r["row"]), subjects.index(r["subject"]))
    )
    text, _ = table(results, f"{plain}, 0.001, 200 steps" if tuned else plain)
    assert text.strip() == written.strip()
