"""Prior preservation: class images made once by the base model or given, ordinary samples with their own weight."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import on_toy
from PIL import Image
from safetensors.numpy import save_file

from mlx_blockskip import generate, train
from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.events import Note, PhaseEnd, Step
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.options import from_mapping
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.sampling.previews import CLASS_NOISE, class_images
from mlx_blockskip.tasks.train import loop, precompute
from mlx_blockskip.tasks.train import train as train_task
from mlx_blockskip.tasks.train.samples import ORDER
from support.compare import assert_same_adapter, factors, same_bits
from support.models import HEDGEHOG, prepared

CLASSES = {"class_prompt": ["a ghost on a blue background", "a dog on a red background"], "class_images": 3}


@pytest.fixture
def class_data(tmp_path):
    """Makes directories of class images; their captions are as long, so records are alike."""

    def directory(name, count):
        target = tmp_path / name
        target.mkdir()
        for path in sorted(HEDGEHOG.glob("*.png"))[:count]:
            shutil.copyfile(path, target / path.name)
            (target / f"{path.stem}.txt").write_text("a trophy on a green background")
        return str(target)

    return directory


@on_toy
def test_class_images_are_made_once_and_captioned_in_turn(quick):
    events = []
    directory = train(quick(**CLASSES), on_event=events.append).adapter_path / "class_images"
    lines = [json.loads(line) for line in (directory / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [*CLASSES["class_prompt"], CLASSES["class_prompt"][0]]
    assert "class images" in {e.phase for e in events if isinstance(e, PhaseEnd)}
    assert any(isinstance(e, Note) and "3 class images" in e.message for e in events)
    first = (directory / lines[0]["file_name"]).read_bytes()
    assert first != (directory / lines[2]["file_name"]).read_bytes(), "the same prompt again has other noise"

    again = []
    train(quick(**CLASSES, iters=8, resume=True, lr_schedule="constant"), on_event=again.append)
    assert "class images" not in {e.phase for e in again if isinstance(e, PhaseEnd)}
    assert (directory / lines[0]["file_name"]).read_bytes() == first


def drawn(directory):
    return {path.name: path.read_bytes() for path in (directory / "class_images").glob("*.png")}


def phases(settings):
    """The phases of a run that replaces the adapter of the last one."""
    (Path(settings.adapter_path) / "adapters.safetensors").unlink(missing_ok=True)
    events = []
    train(settings, on_event=events.append)
    return {e.phase: e.peak_memory for e in events if isinstance(e, PhaseEnd)}


def test_only_class_images_that_are_not_there_are_made(quick, toy):
    settings = quick(**CLASSES, iters=1, model=str(toy), overwrite=True)
    directory = Path(settings.adapter_path)
    assert phases(settings)["class images"] > 0
    before = drawn(directory)
    assert "class images" not in phases(replace(settings, class_images=2))
    assert drawn(directory) == {name: before[name] for name in ("0000.png", "0001.png")}
    assert "class images" in phases(settings)
    assert drawn(directory) == before
    assert "class images" in phases(replace(settings, class_prompt=CLASSES["class_prompt"][::-1]))
    assert not set(drawn(directory).values()) & set(before.values()), "of other prompts all are other images"


def stop_at(name, done):
    def look(event):
        if isinstance(event, Step) and event.phase == name and event.done == done:
            raise KeyboardInterrupt

    return look


@on_toy
def test_a_run_stopped_among_class_images_and_then_in_training_goes_on_to_the_same_bits(quick):
    options = {**CLASSES, "class_images": 2, "prior_weight": 0.5, "residuals": "fresh"}
    whole = train(quick("whole", **options)).adapter_path
    settings = quick("stopped", **options)
    directory = Path(settings.adapter_path)
    with pytest.raises(KeyboardInterrupt):
        train(settings, on_event=stop_at("class images", 1))
    assert drawn(directory).keys() == {"0000.png"}
    with pytest.raises(KeyboardInterrupt):
        train(settings, on_event=stop_at("train", 3))
    train(replace(settings, resume=True))
    assert drawn(directory) == drawn(whole)
    assert_same_adapter(whole, directory)


def test_a_class_image_is_what_generate_draws(tiny_flux, tmp_path):
    """The same noise through `generate` gives the same picture: class images are the base model's own."""
    directory = tmp_path / "class_images"
    class_images(open_model(tiny_flux), CLASSES["class_prompt"], 2, 64, directory, seed=5)
    noise = philox.normal(5, CLASS_NOISE, 1, shape=(1, *open_model(tiny_flux, None).latent_shape(64, 64)))
    save_file({"noise": noise.transpose(0, 3, 1, 2).copy()}, tmp_path / "noise.safetensors")
    (path,) = generate(
        model=str(tiny_flux),
        prompt=CLASSES["class_prompt"][1],
        noise=str(tmp_path / "noise.safetensors"),
        width=64,
        height=64,
        output=str(tmp_path / "own.png"),
    )
    assert Image.open(path).convert("RGB").tobytes() == Image.open(directory / "0001.png").convert("RGB").tobytes()


def test_every_other_sample_is_a_class_image_and_all_take_turns(quick, class_data):
    samples = prepared(quick(class_data=class_data("given", 3), prior_weight=0.25)).samples
    subjects = len(samples.dataset.examples)
    images = [samples.image_of(k) for k in range(2 * subjects * 3)]
    assert all((image < subjects) == (k % 2 == 0) for k, image in enumerate(images))
    assert sorted(images[::2]) == sorted(list(range(subjects)) * 3)
    assert sorted(images[1:6:2]) == [subjects, subjects + 1, subjects + 2]
    assert samples.weights(0) == [1.0, 0.25]


def test_the_two_kinds_are_in_orders_of_their_own(quick, class_data):
    """As many of each: an image of the subject does not always meet the same class image."""
    count = len(prepared(quick("probe")).samples.examples)
    samples = prepared(quick(class_data=class_data("given", count))).samples
    own, theirs = ([samples.image_of(2 * k + kind) for k in range(4 * count)] for kind in (0, 1))
    assert sorted(own) == sorted(image - count for image in theirs)
    assert own != [image - count for image in theirs]


def test_at_weight_zero_class_images_change_no_bit(quick, class_data):
    directories = [
        train(quick(f"a{i}", class_data=class_data(f"c{i}", i), prior_weight=0.0)).adapter_path for i in (1, 4)
    ]
    assert_same_adapter(*directories)
    heavier = train(quick("a5", class_data=class_data("c5", 4), prior_weight=1.0)).adapter_path
    first, second = factors(directories[0]), factors(heavier)
    assert any(not same_bits(first[name], second[name]) for name in first)


def test_the_loss_is_the_weighted_mean_over_both_kinds(quick, class_data):
    """Against the full model applied to the two samples directly: (subject + w prior) / 2."""
    job = prepared(quick(class_data=class_data("given", 3), prior_weight=0.25))
    samples, model = job.samples, job.model
    state = train_task.first_state(job)
    _, chunk = loop.next_chunk(job, state)
    loss = loop.train_step(job, chunk, state)
    precompute.encode_images(samples, range(1), job.cache / "latents.safetensors")
    noisy, target, s = precompute.Noised(job.cache / "latents.safetensors").read(0)
    tokens, context = samples.embed(0, noisy, s)
    (sample,) = waiting = [Batch(tokens, context)]
    forward(model.stack, model.reader, waiting)
    error = model.final_layer(sample.state, context, model.final_modulation(context)) - target
    subject, prior = np.square(np.array(error, np.float64)).mean(axis=(1, 2, 3))
    assert loss == pytest.approx((subject + 0.25 * prior) / 2, rel=1e-5)
    assert abs(subject - prior) > 1e-3, "so the weight cannot be on the wrong one"


def test_without_class_prompts_a_run_is_what_it_was(quick):
    """Images in epochs of their own order, each with weight one; class prompts that are turned off change no bit."""
    samples = prepared(quick()).samples
    count = len(samples.dataset.examples)
    epochs = [philox.generator(0, ORDER, epoch).permutation(count).tolist() for epoch in range(3)]
    assert [samples.image_of(k) for k in range(3 * count)] == [image for epoch in epochs for image in epoch]
    assert samples.weights(0) == [1.0, 1.0]
    plain = train(quick("plain", class_images=0 if samples.model.defaults.class_prompt else None))
    off = train(quick("off", class_prompt=["a dog"], class_images=0, prior_weight=0.5))
    assert_same_adapter(plain.adapter_path, off.adapter_path)


@on_toy
def test_a_class_image_that_was_changed_is_refused_on_resume(quick):
    directory = train(quick(**CLASSES, iters=2)).adapter_path
    Image.new("RGB", (64, 64), "red").save(directory / "class_images" / "0001.png")
    with pytest.raises(UserError, match="prior"):
        train(quick(**CLASSES, iters=4, resume=True))


def test_recorded_settings_make_the_run_again(quick, class_data, toy):
    """What adapter_config.json holds is taken as it is, with class images given, made or left out."""
    for i, options in enumerate([{"class_data": class_data("c", 2)}, CLASSES, {"class_images": 0}]):
        directory = train(quick(f"a{i}", **options, iters=1, model=str(toy))).adapter_path
        config = json.loads((directory / "adapter_config.json").read_text())
        again = from_mapping(TrainSettings, config["settings"])
        train(replace(again, adapter_path=str(directory.with_name(f"b{i}"))))
        assert config["captions"] == sorted({path.read_text().strip() for path in HEDGEHOG.glob("*.txt")})


def test_other_class_images_are_refused_on_resume(quick, class_data):
    train(quick(class_data=class_data("one", 2), iters=2))
    with pytest.raises(UserError, match="prior"):
        train(quick(class_data=class_data("two", 3), iters=4, resume=True))


def test_none_where_no_images_are_wanted(quick):
    directory = train(quick(class_prompt=["a dog"], class_images=0, iters=1)).adapter_path
    assert not (directory / "class_images").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_images": -1}, "--class-images -1: must be at least 0"),
        ({"prior_weight": -0.5}, "--prior-weight -0.5: must be at least 0"),
        ({"prior_weight": float("nan")}, "--prior-weight nan: must be at least 0"),
        ({"class_data": "nowhere"}, "nowhere: no such directory"),
        ({"class_data": str(HEDGEHOG), "class_images": 4, "class_prompt": ["a dog"]}, "give one of them"),
    ],
)
def test_bad_settings_are_one_clear_error(quick, options, match):
    with pytest.raises(UserError, match=match):
        train(quick(**options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_images": 4}, "--class-images 4: say of what with --class-prompt"),
        ({"class_images": None, "prior_weight": 0.5}, "--prior-weight 0.5: there are no class images to weigh"),
    ],
)
def test_options_that_mean_nothing_alone_are_refused(quick, toy, options, match):
    """Of a model that records no class prompts."""
    with pytest.raises(UserError, match=match):
        train(quick(model=str(toy), **options))


def test_class_images_of_the_user_need_captions_or_one_class_prompt(quick, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(next(HEDGEHOG.glob("*.png")), bare / "1.png")
    with pytest.raises(UserError, match="has no caption.*--class-prompt"):
        train(quick(class_data=str(bare)))
    samples = prepared(quick("b", class_data=str(bare), class_prompt=["a dog on a green sofa"])).samples
    assert samples.examples[-1].caption == "a dog on a green sofa"
