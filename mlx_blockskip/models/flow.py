"""Flow matching: x_s = (1 - s) x0 + s e, velocity v = e - x0, s in (0, 1]; training noise levels and samplers."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.schedulers import DPMSolverMultistepConfig, FlowMatchEulerDiscreteConfig, SchedulerConfig

LATEST, BETWEEN = 1.5708, 1.3
"""The first angle, and the second where there are two steps: what SanaSprintPipeline asks of the scheduler."""

Fresh = Callable[[int, tuple[int, ...]], mx.array]
"""`(step, shape) -> standard normal numbers in float32`, a pure function for each image."""

Mu = Callable[[int, int], float]
"""`(image tokens, steps) -> how far dynamic shifting goes`."""


class Sampler(Protocol):
    """Carries one image's latents from noise: `step` is called for each of `times` in order, once.

    times: (steps,) float32 in (0, 1], the sigma at which the network is asked for the velocity of step i.
    """

    times: np.ndarray

    def step(self, i: int, velocity: mx.array, latents: mx.array) -> mx.array: ...


def noisy(x0: mx.array, noise: mx.array, s: mx.array) -> mx.array:
    """x_s = (1 - s) x0 + s e. x0, noise: (B, h, w, C); s: (B,)."""
    s = s.reshape(-1, 1, 1, 1)
    return (1 - s) * x0 + s * noise


def velocity(x0: mx.array, noise: mx.array) -> mx.array:
    """The target v = e - x0."""
    return noise - x0


def noise_level(normal: float, mean: float, std: float, shift: float) -> float:
    """s in (0, 1] from a standard normal draw: u = sigmoid(mean + std n); s = shift u / (1 + (shift - 1) u)."""
    u = 1 / (1 + math.exp(-(mean + std * normal)))
    return min(1.0, max(1e-4, _shifted(u, shift)))


def _shifted(sigma: Any, shift: float) -> Any:
    """shift s / (1 + (shift - 1) s), of a number or an array."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_shift(config: SchedulerConfig) -> float:
    """The scheduler's static shift; 1 where shifting is dynamic."""
    if isinstance(config, DPMSolverMultistepConfig):
        return float(config.flow_shift)
    if isinstance(config, FlowMatchEulerDiscreteConfig) and not config.use_dynamic_shifting:
        return float(config.shift)
    return 1.0


def sampler(
    config: SchedulerConfig,
    steps: int,
    image_tokens: int,
    fresh: Fresh | None = None,
    own_spacing: bool = False,
    mu: Mu | None = None,
) -> Sampler:
    """The sampler of a checkpoint's scheduler. Raises UserError for less than one step.

    fresh: what a sampler draws noise from that adds some on the way. own_spacing: the family's pipeline leaves the
    spacing of the steps to the scheduler. mu: the family's pipeline gives a scheduler with dynamic shifting its own.
    """
    if steps < 1:
        raise UserError(f"--steps {steps}: at least one step is needed")
    if isinstance(config, DPMSolverMultistepConfig):
        return Multistep(*dpm_sigmas(config, steps), config.solver_order, config.solver_type)
    if isinstance(config, FlowMatchEulerDiscreteConfig):
        return Euler(euler_sigmas(config, steps, image_tokens, own_spacing, mu))
    return Consistency(consistency_sigmas(steps), fresh)


def guided(conditional: mx.array, unconditional: mx.array, scale: float) -> mx.array:
    """Classifier-free guidance (arXiv 2207.12598): the velocity from the unconditional one, `scale` times the way."""
    return unconditional + scale * (conditional - unconditional)


class Euler:
    """x += (s_next - s) v. sigmas: (steps + 1,), descending to 0."""

    def __init__(self, sigmas: np.ndarray):
        self.sigmas = sigmas
        self.times = sigmas[:-1]

    def step(self, i: int, velocity: mx.array, latents: mx.array) -> mx.array:
        delta = float(self.sigmas[i + 1] - self.sigmas[i])
        return (latents.astype(mx.float32) + delta * velocity.astype(mx.float32)).astype(latents.dtype)


class Multistep:
    """DPM-Solver++ (arXiv 2211.01095, Algorithm 2) for the flow x_s = (1 - s) x0 + s e.

    With lambda(s) = log((1 - s) / s), h = lambda(t) - lambda(s) and c = (1 - t) (1 - e^-h), a step from s to t is
    x_t = (t / s) x_s + c x0(s), and of second order with k (x0(s) - x0(r)) h / (lambda(s) - lambda(r)) on top, where r
    is the sigma before s, and k = c / 2 (midpoint) or 1 - t - c / h (heun). The first step and the last, to sigma 0
    where lambda is infinite, are of first order. Source: diffusers DPMSolverMultistepScheduler.
    """

    def __init__(self, sigmas: np.ndarray, times: np.ndarray, order: int = 2, kind: str = "midpoint"):
        self.sigmas = sigmas
        self.times = times
        self.order = order
        self.heun = kind == "heun"
        self._before: mx.array | None = None

    def step(self, i: int, velocity: mx.array, latents: mx.array) -> mx.array:
        s, t = float(self.sigmas[i]), float(self.sigmas[i + 1])
        x = latents.astype(mx.float32)
        x0 = x - s * velocity.astype(mx.float32)
        c = (1 - t) - (1 - s) * t / s
        y = (t / s) * x + c * x0
        if self.order == 2 and t > 0 and self._before is not None:
            h, h_before = _lambda(t) - _lambda(s), _lambda(s) - _lambda(float(self.sigmas[i - 1]))
            k = 1 - t - c / h if self.heun else c / 2
            y = y + (k * h / h_before) * (x0 - self._before)
        self._before = x0
        return y.astype(latents.dtype)


def _lambda(s: float) -> float:
    return math.log((1 - s) / s)


class Consistency:
    """x0 = x_s - s v, and on the way x_t = (1 - t) x0 + t e with fresh noise e. sigmas: (steps + 1,), to 0.

    TrigFlow's x_a = cos(a) x0 + sin(a) e at s = sin(a) / (cos(a) + sin(a)) is x_s but for its length, so the network's
    velocity is taken as it is. Source: diffusers SCMScheduler and SanaSprintPipeline (arXiv 2503.09641).
    """

    def __init__(self, sigmas: np.ndarray, fresh: Fresh | None):
        if len(sigmas) > 2 and fresh is None:
            raise ValueError("more than one step needs fresh noise")
        self.sigmas = sigmas
        self.times = sigmas[:-1]
        self.fresh = fresh

    def step(self, i: int, velocity: mx.array, latents: mx.array) -> mx.array:
        s, t = float(self.sigmas[i]), float(self.sigmas[i + 1])
        x0 = latents.astype(mx.float32) - s * velocity.astype(mx.float32)
        if t > 0 and self.fresh is not None:
            x0 = (1 - t) * x0 + t * self.fresh(i, latents.shape)
        return x0.astype(latents.dtype)


def dpm_sigmas(config: DPMSolverMultistepConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps + 1,) and (steps,) float32: sigmas to 0, and the times, which the reference cuts to whole timesteps."""
    count = config.num_train_timesteps
    sigmas = 1 - np.linspace(1, 1 / count, steps + 1)
    sigmas = _shifted(sigmas, float(config.flow_shift))[:0:-1]
    times = np.trunc(sigmas * count) / count
    return np.append(sigmas, 0.0).astype(np.float32), times.astype(np.float32)


def consistency_sigmas(steps: int) -> np.ndarray:
    """(steps + 1,) float32: sin(a) / (cos(a) + sin(a)) of the scheduler's angles a, from 1 to 0."""
    angles = np.array([LATEST, BETWEEN, 0.0]) if steps == 2 else np.linspace(LATEST, 0.0, steps + 1)
    return np.minimum(np.sin(angles) / (np.cos(angles) + np.sin(angles)), 1.0).astype(np.float32)


def euler_sigmas(
    config: FlowMatchEulerDiscreteConfig,
    steps: int,
    image_tokens: int,
    own_spacing: bool = False,
    mu: Mu | None = None,
) -> np.ndarray:
    """(steps + 1,) float32: 1 ... 1/steps, shifted, then 0; with `own_spacing` (see `sampler`) down to the least
    training sigma instead, which is shifted twice. Source: FluxPipeline, FlowMatchEulerDiscreteScheduler.
    """
    least, shift = 1 / steps, float(config.shift)
    if own_spacing and not config.use_dynamic_shifting:
        least = _shifted(1 / config.num_train_timesteps, shift)
    sigmas = np.linspace(1.0, least, steps)
    if config.use_dynamic_shifting:
        sigmas = _dynamic(config, sigmas, mu(image_tokens, steps) if mu else linear_mu(config, image_tokens))
    else:
        sigmas = _shifted(sigmas, shift)
    return np.append(sigmas, 0.0).astype(np.float32)


def linear_mu(config: FlowMatchEulerDiscreteConfig, image_tokens: int) -> float:
    """mu grows linearly with the number of image tokens. Source: FluxPipeline."""
    low, high = config.base_image_seq_len, config.max_image_seq_len
    return config.base_shift + (config.max_shift - config.base_shift) * (image_tokens - low) / (high - low)


def _dynamic(config: FlowMatchEulerDiscreteConfig, sigmas: np.ndarray, mu: float) -> np.ndarray:
    """s = e^mu / (e^mu + 1/s - 1), or mu for e^mu."""
    factor = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1))
