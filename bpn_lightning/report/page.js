"use strict";
// Text is set by textContent, so that no name in the data is ever read as HTML.
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (selector, host = document) => [...host.querySelectorAll(selector)];
  const make = (tag, text = "", attributes = {}) => {
    const node = document.createElement(tag);
    node.textContent = text;
    Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
    return node;
  };
  const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "not measured");

  // Light and dark: as the system has it, until the button is pressed.
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const paint = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "Light page" : "Dark page";
  };
  system.addEventListener("change", () => paint(system.matches));
  $("theme").addEventListener("click", () => paint(root.dataset.theme === "light"));
  paint(system.matches);

  // Values of a picture, by pointer and by arrow keys, are read in the line below it.
  for (const host of all(".picture")) {
    const line = host.nextElementSibling;
    const hint = line.textContent;
    let current = null;
    const read = (item) => {
      if (current) current.classList.remove("current");
      if (item) item.classList.add("current");
      current = item;
      line.textContent = item ? item.dataset.value : hint;
    };
    host.addEventListener("pointerover", (event) => read(event.target.closest("[data-value]")));
    for (const kind of ["pointerleave", "blur"]) host.addEventListener(kind, () => read(null));
    host.addEventListener("keydown", (event) => {
      const items = all("[data-value]", host);
      const columns = Number(host.dataset.columns || 1);
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (!step || !items.length) return;
      event.preventDefault();
      const from = items.indexOf(current);
      read(items[from < 0 ? Number(host.dataset.first || 0) : from + step] || current);
      current.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
  }

  // One run: its matrix, its curves, and each task at one moment.
  const data = JSON.parse($("data").textContent);
  let run, names;
  function cell(value, row, task) {
    const text = `${row ? `after task ${row}` : "before training"}, accuracy on ${names[task]}: ${number(value, 4)}`;
    const node = make("td", "", { "data-value": text, class: task === row ? "stair" : "" });
    node.classList.toggle("unknown", value === null);
    if (value === null) return node;
    [node.style.background, node.style.color] = data.shades[Math.round(value * (data.shades.length - 1))];
    node.append(make("data", value >= 0.995 ? "1" : value.toFixed(2).slice(1), { value }));
    return node;
  }

  function drawMatrix() {
    const heads = names.map((name, task) => make("th", task + 1, { scope: "col", title: name }));
    $("values").rows[0].replaceChildren(make("th", "after", { scope: "col" }), ...heads);
    $("values").tBodies[0].replaceChildren(...run.matrix.map((values, row) => {
      const line = make("tr");
      const cells = values.map((value, task) => cell(value, row, task));
      line.append(make("th", row || "before", { scope: "row" }), ...cells);
      return line;
    }));
    $("heat").dataset.columns = names.length;
    $("numbers").checked = names.length <= 20;
    showNumbers();
  }
  const showNumbers = () => $("values").classList.toggle("tiny", !$("numbers").checked);

  function mark(button) {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    all("button", $("bars")).forEach((one, task) => {
      one.setAttribute("aria-pressed", one === button && pressed);
      $(`task-${task + 1}`)?.classList.toggle("faint", pressed && one !== button);
    });
  }

  function show(moment) {
    const row = run.matrix[moment];
    const mean = row.slice(0, moment).reduce((sum, value) => sum + (value ?? NaN), 0) / moment;
    const text = `${run.label}, ` + (moment === 0 ? "before training." : `after ${names[moment - 1]}, ${moment} of `
      + `${names.length} tasks. Mean over the tasks learned: ${number(mean, 3)}; task 1: ${number(row[0], 3)}.`);
    $("state").textContent = text;
    $("moment").value = moment;
    $("moment").ariaValueText = text;
    $("moment-text").textContent = `${moment} of ${names.length}`;
    $("heat").dataset.first = moment * names.length;
    all("tr", $("values")).forEach((one) => one.classList.toggle("now", one.rowIndex === moment + 1));
    all("[id^=now-]", $("curves")).forEach((one) => one.classList.toggle("shown", one.id === `now-${moment}`));
    [...$("bars").children].forEach((item, task) => {
      item.classList.toggle("ahead", task >= moment);
      item.children[1].value = row[task] ?? 0;
      item.children[2].textContent = row[task] === null ? "-" : number(row[task], 2);
    });
  }

  function select() {
    run = data.runs[$("run").value];
    names = data.streams[run.stream];
    $("moment").max = run.learned;
    const drawn = all("template")[$("run").value].content.cloneNode(true);
    $("curves").replaceChildren(drawn.querySelector("svg"));
    $("bars").replaceChildren(...drawn.querySelectorAll("li"));
    drawMatrix();
    show(run.learned);
  }

  if (data.runs.length) {
    $("run").addEventListener("change", select);
    $("numbers").addEventListener("change", showNumbers);
    $("moment").addEventListener("input", (event) => show(Number(event.target.value)));
    $("bars").addEventListener("click", (event) => event.target.closest("button") && mark(event.target));
    $("values").addEventListener("click", (event) => {
      const row = event.target.closest("tr").rowIndex - 1; // the first has the columns' names
      if (row >= 0 && row <= run.learned) show(row);
    });
    select();
  }

  for (const table of all("table.sortable")) {
    const key = ({ cells }, column) => Number(cells[column].querySelector("data")?.value ?? NaN);
    const sort = (head, column) => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      all("th", table).forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((first, second) => {
        const [a, b] = [key(first, column), key(second, column)];
        if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1; // what was not measured comes last
        return sign * (a - b || first.cells[column].textContent.localeCompare(second.cells[column].textContent));
      }));
    };
    all("thead th", table).forEach((head, column) => {
      const name = make("button", head.textContent, { type: "button", class: "sort" });
      name.addEventListener("click", () => sort(head, column));
      head.replaceChildren(name);
    });
  }

  const fold = (some, open) => all(some).forEach((one) => { one.open = one.toggleAttribute("data-opened", open); });
  addEventListener("beforeprint", () => fold("details:not([open])", true));
  addEventListener("afterprint", () => fold("details[data-opened]", false));
})();
