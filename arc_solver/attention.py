"""Attention for packed sequences, and with a mask for decoding: the function that models are loaded with.

transformers builds attention masks that we never want: for packed sequences it makes a dense T x T one, and it takes
the jumps of grid positions for packing. This function is told where the sequences are. It has no mask function in
transformers, which therefore builds none.
"""

import inspect
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
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
    return attention(q_BHTD, k_BGKD, v_BGKD, scaling, ends_S, mask_BTK).transpose(1, 2), None


def attention(
    q_BHTD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    scaling: float | None = None,
    ends_S: Tensor | None = None,
    mask_BTK: Tensor | None = None,
) -> Tensor:
    """Softmax attention with H query heads in G groups, [B, H, T, D].

    Args:
        ends_S: where packed sequences end; each sees itself only, causally, and B must be 1.
        mask_BTK: True where a key may be seen. Without either: plain causal.
    """
    groups = q_BHTD.shape[1] // k_BGKD.shape[1]
    if ends_S is None:
        mask = mask_BTK[:, None] if mask_BTK is not None else None
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGKD, v_BGKD, mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    if not q_BHTD.is_cpu:
        return _packed_on_gpu(q_BHTD, k_BGKD, v_BGKD, ends_S, scaling)
    if groups > 1:  # the CPU kernel wants as many key as query heads
        k_BGKD, v_BGKD = (x.repeat_interleave(groups, 1) for x in (k_BGKD, v_BGKD))
    out, _ = _packed(q_BHTD, k_BGKD, v_BGKD, ends_S, scaling or q_BHTD.shape[-1] ** -0.5)
    return out


def _packed_on_gpu(q: Tensor, k: Tensor, v: Tensor, ends_S: Tensor, scaling: float | None) -> Tensor:
    """Causal attention inside each sequence: one flash kernel for all where there is one (16 bit), else a loop."""
    groups = q.shape[1] // k.shape[1]
    flash = q.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if not (flash and _has_varlen()):
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


SHORT = 512  # tokens; up to here bf16 matrix products beat the CPU's flash kernel in the backward pass

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
        if q.dtype == torch.bfloat16 and end - start <= SHORT:
            parts = _products_backward(grad[0, :, s], q[0, :, s], k[0, :, s], v[0, :, s], scale)
        else:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x[:, :, s] for x in (grad, q, k, v, out, lse)), 0.0, True, scale=scale
            )
        for whole, part in zip(grads, parts, strict=True):
            whole[:, :, s] = part
        start = end
    return grads


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention by bf16 matrix products: on short sequences twice as fast as the flash kernel.

    A block of queries at a time, each with the keys that it sees; one block of all if there are few. [H, T, D] each.
    """
    q, length = q * scale, q.shape[1]
    if length <= 2 * block:
        dq, dk, dv = _block_backward(grad, q, k, v)
        return dq.mul_(scale), dk, dv
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, length, block):
        rows, seen = slice(start, start + block), slice(min(start + block, length))
        dq[:, rows], dk_seen, dv_seen = _block_backward(grad[:, rows], q[:, rows], k[:, seen], v[:, seen])
        dk[:, seen] += dk_seen
        dv[:, seen] += dv_seen
    return dq.mul_(scale), dk, dv


def _block_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for queries that are the last of the keys, and scaled already."""
    rows = q.shape[1]
    scores = torch.bmm(q, k.transpose(1, 2))
    scores[:, :, -rows:] += _above_diagonal(rows)
    weights = scores.softmax(-1)
    dweights = torch.bmm(grad, v.transpose(1, 2))
    dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
    return (
        torch.bmm(dscores, k),
        torch.bmm(dscores.transpose(1, 2), q),
        torch.bmm(weights.transpose(1, 2), grad),
    )


@lru_cache(64)
def _above_diagonal(size: int) -> Tensor:
    return torch.full((size, size), -torch.inf, dtype=torch.bfloat16).triu_(1)


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
