"""How the files of adapters are called, ours and other tools'."""

TENSORS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PEFT_FILE = "pytorch_lora_weights.safetensors"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_TYPE = "peft_type"
"""What PEFT's adapter_config.json says, and ours does not."""

SUFFIXES = (".safetensors", ".sft")
