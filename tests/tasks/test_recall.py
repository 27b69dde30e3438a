"""`--from-image`: a picture says how to draw; what is opened and written comes from the user alone."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.settings import GenerateSettings
from mlx_blockskip.tasks.sampling.pictures import PNG_KEY
from mlx_blockskip.tasks.sampling.recall import TAKEN, recall

KEPT = {
    "model": "tiny-sana", "prompt": ["a dog"], "negative_prompt": "a cat", "seed": 5, "steps": 3, "cfg_scale": 2.0,
    "guidance": 1.5, "width": 64, "height": 32, "max_sequence_length": 8,
}  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    def make(**changes):
        info = PngImagePlugin.PngInfo()
        info.add_itxt(PNG_KEY, json.dumps({**KEPT, **changes}))
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
        return str(tmp_path / "a.png")

    return make


def test_all_that_decides_how_a_picture_looks_is_taken(picture):
    found = recall(GenerateSettings(from_image=picture()))
    assert {name: getattr(found, name) for name in KEPT} == KEPT
    assert set(TAKEN) | {"model", "prompt"} == set(KEPT)
    assert found.from_image is None


def test_what_was_given_wins_also_where_it_is_the_default(picture):
    found = recall(GenerateSettings(from_image=picture(), model="tiny-flux", seed=0, prompt=["b"], negative_prompt=""))
    assert (found.model, found.seed, found.prompt, found.negative_prompt) == ("tiny-flux", 0, ["b"], "")
    assert recall(GenerateSettings(from_image=picture(), prompt_file="own.txt")).prompt == []


def test_a_picture_names_nothing_that_is_opened_or_written(picture):
    hostile = {
        "output": "/etc/out.png", "prompt_file": "/etc/passwd", "trace_memory": "/etc/t", "from_image": "/etc/b.png",
        "n_images": 1000, "memory_budget": "1TB", "debug": True, "unknown": [[[]]],
    }  # fmt: skip
    assert recall(GenerateSettings(from_image=picture(**hostile))) == recall(GenerateSettings(from_image=picture()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "owner/name"}, r"a\.png: was drawn with the model owner/name, .*; give --model owner/name, or"),
        ({"model": "/models/flux"}, "give --model /models/flux"),
        ({"model": {"a": 1}}, "was drawn with the model"),
        (
            {"adapter_path": ["dog", "cat"]},
            "was drawn with the adapter dog, cat, .*--adapter-path dog --adapter-path cat",
        ),
        ({"noise": "noise.safetensors"}, "give --noise noise.safetensors"),
        ({"steps": 10**9}, r"a\.png: --steps 1000000000: must be"),
        ({"seed": "one"}, r"a\.png: --seed: 'one' is not a whole number"),
        ({"prompt": []}, "its prompt is not one text"),
    ],
)
def test_what_it_needs_beside_is_asked_for(picture, changes, match):
    with pytest.raises(UserError, match=match):
        recall(GenerateSettings(from_image=picture(**changes)))


def test_files_that_were_given_are_taken_with_the_pictures_strengths(picture):
    path = picture(model="/models/flux", adapter_path=["dog"], lora_scale=[0.5], noise="/etc/noise")
    found = recall(GenerateSettings(from_image=path, model="flux", adapter_path=["mine"], noise="n.safetensors"))
    assert (found.model, found.adapter_path, found.lora_scale, found.noise) == (
        "flux",
        ["mine"],
        [0.5],
        "n.safetensors",
    )
    given = GenerateSettings(from_image=path, model="flux", adapter_path=["mine"], lora_scale=[0], seed=3)
    assert (recall(given).lora_scale, recall(given).noise) == ([0.0], None), "a seed in place of the noise"


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)
NAMES = (*KEPT, "adapter_path", "lora_scale", "noise", "output", "n_images", "prompt_file", "memory_budget")


@how(max_examples=80)
@given(st.one_of(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4).map(lambda d: {**KEPT, **d}), JSON))
def test_whatever_a_picture_holds_is_how_to_draw_or_one_sentence(tmp_path_factory, held):
    path = tmp_path_factory.getbasetemp() / "held.png"
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(held))
    Image.new("RGB", (1, 1)).save(path, pnginfo=info)
    for own in ({}, {"model": "mine", "adapter_path": ["dog"]}):
        usual = GenerateSettings(**own)
        try:
            found = recall(GenerateSettings(from_image=str(path), **own))
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        assert found.model in (usual.model, "tiny-flux", "tiny-sana")
        for name in ("adapter_path", "noise", "output", "n_images", "prompt_file", "memory_budget", "trace_memory"):
            assert getattr(found, name) == getattr(usual, name)
