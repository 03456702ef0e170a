/**
 * Regions as other back-ends leave them, killed wherever they like. The ring lies in plain shared memory, the region in a
 * memory file.
 */
import { once } from "node:events";
import { readSync, writeSync } from "node:fs";
import { Worker } from "node:worker_threads";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { USED_RING } from "../../src/layout/virtio.ts";
import { recoverPacked } from "../../src/ports/recover-packed.ts";
import { recoverSplit } from "../../src/ports/recover-split.ts";
import { makePosition } from "../../src/vhost-user/position.ts";

const SIZE = 8;
const stopFlag = new Int32Array(new SharedArrayBuffer(4));
const OFFSET = 128n;
const AVAIL = 1 << 7;
const USED = 1 << 15;

let fd: number;
let place: { fd: number; offset: bigint };
let ring: DataView;

beforeEach(() => {
  fd = memfdCreate("inflight", 8192);
  place = { fd, offset: OFFSET };
  ring = new DataView(new SharedArrayBuffer(1024));
});
afterEach(() => close(fd));

function region(bytes: number): DataView {
  const copy = new Uint8Array(bytes);
  readSync(fd, copy, 0, bytes, OFFSET);
  return new DataView(copy.buffer);
}

function writeRegion(view: DataView): void {
  writeSync(fd, new Uint8Array(view.buffer), 0, view.byteLength, Number(OFFSET));
}

describe("PROTOCOL, 17: split rings", () => {
  const BYTES = L.INFLIGHT_SPLIT_ENTRIES + SIZE * L.INFLIGHT_SPLIT_ENTRY_SIZE;

  interface Left {
    usedIdx: number;
    lastBatchHead?: number;
    version?: number;
    features?: bigint;
    descNum?: number;
    /** Entries marked in flight: index -> counter. */
    inFlight?: Record<number, bigint>;
    next?: Record<number, number>;
  }

  function leave(left: Left): void {
    const view = region(BYTES);
    view.setBigUint64(L.INFLIGHT_FEATURES, left.features ?? 0n, true);
    view.setUint16(L.INFLIGHT_VERSION, left.version ?? 1, true);
    view.setUint16(L.INFLIGHT_DESC_NUM, left.descNum ?? SIZE, true);
    view.setUint16(L.INFLIGHT_SPLIT_LAST_BATCH_HEAD, left.lastBatchHead ?? 0, true);
    view.setUint16(L.INFLIGHT_SPLIT_USED_IDX, left.usedIdx, true);
    const entry = (index: number | string) => L.INFLIGHT_SPLIT_ENTRIES + Number(index) * L.INFLIGHT_SPLIT_ENTRY_SIZE;
    for (const [index, counter] of Object.entries(left.inFlight ?? {})) {
      view.setUint8(entry(index), 1);
      view.setBigUint64(entry(index) + L.INFLIGHT_SPLIT_COUNTER, counter, true);
    }
    for (const [index, next] of Object.entries(left.next ?? {})) {
      view.setUint16(entry(index) + L.INFLIGHT_SPLIT_NEXT, next, true);
    }
    writeRegion(view);
  }

  /** The used ring's entries from one used index to another. */
  function given(from: number, to: number): { id: number; length: number }[] {
    return Array.from({ length: (to - from) & 0xffff }, (_, i) => {
      const at = USED_RING + (((from + i) & 0xffff) % SIZE) * 8;
      return { id: ring.getUint32(at, true), length: ring.getUint32(at + 4, true) };
    });
  }

  function recover(usedIndex: number) {
    ring.setUint16(2, usedIndex, true);
    const recovery = recoverSplit(place, SIZE, ring);
    const now = ring.getUint16(2, true);
    const after = region(BYTES);
    const marks = Array.from({ length: SIZE }, (_, i) =>
      after.getUint8(L.INFLIGHT_SPLIT_ENTRIES + i * L.INFLIGHT_SPLIT_ENTRY_SIZE),
    );
    return {
      ...recovery,
      given: given(usedIndex, now),
      marks,
      usedIdx: after.getUint16(L.INFLIGHT_SPLIT_USED_IDX, true),
    };
  }

  const NONE = Array(SIZE).fill(0);

  it("a fresh region is made version 1 and the ring goes on at its used index", () => {
    const found = recover(40);
    expect(found).toMatchObject({ position: 40, given: [], usedIdx: 40 });
    const view = region(BYTES);
    expect(view.getUint16(L.INFLIGHT_VERSION, true)).toBe(1);
    expect(view.getUint16(L.INFLIGHT_DESC_NUM, true)).toBe(SIZE);
  });

  it("with nothing in flight the ring goes on at its used index", () => {
    leave({ usedIdx: 40 });
    expect(recover(40)).toMatchObject({ position: 40, given: [], usedIdx: 40 });
  });

  it("BI-321: what is in flight is given back, length 0, in the order in which it was taken", () => {
    leave({ usedIdx: 65534, inFlight: { 1: 9n, 5: 7n, 2: 8n } });
    expect(recover(65534)).toEqual({
      position: 1,
      given: [5, 2, 1].map((id) => ({ id, length: 0 })),
      marks: NONE,
      usedIdx: 1,
    });
  });

  it("BI-319: killed between the used index and the marks of a batch: that batch is not given back again", () => {
    leave({ usedIdx: 10, lastBatchHead: 3, next: { 3: 6, 6: 0 }, inFlight: { 3: 1n, 6: 2n, 4: 3n } });
    expect(recover(12)).toMatchObject({ position: 13, given: [{ id: 4 }], marks: NONE, usedIdx: 13 });
  });

  it("so it is when the marks were cleared and the region's used index was not", () => {
    leave({ usedIdx: 10, lastBatchHead: 3, next: { 3: 6, 6: 0 }, inFlight: { 4: 3n } });
    expect(recover(12)).toMatchObject({ position: 13, given: [{ id: 4 }], marks: NONE });
  });

  it("this recovery, killed at any of its own steps, is done again or known to be done", () => {
    const inFlight = { 1: 9n, 5: 7n, 2: 8n };
    const next = { 5: 0, 2: 5, 1: 2 };
    const again = { position: 23, given: [5, 2, 1].map((id) => ({ id, length: 0 })), marks: NONE, usedIdx: 23 };
    const done = { position: 23, given: [], marks: NONE, usedIdx: 23 };
    leave({ usedIdx: 20, inFlight, next });
    expect(recover(20), "entries linked").toMatchObject(again);
    leave({ usedIdx: 20, inFlight, next, lastBatchHead: 1 });
    expect(recover(20), "last batch named").toMatchObject(again);
    leave({ usedIdx: 20, inFlight, next, lastBatchHead: 1 });
    expect(recover(23), "published").toMatchObject(done);
    leave({ usedIdx: 20, inFlight: { 5: 7n }, next, lastBatchHead: 1 });
    expect(recover(23), "some marks cleared").toMatchObject(done);
    leave({ usedIdx: 20, inFlight: {}, next, lastBatchHead: 1 });
    expect(recover(23), "all marks cleared").toMatchObject(done);
  });

  it.each([
    ["version 2", { version: 2, usedIdx: 10, inFlight: { 1: 1n } }],
    ["features", { features: 1n, usedIdx: 10, inFlight: { 1: 1n } }],
  ])("BI-142: a region with %s is not used and not touched", (_name, left) => {
    leave(left);
    const before = region(BYTES);
    expect(() => recover(10)).toThrow(/only version 1 is known/);
    expect(region(BYTES)).toEqual(before);
    expect(given(10, ring.getUint16(2, true))).toEqual([]);
  });

  it("BI-143: the number of entries that the region names is not believed", () => {
    leave({ descNum: 65535, usedIdx: 0, inFlight: { 7: 1n } });
    expect(recover(0)).toMatchObject({ given: [{ id: 7 }] });
  });

  it.each([
    ["the head of the last batch", { usedIdx: 10, lastBatchHead: 8, inFlight: { 1: 1n } }],
    ["a link", { usedIdx: 10, lastBatchHead: 3, next: { 3: 65535 }, inFlight: { 1: 1n } }],
  ])("BI-144: %s out of range: nothing is given back, the region is made sound", (_name, left) => {
    leave(left);
    expect(recover(12)).toMatchObject({ position: 12, given: [], marks: NONE, usedIdx: 12, complaint: /./ });
    expect(recover(12)).toEqual({ position: 12, given: [], marks: NONE, usedIdx: 12 });
  });

  it("BI-146: everything in flight: each entry once", () => {
    leave({ usedIdx: 0, inFlight: Object.fromEntries(NONE.map((_, i) => [i, BigInt(SIZE - i)])) });
    expect(recover(0).given.map(({ id }) => id)).toEqual([7, 6, 5, 4, 3, 2, 1, 0]);
  });

  it("BI-147: equal counters go by index, and the largest is the last", () => {
    leave({ usedIdx: 0, inFlight: { 6: 5n, 0: 2n ** 64n - 1n, 3: 5n, 2: 2n ** 63n } });
    expect(recover(0).given.map(({ id }) => id)).toEqual([3, 6, 2, 0]);
  });

  it("BI-149: a used index more than a ring away: nothing is given back, the region follows the ring", () => {
    leave({ usedIdx: 100, inFlight: { 1: 1n } });
    expect(recover(109)).toMatchObject({ position: 109, given: [], marks: NONE, usedIdx: 109, complaint: /behind/ });
  });

  it("BI-148: somebody who scribbles over the region meanwhile: no buffer is given back twice", async () => {
    const scribbler = new Worker(
      `const { writeSync } = require("node:fs");
       const { workerData } = require("node:worker_threads");
       const { fd, from, to, stop } = workerData;
       while (Atomics.load(stop, 0) === 0) {
         const at = from + Math.floor(Math.random() * (to - from));
         writeSync(fd, Uint8Array.of(Math.random() * 256), 0, 1, at);
       }`,
      { eval: true, workerData: { fd, from: Number(OFFSET) + 10, to: Number(OFFSET) + BYTES, stop: stopFlag } },
    );
    await once(scribbler, "online");
    try {
      for (let round = 0; round < 2000; round++) {
        leave({ usedIdx: 10, lastBatchHead: 3, next: { 3: 6 }, inFlight: { 0: 1n, 3: 1n, 4: 3n, 6: 2n, 7: 9n } });
        const { given: found } = recover(12);
        expect(new Set(found.map(({ id }) => id)).size).toBe(found.length);
        expect(found.every(({ id, length }) => id < SIZE && length === 0)).toBe(true);
      }
    } finally {
      Atomics.store(stopFlag, 0, 1);
      await once(scribbler, "exit");
    }
  });

  it.each([2n ** 53n, 2n ** 53n - 64n, 2n ** 63n])(
    "a part at offset %d is refused: it is written to by numbers",
    (offset) => {
      place = { fd, offset };
      expect(() => recover(0)).toThrow(/less than 2\^53/);
    },
  );

  it("a file that has become shorter is refused, whatever is missing", () => {
    close(fd);
    fd = memfdCreate("inflight", Number(OFFSET) + BYTES - 1);
    place = { fd, offset: OFFSET };
    expect(() => recover(0)).toThrow(/shorter/);
  });
});

describe("PROTOCOL, 17: packed rings", () => {
  const BYTES = L.INFLIGHT_PACKED_ENTRIES + SIZE * L.INFLIGHT_PACKED_ENTRY_SIZE;
  const entryAt = (index: number) => L.INFLIGHT_PACKED_ENTRIES + index * L.INFLIGHT_PACKED_ENTRY_SIZE;

  interface Chain {
    head: number;
    last: number;
    num: number;
    id: number;
    counter: bigint;
  }

  interface Left {
    /** [new, old], as the header has them. */
    position: [number, number];
    free?: [number, number];
    next?: Record<number, number>;
    chains?: Chain[];
    version?: number;
  }

  function leave({ position, free = [SIZE, SIZE], next = {}, chains = [], version = 1 }: Left): void {
    const view = region(BYTES);
    new Uint8Array(view.buffer).fill(0);
    view.setUint16(L.INFLIGHT_VERSION, version, true);
    view.setUint16(L.INFLIGHT_PACKED_FREE_HEAD, free[0], true);
    view.setUint16(L.INFLIGHT_PACKED_OLD_FREE_HEAD, free[1], true);
    view.setUint16(L.INFLIGHT_PACKED_USED_IDX, position[0] & 0x7fff, true);
    view.setUint16(L.INFLIGHT_PACKED_OLD_USED_IDX, position[1] & 0x7fff, true);
    view.setUint8(L.INFLIGHT_PACKED_USED_WRAP, position[0] >> 15);
    view.setUint8(L.INFLIGHT_PACKED_OLD_USED_WRAP, position[1] >> 15);
    for (let i = 0; i < SIZE; i++) view.setUint16(entryAt(i) + L.INFLIGHT_PACKED_NEXT, next[i] ?? i + 1, true);
    for (const { head, last, num, id, counter } of chains) {
      view.setUint8(entryAt(head), 1);
      view.setUint16(entryAt(head) + L.INFLIGHT_PACKED_LAST, last, true);
      view.setUint16(entryAt(head) + L.INFLIGHT_PACKED_NUM, num, true);
      view.setBigUint64(entryAt(head) + L.INFLIGHT_PACKED_COUNTER, counter, true);
      view.setUint16(entryAt(last % SIZE) + L.INFLIGHT_PACKED_ID, id, true);
    }
    writeRegion(view);
  }

  /** The driver has made `count` slots available from a position on; before it everything was used. */
  function makeAvailable(from: number, count: number): void {
    for (let i = 0; i < SIZE; i++) {
      const position = slotAfter(from, i);
      const wrap = position >> 15;
      const flags = i < count ? (wrap ? AVAIL : USED) : wrap ? 0 : AVAIL | USED;
      ring.setUint16((position & 0x7fff) * 16 + 14, flags, true);
    }
  }

  function slotAfter(position: number, count: number): number {
    const index = (position & 0x7fff) + count;
    return index < SIZE ? position + count : makePosition(index - SIZE, 1 - (position >> 15));
  }

  /** What the driver finds used, from a position on: buffer id and slots that look used, for each slot. */
  function used(from: number, count: number) {
    return Array.from({ length: count }, (_, i) => {
      const position = slotAfter(from, i);
      const at = (position & 0x7fff) * 16;
      const flags = ring.getUint16(at + 14, true);
      const bits = position >> 15 ? AVAIL | USED : 0;
      return { id: ring.getUint16(at + 12, true), length: ring.getUint32(at + 8, true), isUsed: flags === bits };
    });
  }

  function recover(base = 0x8000) {
    const recovery = recoverPacked(place, SIZE, new DataView(ring.buffer, 0, SIZE * 16), base);
    const view = region(BYTES);
    const header = (index: number, wrap: number) => makePosition(view.getUint16(index, true), view.getUint8(wrap));
    return {
      ...recovery,
      marks: Array.from({ length: SIZE }, (_, i) => view.getUint8(entryAt(i))),
      header: [
        header(L.INFLIGHT_PACKED_USED_IDX, L.INFLIGHT_PACKED_USED_WRAP),
        header(L.INFLIGHT_PACKED_OLD_USED_IDX, L.INFLIGHT_PACKED_OLD_USED_WRAP),
      ],
      free: [view.getUint16(L.INFLIGHT_PACKED_FREE_HEAD, true), view.getUint16(L.INFLIGHT_PACKED_OLD_FREE_HEAD, true)],
    };
  }

  const NONE = Array(SIZE).fill(0);
  const CHAINS = [
    { head: 0, last: 1, num: 2, id: 70, counter: 11n },
    { head: 2, last: 2, num: 1, id: 71, counter: 10n },
  ];

  it("a fresh region is made version 1 with all entries free; the base counts if the ring does not belie it", () => {
    makeAvailable(makePosition(3, 1), 0);
    expect(recover(makePosition(3, 1))).toMatchObject({ position: makePosition(3, 1), free: [0, 0], marks: NONE });
    const view = region(BYTES);
    expect(view.getUint16(L.INFLIGHT_VERSION, true)).toBe(1);
    expect(NONE.map((_, i) => view.getUint16(entryAt(i) + L.INFLIGHT_PACKED_NEXT, true))).toEqual(
      NONE.map((_, i) => i + 1),
    );
  });

  it("with nothing in flight the ring goes on where the region says", () => {
    const at = makePosition(5, 0);
    makeAvailable(at, 3);
    leave({ position: [at, at], free: [0, 0] });
    expect(recover(0x8000)).toMatchObject({ position: at, header: [at, at] });
  });

  it("a driver that began anew, with a region from before: the ring belies it", () => {
    makeAvailable(0x8000, 4);
    leave({ position: [makePosition(5, 1), makePosition(5, 1)], free: [0, 0] });
    expect(recover(0x8000)).toMatchObject({ position: 0x8000, header: [0x8000, 0x8000] });
  });

  it("BI-321: what is in flight is given back, length 0, in the order in which it was taken, through the ring's end", () => {
    const at = makePosition(7, 1);
    const after = makePosition(2, 0);
    makeAvailable(at, 5);
    leave({ position: [at, at], free: [3, 3], chains: CHAINS });
    expect(recover()).toEqual({ position: after, header: [after, after], marks: NONE, free: [0, 0] });
    expect(used(at, 4)).toMatchObject([
      { id: 71, length: 0, isUsed: true },
      { id: 70, length: 0, isUsed: true },
      { isUsed: true },
      { isUsed: false },
    ]);
    const view = region(BYTES);
    const next = (index: number) => view.getUint16(entryAt(index) + L.INFLIGHT_PACKED_NEXT, true);
    expect([next(1), next(2)], "the free list has them again").toEqual([2, 3]);
  });

  it("BI-319: a header that is ahead counts if the descriptor was written, and not if it was not", () => {
    const old = makePosition(2, 1);
    const now = makePosition(4, 1);
    const left: Left = { position: [now, old], free: [0, 3], next: { 1: 3 }, chains: CHAINS };
    makeAvailable(old, 3);
    leave(left);
    expect(recover(), "not written").toMatchObject({ position: makePosition(5, 1), marks: NONE });
    makeAvailable(now, 1);
    leave(left);
    expect(recover(), "written").toMatchObject({ position: makePosition(5, 1), marks: NONE });
    expect(used(now, 1)).toEqual([{ id: 71, length: 0, isUsed: true }]);
  });

  it("this recovery, killed at any of its own steps, is done again or known to be done", () => {
    const old = makePosition(2, 1);
    const now = makePosition(5, 1);
    const done = { position: now, header: [now, now], marks: NONE, free: [0, 0] };
    const next = { 1: 2, 2: 3 };
    makeAvailable(old, 3);
    leave({ position: [old, old], free: [3, 3], next, chains: CHAINS });
    expect(recover(), "entries linked").toEqual(done);
    makeAvailable(old, 3);
    leave({ position: [now, old], free: [0, 3], next, chains: CHAINS });
    expect(recover(), "header ahead").toEqual(done);
    makeAvailable(old, 3);
    for (const slot of [3, 4]) ring.setUint16(slot * 16 + 14, AVAIL | USED, true);
    leave({ position: [now, old], free: [0, 3], next, chains: CHAINS });
    expect(recover(), "all but the first slot written").toEqual(done);
    expect(used(old, 3).map(({ id }) => id)).toMatchObject([71, 70, expect.any(Number)]);
    makeAvailable(now, 0);
    leave({ position: [now, old], free: [0, 3], next, chains: CHAINS });
    expect(recover(), "published").toEqual(done);
    leave({ position: [now, old], free: [0, 3], next, chains: CHAINS.slice(1) });
    expect(recover(), "some marks cleared").toEqual(done);
    leave({ position: [now, old], free: [0, 3], next });
    expect(recover(), "all marks cleared").toEqual(done);
    expect(used(now, 1)).toMatchObject([{ isUsed: false }]);
  });

  it.each([
    ["a used index that the ring does not have", { position: [8, 0x8000] as [number, number], chains: CHAINS }],
    [
      "a chain that ends outside",
      { position: [0x8000, 0x8000] as [number, number], chains: [{ ...CHAINS[0]!, last: 9 }] },
    ],
    ["a chain without slots", { position: [0x8000, 0x8000] as [number, number], chains: [{ ...CHAINS[0]!, num: 0 }] }],
    [
      "more slots than the ring has",
      { position: [0x8000, 0x8000] as [number, number], chains: CHAINS.map((chain) => ({ ...chain, num: 5 })) },
    ],
  ])("BI-144: %s: nothing is given back, the region is made anew", (_name, left) => {
    makeAvailable(0x8000, 8);
    leave(left);
    expect(recover()).toMatchObject({ position: 0x8000, marks: NONE, header: [0x8000, 0x8000], complaint: /./ });
    expect(used(0x8000, 1)).toMatchObject([{ isUsed: false }]);
    expect(recover()).not.toHaveProperty("complaint");
  });

  it("BI-144: a free list in a circle ends", () => {
    makeAvailable(0x8000, 8);
    leave({ position: [0x8000, 0x8000], free: [4, 4], next: { 4: 5, 5: 4 }, chains: CHAINS });
    expect(recover()).toMatchObject({ position: makePosition(3, 1), marks: NONE });
  });

  it("BI-142: a region of version 2 is not used and not touched", () => {
    leave({ version: 2, position: [0x8000, 0x8000], chains: CHAINS });
    const before = region(BYTES);
    expect(() => recover()).toThrow(/only version 1 is known/);
    expect(region(BYTES)).toEqual(before);
  });
});
