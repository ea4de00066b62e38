"use strict";
// The page's data: see page.py. A node is {name, parent, source, inputs, output, calls, parameters, flops, bytes, seconds,
// measured, settings}.
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = new Map(data.nodes.map(node => [node.name, node]));
const boxes = [...document.querySelectorAll(".box")];
const panel = document.getElementById("panel"), metric = document.getElementById("metric");
let chosen = "unet", step = data.maps ? data.maps.steps.length - 1 : 0, player = null, lookedAt = {};

// ------------------------------------------------------------------------------------------------------------- helpers

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

const SCALES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
function scaled(value, unit) {
  const [size, prefix] = SCALES.find(([size]) => value >= size) || [1, ""];
  return `${size === 1 ? Math.round(value) : (value / size).toPrecision(3)} ${prefix}${unit}`;
}
function time(seconds) {
  const [size, unit] = seconds >= 1 ? [1, "s"] : seconds >= 1e-3 ? [1e-3, "ms"] : [1e-6, "µs"];
  return `${Number((seconds / size).toPrecision(3))} ${unit}`;
}
const whole = value => value.toLocaleString("en-US");
const shape = value => Array.isArray(value) ? `(${value.join(", ")})` : String(value);
const network = name => nodes.get(name.split(".")[0]);
const last = name => { const node = nodes.get(name); return node.parent ? name.slice(node.parent.length + 1) : title(name); };
const title = name => ({unet: "UNet", vae: "VAE decoder", text_encoder: "text encoder"})[name] || name;
const childrenOf = name => data.nodes.filter(node => node.parent === name);
function percent(part, all) {
  if (!all) return "";
  const value = 100 * part / all;
  return value > 99.9 ? "100 %" : value < 0.1 ? (value ? "< 0.1 %" : "0 %") : `${value.toPrecision(2)} %`;
}

// What the bars show: "flops", "bytes", "parameters", "seconds:0", ..., "measured".
function amount(node, what = metric.value) {
  if (what.startsWith("seconds:")) return node.seconds[Number(what.slice(8))];
  return node[what] || 0;
}
const written = (node, what = metric.value) => what === "parameters" ? whole(node.parameters)
  : what === "flops" ? scaled(node.flops, "FLOP") : what === "bytes" ? scaled(node.bytes, "B") : time(amount(node));

// ------------------------------------------------------------------------------------------------------------- picture

function drawBars() {
  for (const group of [boxes.filter(box => !box.dataset.node.includes(".")), boxes.filter(box => box.dataset.node.includes("."))]) {
    const most = Math.max(...group.map(box => amount(nodes.get(box.dataset.node)))) || 1;
    for (const box of group) {
      const bar = box.querySelector(".bar");
      bar.setAttribute("width", (bar.dataset.full * amount(nodes.get(box.dataset.node)) / most).toFixed(1));
    }
  }
}

// The box of a module, or of the nearest that it is in; a level has none, and its network's is taken.
function boxOf(name) {
  for (let node = nodes.get(name); node; node = nodes.get(node.parent)) {
    const box = boxes.find(box => box.dataset.node === node.name);
    if (box) return box;
  }
  return boxes[0];
}

function nearest(from, key) {
  const [x, y] = [Number(from.dataset.x), Number(from.dataset.y)];
  let best = null, least = Infinity;
  for (const box of boxes) {
    const dx = Number(box.dataset.x) - x, dy = Number(box.dataset.y) - y;
    const [along, across] = {ArrowRight: [dx, dy], ArrowLeft: [-dx, dy], ArrowDown: [dy, dx], ArrowUp: [-dy, dx]}[key];
    const distance = along + 2.5 * Math.abs(across);
    if (along > 1 && distance < least) [best, least] = [box, distance];
  }
  return best;
}

function markPicture() {
  const box = boxOf(chosen);
  for (const other of boxes) {
    other.setAttribute("aria-pressed", String(other === box));
    other.setAttribute("tabindex", other === box ? "0" : "-1");
  }
  for (const part of document.querySelectorAll(".part")) {
    const name = part.dataset.node;
    part.classList.toggle("picked", chosen === name || chosen.startsWith(`${name}.`));
  }
}

// --------------------------------------------------------------------------------------------------------------- panel

function choose(name, focus) {
  chosen = name;
  markPicture();
  drawPanel();
  try { history.replaceState(null, "", `#${name}`); } catch { /* a browser may forbid it for files */ }
  if (focus === "picture") boxOf(name).focus();
  if (focus === "panel") {
    const place = panel.querySelector(".parts button") || panel.querySelector("nav [aria-current]");
    (place || panel).focus({preventScroll: true});
    if (panel.getBoundingClientRect().top > innerHeight * 0.6) panel.scrollIntoView();
  }
}

function drawPanel() {
  const node = nodes.get(chosen), source = data.sources[node.source];
  panel.replaceChildren(
    path(node),
    make("div", {}, make("h2", {}, source.name), make("p", {}, source.says, node.settings ? make("code", {}, ` ${node.settings}`) : null)),
    facts(node), kinds(node) || "", maps(node) || "", parts(node) || "", sourceOf(source) || "");
  panel.scrollTop = 0;
  document.getElementById("said").textContent = `${node.name}: ${source.name}, ${written(node)}`;
}

function path(node) {
  const names = [];
  for (let at = node; at; at = nodes.get(at.parent)) names.unshift(at.name);
  return make("nav", {"aria-label": "Where it is"}, names.flatMap((name, i) => [
    i ? " › " : null,
    make("button", {type: "button", "aria-current": name === node.name && "true", onclick: () => choose(name, "panel")}, last(name))]),
    make("button", {type: "button", class: "back", onclick: () => { choose(chosen, "picture"); boxOf(chosen).scrollIntoView({block: "center"}); }}, "↑ picture"));
}

function facts(node) {
  const all = network(node.name), device = data.devices[0], ridge = device.flops / device.bytes;
  const of = what => node === all ? "" : make("small", {}, `, ${percent(amount(node, what), amount(all, what))} of the ${title(all.name)}`);
  const rows = [];
  if (node.inputs.length) rows.push(["input", node.inputs.map(([name, value]) => make("div", {}, `${name} `, make("b", {}, shape(value))))]);
  if (node.output.length) rows.push(["output", make("b", {}, shape(node.output))]);
  if (node.calls > 1) rows.push(["calls", `${node.calls}, added together`]);
  rows.push(["parameters", [whole(node.parameters), make("small", {}, `, ${scaled(2 * node.parameters, "B")} in float16`), of("parameters")]]);
  rows.push(["FLOPs", [scaled(node.flops, "FLOP"), of("flops")]]);
  rows.push(["bytes moved", [scaled(node.bytes, "B"), of("bytes")]]);
  if (node.bytes) {
    const intensity = node.flops / node.bytes;
    rows.push(["FLOPs per byte", [intensity.toPrecision(3), make("small", {}, ` ${intensity < ridge ? "memory-bound" : "compute-bound"} on ${device.name}, whose limit is ${Math.round(ridge)}`)]]);
  }
  rows.push(["time, counted", data.devices.map((d, i) => make("div", {}, `${time(node.seconds[i])} `, make("small", {}, `${d.name}, ${d.source}`)))]);
  if (node.measured !== null) rows.push(["time, measured", [time(node.measured), make("small", {}, ` ${data.measured_on}`), of("measured")]]);
  return make("table", {class: "facts"}, make("tbody", {}, rows.map(([name, value]) => make("tr", {}, make("th", {scope: "row"}, name), make("td", {}, value)))));
}

function shareBar(value, all) {
  return make("span", {class: "share", style: `width: ${(70 * value / (all || 1)).toFixed(1)}px`});
}

function kinds(node) {
  if (node.name !== "unet") return null;
  const most = Math.max(...data.kinds.map(kind => amount(kind)));
  const row = (name, value, count) => make("tr", {}, make("th", {scope: "row"}, name), make("td", {class: "n"}, `${count} ×`),
    make("td", {class: "n"}, written(value)), make("td", {class: "n"}, percent(amount(value), amount(node))), make("td", {}, shareBar(amount(value), most)));
  return make("div", {class: "wide"}, make("h3", {}, `By kind of layer: ${metric.selectedOptions[0].text}`),
    make("table", {}, make("tbody", {}, data.kinds.map(kind => row(kind.name, kind, kind.calls)))));
}

function parts(node) {
  const children = childrenOf(node.name);
  if (!children.length) return null;
  const all = amount(node), most = Math.max(...children.map(child => amount(child)));
  const rest = {...node, parameters: 0};  // what is in no part, such as additions
  for (const what of ["flops", "bytes"]) rest[what] = children.reduce((left, child) => left - child[what], node[what]);
  rest.seconds = node.seconds.map((seconds, i) => children.reduce((left, child) => left - child.seconds[i], seconds));
  rest.measured = children.reduce((left, child) => left - (child.measured || 0), node.measured || 0);
  const own = amount(rest) > 0.001 * all && make("tr", {}, make("td", {}, "between them"), make("td", {}, ""),
    make("td", {class: "n"}, written(rest)), make("td", {class: "n"}, percent(amount(rest), all)),
    make("td", {}, shareBar(amount(rest), most)));
  return make("div", {class: "wide"}, make("h3", {}, `Parts: ${metric.selectedOptions[0].text}`),
    make("table", {class: "parts"}, make("tbody", {}, children.map(child => make("tr", {},
      make("td", {}, make("button", {type: "button", "data-node": child.name, onclick: () => choose(child.name, "panel")}, last(child.name))),
      make("td", {}, data.sources[child.source].name), make("td", {class: "n"}, written(child)), make("td", {class: "n"}, percent(amount(child), all)),
      make("td", {}, shareBar(amount(child), most)))), own || null)));
}

function sourceOf(source) {
  if (!source.lines.length) return null;
  const width = String(source.lines[source.lines.length - 1][0]).length;
  return make("div", {}, make("h3", {}, `Source: ${source.file}, line ${source.lines[0][0]}`),
    make("pre", {tabindex: "0", "aria-label": "source lines"}, source.lines.flatMap(([number, text]) =>
      [make("i", {"aria-hidden": "true"}, `${String(number).padStart(width)}  `), `${text}\n`])));
}

// ---------------------------------------------------------------------------------------------------------------- maps

function sprite(image, row, column, rows, columns, kind, mark) {
  const at = (i, n) => n > 1 ? `${100 * i / (n - 1)}%` : "0%";
  const cell = make("div", {class: `cell ${kind}`, style: `background-image: url(${image}); background-size: ${100 * columns}% ${100 * rows}%; `
    + `background-position: ${at(column, columns)} ${at(row, rows)}`});
  if (mark) cell.append(make("b", {style: `left: ${mark[0]}%; top: ${mark[1]}%`}));
  return cell;
}

function maps(node) {
  if (!data.maps) return null;
  const names = Object.keys(data.maps.of).filter(name => name === node.name || name.startsWith(`${node.name}.`));
  if (!names.length) return null;
  if (!names.includes(lookedAt[node.name])) lookedAt[node.name] = names.find(name => data.maps.of[name].kind === "text") || names[0];
  const area = make("div", {class: "wide", style: `--ratio: ${data.maps.ratio}`}), caption = make("span", {"aria-live": "polite"});
  const draw = () => {
    const map = data.maps.of[lookedAt[node.name]], {rows, columns} = map;
    const large = columns.length === 1 && rows.length === 1;
    const fit = Math.max(48, Math.min(76, Math.floor((panel.clientWidth - 120) / (columns.length + 1)) - 6));
    const head = map.kind === "frames" ? null : make("tr", {}, make("th", {}, ""), make("th", {}, "video"), columns.map(c => make("th", {scope: "col"}, c)));
    area.replaceChildren(make("p", {}, map.says), make("table", {class: "maps", style: `width: auto; --cell: ${fit}px`}, make("tbody", {}, head, rows.map((label, i) => make("tr", {},
      large ? null : [make("th", {scope: "row"}, label), make("td", {}, sprite(data.maps.video, i, 0, rows.length, 1, ""))],
      columns.map((_, j) => make("td", {}, sprite(map.images[step], i, j, rows.length, columns.length, `map${large ? " large" : ""}`, map.marks && map.marks[j]))))))));
    caption.textContent = `step ${data.maps.steps[step]} of ${data.maps.count}`;
    slider.value = step;
  };
  const slider = make("input", {type: "range", min: 0, max: data.maps.steps.length - 1, step: 1, "aria-label": "denoising step",
                                oninput: event => { step = Number(event.target.value); draw(); }});
  const play = make("button", {type: "button", onclick: () => {
    clearInterval(player);
    step = 0;
    draw();
    player = setInterval(() => { if (step + 1 < data.maps.steps.length && area.isConnected) { step += 1; draw(); } else clearInterval(player); }, 700);
  }}, "play");
  const select = make("select", {"aria-label": "attention", onchange: event => { lookedAt[node.name] = event.target.value; draw(); }},
    names.map(name => make("option", {value: name, selected: name === lookedAt[node.name]}, `${data.maps.of[name].kind}: ${name.slice(node.name.length + 1) || last(name)}`)));
  draw();
  return make("div", {}, make("h3", {}, `Attention for “${data.maps.prompt}”`),
    make("div", {class: "steps"}, names.length > 1 ? select : null, slider, play, caption), area);
}

// ------------------------------------------------------------------------------------------------------- what people do

for (const box of boxes) {
  box.addEventListener("click", event => {
    const part = event.target.closest(".part");
    choose((part || box).dataset.node);
    box.focus({preventScroll: true});
    if (matchMedia("(max-width: 800px)").matches) panel.scrollIntoView();
  });
  box.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key.startsWith("Arrow")) {
      const next = nearest(box, event.key);
      if (next) choose(next.dataset.node, "picture");
    } else if (event.key === "Home") choose("unet.conv_in", "picture");
    else if (event.key === "End") choose("unet.conv_out", "picture");
    else if (event.key === "Enter" || event.key === " ") choose(box.dataset.node, "panel");
    else return;
    event.preventDefault();
  });
}

panel.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const buttons = [...panel.querySelectorAll(".parts button")], at = buttons.indexOf(document.activeElement);
  if (event.key === "Escape") {
    const node = nodes.get(chosen), box = boxes.find(box => box.dataset.node === chosen);
    if (box || !node.parent) choose(chosen, "picture");
    else {
      const from = chosen;
      choose(node.parent, "panel");
      const back = panel.querySelector(`.parts button[data-node="${CSS.escape(from)}"]`);
      if (back) back.focus();
    }
  } else if (at >= 0 && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    buttons[(at + (event.key === "ArrowDown" ? 1 : buttons.length - 1)) % buttons.length].focus();
  } else return;
  event.preventDefault();
});

metric.addEventListener("change", () => { drawBars(); drawPanel(); });

const theme = document.getElementById("theme"), system = matchMedia("(prefers-color-scheme: dark)");
let own = null;
try { own = localStorage.getItem("theme"); } catch { /* a browser may forbid it for files */ }
function paint() {
  const dark = own ? own === "dark" : system.matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(dark));
}
theme.addEventListener("click", () => {
  own = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", own); } catch { /* as above */ }
  paint();
});
system.addEventListener("change", paint);
addEventListener("hashchange", () => { const name = decodeURIComponent(location.hash.slice(1)); if (nodes.has(name)) choose(name); });

paint();
drawBars();
const asked = decodeURIComponent(location.hash.slice(1));
choose(nodes.has(asked) ? asked : "unet");
