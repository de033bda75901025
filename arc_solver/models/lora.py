"""Offline LoRA, by PEFT: attach, continue, save and merge an adapter.

The layers are put into the model in place, so it is run as before. An adapter folder is PEFT's, and says besides which
base it belongs to (`base.json`) and what it was trained on.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..config import LoraConfig
from ..data import TrainingData, read_training_data
from ..errors import UserError
from .adapters import Adapter, attach_adapters, load_adapter, merge
from .model import DATA_FILE, Model, fingerprint, load_model
from .peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE, check_adapter

BASE_FILE = "base.json"


def attach_lora(model: Model, config: LoraConfig, seed: int) -> Any:
    """A fresh adapter on the model, whose own weights are frozen; the same one for the same seed. Answers PEFT's model.

    Raises:
        UserError: a target names no layer of the model, or the rank does not go with the init.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    check_targets(model, config)
    _untie(model.lm, config.targets)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # PEFT says int and takes any number
        use_rslora=config.rslora,
        use_dora=config.dora,
        init_lora_weights=True if config.init == "default" else config.init,  # type: ignore[arg-type]
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _quietly():
            return get_peft_model(model.lm, settings)


def check_targets(model: Model, config: LoraConfig) -> None:
    """Checks that an adapter can be attached.

    Raises:
        UserError: a target names no layer of the model, or the rank does not go with the init.
    """
    found = {name.rpartition(".")[2] for name, m in model.lm.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    if any(type(m).__name__ == "Conv1D" for m in model.lm.modules()):
        raise UserError(
            f"lora.enabled: this model ({model.lm.config.model_type}) has Conv1D layers in the place of linear ones, on"
            " which no adapter is trained here: set lora.enabled=false to train all weights, or give another model"
        )
    if missing := sorted(set(config.targets) - found):
        raise UserError(
            f"lora.targets: the model has no layer named {', '.join(missing)}; it has {', '.join(sorted(found))}"
        )
    if config.init == "orthogonal" and config.rank % 2:
        raise UserError(f"lora.init='orthogonal' needs an even lora.rank, got {config.rank}")


def continue_lora(model: Model, folder: Path, base_dir: Path) -> Any:
    """The adapter in a folder on the model, to be trained on. Answers PEFT's model.

    Raises:
        UserError: there is none, it is for another base, or it is more than PEFT and we can train on.
    """
    from peft import PeftModel, get_peft_model_state_dict

    _untie(model.lm, check_base(folder, base_dir, by_peft=True))
    try:
        with _quietly():
            lora = PeftModel.from_pretrained(model.lm, str(folder), is_trainable=True)
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            foreign = set(get_peft_model_state_dict(lora, save_embedding_layers=False)) ^ set(file.keys())
        if foreign:
            raise ValueError(f"{min(foreign)} is in one of them only")
    except Exception as error:  # PEFT raises many kinds; all of them mean these files
        *_, last = (str(error).strip() or type(error).__name__).splitlines()  # the first of several is a headline
        raise UserError(
            f"the adapter in {folder} does not fit the model in {base_dir} ({last.strip().rstrip('.')}): give the model"
            " that it was trained on as model.path"
        ) from error
    return lora


@contextmanager
def _quietly() -> Iterator[None]:
    """Without two warnings that a user can do nothing about.

    PEFT 0.21 asks transformers 5.23 for something by its old name. And PEFT 0.19 goes by a model's class where it warns
    of tied weights, whatever `_untie` has done.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


def check_base(folder: Path, base_dir: Path, by_peft: bool = False) -> frozenset[str]:
    """Checks that an adapter is whole, one that is used as it is, and for a base, as far as it says.

    Args:
        by_peft: PEFT is to run it, which knows more than plain LoRA.

    Returns:
        The names of the layers that it is for.

    Raises:
        UserError: it is not, or there is no adapter.
    """
    _, layers = check_adapter(folder, by_peft)
    file = folder / BASE_FILE
    base = None
    try:
        if file.is_file():
            content = json.loads(file.read_text())
            base = content["fingerprint"], content["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the adapter in {folder} is damaged, copy or make it again: {BASE_FILE} does not say what it is for"
        ) from error
    if base and base[0] != fingerprint(base_dir):
        raise UserError(
            f"the adapter in {folder} is for another base than {base_dir}: give the one that it was trained on,"
            f" model.path={base[1]}"
        )
    return layers


def unverified_base_warning(folder: Path) -> str:
    """A warning if the adapter only names its base, so that the match is unverified; "" if it is verified.

    It is verified where the adapter was checked against the base's own numbers.
    """
    if (folder / BASE_FILE).is_file():
        return ""
    name = json.loads((folder / CONFIG_FILE).read_text()).get("base_model_name_or_path")
    said = f"is for {name}, it says" if name else "does not say which base it is for"
    return f"the adapter in {folder} {said}: only shapes are compared with model.path, another base gives wrong answers"


def _untie(lm: Any, layers: Iterable[str]) -> None:
    """Gives the head a weight of its own where it is the embedding's, and an adapter changes one of the two.

    Otherwise a merge would change both.

    Args:
        layers: names, or their last parts, of what is adapted.
    """
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in lm.named_modules() if module in (embedding, head)}
    if head.weight is embedding.weight and names & {layer.rpartition(".")[2] for layer in layers}:
        head.weight = nn.Parameter(head.weight.detach().clone())
        lm.config.tie_word_embeddings = False


def save_lora(
    lora: Any, folder: Path, base_dir: Path, trained_on: TrainingData | None, state: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter in PEFT's format.

    Args:
        state: the model's weights, where it holds but a shard of each.
    """
    whole = {f"{PREFIX}{name}": weight for name, weight in state.items()} if state else None
    options: dict[str, Any] = {"state_dict": whole} if whole else {}
    lora.save_pretrained(str(folder), save_embedding_layers=False, **options)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    write_origin(folder, origin_of(base_dir), trained_on)


def origin_of(base_dir: Path) -> dict[str, str]:
    """What tells the base of adapters from others: its path and fingerprint."""
    return {"path": str(base_dir.resolve()), "fingerprint": fingerprint(base_dir)}


def write_origin(folder: Path, origin: Mapping[str, str], trained_on: TrainingData | None) -> None:
    """Notes in an adapter's folder which base it is for (see `origin_of`), and what it was trained on, if known."""
    settings = json.loads((folder / CONFIG_FILE).read_text())
    settings["base_model_name_or_path"] = origin["path"]  # not the pretrained one, whose ids mean something else
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n")
    (folder / BASE_FILE).write_text(json.dumps(origin, indent=1) + "\n")
    if trained_on:
        (folder / DATA_FILE).write_text(json.dumps(trained_on.to_json()))


def merged_model(adapter_dir: Path, base_dir: Path) -> Model:
    """The checkpoint in `base_dir` with an adapter of any kind merged into its weights, in float32."""
    base = load_model(base_dir)
    lm = continue_lora(base, adapter_dir, base_dir).merge_and_unload()
    return Model(lm, base.format, combined_training_data(base.trained_on, adapter_dir))


def merge_saved_adapter(model: Model, adapter: str, base_dir: Path) -> Model:
    """Merges the LoRA adapter saved in a folder into the model's weights; with "" the model stays as it is.

    Raises:
        UserError: there is none, it is for another base, or no plain LoRA.
    """
    if not adapter:
        return model
    folder = Path(adapter)
    _untie(model.lm, check_base(folder, base_dir))
    loaded = load_adapter(folder)
    try:
        merge(model, loaded)
    except UserError as error:
        raise UserError(f"the adapter in {folder} cannot be merged into the model in {base_dir}: {error}") from error
    return Model(model.lm, model.format, combined_training_data(model.trained_on, folder))


def load_start_adapter(model: Model, folder: Path, base_dir: Path) -> tuple[Model, Adapter]:
    """Loads the adapter that every task's adapter starts from; also the model, its training record extended.

    Raises:
        UserError: there is none, it is for another base, or no plain LoRA.
    """
    check_base(folder, base_dir)
    adapter = load_adapter(folder)
    heads = {name for name, module in model.lm.named_modules() if module is model.lm.get_output_embeddings()}
    if changed := sorted(heads & adapter.weights.keys()):
        raise UserError(
            f"the adapter in {folder} changes the head, {changed[0]}, which is not adapted to tasks;"
            ' adapt.start="fresh" merges it into the model'
        )
    try:
        with attach_adapters(model, [adapter]):
            pass
    except UserError as error:
        raise UserError(f"the adapter in {folder} does not go on the model in {base_dir}: {error}") from error
    return Model(model.lm, model.format, combined_training_data(model.trained_on, folder)), adapter


def combined_training_data(base: TrainingData | None, folder: Path) -> TrainingData | None:
    """What a base and its adapter were trained on, for the leak audit; None if either is unknown.

    Raises:
        UserError: what the adapter says cannot be read.
    """
    own = read_training_data(folder) if base else None
    return base | own if base and own else None
