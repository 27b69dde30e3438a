"""A checkpoint that leaves out what the reference classes fill, as published ones do; and what is refused early."""

import shutil
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import convert, generate
from mlx_blockskip.converters.run import load_table
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import schedulers
from support.models import assets

MODELS = {"tiny-flux": "flux1", "tiny-sana": "sana"}


def without_defaults(config, path):
    """Remove every option from the file that has the reference's default; gives their names."""
    content = files.read_json(path)
    parsed = config.from_dict(content)
    left_out = {f.name for f in fields(config) if f.name in content and getattr(parsed, f.name) == f.default}
    files.write_json(path, {name: value for name, value in content.items() if name not in left_out})
    return left_out


def drawn(source, target):
    model = convert(hf_path=str(source), mlx_path=str(target), dtype="float32")
    (image,) = generate(
        model=str(model), prompt="a penguin", seed=3, steps=2, width=64, height=64, output=str(target / "a.png")
    )
    return np.asarray(Image.open(image))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_without_its_defaults_gives_the_same_image(name, tmp_path):
    source, table = shutil.copytree(assets() / name, tmp_path / "hf"), load_table(MODELS[name])
    left_out = {folder: without_defaults(cls, source / folder / "config.json") for folder, cls in table.CONFIGS.items()}
    scheduler = type(schedulers.read(source))
    assert without_defaults(scheduler, source / "scheduler" / schedulers.FILE)
    assert all(left_out.values()), left_out
    assert {"in_channels", "out_channels"} <= left_out["transformer"]
    np.testing.assert_array_equal(drawn(source, tmp_path / "bare"), drawn(assets() / name, tmp_path / "whole"))
    for folder in table.FOLDERS:
        written = tmp_path / "bare" / folder / "config.json"
        assert written.read_bytes() == (source / folder / "config.json").read_bytes(), "the file is not completed"


@pytest.mark.parametrize(
    ("name", "file", "change", "sentence"),
    [
        ("tiny-flux", "transformer/config.json", {"patch_size": 2}, "patch_size=2 is not implemented"),
        ("tiny-flux", "transformer/config.json", {"axes_dims_rope": [8, 8]}, r"axes_dims_rope 8 \+ 8 is not"),
        ("tiny-flux", "text_encoder/config.json", {"hidden_act": "relu"}, 'hidden_act="relu" is not implemented'),
        ("tiny-flux", "text_encoder_2/config.json", {"dense_act_fn": "gelu"}, "dense_act_fn 'gelu' with"),
        ("tiny-flux", "vae/config.json", {"latents_mean": [0.0]}, "latents_mean=.* is not implemented"),
        ("tiny-flux", "scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "use_beta_sigmas=true is not"),
        ("tiny-sana", "transformer/config.json", {"qk_norm": "layer_norm"}, 'qk_norm="layer_norm" is not implemented'),
        ("tiny-sana", "text_encoder/config.json", {"model_type": "gemma3_text"}, 'model_type="gemma3_text" is not'),
        ("tiny-sana", "vae/config.json", {"decoder_act_fns": "elu"}, 'decoder_act_fns="elu" is not implemented'),
        ("tiny-sana", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler is not"),
    ],
)
def test_what_is_not_implemented_is_refused_before_there_are_weights(tmp_path, name, file, change, sentence):
    source = tmp_path / "hf"
    shutil.copytree(assets() / name, source, ignore=shutil.ignore_patterns("*.safetensors"))
    files.write_json(source / file, {**files.read_json(source / file), **change})
    with pytest.raises(UserError, match=f"{file}: {sentence}"):
        convert(hf_path=str(source), mlx_path=str(tmp_path / "mlx"))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("text_encoder_2/config.json", {"feed_forward_proj": "gated-silu"}),
        ("scheduler/scheduler_config.json", {"stochastic_sampling": True}),
    ],
)
def test_it_is_refused_when_a_model_is_opened_too(tiny_flux, tmp_path, file, change):
    from mlx_blockskip.models.registry import open_model

    path = shutil.copytree(tiny_flux, tmp_path / "mlx")
    files.write_json(path / file, {**files.read_json(path / file), **change})
    (path / "manifest.json").unlink()  # of a model that an older version converted
    with pytest.raises(UserError, match=f"{file}: {next(iter(change))}=.* is not implemented"):
        open_model(path)
