const data = JSON.parse(document.getElementById("data").textContent);
const { steps, tiles, rows, columns, keys } = data;
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let at = 0;

// What is there after a step: the tile's own numbers from the stage on that makes them, those of the tile before until then.
function numbers(step) {
  const order = ["before", "scores", "softmax", "output", "done"].indexOf(step.stage);
  const tile = tiles[step.tile], before = tiles[step.tile - 1];
  const soft = order >= 2 ? tile : before;
  const zeros = Array(rows * columns).fill(0);
  let o = before ? before.o : zeros;
  if (order === 2) o = o.map((x, i) => x * tile.alpha[Math.floor(i / columns)]);
  if (order === 3) o = tile.o;
  if (order === 4) o = data.o;
  return {
    s: order >= 1 ? tile?.s : null,
    p: order >= 2 ? tile?.p : before?.p ?? null,
    m: soft ? soft.m : Array(rows).fill(null),
    l: soft ? soft.l : Array(rows).fill(0),
    alpha: order >= 2 ? tile?.alpha : null,
    o,
  };
}

const shown = {};

function mix(value, largest) {
  if (value === null || value === undefined) return colour("--grid");
  const share = largest > 0 ? Math.min(Math.abs(value) / largest, 1) : 0;
  const hue = value < 0 ? colour("--line1") : colour("--line0");
  return `color-mix(in srgb, ${hue} ${Math.round(share * 100)}%, ${colour("--card")})`;
}

// Colours by the largest value, or by that of each line.
function draw(id, values, width, name, byLine = false) {
  const canvas = byId(id), cell = 8, height = values ? values.length / width : rows;
  canvas.width = width * cell;
  canvas.height = height * cell;
  const context = canvas.getContext("2d");
  context.fillStyle = colour("--bg");
  context.fillRect(0, 0, canvas.width, canvas.height);
  shown[id] = { values, width, name };
  if (!values) return;
  const largest = (some) => Math.max(...some.filter((value) => value !== null).map(Math.abs), 1e-30);
  const all = largest(values);
  values.forEach((value, i) => {
    const first = i - (i % width);
    context.fillStyle = mix(value, byLine ? largest(values.slice(first, first + width)) : all);
    context.fillRect((i % width) * cell, Math.floor(i / width) * cell, cell - 1, cell - 1);
  });
}

function show(index) {
  at = Math.max(0, Math.min(steps.length - 1, index));
  const step = steps[at], now = numbers(step);
  byId("title").textContent = tiles.length ? `${step.title} (tile ${step.tile + 1} of ${tiles.length})` : step.title;
  byId("note").textContent = step.note;
  byId("count").textContent = `${at + 1} of ${steps.length}`;
  byId("at").value = at;
  byId("first").disabled = byId("back").disabled = at === 0;
  byId("next").disabled = byId("tile").disabled = at === steps.length - 1;
  document.querySelectorAll(".line.on").forEach((line) => line.classList.remove("on"));
  for (let line = step.lines[0]; line <= step.lines[1]; line++) byId(`l${step.source}-${line}`)?.classList.add("on");
  const code = document.querySelector(".code"), line = byId(`l${step.source}-${step.lines[0]}`);
  if (line) code.scrollTop = line.offsetTop - code.offsetTop - code.clientHeight / 3;
  draw("s", now.s, keys, (i) => `S of row ${Math.floor(i / keys)}, key ${step.tile * keys + (i % keys)}`);
  draw("p", now.p, keys, (i) => `P of row ${Math.floor(i / keys)}, key ${i % keys} of its tile`);
  const ofRows = [...now.m, ...now.l, ...(now.alpha ?? Array(rows).fill(null))];
  draw("ml", ofRows, rows, (i) => `${["m", "l", "α"][Math.floor(i / rows)]} of row ${i % rows}`, true);
  draw("o", now.o, columns, (i) => `O of row ${Math.floor(i / columns)}, column ${i % columns}`);
  byId("oname").textContent = step.stage === "done" ? "O, normalised" : "O, not yet divided by l";
  memory(step);
  lanes(step);
}

function memory(step) {
  const owners = ["--line3", "--line1", "--line5", "--line0"]; // Q, K, V, P
  byId("memory").replaceChildren(...data.regions.map(([name, bytes], i) => {
    const [holds, does] = step.memory[i] ?? ["", ""], box = document.createElement("div");
    box.style.flex = bytes;
    box.style.setProperty("--owner", `var(${owners[i]})`);
    box.className = `${holds ? "full" : ""} ${does}`;
    const what = document.createElement("b");
    what.textContent = holds || `${name}: nothing yet`;
    box.append(what, { write: "is written", read: "is read" }[does] ?? `${(bytes / 1024).toFixed(1)} KiB`);
    return box;
  }));
}

// As the emulator runs them in order: the last warp of the block, or the last lane of each warp, is still to come.
function lanes(step) {
  byId("lanes").replaceChildren(...Array.from({ length: data.warps }, (_, warp) => {
    const row = document.createElement("div");
    row.append(`warp ${warp}`);
    for (let lane = 0; lane < 32; lane++) {
      const cell = document.createElement("i");
      const last = step.barrier === "block" ? warp === data.warps - 1 : lane === 31;
      if (step.barrier && !last) cell.className = "wait";
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
    const { values, width, name } = shown[canvas.id] ?? {}, box = canvas.getBoundingClientRect();
    const cell = canvas.width / width / canvas.width;
    const column = Math.floor((event.clientX - box.left) / box.width / cell);
    const row = Math.floor((event.clientY - box.top) / box.height * (canvas.height / 8));
    const index = row * width + column, value = values?.[index];
    byId("readout").textContent = values && index < values.length
      ? `${name(index)}: ${value === null ? "-∞, or not there" : value.toPrecision(4)}` : "";
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(at));
show(Number(location.hash.slice(1)) || 0);
