"""Makes any pretrained causal LM one of ours: fetch it, cut its vocabulary down to our 64 ids, check its attention.

The *cut* takes the rows of the embedding and of the head that our ids need: digits and newline as they are, the
numbers and the two markers as the mean of their tokens' rows. On digits and newlines the cut model's logits are the
original's; softmax and head cost nothing any more; and nothing downstream knows that the model was ever another.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FormatConfig
from ..data import NOTHING
from ..errors import UserError, first_line
from ..puzzles import COLOURS, END, INPUT, MAX_SIDE, NEWLINE, NUMBER, OUTPUT, PAD, VOCABULARY
from . import fast_decoder
from .attention import Packing
from .checkpoint_format import explain_no_checkpoint, refuse_lfs_pointers
from .kv_cache import KvCache
from .model import ATTENTION, Model, has_weights, is_ours, load_model, read_weights

KeptIds = Sequence[tuple[int, ...]]  # for each of our ids the original ones whose rows it is the mean of


@dataclass(frozen=True)
class Cut:
    """What a vocabulary cut did."""

    vocabulary: int  # before
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        return (
            f"vocabulary cut from {self.vocabulary:,} to {VOCABULARY} ids: {self.parameters_before:,} parameters"
            f" before, {self.parameters_after:,} after"
        )


def load_any(
    folder: Path, path: str, format: FormatConfig, dtype: torch.dtype = torch.float32
) -> tuple[Model, Cut | None]:
    """The checkpoint in a folder, cut to our vocabulary unless it was before.

    Args:
        path: what the user calls it.

    Raises:
        UserError: it cannot be read, or is of a kind that we cannot train.
    """
    if is_ours(folder):
        model = load_model(folder, dtype=dtype)
        if model.format != format:
            theirs, ours = model.format.model_dump(), format.model_dump()
            words = [f"format.{key}={json.dumps(value)}" for key, value in theirs.items() if value != ours[key]]
            raise UserError(f"{path} was trained with another [format] than the config's: set {' '.join(words)}")
        return model, None
    if format.positions != "token":
        raise UserError(f'{path} is a pretrained model, which knows token positions only: set format.positions="token"')
    lm = read_weights(folder, torch.float32)
    _check_windows(lm, path)
    cut = cut_vocabulary(lm, vocabulary_map(_tokenizer(folder), _rows_count(lm, path)))
    check_attention(lm, path)
    return Model(lm.to(dtype).eval(), format, replace(NOTHING, pretrained=frozenset({path}))), cut


def fetch_checkpoint(path: str) -> Path:
    """The folder of a checkpoint, given as a folder or a Hugging Face id, which is downloaded.

    Raises:
        UserError: neither a folder nor a hub id leads to one.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not has_weights(folder):
            instead = explain_no_checkpoint(folder) or "config.json and model.safetensors are needed"
            raise UserError(f"{path} holds no checkpoint: {instead}")
        return folder
    if folder.suffix == ".gguf":
        raise UserError(f"model.path={path} holds no checkpoint: {explain_no_checkpoint(folder)}")
    if path.count("/") != 1 or path.startswith(("/", ".", "~")) or folder.exists():
        raise UserError(f"model.path={path} is no folder; give a checkpoint's folder, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            path,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["*/*", "consolidated*"],  # the same weights once more, in other formats
        )
    except Exception as error:  # of many kinds, from HTTP to disks; all of them mean that there is no checkpoint
        said = " ".join(str(error).split("\n\n")[:2]).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"model.path={path} is no folder and cannot be fetched from the Hugging Face hub ({said[0]}); give the"
            " folder of a downloaded checkpoint"
        ) from error
    return fetch_checkpoint(fetched)


def vocabulary_map(tokenizer: Any, rows: int) -> list[tuple[int, ...]]:
    """For each of our ids, the ids of the tokenizer that stand for it.

    Args:
        rows: of the embedding. A tokenizer may name tokens beyond them, as when a token to pad with was added to it.

    Raises:
        UserError: a digit or the newline is not a token of its own, or a token that is needed has no row.
    """
    digits = [_only_id(tokenizer, str(digit)) for digit in range(COLOURS)]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None:
        raise UserError("the checkpoint's tokenizer names no end token: set eos_token in its tokenizer_config.json")
    if pad is None or pad >= rows:  # padding is never learnt and never asked for
        pad = end
    kept: list[tuple[int, ...]] = [(pad,)] * VOCABULARY  # nor are the reserved ids
    kept[:COLOURS] = [(digit,) for digit in digits]
    kept[NEWLINE] = (_only_id(tokenizer, "\n"),)
    kept[INPUT], kept[OUTPUT] = _ids(tokenizer, "input"), _ids(tokenizer, "output")
    kept[END] = (end,)
    for n in range(1, MAX_SIDE + 1):
        kept[NUMBER + n] = tuple(digits[int(digit)] for digit in str(n))
    if beyond := sorted({i for ids in kept for i in ids if i >= rows}):
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in beyond)
        raise UserError(
            f"the checkpoint's embedding has {rows} rows and none for its tokenizer's {names}: resize it with"
            " transformers' resize_token_embeddings, or give the tokenizer that the model was trained with"
        )
    return kept


def cut_vocabulary(lm: Any, kept: KeptIds) -> Cut:
    """Cuts embedding and head of a causal LM down to our ids, in place. Tied ones stay tied."""
    before = sum(p.numel() for p in lm.parameters())
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head.weight is embedding.weight
    vocabulary = len(embedding.weight)
    embedding.weight = _rows(embedding.weight, kept)
    embedding.num_embeddings, embedding.padding_idx = VOCABULARY, None
    head.weight = embedding.weight if tied else _rows(head.weight, kept)
    head.out_features = VOCABULARY
    if getattr(head, "bias", None) is not None:
        head.bias = _rows(head.bias, kept)
    _rename_ids(lm)
    return Cut(vocabulary, before, sum(p.numel() for p in lm.parameters()))


def _rows_count(lm: Any, path: str) -> int:
    """How many ids embedding and head both have rows for."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise UserError(
            f"{path}: this architecture ({lm.config.model_type}) has no plain embedding and head to cut: {OTHERS}"
        )
    return min(len(embedding.weight), len(head.weight))


def _rows(weight: Tensor, kept: KeptIds) -> nn.Parameter:
    """The mean of the rows for each id. Computed in float32, which gives a single row back as it is."""
    means = [weight[list(ids)].detach().float().mean(0) for ids in kept]
    return nn.Parameter(torch.stack(means).to(weight.dtype))


def _rename_ids(lm: Any) -> None:
    """The ids in the config and the generation config become ours."""
    from transformers import GenerationConfig

    for config in {id(c): c for c in (lm.config, lm.config.get_text_config())}.values():
        config.vocab_size = VOCABULARY
        for name in list(config.to_dict()):
            if name.endswith(("_token_id", "_token_ids", "_token_index")):
                setattr(config, name, None)
        config.eos_token_id, config.pad_token_id = END, PAD
    lm.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    for module in lm.modules():
        if isinstance(getattr(module, "vocab_size", None), int):
            module.vocab_size = VOCABULARY


OTHERS = "give another model, such as Qwen2.5, Qwen3, Llama or SmolLM"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    refuse_lfs_pointers(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds; all of them mean these files
        files = [file.name for file in sorted(folder.glob("tokenizer*")) if file.name != "tokenizer_config.json"]
        if not files:
            raise UserError(
                f"there is no tokenizer in {folder}: copy tokenizer.json and tokenizer_config.json of the model there"
            ) from error
        raise UserError(
            f"the tokenizer in {folder} cannot be read from {', '.join(files)} ({first_line(error)}): give a checkpoint"
            " that has a whole tokenizer.json"
        ) from error


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise UserError(f"the checkpoint's tokenizer reads nothing in {text!r}, and cannot be cut to digits: {OTHERS}")
    return ids


def _only_id(tokenizer: Any, text: str) -> int:
    """The id of a one-character text. Some tokenizers put a token for the word's beginning before it."""
    ids = _ids(tokenizer, text)
    if tokenizer.decode([ids[-1]]) != text:
        raise UserError(
            f"the checkpoint's tokenizer has no token for {text!r} alone, so it cannot be cut to digits: {OTHERS}"
        )
    return ids[-1]


def _check_windows(lm: Any, path: str) -> None:
    """Packed attention is causal and no more, and a sequence's keys depend on that sequence alone."""
    config = lm.config.get_text_config()
    # Mistral and its kin name no types of layers: all of them have the window, unless it is wider than any sequence.
    window = getattr(config, "sliding_window", None) or math.inf
    every = "sliding_attention" if window < getattr(config, "max_position_embeddings", math.inf) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [every])
    if kinds != {"full_attention"}:
        raise UserError(
            f"{path} has layers of {', '.join(sorted(kinds))}, and only full attention can be trained on packed"
            f" sequences: {OTHERS}"
        )
    if getattr(config, "attn_logit_softcapping", None):  # too weak to show in the short sequences that are compared
        raise UserError(
            f"{path} caps its attention scores (attn_logit_softcapping), which packed attention does not: {OTHERS}"
        )
    if "longrope" in str(getattr(config, "rope_parameters", None)):
        raise UserError(
            f"{path} has a rotary embedding that changes with the longest sequence of a batch (longrope), so one answer"
            " would depend on others: take a variant for short contexts"
        )


def check_attention(lm: Any, path: str, length: int = 48) -> None:
    """Checks that our attention gives what the model's own gives, packed and with a KV cache.

    In both ways in which a model may be run here: by transformers, and by hand.

    Raises:
        UserError: they differ, or it does not run: the architecture does something that packed training cannot.
    """
    try:
        why = "" if _attention_agrees(lm, length) else "its own attention gives something else than ours"
    except Exception as error:  # of any kind, in the code of an architecture that we do not know
        why = first_line(error)
    if why:
        kind = lm.config.model_type
        raise UserError(f"{path}: this architecture ({kind}) cannot be trained on packed sequences ({why}): {OTHERS}")


@torch.no_grad()
def _attention_agrees(lm: Any, length: int) -> bool:
    model = Model(lm, FormatConfig(positions="token"), None)
    ids_BT = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(length)[None]
    half = length // 2
    packing = Packing.of(torch.tensor([half, length]), ids_BT.device)
    lm.set_attn_implementation("eager")
    try:
        own = lm(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits.float()
    finally:
        lm.set_attn_implementation(ATTENTION)
    found = []
    for through in (lm, None) if fast_decoder.supports(lm) else (lm,):
        logits = partial(model.logits, through=through)
        whole = logits(ids_BT, positions_BT)
        twice = logits(ids_BT[:, :half].repeat(1, 2), positions_BT[:, :half].repeat(1, 2), packing=packing)
        cache = KvCache(1)
        logits(ids_BT[:, :half], positions_BT[:, :half], cache=cache.for_prefill([0]))
        continued = logits(
            ids_BT[:, half:],
            positions_BT[:, half:],
            cache=cache.for_decoding(torch.arange(half, length)[None], length),
            mask_BTK=torch.ones(1, length - half, length, dtype=torch.bool).tril(half),
        )
        found += [(whole, own), (twice[:, :half], own[:, :half]), (twice[:, half:], own[:, :half])]
        found.append((continued, own[:, half:]))
    tolerance = 1e-3 * float(own.std())
    return all(float((ours - expected).abs().max()) <= tolerance for ours, expected in found)
