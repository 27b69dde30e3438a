"""What a run draws for each training sample: the noise level follows the settings and the model's own scheduler."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_blockskip.data import load_dataset
from mlx_blockskip.models import schedulers
from mlx_blockskip.models.defaults import ModelDefaults
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.defaults import train_config
from mlx_blockskip.tasks.train.samples import TrainingSamples
from support.models import HEDGEHOG


def samples(scheduler, mean=0.0, std=1.0):
    """A run's samples, which can be drawn; nothing is encoded."""
    model = SimpleNamespace(
        scheduler=schedulers.parse(scheduler), latent_shape=lambda height, width: (height // 8, width // 8, 4),
        defaults=ModelDefaults(64, 32, 64, 64, 8, 4), size_multiple=16,
    )  # fmt: skip
    given = TrainSettings(seed=3, batch_size=2, timestep_mean=mean, timestep_std=std)
    return TrainingSamples(train_config(given, model), model, load_dataset(HEDGEHOG), None, ())


def logit(s):
    return math.log(s / (1 - s))


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        ({"shift": 3.0}, 3.0),
        ({"shift": 3.0, "use_dynamic_shifting": True}, 1.0),
        (
            {
                "_class_name": schedulers.DPM,
                "flow_shift": 2.0,
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
            },
            2.0,
        ),
        ({}, 1.0),
    ],
)
def test_noise_levels_are_shifted_as_the_scheduler_says(scheduler, shift):
    """A shift adds its logarithm to the logit, whatever mean and deviation; noise and image do not depend on it."""
    plain, shifted = samples({"shift": 1.0}, 0.4, 1.5), samples(scheduler, 0.4, 1.5)
    for k in range(20):
        one, other = plain.draw(k), shifted.draw(k)
        assert logit(other.s) - logit(one.s) == pytest.approx(math.log(shift), abs=1e-9)
        assert one.image == other.image
        assert np.array_equal(one.noise, other.noise)
        assert np.array_equal(one.posterior, other.posterior)


def test_noise_levels_have_the_mean_and_the_deviation_asked_for():
    """Of the logit, which is normal: 600 draws are off by less than four standard errors."""
    count, mean, std = 600, -0.7, 0.6
    drawing = samples({"shift": 3.0}, mean, std)
    normal = np.array([(logit(drawing.draw(k).s) - math.log(3.0) - mean) / std for k in range(count)])
    assert abs(normal.mean()) < 4 / math.sqrt(count)
    assert abs(normal.std() - 1) < 4 / math.sqrt(2 * count)
    assert len(np.unique(normal)) == count


def test_the_noise_of_the_posterior_and_of_the_flow_are_two_and_normal():
    draws = [samples({}).draw(k) for k in range(40)]
    for name in ("posterior", "noise"):
        values = np.stack([getattr(draw, name) for draw in draws])
        assert values.shape == (40, 1, 4, 4, 4)
        assert abs(values.mean()) < 4 / math.sqrt(values.size)
        assert abs(values.std() - 1) < 4 / math.sqrt(2 * values.size)
    both = [np.stack([getattr(draw, name) for draw in draws]).ravel() for name in ("posterior", "noise")]
    assert abs(np.corrcoef(both)[0, 1]) < 4 / math.sqrt(both[0].size)
