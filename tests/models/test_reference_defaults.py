"""Every default of a configuration is the reference's; every option of the reference is one here or is named here."""

import inspect
from dataclasses import MISSING, asdict, fields

import pytest

from mlx_blockskip.models import schedulers
from mlx_blockskip.models.flux1.transformer import FluxTransformer2DConfig
from mlx_blockskip.models.flux2.transformer import Flux2Transformer2DConfig
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig
from mlx_blockskip.models.text.clip import CLIPTextConfig
from mlx_blockskip.models.text.gemma2 import Gemma2Config
from mlx_blockskip.models.text.lm import Qwen3Config
from mlx_blockskip.models.text.t5 import T5Config
from mlx_blockskip.models.vae.dc_ae import AutoencoderDCConfig
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig
from mlx_blockskip.models.vae.kl_flux2 import AutoencoderKLFlux2Config
from mlx_blockskip.models.vision import preprocess
from mlx_blockskip.models.vision.clip import CLIPConfig, CLIPVisionConfig
from mlx_blockskip.models.vision.vit import Dinov2Config, ViTConfig
from mlx_blockskip.models.z_image.transformer import ZImageTransformer2DConfig

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

BETAS = {
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "variance_type"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lower_order_final", "euler_at_final", "lambda_min_clipped"),
    *("timestep_spacing", "steps_offset", "time_shift_type"),
}
"""With flow sigmas that end at 0 and neither thresholding nor dynamic shifting these do nothing."""

DIFFUSERS = (
    (FluxTransformer2DConfig, "FluxTransformer2DModel", set()),
    (Flux2Transformer2DConfig, "Flux2Transformer2DModel", set()),
    (SanaTransformer2DConfig, "SanaTransformer2DModel", {"dropout"}),
    # neither changes the network: there are as many keys as queries, and positions have no end here
    (ZImageTransformer2DConfig, "ZImageTransformer2DModel", {"n_kv_heads", "axes_lens"}),
    (AutoencoderKLConfig, "AutoencoderKL", {"sample_size", "force_upcast"}),
    (AutoencoderKLFlux2Config, "AutoencoderKLFlux2", {"sample_size", "batch_norm_momentum"}),
    (AutoencoderDCConfig, "AutoencoderDC", set()),
    (schedulers.FlowMatchEulerDiscreteConfig, schedulers.EULER, set()),
    (schedulers.DPMSolverMultistepConfig, schedulers.DPM, BETAS),
    (schedulers.SCMConfig, schedulers.CONSISTENCY, {"sigma_data"}),
)
"""Ours, theirs, and the options of theirs that change nothing here."""

IDS = {"pad_token_id", "bos_token_id", "eos_token_id"}
DROPPED = {"attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "drop_path_rate"}
MADE = {"initializer_range", "initializer_factor", "use_cache", "tie_word_embeddings", "projection_dim"}
WITHOUT = {
    T5Config: {"num_decoder_layers", "classifier_dropout", "is_decoder", "is_encoder_decoder", "scale_decoder_outputs"},
    # sequences longer than the window are refused, so the layers are the same; the language model's head is not there
    Gemma2Config: {"layer_types", "final_logit_softcapping", "max_position_embeddings"},
    Qwen3Config: {"layer_types", "sliding_window", "max_window_layers"},  # of windows, which are refused
    ViTConfig: {"encoder_stride", "pooler_output_size", "pooler_act"},
    Dinov2Config: {
        *("layerscale_value", "_out_features", "_out_indices", "apply_layernorm", "reshape_hidden_states"),
        "use_mask_token",
    },
    CLIPConfig: {"text_config", "vision_config", "logit_scale_init_value"},
}
"""What else a class has that does not change what is computed here."""

DERIVED = {
    (T5Config, "dense_act_fn"): "relu",
    (T5Config, "is_gated_act"): False,
    (Gemma2Config, "rope_parameters"): {"rope_theta": 10000.0, "rope_type": "default"},
    (Qwen3Config, "rope_parameters"): {"rope_theta": 10000.0, "rope_type": "default"},
}
"""What theirs makes of other options. Ours is None where a file may contradict it, or a configuration of its own."""

TRANSFORMERS = (
    CLIPTextConfig,
    T5Config,
    Gemma2Config,
    Qwen3Config,
    CLIPVisionConfig,
    CLIPConfig,
    ViTConfig,
    Dinov2Config,
)
"""Each is called as theirs."""


def defaults(cls):
    found = {field.name: field.default for field in fields(cls)}
    assert MISSING not in found.values()
    return found


@pytest.mark.parametrize(("ours", "theirs", "harmless"), DIFFUSERS, ids=[name for _, name, _ in DIFFUSERS])
def test_the_defaults_are_those_of_diffusers(ours, theirs, harmless):
    given = {k: p.default for k, p in inspect.signature(getattr(diffusers, theirs).__init__).parameters.items()}
    given.pop("self")
    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    assert defaults(ours) == {name: wanted[name] for name in defaults(ours)}
    assert set(given) - set(defaults(ours)) <= harmless


@pytest.mark.parametrize("ours", TRANSFORMERS, ids=[cls.__name__ for cls in TRANSFORMERS])
def test_the_defaults_are_those_of_transformers(ours):
    reference = getattr(transformers, ours.__name__)
    theirs = reference()
    for name, value in defaults(ours).items():
        assert hasattr(theirs, name), name
        if (ours, name) in DERIVED:
            assert getattr(theirs, name) == DERIVED[ours, name], name
            assert value is None or asdict(value) == DERIVED[ours, name], name
        else:
            assert getattr(theirs, name) == value, name
    own = vars(reference).get("__annotations__") or inspect.signature(reference.__init__).parameters
    assert set(own) - set(defaults(ours)) - IDS - DROPPED - MADE - WITHOUT.get(ours, set()) <= {"self", "kwargs"}


@pytest.mark.parametrize("kind", ["ViT", "CLIP", "Bit"])
def test_preprocessing_begins_as_in_transformers(kind):
    module = getattr(transformers.models, kind.lower())
    reference = getattr(getattr(module, f"image_processing_pil_{kind.lower()}"), f"{kind}ImageProcessorPil")
    names = ("size", "resample", "image_mean", "image_std", "crop_size", "rescale_factor", "do_resize", "do_rescale")
    names += ("do_normalize", "do_center_crop")
    theirs = {name: value for name in names if (value := getattr(reference, name, None)) is not None}
    given = {"image_processor_type": f"{kind}ImageProcessor"}
    assert len(theirs) >= 6
    assert preprocess.parse(given | theirs) == preprocess.parse(given)
