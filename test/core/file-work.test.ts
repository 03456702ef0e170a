/**
 * How long one turn of a lane with a file may take, of a driver whose chains are as long as the ring allows and hold next
 * to nothing: it must not hold up the other lanes of a poller. Work is counted in guest accesses.
 */
import { describe, expect, test } from "vitest";
import { PIECES_MAX } from "../../src/layout/lane.ts";
import { frameOf } from "./chains.ts";
import { EAGAIN } from "./file-kernel.ts";
import { type FileDirection, FileLane, inFile } from "./file-world.ts";
import { NEXT, WRITE } from "./raw-ring.ts";
import { RawSplit } from "./raw-split.ts";
import { ringAt } from "./rig.ts";

const [RING, DATA] = [0x10_0000n, 0x1_0000_0000n];
const SIZE = 32_768;
/** As in work.test.ts: two words a descriptor, for a turn's limit, a frame's, and the chain that passes each; ring entries. */
const ACCESSES_MAX = 2 * (2 * PIECES_MAX + 4 * SIZE) + 4 * SIZE;

class LongChains {
  accesses = 0;
  readonly lane: FileLane;
  readonly raw: RawSplit;
  readonly #flags: number;

  constructor(direction: FileDirection, ring = {}) {
    this.#flags = direction === "receive" ? WRITE : 0;
    this.lane = new FileLane({
      direction,
      variant: "hooked",
      observe: () => {
        // an endless turn ends the test
        if (++this.accesses > 8 * ACCESSES_MAX) throw new Error("it goes on and on");
      },
      end: {
        regions: [
          { gpa: RING, sizeBytes: 0xf_0000 },
          { gpa: DATA, sizeBytes: 0x2_0000 },
        ],
        ring: ringAt(RING, SIZE, { eventIdx: false, ...ring }),
      },
    });
    this.raw = new RawSplit(this.lane.ram, this.lane.ring);
  }

  /** Every head leads to a chain of `size` descriptors of no bytes; `last` makes them end or loop. */
  lay(last: { len: number; flags: number }): void {
    for (let i = 0; i < SIZE; i++) this.raw.describe(i, { gpa: DATA, len: 0, flags: this.#flags | NEXT, next: i + 1 });
    this.raw.describe(SIZE - 1, { gpa: DATA, next: 0, len: last.len, flags: this.#flags | last.flags });
  }

  /** A turn that does not do too much. */
  turn(budget = 64) {
    this.accesses = 0;
    const turn = this.lane.turn(budget);
    expect(this.accesses).toBeLessThan(ACCESSES_MAX);
    return turn;
  }

  give(...lengths: number[]): void {
    for (const length of lengths) this.lane.kernel.queue.push(inFile(new Uint8Array(12), frameOf(1, length)));
  }
}

const ends = [
  ["loop", { len: 0, flags: NEXT }],
  ["end with one byte", { len: 1, flags: 0 }],
  ["end with a frame's room", { len: 2000, flags: 0 }],
] as const;

describe("one turn reads a bounded number of descriptors", () => {
  test.each(ends)("sending chains of 32768 descriptors that %s", (_, last) => {
    const long = new LongChains("send");
    long.lay(last);
    long.raw.offer(...Array<number>(SIZE).fill(0));
    for (let turn = 0; turn < 3; turn++) {
      const { count } = long.turn();
      expect(count).toBeGreaterThan(0);
      expect(long.raw.used()).toEqual(Array.from({ length: count }, () => ({ id: 0, len: 0 })));
    }
  });

  test.each(ends)("reading into chains of 32768 descriptors that %s", (_, last) => {
    const long = new LongChains("receive");
    long.lay(last);
    long.raw.offer(...Array<number>(SIZE).fill(0));
    long.give(...Array<number>(300).fill(60));
    for (let turn = 0; turn < 6; turn++) {
      long.lane.reads = 64;
      long.turn();
      expect(long.lane.arm()).toBe(true); // there are more: do not sleep
    }
    const { drops } = long.lane.rig.counters;
    expect(long.raw.used().length + drops.tooSmall).toBeGreaterThan(0);
  });

  test.each(ends)("a large read into chains of 32768 descriptors that %s", (_, last) => {
    const long = new LongChains("receive");
    // a frame that passes its buffer, then buffers for it
    long.raw.describe(0, { gpa: DATA, len: 100, flags: WRITE });
    long.raw.offer(...Array<number>(41).fill(0));
    long.give(4000, 60);
    long.turn();
    long.turn();
    expect(long.raw.used().length).toBe(41);
    long.lay(last);
    long.raw.offer(...Array<number>(SIZE).fill(0));
    for (let turn = 0; turn < 3; turn++) long.turn();
  });

  test.each([true, false])("held frames, then chains of 32768 descriptors and one byte (mergeable %s)", (mergeable) => {
    const long = new LongChains("receive", { mergeable });
    long.raw.describe(0, { gpa: DATA, len: 100, flags: WRITE });
    long.raw.offer(...Array<number>(65).fill(0));
    long.give(60);
    long.turn();
    long.give(...Array<number>(64).fill(70));
    long.lane.kernel.answer = (number) => (number === 1 ? EAGAIN : undefined);
    long.lane.reads = 64;
    expect(long.turn().requests).toBe(64);
    expect(long.lane.isHolding).toBe(true);
    // the buffers that there were are now others: the driver is a bad one
    long.lay({ len: 1, flags: 0 });
    long.raw.offer(...Array<number>(1000).fill(0));
    for (let turn = 0; turn < 8; turn++) long.turn();
  });
});
