"""`doctor --bench`: counted operations, times of blocks, and the steps that are predicted from them."""

import json
from dataclasses import fields, replace

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_blockskip.cli import app
from mlx_blockskip.engine import limits
from mlx_blockskip.models import layers, presets
from mlx_blockskip.tasks.doctor import bench, blocks, checks, forecast, hollows, machine
from mlx_blockskip.tasks.doctor.bench import Speed
from mlx_blockskip.tasks.doctor.blocks import Timed
from mlx_blockskip.tasks.doctor.counting import linear_flops
from mlx_blockskip.tasks.doctor.forecast import counts_of, step
from mlx_blockskip.tasks.doctor.rates import Rates
from mlx_blockskip.tasks.doctor.workshop import Workshop

RATES = Rates({"bf16": 4e12, "4 bit": 2e12}, {"bf16": 2e12, "4 bit": 1e12}, 1e9, 1e-3)
BLOCK = Timed("flux1-dev", "single", 768, 1.0, 0.1, 0.4, 0.01, 0.2, 174_000_000_000)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def flux(workshop):
    return hollows.published(workshop, "flux1-dev", 4)


class TestCounting:
    def test_linear_layers_are_counted_from_shapes_and_nothing_stays(self):
        before = layers.matmul
        w = {"a.weight": mx.zeros((5, 7))}
        with linear_flops() as found:
            layers.linear(w, "a", mx.zeros((2, 3, 7)))
        assert found == [2 * 2 * 3 * 7 * 5]
        assert layers.matmul is before

    def test_blocks_of_flux1(self, flux):
        """By hand: a single block's layers see 256 image and 512 text tokens, a double block's halves their own."""
        d, image, text = 3072, 256, 512
        counts = counts_of(flux)
        assert counts["single"] == 2 * (image + text) * d * (3 * d + 4 * d + 5 * d)
        assert counts["double"] == 2 * (image + text) * d * (4 * d + 8 * d)

    def test_quantized_and_whole_weights_count_alike(self, workshop):
        whole, packed = (counts_of(hollows.published(workshop, "sana-0.6b", bits)) for bits in (0, 4))
        assert whole == packed

    def test_nothing_is_computed(self, workshop):
        """Neither a block nor its weights: 227 MB of them would be read, beside 90 MB of the layers before them."""
        flux = hollows.published(workshop, "flux1-dev")
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        counts_of(flux)
        assert mx.get_peak_memory() - before < 128 << 20


class TestTheForecast:
    def test_products_by_hand(self, flux):
        counts = {"double": 0, "single": 100_000_000_000}
        found = step(flux, "4 bit", counts, RATES, [], 64 << 30)
        retained = sum(kind == "single" for kind in self.retained(flux))
        assert retained > 0
        assert found.products == pytest.approx(retained * (2 * 100e9 / 2e12 + 100e9 / 1e12))
        assert (found.other, found.basis, found.reading) == (0, "", 0)
        assert found.waiting == pytest.approx(len(self.retained(flux)) * 3e-3)

    def retained(self, of):
        from mlx_blockskip.blockskip import plan

        chosen = plan.choose(of.model.stack.depth, ratio=0.5, recorded=of.model.defaults.plans)
        return [of.model.stack.kinds[index] for index in chosen.retained]

    def test_other_work_grows_with_the_products(self, flux):
        counts = {"double": 0, "single": 2 * BLOCK.flops}
        found = step(flux, "4 bit", counts, RATES, [BLOCK], 64 << 30)
        assert found.other == pytest.approx(sum(k == "single" for k in self.retained(flux)) * 2 * BLOCK.other)
        assert found.basis == "flux1-dev, 768 tokens"

    @pytest.mark.parametrize(
        ("rates", "budget", "binds"),
        [
            (RATES, 64 << 30, "products"),
            (replace(RATES, reading=1e6), 1 << 30, "reading"),
            (replace(RATES, waiting=10.0), 64 << 30, "waiting"),
        ],
    )
    def test_what_binds(self, flux, rates, budget, binds):
        found = step(flux, "4 bit", counts_of(flux), rates, [replace(BLOCK, other=0.0)], budget)
        assert found.binds == binds
        together = found.products + found.other + found.waiting
        assert found.seconds == pytest.approx(max(together, found.reading))

    def test_reading_is_of_what_does_not_stay(self, flux):
        counts = counts_of(flux)
        little, more, ample = (
            step(flux, "4 bit", counts, RATES, [], budget).reading for budget in (1 << 30, 3 << 30, 64 << 30)
        )
        assert little > more > ample == 0
        assert little - more == pytest.approx(2 * (1 << 30) / RATES.reading)

    def test_the_nearest_block_is_of_the_same_model_then_kind(self):
        other, kind = replace(BLOCK, model="a"), replace(BLOCK, model="b", kind="double")
        assert forecast.nearest([other, kind, BLOCK], "flux1-dev", "double") is BLOCK
        assert forecast.nearest([other, kind], "flux1-dev", "double") is kind
        assert forecast.nearest([], "flux1-dev", "double") is None


class TestBlocks:
    def test_a_block_that_would_take_too_long_is_run_smaller_or_not_at_all(self, workshop):
        of = hollows.published(workshop, "sana-0.6b", 4)
        whole = RATES.products(blocks.counted(of, "sana", blocks.sample_of(of)), "4 bit")
        enough = (blocks.RUNS + 1) * whole
        assert blocks._affordable(of, "sana", RATES, enough) == 1.0
        assert blocks._affordable(of, "sana", RATES, 0.5 * enough) == 0.5
        assert blocks._affordable(of, "sana", RATES, 1e-9) is None
        assert blocks.timed(workshop, RATES, 0.0, lambda _: None) == ()

    def test_a_block_is_timed(self, workshop):
        of = hollows.published(workshop, "sana-0.6b", 4)
        with limits.at_least(1 << 30):
            found = blocks.run(of, "sana", 0.125, RATES)
        assert found.whole > found.forward > found.building > 0
        assert found.tokens == 4
        assert found.flops > 0


def test_tokens_follow_the_calibration():
    assert bench.affordable(10.0) == 768
    assert bench.affordable(1e-3) == bench.TOKENS[-1]
    assert bench.TOKENS[-1] < bench.affordable(0.04) < 768


def test_times_are_medians_after_a_run_that_warms_up(monkeypatch):
    ticks = iter([0, 100, 0, 3, 0, 1, 0, 2])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    assert bench.seconds_of(lambda: mx.zeros(1)) == 2


def test_the_command_prints_speeds_and_every_preset(monkeypatch):
    """All that is measured made small."""
    monkeypatch.setattr(checks, "TRIALS", ())
    monkeypatch.setattr(machine, "disk_speed", lambda: 1e9)
    for name, value in {
        "WIDTH": 64,
        "HIDDEN": 128,
        "HEADS": 2,
        "TOKENS": (16,),
        "CALIBRATION": 64,
        "SECONDS": 0.0,
    }.items():
        monkeypatch.setattr(bench, name, value)
    document = json.loads(CliRunner().invoke(app, ["doctor", "--quick", "--bench", "--json"]).stdout)
    found = document["bench"]
    assert set(found) == {"speeds", "blocks", "steps"}
    assert {speed["name"] for speed in found["speeds"]} >= {"product, bf16", "product back, 4 bit", "reading"}
    assert all(speed["value"] > 0 for speed in found["speeds"])
    assert all(set(speed) == {field.name for field in fields(Speed)} for speed in found["speeds"])
    assert {one["model"] for one in found["steps"]} == set(presets.folders())
    assert all(one["seconds"] > 0 for one in found["steps"])
    assert {one["precision"] for one in found["steps"]} == {"4 bit", "bf16"}
