"""Flow matching: x_s = (1 - s) x0 + s e, velocity v = e - x0, s in (0, 1]; training noise levels and samplers."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.errors import UserError

EULER = "FlowMatchEulerDiscreteScheduler"
REFUSED = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "stochastic_sampling", "shift_terminal"),
)


class Sampler(Protocol):
    """Carries latents from noise to an image: `steps` calls of `step`, the velocity taken at `sigmas[i]`."""

    sigmas: np.ndarray

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
    return min(1.0, max(1e-4, shift * u / (1 + (shift - 1) * u)))


def training_shift(scheduler: Mapping[str, Any]) -> float:
    """The scheduler's static shift; 1 where shifting is dynamic."""
    return 1.0 if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))


def sampler(scheduler: Mapping[str, Any], steps: int, image_tokens: int) -> Sampler:
    """The sampler that a scheduler_config.json names. Raises UserError for what is not implemented, by its name."""
    name = scheduler.get("_class_name", EULER)
    if name != EULER:
        raise UserError(f"scheduler {name} is not implemented; use a checkpoint with {EULER}")
    for option in REFUSED:
        if scheduler.get(option):
            raise UserError(
                f"scheduler option {option}={scheduler[option]} is not implemented; set it to false or null"
            )
    if steps < 1:
        raise UserError(f"--steps {steps}: at least one step is needed")
    return Euler(euler_sigmas(scheduler, steps, image_tokens))


class Euler:
    """x += (s_next - s) v. sigmas: (steps + 1,), descending to 0."""

    def __init__(self, sigmas: np.ndarray):
        self.sigmas = sigmas

    def step(self, i: int, velocity: mx.array, latents: mx.array) -> mx.array:
        delta = float(self.sigmas[i + 1] - self.sigmas[i])
        return (latents.astype(mx.float32) + delta * velocity.astype(mx.float32)).astype(latents.dtype)


def euler_sigmas(scheduler: Mapping[str, Any], steps: int, image_tokens: int) -> np.ndarray:
    """(steps + 1,) float32: 1 ... 1/steps, shifted, then 0. Source: FluxPipeline, FlowMatchEulerDiscreteScheduler."""
    sigmas = np.linspace(1.0, 1 / steps, steps)
    if scheduler.get("use_dynamic_shifting"):
        sigmas = _dynamic(scheduler, sigmas, image_tokens)
    else:
        shift = float(scheduler.get("shift", 1.0))
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0.0).astype(np.float32)


def _dynamic(scheduler: Mapping[str, Any], sigmas: np.ndarray, image_tokens: int) -> np.ndarray:
    """mu grows linearly with the number of image tokens; then s = e^mu / (e^mu + 1/s - 1), or mu for e^mu."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = base + (top - base) * (image_tokens - low) / (high - low)
    kind = scheduler.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise UserError(f"scheduler option time_shift_type={kind!r} is not implemented; use exponential or linear")
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1))
