"""One dataclass a task. Its fields carry type, default and help; command line options, YAML keys, adapter_config.json
and the Python API are all made from them. None means: the model's own default, then its family's. A number's type has
its range, which is checked when settings are made.
"""

from dataclasses import dataclass

from mlx_blockskip.models import ranges
from mlx_blockskip.options import Settings, option
from mlx_blockskip.shared_options import (
    DATA,
    LORA,
    METHOD,
    OPTIMIZER,
    OVERWRITE,
    PRIOR,
    RUN,
    DrawingOptions,
    EncoderOptions,
    MemoryOptions,
    ModelChoice,
    TrainSize,
)


@dataclass
class ConvertSettings(Settings):
    """Convert a Hugging Face checkpoint to an MLX model directory, or back."""

    hf_path: str = option(
        "",
        "Hugging Face directory or repo id, a single safetensors file, or a folder of such files; with --to hf an MLX "
        "model directory.",
    )
    base: str | None = option(None, "Hugging Face directory or repo id that has what single files have not.")
    mlx_path: str = option("mlx_model", "Directory to write.")
    to: str = option("mlx", "Layout to write; hf makes a diffusers folder of an MLX model.", choices=("mlx", "hf"))
    quantize: bool = option(False, "Quantize the linear layers of the blocks.", short="-q")
    q_bits: int = option(4, "Bits per weight.", choices=(4, 6, 8))
    q_group_size: int = option(64, "Weights that share a scale.", choices=(32, 64, 128))
    q_modulation: str = option("none", "Bits of the modulation layers.", choices=("none", "8"))
    dtype: str | None = option(
        None,
        "Type of what is not quantized (bfloat16 on Metal, float32 elsewhere; with --to hf the stored one).",
        choices=("float32", "bfloat16", "float16"),
    )
    revision: str | None = option(None, "Branch, tag or commit of the repo.")
    stream: bool = option(False, "Convert a repo's weights as they come: the download takes no room on the disk.")


@dataclass
class TrainSettings(MemoryOptions, TrainSize, ModelChoice):
    """Learn a subject from a few photos: a LoRA on the retained blocks."""

    data: str = option("", "Directory of images, with captions beside them or not.", group=DATA)
    prompt: str | None = option(None, 'Caption of images that have none, e.g. "a photo of sks dog".', group=DATA)
    class_prompt: list[str] = option(
        [], "What the model should go on drawing as it does; repeatable. Turns prior preservation on.", group=PRIOR
    )
    class_images: ranges.ImagesOrNone | None = option(
        None, "Images of the class prompts to make; 0 for none.", group=PRIOR
    )
    class_data: str | None = option(None, "Directory of class images to use instead, with captions.", group=PRIOR)
    prior_weight: ranges.PriorWeight | None = option(
        None, "Weight of a class image in the loss, where a subject's image has 1 (1 by default).", group=PRIOR
    )
    adapter_path: str = option("adapters", "Adapter directory to write.", group=RUN)
    skip_ratio: ranges.Share | None = option(None, "Share of blocks to skip; 0 is plain LoRA.", group=METHOD)
    skip_first: ranges.BlocksOrNone | None = option(None, "Blocks to skip at the start (n).", group=METHOD)
    skip_last: ranges.BlocksOrNone | None = option(None, "Blocks to skip at the end (m).", group=METHOD)
    plan: str | None = option(
        None,
        "JSON file with a skip plan or a block selection; auto: probe the subject's images first; even: as many at "
        "the start as at the end. By default the model's own plan, or auto where it has none.",
        group=METHOD,
    )
    residuals: str = option("base", "Features of skipped blocks.", choices=("base", "fresh", "none"), group=METHOD)
    refresh: ranges.Steps = option(50, "Steps after which fresh residuals are made anew.", group=METHOD)
    patch_mode: str | None = option(
        None, "How patches are cut.", choices=("dynamic", "high-to-low", "random", "resize", "none"), group=METHOD
    )
    guidance: ranges.Guidance | None = option(None, "Guidance that a distilled model trains with.", group=METHOD)
    timestep_mean: ranges.LogitMean = option(0.0, "Mean of the logit-normal noise level.", group=METHOD)
    timestep_std: ranges.LogitDeviation = option(1.0, "Deviation of the logit-normal noise level.", group=METHOD)
    scale: ranges.Scale = option(1.0, "alpha / rank.", group=LORA)
    lora_targets: str = option("all", "Layers of the retained blocks.", choices=("attention", "all"), group=LORA)
    init_adapter: str | None = option(
        None, "Adapter to begin with: a directory, a LoRA file, or owner/name on the Hub.", group=LORA
    )
    learning_rate: ranges.LearningRate | None = option(None, "Learning rate.", group=OPTIMIZER)
    lr_schedule: str = option(
        "constant", "Learning rate over the run.", choices=("constant", "linear", "cosine"), group=OPTIMIZER
    )
    warmup: ranges.StepsOrNone = option(0, "Steps over which the learning rate rises.", group=OPTIMIZER)
    weight_decay: ranges.WeightDecay = option(0.01, "AdamW's weight decay.", group=OPTIMIZER)
    clip: ranges.Norm = option(1.0, "Largest global norm of the gradients; 0 for none.", group=OPTIMIZER)
    grad_accumulation: ranges.Batch = option(1, "Micro-batches per optimizer step; all wait in one sweep.", group=RUN)
    seed: ranges.Seed = option(0, "Seed of all draws: images, crops, noise levels, noise, LoRA factors.", group=RUN)
    steps_per_save: ranges.StepsOrNone = option(100, "Steps between checkpoints; 0 for none.", group=RUN)
    steps_per_sample: ranges.StepsOrNone = option(0, "Steps between sample images; 0 for none.", group=RUN)
    sample_prompt: list[str] = option([], "Prompt of sample images; repeatable.", group=RUN)
    resume: bool = option(False, "Go on from the last checkpoint in the adapter directory.", group=RUN)
    overwrite: bool = option(False, "Begin again in a directory that holds another run.", group=RUN)


@dataclass
class GenerateSettings(MemoryOptions, DrawingOptions, ModelChoice):
    """Generate images."""

    prompt: list[str] = option([], "What to show; repeatable.")
    prompt_file: str | None = option(None, "Text file with one prompt per line.")
    negative_prompt: str = option("", "What not to show (where cfg-scale is above 1).")
    adapter_path: list[str] = option([], "Adapter directory, or LoRA file; repeatable.", group=LORA)
    lora_scale: list[ranges.Strength] = option([], "Strength of each adapter; 1 by default.", group=LORA)
    seed: ranges.Seed = option(0, "Seed of the first image; the others follow.")
    n_images: ranges.Images = option(1, "Images per prompt.")
    noise: str | None = option(None, "safetensors file with `noise` (B x C x h x w) to start from, instead of a seed.")
    from_image: str | None = option(None, "PNG made by this tool, whose settings are taken.")
    output: str | None = option(
        None, "File to write (by default out.png, out-2.png, ...); numbered where there are several images."
    )
    overwrite: bool = option(False, OVERWRITE)


@dataclass
class SelectSettings(MemoryOptions, EncoderOptions, DrawingOptions, ModelChoice):
    """Choose which blocks to skip, by masking attention from image to text (Algorithm 1)."""

    method: str = option(
        "probe",
        "generate: Algorithm 1, on generated images; probe: on predicted velocities, without generating; "
        "sliding: every window of blocks, on generated images.",
        choices=("generate", "probe", "sliding"),
    )
    adapter_path: list[str] = option([], "Adapter of a subject; repeatable. The base model without.", group=LORA)
    data: str = option("", "The subject's images, to probe with; captions are prompts.", group=DATA)
    prompt: list[str] = option(
        [],
        "What to show, repeatable (by default the adapter's captions); caption of images that have none.",
        group=DATA,
    )
    skip_ratio: ranges.ShareOfSome = option(0.5, "Largest share of blocks that plans are wanted for.", group=METHOD)
    stride: ranges.Few = option(1, "probe: measure every so many-th n and m; the rest is interpolated.", group=METHOD)
    noise_levels: ranges.Few = option(4, "probe: noise levels per image.", group=METHOD)
    probe_images: ranges.Few = option(4, "probe: images of the subject.", group=METHOD)
    resolution: ranges.Side | None = option(
        None, "probe: side of the images (by default a training patch's).", group=METHOD
    )
    window: ranges.Few = option(1, "sliding: consecutive blocks that are masked.", group=METHOD)
    distance: str = option("dino", "What images are compared by.", choices=("dino", "clip"), group=METHOD)
    n_images: ranges.Images = option(1, "Seeds per prompt.")
    seed: ranges.Seed = option(0, "Seed of the first image; the others follow.")
    output: str | None = option(
        None,
        "File to write (by default selection.json, selection-2.json, ...); a picture and the images go beside it.",
        group=RUN,
    )
    overwrite: bool = option(False, OVERWRITE, group=RUN)


@dataclass
class EstimateSettings(TrainSize, DrawingOptions):
    """Say what a run would take in memory, disk and time, before anything is downloaded."""

    model: str = option(
        "tiny-flux", "Directory of either layout, a preset such as flux1-dev or sana-1.6b, or tiny-flux, tiny-sana."
    )
    memory: ranges.Memory = option("auto", "MLX memory there is, e.g. 8GB; auto: what this machine has.")


@dataclass
class EvaluateSettings(MemoryOptions, EncoderOptions, DrawingOptions):
    """Measure how like its subject an adapter's images are, how true to prompts, and how far other images drift."""

    adapter_path: str = option("adapters", "Adapter directory, or LoRA file.")
    model: str | None = option(None, "Model that it is for (by default the one it was trained on).")
    data: str | None = option(None, "Images of the subject (by default those it was trained on).", group=DATA)
    subject: str | None = option(
        None, 'What prompts call the subject, e.g. "sks dog" (by default what the captions have in common).', group=DATA
    )
    class_noun: str | None = option(
        None,
        "What texts to compare with call it, e.g. dog (by default the subject without its first word).",
        group=DATA,
    )
    subject_kind: str | None = option(
        None,
        "Prompts that ship: for an object (the default), a living thing, or a small model's plain backgrounds.",
        choices=("object", "living", "plain"),
        group=DATA,
    )
    prompts: str | None = option(None, "Text file with one prompt per line, {} where the subject goes.", group=DATA)
    drift_prompts: str | None = option(None, "Text file of prompts without the subject.", group=DATA)
    n_images: ranges.Images = option(4, "Images per prompt.")
    baseline: bool = option(False, "Also make and measure the base model's images of the subject's prompts.")
    drift_images: ranges.ImagesOrNone = option(
        1, "Images per prompt without the subject, by the base model and the adapted; 0 for none."
    )
    seed: ranges.Seed = option(0, "Seed of the first image of every prompt; the others follow.")
    lora_scale: ranges.Strength = option(1.0, "Strength of the adapter.")
    output: str | None = option(None, "Directory to write (by default `evaluation` in the adapter directory).")
    overwrite: bool = option(False, "Replace the evaluation of other settings that is there.")


@dataclass
class ExportSettings(Settings):
    """Write an adapter in the format of another tool."""

    adapter_path: str = option("adapters", "Adapter directory.")
    format: str = option(
        "diffusers",
        "diffusers, comfyui or kohya: a LoRA file; mlx: an adapter directory.",
        choices=("diffusers", "comfyui", "kohya", "mlx"),
    )
    dtype: str = option("float32", "Type of the factors.", choices=("float32", "bfloat16", "float16"))
    output: str | None = option(
        None, "File to write (pytorch_lora_weights.safetensors); with mlx a directory (mlx_adapter)."
    )
    overwrite: bool = option(False, "Replace the file that is there.")


@dataclass
class FuseSettings(Settings):
    """Add adapters to the weights of their model, and write a model of its own."""

    adapter_path: list[str] = option([], "Adapter directory (adapters), or LoRA file; repeatable.")
    model: str | None = option(None, "Model that they are for (by default the one the first was trained on).")
    save_path: str = option("fused_model", "Directory to write.")
    to: str = option("mlx", "Layout to write: an MLX model, or a diffusers folder.", choices=("mlx", "hf"))
    dequantize: bool = option(False, "Write quantized layers whole.", short="-d")
    lora_scale: list[ranges.Strength] = option([], "Strength of each adapter; 1 by default.")


@dataclass
class VerifySettings(Settings):
    """Hold a model, an adapter or a residual cache against what was written; the status is 1 where it differs."""

    path: str = option("", "Directory of a converted model, an adapter or a cache.", positional=True)


@dataclass
class UploadSettings(Settings):
    """Put an adapter or a converted model on the Hub, with a model card."""

    path: str = option("adapters", "Adapter directory, or MLX model directory.")
    repo: str = option("", "Repo to upload to, owner/name; it is made where there is none.")
    private: bool = option(False, "Make the repo private, where it is made.")
    dry_run: bool = option(False, "Print what would be uploaded, and write nothing.")


@dataclass
class CacheSettings(Settings):
    """List the models that were converted because they were given by a name, or clear them until they are needed."""

    action: str = option("list", "What to do.", choices=("list", "clear"), positional=True)
    names: list[str] = option([], "Conversions, as `list` names them; all where none is named.", positional=True)
    older_than: ranges.Days | None = option(None, "Only what was not used for so many days.")


@dataclass
class DoctorSettings(Settings):
    """Say what this machine is and what fits it, and test here that results are right. Run it first."""

    quick: bool = option(False, "Only the tests that take a few seconds together.")
    bench: bool = option(False, "Also measure speeds, and predict a training step of every model (two minutes).")
