"""The samplers of SANA against the schedulers of diffusers, step by step; and the noise levels that training draws."""

import math
from statistics import NormalDist

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import flow, schedulers
from mlx_blockskip.tasks.sampling.denoise import fresh_noise
from support.compare import assert_parity, relative_error, same_bits

SHAPE = (1, 4, 6, 8)
DPM = {
    **{"_class_name": schedulers.DPM, "use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    **{"solver_order": 2, "num_train_timesteps": 1000},
}
SCM = {
    **{"_class_name": schedulers.CONSISTENCY, "prediction_type": "trigflow", "sigma_data": 0.5},
    "num_train_timesteps": 1000,
}


def velocity(x, s):
    """Some smooth function of latents and sigma, the same in numpy."""
    return np.sin(1.3 * x + 2 * s) - (0.7 + s) * x


def noise(step=99):
    return philox.normal(1, step, shape=SHAPE)


def ours(scheduler, steps, fresh=None):
    """Latents after every step."""
    sampler = flow.sampler(schedulers.parse(scheduler), steps, 24, fresh)
    assert sampler.times.shape == (steps,)
    assert sampler.times.dtype == np.float32
    assert sampler.times.min() > 0
    assert sampler.times.max() <= 1
    latents, found = mx.array(noise()), []
    for i in range(steps):
        v = velocity(np.array(latents), float(sampler.times[i]))
        latents = sampler.step(i, mx.array(v), latents)
        found.append(np.array(latents))
    return found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"solver_order": 1},
        {"solver_type": "heun"},
        {"flow_shift": 1.0, "lower_order_final": False},
        {"flow_shift": 6.0, "euler_at_final": True},
        {"num_train_timesteps": 500},
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20])
def test_dpm_solver_equals_diffusers(change, steps):
    torch = pytest.importorskip("torch")
    from diffusers import DPMSolverMultistepScheduler

    config = DPM | change
    reference = DPMSolverMultistepScheduler.from_config(config)
    reference.set_timesteps(steps)
    latents = torch.from_numpy(noise())
    for found, t in zip(ours(config, steps), reference.timesteps, strict=True):
        v = velocity(latents.numpy(), float(t) / config["num_train_timesteps"])
        latents = reference.step(torch.from_numpy(v.astype(np.float32)), t, latents, return_dict=False)[0]
        assert_parity("DPMSolverMultistepScheduler, a step", found, latents.numpy(), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_consistency_sampling_equals_diffusers(monkeypatch, steps):
    """The reference speaks of angles, scaled data and TrigFlow's target; the loop is that of SanaSprintPipeline."""
    torch = pytest.importorskip("torch")
    from diffusers import SCMScheduler
    from diffusers.schedulers import scheduling_scm

    drawn = [noise(step) for step in range(steps)]
    monkeypatch.setattr(
        scheduling_scm, "randn_tensor", lambda shape, **_: torch.from_numpy(drawn[reference.step_index])
    )
    reference = SCMScheduler.from_config(SCM)
    reference.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
    reference.set_begin_index(0)
    data = reference.config.sigma_data
    latents = torch.from_numpy(noise()) * data
    found = ours(SCM, steps, lambda step, shape: mx.array(drawn[step]))
    for i, t in enumerate(reference.timesteps[:-1]):
        s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        length = torch.sqrt(s**2 + (1 - s) ** 2)
        x = latents / data * length
        v = torch.from_numpy(velocity(x.numpy(), float(s)).astype(np.float32))
        target = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * v) / length
        latents, _ = reference.step(target * data, t, latents, return_dict=False)
        after = reference.timesteps[i + 1]
        flowing = latents / data / (torch.cos(after) + torch.sin(after))
        assert_parity("SCMScheduler, a step", found[i], flowing.numpy(), 1e-5)


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"shift": 1.0}, 24),
        ({"shift": 3.0}, 24),
        ({"shift": 3.0, "num_train_timesteps": 500}, 24),
        *((DYNAMIC, tokens) for tokens in (16, 256, 1024, 4096, 9000)),
        (DYNAMIC | {"time_shift_type": "linear", "max_image_seq_len": 2048, "max_shift": 1.4}, 1024),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_euler_equals_diffusers_as_its_flux_pipeline_asks_for_it(config, tokens, steps):
    """Sigmas from 1 to 1 / steps, and mu from the number of image tokens; then step by step."""
    torch = pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    reference = FlowMatchEulerDiscreteScheduler(**config)
    of_mu = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(reference.config[name] for name in of_mu))
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert_parity(
        "FlowMatchEulerDiscreteScheduler, sigmas",
        flow.euler_sigmas(schedulers.parse(config), steps, tokens),
        reference.sigmas,
        1e-6,
    )
    latents = torch.from_numpy(noise())
    sampler, own = flow.sampler(schedulers.parse(config), steps, tokens), mx.array(noise())
    for i, t in enumerate(reference.timesteps):
        v = velocity(latents.numpy(), float(reference.sigmas[i])).astype(np.float32)
        latents = reference.step(torch.from_numpy(v), t, latents, return_dict=False)[0]
        own = sampler.step(i, mx.array(velocity(np.array(own), float(sampler.times[i]))), own)
        assert_parity("FlowMatchEulerDiscreteScheduler, a step", own, latents.numpy(), 1e-5)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"shift": 1.0}, {"shift": 4.0, "num_train_timesteps": 500}])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_euler_equals_diffusers_where_the_scheduler_spaces_its_own_steps(config, steps):
    pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    reference = FlowMatchEulerDiscreteScheduler(**config)
    reference.set_timesteps(steps)
    found = flow.euler_sigmas(schedulers.parse(config), steps, 24, own_spacing=True)
    assert_parity("FlowMatchEulerDiscreteScheduler, sigmas", found, reference.sigmas, 1e-5)


def test_a_kind_of_dynamic_shift_that_is_not_known_is_refused_by_name():
    with pytest.raises(UserError, match='time_shift_type="cosine" is not implemented; use "exponential" or "linear"'):
        schedulers.parse(DYNAMIC | {"time_shift_type": "cosine"})


def test_noised_latents_lie_on_the_line_from_image_to_noise_each_at_its_own_level():
    x0, e = noise(1).repeat(3, axis=0), philox.normal(1, 2, shape=(3, *SHAPE[1:]))
    levels = np.array([0.0, 0.25, 1.0], np.float32)
    found = np.array(flow.noisy(mx.array(x0), mx.array(e), mx.array(levels)))
    assert relative_error(found, np.stack([x0[0], 0.75 * x0[1] + 0.25 * e[1], e[2]])) <= 1e-6
    v = np.array(flow.velocity(mx.array(x0), mx.array(e)))
    assert relative_error(v, e - x0) <= 1e-6
    assert relative_error(found + (1 - levels.reshape(3, 1, 1, 1)) * v, e) <= 1e-5, "the velocity leads on to the noise"


def test_euler_tells_the_network_its_own_sigmas():
    sampler = flow.sampler(schedulers.parse({"shift": 3.0}), 5, 24)
    config = schedulers.FlowMatchEulerDiscreteConfig(shift=3.0)
    assert np.array_equal(sampler.times, flow.euler_sigmas(config, 5, 24)[:-1])


def test_fresh_noise_is_a_function_of_the_first_noise_and_the_step():
    first, other = mx.array(noise(0)), mx.array(noise(1))
    drawn = fresh_noise(first)(0, SHAPE)
    assert same_bits(fresh_noise(mx.array(noise(0)))(0, SHAPE), drawn)
    for another in (fresh_noise(first)(1, SHAPE), fresh_noise(other)(0, SHAPE), first):
        assert relative_error(another, drawn) > 0.1


def test_several_steps_of_consistency_sampling_need_noise():
    assert len(ours(SCM, 1)) == 1
    with pytest.raises(ValueError, match="fresh noise"):
        flow.sampler(schedulers.parse(SCM), 2, 24)


def unshifted(s, shift):
    """The u of s = shift u / (1 + (shift - 1) u)."""
    return s / (shift - (shift - 1) * s)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-0.6, 1.4)])
@pytest.mark.parametrize("scheduler", [{"shift": 3.0}, {"shift": 1.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_training_noise_levels_are_logit_normal_and_shifted(scheduler, mean, std):
    """The share of draws up to each level is its closed form, Phi((logit u - mean) / std), to four standard errors."""
    count, shift = 4000, flow.training_shift(schedulers.parse(scheduler))
    assert shift == (1.0 if scheduler.get("use_dynamic_shifting") else scheduler["shift"])
    normals = philox.normal(5, shape=(count,))
    levels = np.array([flow.noise_level(float(n), mean, std, shift) for n in normals])
    for level in (0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95):
        u = unshifted(level, shift)
        wanted = NormalDist().cdf((math.log(u / (1 - u)) - mean) / std)
        assert abs((levels <= level).mean() - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / count) + 1e-4, level
    assert np.array_equal(np.argsort(levels), np.argsort(normals)), "the level rises with the draw"


@pytest.mark.parametrize(
    ("normal", "mean", "std", "shift", "level"),
    [
        (0.0, 0.0, 1.0, 1.0, 0.5),
        (0.0, 0.0, 1.0, 3.0, 0.75),
        (0.0, math.log(3), 1.0, 1.0, 0.75),
        (0.0, math.log(3), 1.0, 3.0, 0.9),
        (2.0, -math.log(3), math.log(3), 1.0, 0.75),
        (-1.0, 0.0, math.log(3), 1.0, 0.25),
        (-1.0, 0.0, math.log(3), 3.0, 0.5),
        (-40.0, 0.0, 1.0, 1.0, 1e-4),
        (60.0, 0.0, 1.0, 3.0, 1.0),
    ],
)
def test_a_training_noise_level_of_a_known_draw(normal, mean, std, shift, level):
    assert flow.noise_level(normal, mean, std, shift) == pytest.approx(level, rel=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [(DPM, 3.0), (SCM, 1.0), ({"shift": 2.0}, 2.0), ({"shift": 2.0, "use_dynamic_shifting": True}, 1.0)],
)
def test_training_takes_the_schedulers_static_shift(scheduler, shift):
    assert flow.training_shift(schedulers.parse(scheduler)) == shift


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        (DPM | {"use_flow_sigmas": False}, "use_flow_sigmas=false is not implemented; use true"),
        ({"_class_name": schedulers.DPM, "prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        ({"_class_name": schedulers.DPM, "use_flow_sigmas": True}, "prediction_type=.epsilon."),
        (DPM | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type=.sde-dpmsolver\\+\\+."),
        (DPM | {"solver_order": 3}, "solver_order=3 is not implemented; use 1 or 2"),
        (DPM | {"solver_type": "bh2"}, "solver_type=.bh2. is not implemented; use .midpoint. or .heun."),
        (DPM | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        (DPM | {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (DPM | {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (DPM | {"thresholding": True}, "thresholding"),
        ({"time_shift_type": "cosine"}, "time_shift_type"),
        ({"shift": "3"}, 'shift is "3", where a number above 0 is needed'),
        (SCM | {"prediction_type": "epsilon"}, "prediction_type=.epsilon. is not implemented; use .trigflow."),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(scheduler, match):
    with pytest.raises(UserError, match=match):
        flow.sampler(schedulers.parse(scheduler), 4, 24)
