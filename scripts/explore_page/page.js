// The page: what is chosen, what is asked of the server, and what is shown of it.
import * as draw from "./draw.js";

const $ = (id) => document.getElementById(id);
const state = {
  about: null, sort: "name", page: 0, image: null, picture: null, errors: null,
  threshold: 0.5, truth: false,
  chosen: null,             // {detection} or {point: [x, y]}, with the server's `seen` once it is there
  layer: -1, head: 0, view: "heat", path: true, of: "",             // layer and head are of the encoder or the decoder
};
let opening = 0;            // counts what was asked for, so that a late answer to an earlier question is dropped
let asking = 0;

// Talking to the server.

async function ask(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error || `The server answered ${answer.status}`);
  return content;
}

function showError(error) {
  $("error-text").textContent = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  $("error").hidden = false;
}

function clearError() {
  $("error").hidden = true;
}

function loadPicture(id) {
  return new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => resolve(picture);
    picture.onerror = () => reject(new Error(`The picture of image ${id} does not load`));
    picture.src = `/api/images/${id}/picture?v=${state.about.token}`;
  });
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function press(group, chosen) {
  for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
}

// The list of images.

let listing = 0, poll = null;

async function showList() {
  const mine = ++listing;
  clearTimeout(poll);
  let list;
  try {
    list = await ask(`/api/images?sort=${state.sort}&page=${state.page}`);
  } catch (error) {
    showError(error);
    return;
  }
  if (mine !== listing) return;
  state.page = list.page;
  fill($("uploads"), list.uploads);
  fill($("thumbnails"), list.images);
  $("no-images").hidden = list.of + list.uploads.length > 0;
  $("no-images").textContent = "No data set was given. Upload an image to look at it.";
  $("pager").hidden = list.pages < 2;
  $("page-number").textContent = `${list.page + 1} of ${list.pages}`;
  $("page-back").disabled = list.page === 0;
  $("page-on").disabled = list.page === list.pages - 1;
  const unfinished = state.sort === "error" && list.done < list.of;
  $("progress").textContent = unfinished ? `looked at ${list.done} of ${list.of}` : "";
  if (unfinished) poll = setTimeout(showList, 1000);
}

function fill(list, images) {
  const known = new Map([...list.children].map((item) => [item.dataset.id, item]));
  list.replaceChildren(...images.map((image) => {
    const item = known.get(image.id) || thumbnail(image);
    const button = item.firstChild;
    button.setAttribute("aria-current", String(state.image !== null && state.image.id === image.id));
    button.querySelector(".errors")?.remove();
    if (state.sort === "error" && image.looked_at) {
      const said = image.errors === null ? "unreadable" : `${image.errors} error${image.errors === 1 ? "" : "s"}`;
      button.append(element("span", { className: "errors", textContent: said }));
    }
    return item;
  }));
}

function thumbnail(image) {
  const picture = element("img", { src: `/api/images/${image.id}/thumbnail?v=${state.about.token}`, alt: image.name,
    loading: "lazy" });
  const button = element("button", { title: `${image.name}, ${image.width} × ${image.height}`,
    onclick: () => open(image.id) }, picture);
  const item = element("li", {}, button);
  item.dataset.id = image.id;
  return item;
}

// One image.

async function open(id) {
  const mine = ++opening;
  unchoose();
  clearError();
  $("busy").hidden = false;
  try {
    const loading = loadPicture(id);
    loading.catch(() => {});                                        // what the server says of it tells more
    const image = await ask(`/api/images/${id}/detections`), picture = await loading;
    if (mine !== opening) return;
    asking++;                                   // what was chosen meanwhile, on the image before, is not of this one
    Object.assign(state, { image, picture, errors: null, chosen: null });
    history.replaceState(null, "", `#${id}`);
    $("stage-note").textContent = "";
    $("truth").disabled = image.truth === null;
    for (const button of document.querySelectorAll(".thumbnails button")) {
      button.setAttribute("aria-current", String(button.parentNode.dataset.id === id));
    }
    if (state.truth) askErrors();
  } catch (error) {
    if (mine === opening) showError(error);
  } finally {
    if (mine === opening) {
      $("busy").hidden = true;
      show();
    }
  }
}

async function move(step) {
  if (!state.image) return;
  try {
    const { id } = await ask(`/api/images/${state.image.id}/neighbour?step=${step}&sort=${state.sort}`);
    if (id !== null) await open(id);
  } catch (error) {
    showError(error);
  }
}

async function upload(file) {
  if (file.size > state.about.most_bytes) {
    showError(new Error(`the file is larger than ${state.about.most_bytes / 1e6} MB, the limit of an upload; make it `
      + "smaller first"));
    return;
  }
  clearError();
  $("busy").hidden = false;
  try {
    const image = await ask("/api/uploads", { method: "POST", body: file,
      headers: { "Content-Type": "application/octet-stream" } });
    showList();
    await open(image.id);
  } catch (error) {
    showError(error);
  } finally {
    $("busy").hidden = true;
  }
}

// Ground truth and errors.

let wait = null;

function askErrors() {
  clearTimeout(wait);
  if (!state.truth || !state.image || state.image.truth === null) return;
  const { image, threshold } = state;
  wait = setTimeout(async () => {
    try {
      const errors = await ask(`/api/images/${image.id}/errors?threshold=${threshold}`);
      if (state.image === image && state.threshold === threshold) {
        state.errors = { ...errors, of: new Map(errors.places.map((place, k) => [place, errors.kinds[k]])) };
        show();
      }
    } catch (error) {
      showError(error);
    }
  }, state.errors ? 120 : 0);
}

function showLegend() {
  const legend = $("legend"), { errors } = state;
  legend.hidden = !(state.truth && errors && state.image?.truth) || Boolean(state.chosen?.seen);
  if (legend.hidden) return;
  const line = (colour, dashed, text) => {
    const mark = element("i", { className: dashed ? "dashed" : "" });
    mark.style.borderColor = colour;
    return element("span", {}, mark, text);
  };
  const rows = Object.entries(state.about.kinds).filter(([kind]) => errors.counts[kind])
    .map(([kind, { letter, colour, words }]) => line(colour, kind === "missed",
      `${errors.counts[kind]} ${words}${letter && ` (${letter})`}`));
  legend.replaceChildren(line("#8a949b", true, "ground truth"), ...rows);
}

// Choosing a box or a point.

async function choose(chosen) {
  const mine = ++asking, { image } = state;
  state.chosen = chosen;
  show();
  const [x, y] = chosen.point || [0, 0];
  if (chosen.point && !state.about.encoder_layers) {
    $("attention-note").textContent = `${state.about.model} has no encoder layers: no point of the image looks at `
      + "others. Choose a box to see where its query looked.";
    $("busy").hidden = true;
    show();
    return;
  }
  $("busy").hidden = false;
  try {
    const seen = await ask(chosen.point ? `/api/images/${image.id}/point?x=${x}&y=${y}`
      : `/api/images/${image.id}/query/${chosen.detection.query}`);
    if (mine !== asking) return;
    chosen.seen = seen;
    const of = chosen.point ? "encoder" : "decoder";
    if (of !== state.of) Object.assign(state, { of, head: 0, layer: seen.layers.length - 1 });
    if (!seen.layers[0].points) state.view = "heat";
  } catch (error) {
    if (mine === asking) {
      showError(error);
      unchoose();
    }
  } finally {
    if (mine === asking) {
      $("busy").hidden = true;
      show();
    }
  }
}

function unchoose() {
  asking++;
  state.chosen = null;
  $("busy").hidden = true;
  show();
}

// What kind of error a detection is, where the ground truth is shown: {letter, colour, words}.
function kindOf(one) {
  return state.truth ? state.about.kinds[state.errors?.of.get(state.image.detections.indexOf(one))] : null;
}

function visible() {
  return state.image ? state.image.detections.filter((one) => one.score >= state.threshold) : [];
}

function click(event) {
  if (!state.image) return;
  const frame = $("picture").getBoundingClientRect();
  const x = (event.clientX - frame.left) / frame.width * state.image.width;
  const y = (event.clientY - frame.top) / frame.height * state.image.height;
  if (!(x >= 0 && y >= 0 && x < state.image.width && y < state.image.height)) return;
  const area = ([left, top, right, bottom]) => (right - left) * (bottom - top);
  const around = ({ box: [left, top, right, bottom] }) => left <= x && x <= right && top <= y && y <= bottom;
  const pointed = event.shiftKey || state.chosen?.point && state.chosen.seen;
  const hit = pointed ? [] : visible().filter(around).sort((a, b) => area(a.box) - area(b.box));
  if (hit.length) {
    const next = hit.indexOf(state.chosen?.detection) + 1;          // a second click takes the box behind
    choose({ detection: hit[next % hit.length] });
  } else if (state.chosen && !pointed) {
    unchoose();
  } else {
    choose({ point: [Math.round(x * 10) / 10, Math.round(y * 10) / 10] });
  }
}

// Showing all of it.

function show() {
  showPicture();
  showPanel();
  showAttention();
  showLegend();
}

function labelColour(one) {
  return state.about.colours[one.label];
}

function caption(one) {
  return `${one.name} ${one.score.toFixed(2)}`;
}

function showPicture() {
  const { about, image, picture, chosen } = state, canvas = $("picture");
  canvas.hidden = !image;
  $("title").textContent = image ? `${image.name} · ${image.width} × ${image.height}` : "No image";
  $("previous").disabled = $("next").disabled = !image;
  $("hint").textContent = !image ? "" : hint();
  if (!image) return;
  const size = [image.width, image.height], room = $("stage").clientWidth;
  const tallest = Math.max(260, window.innerHeight - 190);
  const width = Math.min(room, tallest * size[0] / size[1]);
  const [context, scale] = draw.prepare(canvas, size, width), taken = [];
  context.imageSmoothingQuality = "high";
  const layer = chosen?.seen?.layers[state.layer];
  if (!layer) {
    context.drawImage(picture, 0, 0, ...size);
  } else {
    draw.drawGrey(context, picture, size);
    if (state.view === "points") draw.drawPoints(context, layer, state.head, scale);
    else draw.drawHeat(context, layer, state.head, size);
  }
  if (chosen?.point && about.encoder_layers) {
    draw.drawCross(context, ...chosen.point, scale);
  } else if (chosen?.detection) {
    for (const one of visible()) draw.drawBox(context, one.box, "#ffffff", scale, { width: 1, alpha: 0.3 });
    showChosenBox(context, chosen, scale, size, taken);
  } else {
    showBoxes(context, scale, size, taken);
  }
}

function hint() {
  const { chosen, about } = state;
  if (!about.encoder_layers && !chosen?.detection) return "Click a box.";
  if (!chosen) return "Click a box, or a point (with Shift one inside a box).";
  if (chosen.point) return "Where the encoder looks from the cross. Click another point, or press Esc.";
  return "Where the query of this box looked. Click beside it, or press Esc, to see all boxes.";
}

function showBoxes(context, scale, size, taken) {
  const { image, errors } = state, judged = state.truth && image.truth, shown = visible(), { missed } = state.about.kinds;
  if (judged) {
    const lost = new Set(errors ? errors.missed : []);
    image.truth.forEach((object, k) => {
      const colour = lost.has(k) ? missed.colour : "#ffffff";
      draw.drawBox(context, object.box, colour, scale, { dash: [7, 5], width: 2, alpha: object.crowd ? 0.5 : 1 });
    });
  }
  const colour = (one) => (judged ? kindOf(one)?.colour || "#a8b0b6" : labelColour(one));
  for (const one of [...shown].reverse()) draw.drawBox(context, one.box, colour(one), scale);
  if (shown.length > 40) return;                                    // they would hide the picture; the list has them
  for (const one of shown) {
    const kind = judged && kindOf(one);
    const said = kind && kind !== state.about.kinds.correct ? `${caption(one)} · ${kind.words}` : caption(one);
    draw.drawCaption(context, said, one.box, colour(one), scale, size, taken);
  }
  if (judged && errors) {
    for (const k of errors.missed) {
      draw.drawCaption(context, `${image.truth[k].name} · ${missed.words}`, image.truth[k].box, missed.colour, scale, size,
        taken);
    }
  }
}

function showChosenBox(context, { detection, seen }, scale, size, taken) {
  if (seen && state.path) {
    seen.path.forEach((box, k) => {
      const last = k === seen.path.length - 1, start = k === 0 && seen.from_box;
      draw.drawBox(context, box, draw.stepColour(k, seen.path.length), scale, { width: last ? 3 : 1.5,
        dash: start ? [4, 4] : null });
    });
    if (seen.from_point) draw.drawCross(context, ...seen.from_point, scale);
  } else {
    draw.drawBox(context, detection.box, "#e69f00", scale, { width: 3 });
  }
  draw.drawCaption(context, caption(detection), detection.box, "#e69f00", scale, size, taken);
}

function showPanel() {
  $("threshold-value").textContent = state.threshold.toFixed(2);
  const shown = visible();
  $("count").textContent = !state.image ? "" : shown.length === 0 ? "no box; lower the score"
    : `${shown.length} box${shown.length === 1 ? "" : "es"}`;
  $("count").dataset.boxes = shown.length;
  $("truth-label").hidden = !state.about?.images;
  $("detections").replaceChildren(...shown.slice(0, 100).map((one) => {
    const kind = kindOf(one), colour = kind ? kind.colour : labelColour(one);
    const button = element("button", { onclick: () => choose({ detection: one }) }, draw.swatch(colour),
      element("span", { textContent: one.name }), element("small", { textContent: kind ? kind.words : "" }),
      element("span", { textContent: one.score.toFixed(2) }));
    button.setAttribute("aria-pressed", String(one === state.chosen?.detection));
    return element("li", {}, button);
  }));
}

function showAttention() {
  const { chosen } = state, layers = chosen?.seen?.layers;
  $("attention").hidden = !chosen;
  if (!chosen) return;
  const nothing = chosen.point && !state.about.encoder_layers;
  $("attention-note").hidden = !nothing;
  $("attention-controls").hidden = !layers;
  $("attention-title").textContent = chosen.point ? `Encoder, from (${chosen.point.map(Math.round).join(", ")})`
    : `Where the query of “${chosen.detection.name}” looked`;
  if (!layers) return;
  const names = chosen.point ? "encoder" : "decoder";
  $("layers").replaceChildren(...layers.map((_, k) => {
    const button = element("button", { textContent: k + 1, title: `${names} layer ${k + 1} of ${layers.length}`,
      onclick: () => set({ layer: k }) });
    button.setAttribute("aria-pressed", String(k === state.layer));
    return button;
  }));
  const layer = layers[state.layer];
  $("view-row").hidden = !layer.points;
  press($("view"), $("view").querySelector(`[data-view="${state.view}"]`));
  showHeads(layer);
  const points = state.view === "points" ? draw.pointsOf(layer, state.head) : null;
  const most = points ? points[points.length - 1][2] : layer.most[state.head];
  $("scale-most").textContent = most.toPrecision(2);
  showSteps(chosen.seen);
}

function showHeads(layer) {
  const { image, picture } = state, size = [image.width, image.height];
  $("heads").replaceChildren(...layer.most.map((_, head) => {
    const canvas = element("canvas"), button = element("button", {
      title: head === 0 ? "The average of all heads" : `Head ${head}`, onclick: () => set({ head }) }, canvas,
    head === 0 ? "all" : String(head));
    button.setAttribute("aria-pressed", String(head === state.head));
    const [context, scale] = draw.prepare(canvas, size, 128);
    canvas.style.width = canvas.style.height = "";
    draw.drawGrey(context, picture, size);
    if (state.view === "points") draw.drawPoints(context, layer, head, scale * 2);
    else draw.drawHeat(context, layer, head, size);
    return button;
  }));
}

function showSteps(seen) {
  $("path-label").hidden = $("steps").hidden = !seen.path;
  if (!seen.path) return;
  $("path").checked = state.path;
  const rows = seen.path.map((box, k) => {
    const name = seen.from_box ? (k === 0 ? "start" : `layer ${k}`) : `layer ${k + 1}`;
    const [left, top, right, bottom] = box.map(Math.round);
    return element("li", {}, draw.swatch(draw.stepColour(k, seen.path.length)),
      `${name}: ${left}, ${top} to ${right}, ${bottom}`);
  });
  if (seen.from_point) {
    const [x, y] = seen.from_point.map(Math.round);
    rows.unshift(element("li", {}, draw.swatch("#ffffff"), `start: the point ${x}, ${y}`));
  }
  $("steps").replaceChildren(...rows);
  $("steps").hidden = !state.path;
}

function set(change) {
  Object.assign(state, change);
  show();
}

// What the user does.

function listen() {
  $("threshold").oninput = (event) => {
    state.threshold = Number(event.target.value);
    state.errors = state.errors && { ...state.errors, of: new Map(), missed: [], counts: {} };
    if (state.chosen?.detection && state.chosen.detection.score < state.threshold) unchoose();
    show();
    askErrors();
  };
  $("truth").onchange = (event) => {
    set({ truth: event.target.checked });
    askErrors();
  };
  $("picture").onclick = click;
  $("view").onclick = (event) => event.target.dataset.view && set({ view: event.target.dataset.view });
  $("path").onchange = (event) => set({ path: event.target.checked });
  $("unchoose").onclick = unchoose;
  $("previous").onclick = () => move(-1);
  $("next").onclick = () => move(1);
  $("page-back").onclick = () => { state.page--; showList(); };
  $("page-on").onclick = () => { state.page++; showList(); };
  $("sort").onclick = (event) => {
    if (!event.target.dataset.sort) return;
    Object.assign(state, { sort: event.target.dataset.sort, page: 0 });
    press($("sort"), event.target);
    showList();
  };
  $("upload").onchange = (event) => {
    const [file] = event.target.files;
    if (file) upload(file);
    event.target.value = "";
  };
  $("stage").ondragover = (event) => event.preventDefault();
  $("stage").ondrop = (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) upload(file);
  };
  $("error-close").onclick = clearError;
  document.onkeydown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") unchoose();
    if (event.target.matches("input[type=range]")) return;          // arrows move the slider
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  };
  new ResizeObserver(() => state.image && showPicture()).observe($("viewer"));
  window.onhashchange = () => {
    const id = location.hash.slice(1);
    if (/^\w+$/.test(id) && id !== state.image?.id) open(id);
  };
}

async function start() {
  try {
    state.about = await ask("/api/about");
  } catch (error) {
    showError(error);
    return;
  }
  const { about } = state;
  state.threshold = about.threshold;
  $("threshold").value = about.threshold;
  $("model").textContent = [about.model, about.data && `${about.images.toLocaleString("en")} images of ${about.data}`]
    .filter(Boolean).join(" · ");
  $("sort-error").title = `Images with most errors first: of boxes with a score of at least ${about.threshold}, at an `
    + `IoU of ${about.iou}. All images are looked at for it, in the background, as long as this order is shown.`;
  $("upload-label").hidden = !about.takes_uploads;
  $("sort").hidden = about.images === 0;
  listen();
  show();
  await showList();
  const wanted = location.hash.slice(1), first = $("thumbnails").firstChild || $("uploads").firstChild;
  if (/^\w+$/.test(wanted)) open(wanted);
  else if (first) open(first.dataset.id);
}

start();
