"""`doctor`: every check can fail, the report keeps its shape, and nothing private is in it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_blockskip import doctor
from mlx_blockskip.cli import app
from mlx_blockskip.engine import files, philox
from mlx_blockskip.events import Note, Step, Table, Warning
from mlx_blockskip.models import attention as seam
from mlx_blockskip.tasks.doctor import checks, fits, kernels, machine, networks, peaks, runs
from mlx_blockskip.tasks.doctor.trials import FAILED, PASSED, SKIPPED, Trial, hold
from mlx_blockskip.tasks.doctor.workshop import Workshop, as_numpy, references_path
from support import winograd

TOKEN = "hf_abcdefghijklmnop"
BY_NAME = {trial.name: trial for trial in checks.TRIALS}
FINE = Trial("fine", lambda _: 0.5, 1.0, "parts", "nothing", quick=True)
SLOW = Trial("slow", lambda _: 0.5, 1.0, "parts", "nothing")
WRONG = Trial("wrong", lambda _: 1.5, 1.0, "parts", "something is wrong; mend it", quick=True)
PHASES = dict.fromkeys((*fits.TRAINING, *fits.DRAWING), 1 << 20)

SCHEMA = {
    "": {"format", "version", "healthy", "machine", "fits", "checks", "bench", "seconds"},
    "machine": {
        *("chip", "memory", "recommended", "budget", "system", "architecture", "translated", "python", "mlx"),
        *("unsupported", "device", "gpu", "power", "caffeinate", "disk_free", "disk_speed", "logged_in", "environment"),
    },
    "checks": {"name", "status", "value", "bound", "unit", "means", "seconds", "note"},
    "fits": {"model", "precision", "ratio", "phases", "fits"},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("doctor"))


@pytest.fixture
def held(monkeypatch):
    """Sets the trials that there are."""
    return lambda *given: monkeypatch.setattr(checks, "TRIALS", given)


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


class TestTheSelfTest:
    def test_the_quick_ones_pass_here(self, workshop):
        found = [hold(trial, workshop) for trial in checks.TRIALS if trial.quick]
        assert [check.name for check in found if check.status != PASSED] == []

    @pytest.mark.parametrize("name", [trial.name for trial in checks.TRIALS if not trial.quick])
    def test_the_others_pass_here(self, name, workshop):
        check = hold(BY_NAME[name], workshop)
        assert check.status == PASSED, check.found

    def test_names_are_unique_and_every_failure_says_what_to_do(self):
        assert len(BY_NAME) == len(checks.TRIALS)
        assert all(len(trial.means) > 60 and trial.means.endswith(".") for trial in checks.TRIALS)

    def test_the_references_are_small_and_in_the_package(self):
        assert references_path().stat().st_size < 300 << 10


def spoilt_product(monkeypatch):
    """The ten bits of TF32's mantissa."""
    cut = lambda x: (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)  # noqa: E731
    monkeypatch.setattr(kernels, "multiplied", lambda a, b: cut(a) @ cut(b))


def spoilt_convolution(monkeypatch):
    """What Metal computes by Winograd's algorithm."""

    def convolved(weights, name, x):
        return mx.array(winograd.convolved(as_numpy(x), as_numpy(weights[f"{name}.weight"])))

    monkeypatch.setattr(kernels, "conv2d", convolved)


def test_winograd_is_emulated_rightly():
    """Without rounding it is the convolution."""
    x, weight = philox.normal(0, 1, shape=(1, 17, 20, 4)), philox.normal(0, 2, shape=(5, 3, 3, 4))
    found = winograd.convolved(x.astype(np.float64), weight.astype(np.float64), keep=lambda x: x)
    assert np.allclose(found, kernels.convolved(x, weight), atol=1e-4)
    assert np.array_equal(winograd.bfloat16(x), np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)))


def spoilt_first_attention(monkeypatch):
    """Another kernel outside of a gradient than inside."""
    calls = []

    def attention(*qkv, scale):
        calls.append(None)
        return seam.attention(*qkv, scale=scale) * (1.004 if len(calls) % 2 else 1)

    monkeypatch.setattr(kernels, "attention", attention)


def spoilt_attention(monkeypatch):
    monkeypatch.setattr(
        kernels,
        "attention",
        lambda q, k, v, scale: seam.attention(q, k, v, scale=1.1 * scale) * mx.array(1.03, q.dtype),
    )


def spoilt_outputs(monkeypatch):
    own = networks.outputs
    monkeypatch.setattr(networks, "outputs", lambda *given: {k: v * 1.1 for k, v in own(*given).items()})


def spoilt_vectors(monkeypatch):
    own = networks.vectors
    monkeypatch.setattr(networks, "vectors", lambda *given: {k: v[:, ::-1] for k, v in own(*given).items()})


def spoilt_training(monkeypatch):
    """An adapter in which every tensor is a little larger, and other where it is streamed or resumed."""
    own = runs.trained

    def trained(workshop, name, budget, stop=False):
        loss, path = own(workshop, name, "auto")
        target = workshop.place(f"spoilt-{name}-{budget}-{stop}.safetensors")
        share = 1.01 + 0.01 * (budget == "0") + 0.02 * stop
        mx.save_safetensors(str(target), {k: v * share for k, v in files.load_lazily(path).items()})
        return loss, target

    monkeypatch.setattr(runs, "trained", trained)


def spoilt_picture(monkeypatch):
    own = runs.drawn
    monkeypatch.setattr(runs, "drawn", lambda *given: np.minimum(own(*given) + 1, 255))


def spoilt_peak(monkeypatch):
    own = peaks.measured
    monkeypatch.setattr(peaks, "measured", lambda of: 2 * own(of) + (200 << 20))


def spoilt_settings(monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")


def spoilt_kernels(monkeypatch):
    """Metal, and kernels that do not run there."""
    monkeypatch.setattr("mlx_blockskip.engine.limits.on_metal", lambda: True)


def spoils():
    """For each check, what makes it fail."""
    for name in BY_NAME:
        if name.startswith("attention"):
            yield name, spoilt_first_attention if "without gradient" in name else spoilt_attention
        elif name.startswith("peak"):
            yield name, spoilt_peak
        elif name.endswith((", float32", ", bfloat16")):
            yield name, spoilt_outputs
        elif name.endswith("picture"):
            yield name, spoilt_picture
        elif name.endswith(("training", "resident", "whole")):
            yield name, spoilt_training
        else:
            own = {
                "float32 products": spoilt_product,
                "convolution in bfloat16": spoilt_convolution,
                "settings of MLX in doubt": spoilt_settings,
                "elementwise kernels refused": spoilt_kernels,
            }
            yield name, own.get(name, spoilt_vectors)


@pytest.mark.parametrize(("name", "spoil"), list(spoils()))
def test_every_check_can_fail(name, spoil, workshop, monkeypatch):
    spoil(monkeypatch)
    fresh = Workshop(workshop.directory)  # what was computed before counts for nothing; conversions stay
    check = hold(BY_NAME[name], fresh)
    assert check.status == FAILED, check.found
    assert check.value is not None, check.note


class TestHolding:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_fails_and_is_json(self, value):
        check = hold(replace(FINE, measure=lambda _: value), Workshop(Path()))
        assert (check.status, check.value) == (FAILED, None)
        json.dumps(asdict(check), allow_nan=False)

    def test_an_error_fails_that_check_alone(self, held):
        def broken(_):
            raise RuntimeError("the GPU\nhangs")

        held(replace(FINE, name="broken", measure=broken), FINE)
        report = doctor(quick=True)
        assert [check.status for check in report.checks] == [FAILED, PASSED]
        assert report.checks[0].note == "RuntimeError: the GPU hangs"
        assert "FAILED broken: RuntimeError: the GPU hangs" in report.text()

    def test_the_bound_itself_passes(self):
        assert hold(replace(FINE, measure=lambda _: 1.0), Workshop(Path())).status == PASSED


class TestTheCommand:
    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_a_failure_is_status_one(self, held, options):
        held(FINE, WRONG)
        result = invoke("--quick", *options)
        assert result.exit_code == 1
        assert "something is wrong; mend it" in result.output

    def test_all_passed_is_status_zero_and_ends_with_what_to_paste(self, held):
        held(FINE)
        result = invoke("--quick")
        assert result.exit_code == 0, result.output
        *_, last = result.stdout.strip().splitlines()
        assert last == "---- to here ----"
        pasted = result.stdout.split("---- paste into an issue ----")[1]
        assert "checks: 1 passed, 0 failed, 0 skipped" in pasted
        assert max(map(len, pasted.splitlines())) <= 100

    def test_json_is_one_document_of_a_fixed_shape(self, held, monkeypatch):
        monkeypatch.setattr(fits, "read", lambda: {"backend": "b", "models": {"m": {"bf16": {"0.5": PHASES}}}})
        held(FINE, WRONG)
        document = json.loads(invoke("--quick", "--json").stdout)
        assert set(document) == SCHEMA[""]
        assert set(document["machine"]) == SCHEMA["machine"]
        assert [set(check) for check in document["checks"]] == [SCHEMA["checks"]] * 2
        assert [set(fit) for fit in document["fits"]] == [SCHEMA["fits"]]
        assert (document["format"], document["healthy"], document["bench"]) == (1, False, None)

    def test_quick_holds_the_quick_ones_and_lists_the_others_as_skipped(self, held):
        held(FINE, SLOW)
        document = json.loads(invoke("--quick", "--json").stdout)
        assert [check["status"] for check in document["checks"]] == [PASSED, SKIPPED]
        assert 10 < sum(trial.quick for trial in BY_NAME.values()) < len(BY_NAME)

    def test_without_quick_all_are_held(self, held, monkeypatch):
        monkeypatch.setattr(machine, "disk_speed", lambda: 1e9)
        held(FINE, SLOW)
        document = json.loads(invoke("--json").stdout)
        assert [check["status"] for check in document["checks"]] == [PASSED, PASSED]
        assert document["machine"]["disk_speed"] == 1e9

    def test_events_are_tables_and_notes(self, held):
        held(FINE, WRONG)
        seen = []
        doctor(quick=True, on_event=seen.append)
        assert any(isinstance(event, Table) and event.title == "This machine" for event in seen)
        assert [event.done for event in seen if isinstance(event, Step)] == [1, 2]
        assert [event.message.split(":")[0] for event in seen if isinstance(event, Warning)] == ["wrong"]
        assert isinstance(seen[-1], Note)

    def test_limits_of_mlx_are_what_they_were(self, held):
        def bounds(_):
            mx.set_cache_limit(1 << 20)
            return 0.0

        held(replace(FINE, measure=bounds))
        before = mx.set_cache_limit(123 << 20)
        try:
            doctor(quick=True)
            assert mx.set_cache_limit(before) == 123 << 20
        finally:
            mx.set_cache_limit(before)


class TestPrivacy:
    @pytest.mark.parametrize("options", [(), ("--json",)])
    def test_no_token_and_no_home_in_any_output(self, held, options, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("MLX_SOMETHING_PRIVATE", TOKEN)
        held(FINE)
        output = invoke("--quick", *options).output
        assert TOKEN not in output
        assert str(Path.home()) not in output
        assert ('"logged_in": true' if options else "| yes") in output

    def test_variables_that_change_results_are_shown(self, held, monkeypatch):
        monkeypatch.setenv("MLX_ENABLE_TF32", "0")
        held(FINE)
        report = doctor(quick=True)
        assert report.machine.environment["MLX_ENABLE_TF32"] == "0"
        assert "MLX_ENABLE_TF32=0" in report.text()
