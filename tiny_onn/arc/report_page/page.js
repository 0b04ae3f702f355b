"use strict";
// Grids are strings: rows of digits joined by slashes. Colours: the palette of arcprize.org.
const PALETTE = ["#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00",
                 "#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231"];
const NAMES = { all: "All", solved: "Solved", near: "Near miss", unsolved: "Unsolved", unknown: "No truth" };
const FILTERS = Object.keys(NAMES);
const data = JSON.parse(document.getElementById("data").textContent);
const state = { filter: "all", query: "", current: -1, marks: true };
const byId = (id) => document.getElementById(id);
const drawings = new WeakMap(); // canvas -> { rows, truth }
const cards = [];               // { task, node } in the order of the page

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// ---- drawing -------------------------------------------------------------------------------

function gridCanvas(code, label, truth, side) {
  const rows = code.split("/");
  const canvas = el("canvas", { class: side || "out", role: "img", "aria-label": `${label}, ${rows.length} rows by ${rows[0].length} columns` });
  canvas.style.setProperty("--w", rows[0].length);
  canvas.style.setProperty("--h", rows.length);
  drawings.set(canvas, { rows, truth: truth ? truth.split("/") : null });
  return canvas;
}

function draw(canvas) {
  const { rows, truth } = drawings.get(canvas);
  const scale = window.devicePixelRatio || 1;
  const cell = (canvas.clientWidth - 1) / rows[0].length;
  if (cell <= 0) return;
  canvas.width = Math.round(canvas.clientWidth * scale);
  canvas.height = Math.round(canvas.clientHeight * scale);
  const context = canvas.getContext("2d");
  const line = Math.max(1, Math.round(scale));
  const edge = (index) => Math.round(index * cell * scale);
  context.fillStyle = "#555555";
  context.fillRect(0, 0, canvas.width, canvas.height);
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x++) {
      context.fillStyle = PALETTE[row[x]];
      context.fillRect(edge(x) + line, edge(y) + line, edge(x + 1) - edge(x) - line, edge(y + 1) - edge(y) - line);
    }
  });
  const comparable = truth && truth.length === rows.length && truth[0].length === rows[0].length;
  if (!comparable || !state.marks) return;
  rows.forEach((row, y) => {
    for (let x = 0; x < row.length; x++) if (row[x] !== truth[y][x]) cross(context, edge(x), edge(y), cell * scale, scale);
  });
}

function cross(context, left, top, size, scale) {
  const inset = Math.max(size * 0.24, 1.5 * scale);
  const path = new Path2D();
  path.moveTo(left + inset, top + inset);
  path.lineTo(left + size - inset + scale, top + size - inset + scale);
  path.moveTo(left + size - inset + scale, top + inset);
  path.lineTo(left + inset, top + size - inset + scale);
  context.lineCap = "round";
  const width = Math.max(1.4 * scale, Math.min(2.5 * scale, size * 0.12));
  for (const [color, extra] of [["#000000", 2 * scale], ["#ffffff", 0]]) {
    context.strokeStyle = color;
    context.lineWidth = width + extra;
    context.stroke(path);
  }
}

// Cards are drawn when they come near the screen and let go of their bitmaps when they leave.
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.dataset.near = entry.isIntersecting ? "1" : "";
    for (const canvas of entry.target.querySelectorAll("canvas")) {
      if (entry.isIntersecting) draw(canvas); else canvas.width = canvas.height = 0;
    }
  }
}, { rootMargin: "600px 0px" });

function redraw(everything) {
  for (const { node } of cards) {
    if (node.dataset.near || everything) node.querySelectorAll("canvas").forEach(draw);
  }
}

// ---- cards ---------------------------------------------------------------------------------

const longestSide = (grids) => Math.max(1, ...grids.map((code) => { const rows = code.split("/"); return Math.max(rows.length, rows[0].length); }));

// Pixels a cell for inputs and for outputs: each fills the target, neither over twice the other.
function cellSizes(inputs, outputs, target) {
  const fit = (grids) => Math.max(4, Math.min(22, Math.floor(target / longestSide(grids))));
  const [one, two] = [fit(inputs), fit(outputs)];
  return [Math.min(one, 2 * two), Math.min(two, 2 * one)];
}

function setCells(node, inputs, outputs, wide, narrow) {
  for (const [name, target] of [["wide", wide], ["narrow", narrow]]) {
    const [one, two] = cellSizes(inputs, outputs, target);
    node.style.setProperty(`--in-${name}`, `${one}px`);
    node.style.setProperty(`--out-${name}`, `${two}px`);
  }
}

function figure(code, label, truth, caption, below, side) {
  const picture = code === null ? el("div", { class: "absent" }, "no grid") : gridCanvas(code, label, truth, side);
  return el("figure", {}, el("figcaption", {}, ...caption), picture, ...below);
}

function size(code) {
  const rows = code.split("/");
  return `${rows.length}×${rows[0].length}`;
}

function verdict(attempt, truth) {
  if (attempt.wrong === null) return [];
  if (attempt.wrong === 0) return [el("span", { class: "verdict solved" }, "✓ right")];
  const text = attempt.wrong < 0 ? `size, expected ${size(truth)}` : plural(attempt.wrong, "wrong cell");
  return [el("span", { class: "verdict unsolved" }, `✗ ${text}`)];
}

function confidence(attempt) {
  const lines = [];
  if (attempt.note) lines.push(el("span", { class: "fallback" }, attempt.note));
  if (attempt.reason) lines.push(el("span", { class: "fallback" }, `fallback: ${attempt.reason}`));
  if (attempt.views > 0 && !attempt.reason) {
    const share = attempt.votes / attempt.views;
    const bar = el("i");
    bar.style.width = `${Math.min(100, 100 * share)}%`;
    lines.push(el("div", { class: "votes" }, bar));
    lines.push(el("span", {}, `${attempt.votes} of ${plural(attempt.views, "vote")} (${Math.round(100 * share)}%)`));
  }
  if (typeof attempt.logprob === "number") lines.push(el("span", {}, `log-likelihood ${attempt.logprob.toFixed(2).replace("-", "−")}`));
  return lines.length ? [el("div", { class: "confidence" }, ...lines)] : [];
}

function attemptFigure(attempt, rank, truth) {
  const name = `Attempt ${rank + 1}`;
  const caption = [el("b", {}, name), attempt.grid ? ` ${size(attempt.grid)}` : "", el("br")];
  const judged = verdict(attempt, truth);
  caption.push(...(judged.length || truth === null ? judged : ["\u00a0"]));
  const node = figure(attempt.grid, name, truth, caption, confidence(attempt));
  node.className = "attempt";
  if (attempt.wrong !== null) node.dataset.wrong = attempt.wrong;
  return node;
}

function card(task, index) {
  const right = task.tests.filter((test) => test.outcome === "solved").length;
  const notes = task.tests.length > 1 ? [el("span", { class: "note" }, task.outcome === "unknown" ? plural(task.tests.length, "test") : `${right} of ${task.tests.length} tests right`)] : [];
  const demos = el("div", { class: "demos" }, ...task.demos.map(([input, output], number) => el("div", { class: "pair" },
    gridCanvas(input, `demonstration ${number + 1} input`, null, "in"), el("span", { class: "arrow" }, "→"),
    gridCanvas(output, `demonstration ${number + 1} output`))));
  setCells(demos, task.demos.map((pair) => pair[0]), task.demos.map((pair) => pair[1]), 150, 132);
  const node = el("article", { class: "task", id: `task-${task.id}`, "data-outcome": task.outcome, tabindex: "-1" },
    el("header", {},
      el("h2", {}, el("a", { href: `#task=${encodeURIComponent(task.id)}` }, task.id)),
      el("span", { class: `badge ${task.outcome}` }, el("span", { class: "dot" }), NAMES[task.outcome]), ...notes),
    el("p", { class: "label" }, plural(task.demos.length, "demonstration")), demos,
    ...task.tests.map((test, number) => testRow(test, number, task.tests.length)));
  cards.push({ task, node, index });
  return node;
}

function testRow(test, number, total) {
  const caption = (name, code) => [el("b", {}, name), ` ${size(code)}`, el("br"), "\u00a0"];
  const figures = [figure(test.input, "test input", null, caption("Input", test.input), [], "in"),
    ...test.attempts.map((attempt, rank) => attemptFigure(attempt, rank, test.truth))];
  if (test.truth !== null) figures.push(figure(test.truth, "truth", null, caption("Truth", test.truth), []));
  const answers = [test.truth, ...test.attempts.map((attempt) => attempt.grid)].filter(Boolean);
  const grids = el("div", { class: "grids" }, ...figures);
  setCells(grids, [test.input], answers, 220, 156);
  return el("section", { class: "test", "data-outcome": test.outcome },
    el("p", { class: "label" }, total > 1 ? `Test ${number + 1} of ${total}` : "Test"), grids);
}

// ---- top of the page -----------------------------------------------------------------------

function fillTop() {
  document.title = data.title;
  byId("title").textContent = data.title;
  if (data.score) {
    const percent = (share) => `${(100 * share).toFixed(1)}%`;
    byId("score").append(el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, "Score"), el("th", {}, "pass@1"), el("th", {}, "pass@2"))),
      el("tbody", {}, ...data.score.map(([rule, meaning, one, two]) => el("tr", {},
        el("th", { scope: "row" }, rule, el("small", {}, meaning)), el("td", {}, percent(one)), el("td", { class: "main" }, percent(two)))))));
  }
  if (data.facts.length) {
    byId("facts").append(el("dl", { class: "facts" }, ...data.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  }
  const outcomes = FILTERS.slice(1).filter((name) => data.counts[name] > 0);
  byId("share").setAttribute("aria-label", outcomes.map((name) => `${NAMES[name]} ${data.counts[name]}`).join(", "));
  for (const name of outcomes) {
    const part = el("i", { class: name, title: `${NAMES[name]}: ${data.counts[name]}` });
    part.style.flexGrow = data.counts[name];
    byId("share").append(part);
  }
  FILTERS.forEach((name, key) => {
    const count = name === "all" ? data.tasks.length : data.counts[name];
    const button = el("button", { type: "button", "data-filter": name, title: `${NAMES[name]} (${key})` },
      ...(name === "all" ? [] : [el("span", { class: `dot ${name}` })]), NAMES[name], el("b", {}, String(count)));
    button.disabled = count === 0 && name !== "all";
    button.addEventListener("click", () => show({ filter: name }));
    byId("filters").append(button);
  });
}

// ---- filter, search, address ---------------------------------------------------------------

const visible = () => cards.filter(({ node }) => !node.hidden);

function show(change, keepAddress) {
  Object.assign(state, change);
  const query = state.query.trim().toLowerCase();
  for (const { task, node } of cards) {
    node.hidden = !((state.filter === "all" || task.outcome === state.filter) && task.id.toLowerCase().includes(query));
  }
  for (const button of byId("filters").children) {
    const pressed = button.dataset.filter === state.filter;
    button.setAttribute("aria-pressed", String(pressed));
    if (pressed) keepInSight(button);
  }
  const count = visible().length;
  byId("shown").textContent = `${plural(count, "task")} shown`;
  byId("empty").hidden = count > 0;
  byId("empty").textContent = `No task matches: ${NAMES[state.filter]}${query ? `, id with "${state.query.trim()}"` : ""}.`;
  mark(-1);
  if (!keepAddress) {
    const parts = new URLSearchParams();
    if (state.filter !== "all") parts.set("filter", state.filter);
    if (query) parts.set("q", state.query.trim());
    history.replaceState(null, "", `#${parts}`);
  }
}

function keepInSight(button) {
  const strip = byId("filters");
  const [outer, inner] = [strip.getBoundingClientRect(), button.getBoundingClientRect()];
  const before = inner.left - 40 - outer.left, after = inner.right + 40 - outer.right;
  if (after > 0) strip.scrollLeft += after; else if (before < 0) strip.scrollLeft += before;
}

function mark(index, scroll) {
  if (cards[state.current]) cards[state.current].node.classList.remove("current");
  state.current = index;
  if (!cards[index]) return;
  cards[index].node.classList.add("current");
  if (scroll) cards[index].node.scrollIntoView({ block: "start" });
}

function step(direction) {
  const shown = visible();
  if (!shown.length) return;
  const onScreen = ({ node }) => { const box = node.getBoundingClientRect(); return box.bottom > 80 && box.top < innerHeight; };
  let at = shown.findIndex(({ index }) => index === state.current);
  if (at < 0 || !onScreen(shown[at])) {
    at = shown.findIndex(onScreen);
    at = at < 0 ? 0 : direction > 0 ? at : Math.max(0, at - 1);
  } else {
    at = Math.max(0, Math.min(shown.length - 1, at + direction));
  }
  mark(shown[at].index, true);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const filter = FILTERS.includes(parts.get("filter")) ? parts.get("filter") : "all";
  byId("search").value = parts.get("q") || "";
  show({ filter, query: parts.get("q") || "" }, true);
  const wanted = cards.findIndex(({ task }) => task.id === parts.get("task"));
  if (wanted >= 0) mark(wanted, true);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

// ---- start ---------------------------------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(prefersDark.matches ? "dark" : "light");
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
const swapTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
const openHelp = () => byId("help").showModal();

fillTop();
byId("tasks").append(...data.tasks.map(card));
readAddress();
cards.forEach(({ node }) => near.observe(node));

byId("theme").addEventListener("click", swapTheme);
byId("help-open").addEventListener("click", openHelp);
byId("search").addEventListener("input", (event) => show({ query: event.target.value }));
addEventListener("hashchange", readAddress);
addEventListener("resize", () => redraw(false));
addEventListener("beforeprint", () => redraw(true));
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (document.activeElement === byId("search")) {
    if (event.key === "Escape" || event.key === "Enter") byId("search").blur();
    return;
  }
  const digit = FILTERS["01234".indexOf(event.key)];
  if (event.key.length === 1 && digit) { if (digit === "all" || data.counts[digit] > 0) show({ filter: digit }); }
  else if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "m") { state.marks = !state.marks; redraw(false); }
  else if (event.key === "t") swapTheme();
  else if (event.key === "?") openHelp();
  else if (event.key === "/") byId("search").focus();
  else return;
  event.preventDefault();
});
