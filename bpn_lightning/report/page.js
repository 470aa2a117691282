"use strict";
// Draws the pictures of the page from the JSON inside it. Everything is made with createElement and
// textContent, so that no name in the data is ever read as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const FEW = 10; // up to so many tasks, each has a color and dashes of its own

  const make = (space) => (tag, attributes = {}, ...children) => {
    const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const h = make(null);
  const s = make(SVG);

  const known = (value) => value !== null && value !== undefined;
  const number = (value, digits = 3) => (known(value) ? value.toFixed(digits) : "not measured");
  const brief = (value) => (value >= 0.995 ? "1" : value.toFixed(2).slice(1));
  const mean = (values) =>
    values.length && values.every(known) ? values.reduce((a, b) => a + b) / values.length : null;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- theme ---------------------------------------------------------------------------------
  const dark = () =>
    root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
  const button = $("theme");
  function showTheme() {
    button.textContent = dark() ? "Light page" : "Dark page";
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    showTheme();
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    showTheme();
    drawAll();
  });

  // ---- colors -------------------------------------------------------------------------------
  // Viridis, whose lightness runs one way.
  const VIRIDIS = [
    [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
  ];
  function viridis(value) {
    const place = clamp(value, 0, 1) * (VIRIDIS.length - 1);
    const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
    return VIRIDIS[below].map((low, i) =>
      Math.round(low + (place - below) * (VIRIDIS[below + 1][i] - low)));
  }
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const onColor = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 127 ? "#000" : "#fff");
  // Its ends are no colors for a line on a page of the same lightness.
  const lineColor = (part) => css(viridis(printing || !dark() ? part * 0.85 : 0.3 + part * 0.7));
  let printing = false;

  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  const look = (task, tasks) =>
    tasks <= FEW
      ? { class: `series s${task % 7}`, "stroke-dasharray": DASHES[task % 4] || null }
      : { class: "series", style: `stroke:${lineColor(task / (tasks - 1))};stroke-width:1` };

  // Which numbers stand on an axis, so that they are `room` pixels apart.
  function labels(first, last, pixels, room) {
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((n) => n * pixels >= room) || 10000;
    const found = [];
    for (let n = first; n <= last; n += 1) {
      if (every === 1 || n % every === 0) found.push(n);
    }
    return found;
  }

  function canvas(host, height, label) {
    const width = Math.max(260, Math.floor(host.clientWidth));
    const svg = s("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label,
    });
    host.replaceChildren(svg);
    return [svg, width];
  }

  // ---- one run -------------------------------------------------------------------------------
  const section = $("stream");
  let run, moment, cell, point, marked;

  function select(index) {
    run = data.runs[index];
    run.names = data.streams[run.stream];
    run.tasks = run.names.length;
    run.y = run.curve.y || run.matrix.slice(1, run.curve.at.length + 1)
      .map((row, n) => row.map((value, task) => (task <= n ? value : null)));
    moment = run.learned;
    cell = null;
    point = null;
    marked = null;
    const slider = $("moment");
    slider.max = run.learned;
    slider.value = moment;
    drawRun();
  }

  const after = (row) => (row === 0 ? "before training" : `after task ${row}`);
  const average = (row) => mean(run.matrix[row].slice(0, row));

  // What moves with the slider; the rest of the pictures stays.
  function showMoment() {
    const text = moment === 0
      ? `${run.label}, before training.`
      : `${run.label}, after ${run.names[moment - 1]}, ${moment} of ${run.tasks} tasks. Mean over the tasks learned: ` +
        `${number(average(moment))}; task 1: ${number(run.matrix[moment][0])}.`;
    $("state").textContent = text;
    $("moment").setAttribute("aria-valuetext", text);
    $("moment-text").textContent = `${moment} of ${run.tasks}`;
    $("heat").mark();
    $("curves").mark();
    drawBars();
  }

  function drawRun() {
    drawHeat();
    drawCurves();
    showMoment();
    fillTable();
  }

  function pattern() {
    return s("defs", {}, s("pattern",
      { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      s("rect", { width: 6, height: 6, class: "hatch-ground" }),
      s("line", { y2: 6, class: "hatch-line" })));
  }

  function drawHeat() {
    const host = $("heat");
    const tasks = run.tasks;
    const left = 50;
    const width = Math.max(260, Math.floor(host.clientWidth));
    const size = Math.min(60, (width - left - 12) / tasks);
    const high = clamp(size, 2, 32);
    const top = 34;
    const bottom = top + high * (tasks + 1);
    const [svg] = canvas(host, bottom + 46,
      `Accuracy matrix of ${run.label}: a row for each moment, a column for each task. ` +
      "Arrow keys read single values; all values are in the table below.");
    svg.append(pattern());
    const x = (task) => left + task * size;
    const y = (row) => top + row * high;
    for (const [row, values] of run.matrix.entries()) {
      for (const [task, value] of values.entries()) {
        const color = known(value) ? viridis(value) : null;
        svg.append(s("rect", {
          x: x(task), y: y(row), width: size + 0.3, height: high + 0.3,
          fill: color ? css(color) : "url(#hatch)",
        }));
        if (color && size >= 27 && high >= 15) {
          svg.append(s("text", {
            x: x(task) + size / 2, y: y(row) + high / 2, class: "in-cell",
            style: `fill:${onColor(color)}`,
          }, brief(value)));
        }
      }
    }
    // right of the stairs: tasks that were still to come
    let stairs = `M${x(0)},${y(1)}`;
    for (let task = 0; task < tasks; task += 1) {
      stairs += `H${x(task + 1)}` + (task < tasks - 1 ? `V${y(task + 2)}` : "");
    }
    svg.append(s("path", { d: stairs, class: "halo" }), s("path", { d: stairs, class: "stairs" }));
    for (const n of labels(1, tasks, size, 20)) {
      svg.append(s("text", { x: x(n - 0.5), y: top - 6, class: "tick middle" }, `${n}`));
    }
    svg.append(s("text", { x: left, y: 12, class: "name" }, "accuracy on task"));
    for (const n of [...(high >= 9 ? [0] : []), ...labels(1, tasks, high, 14)]) {
      svg.append(s("text", { x: left - 6, y: y(n + 0.5) + 4, class: "tick end" },
        n === 0 ? "before" : `${n}`));
    }
    svg.append(s("text", { x: 2, y: top - 6, class: "name" }, "after"));
    // the scale of colors
    const wide = Math.min(180, width - left - 110);
    for (let i = 0; i < wide; i += 2) {
      svg.append(s("rect",
        { x: left + i, y: bottom + 12, width: 2.5, height: 10, fill: css(viridis(i / wide)) }));
    }
    for (const part of [0, 0.5, 1]) {
      svg.append(s("text", { x: left + part * wide, y: bottom + 36, class: "tick middle" }, `${part}`));
    }
    svg.append(s("rect", { x: left + wide + 18, y: bottom + 12, width: 12, height: 10, fill: "url(#hatch)" }),
      s("text", { x: left + wide + 35, y: bottom + 21, class: "tick" }, "not measured"));
    const marks = s("g");
    svg.append(marks);
    host.mark = () => {
      marks.replaceChildren(...frame(x(0), y(moment), size * tasks, high, "picked"));
      if (cell) marks.append(...frame(x(cell[1]), y(cell[0]), size, high, "cursor"));
    };
    host.mark();
    host.at = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = box.width / width;
      const task = Math.floor(((event.clientX - box.left) / scale - left) / size);
      const row = Math.floor(((event.clientY - box.top) / scale - top) / high);
      return task >= 0 && task < tasks && row >= 0 && row <= tasks ? [row, task] : null;
    };
  }

  const frame = (x, y, width, height, kind) =>
    ["halo", "frame"].map((part) => s("rect", { x, y, width, height, class: `${part} ${kind}` }));

  function read(found) {
    if (found && cell && found[0] === cell[0] && found[1] === cell[1]) return;
    cell = found;
    $("reading").textContent = cell
      ? `${after(cell[0])}, accuracy on ${run.names[cell[1]]}: ` +
        number(run.matrix[cell[0]][cell[1]], 4)
      : "Point at a cell, or use the arrow keys in the matrix.";
    $("heat").mark();
  }

  function drawBars() {
    const height = 200;
    const [left, top, bottom] = [34, 34, 36];
    const row = run.matrix[moment];
    const [svg, width] = canvas($("bars"), height,
      `Accuracy of each task ${after(moment)}, of ${run.label}.`);
    const size = (width - left - 8) / run.tasks;
    const y = (value) => top + (1 - value) * (height - top - bottom);
    axis(svg, left, width - 8, y);
    for (const [task, value] of row.entries()) {
      if (!known(value)) continue;
      const gap = size > 6 ? size * 0.15 : 0.3;
      svg.append(s("rect", {
        x: left + task * size + gap, y: y(value), width: size - 2 * gap,
        height: Math.max(0, y(0) - y(value)), class: task < moment ? "bar" : "bar ahead",
      }));
    }
    const level = moment ? average(moment) : null;
    if (known(level)) {
      svg.append(s("line", { x1: left, x2: left + moment * size, y1: y(level),
        y2: y(level), class: "mean" }));
    }
    for (const [task, value] of row.entries()) {
      if (!known(value) || size < 30) continue;
      const crossed = known(level) && task < moment && Math.abs(y(value) - 10 - y(level)) < 8;
      const place = crossed ? y(level) - 5 : y(value) - 6;
      svg.append(s("text", { x: left + (task + 0.5) * size, y: place, class: "label middle" },
        number(value, 2)));
    }
    for (const n of labels(1, run.tasks, size, 20)) {
      svg.append(s("text", { x: left + (n - 0.5) * size, y: height - 20, class: "tick middle" }, `${n}`));
    }
    svg.append(s("text", { x: left, y: 10, class: "name" }, `accuracy ${after(moment)}`),
      s("text", { x: width - 8, y: height - 4, class: "name end" }, "task"));
  }

  function axis(svg, left, right, y) {
    for (const value of [0, 0.25, 0.5, 0.75, 1]) {
      svg.append(s("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "grid" }));
      if (value % 0.5 === 0) {
        svg.append(s("text", { x: left - 6, y: y(value) + 4, class: "tick end" }, `${value}`));
      }
    }
  }

  function drawCurves() {
    const height = 330;
    const [left, top, bottom] = [34, 36, 38];
    const { at, starts, unit } = run.curve;
    const last = at.length ? at[at.length - 1] : 1;
    const host = $("curves");
    const [svg, width] = canvas(host, height,
      `Accuracy of each task over the stream, in ${unit}, of ${run.label}.`);
    const right = width - 16;
    const x = (value) => left + (value / Math.max(last, 1e-9)) * (right - left);
    const y = (value) => top + 5 + (1 - value) * (height - top - bottom - 10);
    axis(svg, left, right, y);
    let shown = -Infinity;
    const crowded = x(last / Math.max(1, starts.length)) - x(0) < 7;
    starts.forEach((start, task) => {
      const place = x(start) + 3;
      const apart = place - shown > 22;
      if (apart || !crowded) {
        svg.append(s("line", { x1: x(start), x2: x(start), y1: top, y2: y(0), class: "border" }));
      }
      if (apart) {
        svg.append(s("text", { x: place, y: top - 6, class: "tick" }, `${task + 1}`));
        shown = place;
      }
    });
    svg.append(s("text", { x: left, y: 12, class: "name" }, "accuracy; above: the task that starts"));
    for (const tick of [0, ...labels(1, Math.floor(last), (right - left) / last, 48)]) {
      svg.append(s("text", { x: x(tick), y: height - 20, class: "tick middle" }, `${tick}`));
    }
    svg.append(s("text", { x: right, y: height - 4, class: "name end" }, unit));
    const order = run.names.map((_, task) => task);
    if (marked !== null) order.push(...order.splice(marked, 1));
    for (const task of order) {
      const own = look(task, run.tasks);
      if (marked !== null) own.class += task === marked ? " marked" : " faint";
      let path = "";
      run.y.forEach((row, i) => {
        if (known(row[task])) path += `${path ? "L" : "M"}${x(at[i]).toFixed(1)},${y(row[task]).toFixed(1)}`;
      });
      if (!path) continue;
      svg.append(s("path", { ...own, d: path }));
      if (run.tasks <= FEW) {
        const every = Math.max(1, Math.round(at.length / 12));
        run.y.forEach((row, i) => {
          const edge = i === at.length - 1;
          if (known(row[task]) && (edge || i % every === task % every)) {
            svg.append(marker(task, x(at[i]), y(row[task]), own.class));
          }
        });
      }
    }
    if (run.tasks > FEW) {
      const means = starts.map((_, k) => (k + 1 < run.matrix.length ? average(k + 1) : null));
      let path = "";
      means.forEach((value, k) => {
        const end = k + 1 < starts.length ? starts[k + 1] : last;
        if (known(value)) path += `${path ? "L" : "M"}${x(end)},${y(value)}`;
      });
      if (path) svg.append(s("path", { d: path, class: "mean-line" }));
    }
    const marks = s("g");
    svg.append(marks);
    const upright = (value, kind) =>
      s("line", { x1: x(value), x2: x(value), y1: top, y2: y(0), class: kind });
    host.mark = () => {
      const here = moment === 0 ? 0 : moment < starts.length ? starts[moment] : last;
      marks.replaceChildren(upright(here, "now"));
      if (point !== null) marks.append(upright(at[point], "cross"));
    };
    host.mark();
    host.at = (event) => {
      const box = svg.getBoundingClientRect();
      const value = (((event.clientX - box.left) * width) / box.width - left) / (right - left) * last;
      let near = 0;
      at.forEach((moment_, i) => {
        if (Math.abs(moment_ - value) < Math.abs(at[near] - value)) near = i;
      });
      return at.length ? near : null;
    };
    drawLegend();
  }

  function marker(task, x, y, kind) {
    const shapes = [
      "M-3,0A3,3 0 1 0 3,0A3,3 0 1 0 -3,0Z", "M-3,-3H3V3H-3Z", "M0,-4L4,0L0,4L-4,0Z",
      "M-3.5,3L0,-4L3.5,3Z", "M-3.5,-3L0,4L3.5,-3Z",
    ];
    return s("path", {
      d: shapes[task % shapes.length], transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`,
      class: kind.replace("series", "marker"),
    });
  }

  function drawLegend() {
    const host = $("legend");
    if (run.tasks > FEW) {
      const bar = s("svg", { width: 120, height: 12, "aria-hidden": "true" });
      for (let i = 0; i < 120; i += 2) {
        bar.append(s("rect", { x: i, width: 2.5, height: 12, fill: lineColor(i / 120) }));
      }
      const line = s("svg", { width: 28, height: 12, "aria-hidden": "true" },
        s("line", { x1: 0, x2: 28, y1: 6, y2: 6, class: "mean-line" }));
      host.replaceChildren(h("span", {}, "task 1 ", bar, ` ${run.tasks}`),
        h("span", {}, line, " mean of the tasks learned so far"));
      return;
    }
    host.replaceChildren(...run.names.map((name, task) => {
      const own = look(task, run.tasks);
      const key = s("svg", { width: 34, height: 12, "aria-hidden": "true" },
        s("line", { ...own, x1: 0, x2: 34, y1: 6, y2: 6 }), marker(task, 17, 6, own.class));
      const one = h("button", { type: "button", "aria-pressed": `${marked === task}` }, key, ` ${name}`);
      one.addEventListener("click", () => {
        marked = marked === task ? null : task;
        drawCurves();
        host.children[task].focus();
      });
      return one;
    }));
  }

  function readCurve(index) {
    if (index === point) return;
    point = index;
    let text = "Point at a moment, or use the arrow keys in the picture.";
    if (point !== null) {
      const row = run.y[point];
      const values = row.map((value, task) => [value, task]).filter(([value]) => known(value));
      const listed = values.length <= FEW
        ? values.map(([value, task]) => `task ${task + 1} ${number(value)}`).join(", ")
        : `mean over ${values.length} tasks ${number(mean(values.map(([value]) => value)))}`;
      text = `${run.curve.at[point]} ${run.curve.unit}: ${listed || "nothing measured"}`;
    }
    $("curve-reading").textContent = text;
    $("curves").mark();
  }

  function fillTable() {
    const details = $("values");
    if (!details.open) return;
    const head = h("tr", {}, h("th", { scope: "col" }, "after task"),
      ...run.names.map((name, task) => h("th", { scope: "col", title: name }, `task ${task + 1}`)));
    const rows = run.matrix.map((row, n) => h("tr", {},
      h("th", { scope: "row" }, n === 0 ? "before" : `${n}`),
      ...row.map((value) => (known(value)
        ? h("td", {}, h("data", { value: `${value}` }, number(value, 4)))
        : h("td", {}, "-")))));
    $("values-table").replaceChildren(
      h("caption", {}, `Accuracies of ${run.label}`), h("thead", {}, head), h("tbody", {}, ...rows));
  }

  // ---- bytes against accuracy ----------------------------------------------------------------
  const figures = [...document.querySelectorAll(".bytes")];

  function drawBytes(host) {
    const rows = data.rows.filter((row) => row.place === Number(host.dataset.place) && known(row.bytes));
    const narrow = host.clientWidth < 560;
    const height = 320;
    const [left, top, bottom] = [34, 24, 44];
    const [svg, width] = canvas(host, height,
      "Bytes per task against ACC, a point for each method; the values are in the table of methods.");
    const right = width - (narrow ? 16 : 150);
    const positive = rows.map((row) => row.bytes).filter((bytes) => bytes > 0);
    const low = Math.floor(Math.log10(Math.min(...positive, 1e12)));
    const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...positive, 1))));
    const zero = rows.some((row) => row.bytes === 0);
    const start = left + (zero ? 64 : 12);
    const x = (bytes) => (bytes === 0
      ? left + 16
      : start + ((Math.log10(bytes) - low) / (high - low)) * (right - start - 6));
    const y = (value) => top + (1 - value) * (height - top - bottom);
    axis(svg, left, right, y);
    if (zero) svg.append(s("text", { x: x(0), y: height - 26, class: "tick middle" }, "0"));
    const unit = (n) => (n >= 9 ? `${10 ** (n - 9)} GB` : n >= 6 ? `${10 ** (n - 6)} MB`
      : n >= 3 ? `${10 ** (n - 3)} kB` : `${10 ** n} B`);
    if (positive.length) {
      for (let n = low; n <= high; n += 1) {
        const place = x(10 ** n);
        svg.append(s("line", { x1: place, x2: place, y1: top, y2: y(0), class: "grid" }),
          s("text", { x: place, y: height - 26, class: "tick middle" }, unit(n)));
      }
    }
    svg.append(s("text", { x: left, y: 10, class: "name" }, "ACC"),
      s("text", { x: right, y: height - 6, class: "name end" }, "bytes per task (1 kB = 1000 B)"));
    const taken = [];
    const points = rows.flatMap((row) => [[row, row.told, true], [row, row.alone, false]])
      .filter(([, value]) => value);
    for (const [row, value, told] of points) {
      const [px, py] = [x(row.bytes), y(clamp(value.mean, 0, 1))];
      if (known(value.half)) {
        svg.append(s("line", {
          x1: px, x2: px, y1: y(clamp(value.mean + value.half, 0, 1)),
          y2: y(clamp(value.mean - value.half, 0, 1)), class: told ? "whisker told" : "whisker alone",
        }));
      }
    }
    for (const [row, value, told] of points) {
      const [px, py] = [x(row.bytes), y(clamp(value.mean, 0, 1))];
      svg.append(s("path", {
        d: told ? "M-5,0A5,5 0 1 0 5,0A5,5 0 1 0 -5,0Z" : "M0,-6L6,0L0,6L-6,0Z",
        transform: `translate(${px},${py})`, class: told ? "dot told" : "dot alone",
      }, s("title", {}, `${row.method}, ${told ? "task given" : "no oracle"}: ${value.text}, ` +
        `${row.bytes} bytes per task`)));
      taken.push([px - 7, py - 7, px + 7, py + 7]);
    }
    // names beside the points, moved until they are free; of many, those that none beats in both
    const beaten = (row) => !row.told || rows.some((other) => other.told &&
      other.bytes <= row.bytes && other.told.mean >= row.told.mean &&
      (other.bytes < row.bytes || other.told.mean > row.told.mean));
    const named = rows.filter((row) => (row.told || row.alone) && (rows.length <= 16 || !beaten(row)));
    for (const row of named) {
      const value = row.told || row.alone;
      const [px, py] = [x(row.bytes), y(clamp(value.mean, 0, 1))];
      const name = row.method.length > 28 ? `${row.method.slice(0, 27)}…` : row.method;
      const wide = name.length * 7.4 + 4;
      const onRight = px + 10 + wide < width;
      for (let step = 0; step < 14; step += 1) {
        const shift = (step % 2 ? 1 : -1) * Math.ceil(step / 2) * 13;
        const tx = onRight ? px + 10 : px - 10 - wide;
        const ty = clamp(py + shift, top - 4, y(0) - 4);
        const box = [tx, ty - 6, tx + wide, ty + 6];
        if (taken.some((b) => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3])) continue;
        taken.push(box);
        if (Math.abs(shift) > 13) {
          svg.append(s("line", { x1: px, y1: py, x2: onRight ? tx - 2 : tx + wide, y2: ty, class: "leader" }));
        }
        svg.append(s("text", { x: tx, y: ty + 4, class: "label" }, name));
        break;
      }
    }
  }

  // ---- tables that can be sorted -------------------------------------------------------------
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead th[data-sort]").forEach((head) => {
      const column = head.cellIndex;
      const name = h("button", { type: "button", class: "sort" }, head.textContent);
      head.replaceChildren(name);
      name.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const key = (line) => {
          const value = line.cells[column].querySelector("data");
          return value ? Number(value.value) : line.cells[column].textContent;
        };
        const lines = [...body.rows].map((line) => [key(line), line]);
        lines.sort(([a], [b]) => {
          if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // unknown ones last
          const order = typeof a === "number" ? a - b : a.localeCompare(b);
          return down ? -order : order;
        });
        body.append(...lines.map(([, line]) => line));
      });
    });
  }

  // ---- events --------------------------------------------------------------------------------
  function drawAll() {
    if (run) drawRun();
    figures.forEach(drawBytes);
  }

  if (section && data.runs.length) {
    $("run").addEventListener("change", (event) => select(Number(event.target.value)));
    $("moment").addEventListener("input", (event) => {
      moment = Number(event.target.value);
      showMoment();
    });
    const heat = $("heat");
    heat.addEventListener("pointermove", (event) => read(heat.at(event)));
    heat.addEventListener("pointerdown", (event) => {
      const found = heat.at(event);
      read(found);
      if (found && found[0] <= run.learned) {
        $("moment").value = moment = found[0];
        showMoment();
      }
    });
    heat.addEventListener("pointerleave", () => read(null));
    heat.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      read(cell
        ? [clamp(cell[0] + step[0], 0, run.tasks), clamp(cell[1] + step[1], 0, run.tasks - 1)]
        : [moment, 0]);
    });
    heat.addEventListener("blur", () => read(null));
    const curves = $("curves");
    curves.addEventListener("pointermove", (event) => readCurve(curves.at(event)));
    curves.addEventListener("pointerleave", () => readCurve(null));
    curves.addEventListener("blur", () => readCurve(null));
    curves.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !run.curve.at.length) return;
      event.preventDefault();
      readCurve(point === null ? (step > 0 ? 0 : run.y.length - 1) : clamp(point + step, 0, run.y.length - 1));
    });
    $("values").addEventListener("toggle", fillTable);
    select(0);
  }

  showTheme();
  figures.forEach(drawBytes);
  let width = root.clientWidth;
  addEventListener("resize", () => {
    if (root.clientWidth === width) return; // a phone's bar that comes and goes
    width = root.clientWidth;
    drawAll();
  });
  addEventListener("beforeprint", () => {
    printing = true;
    for (const details of document.querySelectorAll("details:not([open])")) {
      // thousands of accuracies are no reading; their picture is printed
      if (details.id === "values" && run.tasks > 12) continue;
      details.open = true;
      details.dataset.opened = "";
    }
    drawAll();
  });
  addEventListener("afterprint", () => {
    printing = false;
    for (const details of document.querySelectorAll("details[data-opened]")) {
      details.open = false;
      delete details.dataset.opened;
    }
    drawAll();
  });
})();
