"""Candidates -> two attempts -> the submission file and its score, without a model.

In the order of reading; each imports only from those before it:

    candidates  what was answered to a task: every distinct grid, by whom, how probable
    vote        candidates -> two attempts: rules and priors
    comparison  two ways of solving the same tasks, compared
    submission  the submission file: build, validate, score, merge; `bin/score`
    chances     how likely a task is solved, without knowing the solution
    revote      selection again, from the saved candidates of runs
"""

from .candidates import STAGES, Candidate, Predictions
from .revote import best_file, parse_predictions, tasks_of_run
from .submission import (
    Score,
    Submission,
    candidate_grids,
    data_rows,
    first_attempts,
    read_submission,
    score,
    score_of,
    solved_outputs,
    write_submission,
)
from .vote import choose_attempts, rank

__all__ = [
    "STAGES",
    "Candidate",
    "Predictions",
    "Score",
    "Submission",
    "best_file",
    "candidate_grids",
    "choose_attempts",
    "data_rows",
    "first_attempts",
    "parse_predictions",
    "rank",
    "read_submission",
    "score",
    "score_of",
    "solved_outputs",
    "tasks_of_run",
    "write_submission",
]
