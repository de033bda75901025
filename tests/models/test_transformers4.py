"""What we save, read by transformers 4: the same logits, the same ids, nothing to say."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, add_settings, folder_with, make_checkpoint
from conftest import TRANSFORMERS_4
from safetensors.torch import load_file, save_file
from test_pretrained import TOKEN
from toys import TOY

from arc_solver.config import FormatConfig
from arc_solver.models.model import Model, load_model, new_model, save_model
from arc_solver.models.pretrained import load_any
from arc_solver.puzzles.encode import END, NEWLINE

IDS_BT = torch.randint(44, (2, 120), generator=torch.Generator().manual_seed(0))
READ = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4.57."), transformers.__version__
ids_BT = load_file(sys.argv[1])["ids"]
for folder in map(Path, sys.argv[3:]):
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="auto")
    out = Path(sys.argv[2], folder.name)
    with torch.no_grad():
        save_file({"logits": lm(input_ids=ids_BT).logits.contiguous()}, f"{out}.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = {"ids": tokenizer("012\\n<end>").input_ids, "end": tokenizer.eos_token, "pad": tokenizer.pad_token}
    said["generates_until"] = lm.generation_config.eos_token_id
    Path(f"{out}.json").write_text(json.dumps(said))
"""


def configs() -> dict[str, Any]:
    import transformers as t

    def rope(kind: str, **more: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e4, **more}}

    fewer = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    shorter = {**SMALL, "max_position_embeddings": 64}
    llama3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
    return {
        "qwen2-yarn": t.Qwen2Config(**SMALL, **rope("yarn", factor=64.0, original_max_position_embeddings=64)),
        "llama-llama3": t.LlamaConfig(**SMALL, **rope("llama3", **llama3)),
        "llama-linear": t.LlamaConfig(**SMALL, **rope("linear", factor=4.0)),
        "llama-dynamic": t.LlamaConfig(**shorter, **rope("dynamic", factor=4.0)),
        "phi3": t.Phi3Config(**SMALL, sliding_window=None, **rope("default")),
        "phi": t.PhiConfig(**SMALL, **rope("default", partial_rotary_factor=0.5)),
        "gpt-neox": t.GPTNeoXConfig(**fewer, **rope("default", partial_rotary_factor=0.5)),
        "granite": t.GraniteConfig(**SMALL, **rope("default")),
        "olmo2": t.Olmo2Config(**SMALL, **rope("default")),
        "smollm3": t.SmolLM3Config(**SMALL, no_rope_layers=[1, 0], **rope("default")),
        "mistral": t.MistralConfig(**SMALL, sliding_window=None, **rope("default")),
    }


@torch.no_grad()
def ask(model: Model) -> torch.Tensor:
    return model.logits(IDS_BT, torch.arange(IDS_BT.shape[1]).expand_as(IDS_BT))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Model]:
    """Models and where they were saved: one like the bundled one, and cut ones."""
    folder = tmp_path_factory.mktemp("models")
    models = {"bundled": new_model(TOY.model_copy(update={"rope_theta": 777.0}), FormatConfig(), seed=1)}
    original = make_checkpoint(folder / "originals" / "qwen2", "qwen2")
    add_settings(original / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    models["qwen2"], _ = load_any(original, "org/name", TOKEN)
    for name, config in configs().items():
        models[name], _ = load_any(folder_with(folder / "originals" / name, config), f"org/{name}", TOKEN)
    for name, model in models.items():
        save_model(model, folder / name)
    return {folder / name: model for name, model in models.items()}


@pytest.mark.transformers4
def test_transformers_4_reads_what_we_save(saved, tmp_path):
    save_file({"ids": IDS_BT}, tmp_path / "ids.safetensors")
    words = [TRANSFORMERS_4, "-c", READ, tmp_path / "ids.safetensors", tmp_path, *saved]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no word of settings that it does not know
    for folder, model in saved.items():
        theirs = load_file(tmp_path / f"{folder.name}.safetensors")["logits"]
        torch.testing.assert_close(theirs, ask(model), atol=1e-4, rtol=0)
        said = json.loads((tmp_path / f"{folder.name}.json").read_text())
        assert said == {"ids": [0, 1, 2, NEWLINE, END], "end": "<end>", "pad": "<pad>", "generates_until": END}, folder


def test_so_do_we(saved, tmp_path):
    """What is said once more says nothing else: what is loaded is saved the same."""
    for folder, model in saved.items():
        again = load_model(folder)
        torch.testing.assert_close(ask(again), ask(model), atol=1e-5, rtol=0)
        save_model(again, tmp_path)
        before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
        after["rope_parameters"].pop("type", "")  # Phi-3's old name of its own for rope_type
        assert after == before
        assert before["rope_parameters"]["rope_theta"] in (before.get("rope_theta"), before.get("rotary_emb_base"))
        assert ("rope_scaling" in before) == (before["rope_parameters"]["rope_type"] != "default")
