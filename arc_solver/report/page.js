"use strict";
// Draws grids, filters and sorts tasks, opens one in place. Data lies in the page, each task's in a script element of
// its own that is parsed when it is first drawn. Text goes in as text (`textContent`), never as HTML.
const PALETTE = ["#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00", "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231"];
const DARK = [0, 2, 9]; // colours on which a digit is white
const SYMBOLS = { right: "✓", wrong: "✗" };
const GEOMETRIES = ["as it is", "¼ turn", "½ turn", "¾ turn", "transposed", "transposed, ¼ turn", "transposed, ½ turn", "transposed, ¾ turn"];
const NATS = 100; // log-probabilities are whole hundredths
const HALF = 5; // nats less than certain, at which a bar is half as tall
const RELOAD_MS = 10000;
const READABLE = 15; // pixels of a cell with its number in it
const SMALLEST = 9; // pixels of a cell that has room for a number
const LATE = 6; // times the usual seconds between two pages: then it is said that nothing comes
const $ = (id) => document.getElementById(id);
const all = (selector, of = document) => [...of.querySelectorAll(selector)];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- grids ----

const rowsOf = (text) => text.split("/");
const sidesOf = (text) => [rowsOf(text).length, rowsOf(text)[0].length];
const shapeOf = (text) => sidesOf(text).join(" × ");
const parsed = new Map();

function task(i) {
  if (!parsed.has(i)) parsed.set(i, JSON.parse($("t" + i).textContent));
  return parsed.get(i);
}

const gridOf = (one, found) => (typeof one.g === "string" ? one.g : changed(found[0].g, one.g));

function changed(first, changes) { // cell and colour in turn
  const rows = rowsOf(first).map((row) => [...row]), width = rows[0].length;
  for (let k = 0; k < changes.length; k += 2) rows[Math.floor(changes[k] / width)][changes[k] % width] = changes[k + 1];
  return rows.map((row) => row.join("")).join("/");
}

function draw(canvas, text, side, options = {}) {
  const rows = rowsOf(text), height = rows.length, width = rows[0].length;
  const cell = Math.max(2, Math.min(options.most || 28, Math.floor(side / Math.max(height, width))));
  const gap = cell > 6 ? 1 : 0, ratio = 2;
  canvas.width = (width * cell + gap) * ratio;
  canvas.height = (height * cell + gap) * ratio;
  canvas.style.width = canvas.width / ratio + "px";
  canvas.style.height = canvas.height / ratio + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.fillStyle = "#5a5a5a";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  const right = options.right && rowsOf(options.right);
  const sameShape = right && right.length === height && right[0].length === width;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.font = `${Math.max(7, Math.floor(cell * 0.62))}px ui-monospace, Menlo, Consolas, monospace`;
  rows.forEach((row, r) => [...row].forEach((digit, c) => {
    const colour = Number(digit), x = c * cell + gap, y = r * cell + gap, inner = cell - gap;
    pen.fillStyle = PALETTE[colour];
    pen.fillRect(x, y, inner, inner);
    if (options.numbers && cell >= SMALLEST) {
      pen.fillStyle = DARK.includes(colour) ? "#fff" : "#000";
      pen.fillText(digit, x + inner / 2, y + inner / 2 + 0.5);
    }
    if (sameShape && options.marks && right[r][c] !== digit) {
      corner(pen, x + inner, y, Math.max(3, cell * 0.42));
    }
  }));
  canvas.dataset.cell = cell;
  canvas.dataset.gap = gap;
}

function corner(pen, x, y, size) { // marks a cell in a way that shows on any colour
  for (const [colour, reach] of [["#000", size + Math.max(1, size * 0.3)], ["#fff", size]]) {
    pen.fillStyle = colour;
    pen.beginPath();
    pen.moveTo(x - reach, y);
    pen.lineTo(x, y);
    pen.lineTo(x, y + reach);
    pen.fill();
  }
}

function differences(text, right) {
  const [a, b] = [rowsOf(text), rowsOf(right)];
  if (a.length !== b.length || a[0].length !== b[0].length) return null;
  return a.reduce((sum, row, r) => sum + [...row].filter((digit, c) => digit !== b[r][c]).length, 0);
}

function gridCanvas(title, text, options) { // as a button that shows it larger
  const cells = rowsOf(text).map((row) => [...row].join(" ")).join("; ");
  const canvas = element("canvas", { role: "img", "data-grid": options.name, "aria-label": `${title}, grid of ${shapeOf(text)}: ${cells}` });
  draw(canvas, text, options.side, { numbers: isOn("numbers"), marks: isOn("marks"), right: options.right, most: options.most });
  if (isOn("numbers") && Number(canvas.dataset.cell) < SMALLEST) $("no-room").hidden = false;
  const button = element("button", { type: "button", class: "grid", title: "enlarge" }, canvas);
  button.addEventListener("click", () => enlarge(title, text, options.right));
  return button;
}

function enlarge(title, text, right) { // to what the window has room for, or so that numbers fit
  const canvas = $("large").querySelector("canvas"), page = document.documentElement;
  const room = Math.min(page.clientWidth - 60, page.clientHeight - 130), side = Math.max(...sidesOf(text));
  draw(canvas, text, Math.max(room, SMALLEST * side + 1), { numbers: isOn("numbers"), marks: isOn("marks"), right, most: 60 });
  $("large-title").textContent = `${title}, ${shapeOf(text)}`;
  if (!$("large").open) $("large").showModal();
}

function gridFigure(title, text, options) {
  const canvas = gridCanvas(title, text, options);
  const caption = element("figcaption", {}, element("b", {}, title));
  const figure = element("figure", {}, caption, canvas);
  if (options.right) {
    const off = differences(text, options.right), isRight = off === 0;
    figure.className = isRight ? "right" : "wrong";
    caption.firstChild.textContent = `${title} ${isRight ? SYMBOLS.right : SYMBOLS.wrong}`;
    if (!isRight) caption.append(off === null ? ` ${shapeOf(text)} instead of ${shapeOf(options.right)}` : ` ${off} ${off === 1 ? "cell differs" : "cells differ"}`);
  } else if (options.says) caption.append(" " + options.says);
  return figure;
}

const isOn = (id) => Boolean($(id) && $(id).checked);

// ---- one task ----

function candidateItem(one, grid, place, t, content) {
  const right = content.solution && content.solution[t], isRight = right === grid;
  const item = element("li", isRight ? { class: "is-right" } : {});
  const canvas = gridCanvas(`candidate ${place + 1}`, grid, { name: `candidate-${t}-${place}`, side: 120, right, most: 16 });
  const known = one.p.filter((p) => p !== null), views = content.geometries.length;
  const sum = -known.reduce((a, b) => a + b, 0) / NATS, scored = known.length === views ? "all views" : `${known.length} of ${views} views`;
  const says = element("div", {},
    element("p", {}, element("b", {}, `${place + 1}`), place < 2 ? ` · attempt ${place + 1}` : "", isRight ? " · right ✓" : ""),
    element("p", {}, `${one.v.length} of ${views} views`, one.s.length ? `, ${one.s.length} searches` : ""),
    element("p", {}, known.length ? `${sum.toFixed(2)} nats in ${scored}` : "not scored"));
  if (right && !isRight) {
    const off = differences(grid, right);
    says.append(element("p", { class: "muted" }, off === null ? shapeOf(grid) : `${off} ${off === 1 ? "cell differs" : "cells differ"}`));
  }
  const strip = element("div", { class: "strip", role: "img", "aria-label": `log-probability in ${known.length} of ${views} views; answered by views ${one.v.map((v) => v + 1).join(", ") || "none"}` });
  one.p.forEach((p, v) => {
    const height = p === null ? 1 : 38 / (1 + p / NATS / HALF); // so that far behind and very far behind differ too
    const classes = [p === null ? "unknown" : "", one.v.includes(v) ? "voted" : "", one.s.includes(v) ? "searched" : ""];
    strip.append(element("i", { class: classes.join(" ").trim(), style: `height:${height.toFixed(0)}px`, title: viewText(one, v, content) }));
  });
  const details = keptOpen(element("details", { id: `views of ${content.id}, ${t}, ${place}` }, element("summary", {}, "every view")), () => {
    if (details.open && details.children.length === 1) details.append(viewTable(one, content));
  });
  item.append(canvas, says, strip, details);
  return item;
}

function viewText(one, v, content) {
  const p = one.p[v] === null ? "not scored" : `${(-one.p[v] / NATS).toFixed(2)} nats`;
  return `view ${v + 1}, ${GEOMETRIES[content.geometries[v]]}: ${p}${one.v.includes(v) ? ", its answer" : ""}${one.s.includes(v) ? ", found by its search" : ""}`;
}

function viewTable(one, content) {
  const body = element("tbody");
  one.p.forEach((p, v) => body.append(element("tr", {},
    element("td", {}, `${v + 1}`), element("td", {}, GEOMETRIES[content.geometries[v]]),
    element("td", {}, p === null ? "–" : (-p / NATS).toFixed(2)),
    element("td", {}, [one.v.includes(v) ? "answered" : "", one.s.includes(v) ? "found" : ""].filter(Boolean).join(", ")))));
  const head = element("tr", {}, ...["view", "geometry", "log-probability", "gave it"].map((name) => element("th", { scope: "col" }, name)));
  return element("table", {}, element("thead", {}, head), body);
}

function lossCurve(losses, steps, beside = losses) { // on the scale of all that stand beside each other
  const [width, height, left, bottom] = [360, 150, 38, 22];
  const low = Math.log10(Math.max(1e-4, Math.min(...beside.filter((x) => x > 0), 1))), high = Math.log10(Math.max(...beside, 1e-3));
  const y = (loss) => 6 + (height - bottom - 6) * (high - Math.log10(Math.max(1e-4, loss))) / Math.max(0.1, high - low);
  const x = (k) => left + (width - left - 6) * (losses.length > 1 ? k / (losses.length - 1) : 0.5);
  const svg = drawing("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `loss over ${steps} steps: ${losses.join(", ")}` });
  for (const power of [-4, -3, -2, -1, 0, 1]) {
    for (const factor of [1, 3]) {
      const loss = factor * 10 ** power;
      if (Math.log10(loss) < low - 0.05 || Math.log10(loss) > high + 0.05) continue;
      svg.append(drawing("line", { x1: left, x2: width - 6, y1: y(loss), y2: y(loss) }), drawing("text", { x: left - 6, y: y(loss) + 4, "text-anchor": "end" }, String(Number(loss.toPrecision(1)))));
    }
  }
  svg.append(drawing("polyline", { points: losses.map((loss, k) => `${x(k).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") }));
  svg.append(drawing("text", { x: left, y: height - 4 }, "step 1"), drawing("text", { x: width - 6, y: height - 4, "text-anchor": "end" }, `step ${steps}; loss in nats a token`));
  return svg;
}

const ENDS = { steps: "took all its steps", "leave-one-out": "stopped early: what was held out was answered", deadline: "stopped by the clock", diverged: "diverged: the adapter is what it was at the start" };

function learning(content) {
  const learnt = content.adaptation, made = [];
  if (!learnt || learnt.steps === undefined) {
    const why = content.stage === "unadapted" ? "There was no time for it so far: the answer is that of the cheap pass." : content.fallback ? "It failed." : "There was none.";
    return [element("p", { class: "muted" }, why)];
  }
  const rows = [["steps", `${learnt.steps}, ${learnt.tokens.toLocaleString("en")} tokens`], ["how it ended", ENDS[learnt.ended] || learnt.ended],
    ["loss, first and last tenth", `${learnt.first_loss.toFixed(3)} to ${learnt.last_loss.toFixed(3)} nats`],
    ["leave-one-out", `${Math.round(100 * learnt.leave_one_out)}% of the last held-out outputs answered exactly`],
    ["time of one worker", `${learnt.seconds.toFixed(1)} s adapting, ${content.asking.toFixed(1)} s asking`]];
  if (learnt.dropped) rows.push(["samples lost", `up to ${learnt.dropped} demonstrations`]);
  const list = element("dl", { class: "figures" }, ...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  const curve = learnt.losses && learnt.losses.length ? lossCurve(learnt.losses, learnt.steps) : element("p", { class: "muted" }, "This run kept no loss curve.");
  made.push(element("div", { class: "learning" }, curve, list));
  return made;
}

function failures(content) {
  const found = content.failures || [];
  if (!found.length) return [];
  return [element("p", {}, `${found.length} ${found.length === 1 ? "try" : "tries"} failed:`), element("ol", {}, ...found.map((says) => element("li", {}, says)))];
}

// So large that cells are readable, if a pair has room beside each other.
function sideOfPairs(content) {
  const grids = [...content.train.flat(), ...content.test, ...(content.solution || [])];
  const wanted = Math.max(240, READABLE * Math.max(...grids.flatMap(sidesOf)) + 1);
  return Math.min(wanted, Math.max(90, ($("task").clientWidth - 42) / 2));
}

function pairs(content) {
  const side = sideOfPairs(content);
  return element("div", { class: "pairs" }, ...content.train.map(([input, output], k) => {
    const grids = [["input", input], ["output", output]].map(([name, text]) => gridCanvas(`demonstration ${k + 1}, ${name}`, text, { name: `train-${k}-${name}`, side }));
    const arrow = element("span", { class: "arrow", "aria-hidden": "true" }, "→");
    const caption = element("figcaption", {}, element("b", {}, `${k + 1}`), ` ${shapeOf(input)} → ${shapeOf(output)}`);
    return element("figure", {}, caption, element("div", { class: "pair" }, grids[0], arrow, grids[1]));
  }));
}

function attemptsOf(content, attempts, t, prefix = "") {
  const right = content.solution && content.solution[t];
  return attempts.map((grid, k) => gridFigure(`attempt ${k + 1}`, grid, { name: `${prefix}attempt-${t}-${k}`, side: sideOfPairs(content), right, says: right ? "" : shapeOf(grid) }));
}

function show(i) {
  const content = task(i), row = rows[i], body = $("task-body");
  document.title = `${content.id} – ${TITLE}`;
  $("no-room").hidden = true;
  body.replaceChildren(element("h1", {}, element("span", { class: "id" }, content.id), " ", element("span", { class: "state" }, ...[...row.cells[1].cloneNode(true).childNodes])));
  if (content.reasons && content.reasons.length) body.append(element("ul", { class: "why" }, ...content.reasons.map((says) => element("li", {}, says))));
  body.append(element("h2", {}, "Demonstrations"), pairs(content));
  if (content.runs) { showBeside(content, body); place(i); return; }
  content.test.forEach((input, t) => {
    const many = content.test.length > 1 ? ` ${t + 1}` : "", right = content.solution && content.solution[t];
    const side = sideOfPairs(content);
    const shown = [gridFigure("test input", input, { name: `test-${t}`, side, says: shapeOf(input) }), ...attemptsOf(content, content.attempts[t] || [], t)];
    if (right) shown.push(gridFigure("right output", right, { name: `solution-${t}`, side, says: shapeOf(right) }));
    body.append(element("h2", {}, `Test${many}`), element("div", { class: "pairs" }, ...shown));
    if (!right) body.append(element("p", { class: "muted" }, "The solution is not known."));
  });
  body.append(element("h2", {}, "Adaptation"), ...learning(content), ...failures(content));
  content.candidates.forEach((found, t) => {
    const many = content.test.length > 1 ? `, test ${t + 1}` : "";
    body.append(element("h2", {}, `Candidates${many}: ${found.length}`));
    if (t === 0 && found.length) body.append(element("p", { class: "key" }, `Each bar is a view: full height where the answer is certain (0 nats), half of it at −${HALF} nats, dotted where it was not scored.`, element("span", {}, element("i", { class: "swatch" }), "the view answered it; a dot: its search found it")));
    body.append(element("ol", { class: "candidates" }, ...found.map((one, place) => candidateItem(one, gridOf(one, found), place, t, content))));
  });
  if (content.error) body.append(keptOpen(element("details", { id: `error of ${content.id}` }, element("summary", {}, "What went wrong"), element("pre", {}, content.error))));
  place(i);
}

function showBeside(content, body) { // two runs of it
  const lossesOf = (run) => (run.adaptation && run.adaptation.losses) || [], losses = content.runs.flatMap(lossesOf);
  content.test.forEach((input, t) => {
    const many = content.test.length > 1 ? ` ${t + 1}` : "", right = content.solution[t], side = sideOfPairs(content);
    body.append(element("h3", {}, `Test${many}`), element("div", { class: "pairs" },
      gridFigure("test input", input, { name: `test-${t}`, side, says: shapeOf(input) }),
      gridFigure("right output", right, { name: `solution-${t}`, side, says: shapeOf(right) })));
    body.append(element("div", { class: "two" }, ...content.runs.map((run, k) => element("div", {},
      element("h4", {}, element("b", { class: "letter" }, "AB"[k]), run.attempts.length ? ` ${run.votes} of ${run.views} views gave attempt 1; ${run.candidates} candidates` : " no answer"),
      element("div", { class: "pairs" }, ...attemptsOf(content, run.attempts[t] || [], t, "AB"[k]))))));
  });
  body.append(element("div", { class: "two" }, ...content.runs.map((run, k) => element("div", {},
    element("h3", {}, element("b", { class: "letter" }, "AB"[k]), " Why"),
    run.reasons.length ? element("ul", { class: "why" }, ...run.reasons.map((says) => element("li", {}, says))) : element("p", {}, "Solved."),
    ...(lossesOf(run).length ? [lossCurve(run.adaptation.losses, run.adaptation.steps, losses)] : [])))));
}

function place(i) {
  const along = alongOf(i), at = along.indexOf(i);
  $("place").textContent = `${at + 1} of ${along.length}${along === order ? "" : ", hidden by the filters"}`;
  $("previous").disabled = at <= 0;
  $("next").disabled = at >= along.length - 1;
}

const alongOf = (i) => (order.includes(i) ? order : sorted(rows.map((_, k) => k))); // the tasks that arrows go along

// ---- the list ----

const rows = all("#table tbody tr"), cards = all(".card");
const state = { search: "", states: [], kind: "", sort: rows.length ? Number($("table").dataset.sort) : 0, down: false, table: false, numbers: false, scroll: 0, opened: [] };
const TITLE = document.title;
let order = rows.map((_, i) => i), open = null;

const kept = {
  read(name) { try { return JSON.parse(sessionStorage.getItem(name + location.pathname)); } catch { return null; } },
  write(name, value) { try { sessionStorage.setItem(name + location.pathname, JSON.stringify(value)); } catch { /* a page without storage */ } },
};

function valueOf(row, column) {
  const said = row.cells[column].dataset.v;
  return said === "" ? null : Number.isNaN(Number(said)) || column === 0 ? said : Number(said);
}

function keptOpen(details, toggled = () => {}) { // over a reload too
  details.addEventListener("toggle", () => {
    state.opened = [...state.opened.filter((id) => id !== details.id), ...(details.open ? [details.id] : [])];
    kept.write("state", state);
    toggled();
  });
  details.open = state.opened.includes(details.id);
  return details;
}

function sorted(which) {
  const keys = which.map((i) => [i, valueOf(rows[i], state.sort)]);
  keys.sort(([i, a], [j, b]) => {
    if (a === null || b === null) return (a === null) - (b === null) || i - j; // what is not known comes last
    return (a < b ? -1 : a > b ? 1 : 0) * (state.down ? -1 : 1) || i - j;
  });
  return keys.map(([i]) => i);
}

function arrange() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const isShown = (row) => (!state.states.length || state.states.includes(row.dataset.state))
    && (!state.kind || row.dataset.kinds === state.kind) && words.every((word) => row.dataset.words.includes(word));
  order = sorted(rows.map((_, i) => i).filter((i) => isShown(rows[i])));
  const shown = new Set(order);
  rows.forEach((row, i) => { row.hidden = cards[i].hidden = !shown.has(i); });
  $("table").querySelector("tbody").append(...order.map((i) => rows[i]));
  $("cards").append(...order.map((i) => cards[i]));
  $("count").textContent = order.length === rows.length ? `${rows.length} tasks` : `${order.length} of ${rows.length} tasks`;
  all("th").filter((th) => th.closest("#table")).forEach((th, k) => th.setAttribute("aria-sort", k === state.sort ? (state.down ? "descending" : "ascending") : "none"));
  all("[data-state]").filter((one) => one.closest(".chips")).forEach((chip) => chip.setAttribute("aria-pressed", String(state.states.includes(chip.dataset.state))));
  all("button[data-kind]").forEach((one) => one.classList.toggle("on", one.dataset.kind === state.kind && state.kind !== ""));
  $("search").value = state.search;
  $("kind").value = state.kind;
  $("sort").value = state.sort;
  $("as-table").checked = state.table;
  $("numbers").checked = $("numbers2").checked = state.numbers;
  $("table").hidden = !state.table;
  $("cards").hidden = state.table;
  $("clear").hidden = !words.length && !state.states.length && !state.kind;
  sideways();
  kept.write("state", state);
}

function sideways() {
  $("sideways").hidden = !state.table || $("table").scrollWidth <= $("table").clientWidth;
}

function set(changes) {
  Object.assign(state, changes);
  arrange();
}

const isDown = (column) => column > 1 && !("least" in all("#table th button")[column].dataset);

function sortBy(column) {
  set(column === state.sort ? { down: !state.down } : { sort: column, down: isDown(column) });
}

function thumbnails(entries) {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    watcher.unobserve(entry.target);
    thumbnail(entry.target);
  }
}
const watcher = new IntersectionObserver(thumbnails, { rootMargin: "400px" });

function thumbnail(card) {
  const content = task(Number(card.dataset.i)), [input, answer] = all("canvas", card);
  const side = document.documentElement.clientWidth <= 640 ? 44 : 66;
  draw(input, content.test[0], side, { most: 10 });
  const given = content.runs ? content.solution[0] : content.attempts[0] && content.attempts[0][0];
  if (given) draw(answer, given, side, { most: 10 });
}

function go(i) {
  location.hash = i === null ? "" : "task=" + encodeURIComponent(task(i).id);
  follow(); // at once: the browser says so later, and the next key may come before
}

function follow() { // the address says which task is open
  const wanted = /^#task=(.*)$/.exec(location.hash);
  let id = null;
  try { id = wanted && decodeURIComponent(wanted[1]); } catch { /* no address of ours */ }
  const i = id === null ? -1 : rows.findIndex((row) => row.cells[0].dataset.v === id);
  const before = open;
  if (i === (before === null ? -1 : before)) return;
  if (before === null && i >= 0) state.scroll = window.scrollY;
  open = i >= 0 ? i : null;
  $("overview").hidden = open !== null;
  $("task").hidden = open === null;
  if (open !== null) {
    show(open);
    window.scrollTo(0, 0);
    $("task").focus({ preventScroll: true });
  } else if (before !== null) {
    document.title = TITLE;
    window.scrollTo(0, state.scroll);
    (state.table ? rows[before].querySelector("a") : cards[before]).focus({ preventScroll: true });
  }
}

function step(by) {
  const along = alongOf(open), at = along.indexOf(open);
  if (along[at + by] !== undefined) go(along[at + by]);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("large").open) return;
  const isTyping = event.target.matches("input[type=search], select, textarea");
  if (event.target === $("search") && event.key === "Escape") { // which alone empties the box in some browsers
    event.preventDefault();
    if (state.search) set({ search: "" }); else event.target.blur();
    return;
  }
  if (event.target === $("search") && event.key === "Enter" && order.length === 1) { go(order[0]); return; }
  if (event.key === "Escape") { if (open !== null) go(null); else if (isTyping) event.target.blur(); return; }
  if (isTyping) return;
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (by && open !== null) { step(by); event.preventDefault(); return; }
  if (by) {
    const links = order.map((i) => (state.table ? rows[i].querySelector("a") : cards[i])), at = links.indexOf(document.activeElement);
    const next = links[at < 0 ? (by > 0 ? 0 : links.length - 1) : at + by];
    if (next) { next.focus(); event.preventDefault(); }
  } else if (event.key === "/" && open === null) { $("search").focus(); event.preventDefault(); } else if (event.key === "n") setNumbers(!state.numbers);
  else if (event.key === "d" && open !== null) { $("marks").checked = !$("marks").checked; show(open); }
}

function setNumbers(on) {
  set({ numbers: on });
  if (open !== null) show(open);
}

function start() {
  Object.assign(state, kept.read("state") || {});
  if (!(state.sort < rows[0].cells.length)) state.sort = 0;
  $("clear").addEventListener("click", () => set({ search: "", states: [], kind: "" }));
  $("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); }); // beside it
  if ($("all-settings")) keptOpen($("all-settings"));
  window.addEventListener("resize", sideways);
  $("search").addEventListener("input", (event) => set({ search: event.target.value }));
  all(".chips button").forEach((chip) => chip.addEventListener("click", () => {
    const name = chip.dataset.state;
    set({ states: state.states.includes(name) ? state.states.filter((one) => one !== name) : [...state.states, name] });
  }));
  all("button[data-kind]").forEach((one) => one.addEventListener("click", () => {
    set({ kind: state.kind === one.dataset.kind ? "" : one.dataset.kind, states: [], search: "" });
    $("search").scrollIntoView({ block: "nearest" });
  }));
  $("kind").addEventListener("change", (event) => set({ kind: event.target.value }));
  $("sort").addEventListener("change", (event) => set({ sort: Number(event.target.value), down: isDown(Number(event.target.value)) }));
  all("#table th button").forEach((one, k) => one.addEventListener("click", () => sortBy(k)));
  $("as-table").addEventListener("change", (event) => set({ table: event.target.checked }));
  for (const id of ["numbers", "numbers2"]) $(id).addEventListener("change", (event) => setNumbers(event.target.checked));
  $("marks").addEventListener("change", () => open !== null && show(open));
  $("back").addEventListener("click", () => go(null));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", follow);
  arrange();
  cards.forEach((card) => watcher.observe(card));
  window.addEventListener("beforeprint", () => cards.forEach(thumbnail));
  follow();
}

function theme() {
  let chosen = "";
  try { chosen = localStorage.getItem("arc_solver theme") || ""; } catch { /* as the system */ }
  const apply = () => { if (chosen) document.documentElement.dataset.theme = chosen; else delete document.documentElement.dataset.theme; };
  $("theme").value = chosen;
  $("theme").addEventListener("change", (event) => {
    chosen = event.target.value;
    try { localStorage.setItem("arc_solver theme", chosen); } catch { /* for this time only */ }
    apply();
  });
  apply();
}

theme();
if (rows.length) start();
if ("running" in document.body.dataset) {
  const paused = () => {
    if (!isOn("reload")) return "This page does not reload itself now";
    if ($("search") && document.activeElement === $("search")) return "Paused while you type";
    return $("large") && $("large").open ? "Paused while a grid is enlarged" : "";
  };
  const say = () => {
    const { running, every } = document.body.dataset, since = Date.now() / 1000 - Number(running);
    const isLate = since > LATE * Number(every) + RELOAD_MS / 1000, age = `${Math.round(since / 60)} minutes`;
    let says = "This page reloads itself.";
    if (paused()) says = isLate ? `${paused()}: what you see is ${age} old.` : `${paused()}.`;
    else if (isLate) says = `But nothing new was written for ${age}: it may have been killed. bin/report on its folder says how it stands.`;
    $("pulse").textContent = paused() ? "paused" : isLate ? `${age} old` : ""; // where a task is open too
    if ($("fresh").textContent !== says) $("fresh").textContent = says; // else it would be read out each time
  };
  say();
  for (const event of ["focusin", "focusout", "change"]) document.addEventListener(event, () => setTimeout(say));
  setInterval(() => {
    say();
    if (!paused() && !document.hidden) location.reload();
  }, RELOAD_MS);
}
