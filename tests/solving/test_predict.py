import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
from plain_decoding import with_short_replies
from toys import TOY, flip_task, grid, random_grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.answers.vote import choose_attempts
from arc_solver.config import FormatConfig, PredictConfig, VoteConfig
from arc_solver.decoding.engine import DecodingStats, Reply, ReplyScore, SearchResult, needed_context_length
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.models.model import Model, new_model
from arc_solver.puzzles.augment import ColourPolicy, spread_augmentations
from arc_solver.puzzles.encode import END, INPUT, decode_reply, encode_prompt, encode_reply
from arc_solver.puzzles.tasks import freeze, grid_key, same_grid
from arc_solver.rng import named_rng
from arc_solver.solving.predict import predict, predict_tasks

FORMAT = FormatConfig()


class Mirror:
    """An engine that knows the rule of `flip_task` in every view: it mirrors the test input it is shown.

    Of a turned view it sees a turned mirror axis, so it looks at the demonstration for it. It also finds the unchanged
    test input, with half the probability. Every other reply scores minus its length.
    """

    format = FORMAT

    def __init__(self, context: int = 32_768):
        self.context_length, self.prompts, self.drafts, self.scored = context, [], {}, 0

    @contextmanager
    def open_session(self, prompts, adapters):
        assert len(prompts) == len(adapters)
        self.prompts, self.adapters, self.cost = prompts, adapters, DecodingStats(forward_steps=7)
        yield self

    def generate(self, rows, drafts=None):
        self.drafts |= {i: tuple(map(tuple, of_row)) for i, of_row in (drafts or {}).items()}
        return [Reply(self.answers(self.prompts[i])[0], -1.0 - i) for i in rows]

    def search(self, threshold, max_nodes):
        found = []
        for i, prompt in enumerate(self.prompts):
            first, second = self.answers(prompt)
            replies = (Reply(first, -1.0 - i), Reply(second, -1.0 - i - math.log(2)))
            found.append(SearchResult(tuple(r for r in replies if threshold < 0.9), i > 0))
        return found

    def score(self, replies):
        assert len(replies) == len(self.prompts)
        self.scored += 1
        return [[ReplyScore(-float(len(ids)), 0) for ids in of_prompt] for of_prompt in replies]

    def answers(self, prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ids = prompt.ids_T.tolist()
        grids, start = [], 0
        for i, token in enumerate(ids):
            if token in (11, 12):
                start = i + 1
            nxt = ids[i + 1] if i + 1 < len(ids) else None
            if nxt in (11, 12, END) and token not in (11, 12, END):
                grids.append(decode_reply([*ids[start : i + 1], END], FORMAT))
        *demonstrations, test = grids
        flips = [lambda g: g[:, ::-1], lambda g: g[::-1]]
        fits = [
            all(same_grid(flip(a), b) for a, b in zip(demonstrations[::2], demonstrations[1::2], strict=True))
            for flip in flips
        ]
        answer = freeze(np.ascontiguousarray(flips[fits.index(True)](test)))
        return tuple(encode_reply(answer, FORMAT).tolist()), tuple(encode_reply(test, FORMAT).tolist())


class Behind(Mirror):
    """It answers with the mirrored input, the unchanged one, and the half turned one, which is so far behind those."""

    def __init__(self, nats: float):
        super().__init__()
        self.nats = nats

    def generate(self, rows, drafts=None):
        return [Reply(self.three_answers(self.prompts[i])[i if i < 3 else 0], -1.0) for i in rows]

    def score(self, replies):
        nats = (-1.0, -2.0, -2.0 - self.nats)
        known = [dict(zip(self.three_answers(prompt), nats, strict=True)) for prompt in self.prompts]
        return [[ReplyScore(of[tuple(ids)], 0) for ids in mine] for of, mine in zip(known, replies, strict=True)]

    def three_answers(self, prompt):
        first, second = self.answers(prompt)
        turned = np.ascontiguousarray(decode_reply(second, FORMAT)[::-1, ::-1])
        return first, second, tuple(encode_reply(turned, FORMAT).tolist())


def plain(views, **settings):
    return PredictConfig(**{"views": views, "drafts": False, "score": False, **settings})


@pytest.mark.parametrize("tests", [1, 3])
def test_answers_come_back_undone(tests, rng):
    """Whatever the view, a right answer in the view is the right answer of the task."""
    task = flip_task(rng, tests=tests)
    for config in (plain(16), PredictConfig(views=16)):
        found = predict(task, Mirror(), None, config, named_rng(0))
        assert [c.test for c in found.candidates] == list(range(tests))
        for candidate in found.candidates:
            assert same_grid(candidate.grid, task.test[candidate.test][:, ::-1])
            assert candidate.views == tuple(range(16))
            assert candidate.searched == ()
            assert None not in candidate.log_probabilities
        assert sorted(found.geometries) == sorted([*range(8)] * 2)
        assert found.cost["forward_steps"] == 7


def test_drafts_are_the_leaders_answers_in_each_view(rng):
    task = flip_task(rng, tests=2)
    engine = Mirror()
    predict(task, engine, None, PredictConfig(views=10, leaders=3, score=False), named_rng(0))
    assert sorted(engine.drafts) == list(range(10 * 2))
    assert all(engine.drafts[i] == () for i in range(3 * 2))
    for i in range(3 * 2, 10 * 2):
        assert engine.drafts[i] == (engine.answers(engine.prompts[i])[0],) * 3


def test_what_the_search_finds_is_a_candidate(rng):
    task = flip_task(rng)
    engine = Mirror()
    found = predict(task, engine, None, plain(6, threshold=0.1), named_rng(0))
    right, unchanged = found.candidates
    assert right.views == right.searched == unchanged.searched == tuple(range(6))
    assert unchanged.views == ()
    assert same_grid(unchanged.grid, task.test[0])
    assert unchanged.log_probabilities == pytest.approx([-1.0 - i - math.log(2) for i in range(6)])
    assert found.capped == 1
    assert engine.scored == 0
    assert len(predict(task, engine, None, plain(6, threshold=0.95), named_rng(0)).candidates) == 1


def test_scores_are_of_every_candidate_in_every_view(rng):
    task = flip_task(rng)
    found = predict(task, Mirror(), None, plain(8, threshold=0.1, score=True), named_rng(0))
    assert len(found.candidates) == 2
    for candidate in found.candidates:
        turned = [
            candidate.grid.T if geometry % 4 % 2 != geometry // 4 else candidate.grid for geometry in found.geometries
        ]
        assert candidate.log_probabilities == tuple(-float(len(encode_reply(cells, FORMAT))) for cells in turned)


@pytest.mark.parametrize(("nats", "views"), [(5.1, 4), (4.9, 8), (2.6, 8), (2.4, 16), (0.62, 32)])
def test_what_is_far_behind_the_second_best_is_scored_in_no_more_views(nats, views, rng):
    """It is looked at after 4, 8 and 16 views, and 20 nats are far."""
    task = flip_task(rng)
    for more, expected in (({}, views), ({"score_all": True}, 32)):
        found = predict(task, Behind(nats), None, PredictConfig(views=32, drafts=False, **more), named_rng(0))
        scored = [[v for v, p in enumerate(c.log_probabilities) if p is not None] for c in found.candidates]
        assert scored == [[*range(32)], [*range(32)], [*range(expected)]]


def test_not_scoring_all_changes_no_attempt_and_no_score(rng):
    model = with_short_replies(Model(new_model(TOY, FORMAT, seed=1).lm.eval(), FORMAT, None))
    task, engine = flip_task(rng, tests=2), TorchEngine(model, 10_000)
    few, every = (
        predict(task, engine, None, PredictConfig(views=64, score_all=all_), named_rng(0)) for all_ in (False, True)
    )
    attempts = [choose_attempts(found, task, VoteConfig(rule="product")) for found in (few, every)]
    assert all(same_grid(a, b) for x, y in zip(*attempts, strict=True) for a, b in zip(x, y, strict=True))
    scores = [np.array([c.log_probabilities for c in found.candidates], dtype=float) for found in (few, every)]
    left_out = np.isnan(scores[0])
    assert 0.1 < left_out.mean() < 1
    assert not np.isnan(scores[1]).any()
    assert scores[0][~left_out] == pytest.approx(scores[1][~left_out], abs=1e-3)


def test_tasks_together_are_as_each_alone(rng):
    model = with_short_replies(Model(new_model(TOY, FORMAT, seed=1).lm.eval(), FORMAT, None))
    tasks = [flip_task(rng, f"task{i}", tests=1 + i % 2) for i in range(3)]
    config = PredictConfig(views=5, leaders=2, threshold=0.3)
    engine = TorchEngine(model, 10_000)
    alone = [predict(task, engine, None, config, named_rng(0, task.id)) for task in tasks]
    together = predict_tasks(tasks, engine, [None] * 3, config, [named_rng(0, task.id) for task in tasks])
    for one, other in zip(alone, together, strict=True):
        assert one.geometries == other.geometries
        assert [grid_key(c.grid) for c in one.candidates] == [grid_key(c.grid) for c in other.candidates]
        for a, b in zip(one.candidates, other.candidates, strict=True):
            assert (a.test, a.views, a.searched) == (b.test, b.views, b.searched)
            assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-3)


def test_drafts_change_no_candidate(rng):
    model = with_short_replies(Model(new_model(TOY, FORMAT, seed=1).lm.eval(), FORMAT, None))
    task, engine = flip_task(rng), TorchEngine(model, 10_000)
    found = [
        predict(task, engine, None, PredictConfig(views=8, drafts=drafts, leaders=1), named_rng(0))
        for drafts in (False, True)
    ]
    for a, b in zip(*(predictions.candidates for predictions in found), strict=True):
        assert grid_key(a.grid) == grid_key(b.grid)
        assert a.views == b.views
        assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-3)
    assert found[1].cost["drafted"] > found[0].cost["drafted"] == 0


def test_long_prompts_lose_demonstrations_but_not_the_last(rng):
    task, engine = flip_task(rng, demonstrations=4), Mirror()
    found = predict(task, engine, None, plain(2, max_tokens=1), named_rng(0))
    assert all((prompt.ids_T == INPUT).sum() == 2 for prompt in engine.prompts)
    assert found.dropped == 3
    found = predict(task, engine, None, plain(2), named_rng(0))
    assert all((prompt.ids_T == INPUT).sum() == 5 for prompt in engine.prompts)
    assert found.dropped == 0


def test_prompts_and_replies_fit_the_context(rng):
    task = flip_task(rng, demonstrations=4)
    needed = needed_context_length(encode_prompt(task.train, task.test[0], FORMAT), FORMAT)
    assert predict(task, Mirror(needed), None, plain(2), named_rng(0)).dropped == 0
    assert predict(task, Mirror(needed - 1), None, plain(2), named_rng(0)).dropped == 1
    assert predict(task, Mirror(needed - 1), None, plain(2), named_rng(0)).too_long == 0
    nowhere = predict(task, Mirror(10), None, plain(2), named_rng(0))
    assert (nowhere.dropped, nowhere.too_long) == (3, 2)


def test_the_first_view_is_the_task_itself(rng):
    task, engine = flip_task(rng), Mirror()
    predict(task, engine, None, plain(3), named_rng(0))
    assert engine.prompts[0].ids_T.tolist() == encode_prompt(task.train, task.test[0], FORMAT).ids_T.tolist()
    views = spread_augmentations(3, named_rng(0), ColourPolicy(PredictConfig().keep_background), task.train)
    seen = views[2].apply_task(task)
    assert engine.prompts[2].ids_T.tolist() == encode_prompt(seen.train, seen.test[0], FORMAT).ids_T.tolist()


def test_predictions_survive_json(rng):
    candidate = Candidate(1, random_grid(rng), (0, 2), (1,), (-0.123456, None, -3.0))
    predictions = Predictions((0, 5, 3), (candidate,), dropped=2, too_long=3, capped=1, cost={"tokens": 5})
    again = Predictions.from_json(json.loads(json.dumps(predictions.to_json())))
    assert again.to_json() == predictions.to_json()
    assert (again.geometries, again.dropped, again.too_long) == ((0, 5, 3), 2, 3)
    assert (again.capped, again.cost) == (1, {"tokens": 5})
    assert grid_key(again.candidates[0].grid) == grid_key(candidate.grid)
    assert again.candidates[0].log_probabilities == (-0.123456, None, -3.0)


def test_two_rounds_are_joined_under_the_views_of_both():
    same, other = grid("12"), grid("3")
    first = Predictions((0, 4), (Candidate(0, same, (0,), (1,), (-1.0, -2.0)),), cost={"tokens": 5})
    second = Predictions((1,), (Candidate(0, other, (0,), (), (-4.0,)), Candidate(0, same, (), (0,), (-3.0,))), 2, 1, 1)
    both = first.merged_with(second)
    assert (both.geometries, both.dropped, both.too_long, both.capped) == ((0, 4, 1), 2, 1, 1)
    found = [(c.grid.tolist(), c.views, c.searched, c.log_probabilities) for c in both.candidates]
    assert found == [([[1, 2]], (0,), (1, 2), (-1.0, -2.0, -3.0)), ([[3]], (2,), (), (None, None, -4.0))]


def test_predictions_do_not_see_test_outputs(tmp_path, rng):
    """The same task file with other test outputs: the same candidates, to the bit."""
    from arc_solver.config import TasksConfig
    from arc_solver.puzzles.task_files import load_tasks

    task, model = flip_task(rng), with_short_replies(new_model(TOY, FORMAT, seed=1))
    found = []
    for answer in ([[1]], [[7, 7], [7, 7]]):
        content = {
            "train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in task.train],
            "test": [{"input": task.test[0].tolist(), "output": answer}],
        }
        (tmp_path / "aa.json").write_text(json.dumps(content))
        (loaded,) = load_tasks(TasksConfig(spec=str(tmp_path / "aa.json"))).tasks
        predictions = predict(loaded, TorchEngine(model, 10_000), None, PredictConfig(views=2), named_rng(0))
        found.append(predictions.to_json())
    assert found[0] == found[1]
