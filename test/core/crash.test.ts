/**
 * Crash completeness: the relay is killed before each of its stores to guest memory, and with that after the one before,
 * in bursts of all kinds; then another one goes on with the rings. Every chain of both rings comes back to its driver once
 * and in order; frames arrive in order, none twice, and only frames of the interrupted poll may be missing.
 *
 * VHOST_RELAY_TEST_RUNS multiplies the number of random bursts.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { CrashRig, CrashWorld, type RingSketch, type Step } from "./crash.ts";
import { runs } from "./runs.ts";

/** Kills at every store of the steps. @returns what went wrong, and where */
function killEverywhere(from: RingSketch, to: RingSketch, steps: readonly Step[], busyDrivers = false): string[] {
  const rig = new CrashRig(from, to);
  const wrong: string[] = [];
  for (let killAt = 0; ; killAt++) {
    const world = new CrashWorld(rig, killAt, busyDrivers);
    try {
      world.run(steps);
      world.finish();
    } catch (error) {
      const { kind, end, gpa, bytes } = world.killedBefore ?? {};
      wrong.push(`store ${killAt} (${kind} ${end} 0x${gpa?.toString(16)}, ${bytes} bytes): ${String(error)}`);
    }
    if (!world.killedBefore || wrong.length > 9) return wrong;
  }
}

const send = (length: number, parts = 1, bad = false): Step => ({ type: "send", length, parts, bad });
const post = (length: number, parts = 1, bad = false): Step => ({ type: "post", length, parts, bad });
const poll: Step = { type: "poll", budget: 64 };
const reap: Step = { type: "reap" };
const times = (count: number, ...steps: Step[]): Step[] => Array.from({ length: count }, () => steps).flat();

const position = (packed: boolean, size: number, at: number) =>
  packed ? (at % size) | (Math.floor(at / size) % 2 === 0 ? 0x8000 : 0) : (65_530 + at) & 0xffff;
const ring = (packed: boolean, size: number, at: number): RingSketch => {
  return { packed, size, base: position(packed, size, at) };
};

describe.each([
  ["split", "split", false, false],
  ["packed", "packed", true, true],
  ["split", "packed", false, true],
  ["packed", "split", true, false],
])("%s to %s", (_from, _to, fromPacked, toPacked) => {
  /** Begun at either end of either lap, and at a place between. */
  const bursts = (size: number, steps: Step[]) => {
    const wrong: string[] = [];
    for (const at of new Set([0, 1, size - 1, 2 * size - 1])) {
      const found = killEverywhere(ring(fromPacked, size, at), ring(toPacked, size, at), steps);
      wrong.push(...found.map((each) => `begun at ${at}: ${each}`));
    }
    return wrong.join("\n");
  };

  test.each([1, 2, 4])("frames of one descriptor, the rings of %i full", (size) => {
    expect(bursts(size, times(3, ...times(size, post(100), send(60)), poll, reap))).toBe("");
  });

  test("merged frames", () => {
    expect(bursts(8, times(2, ...times(8, post(40)), send(60), send(60), poll, reap))).toBe("");
  });

  test("chains of several descriptors, across the ring's end", () => {
    expect(bursts(8, times(3, post(100, 3), post(100, 3), send(60, 3), send(60, 2), poll, reap))).toBe("");
  });

  test("malformed chains among good ones, of one descriptor and of several", () => {
    const mixed = [
      post(100, 2, true),
      post(100),
      post(100, 1, true),
      post(100),
      send(60, 2, true),
      send(60),
      send(60, 1, true),
      send(60),
    ];
    expect(bursts(8, times(2, ...mixed, poll, reap))).toBe("");
  });

  test("a chain as long as the ring, a frame merged from all of it", () => {
    expect(bursts(4, times(2, ...times(4, post(30)), send(100, 4), poll, reap))).toBe("");
    expect(bursts(4, times(2, post(120, 4), send(100, 4), poll, reap))).toBe("");
  });

  test("bursts at random, with drivers that act during polls", { timeout: 120_000 }, () => {
    const bad = fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, { weight: 1, arbitrary: fc.constant(true) });
    const parts = fc.constantFrom(1, 1, 1, 2, 3);
    // A ring full of buffers holds a frame, or it would be dropped. Frames are merged from buffers of one descriptor each: of a
    // packed batch with several chains of several descriptors nobody can tell where it was cut off (packed.ts).
    const chain = (merged: boolean) =>
      fc.oneof(
        fc.record({ type: fc.constant("send" as const), length: fc.constantFrom(30, 60, 120), parts, bad }),
        merged
          ? fc.record({ type: fc.constant("post" as const), length: fc.constant(50), parts: fc.constant(1), bad })
          : fc.record({ type: fc.constant("post" as const), length: fc.constant(150), parts, bad }),
      );
    const steps: fc.Arbitrary<Step[]> = fc.boolean().chain((merged) =>
      fc.array(
        fc.oneof(
          { weight: 8, arbitrary: chain(merged) },
          {
            weight: 2,
            arbitrary: fc.record({ type: fc.constant("poll" as const), budget: fc.constantFrom(1, 2, 64) }),
          },
          { weight: 2, arbitrary: fc.constant(reap) },
        ),
        { minLength: 10, maxLength: 30, size: "max" },
      ),
    );
    const size = fc.constantFrom(4, 5, 8, 11);
    const sketch = (packed: boolean) =>
      fc.tuple(size, fc.nat(30)).map(([size, at]) => ring(packed, packed ? size : 2 ** Math.ceil(Math.log2(size)), at));
    fc.assert(
      fc.property(sketch(fromPacked), sketch(toPacked), steps, fc.boolean(), (from, to, steps, busyDrivers) => {
        expect(killEverywhere(from, to, [...steps, poll], busyDrivers).join("\n")).toBe("");
      }),
      { numRuns: runs(6), endOnFailure: true },
    );
  });
});
