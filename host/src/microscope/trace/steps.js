const data = JSON.parse(document.getElementById("data").textContent);
const { steps, tiles, matrices } = data;
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let at = 0;

const shown = {};

function mix(value, largest) {
  if (value === null || value === undefined) return colour("--grid");
  const share = largest > 0 ? Math.min(Math.abs(value) / largest, 1) : 0;
  const hue = value < 0 ? colour("--line1") : colour("--line0");
  return `color-mix(in srgb, ${hue} ${Math.round(share * 100)}%, ${colour("--card")})`;
}

// Colours by the largest value, or by that of each line where lines have names.
function draw(figure, matrix) {
  const canvas = byId(`figure${figure}`), cell = 8;
  byId(`title${figure}`).textContent = matrix?.title ?? data.figures[figure];
  shown[canvas.id] = matrix;
  const like = matrix ?? matrices.find(({ title }) => title === data.figures[figure]);
  canvas.width = (like?.width ?? 1) * cell;
  canvas.height = (like ? like.values.length / like.width : 1) * cell;
  const context = canvas.getContext("2d");
  context.fillStyle = colour("--bg");
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (!matrix) return;
  const { values, width, lines } = matrix;
  const largest = (some) => some.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 1e-30);
  const all = largest(values);
  values.forEach((value, i) => {
    const first = i - (i % width);
    context.fillStyle = mix(value, lines.length ? largest(values.slice(first, first + width)) : all);
    context.fillRect((i % width) * cell, Math.floor(i / width) * cell, cell - 1, cell - 1);
  });
}

// What a cell is: a row and a column by their numbers, or a line by its name.
function label({ name, width, row, column, lines }, index) {
  const [r, c] = [Math.floor(index / width), index % width];
  const of = lines.length ? lines[r] : `${name} of ${row[0]} ${row[1] + r}`;
  return `${of}${lines.length ? " of" : ","} ${column[0]} ${column[1] + c}`;
}

function show(index) {
  at = Math.max(0, Math.min(steps.length - 1, index));
  const step = steps[at];
  byId("title").textContent = tiles ? `${step.title} (tile ${step.tile + 1} of ${tiles})` : step.title;
  byId("note").textContent = step.note;
  byId("count").textContent = `${at + 1} of ${steps.length}`;
  byId("at").value = at;
  byId("first").disabled = byId("back").disabled = at === 0;
  byId("next").disabled = byId("tile").disabled = at === steps.length - 1;
  document.querySelectorAll(".line.on").forEach((line) => line.classList.remove("on"));
  for (let line = step.lines[0]; line <= step.lines[1]; line++) byId(`l${step.source}-${line}`)?.classList.add("on");
  const code = document.querySelector(".code"), line = byId(`l${step.source}-${step.lines[0]}`);
  if (line) code.scrollTop = line.offsetTop - code.offsetTop - code.clientHeight / 3;
  data.figures.forEach((_, figure) => draw(figure, matrices[step.shown[figure] ?? -1]));
  memory(step);
  lanes(step);
}

function memory(step) {
  const owners = { Q: "--line3", K: "--line1", V: "--line5", P: "--line0", d: "--line4" };
  byId("memory").replaceChildren(...data.regions.map(([name, bytes], i) => {
    const [holds, does] = step.memory[i] ?? ["", ""], box = document.createElement("div");
    box.style.flex = bytes;
    box.style.setProperty("--owner", `var(${owners[name[0]]})`);
    box.className = `${holds ? "full" : ""} ${does}`;
    const what = document.createElement("b");
    what.textContent = holds || `${name}: nothing yet`;
    box.append(what, { write: "is written", read: "is read" }[does] ?? `${(bytes / 1024).toFixed(1)} KiB`);
    return box;
  }));
}

// As the emulator runs them in order: the last warp of the block, or the last lane of each warp, is still to come. Consumers
// wait for the copy engine or for tensor cores.
function lanes(step) {
  byId("lanes").replaceChildren(...Array.from({ length: data.warps }, (_, warp) => {
    const row = document.createElement("div");
    row.append(`warp ${warp}`);
    for (let lane = 0; lane < 32; lane++) {
      const cell = document.createElement("i");
      const waits = {
        block: warp !== data.warps - 1, warp: lane !== 31, consumers: warp >= data.first_consumer,
      }[step.barrier];
      if (waits) cell.className = "wait";
      cell.title = `thread ${warp * 32 + lane}${cell.className ? `: waits at line ${step.lines[0]}` : ""}`;
      row.append(cell);
    }
    return row;
  }));
}

function nextTile(direction) {
  const tile = steps[at].tile + direction;
  const index = steps.findIndex((step, i) => step.tile === tile && (i > 0 || direction < 0));
  show(index < 0 ? (direction > 0 ? steps.length - 1 : 0) : index);
}

byId("first").addEventListener("click", () => show(0));
byId("back").addEventListener("click", () => show(at - 1));
byId("next").addEventListener("click", () => show(at + 1));
byId("tile").addEventListener("click", () => nextTile(1));
byId("at").addEventListener("input", (event) => show(Number(event.target.value)));
addEventListener("keydown", (event) => {
  if (event.target.id === "at" && event.key.startsWith("Arrow")) return;
  const action = {
    ArrowRight: () => show(at + 1), ArrowLeft: () => show(at - 1), PageDown: () => nextTile(1),
    PageUp: () => nextTile(-1), Home: () => show(0), End: () => show(steps.length - 1),
  }[event.key];
  if (action) { event.preventDefault(); action(); }
});
for (const canvas of document.querySelectorAll("canvas")) {
  canvas.addEventListener("pointermove", (event) => {
    const matrix = shown[canvas.id], box = canvas.getBoundingClientRect();
    if (!matrix) return;
    const { values, width } = matrix;
    const column = Math.floor((event.clientX - box.left) / box.width * width);
    const row = Math.floor((event.clientY - box.top) / box.height * (values.length / width));
    const index = row * width + column, value = values[index];
    byId("readout").textContent = index < values.length
      ? `${label(matrix, index)}: ${value === null ? "hidden, or not there" : value.toPrecision(4)}` : "";
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(at));
show(Number(location.hash.slice(1)) || 0);
