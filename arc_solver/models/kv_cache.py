"""Keys and values of prompts and of what comes after them.

Rows are as independent as their prompts: each writes its new columns where its own columns end, so columns that are
no longer wanted are overwritten and none is wasted. What a query sees is a matter of the mask.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .attention import to_device
from .model import Model

ROOM = 64  # columns of headroom, at least, when buffers are made or grow


class PassCache(Protocol):
    """What a transformers model calls on its cache (5.0 and later); one object serves one forward pass."""

    def update(self, k_BGTD: Tensor, v_BGTD: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of new ids; gives those that they attend to, [B, G, K, D] each.

        What transformers adds to that differs from version to version, and is for caches of other kinds.
        """

    def get_seq_length(self, layer: int = 0) -> int:
        """Ids before the new ones, of which transformers makes positions and masks. Ours are given, so none are."""


def _index(rows: Sequence[int], device: torch.device) -> slice | Tensor:
    """Rows as an index that is made once, so that no layer waits for it: a slice where they follow each other."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return to_device(torch.tensor(rows), device)


Buffers = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values [B, G, capacity, D]


def bytes_per_token(model: Model) -> int:
    """What the keys and values of one id take, in all layers."""
    config = model.lm.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads  # GPT-NeoX knows no groups
    width = 2 * config.num_hidden_layers * heads * size
    return width * next(model.lm.parameters()).element_size()


class KvCache:
    """The buffers of `count` rows, and a copy of some of the rows while only those go on."""

    def __init__(self, count: int):
        self.count = count
        self.all: Buffers = {}
        self.some: Buffers = {}
        self.rows = list(range(count))  # what a step goes through: all rows, or those that were copied

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for buffers in (self.all, self.some) for pair in buffers.values() for x in pair)

    def for_prefill(self, rows: Sequence[int]) -> PassCache:
        """The cache for one causal prefill pass: stores what it gets as the first columns of these rows."""
        return _Prompts(self, rows)

    def for_decoding(self, columns_BT: Tensor, end: int) -> PassCache:
        """The cache for one decoding pass over `self.rows`: writes these columns, returns the first `end`."""
        return _Step(self, columns_BT, end)

    def compact_to(self, wanted: Sequence[int]) -> None:
        """Shrinks the active rows to a superset of `wanted` that is less than twice as large.

        Copying rows is cheap; going through rows that have nothing to say is not, as attention reads all their columns.
        """
        if set(wanted) <= set(self.rows) and 2 * len(wanted) > len(self.rows):
            return
        self._write_back()
        if 2 * len(wanted) <= self.count:
            self.rows = list(wanted)
            at = _index(self.rows, next(iter(self.all.values()))[0].device)
            self.some = {layer: (k[at].clone(), v[at].clone()) for layer, (k, v) in self.all.items()}

    def _write_back(self) -> None:
        at = _index(self.rows, next(iter(self.some.values()))[0].device) if self.some else slice(0)
        for layer, copies in self.some.items():
            capacity = copies[0].shape[2]
            for buffer, copy in zip(self.buffers(layer, copies[0], capacity, self.all), copies, strict=True):
                buffer[at, :, :capacity] = copy
        self.some, self.rows = {}, list(range(self.count))

    def buffers(self, layer: int, like_BGTD: Tensor, columns: int, among: Buffers) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, with room for so many columns."""
        old = among.get(layer)
        if old is None or old[0].shape[2] < columns:
            capacity = columns + ROOM if old is None else max(columns + ROOM, old[0].shape[2] * 9 // 8)
            count = len(self.rows) if among is self.some else self.count
            _, groups, _, size = like_BGTD.shape
            # Zeros: masked columns must be finite.
            k, v = (like_BGTD.new_zeros(count, groups, capacity, size) for _ in range(2))
            if old is not None:
                k[:, :, : old[0].shape[2]], v[:, :, : old[1].shape[2]] = old
            among[layer] = k, v
        return among[layer]


class _Stateless:
    """What makes positions and masks of a cache's length is not asked for them here: see `PassCache`."""

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class _Prompts(_Stateless):
    def __init__(self, cache: KvCache, rows: Sequence[int]):
        self.cache, self.rows = cache, rows
        self.at: slice | Tensor | None = None

    def update(self, k_BGTD: Tensor, v_BGTD: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        k_BGTD = k_BGTD.to(v_BGTD.dtype)  # a norm may have widened it under autocast
        columns = k_BGTD.shape[2]
        k, v = self.cache.buffers(layer, k_BGTD, columns, self.cache.all)
        if self.at is None:
            self.at = _index(self.rows, k.device)
        k[self.at, :, :columns], v[self.at, :, :columns] = k_BGTD, v_BGTD
        return k_BGTD, v_BGTD


class _Step(_Stateless):
    def __init__(self, cache: KvCache, columns_BT: Tensor, end: int):
        self.cache, self.columns_BT, self.end = cache, columns_BT, end
        self.rows_B1 = torch.arange(len(columns_BT), device=columns_BT.device)[:, None]

    def update(self, k_BGTD: Tensor, v_BGTD: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        k_BGTD = k_BGTD.to(v_BGTD.dtype)
        among = self.cache.some or self.cache.all
        k, v = self.cache.buffers(layer, k_BGTD, self.end, among)
        k[self.rows_B1, :, self.columns_BT] = k_BGTD.transpose(1, 2)
        v[self.rows_B1, :, self.columns_BT] = v_BGTD.transpose(1, 2)
        return k[:, :, : self.end], v[:, :, : self.end]
