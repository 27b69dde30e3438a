"""What a user leaves open is filled, and what is wrong refused, before anything is read or made."""

from types import SimpleNamespace

import pytest

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.defaults import ModelDefaults, model_defaults
from mlx_blockskip.settings import GenerateSettings, TrainSettings
from mlx_blockskip.tasks.defaults import FROM_MODEL, check_seeds, check_size, draw_config, model_draws, train_config

DEFAULTS = ModelDefaults(96, 48, 80, 64, 8, 4, cfg_scale=2.0, guidance=3.5, train_guidance=1.5, class_prompt=("a dog",))


def model(multiple=16, native=lambda width, height: (width, height), **changes):
    """What of a model its settings are filled from."""
    defaults = ModelDefaults(**{**vars(DEFAULTS), **changes})
    return SimpleNamespace(defaults=defaults, size_multiple=multiple, native_size=native)


def trained(**given):
    return train_config(TrainSettings(**{"class_data": "theirs", "class_images": 0, **given}), model(), ("a", "b"))


def drawn(**given):
    return draw_config(GenerateSettings(**given), model())


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("iters", 10**9), ("learning_rate", float("nan")), ("width", 0), ("steps", 10**6), ("rank", "4")],
)
def test_a_models_own_defaults_are_held_to_the_ranges_of_the_settings(name, value):
    own = {**vars(DEFAULTS), "class_prompt": ["a dog"]}
    assert model_defaults(own, source="here").rank == DEFAULTS.rank
    with pytest.raises(UserError, match=f"here: its default {name} is .*, and (must|should) be"):
        model_defaults(own, {name: value}, source="here")
    with pytest.raises(UserError, match="here: its defaults are no object"):
        model_defaults(own, [name], source="here")


def test_images_have_seeds_of_their_own_as_far_as_seeds_go():
    check_seeds(2**64 - 2, 2)
    with pytest.raises(UserError, match="--seed 18446744073709551614: 3 images"):
        check_seeds(2**64 - 2, 3)


def test_what_is_not_given_is_the_models():
    found, own = drawn(width=32, guidance=0.0), model().defaults
    assert (found.width, found.height, found.guidance) == (32, own.height, 0.0)
    assert {name: getattr(drawn(), name) for name in FROM_MODEL} == {name: getattr(own, name) for name in FROM_MODEL}
    assert drawn().recorded() == {name: getattr(own, name) for name in FROM_MODEL}
    found = trained(rank=3)
    assert (found.rank, found.resolution, found.guidance) == (3, own.resolution, own.train_guidance)
    assert found.sample_prompt == ("a",), "of the subject's first image"
    assert trained(sample_prompt=["c", "d"]).sample_prompt == ("c", "d")


def test_a_size_is_that_asked_for_else_the_models():
    found = model_draws(model(), 32, memory_budget="1GB")
    assert (found.width, found.height, found.memory_budget) == (32, DEFAULTS.height, "1GB")
    assert model_draws(model(), height=32).height == 32
    assert model_draws(model()).recorded() == drawn().recorded()


def test_guidance_needs_a_scale_above_one():
    assert drawn(cfg_scale=1.5).guided
    assert not drawn(cfg_scale=1.0).guided


@pytest.mark.parametrize(
    ("size", "near"), [((40, 64), "32 x 64"), ((64, 25), "64 x 32"), ((1, 15), "16 x 16"), ((0, 32), "16 x 32")]
)
def test_a_side_that_is_no_multiple_is_refused_with_the_nearest_that_is(size, near):
    with pytest.raises(UserError, match=f"the sides must be multiples of 16; the nearest is {near}"):
        check_size(model(), *size)
    check_size(model(), 16, 48)


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_an_image_has_a_pixel_a_side_at_least_in_whatever_size_it_is_made(size):
    one = model(1, native=lambda width, height: (32, 32))
    check_size(one, 1, 1)
    with pytest.raises(UserError, match="the sides must be"):
        check_size(one, *size)


def test_an_image_may_have_another_size_than_what_it_is_made_of():
    check_size(model(native=lambda width, height: (32, 32)), 30, 7)


def test_what_is_recorded_has_no_empty_field_and_is_under_the_names_of_the_settings():
    found = trained(class_data=None, class_prompt=["a cat"], class_images=2).recorded()
    assert found["class_prompt"] == ("a cat",)
    assert found["class_images"] == 2
    assert "size_multiple" not in found
    assert "class_data" not in found
    assert found.keys() <= vars(TrainSettings()).keys()
    assert (found["warmup"], found["resume"]) == (0, False), "which are not empty"


def test_micro_batches_are_counted_over_all_steps():
    assert trained(iters=6, grad_accumulation=3).batches == 18


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 100),
        ({"class_images": 3}, 3),
        ({"class_prompt": ["a cat"], "class_images": 0}, 0),
        ({"class_data": "theirs"}, 0),
        ({"class_data": "theirs", "prior_weight": 0.5}, 0),
    ],
)
def test_class_images_are_made_of_class_prompts_and_not_beside_the_users_own(given, count):
    assert train_config(TrainSettings(**given), model()).class_images == count


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"class_images": 1}, "--class-images 1: say of what"),
        ({"prior_weight": 0.5}, "--prior-weight 0.5: there are no class images"),
        ({"prior_weight": 0.0}, "--prior-weight 0: there are no class images"),
        ({"class_images": 1, "class_data": "theirs"}, "give one of them"),
    ],
)
def test_options_of_class_images_that_mean_nothing_are_refused(given, match):
    bare = model(class_prompt=())
    with pytest.raises(UserError, match=match):
        train_config(TrainSettings(**given), bare)
    assert train_config(TrainSettings(prior_weight=0.5, class_images=0), bare).class_images == 0
    assert train_config(TrainSettings(), bare).class_images == 0
