/**
 * Drivers that break the rules, of a lane with a file at one end: bad chains come back used with length 0, good ones
 * before, between and behind them work, a ring without sense is broken; and the kernel is never asked for anything else.
 */
import { describe, expect, test } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { instantiateCore } from "../../src/datapath/core.ts";
import { Lane } from "../../src/datapath/lane.ts";
import { VRING_ENABLED, VRING_MERGEABLE } from "../../src/layout/lane.ts";
import { FRAME_BYTES_MAX } from "../../src/layout/lane.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { frameOf } from "./chains.ts";
import { FakeKernel } from "./file-kernel.ts";
import { type FileDirection, FileLane, inFile } from "./file-world.ts";
import { RawPacked, availableAt } from "./raw-packed.ts";
import { INDIRECT, NEXT, type RawRing, WRITE } from "./raw-ring.ts";
import { RawSplit } from "./raw-split.ts";
import { advance } from "./reference-packed.ts";
import { type Ring, ringAt } from "./rig.ts";

const [RING, DATA, HOLE, TOP] = [0x10_0000n, 0x1_0000_0000n, 0x8000_0000n, 0xffff_ffff_ffff_ffffn];
const DATA_END = DATA + 0x1_0000n;
/** Where the good buffers of a test are. */
const GOOD = DATA + 0x8000n;
const SIZE = 16;

class Scene {
  readonly lane: FileLane;
  readonly raw: RawRing;
  readonly flags: number;
  /** What the device has or had, of good chains. */
  readonly #allowed: { gpa: bigint; len: number }[] = [];
  #goods = 0;

  constructor(direction: FileDirection, packed: boolean, ring: Partial<Ring> = {}) {
    this.flags = direction === "receive" ? WRITE : 0;
    this.lane = new FileLane({
      direction,
      variant: "hooked",
      allows: (gpa, length) =>
        this.#allowed.some((part) => gpa >= part.gpa && gpa + BigInt(length) <= part.gpa + BigInt(part.len)),
      end: {
        regions: [
          { gpa: RING, sizeBytes: 0x1000 },
          { gpa: DATA, sizeBytes: 0x1_0000 },
        ],
        ring: ringAt(RING, SIZE, { packed, eventIdx: false, ...ring }),
      },
    });
    this.raw = packed ? new RawPacked(this.lane.ram, this.lane.ring) : new RawSplit(this.lane.ram, this.lane.ring);
  }

  get drops() {
    return this.lane.rig.counters.drops;
  }

  /** A good chain of one descriptor, number 8 and up. */
  good(len: number): number {
    const head = 8 + (this.#goods++ % 8);
    const gpa = GOOD + BigInt(0x800 * (head - 8));
    this.raw.describe(head, { gpa, len, flags: this.flags });
    this.#allowed.push({ gpa, len });
    this.raw.offer(head);
    return head;
  }

  /** Writes frame number `sequence` to the buffer of the good chain offered next. */
  fill(sequence: number, length: number): Uint8Array {
    const frame = inFile(new Uint8Array(12), frameOf(sequence, length));
    this.lane.ram.slice(GOOD + BigInt(0x800 * (this.#goods % 8)), frame.length).set(frame);
    return frame;
  }

  give(...lengths: number[]): Uint8Array[] {
    const frames = lengths.map((length, i) => inFile(new Uint8Array(12), frameOf(i, length)));
    this.lane.kernel.queue.push(...frames);
    return frames;
  }

  content(head: number, length: number): Uint8Array {
    const bytes = this.lane.ram.slice(GOOD + BigInt(0x800 * (head - 8)), length).slice();
    bytes.fill(0, 10, 12);
    return bytes;
  }
}

type Lay = (scene: Scene) => void;
/** Chains at head 0 that must be refused whole. */
const bad: [name: string, lay: Lay, ring?: Partial<Ring>][] = [
  ["not mapped", ({ raw, flags }) => raw.describe(0, { gpa: HOLE, len: 2048, flags })],
  ["across the end of RAM", ({ raw, flags }) => raw.describe(0, { gpa: DATA_END - 100n, len: 101, flags })],
  ["far too long", ({ raw, flags }) => raw.describe(0, { gpa: DATA, len: 0xffff_ffff, flags })],
  ["wraps 64 bits", ({ raw, flags }) => raw.describe(0, { gpa: TOP - 31n, len: 64, flags })],
  ["wrong direction", ({ raw, flags }) => raw.describe(0, { gpa: DATA, len: 100, flags: flags ^ WRITE })],
  [
    "wrong direction behind good bytes",
    ({ raw, flags }) => {
      raw.describe(0, { gpa: DATA, len: 100, flags: flags | NEXT, next: 1 });
      raw.describe(1, { gpa: DATA + 256n, len: 100, flags: flags ^ WRITE });
    },
  ],
  [
    "a hole behind good bytes",
    ({ raw, flags }) => {
      raw.describe(0, { gpa: DATA, len: 100, flags: flags | NEXT, next: 1 });
      raw.describe(1, { gpa: HOLE, len: 100, flags });
    },
  ],
  ["a table in a hole", ({ raw }) => raw.describe(0, { gpa: HOLE, len: 32, flags: INDIRECT })],
  ["a table of 17 bytes", ({ raw }) => raw.describe(0, { gpa: DATA, len: 17, flags: INDIRECT })],
  [
    "a table without the feature",
    ({ raw }) => raw.describe(0, { gpa: DATA, len: 16, flags: INDIRECT }),
    { indirect: false },
  ],
  [
    "a table in a table",
    ({ raw, flags }) => {
      raw.write(DATA, { gpa: DATA + 64n, len: 16, flags: flags | INDIRECT });
      raw.describe(0, { gpa: DATA, len: 16, flags: INDIRECT });
    },
  ],
];
/** Of split rings alone. */
const loops: typeof bad = [
  ["a loop", ({ raw, flags }) => raw.describe(0, { gpa: DATA, len: 8, flags: flags | NEXT, next: 0 })],
  ["next beyond the ring", ({ raw, flags }) => raw.describe(0, { gpa: DATA, len: 8, flags: flags | NEXT, next: SIZE })],
];
const cases = [false, true].flatMap((packed) =>
  [...bad, ...(packed ? [] : loops)].map(([name, lay, ring = {}]) => ({ name, lay, ring, packed })),
);

describe.each(cases)("$name, packed $packed", ({ lay, ring, packed }) => {
  test.each([12, 10])("sent between good chains, header of %i", (headerBytes) => {
    const scene = new Scene("send", packed, { ...ring, headerBytes, mergeable: headerBytes === 12 });
    lay(scene);
    const heads: number[] = [];
    const goodLength = 600;
    for (let i = 0; i < 2; i++) {
      scene.fill(i, goodLength);
      heads.push(scene.good(headerBytes + goodLength));
      scene.raw.offer(0);
      heads.push(0);
    }
    scene.fill(2, goodLength);
    heads.push(scene.good(headerBytes + goodLength));
    let count = 0;
    for (let turn = 0; turn < 4; turn++) {
      const result = scene.lane.turn();
      expect(result.broke).toBe(false);
      count += result.count;
    }
    expect(count).toBe(5);
    expect(scene.raw.used()).toEqual(heads.map((id) => ({ id, len: 0 })));
    expect(scene.drops.malformed).toBe(2);
    expect(scene.lane.kernel.passed.length).toBe(3);
  });

  test.each([12, 10])("for receiving between good chains, header of %i", (headerBytes) => {
    const scene = new Scene("receive", packed, { ...ring, headerBytes, mergeable: headerBytes === 12 });
    lay(scene);
    scene.raw.offer(0, 0);
    const heads = [scene.good(200)];
    scene.raw.offer(0);
    heads.push(scene.good(200), scene.good(200));
    const frames = scene.give(60, 61, 62);
    for (let turn = 0; turn < 4; turn++) {
      scene.lane.reads = 64;
      expect(scene.lane.turn().broke).toBe(false);
    }
    const [first, second, third] = heads as [number, number, number];
    const used = [0, 0, first, 0, second, third];
    const lengths = [0, 0, 60, 0, 61, 62].map((length) => length && length + headerBytes);
    expect(scene.raw.used()).toEqual(used.map((id, i) => ({ id, len: lengths[i] })));
    expect(scene.lane.rig.counters).toMatchObject({ packets: 3, malformedBuffers: 3 });
    if (headerBytes === 12) {
      for (const [i, head] of heads.entries()) expect(scene.content(head, 72 + i)).toEqual(frames[i]);
    }
  });

  test("for receiving while frames are held: only good buffers are used", () => {
    const scene = new Scene("receive", packed, ring);
    lay(scene);
    for (let i = 0; i < 2; i++) scene.good(100);
    scene.give(60, 1000, 61);
    for (let turn = 0; turn < 3; turn++) scene.lane.turn();
    expect(scene.lane.isHolding).toBe(true);
    expect(scene.lane.rig.counters.packets).toBe(1);
    scene.raw.offer(0);
    expect(scene.lane.turn()).toMatchObject({ count: 0, broke: false });
    // A frame's chains are neighbours: the one before the bad one comes back empty as well.
    expect(scene.raw.used().map(({ len }) => len)).toEqual([72, 0, 0]);
    for (let i = 0; i < 3; i++) scene.good(600);
    for (let turn = 0; turn < 3; turn++) scene.lane.turn();
    expect(scene.raw.used().map(({ len }) => len)).toEqual([600, 412, 73]);
    expect(scene.lane.rig.counters).toMatchObject({ packets: 3, malformedBuffers: 1 });
  });
});

describe("split rings without sense", () => {
  test.each(["send", "receive"] as const)(
    "a head beyond the ring (%s): what comes before it still goes",
    (direction) => {
      const scene = new Scene(direction, false);
      scene.fill(0, 100);
      scene.good(112);
      scene.raw.offer(SIZE);
      scene.give(100, 100, 100);
      let broke = 0;
      for (let turn = 0; turn < 5; turn++) broke += scene.lane.turn().broke ? 1 : 0;
      expect(broke).toBe(1);
      expect(scene.raw.used().length).toBe(1);
      expect(scene.lane.rig.lane.isBroken(scene.lane.end)).toBe(true);
      expect(scene.lane.turn()).toMatchObject({ requests: 0, count: 0, fileWaits: false, broke: false });
      expect(scene.lane.arm()).toBe(false);
      scene.lane.rig.core.disarm();
    },
  );

  test.each(["send", "receive"] as const)("an avail index that is too far (%s)", (direction) => {
    const scene = new Scene(direction, false);
    (scene.raw as RawSplit).availIdx = SIZE + 1;
    scene.give(100);
    expect(scene.lane.turn()).toMatchObject({ requests: 0, broke: true });
    expect(scene.lane.turn()).toMatchObject({ requests: 0, broke: false });
  });

  test("a receiveq that breaks while frames are held, then is started anew: they are forgotten", () => {
    const scene = new Scene("receive", false);
    scene.good(100);
    scene.give(60, 1000);
    scene.lane.turn();
    scene.good(100);
    scene.lane.turn();
    expect(scene.lane.isHolding).toBe(true);
    scene.raw.offer(SIZE);
    expect(scene.lane.turn()).toMatchObject({ broke: true, count: 0, fileWaits: false });
    for (let turn = 0; turn < 3; turn++) {
      expect(scene.lane.turn()).toMatchObject({ requests: 0, count: 0, broke: false, fileWaits: false });
    }
    const raw = new RawSplit(scene.lane.ram, scene.lane.ring);
    scene.lane.restart(0);
    expect(scene.lane.isHolding).toBe(false);
    raw.describe(0, { gpa: GOOD, len: 100, flags: WRITE });
    raw.offer(0);
    scene.lane.kernel.queue.length = 0;
    const [frame] = scene.give(50);
    expect(scene.lane.turn()).toMatchObject({ requests: 1, count: 1 });
    expect(raw.used()).toEqual([{ id: 0, len: 62 }]);
    expect(scene.content(8, 62)).toEqual(frame);
  });
});

describe("packed rings without sense", () => {
  test.each(["send", "receive"] as const)("a chain without an end (%s)", (direction) => {
    const scene = new Scene(direction, true);
    scene.fill(0, 100);
    scene.good(112);
    for (let i = 0; i < SIZE - 1; i++) {
      scene.raw.describe(i, { gpa: DATA, len: 8, flags: scene.flags | NEXT, next: (i + 1) % (SIZE - 1) });
    }
    scene.raw.offer(0);
    scene.give(100, 100, 100);
    let broke = 0;
    for (let turn = 0; turn < 5; turn++) broke += scene.lane.turn().broke ? 1 : 0;
    expect(broke).toBe(1);
    expect(scene.raw.used().length).toBe(1);
  });

  test("more chains than the ring has slots: each read gets buffers of its own choice, nothing stray happens", () => {
    const size = 4;
    const ring = ringAt(RING, size, { packed: true, eventIdx: false });
    // As soon as a slot was read it is made available for the next lap.
    const lane: FileLane = new FileLane({
      direction: "receive",
      variant: "hooked",
      observe: ({ kind, gpa }) => {
        if (kind !== "load" || gpa < RING || gpa >= RING + 16n * BigInt(size) || (gpa - RING) % 16n !== 0n) return;
        const at = lane.ram.at(gpa);
        const flags = lane.ram.view.getUint16(at + 14, true);
        lane.ram.view.setUint16(at + 14, flags ^ 0x8080, true);
      },
      end: {
        regions: [
          { gpa: RING, sizeBytes: 0x1000 },
          { gpa: DATA, sizeBytes: 0x1_0000 },
        ],
        ring,
      },
    });
    const raw = new RawPacked(lane.ram, ring);
    for (let i = 0; i < 200; i++)
      lane.kernel.queue.push(inFile(new Uint8Array(12), frameOf(i, i % 7 === 6 ? 5000 : 60)));
    for (let turn = 0; turn < 60; turn++) {
      let position = lane.rig.lane.nextAvail("destination");
      for (let i = 0; i < size; i++, position = advance(position, 1, size)) {
        const flags = WRITE | availableAt(position) | (turn % 3 === 0 && i % 2 === 1 ? NEXT : 0);
        raw.put(position, { gpa: DATA + BigInt(1000 * i), len: 100, id: i, flags });
      }
      lane.reads = turn % 2 ? 64 : 1;
      expect(lane.turn().requests).toBeLessThanOrEqual(64);
      lane.arm();
    }
    expect(lane.rig.counters.packets).toBeGreaterThan(4);
  });
});

describe("buffers of nearly 4 GiB, in a guest of 8", () => {
  const GIB = 1n << 30n;
  test.each([
    [12, VRING_ENABLED | VRING_MERGEABLE],
    [12, VRING_ENABLED],
    [10, VRING_ENABLED],
  ])("header of %i, flags %i", (headerBytes, flags) => {
    const fd = memfdCreate("large", 8n * GIB);
    const guest = new GuestMemory();
    guest.setRegions([{ gpa: 0n, sizeBytes: 8n * GIB, mmapOffset: 0n, fd }]);
    close(fd);
    const bytes = new Uint8Array(guest.segments[0]!.buffer, Number(guest.extents[0]!.offset), 0x10_0000);
    const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
    const buffer = 0x1_0000;
    const area = (gpa: bigint, length: bigint) => guest.locate(gpa, length)!;
    const lane = new Lane("large");
    lane.setFile("source");
    lane.setFileFrames(FRAME_BYTES_MAX);
    lane.setVring("destination", {
      start: Symbol("start"),
      size: 4,
      base: 0,
      desc: area(0n, 64n),
      avail: area(64n, 14n),
      used: area(128n, 38n),
      headerBytes,
      flags,
      kick: undefined,
      call: undefined,
      err: undefined,
    });
    lane.setExtents("destination", guest.extents);
    const core = instantiateCore(lane.memory, guest.segments, guest.segments);
    core.refresh();
    const kernel = new FakeKernel({
      memory: lane.memory,
      guest,
      direction: "receive",
      layout: "io_uring",
      allows: () => true,
    });
    const turn = () => {
      const requests = core.prepare(64);
      if (requests !== 0) kernel.submit(requests);
      core.finish();
      return requests;
    };
    const post = (index: number, length: number) => {
      view.writeBigUInt64LE(BigInt(buffer), 16 * (index % 4));
      view.writeUInt32LE(length, 16 * (index % 4) + 8);
      view.writeUInt16LE(WRITE, 16 * (index % 4) + 12);
      view.writeUInt16LE(index % 4, 64 + 4 + 2 * (index % 4));
      view.writeUInt16LE(index + 1, 64 + 2);
    };
    let posted = 0;
    for (const length of [0xffff_ffff, 0xffff_fffe, 0xffff_fffd, 0xffff_fff0]) {
      for (const size of [14, 1000, 65_600]) {
        const frame = inFile(Uint8Array.of(0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0), frameOf(posted, size));
        kernel.queue.push(frame);
        // the second one behind a small one that does not do, where they are merged
        if (flags & VRING_MERGEABLE && size > 200 && posted % 2 === 1) post(posted++, 100);
        post(posted++, length);
        for (let i = 0; i < 3; i++) turn();
        const entry = 128 + 4 + 8 * ((posted - 1) % 4);
        expect(view.readUInt16LE(128 + 2)).toBe(posted);
        const isMerged = size > 200 && view.readUInt32LE(entry + 4) !== headerBytes + size;
        if (!isMerged) {
          expect(view.readUInt32LE(entry + 4)).toBe(headerBytes + size);
          const got = view.subarray(buffer + headerBytes, buffer + headerBytes + size);
          expect(Buffer.compare(got, frame.subarray(12))).toBe(0);
        } else expect(view.readUInt32LE(entry + 4)).toBe(headerBytes + size - 100);
      }
    }
    expect(lane.counters).toMatchObject({ packets: 12, malformedBuffers: 0, drops: { tooSmall: 0 } });
  });
});
