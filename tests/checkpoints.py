"""Tiny pretrained checkpoints, made on the spot, in all that matters like those on the hub: architectures, byte-level
BPE tokenizers that split digits one by one or in threes, padded embeddings, end tokens, generation settings."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["qwen2", "qwen3", "llama", "smollm"]
Digits = Literal["single", "triples"]
KINDS: tuple[Kind, ...] = ("qwen2", "qwen3", "llama", "smollm")
TIED = {"qwen2": True, "qwen3": True, "llama": False, "smollm": True}  # as the small ones of each family are

# How text is cut before BPE, by Qwen 2 and 3 and by Llama 3. SmolLM cuts digits one by one too.
SPLITS: dict[Digits, str] = {
    "single": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "triples": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPECIAL: dict[Kind, tuple[str, ...]] = {
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "smollm": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
NAMED: dict[Kind, dict[str, str]] = {
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},  # and none to pad with
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
}


def make_checkpoint(
    folder: Path,
    kind: Kind,
    digits: Digits = "single",
    tied: bool | None = None,
    seed: int = 0,
    shard_size: str = "5GB",
) -> Path:
    """Writes one, with random weights that are the same for the same arguments.

    Args:
        tied: whether embedding and head are one matrix; None: as usual for the kind.
    """
    tokenizer = make_tokenizer(kind, digits)
    tokenizer.save_pretrained(folder)
    lm = make_lm(kind, tokenizer, TIED[kind] if tied is None else tied, seed)
    lm.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def make_lm(kind: Kind, tokenizer: Any, tied: bool, seed: int) -> Any:
    """A causal LM for a tokenizer; its norms and biases are random too."""
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    heads: dict[Kind, dict[str, int]] = {
        "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},  # head_dim 16
        "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},  # together wider than hidden
        "llama": {"num_attention_heads": 2, "num_key_value_heads": 2},
        "smollm": {"num_attention_heads": 4, "num_key_value_heads": 1},
    }
    makers: dict[Kind, tuple[Any, Any]] = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "smollm": (LlamaConfig, LlamaForCausalLM),
    }
    make_config, make = makers[kind]
    first, end = (tokenizer.convert_tokens_to_ids(SPECIAL[kind][i]) for i in (0, -1))
    config = make_config(
        vocab_size=len(tokenizer) + (43 if kind == "qwen2" else 0),  # Qwen's embeddings have rows that no token uses
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=first,
        eos_token_id=end,
        **heads[kind],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = make(config)
        with torch.no_grad():
            for p in lm.parameters():
                if p.ndim == 1:
                    p += 0.2 * torch.randn(p.shape)
    lm.generation_config = GenerationConfig(
        bos_token_id=first, eos_token_id=[end, first], pad_token_id=first, do_sample=True, temperature=0.7
    )
    return lm


def make_tokenizer(kind: Kind, digits: Digits) -> Any:
    """A byte-level BPE tokenizer of a few hundred ids, trained on made-up text.

    Of "single" no token has two digits; of "triples" the frequent numbers, 12 and 123 among them, are tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[digits]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL[kind]),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    if kind == "llama":  # which puts a token before every text
        first = SPECIAL[kind][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    grouped = [tokenizer.token_to_id(number) is not None for number in ("12", "123")]
    assert grouped == [digits == "triples"] * 2
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMED[kind])


def _text() -> list[str]:
    rng = random.Random(0)
    words = [
        "the",
        "output",
        "of",
        "an",
        "input",
        "grid",
        "has",
        "rows",
        "and",
        "columns:",
        "every",
        "cell",
        "is",
        "one",
    ]
    numbers = ["12", "123", "30", "7", "10", "305"]
    return [
        " ".join(rng.choice(words) for _ in range(8)) + f" {rng.choice(numbers)} {rng.randrange(1000)}\n\n"
        for _ in range(200)
    ]


SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def folder_with(folder: Path, config: Any) -> Path:
    """A checkpoint of any architecture, with a tokenizer of ours."""
    from transformers import AutoModelForCausalLM

    make_tokenizer("qwen3", "single").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def add_settings(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))
