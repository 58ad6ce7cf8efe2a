// What is drawn on canvases: boxes, heat, sampling points, paths.

const VIRIDIS = [[68, 1, 84], [72, 31, 112], [68, 57, 131], [59, 82, 139], [49, 104, 142], [40, 124, 142], [33, 145, 140],
  [32, 164, 134], [53, 183, 121], [94, 201, 98], [144, 215, 67], [200, 224, 32], [253, 231, 37]];

export function viridis(value) {
  const place = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((c, k) => Math.round(c + (VIRIDIS[low + 1][k] - c) * (place - low)));
}

// Black or white, whichever contrasts more.
function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((k) => (parseInt(colour.slice(k, k + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// A canvas of `width` CSS pixels for a picture of `size` [width, height], sharp on any display; its context draws in
// pixels of the picture. Returns the context and how many CSS pixels one of the picture is.
export function prepare(canvas, size, width) {
  const density = Math.min(window.devicePixelRatio || 1, 2), scale = width / size[0];
  canvas.width = Math.max(1, Math.round(width * density));
  canvas.height = Math.max(1, Math.round(size[1] * scale * density));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${size[1] * scale}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale * density, 0, 0, scale * density, 0, 0);
  return [context, scale];
}

// One map of a layer as numbers 0..255: 0 is the average of the heads, 1 the first head.
export function heatOf(layer, head) {
  if (!layer.bytes) {
    const text = atob(layer.heat);
    layer.bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  }
  const cells = layer.shape[0] * layer.shape[1];
  return layer.bytes.subarray(head * cells, (head + 1) * cells);
}

// The picture behind a heat map is greyed, so that colour means weight alone.
export function drawGrey(context, picture, size) {
  context.save();
  context.filter = "grayscale(1) brightness(0.8)";
  context.drawImage(picture, 0, 0, ...size);
  context.restore();
}

// Cells become pixels of a small canvas, which the browser scales up smoothly. What has little weight is transparent.
export function drawHeat(context, layer, head, size) {
  const [rows, columns] = layer.shape, values = heatOf(layer, head);
  const cells = document.createElement("canvas");
  cells.width = columns;
  cells.height = rows;
  const small = cells.getContext("2d"), image = small.createImageData(columns, rows);
  values.forEach((value, k) => {
    image.data.set([...viridis(value / 255), Math.round(255 * 0.9 * Math.sqrt(value / 255))], 4 * k);
  });
  small.putImageData(image, 0, 0);
  context.save();
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(cells, 0, 0, ...size);
  context.restore();
}

// Points of a layer with the share that each has: of one head, or of all, of which each then has its share of them.
export function pointsOf(layer, head) {
  const heads = layer.points, averaged = (points) => points.map(([x, y, w, l]) => [x, y, w / heads.length, l]);
  const chosen = head === 0 ? heads.flatMap(averaged) : heads[head - 1];
  return [...chosen].sort((a, b) => a[2] - b[2]);
}

export function drawPoints(context, layer, head, scale) {
  const points = pointsOf(layer, head), most = points.length ? points[points.length - 1][2] : 1;
  for (const [x, y, weight] of points) {
    const share = weight / (most || 1);
    context.beginPath();
    context.arc(x, y, (1.5 + 5.5 * Math.sqrt(share)) / scale, 0, 2 * Math.PI);
    context.fillStyle = `rgb(${viridis(share).join(" ")} / 90%)`;
    context.fill();
    context.lineWidth = 1 / scale;
    context.strokeStyle = share > 0.4 ? "rgb(0 0 0 / 80%)" : "rgb(255 255 255 / 70%)";
    context.stroke();
  }
}

// A box with an outline that is seen on any ground. `scale`: CSS pixels of one pixel of the picture.
export function drawBox(context, box, colour, scale, { width = 2.5, dash = null, alpha = 1 } = {}) {
  const [left, top, right, bottom] = box;
  context.save();
  context.globalAlpha = alpha;
  context.lineJoin = "round";
  context.strokeStyle = "rgb(0 0 0 / 65%)";
  context.lineWidth = (width + 2) / scale;
  if (dash) context.setLineDash(dash.map((d) => d / scale));
  context.strokeRect(left, top, right - left, bottom - top);
  context.strokeStyle = colour;
  context.lineWidth = width / scale;
  context.strokeRect(left, top, right - left, bottom - top);
  context.restore();
}

// Captions stand above their boxes, or where little of earlier captions is hidden, within the picture.
export function drawCaption(context, text, box, colour, scale, size, taken) {
  const letters = 13 / scale, pad = 4 / scale, height = 18 / scale;
  context.font = `600 ${letters}px system-ui, "DejaVu Sans", sans-serif`;
  const width = context.measureText(text).width + 2 * pad;
  const within = (x, y) => [Math.max(0, Math.min(x, size[0] - width)), Math.max(0, Math.min(y, size[1] - height))];
  const places = [box[1] - height, box[3], box[1], box[3] - height].flatMap((y) => [within(box[0], y),
    within(box[2] - width, y)]);
  const hidden = ([x, y]) => taken.reduce((sum, [a, b, w, h]) => sum + Math.max(0, Math.min(x + width, a + w)
    - Math.max(x, a)) * Math.max(0, Math.min(y + height, b + h) - Math.max(y, b)), 0);
  const [x, y] = places.reduce((best, place) => (hidden(place) < hidden(best) ? place : best));
  taken.push([x, y, width, height]);
  context.fillStyle = colour;
  context.fillRect(x, y, width, height);
  context.fillStyle = inkOn(colour);
  context.textBaseline = "middle";
  context.fillText(text, x + pad, y + height / 2 + 0.5 / scale);
}

// A cross at a point, white on black.
export function drawCross(context, x, y, scale, colour = "#fff") {
  const arm = 8 / scale;
  for (const [style, width] of [["#000", 5], [colour, 2.5]]) {
    context.strokeStyle = style;
    context.lineWidth = width / scale;
    context.beginPath();
    context.moveTo(x - arm, y);
    context.lineTo(x + arm, y);
    context.moveTo(x, y - arm);
    context.lineTo(x, y + arm);
    context.stroke();
  }
}

// Colour of a step of a box's path, from pale to the last, which is as the box is.
export function stepColour(step, steps) {
  const share = steps > 1 ? step / (steps - 1) : 1, from = [255, 255, 255], to = [230, 159, 0];
  return `#${from.map((c, k) => Math.round(c + (to[k] - c) * share).toString(16).padStart(2, "0")).join("")}`;
}

// A small square or line of one colour, for lists.
export function swatch(colour) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return canvas;
}
