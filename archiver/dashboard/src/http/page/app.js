// Keeps the page fresh and moves the picker. Everything it shows is rendered by the server: it fetches the page again
// when the live stream says that something is new, and replaces the parts marked data-live. Without it the page reads
// the same and loads itself every few seconds.
"use strict";
(() => {
  const STALE_AFTER_MS = 5000;
  const REFRESH_MIN_MS = 900;
  const CAN_FOCUS = "a,button,summary,input,select,[tabindex]";
  const byId = (id) => document.getElementById(id);
  let lastNews = Date.now();
  let lastRefresh = 0;
  let busy = false;
  let again = false;

  const localTimes = (root) => {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const local = new Date(time.dateTime);
      if (!Number.isNaN(local.getTime())) time.title = local.toString();
    }
  };

  // Screen readers hear a change of the state, not each number that changes every second.
  const announce = (fresh) => {
    const of = (root) => root.querySelector("#hero .badge")?.textContent.trim();
    const [before, after] = [of(document), of(fresh)];
    if (!after || before === after) return;
    byId("announce").textContent = `The state is ${after}. ${fresh.getElementById("reason")?.textContent ?? ""}`;
  };

  const replace = (fresh) => {
    announce(fresh);
    // The first strip needs parts of the page that are not replaced.
    if (!byId("zoom") && fresh.getElementById("zoom")) { location.reload(); return; }
    for (const old of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(old.id);
      if (!now || now.isEqualNode(old)) continue;
      const focused = old.contains(document.activeElement) && document.activeElement !== document.body;
      const scrolled = old.querySelector(".scroll");
      const left = scrolled ? scrolled.scrollLeft : 0;
      const opened = [...old.querySelectorAll("details")].map((one) => one.open);
      const at = focused ? [...old.querySelectorAll(CAN_FOCUS)].indexOf(document.activeElement) : -1;
      const adopted = document.adoptNode(now);
      old.replaceWith(adopted);
      [...adopted.querySelectorAll("details")].forEach((one, number) => { one.open = opened[number] ?? one.open; });
      localTimes(adopted);
      if (left && adopted.querySelector(".scroll")) adopted.querySelector(".scroll").scrollLeft = left;
      if (at >= 0) adopted.querySelectorAll(CAN_FOCUS)[at]?.focus({ preventScroll: true });
    }
    document.title = fresh.title;
    const [mine, theirs] = [byId("when"), fresh.getElementById("when")];
    if (mine && theirs && document.activeElement !== mine) {
      mine.disabled = theirs.disabled;
      mine.min = theirs.min;
      mine.max = theirs.max;
    }
    moveCursor();
    readChart();
  };

  const refresh = async (now) => {
    if (busy) { again ||= now === true; return; }
    if (now !== true && Date.now() - lastRefresh < REFRESH_MIN_MS) return;
    busy = true;
    again = false;
    lastRefresh = Date.now();
    try {
      const query = new URLSearchParams(location.search);
      query.delete("at");
      const answer = await fetch(`${location.pathname}?${query}`, { cache: "no-store", signal: AbortSignal.timeout(4000) });
      if (answer.redirected) { location.reload(); return; }
      if (answer.ok) {
        replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
        lastNews = Date.now();
      }
    } catch { /* The page says by itself that it is stale. */ }
    busy = false;
    if (again) refresh(true);
  };

  const watch = () => {
    if (!document.querySelector("[data-live]")) return;
    const source = new EventSource("/api/v1/events/stream");
    for (const kind of ["status", "alert", "event"]) source.addEventListener(kind, () => refresh());
    setInterval(() => {
      const age = Date.now() - lastNews;
      const stale = age > STALE_AFTER_MS;
      document.body.classList.toggle("stale", stale);
      const line = byId("stale");
      line.hidden = !stale;
      if (stale) {
        const text = `Stale: no news from the archiver since ${new Date(lastNews).toISOString().slice(0, 19)}Z. The numbers below are old.`;
        if (line.textContent !== text) line.textContent = text;
        refresh();
      }
      // A browser gives up a stream that was refused; it is begun anew after the next page that was answered.
      if (source.readyState === EventSource.CLOSED) refresh();
    }, 1000);
  };

  const moveCursor = () => {
    const [slider, cursor] = [byId("when"), byId("cursor")];
    if (!slider || !cursor || slider.dataset.used !== "yes") return;
    const width = Number(slider.max) - Number(slider.min);
    const share = width > 0 ? (Number(slider.value) - Number(slider.min)) / width : 1;
    cursor.style.left = `${Math.min(Math.max(share, 0), 1) * 100}%`;
    cursor.hidden = false;
  };

  // The server renders the plan, as it does without a script.
  const showPlan = async () => {
    const picked = byId("picked");
    const at = byId("at").value.trim();
    if (!at) return;
    try {
      const answer = await fetch(`${location.pathname}?at=${encodeURIComponent(at)}`, { cache: "no-store" });
      if (answer.redirected) { location.reload(); return; }
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("picked");
      if (!fresh) throw new Error("no answer");
      picked.replaceChildren(...[...fresh.childNodes].map((node) => document.adoptNode(node)));
      localTimes(picked);
      showChosen(picked);
    } catch {
      const p = document.createElement("p");
      p.className = "error";
      p.textContent = "The archiver does not answer.";
      picked.replaceChildren(p);
    }
  };

  // Shows the local time too, and moves the cursor to an instant that was typed.
  const showChosen = (picked) => {
    const [chosen, slider] = [picked.querySelector(".chosen"), byId("when")];
    if (!chosen) return;
    const second = Number(chosen.dataset.second);
    chosen.querySelector(".local").textContent = ` · local ${new Date(second * 1000).toLocaleString()}`;
    if (slider) { slider.value = String(second); slider.dataset.used = "yes"; moveCursor(); }
    const copy = picked.querySelector("#copy");
    if (copy) copy.hidden = false;
  };

  const copyCommand = async (button) => {
    const text = byId("command").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(byId("command"));
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };

  const pick = () => {
    const [slider, form] = [byId("when"), byId("pick")];
    if (!slider || !form) return;
    slider.parentElement.hidden = false;
    const show = () => {
      slider.dataset.used = "yes";
      const time = new Date(Number(slider.value) * 1000).toISOString().slice(0, 19).replace("T", " ");
      byId("at").value = `${time}+00`;
      slider.setAttribute("aria-valuetext", `${time} UTC`);
      moveCursor();
    };
    slider.addEventListener("input", show);
    slider.addEventListener("change", () => { show(); showPlan(); });
    slider.addEventListener("keydown", (event) => { if (event.key === "Enter") { show(); showPlan(); } });
    form.addEventListener("submit", (event) => { event.preventDefault(); showPlan(); });
    // A click on the strip is a pick too; the keyboard has the slider.
    document.querySelector(".strip-frame")?.addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      slider.value = String(Math.round(Number(slider.min) + share * (Number(slider.max) - Number(slider.min))));
      readMark(event);
      show();
      showPlan();
    });
    document.addEventListener("click", (event) => { if (event.target.id === "copy") copyCommand(event.target); });
    showChosen(byId("picked"));
  };

  // Shows the text of the mark that is nearest to a click, because a finger sees no tooltip.
  const readMark = (event) => {
    const REACH_PX = 18;
    const distance = (mark) => {
      const box = mark.getBoundingClientRect();
      const [x, y] = [(box.left + box.right) / 2 - event.clientX, (box.top + box.bottom) / 2 - event.clientY];
      return Math.hypot(x, y);
    };
    const marks = [...document.querySelectorAll(".strip use")].map((mark) => [distance(mark), mark]);
    marks.sort((one, other) => one[0] - other[0]);
    const hit = marks.length && marks[0][0] < REACH_PX ? marks[0][1] : event.target;
    const text = hit.querySelector?.("title")?.textContent ?? "";
    byId("strip-readout").textContent = text;
    byId("strip-readout").hidden = !text;
  };

  // Reads a chart at the pointer or, by arrow keys, at the focus.
  let reading = null;
  const readChart = () => {
    if (!reading) return;
    const plots = [...document.querySelectorAll(".plot[data-chart]")];
    const plot = plots[reading.plot];
    if (!plot) return;
    const chart = JSON.parse(plot.dataset.chart);
    const count = chart.series[0].values.length;
    reading.at = Math.min(Math.max(reading.at, 0), count - 1);
    const time = new Date((chart.from + reading.at * chart.step) * 1000).toISOString().slice(0, 19).replace("T", " ");
    const number = (value) => {
      if (value === null || value === undefined) return "unknown";
      if (chart.unit === "s") return `${value.toFixed(1)} s`;
      const units = ["B/s", "KiB/s", "MiB/s", "GiB/s"];
      let unit = 0;
      while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
      return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
    };
    const values = chart.series.map((one) => `${one.name} ${number(one.values[reading.at])}`);
    plot.closest("figure").querySelector(".readout").textContent = `${time}Z: ${values.join(", ")}`;
    const reader = plot.querySelector(".reader");
    const x = String(((reading.at + 0.5) / count) * plot.querySelector("svg").viewBox.baseVal.width);
    reader.setAttribute("x1", x);
    reader.setAttribute("x2", x);
    reader.setAttribute("visibility", "visible");
  };
  const charts = () => {
    const numberOf = (plot) => [...document.querySelectorAll(".plot[data-chart]")].indexOf(plot);
    document.addEventListener("pointermove", (event) => {
      const plot = event.target.closest?.(".plot[data-chart]");
      if (!plot) return;
      const box = plot.querySelector("svg").getBoundingClientRect();
      const count = JSON.parse(plot.dataset.chart).series[0].values.length;
      reading = { plot: numberOf(plot), at: Math.floor(((event.clientX - box.left) / box.width) * count) };
      readChart();
    });
    // The focus reads the newest value, and arrow keys go on from there.
    document.addEventListener("focusin", (event) => {
      const plot = event.target.closest?.(".plot[data-chart]");
      if (!plot || reading?.plot === numberOf(plot)) return;
      reading = { plot: numberOf(plot), at: 1e9 };
      readChart();
    });
    document.addEventListener("keydown", (event) => {
      const plot = document.activeElement?.closest?.(".plot[data-chart]");
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (!plot || step === undefined) return;
      event.preventDefault();
      const number = numberOf(plot);
      const at = reading?.plot === number ? reading.at : Infinity;
      reading = { plot: number, at: at === Infinity && step < 0 && step !== -Infinity ? 1e9 : at + step };
      readChart();
    });
  };

  // Links that only change the view keep the rest of the page as it is.
  const views = () => {
    document.addEventListener("click", (event) => {
      const link = event.target.closest?.(".ranges a");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      const query = new URLSearchParams(location.search);
      if (link.closest("#zoom")) for (const name of ["from", "to"]) query.delete(name);
      for (const [name, value] of new URL(link.href).searchParams) query.set(name, value);
      show(query);
    });
    const filter = byId("filter");
    filter?.addEventListener("input", () => {
      const query = new URLSearchParams(location.search);
      query.set("filter", filter.value);
      show(query);
    });
  };
  const show = (query) => {
    for (const name of ["at", "tested"]) query.delete(name);
    history.replaceState(null, "", `${location.pathname}?${query}`);
    refresh(true);
  };

  // The label names the colours that a click brings. The switch goes from the browser's setting to the other one and back.
  const themeSwitch = () => {
    const button = byId("theme");
    if (!button) return;
    const dark = () => {
      const chosen = document.documentElement.dataset.theme;
      return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    };
    const show = () => { button.textContent = dark() ? "Switch to light" : "Switch to dark"; };
    button.hidden = false;
    button.addEventListener("click", () => {
      const next = dark() ? "light" : "dark";
      document.documentElement.dataset.theme = next;
      try { localStorage.setItem("theme", next); } catch { /* It holds for this page only. */ }
      show();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    show();
  };

  localTimes(document);
  themeSwitch();
  pick();
  charts();
  views();
  watch();
})();
