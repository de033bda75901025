"""PEFT's format of an adapter: which settings and tensors mean what plain LoRA means, and what is refused by name.

PEFT reads an adapter as its config says; we read tensors. So each setting of PEFT's that may change what the tensors
mean, and each one that we do not know, is refused unless it is at its default: the numbers would be wrong in silence.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .checkpoint_format import explain_no_safetensors, refuse_lfs_pointers
from .model import has_weights

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Of LoraConfig in PEFT 0.19 to 0.21: where an adapter goes, how it was trained, and what is read here itself.
HARMLESS = """
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_rslora
"""
# What the others mean.
MEANINGS = {
    "alora_invocation_tokens": "activated LoRA, which changes only what comes after these tokens",
    "arrow_config": "a choice among several adapters at every token",
    "bias": "biases of the base were trained too",
    "kasa_config": "KaSA, which takes the smallest singular values from the base's weights",
    "layer_replication": "layers of the base are there several times",
    "lora_bias": "a bias beside each pair of matrices",
    "megatron_config": "layers of Megatron's",
    "modules_to_save": "whole layers that replace the base's",
    "monteclora_config": "matrices that are drawn anew at every step",
    "target_parameters": "parameters that are no layer's weight",
    "trainable_token_indices": "rows of the embedding that were trained",
    "use_bdlora": "block-diagonal matrices",
    "use_dora": "DoRA, which scales the base's weights anew",
    "use_qalora": "inputs are averaged over groups first",
    "velora_config": "activations are compressed in training",
}
PLAIN_INITS = ("eva", "gaussian", "mica", "orthogonal")  # besides true and false; these leave the base as it was
CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
NOT_MERGEABLE = """
    ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING PREFIX_TUNING PROMPT_TUNING P_TUNING XLORA
    alora_invocation_tokens arrow_config
"""
MERGE = (
    "merge it into its base with PEFT first (PeftModel.from_pretrained(base, adapter).merge_and_unload()), and give the"
    " result as model.path"
)
CONVERT = (
    "convert it to plain LoRA where it was trained, with PEFT's save_pretrained(...,"
    " path_initial_model_for_weight_conversion=...), or merge it there (merge_and_unload()) and give the result as"
    " model.path"
)
OWN_VOCABULARY = "an embedding or head of its own, as its vocabulary was resized or trained"
# What a tensor is whose name has this part, the first that fits; of those that PEFT itself can run, then of all others.
BY_PEFT = {".lora_embedding_": "LoRA on an embedding", ".lora_magnitude_vector": "DoRA's magnitudes"}
FOREIGN = {
    "modules_to_save": "a whole layer that replaces the base's",
    "trainable_tokens": "rows of the embedding that were trained",
    ".base_layer.": "a weight of the base itself",
    "lora_B.bias": "a bias beside a pair of matrices (lora_bias)",
    "lora_": "no part of plain LoRA",
    ".bias": "a bias of the base",
    "embed": OWN_VOCABULARY,
    "wte": OWN_VOCABULARY,
    "lm_head": OWN_VOCABULARY,
}


def check_adapter(folder: Path, by_peft: bool = False) -> tuple[dict[str, Any], frozenset[str]]:
    """The settings of an adapter, and the names of the layers that it is for.

    Args:
        by_peft: PEFT is to run it, which knows DoRA and LoRA on embeddings.

    Raises:
        UserError: there is none, it is damaged, or it says something that would be left out.
    """
    require_adapter(folder)
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text())
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            names = set(file.keys())
        if not isinstance(settings, dict):
            raise ValueError(f"{CONFIG_FILE} holds no settings")
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} is damaged, copy or make it again: {error}") from error
    _check_settings(folder, settings, by_peft)
    _check_names(folder, names, by_peft)
    layers = {re.split(r"\.lora_(?:[AB]|embedding_|mag)", name.removeprefix(PREFIX))[0] for name in names}
    _check_targets(folder, settings.get("target_modules"), layers)
    return settings, frozenset(layers)


def require_adapter(folder: Path) -> None:
    """Refuses what is no folder with the two files of a PEFT adapter, and says what it is instead."""
    if not folder.exists():
        raise UserError(f"there is no adapter {folder}: give the folder of one; adapters are not fetched from the hub")
    if folder.is_dir():
        refuse_lfs_pointers(folder)
    for needed in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / needed).is_file():
            raise UserError(f"{folder} holds no adapter: {_instead(folder) or f'{needed} is missing'}")


def _instead(path: Path) -> str:
    """What there is in place of an adapter, and what to do; "" if that cannot be told."""
    if (path / "config.json").is_file() and has_weights(path):
        return "it is a whole model; give it as model.path"
    if (path / "adapters.safetensors").is_file():
        return "adapters.safetensors is in MLX's format, which is not read; convert it to PEFT's"
    if below := sorted(path.glob(f"*/{CONFIG_FILE}")):
        return f"{below[-1].parent} does; give that folder"
    return explain_no_safetensors(path)


def _check_settings(folder: Path, settings: Mapping[str, Any], by_peft: bool) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        what = f"is of PEFT's type {kind}, not LORA" if kind else f"is not PEFT's: {CONFIG_FILE} names no peft_type"
        raise UserError(f"the adapter in {folder} {what}; {_remedy(kind) if kind else 'convert it to a PEFT adapter'}")
    init = settings.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init is None or str(init).lower() in PLAIN_INITS):
        changed = str(init).lower().startswith(CHANGED_BASES)
        why = "its training began by changing the base's weights" if changed else "which is not known here"
        raise UserError(
            f'the adapter in {folder} has init_lora_weights="{init}" ({why}), so on the plain base it would give other'
            f" numbers; {CONVERT}"
        )
    harmless = {*HARMLESS.split(), "use_dora" if by_peft else ""}
    for name, value in settings.items():
        if name in harmless or not value or (name, value) == ("bias", "none"):
            continue
        said = json.dumps(value)
        said = said if len(said) < 60 else said[:60] + "..."
        raise UserError(
            f"the adapter in {folder} is not plain LoRA: it has {name}={said}"
            f" ({MEANINGS.get(name, 'a setting that is not known here')}); {_remedy(name)}"
        )


def _remedy(name: str) -> str:
    return "PEFT cannot merge it either: train a plain LoRA adapter" if name in NOT_MERGEABLE.split() else MERGE


def _check_names(folder: Path, names: Iterable[str], by_peft: bool) -> None:
    """Every tensor is one that is used."""
    used = (".lora_A.weight", ".lora_B.weight")
    for name in sorted(names):
        if not name.startswith(PREFIX):
            raise UserError(
                f"the adapter in {folder} is not in PEFT's format: {name} does not begin with {PREFIX}; save it with"
                " PEFT's save_pretrained"
            )
        if name.endswith(used) or (by_peft and any(part in name for part in BY_PEFT)):
            continue
        what = next((what for part, what in (BY_PEFT | FOREIGN).items() if part in name), FOREIGN["modules_to_save"])
        raise UserError(f"the adapter in {folder} is not plain LoRA: it has {name}, {what}; {MERGE}")


def _check_targets(folder: Path, targets: Any, layers: Iterable[str]) -> None:
    """PEFT would not load the weights of a layer that is no target: they are of another adapter than the settings."""
    for layer in sorted(layers):
        try:
            if isinstance(targets, str):
                named = targets.lower() == "all-linear" or bool(re.fullmatch(targets, layer))
            else:
                named = targets is None or any(f".{layer}".endswith(f".{target}") for target in targets)
        except (TypeError, re.error) as error:
            raise UserError(
                f"the adapter in {folder} has target_modules={json.dumps(targets)} in {CONFIG_FILE}, and must have a"
                " list of layers' names there, or one regular expression: copy or make it again"
            ) from error
        if not named:
            raise UserError(
                f"the adapter in {folder} is damaged, copy or make it again: it has weights for {layer}, which is not"
                " among its target_modules"
            )


def layer_alphas(folder: Path, settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """For each layer the alpha of plain LoRA, which scales by alpha / rank; both may differ from layer to layer.

    rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).

    Args:
        ranks: name of the layer -> rank of its matrices.

    Raises:
        UserError: they contradict the settings.
    """
    alphas: dict[str, float] = {}
    for name, rank in ranks.items():
        said = _of_layer(folder, settings, "rank_pattern", name, settings.get("r", 8))
        alpha = _of_layer(folder, settings, "alpha_pattern", name, settings.get("lora_alpha", 8))
        if said != rank:
            raise UserError(
                f"the adapter in {folder} is damaged, copy or make it again: the weights of {name} are of rank {rank},"
                f" and {CONFIG_FILE} says rank {said}"
            )
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise UserError(
                f"the adapter in {folder} has alpha {alpha} for {name} in {CONFIG_FILE}, and what scales its weights"
                " must be a number above 0: write there what it was trained with"
            )
        alphas[name] = alpha * (math.sqrt(rank) if settings.get("use_rslora") else 1)
    return alphas


def _of_layer(folder: Path, settings: Mapping[str, Any], pattern: str, name: str, usual: Any) -> Any:
    """The value of a layer: that of the first key that is a regular expression of the end of its name, as in PEFT."""
    try:
        patterns = (settings.get(pattern) or {}).items()
        return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name)), usual)
    except (AttributeError, re.error) as error:
        raise UserError(
            f"the adapter in {folder} has {pattern}={json.dumps(settings[pattern])} in {CONFIG_FILE}, and must have"
            " regular expressions of layers' names there, each with a number: copy or make it again"
        ) from error
