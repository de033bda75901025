"""The protocol of engines: prompts in; continuations and their log-probabilities out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ..config import FormatConfig
from ..models import Adapter
from ..puzzles import Prompt, longest_reply
from ..puzzles.encode import GRID_STRIDE


@dataclass(frozen=True, eq=False)
class Reply:
    """A decoded answer: what follows the prompt, up to and with END."""

    ids: tuple[int, ...]
    log_probability: float  # of all ids together, nats, under the unrestricted softmax


@dataclass(frozen=True, eq=False)
class ReplyScore:
    """The log-probability of a given reply under one prompt."""

    log_probability: float  # of all ids together, nats, under the unrestricted softmax
    agreed: int  # its first ids that greedy decoding takes too


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What the threshold search found for one prompt."""

    replies: tuple[Reply, ...]  # all that are at least as probable as the threshold, the most probable first
    complete: bool  # False: the cap on nodes ended the search, so there may be more


@dataclass
class DecodingStats:
    """Counters of one decoding session: forward passes, tokens, accepted drafts, peak size of the cache."""

    forward_steps: int = 0  # forward passes of a batch
    view_steps: int = 0  # the same, summed over the prompts that took part
    tokens: int = 0  # ids that went through the model, prompts included, padding not
    decoded: int = 0  # ids of greedy replies
    drafted: int = 0  # ids of drafts that were checked
    accepted: int = 0  # and those of them that became part of a reply
    cache_bytes: int = 0  # of keys and values, at most at a time


Drafts = Sequence[Sequence[int]]


class Session(Protocol):
    """Prompts that are being answered. What was computed for them is kept for the next question."""

    cost: DecodingStats

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Drafts] | None = None) -> list[Reply]:
        """The greedy replies to these of the prompts, in the order of `rows`, among the ids that are legal.

        Args:
            drafts: by row, guesses of the reply, or none; with a row here, what else is likely is guessed too. It
                changes how long it takes, and nothing else.
        """

    def search(self, threshold: float, max_nodes: int) -> list[SearchResult]:
        """For every prompt, the legal replies of probability `threshold` or more; `max_nodes` ids at most are tried."""

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[ReplyScore]]:
        """For every prompt, its own list of replies (with END) scored; what is known already costs nothing."""


class Engine(Protocol):
    """What answers prompts: `TorchEngine`, or `vllm_engine.VLLMEngine`."""

    deadline: float  # of `time.monotonic()`; what is not answered by then comes back unfinished
    on_step: Callable[[int], None]  # called after every forward pass, with the ids that went through

    @property
    def format(self) -> FormatConfig: ...

    @property
    def context_length(self) -> int:
        """The number of positions that the model has; see `needed_context_length`."""

    def open_session(
        self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]
    ) -> AbstractContextManager[Session]:
        """Opens a session on these prompts, each with its own adapter or all with none; to be used in a `with`."""


def needed_context_length(prompt: Prompt, format: FormatConfig) -> int:
    """The context in which any legal reply to a prompt fits, in positions."""
    if format.positions == "token":
        return len(prompt) + longest_reply(format)
    return (int(prompt.positions_T[-1]) // GRID_STRIDE + 1) * GRID_STRIDE
