/**
 * Crash completeness of lanes with a file: the relay is killed before each of its stores to guest memory, in bursts of all
 * kinds; then another one goes on with the ring, where the ring says. Every chain comes back to its driver once, in order.
 *
 * Frames that were read from the file and not yet published are lost, like on any network. Frames that were written to it
 * and whose chains were not yet given back are written again: at most those of the turn that was interrupted.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { giveBackCutBatch } from "../../src/ports/cut-batch.ts";
import { packedFlags } from "../../src/ports/ring-memory.ts";
import { startPosition } from "../../src/vhost-user/position.ts";
import { frameOf } from "./chains.ts";
import { type Answer, EAGAIN, EFAULT } from "./file-kernel.ts";
import { type FileDirection, FileWorld, PLAIN, inFile } from "./file-world.ts";
import type { Access } from "./hooked-core.ts";
import { ringAt } from "./rig.ts";
import { runs } from "./runs.ts";

/** The relay is no more. */
class Killed extends Error {}

const [RING, DATA, HOLE] = [0x10_0000n, 0x1_0000_0000n, 0x8000_0000n];

interface RingSketch {
  packed: boolean;
  size: number;
  base: number;
}

type Step =
  | { type: "send" | "post"; length: number; parts: number; bad: boolean }
  | { type: "give"; length: number }
  | { type: "turn"; answers: Answer[] }
  | { type: "reap" };

class FileCrash {
  readonly world: FileWorld;
  readonly #killAt: number;
  #stores = 0;
  #sent = 0;
  killedBefore: Access | undefined;
  /** Of the frames written to the file so far, how many the turn had written that was interrupted. */
  #again = 0;
  /** Frames that may be missing: the file gave them to a relay that was killed. */
  #gone = 0;

  constructor(direction: FileDirection, { packed, size, base }: RingSketch, killAt: number) {
    this.#killAt = killAt;
    this.world = new FileWorld({
      direction,
      variant: "hooked",
      observe: (access) => this.#onAccess(access),
      end: {
        regions: [
          { gpa: RING, sizeBytes: 0x1000 },
          { gpa: DATA, sizeBytes: 0x8000 },
        ],
        ring: ringAt(RING, size, { packed, base }),
      },
    });
  }

  run(steps: readonly Step[]): void {
    for (const step of steps) {
      if (step.type === "turn") this.#turn(step.answers);
      else if (step.type === "reap") this.#reap();
      else if (step.type === "give") this.#give(step.length);
      else this.#add(step);
    }
  }

  /** Lets everything come to its end. @throws if a rule was broken */
  finish(): void {
    const { world } = this;
    for (let round = 0; world.driver.outstanding > 0; round++) {
      if (round > 60) throw new Error(`${world.driver.outstanding} chains never come back`);
      if (world.isHolding) this.#add({ type: "post", length: 200, parts: 1, bad: false });
      else if (world.direction === "receive") this.#give(20);
      this.#turn([]);
      this.#reap();
    }
    this.#judge();
  }

  #judge(): void {
    const { passed } = this.world.kernel;
    const numbers = passed.map((frame) => Buffer.from(frame).readUInt32LE(12));
    for (const [i, frame] of passed.entries()) {
      if (Buffer.compare(frame.subarray(12), frameOf(numbers[i]!, frame.length - 12)) !== 0) throw new Error("damaged");
    }
    if (this.world.direction === "send") {
      // in order, but for what was written again
      let back = 0;
      for (let i = 1; i < numbers.length; i++) {
        if (numbers[i]! > numbers[i - 1]!) continue;
        back++;
        const repeated = numbers.slice(0, i).filter((number) => number >= numbers[i]!).length;
        if (repeated > this.#again) throw new Error(`${repeated} frames were sent again, of ${this.#again}`);
      }
      if (back > 1) throw new Error(`frames were sent as ${numbers.join()}`);
      for (let number = 0; number < this.#sent; number++) {
        if (!numbers.includes(number) && !this.#bad.has(number)) throw new Error(`frame ${number} was not sent`);
      }
      return;
    }
    const received = this.world.received.map((frame) => Buffer.from(frame).readUInt32LE(10));
    for (const [i, frame] of this.world.received.entries()) {
      if (Buffer.compare(frame.subarray(10), frameOf(received[i]!, frame.length - 10)) !== 0)
        throw new Error("damaged");
    }
    if (received.some((number, i) => i > 0 && number <= received[i - 1]!)) throw new Error(`got ${received.join()}`);
    const missing = numbers.filter((number) => !received.includes(number)).length;
    const { tooSmall } = this.world.rig.counters.drops;
    const held = this.world.isHolding ? 64 : 0;
    if (missing > this.#gone + tooSmall + held) throw new Error(`${missing} frames are lost, not ${this.#gone}`);
  }

  readonly #bad = new Set<number>();

  #add({ type, length, parts, bad }: Extract<Step, { parts: number }>): void {
    const shape = { ...PLAIN, cuts: Array<number>(parts).fill(1) };
    const { driver } = this.world;
    if (type === "post") {
      if (bad) driver.addParts([{ gpa: HOLE, len: 100 }]);
      else driver.add(length, shape);
    } else if (bad) {
      if (driver.addParts([{ gpa: HOLE, len: 100 }], undefined, new Uint8Array(100))) this.#bad.add(this.#sent++);
    } else if (driver.add(12 + length, shape, inFile(new Uint8Array(12), frameOf(this.#sent, length)))) this.#sent++;
    driver.publish();
  }

  #give(length: number): void {
    this.world.kernel.queue.push(inFile(new Uint8Array(12), frameOf(this.#sent++, length)));
  }

  #turn(answers: Answer[]): void {
    const { world } = this;
    const before = world.kernel.passed.length;
    const heldBefore = world.isHolding ? 64 : 0;
    let number = 0;
    let last: Answer;
    // A file that is full stays so for the rest of the turn.
    world.kernel.answer = () => (last === EAGAIN && world.direction === "send" ? last : (last = answers[number++]));
    try {
      world.reads = 64;
      world.turn();
    } catch (error) {
      if (!(error instanceof Killed)) throw error;
      this.#again = world.kernel.passed.length - before;
      this.#gone = this.#again + heldBefore;
      this.#startAgain();
    }
  }

  #reap(): void {
    if (this.world.direction === "send") this.world.reapSent();
    else this.world.reapReceived({ empty: true });
  }

  /** What the next relay does: finds out where the ring stands, the front-end's base being old, and begins there. */
  #startAgain(): void {
    const { ram, ring } = this.world;
    if (!ring.packed) {
      this.world.replaceLane(ram.view.getUint16(ram.at(ring.used) + 2, true));
      return;
    }
    const desc = new DataView(ram.bytes.buffer, ram.bytes.byteOffset + ram.at(ring.desc), 16 * ring.size);
    this.world.replaceLane(giveBackCutBatch(desc, startPosition(ring.base, packedFlags(desc))));
  }

  #onAccess(access: Access): void {
    if (access.kind === "load") return;
    if (this.#stores++ !== this.#killAt) return;
    this.killedBefore = access;
    throw new Killed();
  }
}

/** Kills at every store of the steps. @returns what went wrong, and where */
function killEverywhere(direction: FileDirection, ring: RingSketch, steps: readonly Step[]): string[] {
  const wrong: string[] = [];
  for (let killAt = 0; ; killAt++) {
    const crash = new FileCrash(direction, ring, killAt);
    try {
      crash.run(steps);
      crash.finish();
    } catch (error) {
      const { kind, gpa, bytes } = crash.killedBefore ?? {};
      wrong.push(`store ${killAt} (${kind} 0x${gpa?.toString(16)}, ${bytes} bytes): ${String(error)}`);
    }
    if (!crash.killedBefore || wrong.length > 5) return wrong;
  }
}

const send = (length: number, parts = 1, bad = false): Step => ({ type: "send", length, parts, bad });
const post = (length: number, parts = 1, bad = false): Step => ({ type: "post", length, parts, bad });
const give = (length: number): Step => ({ type: "give", length });
const turn = (...answers: Answer[]): Step => ({ type: "turn", answers });
const reap: Step = { type: "reap" };
const times = (count: number, ...steps: Step[]): Step[] => Array.from({ length: count }, () => steps).flat();

describe.each([false, true])("packed %s", (packed) => {
  const ring = (size: number, at: number): RingSketch => {
    const position = (at % size) | (Math.floor(at / size) % 2 === 0 ? 0x8000 : 0);
    return { packed, size, base: packed ? position : (65_530 + at) & 0xffff };
  };
  /** Begun at the first place of all, and at the last one. */
  const bursts = (direction: FileDirection, size: number, steps: Step[]) =>
    [...new Set([0, 2 * size - 1])]
      .flatMap((at) => killEverywhere(direction, ring(size, at), steps).map((each) => `begun at ${at}: ${each}`))
      .join("\n");

  test.each([1, 2, 4])("sending frames of one descriptor, a ring of %i full", (size) => {
    expect(bursts("send", size, times(3, ...times(size, send(60)), turn(), reap))).toBe("");
  });

  test("sending chains of several descriptors, malformed ones among them, with a file that is full now and then", () => {
    const mixed = [
      send(60, 3),
      send(300, 2),
      send(60, 1, true),
      send(60),
      turn(undefined, EAGAIN),
      send(60),
      turn(),
      reap,
    ];
    expect(bursts("send", 8, times(3, ...mixed))).toBe("");
  });

  test.each([1, 2, 4])("reading into buffers of one descriptor, a ring of %i full", (size) => {
    expect(bursts("receive", size, times(4, ...times(size, post(100), give(60)), turn(), turn(), reap))).toBe("");
  });

  test("reading into chains of several descriptors, malformed ones among them", () => {
    const mixed = [post(100, 2), post(100, 3), post(100, 1, true), post(100), give(60), give(61), turn(), reap];
    expect(bursts("receive", 8, times(3, ...mixed))).toBe("");
  });

  test("reading large frames into buffers that are merged, and frames that are held", () => {
    const mixed = [...times(7, post(50)), give(100), give(20), turn(), turn(undefined, EAGAIN), reap];
    expect(bursts("receive", 8, times(3, ...mixed))).toBe("");
    const held = [
      ...times(4, post(100)),
      give(60),
      give(60),
      give(60),
      turn(),
      turn(EAGAIN, undefined, EFAULT),
      turn(),
    ];
    expect(bursts("receive", 8, times(3, ...held, reap))).toBe("");
  });

  test("at random", { timeout: 120_000 }, () => {
    const parts = packed ? fc.constantFrom(1, 1, 1, 2) : fc.constantFrom(1, 1, 2, 3);
    const bad = fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, { weight: 1, arbitrary: fc.constant(true) });
    const answers = fc.array(fc.constantFrom<Answer[]>(undefined, undefined, undefined, EAGAIN, "untaken"), {
      maxLength: 6,
    });
    const other = [
      { weight: 3, arbitrary: answers.map((each) => turn(...each)) },
      { weight: 2, arbitrary: fc.constant(reap) },
    ];
    const sending = fc.oneof(
      { weight: 8, arbitrary: fc.tuple(fc.constantFrom(30, 60, 300), parts, bad).map((of) => send(...of)) },
      ...other,
    );
    // As in crash.test.ts: merged from buffers of one descriptor each.
    const reading = (merged: boolean) =>
      fc.oneof(
        {
          weight: 8,
          arbitrary: merged
            ? bad.map((isBad) => post(60, 1, isBad))
            : fc.tuple(fc.constant(150), parts, bad).map((of) => post(...of)),
        },
        { weight: 6, arbitrary: fc.constantFrom(20, 40, 120).map((length) => give(length)) },
        ...other,
      );
    const burst = (step: fc.Arbitrary<Step>) => fc.array(step, { minLength: 10, maxLength: 30, size: "max" });
    const sketch = fc.tuple(fc.constantFrom(4, 8, 11), fc.nat(30)).map(([size, at]) => ring(packed ? size : 8, at));
    fc.assert(
      fc.property(
        sketch,
        burst(sending),
        fc.boolean().chain((merged) => burst(reading(merged))),
        (at, sends, reads) => {
          expect(killEverywhere("send", at, [...sends, turn()]).join("\n")).toBe("");
          expect(killEverywhere("receive", at, [...reads, turn()]).join("\n")).toBe("");
        },
      ),
      { numRuns: runs(4), seed: 3 },
    );
  });
});
