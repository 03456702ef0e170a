/** The fuzzer finds what it is there to find; and a short search with fixed seeds, the same every time, finds nothing. */
import { describe, expect, it } from "vitest";
import { Random, Reader } from "./bytes.ts";
import { type Features, search } from "./engine.ts";
import { targets } from "./targets.ts";

/** Runs of a target that take a second or two. */
const RUNS = 600;

describe("the search", () => {
  /** Fails once four bytes in a row are right; each that is right shows as a feature. */
  const maze = (input: Uint8Array): Features => {
    const reader = new Reader(input);
    const features: Features = new Map();
    for (const [i, wanted] of [0x17, 0x2a, 0x99, 0x03].entries()) {
      if (reader.u8() !== wanted) return features;
      features.set(i + 1, 1);
    }
    throw new Error(`through after ${input.length} bytes`);
  };

  it("gets where no blind search gets, and shortens what it found", async () => {
    const report = await search(maze, [], new Random(1), (runs) => runs === 200_000);
    expect(Buffer.from(report.finding!.input).toString("hex")).toBe("172a9903");
    expect(report.finding!.message).toBe("Error: through after 4 bytes");
  });

  it("is the same for the same seed", async () => {
    const reports = [2, 2, 3].map((seed) => search(maze, [], new Random(seed), (runs) => runs === 3000));
    const [first, second, other] = await Promise.all(reports);
    expect(second).toEqual(first);
    expect(other).not.toEqual(first);
  });
});

it.each(Object.entries(targets))("%s survives a short search", async (_name, target) => {
  for (const seed of [1, 2]) {
    const report = await search(target.run, target.seeds(), new Random(seed), (runs) => runs === RUNS);
    const found =
      report.finding && `${Buffer.from(report.finding.input).toString("base64")}: ${report.finding.message}`;
    expect(found).toBeUndefined();
    // It gets somewhere: a search that always does the same finds nothing either.
    expect(report.corpus.length).toBeGreaterThan(100);
  }
});
