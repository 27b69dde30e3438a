"""What `doctor` says of the machine, and of what fits it."""

from dataclasses import replace

from mlx_blockskip import doctor
from mlx_blockskip.models import presets
from mlx_blockskip.tasks.doctor import checks, fits, machine


class TestTheMachine:
    def test_is_known_here(self):
        found = machine.examine(timed=False)
        assert found.memory > found.budget > 0
        assert found.chip
        assert found.disk_free > 0
        assert found.disk_speed is None

    def test_processors_are_read_from_what_the_system_says(self):
        assert machine.model_name("processor\t: 0\nmodel name\t: Some CPU\n") == "Some CPU"
        assert machine.model_name("") is None

    def test_a_disk_that_cannot_be_written_is_not_measured(self, monkeypatch):
        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mlx_blockskip.engine.disk.read_speed", full)
        assert machine.disk_speed() is None

    def test_what_should_change_is_said(self):
        found = replace(machine.examine(timed=False), power="battery", logged_in=False, device="GPU")
        found = replace(found, unsupported="too old")
        said = machine.advice(found)
        assert [text for text in said if text == "too old" or "battery" in text or "hf auth login" in text] == said
        assert len(said) == 3
        assert machine.advice(replace(found, unsupported=None, power="mains", logged_in=True)) == []

    def test_a_mac_is_asked_for_what_keeps_it_awake(self):
        found = replace(machine.examine(timed=False), unsupported=None, power="mains", logged_in=True, device="GPU")
        for system, there, row in (
            ("macOS 15.5", True, "found"),
            ("macOS 15.5", False, "not found"),
            ("Linux 6", False, None),
        ):
            mac = replace(found, system=system, caffeinate=there)
            assert dict(machine.table(mac).rows).get("caffeinate") == row
            assert any("caffeinate" in text for text in machine.advice(mac)) == (row == "not found")


def phases(train: int, decode: int) -> dict[str, int]:
    """Bytes of every phase, in GiB."""
    small = dict.fromkeys((*fits.TRAINING, *fits.DRAWING), 1 << 20)
    return {**small, "train": train << 30, "decode": decode << 30}


class TestWhatFits:
    MODELS = {  # noqa: RUF012
        "small": {"bf16": {"0": phases(4, 1), "0.5": phases(1, 1)}},
        "large": {"4 bit": {"0.5": phases(1, 2)}},
    }

    def test_is_judged_by_the_largest_phase_with_a_margin(self):
        whole, half, large = fits.judged(self.MODELS, 2 << 30)
        assert (whole.model, whole.precision, whole.ratio, whole.fits) == ("small", "bf16", 0.0, False)
        assert half.fits
        assert not large.fits, "2 of 2 GiB leave no margin"

    def test_a_row_a_model_and_precision(self):
        table = fits.table(fits.judged(self.MODELS, 2 << 30), 2 << 30, "the CPU backend")
        assert table.columns == ("model", "weights", "train, 0%", "train, 50%", "generate", "fits 2.0 GiB")
        assert table.rows == (
            ("small", "bf16", "4.00", "1.00", "1.00", "yes"), ("large", "4 bit", "-", "1.00", "2.00", "no")
        )  # fmt: skip

    def test_without_a_file_there_is_no_table(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fits, "path", lambda: tmp_path / "none.json")
        monkeypatch.setattr(checks, "TRIALS", ())
        assert doctor(quick=True).fits == ()

    def test_the_stored_figures_are_of_known_models(self):
        stored = fits.read()["models"]
        assert set(stored) <= set(presets.folders())
        for precisions in stored.values():
            assert set(precisions) == {"bf16", "8 bit", "4 bit"}
            for ratios in precisions.values():
                assert set(ratios) == {"0", "0.3", "0.4", "0.5"}
                assert all(set(phases) == {*fits.TRAINING, *fits.DRAWING} for phases in ratios.values())
                assert all(1 << 24 < peak < 1 << 34 for phases in ratios.values() for peak in phases.values())
