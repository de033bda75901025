"""What a folder of weights is, told from its files: a checkpoint that can be read, or what it is instead."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

# Ends of the names of architectures that write no text, or not from text alone.
OTHER_KINDS = {
    "ForConditionalGeneration": "reads images or sound, or has an encoder",
    "ForMaskedLM": "is an encoder",
    "ForPreTraining": "is more than a language model",
    "ForQuestionAnswering": "finds answers in texts",
    "ForSequenceClassification": "classifies texts",
    "ForTokenClassification": "classifies words",
    "EncoderModel": "is an encoder",
    "RewardModel": "scores texts",
}


def explain_no_checkpoint(path: Path) -> str:
    """Why a folder is no checkpoint, and what to do about it; "" if unknown."""
    if (path / "adapter_config.json").is_file():
        return "it is an adapter; give it as model.adapter, and the model that it is for as model.path"
    if (path / "model" / "config.json").is_file():
        return f"it is a run of bin/train; give {path / 'model'}"
    if (path / "run.json").is_file() and (path / "adapters").is_dir():
        return f"it is a run of bin/solve; give the model that it used, and one of {path / 'adapters'} as model.adapter"
    return explain_no_safetensors(path)


def explain_no_safetensors(path: Path) -> str:
    """What there is in place of weights in safetensors, and what to do; "" if that cannot be told."""
    inside = sorted(file.name for file in path.glob("*")) if path.is_dir() else [path.name]
    if gguf := next((name for name in inside if name.endswith(".gguf")), ""):
        return f"{gguf} is in llama.cpp's format, GGUF, which is not read; give the original in safetensors"
    if path.is_file():
        return "it is a file; give the folder that it lies in"
    weights = [name for name in inside if name.startswith(("adapter_model", "consolidated", "model", "pytorch_model"))]
    if pickled := next((name for name in weights if Path(name).suffix in (".bin", ".pt", ".pth")), ""):
        return (
            f"{pickled} is a pickle, which is not read as it may run any code; convert it to safetensors, by loading it"
            " and save_pretrained"
        )
    return ""


def refuse_lfs_pointers(folder: Path) -> None:
    """Refuses a folder with files that git-lfs has not fetched: a few lines of text in place of each.

    Raises:
        UserError: it has one.
    """
    for file in sorted(folder.glob("*")):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is a pointer of git-lfs, not the file itself: run git lfs pull, or download it")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Raises:
        UserError: it holds no settings, or files are missing that git-lfs has not fetched.
    """
    refuse_lfs_pointers(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
        return config
    except ValueError as error:
        raise UserError(f"{folder}/config.json is damaged, copy or make it again: {error}") from None


def require_causal_lm(folder: Path) -> None:
    """Refuses a checkpoint that is quantised or is not a causal language model.

    Raises:
        UserError: it is one.
    """
    config = read_config(folder)
    if how := _quantisation(folder, config):
        raise UserError(
            f"the checkpoint in {folder} is quantised ({how}): its weights can be neither cut nor trained; give the one"
            " that it was made from, in 16 or 32 bit"
        )
    for name in map(str, config.get("architectures") or ()):
        if kind := next((kind for end, kind in OTHER_KINDS.items() if name.endswith(end)), ""):
            raise UserError(
                f"the checkpoint in {folder} is no causal language model: a {name} {kind}; give a ...ForCausalLM"
            )


def _quantisation(folder: Path, config: dict[str, Any]) -> str:
    """What the weights were quantised by; "" if they were not."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "compression_config", "quantization"):  # the last is MLX's
            if about := part.get(name):
                return str(about.get("quant_method") or name) if isinstance(about, dict) else str(about)
    older = ("quantize_config.json", "quant_config.json")  # of AutoGPTQ and AutoAWQ
    return next((name for name in older if (folder / name).is_file()), "")
