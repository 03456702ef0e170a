/** Inputs that a target did not survive once: test/fuzz/corpus has a file for each, as `npm run fuzz` printed it. */
import { readdirSync, readFileSync } from "node:fs";
import { it } from "vitest";
import { targets } from "./targets.ts";

interface Regression {
  target: string;
  /** What went wrong then. */
  about: string;
}

const directory = new URL("./corpus/", import.meta.url);
const regressions = readdirSync(directory).map((name) => {
  return JSON.parse(readFileSync(new URL(name, directory), "utf8")) as Regression;
});

it.each(regressions.map((each) => [each.target, each.about, each] as const))("%s: %s", (name, _about, each) => {
  return targets[name]!.replay(each);
});
