"""An adapter that was trained on a base model is used with the model that was distilled from it."""

import json

import numpy as np
from conftest import QUICK
from PIL import Image

from mlx_blockskip import fuse, generate, train
from mlx_blockskip.events import Warning, listening
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.checkpoint import adapters
from mlx_blockskip.tasks.sampling.pictures import PNG_KEY
from support import flux2
from support.models import convert


def test_train_on_a_base_and_draw_with_its_distilled_sibling(tiny_klein, tmp_path):
    events = []
    distilled = convert(flux2.checkpoint(tmp_path / "hf", distilled=True), tmp_path / "mlx", "flux2")
    own = {"model": str(tiny_klein), "adapter_path": str(tmp_path / "a"), "learning_rate": 0.1, "patch_mode": "resize"}
    adapter = str(train(settings=TrainSettings(**{**QUICK, **own})).adapter_path)

    def drawn(name, **options):
        (path,) = generate(
            model=str(distilled), prompt=["a sks toy"], output=str(tmp_path / name), memory_budget="any",
            on_event=events.append, **options,
        )  # fmt: skip
        image = Image.open(path)
        return np.asarray(image, float), json.loads(image.info[PNG_KEY])

    (plain, _), (adapted, info) = drawn("a.png"), drawn("b.png", adapter_path=[adapter])
    assert np.abs(plain - adapted).max() > 2
    assert open_model(distilled).identity != open_model(tiny_klein).identity
    assert info["cfg_scale"] == 1.0, "and not 4, as its base has it"
    fuse(model=str(distilled), adapter_path=[adapter], save_path=str(tmp_path / "fused"), on_event=events.append)
    assert not [event for event in events if isinstance(event, Warning)]


def test_models_that_are_no_siblings_are_told_apart(tiny_flux, tiny_klein, tiny_z_image):
    """Asked of a model of each, with another's identity recorded."""
    for path, warned in ((tiny_flux, True), (tiny_klein, False), (tiny_z_image, False)):
        events, model = [], open_model(path)
        with listening(events.append):
            adapters.warn_of_another_model(path, {"base_model_identity": "other"}, model)
            adapters.warn_of_another_model(path, {"base_model_identity": model.identity}, model)
            adapters.warn_of_another_model(path, {}, model)
        assert len(events) == warned
