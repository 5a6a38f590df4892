// Run by Bokeh once the plane is drawn; explorer.py gives what is not defined here. Texts of files, such as the names
// of runs, enter the page as text nodes only, never as HTML.
const all = selector => [...document.querySelectorAll(selector)];

for (const button of all("th button")) button.onclick = () => {  // sorts its table
  const th = button.parentElement, body = th.closest("table").tBodies[0];
  const up = th.ariaSort !== "ascending", value = row => row.cells[th.cellIndex].textContent;
  for (const other of th.parentElement.cells) other.ariaSort = null;
  th.ariaSort = up ? "ascending" : "descending";
  const order = (a, b) => a === "" || b === "" ? (a === "") - (b === "") :
    (up ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
};

onkeydown = ({key}) => {  // closes a picture
  if (key === "Escape") for (const picture of all("details")) picture.open = false;
};

const [colour, a, b] = all("#explorer select"), [body] = all("#compared tbody");
const others = document.createElement("optgroup");
others.label = "more";
const rows = lines.map(({title, values, more}, i) => {
  if (values) (more ? others : colour).append(new Option(title, i));
  const row = body.insertRow();
  row.innerHTML = "<th></th><td></td><td></td>";
  row.cells[0].textContent = row.dataset.title = title;
  return row;
});
if (others.children.length) colour.append(others);
for (const select of [a, b]) labels.forEach((label, i) => select.add(new Option(label, i)));

colour.onchange = () => {
  const {title, better, low, high, values, texts} = lines[colour.value];
  mapper.setv({palette: palettes.at(better), low, high});
  plot.title.text = title;
  cells.data = {...cells.data, value: values, shown: texts.map(text => `${title}: ${text || "unknown"}`)};
};

a.onchange = b.onchange = () => {
  const two = [a.value, b.value], places = of => two.map(i => of[i] ?? NaN);
  pair.data = {x: places(cells.data.x), y: places(cells.data.y), label: ["A", "B"]};
  two.forEach((i, k) => {
    lines.forEach(({texts}, n) => { rows[n].cells[k + 1].textContent = texts[i] ?? ""; });
    for (const picture of all(`#compared td:nth-child(${k + 2}) img`)) picture.src = cells.data[picture.alt][i] ?? empty;
  });
  lines.forEach(({texts, better}, n) => {
    const gain = better * (parseFloat(texts[a.value]) - parseFloat(texts[b.value]));
    rows[n].className = gain > 0 ? "better-a" : gain < 0 ? "better-b" : "";
  });
};

plot.on_event("tap", ({sx, sy}) => {  // chooses the nearest cell within a finger's reach, beside the one before
  const {sx: x, sy: y} = Bokeh.index.get_one(plot).views.find_one(dots).glyph;
  const far = Array.from(x, (_, i) => Math.hypot(x[i] - sx, y[i] - sy)), least = Math.min(...far);
  if (least > 22) return;
  a.value = b.value || a.value;
  b.value = far.indexOf(least);
  b.onchange();
});

matchMedia("(prefers-color-scheme: dark)").onchange = () => plot.change.emit();
colour.value = first;
a.value = start ?? "";
colour.onchange();
a.onchange();
