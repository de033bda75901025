"""The one format: tasks <-> token ids, labels and positions.

Every model sees the same 64 ids: a cell is always one token, and nothing is text. A sequence is a task's pairs in
order, last the pair asked for:

    INPUT rows OUTPUT [height width] rows END   INPUT rows OUTPUT ...        a row: [number] cells NEWLINE

That is the objective *solve*: outputs, given examples. *Imitate* learns an input, given other inputs:

    INPUT rows END   INPUT rows END   ...

*Grid positions*: position id = grid index x 1024 + row x 32 + column, with the cells of a row in columns 1 to W, and
column 0 for the token just before its first cell (the marker, then the newlines). So "the cell above" is always 32
back, "the same cell in the input" 1024 back, at every grid size; and since the token in column c predicts the cell in
column c + 1, what it needs is at fixed offsets too. Tokens that belong to no row go to row 31. Positions are a pure
function of the ids so far; `Cursor` computes them one id at a time, `encode` whole grids at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from ..config import FormatConfig
from .tasks import COLOURS, MAX_SIDE, Grid, Pair, freeze

VOCABULARY = 64
NEWLINE, INPUT, OUTPUT, END, PAD = range(COLOURS, COLOURS + 5)
NUMBER = PAD  # the number n, 1 to 30, is the id NUMBER + n; 45 to 63 are reserved
TOKENS = (  # the ids as text, for a tokenizer
    *map(str, range(COLOURS)),
    *("\n", "<input>", "<output>", "<end>", "<pad>"),
    *(f"<{n}>" for n in range(1, MAX_SIDE + 1)),
    *(f"<reserved-{i}>" for i in range(NUMBER + MAX_SIDE + 1, VOCABULARY)),
)
IGNORE = -100  # label of a position that is not learnt (the value that PyTorch's cross entropy skips)

GRID_STRIDE, ROW_STRIDE = 1024, 32
MARGIN = 31 * ROW_STRIDE  # where tokens go that belong to no row

Labels = Literal["all-but-first", "last", "all"]


@dataclass(frozen=True, eq=False)
class Sample:
    """A sequence to learn from. All [T]; labels are the ids themselves where learnt, IGNORE elsewhere."""

    ids_T: np.ndarray  # uint8
    labels_T: np.ndarray  # int16
    positions_T: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A sequence to be continued: everything up to the OUTPUT marker that is asked for. [T] each."""

    ids_T: np.ndarray  # uint8
    positions_T: np.ndarray  # int32

    def __len__(self) -> int:
        return len(self.ids_T)


class Malformed(Enum):
    """Why a reply is no grid."""

    ENDED_EARLY = "the reply ended before a row was complete"
    NO_END = "the reply has no end"
    RAGGED = "rows differ in length"
    TOO_LARGE = f"more than {MAX_SIDE} rows or columns"
    CONTRADICTS_HEADER = "the rows are not what the shape header or the row numbers say"
    NOT_A_CELL = "an id that cannot stand there"


def encode_sample(pairs: Sequence[Pair], config: FormatConfig, labels: Labels = "all-but-first") -> Sample:
    """All pairs, outputs included. `labels` says which outputs are learnt, each up to and with its END.

    A single pair is learnt whatever `labels` says: nothing comes before it that could be left out.
    """
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    learnt: list[bool] = []
    first = {"all": 0, "all-but-first": 1, "last": len(pairs) - 1}[labels]
    for i, pair in enumerate(pairs):
        pieces += [_input_piece(pair.input, 2 * i, config), *_output_pieces(pair.output, 2 * i + 1, config)]
        learnt += [False, False, i >= first or len(pairs) == 1]
    ids_T, positions_T = _join(pieces, config)
    learnt_T = np.repeat(learnt, [len(ids) for ids, _ in pieces])
    return Sample(ids_T, np.where(learnt_T, ids_T.astype(np.int16), IGNORE), positions_T)


def encode_imitation(grids: Sequence[Grid], config: FormatConfig, labels: Labels = "all-but-first") -> Sample:
    """Inputs alone, each closed by END: one is learnt from those before it. `labels` as in `encode_sample`."""
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    learnt: list[bool] = []
    first = {"all": 0, "all-but-first": 1, "last": len(grids) - 1}[labels]
    for i, grid in enumerate(grids):
        ids, positions = _input_piece(grid, i, config)
        end = (np.array([END]), np.array([i * GRID_STRIDE + MARGIN + ROW_STRIDE - 1]))
        pieces += [(ids[:1], positions[:1]), (ids[1:], positions[1:]), end]
        learnt += [False, *[i >= first or len(grids) == 1] * 2]
    ids_T, positions_T = _join(pieces, config)
    learnt_T = np.repeat(learnt, [len(ids) for ids, _ in pieces])
    return Sample(ids_T, np.where(learnt_T, ids_T.astype(np.int16), IGNORE), positions_T)


def encode_prompt(pairs: Sequence[Pair], test_input: Grid, config: FormatConfig) -> Prompt:
    """The demonstrations and a test input, up to the OUTPUT marker that opens the reply."""
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    for i, pair in enumerate(pairs):
        pieces += [_input_piece(pair.input, 2 * i, config), *_output_pieces(pair.output, 2 * i + 1, config)]
    index = 2 * len(pairs)
    pieces += [_input_piece(test_input, index, config), _output_marker(index + 1, config)]
    return Prompt(*_join(pieces, config))


def encode_reply(grid: Grid, config: FormatConfig) -> np.ndarray:
    """The ids of an answer: what follows the OUTPUT marker, END included. [T] uint8."""
    return _output_pieces(grid, 1, config)[1][0].astype(np.uint8)


def sample_tokens(pairs: Sequence[Pair], config: FormatConfig) -> int:
    """Length of `encode_sample(pairs, config)`, without encoding."""
    total = 0
    for pair in pairs:
        for grid in (pair.input, pair.output):
            height, width = grid.shape
            total += 1 + height * (width + 1 + config.row_numbers)
        total += 1 + 2 * config.shape_header
    return total


def imitation_tokens(pairs: Sequence[Pair], config: FormatConfig) -> int:
    """Length of `encode_imitation` of the pairs' inputs, without encoding."""
    sizes = (pair.input.shape for pair in pairs)
    return sum(2 + height * (width + 1 + config.row_numbers) for height, width in sizes)


def longest_reply(config: FormatConfig) -> int:
    """Tokens of the largest legal answer: 30 by 30, and END."""
    return MAX_SIDE * (MAX_SIDE + 1 + config.row_numbers) + 1 + 2 * config.shape_header


def decode_reply(ids: Sequence[int] | np.ndarray, config: FormatConfig) -> Grid | Malformed:
    """The grid that a reply spells, END included, or why it is none. Strict: `encode_reply` inverted, and no more."""
    rest = [int(i) for i in ids]
    if END not in rest:
        return Malformed.NO_END
    if rest.index(END) != len(rest) - 1:
        return Malformed.NOT_A_CELL
    rest.pop()
    header: tuple[int, int] | None = None
    if config.shape_header:
        if len(rest) < 2:
            return Malformed.ENDED_EARLY
        header = (rest[0] - NUMBER, rest[1] - NUMBER)
        if not all(1 <= side <= MAX_SIDE for side in header):
            return Malformed.NOT_A_CELL
        rest = rest[2:]
    if not rest or rest[-1] != NEWLINE:
        return Malformed.ENDED_EARLY
    rows: list[list[int]] = [[]]
    for i in rest[:-1]:
        if i == NEWLINE:
            rows.append([])
        else:
            rows[-1].append(i)
    if config.row_numbers:
        if any(row[:1] != [NUMBER + r + 1] for r, row in enumerate(rows)):
            return Malformed.CONTRADICTS_HEADER
        rows = [row[1:] for row in rows]
    if any(not 0 <= i < COLOURS for row in rows for i in row):
        return Malformed.NOT_A_CELL
    if len(rows) > MAX_SIDE or any(len(row) > MAX_SIDE for row in rows):
        return Malformed.TOO_LARGE
    if any(not row for row in rows):
        return Malformed.ENDED_EARLY
    if len({len(row) for row in rows}) > 1:
        return Malformed.RAGGED
    if header and header != (len(rows), len(rows[0])):
        return Malformed.CONTRADICTS_HEADER
    return freeze(np.array(rows, dtype=np.uint8))


class Cursor:
    """Walks along one reply: which ids are legal next, and the grid position of each id that is taken.

    A legal walk that reaches END always decodes to a grid: rows are as long as the first one (or as the header
    says), and there are 1 to 30 of them.
    """

    def __init__(self, prompt: Prompt, config: FormatConfig):
        self.config = config
        self.grid_index = int(np.count_nonzero((prompt.ids_T == INPUT) | (prompt.ids_T == OUTPUT))) - 1
        self.taken = 0  # ids so far
        self.row, self.column = 0, 0  # where the next cell goes
        self.height: int | None = None  # once known
        self.width: int | None = None
        self.needs_number = config.row_numbers
        self.done = False

    def legal(self) -> np.ndarray:
        """Ids that may come next. [V] bool."""
        mask_V = np.zeros(VOCABULARY, dtype=bool)
        if self.config.shape_header and self.taken < 2:
            mask_V[NUMBER + 1 : NUMBER + MAX_SIDE + 1] = True
            return mask_V
        at_start = self.column == 0 and self.needs_number == self.config.row_numbers  # nothing of this row yet
        if at_start and self.row > 0 and (self.height is None or self.row == self.height):
            mask_V[END] = True
        if at_start and self.row == (self.height or MAX_SIDE):
            return mask_V
        if self.needs_number:
            mask_V[NUMBER + self.row + 1] = True
            return mask_V
        if self.column < (self.width or MAX_SIDE):
            mask_V[:COLOURS] = True
        if self.column > 0 and (self.width is None or self.column == self.width):
            mask_V[NEWLINE] = True
        return mask_V

    def take(self, token: int) -> int:
        """Moves over a legal id and returns its grid position."""
        base = self.grid_index * GRID_STRIDE
        self.taken += 1
        if self.config.shape_header and self.taken <= 2:
            if self.taken == 1:
                self.height = token - NUMBER
                return base + MARGIN + 1
            self.width = token - NUMBER
            return base + (MARGIN + 2 if self.config.row_numbers else 0)
        if token == END:
            self.done = True
            return base + MARGIN + ROW_STRIDE - 1
        if token == NEWLINE:
            self.width = self.column
            self.row, self.column = self.row + 1, 0
            self.needs_number = self.config.row_numbers
            if self.config.row_numbers:
                return base + (self.row - 1) * ROW_STRIDE + self.width + 1
            return base + self.row * ROW_STRIDE
        if self.needs_number:
            self.needs_number = False
            return base + self.row * ROW_STRIDE
        self.column += 1
        return base + self.row * ROW_STRIDE + self.column


def _input_piece(grid: Grid, index: int, config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    ids, positions = _rows(grid, index, config)
    start = index * GRID_STRIDE + (MARGIN if config.row_numbers else 0)
    return np.concatenate(([INPUT], ids)), np.concatenate(([start], positions))


def _output_marker(index: int, config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    in_margin = config.row_numbers or config.shape_header
    return np.array([OUTPUT]), np.array([index * GRID_STRIDE + (MARGIN if in_margin else 0)])


def _output_pieces(grid: Grid, index: int, config: FormatConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """The OUTPUT marker, and the reply to it."""
    ids, positions = _rows(grid, index, config)
    base = index * GRID_STRIDE
    head, head_positions = [], []
    if config.shape_header:
        head = [NUMBER + grid.shape[0], NUMBER + grid.shape[1]]
        head_positions = [base + MARGIN + 1, base + (MARGIN + 2 if config.row_numbers else 0)]
    reply = (
        np.concatenate((head, ids, [END])),
        np.concatenate((head_positions, positions, [base + MARGIN + ROW_STRIDE - 1])),
    )
    return [_output_marker(index, config), reply]


def _rows(grid: Grid, index: int, config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a grid: ids and grid positions. [H * (W + 1 (+ 1 with row numbers))] each."""
    height, width = grid.shape
    lead = int(config.row_numbers)
    ids = np.full((height, lead + width + 1), NEWLINE)
    ids[:, lead : lead + width] = grid
    rows = np.arange(height)[:, None] * ROW_STRIDE
    # Columns of the cells start at 1; the newline opens the next row, unless a row number does.
    positions = rows + np.arange(1 - lead, width + 2)
    if lead:
        ids[:, 0] = NUMBER + 1 + np.arange(height)
    else:
        positions[:, -1] = rows[:, 0] + ROW_STRIDE
    return ids.ravel(), positions.ravel() + index * GRID_STRIDE


def _join(pieces: list[tuple[np.ndarray, np.ndarray]], config: FormatConfig) -> tuple[np.ndarray, np.ndarray]:
    ids_T = np.concatenate([ids for ids, _ in pieces]).astype(np.uint8)
    if config.positions == "token":
        return ids_T, np.arange(len(ids_T), dtype=np.int32)
    return ids_T, np.concatenate([positions for _, positions in pieces]).astype(np.int32)
