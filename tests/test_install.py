"""What is installed: the package with its data, and the folder convert/ under its name."""

import importlib.metadata
import sys
from importlib import resources
from pathlib import Path

import mlx_blockskip
import mlx_blockskip.converters
from mlx_blockskip.engine.environment import preload


def test_converters_and_assets_are_part_of_the_package():
    assert mlx_blockskip.converters.__name__ == "mlx_blockskip.converters"
    root = Path(str(resources.files("mlx_blockskip")))
    assert (root / "py.typed").is_file()
    assets = root / "assets"
    for model in ("tiny-flux", "tiny-sana"):
        assert (assets / model / "model_index.json").is_file()
    assert len(list((assets / "subjects" / "hedgehog").glob("*.png"))) == 5
    for name in ("tiny-clip", "tiny-dino"):
        held = {path.name for path in (assets / name).iterdir()}
        assert held >= {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 34 << 20


def test_openblas_is_opened_before_mlx_and_never_after():
    order = list(sys.modules)
    assert order.index("mlx_blockskip.engine.environment") < order.index("mlx.core"), "these tests run on the slow BLAS"
    assert not preload()


def test_the_version_is_one():
    assert importlib.metadata.version("mlx-blockskip") == mlx_blockskip.__version__


def test_the_public_api_is_lazy_and_documented():
    for name in mlx_blockskip.__all__:
        assert getattr(mlx_blockskip, name).__doc__
