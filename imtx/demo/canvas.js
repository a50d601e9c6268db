// Draws a Stream value (its fields: canvas.py), at the pace that the visitor chose and not before its pixels are there.
// Gradio runs this once per component, with `element`, `props`, `watch`.
const find = (selector) => element.querySelector(selector);
const root = find('.imtx-canvas'), grid = find('.imtx-grid'), text = find('.imtx-text'), live = find('.imtx-live');
const replay = find('.imtx-replay'), play = find('.imtx-replay button');
const slider = find('.imtx-replay input'), label = find('.imtx-replay span');
const pace = find('.imtx-pace select');  // seconds a picture; 0: as it comes
if (matchMedia('(prefers-reduced-motion: reduce)').matches) pace.value = 0;

let v = {};        // the value being drawn
let total = 0;     // steps in a picture
let samples = [];  // [{canvas, context, image}]
let drawn = 0;     // steps that the samples' images hold now
let arrived = 0;   // steps that v holds
let at = 0;        // how far the pace allows to show, in steps and fractions of one
let frame = 0;     // the animation frame that goes on from there, if any
let then = 0;      // the time of the last one
let part = -1;     // 0: first half of the run is shown, 1: second half, 2: all
let replaying = false;
let stopped = '';  // the run that the visitor stopped: no more of it is shown

// Writes the "rrggbb" at hex[at] into one pixel of an ImageData.
function put(image, pixel, hex, at, alpha = 255) {
  const rgb = parseInt(hex.slice(at, at + 6), 16);
  image.data.set([rgb >> 16, (rgb >> 8) & 255, rgb & 255, alpha], 4 * pixel);
}

const pixelOf = (step) => (v.order.length ? v.order[step] : step);

// Tile i of the grid. Tiles are kept from run to run, so nothing flickers and nothing moves.
function tile(i, kind, caption, side) {
  const figure = grid.children[i] || grid.appendChild(grid.firstElementChild.cloneNode(true));
  const canvas = figure.querySelector('canvas'), context = canvas.getContext('2d');
  if (i) delete canvas.dataset.n;
  Object.assign(canvas, { width: side, height: side, className: kind });
  canvas.setAttribute('aria-label', caption);
  figure.querySelector('figcaption').textContent = caption;
  return { canvas, context, image: context.createImageData(side, side) };
}

// A new run: lay out the tiles and draw the references.
function begin() {
  total = v.size * v.size;
  samples = Array.from({ length: v.count }, (_, i) =>
    tile(i, 'sample', v.captions[i] ?? (v.count > 1 ? `Sample ${i + 1}` : 'Sample'), v.size));
  v.reference.forEach(([caption, side, hex], i) => {
    const { context, image } = tile(v.count + i, 'reference', caption, side);
    for (let pixel = 0; 6 * pixel < hex.length; pixel++) put(image, pixel, hex, 6 * pixel);
    context.putImageData(image, 0, 0);
  });
  const tiles = v.count + v.reference.length;
  while (grid.children.length > tiles) grid.lastChild.remove();
  grid.dataset.tiles = tiles > 6 && tiles !== 10 ? 'many' : tiles;
  grid.dataset.base = v.base.length === 6 * total ? 'whole' : '';
  Object.assign(slider, { min: v.given, max: total });
  part = -1;
  clear();
  at = drawn;
}

// What shows before the first generated step: the base (dimmed where it is not given); elsewhere the checkerboard.
function clear() {
  for (const { image } of samples) {
    image.data.fill(0);
    for (let step = 0; 6 * step < v.base.length; step++)
      put(image, pixelOf(step), v.base, 6 * step, step < v.given ? 255 : 140);
  }
  drawn = v.given;
}

// Shows the pictures as they were after n steps; going forward, only the new steps are decoded.
function paint(n) {
  if (n < drawn) clear();
  samples.forEach(({ context, image }, i) => {
    for (let step = drawn; step < n; step++)
      put(image, pixelOf(step), v.hex, 6 * ((step - v.given) * v.count + i));
    context.putImageData(image, 0, 0);
    if (n > v.given && n < total) {  // mark the pixel that comes next
      context.fillStyle = '#f97316';
      context.fillRect(pixelOf(n) % v.size, Math.floor(pixelOf(n) / v.size), 1, 1);
    }
  });
  drawn = n;
  root.dataset.n = samples[0].canvas.dataset.n = n;
  slider.value = n;
  label.textContent = `Replay: pixel ${n} of ${total}`;
}

// The line under the pictures counts what is shown; at the start and at the end it has the server's words.
function tell(words = +pace.value && arrived > v.given && drawn < total ? `Pixel ${drawn} of ${total}` : v.msg) {
  text.textContent = words;
  // Screen readers hear the start, the half and the end, not every frame.
  const now = drawn < total ? Math.floor((2 * (drawn - v.given)) / (total - v.given)) : 2;
  if (now !== part) live.textContent = words;
  part = now;
  replay.style.visibility = drawn === total ? 'visible' : 'hidden';
}

// One animation frame: shows what the time since the last one allows, of what is there. No frames come while the page is
// hidden, and nobody looks: then all is shown. A replay needs a pace.
function unveil(now) {
  const seconds = +pace.value || (replaying ? 2 : 0);
  const steps = ((total - v.given) * Math.max(now - then, 0)) / (1000 * seconds);
  at = seconds && !document.hidden ? Math.min(at + steps, arrived) : arrived;
  then = now;
  paint(Math.floor(at));
  if (!replaying) tell();
  if (at < arrived) frame = requestAnimationFrame(unveil);
  else halt();
}

function go() {
  if (!frame) unveil((then = performance.now()));
}

function halt() {
  cancelAnimationFrame(frame);
  frame = 0;
  replaying = false;
  play.textContent = 'Replay';
}

function draw() {
  let next = props.value || {};
  if (typeof next === 'string') try { next = JSON.parse(next); } catch { return; }
  if (!next.run || next.run === stopped) return;
  const fresh = next.run !== v.run || next.hex.length < v.hex.length, opening = !v.run;
  if (next.stopped && !fresh) {
    halt();
    if (part === 2) return;  // nothing to stop but a replay
    stopped = next.run;
    live.textContent = 'Stopped.';
    tell('Stopped.');
    return;
  }
  if (fresh || replaying) halt();
  v = { ...next, order: fresh ? [...next.order] : v.order };
  if (fresh) begin();
  arrived = v.given + Math.floor(v.hex.length / (6 * v.count));
  if (opening) at = arrived;  // the page opens with finished pictures
  go();
}

slider.oninput = () => { halt(); paint(+slider.value); };
play.onclick = () => {
  if (replaying) return halt();
  play.textContent = 'Pause';
  replaying = true;
  at = drawn < total ? drawn : v.given;
  go();
};
document.addEventListener('visibilitychange', () => { if (frame && document.hidden) unveil(performance.now()); });

watch('value', draw);
draw();
