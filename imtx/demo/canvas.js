// Draws a Stream value (its fields: canvas.py). Gradio runs this once per component, with `element`, `props`, `watch`.
const find = (selector) => element.querySelector(selector);
const root = find('.imtx-canvas'), grid = find('.imtx-grid'), text = find('.imtx-text'), live = find('.imtx-live');
const replay = find('.imtx-replay'), play = find('.imtx-replay button');
const slider = find('.imtx-replay input'), label = find('.imtx-replay span');

let v = {};        // the value being drawn
let total = 0;     // steps in a picture
let samples = [];  // [{canvas, context, image}]
let drawn = 0;     // steps that the samples' images hold now
let part = -1;     // 0: first half of the run, 1: second half, 2: finished
let timer = 0;     // of a running replay
let stopped = '';  // the run that the visitor stopped: frames of it that are still on their way are not shown

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
    tile(i, 'sample', v.count > 1 ? `Sample ${i + 1}` : 'Sample', v.size));
  v.reference.forEach(([caption, side, hex], i) => {
    const { context, image } = tile(v.count + i, 'reference', caption, side);
    for (let pixel = 0; 6 * pixel < hex.length; pixel++) put(image, pixel, hex, 6 * pixel);
    context.putImageData(image, 0, 0);
  });
  const tiles = v.count + v.reference.length;
  while (grid.children.length > tiles) grid.lastChild.remove();
  grid.dataset.tiles = tiles > 6 ? 'many' : tiles;
  grid.dataset.base = v.base.length === 6 * total ? 'whole' : '';
  part = -1;
  clear();
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

function stop() {
  clearInterval(timer);
  timer = 0;
  play.textContent = 'Replay';
}

function draw() {
  let next = props.value || {};
  if (typeof next === 'string') try { next = JSON.parse(next); } catch { return; }
  if (!next.run || next.run === stopped) return;
  if (next.stopped) stopped = next.run;
  const fresh = next.run !== v.run || next.hex.length < v.hex.length, before = drawn;
  v = { ...next, order: fresh ? [...next.order] : v.order };
  stop();
  if (fresh) begin();
  const n = v.given + Math.floor(v.hex.length / (6 * v.count));
  Object.assign(slider, { min: v.given, max: total });
  paint(n);
  text.textContent = v.msg;
  // Screen readers hear the start, the half, the end, and words that come with no new pixel; not every frame.
  const now = n < total ? Math.floor((2 * (n - v.given)) / (total - v.given)) : 2;
  if (now !== part || n === before) live.textContent = v.msg;
  part = now;
  replay.style.visibility = n === total && n > v.given ? 'visible' : 'hidden';
}

slider.oninput = () => { stop(); paint(+slider.value); };
play.onclick = () => {
  if (timer) return stop();
  play.textContent = 'Pause';
  let n = drawn < total ? drawn : v.given;
  timer = setInterval(() => {  // the whole picture in about four seconds
    n = Math.min(total, n + Math.ceil(total / 128));
    paint(n);
    if (n === total) stop();
  }, 33);
};

watch('value', draw);
draw();
