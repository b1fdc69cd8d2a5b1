"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const put = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  };
  const copy = (text, button) => {
    const name = button.textContent;
    const done = () => { button.textContent = "copied"; setTimeout(() => { button.textContent = name; }, 1200); };
    if (navigator.clipboard && window.isSecureContext) navigator.clipboard.writeText(text).then(done, () => { put(text); done(); });
    else { put(text); done(); }
  };

  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  if (matchMedia("(max-width: 1099px)").matches) document.querySelector("#contents details").open = false;
  addEventListener("beforeprint", () => all("details").forEach((part) => { part.open = true; }));

  for (const box of all(".table")) {
    const body = box.querySelector("tbody"), rows = all("tr", body);
    const formats = JSON.parse(box.querySelector("script").textContent);
    const filter = box.querySelector("input[type=search]"), count = box.querySelector(".count");
    box.querySelector(".tools").hidden = false;
    filter.hidden = rows.length < 2;
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      const seen = rows.filter((row) => !row.hidden).length;
      count.textContent = words.length ? `${seen} of ${rows.length} rows` : "";
    });
    for (const button of all(".copy button", box)) {
      button.addEventListener("click", () => {
        const format = formats[button.textContent];
        const seen = all("tr", body).filter((row) => !row.hidden).map((row) => format.rows[Number(row.dataset.row)]);
        copy(format.head + seen.join("") + format.foot, button);
      });
    }
    all("th", box).forEach((head, column) => {
      head.classList.add("sorts");
      head.tabIndex = 0;
      const sort = () => {
        const order = { descending: "ascending", ascending: "" }[head.getAttribute("aria-sort") || ""] ?? "descending";
        all("th", box).forEach((other) => other.removeAttribute("aria-sort"));
        if (order) head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const of = (row) => {
          const cell = row.cells[column];
          if (!cell.classList.contains("n")) return cell.textContent;
          const value = Number(cell.dataset.value ?? NaN);
          return Number.isNaN(value) ? null : value;
        };
        const compare = (a, b) => {
          const one = of(a), other = of(b);
          if (one === null || other === null) return (one === null) - (other === null);
          return sign * (typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true }));
        };
        body.append(...(order ? [...rows].sort(compare) : rows));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
    const gaps = box.querySelector(".gaps"), cells = all("td[data-gap]", box).filter((cell) => cell.dataset.gap);
    gaps.hidden = !cells.length;
    for (const cell of cells) cell.dataset.text = cell.textContent;
    gaps.querySelector("input").addEventListener("change", (event) => {
      for (const cell of cells) cell.textContent = event.target.checked ? cell.dataset.gap : cell.dataset.text;
    });
  }

  for (const figure of all(".chart")) {
    const svg = figure.querySelector("svg"), box = figure.querySelector(".values"), hair = svg.querySelector(".hair");
    const lines = all("polyline", svg).map((line) => ({
      name: line.dataset.name, colour: line.classList[1], values: JSON.parse(line.dataset.values),
      places: line.getAttribute("points").split(" ").map((point) => point.split(",").map(Number)),
    })).filter((line) => line.values.length);
    if (!hair || !lines.length) continue;
    const leave = () => { box.style.display = "none"; hair.style.visibility = "hidden"; };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const across = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
      const near = lines.map((line) => {
        let best = 0;
        line.places.forEach((place, i) => { if (Math.abs(place[0] - across) < Math.abs(line.places[best][0] - across)) best = i; });
        return { line, best, away: Math.abs(line.places[best][0] - across) };
      });
      const nearest = near.reduce((a, b) => (b.away < a.away ? b : a));
      const x = nearest.line.values[nearest.best][0];
      box.replaceChildren();
      const title = document.createElement("b");
      title.textContent = String(x);
      box.append(title);
      const here = near.filter(({ line, best }) => line.values[best][0] === x).slice(0, 12);
      for (const { line, best } of here) {
        const text = document.createElement("span");
        text.className = line.colour;
        text.textContent = `${line.name} ${line.values[best][1]}`;
        box.append(text);
      }
      hair.setAttribute("x1", nearest.line.places[nearest.best][0]);
      hair.setAttribute("x2", nearest.line.places[nearest.best][0]);
      hair.style.visibility = "visible";
      box.style.display = "block";
      const left = across < svg.viewBox.baseVal.width / 2;
      box.style.right = left ? "8px" : "auto";
      box.style.left = left ? "auto" : "8px";
    });
  }

  const command = document.querySelector(".copy-command");
  if (command) {
    command.hidden = false;
    command.addEventListener("click", () => copy(document.querySelector(".command pre").textContent, command));
  }

  const viewer = document.getElementById("viewer"), pair = viewer.querySelector(".pair");
  const under = viewer.querySelector(".under"), over = viewer.querySelector(".over"), edge = viewer.querySelector(".edge");
  const slider = viewer.querySelector("input"), choice = viewer.querySelector("select");
  let pictures = [], place = 0, fitted = true;
  const size = () => {
    const stage = viewer.querySelector(".stage"), picture = pictures[place];
    const wide = Number(picture.getAttribute("width")), high = Number(picture.getAttribute("height"));
    const fit = Math.min(stage.clientWidth / wide, stage.clientHeight / high);
    const scale = fitted ? fit : Math.max(1, 1 / devicePixelRatio);
    under.style.width = `${wide * scale}px`;
    under.style.height = `${high * scale}px`;
  };
  const slide = () => {
    const compared = choice.value !== "";
    slider.style.visibility = edge.style.visibility = over.style.visibility = compared ? "visible" : "hidden";
    over.style.clipPath = `inset(0 0 0 ${slider.value / 10}%)`;
    edge.style.left = `calc(${slider.value / 10}% - 1px)`;
  };
  const show = (to) => {
    place = (to + pictures.length) % pictures.length;
    const picture = pictures[place];
    under.src = picture.src;
    viewer.classList.toggle("pixels", picture.parentElement.classList.contains("pixels"));
    viewer.querySelector(".caption").textContent = picture.alt;
    const kept = choice.value;
    choice.replaceChildren(new Option("–", ""));
    pictures.forEach((other, i) => {
      if (i !== place && other.getAttribute("width") === picture.getAttribute("width") && other.getAttribute("height") === picture.getAttribute("height")) choice.add(new Option(other.alt || `picture ${i + 1}`, i));
    });
    choice.value = [...choice.options].some((option) => option.value === kept) ? kept : "";
    viewer.querySelector(".compare").hidden = choice.options.length < 2;
    compare();
    size();
  };
  const compare = () => {
    if (choice.value !== "") over.src = pictures[Number(choice.value)].src;
    slide();
  };
  const toggle = () => { fitted = !fitted; viewer.querySelector(".zoom").textContent = fitted ? "1:1" : "fit"; size(); };
  const open = (picture) => {
    pictures = all("img", picture.closest(".gallery"));
    choice.replaceChildren();
    viewer.showModal();
    show(pictures.indexOf(picture));
  };
  for (const picture of all(".gallery img")) {
    picture.addEventListener("click", () => open(picture));
    picture.addEventListener("keydown", (event) => { if (event.key === "Enter") open(picture); });
  }
  slider.addEventListener("input", slide);
  choice.addEventListener("change", compare);
  pair.addEventListener("pointermove", (event) => {
    if (choice.value === "" || (event.pointerType === "mouse" && !event.buttons)) return;
    const frame = pair.getBoundingClientRect();
    slider.value = Math.round((event.clientX - frame.left) / frame.width * 1000);
    slide();
  });
  pair.addEventListener("dragstart", (event) => event.preventDefault());
  viewer.querySelector(".before").addEventListener("click", () => show(place - 1));
  viewer.querySelector(".after").addEventListener("click", () => show(place + 1));
  viewer.querySelector(".zoom").addEventListener("click", toggle);
  viewer.querySelector(".close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.target === slider || event.target === choice) return;
    if (event.key === "ArrowLeft") show(place - 1);
    if (event.key === "ArrowRight") show(place + 1);
  });
  addEventListener("resize", () => { if (viewer.open) size(); });
})();
