import os

import mlx_blockskip  # noqa: F401  (before mlx.core is imported: it makes its settings)

# isort: split

import hypothesis
import pytest

from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import TrainSettings
from support import flux2, z_image
from support.compare import gather, parity_table, worst
from support.hub_server import attach, running
from support.models import HEDGEHOG, assets, convert
from support.toy import make_toy

QUICK = {
    "data": str(HEDGEHOG), "iters": 4, "rank": 2, "learning_rate": 1e-3, "steps_per_save": 2, "class_images": 0,
    "memory_budget": "any",  # nothing has to be traced first
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--long", nargs="?", const=16, default=1, type=int, help="so many times as many trials of faults and fuzzing"
    )


hypothesis.settings.register_profile("suite", database=None, deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Models that tests convert go into a cache of the test session."""
    monkeypatch.setenv("MLX_BLOCKSKIP_CACHE", str(tmp_path_factory.getbasetemp() / "models"))


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A Hub on the loopback that this process's client talks to; its cache is the test's own."""
    with running() as server:
        attach(server, monkeypatch, tmp_path / "hf")
        yield server


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    """What tests write need not survive a power loss; those of the flushing itself look at what is called."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def _asleep_as_usual(monkeypatch):
    """Tests keep no Mac awake, and say nothing of its battery."""
    monkeypatch.setenv("MLX_BLOCKSKIP_KEEP_AWAKE", "0")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """The bundled model, converted to float32."""
    return convert(assets() / "tiny-flux", tmp_path_factory.mktemp("flux") / "tiny-flux")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory):
    """The other bundled model, converted to float32."""
    return convert(assets() / "tiny-sana", tmp_path_factory.mktemp("sana") / "tiny-sana", "sana")


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory):
    """A random FLUX.2, converted to float32."""
    path = tmp_path_factory.mktemp("klein")
    return convert(flux2.checkpoint(path / "hf"), path / "tiny-klein", "flux2")


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory):
    """A random Z-Image, converted to float32: with a prelude, and prompts of different lengths."""
    path = tmp_path_factory.mktemp("z_image")
    return convert(z_image.checkpoint(path / "hf"), path / "tiny-z-image", "z_image")


@pytest.fixture(scope="session")
def toy_with_prelude(tmp_path_factory):
    """Two blocks that are swept before block 0 and not counted."""
    return make_toy(tmp_path_factory.mktemp("prelude") / "toy", prelude=2)


@pytest.fixture(scope="session")
def toy_of_many_lengths(tmp_path_factory):
    """Prompts are encoded to their own lengths."""
    return make_toy(tmp_path_factory.mktemp("lengths") / "toy", prelude=1, varied=True)


EVERY = ("tiny_flux", "tiny_klein", "tiny_sana", "tiny_z_image", "toy")
"""A small model of every family; contract tests run over all of them."""


@pytest.fixture(scope="session", params=["tiny_z_image", "tiny_sana", "toy"])
def family_model(request):
    """A model directory of families that differ: with joint attention, a prelude and prompts of different lengths;
    without; and the toy. The others with joint attention have their turn in the contract tests."""
    return request.getfixturevalue(request.param)


on_every = pytest.mark.parametrize("family_model", EVERY, indirect=True)

on_toy = pytest.mark.parametrize("family_model", ["toy"], indirect=True)
"""For tests of what no family has a part in, and that take many runs."""


@pytest.fixture
def open_family(family_model):
    return lambda budget=None: open_model(family_model, budget)


@pytest.fixture
def quick(family_model, tmp_path):
    """Settings of a short run on each family."""

    def settings(name="a", **options):
        fixed = {**QUICK, "model": str(family_model), "train_resolution": 32, "resolution": 64, "batch_size": 2}
        return TrainSettings(**{**fixed, "adapter_path": str(tmp_path / name), **options})

    return settings


def pytest_sessionfinish(session):
    """A worker hands what it held against references to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = worst


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for name, (error, bound, count) in getattr(node, "workeroutput", {}).get("parity", {}).items():
        gather(name, error, bound, count)


def pytest_terminal_summary(terminalreporter):
    """Print the parity table where something was held against a reference implementation."""
    if worst:
        terminalreporter.write_sep("-", "parity, float32")
        terminalreporter.write_line(parity_table())
