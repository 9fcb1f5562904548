// Drives the real page in Chromium: tiles, strip, picker, live update, staleness, dark mode, phone width, keyboard, axe.
// Usage: node page.mjs MODULES URL ARTEFACTS STEPS; STEPS is a directory: this script writes `NAME.asked` and waits for
// `NAME.done`, between which the test changes the world (writes WAL, stops the archiver).
import { createRequire } from "node:module";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import assert from "node:assert/strict";

const [modules, url, artefacts, steps] = process.argv.slice(2);
const require = createRequire(join(modules, "node_modules", "x.js"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const executablePath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const until = async (what, condition) => {
  for (const end = Date.now() + 60000; Date.now() < end; await sleep(100)) if (await condition()) return;
  assert.fail(`waited in vain: ${what}`);
};
const step = async (name) => {
  writeFileSync(join(steps, `${name}.asked`), "");
  await until(`step ${name}`, () => existsSync(join(steps, `${name}.done`)));
};

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
try {
  const problems = [];
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  page.on("console", (message) => {
    // A fetch that fails while the archiver is stopped is what staleness is about.
    if (message.type() === "error" && !/ERR_|Failed to load/.test(message.text())) problems.push(message.text());
  });
  page.on("pageerror", (error) => problems.push(String(error)));
  await page.goto(url);

  // Tiles and the sentence.
  for (const id of ["rpo", "lag", "window", "rto", "drill"]) assert.ok(await page.locator(`#tile-${id} .value`).innerText(), id);
  await until("it is OK", async () => /OK/.test(await page.locator("#hero .badge").innerText()));
  assert.match(await page.locator("#sentence").innerText(), /Losing the primary now loses/);
  assert.match(await page.locator("#reason").innerText(), /Streaming; the repository is within its target/);
  await until("the drill is seen", async () => /A restore takes about/.test(await page.locator("#sentence").innerText()));
  assert.match(await page.locator("#sentence").innerText(), /estimate/);
  assert.match(await page.locator("#tile-drill").innerText(), /passed/);
  // The answer, then what needs a person, then the numbers, then the strip.
  const tops = await page.evaluate(() => ["sentence", "alerts", "tiles", "strip", "picker"]
    .map((id) => document.getElementById(id).getBoundingClientRect().top));
  assert.deepEqual(tops, [...tops].sort((one, other) => one - other), `order: ${tops}`);
  const shape = await page.evaluate(() => {
    const width = (id) => document.getElementById(id).getBoundingClientRect().width;
    const notes = [...document.querySelectorAll(".tile")].map((tile) => tile.querySelectorAll(".notes > span").length);
    return { rpo: width("tile-rpo"), rto: width("tile-rto"), lag: width("tile-lag"), notes: Math.max(...notes) };
  });
  assert.ok(shape.rpo > 1.8 * shape.lag && shape.rto > 1.8 * shape.lag && shape.notes <= 2, JSON.stringify(shape));
  assert.ok((await page.locator(".strip .held").count()) >= 1, "held WAL on the strip");
  assert.ok((await page.locator(".strip .m-backup").count()) >= 1, "a backup on the strip");
  assert.ok((await page.locator(".strip .m-point").count()) >= 1, "a restore point on the strip");

  // Live update without a reload: a new event of the strip appears by itself.
  await page.evaluate(() => { window.mark = "not reloaded"; });
  const before = await page.locator("#tile-window").innerText();
  await step("write");
  await until("the window moves", async () => (await page.locator("#tile-window").innerText()) !== before);
  assert.equal(await page.evaluate(() => window.mark), "not reloaded");

  // The picker, by keyboard alone.
  await page.locator("#when").focus();
  for (const key of ["ArrowLeft", "ArrowLeft", "ArrowRight", "Enter"]) await page.keyboard.press(key);
  await until("commits are found", async () => /Last commit kept/.test(await page.locator("#picked").innerText()));
  assert.match(await page.locator("#command").innerText(), /^pitr-restore --repository .* --target-lsn /);
  assert.ok(await page.locator("#cursor").isVisible());
  assert.match(await page.locator("#when").getAttribute("aria-valuetext"), /UTC$/);
  assert.match(await page.locator("#picked").innerText(), /base backup .* of WAL/);
  assert.match(await page.locator("#picked .chosen").innerText(), /Z · local /);
  // The picker takes what the command line takes, and says what it does not understand.
  const type = async (text, expected) => {
    await page.locator("#at").fill(text);
    await page.locator("#pick button").click();
    await until(`${text} is answered`, async () => expected.test(await page.locator("#picked").innerText()));
  };
  await type("yesterday", /write it with an offset/);
  await type("9 days ago", /This instant cannot be restored: no base backup ends before/);
  await type("0 s ago", /pitr-restore /);
  // It stays while the page goes on living.
  for (let news = 0; news < 2; news += 1) {
    const asOf = await page.locator("#hero .as-of").innerText();
    await until("the page is fresher", async () => (await page.locator("#hero .as-of").innerText()) !== asOf);
  }
  assert.match(await page.locator("#command").innerText(), /^pitr-restore /);

  // The strip zooms and moves by links that a script and a reader without one can use.
  const range = () => page.locator("#strip").evaluate((strip) => Date.parse(strip.dataset.to) - Date.parse(strip.dataset.from));
  const whole = await range();
  await page.locator("#zoom a[aria-label='Zoom in']").click();
  await until("the strip is zoomed", async () => (await range()) < 0.6 * whole);
  assert.equal(await page.evaluate(() => window.mark), "not reloaded");
  assert.match(page.url(), /from=.*to=/);
  await page.locator("#zoom a", { hasText: "All" }).click();
  await until("all of the strip is shown", async () => (await range()) >= whole);
  // A finger reads a mark.
  const flag = await page.locator(".strip .m-point").first().boundingBox();
  await page.mouse.click(flag.x + flag.width / 2, flag.y + flag.height / 2);
  await until("the mark is read", async () => /before_release/.test(await page.locator("#strip-readout").innerText()));

  // The progress of a base backup that another program takes is shown while it runs.
  assert.equal(await page.locator("#progress").count(), 0);
  await step("backup");
  const progress = /streaming database files: [\d.]+ MiB of [\d.]+ MiB \(\d+ %\), [\d.]+ .?i?B\/s/;
  await until("the backup is shown with its rate", async () => progress.test((await page.locator("#running").innerText()).trim().split("\n").at(-1)));
  assert.equal(await page.locator("#progress progress").getAttribute("aria-label"), "Progress of the base backup");
  await step("backup-end");
  await until("the backup is no longer shown", async () => (await page.locator("#progress").count()) === 0);

  // Removed tables are named, as far as their names are known.
  const named = async () => {
    const rows = await page.locator("#strip-words tr").allTextContents();
    return [/table truncated or rewritten: public\.drafts \(database postgres\)/, /table dropped: public\.orders \(database postgres\)/, /name not known/]
      .every((expected) => rows.some((row) => expected.test(row)));
  };
  await step("remove");
  await until("removals are named", named);
  assert.equal(await page.locator(".strip .m-removal").count(), 3);

  // A chart has round ticks and times, and is read by pointer and keys.
  const chart = page.locator("#charts figure").first();
  assert.equal(await chart.locator(".scale span").count(), 3);
  assert.equal(await chart.locator(".axis span").count(), 4);
  assert.match(await chart.locator(".labels").textContent(), /target 5 s/);
  await chart.locator(".plot").focus();
  await until("the focus reads the newest value", async () => /Z: RPO /.test(await page.locator("#charts .readout").first().innerText()));
  const newest = await page.locator("#charts .readout").first().innerText();
  await page.keyboard.press("ArrowLeft");
  await until("an earlier value is read", async () => (await page.locator("#charts .readout").first().innerText()) !== newest);
  await page.locator("#charts .plot").nth(1).hover();
  await until("a rate is read", async () => /received .*stored/.test(await page.locator("#charts .readout").nth(1).innerText()));

  // Events are grouped by day and filtered.
  assert.match(await page.locator("#events .day").first().innerText(), /day, 20\d\d-/);
  await page.locator("#events a", { hasText: "States" }).click();
  await until("only states are shown", async () => {
    const kinds = await page.locator("#events tbody tr:not(.day) td:nth-child(2)").allInnerTexts();
    return kinds.length > 0 && kinds.every((kind) => kind === "state");
  });
  await page.locator("#events a", { hasText: "All" }).click();

  // Tab reaches what can be used, with a focus that can be seen.
  await page.evaluate(() => document.activeElement.blur());
  const reached = new Set();
  for (let press = 0; press < 60; press += 1) {
    await page.keyboard.press("Tab");
    const seen = await page.evaluate(() => {
      const style = getComputedStyle(document.activeElement);
      const { id, ariaLabel, textContent } = document.activeElement;
      return [id || ariaLabel || textContent.trim(), style.outlineStyle];
    });
    if (seen[1] !== "none") reached.add(seen[0]);
  }
  for (const name of ["when", "at", "Show the plan", "24 h", "Metrics", "theme", "Zoom in"]) assert.ok(reached.has(name), `Tab reaches ${name}: ${[...reached]}`);

  const shoot = async (name) => page.screenshot({ path: join(artefacts, `${name}.png`), fullPage: true });
  const check = async (name, of = page) => {
    await of.evaluate(axe);
    const { violations } = await of.evaluate(() => window.axe.run());
    assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`), [], name);
  };
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const LIGHT = "rgb(244, 246, 247)";
  for (const [width, suffix] of [[1280, ""], [768, "-tablet"], [360, "-phone"]]) {
    await page.setViewportSize({ width, height: 900 });
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      assert.equal((await ground()) === LIGHT, colorScheme === "light");
      const wide = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(wide <= width, `nothing hangs over at ${width} px: ${wide}`);
      // A finger hits what can be used.
      const small = await page.evaluate(() => [...document.querySelectorAll("a:not(.skip), button, summary, input")]
        .map((one) => [one.textContent.trim() || one.id, one.getBoundingClientRect()])
        .filter(([, box]) => box.width > 0 && (box.width < 24 || box.height < 24)).map(([name]) => name));
      assert.deepEqual(small, [], `targets of 24 px at ${width} px`);
      await shoot(`${colorScheme}${suffix}`);
      await check(`${colorScheme}${suffix}`);
    }
  }
  // The switch overrides the browser's setting, also after a reload.
  await page.setViewportSize({ width: 1280, height: 900 });
  await page.emulateMedia({ colorScheme: "light" });
  // The browser tells a page of a new setting with its next frame.
  await until("the switch names the other colours", async () => (await page.locator("#theme").innerText()) === "Switch to dark");
  await page.locator("#theme").click();
  assert.notEqual(await ground(), LIGHT);
  await page.reload();
  assert.notEqual(await ground(), LIGHT);
  assert.equal(await page.locator("#theme").innerText(), "Switch to light");
  await page.locator("#theme").click();
  assert.equal(await ground(), LIGHT);
  await page.emulateMedia({ media: "print" });
  assert.equal(await page.locator("#picker").isVisible(), false);
  await shoot("print");
  await page.emulateMedia({ media: "screen" });

  // Without JavaScript the same page reads, and the picker works.
  const plain = await (await browser.newContext({ javaScriptEnabled: false })).newPage();
  await plain.goto(url);
  assert.match(await plain.locator("#sentence").innerText(), /Losing the primary/);
  assert.equal(await plain.locator("meta[http-equiv]").count(), 0, "no reload while a form is used");
  await plain.locator("#at").fill("1 s ago");
  await plain.locator("#pick button").click();
  assert.match(await plain.locator("#command").innerText(), /^pitr-restore /);
  assert.equal(await plain.locator("#stale").isVisible(), false);

  // The form for a token and the runbooks are pages of their own.
  for (const name of ["login", "runbook"]) {
    const other = await context.newPage();
    await other.goto(new URL(`/${name}`, url).href);
    await check(name, other);
    await other.close();
  }

  // The archiver is gone: the page says so and greys out; it comes back: the page does too.
  await step("stop");
  await until("it is stale", async () => page.locator("#stale").isVisible());
  assert.match(await page.locator("#stale").innerText(), /no news from the archiver since/);
  assert.ok(await page.evaluate(() => document.body.classList.contains("stale")));
  // What can be told from the state is told to a screen reader, and numbers are not.
  await page.evaluate(() => {
    window.told = [];
    new MutationObserver(() => window.told.push(document.getElementById("announce").textContent))
      .observe(document.getElementById("announce"), { childList: true, characterData: true, subtree: true });
  });
  for (const width of [360, 1280]) {
    for (const colorScheme of ["light", "dark"]) {
      await page.setViewportSize({ width, height: 900 });
      await page.emulateMedia({ colorScheme });
      await shoot(`stale-${width}-${colorScheme}`);
      await check(`stale at ${width} px, ${colorScheme}`);
    }
  }
  await step("start");
  await until("it is fresh again", async () => !(await page.locator("#stale").isVisible()));
  await until("it is OK again", async () => /OK/.test(await page.locator("#hero .badge").innerText()));
  await until("removals are named after a restart", named);
  const told = await page.evaluate(() => window.told);
  assert.ok(told.every((text) => /^The state is /.test(text)), JSON.stringify(told));
  assert.deepEqual(problems, []);
  console.log("page: all as it should be");
} finally {
  await browser.close();
}
