// One curve figure as inline SVG: axes, curves, and a cursor that pointer or arrow keys move to read values.
import { make } from "./marks.js";

const BOX = { width: 480, height: 330, left: 60, right: 12, top: 10, bottom: 46 };

/** Place of a value on an axis, as a share of its length; what lies outside is put at the end. */
function along({ low, high, is_log: isLog }, value) {
  const share = isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  return Math.min(1, Math.max(0, share));
}

const xOf = ({ x }, value) => BOX.left + along(x, value) * (BOX.width - BOX.left - BOX.right);
const yOf = ({ y }, value) => BOX.height - BOX.bottom - along(y, value) * (BOX.height - BOX.top - BOX.bottom);

function pathOf(plot, points, isStep) {
  const places = points.map(([x, y]) => [xOf(plot, x).toFixed(1), yOf(plot, y).toFixed(1)]);
  return places.map(([x, y], at) => (at === 0 ? `M${x} ${y}` : isStep ? `H${x}V${y}` : `L${x} ${y}`)).join("");
}

function axes(plot) {
  const [left, right, bottom] = [BOX.left, BOX.width - BOX.right, BOX.height - BOX.bottom];
  const middle = (BOX.top + bottom) / 2;
  return [
    ...plot.y.ticks.flatMap(([value, label]) => [
      make("line", { class: "grid", x1: left, x2: right, y1: yOf(plot, value), y2: yOf(plot, value) }),
      make("text", { x: left - 8, y: yOf(plot, value) + 4, "text-anchor": "end" }, label),
    ]),
    ...plot.x.ticks.flatMap(([value, label]) => [
      make("line", { class: "axis", x1: xOf(plot, value), x2: xOf(plot, value), y1: bottom, y2: bottom + 5 }),
      make("text", { x: xOf(plot, value), y: bottom + 19, "text-anchor": "middle" }, label),
    ]),
    make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    make("text", { x: (left + right) / 2, y: BOX.height - 6, "text-anchor": "middle" }, plot.x.label),
    make("text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(11 ${middle}) rotate(-90)` }, plot.y.label),
  ];
}

function curve(plot, { scorer, points }) {
  const line = make("path", { class: "curve", "data-scorer": scorer, d: pathOf(plot, points, plot.is_step) });
  if (plot.is_step) return [line];
  return [line, ...points.map(([x, y]) => make("circle", { class: "dot", "data-scorer": scorer, cx: xOf(plot, x), cy: yOf(plot, y), r: 4 }))];
}

/** The point that holds at a place: the last one up to it of a step curve, else the nearest one. */
function pointAt(plot, { points }, value) {
  if (plot.is_step) return Math.max(0, points.findLastIndex(([x]) => x <= value));
  const away = points.map(([x]) => Math.abs(x - value));
  return away.indexOf(Math.min(...away));
}

const short = (value) => (Number.isInteger(value) ? `${value}` : value < 0.1 ? `${Number(value.toPrecision(2))}` : value.toFixed(2));

export function makePlot(plot, id) {
  const figure = make("figure", { class: "plot" }, make("h3", { id }, plot.title));
  if (!plot.series.length) {
    figure.append(make("p", { class: "caption" }, plot.note));
    return figure;
  }
  const cursor = make("line", { class: "cursor", y1: BOX.top, y2: BOX.height - BOX.bottom, visibility: "hidden" });
  const svg = make("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", tabindex: 0, "aria-labelledby": `${id}-title ${id}-desc` },
    make("title", { id: `${id}-title` }, plot.title), make("desc", { id: `${id}-desc` }, describePlot(plot)), ...axes(plot));
  if (plot.reference.length) svg.append(make("path", { class: "reference", d: pathOf(plot, plot.reference, false) }));
  svg.append(...[...plot.series].reverse().flatMap((series) => curve(plot, series)), cursor); // the head on top
  const values = plot.series.map(() => make("span", { class: "value" }));
  const readout = make("p", { class: "readout caption", "aria-live": "polite" });
  figure.append(svg, readout, legendOf(plot, values), make("figcaption", { class: "caption" }, plot.note));
  followCursor(plot, svg, { cursor, values, readout });
  return figure;
}

function describePlot({ title, x, y, series, note }) {
  const ends = series.map(({ label, points }) => {
    const middle = points[Math.floor(points.length / 2)];
    return `${label}: ${short(middle[1])} at ${short(middle[0])}, ${short(points.at(-1)[1])} at ${short(points.at(-1)[0])}`;
  });
  return `${title}. Across: ${x.label}, up: ${y.label}. ${ends.join("; ")}. ${note}`;
}

function legendOf({ series, reference_label: reference }, values) {
  const sample = (attributes) => make("svg", { viewBox: "0 0 32 10", "aria-hidden": "true" }, make("path", { d: "M0 6H32", ...attributes }));
  const list = make("ul", { class: "legend" }, ...series.map(({ scorer, label }, at) =>
    make("li", {}, sample({ class: "curve", "data-scorer": scorer }), label, values[at])));
  if (reference) list.append(make("li", { class: "plot" }, sample({ class: "reference" }), reference));
  return list;
}

function followCursor(plot, svg, { cursor, values, readout }) {
  const stops = [...new Set(plot.series.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
  let at = -1;
  const show = (next) => {
    at = next;
    const place = at < 0 ? 0 : xOf(plot, stops[at]);
    cursor.setAttribute("visibility", at < 0 ? "hidden" : "visible");
    readout.textContent = at < 0 ? "" : `${plot.x.label}: ${short(stops[at])}`;
    plot.series.forEach((series, index) => {
      const point = at < 0 ? -1 : pointAt(plot, series, stops[at]);
      values[index].textContent = at < 0 ? "" : [short(series.points[point][1]), series.notes[point]].filter(Boolean).join(", ");
    });
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, place);
  };
  svg.addEventListener("pointermove", ({ clientX }) => {
    const { left, width } = svg.getBoundingClientRect();
    const place = (clientX - left) / width * BOX.width;
    const away = stops.map((stop) => Math.abs(xOf(plot, stop) - place));
    show(away.indexOf(Math.min(...away)));
  });
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (next === undefined) return;
    show(Math.min(stops.length - 1, Math.max(0, next)));
    event.preventDefault();
  });
  show(-1);
}
