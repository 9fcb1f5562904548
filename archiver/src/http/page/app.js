// Keeps the page fresh and moves the picker. Everything it shows is rendered by the server: it fetches the page again
// when the live stream says that something is new, and replaces the parts marked data-live. Without it the page reads
// the same and loads itself every few seconds.
"use strict";
(() => {
  const STALE_AFTER_MS = 5000;
  const REFRESH_MIN_MS = 900;
  const byId = (id) => document.getElementById(id);
  let lastNews = Date.now();
  let lastRefresh = 0;
  let busy = false;

  const localTimes = (root) => {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const local = new Date(time.dateTime);
      if (!Number.isNaN(local.getTime())) time.title = local.toString();
    }
  };

  const replace = (fresh) => {
    for (const old of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(old.id);
      if (!now || now.isEqualNode(old)) continue;
      const focused = old.contains(document.activeElement) && document.activeElement !== document.body;
      const scrolled = old.querySelector(".scroll");
      const left = scrolled ? scrolled.scrollLeft : 0;
      const at = focused ? [...old.querySelectorAll("a,button,[tabindex]")].indexOf(document.activeElement) : -1;
      const adopted = document.adoptNode(now);
      old.replaceWith(adopted);
      localTimes(adopted);
      if (left && adopted.querySelector(".scroll")) adopted.querySelector(".scroll").scrollLeft = left;
      if (at >= 0) adopted.querySelectorAll("a,button,[tabindex]")[at]?.focus({ preventScroll: true });
    }
    document.title = fresh.title;
    const [mine, theirs] = [byId("when"), fresh.getElementById("when")];
    if (mine && theirs && document.activeElement !== mine) {
      mine.disabled = theirs.disabled;
      mine.min = theirs.min;
      mine.max = theirs.max;
    }
    moveCursor();
  };

  const refresh = async () => {
    if (busy || Date.now() - lastRefresh < REFRESH_MIN_MS) return;
    busy = true;
    lastRefresh = Date.now();
    try {
      const answer = await fetch(location.pathname + location.search, { cache: "no-store", signal: AbortSignal.timeout(4000) });
      if (answer.redirected) { location.reload(); return; }
      if (answer.ok) {
        replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
        lastNews = Date.now();
      }
    } catch { /* The page says by itself that it is stale. */ }
    busy = false;
  };

  const watch = () => {
    if (!document.querySelector("[data-live]")) return;
    const source = new EventSource("/api/v1/events/stream");
    for (const kind of ["status", "alert", "event"]) source.addEventListener(kind, refresh);
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

  const line = (term, commit) => {
    const [row, dt, dd] = ["div", "dt", "dd"].map((name) => document.createElement(name));
    dt.textContent = term;
    dd.textContent = commit
      ? `${commit.time.slice(0, 23).replace("T", " ")}Z · transaction ${commit.xid} · LSN ${commit.lsn} · timeline ${commit.timeline}`
      : "none that the restore replays";
    row.append(dt, dd);
    return row;
  };

  const locate = async () => {
    const cluster = document.body.dataset.cluster;
    const picked = byId("picked");
    const at = byId("at").value;
    if (!at) return;
    const say = (text, className) => {
      const p = document.createElement("p");
      p.className = className;
      p.textContent = text;
      picked.replaceChildren(p);
    };
    try {
      const answer = await fetch(`/api/v1/clusters/${cluster}/locate?time=${encodeURIComponent(at + (at.length === 16 ? ":00Z" : "Z"))}`);
      const found = await answer.json();
      if (!answer.ok) { say(found.detail, "error"); return; }
      if (!found.command) {
        say(`This instant cannot be restored: ${found.refusal}.`, "error");
        for (const near of found.nearest) {
          const [hint, box, pre] = ["p", "div", "pre"].map((name) => document.createElement(name));
          hint.className = "hint";
          hint.textContent = `Nearest: ${near.time.slice(0, 19).replace("T", " ")}Z`;
          box.className = "command";
          pre.tabIndex = 0;
          pre.textContent = near.command;
          box.append(pre);
          picked.append(hint, box);
        }
        return;
      }
      const list = document.createElement("dl");
      list.className = "commits";
      list.append(line("Last commit kept", found.before), line("First commit dropped", found.after));
      picked.replaceChildren(list);
      const [box, pre, copy, hint] = ["div", "pre", "button", "p"].map((name) => document.createElement(name));
      box.className = "command";
      pre.id = "command";
      pre.tabIndex = 0;
      pre.textContent = found.command;
      copy.id = "copy";
      copy.type = "button";
      copy.textContent = "Copy";
      hint.className = "hint";
      hint.textContent = "Restores into a new directory. Add --dry-run to see the plan first.";
      box.append(pre, copy);
      picked.append(box, hint);
    } catch { say("The archiver does not answer.", "error"); }
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
      const time = new Date(Number(slider.value) * 1000).toISOString().slice(0, 19);
      byId("at").value = time;
      slider.setAttribute("aria-valuetext", `${time.replace("T", " ")} UTC`);
      moveCursor();
    };
    slider.addEventListener("input", show);
    slider.addEventListener("change", () => { show(); locate(); });
    slider.addEventListener("keydown", (event) => { if (event.key === "Enter") { show(); locate(); } });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const second = Date.parse(`${byId("at").value}Z`) / 1000;
      if (!Number.isNaN(second)) { slider.value = String(second); slider.dataset.used = "yes"; moveCursor(); }
      locate();
    });
    // A click on the strip is a pick too; the keyboard has the slider.
    document.querySelector(".strip-frame")?.addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      slider.value = String(Math.round(Number(slider.min) + share * (Number(slider.max) - Number(slider.min))));
      show();
      locate();
    });
    document.addEventListener("click", (event) => { if (event.target.id === "copy") copyCommand(event.target); });
    const copy = byId("copy");
    if (copy) copy.hidden = false;
  };

  localTimes(document);
  pick();
  watch();
})();
