import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, SMALL, add_settings, folder_with, make_checkpoint

import arc_solver.models.attention
import arc_solver.models.pretrained
from arc_solver.config import FormatConfig
from arc_solver.errors import UserError
from arc_solver.models.attention import Packing
from arc_solver.models.model import Model, load_model, save_model
from arc_solver.models.pretrained import check_attention, cut_vocabulary, fetch_checkpoint, load_any, vocabulary_map
from arc_solver.puzzles.encode import END, INPUT, NEWLINE, NUMBER, OUTPUT, PAD, TOKENS, VOCABULARY

TOKEN = FormatConfig(positions="token")
EXACT = [*range(10), NEWLINE, END, PAD]  # ids of ours that are each one id of the original
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=["single", "triples"])
def digits(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def plain(folder: Path) -> Any:
    """What anybody else would load."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@torch.no_grad()
def logits_of(lm: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return lm(input_ids=ids_BT).logits


def ask(model: Model, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(ids_BT, torch.arange(ids_BT.shape[1]).expand_as(ids_BT))


def random_text(rng, rows: int = 3, length: int = 40) -> torch.Tensor:
    """Our ids of digits and newlines. [B, T]"""
    return torch.from_numpy(rng.integers(0, NEWLINE + 1, size=(rows, length)))


def test_the_cut_keeps_the_logits(kind, digits, tied, tmp_path, rng):
    """On digits and newlines; and since the head is linear, the logit of a mean of rows is the mean of the logits."""
    from transformers import AutoTokenizer

    folder = make_checkpoint(tmp_path, kind, digits, tied)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kept = vocabulary_map(tokenizer, rows=500)
    assert all(len(kept[i]) == 1 for i in EXACT)
    assert [tokenizer.decode(kept[i]) for i in (7, NEWLINE, INPUT, OUTPUT)] == ["7", "\n", "input", "output"]
    original = plain(folder)
    model, _ = load_any(folder, "org/name", TOKEN)
    ids_BT = random_text(rng)
    theirs_BTV = logits_of(original, torch.tensor([[kept[i][0] for i in row] for row in ids_BT.tolist()]))
    ours_BTV = ask(model, ids_BT)
    assert ours_BTV.shape == (3, 40, VOCABULARY)
    expected_BTV = torch.stack([theirs_BTV[..., list(ids)].mean(-1) for ids in kept], -1)
    assert expected_BTV.std() > 0.5  # so that the tolerance means something
    torch.testing.assert_close(ours_BTV[..., EXACT], expected_BTV[..., EXACT], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_BTV, expected_BTV, atol=1e-5, rtol=1e-5)


def test_the_rows_of_the_cut(kind, digits, tied, tmp_path):
    folder = make_checkpoint(tmp_path, kind, digits, tied)
    original = plain(folder)
    model, cut = load_any(folder, "org/name", TOKEN)
    assert cut
    embedding, head = model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight
    assert (head is embedding) == tied == model.lm.config.tie_word_embeddings
    assert embedding.shape == head.shape == (VOCABULARY, 64)
    assert model.lm.get_input_embeddings().num_embeddings == VOCABULARY == model.lm.get_output_embeddings().out_features
    for rows, before in ((embedding, original.get_input_embeddings()), (head, original.get_output_embeddings())):
        for row in range(10):
            assert (before.weight == rows[row]).all(1).any()  # a digit's row is one of the original
        for n in range(1, 31):
            mean = torch.stack([rows[int(digit)] for digit in str(n)]).mean(0)
            torch.testing.assert_close(rows[NUMBER + n], mean, atol=1e-6, rtol=0)
        assert torch.equal(rows[NUMBER + 31 :], rows[PAD].expand(19, -1))
        assert not torch.equal(rows[INPUT], rows[OUTPUT])
    vocabulary = len(original.get_input_embeddings().weight)
    assert cut.vocabulary == vocabulary
    assert cut.parameters_before == sum(p.numel() for p in original.parameters())
    assert cut.parameters_after == model.parameters_count
    assert cut.parameters_before - cut.parameters_after == (vocabulary - VOCABULARY) * 64 * (1 if tied else 2)
    assert str(cut).startswith(f"vocabulary cut from {vocabulary} to 64 ids")
    assert model.trained_on is not None
    assert model.trained_on.pretrained == {"org/name"}
    assert not model.trained_on.ids


def test_our_ids_in_a_known_tokenizer():
    """WordLevel, ids in the order given: every kept id can be written down."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*"9876543210", "x", "\n", "input", "output", "<stop>", "<fill>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\n"), "isolated")
    tokenizer.add_special_tokens(["<stop>", "<fill>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<fill>")
    kept = vocabulary_map(fast, rows=16)
    assert kept[:10] == [(9 - digit,) for digit in range(10)]
    assert kept[10:15] == [(11,), (12,), (13,), (14,), (15,)]
    assert kept[NUMBER + 7] == (2,)
    assert kept[NUMBER + 30] == (6, 9)
    assert kept[45:] == [(15,)] * 19
    fast.pad_token = None
    assert vocabulary_map(fast, rows=15)[PAD] == (14,)  # the end's, where there is none to pad with
    fast.pad_token = "<fill>"
    assert vocabulary_map(fast, rows=15)[45:] == [(14,)] * 19  # or one without a row
    with pytest.raises(UserError, match=r"has 14 rows and none for its tokenizer's '<stop>' \(id 14\): resize"):
        vocabulary_map(fast, rows=14)
    with pytest.raises(UserError, match=r"none for its tokenizer's 'input' \(id 12\), 'output' .id 13., '<stop>'"):
        vocabulary_map(fast, rows=12)
    fast.eos_token = None
    with pytest.raises(UserError, match="names no end token"):
        vocabulary_map(fast, rows=16)


def test_the_ids_in_the_configs_are_ours(kind, tmp_path):
    original = plain(make_checkpoint(tmp_path / "original", kind))
    assert original.generation_config.temperature == 0.7
    model, _ = load_any(tmp_path / "original", "org/name", TOKEN)
    save_model(model, tmp_path / "cut")
    for lm in (model.lm, plain(tmp_path / "cut")):
        assert lm.config.vocab_size == VOCABULARY
        for config in (lm.config, lm.generation_config):
            named = {name: i for name, i in config.to_dict().items() if name.endswith("_token_id")}
            assert {name: i for name, i in named.items() if i is not None} == {"eos_token_id": END, "pad_token_id": PAD}
        assert lm.generation_config.temperature != 0.7


def test_a_saved_cut_loads_anywhere(kind, tied, tmp_path, rng):
    """Plain transformers gives the logits of the model that was saved, and so do packed sequences."""
    model, _ = load_any(make_checkpoint(tmp_path / "original", kind, tied=tied), "org/name", TOKEN)
    save_model(model, tmp_path / "cut")
    stock, again = plain(tmp_path / "cut"), load_model(tmp_path / "cut")
    stock_head, stock_embedding = stock.get_output_embeddings().weight, stock.get_input_embeddings().weight
    assert (stock_head is stock_embedding) == tied
    assert again.format == TOKEN
    assert again.trained_on == model.trained_on
    ids_BT = random_text(rng)
    expected = ask(model, ids_BT)
    torch.testing.assert_close(logits_of(stock, ids_BT), expected, atol=1e-5, rtol=1e-5)
    lengths = (7, 30, 1, 22)
    alone = [random_text(rng, 1, length) for length in lengths]
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = again.logits(
            torch.cat(alone, 1), positions_BT, packing=Packing.of(torch.tensor(lengths).cumsum(0), again.device)
        )[0]
    for piece, ids in zip(packed.split(lengths), alone, strict=True):
        torch.testing.assert_close(piece, logits_of(stock, ids)[0], atol=1e-5, rtol=1e-5)


def test_the_saved_tokenizer_reads_and_writes_our_ids(kind, tmp_path):
    from transformers import AutoTokenizer

    model, _ = load_any(make_checkpoint(tmp_path / "original", kind), "org/name", TOKEN)
    save_model(model, tmp_path / "cut")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    known = {
        "012\n345\n": [0, 1, 2, NEWLINE, 3, 4, 5, NEWLINE],
        "<input>7\n\n<output><1><30>": [INPUT, 7, NEWLINE, NEWLINE, OUTPUT, NUMBER + 1, NUMBER + 30],
        "00<end><pad>": [0, 0, END, PAD],
        "".join(TOKENS): list(range(VOCABULARY)),
    }
    for text, ids in known.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCABULARY
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END, PAD)


def test_a_cut_model_is_not_cut_again(tmp_path, rng):
    model, _ = load_any(make_checkpoint(tmp_path / "original", "llama"), "org/name", TOKEN)
    save_model(model, tmp_path / "cut")
    again, cut = load_any(tmp_path / "cut", "runs/mine", TOKEN)
    assert cut is None
    assert again.trained_on == model.trained_on
    ids_BT = random_text(rng)
    assert torch.equal(ask(again, ids_BT), ask(model, ids_BT))
    with pytest.raises(UserError, match=r"runs/mine was trained with another \[format\]"):
        load_any(tmp_path / "cut", "runs/mine", FormatConfig(positions="token", row_numbers=True))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}, ""),  # as transformers 5 writes it
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, ""),
        ({"pad_token": "<|added|>"}, ""),  # and the embedding was not resized
        ({"eos_token": "<|added|>"}, r"embedding has \d+ rows and none for its tokenizer's '<\|added\|>' \(id \d+\)"),
    ],
    ids=str,
)
def test_tokenizers_as_they_come(names, said, tmp_path):
    """Of a class that transformers 4 or 5 writes, or with tokens that the embedding has no rows for."""
    folder = make_checkpoint(tmp_path, "llama")
    add_settings(folder / "tokenizer_config.json", **names)
    if said:
        with pytest.raises(UserError, match=said):
            load_any(folder, "org/name", TOKEN)
        return
    rows = load_any(folder, "org/name", TOKEN)[0].lm.get_input_embeddings().weight
    assert torch.equal(rows[PAD], rows[END])


def test_sharded_checkpoints_load(tmp_path, rng):
    whole = make_checkpoint(tmp_path / "whole", "qwen2")
    sharded = make_checkpoint(tmp_path / "sharded", "qwen2", shard_size="100KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert fetch_checkpoint(str(sharded)) == sharded
    ids_BT = random_text(rng)
    models = [load_any(folder, "org/name", TOKEN)[0] for folder in (whole, sharded)]
    assert torch.equal(ask(models[0], ids_BT), ask(models[1], ids_BT))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"cannot be loaded \(No such file.*{shards[1].name}\): copy or make it again"):
        load_any(sharded, "org/name", TOKEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_type_asked_for(dtype, tmp_path):
    """In 16 bit too, rows are means of rows, rounded once."""
    folder = make_checkpoint(tmp_path, "llama")
    exact, _ = load_any(folder, "org/name", TOKEN)
    model, _ = load_any(folder, "org/name", TOKEN, dtype)
    assert {p.dtype for p in model.lm.parameters()} == {dtype}
    rows, expected = model.lm.get_input_embeddings().weight, exact.lm.get_input_embeddings().weight
    assert torch.equal(rows[EXACT], expected[EXACT].to(dtype))
    for n in (7, 11, 28):
        assert torch.equal(rows[NUMBER + n], expected[[int(digit) for digit in str(n)]].mean(0).to(dtype))


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "whole", "smollm")
    assert fetch_checkpoint(str(folder)) == folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"whole holds no checkpoint: pytorch_model\.bin is a pickle, .* convert it"):
        fetch_checkpoint(str(folder))
    for name in ("whole-q4_k_m.gguf", "elsewhere"):
        (folder / "pytorch_model.bin").rename(folder / name)
        said = r"whole-q4_k_m\.gguf is in llama\.cpp's format" if name.endswith("gguf") else r"config\.json and model"
        with pytest.raises(UserError, match=f"whole holds no checkpoint: {said}"):
            fetch_checkpoint(str(folder))
        with pytest.raises(UserError, match="whole holds no checkpoint"):
            load_model(folder)
        (folder / name).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"x\.gguf holds no checkpoint: x\.gguf is in llama\.cpp's format"):
        fetch_checkpoint("models/x.gguf")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="whole holds no checkpoint"):
        fetch_checkpoint(str(folder))


@pytest.mark.parametrize("path", ["{}/none", "./none", "~/none", "none", "a/b/c", "{}/file", "org/file"])
def test_what_is_neither_folder_nor_hub_id_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "file", tmp_path / "org" / "file"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    with pytest.raises(UserError, match=r"is no folder; give a checkpoint's folder, or a hub id such as org/name"):
        fetch_checkpoint(path.format(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pointers_in_place_of_files_are_named(name, tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for use in (load_model, lambda folder: load_any(folder, "org/name", TOKEN)):
        with pytest.raises(UserError, match=f"{tmp_path}/{name} is a pointer of git-lfs, .*: run git lfs pull"):
            use(tmp_path)


QUANTISED: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ("config.json", {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "fp8"),
    ("config.json", {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ("config.json", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    ("quantize_config.json", {"bits": 4}, r"quantize_config\.json"),
]


@pytest.mark.parametrize(("name", "settings", "how"), QUANTISED, ids=str)
def test_a_quantised_checkpoint_is_refused(name, settings, how, tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    add_settings(tmp_path / name, **settings)
    with pytest.raises(UserError, match=rf"{tmp_path} is quantised \({how}\): .* give the one that it was made from"):
        load_any(tmp_path, "org/name", TOKEN)


@pytest.mark.parametrize(
    "name", ["Qwen3ForSequenceClassification", "BertForMaskedLM", "Gemma3ForConditionalGeneration", "T5EncoderModel"]
)
def test_what_is_no_causal_language_model_is_refused(name, tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    add_settings(tmp_path / "config.json", architectures=[name])
    with pytest.raises(UserError, match=f"{tmp_path} is no causal language model: a {name} .*give a ...ForCausalLM"):
        load_any(tmp_path, "org/name", TOKEN)


def test_an_unknown_scaling_of_positions_is_named(tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    add_settings(tmp_path / "config.json", rope_parameters={"rope_type": "fancy", "rope_theta": 1e4})
    with pytest.raises(UserError, match=r"does not know 'fancy', which config\.json in .* names: give another model"):
        load_any(tmp_path, "org/name", TOKEN)


@pytest.mark.parametrize("content", [b"", None])
def test_damaged_weights_are_refused(content, tmp_path):
    weights = make_checkpoint(tmp_path, "qwen3") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=f"the weights in {tmp_path} are damaged, copy or make them again"):
        load_any(tmp_path, "org/name", TOKEN)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged, copy or make it again"),
        ("", "is damaged, copy or make it again"),
        ("{}", "names no model_type: copy it again"),
        ('{"model_type": "unheard-of"}', r"transformers [\d.]+ does not know unheard-of, in .*: give another model"),
    ],
)
def test_a_damaged_config_is_refused(content, said, tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        load_any(tmp_path, "org/name", TOKEN)


def test_a_missing_tokenizer_is_refused(kind, tmp_path):
    folder = make_checkpoint(tmp_path, kind)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_any(folder, "org/name", TOKEN)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"the tokenizer in {folder} cannot be read"):
        load_any(folder, "org/name", TOKEN)


def test_a_tokenizer_without_digits_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = make_checkpoint(tmp_path, "llama")
    words = ["?", "input", "output", "\n", *(f"{n:02}" for n in range(100))]  # digits in pairs only
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?").save_pretrained(folder)
    with pytest.raises(UserError, match="no token for '0' alone"):
        load_any(folder, "org/name", TOKEN)


def test_grid_positions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'org/name .*format\.positions="token"'):
        load_any(make_checkpoint(tmp_path, "llama"), "org/name", FormatConfig())


def test_sliding_windows_are_refused(tmp_path):
    """However wide: a window of 2048 does not show in the short sequences that attention is checked on."""
    from transformers import Gemma2Config, Gemma3TextConfig, MistralConfig, Phi3Config, Qwen2Config

    kinds = ["sliding_attention", "full_attention"]
    configs = {
        "gemma3": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=512, layer_types=kinds),
        "phi3": Phi3Config(**SMALL, sliding_window=2047),
        "qwen2": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=2048, max_window_layers=1),
        "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=2048),
        "mistral": MistralConfig(**SMALL, sliding_window=2048),
    }
    for name, config in configs.items():
        with pytest.raises(UserError, match=f"the/{name} has layers of .*sliding_attention"):
            load_any(folder_with(tmp_path / name, config), f"the/{name}", TOKEN)
    for name, window in (("without", None), ("wider", 4096)):  # than any sequence
        folder = folder_with(tmp_path / name, MistralConfig(**SMALL, sliding_window=window))
        assert load_any(folder, "the/mistral", TOKEN)[1]


def test_attention_that_ours_does_not_reproduce_is_refused(tmp_path, monkeypatch):
    """Ours is made to sharpen the scores, then to ignore where sequences end, then to fail."""
    model, _ = load_any(make_checkpoint(tmp_path, "qwen3"), "org/name", TOKEN)
    check_attention(model.lm, "org/name")
    attend = arc_solver.models.attention.attend

    def sharper(module, q, k, v, mask, **rest):
        return attend(module, 2 * q, k, v, mask, **rest)

    def unpacked(module, q, k, v, mask, packing=None, **rest):
        return attend(module, q, k, v, mask, **rest)

    def failing(module, q, k, v, mask, **rest):
        raise RuntimeError("heads differ\nin size")

    for broken, said in ((sharper, "its own attention"), (unpacked, "its own attention"), (failing, r"heads differ\)")):
        with monkeypatch.context() as patch:
            patch.setitem(attention_functions(), arc_solver.models.model.ATTENTION, broken)
            with pytest.raises(
                UserError, match=rf"org/name: .*\(qwen3\) cannot be trained on packed sequences \({said}"
            ):
                check_attention(model.lm, "org/name")
        assert model.lm.config._attn_implementation == arc_solver.models.model.ATTENTION
    check_attention(model.lm, "org/name")


def attention_functions() -> Any:
    from transformers import AttentionInterface

    return AttentionInterface._global_mapping


def test_an_architecture_with_biases_in_its_attention_is_refused(tmp_path):
    """ALiBi adds distances to the scores, in code of Bloom's own."""
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2)
    with pytest.raises(UserError, match=r"\(bloom\) cannot be trained on packed sequences"):
        load_any(folder_with(tmp_path, config), "the/bloom", TOKEN)


def test_a_head_with_a_bias_is_cut_too(tmp_path, rng):
    from transformers import PhiConfig

    folder = folder_with(tmp_path, PhiConfig(**SMALL))
    original = plain(folder)
    with torch.no_grad():
        original.lm_head.bias.copy_(torch.arange(400.0))
    kept = [(i + 7,) for i in range(VOCABULARY)]
    ids_BT = random_text(rng)
    expected = logits_of(original, ids_BT + 7)
    cut_vocabulary(original, kept)
    torch.testing.assert_close(logits_of(original, ids_BT), expected[..., 7 : 7 + VOCABULARY], atol=1e-4, rtol=1e-5)


# ---- the hub -------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder as the repository org/tiny, the way the Hugging Face hub does: its address, what was asked for.

    Another one, org/cut-off, answers with a closed connection; the rest is not there.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if "/org/cut-off" in self.path:
                self.close_connection = True
                return
            files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
            listing = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in sorted(files.items())
            ]
            siblings = [{"rfilename": entry["path"]} for entry in listing]
            about = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "private": False, "siblings": siblings}
            answers = {
                "/api/models/org/tiny/revision/main": about,
                f"/api/models/org/tiny/tree/{COMMIT}": listing,
            }
            resolved = files.get(path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"))
            if path in answers:
                self.answer(200, json.dumps(answers[path]).encode(), {"Content-Type": "application/json"})
            elif resolved:
                self.answer(200, resolved.read_bytes(), {"ETag": f'"{_etag(resolved)}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        do_HEAD = do_GET

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def fetch(endpoint: str, home: Path, *paths: str) -> list[dict[str, str]]:
    """What `fetch_checkpoint` says of each path, in a process of its own: the address of the hub is read at import."""
    code = (
        "import json, sys\n"
        "from arc_solver.errors import UserError\n"
        "from arc_solver.models.pretrained import fetch_checkpoint\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        print(json.dumps({'folder': str(fetch_checkpoint(path))}))\n"
        "    except UserError as error:\n"
        "        print(json.dumps({'error': str(error)}))\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_checkpoint_is_fetched_from_the_hub(tmp_path, rng):
    folder = make_checkpoint(tmp_path / "original", "smollm", shard_size="100KB")
    unwanted = ("pytorch_model.bin", "README.md", "consolidated.safetensors", "onnx/model.safetensors")
    for name in unwanted:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not to be fetched")
    with hub(folder) as (endpoint, asked):
        found, none, cut_off = fetch(endpoint, tmp_path / "home", "org/tiny", "org/none", "org/cut-off")
    fetched = Path(found["folder"])
    assert fetched.is_relative_to(tmp_path / "home")
    assert {file.name for file in fetched.iterdir()} == {f.name for f in folder.iterdir()} - {*unwanted, "onnx"}
    assert not [path for path in asked if path.endswith(unwanted)]
    ids_BT = random_text(rng)
    there, here = (load_any(place, "org/tiny", TOKEN)[0] for place in (fetched, folder))
    assert torch.equal(ask(there, ids_BT), ask(here, ids_BT))
    assert "model.path=org/none is no folder and cannot be fetched" in none["error"]
    assert "Repository Not Found" in none["error"]
    assert "model.path=org/cut-off is no folder and cannot be fetched" in cut_off["error"]
    assert "\n" not in none["error"] + cut_off["error"]
    # Nobody is there any more: what was fetched is used again, what was not ends in one sentence.
    again, never = fetch(endpoint, tmp_path / "home", "org/tiny", "org/other")
    assert again == found
    assert "model.path=org/other is no folder and cannot be fetched" in never["error"]
    assert never["error"].endswith("give the folder of a downloaded checkpoint")
