"""From noise to latents by transformer and samplers, against the loops of SanaPipeline and SanaSprintPipeline."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import philox
from mlx_blockskip.models import flow, schedulers
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.models.sana import transformer as net
from mlx_blockskip.tasks.sampling.denoise import Request, fresh_noise, sample
from support.compare import PIPELINE, assert_parity
from support.sana import Network, converted, random_transformer

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SIZE, TEXT = (4, 6), 7


class Model(Network):
    """What `sample` needs of a model."""

    def __init__(self, shards, scheduler):
        super().__init__(shards)
        self.scheduler = schedulers.parse(scheduler)

    def sampler(self, steps, size, fresh=None):
        return flow.sampler(self.scheduler, steps, size[0] * size[1], fresh)

    def make_room(self):
        pass

    def guide(self, conditional, unconditional, scale):
        return flow.guided(conditional, unconditional, scale)

    def context(self, sigma, prompt, size, guidance):
        scale = None if guidance is None else mx.full(sigma.shape, guidance)
        temb, embedded = net.time_embedding(self.rest, self.config, sigma, scale)
        bias = net.text_bias(prompt["mask"], mx.float32)
        return net.Context(net.caption(self.rest, prompt["text"]), bias, temb, embedded, size)

    def embed(self, latents, prompt):
        return Tokens(net.embed(self.rest, self.config, latents))

    def final_modulation(self, context):
        return (context.embedded,)

    def final_layer(self, tokens, context, modulation):
        return net.output(self.rest, self.config, tokens.image, modulation[0], context.size)


def prompt(number, length):
    text = philox.normal(1, number, shape=(1, TEXT, 24))
    return {"text": mx.array(text), "mask": mx.array((np.arange(TEXT)[None] < length).astype(np.float32))}


def tensors(p):
    return torch.from_numpy(np.array(p["text"])), torch.from_numpy(np.array(p["mask"]))


def channels_first(latents):
    return torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("change", [{}, {"timestep_scale": 0.001, "qk_norm": "rms_norm_across_heads"}])
def test_sampling_with_cfg_equals_sana_pipeline(tmp_path, change):
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    reference = random_transformer(**change)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", num_train_timesteps=1000
    )
    noise, asked, negative = mx.array(philox.normal(0, shape=(1, *SIZE, 6))), prompt(1, 5), prompt(2, 2)
    pipe = SanaPipeline(None, None, None, reference, scheduler)
    pipe.set_progress_bar_config(disable=True)
    (embeds, mask), (other, other_mask) = tensors(asked), tensors(negative)
    theirs = pipe(
        **{"prompt_embeds": embeds, "prompt_attention_mask": mask, "negative_prompt": None},
        **{"negative_prompt_embeds": other, "negative_prompt_attention_mask": other_mask},
        **{"height": 32 * SIZE[0], "width": 32 * SIZE[1], "latents": channels_first(noise)},
        **{"num_inference_steps": 6, "guidance_scale": 4.5},
        **{"use_resolution_binning": False, "output_type": "latent"},
    ).images
    model = Model(converted(tmp_path, reference), {"_class_name": schedulers.DPM, **scheduler.config})
    *_, (ours,) = sample(model, [Request(asked, negative, noise)], steps=6, cfg_scale=4.5, guidance=1.0)
    assert_parity("SanaPipeline latents", ours, theirs.permute(0, 2, 3, 1).numpy(), PIPELINE)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_equals_sana_sprint_pipeline(tmp_path, monkeypatch, steps):
    from diffusers import SanaSprintPipeline, SCMScheduler
    from diffusers.schedulers import scheduling_scm

    reference = random_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    scheduler = SCMScheduler()
    noise, asked = mx.array(philox.normal(0, shape=(1, *SIZE, 6))), prompt(1, 5)
    fresh = fresh_noise(noise)
    monkeypatch.setattr(
        scheduling_scm, "randn_tensor", lambda *_, **__: channels_first(fresh(scheduler.step_index, noise.shape))
    )
    pipe = SanaSprintPipeline(None, None, None, reference, scheduler)
    pipe.set_progress_bar_config(disable=True)
    embeds, mask = tensors(asked)
    theirs = pipe(
        **{"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 4.5},
        **{"height": 32 * SIZE[0], "width": 32 * SIZE[1], "latents": channels_first(noise)},
        **{"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None},
        **{"use_resolution_binning": False, "output_type": "latent"},
    ).images
    model = Model(converted(tmp_path, reference), {"_class_name": schedulers.CONSISTENCY, **scheduler.config})
    *_, (ours,) = sample(model, [Request(asked, None, noise)], steps=steps, cfg_scale=1.0, guidance=4.5)
    assert_parity("SanaSprintPipeline latents", ours, theirs.permute(0, 2, 3, 1).numpy(), PIPELINE)
