"""Attention by each of its kernels gives what attention sequence by sequence gives, forward and backward."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from arc_solver.models.attention import HALF, Packing, _flash, _padded, attention, packs_in_one_graph

ENDS = torch.tensor([7, 8, 30, 31, 64])
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def some_heads(dtype=torch.float32, device=CPU, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    """Queries, keys and values, [1, heads, 64, 16]."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, n, int(ENDS[-1]), 16, generator=generator) for n in (heads, groups, groups)]
    return [x.to(dtype).to(device).requires_grad_() for x in made]


def one_by_one(q, k, v, scale=None):
    """Each sequence by itself."""
    sizes = ENDS.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    pieces = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*p, is_causal=True, scale=scale, enable_gqa=True) for p in pieces], dim=2
    )


def with_gradients(attend, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    """What it gives, and the gradients of queries, keys and values, float32 on the CPU."""
    out = attend(*heads)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [x.detach().float().cpu() for x in (out, *torch.autograd.grad((out.float() * weights).sum(), heads))]


def check(attend, dtype=torch.float32, device=CPU, groups: int = 2) -> None:
    expected = with_gradients(one_by_one, some_heads(groups=groups))
    for a, b in zip(with_gradients(attend, some_heads(dtype, device, groups=groups)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE[dtype] * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_on_the_cpu(dtype, groups):
    check(lambda q, k, v: attention(q, k, v, packing=Packing.of(ENDS, CPU)), dtype, groups=groups)


def test_gradients_of_attention_in_bf16():
    """Sequences of one block, of several, and long ones, against plain softmax attention in float32."""
    ends, generator = torch.tensor([1, 33, 230, 560, 1100]), torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 1100, 32, generator=generator).bfloat16() for _ in range(4)]
    q, k, v = (x.clone().requires_grad_() for x in drawn[:3])
    out = attention(q, k, v, 0.2, Packing.of(ends, CPU))
    found = torch.autograd.grad(out, (q, k, v), drawn[3])
    whole = [x.float().requires_grad_() for x in drawn[:3]]
    start = 0
    for end in ends.tolist():
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        one, two, three = (x[:, :, start:end] for x in whole)
        plain = (one @ two.transpose(2, 3) * 0.2).masked_fill(~seen, -torch.inf).softmax(-1) @ three
        expected = torch.autograd.grad(plain, whole, drawn[3][:, :, start:end].float())
        for mine, theirs in zip(found, expected, strict=True):
            part = theirs[:, :, start:end]
            error = (mine[:, :, start:end] - part).norm() / part.norm().clamp_min(1e-6)
            assert error < 0.02 or part.norm() < 1e-6, (start, end, error)
        start = end


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_padded_batches(dtype, groups):
    """What serves GPUs without flash attention, run on the CPU in their types."""
    check(lambda q, k, v: _padded(q, k, v, Packing.of(ENDS, CPU), 0.25), dtype, groups=groups)


def test_padding_is_bounded():
    ends = torch.tensor([1, 3, 1003, 1007, 1107, 1307])  # 1, 2, 1000, 4, 100 and 200 tokens
    padded = Packing.of(ends, CPU).padded
    assert padded.counts == (1, 2, 2, 1), "1000; 200 and 100; 4 and 2; 1"
    assert sum(len(rows) for rows in padded.rows) <= 2 * 1307
    rows = torch.cat(padded.rows)
    assert torch.equal(rows[padded.places_T], torch.arange(1307)), "every token is found again"


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return reference(query, key, value, cu_seq_q, max_q, is_causal, None)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return reference(query, key, value, cu_seq_q, max_q, window_size == (-1, 0), scale)


def varlen_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return reference(query, key, value, cu_seq_q, max_q, window_size == (-1, 0), scale)


def reference(q, k, v, starts, longest, causal, scale):
    """What those do, as PyTorch documents it: [T, heads, D] with cumulative lengths from 0, in int32."""
    assert q.shape == k.shape == v.shape and starts.dtype == torch.int32 and causal
    lengths = starts.diff().tolist()
    assert starts[0] == 0 and max(lengths) <= longest and all(x.is_contiguous() for x in (q, k, v))
    pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*piece, is_causal=True, scale=scale) for piece in pieces]
    return torch.cat(outs, 1).transpose(0, 1)


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("varlen", [varlen_2_10, varlen_2_11, varlen_2_13])
def test_flash_attention_is_called_as_each_pytorch_wants_it(varlen, groups, scale, monkeypatch):
    """The signatures are those of the releases 2.10, 2.11 and 2.13."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    found = Packing.of(ENDS, CPU)
    packing = Packing(found.ends_S, found.starts_S1, found.longest, tuple(inspect.signature(varlen).parameters))
    heads = some_heads(groups=groups)
    expected = with_gradients(lambda q, k, v: one_by_one(q, k, v, scale), heads)
    ours = with_gradients(lambda q, k, v: _flash(q, k, v, packing, scale or 0.25), heads)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_graph_serves_batches_whose_sequences_differ(monkeypatch):
    """Where flash attention is compiled, the longest sequence that it is told of is a constant of the graph."""

    def varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, *, is_causal=False):
        return (query + key + value) * longest_q

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    graphs = CompileCounter()
    flash = torch.compile(_flash, dynamic=False, backend=graphs, fullgraph=True)
    q, k, v = some_heads()
    for ends in ([64], [20, 40, 64], [16, 32, 48, 64]):
        found = Packing.of(torch.tensor(ends), CPU, most=64)
        flash(q, k, v, replace(found, flash=("is_causal",)), 0.25)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_groups_with_a_mask(groups, dtype, length):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, t, 16, generator=generator) for n, t in ((4, length), (groups, 9), (groups, 9)))
    mask_BTK = torch.rand(3, length, 9, generator=generator) < 0.5
    mask_BTK[:, :, 0] = True
    ours = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask_BTK=mask_BTK).float()
    k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(~mask_BTK[:, None], -torch.inf)
    torch.testing.assert_close(ours, scores.softmax(-1) @ v, atol=3 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("cells", [1 << 22, 1 << 10], ids=["all-rows-at-once", "row-by-row"])
@pytest.mark.parametrize("keys", [None, 600])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("queries", [15, 16, 200, 500])
def test_decoding_in_bf16_on_a_cpu(queries, groups, keys, cells, monkeypatch):
    """By the flash kernel and by products, in one block of queries and in several, with a mask and causal."""
    monkeypatch.setattr("arc_solver.models.attention.PRODUCT_CELLS", cells)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(3, count, n, 16, generator=generator)
        for count, n in ((4, queries), *[(groups, keys or queries)] * 2)
    ]
    q, k, v = (x.bfloat16() for x in drawn)
    seen = torch.ones(3, queries, queries, dtype=torch.bool).tril()
    if keys:
        seen = torch.rand(3, queries, keys, generator=generator) < 0.3
        seen[:, :, 5] = True
    with torch.inference_mode():
        found = attention(q, k, v, 0.4, mask_BTK=seen if keys else None)
    q, k, v = (x.float().repeat_interleave(4 // x.shape[1], 1) for x in (q, k, v))
    expected = (q @ k.transpose(2, 3) * 0.4).masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("attend", ["masked", "causal", "padded"])
def test_kernels_may_lay_out_their_answers_as_they_like(attend, monkeypatch):
    """Those of GPUs give [B, T, H, D], transposed."""
    q, k, v = some_heads()
    mask_BTK = torch.ones(1, 64, 64, dtype=torch.bool).tril()
    ways = {
        "masked": lambda: attention(q, k, v, mask_BTK=mask_BTK),
        "causal": lambda: attention(q, k, v),
        "padded": lambda: _padded(q, k, v, Packing.of(ENDS, CPU), 0.25),
    }
    expected, real = ways[attend](), F.scaled_dot_product_attention

    def transposed(*args, **options):
        return real(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert torch.equal(ways[attend](), expected)


def test_what_one_graph_serves():
    assert packs_in_one_graph(CPU, torch.float32)


@ON_GPU
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [4, 2])
def test_packed_on_the_gpu(dtype, groups):
    device = torch.device("cuda")
    check(lambda q, k, v: attention(q, k, v, packing=Packing.of(ENDS, device)), dtype, device, groups)


@ON_GPU
def test_a_gpu_compiles_once_where_it_has_flash_attention():
    device = torch.device("cuda")
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert [packs_in_one_graph(device, dtype) for dtype in HALF] == [ampere] * 2
    assert not packs_in_one_graph(device, torch.float32)


@pytest.mark.parametrize("how", ["causal", "masked", "packed"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_scale_is_kept_on_every_way(how, groups):
    """Some architectures have another than one over the root of the head's size."""
    q, k, v = (x.detach() for x in some_heads(groups=groups))
    length = q.shape[2]
    way = {
        "causal": {},
        "masked": {"mask_BTK": torch.ones(1, length, length, dtype=torch.bool).tril()},
        "packed": {"packing": Packing.of(torch.tensor([length]), CPU)},
    }[how]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, 0.7, **way), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(attention(q, k, v, **way), expected, atol=1e-2)
