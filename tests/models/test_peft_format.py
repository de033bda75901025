"""Adapters that the installed PEFT makes and loads: ours give its numbers, or one sentence names what we leave out."""

import json
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TOY

from arc_solver.config import AdaptConfig, FormatConfig, load_config
from arc_solver.errors import UserError
from arc_solver.models.adapters import attach_adapters, fresh_adapter, load_adapter
from arc_solver.models.lora import continue_lora, load_start_adapter, merge_saved_adapter
from arc_solver.models.model import Model, load_model, new_model, save_model
from arc_solver.models.peft_format import HARMLESS, MEANINGS, check_adapter
from arc_solver.rng import named_rng
from arc_solver.training.run import start_model

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]
IDS_BT = torch.randint(14, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_model(new_model(TOY, FormatConfig(), seed=1), folder)
    return folder


def stock(base_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation="eager")


def make_adapter(folder: Path, base_dir: Path, config: Any, resized: int = 0) -> torch.Tensor:
    """An adapter as PEFT trains and saves it, every weight another one, and the logits that PEFT gives with it."""
    from peft import PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of settings that people use all the same
        lm = stock(base_dir)
        if resized:
            lm.resize_token_embeddings(resized)
        torch.manual_seed(0)
        peft = get_peft_model(lm, config)
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        peft.save_pretrained(str(folder), save_embedding_layers=bool(resized))
        if resized:
            return torch.empty(0)
        again = PeftModel.from_pretrained(stock(base_dir), str(folder)).eval()
        with torch.no_grad():
            return again(input_ids=IDS_BT, use_cache=False).logits


@torch.no_grad()
def ask(model: Model) -> torch.Tensor:
    return model.logits(IDS_BT, torch.arange(24).expand(2, 24))


def edit(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def lora_config(settings: dict[str, Any]) -> Any:
    import peft

    if unknown := settings.keys() - {field.name for field in fields(peft.LoraConfig)}:
        pytest.skip(f"PEFT {peft.__version__} has no {unknown}")
    if settings.get("init_lora_weights") == "mica" and not hasattr(peft.tuners.lora.LoraLayer, "mica_init"):
        pytest.skip(f"PEFT {peft.__version__} has no MiCA")
    settings = {name: value(peft) if callable(value) else value for name, value in settings.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.LoraConfig(
            **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
        )


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": False},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "mica"},
    {"lora_dropout": 0.5, "revision": "main"},
    {"fan_in_fan_out": True},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"exclude_modules": ["down_proj"]},
    {"target_modules": r".*\.layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"},
    {"target_modules": "all-linear"},
    {"alpha_pattern": {"q_proj": 2.0}},
    {"alpha_pattern": {"layers.1.self_attn.q_proj": 24, "q_proj": 2}, "use_rslora": True},
    {"rank_pattern": {"down_proj": 2}},
    {"rank_pattern": {r".*\.1\..*": 8}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_what_is_accepted_gives_pefts_logits(settings, base_dir, tmp_path):
    """Merged, attached, and continued by bin/train."""
    expected = make_adapter(tmp_path, base_dir, lora_config(settings))
    assert (expected - ask(load_model(base_dir))).abs().max() > 0.01
    close(ask(merge_saved_adapter(load_model(base_dir), str(tmp_path), base_dir)), expected)
    model = load_model(base_dir)
    with attach_adapters(model, [load_adapter(tmp_path)]):
        close(ask(model), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out|`eva_config`|.init_lora_weights. is 'eva'")
        continue_lora(model, tmp_path, base_dir).eval()
    close(ask(model), expected)


def test_an_adapter_on_the_head_is_merged_and_not_continued_by_tasks(base_dir, tmp_path):
    """Of a task's tokens the head sees some only, so it cannot tell whose they are."""
    expected = make_adapter(tmp_path, base_dir, lora_config({"target_modules": ["q_proj", "lm_head"]}))
    close(ask(merge_saved_adapter(load_model(base_dir), str(tmp_path), base_dir)), expected)
    with pytest.raises(UserError, match=r'changes the head, lm_head, .* adapt\.start="fresh" merges it'):
        load_start_adapter(load_model(base_dir), tmp_path, base_dir)
    with pytest.raises(UserError, match=r"adapt\.targets: lm_head is the head"):
        fresh_adapter(load_model(base_dir), AdaptConfig(targets=("q_proj", "lm_head")), named_rng(0))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa".*path_initial_model_for_weight_conversion'),
    ({"init_lora_weights": "pissa_niter_2"}, 'init_lora_weights="pissa_niter_2".*path_initial_model'),
    ({"init_lora_weights": "olora"}, 'init_lora_weights="olora".*path_initial_model'),
    ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\].*train a plain LoRA adapter"),
    ({"lora_bias": True}, "lora_bias=true .*merge_and_unload"),
    ({"bias": "all"}, 'bias="all"'),
    ({"bias": "lora_only"}, 'bias="lora_only"'),
    ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\] .*merge_and_unload'),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
    ({"target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters="),
    ({"use_bdlora": lambda peft: peft.tuners.lora.BdLoraConfig(["q_proj"], ["down_proj"], 2)}, "use_bdlora="),
    ({"kasa_config": lambda peft: peft.KasaConfig()}, "kasa_config="),
    ({"monteclora_config": lambda peft: peft.MontecloraConfig()}, "monteclora_config="),
    ({"velora_config": lambda peft: peft.VeloraConfig(num_groups=2)}, "velora_config="),
]


def refuses(said: str, folder: Path, base_dir: Path) -> None:
    """Both bin/solve and bin/train; the latter before it loads anything, and in one line."""
    for use in (
        lambda: merge_saved_adapter(load_model(base_dir), str(folder), base_dir),
        lambda: load_start_adapter(load_model(base_dir), folder, base_dir),
        lambda: continue_lora(load_model(base_dir), folder, base_dir),
    ):
        with pytest.raises(UserError, match=f"{folder}.*{said}") as caught:
            use()
        assert "\n" not in str(caught.value)
    for lora in ("true", "false"):
        words = [f"model.path={base_dir}", f"model.adapter={folder}", "train.optimizer=adamw", f"lora.enabled={lora}"]
        nothing: Any = None
        with pytest.raises(UserError, match=said):
            start_model(load_config(None, words), nothing, Path("none"), None, nothing, nothing, nothing)


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=[", ".join(settings) for settings, _ in REFUSED])
def test_what_would_give_other_numbers_is_refused_by_name(settings, said, base_dir, tmp_path):
    make_adapter(tmp_path, base_dir, lora_config(settings))
    refuses(said, tmp_path, base_dir)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora=true .*merge_and_unload"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A, LoRA on an embedding"),
    ],
    ids=str,
)
def test_what_peft_alone_knows_is_continued_and_not_merged(settings, said, base_dir, tmp_path):
    expected = make_adapter(tmp_path, base_dir, lora_config(settings))
    with pytest.raises(UserError, match=f"{tmp_path} is not plain LoRA: it has .*{said}"):
        merge_saved_adapter(load_model(base_dir), str(tmp_path), base_dir)
    model = load_model(base_dir)
    continue_lora(model, tmp_path, base_dir)
    close(ask(model), expected)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("AdaLora", {"target_modules": ["q_proj"], "total_step": 10}),
        ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("LoHa", {"target_modules": ["q_proj"]}),
        ("LoKr", {"target_modules": ["q_proj"]}),
        ("Vera", {"target_modules": ["q_proj"]}),
        ("PromptTuning", {"num_virtual_tokens": 4}),
    ],
)
def test_adapters_of_other_types_are_refused(kind, settings, base_dir, tmp_path):
    import peft

    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings)
    make_adapter(tmp_path, base_dir, config)
    todo = "train a plain LoRA adapter" if kind == "PromptTuning" else "merge_and_unload"
    refuses(f"of PEFT's type {re.sub('(?<=[a-z])T', '_T', kind).upper()}, not LORA; .*{todo}", tmp_path, base_dir)


def test_a_resized_vocabulary_is_refused(base_dir, tmp_path):
    make_adapter(tmp_path, base_dir, lora_config({}), resized=80)
    refuses("lm_head.weight, an embedding or head of its own", tmp_path, base_dir)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"init_lora_weights": "corda"}, 'init_lora_weights="corda".*path_initial_model'),
    ({"init_lora_weights": "lora_ga"}, 'init_lora_weights="lora_ga".*path_initial_model'),
    ({"init_lora_weights": "unheard-of"}, 'init_lora_weights="unheard-of" .which is not known'),
    (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        'init_lora_weights="loftq".*path_initial_model',
    ),
    ({"layer_replication": [[0, 2], [0, 1]]}, "layer_replication="),
    ({"use_qalora": True}, "use_qalora=true"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config=.*train a plain LoRA adapter"),
    ({"megatron_config": {"layers": 2}}, "megatron_config="),
    ({"use_something_new": [True]}, r"use_something_new=\[true\] .a setting that is not known"),
    ({"peft_type": None}, "names no peft_type"),
    ({"peft_type": "UNHEARD"}, "type UNHEARD, not LORA"),
    ({"r": 2}, "of rank 4, and adapter_config.json says rank 2"),
    ({"lora_alpha": "many"}, "has alpha many for"),
    ({"lora_alpha": 0}, "has alpha 0 for .* must be a number above 0"),
    (
        {"target_modules": ["q_proj"]},
        r"weights for model\.layers\.0\.mlp\.down_proj, which is not among its target",
    ),
    ({"target_modules": ".*q_proj"}, "down_proj, which is not among its target_modules"),
    ({"target_modules": "("}, r'target_modules="\(" in adapter_config.json, and must have a list of'),
    ({"target_modules": 7}, "target_modules=7 in adapter_config.json, and must have a list of"),
    ({"alpha_pattern": {"(": 2}}, r'alpha_pattern={"\(": 2} in .*, and must have regular expressions of'),
]


@pytest.mark.parametrize(("settings", "said"), SETTINGS, ids=str)
def test_what_a_config_says_is_not_passed_over(settings, said, base_dir, tmp_path):
    make_adapter(tmp_path, base_dir, lora_config({}))
    load_adapter(edit(tmp_path, use_something_new=[], another=None, a_third=False))
    with pytest.raises(UserError, match=f"the adapter in {tmp_path} .*{said}"):
        load_adapter(edit(tmp_path, **settings))


def test_every_setting_of_peft_was_considered():
    """Of a new version too: until it is, an adapter that uses a new setting is refused as unknown."""
    from peft import LoraConfig

    assert {field.name for field in fields(LoraConfig)} <= {*HARMLESS.split(), *MEANINGS}
    assert not set(HARMLESS.split()) & MEANINGS.keys()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_model.model.lm_head.weight", "an embedding or head of its own"),
        ("base_model.model.model.embed_tokens.weight", "an embedding or head of its own"),
        ("base_model.model.lm_head.base_layer.weight", "a weight of the base itself"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "a bias of the base"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", r"lora_bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "no part of plain LoRA"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "rows of the embedding"),
        ("base_model.model.model.norm.weight", "a whole layer"),
        ("base_model.model.score.modules_to_save.weight", "a whole layer"),
        ("model.layers.0.self_attn.v_proj.lora_A.weight", "not in PEFT's format"),
        ("module.base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight", "not in PEFT's format"),
    ],
)
def test_no_tensor_is_left_out(name, what, base_dir, tmp_path):
    make_adapter(tmp_path, base_dir, lora_config({}))
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.ones(4, 4)}, file)
    refuses(f"({name}.*{what}|{what}.*{name})", tmp_path, base_dir)


def test_what_is_no_adapter_is_said(base_dir, tmp_path):
    """The folder of something else, or in another format."""
    make_adapter(tmp_path / "run" / "adapter", base_dir, lora_config({}))
    adapter = tmp_path / "run" / "adapter"
    check_adapter(adapter)
    for path, said in (
        (base_dir, f"{base_dir} holds no adapter: it is a whole model; give it as model.path"),
        (tmp_path / "run", f"{tmp_path / 'run'} holds no adapter: {adapter} does; give that folder"),
        (adapter / "adapter_model.safetensors", "safetensors holds no adapter: it is a file; give the folder"),
        (tmp_path / "none", f"there is no adapter {tmp_path / 'none'}: give the folder of one"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check_adapter(path)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refuses("is a pointer of git-lfs, not the file itself: run git lfs pull", adapter, base_dir)
    weights.unlink()
    for name, said in (
        ("adapter_model.bin", "adapter_model.bin is a pickle, .*convert it to safetensors"),
        ("lora-q4.gguf", "lora-q4.gguf is in llama.cpp's format, GGUF"),
        ("adapters.safetensors", "adapters.safetensors is in MLX's format"),
    ):
        (adapter / name).write_bytes(whole)
        refuses(f"holds no adapter: {said}", adapter, base_dir)
        (adapter / name).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        check_adapter(adapter)
    with pytest.raises(UserError, match=r"it is an adapter; give it as model\.adapter"):
        load_model(adapter)
