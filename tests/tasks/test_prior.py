"""Prior preservation: class images made once by the base model or given, ordinary samples with their own weight."""

import json
import shutil

import pytest
from PIL import Image
from safetensors.numpy import save_file
from support.compare import assert_same_adapter, factors, same_bits
from support.models import HEDGEHOG, prepared

from mlx_blockskip import generate, train
from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, PhaseEnd, finish
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.samples import CLASS_NOISE, class_images

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


def test_other_class_images_are_made_where_what_they_depend_on_changed(quick):
    settings = quick(**CLASSES, iters=1)
    directory = train(settings).adapter_path
    (directory / "adapters.safetensors").unlink()
    before = sorted(p.name for p in (directory / "class_images").glob("*.png"))
    events = []
    train(quick(**{**CLASSES, "class_images": 2}, iters=1), on_event=events.append)
    assert "class images" in {e.phase for e in events if isinstance(e, PhaseEnd)}
    assert sorted(p.name for p in (directory / "class_images").glob("*.png")) == before[:2]


def test_a_class_image_is_what_generate_draws(tiny_flux, tmp_path):
    """The same noise through `generate` gives the same picture: class images are the base model's own."""
    directory = tmp_path / "class_images"
    finish(class_images(open_model(tiny_flux), CLASSES["class_prompt"], 2, 64, directory, seed=5))
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
    recipe = prepared(quick(class_data=class_data("given", 3), prior_weight=0.25)).recipe
    subjects = len(recipe.dataset.examples)
    images = [recipe.image_of(k) for k in range(2 * subjects * 3)]
    assert all((image < subjects) == (k % 2 == 0) for k, image in enumerate(images))
    assert sorted(images[::2]) == sorted(list(range(subjects)) * 3)
    assert sorted(images[1:6:2]) == [subjects, subjects + 1, subjects + 2]
    assert recipe.weights(0).tolist() == [1.0, 0.25]


def test_at_weight_zero_class_images_change_no_bit(quick, class_data):
    directories = [
        train(quick(f"a{i}", class_data=class_data(f"c{i}", i), prior_weight=0.0)).adapter_path for i in (1, 4)
    ]
    assert_same_adapter(*directories)
    heavier = train(quick("a5", class_data=class_data("c5", 4), prior_weight=1.0)).adapter_path
    first, second = factors(directories[0]), factors(heavier)
    assert any(not same_bits(first[name], second[name]) for name in first)


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
        ({"class_data": "nowhere"}, "nowhere: no such directory"),
        ({"class_data": str(HEDGEHOG), "class_images": 4, "class_prompt": ["a dog"]}, "give one of them"),
    ],
)
def test_bad_settings_are_one_clear_error(quick, options, match):
    with pytest.raises(UserError, match=match):
        train(quick(**options))


def test_class_images_of_the_user_need_captions_or_one_class_prompt(quick, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(next(HEDGEHOG.glob("*.png")), bare / "1.png")
    with pytest.raises(UserError, match="has no caption.*--class-prompt"):
        train(quick(class_data=str(bare)))
    recipe = prepared(quick("b", class_data=str(bare), class_prompt=["a dog"])).recipe
    assert recipe.examples[-1].caption == "a dog"
