"""Weights: make a small decoder from scratch, load one, save one, run one.

A model is a stock Hugging Face causal LM over our 64 ids, in safetensors, so `from_pretrained` and PEFT just work. How
its sequences are written (`FormatConfig`) and what it was trained on (`TrainingData`) travel in the same folder.

transformers builds attention masks that we never want: for packed sequences it makes a dense T x T one, and it takes
the jumps of grid positions for packing. So models are loaded with an attention function of our own, which is told
where the sequences are. It has no mask function in transformers, which therefore builds none.
"""

import inspect
import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PACKAGE_DIR, FormatConfig, ModelConfig, UserError
from .corpus import TrainingData
from .encode import END, PAD, VOCABULARY

BUNDLED_DIR = PACKAGE_DIR / "bundled"
ATTENTION = "arc_solver"
DATA_FILE = "training_data.json"


@dataclass(frozen=True, eq=False)
class Model:
    """A causal LM with the format that it reads and writes."""

    lm: Any  # transformers.PreTrainedModel; transformers' classes defeat type checkers
    format: FormatConfig
    trained_on: TrainingData | None  # None: unknown, so no leak audit is possible

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @property
    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.lm.parameters())

    def logits(self, ids_BT: Tensor, positions_BT: Tensor, **attention: Any) -> Tensor:
        """Next-id logits, [B, T, V] float32.

        Args:
            ids_BT, positions_BT: int64.
            attention: `ends_S`, where packed sequences end (B must be 1), or `mask_BTK`, True where a key may be seen,
                with `past_key_values` to keep keys and values. None of them: plain causal attention.
        """
        keeps = "past_key_values" in attention
        body = self.lm.base_model
        hidden = body(input_ids=ids_BT, position_ids=positions_BT, use_cache=keeps, **attention).last_hidden_state
        return self.lm.get_output_embeddings()(hidden).float()


def new_model(config: ModelConfig, format: FormatConfig, seed: int, trained_on: TrainingData | None = None) -> Model:
    """A randomly initialised stock Qwen3 in float32: the same weights for the same seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: Any = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    settings._attn_implementation = ATTENTION
    _prepare_transformers()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = Qwen3ForCausalLM(settings)
    return Model(lm, format, trained_on)


def save_model(model: Model, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes an ordinary Hugging Face checkpoint, its weights cast to `dtype` if given, and what belongs to it."""
    state = {name: p.detach().to(dtype or p.dtype).contiguous() for name, p in model.lm.state_dict().items()}
    model.lm.config.arc_format = model.format.model_dump()
    model.lm.save_pretrained(folder, state_dict=state)
    if model.trained_on:
        (folder / DATA_FILE).write_text(json.dumps(model.trained_on.to_json()))


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The checkpoint in a folder; "" is the bundled one.

    Raises:
        UserError: no checkpoint is there, or it was not written by `save_model`.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(path) if path else BUNDLED_DIR
    for needed in ("config.json", "model.safetensors"):
        if not (folder / needed).is_file():
            raise UserError(
                f"{folder} holds no checkpoint ({needed} is missing); make one with bin/train CONFIG --out DIR"
            )
    try:
        content = json.loads((folder / "config.json").read_text())
        format = FormatConfig.model_validate(content["arc_format"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}/config.json does not describe an arc_solver checkpoint: {error}") from None
    _prepare_transformers()
    data_file = folder / DATA_FILE
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation=ATTENTION, local_files_only=True
        )
        trained_on = TrainingData.from_json(json.loads(data_file.read_text())) if data_file.is_file() else None
    except Exception as error:  # transformers and safetensors raise many kinds; all of them mean these files
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the checkpoint in {folder} is damaged, copy or make it again: {first}") from error
    return Model(lm.to(device).eval(), format, trained_on)


def pick_device(name: str) -> torch.device:
    """The device of a config: "auto" is a CUDA GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise UserError(f"run.device='{name}' is no device: use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"run.device={name} asks for a GPU that PyTorch does not find: use run.device=cpu")
    return torch.device(name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (GPUs from Ampere on, CPUs with AMX), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.bfloat16 if has_amx and has_amx() else torch.float32


# ---- attention ---------------------------------------------------------------------------------------------------


def _prepare_transformers() -> None:
    """Registers the attention function, and keeps progress bars of transformers' own out of ours."""
    from transformers import AttentionInterface
    from transformers.utils import logging

    logging.disable_progress_bar()
    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: nn.Module,
    q_BHTD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    ends_S: Tensor | None = None,
    mask_BTK: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer. Returns [B, T, H, D]."""
    q_BHTD, k_BGKD = q_BHTD.to(v_BGKD.dtype), k_BGKD.to(v_BGKD.dtype)  # norms may have widened them under autocast
    groups = q_BHTD.shape[1] // k_BGKD.shape[1]
    if ends_S is None:
        mask = mask_BTK[:, None] if mask_BTK is not None else None
        out = F.scaled_dot_product_attention(
            q_BHTD, k_BGKD, v_BGKD, mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    elif not q_BHTD.is_cpu:
        out = _packed_on_gpu(q_BHTD, k_BGKD, v_BGKD, ends_S, scaling)
    else:
        if groups > 1:  # the CPU kernel wants as many key as query heads
            k_BGKD, v_BGKD = (x.repeat_interleave(groups, 1) for x in (k_BGKD, v_BGKD))
        out, _ = _packed(q_BHTD, k_BGKD, v_BGKD, ends_S, scaling or q_BHTD.shape[-1] ** -0.5)
    return out.transpose(1, 2), None


def _packed_on_gpu(q: Tensor, k: Tensor, v: Tensor, ends_S: Tensor, scaling: float | None) -> Tensor:
    """Causal attention inside each sequence: one flash kernel for all where there is one (16 bit), else a loop."""
    groups = q.shape[1] // k.shape[1]
    if not (_has_varlen() and q.dtype in (torch.bfloat16, torch.float16)):
        lengths = ends_S.diff(prepend=ends_S.new_zeros(1)).tolist()
        pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        return torch.cat([attend(*piece) for piece in pieces], dim=2)
    from torch.nn.attention.varlen import varlen_attn

    starts = F.pad(ends_S, (1, 0)).to(torch.int32)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    longest = int(q.shape[0])  # an upper bound; the exact length would cost a transfer from the GPU
    out = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=groups > 1
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


@cache
def _has_varlen() -> bool:
    """Whether this PyTorch has flash attention for packed sequences with the arguments that we need (2.13 has)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


# On a CPU each packed sequence goes through the flash kernel by itself. As a custom operator the loop is opaque to
# torch.compile: one graph serves every way of packing.


@torch.library.custom_op("arc_solver::packed_attention", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, ends_S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention inside each of the sequences. [1, H, T, D] each. Returns the output and the log-sum-exp."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    start = 0
    for end in ends_S.tolist():
        s = slice(start, end)
        out[:, :, s], lse[:, :, s] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, s], k[:, :, s], v[:, :, s], 0.0, True, scale=scale
        )
        start = end
    return out, lse


@torch.library.custom_op("arc_solver::packed_attention_backward", mutates_args=())
def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends_S: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    start = 0
    for end in ends_S.tolist():
        s = slice(start, end)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x[:, :, s] for x in (grad, q, k, v, out, lse)), 0.0, True, scale=scale
        )
        for whole, part in zip(grads, parts, strict=True):
            whole[:, :, s] = part
        start = end
    return grads


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends_S, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, ends_S)


def _packed_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, ends_S = ctx.saved_tensors
    return *torch.ops.arc_solver.packed_attention_backward(grad, q, k, v, out, lse, ends_S, ctx.scale), None, None


_packed.register_fake(
    lambda q, k, v, ends_S, scale: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
)
_packed_backward.register_fake(
    lambda grad, q, k, v, out, lse, ends_S, scale: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
_packed.register_autograd(_packed_gradient, setup_context=_packed_context)
