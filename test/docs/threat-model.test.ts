/** The table of hostile inputs in docs/THREAT-MODEL.md names the tests that carry their numbers, all of them and no others. */
import { globSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";

test("docs/THREAT-MODEL.md has every BI-nnn that a test carries, with the files", () => {
  const carried = new Map<string, Set<string>>();
  for (const file of globSync("test/**/*.ts").toSorted()) {
    for (const [, first, more] of readFileSync(file, "utf8").matchAll(/BI-(\d{3})((?:, (?:BI-)?\d{3})*)/g)) {
      for (const number of [first!, ...(more!.match(/\d{3}/g) ?? [])]) {
        carried.set(number, (carried.get(number) ?? new Set()).add(file.slice("test/".length)));
      }
    }
  }
  const rows = readFileSync("docs/THREAT-MODEL.md", "utf8").matchAll(/^\| (\d{3}) \| [^|]+ \| ([^|]+) \|$/gm);
  const documented = [...rows].map(([, number, files]) => [number, files!.split(", ").toSorted()]);
  const expected = [...carried].map(([number, files]) => [number, [...files].toSorted()]);
  expect(documented).toEqual(expected.toSorted(([a], [b]) => (a! < b! ? -1 : 1)));
});
