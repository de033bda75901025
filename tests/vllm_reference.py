"""What vLLM answers for checkpoints: run by `test_vllm.py`, with the Python of `.venv-vllm` and nothing of ours.

    .venv-vllm/bin/python vllm_reference.py MODEL_DIR REQUEST.json RESULT.json [MODEL_DIR REQUEST.json RESULT.json ...]

A request: {"prompts": lists of ids, "new_ids": how many to add greedily, "adapter_dir": a PEFT adapter or null}. The
result has a list "base" and, where there is an adapter, "adapter", with for each prompt of P ids the N new "ids", and
"logprobs": row t is what id t + 1 may be, from the second id of the prompt to the last new one, [P + N - 1, V].
Several checkpoints share a process, as it takes much longer to import vllm than to start an engine.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {  # read when vllm is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no workers to start, and none left behind
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # threads that wait for each other cost more than tiny models do
    "TORCH_COMPILE_DISABLE": "1",  # or a function of the sampler is compiled, even with enforce_eager
    "VLLM_CACHE_ROOT": f"{sys.prefix}/cache",  # what it finds out about an architecture, once
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for; adapters are padded to one


def main(model_dir: Path, request_file: Path, result_file: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.loads(request_file.read_text())
    adapters, lora = {"base": None}, {}
    if adapter_dir := request["adapter_dir"]:
        settings = json.loads((Path(adapter_dir) / "adapter_config.json").read_text())
        adapters["adapter"] = LoRARequest("adapter", 1, adapter_dir)
        lora = {
            "enable_lora": True,
            "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= settings["r"]),
            # Without this vLLM wraps lm_head too, and then fails over log-probabilities of prompts (CPU, 0.32).
            "lora_target_modules": settings["target_modules"],
        }
    llm = LLM(
        str(model_dir),
        dtype="float32",
        skip_tokenizer_init=True,
        generation_config="vllm",  # its own defaults, whatever the checkpoint suggests
        enforce_eager=True,
        max_model_len=max(map(len, request["prompts"])) + request["new_ids"],
        max_num_seqs=8,
        max_num_batched_tokens=256,  # what LoRA on a CPU takes memory for; longer prompts go in pieces
        kv_cache_memory_bytes=256 << 20,
        max_logprobs=-1,
        **lora,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=request["new_ids"], ignore_eos=True, detokenize=False, logprobs=-1, prompt_logprobs=-1
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    result = {}
    for name, adapter in adapters.items():
        outputs = llm.generate(prompts, greedy, lora_request=adapter, use_tqdm=False)
        result[name] = [answer(output.prompt_logprobs[1:], output.outputs[0]) for output in outputs]
    result_file.write_text(json.dumps(result))


def answer(prompt_rows: list[dict], completion) -> dict:
    rows = [*prompt_rows, *completion.logprobs]
    return {"ids": list(completion.token_ids), "logprobs": [[row[i].logprob for i in range(len(row))] for row in rows]}


if __name__ == "__main__":
    files = map(Path, sys.argv[1:])
    for job in zip(files, files, files, strict=True):
        main(*job)
