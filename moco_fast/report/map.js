// Map of embeddings on a canvas: zoom, move, point at a sample to see it, highlight a group.
"use strict";
(() => {
  const figure = document.querySelector("figure.map");
  const canvas = figure.querySelector("canvas");
  const card = figure.querySelector(".card");
  const buttons = [...figure.querySelectorAll("[data-group]")];
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const pen = canvas.getContext("2d");
  const NUM_COLORS = 8, SHAPES = 4, MARGIN = 18, MAX_ZOOM = 60, PICTURES_FROM = 3, REACH = 16;
  const sprite = new Image();
  const view = { zoom: 1, x: 0, y: 0 }; // x, y: of the map's middle, in pixels from the canvas's
  let width = 0, height = 0, group = null, selected = null, colors = [], ink = "";

  const middleOf = (values) => (Math.max(...values) + Math.min(...values)) / 2;
  const [middleX, middleY] = [middleOf(data.x), middleOf(data.y)];
  const extent = (values) => Math.max(...values) - Math.min(...values) || 1;
  const fit = () => Math.min((width - 2 * MARGIN) / extent(data.x), (height - 2 * MARGIN) / extent(data.y));
  const place = (i) => {
    const scale = fit() * view.zoom;
    return [width / 2 + view.x + (data.x[i] - middleX) * scale, height / 2 + view.y - (data.y[i] - middleY) * scale];
  };

  function readColors() {
    const style = getComputedStyle(figure);
    colors = Array.from({ length: NUM_COLORS }, (_, n) => style.getPropertyValue(`--run-${n}`).trim());
    ink = style.getPropertyValue("--ink").trim();
  }

  function shape(kind, x, y, r) {
    pen.beginPath();
    if (kind === 0) pen.arc(x, y, r, 0, 2 * Math.PI);
    else if (kind === 1) pen.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
    else {
      const corners = kind === 2 ? 3 : 4, begin = kind === 2 ? -Math.PI / 2 : 0;
      for (let n = 0; n < corners; n++) {
        const angle = begin + (2 * Math.PI * n) / corners;
        pen.lineTo(x + 1.25 * r * Math.cos(angle), y + 1.25 * r * Math.sin(angle));
      }
      pen.closePath();
    }
  }

  const lookOf = (g) => [colors[g % NUM_COLORS], (g + Math.floor(g / NUM_COLORS)) % SHAPES];

  function draw() {
    pen.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
    pen.clearRect(0, 0, width, height);
    const hasPictures = view.zoom >= PICTURES_FROM && sprite.complete && sprite.naturalWidth > 0;
    const side = Math.min(14 + 3 * view.zoom, 72);
    for (let i = 0; i < data.x.length; i++) {
      const [x, y] = place(i);
      if (x < -side || y < -side || x > width + side || y > height + side) continue;
      const [color, kind] = lookOf(data.group[i]);
      const isOther = group !== null && data.group[i] !== group;
      pen.globalAlpha = isOther ? 0.12 : 0.85;
      if (hasPictures && !isOther) {
        pen.globalAlpha = 1;
        picture(i, x - side / 2, y - side / 2, side);
        pen.strokeStyle = color;
        pen.lineWidth = 2;
        pen.strokeRect(x - side / 2, y - side / 2, side, side);
      } else {
        pen.fillStyle = color;
        shape(kind, x, y, 3.4);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
    if (selected !== null) {
      const [x, y] = place(selected);
      pen.strokeStyle = ink;
      pen.lineWidth = 2;
      shape(0, x, y, hasPictures ? side * 0.78 : 8);
      pen.stroke();
    }
  }

  function picture(i, x, y, side) {
    const [row, column] = [Math.floor(i / data.columns), i % data.columns];
    pen.drawImage(sprite, column * data.side, row * data.side, data.side, data.side, x, y, side, side);
  }

  function nearest(x, y, reach) {
    let found = null, best = reach * reach;
    for (let i = 0; i < data.x.length; i++) {
      if (group !== null && data.group[i] !== group) continue;
      const [px, py] = place(i), distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < best) [found, best] = [i, distance];
    }
    return found;
  }

  function select(i) {
    if (i === selected) return;
    selected = i;
    card.hidden = i === null;
    if (i !== null) {
      const thumb = card.querySelector("canvas").getContext("2d");
      thumb.imageSmoothingEnabled = false;
      const [row, column] = [Math.floor(i / data.columns), i % data.columns];
      if (sprite.complete) thumb.drawImage(sprite, column * data.side, row * data.side, data.side, data.side, 0, 0, 96, 96);
      const label = data.label.length && data.label[i] >= 0 ? data.classes[data.label[i]] ?? `class ${data.label[i]}` : "";
      card.querySelector("b").textContent = label || buttons[data.group[i]].dataset.name;
      card.querySelector("span").textContent = `key ${data.key[i]}, sample ${data.sample[i]}`;
      const [x, y] = place(i), box = canvas.getBoundingClientRect(), frame = figure.getBoundingClientRect();
      const isRight = x > width / 2, isLow = y > height / 2;
      card.style.left = isRight ? "auto" : `${box.left - frame.left + x + 14}px`;
      card.style.right = isRight ? `${frame.right - box.left - x + 14}px` : "auto";
      card.style.top = isLow ? "auto" : `${box.top - frame.top + y + 10}px`;
      card.style.bottom = isLow ? `${frame.bottom - box.top - y + 10}px` : "auto";
    }
    draw();
  }

  function zoomBy(factor, x = width / 2, y = height / 2) {
    const zoom = Math.min(Math.max(view.zoom * factor, 1), MAX_ZOOM), by = zoom / view.zoom;
    view.x = (x - width / 2) * (1 - by) + view.x * by;
    view.y = (y - height / 2) * (1 - by) + view.y * by;
    view.zoom = zoom;
    bound();
  }

  function moveBy(x, y) {
    view.x += x;
    view.y += y;
    bound();
  }

  // Something of the map stays in sight.
  function bound() {
    const limit = (values) => (view.zoom > 1 ? (extent(values) * fit() * view.zoom) / 2 : 0);
    const [x, y] = [limit(data.x), limit(data.y)];
    view.x = Math.min(Math.max(view.x, -x), x);
    view.y = Math.min(Math.max(view.y, -y), y);
    select(null);
    draw();
  }

  function reset() {
    Object.assign(view, { zoom: 1, x: 0, y: 0 });
    select(null);
    draw();
  }

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const pointers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, at(event));
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = at(event), before = pointers.get(event.pointerId);
    if (!before) return select(nearest(...now, REACH));
    const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, spot]) => spot);
    pointers.set(event.pointerId, now);
    if (others.length) {
      const far = (spot) => Math.hypot(spot[0] - others[0][0], spot[1] - others[0][1]) || 1;
      zoomBy(far(now) / far(before), (now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2);
    } else if (event.pointerType === "mouse" || view.zoom > 1) moveBy(now[0] - before[0], now[1] - before[1]);
  });
  for (const kind of ["pointerup", "pointercancel"])
    canvas.addEventListener(kind, (event) => {
      pointers.delete(event.pointerId);
      if (kind === "pointerup") select(nearest(...at(event), event.pointerType === "mouse" ? REACH : 2 * REACH));
    });
  canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && select(null));
  canvas.addEventListener("dblclick", (event) => zoomBy(2, ...at(event)));
  // The page scrolls on, unless one is at work here.
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 300), ...at(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = 0.12 * Math.min(width, height);
    const actions = {
      ArrowLeft: () => moveBy(step, 0), ArrowRight: () => moveBy(-step, 0), ArrowUp: () => moveBy(0, step), ArrowDown: () => moveBy(0, -step),
      "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: reset,
    };
    if (event.key === "Escape") return select(null);
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
    select(nearest(width / 2, height / 2, Infinity));
  });
  canvas.addEventListener("blur", () => select(null));

  for (const button of figure.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => (button.dataset.zoom === "0" ? reset() : zoomBy(Number(button.dataset.zoom))));
  for (const button of buttons)
    button.addEventListener("click", () => {
      const number = Number(button.dataset.group);
      group = group === number ? null : number;
      for (const each of buttons) each.setAttribute("aria-pressed", String(Number(each.dataset.group) === group));
      select(null);
      draw();
    });

  // A legend with the same shapes.
  function drawLegend() {
    for (const button of buttons) {
      const [color, kind] = lookOf(Number(button.dataset.group));
      const path = ["M6 2a4 4 0 1 1 0 8a4 4 0 1 1 0-8Z", "M2.4 2.4H9.6V9.6H2.4Z", "M6 1L10.8 9.3H1.2Z", "M6 1L11 6L6 11L1 6Z"][kind];
      button.querySelector("path").setAttribute("d", path);
      button.querySelector("path").style.fill = color;
    }
  }

  function resize() {
    const box = canvas.getBoundingClientRect();
    [width, height] = [box.width, box.height];
    [canvas.width, canvas.height] = [width, height].map((size) => Math.round(size * devicePixelRatio));
    readColors();
    drawLegend();
    draw();
  }
  new ResizeObserver(resize).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", resize);
  sprite.onload = draw;
  sprite.src = figure.dataset.sprite;
})();
