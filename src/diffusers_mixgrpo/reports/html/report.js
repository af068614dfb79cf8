"use strict";

// ---- Charts: the values under the pointer, or by the arrow keys ----

for (const plot of document.querySelectorAll(".plot")) {
  const series = JSON.parse(plot.dataset.series);
  const places = new Map();
  for (const line of series) {
    for (const [x, across] of line.points) places.set(x, across);
  }
  const values = [...places.keys()].sort((a, b) => a - b);
  const area = plot.querySelector(".area");
  const cursor = area.appendChild(document.createElement("div"));
  cursor.className = "cursor";
  cursor.hidden = true;
  const tooltip = area.appendChild(document.createElement("div"));
  tooltip.className = "tooltip";
  tooltip.setAttribute("role", "status");
  tooltip.hidden = true;
  let chosen = -1;

  const hide = () => {
    cursor.hidden = true;
    tooltip.hidden = true;
  };

  const show = (index) => {
    chosen = Math.max(0, Math.min(values.length - 1, index));
    const x = values[chosen];
    const across = places.get(x);
    tooltip.replaceChildren();
    const title = tooltip.appendChild(document.createElement("strong"));
    title.textContent = `${plot.dataset.x} ${x}`;
    for (const line of series) {
      const point = line.points.find((candidate) => candidate[0] === x);
      if (!point) continue;
      const row = tooltip.appendChild(document.createElement("span"));
      row.className = `c${line.color}`;
      row.appendChild(document.createElement("i")).className = "swatch";
      row.appendChild(document.createTextNode(series.length > 1 ? `${line.label}: ${point[3]}` : point[3]));
    }
    cursor.hidden = false;
    tooltip.hidden = false;
    cursor.style.left = `${across * 100}%`;
    // Beside the line where there is room, and never outside the area
    const width = area.clientWidth;
    const left = across * width + (across > 0.5 ? -tooltip.offsetWidth - 8 : 8);
    tooltip.style.left = `${Math.max(0, Math.min(width - tooltip.offsetWidth, left))}px`;
  };

  const nearest = (event) => {
    const box = area.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width;
    let best = 0;
    values.forEach((x, index) => {
      if (Math.abs(places.get(x) - across) < Math.abs(places.get(values[best]) - across)) best = index;
    });
    show(best);
  };

  area.tabIndex = 0;
  area.setAttribute("role", "group");
  area.setAttribute("aria-label", `${plot.dataset.x}: values by the arrow keys`);
  area.addEventListener("pointermove", nearest);
  area.addEventListener("pointerdown", nearest);
  area.addEventListener("pointerleave", hide);
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const last = values.length - 1;
    const target = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (target === undefined) return;
    event.preventDefault();
    show(target);
  });
}

// ---- Before and after ----

for (const input of document.querySelectorAll(".slider input")) {
  const show = () => {
    input.parentElement.style.setProperty("--position", `${input.value}%`);
    input.setAttribute("aria-valuetext", `${input.value}%`);
  };
  input.addEventListener("input", show);
  show(); // a reloaded page keeps the value
}

// ---- The search in the settings ----

const search = document.getElementById("search");
if (search) {
  const groups = [...document.querySelectorAll("details.settings")];
  const wasOpen = new Map(groups.map((group) => [group, group.open]));
  const filter = () => {
    const text = search.value.trim().toLowerCase();
    let count = 0;
    for (const group of groups) {
      let matches = 0;
      for (const row of group.querySelectorAll("tbody tr")) {
        row.hidden = !row.textContent.toLowerCase().includes(text);
        matches += row.hidden ? 0 : 1;
      }
      group.hidden = matches === 0;
      group.open = text ? true : wasOpen.get(group);
      count += matches;
    }
    document.getElementById("found").textContent = text ? `${count} found` : "";
  };
  search.addEventListener("input", filter);
  if (search.value) filter();
}
