"""Attention for packed sequences, and with a mask for decoding: the function that models are loaded with.

transformers builds attention masks that we never want: for packed sequences it makes a dense T x T one, and it takes
the jumps of grid positions for packing. This function is told where the sequences are. It has no mask function in
transformers, which therefore builds none.
"""

import inspect
import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On an H100 PyTorch prefers cuDNN's attention with a mask, which makes a plan for every new shape; ours are new all the
# time. It is not used for packed sequences.
torch.backends.cuda.enable_cudnn_sdp(False)

HALF = (torch.bfloat16, torch.float16)
FLASH_SIZES = range(8, 257, 8)  # of a head
AMPERE = 8, 0  # the compute capability from which on flash attention runs
FEW_QUERIES = 16
PRODUCT_CELLS = 1 << 22  # queries x keys x heads of a matrix product of attention on a CPU, about
MOST_UNEVEN = 2  # longest by shortest of sequences that are padded to one length


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device without waiting for it: pinned memory, non_blocking."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where packed sequences end, in the forms in which attention wants to know it.

    Made once for a pass, as asking the GPU in every layer would make it wait.
    """

    ends_S: Tensor  # int64, on the CPU
    starts_S1: Tensor  # int32, on the model's device: a 0 before the ends
    longest: int  # no sequence has more tokens
    flash: tuple[str, ...]  # the parameters of flash attention; empty where the device has none

    @staticmethod
    def of(ends_S: Tensor, device: torch.device, most: int = 0) -> "Packing":
        """Of the ends of sequences, on the CPU, int64.

        Args:
            most: tokens that a sequence may have, the same for all batches that one compiled graph is to serve, as it
                becomes part of the graph; 0: those of the longest here, rounded up to a power of two.
        """
        assert ends_S.device.type == "cpu", ends_S.device
        starts_S1 = to_device(F.pad(ends_S, (1, 0)).to(torch.int32), device)
        for ends in (ends_S, starts_S1):
            torch._dynamo.maybe_mark_dynamic(ends, 0)  # the number of sequences differs from batch to batch
        longest = int(ends_S.diff(prepend=ends_S.new_zeros(1)).max())
        return Packing(ends_S, starts_S1, most or 1 << (longest - 1).bit_length(), _flash_parameters(device))

    @cached_property
    def padded(self) -> "Padded":
        """The sequences as padded batches, on the device."""
        lengths_S = self.ends_S.diff(prepend=self.ends_S.new_zeros(1))
        starts_S = self.ends_S - lengths_S
        groups = _alike(lengths_S.tolist())
        rows, places_T, begin = [], torch.empty(int(self.ends_S[-1]), dtype=torch.int64), 0
        for group in groups:
            columns_L = torch.arange(int(lengths_S[group[0]]))
            is_real_GL = columns_L < lengths_S[group, None]
            rows_GL = starts_S[group, None] + columns_L * is_real_GL
            places_T[rows_GL[is_real_GL]] = begin + is_real_GL.flatten().nonzero()[:, 0]
            rows.append(rows_GL.flatten())
            begin += rows_GL.numel()
        device = self.starts_S1.device
        moved = tuple(to_device(rows_N, device) for rows_N in rows)
        return Padded(moved, tuple(map(len, groups)), to_device(places_T, device))


@dataclass(frozen=True, eq=False)
class Padded:
    """Packed sequences as batches of like length. What pads a sequence is its first token, which no one asks about."""

    rows: tuple[Tensor, ...]  # of each batch: the tokens, sequence by sequence
    counts: tuple[int, ...]  # sequences of each batch
    places_T: Tensor  # where each token is in what comes of all batches


def _alike(lengths: list[int]) -> list[list[int]]:
    """The indexes of sequences, longest first, in groups that are not too uneven to be padded to one length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] <= MOST_UNEVEN * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@cache
def _flash_parameters(device: torch.device) -> tuple[str, ...]:
    """Of PyTorch's flash attention for packed sequences; none where the device has no such attention.

    `scale` and `window_size` are known from 2.11 on, `enable_gqa` from 2.13 on.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE:
        return ()
    from torch.nn.attention.varlen import varlen_attn  # takes seconds

    return tuple(inspect.signature(varlen_attn).parameters)


def packs_in_one_graph(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one compiled graph serves every way of packing, with matrix products in this type."""
    return device.type == "cpu" or (bool(_flash_parameters(device)) and dtype in HALF)


def attend(
    module: nn.Module,
    q_BHTD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    packing: Packing | None = None,
    mask_BTK: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer. Returns [B, T, H, D]."""
    q_BHTD, k_BGKD = q_BHTD.to(v_BGKD.dtype), k_BGKD.to(v_BGKD.dtype)  # norms may have widened them under autocast
    return attention(q_BHTD, k_BGKD, v_BGKD, scaling, packing, mask_BTK).transpose(1, 2), None


def attention(
    q_BHTD: Tensor,
    k_BGKD: Tensor,
    v_BGKD: Tensor,
    scaling: float | None = None,
    packing: Packing | None = None,
    mask_BTK: Tensor | None = None,
) -> Tensor:
    """Softmax attention with H query heads in G groups, [B, H, T, D].

    Args:
        packing: where packed sequences end; each sees itself only, causally, and B must be 1.
        mask_BTK: True where a key may be seen. Without either: plain causal.
    """
    scale = scaling or q_BHTD.shape[-1] ** -0.5
    if packing is None:
        if mask_BTK is not None:
            return _masked(q_BHTD, k_BGKD, v_BGKD, mask_BTK, scale)
        return _causal(q_BHTD, k_BGKD, v_BGKD, scale)
    if q_BHTD.is_cpu:
        out, _ = _packed(q_BHTD, *_as_many_heads(q_BHTD, k_BGKD, v_BGKD), packing.ends_S, scale)
        return out
    if packing.flash and q_BHTD.dtype in HALF and q_BHTD.shape[-1] in FLASH_SIZES:
        return _flash(q_BHTD, k_BGKD, v_BGKD, packing, scale)
    return _padded(q_BHTD, k_BGKD, v_BGKD, packing, scale)


def _as_many_heads(q_BHTD: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
    """Keys and values repeated for the query heads of their group."""
    groups = q_BHTD.shape[1] // keys_and_values[0].shape[1]
    return [x if groups == 1 else x.repeat_interleave(groups, 1) for x in keys_and_values]


def _masked(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask_BTK: Tensor, scale: float) -> Tensor:
    """The queries of a group are rows of one head: with a mask and groups PyTorch's fast kernels for GPUs decline."""
    batch, heads, length, size = q_BHTD.shape
    groups = k_BGKD.shape[1]
    repeats = heads // groups
    mask = mask_BTK if length == 1 or repeats == 1 else mask_BTK.repeat(1, repeats, 1)
    q = q_BHTD.reshape(batch, groups, repeats * length, size)
    if _is_for_products(q_BHTD):
        return _batch_by_products(q, k_BGKD, v_BGKD, scale, mask).reshape(q_BHTD.shape)
    # Not a view: some kernels give queries before heads.
    return F.scaled_dot_product_attention(q, k_BGKD, v_BGKD, mask[:, None], scale=scale).reshape(q_BHTD.shape)


def _causal(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scale: float) -> Tensor:
    if _is_for_products(q_BHTD):
        k_BHKD, v_BHKD = _as_many_heads(q_BHTD, k_BGKD, v_BGKD)
        return _batch_by_products(q_BHTD, k_BHKD, v_BHKD, scale)
    grouped = q_BHTD.shape[1] != k_BGKD.shape[1]
    flash = q_BHTD.dtype in HALF and bool(_flash_parameters(q_BHTD.device))
    if grouped and q_BHTD.is_cuda and not flash:  # no other fast kernel for GPUs knows groups
        (k_BGKD, v_BGKD), grouped = _as_many_heads(q_BHTD, k_BGKD, v_BGKD), False
    return F.scaled_dot_product_attention(q_BHTD, k_BGKD, v_BGKD, is_causal=True, scale=scale, enable_gqa=grouped)


def _is_for_products(q_BHTD: Tensor) -> bool:
    """Whether a few matrix products beat the flash kernel: on a CPU in bf16, unless there are few queries."""
    is_for_them = q_BHTD.is_cpu and q_BHTD.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    return is_for_them and q_BHTD.shape[2] >= FEW_QUERIES


def _batch_by_products(
    q_BHTD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, scale: float, mask_BTK: Tensor | None = None
) -> Tensor:
    """Attention by matrix products, a block of queries after the other; without a mask causal. [B, H, T, D]"""
    batch, heads, length, size = q_BHTD.shape
    out_BTHD = q_BHTD.new_empty(batch, length, heads, size)
    for queries, seen in _blocks(length):
        keys = seen if mask_BTK is None else slice(0, k_BHKD.shape[2])
        rows = max(1, PRODUCT_CELLS // (heads * (queries.stop - queries.start) * keys.stop))
        for b in range(0, batch, rows):
            some = slice(b, b + rows)
            q = q_BHTD[some, :, queries].flatten(0, 1)
            k, v = (x[some, :, keys].flatten(0, 1) for x in (k_BHKD, v_BHKD))
            if mask_BTK is None:
                bias = _causal_mask(q.shape[1], keys.stop, q.dtype)
            else:
                mask = mask_BTK[some, queries]
                bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
                bias = bias[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
            weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
            out_BTHD[some, queries] = torch.bmm(weights, v).unflatten(0, (-1, heads)).transpose(1, 2)
    return out_BTHD.transpose(1, 2)


def _flash(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal attention inside each sequence by one flash kernel, in the words of this PyTorch."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if "enable_gqa" in packing.flash:
        options["enable_gqa"] = q_BHTD.shape[1] != k_BGKD.shape[1]
    else:
        k_BGKD, v_BGKD = _as_many_heads(q_BHTD, k_BGKD, v_BGKD)
    if "scale" in packing.flash:
        options["scale"] = scale
    elif not math.isclose(factor := scale * math.sqrt(q_BHTD.shape[-1]), 1):
        q_BHTD = q_BHTD * factor
    options |= {"window_size": (-1, 0)} if "window_size" in packing.flash else {"is_causal": True}
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q_BHTD, k_BGKD, v_BGKD))
    starts, longest = packing.starts_S1, packing.longest
    out = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _padded(q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, packing: Packing, scale: float) -> Tensor:
    """The same where flash attention is not to be had: a kernel for each batch of sequences of like length."""
    padded = packing.padded
    all_THD = [x[0].transpose(0, 1) for x in (q_BHTD, *_as_many_heads(q_BHTD, k_BGKD, v_BGKD))]
    outs = []
    for rows_N, count in zip(padded.rows, padded.counts, strict=True):
        q, k, v = (x.index_select(0, rows_N).unflatten(0, (count, -1)).transpose(1, 2) for x in all_THD)
        out_SHLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        outs.append(out_SHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, padded.places_T).transpose(0, 1)[None]


class ManualAttention:
    """`attention` with its backward pass at hand, for layers that are run without autograd.

    On a CPU the weights of short sequences are kept: in bf16 a few matrix products are twice as fast as the flash
    kernel forward, and four times backward. Elsewhere autograd has a graph of this one operation.
    """

    def __init__(self, scaling: float | None = None, packing: Packing | None = None, mask_BTK: Tensor | None = None):
        self.scaling, self.packing, self.mask_BTK = scaling, packing, mask_BTK
        self.saved: tuple[Any, ...] = ()
        self.by_products = False

    def forward(self, q_BHTD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, keep: bool) -> Tensor:
        """What `attention` gives. `keep`: for the backward pass."""
        if not keep:
            return attention(q_BHTD, k_BGKD, v_BGKD, self.scaling, self.packing, self.mask_BTK)
        packing = self.packing
        self.by_products = q_BHTD.is_cpu and packing is not None and packing.longest <= SHORT
        if self.by_products:
            assert packing is not None
            scale = self.scaling or q_BHTD.shape[-1] ** -0.5
            k_BHTD, v_BHTD = _as_many_heads(q_BHTD, k_BGKD, v_BGKD)
            out, weights = _by_products(q_BHTD[0], k_BHTD[0], v_BHTD[0], packing.ends_S, scale)
            self.saved = q_BHTD[0], k_BHTD[0], v_BHTD[0], weights, packing.ends_S, scale, k_BGKD.shape[1]
            return out[None]
        q, k, v = (x.detach().requires_grad_() for x in (q_BHTD, k_BGKD, v_BGKD))
        with torch.enable_grad():
            out = attention(q, k, v, self.scaling, packing, self.mask_BTK)
        self.saved = (q, k, v), out
        return out.detach()

    def backward(self, grad_BHTD: Tensor) -> tuple[Tensor, ...]:
        """The gradients of queries, keys and values."""
        if self.by_products:
            return tuple(d[None] for d in _by_products_backward(grad_BHTD[0], *self.saved))
        inputs, out = self.saved
        return torch.autograd.grad(out, inputs, grad_BHTD)


SHORT = 512  # tokens; up to here matrix products beat the CPU's flash kernel, those in bf16 by far

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
            d, q_s, k_s, v_s = (x[0, :, s] for x in (grad, q, k, v))
            parts = _products_backward(d, q_s, k_s, v_s, _weights(q_s, k_s, scale), scale)
        else:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x[:, :, s] for x in (grad, q, k, v, out, lse)), 0.0, True, scale=scale
            )
        for whole, part in zip(grads, parts, strict=True):
            whole[:, :, s] = part
        start = end
    return grads


Weights = list[Tensor]  # of a sequence: of each block of queries, [H, queries, keys that they see]


def _by_products(q: Tensor, k: Tensor, v: Tensor, ends_S: Tensor, scale: float) -> tuple[Tensor, list[Weights]]:
    """Causal attention inside each of the sequences by matrix products, and its weights. [H, T, D] each."""
    out_THD = q.new_empty(q.shape[1], len(q), q.shape[2])
    start, weights = 0, []
    for end in ends_S.tolist():
        s = slice(start, end)
        weights.append(_weights(q[:, s], k[:, s], scale))
        for (rows, seen), block in zip(_blocks(end - start), weights[-1], strict=True):
            out_THD[s][rows] = torch.bmm(block, v[:, s][:, seen]).transpose(0, 1)
        start = end
    return out_THD.transpose(0, 1), weights


def _by_products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: list[Weights], ends_S: Tensor, scale: float, groups: int
) -> tuple[Tensor, ...]:
    """Its gradients; of keys and values summed over the heads of each group."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    start = 0
    for end, of_sequence in zip(ends_S.tolist(), weights, strict=True):
        s = slice(start, end)
        parts = _products_backward(grad[:, s], q[:, s], k[:, s], v[:, s], of_sequence, scale)
        for whole, part in zip(grads, parts, strict=True):
            whole[:, s] = part
        start = end
    dq, dk, dv = grads
    if groups != len(q):
        dk, dv = (d.unflatten(0, (groups, -1)).sum(1) for d in (dk, dv))
    return dq, dk, dv


def _blocks(length: int, block: int = 128) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that it sees; one block of all if there are few."""
    if length <= 2 * block:
        return [(slice(0, length), slice(0, length))]
    ends = [(start, min(start + block, length)) for start in range(0, length, block)]
    return [(slice(start, end), slice(0, end)) for start, end in ends]


def _weights(q: Tensor, k: Tensor, scale: float) -> Weights:
    """The softmax of causal attention in one sequence. [H, T, D] each."""
    weights = []
    for rows, seen in _blocks(q.shape[1]):
        queries, keys = q[:, rows], k[:, seen]
        mask = _causal_mask(queries.shape[1], keys.shape[1], queries.dtype)
        weights.append(torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale).softmax(-1))
    return weights


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Weights, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal attention in one sequence by bf16 matrix products. [H, T, D] each."""
    blocks = _blocks(q.shape[1])
    if len(blocks) == 1:
        return _block_backward(grad, q, k, v, weights[0], scale)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (rows, seen), block in zip(blocks, weights, strict=True):
        parts = _block_backward(grad[:, rows], q[:, rows], k[:, seen], v[:, seen], block, scale)
        dq[:, rows], dk_seen, dv_seen = parts
        dk[:, seen] += dk_seen
        dv[:, seen] += dv_seen
    return dq, dk, dv


def _block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dweights = torch.bmm(grad, v.transpose(1, 2))
    dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
    return (
        torch.bmm(dscores, k).mul_(scale),
        torch.bmm(dscores.transpose(1, 2), q).mul_(scale),
        torch.bmm(weights.transpose(1, 2), grad),
    )


@lru_cache(64)
def _causal_mask(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """0 where a query, one of the last of the keys, may see a key, and -inf elsewhere."""
    return torch.full((queries, keys), -torch.inf, dtype=dtype).triu_(1 + keys - queries)


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
