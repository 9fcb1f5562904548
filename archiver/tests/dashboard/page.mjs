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
  await until("the drill is seen", async () => /A restore would take about/.test(await page.locator("#sentence").innerText()));
  assert.match(await page.locator("#tile-drill").innerText(), /passed/);
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
  // It stays while the page goes on living.
  for (let news = 0; news < 2; news += 1) {
    const asOf = await page.locator("#hero .as-of").innerText();
    await until("the page is fresher", async () => (await page.locator("#hero .as-of").innerText()) !== asOf);
  }
  assert.match(await page.locator("#command").innerText(), /^pitr-restore /);

  // Tab reaches what can be used, with a focus that can be seen.
  await page.evaluate(() => document.activeElement.blur());
  const reached = new Set();
  for (let press = 0; press < 40; press += 1) {
    await page.keyboard.press("Tab");
    const seen = await page.evaluate(() => {
      const style = getComputedStyle(document.activeElement);
      return [document.activeElement.id || document.activeElement.textContent.trim(), style.outlineStyle];
    });
    if (seen[1] !== "none") reached.add(seen[0]);
  }
  for (const name of ["when", "at", "Find commits", "24 h", "Metrics"]) assert.ok(reached.has(name), `Tab reaches ${name}: ${[...reached]}`);

  const shoot = async (name) => page.screenshot({ path: join(artefacts, `${name}.png`), fullPage: true });
  const check = async (name, of = page) => {
    await of.evaluate(axe);
    const { violations } = await of.evaluate(() => window.axe.run());
    const bad = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
    assert.deepEqual(bad.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).join(" ")}`), [], name);
  };
  await shoot("light");
  await check("light");
  await page.emulateMedia({ colorScheme: "dark" });
  assert.notEqual(await page.evaluate(() => getComputedStyle(document.body).backgroundColor), "rgb(244, 246, 247)");
  await shoot("dark");
  await check("dark");
  await page.emulateMedia({ colorScheme: "light" });
  await page.setViewportSize({ width: 360, height: 780 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(wide <= 360, `nothing hangs over at 360 px: ${wide}`);
  await shoot("phone");
  await check("phone");
  await page.setViewportSize({ width: 1280, height: 900 });

  // Without JavaScript the same page reads, and the picker works.
  const plain = await (await browser.newContext({ javaScriptEnabled: false })).newPage();
  await plain.goto(url);
  assert.match(await plain.locator("#sentence").innerText(), /Losing the primary/);
  await plain.locator("#pick button").click();
  assert.match(await plain.locator("#command").innerText(), /^pitr-restore /);
  assert.equal(await plain.locator("#stale").isVisible(), false);

  // The form for a token is a page of its own.
  const login = await context.newPage();
  await login.goto(new URL("/login", url).href);
  await check("login", login);
  await login.close();

  // The archiver is gone: the page says so and greys out; it comes back: the page does too.
  await step("stop");
  await until("it is stale", async () => page.locator("#stale").isVisible());
  assert.match(await page.locator("#stale").innerText(), /no news from the archiver since/);
  assert.ok(await page.evaluate(() => document.body.classList.contains("stale")));
  await shoot("stale");
  await step("start");
  await until("it is fresh again", async () => !(await page.locator("#stale").isVisible()));
  assert.deepEqual(problems, []);
  console.log("page: all as it should be");
} finally {
  await browser.close();
}
