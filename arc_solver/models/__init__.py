"""Weights and layers: make them, load them, cut them to our vocabulary, adapt them, save them.

In the order of reading; each imports only from those before it:

    attention          packed sequences without padding, and masks for decoding
    fast_decoder       Llama and its kin, run by hand: the same numbers as transformers, in less time
    checkpoint_format  what a folder of weights is, told from its files
    hardware           which device, which number type is fast on it, how much memory it has
    model              a decoder and its format: make, load, run, save
    kv_cache           keys and values of prompts and their continuations
    pretrained         any pretrained model made ours: fetch, cut the vocabulary, check
    peft_format        adapters in PEFT's format: what is read, what is refused by name
    adapters           LoRA for K tasks at once over one frozen base
    lora               offline LoRA, by PEFT: attach, continue, save, merge
"""

from .adapters import Adapter, LoraBank, attach_adapters, fresh_adapter, load_adapter, save_adapter
from .attention import Packing, to_device
from .hardware import cpu_name, describe_precision, fast_dtype, free_memory, peak_memory, pick_device, resident_memory
from .lora import attach_lora, merge_saved_adapter, unverified_base_warning
from .model import Model, checkpoint_dir, load_model, new_model, packed_loss, require_ours, save_model
from .peft_format import check_adapter

__all__ = [
    "Adapter",
    "LoraBank",
    "Model",
    "Packing",
    "attach_adapters",
    "attach_lora",
    "check_adapter",
    "checkpoint_dir",
    "cpu_name",
    "describe_precision",
    "fast_dtype",
    "free_memory",
    "fresh_adapter",
    "load_adapter",
    "load_model",
    "merge_saved_adapter",
    "new_model",
    "packed_loss",
    "peak_memory",
    "pick_device",
    "require_ours",
    "resident_memory",
    "save_adapter",
    "save_model",
    "to_device",
    "unverified_base_warning",
]
