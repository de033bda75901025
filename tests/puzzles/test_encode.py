import numpy as np
import pytest
from toys import grid, random_grid

from arc_solver.config import FormatConfig
from arc_solver.puzzles.encode import (
    COLOURS,
    END,
    GRID_STRIDE,
    IGNORE,
    INPUT,
    NEWLINE,
    NUMBER,
    OUTPUT,
    PAD,
    ROW_STRIDE,
    VOCABULARY,
    Cursor,
    Malformed,
    decode_reply,
    encode_imitation,
    encode_prompt,
    encode_reply,
    encode_sample,
    imitation_tokens,
    longest_reply,
    sample_tokens,
)
from arc_solver.puzzles.tasks import Pair, freeze, same_grid

PLAIN = FormatConfig()
FULL = FormatConfig(shape_header=True, row_numbers=True)
PAIRS = [Pair(grid("12", "34"), grid("5")), Pair(grid("6"), grid("78"))]


def test_vocabulary():
    assert (NEWLINE, INPUT, OUTPUT, END, PAD, NUMBER + 1, NUMBER + 30, VOCABULARY) == (10, 11, 12, 13, 14, 15, 44, 64)


def test_a_sequence_spelt_out():
    sample = encode_sample(PAIRS, PLAIN)
    first = [INPUT, 1, 2, NEWLINE, 3, 4, NEWLINE, OUTPUT, 5, NEWLINE, END]
    second = [INPUT, 6, NEWLINE, OUTPUT]
    answer = [7, 8, NEWLINE, END]
    assert sample.ids_T.tolist() == first + second + answer
    assert sample.labels_T.tolist() == [IGNORE] * 15 + answer
    assert sample.positions_T.tolist() == [
        *(0, 1, 2, 32, 33, 34, 64),
        *(1024, 1025, 1024 + 32, 2 * 1024 - 1),
        *(2048, 2049, 2048 + 32),
        *(3 * 1024, 3 * 1024 + 1, 3 * 1024 + 2, 3 * 1024 + 32, 4 * 1024 - 1),
    ]


def test_header_and_row_numbers_spelt_out():
    assert encode_reply(grid("12", "34"), FULL).tolist() == [
        *(NUMBER + 2, NUMBER + 2),
        *(NUMBER + 1, 1, 2, NEWLINE),
        *(NUMBER + 2, 3, 4, NEWLINE),
        END,
    ]


@pytest.mark.parametrize("labels", ["all-but-first", "last", "all"])
def test_labels_cover_exactly_the_outputs(labels, any_format, rng):
    for count in (1, 2, 5):
        pairs = [Pair(random_grid(rng, 5), random_grid(rng, 5)) for _ in range(count)]
        sample = encode_sample(pairs, any_format, labels)
        learnt = {"all-but-first": pairs[1:], "last": pairs[-1:], "all": pairs}[labels] or pairs
        expected = [int(i) for pair in learnt for i in encode_reply(pair.output, any_format)]
        assert [i for i in sample.labels_T.tolist() if i != IGNORE] == expected
        chosen = sample.labels_T != IGNORE
        assert (sample.labels_T[chosen] == sample.ids_T[chosen]).all()


def test_round_trip_on_all_arc_grids(arc, any_format):
    """Every grid of all 800 tasks through encode and decode: zero failures."""
    count = 0
    for found in arc.values():
        for task in found.tasks:
            solutions = found.solutions[task.id]
            for cells in [*task.test, *solutions, *(g for p in task.train for g in (p.input, p.output))]:
                again = decode_reply(encode_reply(cells, any_format), any_format)
                assert isinstance(again, np.ndarray)
                assert same_grid(again, cells)
                count += 1
    assert count == 2 * (416 + 419) + 2 * sum(len(t.train) for found in arc.values() for t in found.tasks)


def test_sample_tokens_is_the_length(any_format, rng):
    for _ in range(10):
        pairs = [Pair(random_grid(rng), random_grid(rng)) for _ in range(3)]
        assert sample_tokens(pairs, any_format) == len(encode_sample(pairs, any_format))
    assert longest_reply(any_format) == len(encode_reply(freeze(np.zeros((30, 30), np.uint8)), any_format))


def test_an_imitation_spelt_out():
    sample = encode_imitation([pair.input for pair in PAIRS], PLAIN)
    assert sample.ids_T.tolist() == [INPUT, 1, 2, NEWLINE, 3, 4, NEWLINE, END, INPUT, 6, NEWLINE, END]
    assert sample.labels_T.tolist() == [IGNORE] * 9 + [6, NEWLINE, END]
    assert sample.positions_T.tolist() == [
        *(0, 1, 2, 32, 33, 34, 64, 1024 - 1),
        *(1024, 1025, 1024 + 32, 2 * 1024 - 1),
    ]


@pytest.mark.parametrize("labels", ["all-but-first", "last", "all"])
def test_labels_of_an_imitation_cover_the_inputs(labels, any_format, rng):
    """All but the first, as the default says; each with its END and without its marker."""
    for count in (1, 2, 5):
        grids = [random_grid(rng, 5) for _ in range(count)]
        sample = encode_imitation(grids, any_format, labels)
        learnt = {"all-but-first": grids[1:], "last": grids[-1:], "all": grids}[labels] or grids
        plain = FormatConfig(row_numbers=any_format.row_numbers)  # inputs have no shape header
        assert sample.labels_T[sample.labels_T != IGNORE].tolist() == [
            int(i) for cells in learnt for i in encode_reply(cells, plain)
        ]
        chosen = sample.labels_T != IGNORE
        assert (sample.labels_T[chosen] == sample.ids_T[chosen]).all()
        assert OUTPUT not in sample.ids_T


def positions_by_hand(ids: list[int], row_numbers: bool) -> list[int]:
    """Grid index x 1024 + row x 32 + column, id by id; what belongs to no row is in row 31."""
    found, grid_index, row, column = [], -1, 0, 0
    for i in ids:
        place = 32 * row + column
        if i == INPUT:
            grid_index, row, column = grid_index + 1, 0, 0 if row_numbers else 1
            place = 31 * 32 if row_numbers else 0
        elif i == END:
            place = 1023
        elif i == NEWLINE:
            row, column = row + 1, 0 if row_numbers else 1
            place = place if row_numbers else 32 * row
        else:
            column += 1
        found.append(1024 * grid_index + place)
    return found


def test_an_imitation_has_the_length_and_the_positions_of_the_format(any_format, rng):
    for _ in range(10):
        pairs = [Pair(random_grid(rng), random_grid(rng)) for _ in range(3)]
        sample = encode_imitation([pair.input for pair in pairs], any_format)
        assert len(sample) == imitation_tokens(pairs, any_format)
        if any_format.positions == "grid":
            assert sample.positions_T.tolist() == positions_by_hand(sample.ids_T.tolist(), any_format.row_numbers)
        else:
            assert sample.positions_T.tolist() == list(range(len(sample)))


def test_the_cursor_walks_every_reply_legally(any_format, rng):
    """Positions id by id equal those of whole grids, and every encoded reply is legal at every id."""
    for _ in range(20):
        pairs = [Pair(random_grid(rng), random_grid(rng)) for _ in range(2)]
        sample = encode_sample(pairs, any_format)
        prompt = encode_prompt(pairs[:1], pairs[1].input, any_format)
        reply = encode_reply(pairs[1].output, any_format)
        assert sample.ids_T.tolist() == prompt.ids_T.tolist() + reply.tolist()
        assert sample.positions_T[: len(prompt)].tolist() == prompt.positions_T.tolist()
        cursor = Cursor(prompt, any_format)
        positions = []
        for token in reply.tolist():
            assert cursor.legal()[token]
            positions.append(cursor.take(token))
        assert cursor.done
        if any_format.positions == "grid":
            assert positions == sample.positions_T[len(prompt) :].tolist()


def test_every_legal_walk_is_a_grid(any_format, rng):
    prompt = encode_prompt([], grid("1"), any_format)
    sizes = set()
    for walk in range(60):
        cursor, ids = Cursor(prompt, any_format), []
        stop = rng.random() ** 2 / 2  # some walks end rows and grids early, some never unless they must
        while not cursor.done:
            legal = np.flatnonzero(cursor.legal())
            ends = [i for i in legal if i in (NEWLINE, END)]
            token = int(rng.choice(ends if ends and rng.random() < stop else legal))
            if walk == 0 and COLOURS - 1 in legal:
                token = COLOURS - 1  # the walk that goes on for as long as it may
            cursor.take(token)
            ids.append(token)
            assert len(ids) <= longest_reply(any_format)
        cells = decode_reply(ids, any_format)
        assert isinstance(cells, np.ndarray), cells
        sizes.add(cells.shape)
    assert len(sizes) > 10


@pytest.mark.parametrize(
    ("ids", "format", "reason"),
    [
        ([1, 2, NEWLINE, 3, NEWLINE, END], PLAIN, Malformed.RAGGED),
        ([*[1] * 31, NEWLINE, END], PLAIN, Malformed.TOO_LARGE),
        ([1, NEWLINE] * 31 + [END], PLAIN, Malformed.TOO_LARGE),
        ([END], PLAIN, Malformed.ENDED_EARLY),
        ([1, 2, END], PLAIN, Malformed.ENDED_EARLY),
        ([NEWLINE, END], PLAIN, Malformed.ENDED_EARLY),
        ([1, 2, NEWLINE], PLAIN, Malformed.NO_END),
        ([], PLAIN, Malformed.NO_END),
        ([1, NEWLINE, END, 1], PLAIN, Malformed.NOT_A_CELL),
        ([1, INPUT, NEWLINE, END], PLAIN, Malformed.NOT_A_CELL),
        ([-1, NEWLINE, END], PLAIN, Malformed.NOT_A_CELL),
        ([1, NUMBER + 3, NEWLINE, END], PLAIN, Malformed.NOT_A_CELL),
        ([NUMBER + 2, NUMBER + 1, NUMBER + 1, 5, NEWLINE, END], FULL, Malformed.CONTRADICTS_HEADER),
        ([NUMBER + 1, NUMBER + 1, NUMBER + 2, 5, NEWLINE, END], FULL, Malformed.CONTRADICTS_HEADER),
        ([NUMBER + 1, END], FULL, Malformed.ENDED_EARLY),
        ([5, 5, NUMBER + 1, 5, NEWLINE, END], FULL, Malformed.NOT_A_CELL),
    ],
)
def test_the_decoder_says_why_not(ids, format, reason):
    assert decode_reply(ids, format) is reason


def test_cells_above_and_in_the_input_are_at_fixed_distances(rng):
    """What grid positions are for, at every grid size."""
    for _ in range(10):
        cells = random_grid(rng)
        sample = encode_sample([Pair(cells, cells)], PLAIN)
        height, width = cells.shape
        table = sample.positions_T[1 : 1 + height * (width + 1)].reshape(height, width + 1)[:, :width]
        copy = sample.positions_T[2 + height * (width + 1) :][: height * (width + 1)].reshape(height, width + 1)
        assert (copy[:, :width] - table == GRID_STRIDE).all()
        assert (np.diff(table, axis=0) == ROW_STRIDE).all()
        assert len(set(sample.positions_T.tolist())) == len(sample)


def test_a_prompt_and_its_reply_are_a_sample(any_format, rng):
    """What is asked for is what was trained on: the same ids at the same positions, up to the OUTPUT marker."""
    pairs = [Pair(random_grid(rng, 6), random_grid(rng, 6)) for _ in range(4)]
    sample = encode_sample(pairs, any_format)
    prompt = encode_prompt(pairs[:-1], pairs[-1].input, any_format)
    reply = encode_reply(pairs[-1].output, any_format)
    assert [*prompt.ids_T, *reply] == sample.ids_T.tolist()
    assert prompt.positions_T.tolist() == sample.positions_T[: len(prompt)].tolist()
    assert (prompt.ids_T.dtype, prompt.positions_T.dtype, reply.dtype) == (np.uint8, np.int32, np.uint8)
    assert (sample.ids_T.dtype, sample.labels_T.dtype, sample.positions_T.dtype) == (np.uint8, np.int16, np.int32)


def test_no_two_ids_share_a_position(any_format, rng):
    sample = encode_sample([Pair(random_grid(rng), random_grid(rng)) for _ in range(3)], any_format)
    assert len(set(sample.positions_T.tolist())) == len(sample)


def test_a_header_may_say_any_side():
    prompt = encode_prompt(PAIRS, grid("12"), FULL)
    legal_V = Cursor(prompt, FULL).legal()
    assert np.flatnonzero(legal_V).tolist() == [NUMBER + side for side in range(1, 31)]
    assert legal_V.dtype == bool
