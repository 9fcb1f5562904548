// Logs in and out in Chromium as a person does: fills in the form, clicks, reads the page, clicks again.
// Usage: node login.mjs MODULES TOKEN URL...; TLS certificates are not verified.
import { createRequire } from "node:module";
import { existsSync } from "node:fs";
import { join } from "node:path";
import assert from "node:assert/strict";

const [modules, token, ...urls] = process.argv.slice(2);
const require = createRequire(join(modules, "node_modules", "x.js"));
const { chromium } = require("playwright-core");
const executablePath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
try {
  for (const url of urls) {
    for (const javaScriptEnabled of url === urls[0] ? [true, false] : [true]) {
      const context = await browser.newContext({ ignoreHTTPSErrors: true, javaScriptEnabled });
      const page = await context.newPage();
      const at = (path) => assert.equal(page.url(), new URL(path, url).href);
      const logIn = async (with_token) => {
        await page.locator("#token").fill(with_token);
        await page.getByRole("button", { name: "Log in" }).click();
      };
      await page.goto(url);
      at("/login");
      await logIn("not-the-token-at-all");
      await page.getByText("This token is not known.").waitFor();
      await logIn(token);
      await page.locator("#sentence").waitFor();
      at("/");
      // A link in a mail or a chat, followed from another site, opens the page too.
      const elsewhere = await context.newPage();
      await elsewhere.setContent(`<a href="${url}">the dashboard</a>`);
      await elsewhere.getByText("the dashboard").click();
      await elsewhere.locator("#sentence").waitFor();
      // Another site's form is refused: the session goes on.
      await elsewhere.goto("about:blank");
      await elsewhere.setContent(`<form method="post" action="${new URL("/logout", url).href}"><button>win</button></form>`);
      await elsewhere.getByRole("button").click();
      await elsewhere.getByText("another site").waitFor();
      await elsewhere.close();
      await page.reload();
      await page.locator("#sentence").waitFor();
      await page.getByRole("button", { name: "Log out" }).click();
      await page.locator("#token").waitFor();
      at("/login");
      await page.goto(url);
      at("/login");
      await context.close();
    }
  }
  console.log("login: all as it should be");
} finally {
  await browser.close();
}
