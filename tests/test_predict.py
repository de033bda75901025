import json

import numpy as np
import pytest
from conftest import TOY, flip_task, hasty, random_grid

from arc_solver.augment import ColourPolicy, spread_augmentations
from arc_solver.config import FormatConfig, PredictConfig, named_rng
from arc_solver.encode import INPUT, decode_reply, encode_prompt, encode_reply
from arc_solver.engine import Reply, TorchEngine
from arc_solver.model import new_model
from arc_solver.predict import Candidate, predict
from arc_solver.tasks import freeze, grid_key, same_grid


class Mirror:
    """An engine that knows the rule of `flip_task` in every view: it mirrors the test input it is shown.

    Of a turned view it sees a turned mirror axis, so it looks at the demonstration for it.
    """

    class model:
        format = FormatConfig()

    def __init__(self):
        self.prompts = []

    def generate(self, prompts, adapter):
        self.prompts = prompts
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt) -> Reply:
        from arc_solver.encode import END

        ids = prompt.ids_T.tolist()
        grids, start = [], 0
        for i, token in enumerate(ids):
            if token in (11, 12):
                start = i + 1
            nxt = ids[i + 1] if i + 1 < len(ids) else None
            if nxt in (11, 12, END) and token not in (11, 12, END):
                grids.append(decode_reply([*ids[start : i + 1], END], FormatConfig()))
        *demonstrations, test = grids
        flips = [lambda g: g[:, ::-1], lambda g: g[::-1]]
        fits = [
            all(same_grid(flip(a), b) for a, b in zip(demonstrations[::2], demonstrations[1::2], strict=True))
            for flip in flips
        ]
        answer = freeze(np.ascontiguousarray(flips[fits.index(True)](test)))
        return Reply(tuple(encode_reply(answer, FormatConfig()).tolist()), -1.0)


@pytest.mark.parametrize("tests", [1, 3])
def test_answers_come_back_undone(tests, rng):
    """Whatever the view, a right answer in the view is the right answer of the task."""
    task = flip_task(rng, tests=tests)
    candidates = predict(task, Mirror(), None, PredictConfig(views=16), named_rng(0))
    assert [(c.test, c.view) for c in candidates] == [(t, v) for t in range(tests) for v in range(16)]
    for candidate in candidates:
        assert same_grid(candidate.grid, task.test[candidate.test][:, ::-1])


def test_long_prompts_lose_demonstrations_but_not_the_last(rng):
    task, engine = flip_task(rng, demonstrations=4), Mirror()
    predict(task, engine, None, PredictConfig(views=2, max_tokens=1), named_rng(0))
    assert all((prompt.ids_T == INPUT).sum() == 2 for prompt in engine.prompts)
    predict(task, engine, None, PredictConfig(views=2), named_rng(0))
    assert all((prompt.ids_T == INPUT).sum() == 5 for prompt in engine.prompts)


def test_the_first_view_is_the_task_itself(rng):
    task, engine = flip_task(rng), Mirror()
    predict(task, engine, None, PredictConfig(views=3), named_rng(0))
    assert engine.prompts[0].ids_T.tolist() == encode_prompt(task.train, task.test[0], FormatConfig()).ids_T.tolist()
    views = spread_augmentations(3, named_rng(0), ColourPolicy(PredictConfig().keep_background), task.train)
    seen = views[2].apply_task(task)
    assert engine.prompts[2].ids_T.tolist() == encode_prompt(seen.train, seen.test[0], FormatConfig()).ids_T.tolist()


def test_candidates_survive_json(rng):
    candidate = Candidate(1, 2, random_grid(rng), -0.123456)
    again = Candidate.from_json(json.loads(json.dumps(candidate.to_json())))
    assert grid_key(again.grid) == grid_key(candidate.grid)
    assert (again.test, again.view, again.log_probability) == (1, 2, -0.123456)


def test_predictions_do_not_see_test_outputs(tmp_path, rng):
    """The same task file with other test outputs: the same candidates, to the bit."""
    from arc_solver.tasks import TasksConfig, load_tasks

    task, model = flip_task(rng), hasty(new_model(TOY, FormatConfig(), seed=1))
    found = []
    for answer in ([[1]], [[7, 7], [7, 7]]):
        content = {
            "train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in task.train],
            "test": [{"input": task.test[0].tolist(), "output": answer}],
        }
        (tmp_path / "aa.json").write_text(json.dumps(content))
        (loaded,) = load_tasks(TasksConfig(spec=str(tmp_path / "aa.json"))).tasks
        candidates = predict(loaded, TorchEngine(model, 10_000), None, PredictConfig(views=2), named_rng(0))
        found.append([c.to_json() for c in candidates])
    assert found[0] == found[1]
