import os

import mlx.core as mx
import pytest

from mlx_blockskip.converters.hollow import write_hollow
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets
from mlx_blockskip.models.flux1 import FAMILY
from mlx_blockskip.models.registry import open_model
from support.models import assets, convert

FOLDERS = ("transformer", "text_encoder", "text_encoder_2", "vae")


def preset(name):
    return presets.configs(presets.folders()[name])


@pytest.mark.parametrize("bits", [0, 4])
def test_a_hollow_model_has_every_tensor_of_a_real_one(bits, tmp_path):
    tiny = assets() / "tiny-flux"
    configs = {folder: files.read_json(tiny / folder / "config.json") for folder in FOLDERS}
    write_hollow(tmp_path / "hollow", "flux1", configs, Precision("float32", bits), tiny)
    real = convert(tiny, tmp_path / "real", bits=bits)
    for folder in FOLDERS:
        index = files.read_json(real / folder / "model.safetensors.index.json")
        own = files.read_json(tmp_path / "hollow" / folder / "model.safetensors.index.json")
        assert own["weight_map"] == index["weight_map"]
        assert own["metadata"]["total_size"] == index["metadata"]["total_size"]
        assert own["metadata"].get("group_sizes") == index["metadata"].get("group_sizes")
        for file in set(index["weight_map"].values()):
            theirs = files.read_header(real / folder / file).entries
            assert files.read_header(tmp_path / "hollow" / folder / file).entries == theirs
    config = files.read_json(real / "config.json")
    assert files.read_json(tmp_path / "hollow" / "config.json")["quantization"] == config["quantization"]


def test_flux_dev_is_there_in_full_and_takes_no_disk(tmp_path):
    configs, tiny = preset("flux1-dev"), assets() / "tiny-flux"
    write_hollow(tmp_path / "m", "flux1", configs, Precision("bfloat16"), tiny, scheduler=configs["scheduler"])
    model = open_model(tmp_path / "m", 0)
    assert model.stack.kinds == ("double",) * 19 + ("single",) * 38
    body = {kind: model.reader.nbytes(i, "body") / 2**20 for i, kind in ((0, "double"), (19, "single"))}
    assert body == pytest.approx({"double": 432, "single": 216}, rel=1e-3)
    assert model.reader.shards.load(["proj_out.weight"])["proj_out.weight"].dtype == mx.bfloat16
    on_disk = sum(os.stat(path).st_blocks * 512 for path in tmp_path.rglob("*.safetensors"))
    apparent = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert apparent > 30 << 30
    assert on_disk < 64 << 20


def test_shallow_keeps_one_block_of_each_kind(tmp_path):
    configs = FAMILY.shallow(preset("flux1-schnell"))
    write_hollow(tmp_path / "m", "flux1", configs, Precision("bfloat16"), assets() / "tiny-flux")
    assert open_model(tmp_path / "m").stack.kinds == ("double", "single")


def test_it_replaces_nothing(tmp_path):
    with pytest.raises(UserError, match="already exists"):
        write_hollow(tmp_path, "flux1", preset("flux1-dev"), Precision("bfloat16"), assets() / "tiny-flux")
