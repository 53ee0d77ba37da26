
"use strict";

// A crosshair on every chart at once: the charts share their axis of steps.
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };

  // The point whose step is nearest; points rise by step.
  const nearest = (points, step) => {
    let low = 0;
    let high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= step) low = middle;
      else high = middle;
    }
    return high >= 0 && Math.abs(points[high][0] - step) < Math.abs(points[low][0] - step) ? high : low;
  };

  const read = (figure) => {
    const svg = figure.querySelector("svg");
    const { frame: [left, top, right, bottom], x, y, log, series } = JSON.parse(figure.dataset.chart);
    const scale = log ? Math.log : (value) => value;
    const across = (step) => left + ((step - x[0]) / (x[1] - x[0])) * (right - left);
    const up = (value) => bottom - ((scale(value) - scale(y[0])) / (scale(y[1]) - scale(y[0]))) * (bottom - top);
    const stepAt = (place) => x[0] + ((place - left) / (right - left)) * (x[1] - x[0]);
    const near = (x[1] - x[0]) / 200;
    const ground = series.reduce((most, points) => (points.length > most.length ? points : most), []);
    const keys = [...figure.querySelectorAll(".legend li")];
    const at = figure.querySelector(".at");

    const cross = make("g", { class: "cross", visibility: "hidden" }, svg);
    const line = make("line", { y1: top, y2: bottom }, cross);
    const dots = series.map((_, i) => make("circle", { r: 4, class: keys[i].firstElementChild.classList[1] }, cross));

    const hide = () => {
      cross.setAttribute("visibility", "hidden");
      at.textContent = "";
      for (const key of keys) if (key.querySelector(".value")) key.querySelector(".value").textContent = "";
    };

    const show = (wanted) => {
      if (!ground.length) return;
      const step = ground[nearest(ground, wanted)][0];
      cross.setAttribute("visibility", "visible");
      line.setAttribute("x1", across(step));
      line.setAttribute("x2", across(step));
      at.textContent = `step ${step.toLocaleString("en")}`;
      series.forEach((points, i) => {
        if (!points.length) return;
        const [its, value] = points[nearest(points, step)];
        const drawn = value !== null && (!log || value > 0);
        const told = value === null ? "not finite" : String(value);
        const where = Math.abs(its - step) < near ? told : `${told} (step ${its.toLocaleString("en")})`;
        keys[i].querySelector(".value").textContent = where;
        dots[i].setAttribute("visibility", drawn ? "inherit" : "hidden");
        if (drawn) {
          dots[i].setAttribute("cx", across(its));
          dots[i].setAttribute("cy", up(value));
        }
      });
    };

    return { svg, ground, stepAt, show, hide };
  };

  const charts = [...document.querySelectorAll("figure.chart")].map(read);
  const showAll = (step) => charts.forEach((chart) => chart.show(step));
  const hideAll = () => charts.forEach((chart) => chart.hide());

  for (const { svg, ground, stepAt } of charts) {
    let place = -1;
    svg.addEventListener("pointermove", (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      showAll(stepAt(point.x));
    });
    svg.addEventListener("pointerleave", hideAll);
    svg.addEventListener("blur", hideAll);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || !ground.length) return;
      event.preventDefault();
      place = place < 0 ? ground.length - 1 : Math.min(ground.length - 1, Math.max(0, place + move));
      showAll(ground[place][0]);
    });
  }
})();
