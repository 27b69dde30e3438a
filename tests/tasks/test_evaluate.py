"""Evaluation as a user meets it: what it makes, what it writes, how it goes on, what it refuses."""

import errno
import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK
from PIL import Image
from typer.testing import CliRunner

from mlx_blockskip import evaluate, export, generate, train
from mlx_blockskip.cli import app
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Image as Made
from mlx_blockskip.events import Note, PhaseEnd, Saved, Table, Warning
from mlx_blockskip.options import from_mapping
from mlx_blockskip.settings import EvaluateSettings, GenerateSettings
from mlx_blockskip.tasks.checkpoint import encoders
from mlx_blockskip.tasks.evaluate.subject import shipped
from mlx_blockskip.tasks.memory import check
from support.models import HEDGEHOG

PROMPTS = ["a {} on a red background", "small {}, brown background"]
OTHERS = ["a ghost on a blue background"]
REAL = encoders.vision_encoder, encoders.clip_encoder
SMALL = {"steps": 2, "width": 64, "height": 64, "n_images": 2}


class Colours:
    """An encoder that knows the mean colour of each quarter of an image, and of a text how long its words are."""

    path, has_text = Path("colours"), True

    def __init__(self, identity="colours"):
        self.identity, self.texts = identity, []

    def embed_images(self, images):
        quarters = [np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32) for image in images]
        return np.stack([unit(quarter.reshape(-1) + 1) for quarter in quarters])

    def embed_texts(self, texts):
        self.texts += texts
        return np.stack([unit([1 + len(word) for word in (text.split() * 12)[:12]]) for text in texts])

    def release(self):
        pass


def unit(row):
    row = np.asarray(row, np.float32)
    return row / np.linalg.norm(row)


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """Both encoders are stand-ins; the one that embeds texts is returned."""
    vision, clip = Colours("vision"), Colours("clip")
    monkeypatch.setattr(encoders, "vision_encoder", lambda name, path: vision)
    monkeypatch.setattr(encoders, "clip_encoder", lambda name, path: clip)
    return clip


@pytest.fixture(scope="module")
def trained(tiny_flux, tmp_path_factory):
    """A short training run on the hedgehog."""
    target = tmp_path_factory.mktemp("trained") / "adapter"
    options = {"rank": 2, "iters": 2, "class_images": 0, "train_resolution": 64, "resolution": 64, "batch_size": 1}
    train(model=str(tiny_flux), data=str(HEDGEHOG), adapter_path=str(target), learning_rate=0.01, **options)
    return target


@pytest.fixture
def asked(trained, tmp_path):
    """Options of a small evaluation, its output in a directory of its own."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "others.txt").write_text("\n".join(OTHERS))
    files = {"prompts": str(tmp_path / "prompts.txt"), "drift_prompts": str(tmp_path / "others.txt")}
    return {**SMALL, **files, "adapter_path": str(trained), "output": str(tmp_path / "out"), "overwrite": True}


def made(options):
    events = []
    result = evaluate(**options, on_event=events.append)
    return result, events, [event.path for event in events if isinstance(event, Made)]


def test_what_it_writes(asked, trained, tiny_flux, colours):
    result, events, images = made(asked)
    report = json.loads(result.report.read_text())
    assert report["subject"] == {"phrase": "sks toy", "noun": "toy"}
    assert [p["prompt"] for p in report["prompts"]] == [text.replace("{}", "sks toy") for text in PROMPTS]
    assert [p["compared_with"] for p in report["prompts"]] == [text.replace("{}", "toy") for text in PROMPTS]
    assert not any("sks" in text for text in colours.texts), "the encoder of texts never sees the identifier"
    assert [len(p["images"]) for p in report["prompts"]] == [2, 2]
    assert [image["seed"] for image in report["prompts"][1]["images"]] == [0, 1]
    assert report["means"]["dino"] == pytest.approx(np.mean([p["dino"] for p in report["prompts"]]))
    assert (result.dino, result.drift) == (report["means"]["dino"], report["drift"]["means"]["dino"])
    assert [p["prompt"] for p in report["drift"]["prompts"]] == OTHERS
    config = json.loads((trained / "adapter_config.json").read_text())
    assert report["identities"]["model"] == config["base_model_identity"]
    assert report["identities"].keys() == {"model", "adapter", "data", "vision", "clip"}
    assert (report["settings"]["data"], report["settings"]["model"]) == (str(HEDGEHOG), str(tiny_flux))
    assert (report["settings"]["steps"], report["settings"]["cfg_scale"]) == (2, 2.5)
    on_disk = sorted((result.report.parent / "images").iterdir())
    assert sorted(images) == on_disk
    assert len(on_disk) == 2 * 2 + 2
    assert Image.open(result.sheet).width > 5 * 190
    assert not (result.report.parent / ".lock").exists()
    phases = {e.phase: e.peak_memory for e in events if isinstance(e, PhaseEnd)}
    assert phases.keys() >= {"generate", "decode", "embed images, DINO", "embed images, CLIP", "embed prompts, CLIP"}
    about, drifted = (event for event in events if isinstance(event, Table))
    assert [row[0] for row in about.rows] == [
        "a sks toy on a red background", "small sks toy, brown background", "mean",
        "the subject's images among themselves",
    ]  # fmt: skip
    assert about.rows[2][1:] == tuple(f"{report['means'][name]:.4f}" for name in ("dino", "clip_i", "clip_t"))
    assert drifted.rows[-1][1] == f"{result.drift:.4f}"
    assert [e.what for e in events if isinstance(e, Saved)] == ["evaluation", "contact sheet"]


def test_scores_are_those_of_the_images_on_disk(asked):
    result, _, _ = made(asked)
    report = json.loads(result.report.read_text())
    real = Colours().embed_images([Image.open(path).convert("RGB") for path in sorted(HEDGEHOG.glob("*.png"))])
    image = report["prompts"][0]["images"][1]
    (row,) = Colours().embed_images([Image.open(result.report.parent / image["file"]).convert("RGB")])
    assert image["dino"] == pytest.approx(float((real @ row).mean()), abs=1e-5)
    pair = report["drift"]["prompts"][0]["images"][0]
    a, b = Colours().embed_images([Image.open(result.report.parent / pair[side]) for side in ("file", "base")])
    assert pair["dino"] == pytest.approx(float(a @ b), abs=1e-5)


def test_an_image_is_what_generate_draws(asked, tmp_path):
    _, _, images = made(asked)
    picture = next(path for path in images if "adapted-small-sks-toy" in path.name and "-1-" in path.name)
    record = json.loads(Image.open(picture).text["mlx-blockskip"])
    files = {name: record[name] for name in ("model", "adapter_path")}
    (again,) = generate(from_image=str(picture), output=str(tmp_path / "again.png"), **files)
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(picture)))
    record = from_mapping(GenerateSettings, record)
    assert (record.prompt, record.seed) == (["small sks toy, brown background"], 1)


def test_only_what_is_not_there_is_made(asked, tmp_path):
    """Also in the order, the number and the company of other prompts."""
    first, _, images = made(asked)
    before = digests(images)
    images[2].unlink()
    second, events, again = made({**asked, "overwrite": False})
    assert again == [images[2]]
    assert any(isinstance(e, Note) and "4 of 5 images are there already" in e.message for e in events)
    assert digests(images) == before
    assert json.loads(second.report.read_text()) == json.loads(first.report.read_text())
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[::-1], "a {} on a white background"]))
    with pytest.raises(UserError, match=r"evaluation.json: is of other settings; give another --output"):
        made({**asked, "n_images": 1, "overwrite": False})
    _, _, more = made({**asked, "n_images": 1})
    assert [path.name.rsplit("-", 1)[0] for path in more] == ["adapted-a-sks-toy-on-a-white-background-0"]


def test_a_disk_without_locks_is_said_before_anything_is_made(asked, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def stop(event):
        heard.append(event)
        if isinstance(event, Made):
            raise KeyboardInterrupt

    heard = []
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KeyboardInterrupt):
        evaluate(**asked, on_event=stop)
    assert any(isinstance(e, Warning) and "out: its disk has no locks" in e.message for e in heard)


def digests(paths):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("change", [{"steps": 3}, {"seed": 7}, {"lora_scale": 0.5}, {"subject": "zwx toy"}])
def test_what_an_image_depends_on_makes_another_one(asked, change):
    one = {**asked, "n_images": 1, "drift_images": 0}
    _, _, images = made(one)
    _, _, others = made({**one, **change})
    assert len(others) == len(images)
    assert not set(images) & set(others)


def test_a_run_that_is_stopped_goes_on(asked, monkeypatch):
    monkeypatch.setattr("mlx_blockskip.tasks.evaluate.evaluate.WAITING", 2)
    seen = []

    def stop(event):
        if isinstance(event, Made):
            seen.append(event.path)
            if len(seen) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(**asked, on_event=stop)
    _, _, rest = made(asked)
    assert len(rest) == 3
    assert not set(seen) & set(rest)


def test_the_budget_changes_no_image(asked, tmp_path):
    options = {**asked, "drift_images": 0}
    images = [made({**options, "output": str(tmp_path / b), "memory_budget": b})[2] for b in ("auto", "0")]
    assert [path.name for path in images[0]] == [path.name for path in images[1]]
    for a, b in zip(*images, strict=True):
        assert np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def test_as_many_images_wait_as_the_budget_takes(tiny_flux):
    from mlx_blockskip.models.registry import open_model
    from mlx_blockskip.tasks.defaults import draw_config

    model = open_model(tiny_flux)

    def at_once(text, most=32):
        return check.images_at_once(draw_config(GenerateSettings(memory_budget=text), model), model, most)

    assert (at_once("8GB"), at_once("0"), at_once(None)) == (32, 1, 32)
    settings = draw_config(GenerateSettings(), model)
    peak = check.generation_phases(settings, model, 8)[0].peak
    assert at_once(str(int(1.2 * peak))) == 8


def test_the_encoders_of_the_package(asked, monkeypatch):
    """Two encoders of their own identity and preprocessing; all scores are cosines."""
    for name, encoder in zip(("vision_encoder", "clip_encoder"), REAL, strict=True):
        monkeypatch.setattr(encoders, name, encoder)
    result, _, _ = made({**asked, "n_images": 1})
    report = json.loads(result.report.read_text())
    assert report["identities"]["vision"] != report["identities"]["clip"]
    assert all(-1 <= value <= 1 for value in (*report["means"].values(), *report["drift"]["means"].values()))
    assert report["means"]["dino"] != report["means"]["clip_i"]
    assert report["means"]["dino"] < report["real"]["dino"], "after two steps nothing is learned"


def test_the_base_model_as_a_baseline(asked):
    result, events, images = made({**asked, "n_images": 1, "baseline": True})
    report = json.loads(result.report.read_text())
    assert len(images) == 2 * 2 + 2
    assert all("/base-" in image["file"] for p in report["baseline"]["prompts"] for image in p["images"])
    (table, _) = (event for event in events if isinstance(event, Table))
    assert ("mean of the base model", f"{report['baseline']['means']['dino']:.4f}") == table.rows[-2][:2]
    assert report["baseline"]["means"] != report["means"]


def test_without_drift(asked):
    result, events, images = made({**asked, "n_images": 1, "drift_images": 0})
    assert result.drift is None
    assert len(images) == 2
    assert json.loads(result.report.read_text())["drift"] is None
    assert sum(isinstance(event, Table) for event in events) == 1


def test_a_small_model_has_prompts_of_its_own(asked):
    del asked["prompts"], asked["drift_prompts"]
    result, _, images = made({**asked, "n_images": 1, "steps": 1})
    report = json.loads(result.report.read_text())
    assert report["settings"]["subject_kind"] == "plain"
    assert [p["compared_with"] for p in report["prompts"]] == [text.replace("{}", "toy") for text in shipped("plain")]
    assert len(images) == 12 + 2 * len(shipped("others-plain"))


def test_a_lora_file_needs_to_be_told_what_it_is_for(asked, trained, tiny_flux, tmp_path):
    file = tmp_path / "hedgehog.safetensors"
    export(adapter_path=str(trained), output=str(file))
    options = {k: v for k, v in asked.items() if k != "output"} | {"adapter_path": str(file), "n_images": 1}
    with pytest.raises(UserError, match="--model: .*hedgehog.safetensors is no adapter directory that records it"):
        evaluate(**options)
    with pytest.raises(UserError, match="--data: "):
        evaluate(**options, model=str(tiny_flux))
    result = evaluate(**options, model=str(tiny_flux), data=str(HEDGEHOG))
    assert result.report == tmp_path / "hedgehog-evaluation" / "evaluation.json"


def test_images_need_no_captions(asked, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(next(HEDGEHOG.glob("*.png")), photos / "1.png")
    result, events, _ = made({**asked, "data": str(photos), "n_images": 1, "drift_images": 0})
    assert json.loads(result.report.read_text())["real"] == {"dino": None, "clip_i": None}
    (table,) = (event for event in events if isinstance(event, Table))
    assert table.rows[-1][1:] == ("-", "-", "-")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapter_path": "nowhere"}, "nowhere: no such adapter; --adapter-path"),
        ({"data": "nowhere"}, "nowhere: no such directory; --data"),
        ({"n_images": 0}, "--n-images 0: must be at least 1"),
        ({"drift_images": -1}, "--drift-images -1: must be at least 0"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"prompts": "missing.txt"}, "missing.txt: no such file"),
        ({"subject": ""}, "--subject: is empty"),
        ({"subject_kind": "living"}, "--prompts and --subject-kind: .*give one of them"),
        ({"width": 70}, "the nearest is 64 x 64"),
        ({"steps": 0}, "--steps 0"),
        ({"model": "nothing-here"}, "no such model"),
        ({"memory_budget": "much"}, "not a size"),
        ({"output": __file__}, "is a file; --output takes a directory"),
    ],
)
def test_bad_input_is_one_clear_error(asked, options, match):
    with pytest.raises(UserError, match=match):
        evaluate(**{**asked, **options})
    assert not (Path(asked["output"]) / "images").exists()


def test_another_model_is_warned_of(asked, tmp_path, trained):
    from mlx_blockskip.events import Warning

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_identity": "other"}))
    _, events, _ = made({**asked, "adapter_path": str(copy), "n_images": 1, "drift_images": 0, "steps": 1})
    assert any(isinstance(e, Warning) and "trained on another model" in e.message for e in events)


def test_the_command_draws_the_table(asked):
    flags = {key: f"--{key.replace('_', '-')}" for key in asked}
    arguments = [
        text for key, value in asked.items() for text in (flags[key], *([] if value is True else [str(value)]))
    ]
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--drift-images", "0"])
    assert result.exit_code == 0, result.output
    assert "| a sks toy on a red background" in result.output
    helped = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert all(f"--{name.replace('_', '-')}" in helped for name in EvaluateSettings.__dataclass_fields__)


def test_it_finds_what_the_adapter_was_trained_on_from_any_directory(tiny_flux, tmp_path, monkeypatch):
    """Model and images were given by paths that are relative to where the training ran."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    shutil.copytree(HEDGEHOG, tmp_path / "here" / "photos")
    shutil.copytree(tiny_flux, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    quick = {**QUICK, "iters": 1, "data": "photos", "model": "model", "adapter_path": "dog"}
    train(**quick, train_resolution=32, resolution=64, batch_size=1)
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "prompts.txt").write_text("a {} on a mat\n")
    found = evaluate(
        adapter_path="../here/dog", steps=1, width=64, height=64, n_images=1, drift_images=0, memory_budget="any",
        prompts=str(tmp_path / "prompts.txt"),
    )  # fmt: skip
    assert found.report.is_file()
