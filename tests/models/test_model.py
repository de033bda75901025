import json

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load, save_file
from toys import TOY, random_grid

from arc_solver.config import FormatConfig, ModelConfig
from arc_solver.data.leaks import NOTHING, TrainingData
from arc_solver.data.stream import pack
from arc_solver.errors import UserError
from arc_solver.models.attention import Packing
from arc_solver.models.hardware import pick_device
from arc_solver.models.model import (
    ATTENTION,
    BUNDLED_DIR,
    Model,
    fingerprint,
    load_model,
    new_model,
    packed_loss,
    save_model,
)
from arc_solver.models.pretrained import load_any
from arc_solver.puzzles.encode import IGNORE, encode_sample
from arc_solver.puzzles.tasks import Pair


def samples(rng, format, count=4):
    return [
        encode_sample([Pair(random_grid(rng, 6), random_grid(rng, 6)) for _ in range(n + 1)], format)
        for n in range(count)
    ]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_packed_samples_do_not_see_each_other(kv_heads, rng):
    """Logits of a packed sample equal those of the sample alone, and gradients those of the samples one by one."""
    model = new_model(TOY.model_copy(update={"kv_heads": kv_heads}), FormatConfig(), seed=0)
    alone = samples(rng, model.format)
    batch = pack(alone, sum(map(len, alone)) + 7)
    together = model.logits(batch.ids_T[None], batch.positions_T[None], packing=Packing.of(batch.ends_S, model.device))[
        0
    ]
    together[:-7].square().sum().backward()
    packed_grads = [p.grad.clone() for p in model.lm.parameters()]
    model.lm.zero_grad()
    start = 0
    for sample in alone:
        ids, positions = (torch.from_numpy(x.astype("int64"))[None] for x in (sample.ids_T, sample.positions_T))
        logits = model.logits(ids, positions)[0]
        torch.testing.assert_close(together[start : start + len(sample)], logits, atol=1e-5, rtol=1e-4)
        logits.square().sum().backward()
        start += len(sample)
    for p, grad in zip(model.lm.parameters(), packed_grads, strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-3, rtol=1e-3)


def test_packed_attention_passes_pytorchs_operator_checks():
    q, k, v = (torch.randn(1, 2, 12, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(torch.ops.arc_solver.packed_attention, (q, k, v, torch.tensor([5, 12]), 0.25))


def test_a_saved_model_is_the_same_model(tmp_path, rng, any_format):
    data = TrainingData(frozenset({"aa"}), frozenset({"k"}))
    model = new_model(TOY, any_format, seed=3, trained_on=data)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.format == any_format
    assert again.trained_on == data
    for name, p in model.lm.state_dict().items():
        assert torch.equal(p, again.lm.state_dict()[name]), name
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_stock_transformers_reads_it(tmp_path, rng):
    """Plain from_pretrained with PyTorch's attention gives the same logits, told the positions and a mask."""
    from transformers import Qwen3ForCausalLM

    model = new_model(TOY, FormatConfig(), seed=3)
    save_model(model, tmp_path)
    (sample,) = samples(rng, model.format, 1)
    ids, positions = (torch.from_numpy(x.astype("int64"))[None] for x in (sample.ids_T, sample.positions_T))
    stock = Qwen3ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    causal = torch.ones(len(sample), len(sample), dtype=torch.bool).tril()[None, None]
    expected = stock(input_ids=ids, position_ids=positions, attention_mask=causal).logits
    torch.testing.assert_close(model.logits(ids, positions), expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_another_format_names_the_settings(tmp_path):
    save_model(new_model(TOY, FormatConfig(positions="token", row_numbers=True), seed=0), tmp_path)
    with pytest.raises(UserError, match=r'^mine .*: set format\.positions="token" format\.row_numbers=true$'):
        load_any(tmp_path, "mine", FormatConfig())


def test_tied_weights_are_saved_once(tmp_path):
    """In another precision too: two copies would be two matrices to some releases of transformers."""
    folder = make_checkpoint(tmp_path / "tied", "qwen2", tied=True)
    model, _ = load_any(folder, "org/name", FormatConfig(positions="token"))
    for dtype in (None, torch.bfloat16):
        save_model(model, tmp_path / str(dtype), dtype)
        assert "lm_head.weight" not in load((tmp_path / str(dtype) / "model.safetensors").read_bytes())
        lm = load_model(tmp_path / str(dtype)).lm
        assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_weights_come_from_the_seed():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, same, other = (new_model(TOY, FormatConfig(), seed=s).lm.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint \(config.json missing\).*bin/train"):
        load_model(tmp_path)
    save_model(new_model(TOY, FormatConfig(), seed=0), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no checkpoint \(weights in safetensors missing\)"):
        load_model(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["arc_format"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"is a pretrained checkpoint with a vocabulary of its own: train it first"):
        load_model(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    save_model(new_model(TOY, FormatConfig(), seed=0, trained_on=NOTHING), tmp_path)
    assert load_model(tmp_path).trained_on == NOTHING
    settings = json.loads((tmp_path / "config.json").read_text())
    unknown = json.dumps({**settings, "arc_format": {"positions": "none"}})
    data = r"training_data\.json is damaged: copy it again, or remove it"
    damages = {
        "config.json": {
            "{": "damaged, copy or make",
            unknown: '^[^\n]*arc_format.positions="none", which this version',
        },
        "training_data.json": {"{": data, '{"unknown": []}': data, "[]": data, '{"ids": 1, "pair_keys": []}': data},
        "model.safetensors": {
            "version https://git-lfs.github.com/spec/v1": r"model\.safetensors is a pointer of git",
            "": "damaged, copy or make",
        },
    }
    for name, contents in damages.items():
        whole = (tmp_path / name).read_bytes()
        for content, says in contents.items():
            (tmp_path / name).write_text(content)
            with pytest.raises(UserError, match=f"{says}.*$"):
                load_model(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert load_model(tmp_path).trained_on == NOTHING


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path):
    """Nothing is left as it was drawn at random: not a layer, not a tensor, not one of another shape."""
    save_model(new_model(TOY, FormatConfig(), seed=0), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changed in ({"num_hidden_layers": 3}, {"intermediate_size": 80}):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(
            UserError, match=r"is wrong: .*layer_types|does not fit the weights|the number of layer types"
        ):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    weights = load((tmp_path / "model.safetensors").read_bytes())  # not mapped: the file is written anew
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        kept = {other: tensor for other, tensor in weights.items() if other != name}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=rf"cannot be loaded \({name} is missing\): copy or make it again"):
            load_model(tmp_path)


def test_the_packed_loss_is_that_of_the_samples(rng):
    """The sum over all target ids, each predicted by what comes before it in its own sample; padding counts nothing."""
    model = new_model(TOY, FormatConfig(), seed=0)
    alone = samples(rng, model.format)
    batch = pack(alone, sum(map(len, alone)) + 9)
    total, learnt = 0.0, 0
    for sample in alone:
        ids, positions = (torch.from_numpy(x.astype("int64"))[None] for x in (sample.ids_T, sample.positions_T))
        chances = model.logits(ids, positions)[0].log_softmax(-1).detach()
        for t in range(1, len(sample)):
            if sample.labels_T[t] != IGNORE:
                total -= float(chances[t - 1, sample.ids_T[t]])
                learnt += 1
    assert learnt == batch.target_tokens
    assert packed_loss(model, batch, reduction="sum").item() == pytest.approx(total, rel=1e-5)
    assert packed_loss(model, batch).item() == pytest.approx(total / learnt, rel=1e-5)


def test_fingerprints_tell_checkpoints_apart(tmp_path):
    prints = {}
    for name, width, seed in (("one", 32, 1), ("same", 32, 1), ("other", 32, 2), ("wider", 48, 1)):
        model = new_model(TOY.model_copy(update={"width": width}), FormatConfig(), seed)
        save_model(model, tmp_path / name)
        prints[name] = fingerprint(tmp_path / name)
    assert prints["one"] == prints["same"]
    assert len(set(prints.values())) == 3
    save_model(load_model(tmp_path / "one"), tmp_path / "half", torch.bfloat16)
    assert fingerprint(tmp_path / "half") not in prints.values()


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="is no device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"run\.device=cpu"):
            pick_device("cuda")
    with pytest.raises(UserError, match=r"run\.device=cpu"):
        pick_device("cuda:99")


def test_the_bundled_model_fits_the_wheel():
    model = load_model("")
    assert isinstance(model, Model)
    assert model.lm.config._attn_implementation == ATTENTION
    assert model.trained_on is not None
    assert sum(file.stat().st_size for file in BUNDLED_DIR.iterdir()) <= 25e6
    assert ModelConfig().layers == model.lm.config.num_hidden_layers
