import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load, save_file
from torch import nn
from toys import TOY

from arc_solver.config import LINEAR_LAYERS, FormatConfig, LoraConfig, load_config
from arc_solver.data.leaks import TrainingData
from arc_solver.errors import UserError
from arc_solver.models import fast_decoder
from arc_solver.models.adapters import attach_adapters, load_adapter, merge
from arc_solver.models.lora import (
    BASE_FILE,
    attach_lora,
    combined_training_data,
    continue_lora,
    merge_saved_adapter,
    merged_model,
    save_lora,
    unverified_base_warning,
)
from arc_solver.models.model import DATA_FILE, Model, load_model, new_model, save_model
from arc_solver.models.pretrained import load_any

pytestmark = [
    # PEFT 0.21 asks for it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
BASE_DATA = TrainingData(frozenset({"aa"}), frozenset({"k"}))
ADAPTER_DATA = TrainingData(frozenset({"bb"}), frozenset({"l"}), frozenset({"cc"}))
IDS_BT = torch.randint(14, (2, 24), generator=torch.Generator().manual_seed(0))


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"enabled": True, "rank": 4, "alpha": 6.0, "save": "merged", **settings})


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def make_base(folder: Path, seed: int = 1, **shape: Any) -> Path:
    model = new_model(TOY.model_copy(update=shape), FormatConfig(), seed, BASE_DATA)
    save_model(model, folder)
    return folder


@torch.no_grad()
def ask(model: Model) -> torch.Tensor:
    return model.logits(IDS_BT, torch.arange(24).expand(2, 24))


def trained(lora: Any, seed: int = 0) -> Any:
    """As if it had been trained: every weight of the adapter is another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return lora


def make_adapter(folder: Path, base_dir: Path, settings: LoraConfig, data: TrainingData | None = None) -> torch.Tensor:
    """Saves an adapter for a base, and answers the logits that it gives on it."""
    model = load_model(base_dir)
    lora = trained(attach_lora(model, settings, seed=5))
    save_lora(lora, folder, base_dir, data)
    expected = ask(model)
    assert (expected - ask(load_model(base_dir))).abs().max() > 0.01
    return expected


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- attach --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(init, dora, base_dir, monkeypatch):
    """And of the base nothing is trained."""
    # PEFT's layers go through transformers; both are to
    monkeypatch.setattr(fast_decoder, "supports", lambda lm: False)
    model = load_model(base_dir)
    before, weights = ask(model), {name: p.clone() for name, p in model.lm.state_dict().items()}
    lora = attach_lora(model, config(init=init, dora=dora), seed=0)
    if init == "orthogonal" or dora:  # B is not zero, or the norms are taken and given back
        close(ask(model), before)
    else:
        assert torch.equal(ask(model), before)
    trainable = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in trainable}
    assert layers == set(LINEAR_LAYERS)
    assert len(trainable) == 2 * len(LINEAR_LAYERS) * (3 if dora else 2)  # of two layers
    after = {name.replace(".base_layer", ""): p for name, p in model.lm.state_dict().items() if "lora_" not in name}
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], p) for name, p in weights.items())
    b_is_zero = {not p.any() for name, p in lora.named_parameters() if "lora_B" in name}
    assert b_is_zero == {init != "orthogonal"}


def test_adapters_come_from_the_seed_and_the_init(base_dir):
    def drawn(seed: int, init: str = "default") -> dict[str, torch.Tensor]:
        lora = attach_lora(load_model(base_dir), config(init=init), seed)
        return {name: p for name, p in lora.named_parameters() if "lora_A" in name}

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same = drawn(1), drawn(1)
    assert first
    assert all(torch.equal(p, same[name]) for name, p in first.items())
    for other in (drawn(2), drawn(1, "gaussian"), drawn(1, "orthogonal")):
        assert not any(torch.equal(p, other[name]) for name, p in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_are_float32_over_a_base_of_any_type(base_dir):
    model = load_model(base_dir, dtype=torch.bfloat16)
    lora = attach_lora(model, config(), seed=0)
    assert {(p.requires_grad, p.dtype) for p in lora.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


def test_what_cannot_be_attached_is_refused(base_dir):
    with pytest.raises(UserError, match=r"lora\.targets: the model has no layer named q, v; it has .*q_proj"):
        attach_lora(load_model(base_dir), config(targets=("q", "v", "q_proj")), seed=0)
    with pytest.raises(UserError, match=r"lora\.init='orthogonal' needs an even lora\.rank, got 3"):
        attach_lora(load_model(base_dir), config(init="orthogonal", rank=3), seed=0)


# ---- save, and read by others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"rslora": True}, {"rslora": False}, {"dora": True}], ids=str)
def test_peft_reads_what_is_saved(settings, base_dir, tmp_path):
    """Plain PEFT on the plain base, with transformers' own attention."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = make_adapter(tmp_path / "adapter", base_dir, config(**settings), ADAPTER_DATA)
    files = {"adapter_config.json", "adapter_model.safetensors", BASE_FILE, DATA_FILE}
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == files
    stock = AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation="eager")
    peft = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    with torch.no_grad():
        close(peft(input_ids=IDS_BT).logits, expected)


@pytest.mark.parametrize(("rslora", "scale"), [(True, 6 / 2), (False, 6 / 4)])
def test_our_layers_give_pefts_logits(rslora, scale, base_dir, tmp_path):
    """rsLoRA scales by alpha / sqrt(rank), plain LoRA by alpha / rank."""
    expected = make_adapter(tmp_path / "adapter", base_dir, config(rslora=rslora))
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.alpha / adapter.rank == pytest.approx(scale)
    model = load_model(base_dir)
    with attach_adapters(model, [adapter]):
        close(ask(model), expected)
    merge(model, adapter)
    close(ask(model), expected)


# ---- continue ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_trained_on_from_where_it_was(dora, base_dir, tmp_path):
    expected = make_adapter(tmp_path / "adapter", base_dir, config(dora=dora))
    model = load_model(base_dir)
    lora = continue_lora(model, tmp_path / "adapter", base_dir)
    close(ask(model), expected)
    before = {name: p.clone() for name, p in lora.named_parameters()}
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    model.logits(IDS_BT, torch.arange(24).expand(2, 24)).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    save_lora(lora, tmp_path / "again", base_dir, None)
    after, other = ask(model), load_model(base_dir)
    continue_lora(other, tmp_path / "again", base_dir)
    close(ask(other), after)


# ---- merge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"rslora": True},
        {"rslora": False},
        {"dora": True},
        {"init": "orthogonal"},
        {"targets": (*LINEAR_LAYERS, "embed_tokens", "lm_head")},
        {"targets": (*LINEAR_LAYERS, "embed_tokens", "lm_head"), "dora": True},
    ],
    ids=str,
)
def test_a_merged_model_gives_the_adapters_logits(settings, base_dir, tmp_path):
    expected = make_adapter(tmp_path / "adapter", base_dir, config(**settings), ADAPTER_DATA)
    model = merged_model(tmp_path / "adapter", base_dir)
    close(ask(model), expected)
    assert model.trained_on == BASE_DATA | ADAPTER_DATA
    assert model.format == FormatConfig()
    assert model.lm.state_dict().keys() == load_model(base_dir).lm.state_dict().keys()
    save_model(model, tmp_path / "merged")
    close(ask(load_model(tmp_path / "merged")), expected)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "embed_tokens"), ("q_proj", "lm_head")], ids=str)
def test_an_adapter_on_one_of_two_tied_matrices_leaves_the_other(targets, tmp_path):
    """An embedding that is the head too: only where one of the two is adapted do they part."""
    model, _ = load_any(make_checkpoint(tmp_path / "original", "smollm"), "org/name", FormatConfig(positions="token"))
    save_model(model, tmp_path / "base")
    expected = make_adapter(tmp_path / "adapter", tmp_path / "base", config(targets=targets))
    merged = merged_model(tmp_path / "adapter", tmp_path / "base")
    close(ask(merged), expected)
    save_model(merged, tmp_path / "merged")
    saved = load_model(tmp_path / "merged")
    close(ask(saved), expected)
    one = saved.lm.get_input_embeddings().weight is saved.lm.get_output_embeddings().weight
    assert one == (targets == ("q_proj",)) == saved.lm.config.tie_word_embeddings
    continued = load_model(tmp_path / "base")
    continue_lora(continued, tmp_path / "adapter", tmp_path / "base")
    close(ask(continued), expected)
    if "embed_tokens" not in targets:
        close(
            ask(merge_saved_adapter(load_model(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "base")),
            expected,
        )


def test_with_adapter_merges_and_unites_the_training_data(base_dir, tmp_path):
    expected = make_adapter(tmp_path / "adapter", base_dir, config(), ADAPTER_DATA)
    model = merge_saved_adapter(load_model(base_dir), str(tmp_path / "adapter"), base_dir)
    close(ask(model), expected)
    assert type(model.lm.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.trained_on == TrainingData(frozenset({"aa", "bb"}), frozenset({"k", "l"}), frozenset({"cc"}))
    bare = load_model(base_dir)
    assert merge_saved_adapter(bare, "", base_dir) is bare
    (tmp_path / "adapter" / DATA_FILE).unlink()  # an adapter of somebody else's
    assert merge_saved_adapter(load_model(base_dir), str(tmp_path / "adapter"), base_dir).trained_on is None
    assert combined_training_data(None, tmp_path / "adapter") is None


def test_an_adapter_without_our_note_of_its_base_is_remarked_upon(base_dir, tmp_path):
    folder = tmp_path / "adapter"
    make_adapter(folder, base_dir, config(), ADAPTER_DATA)
    assert unverified_base_warning(folder) == ""
    (folder / "base.json").unlink()
    assert f"is for {base_dir}, it says: only shapes are compared" in unverified_base_warning(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "does not say which base it is for" in unverified_base_warning(folder)


def test_what_plain_lora_cannot_say_is_not_merged_in_part(base_dir, tmp_path):
    for name, settings in {"dora": {"dora": True}, "embedding": {"targets": ("q_proj", "embed_tokens")}}.items():
        make_adapter(tmp_path / name, base_dir, config(**settings))
        with pytest.raises(UserError, match=f"{tmp_path / name} is not plain LoRA"):
            merge_saved_adapter(load_model(base_dir), str(tmp_path / name), base_dir)


# ---- what is refused -----------------------------------------------------------------------------------------------


def continued(folder: Path, base_dir: Path) -> Any:
    return continue_lora(load_model(base_dir), folder, base_dir)


def merged(folder: Path, base_dir: Path) -> Any:
    return merge_saved_adapter(load_model(base_dir), str(folder), base_dir)


either = pytest.mark.parametrize("use", [continued, merged])


@either
def test_an_adapter_for_another_base_is_refused(use, base_dir, tmp_path):
    make_adapter(tmp_path / "adapter", base_dir, config())
    others = {"weights": {"seed": 2}, "width": {"width": 48}, "layers": {"layers": 1}}
    for name, settings in others.items():
        other = make_base(tmp_path / name, **settings)
        with pytest.raises(UserError, match=rf"is for another base than {other}: .*model\.path={base_dir}$"):
            use(tmp_path / "adapter", other)
    (tmp_path / "adapter" / BASE_FILE).unlink()  # it does not say for which: then it must fit, layer by layer
    use(tmp_path / "adapter", base_dir)
    use(tmp_path / "adapter", tmp_path / "weights")
    for name in ("width", "layers"):
        with pytest.raises(
            UserError, match=rf"in {tmp_path / 'adapter'} .* the model in {tmp_path / name}(: | \(.*\): give the)"
        ):
            use(tmp_path / "adapter", tmp_path / name)


def test_an_adapter_for_fewer_layers_is_not_continued(base_dir, tmp_path):
    """It would be trained on with new ones in the layers that it lacks."""
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "shallow", layers=1), config())
    (tmp_path / "adapter" / BASE_FILE).unlink()
    with pytest.raises(UserError, match="does not fit"):
        continued(tmp_path / "adapter", base_dir)


@either
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_not_whole_is_refused(use, name, base_dir, tmp_path):
    make_adapter(tmp_path / "adapter", base_dir, config(), ADAPTER_DATA)
    file = tmp_path / "adapter" / name
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"version https://git-lfs.github.com/spec/v1"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{tmp_path}/adapter(/{name} is a pointer of git-lfs| is damaged)"):
            use(tmp_path / "adapter", base_dir)
    file.unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'adapter'} holds no adapter: {name} is missing"):
        use(tmp_path / "adapter", base_dir)
    with pytest.raises(UserError, match=r"there is no adapter .*none: give the folder of one"):
        use(tmp_path / "none", base_dir)


@either
def test_an_adapter_that_lacks_a_tensor_is_refused(use, base_dir, tmp_path):
    make_adapter(tmp_path / "adapter", base_dir, config())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load(file.read_bytes())  # not mapped: the file is written anew
    name = next(name for name in tensors if "layers.1.self_attn.v_proj.lora_B" in name)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    with pytest.raises(UserError, match="adapter"):
        use(tmp_path / "adapter", base_dir)


@either
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"path": "here"}'])
def test_a_damaged_note_of_the_base_is_refused(use, content, base_dir, tmp_path):
    make_adapter(tmp_path / "adapter", base_dir, config())
    (tmp_path / "adapter" / BASE_FILE).write_text(content)
    with pytest.raises(UserError, match=f"the adapter in {tmp_path / 'adapter'} is damaged"):
        use(tmp_path / "adapter", base_dir)


@pytest.mark.parametrize("content", ["{", "[]", '{"ids": []}', '{"unknown": []}'])
def test_damaged_training_data_is_refused(content, base_dir, tmp_path):
    make_adapter(tmp_path / "adapter", base_dir, config(), ADAPTER_DATA)
    (tmp_path / "adapter" / DATA_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{DATA_FILE} is damaged"):
        merged(tmp_path / "adapter", base_dir)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.dora=true"], r"vLLM serves no adapter with lora\.dora"),
        (["lora.dora=true", "lora.save=adapter"], r"vLLM serves no adapter with lora\.dora"),
        (
            ['lora.targets=["q_proj","embed_tokens"]', "lora.save=adapter"],
            r"no adapter with lora\.targets embed_tokens",
        ),
        (['lora.targets=["lm_head"]'], r"vLLM serves no adapter with lora\.targets lm_head"),
        (["train.optimizer=muon"], r'lora\.enabled needs train\.optimizer="adamw"'),
        (["lora.init=zeros"], r"lora\.init"),
        (["lora.targets=[]"], r"lora\.targets"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(words, said):
    enabled = ["lora.enabled=true", "train.optimizer=adamw"]
    with pytest.raises(UserError, match=said):
        load_config(None, [*enabled, *words])


def test_settings_that_do():
    enabled = ["lora.enabled=true", "train.optimizer=adamw"]
    assert load_config(None, enabled).lora.save == "both"
    for word in ("lora.dora=true", 'lora.targets=["q_proj","embed_tokens","lm_head"]'):
        assert load_config(None, [*enabled, word, "lora.save=merged"]).lora.enabled
    assert load_config(None, ["lora.dora=true"]).lora.dora  # which is no matter while it is not enabled
    assert json.loads(load_config(None, enabled).model_dump_json())["lora"]["enabled"]
