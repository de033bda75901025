"""Predicts tasks: decodes under augmented views, maps replies back to candidates, scores the likely ones in all views.

A few views are decoded first. Their answers, carried into the other views, are the drafts that those verify; they
change no answer, only the time. All questions of a call share one session, so what was computed for one of them is
there for the next: that of scoring above all.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ..answers import Candidate, Predictions
from ..config import FormatConfig, PredictConfig
from ..decoding.engine import Engine, Reply, Session, needed_context_length
from ..models import Adapter
from ..puzzles import Augmentation, ColourPolicy, Grid, Malformed, Prompt, Task, decode_reply, encode_prompt, grid_key
from ..puzzles.augment import spread_augmentations
from ..puzzles.encode import encode_reply

FIRST_VIEWS = 4  # in which all answers are scored
# Nats by which an answer may be less probable, in the views so far, than the second best, and still be scored in more.
MARGIN = 20.0


@dataclass(frozen=True, eq=False)
class ViewPrompt:
    """The prompt of one test input of one task under one view."""

    task: int
    test: int
    view: int
    augmentation: Augmentation
    prompt: Prompt
    dropped: int  # demonstrations that had no room
    fits: bool  # whether the context has room for any reply to what is left

    def grid_of(self, ids: Sequence[int], format: FormatConfig) -> Grid | None:
        """The answer that a reply spells, with the augmentation undone; None: it is no grid."""
        seen = decode_reply(ids, format)
        return None if isinstance(seen, Malformed) else self.augmentation.undo(seen)

    def reply_of(self, grid: Grid, format: FormatConfig) -> list[int]:
        """The reply that spells an answer here."""
        return encode_reply(self.augmentation.apply(grid), format).tolist()


@dataclass(eq=False)
class CandidateBuilder:
    """A distinct answer and the votes and log-probabilities collected for it so far."""

    grid: Grid
    views: list[int] = field(default_factory=list)
    searched: list[int] = field(default_factory=list)
    log_probabilities: dict[int, float] = field(default_factory=dict)  # by view

    def to_candidate(self, test: int, views: int) -> Candidate:
        scores = tuple(self.log_probabilities.get(view) for view in range(views))
        return Candidate(test, self.grid, tuple(self.views), tuple(self.searched), scores)


Answers = dict[bytes, CandidateBuilder]  # by `grid_key`, in the order in which they were found
ByInput = Mapping[tuple[int, int], Answers]  # by task and test


def predict(
    task: Task, engine: Engine, adapter: Adapter | None, config: PredictConfig, rng: np.random.Generator
) -> Predictions:
    """All candidates of one task."""
    return predict_tasks([task], engine, [adapter], config, [rng])[0]


def predict_tasks(
    tasks: Sequence[Task],
    engine: Engine,
    adapters: Sequence[Adapter | None],
    config: PredictConfig,
    rngs: Sequence[np.random.Generator],
) -> list[Predictions]:
    """All candidates of several tasks, which share batches. Replies that are no grid are left out."""
    views = [views_of(task, config, rng) for task, rng in zip(tasks, rngs, strict=True)]
    questions = [q for k, task in enumerate(tasks) for q in _questions(k, task, views[k], engine, config)]
    answers: ByInput = defaultdict(dict)
    capped = np.zeros(len(tasks), dtype=int)
    with engine.open_session([q.prompt for q in questions], [adapters[q.task] for q in questions]) as session:
        for q, reply in zip(questions, _decode(session, questions, engine.format, config), strict=True):
            if answer := _answer(answers, q, reply, engine.format):
                answer.views.append(q.view)
        if config.threshold > 0:
            for q, found in zip(questions, session.search(config.threshold, config.max_nodes), strict=True):
                capped[q.task] += not found.complete
                for reply in found.replies:
                    if answer := _answer(answers, q, reply, engine.format):
                        answer.searched.append(q.view)
        if config.score:
            _score(session, questions, answers, engine.format, config)
        cost = asdict(session.cost)
    return [
        Predictions(
            tuple(view.geometry for view in views[k]),
            tuple(
                answer.to_candidate(test, len(views[k]))
                for test in range(len(task.test))
                for answer in answers[k, test].values()
            ),
            dropped=max(q.dropped for q in questions if q.task == k),
            too_long=sum(not q.fits for q in questions if q.task == k),
            capped=int(capped[k]),
            cost=cost,
        )
        for k, task in enumerate(tasks)
    ]


def views_of(task: Task, config: PredictConfig, rng: np.random.Generator) -> list[Augmentation]:
    """The augmentations under which a task is asked, the task as it is first."""
    policy = ColourPolicy(config.keep_background, config.output_only)
    return spread_augmentations(config.views, rng, policy, task.train)


def _questions(
    k: int, task: Task, views: Sequence[Augmentation], engine: Engine, config: PredictConfig
) -> list[ViewPrompt]:
    """All views of all test inputs, view by view."""
    questions = []
    for v, view in enumerate(views):
        seen = view.apply_task(task)
        for t, test_input in enumerate(seen.test):
            prompt, dropped = _prompt(seen, test_input, engine, config.max_tokens)
            fits = needed_context_length(prompt, engine.format) <= engine.context_length
            questions.append(ViewPrompt(k, t, v, view, prompt, dropped, fits))
    return questions


def _prompt(seen: Task, test_input: Grid, engine: Engine, max_tokens: int) -> tuple[Prompt, int]:
    """A prompt that is too long loses demonstrations from the front, but never the last one. And how many it lost."""
    for dropped in range(len(seen.train)):
        prompt = encode_prompt(seen.train[dropped:], test_input, engine.format)
        if len(prompt) <= max_tokens and needed_context_length(prompt, engine.format) <= engine.context_length:
            break
    return prompt, dropped


def _decode(
    session: Session, questions: Sequence[ViewPrompt], format: FormatConfig, config: PredictConfig
) -> list[Reply]:
    """The greedy reply to each question; with drafts, the leaders' first."""
    if not config.drafts:
        return session.generate(range(len(questions)))
    leaders = {i: q for i, q in enumerate(questions) if q.view < config.leaders}
    followers = {i: q for i, q in enumerate(questions) if q.view >= config.leaders}
    replies = dict(zip(leaders, session.generate([*leaders], dict.fromkeys(leaders, ())), strict=True))
    led: dict[tuple[int, int], list[Grid]] = defaultdict(list)
    for i, q in leaders.items():
        if (grid := q.grid_of(replies[i].ids, format)) is not None:
            led[q.task, q.test].append(grid)
    drafts = {i: [q.reply_of(grid, format) for grid in led[q.task, q.test]] for i, q in followers.items()}
    replies |= zip(followers, session.generate([*followers], drafts), strict=True)
    return [replies[i] for i in range(len(questions))]


def _answer(answers: ByInput, q: ViewPrompt, reply: Reply, format: FormatConfig) -> CandidateBuilder | None:
    """The answer that a reply spells, with what the reply says of its probability; None: it is no grid."""
    grid = q.grid_of(reply.ids, format)
    if grid is None:
        return None
    answer = answers[q.task, q.test].setdefault(grid_key(grid), CandidateBuilder(grid))
    answer.log_probabilities.setdefault(q.view, reply.log_probability)
    return answer


def _score(
    session: Session, questions: Sequence[ViewPrompt], answers: ByInput, format: FormatConfig, config: PredictConfig
) -> None:
    """Log-probabilities of the answers in the views, first in a few and then in twice as many, as far as they matter.

    An answer stays in as long as `_contenders` has it. Where its reply has no room in the context it has none.
    """
    rivals: dict[tuple[int, int], list[CandidateBuilder]] = {key: list(of.values()) for key, of in answers.items()}
    begin, end = 0, config.views if config.score_all else FIRST_VIEWS
    while begin < config.views:
        asked = [rivals.get((q.task, q.test), []) if begin <= q.view < end else [] for q in questions]
        replies = [[q.reply_of(answer.grid, format) for answer in of] for q, of in zip(questions, asked, strict=True)]
        for q, of_question, scores in zip(questions, asked, session.score(replies), strict=True):
            for answer, scored in zip(of_question, scores, strict=True):
                if math.isfinite(scored.log_probability):
                    answer.log_probabilities[q.view] = scored.log_probability
        rivals = {key: _contenders(of, end) for key, of in rivals.items()}
        begin, end = end, 2 * end


def _contenders(answers: Sequence[CandidateBuilder], views: int) -> list[CandidateBuilder]:
    """Those that may still be among the best two by the product over all views, after the first `views` of them."""
    known = [[p for view, p in answer.log_probabilities.items() if view < views] for answer in answers]
    totals = [(len(scores), math.fsum(scores)) for scores in known]  # as selection does: more views come first
    count, total = sorted(totals)[-2:][0]
    return [a for a, own in zip(answers, totals, strict=True) if own >= (count, total - MARGIN)]
