"""Weights: make a small decoder from scratch, load one, save one, run one.

A model is a stock Hugging Face causal LM over our 64 ids, in safetensors, so `from_pretrained` and PEFT just work. How
its sequences are written (`FormatConfig`) and what it was trained on (`TrainingData`) travel in the same folder, with
a tiny tokenizer for those who want to see the ids as text. `pretrained.py` makes one of any pretrained checkpoint.
"""

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from ..config import BUNDLED_DIR, FormatConfig, ModelConfig, Quantize
from ..data import DATA_FILE, TrainingData, read_training_data
from ..data.stream import Batch
from ..errors import UserError, first_line, install_command
from ..puzzles import END, IGNORE, PAD, VOCABULARY
from ..puzzles.encode import TOKENS
from . import fast_decoder
from .attention import Packing, attend, to_device
from .checkpoint_format import explain_no_checkpoint, read_config, require_causal_lm

ATTENTION = "arc_solver"


@dataclass(frozen=True, eq=False)
class Model:
    """A causal LM with the format that it reads and writes."""

    lm: Any  # transformers.PreTrainedModel; transformers' classes defeat type checkers
    format: FormatConfig
    trained_on: TrainingData | None  # None: unknown, so no leak audit is possible

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.lm.get_input_embeddings().weight.dtype

    @property
    def parameters_count(self) -> int:
        return self.lm.num_parameters()  # of quantised ones too, which are packed

    def logits(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        through: nn.Module | None = None,
        rows: Tensor | None = None,
        recompute: bool = False,
        **attention: Any,
    ) -> Tensor:
        """Next-id logits, [B, T, V] float32; or [*, V], of the places `rows` alone.

        Args:
            ids_BT, positions_BT: int64.
            through: the module to call instead of the language model itself: what makes several processes train it.
            rows: indexes into the flattened ids, int64: [N]; or [K, R], as many of each adapter's block of ids.
            recompute: whether activations are computed again in the backward pass instead of kept.
            attention: `packing`, where packed sequences end (B must be 1), or `mask_BTK`, True where a key may be seen,
                with a `cache` to keep keys and values (`kv_cache`). None of them: plain causal attention.
        """
        if through is None and fast_decoder.supports(self.lm):
            return fast_decoder.forward(self.lm, ids_BT, positions_BT, rows, recompute=recompute, **attention).float()
        module = through or self.lm
        if keeps := "cache" in attention:
            attention[_cache_parameter(type(self.lm).forward)] = attention.pop("cache")
        with _recomputing(self.lm) if recompute else nullcontext():
            out = module(input_ids=ids_BT, position_ids=positions_BT, use_cache=keeps, **attention)
        logits_BTV = out.logits.float()
        return logits_BTV if rows is None else logits_BTV.flatten(0, 1)[rows]


@cache
def _cache_parameter(forward: Callable[..., Any]) -> str:
    """What an architecture calls the cache: transformers 5.24 has a new name, and warns of the old one."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def packed_loss(
    model: Model,
    batch: Batch,
    logits_of: Callable[..., Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the target ids of a packed batch of T ids, in nats: their mean, or their sum; or with
    reduction="none" of all ids but the first, [T - 1], 0 where there is no target.

    `logits_of` is `model.logits`, or that compiled.
    """
    device = model.device
    ids_T, positions_T, labels_T = (to_device(x, device) for x in (batch.ids_T, batch.positions_T, batch.labels_T))
    packing = Packing.of(batch.ends_S, device, most=len(ids_T))
    logits_TV = (logits_of or model.logits)(ids_T[None], positions_T[None], packing=packing)[0]
    # Nothing is learnt at a sequence's first id, so the shift by one crosses no border.
    return F.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=IGNORE, reduction=reduction)


def new_model(config: ModelConfig, format: FormatConfig, seed: int, trained_on: TrainingData | None = None) -> Model:
    """A randomly initialised stock Qwen3 in float32: the same weights for the same seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: Any = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    settings._attn_implementation = ATTENTION
    prepare_transformers()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = Qwen3ForCausalLM(settings)
    return Model(lm, format, trained_on)


def save_model(
    model: Model, folder: Path, dtype: torch.dtype | None = None, state: dict[str, Tensor] | None = None
) -> None:
    """Writes an ordinary Hugging Face checkpoint, its weights cast to `dtype` if given, and what belongs to it.

    Args:
        state: the weights, where the model itself holds but a shard of each.
    """
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # once each, as tied weights would be no longer tied
    weights = {
        name: cast.setdefault((p.data_ptr(), p.shape), p.detach().to(dtype or p.dtype).contiguous())
        for name, p in (state or model.lm.state_dict()).items()
    }
    model.lm.config.arc_format = model.format.model_dump()
    model.lm.save_pretrained(folder, state_dict=weights)
    _say_for_transformers_4(folder / "config.json")
    _save_tokenizer(folder)
    if model.trained_on:
        (folder / DATA_FILE).write_text(json.dumps(model.trained_on.to_json()))


def _say_for_transformers_4(file: Path) -> None:
    """Says once more, where transformers 4 looks for it, how positions are rotated; otherwise it takes its defaults.

    transformers 5 has all of it in `rope_parameters`, and reads the places of old besides. Settings that differ from
    layer to layer have none there.
    """
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return
    own = {"rope_theta", "partial_rotary_factor"} & rope.keys()
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # GPT-NeoX's for them
    config |= {names[name] if config["model_type"] == "gpt_neox" else name: rope[name] for name in own}
    scaling = {name: value for name, value in rope.items() if name not in own}
    if scaling.get("rope_type") != "default":
        config["rope_scaling"] = scaling
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a character or marker, for tools that want one; we ourselves only deal in ids.

    It is byte-level, as transformers makes every tokenizer of a Qwen2 model so, whatever its files say.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["Ċ" if token == "\n" else token for token in TOKENS]  # GPT-2's letter for the byte 10
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in TOKENS if len(t) > 1])
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TOKENS[END],
        pad_token=TOKENS[PAD],
        unk_token=TOKENS[PAD],  # else Qwen2's is added to it
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 does not know the name that 5 gives it
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


QUANTIZE = install_command("arc_solver[quantize]")


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, quantize: Quantize = ""
) -> Model:
    """The checkpoint in a folder; "" is the bundled one.

    Args:
        dtype: of the weights, and of what is computed with those that are quantised.

    Raises:
        UserError: no checkpoint is there, or it was not written by `save_model`.
    """
    folder = checkpoint_dir(path)
    require_ours(folder)
    lm = read_weights(folder, dtype, device, quantize)
    return Model(lm.eval(), _read_format(lm.config.arc_format, folder), read_training_data(folder))


def _read_format(saved: Any, folder: Path) -> FormatConfig:
    try:
        return FormatConfig.model_validate(saved)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(["arc_format", *map(str, first["loc"])])
        raise UserError(
            f"config.json in {folder} has {what}={json.dumps(first['input'])}, which this version of arc_solver does"
            " not know: copy it again, or use the version that wrote it"
        ) from None


def require_ours(folder: Path) -> None:
    """Refuses a folder without a checkpoint that was written by `save_model`, before anything large is read.

    Raises:
        UserError: no checkpoint is there, or a pretrained one.
    """
    if not (folder / "config.json").is_file() or not has_weights(folder):
        if instead := explain_no_checkpoint(folder):
            raise UserError(f"{folder} holds no checkpoint: {instead}")
        missing = "weights in safetensors" if (folder / "config.json").is_file() else "config.json"
        raise UserError(_nowhere(folder, missing))
    if not is_ours(folder):
        raise UserError(
            f"{folder} is a pretrained checkpoint with a vocabulary of its own: train it first (bin/train"
            f" configs/qwen2.5-0.5b.toml --out runs/mine model.path={folder}), then give runs/mine/model"
        )


def _nowhere(folder: Path, missing: str) -> str:
    """What to say of a path that leads to no checkpoint."""
    if (folder / "model" / "config.json").is_file():
        return f"{folder} holds no checkpoint, but {folder}/model does: give that folder"
    if folder.is_dir():
        return f"{folder} holds no checkpoint ({missing} missing): make one with bin/train CONFIG --out DIR"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return (
            f"there is no folder {folder}, and names on the Hugging Face hub are for bin/train alone: train it first"
            f" (bin/train configs/qwen2.5-0.5b.toml --out runs/mine model.path={folder}), then give runs/mine/model"
        )
    return f"there is no folder {folder}: give that of a checkpoint, such as runs/mine/model"


def checkpoint_dir(path: str | Path) -> Path:
    """The folder that `model.path` means: "" is the bundled model's."""
    return Path(path) if path else BUNDLED_DIR


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint was written by `save_model`.

    Raises:
        UserError: its config.json is no JSON.
    """
    return "arc_format" in read_config(folder)


def read_weights(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu", quantize: Quantize = "") -> Any:
    """The causal LM in a folder, with our attention.

    Raises:
        UserError: the files are damaged, or are no causal LM in 16 or 32 bit.
    """
    from transformers import AutoModelForCausalLM

    require_causal_lm(folder)
    prepare_transformers()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **(_quantized(quantize, dtype, device) if quantize else {}),
        )
        lm, about = loaded
        if missing := sorted(about["missing_keys"]):  # transformers would go on with random ones
            raise ValueError(f"{missing[0]} is missing")
        _drop_nothing(lm)
        if quantize:
            _keep_gradients(lm)
        return lm if quantize else lm.to(device)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"the checkpoint in {folder} needs a package that is not here: {first_line(error)}") from error
    except Exception as error:  # transformers and safetensors raise many kinds; all of them mean these files
        raise UserError(_why_not_loaded(folder, error)) from error


def _why_not_loaded(folder: Path, error: Exception) -> str:
    """What transformers' and safetensors' complaints come to."""
    said = str(error).strip()
    if type(error).__name__ == "SafetensorError":
        return f"the weights in {folder} are damaged, copy or make them again ({first_line(error)})"
    if "ignore_mismatched_sizes" in said:
        return f"config.json in {folder} does not fit the weights beside it: copy both from the same place"
    if "alidation error for" in said:  # its first line is a headline
        return f"config.json in {folder} is wrong: {said.splitlines()[-1].strip()}"
    if "trust_remote_code" in said or "custom code" in said:
        return (
            f"the checkpoint in {folder} needs code of its own, which is not run: give a model whose architecture is"
            " part of transformers"
        )
    kind = read_config(folder).get("model_type")
    if not kind:
        return f"config.json in {folder} names no model_type: copy it again from where the weights are from"
    if isinstance(error, KeyError) and ATTENTION in said:
        return f"{folder}: this architecture ({kind}) computes attention in a way of its own: give another model"
    if isinstance(error, KeyError) or "does not recognize this architecture" in said:
        from transformers import __version__

        what = f"{said}, which config.json in {folder} names" if isinstance(error, KeyError) else f"{kind}, in {folder}"
        return f"transformers {__version__} does not know {what}: give another model, or use a newer transformers"
    return f"the checkpoint in {folder} cannot be loaded ({first_line(error)}): copy or make it again"


def _quantized(how: Quantize, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """What makes transformers quantise linear layers as it loads them, by bitsandbytes.

    4 bit are NF4 (Dettmers et al. 2023, arXiv 2305.14314), 8 bit LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339).

    Raises:
        UserError: bitsandbytes or accelerate is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantize needs bitsandbytes: run {QUANTIZE}, or leave model.quantize out")
    if find_spec("accelerate") is None:
        raise UserError(f"model.quantize needs accelerate: run {QUANTIZE}, or leave model.quantize out")
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    options = four if how == "4bit" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": torch.device(device)}}


def _drop_nothing(lm: Any) -> None:
    """Switches dropout off: with it training would depend on more than the seed and the step."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):  # what is given to `F.dropout`
                setattr(module, name, 0.0)


def _keep_gradients(lm: Any) -> None:
    """On a CPU bitsandbytes packs 4 bits anew for inference, and what is packed so gives no gradients any more."""
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def recompute_activations(lm: Any) -> None:
    """Switches gradient checkpointing on: activations are computed again in the backward pass instead of kept."""
    # Named anew in transformers 5.23; the old name warns there.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def _recomputing(lm: Any) -> Iterator[None]:
    """The same for the passes made meanwhile. transformers does it in layers that are in training only."""
    layers = [module for module in lm.modules() if hasattr(module, "gradient_checkpointing")]
    trained = [layer.training for layer in layers]
    recompute_activations(lm)
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        disable = getattr(lm, "activation_checkpointing_disable", None) or lm.gradient_checkpointing_disable
        disable()
        for layer, trains in zip(layers, trained, strict=True):
            layer.training = trains


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart: a hash of names, types, shapes and of samples of the weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("model*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as weights:
            for place in range(0, size, max(1, size // 64)):
                weights.seek(place)
                digest.update(weights.read(1 << 16))
    return digest.hexdigest()[:16]


def prepare_transformers() -> None:
    """Registers the attention function, and keeps transformers and bitsandbytes from speaking between our lines."""
    from transformers import AttentionInterface
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # It misses a faster CPU kernel as soon as PEFT imports it, be anything quantised or not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    AttentionInterface.register(ATTENTION, attend)
