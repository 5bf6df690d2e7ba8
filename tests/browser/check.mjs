// Checks reports: `npm run check -- report.html [more.html] [--shots FOLDER]`. Exit 1 where something was found.
//
// HTML by html-validate's standard rules; WCAG 2.2 AA and best practices by axe-core in a headless Chromium, at the widths of a
// phone and a desktop, light and dark, folded parts open and closed; no errors, no requests, no sideways scrolling of the page.
import { createRequire } from "node:module";
import { mkdirSync, readFileSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { FileSystemConfigLoader, HtmlValidate } from "html-validate";
import puppeteer from "puppeteer-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const WIDTHS = [390, 1280];
const SCHEMES = ["light", "dark"];
const RULES = {
  root: true,
  extends: ["html-validate:recommended"],
  rules: {
    "long-title": "off", // a title names the model; its length is the model's
    "void-style": "off",
    "no-inline-style": "off", // matplotlib's drawings
    "no-trailing-whitespace": "off", // a matter of taste, likewise
    "svg-focusable": "off", // Internet Explorer
    "no-redundant-role": "off", // tables keep their roles where a phone's style sheet makes blocks of their rows
  },
};

const { values, positionals } = parseArgs({ options: { shots: { type: "string" } }, allowPositionals: true });
if (!positionals.length) {
  console.error("Name the reports to check: npm run check -- ../../demo-out/report.html");
  process.exit(2);
}
if (values.shots) mkdirSync(values.shots, { recursive: true });

async function markup(path) {
  const report = await new HtmlValidate(new FileSystemConfigLoader(RULES)).validateFile(path);
  return report.results.flatMap((result) => result.messages.map((m) => `HTML ${m.line}:${m.column} ${m.message} (${m.ruleId})`));
}

async function accessibility(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() =>
    globalThis.axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }));
  return violations.flatMap((v) => v.nodes.map((node) => `${v.id}: ${node.failureSummary.replace(/\s+/g, " ")} at ${node.target.join(" ")}`));
}

async function layout(page, width) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  return wide > width ? [`the page is ${wide} px wide on a screen of ${width} px`] : [];
}

async function look(browser, path, width, scheme) {
  const page = await browser.newPage();
  const found = [];
  page.on("pageerror", (error) => found.push(`script error: ${error.message}`));
  page.on("console", (message) => message.type() === "error" && found.push(`console: ${message.text()}`));
  page.on("request", (request) => /^(file|data):/.test(request.url()) || found.push(`asks for ${request.url()}`));
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(pathToFileURL(path).href);
  if (values.shots) {
    await page.screenshot({ path: join(values.shots, `${basename(path, ".html")}-${width}-${scheme}.png`), fullPage: true });
  }
  found.push(...(await layout(page, width)), ...(await accessibility(page)));
  await page.evaluate(() => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  found.push(...(await layout(page, width)), ...(await accessibility(page)));
  await page.close();
  return [...new Set(found)].map((line) => `${width} px, ${scheme}: ${line}`);
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
let count = 0;
for (const name of positionals) {
  const path = resolve(name);
  const found = await markup(path);
  for (const width of WIDTHS) for (const scheme of SCHEMES) found.push(...(await look(browser, path, width, scheme)));
  for (const line of found) console.log(`${name}: ${line}`);
  if (!found.length) console.log(`${name}: nothing found, at ${WIDTHS.join(" and ")} px, ${SCHEMES.join(" and ")}`);
  count += found.length;
}
await browser.close();
process.exit(count ? 1 : 0);
