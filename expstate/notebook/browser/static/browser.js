// The page of expstate's browser. Everything that comes from the kernel is set as text, never as markup; nothing is loaded from anywhere.
//
// In order: small parts; the link to the kernel; ground (light or dark); the view, which holds what is shown; query, table, plot and footer on
// the left; the tree, and the four tabs on the right. Each part is a function that gets the view, makes its elements once and gives functions
// that bring them up to date.

const ROW = 30;          // height of a row of the table, in pixels
const PAGE = 100;        // rows that are asked for at once
const MOST_SELECTED = 500;
const SILENT_MS = 4000;  // a kernel that has not answered by then is said to be silent
const PRESSED_MS = 500;  // the longest that what comes waits for the end of a click

// ---------------------------------------------------------------------------------------------------------------- small parts

function make(tag, options = {}, ...children) {
  const { className, text, title, testid, on, ...attributes } = options;
  const found = document.createElement(tag);
  if (className) found.className = className;
  if (text !== undefined) found.textContent = text;
  if (title) found.title = title;
  if (testid) found.dataset.testid = testid;
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) found.setAttribute(name, value === true ? "" : String(value));
  }
  for (const [name, listener] of Object.entries(on ?? {})) found.addEventListener(name, listener);
  found.append(...children.filter((child) => child !== null && child !== undefined));
  return found;
}

function drawn(tag, attributes = {}, text) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, String(value));
  if (text !== undefined) found.textContent = text;
  return found;
}

const button = (text, testid, click, className = "btn") => make("button", { type: "button", text, testid, className, on: { click } });
const heading = (text, plain = "") => make("p", { className: "h", title: text }, text, make("span", { className: "plain", text: plain }));

function bytesText(count) {
  let size = count;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (size < 1024 || unit === "TiB") return unit === "B" ? `${count} B` : `${size < 1000 ? Number(size.toPrecision(3)) : Math.round(size)} ${unit}`;
    size /= 1024;
  }
}

function ageText(seconds, now = Date.now() / 1000) {
  const age = Math.max(0, now - seconds);
  if (age < 60) return "now";
  if (age < 3600) return `${Math.floor(age / 60)} min ago`;
  if (age < 86400) return `${Math.floor(age / 3600)} h ago`;
  if (age < 172800) return "yesterday";
  if (age < 30 * 86400) return `${Math.floor(age / 86400)} d ago`;
  return new Date(seconds * 1000).toISOString().slice(0, 10);
}

const wholeTime = (seconds) => `${new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`;
const counted = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

function later(milliseconds, action) {
  let timer = 0;
  const call = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

/** A bar with its text and a button to cancel, for work that goes on. */
function progressLine(testid) {
  const fill = make("i");
  const text = make("span", { className: "mono dim one-line", testid: `${testid}-progress` });
  const bar = make("span", { className: "bar-of", role: "progressbar" }, fill);
  const cancel = button("Cancel", `${testid}-cancel`, () => line.job?.cancel());
  const line = {
    element: make("div", { className: "doing", hidden: true }, bar, text, cancel),
    parts: [bar, text, cancel],
    job: null,
    show(job) {
      line.job = job;
      const on = job !== null;
      line.element.hidden = !on;
      for (const part of line.parts) part.hidden = !on;
      fill.style.width = "0";
      text.textContent = "";
    },
    tell(message) {
      if (message.total !== undefined) {
        fill.style.width = `${message.total ? (100 * message.done) / message.total : 100}%`;
        text.textContent = `${bytesText(message.done)} of ${bytesText(message.total)}`;
      } else if (message.text !== undefined) text.textContent = message.text;
    },
  };
  line.show(null);
  return line;
}

// ---------------------------------------------------------------------------------------------------------------- the kernel

class Failure extends Error {
  constructor(found) {
    super(found.message);
    Object.assign(this, found);
  }
}
class Cancelled extends Error {}

/** Keeps what comes while the pointer is down until it is up: an element that is replaced when it was pressed gets no click. */
function betweenClicks(root, hear) {
  let kept = null;
  const release = () => {
    for (const message of kept ?? []) queueMicrotask(() => hear(message));
    kept = null;
  };
  const soon = later(0, release);  // the click follows at once
  const patience = later(PRESSED_MS, release);  // when a scroll bar is let go, nothing tells
  const down = () => {
    kept ??= [];
    patience();
  };
  root.addEventListener("pointerdown", down, true);
  for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, soon, true);
  return {
    hear: (message) => (kept ? kept.push(message) : hear(message)),
    close() {
      for (const end of ["pointerup", "pointercancel"]) window.removeEventListener(end, soon, true);
      soon.cancel();
      patience.cancel();
    },
  };
}

/** Questions to the kernel. `ask` gives a promise; the promise's `cancel` stops the work. */
function connect(model, root, heard) {
  const own = Math.random().toString(36).slice(2, 10);  // the model may be shown several times: each view hears all answers
  const waiting = new Map();
  let count = 0;
  const clicks = betweenClicks(root, (message) => {
    if (message.event) return heard(message);
    const one = waiting.get(message.number);
    if (!one) return;
    if (!("result" in message || "error" in message || "cancelled" in message)) return one.progress?.(message);
    waiting.delete(message.number);
    if ("result" in message) one.resolve(message.result);
    else one.reject("error" in message ? new Failure(message.error) : new Cancelled(message.cancelled));
  });
  model.on("msg:custom", clicks.hear);
  return {
    ask(name, given = {}, progress) {
      const number = `${own}-${(count += 1)}`;
      const answer = new Promise((resolve, reject) => waiting.set(number, { resolve, reject, progress }));
      answer.cancel = () => model.send({ ask: "cancel", number });
      model.send({ ...given, ask: name, number });
      return answer;
    },
    close() {
      model.off("msg:custom", clicks.hear);
      clicks.close();
      waiting.clear();
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------- light or dark

function isDark(color) {
  const found = /^(rgba?|color)\((?:srgb )?([\d.]+)[, ]+([\d.]+)[, ]+([\d.]+)(?:[,/ ]+([\d.]+))?/.exec(color);
  if (!found || Number(found[5] ?? 1) < 0.5) return null;
  return 0.299 * found[2] + 0.587 * found[3] + 0.114 * found[4] < (found[1] === "color" ? 0.5 : 128);
}

/** Whether the ground that an element stands on is dark: the theme's if it names one, else what is behind it. */
function standsOnDark(element) {
  const probe = make("span");
  probe.style.cssText = "display:none;background-color:var(--jp-layout-color1, transparent)";
  element.append(probe);
  const themed = isDark(getComputedStyle(probe).backgroundColor);
  probe.remove();
  if (themed !== null) return themed;
  for (let above = element.parentElement; above; above = above.parentElement) {
    const found = isDark(getComputedStyle(above).backgroundColor);
    if (found !== null) return found;
  }
  return false;
}

function followGround(root) {
  const look = () => root.classList.toggle("dark", standsOnDark(root));
  const watcher = new MutationObserver(later(30, look));
  for (const one of [document.documentElement, document.body]) watcher.observe(one, { attributes: true });
  const wish = matchMedia("(prefers-color-scheme: dark)");
  wish.addEventListener("change", look);
  requestAnimationFrame(look);
  look();
  return () => {
    watcher.disconnect();
    wish.removeEventListener("change", look);
  };
}

// ---------------------------------------------------------------------------------------------------------------- the view

function open(model, root) {
  const view = {
    query: model.get("query") ?? "", sort: null, columns: null, shown: [],
    question: 0, count: 0, total: null, bytes: "", pages: new Map(), places: new Map(),
    selected: new Map(), active: 0, anchor: 0, isLive: true,
    state: { busy: false, pending: [], failures: [], can_undo: false, can_redo: false },
    tab: "Overview", root, drafts: new Map(),
  };
  view.link = connect(model, root, (message) => heard(view, message));
  view.ask = view.link.ask;
  view.keep = () => {
    model.set("query", view.query);
    model.set("selected", [...view.selected.keys()]);
    model.save_changes();
  };
  const parts = (view.parts = {});
  parts.query = queryBar(view);
  parts.plot = plot(view);
  parts.table = table(view);
  parts.notice = notice(view);
  parts.footer = footer(view);
  parts.right = rightSide(view);
  root.append(
    make("div", { className: "shell" },
      parts.query.element,
      make("div", { className: "cols" },
        make("div", { className: "left" }, parts.plot.element, parts.table.element, parts.notice.element, parts.footer.element),
        parts.right.element)),
  );
  view.refresh = later(120, () => search(view));
  search(view);
  const silent = setTimeout(() => parts.table.say("The kernel does not answer: it runs a cell, or was restarted. Then run this cell again."), SILENT_MS);
  view.ask("hello").then((state) => {
    clearTimeout(silent);
    told(view, state);
  });
  return view;
}

function heard(view, message) {
  told(view, message);
  if (message.event !== "changed") return;
  if (view.isLive) view.refresh();
  else view.parts.query.missed();
}

function told(view, { event: _, ...state }) {
  const news = (state.failures ?? []).filter((failure) => !view.state.failures.includes(failure));
  Object.assign(view.state, state);
  view.parts.footer.update();
  view.parts.right.stateChanged();
  if (news.length) view.parts.notice.show(news.join("\n"), "error");
}

/** Ask for what the query finds. While an answer is awaited later wishes wait, and only the last of them is asked. */
async function search(view) {
  if (view.searching) {
    view.searching = "again";
    return;
  }
  view.searching = "once";
  const asked = view.query;
  try {
    const sort = view.sort && `${view.sort.column}:${view.sort.descending ? "desc" : "asc"}`;
    const found = await view.ask("search", { query: asked, sort, columns: view.columns, selected: [...view.selected.keys()] });
    view.parts.query.accepted();
    showFound(view, found);
  } catch (error) {
    if (view.query === asked) view.parts.query.refused(error);
  } finally {
    const again = view.searching === "again";
    view.searching = null;
    if (again) search(view);
  }
}

function showFound(view, found) {
  view.question = found.question;
  view.count = found.count;
  view.total = found.total;
  view.bytes = found.bytes;
  view.shown = found.columns;
  view.pages = new Map([[0, found.rows]]);
  view.places = new Map(Object.entries(found.places));
  for (const id of found.gone) view.selected.delete(id);
  found.rows.forEach((row, place) => {
    if (row) view.places.set(row.id, place);
    if (row && view.selected.has(row.id)) view.selected.set(row.id, row);
  });
  view.active = Math.max(0, Math.min(view.active, view.count - 1));
  view.parts.table.reset();
  view.parts.query.update();
  view.parts.plot.load();
  selectionChanged(view, found.gone.length > 0);
}

function rowAt(view, place) {
  return view.pages.get(Math.floor(place / PAGE))?.[place % PAGE];
}

/** A row, asked for if it is not here. */
async function fetchRow(view, place) {
  await fetchPage(view, Math.floor(place / PAGE));
  return rowAt(view, place);
}

async function fetchPage(view, page) {
  const there = view.pages.get(page);
  if (there) return there instanceof Promise ? there : undefined;
  const { question } = view;
  const asked = view.ask("window", { question, start: page * PAGE, count: PAGE }).then((found) => {
    if (view.question !== question) return;
    if (found.rows === null) return view.refresh();
    view.pages.set(page, found.rows);
    found.rows.forEach((row, index) => row && view.places.set(row.id, page * PAGE + index));
    view.parts.table.draw();
  }, () => view.question === question && view.pages.delete(page));
  view.pages.set(page, asked);
  return asked;
}

function select(view, rows, { add = false, toggle = false } = {}) {
  if (!add && !toggle) view.selected.clear();
  for (const row of rows) {
    if (!row) continue;
    if (toggle && view.selected.has(row.id)) view.selected.delete(row.id);
    else view.selected.set(row.id, row);
  }
  selectionChanged(view, true);
}

function selectionChanged(view, isNew) {
  view.parts.table.draw();
  view.parts.plot.mark();
  view.parts.footer.update();
  view.parts.query.update();
  if (isNew) {
    view.parts.right.show();
    view.keep();
  }
}

// ---------------------------------------------------------------------------------------------------------------- query

const TOKEN = /("(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?)|(<=|>=|==|!=|[<>=~()])|([^\s<>=!~()"']+)|(\s+|.)/gy;
const WORDS = new Set(["and", "or", "not"]);

/** The parts of a query: its names are those before a comparison, or that stand alone. */
function tokens(text) {
  const found = [...text.matchAll(TOKEN)].map(([whole, quoted, operator, word]) => ({ text: whole, quoted, operator, word }));
  let isValue = false;
  for (const token of found) {
    token.isName = Boolean(token.word) && !isValue && !WORDS.has(token.word.toLowerCase());
    if (token.operator) isValue = !"()".includes(token.operator);
    else if (token.word || token.quoted) isValue = false;
  }
  return found;
}

function queryBar(view) {
  const mirror = make("div", { className: "mirror", "aria-hidden": "true" });
  const input = make("input", {
    type: "text", testid: "query", spellcheck: "false", autocomplete: "off", autocapitalize: "off", "aria-label": "query",
    placeholder: "loss < 0.2 and not tag = broken", title: "Fields, metrics and params: < <= > >= = != ~ and or not ( )",
  });
  input.value = view.query;
  const box = make("div", { className: "q" }, mirror, input);
  const message = make("div", { className: "query-error", testid: "query-error", role: "alert", hidden: true });
  const count = make("span", { className: "dim one-line", testid: "count" });
  const live = button("↻ live", "live", () => setLive(!view.isLive), "btn quiet");
  live.title = "New takes appear by themselves";
  const columns = columnChoice(view);
  let problem = null;

  const paint = () => {
    mirror.textContent = "";
    let at = 0;
    for (const token of tokens(input.value)) {
      const isBad = problem !== null && at + token.text.length > problem && (token.text.trim() || at >= problem);
      mirror.append(make(isBad ? "u" : token.isName ? "b" : "span", { text: token.text }));
      at += token.text.length;
    }
    if (problem !== null && problem >= input.value.length) mirror.append(make("u", { text: "\u00a0\u00a0" }));
    mirror.scrollLeft = input.scrollLeft;
  };
  const setLive = (on) => {
    view.isLive = on;
    live.textContent = on ? "↻ live" : "↻ paused";
    live.setAttribute("aria-pressed", String(on));
    live.classList.remove("up");
    if (on) search(view);
  };
  input.addEventListener("input", () => {
    view.query = input.value;
    problem = null;
    box.classList.remove("bad");
    paint();
    search(view);
  });
  input.addEventListener("scroll", () => { mirror.scrollLeft = input.scrollLeft; });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") search(view);
    if (event.key === "ArrowDown") view.parts.table.focus();
  });
  paint();
  return {
    element: make("div", {}, make("div", { className: "bar" }, box, count, columns.button, live, columns.popover), message),
    update() {
      const chosen = view.selected.size;
      const of = view.total !== null && view.total !== view.count ? ` of ${view.total.toLocaleString("en")}` : "";
      const whole = `${view.count.toLocaleString("en")}${of}${view.bytes ? ` · ${view.bytes}` : ""}`;
      count.textContent = chosen > 1 ? `${chosen.toLocaleString("en")} selected` : whole;
      count.title = whole;
    },
    accepted() {
      if (problem !== null || !message.hidden) {
        problem = null;
        paint();
      }
      box.classList.remove("bad");
      message.hidden = true;
    },
    refused(error) {
      problem = error.position ?? null;
      box.classList.add("bad");
      message.textContent = error.message;
      message.hidden = false;
      paint();
    },
    missed() {
      live.textContent = "↻ new takes";
      live.classList.add("up");
    },
    problem: () => problem,
  };
}

/** The columns of the table, ticked in a list that can be narrowed. */
function columnChoice(view) {
  const list = make("div", { className: "list" });
  const narrow = make("input", { type: "text", className: "field", placeholder: "metric or param", "aria-label": "narrow the list" });
  const popover = make("div", { className: "popover", testid: "columns-list", hidden: true }, narrow, list);
  const opener = button("Columns", "columns", () => (popover.hidden ? show() : close()), "btn quiet");
  opener.setAttribute("aria-expanded", "false");

  const close = () => {
    popover.hidden = true;
    opener.setAttribute("aria-expanded", "false");
  };
  const fill = (columns) => {
    list.textContent = "";
    const wanted = narrow.value.toLowerCase();
    for (const column of columns) {
      if (wanted && !`${column.kind} ${column.title}`.toLowerCase().includes(wanted)) continue;
      const box = make("input", { type: "checkbox" });
      box.checked = view.shown.some((one) => one.name === column.name);
      box.addEventListener("change", () => {
        const now = view.shown.map((one) => one.name).filter((name) => name !== column.name);
        view.columns = box.checked ? [...now, column.name] : now;
        search(view);
      });
      const kind = column.kind === "field" ? "" : column.kind;
      list.append(make("label", { title: column.title }, box, make("span", { className: "one-line grow", text: column.title }),
        make("span", { className: "dim", text: kind })));
    }
  };
  const show = async () => {
    popover.hidden = false;
    opener.setAttribute("aria-expanded", "true");
    const { columns } = await view.ask("columns");
    const first = new Set(view.shown.map((one) => one.name));
    const ordered = [...view.shown, ...columns.filter((one) => !first.has(one.name))];
    narrow.oninput = () => fill(ordered);
    fill(ordered);
    narrow.focus();
  };
  popover.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      close();
      opener.focus();
    }
  });
  view.root.addEventListener("pointerdown", (event) => {
    if (!popover.contains(event.target) && event.target !== opener) close();
  });
  return { button: opener, popover };
}

// ---------------------------------------------------------------------------------------------------------------- table

function table(view) {
  const head = make("div", { className: "tr head", role: "row" });
  const rows = make("div", { className: "rows" });
  const scroller = make("div", { className: "table", testid: "table", tabindex: "0", role: "grid", "aria-multiselectable": "true", "aria-label": "snapshots" }, head, rows);
  const own = `exps-${Math.random().toString(36).slice(2, 8)}`;
  const drawnRows = new Map();
  let isWaiting = false;

  const width = (column, index) => {
    if (column.time) return 98;
    const texts = (view.pages.get(0) ?? []).slice(0, 40).map((row) => String(row?.cells[index] ?? "").length);
    const longest = Math.min(24, Math.max(...texts, 0));
    return Math.round(Math.max(56, longest * 8.3 + 18, column.title.length * 7 + 30));
  };
  const label = (column) => (view.sort?.column === column.name ? `${column.title} ${view.sort.descending ? "▼" : "▲"}` : column.title);
  const sortBy = (column) => {
    const now = view.sort?.column === column.name ? view.sort : null;
    view.sort = !now ? { column: column.name, descending: false } : now.descending ? null : { column: column.name, descending: true };
    search(view);
  };
  const drawHead = () => {
    const focused = document.activeElement?.dataset?.testid;
    head.textContent = "";
    for (const column of [{ name: "name", title: "name" }, ...view.shown]) {
      const isOn = view.sort?.column === column.name;
      const one = button(label(column), `sort-${column.name}`, () => sortBy(column), `${column.numeric ? "num" : ""}${isOn ? " on" : ""}`);
      one.title = column.title;
      one.setAttribute("role", "columnheader");
      one.setAttribute("aria-sort", isOn ? (view.sort.descending ? "descending" : "ascending") : "none");
      head.append(one);
      if (focused === `sort-${column.name}`) one.focus();
    }
    scroller.style.setProperty("--columns", ["minmax(150px, 1fr)", ...view.shown.map((column, index) => `${width(column, index)}px`)].join(" "));
  };

  const rowElement = (place, row) => {
    const isOn = Boolean(row) && view.selected.has(row.id);
    const one = make("div", {
      className: `tr${isOn ? " on" : ""}${row ? "" : " waiting"}${place === view.active ? " active" : ""}`,
      role: "row", id: `${own}-${place}`, "aria-selected": String(isOn), "aria-rowindex": String(place + 1), testid: "row",
    });
    one.style.top = `${place * ROW}px`;
    if (row === null) one.append(make("span", { className: "dim", text: "deleted" }));
    else if (row === undefined) one.append(make("span"), ...view.shown.map(() => make("span")));
    else {
      one.dataset.id = row.id;
      one.append(nameCell(row), ...row.cells.map((cell, index) => valueCell(cell, view.shown[index])));
    }
    one.addEventListener("click", (event) => click(place, event));
    one.addEventListener("dblclick", () => view.parts.right.open("Objects"));
    return one;
  };

  const draw = () => {
    isWaiting = false;
    rows.style.height = `${view.count * ROW}px`;
    const top = Math.max(0, scroller.scrollTop - 2 * ROW);
    const first = Math.floor(top / ROW);
    const last = Math.min(view.count, Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + 2);
    for (let page = Math.floor(first / PAGE); page * PAGE < last; page += 1) fetchPage(view, page);
    const seen = new Set();
    for (let place = first; place < last; place += 1) {
      const row = rowAt(view, place);
      const form = `${view.question} ${row === undefined} ${row ? view.selected.has(row.id) : ""} ${place === view.active}`;
      seen.add(place);
      if (drawnRows.get(place)?.form === form) continue;
      const element = rowElement(place, row);
      if (drawnRows.has(place)) drawnRows.get(place).element.replaceWith(element);
      else rows.append(element);
      drawnRows.set(place, { form, element });
    }
    for (const [place, { element }] of drawnRows) {
      if (!seen.has(place)) {
        element.remove();
        drawnRows.delete(place);
      }
    }
    scroller.setAttribute("aria-rowcount", String(view.count));
    if (view.count) scroller.setAttribute("aria-activedescendant", `${own}-${view.active}`);
    empty.hidden = view.count > 0 || !view.question;
    empty.textContent = view.query.trim() ? "No snapshot fulfils this query." : "No snapshots yet. %snapshot take NAMES takes one.";
  };
  const empty = make("div", { className: "empty", hidden: true });
  rows.after(empty);

  const reveal = (place) => {
    const top = place * ROW;
    const height = scroller.clientHeight - head.offsetHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + ROW > scroller.scrollTop + height) scroller.scrollTop = top + ROW - height;
    draw();
  };
  const range = async (from, to) => {
    const [first, last] = from < to ? [from, to] : [to, from];
    const stop = Math.min(last, first + MOST_SELECTED - 1);
    const pages = [];
    for (let page = Math.floor(first / PAGE); page * PAGE <= stop; page += 1) pages.push(fetchPage(view, page));
    await Promise.all(pages);
    return Array.from({ length: stop - first + 1 }, (_, index) => rowAt(view, first + index));
  };
  const go = async (place, { extend = false, keep = false } = {}) => {
    if (!view.count) return;
    view.active = Math.max(0, Math.min(view.count - 1, place));
    reveal(view.active);
    if (keep) return;
    if (extend) select(view, await range(view.anchor, view.active));
    else {
      const wanted = (view.anchor = view.active);
      const row = await fetchRow(view, wanted);
      if (view.active === wanted) select(view, [row]);
    }
  };
  const click = async (place, event) => {
    const row = rowAt(view, place);
    view.active = place;
    scroller.focus({ preventScroll: true });
    if (event.shiftKey) select(view, await range(view.anchor, place));
    else {
      view.anchor = place;
      select(view, [row], { toggle: event.ctrlKey || event.metaKey });
    }
  };
  scroller.addEventListener("scroll", () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(draw);
  });
  scroller.addEventListener("keydown", (event) => {
    if (event.target !== scroller) return;
    const page = Math.max(1, Math.floor(scroller.clientHeight / ROW) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      const wanted = view.selected.size || event.ctrlKey ? view.active + steps[event.key] : event.key === "End" ? Infinity : view.active;
      go(wanted, { extend: event.shiftKey, keep: event.ctrlKey || event.metaKey });
    } else if (event.key === " ") fetchRow(view, view.active).then((row) => select(view, [row], { toggle: true }));
    else if (event.key === "Enter") view.parts.right.open("Objects", true);
    else if (event.key === "Escape") select(view, []);
    else return;
    event.preventDefault();
  });
  const resized = new ResizeObserver(() => draw());
  resized.observe(scroller);
  return {
    element: scroller, draw, reveal, go,
    say(text) {
      empty.hidden = false;
      empty.textContent = text;
    },
    reset() {
      for (const { element } of drawnRows.values()) element.remove();
      drawnRows.clear();
      drawHead();
      draw();
    },
    focus() {
      scroller.focus();
      if (!view.selected.size) go(0);
    },
    close: () => resized.disconnect(),
  };
}

function badges(row) {
  const found = row.aliases.map((text) => make("span", { className: "tag alias", text, title: `alias ${text}` }));
  if (row.pinned) found.push(make("span", { className: "tag", text: "◆ pinned", title: "pinned: it is not deleted" }));
  found.push(...row.tags.map((text) => make("span", { className: "tag", text, title: `tag ${text}` })));
  if (row.status !== "present") found.push(make("span", { className: "tag missing", text: row.status, title: `its folder: ${row.status}` }));
  return found;
}

function nameCell(row) {
  return make("span", { className: "name", role: "gridcell" }, make("span", { text: row.name, title: `${row.name}\n${row.id}` }), ...badges(row));
}

function valueCell(cell, column) {
  if (column?.time) return make("span", { className: "dim", role: "gridcell", text: ageText(cell), title: wholeTime(cell) });
  const isBytes = column?.name === "written" || column?.name === "size";
  return make("span", { className: `${column?.numeric ? "num" : ""}${isBytes ? " dim" : ""}`, role: "gridcell", text: cell, title: String(cell) });
}

// ---------------------------------------------------------------------------------------------------------------- plot

function ticks(low, high, count) {
  const rough = (high - low) / count || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) ?? 10);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}

const tickText = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(Number(value.toPrecision(4))));

function plot(view) {
  const picture = drawn("svg", { role: "img" });
  const choice = make("select", { testid: "plot-metric", "aria-label": "metric of the plot" });
  const tip = make("span", { className: "tip", hidden: true });
  const element = make("div", { className: "plot", testid: "plot", hidden: true }, picture, choice, tip);
  const HEIGHT = 111;
  let series = { points: [], lines: [] };
  let metric = null;
  let at = [];

  const load = async () => {
    const { question } = view;
    const metrics = view.shown.filter((column) => column.kind === "metric").map((column) => column.name.slice("metric.".length));
    const wanted = view.sort?.column.startsWith("metric.") ? view.sort.column.slice("metric.".length) : null;
    if (!choice.dataset.chosen) metric = wanted ?? (metrics.includes(metric) ? metric : metrics[0]) ?? null;
    if (metric === null) {
      element.hidden = true;
      return;
    }
    fillChoice([...new Set([metric, ...metrics])]);
    const found = await view.ask("series", { question, metric }).catch(() => null);
    if (!found || view.question !== question) return;
    series = found;
    element.hidden = !series.points.length && !choice.dataset.chosen;
    draw();
  };
  const fillChoice = (metrics) => {
    choice.textContent = "";
    choice.append(...metrics.map((text) => make("option", { text, value: text })), make("option", { text: "other…", value: "" }));
    choice.value = metric;
  };
  choice.addEventListener("change", async () => {
    if (choice.value === "" && choice.selectedOptions[0]?.textContent === "other…") {
      const metrics = await view.ask("metrics");
      fillChoice([...new Set([metric, ...metrics])]);
      choice.lastElementChild.remove();
      choice.focus();
      return;
    }
    metric = choice.value;
    choice.dataset.chosen = "1";
    load();
  });

  const draw = () => {
    picture.textContent = "";
    const { points, lines } = series;
    const width = element.clientWidth;
    if (!points.length || !width) return;
    const steps = points.map(([step]) => step);
    const values = points.map(([, value]) => value);
    let [left, right] = [steps[0], steps[steps.length - 1]];
    let low = values.reduce((a, b) => Math.min(a, b));
    let high = values.reduce((a, b) => Math.max(a, b));
    if (left === right) [left, right] = [left - 1, right + 1];
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
    const yTicks = ticks(low, high, 3);
    const begin = Math.max(40, Math.max(...yTicks.map((tick) => tickText(tick).length)) * 5.6 + 14);
    const x = (step) => begin + 8 + ((step - left) / (right - left)) * (width - begin - 28);
    const y = (value) => 90 - ((value - low) / (high - low)) * 66;
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    picture.setAttribute("aria-label", `${metric} of ${counted(points.length, "snapshot")} against the step`);
    for (const tick of yTicks) {
      picture.append(drawn("line", { class: "grid-line", x1: begin, x2: width - 10, y1: y(tick), y2: y(tick) }),
        drawn("text", { x: 8, y: y(tick) + 3 }, tickText(tick)));
    }
    for (const tick of ticks(left, right, Math.max(2, Math.floor(width / 110)))) {
      picture.append(drawn("text", { x: x(tick), y: 106, "text-anchor": "middle" }, tickText(tick)));
    }
    at = points.map(([step, value, place]) => ({ x: x(step), y: y(value), step, value, place }));
    const edges = lines.map(([from, to]) => `M${at[from].x.toFixed(1)} ${at[from].y.toFixed(1)}L${at[to].x.toFixed(1)} ${at[to].y.toFixed(1)}`);
    const dots = at.map((one) => `M${one.x.toFixed(1)} ${one.y.toFixed(1)}h0`).join("");
    const size = points.length > 400 ? 3 : points.length > 120 ? 5 : 8;
    picture.append(drawn("path", { class: "edge", d: edges.join("") }), drawn("path", { class: "dot-rim", d: dots, "stroke-width": size }));
    if (size > 4) picture.append(drawn("path", { class: "dot-core", d: dots, "stroke-width": size - 3 }));
    picture.append(drawn("g", { class: "marks" }), drawn("circle", { class: "near", r: 7, visibility: "hidden" }));
    mark();
  };
  const mark = () => {
    const marks = picture.querySelector(".marks");
    if (!marks) return;
    marks.textContent = "";
    const places = new Set([...view.selected.keys()].map((id) => view.places.get(id)).filter((place) => place !== undefined));
    for (const one of at) if (places.has(one.place)) marks.append(drawn("circle", { class: "chosen", r: 6, cx: one.x, cy: one.y }));
  };
  const nearest = (event) => {
    const box = picture.getBoundingClientRect();
    const scale = (element.clientWidth || 1) / (box.width || 1);
    const [px, py] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let best = null;
    let least = 18 ** 2;
    for (const one of at) {
      const apart = (one.x - px) ** 2 + (one.y - py) ** 2;
      if (apart < least) [best, least] = [one, apart];
    }
    return best;
  };
  picture.addEventListener("pointermove", (event) => {
    const one = nearest(event);
    const ring = picture.querySelector(".near");
    tip.hidden = !one;
    ring?.setAttribute("visibility", one ? "visible" : "hidden");
    if (!one) return;
    ring?.setAttribute("cx", one.x);
    ring?.setAttribute("cy", one.y);
    const name = rowAt(view, one.place)?.name;
    tip.textContent = `${name ? `${name} · ` : ""}step ${one.step} · ${Number(one.value.toPrecision(5))}`;
    tip.style.top = `${one.y > 60 ? one.y - 30 : one.y + 12}px`;
    tip.style.left = `${Math.max(4, Math.min(one.x - tip.offsetWidth / 2, element.clientWidth - tip.offsetWidth - 4))}px`;
  });
  picture.addEventListener("pointerleave", () => {
    tip.hidden = true;
    picture.querySelector(".near")?.setAttribute("visibility", "hidden");
  });
  picture.addEventListener("click", async (event) => {
    const one = nearest(event);
    if (!one) return;
    const row = await fetchRow(view, one.place);
    if (!row) return;
    view.places.set(row.id, one.place);
    view.active = view.anchor = one.place;
    select(view, [row], { toggle: event.ctrlKey || event.metaKey });
    view.parts.table.reveal(one.place);
  });
  const resized = new ResizeObserver(() => draw());
  resized.observe(element);
  return { element, load, mark, close: () => resized.disconnect() };
}

// ---------------------------------------------------------------------------------------------------------------- footer

function notice(view) {
  const text = make("span", { className: "text", testid: "notice" });
  const more = make("span");
  const close = button("×", "notice-close", () => hide(), "link");
  close.setAttribute("aria-label", "close");
  const element = make("div", { className: "notice", role: "status", "aria-live": "polite", hidden: true }, text, more, close);
  const fade = later(6000, () => hide());
  const hide = () => {
    element.hidden = true;
    view.parts.table?.draw();
  };
  return {
    element, hide,
    show(message, kind = "") {
      text.textContent = message;
      text.className = `text ${kind}`;
      element.hidden = false;
      fade.cancel();
      if (kind !== "error" && kind !== "stays") fade();
    },
    failed: (error) => view.parts.notice.show(error instanceof Cancelled ? error.message || "Cancelled." : error.message, "error"),
  };
}

/** Copy a text; where the page may not, it is shown to be copied by hand. */
async function copy(view, text) {
  try {
    await navigator.clipboard.writeText(text);
    view.parts.notice.show(`Copied:\n${text.trim()}`);
  } catch {
    const field = make("textarea", { "aria-hidden": "true" });
    field.value = text;
    field.style.cssText = "position:absolute;opacity:0;width:1px;height:1px";
    view.root.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    view.parts.notice.show(`${done ? "Copied" : "Copy this"}:\n${text.trim()}`, done ? "" : "stays");
  }
}

function edit(view, action, text = "", ids = [...view.selected.keys()]) {
  return view.ask("edit", { action, ids, text }).then(() => search(view)).then(() => view.parts.right.reload());
}

function footer(view) {
  const status = make("span", { className: "dim one-line", testid: "status" });
  const ids = () => [...view.selected.keys()];
  const rows = () => [...view.selected.values()];
  const diff = button("Diff", "diff", () => view.parts.right.open("Diff"));
  const restore = button("Restore…", "restore", () => view.parts.right.open("Restore"));
  const pin = button("Pin", "pin", () => edit(view, rows().every((row) => row.pinned) ? "unpin" : "pin").catch(view.parts.notice.failed), "btn quiet");
  const word = labelInput("tag", (text) => edit(view, "tag", text).catch(view.parts.notice.failed));
  const tag = button("Tag", "tag", () => word.open(tag), "btn quiet");
  const python = button("Copy as Python", "copy", () => {
    const sort = view.sort && `${view.sort.column}:${view.sort.descending ? "desc" : "asc"}`;
    view.ask("python", { ids: ids(), query: view.query, sort }).then((text) => copy(view, text), view.parts.notice.failed);
  }, "btn quiet");
  diff.title = "Compare two, or one with live state";
  return {
    element: make("div", { className: "foot" }, diff, restore, pin, tag, word.element, python, make("span", { className: "grow" }), status),
    update() {
      const chosen = view.selected.size;
      const { busy, pending } = view.state;
      diff.disabled = chosen < 1 || chosen > 2;
      restore.disabled = chosen !== 1;
      pin.disabled = tag.disabled = chosen < 1;
      pin.textContent = chosen && rows().every((row) => row.pinned) ? "Unpin" : "Pin";
      const [first] = pending;
      const share = first?.total ? ` ${Math.floor((100 * first.done) / first.total)} %` : "";
      status.textContent = first ? `taking ${first.name}${share}${pending.length > 1 ? ` and ${pending.length - 1} more` : ""}` : busy ? "kernel busy" : "kernel idle";
    },
  };
}

/** A field for one word that takes the place of the button that opens it. */
function labelInput(what, done) {
  const field = make("input", { type: "text", className: "field", size: "12", placeholder: what, testid: `${what}-input`, "aria-label": `new ${what}`, hidden: true });
  let opener = null;
  const close = () => {
    field.hidden = true;
    field.value = "";
    if (opener) opener.hidden = false;
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && field.value.trim()) done(field.value.trim());
    if (event.key === "Enter" || event.key === "Escape") {
      close();
      opener?.focus();
    }
  });
  field.addEventListener("blur", close);
  return {
    element: field,
    open(from) {
      opener = from;
      from.hidden = true;
      field.hidden = false;
      field.focus();
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------- right side

function rightSide(view) {
  const names = ["Overview", "Objects", "Diff", "Restore"];
  const pane = make("div", { className: "pane", role: "tabpanel", testid: "pane", tabindex: "-1" });
  const foot = make("div", { className: "foot", hidden: true });
  const buttons = names.map((name) => {
    const one = button(name, `tab-${name.toLowerCase()}`, () => opened(name), "");
    one.setAttribute("role", "tab");
    return one;
  });
  const bar = make("div", { className: "tabs", role: "tablist" }, ...buttons);
  const makers = { Overview: overviewTab, Objects: objectsTab, Diff: diffTab, Restore: restoreTab };
  let current = null;
  let shownFor = null;

  const opened = (name, focus = false) => {
    view.tab = name;
    shownFor = null;
    show(focus);
    if (focus) pane.querySelector("[tabindex='0'], button, input")?.focus();
  };
  const show = (focus = false, keep = false) => {
    buttons.forEach((one, index) => {
      one.setAttribute("aria-selected", String(names[index] === view.tab));
      one.tabIndex = names[index] === view.tab ? 0 : -1;
    });
    const rows = [...view.selected.values()];
    const wanted = `${view.tab} ${rows.map((row) => row.id).join()}`;
    if (wanted === shownFor) return;
    shownFor = wanted;
    current?.close?.();
    if (!keep) {
      pane.textContent = foot.textContent = "";
      pane.scrollTop = 0;
      foot.hidden = true;
    }
    current = rows.length ? makers[view.tab](view, rows, pane, foot, focus) : null;
    if (!rows.length) {
      pane.append(make("div", { className: "empty" }, "Select a snapshot to see what is in it.",
        make("div", { text: "↑ ↓ move · Shift or Ctrl select several · Enter opens" })));
    }
  };
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (names.indexOf(view.tab) + step + names.length) % names.length;
    opened(names[next]);
    buttons[next].focus();
    event.preventDefault();
  });
  show();
  return {
    element: make("div", { className: "right" }, bar, pane, foot), show, open: opened,
    reload() {
      if (view.tab !== "Overview" || !view.selected.size) return;
      shownFor = null;
      show(false, true);
    },
    stateChanged: () => current?.stateChanged?.(),
    close: () => current?.close?.(),
  };
}

/** Something that is shown as long as the tab it belongs to is: answers that come later are dropped. */
function scope() {
  const jobs = new Set();
  const own = {
    isOpen: true,
    ask(view, name, given, progress) {
      const job = view.ask(name, given, (message) => own.isOpen && progress?.(message));
      jobs.add(job);
      const answer = job.finally(() => jobs.delete(job)).then((found) => (own.isOpen ? found : new Promise(() => {})),
        (error) => (own.isOpen ? Promise.reject(error) : new Promise(() => {})));
      answer.cancel = job.cancel;
      return answer;
    },
    close() {
      own.isOpen = false;
      for (const job of jobs) job.cancel();
    },
  };
  return own;
}

const problem = (error) => make("div", { className: "error", testid: "error", role: "alert", text: error instanceof Cancelled ? error.message || "Cancelled." : error.message });

// ---------------------------------------------------------------------------------------------------------------- tree

/** The entries of a snapshot, level by level; with `ticks` (a Map of true and false by number) each row has a box. */
function tree(view, own, id, { onOpen, onTick, ticks, isHere }) {
  const element = make("div", { role: "tree", testid: "tree", "aria-label": "entries", className: ticks ? "ticked" : "" });
  const nodes = new Map();
  let focused = null;

  const load = (node) => own.ask(view, "level", node ? { snapshot_id: id, node: node.number } : { snapshot_id: id });
  const effective = (node) => ticks.get(node.number) ?? (node.above ? effective(node.above) : false);
  const state = (node) => {
    if (!node.below) return effective(node);
    const found = new Set(node.below.map(state));
    return found.size === 1 ? [...found][0] : null;
  };
  const paint = () => {
    if (!ticks) return;
    for (const node of nodes.values()) {
      const now = state(node);
      node.box.checked = now === true;
      node.box.indeterminate = now === null;
    }
  };
  const forget = (node) => {
    for (const child of node.below ?? []) {
      ticks.delete(child.number);
      forget(child);
    }
  };
  const tick = (node) => {
    if (!node.box || node.box.disabled) return;
    const wanted = state(node) !== true;
    forget(node);
    ticks.set(node.number, wanted);
    paint();
    onTick();
  };
  const fold = (node, wanted = !node.isOpen) => {
    if (!node.opens || wanted === node.isOpen) return node.loading;
    const turning = turned(node, wanted).finally(() => { if (node.loading === turning) node.loading = null; });
    node.loading = turning;
    return turning;
  };
  const turned = async (node, wanted) => {
    node.isOpen = wanted;
    node.mark.textContent = wanted ? "▾" : "▸";
    node.element.setAttribute("aria-expanded", String(wanted));
    if (!node.below && wanted) {  // once, though it may be closed and opened again before that comes
      node.coming ??= filled(node).finally(() => { node.coming = null; });
      await node.coming;
    }
    node.group.hidden = !node.isOpen;
  };
  const filled = async (node) => {
    try {
      const { rows } = await load(node);
      node.below = rows.map((row) => add(row, node));
      node.group.replaceChildren(...node.below.flatMap((child) => [child.element, child.group]));
      paint();
    } catch (error) {
      node.group.replaceChildren(problem(error));
    }
  };
  const visible = () => [...element.querySelectorAll(".row")].filter((one) => one.offsetParent !== null);
  const focusOn = (row) => {
    if (!row) return;
    if (focused) focused.tabIndex = -1;
    focused = row;
    row.tabIndex = 0;
    row.focus();
  };
  const choose = (node) => {
    element.querySelectorAll(".row.on").forEach((one) => one.classList.remove("on"));
    node.element.classList.add("on");
    onOpen?.(node);
  };
  const add = (found, above) => {
    const node = { ...found, above, isOpen: false, below: null, depth: above ? above.depth + 1 : 0 };
    node.mark = make("span", { className: "fold", text: node.opens ? "▸" : "" });
    const first = ticks ? make("span", { className: "tick" }) : null;
    if (ticks) {
      node.box = make("input", { type: "checkbox", tabindex: "-1", "aria-label": `put back ${node.title}` });
      node.box.disabled = !isHere(node);
      node.box.addEventListener("click", (event) => {
        event.preventDefault();
        setTimeout(() => tick(node));
      });
      first.append(node.box);
    }
    const share = make("i");
    share.style.width = `${Math.max(node.share * 100, node.share > 0 ? 1 : 0)}%`;
    node.element = make("div", {
      className: `row${ticks && node.box.disabled ? " off" : ""}`, role: "treeitem", tabindex: "-1", testid: "tree-row", title: node.title, "aria-level": String(node.depth + 1),
      ...(node.opens ? { "aria-expanded": "false" } : {}),
    },
    first, make("span", { className: "label" }, node.mark, node.label),
    make("span", { className: "dim mono", text: node.detail, title: node.detail }),
    make("span", { className: "num mono", text: node.size }),
    make("span", { className: "share", title: node.size ? `${(100 * node.share).toFixed(1)} % of the snapshot` : "" }, share));
    if (!node.size) node.element.lastElementChild.style.visibility = "hidden";
    node.element.style.setProperty("--depth", node.depth);
    node.group = make("div", { role: "group", hidden: true, className: ticks ? "ticked" : "" });
    node.element.addEventListener("click", (event) => {
      if (event.target === node.box) return;
      focusOn(node.element);
      if (node.opens) fold(node);
      else choose(node);
    });
    node.element.addEventListener("keydown", (event) => keys(event, node));
    nodes.set(node.number, node);
    return node;
  };
  const keys = (event, node) => {
    if (node.loading && event.key.startsWith("Arrow")) {  // where it goes depends on what comes
      const { key } = event;
      event.preventDefault();
      node.loading.then(() => keys({ key, preventDefault() {} }, node));
      return;
    }
    const rows = visible();
    const at = rows.indexOf(node.element);
    if (event.key === "ArrowDown") focusOn(rows[at + 1]);
    else if (event.key === "ArrowUp") focusOn(rows[at - 1]);
    else if (event.key === "Home") focusOn(rows[0]);
    else if (event.key === "End") focusOn(rows[rows.length - 1]);
    else if (event.key === "ArrowRight") (node.isOpen ? focusOn(rows[at + 1]) : fold(node, true));
    else if (event.key === "ArrowLeft") (node.isOpen ? fold(node, false) : focusOn(node.above?.element));
    else if (event.key === "Enter") (node.opens ? fold(node) : choose(node));
    else if (event.key === " ") (ticks ? tick(node) : node.opens ? fold(node) : choose(node));
    else return;
    event.preventDefault();
  };
  const ready = load(null).then(async ({ rows }) => {
    const roots = rows.map((row) => add(row, null));
    element.append(...roots.flatMap((node) => [node.element, node.group]));
    if (roots.length) {
      focused = roots[0].element;
      focused.tabIndex = 0;
    }
    if (ticks) for (const node of roots) ticks.set(node.number, isHere(node));
    paint();
    const largest = roots.filter((node) => node.opens).sort((one, other) => other.share - one.share)[0];
    if (largest) await fold(largest, true);
    return roots;
  });
  return { element, ready, nodes, fold, focus: () => focused?.focus() };
}

// ---------------------------------------------------------------------------------------------------------------- overview

const pairs = (found) => make("dl", {}, ...found.flatMap(([name, value]) => [make("dt", { text: name, title: name }), make("dd", { text: value })]));

function overviewTab(view, rows, pane) {
  return rows.length > 1 ? severalOverview(view, rows, pane) : oneOverview(view, rows[0], pane);
}

function severalOverview(view, rows, pane) {
  const bytes = rows.reduce((sum, row) => sum + row.bytes, 0);
  const own = scope();
  pane.textContent = "";
  pane.append(heading(`${rows.length} selected`, ` · ${bytesText(bytes)}`),
    make("div", {}, ...rows.slice(0, 50).map((row) => make("div", { className: "one-line", title: row.name }, row.name, ...badges(row)))),
    rows.length > 50 ? make("div", { className: "dim", text: `and ${rows.length - 50} more` }) : null,
    make("div", { className: "actions" }, ...deletion(view, own, rows.map((row) => row.id))));
  return own;
}

function oneOverview(view, row, pane) {
  const own = scope();
  own.ask(view, "overview", { snapshot_id: row.id }).then((found) => {
    redraw(
      pane,
      heading(found.name),
      labels(view, found, "alias", found.aliases), labels(view, found, "tag", found.tags), noteField(view, own, found),
      ...(found.metrics.length ? [heading("Metrics"), pairs(found.metrics)] : []),
      ...(found.params.length ? [heading("Params"), pairs(found.params)] : []),
      heading("Snapshot"), pairs(found.facts),
      ...(found.provenance.length ? [heading("Where it came from"), pairs(found.provenance)] : []),
      ...(found.source ? [make("details", { open: true }, make("summary", { text: "Cell source" }), make("pre", { text: found.source, testid: "source" }))] : []),
      folded(own, "Packages", "packages", () => own.ask(view, "packages", { snapshot_id: row.id }).then(pairs)),
      folded(own, "Lineage", "lineage", () => own.ask(view, "lineage", { snapshot_id: row.id }).then((found) => lineage(view, found))),
      make("div", { className: "actions" }, ...verification(view, own, row), ...deletion(view, own, [row.id])),
    );
  }, (error) => pane.append(problem(error)));
  return own;
}

/** Put other elements into a pane, and the cursor into the field that has the place of the one that it was in, with what is half typed. */
function redraw(pane, ...elements) {
  const before = pane.getRootNode().activeElement;
  const testid = pane.contains(before) && before.dataset.testid;
  pane.replaceChildren(...elements);
  const after = testid && pane.querySelector(`[data-testid="${testid}"]`);
  if (!after) return;
  after.focus({ preventScroll: true });
  if (after.tagName === "INPUT") after.value = before.value;  // of a note there is a draft
  after.setSelectionRange?.(before.selectionStart, before.selectionEnd);
}

function folded(own, title, testid, load) {
  const inside = make("div");
  const element = make("details", { testid }, make("summary", { text: title }), inside);
  element.addEventListener("toggle", () => {
    if (!element.open || inside.childNodes.length) return;
    load().then((found) => inside.append(found.childNodes.length ? found : make("span", { className: "dim", text: "none recorded" })),
      (error) => inside.append(problem(error)));
  });
  return element;
}

function lineage(view, found) {
  const line = (one) => {
    const className = one.here ? "link here" : "link";
    return one.known && !one.here ? button(one.line, "relative", () => showRelative(view, one.id), className) : make("span", { className, text: one.line });
  };
  return make("div", { className: "lineage" },
    found.before ? make("div", { className: "dim", text: `${counted(found.before, "earlier one")}` }) : null,
    ...found.relatives.map(line), found.more ? make("div", { className: "dim", text: `and ${found.more} more` }) : null);
}

/** Show a snapshot that may not be among those that the query finds: the query becomes its id. */
async function showRelative(view, id) {
  const input = view.root.querySelector("[data-testid=query]");
  input.value = view.query = `id = ${id}`;
  input.dispatchEvent(new Event("input"));
  view.selected.clear();
  await search(view);
  while (view.searching) await new Promise((resolve) => setTimeout(resolve, 10));
  view.parts.table.go(0);
}

function labels(view, found, what, present) {
  const failed = view.parts.notice.failed;
  const field = make("input", { type: "text", className: "field", placeholder: `+ ${what}`, testid: `${what}-add`, "aria-label": `new ${what}` });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !field.value.trim()) return;
    const word = field.value.trim();
    field.value = "";  // at once: what is typed from now on is the next one
    edit(view, what, word, [found.id]).catch((error) => {
      field.value ||= word;
      failed(error);
    });
  });
  const chip = ({ text, value }) => {
    const remove = button("×", `${what}-remove`, () => edit(view, `un${what}`, value, [found.id]).catch(failed), "");
    remove.setAttribute("aria-label", `take ${what} ${text} away`);
    return make("span", { className: what === "alias" ? "tag alias" : "tag", title: text }, text, remove);
  };
  const pinned = what === "alias" && found.pinned ? make("span", { className: "tag", text: "◆ pinned" }) : null;
  return make("div", { className: "chips" }, ...present.map(chip), pinned, field);
}

function noteField(view, own, found) {
  const field = make("textarea", { className: "note", rows: "2", placeholder: "Note", testid: "note", "aria-label": "note" });
  field.value = view.drafts.get(found.id) ?? found.note;
  const save = button("Save note", "note-save", () => {
    save.disabled = true;
    view.drafts.delete(found.id);
    edit(view, "note", field.value, [found.id]).catch((error) => {
      save.disabled = false;
      view.parts.notice.failed(error);
    });
  }, "btn primary");
  save.hidden = field.value === found.note;
  field.addEventListener("input", () => {
    save.hidden = field.value === found.note;
    view.drafts.set(found.id, field.value);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save.click();
    if (event.key === "Escape") {
      field.value = found.note;
      save.hidden = true;
      view.drafts.delete(found.id);
    }
  });
  return make("div", {}, field, save);
}

function verification(view, own, row) {
  const line = progressLine("verify");
  const result = make("div", { className: "mono", testid: "verify-result" });
  const start = button("Verify", "verify", async () => {
    start.disabled = true;
    result.textContent = "";
    const job = own.ask(view, "verify", { snapshot_id: row.id }, line.tell);
    line.show(job);
    try {
      const found = await job;
      result.className = found.ok ? "mono good" : "mono error";
      result.textContent = found.lines.join("\n");
    } catch (error) {
      result.append(problem(error));
    }
    line.show(null);
    start.disabled = false;
  });
  return [start, line.element, result];
}

/** Two clicks: the first asks what would go, the second does it, if it comes soon. */
function deletion(view, own, ids) {
  let isSure = false;
  const forget = later(5000, () => reset());
  const reset = () => {
    isSure = false;
    first.textContent = "Delete…";
    first.className = "btn";
  };
  const first = button("Delete…", "delete", async () => {
    try {
      if (!isSure) {
        const { what } = await own.ask(view, "ask_delete", { ids });
        isSure = true;
        first.textContent = `Delete ${what}`;
        first.className = "btn danger";
        forget();
        return;
      }
      forget.cancel();
      first.disabled = true;
      await view.ask("delete", { ids });
      view.parts.notice.show(`Deleted ${counted(ids.length, "snapshot")}.`);
      for (const id of ids) view.selected.delete(id);
      await search(view);
      selectionChanged(view, true);
    } catch (error) {
      view.parts.notice.failed(error);
      first.disabled = false;
      reset();
    }
  });
  return [make("span", { className: "grow" }), first];
}

// ---------------------------------------------------------------------------------------------------------------- objects

function objectsTab(view, rows, pane, _foot, focus) {
  const own = scope();
  const [row] = rows;
  const title = heading(row.name);
  const place = make("div", { className: "tensor-place" });
  const opened = (node) => show(node);
  const entries = tree(view, own, row.id, { onOpen: opened });
  pane.append(title, entries.element, place);
  let latest = null;

  const show = async (node) => {
    latest?.cancel?.();
    place.textContent = "";
    const isTensor = node.kind === "tensor" || node.kind === "tied";
    const body = make("div");
    const panel = make("div", { className: "card tensor", testid: "card" }, make("span", { className: "mono path", text: node.title }), " ",
      make("span", { className: "dim", text: isTensor ? "" : node.detail }), body);
    place.append(panel);
    if (!isTensor) return;
    const line = progressLine("card");
    body.append(line.element);
    const job = (latest = own.ask(view, "card", { snapshot_id: row.id, node: node.number }, (message) => job === latest && line.tell(message)));
    line.show(job);
    try {
      const found = await job;
      if (job !== latest) return;
      panel.textContent = "";
      panel.append(...cardParts(found));
    } catch (error) {
      if (job === latest) body.replaceChildren(problem(error));
    }
  };
  entries.ready.then(() => focus && entries.focus(), (error) => pane.append(problem(error)));
  own.ask(view, "overview", { snapshot_id: row.id }).then((found) => {
    const size = found.facts.find(([name]) => name === "size")?.[1];
    title.lastChild.textContent = ` · ${size.replace(", ", " · ")}`;
  }, () => {});
  return own;
}

function cardParts(found) {
  const parts = [make("span", { className: "mono path", text: found.path }), " ", make("span", { className: "dim", text: found.form })];
  if (found.bins) {
    const picture = drawn("svg", { viewBox: "0 0 384 40", preserveAspectRatio: "none", role: "img", "aria-label": `histogram from ${found.low} to ${found.high}` });
    const most = Math.max(...found.bins, 1);
    const step = 384 / found.bins.length;
    found.bins.forEach((count, index) => {
      const height = count ? Math.max(1.2, (38 * count) / most) : 0.6;
      const bar = drawn("rect", { x: index * step, y: 40 - height, width: step * 0.875, height });
      bar.append(drawn("title", {}, count.toLocaleString("en")));
      picture.append(bar);
    });
    parts.push(picture);
  }
  if (found.stats) parts.push(make("div", { className: "k" }, ...found.stats.map(([name, value]) => make("div", { title: value }, make("b", { text: value }), name))));
  if (found.note) parts.push(make("div", { className: "dim", text: found.note }));
  return parts;
}

// ---------------------------------------------------------------------------------------------------------------- diff

function diffTab(view, rows, pane) {
  const own = scope();
  if (rows.length > 2) {
    pane.append(make("div", { className: "empty", text: `Two snapshots are compared, or one with live state; ${rows.length} are selected.` }));
    return own;
  }
  const line = progressLine("diff");
  const body = make("div");
  pane.append(body, line.element);
  const ids = rows.map((row) => row.id);
  const run = async (stats) => {
    const job = own.ask(view, "diff", { ids, stats }, line.tell);
    line.show(job);
    try {
      const found = await job;
      line.show(null);
      body.replaceChildren(...diffParts(found, pane.clientWidth - 28, () => run(true)));
      if (!found.measured && found.measures && found.quick) run(true);
    } catch (error) {
      line.show(null);
      if (stats && error instanceof Cancelled) return;
      body.append(problem(error));
    }
  };
  run(false);
  return own;
}

function diffParts(found, room, measure) {
  const { counts } = found;
  const number = (what) => counts[what].toLocaleString("en");
  const parts = [
    heading(found.title),
    make("div", { className: "mono", testid: "diff-counts" }, `${number("same")} entries same · `,
      make("span", { className: counts.changed ? "up" : "", text: `${number("changed")} changed` }), ` · ${number("added")} added · ${number("removed")} removed`),
  ];
  if (found.lines.length) parts.push(heatMap(found, room));
  if (!found.measured && found.measures && !found.quick) {
    parts.push(make("div", { className: "actions" }, button(`Measure (reads ${found.bytes} on each side)`, "measure", measure)));
  }
  if (found.facts.length) {
    parts.push(heading("Only what differs"), make("table", { className: "facts", testid: "diff-facts" },
      make("tbody", {}, ...found.facts.map(([name, old, now]) => make("tr", {}, make("td", { text: name, title: name }),
        make("td", { className: "num mono", text: old, title: old }), make("td", { className: "num mono", text: now, title: now }))))),
    found.more_facts ? make("div", { className: "dim", text: `and ${found.more_facts} more` }) : null);
  }
  if (found.entries.length) {
    parts.push(heading("Entries"), make("div", { className: "entries", testid: "diff-entries" }, ...found.entries.map(([path, change, what]) =>
      make("div", {}, make("div", { className: "mono one-line", text: path, title: path }),
        make("div", { className: "dim one-line", title: what }, make("span", { className: change === "added" ? "good" : "up", text: change }), ` ${what}`)))),
    found.more_entries ? make("div", { className: "dim", text: `and ${found.more_entries} more` }) : null);
  }
  return parts.filter((part) => part !== null);
}

/** The end of a long name that still tells it: the last part, and of a number the part before it. */
function nameEnd(name, most = 18) {
  if (name.length <= most) return name;
  const found = /[^./]+(?:[./]\d+( … .*)?)?$/.exec(name);
  return found ? `…${found[0]}` : name;
}

function heatMap(found, room) {
  const fitting = (count) => Math.max(3, Math.min(25, Math.floor((room - 190) / count) - 2));
  const usual = found.lines.map((line) => line.cells.length).filter((count) => count <= 12);
  const element = make("div", { className: "heat", testid: "heatmap", role: "table", "aria-label": "change by layer" });
  const size = fitting(usual.length ? Math.max(...usual) : 32);
  element.style.setProperty("--cell", `${size}px`);
  found.lines.forEach((line, index) => {
    if (found.heads?.at === index && size >= 12) {
      element.append(make("span"), make("div", { className: "heads" }, ...found.heads.names.map((text) => make("span", { text, title: text }))), make("span"));
    }
    const cells = line.cells.map(([level, title]) => make("i", { className: `cell ${level}`, title }));
    element.append(make("span", { className: "mono name one-line", text: nameEnd(line.name), title: line.title }),
      make("div", { className: "cells", style: `--cell:${Math.min(size, fitting(cells.length))}px` }, ...cells),
      make("span", { className: "dim mono sum one-line", text: line.summary, title: line.whole }));
  });
  const legend = make("div", { className: "legend" }, ...found.legend.map(([level, text]) => make("span", {}, make("i", { className: `cell ${level}` }), text)));
  return make("div", { style: "margin-top:8px" }, element, legend);
}

// ---------------------------------------------------------------------------------------------------------------- restore

function restoreTab(view, rows, pane, foot) {
  const own = scope();
  if (rows.length > 1) {
    pane.append(make("div", { className: "empty", text: "One snapshot is put back; select one." }));
    return own;
  }
  const [row] = rows;
  const ticks = new Map();
  const panel = make("div", { className: "card", testid: "restore-preview", "aria-live": "polite" });
  const line = progressLine("restore");
  let isRunning = false;
  let isPossible = false;
  let asked = null;

  const update = () => {
    run.disabled = isRunning || !isPossible;
    undo.disabled = isRunning || !view.state.can_undo;
    redo.disabled = isRunning || !view.state.can_redo;
    redo.hidden = !view.state.can_redo;
    room.hidden = isRunning;
  };
  const say = (...parts) => panel.replaceChildren(...parts);
  const preview = async () => {
    asked?.cancel();
    isPossible = false;
    update();
    const job = (asked = own.ask(view, "preview", { snapshot_id: row.id, ticks: Object.fromEntries(ticks) }, (message) => message.text && say(make("span", { className: "dim", text: message.text }))));
    try {
      const found = await job;
      if (job !== asked) return;
      isPossible = !found.problems.length;
      say(...(isPossible ? previewParts(found) : [make("div", { text: "It does not fit, and nothing would be changed:" }), make("div", { className: "error", text: found.problems.join("\n") })]));
    } catch (error) {
      if (job === asked) say(problem(error));
    }
    update();
  };
  const previewSoon = later(150, preview);
  const work = async (name, given, failed) => {
    isRunning = true;
    asked?.cancel();
    asked = null;
    const job = view.ask(name, given, line.tell);
    line.show(job);
    update();
    try {
      const found = await job;
      if (found.no_room) failed(new Failure({ message: found.no_room, kind: "NoUndoRoomError" }));
      else if (!own.isOpen) view.parts.notice.show(found.lines.join("\n"));
      else say(...found.lines.map((text) => make("div", { text })), make("div", { className: "dim", text: found.undo ? `Undo keeps ${found.undo}.` : "" }));
    } catch (error) {
      if (own.isOpen) failed(error);
      else view.parts.notice.failed(error);
    }
    isRunning = false;
    line.show(null);
    update();
  };
  const restore = (undoable) => work("restore", { snapshot_id: row.id, ticks: Object.fromEntries(ticks), undo: undoable }, (error) => {
    say(problem(error), error.kind === "NoUndoRoomError" ? make("div", { className: "actions" }, button("Restore without undo", "restore-no-undo", () => restore(false))) : "");
  });
  const back = (what, force = false) => work("back", { what, force }, (error) => {
    const more = error.kind === "UndoError" && view.state[`can_${what}`] && !force;
    say(problem(error), more ? make("div", { className: "actions" }, button(`${what === "undo" ? "Undo" : "Redo"} anyway`, "restore-force", () => back(what, true))) : "");
  });
  const run = button("Restore", "restore-run", () => restore(true), "btn primary");
  const undo = button("Undo", "restore-undo", () => back("undo"), "btn quiet");
  const redo = button("Redo", "restore-redo", () => back("redo"), "btn quiet");
  const room = make("span", { className: "grow" });
  foot.append(run, ...line.parts, room, undo, redo);
  foot.hidden = false;
  pane.append(heading(`Put back from ${row.name}`));
  own.ask(view, "targets", { snapshot_id: row.id }).then(async (here) => {
    const entries = tree(view, own, row.id, { ticks, isHere: (node) => here.includes(node.key), onTick: previewSoon });
    pane.append(entries.element, panel);
    await entries.ready;
    if (here.length) preview();
    else say(make("span", { text: "Nothing of it has a name in this notebook: create the objects first, then put their state back." }));
  }).catch((error) => pane.append(problem(error)));
  update();
  return { ...own, stateChanged: update, close: () => own.close() };
}

function previewParts(found) {
  const names = (list) => list.flatMap((name, index) => [index ? ", " : "", make("span", { className: "mono", text: name })]);
  const stay = found.stay.length ? ["; ", ...names(found.stay), found.stay.length === 1 ? " stays" : " stay"] : [];
  return [`${found.what} will come back into `, ...names(found.keys), ...stay, ". ", found.notes.join(" ")];
}

// ---------------------------------------------------------------------------------------------------------------- anywidget

/** Hide the table of the saved notebook, which is an output of its own, for as long as the browser is here. */
function hideStatic(model) {
  const name = model.get("static_class");
  // Two rules: where the second is not understood, an empty line is left.
  return make("style", { text: name ? `.${name} { display: none } .jp-OutputArea-child:has(.${name}) { display: none !important }` : "" });
}

function render({ model, el }) {
  // Keys are the browser's own: a notebook must not take them for its shortcuts.
  const root = make("div", { className: "exps", testid: "expstate-browser", "data-lm-suppress-shortcuts": "true" });
  root.addEventListener("keydown", (event) => event.stopPropagation());
  // Some shortcuts are bound to whatever has the focus, so that has to say it too.
  root.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
  el.append(root);
  const stop = followGround(root);
  const view = open(model, root);
  root.append(hideStatic(model));
  return () => {
    stop();
    for (const part of Object.values(view.parts)) part.close?.();
    view.link.close();
    root.remove();
  };
}

export default { render };
