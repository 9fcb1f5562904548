// Takes pictures of pages in Chromium at three widths, light and dark, and checks each of them: no axe violation,
// nothing wider than the screen, targets of 24 px.
// Usage: node states.mjs MODULES ARTEFACTS STEPS; STEPS is a directory: the test writes a URL to `NAME.asked`, this
// script writes the problems that it found, or nothing, to `NAME.done`. It ends at a file `end`.
import { createRequire } from "node:module";
import { existsSync, readFileSync, readdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [modules, artefacts, steps] = process.argv.slice(2);
const require = createRequire(join(modules, "node_modules", "x.js"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const executablePath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await (await browser.newContext()).newPage();

const look = async (name, url) => {
  const problems = [];
  // The strip appears with a reload when the first backup is seen.
  await page.goto(url);
  for (const width of [360, 768, 1280]) {
    for (const colorScheme of ["light", "dark"]) {
      await page.setViewportSize({ width, height: 900 });
      await page.emulateMedia({ colorScheme });
      const of = `${name}, ${width} px, ${colorScheme}`;
      const found = await page.evaluate(() => {
        const targets = [...document.querySelectorAll("a:not(.skip), button, summary, input")]
          .map((one) => [one.textContent.trim() || one.id, one.getBoundingClientRect()])
          .filter(([, box]) => box.width > 0 && (box.width < 24 || box.height < 24));
        return { wide: document.documentElement.scrollWidth, small: targets.map(([text]) => text) };
      });
      if (found.wide > width) problems.push(`${of}: ${found.wide} px wide`);
      if (found.small.length) problems.push(`${of}: small targets ${found.small}`);
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => window.axe.run());
      for (const { id, nodes } of violations) problems.push(`${of}: ${id}: ${nodes.map((node) => node.html).join(" ")}`);
      await page.screenshot({ path: join(artefacts, `${name}-${width}-${colorScheme}.png`), fullPage: true });
    }
  }
  return problems.join("\n");
};

try {
  while (!existsSync(join(steps, "end"))) {
    for (const file of readdirSync(steps).filter((one) => one.endsWith(".asked"))) {
      const [asked, done] = [join(steps, file), join(steps, file.replace(/asked$/, "done"))];
      const problems = await look(file.replace(/\.asked$/, ""), readFileSync(asked, "utf8"));
      renameSync(asked, `${asked}.seen`);
      writeFileSync(`${done}.new`, problems);
      renameSync(`${done}.new`, done);
    }
    await sleep(50);
  }
} finally {
  await browser.close();
}
