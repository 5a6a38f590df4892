// What the report's page does itself; Bokeh draws the plane, and HTML has the rest. Texts of files, such as the names of
// runs, enter the page as text nodes only, never as HTML.
"use strict";
const $ = id => document.getElementById(id);
const element = (tag, content = [], more = {}) => {
  const made = Object.assign(document.createElement(tag), more);
  made.append(...[content].flat());
  return made;
};

// A click on a heading sorts its table.
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.parentElement, body = th.closest("table").tBodies[0];
  const up = th.ariaSort !== "ascending", value = row => row.cells[th.cellIndex].textContent;
  for (const other of th.parentElement.cells) other.ariaSort = null;
  th.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => a === "" || b === "" ? (a === "") - (b === "") :
    (up ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
};

// A click on a picture shows it in the dialog: browsers open no data: address in a tab of its own.
document.addEventListener("click", event => {
  const button = event.target.closest(".picture");
  if (!button) return;
  const {src, alt} = button.querySelector("img");
  Object.assign($("large").querySelector("img"), {src, alt, className: button.className});
  $("large").showModal();
});

async function explore() {
  const [{columns, betas, rates, ...all}, drawn] = ["explored", "drawn"].map(id => JSON.parse($(id).textContent));
  const views = await Bokeh.embed.embed_item(drawn, "plane");
  const model = name => Bokeh.documents.at(-1).get_model_by_name(name);
  const plot = model("plot"), view = views.get_one(plot), cells = model("cells");
  const N = [...Array(cells.data.x.length).keys()];
  const column = name => columns.find(c => c.name === name);
  const shown = v => v === null || v === undefined ? "" : typeof v === "number" ? `${+v.toPrecision(4)}` : v;
  const withError = (c, i) => shown(c.values[i]) + (c.errors?.[i] != null ? ` ± ${+c.errors[i].toPrecision(2)}` : "");
  // A label, [cell, text] by the name of its mark, stands where it covers least of others, and of cells, in the frame.
  const marked = {chosen: [], stars: []}, high = 14, character = 9.5;  // pixels
  const mark = (name, labels) => { marked[name] = labels; place(); };
  function place() {
    const {x_scale, y_scale, bbox} = view.frame, taken = [];
    const dots = N.map(i => [x_scale.compute(cells.data.x[i]), y_scale.compute(cells.data.y[i])])
      .map(([x, y]) => ({left: x - 6, right: x + 6, top: y - 6, bottom: y + 6}));
    const shared = (a, b) => Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left)) *
      Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
    for (const [name, labels] of Object.entries(marked)) {
      const placed = labels.map(([i, label]) => {
        const [x, y] = [cells.data.x[i], cells.data.y[i]], wide = character * label.length;
        const ways = [15, -15, 30, -30, 45, -45, 60, -60, 75, -75].flatMap(shift => [10, -10].map(side => {
          const left = x_scale.compute(x) + side - (side < 0 ? wide : 0), top = y_scale.compute(y) + shift - high / 2;
          const box = {left, right: left + wide, top, bottom: top + high};
          const hidden = wide * high - shared(box, bbox), covers = (sum, other) => sum + shared(box, other);
          return {x, y, label, shift, side, align: side > 0 ? "left" : "right", box,
            cost: hidden + taken.reduce(covers, 0) + dots.reduce(covers, 0) / 10};
        }));
        const chosen = ways.reduce((a, b) => b.cost < a.cost ? b : a);
        taken.push(chosen.box);
        return chosen;
      });
      model(name).data = Object.fromEntries(Object.keys(model(name).data).map(key => [key, placed.map(of => of[key])]));
    }
  }
  const best = (among, score) => among.reduce((a, b) =>  // ties go to the lowest total rate
    score[b] > score[a] || score[b] === score[a] && rates[0].values[b] < rates[0].values[a] ? b : a);
  const table = (id, headings, rows) => $(id).replaceChildren(element("table", [
    element("thead", element("tr", headings.map(text => element("th", text, {className: text === "task" || text === "metric" ? "text" : ""})))), element("tbody", rows)]));

  function colour() {
    const c = column($("colour").value), known = c.values.filter(v => v !== null);
    const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
    model("mapper").setv({palette: all.palettes[c.better], low, high: high > low ? high : low + 1});
    plot.title.text = c.title;
    const texts = N.map(i => `${c.title}: ${withError(c, i) || "unknown"}`);
    cells.data = {...cells.data, value: c.values.map(v => v ?? NaN), shown: texts};
    compare();
  }

  // The cells to compare: the last two that were clicked.
  const selects = [$("cell-a"), $("cell-b")];
  const chosen = () => selects.filter(s => s.value !== "").map(s => +s.value);
  function choose(i) {
    const now = chosen(), next = now.includes(i) ? now.filter(j => j !== i) : [...now, i].slice(-2);
    selects.forEach((select, k) => select.value = next[k] ?? "");
    compare();
  }

  function compare() {
    const two = selects.flatMap((s, k) => s.value === "" ? [] : [[+s.value, "AB"[k]]]);
    mark("chosen", two);
    const row = (heading, values, better = 0) => {
      const of = values.map(v => parseFloat(v.textContent ?? v)), top = better * Math.max(...of.map(v => better * v));
      const wins = k => better && of.length === 2 && of[0] !== of[1] && of[k] === top;
      return element("tr", [element("th", heading, {className: "text", scope: "row"}),
        ...values.map((v, k) => element("td", v, {className: wins(k) ? "best" : ""}))]);
    };
    const picture = (src, alt) => element("button", element("img", [], {src, alt}),
      {className: "picture small", type: "button", title: `enlarge ${alt}`});
    const kinds = ["samples", "reconstructions"].filter(kind => cells.data[kind]).map(kind => row(
      kind === "samples" || !all.originals ? kind : [element("div", `${kind} of`), picture(all.originals, "test images")],
      two.map(([i, label]) => picture(cells.data[kind][i], `${kind} of cell ${label}`))));
    const first = column($("colour").value), figures = [first, ...columns.filter(c => c !== first)];
    if (!two.length) $("compared").textContent = "Click or tap a cell in the plane, or choose one above.";
    else table("compared", ["", ...two.map(([, label]) => `cell ${label}`)], [...kinds,
      ...Object.entries(betas).map(([name, values]) => row(name, two.map(([i]) => shown(values[i])))),
      ...figures.map(c => row(c.title, two.map(([i]) => withError(c, i)), c.better)),
      ...Object.entries(all.about).map(([name, values]) => row(name, two.map(([i]) => values[i])))]);
    $("commands").replaceChildren(...two.map(([i, label]) => {
      const text = element("textarea", [], {readOnly: true, rows: 3, value: all.commands[i]});
      const copy = element("button", "copy", {type: "button", onclick: async () => {
        text.select();
        try {  // a page that was opened as a file may not be allowed to
          await navigator.clipboard.writeText(text.value);
          copy.textContent = "copied";
        } catch { copy.textContent = "selected, now press Ctrl+C"; }
      }});
      return all.commands[i] ? element("label", [`To train cell ${label}: `, copy, text])
        : element("p", `Cell ${label} started from other weights, or its settings are incomplete: no command trains it.`);
    }));
  }

  // One slider a limit; its steps are the rates of the cells, so that each lets in one more.
  const sliders = rates.map(({name, title, values}) => {
    const steps = [...new Set(values)].sort((a, b) => a - b), told = element("output");
    const slider = element("input", [], {type: "range", id: name, min: 0, max: steps.length - 1});
    slider.value = steps.length - 1;
    const most = () => steps[slider.value];
    slider.oninput = () => { told.value = `${shown(most())} ${all.unit}`; advise(); };
    told.value = `${shown(most())} ${all.unit}`;
    $("budget").append(element("label", [`${title} at most `, told, slider]));
    return i => values[i] <= most();
  });

  function mixture(group, score, most, mixes) {  // what mixture() in gains.py does, as [cell, share] pairs
    const rate = rates[0].values, sum = (way, v) => way.reduce((s, [i, w]) => s + w * v[i], 0);
    const fit = group.filter(i => rate[i] <= most), over = group.filter(i => rate[i] > most);
    const ways = (fit.length ? fit : [best(group, rate.map(r => -r))]).map(i => [[i, 1]]);
    if (mixes) for (const a of fit) for (const b of over) {
      const share = (rate[b] - most) / (rate[b] - rate[a]);
      ways.push([[a, share], [b, 1 - share]]);
    }
    const [values, costs] = [score, rate].map(v => ways.map(way => sum(way, v)));
    return ways[[...ways.keys()].reduce((a, b) =>
      values[b] > values[a] || values[b] === values[a] && costs[b] < costs[a] ? b : a)];
  }

  function advise() {  // what advice() and gain() in advice.py and gains.py do
    const within = N.filter(i => sliders.every(allows => allows(i))), stars = new Map();
    const rows = all.advice.flatMap(({task, title, better, values, chosen, told, mixes, squared, alike}, k) => {
      const there = N.filter(i => values[i] !== null), among = within.filter(i => values[i] !== null);
      // those of too large a total rate, mixed, may be within the budget
      const few = there.filter(i => all.diagonal[i] && sliders.slice(1).every(allows => allows(i)));
      if (!among.length) return [];
      const at = best(among, values.map(x => better * x));
      stars.set(at, [...stars.get(at) ?? [], k + 1]);
      const tested = chosen.length && few.length && [...among, ...few].every(i => chosen[0][i] !== null) &&
        (alike || among.length === there.length);
      const known = values.map(v => squared ? 10 ** (-v / 10) : v);  // linear in mixtures
      const made = tested ? chosen.map((score, r) => [score, told[r]]) : [[known.map(v => squared ? -v : better * v), known]];
      const mean = v => v.reduce((a, b) => a + b) / v.length, firsts = made.map(([score]) => tested ? best(among, score) : at);
      const others = few.length ? made.map(([score], r) => mixture(few, score, rates[0].values[firsts[r]], mixes)) : [];
      const of = (way, v) => way.reduce((s, [i, w]) => s + w * v[i], 0);
      const worth = (way, r) => squared ? -10 * Math.log10(of(way, made[r][1])) : of(way, made[r][1]);
      const value = mean(firsts.map((i, r) => worth([[i, 1]], r))), star = tested ? "" : "*";
      const other = few.length ? mean(others.map(worth)) : null;
      const see = element("button", `${k + 1}`, {type: "button", title: "choose this cell", onclick: () => choose(at)});
      const r_z = firsts.map(i => rates[1].values[i]), digits = v => `${+v.toPrecision(3)}`;
      const parts = [...new Set([digits(Math.min(...r_z)), digits(Math.max(...r_z))])].join(" to ");
      const texts = [task, title, shown(value) + star, shown(betas.beta_y[at]), shown(betas.beta_z[at]),
        ...rates.map(r => shown(r.values[at])), ...other === null ? ["", "", ""] : [shown(other) + star,
          shown(mean(others.map(way => of(way, rates[0].values)))), shown(better * (value - other)) + star], tested ? parts : ""];
      return [element("tr", [element("td", see),
        ...texts.map((text, j) => element("td", text, {className: j < 2 ? "text" : ""}))])];
    });
    const headings = ["", "task", "metric", "best", "beta_y", "beta_z", ...rates.map(r => r.title), "ordinary", "at R",
      "gain", "R(z) of each choice"];
    for (const row of rows) headings.forEach((heading, j) => row.cells[j].dataset.label = heading);
    table("advised", headings, rows);
    mark("stars", [...stars].map(([i, numbers]) => [i, numbers.join(" ")]));
  }

  function theme() {  // a canvas takes no colours from the page's style
    const ink = getComputedStyle(document.body).color;
    const line = {axis_line_color: ink, major_tick_line_color: ink, minor_tick_line_color: ink};
    for (const axis of [...plot.below, ...plot.left])
      axis.setv({...line, axis_label_text_color: ink, major_label_text_color: ink});
    for (const grid of plot.center) grid.setv({grid_line_color: ink, grid_line_alpha: 0.12});
    model("bar").major_label_text_color = plot.title.text_color = ink;
    model("ring").glyph.line_color = ink;
  }

  for (const c of columns) $("colour").add(new Option(c.title, c.name));
  $("colour").value = all.first;
  for (const select of selects) {
    select.add(new Option("none", ""));
    for (const i of N) select.add(new Option(Object.entries(betas).map(([k, v]) => `${k} ${shown(v[i])}`).join(", ") +
      Object.entries(all.about).slice(0, -1).map(([k, v]) => `, ${k} ${v[i]}`).join(""), i));
    select.onchange = compare;
  }
  $("colour").onchange = colour;
  let last = null;
  // The nearest cell, if it is within a finger's reach. Bokeh calls a quick second tap, wherever it is, a double one.
  for (const kind of ["tap", "doubletap"]) plot.on_event(kind, ({x, y}) => {
    const per = (range, size) => size / Math.abs(range.end - range.start);
    const wide = per(plot.x_range, plot.inner_width), high = per(plot.y_range, plot.inner_height);
    const far = N.map(i => Math.hypot((cells.data.x[i] - x) * wide, (cells.data.y[i] - y) * high));
    const nearest = far.indexOf(Math.min(...far));
    if (far[nearest] < 22 && (kind === "tap" || nearest !== last)) choose(last = nearest);
  });
  view.canvas_view.events_el.style.touchAction = "pan-y";  // a finger on the plane still scrolls the page
  matchMedia("(prefers-color-scheme: dark)").onchange = theme;
  theme();
  for (const of of [plot.x_range.properties.end, plot.y_range.properties.end, plot.properties.inner_width])
    of.change.connect(place);  // zoomed, or of another size
  selects[0].value = all.start ?? "";
  colour();
  advise();
}
if ($("explorer")) explore();
