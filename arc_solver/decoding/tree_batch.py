"""Prompts that share a KV cache, and the forward passes over them.

A pass is either causal, over prompts that are not in the cache yet, each with the first chain of ids that is asked
about; or it is over the ids of many trees at once, each of which sees its prompt, its ancestors and itself.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import LoraBank, Model, to_device
from ..models.kv_cache import KvCache, bytes_per_token
from ..puzzles import PAD, longest_reply
from .token_tree import TokenTree

log = logging.getLogger(__name__)

MASK_CELLS = 1 << 25  # queries x keys of a pass with a mask

Asked = dict[int, list[int]]  # row -> nodes of its tree


class TreeBatch:
    """A batch of token trees that share one KV cache; runs the forward passes over their nodes.

    Args:
        trees: one a row.
        adapters: index of each row's adapter in the bank; ascending.
        batch_tokens: rows x ids of the longest of them that go through the model together; a row by itself may be
            longer. Halved when memory runs out.
        on_forward: called after each pass with the number of its rows and of its ids.
    """

    def __init__(
        self,
        model: Model,
        trees: Sequence[TokenTree],
        adapters: Sequence[int],
        bank: LoraBank | None,
        batch_tokens: int,
        on_forward: Callable[[int, int], None],
    ):
        self.model, self.trees, self.bank = model, trees, bank
        self.adapters = np.array(adapters)
        self.batch_tokens, self.on_forward = batch_tokens, on_forward
        self.cache = KvCache(len(trees))

    @property
    def expected_bytes(self) -> int:
        """What the cache takes, about, once greedy decoding is done."""
        longest = max(len(tree.prompt) for tree in self.trees) + longest_reply(self.model.format)
        return max(self.cache.bytes, len(self.trees) * longest * bytes_per_token(self.model))

    def rows(self, rows: Iterable[int]) -> Iterator[tuple[int, TokenTree]]:
        return ((row, self.trees[row]) for row in rows)

    def drop(self) -> None:
        """Frees the cache. What was in it is computed again when it is needed."""
        self.cache = KvCache(len(self.trees))
        for tree in self.trees:
            tree.free_columns_from(0)

    @torch.inference_mode()
    def evaluate(self, asked: Mapping[int, Sequence[int]]) -> None:
        """Runs the model over these nodes, and over their ancestors that are missing from the cache."""
        opening: Asked = {}
        for row, nodes in asked.items():
            tree = self.trees[row]
            if not tree.prompt_is_cached:
                chain = [0]
                for node in tree.nodes_to_run(nodes):
                    if tree.parents[node] != chain[-1]:
                        break
                    chain.append(node)
                opening[row] = chain
        self._in_batches(opening, lambda row: len(self.trees[row].prompt) + len(opening[row]), self._open)
        rest = {row: self.trees[row].nodes_to_run(nodes) for row, nodes in asked.items()}
        rest = {row: nodes for row, nodes in rest.items() if nodes}
        self._in_batches(rest, lambda row: len(rest[row]), self._continue, self._mask_cells)

    def _mask_cells(self, row: int, tokens: int) -> int:
        """Of the mask of so many ids of a row, which attention repeats for each query head of a group."""
        config = self.model.lm.config.get_text_config()
        heads = config.num_attention_heads
        repeats = heads // (getattr(config, "num_key_value_heads", None) or heads)
        return tokens * (self.trees[row].used + tokens) * repeats

    def _in_batches(
        self,
        asked: Asked,
        size: Callable[[int], int],
        run: Callable[[Asked], None],
        cells: Callable[[int, int], int] = lambda row, tokens: 1,
    ) -> None:
        """Longest first, so that memory runs out at once if it does, and rows of a length are together."""
        rows = sorted(asked, key=lambda row: (-size(row), row))
        while rows:
            longest = size(rows[0])
            most_cells = max(cells(row, longest) for row in rows)
            count = max(1, min(self.batch_tokens // longest, MASK_CELLS // most_cells))
            try:
                run({row: asked[row] for row in sorted(rows[:count])})
            except torch.OutOfMemoryError:
                if min(count, len(rows)) == 1:
                    raise
                failed = min(count, len(rows)) * longest
            else:
                rows = rows[count:]
                continue
            self.batch_tokens = failed // 2
            log.warning("out of memory with %d tokens in a batch; going on with %d", failed, self.batch_tokens)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _open(self, asked: Asked) -> None:
        """Prompts, each with a chain of ids after it, in one causal pass. The first of a row's nodes is the prompt."""
        rows = list(asked)
        lengths = [len(self.trees[row].prompt) + len(asked[row]) - 1 for row in rows]
        ids_BT = np.full((len(rows), _rounded(max(lengths))), PAD, dtype=np.int64)
        positions_BT = np.zeros_like(ids_BT)
        for b, row in enumerate(rows):
            tree, chain = self.trees[row], asked[row][1:]
            ids_BT[b, : lengths[b]] = [*tree.prompt.ids_T.tolist(), *(tree.ids[node] for node in chain)]
            positions_BT[b, : lengths[b]] = [
                *tree.prompt.positions_T.tolist(),
                *(tree.positions[node] for node in chain),
            ]
        # Padding is on the right: the real ids never see it, and its columns are overwritten by what comes next.
        places = [(b, range(lengths[b] - len(asked[row]), lengths[b])) for b, row in enumerate(rows)]
        found = self._forward(rows, ids_BT, positions_BT, places, cache=self.cache.for_prefill(rows))
        for row, log_probabilities_TV in zip(rows, found, strict=True):
            tree = self.trees[row]
            tree.assign_prompt_columns()
            tree.assign_columns(asked[row][1:])
            tree.record(asked[row], log_probabilities_TV)
        self.on_forward(len(rows), sum(lengths))

    def _continue(self, asked: Asked) -> None:
        """Nodes of trees whose prompts are in the cache, in one pass."""
        self.cache.compact_to(list(asked))
        rows, device = self.cache.rows, self.model.device
        count, longest = len(rows), _rounded(max(map(len, asked.values())))
        ids_BT = np.full((count, longest), PAD, dtype=np.int64)
        positions_BT = np.zeros_like(ids_BT)
        starts_B = np.array([self.trees[row].used for row in rows])
        prompts_B = np.array([len(self.trees[row].prompt) if self.trees[row].prompt_is_cached else 1 for row in rows])
        seen_BTR = np.zeros((count, longest, int((starts_B - prompts_B).max()) + longest), dtype=bool)
        for b, row in enumerate(rows):
            if nodes := asked.get(row):
                tree = self.trees[row]
                ids_BT[b, : len(nodes)] = [tree.ids[node] for node in nodes]
                positions_BT[b, : len(nodes)] = [tree.positions[node] for node in nodes]
                tree.assign_columns(nodes)
                for t, node in enumerate(nodes):
                    tree.mark_visible(node, seen_BTR[b, t])
        end = _rounded(int(starts_B.max()) + longest)
        columns_BT = to_device(torch.from_numpy(starts_B[:, None] + np.arange(longest)), device)
        mask_BTK = _mask(
            to_device(torch.from_numpy(prompts_B), device), to_device(torch.from_numpy(seen_BTR), device), end
        )
        places = [(rows.index(row), range(len(nodes))) for row, nodes in asked.items()]
        try:
            found = self._forward(
                rows,
                ids_BT,
                positions_BT,
                places,
                cache=self.cache.for_decoding(columns_BT, end),
                mask_BTK=mask_BTK,
            )
        except BaseException:  # their columns were not written
            for row, nodes in asked.items():
                self.trees[row].free_columns_from(self.trees[row].columns[nodes[0]])
            raise
        for (row, nodes), log_probabilities_TV in zip(asked.items(), found, strict=True):
            self.trees[row].record(nodes, log_probabilities_TV)
        self.on_forward(len(asked), sum(map(len, asked.values())))

    def _forward(
        self,
        rows: Sequence[int],
        ids_BT: np.ndarray,
        positions_BT: np.ndarray,
        places: Sequence[tuple[int, range]],
        **attention: Any,
    ) -> list[np.ndarray]:
        """One pass. Log-probabilities of the next id at these places, a row and its columns each, [T, V] each."""
        device = self.model.device
        if self.bank:
            rows_K = np.bincount(self.adapters[rows], minlength=self.bank.count).tolist()
            self.bank.set_rows_per_adapter(rows_K, ids_BT.shape[1])
        rows_N = to_device(torch.tensor([b * ids_BT.shape[1] + t for b, columns in places for t in columns]), device)
        ids, positions = (to_device(torch.from_numpy(x), device) for x in (ids_BT, positions_BT))
        found = torch.log_softmax(self.model.logits(ids, positions, rows=rows_N, **attention), -1).cpu().numpy()
        return np.split(found, np.cumsum([len(columns) for _, columns in places])[:-1])


def _rounded(size: int) -> int:
    """A size that is at least so large, of few that there are: a power of two, or a multiple of 32.

    For every new shape CPU libraries write machine code, and they keep it. In lockstep decoding every step is new.
    """
    return 1 << (size - 1).bit_length() if size <= 32 else -(-size // 32) * 32


def _mask(prompts_B: Tensor, seen_BTR: Tensor, end: int) -> Tensor:
    """Each row's prompt, and what `seen_BTR` says of the columns after it. [B, T, end] bool."""
    after_BK = torch.arange(end, device=prompts_B.device) - prompts_B[:, None]
    seen_BTR = F.pad(seen_BTR, (0, 1))  # one more, never seen: where the columns of shorter prompts end up
    places_BTK = after_BK.clamp(0, seen_BTR.shape[2] - 1)[:, None].expand(-1, seen_BTR.shape[1], -1)
    return (after_BK < 0)[:, None] | seen_BTR.gather(2, places_BTK)
