"""Answers from vLLM, in this process: the same ids and log-probabilities as `TorchEngine`, many rows at a time.

vLLM knows nothing of which id is legal where. It is asked for greedy continuations among all ids that are ever legal,
and reports the log-probabilities of all of these at every place. They go into a tree of what is known under a prompt,
whose paths are followed id by id as replies come in; a reply that leaves the paths wanted is aborted, and the paths
that it missed are asked for. Greedy decoding, threshold search and scoring differ only in which paths they want.

vLLM counts positions by itself, so models with grid positions are not for it. Adapters are read from files, by a name,
path and id that are never used twice: vLLM's prefix cache tells adapters apart by name and path, not by content.
"""

import importlib.metadata
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from ..config import EngineConfig, FormatConfig
from ..errors import MachineError, UserError, first_line, install_command
from ..models import Adapter, Model, save_adapter
from ..models.kv_cache import bytes_per_token
from ..puzzles import COLOURS, END, MAX_SIDE, NEWLINE, NUMBER, VOCABULARY, Prompt, longest_reply
from .drafter import Drafter
from .engine import DecodingStats, Drafts, Reply, ReplyScore, SearchResult
from .search import common_prefix_length, greedy_reply, score_reply
from .token_tree import Grammar, TokenTree

SETTINGS = {  # read when vllm is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: no workers to start, and none left behind
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for; adapters are padded to one
OURS = {  # what vLLM's complaints name, and the setting that it comes from
    "kv cache": "engine.kv_cache_gib",
    "max_num_batched_tokens": "engine.step_tokens",
    "max_num_seqs": "engine.max_sequences",
    "max_loras": "engine.max_loras",
    "max_model_len": "predict.max_tokens",
}
STREAM = 16  # ids between two reports on a reply: what may be decoded in vain, against work for every report
PROBE = tuple(range(16))  # the ids by which an adapter is seen to change something


class VLLMEngine:
    """Decodes with vLLM on the model's device, which then holds the weights twice.

    One of them for a process: when vLLM frees an engine, it takes down what others of the process have set up.

    Args:
        model: what is asked, as far as it says how its adapters must look; its weights are read from `model_dir`.
        like: an adapter with the rank and the layers of those to come; None: there will be none.
        context: the most ids that a prompt and its reply may have together; less if the model was made for less.
        called: what the user calls the model; "": as its folder.

    Raises:
        UserError: vLLM is not installed, or cannot serve this model.
    """

    def __init__(
        self,
        model: Model,
        model_dir: Path,
        config: EngineConfig,
        like: Adapter | None = None,
        context_length: int = 8192,
        called: str = "",
    ):
        check_positions(model.format)
        self.format = model.format
        self.context_length = min(context_length, model.lm.config.max_position_embeddings)
        needed = self.context_length * bytes_per_token(model) / 2**30  # GiB
        if needed > config.kv_cache_gib:
            raise UserError(
                f"a prompt and its reply may take {needed:.3g} GiB of keys and values, and engine.kv_cache_gib is"
                f" {config.kv_cache_gib:.3g}: make that larger, or predict.max_tokens smaller"
            )
        self.layers = {n: tuple(m.weight.shape) for n, m in model.lm.named_modules() if isinstance(m, nn.Linear)}
        self.targets = {name.rpartition(".")[2] for name in like.weights} if like else set()
        self.rank = rank_served(like.rank) if like else 0
        self.alphabet = _alphabet(model.format)
        self._vllm = import_vllm()
        self._selective = _selective(self._vllm)
        try:
            self._llm = self._start(model, model_dir, config)
        except ValueError as error:
            raise UserError(refusal(error, model_dir, called or str(model_dir))) from error
        self.deadline = math.inf
        self.on_step: Callable[[int], None] = lambda tokens: None
        self._names = count(1)  # of adapters and requests
        self._probed_bare: np.ndarray | None = None

    def _start(self, model: Model, model_dir: Path, config: EngineConfig) -> Any:
        on_cpu = model.device.type == "cpu"
        if model.device.index:
            n = model.device.index
            raise UserError(f"vLLM takes the first GPU it sees: use CUDA_VISIBLE_DEVICES={n} and run.device=cuda")
        lora = {
            "enable_lora": True,
            "max_loras": config.max_loras,
            "max_lora_rank": self.rank,
            # Without this vLLM wraps lm_head too, and then fails over log-probabilities of prompts (CPU, 0.32).
            "lora_target_modules": sorted(self.targets),
        }
        with _quietly():
            return self._vllm.LLM(
                str(model_dir),
                dtype=str(model.lm.dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                generation_config="vllm",  # its own defaults, whatever the checkpoint suggests
                enforce_eager=on_cpu,  # on a GPU, LoRA without CUDA graphs is very slow
                max_model_len=self.context_length,
                max_num_seqs=config.max_sequences,
                max_num_batched_tokens=config.step_tokens,
                kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
                gpu_memory_utilization=0.01,  # else vLLM wants 92% of the GPU free first
                max_logprobs=-1,
                use_tqdm_on_load=False,
                **({} if self._selective else {"stream_interval": STREAM}),
                **({"block_size": 32} if on_cpu else {}),  # ids that the prefix cache shares at a time; 128 by default
                **(lora if self.targets else {}),
            )

    @contextmanager
    def open_session(self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]) -> Iterator["VLLMSession"]:
        """Takes prompts, each with the adapter that it is answered under, until the context is left.

        Raises:
            UserError: an adapter is for another model.
            MachineError: vLLM loads an adapter and ignores it.
        """
        distinct = {id(adapter): adapter for adapter in adapters if adapter}
        # vLLM's CPU kernels give a row without an adapter, index -1, that of the last slot.
        assert not distinct or None not in adapters, "prompts with and without an adapter cannot share a session"
        for adapter in distinct.values():
            self._check(adapter)
        in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        loaded: dict[int, Any] = {}
        with TemporaryDirectory(prefix="arc_solver-", dir=in_memory) as folder:
            try:
                for key, adapter in distinct.items():
                    loaded[key] = self._export(adapter, Path(folder))
                    self._probe(adapter, loaded[key])
                session = VLLMSession(self, prompts, [loaded.get(id(adapter)) for adapter in adapters])
                try:
                    yield session
                finally:
                    session.close()
            finally:
                for request in loaded.values():
                    self._llm.llm_engine.remove_lora(request.lora_int_id)

    def _check(self, adapter: Adapter) -> None:
        for name, (a, b) in adapter.weights.items():
            shape = (len(b), a.shape[1])
            if self.layers.get(name) != shape:
                raise UserError(f"the adapter is for another model: it has a {shape[0]} x {shape[1]} layer {name}")
            if name.rpartition(".")[2] not in self.targets:
                raise UserError(f"the adapter changes {name}, and the engine was made for {sorted(self.targets)}")
        if adapter.rank > self.rank:
            raise UserError(f"the adapter has rank {adapter.rank}, and the engine was made for {self.rank} at most")

    def _export(self, adapter: Adapter, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        number = next(self._names)
        save_adapter(adapter, folder / f"adapter-{number}")
        return LoRARequest(f"adapter-{number}", number, str(folder / f"adapter-{number}"))

    def _probe(self, adapter: Adapter, request: Any) -> None:
        """vLLM loads an adapter whose names it does not know without a word, and answers as the bare model."""
        if not any(b.any() for _, b in adapter.weights.values()):
            return  # a fresh one, which changes nothing
        if self._probed_bare is None:
            self._probed_bare = self._logprobs_of_probe(None)
        if np.array_equal(self._logprobs_of_probe(request), self._probed_bare):
            raise MachineError(
                f"vLLM ignores the adapter, log-probabilities are the same with and without it: {min(adapter.weights)}"
                " is not what it calls the layer; use engine.kind=torch"
            )

    def _logprobs_of_probe(self, request: Any) -> np.ndarray:
        """Alone in a batch, so that nothing but the adapter can make a difference. [T - 1, V]"""
        name = self.add(PROBE, self.scoring(read_cache=False), request)
        while True:
            for output in self.step():
                if output.request_id == name:
                    return np.stack([_row(output.prompt_logprobs, t) for t in range(1, len(PROBE))])

    # ---- what a session asks of vLLM ----

    def add(self, ids: Iterable[int], params: Any, adapter: Any) -> str:
        """Hands in a request, and returns its name."""
        name = str(next(self._names))
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(ids)}, params, lora_request=adapter)
        return name

    def step(self) -> list[Any]:
        """One forward pass. vLLM's outputs of requests that have something to report."""
        try:
            return self._llm.llm_engine.step()
        finally:
            self.on_step(0)  # it is alive; a session says which ids went through

    def abort(self, names: Iterable[str]) -> None:
        self._llm.llm_engine.abort_request(list(names))

    def continuing(self, most: int) -> Any:
        """Parameters of a request for up to `most` ids."""
        return self._params(max_tokens=most, **({"stream_interval": STREAM} if self._selective else {}))

    def scoring(self, read_cache: bool) -> Any:
        """Parameters of a request for the log-probabilities along the prompt, and of the next id.

        Args:
            read_cache: take what was computed before. vLLM then says nothing about those places, or worse: garbage.
        """
        return self._params(max_tokens=1, prompt_logprobs=-1, skip_reading_prefix_cache=not read_cache)

    def _params(self, **settings: Any) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return self._vllm.SamplingParams(
            temperature=0,
            detokenize=False,
            allowed_token_ids=self.alphabet,
            # All under the unrestricted softmax: vLLM's "raw_logprobs".
            **({"logprob_token_ids": self.alphabet} if self._selective else {"logprobs": -1}),
            flat_logprobs=True,
            stop_token_ids=[END],
            output_kind=RequestOutputKind.DELTA,
            **settings,
        )


@dataclass(frozen=True)
class _Tip:
    """A place that is to become known: a node of a prompt's tree."""

    row: int
    node: int
    log_probability: float = 0.0  # of the ids up to there, where the search needs it


class VLLMSession:
    """An `engine.Session`. Where the engine's deadline came first, replies have no END and scores are NaN."""

    def __init__(self, engine: VLLMEngine, prompts: Sequence[Prompt], adapters: Sequence[Any]):
        self.cost = DecodingStats()
        self._engine, self._adapters = engine, adapters
        grammar = Grammar(engine.format)
        self._trees = [TokenTree(prompt, grammar, engine.context_length) for prompt in prompts]
        self._answered: set[int] = set()
        self._pending: set[str] = set()  # requests that vLLM has not reported on
        self._open: set[str] = set()  # requests that vLLM has not finished

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Drafts] | None = None) -> list[Reply]:
        """The greedy replies to these of the prompts, in the order of `rows`, among the ids that are legal.

        Args:
            drafts: by row, guesses of the reply. What is likely by them is scored first, and decoding goes on where
                that goes wrong.
        """
        asked = [row for row in dict.fromkeys(rows) if not self._trees[row].advance()]
        guesses = {row: self._guess(row, of_row) for row in asked if drafts and (of_row := drafts.get(row))}
        self._evaluate((row, ids) for row, (_, ids) in guesses.items())

        def follow(tip: _Tip) -> list[_Tip]:
            tree = self._trees[tip.row]
            return [] if tree.advance() else [_Tip(tip.row, tree.path[-1])]

        self._explore([_Tip(row, self._trees[row].path[-1]) for row in asked], follow)
        replies = {row: greedy_reply(self._trees[row]) for row in dict.fromkeys(rows)}
        for row, (start, ids) in guesses.items():
            self.cost.drafted += len(ids) - start
            self.cost.accepted += max(0, common_prefix_length(ids, replies[row].ids) - start)
        for row in replies.keys() - self._answered:
            tree = self._trees[row]
            if tree.ended(tree.path[-1]) or not self._room(_Tip(row, tree.path[-1])):
                self.cost.decoded += len(replies[row].ids)
                self._answered.add(row)
        return [replies[row] for row in rows]

    def search(self, threshold: float, max_nodes: int) -> list[SearchResult]:
        """For every prompt, the legal replies of probability `threshold` or more; `max_nodes` ids at most are tried."""
        assert threshold > 0, threshold
        least = math.log(threshold)
        found: list[list[Reply]] = [[] for _ in self._trees]
        tried = [0] * len(self._trees)
        ended: set[int] = set()  # rows whose search the cap ended, or the deadline

        def follow(tip: _Tip) -> list[_Tip]:
            tree = self._trees[tip.row]
            totals_V = tip.log_probability + tree.log_probabilities_NV[tip.node].astype(np.float64)
            tips = []
            for token in np.flatnonzero(tree.grammar.legal_SV[tree.states[tip.node]] & (totals_V >= least)).tolist():
                if tried[tip.row] == max_nodes:
                    ended.add(tip.row)
                    break
                tried[tip.row] += 1
                node = tree.child(tip.node, token)
                if node is not None and tree.ended(node):
                    found[tip.row].append(Reply(tree.ids_to(node), float(totals_V[token])))
                elif node is not None:
                    tips.append(_Tip(tip.row, node, float(totals_V[token])))
            return tips

        ended |= {tip.row for tip in self._explore([_Tip(row, 0) for row in range(len(self._trees))], follow)}
        in_order = [sorted(replies, key=lambda reply: (-reply.log_probability, reply.ids)) for replies in found]
        return [SearchResult(tuple(replies), row not in ended) for row, replies in enumerate(in_order)]

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[ReplyScore]]:
        """For every prompt, its own list of replies (with END) scored; what is known already costs nothing."""
        self._evaluate((row, tuple(ids)) for row, mine in enumerate(replies) for ids in mine)
        return [[score_reply(tree, ids) for ids in mine] for tree, mine in zip(self._trees, replies, strict=True)]

    def close(self) -> None:
        """Nothing of it is left in vLLM, even if it was left in the middle."""
        self._abort(self._open)

    def _guess(self, row: int, drafts: Drafts) -> tuple[int, tuple[int, ...]]:
        """How many ids of the reply are known, and how it is likely to go on from there, those ids included."""
        tree = self._trees[row]
        tip = tree.path[-1]
        return tree.depths[tip], tree.ids_to([tip, *Drafter(tree, drafts).draft(math.inf)][-1])

    def _explore(self, start: list[_Tip], follow: Callable[[_Tip], list[_Tip]]) -> list[_Tip]:
        """Makes places known. For each, `follow` then says which of the places after it are wanted too.

        Returns those that did not become known before the deadline.
        """
        asked: dict[str, _Tip] = {}  # request -> what its next id follows
        self._go_on(start, follow, asked)
        for output in self._outputs(asked):
            tip = asked.pop(output.request_id)
            tree, completion = self._trees[tip.row], output.outputs[0]
            others: list[_Tip] = []
            for i, token in enumerate(completion.token_ids):
                tree.record([tip.node], _row(completion.logprobs, i)[None])
                wanted = follow(tip)
                others += [after for after in wanted if tree.ids[after.node] != token]
                ahead = [after for after in wanted if tree.ids[after.node] == token]
                if not ahead:
                    self._abort([output.request_id])
                    break
                tip = ahead[0]
            else:
                if output.finished:
                    others.append(tip)
                else:
                    asked[output.request_id] = tip
            self._go_on(others, follow, asked)
        return list(asked.values())

    def _go_on(self, tips: list[_Tip], follow: Callable[[_Tip], list[_Tip]], asked: dict[str, _Tip]) -> None:
        """Follows what is known already, and asks vLLM to go on from there."""
        while tips:
            tip = tips.pop()
            tree = self._trees[tip.row]
            if tree.known[tip.node]:
                tips += follow(tip)
            elif room := self._room(tip):
                asked[self._ask(tip.row, tree.ids_to(tip.node), self._engine.continuing(room))] = tip

    def _room(self, tip: _Tip) -> int:
        """How many ids may come after a place at most."""
        tree = self._trees[tip.row]
        longest = min(self._engine.context_length - len(tree.prompt), longest_reply(self._engine.format))
        return longest - tree.depths[tip.node]

    def _evaluate(self, wanted: Iterable[tuple[int, tuple[int, ...]]]) -> None:
        """Makes the places along these replies known, except those of replies that the context has no room for."""
        walks: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for row, ids in wanted:
            nodes = self._trees[row].walk(ids)
            if ids and len(nodes) == len(ids) + 1:
                walks[row, ids] = nodes[:-1]
        # What the prefix cache has, vLLM does not report. That is the prompt, which does not matter, and may be the
        # beginning of a reply, which is known then, or else asked for again without the cache.
        for read_cache in (True, False):
            params = self._engine.scoring(read_cache)
            asked = {
                self._ask(row, ids[:-1], params): (row, nodes)
                for (row, ids), nodes in walks.items()
                if not all(self._trees[row].known[node] for node in nodes)
            }
            for output in self._outputs(asked):
                row, nodes = asked.pop(output.request_id)
                reported = _rows_at_the_end(output, len(nodes))
                self._trees[row].record(nodes[-len(reported) :], reported)

    def _ask(self, row: int, ids: Sequence[int], params: Any) -> str:
        name = self._engine.add([*self._trees[row].prompt.ids_T.tolist(), *ids], params, self._adapters[row])
        self._pending.add(name)
        self._open.add(name)
        return name

    def _outputs(self, asked: Mapping[str, Any]) -> Iterator[Any]:
        """What vLLM reports on these requests, to which others may be added, until none is left or time is up."""
        while asked:
            if time.monotonic() >= self._engine.deadline:
                self._abort(asked)
                return
            self.cost.forward_steps += 1
            before = self.cost.tokens
            for output in self._engine.step():
                name = output.request_id
                if name not in asked:
                    continue
                self.cost.tokens += len(output.outputs[0].token_ids)
                if name in self._pending:  # the last of a request's ids never goes through the model
                    self._pending.remove(name)
                    self.cost.tokens += len(output.prompt_token_ids) - output.num_cached_tokens - 1
                if output.finished:
                    self._open.discard(name)
                yield output
            self._engine.on_step(self.cost.tokens - before)

    def _abort(self, names: Iterable[str]) -> None:
        names = self._open.intersection(names)
        self._open -= names
        self._engine.abort(names)


def _rows_at_the_end(output: Any, most: int) -> np.ndarray:
    """What may follow the last ids of a scoring request, `most` of them or as many as vLLM reports on. [T, V]"""
    along, total = output.prompt_logprobs, len(output.prompt_token_ids)
    # One runner of vLLM leaves cached places out, another has there whatever was in memory; so from the end.
    count = min(most - 1, len(along) - 1, total - 1 - output.num_cached_tokens)
    rows = [_row(along, len(along) - back) for back in range(count, 0, -1)]
    return np.stack([*rows, _row(output.outputs[0].logprobs, 0)])


def _alphabet(format: FormatConfig) -> list[int]:
    """The ids that are legal somewhere in a reply."""
    numbers = range(NUMBER + 1, NUMBER + MAX_SIDE + 1) if format.shape_header or format.row_numbers else ()
    return [*range(COLOURS), NEWLINE, END, *numbers]


def _row(logprobs: Any, place: int) -> np.ndarray:
    """What vLLM says of one place, in its flat form. [V], -inf for ids that it says nothing of."""
    here = slice(logprobs.start_indices[place], logprobs.end_indices[place])
    row_V = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    row_V[logprobs.token_ids[here]] = logprobs.logprobs[here]
    return row_V


def check_positions(format: FormatConfig) -> None:
    """Refuses a format that vLLM cannot be given."""
    if format.positions == "grid":
        raise UserError("vLLM counts positions by itself and this model has grid positions: use engine.kind=torch")


def rank_served(rank: int) -> int:
    """The least rank that vLLM makes room for that is no less than this one."""
    if rank > LORA_RANKS[-1]:
        most = LORA_RANKS[-1]
        raise UserError(
            f"vLLM serves adapters of rank {most} at most, and the adapters' is {rank}: lower adapt.rank, give a"
            " model.adapter of a lower one, or use engine.kind=torch"
        )
    return next(served for served in LORA_RANKS if served >= rank)


def refusal(error: ValueError, model_dir: Path, called: str) -> str:
    """What vLLM's refusal to start comes to. Pydantic's begin with a headline, and end with values and an address."""
    said = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
    said = (said.strip().splitlines() or [type(error).__name__])[0].rstrip(".").replace(str(model_dir), called)
    change = [ours for theirs, ours in OURS.items() if theirs in said.lower()]
    remedy = f"change {' or '.join(change)}, or " if change else ""
    return f"vLLM cannot serve {called} ({said}): {remedy}use engine.kind=torch"


def import_vllm() -> Any:
    """vLLM, set up to run in this process.

    Raises:
        UserError: it is not installed, or made for another PyTorch.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        needed = _torch_needed()
        if needed not in (None, torch.__version__.partition("+")[0]):
            raise ImportError(f"the installed one is for PyTorch {needed}")
        with _quietly():
            import vllm

            vllm.LLM, vllm.SamplingParams  # noqa: B018 # imported when first asked for
        return vllm
    except Exception as error:  # what a library of another PyTorch raises when it is loaded is anyone's guess
        raise UserError(
            f"engine.kind=vllm needs vLLM for PyTorch {torch.__version__} ({first_line(error)}): run"
            f" {install_command('arc_solver[vllm]')}, or use engine.kind=torch"
        ) from error


def _selective(vllm: Any) -> bool:
    """Whether a request may say of which ids it wants log-probabilities, and how often: 0.19, for PyTorch 2.10, gives
    those of all ids, which are not many, and reports at one interval for all."""
    return {"logprob_token_ids", "stream_interval"} <= set(vllm.SamplingParams.__struct_fields__)


@contextmanager
def _quietly() -> Iterator[None]:
    """PyTorch warns vLLM of deprecated names; a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _torch_needed() -> str | None:
    """The version of PyTorch that the installed vLLM pins."""
    for name in ("vllm", "vllm-cpu"):
        try:
            requirements = " ".join(importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:
            continue
        found = re.search(r"\btorch==([\d.]+)", requirements)
        return found[1] if found else None
    return None
