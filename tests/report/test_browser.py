"""The page in a real browser, headless Chromium: what it draws, what its keys do, and that it asks for nothing."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from forked import Forked, output_of
from pages import facts_of, write_training

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.puzzles.pictures import PALETTE
from arc_solver.puzzles.tasks import Pair, Task, freeze
from arc_solver.report.collect import Failure, RunReader
from arc_solver.report.compare import compare
from arc_solver.report.page import comparison_page, run_page, training_page
from arc_solver.report.reasons import Reason
from arc_solver.report.training import read_training

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
CELLS = """(canvas) => {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const cell = Number(canvas.dataset.cell), gap = Number(canvas.dataset.gap);
  const sides = [canvas.style.height, canvas.style.width].map((side) => Math.floor(parseFloat(side) / cell));
  const ratio = canvas.width / parseFloat(canvas.style.width), found = [];
  for (let r = 0; r < sides[0]; r++) {
    found.push([]);
    for (let c = 0; c < sides[1]; c++) {
      const at = (k) => Math.floor((k * cell + gap + (cell - gap) / 2) * ratio);
      const [red, green, blue] = pen.getImageData(at(c), at(r), 1, 1).data;
      found[r].push("#" + [red, green, blue].map((x) => x.toString(16).padStart(2, "0")).join(""));
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    if not find_spec("playwright"):
        pytest.skip("needs Playwright: bin/test --all installs it, or pip install -e '.[browser]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [os.environ.get("ARC_SOLVER_BROWSER"), *map(shutil.which, NAMES), own if Path(own).exists() else None]
        if not (program := next(filter(None, found), None)):
            pytest.skip("needs a Chromium: apt-get install chromium, or playwright install chromium")
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A real run of some demo tasks with the bundled model."""
    out = tmp_path_factory.mktemp("demo") / "run"
    words = ["--limit", "6", "--out", out, "adapt.steps=24", "predict.views=8", "run.show=0"]
    output_of(Forked("arc_solver.solve", list(map(str, words))))
    return out


@contextmanager
def opened(browser, file: Path, width: int = 1400, **settings) -> Iterator:
    """The page, which must not complain or ask for anything but itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert complaints == []
    assert {url.partition("#")[0] for url in requests} == {file.as_uri()}
    context.close()


def drawn(page, name: str) -> list[list[int]]:
    """The cells of a grid, by their colours."""
    colours = page.locator(f'canvas[data-grid="{name}"]').evaluate(CELLS)
    return [[PALETTE.index(colour) for colour in row] for row in colours]


def follow(card) -> None:
    """Opens a card's task, of which the browser tells the page a moment after the click."""
    card.click()
    card.page.locator("#task").wait_for(state="visible")


def shown_cards(page) -> list[str]:
    return page.locator(".card:visible .id").all_text_contents()


def test_the_grids_drawn_are_those_of_the_journal(browser, demo):
    run = RunReader(demo).read()
    with opened(browser, demo / "report.html") as page:
        for facts in run.tasks:
            journal = json.loads((demo / "tasks" / f"{facts.task.id}.json").read_text())
            follow(page.locator(f'.card:has-text("{facts.task.id}")'))
            assert page.locator("#task h1 .id").inner_text() == facts.task.id
            for k, pair in enumerate(facts.task.train):
                assert drawn(page, f"train-{k}-input") == pair.input.tolist()
                assert drawn(page, f"train-{k}-output") == pair.output.tolist()
            for t, cells in enumerate(facts.task.test):
                assert drawn(page, f"test-{t}") == cells.tolist()
                assert drawn(page, f"solution-{t}") == run.task_set.solutions[facts.task.id][t].tolist()
                for k, attempt in enumerate(facts.attempts[t]):
                    assert drawn(page, f"attempt-{t}-{k}") == attempt.tolist()
                answers = [c["grid"] for c in journal["candidates"] if c["test"] == t]
                shown = [drawn(page, f"candidate-{t}-{k}") for k in range(len(answers))]
                assert sorted(shown) == sorted(answers)
            label = page.locator('canvas[data-grid="test-0"]').get_attribute("aria-label")
            assert label.endswith("; ".join(" ".join(map(str, row)) for row in facts.task.test[0].tolist()))
            page.keyboard.press("Escape")


def test_filters_search_and_order(browser, demo):
    run = RunReader(demo).read()
    with opened(browser, demo / "report.html") as page:
        ids = [task.task.id for task in run.tasks]
        assert shown_cards(page) == sorted(ids)
        page.locator("#search").fill(ids[2])
        assert shown_cards(page) == [ids[2]]
        assert page.locator("#count").inner_text() == f"1 of {len(ids)} tasks"
        page.keyboard.press("Escape")
        assert page.locator("#search").input_value() == "" and len(shown_cards(page)) == len(ids)
        page.reload()
        assert page.locator("#search").input_value() == "" and len(shown_cards(page)) == len(ids)
        state = run.tasks[0].state
        page.locator(f'.chips button[data-state="{state}"]').click()
        assert shown_cards(page) == sorted(task.task.id for task in run.tasks if task.state == state)
        page.locator(f'.chips button[data-state="{state}"]').click()
        page.locator("#as-table").check()
        for press in range(2):
            page.locator("#table th button", has_text="tokens").click()
            shown = page.locator("#table tbody tr:visible td:nth-child(10)").all_inner_texts()
            tokens = [int(text.replace(",", "")) for text in shown]
            assert len(tokens) == len(ids) and tokens == sorted(tokens, reverse=press == 0)
        page.reload()  # as a page does while the run goes on
        assert page.locator("#as-table").is_checked()
        assert [int(t.replace(",", "")) for t in page.locator("#table td:nth-child(10)").all_inner_texts()] == tokens


def test_arrows_move_between_tasks(browser, demo):
    ids = sorted(task.task.id for task in RunReader(demo).read().tasks)
    with opened(browser, demo / "report.html") as page:
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.locator("#task").wait_for(state="visible")

        def title():
            return page.locator("#task h1 .id").inner_text()

        assert title() == ids[1]
        page.keyboard.press("ArrowRight")
        assert title() == ids[2]
        for _ in range(5):
            page.keyboard.press("ArrowLeft")
        assert title() == ids[0]
        assert page.locator("#previous").is_disabled()
        plain = page.locator('canvas[data-grid="test-0"]').evaluate("canvas => canvas.toDataURL()")
        page.keyboard.press("n")
        assert page.locator("#numbers2").is_checked()
        assert page.locator('canvas[data-grid="test-0"]').evaluate("canvas => canvas.toDataURL()") != plain
        page.keyboard.press("Escape")
        assert page.locator("#overview").is_visible() and not page.locator("#task").is_visible()
        page.keyboard.press("/")
        page.keyboard.type(ids[3])
        assert shown_cards(page) == [ids[3]]


def with_reasons(run, *kinds):
    """The run with tasks that were not solved, for these reasons."""
    why = [[Reason(kind, "So it is.")] for kind in kinds]
    tasks = [replace(task, reasons=reasons) for task, reasons in zip(run.tasks, why, strict=False)]
    return replace(run, tasks=[*tasks, *(replace(task, reasons=[]) for task in run.tasks[len(kinds) :])])


def test_filters_do_not_get_stuck(browser, demo, tmp_path):
    run, file = with_reasons(RunReader(demo).read(), "diverged", "stopped"), tmp_path / "page.html"
    file.write_text(run_page(run))
    ids = [task.task.id for task in run.tasks]
    with opened(browser, file) as page:
        assert not page.locator("#clear").is_visible()
        page.locator("#search").fill("nothing like that")
        assert shown_cards(page) == []
        page.locator("#clear").click()
        assert len(shown_cards(page)) == len(ids) and page.locator("#search").input_value() == ""
        page.locator("#search").fill("nothing like that")
        page.locator('.legend button[data-kind="stopped"]').click()  # shows its tasks, whatever was chosen before
        assert shown_cards(page) == [ids[1]]
        page.locator("#search").fill(ids[1])
        page.keyboard.press("Enter")
        assert page.locator("#task h1 .id").inner_text() == ids[1]
        page.goto(f"{file.as_uri()}#task={ids[3]}")  # the filters hide it
        assert page.locator("#place").inner_text() == f"{sorted(ids).index(ids[3]) + 1} of 6, hidden by the filters"
        by = "ArrowLeft" if ids[3] == max(ids) else "ArrowRight"
        page.keyboard.press(by)
        near = sorted(ids)[sorted(ids).index(ids[3]) + (1 if by == "ArrowRight" else -1)]
        assert page.locator("#task h1 .id").inner_text() == near


def test_tasks_are_found_by_the_reasons_that_are_shown_and_sorted_by_how_near_they_are(browser, demo, tmp_path):
    run, file = RunReader(demo).read(), tmp_path / "page.html"
    file.write_text(run_page(with_reasons(run, "memorised")))
    with opened(browser, file) as page:
        page.locator("#search").fill("demonstrations memorised")
        assert shown_cards(page) == [run.tasks[0].task.id]
        page.locator("#search").fill("")
        page.locator("#sort").select_option(label="wrong cells")
        near = {task.task.id: task.wrong_cells for task in run.tasks}
        wrong = [near[i] for i in shown_cards(page)]
        known = [cells for cells in wrong if cells is not None]
        assert known == sorted(known) and wrong[: len(known)] == known


@pytest.fixture(scope="module")
def large(demo, tmp_path_factory) -> Path:
    """A page with one task of 30 by 30 cells, whose candidate was scored under 2 of 4 views."""
    rng = np.random.default_rng(0)
    first, second, test = (freeze(rng.integers(10, size=(30, 30)).astype(np.uint8)) for _ in range(3))
    found = Predictions((0, 1, 2, 3), (Candidate(0, first, (0,), (), (-1.0, None, -2.5, None)),))
    facts = facts_of(Task("large", (Pair(first, second),), (test,)), found, (second,))
    file = tmp_path_factory.mktemp("large") / "page.html"
    file.write_text(run_page(replace(RunReader(demo).read(), tasks=[facts])))
    return file


def test_large_grids_are_readable_where_there_is_room_and_enlarged_where_there_is_none(browser, large):
    cell = "canvas => Number(canvas.dataset.cell)"
    address = large.as_uri() + "#task=large"
    with opened(browser, large) as page:
        page.goto(address)
        assert page.locator('canvas[data-grid="train-0-input"]').evaluate(cell) >= 15
        tops = [page.locator(f'canvas[data-grid="train-0-{name}"]').bounding_box()["y"] for name in ("input", "output")]
        assert tops[0] == tops[1]
    with opened(browser, large, 390) as page:
        page.goto(address)
        assert page.locator('canvas[data-grid="train-0-input"]').evaluate(cell) < 9
        assert not page.locator("#no-room").is_visible()
        page.keyboard.press("n")
        assert page.locator("#no-room").is_visible()
        page.locator('canvas[data-grid="train-0-input"]').click()
        assert page.locator("#large canvas").evaluate(cell) >= 9
        assert page.locator("#large-title").inner_text() == "demonstration 1, input, 30 × 30"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.keyboard.press("Escape")  # closes it, and not the task
        assert not page.locator("#large").is_visible() and page.locator("#task").is_visible()


def test_a_candidate_says_in_how_many_views_it_was_scored(browser, large):
    with opened(browser, large) as page:
        page.goto(large.as_uri() + "#task=large")
        assert "-3.50 nats in 2 of 4 views" in page.locator(".candidates li").inner_text()
        bars = page.locator(".strip i").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.height))")
        assert bars == [round(38 / (1 + 1 / 5)), 1, round(38 / (1 + 2.5 / 5)), 1]
        assert "half of it at −5 nats" in page.locator("#task").inner_text()


def test_what_is_open_stays_open_when_the_page_reads_itself_again(browser, demo):
    with opened(browser, demo / "report.html") as page:
        follow(page.locator(".card").first)
        page.locator(".candidates summary").first.click()
        page.locator(".candidates details[open] table").wait_for()
        page.reload()
        page.locator(".candidates details[open] table").wait_for()
        page.keyboard.press("Escape")
        page.locator("#all-settings summary").click()
        page.wait_for_function("() => state.opened.includes('all-settings')")
        page.reload()
        page.locator("#all-settings table").wait_for()


def test_names_and_headings_are_for_everybody(browser, demo):
    with opened(browser, demo / "report.html", 390) as page:
        base = page.title()
        assert base.startswith("run: ") and base.endswith(" of 6 solved")
        page.locator("#as-table").check()
        assert page.locator("#sideways").is_visible()  # ten columns on a phone
        page.locator("#table a").first.click()
        name = page.locator("#task h1 .id").inner_text()
        assert page.title() == f"{name} – {base}"
        levels = page.locator("#task :is(h1, h2, h3, h4)").evaluate_all("all => all.map(one => Number(one.tagName[1]))")
        assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
        assert page.locator("#next").inner_text() == "next"
        page.keyboard.press("Escape")
        assert page.title() == base
        page.locator("#all-settings summary").click()
        lines = """all => all.map(one => {
          const range = document.createRange();
          range.selectNodeContents(one);
          return range.getClientRects().length;
        })"""
        assert {*page.locator("#all-settings td:first-child").evaluate_all(lines)} == {1}  # no name is broken


def test_on_paper_no_box_is_split(browser, demo):
    with opened(browser, demo / "report.html") as page:
        page.emulate_media(media="print")
        follow(page.locator(".card").first)
        for box in (".learning", ".candidates > li", ".pairs figure"):
            assert page.locator(box).first.evaluate("box => getComputedStyle(box).breakInside") == "avoid"


@pytest.mark.parametrize("width", [1400, 390])
def test_it_fits_a_phone_and_has_a_light_and_a_dark_side(browser, demo, width):
    paper = "() => getComputedStyle(document.body).backgroundColor"
    seen = []
    for scheme in ("light", "dark"):
        with opened(browser, demo / "report.html", width, color_scheme=scheme) as page:
            seen.append(page.evaluate(paper))
            for place in ("", "#task=" + RunReader(demo).task_set.tasks[0].id):
                page.goto((demo / "report.html").as_uri() + place)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.goto((demo / "report.html").as_uri() + "#")
            page.locator("#theme").select_option("dark" if scheme == "light" else "light")
            seen.append(page.evaluate(paper))
    light, switched_to_dark, dark, switched_to_light = seen
    assert (light, dark) == (switched_to_light, switched_to_dark) and light != dark


def test_the_page_of_a_run_that_goes_on_reloads_itself_from_the_disk(browser, demo, tmp_path):
    run, file = RunReader(demo).read(), tmp_path / "page.html"
    file.write_text(run_page(replace(run, is_running=True, tasks=run.tasks[:2])))
    with opened(browser, file) as page:
        page.clock.install()
        page.reload()
        page.locator("#as-table").check()
        assert page.locator("#table tbody tr").count() == 2
        file.write_text(run_page(run))
        with page.expect_navigation():
            page.clock.run_for(11_000)
        assert page.locator("#table tbody tr:visible").count() == 6
        assert page.locator("#reload").count() == 0


def test_the_page_of_a_run_that_was_killed_says_that_nothing_new_comes(browser, demo, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(run_page(replace(RunReader(demo).read(), is_running=True)))
    with opened(browser, file) as page:
        assert page.locator("#fresh").inner_text() == "This page reloads itself."
        page.clock.install(time=time.time() + 600)
        page.reload()
        assert "nothing new was written for 10 minutes" in page.locator("#fresh").inner_text()
        follow(page.locator(".card").first)
        assert page.locator("#pulse").inner_text() == "10 minutes old"


def test_a_page_that_does_not_read_itself_again_says_so_and_how_old_it_is(browser, demo, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(run_page(replace(RunReader(demo).read(), is_running=True)))
    with opened(browser, file) as page:
        page.clock.install()
        page.reload()
        fresh = page.locator("#fresh")
        assert fresh.inner_text() == "This page reloads itself."
        page.locator("#search").focus()
        page.clock.run_for(11_000)
        assert fresh.inner_text() == "Paused while you type."
        page.clock.run_for(600_000)
        assert fresh.inner_text() == "Paused while you type: what you see is 10 minutes old."
        assert page.locator("#pulse").inner_text() == "paused"
        page.locator("#reload").uncheck()
        page.clock.run_for(1)
        assert fresh.inner_text() == "This page does not reload itself now: what you see is 10 minutes old."


def test_a_task_says_why_there_was_no_adaptation_and_what_failed(browser, demo, tmp_path):
    run, file = RunReader(demo).read(), tmp_path / "page.html"
    failed = Failure("adapt", (run.tasks[0].task.id,), "worker 0 ended (signal 9)")
    cheap = replace(run.tasks[0], adaptation=None, stage="unadapted")
    fell_back = replace(run.tasks[1], adaptation=None, fallback="unadapted", failures=[failed, failed])
    file.write_text(run_page(replace(run, tasks=[cheap, fell_back])))
    with opened(browser, file) as page:
        follow(page.locator(f'.card:has-text("{cheap.task.id}")'))
        assert "There was no time for it so far" in page.locator("#task-body").inner_text()
        page.keyboard.press("Escape")
        follow(page.locator(f'.card:has-text("{fell_back.task.id}")'))
        text = page.locator("#task-body").inner_text()
        assert "It failed." in text and "2 tries failed:" in text
        assert text.count("adapting: worker 0 ended (signal 9)") == 2


def test_two_runs_are_drawn_beside_each_other(browser, demo, tmp_path):
    run, file = RunReader(demo).read(), tmp_path / "page.html"
    other = [replace(task, attempts=[both[::-1] for both in task.attempts]) for task in run.tasks]
    file.write_text(comparison_page(compare(run, replace(run, name="other", tasks=other))))
    facts = run.tasks[0]
    with opened(browser, file) as page:
        page.locator("#search").fill(facts.task.id)
        follow(page.locator(".card:visible"))
        for k, attempt in enumerate(facts.attempts[0]):
            assert drawn(page, f"Aattempt-0-{k}") == drawn(page, f"Battempt-0-{1 - k}") == attempt.tolist()


def test_the_loss_curves_of_two_runs_have_one_scale(browser, demo, tmp_path):
    run, file = RunReader(demo).read(), tmp_path / "page.html"
    facts = run.tasks[0]
    higher = {**facts.adaptation, "losses": [5 * loss for loss in facts.adaptation["losses"]]}
    other = replace(run, name="other", tasks=[replace(facts, adaptation=higher)])
    file.write_text(comparison_page(compare(replace(run, tasks=[facts]), other)))
    with opened(browser, file) as page:
        follow(page.locator(".card"))
        ticks = [page.locator("svg.curve").nth(k).locator("text").all_text_contents()[:-1] for k in range(2)]
        assert len(ticks[0]) > 2 and ticks[0] == ticks[1]


def test_the_page_of_a_training_has_its_curves(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(training_page(read_training(write_training(tmp_path / "training"))))
    with opened(browser, file, 390) as page:
        assert page.locator(".charts svg").count() == 4
        assert "learning rate (train.lr)" in page.locator(".charts").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_name_with_markup_in_it_is_text(browser, demo, tmp_path):
    evil = "</script><script>document.title='owned'</script><b>x"
    run = RunReader(demo).read()
    first = run.tasks[0]
    named = replace(first, task=Task(evil, first.task.train, first.task.test))
    file = tmp_path / "page.html"
    file.write_text(run_page(replace(run, tasks=[named])))
    with opened(browser, file) as page:
        assert shown_cards(page) == [evil]
        follow(page.locator(".card"))
        assert page.locator("#task h1 .id").inner_text() == evil
        assert page.title().startswith(f"{evil} – run: ")


def test_no_script_but_the_pages_own_runs(browser, demo, tmp_path):
    file = tmp_path / "page.html"
    text = (demo / "report.html").read_text()
    file.write_text(text.replace("</footer>", "</footer><script>document.title = 'owned'</script>"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.title().startswith("run: ") and page.locator(".card").count() == 6
    context.close()
