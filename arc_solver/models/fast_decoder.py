"""Faster forward and backward passes for Llama, Mistral, Qwen2 and Qwen3, with transformers' numbers.

Test-time training and decoding of small models wait for memory and for Python, not for matrix products. So the layers
of a stock checkpoint are run here with few operations: what can be done in place is, adapters of layers that share an
input share their matrix products, and the backward pass knows that the base is frozen. `Model.logits` comes here
whenever it can; other architectures, and weights that are trained themselves, go through transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import ManualAttention, to_device

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ADAPTERS = 14  # matrices of the adapters of a layer: A and B of seven linear layers


@dataclass(frozen=True, eq=False)
class AdapterPadding:
    """Indexes that pad each adapter's rows to one length, so that one batched matmul serves all adapters."""

    rows_N: Tensor  # which row of the input is in each place, block by block
    places_N: Tensor  # in which place each row is

    @staticmethod
    def of(lengths_K: Sequence[int], device: torch.device) -> "AdapterPadding":
        lengths = torch.tensor(lengths_K)
        columns = torch.arange(int(lengths.max()))
        is_real_KC = columns < lengths[:, None]
        rows_KC = ((lengths.cumsum(0) - lengths)[:, None] + columns) * is_real_KC
        places_N = is_real_KC.flatten().nonzero()[:, 0]
        return AdapterPadding(to_device(rows_KC.flatten(), device), to_device(places_N, device))


class LoraLinear(nn.Module):
    """A frozen linear layer, quantised or not, with K adapters: block k of the input's rows goes through adapter k.

    Attributes:
        live_L: the adapters that the input is for, if not all of them.
        blocks: the blocks, if they are not of equal length. For decoding only.
    """

    live_L: Tensor | None = None
    blocks: AdapterPadding | None = None

    def __init__(self, base: nn.Linear, A_KRI: Tensor, B_KOR: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.A_KRI, self.B_KOR = nn.Parameter(A_KRI), nn.Parameter(B_KOR)

    def forward(self, x: Tensor) -> Tensor:
        (y,), _ = _project(x.reshape(-1, x.shape[-1]), [self], _adapters([self]))
        return y.view(*x.shape[:-1], -1)


def supports(lm: Any) -> bool:
    """Whether the fast passes can run this model as it is now; else transformers runs it."""
    if type(lm).__name__ not in ARCHITECTURES:
        return False
    weight, config = lm.model.embed_tokens.weight, lm.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
        and not getattr(config, "sliding_window", None)
        and type(weight) is nn.Parameter  # a shard of FSDP is not
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.is_autocast_enabled(weight.device.type)
        and all(type(_base(linear)) is nn.Linear for layer in lm.model.layers for linear in _linears(layer))
    )


def _linears(layer: Any) -> list[Any]:
    """The seven linear layers: three into attention, and four out of it."""
    attend, mlp = layer.self_attn, layer.mlp
    return [attend.q_proj, attend.k_proj, attend.v_proj, attend.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def forward(
    lm: Any,
    ids_BT: Tensor,
    positions_BT: Tensor,
    rows: Tensor | None = None,
    cache: Any = None,
    recompute: bool = False,
    **masks: Any,
) -> Tensor:
    """Logits [B, T, V], or [*, V] at the places `rows` of the flattened ids alone.

    Gradients flow to adapters only. The other arguments are those of `Model.logits`.
    """
    adapters = [x for layer in lm.model.layers for x in _adapters(_linears(layer))]
    run = _Pass(lm, ids_BT, positions_BT, rows, cache, recompute, masks)
    logits = _PassFunction.apply(run, *adapters) if torch.is_grad_enabled() else run.forward(adapters, keep=False)
    return logits.view(*(ids_BT.shape if rows is None else rows.shape), -1)


class _Pass:
    """The whole model forward, and backward without autograd: one node of its graph instead of hundreds."""

    def __init__(
        self,
        lm: Any,
        ids_BT: Tensor,
        positions_BT: Tensor,
        rows: Tensor | None,
        cache: Any,
        recompute: bool,
        masks: dict[str, Any],
    ):
        self.lm, self.ids_BT, self.rows, self.recompute = lm, ids_BT, rows, recompute
        tables = _rotations(lm, positions_BT)
        self.layers = [_Layer(x, i, tables, len(ids_BT), cache, masks) for i, x in enumerate(lm.model.layers)]
        self.adapters: Sequence[Tensor | None] = ()
        self.inputs: list[Tensor] = []  # of each layer, where they are recomputed
        self.norm: Sequence[Tensor] = ()

    @property
    def saved(self) -> list[Any]:
        """What the forward pass has kept."""
        return [self.inputs, self.norm, *(layer.saved for layer in self.layers)]

    def forward(self, adapters: Sequence[Tensor | None], keep: bool) -> Tensor:
        """Logits, [N, V]. `keep`: for the backward pass."""
        self.adapters = adapters
        count = max((len(x) for x in adapters if x is not None), default=1)
        if self.rows is not None and (count == 1 or self.rows.ndim == 2):  # else adapters' blocks were not equal
            self.layers[-1].rows_R = self.rows.flatten()
        x = F.embedding(self.ids_BT.flatten(), self.lm.model.embed_tokens.weight)
        for i, layer in enumerate(self.layers):
            if keep and self.recompute:
                self.inputs.append(x)
            x = layer.forward(x, self._of_layer(i), keep and not self.recompute)
        if self.rows is not None and self.layers[-1].rows_R is None:
            x = x[self.rows]
        normed, *self.norm = _norm(x, self.lm.model.norm)
        return F.linear(normed, self.lm.lm_head.weight, self.lm.lm_head.bias)

    def backward(self, dlogits: Tensor) -> list[Tensor | None]:
        """The gradients of the adapters."""
        d: Tensor | None = _norm_backward(dlogits @ self.lm.lm_head.weight, self.lm.model.norm, *self.norm)
        grads: list[Tensor | None] = []
        for i, layer in reversed([*enumerate(self.layers)]):
            if self.recompute:
                layer.forward(self.inputs.pop(), self._of_layer(i), keep=True)
            assert d is not None
            d, of_layer = layer.backward(d, needs_dx=i > 0)
            grads = of_layer + grads
        return grads

    def _of_layer(self, i: int) -> Sequence[Tensor | None]:
        return self.adapters[i * ADAPTERS : (i + 1) * ADAPTERS]


class _PassFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Pass, *adapters: Tensor | None) -> Tensor:
        ctx.run = run
        return run.forward(adapters, keep=True)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.run.backward(dlogits)


class _Layer:
    """One layer of the decoder: x -> its output, [N, D].

    Attributes:
        rows_R: the only places that are asked for, if not all: the output is [R, D].
    """

    rows_R: Tensor | None = None

    def __init__(
        self,
        layer: Any,
        index: int,
        tables: tuple[Tensor, Tensor],
        batch: int,
        cache: Any,
        masks: dict[str, Any],
    ):
        self.index, self.batch, self.cache = index, batch, cache
        self.head_dim = layer.self_attn.head_dim
        linears = _linears(layer)
        self.into, self.out = _Into(layer, linears[:3], tables), _OutOf(layer, linears[3:])
        self.attention = ManualAttention(layer.self_attn.scaling, **masks)

    @property
    def saved(self) -> tuple[Any, ...]:
        return self.into.saved, self.attention.saved, self.out.saved

    def forward(self, x: Tensor, adapters: Sequence[Tensor | None], keep: bool) -> Tensor:
        q, k, v = (self._by_head(y) for y in self.into.forward(x, adapters[:6]))
        if self.cache is not None:
            k, v = self.cache.update(k, v, self.index)
        o = self.attention.forward(q, k, v, keep).transpose(1, 2).reshape(len(x), -1)
        if self.rows_R is not None:
            x, o = x[self.rows_R], o[self.rows_R]
        y = self.out.forward(x, o, adapters[6:])
        if not keep:
            self.into.saved = self.out.saved = ()
        return y

    def backward(self, dy: Tensor, needs_dx: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        dh, do, of_out = self.out.backward(dy)
        if self.rows_R is not None:
            places = len(self.into.tables[0])
            dh, do = (d.new_zeros(places, d.shape[1]).index_copy_(0, self.rows_R, d) for d in (dh, do))
        dq, dk, dv = self.attention.backward(self._by_head(do.view(len(do), -1, self.head_dim)))
        dq, dk, dv = (d.transpose(1, 2).flatten(0, 1) for d in (dq, dk, dv))
        dx, of_into = self.into.backward(dq, dk, dv, needs_dx)
        self.into.saved = self.attention.saved = self.out.saved = ()
        return dx if dx is None else dx.add_(dh), [*of_into, *of_out]

    def _by_head(self, y_NHD: Tensor) -> Tensor:
        """[B, H, T, D]"""
        return y_NHD.unflatten(0, (self.batch, -1)).transpose(1, 2)


# ---- one layer: up to attention, and from there on -----------------------------------------------------------------


class _Into:
    """x -> queries, keys and values, rotated: [N, heads, D] each."""

    def __init__(self, layer: Any, linears: list[nn.Module], tables: tuple[Tensor, Tensor]):
        self.layer, self.linears, self.tables = layer, linears, tables
        self.saved: tuple[Any, ...] = ()

    def forward(self, x: Tensor, adapters: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        attend = self.layer.self_attn
        normed, *norm = _norm(x, self.layer.input_layernorm)
        flat, projected = _project(normed, self.linears, adapters)
        q, k, v = (y.view(len(x), -1, attend.head_dim) for y in flat)
        norms = []
        if hasattr(attend, "q_norm"):
            (q, *q_norm), (k, *k_norm) = _norm(q, attend.q_norm), _norm(k, attend.k_norm)
            norms = [q_norm, k_norm]
        self.saved = norm, projected, norms
        return _rotate(q, *self.tables), _rotate(k, *self.tables), v

    def backward(self, dq: Tensor, dk: Tensor, dv: Tensor, needs_dx: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        attend = self.layer.self_attn
        norm, projected, norms = self.saved
        cos, sin = self.tables
        dq, dk = _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)
        if norms:
            dq = _norm_backward(dq, attend.q_norm, *norms[0])
            dk = _norm_backward(dk, attend.k_norm, *norms[1])
        flat = [d.reshape(len(d), -1) for d in (dq, dk, dv)]
        dnormed, dadapters = _project_backward(flat, self.linears, projected, needs_dx)
        dx = None if dnormed is None else _norm_backward(dnormed, self.layer.input_layernorm, *norm)
        return dx, dadapters


class _OutOf:
    """x and what attention gave -> the layer's output, [N, D]."""

    def __init__(self, layer: Any, linears: list[nn.Module]):
        self.layer, self.linears = layer, linears
        self.saved: tuple[Any, ...] = ()

    def forward(self, x: Tensor, o: Tensor, adapters: Sequence[Tensor | None]) -> Tensor:
        (h,), o_saved = _project(o, self.linears[:1], adapters[:2], onto=x)
        normed, *norm = _norm(h, self.layer.post_attention_layernorm)
        (gate, up), in_saved = _project(normed, self.linears[1:3], adapters[2:6])
        silu = F.silu(gate)
        (y,), out_saved = _project(silu * up, self.linears[3:], adapters[6:], onto=h)
        self.saved = o_saved, norm, in_saved, (gate, up, silu), out_saved
        return y

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        o_saved, norm, in_saved, (gate, up, silu), out_saved = self.saved
        dhidden, out_adapters = _project_backward([dy], self.linears[3:], out_saved)
        assert dhidden is not None
        dup = dhidden * silu
        dgate = torch.ops.aten.silu_backward(dhidden.mul_(up), gate)
        dnormed, in_adapters = _project_backward([dgate, dup], self.linears[1:3], in_saved)
        assert dnormed is not None
        dh = _norm_backward(dnormed, self.layer.post_attention_layernorm, *norm).add_(dy)
        do, o_adapters = _project_backward([dh], self.linears[:1], o_saved)
        assert do is not None
        return dh, do, [*o_adapters, *in_adapters, *out_adapters]


def saved_tensors(node: Any) -> list[Tensor]:
    """Tensors that our own autograd node saved for backward, which PyTorch's hooks do not see."""
    found: list[Tensor] = []
    open_ = [getattr(getattr(node, "run", None), "saved", ())]
    while open_:
        some = open_.pop()
        if isinstance(some, Tensor):
            found.append(some)
        elif isinstance(some, list | tuple):
            open_ += some
    return found


# ---- the operations ------------------------------------------------------------------------------------------------


def _adapters(linears: Sequence[nn.Module]) -> list[Tensor | None]:
    """A and B of each layer in turn, of the live adapters; None where it has none."""
    found: list[Tensor | None] = []
    for linear in linears:
        if not isinstance(linear, LoraLinear):
            found += [None, None]
        elif linear.live_L is None:
            found += [linear.A_KRI, linear.B_KOR]
        else:
            found += [x.index_select(0, linear.live_L) for x in (linear.A_KRI, linear.B_KOR)]
    return found


def _project(
    x_NI: Tensor,
    linears: Sequence[nn.Module],
    adapters: Sequence[Tensor | None],
    onto: Tensor | None = None,
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Linear layers of one input, with their adapters, added to `onto` if there is one; and what backward needs."""
    bases = [_base(linear) for linear in linears]
    ys = [_through(base, x_NI) if onto is None else _onto(onto, x_NI, base) for base in bases]
    adapted = [i for i in range(len(linears)) if adapters[2 * i] is not None]
    if not adapted:
        return ys, ()
    loras: list[Any] = [linears[i] for i in adapted]
    blocks, scale = loras[0].blocks, loras[0].scale
    As, Bs = ([x.to(x_NI.dtype) for i in adapted if (x := adapters[2 * i + of]) is not None] for of in (0, 1))
    A = torch.cat(As, 1)  # [K, all ranks, I]
    if blocks is not None:
        low = torch.bmm(x_NI.index_select(0, blocks.rows_N).view(len(A), -1, x_NI.shape[-1]), A.transpose(1, 2))
        for i, B, part in zip(adapted, Bs, low.chunk(len(Bs), 2), strict=True):
            change = torch.bmm(part, B.transpose(1, 2)).flatten(0, 1)
            ys[i].add_(change.index_select(0, blocks.places_N), alpha=scale)
        return ys, ()
    x_KNI = x_NI.view(len(A), -1, x_NI.shape[-1])
    low = torch.bmm(x_KNI, A.transpose(1, 2))
    for i, B, part in zip(adapted, Bs, low.chunk(len(Bs), 2), strict=True):
        ys[i].view(len(A), -1, B.shape[1]).baddbmm_(part, B.transpose(1, 2), alpha=scale)
    return ys, (adapted, scale, x_KNI, low, A, Bs)


def _base(linear: nn.Module) -> Any:
    return linear.base if isinstance(linear, LoraLinear) else linear


def _through(linear: Any, x: Tensor) -> Tensor:
    """What the layer gives, to be changed in place; what a quantised one gives may be a view of its own."""
    y = linear(x)
    return y if type(linear) is nn.Linear else y.clone()


def _onto(residual: Tensor, x: Tensor, linear: Any) -> Tensor:
    y = torch.addmm(residual, x, linear.weight.T)
    return y if linear.bias is None else y.add_(linear.bias)


def _project_backward(
    dys: Sequence[Tensor], linears: Sequence[nn.Module], saved: tuple[Any, ...], needs_dx: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the input, if wanted, and of A and B of each layer."""
    dx: Tensor | None = None
    for dy, linear in zip(dys, linears, strict=True) if needs_dx else ():
        weight = _base(linear).weight
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    grads: list[Tensor | None] = [None] * (2 * len(linears))
    if saved:
        adapted, scale, x_KNI, low, A, Bs = saved
        dys_KNO = [dys[i].view(len(A), -1, B.shape[1]) for i, B in zip(adapted, Bs, strict=True)]
        dlow = torch.cat([torch.bmm(dy, B) for dy, B in zip(dys_KNO, Bs, strict=True)], 2).mul_(scale)
        dAs = torch.bmm(dlow.transpose(1, 2), x_KNI).chunk(len(Bs), 1)
        for i, dA, dy, part in zip(adapted, dAs, dys_KNO, low.chunk(len(Bs), 2), strict=True):
            grads[2 * i], grads[2 * i + 1] = dA.float(), torch.bmm(dy.transpose(1, 2), part).float().mul_(scale)
        if dx is not None:
            dx.view(len(A), -1, dx.shape[-1]).baddbmm_(dlow, A)
    return dx, grads


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm over the last dimension: the result, x at length 1 (root mean square), and what x was multiplied by."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    rate = squares.div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_().to(x.dtype)
    xhat = x * rate
    return xhat * norm.weight, xhat, rate


def _norm_backward(dy: Tensor, norm: Any, xhat: Tensor, rate: Tensor) -> Tensor:
    d = dy * norm.weight
    return d.addcmul_(xhat, (d * xhat).mean(-1, keepdim=True), value=-1).mul_(rate)


def _rotations(lm: Any, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, [N, 1, D/2] each."""
    rotary = lm.model.rotary_emb
    angles = positions_BT.flatten()[:, None, None].float() * rotary.inv_freq.float()
    dtype = lm.model.embed_tokens.weight.dtype
    return (angles.cos() * rotary.attention_scaling).to(dtype), (angles.sin() * rotary.attention_scaling).to(dtype)


def _rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_NHD.chunk(2, -1)
    y = torch.empty_like(x_NHD, memory_format=torch.contiguous_format)
    y1, y2 = y.chunk(2, -1)
    torch.mul(first, cos, out=y1).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=y2).addcmul_(first, sin)
    return y
