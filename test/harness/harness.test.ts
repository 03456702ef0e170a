/** The catalogue of bad inputs, a representative choice of every section, each case followed by all invariants. */
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { controlCases } from "./control-cases.ts";
import { Harness, type HostileCase } from "./harness.ts";
import { ringCases } from "./ring-cases.ts";

let harness: Harness;
setFlagsFromString("--expose-gc");
const collectGarbage = runInNewContext("gc") as () => void;

beforeAll(async () => {
  harness = await Harness.start();
});
afterAll(async () => {
  await harness[Symbol.asyncDispose]();
  console.info(harness.slowest);
});

const named = (cases: HostileCase[]) => cases.map((each) => [each.number, each.what, each] as const);

it("a VM without malice is served", () => harness.mustServe());

describe("sockets, messages, memory, virtqueues", () => {
  it.each(named(controlCases))("%s: %s", (_number, _what, hostile) => harness.run(hostile));
});

describe("rings and frames", () => {
  it.each(named(ringCases))("%s: %s", (_number, _what, hostile) => harness.run(hostile));
});

it("I7: memory does not grow with repetition", async () => {
  const cases = ["BI-018", "BI-037", "BI-166", "BI-172", "BI-083"].map((number) =>
    [...controlCases, ...ringCases].find((each) => each.number === number),
  );
  const repeat = async (times: number): Promise<number> => {
    for (let i = 0; i < times; i++) await harness.run(cases[i % cases.length]!);
    collectGarbage();
    return process.memoryUsage().rss;
  };
  let before = await repeat(10); // with what is made once
  // Of every guest that was not let go 1 MiB would be left, each time; caches and compiled code come to an end.
  const grown: number[] = [];
  do {
    const after = await repeat(15);
    grown.push(after - before);
    before = after;
  } while (grown.length < 5 && grown.at(-1)! >= 12 << 20);
  expect(Math.min(...grown)).toBeLessThan(12 << 20);
});
