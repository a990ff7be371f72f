// Readout of charts: values of all shown curves at a place on the horizontal axis. Everything else works without it.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const runs = [...document.querySelectorAll("[data-letter]")];

  // What an SVG's axes show, and the points of its curves, read once.
  const plots = new WeakMap();
  function plotOf(svg) {
    if (!plots.has(svg)) {
      const [x, y] = [svg.dataset.x, svg.dataset.y].map((text) => text.split(" ").map(Number));
      const curves = new Map();
      for (const group of svg.querySelectorAll("[class^=of-run-]")) {
        const path = group.querySelector(":scope > path");
        if (!path) continue; // its letter
        const numbers = path.getAttribute("d").match(/-?[\d.]+(?:e-?\d+)?/g).map(Number);
        const points = [];
        for (let i = 0; i + 1 < numbers.length; i += 2) points.push([numbers[i], numbers[i + 1]]);
        curves.set(group.getAttribute("class"), points);
      }
      const mark = svg.appendChild(document.createElementNS(SVG, "g"));
      plots.set(svg, { x, y, curves, mark });
    }
    return plots.get(svg);
  }

  // Where a curve is at a place; curves are straight between their points, and nowhere beyond their ends.
  function heightAt(points, place) {
    const after = points.findIndex(([x]) => x >= place - 0.01);
    if (after < 0) return null;
    const [x1, y1] = points[after];
    if (after === 0) return Math.abs(x1 - place) < 0.5 ? y1 : null;
    const [x0, y0] = points[after - 1];
    return x1 === x0 ? y1 : y0 + ((y1 - y0) * (place - x0)) / (x1 - x0);
  }

  const valueAt = ([low, high, lowPlace, highPlace], place) =>
    low + ((high - low) * (place - lowPlace)) / (highPlace - lowPlace);

  function written(value, isPercent) {
    if (isPercent) return (100 * value).toFixed(1) + "%";
    const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 1 ? 3 : 5;
    return value.toLocaleString("en", { maximumFractionDigits: digits });
  }

  function element(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    const readout = figure.appendChild(document.createElement("div"));
    readout.className = "readout";
    readout.hidden = true;
    readout.setAttribute("role", "status");
    let place = null; // in the SVG's own units

    const shown = () => [...figure.querySelectorAll("svg[data-x]")].find((svg) => svg.getClientRects().length);

    function show(svg) {
      const { x, y, curves, mark } = plotOf(svg);
      place = Math.min(Math.max(place, x[2]), x[3]);
      mark.replaceChildren(element("path", { d: `M${place} ${y[3]}V${y[2]}`, style: "stroke: var(--muted)", "stroke-width": 1 }));
      readout.replaceChildren();
      const head = readout.appendChild(document.createElement("div"));
      head.className = "muted";
      const over = figure.querySelector(`span.along-${svg.closest(".along").className.split("along-")[1]}`);
      head.textContent = over.textContent.replace("over", "") + " " + written(valueAt(x, place), false);
      for (const run of runs) {
        const points = run.checked && curves.get(`of-${run.id}`);
        const height = points ? heightAt(points, place) : null;
        if (height === null) continue;
        const color = `var(--run-${run.dataset.color})`;
        mark.append(element("circle", { cx: place, cy: height, r: 3.4, style: `fill: ${color}; stroke: var(--card)`, "stroke-width": 1.2 }));
        const line = readout.appendChild(document.createElement("div"));
        const badge = line.appendChild(document.createElement("span"));
        badge.className = "badge";
        badge.style.setProperty("--of-run", color);
        badge.textContent = run.dataset.letter;
        line.append(written(valueAt(y, height), figure.dataset.percent === "1"));
      }
      readout.hidden = false;
      const box = svg.getBoundingClientRect(), frame = figure.getBoundingClientRect();
      const at = box.left - frame.left + (place / svg.viewBox.baseVal.width) * box.width;
      const isRight = at > frame.width / 2;
      readout.style.left = isRight ? "auto" : `${at + 12}px`;
      readout.style.right = isRight ? `${frame.width - at + 12}px` : "auto";
      readout.style.top = `${box.top - frame.top + 8}px`;
    }

    function hide() {
      readout.hidden = true;
      for (const svg of figure.querySelectorAll("svg[data-x]")) if (plots.has(svg)) plots.get(svg).mark.replaceChildren();
    }

    figure.addEventListener("pointermove", (event) => {
      const svg = event.target.closest("svg[data-x]");
      if (!svg) return;
      const box = svg.getBoundingClientRect();
      place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      show(svg);
    });
    figure.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const svg = shown();
      if (event.key === "Escape") hide();
      if (!svg || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      const { x } = plotOf(svg);
      const by = (x[3] - x[2]) / (event.shiftKey ? 10 : 50);
      const from = place ?? x[3];
      place = { ArrowLeft: from - by, ArrowRight: from + by, Home: x[2], End: x[3] }[event.key];
      show(svg);
    });
  }
  document.querySelector(".controls")?.addEventListener("change", () => {
    for (const readout of document.querySelectorAll(".readout")) readout.hidden = true;
    for (const svg of document.querySelectorAll("svg[data-x]")) if (plots.has(svg)) plots.get(svg).mark.replaceChildren();
  });
})();
