/**
 * How a lane with a file goes to guest memory: each word is loaded once for each use, whatever changes between two accesses
 * the kernel is never asked to touch anything but the guest's memory, and of what is sent the core reads nothing.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { OFFLOAD_CSUM } from "../../src/layout/lane.ts";
import { frameOf } from "./chains.ts";
import { type Answer, EAGAIN } from "./file-kernel.ts";
import { type FileDirection, FileLane, inFile } from "./file-world.ts";
import type { Access } from "./hooked-core.ts";
import { RawPacked } from "./raw-packed.ts";
import { INDIRECT, NEXT, type RawRing, WRITE } from "./raw-ring.ts";
import { RawSplit } from "./raw-split.ts";
import { type Ring, ringAt } from "./rig.ts";
import { runs } from "./runs.ts";

const [RING, DATA] = [0x10_0000n, 0x1_0000_0000n];
const SEAM = DATA + 0x4000n;
const RAM_END = SEAM + 0x4000n;

interface Scene {
  lane: FileLane;
  raw: RawRing;
  /** Makes chains of all kinds available, as far as there is room. */
  offer: () => void;
}

function scene(
  direction: FileDirection,
  packed: boolean,
  observe: (access: Access) => void,
  ring: Partial<Ring> = {},
): Scene {
  const size = 8;
  const lane = new FileLane({
    direction,
    variant: "hooked",
    observe,
    end: {
      regions: [
        { gpa: RING, sizeBytes: 0x1000 },
        { gpa: DATA, sizeBytes: 0x4000 },
        { gpa: SEAM, sizeBytes: 0x4000 },
      ],
      ring: ringAt(RING, size, { packed, eventIdx: false, ...ring }),
    },
  });
  const raw = packed ? new RawPacked(lane.ram, lane.ring) : new RawSplit(lane.ram, lane.ring);
  const flags = direction === "receive" ? WRITE : 0;
  // a table that crosses two files, with a buffer that does
  raw.write(SEAM - 20n, { gpa: DATA, len: 5, flags: packed ? flags : flags | NEXT, next: 1 });
  raw.write(SEAM - 4n, { gpa: SEAM - 150n, len: 400, flags });
  raw.describe(0, { gpa: SEAM - 20n, len: 32, flags: INDIRECT });
  raw.describe(1, { gpa: DATA + 256n, len: 20, flags: flags | NEXT, next: 2 });
  raw.describe(2, { gpa: DATA + 1024n, len: 300, flags });
  raw.describe(3, { gpa: DATA + 2048n, len: 300, flags });
  raw.describe(4, { gpa: DATA + 4096n, len: 64, flags });
  const offer = () => {
    for (const head of [3, 0, 1, 4]) {
      if (!(raw instanceof RawPacked) || raw.free >= (head === 1 ? 2 : 1)) raw.offer(head);
    }
  };
  return { lane, raw, offer };
}

const cases = (["send", "receive"] as const).flatMap((direction) =>
  [false, true].map((packed) => ({ direction, packed })),
);

function give({ kernel }: FileLane, ...lengths: number[]): void {
  for (const length of lengths) kernel.queue.push(inFile(new Uint8Array(12), frameOf(length, length)));
}

describe.each(cases)("$direction, packed $packed", ({ direction, packed }) => {
  test("each descriptor word and avail entry is loaded once in a turn", () => {
    for (const headerBytes of [10, 12]) {
      const seen: Access[] = [];
      const { lane, offer } = scene(direction, packed, (access) => seen.push(access), {
        headerBytes,
        mergeable: headerBytes === 12,
      });
      offer();
      give(lane, 40, 40, 40, 40, 40, 40);
      for (let turn = 0; turn < 3; turn++) {
        seen.length = 0;
        lane.reads = 64;
        lane.turn();
        const words = seen.filter(({ kind, gpa, atomic, bytes }) => {
          const isDescriptor = gpa >= lane.ring.desc && gpa < lane.ring.desc + 16n * 8n;
          const isTable = gpa >= SEAM - 20n && gpa < SEAM + 12n;
          const isHead = !packed && gpa >= lane.ring.avail + 4n && gpa < lane.ring.avail + 20n;
          // of a packed slot that is not available yet only the flags count
          return kind === "load" && (isTable || isHead || (isDescriptor && !(packed && atomic && bytes === 2)));
        });
        const looked = words.map(({ gpa, bytes }) => `${gpa} ${bytes}`);
        // What is behind the last request is looked at by the next turn again; here each chain leads somewhere else.
        expect(looked.filter((each, i) => looked.indexOf(each) !== i)).toEqual([]);
      }
      expect(lane.rig.counters.packets).toBeGreaterThan(0);
    }
  });

  test(
    "whatever changes before any load: no stray access or request, no hang, no exception",
    { timeout: 120_000 },
    () => {
      const word = fc.oneof(
        fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
        fc.constantFrom(0n, 1n, 2n, 3n, 4n, 5n, 0xffffn, 0x8000n, DATA, SEAM - 7n, RAM_END - 1n, 0xffff_ffffn),
        fc
          .tuple(fc.constantFrom(0n, 1n, 16n, 48n, 100n, 0xffff_ffffn), fc.nat(7), fc.nat(3))
          .map(([len, flags, next]) => {
            const high = packed ? (BigInt(flags | (next % 2 ? 0x80 : 0x8000)) << 48n) | (BigInt(next) << 32n) : 0n;
            return len | (packed ? high : (BigInt(flags) << 32n) | (BigInt(next) << 48n));
          }),
      );
      const change = fc.record({
        at: fc.nat(150),
        far: fc.oneof(fc.constantFrom(-16, -8, -4, -2, 0, 2, 4, 8, 16), fc.integer({ min: -2000, max: 2000 })),
        bytes: fc.constantFrom(2, 2, 8),
        word,
      });
      const answers = fc.array(fc.constantFrom<Answer[]>(undefined, undefined, undefined, EAGAIN, "untaken"), {
        maxLength: 12,
      });
      let packets = 0;
      fc.assert(
        fc.property(
          fc.array(change, { minLength: 1, maxLength: 60 }),
          fc.record({ indirect: fc.boolean(), mergeable: fc.boolean(), eventIdx: fc.boolean(), legacy: fc.boolean() }),
          answers,
          (changes, { legacy, ...features }, answered) => {
            const pending = new Map(changes.map((each) => [each.at, each]));
            let count = 0;
            const observe = (access: Access) => {
              count++;
              const found = pending.get(count);
              if (!found || access.kind !== "load") return;
              const { ram } = lane;
              const at = ram.at(access.gpa) + found.far;
              const bytes = Buffer.alloc(8);
              bytes.writeBigUInt64LE(found.word);
              if (at >= 0 && at + 8 < ram.bytes.length) ram.bytes.set(bytes.subarray(0, found.bytes), at);
            };
            const ring = { ...features, headerBytes: legacy && !features.mergeable ? 10 : 12 };
            const { lane, offer } = scene(direction, packed, observe, ring);
            offer();
            for (let turn = 0; turn < 6; turn++) {
              give(lane, 60, 14, 400, 60, 1000, 60);
              let number = 0;
              lane.kernel.answer = () => answered[number++];
              const before = count;
              lane.reads = 64;
              const { requests } = lane.turn();
              expect(requests).toBeLessThanOrEqual(64);
              // a descriptor is at most 16 loads of a byte, a chain at most the ring's 8; what is copied of a held frame
              expect(count - before).toBeLessThan(64 * 8 * 8 * 17 + 64 * 1500);
              lane.arm();
              lane.rig.core.disarm();
              lane.rig.core.inject(60);
              offer();
            }
            packets += lane.rig.counters.packets;
          },
        ),
        { numRuns: runs(60), seed: 26 },
      );
      expect(packets).toBeGreaterThan(20);
    },
  );
});

test.each([false, true])("of a frame with a header of 12 bytes the core reads nothing (packed %s)", (packed) => {
  const seen: Access[] = [];
  const { lane, raw } = scene("send", packed, (access) => seen.push(access));
  raw.describe(5, { gpa: DATA + 0x800n, len: 12, flags: NEXT, next: 6 });
  raw.describe(6, { gpa: DATA + 0x900n, len: 600 });
  raw.describe(7, { gpa: DATA + 0x800n, len: 100 });
  raw.offer(7, 5, 7);
  expect(lane.turn()).toMatchObject({ requests: 3, count: 3 });
  expect(seen.filter(({ gpa }) => gpa >= DATA)).toEqual([]);
  expect(lane.rig.counters.packets).toBe(3);
});

test.each([false, true])(
  "of what was read only the header's num_buffers is written by the core (packed %s)",
  (packed) => {
    const seen: Access[] = [];
    const { lane, raw } = scene("receive", packed, (access) => seen.push(access), { offloads: OFFLOAD_CSUM });
    raw.describe(5, { gpa: DATA + 0x800n, len: 112, flags: WRITE });
    raw.offer(5);
    give(lane, 100);
    expect(lane.turn()).toMatchObject({ requests: 1, count: 1 });
    const touched = seen
      .filter(({ gpa }) => gpa >= DATA)
      .map(({ kind, gpa, bytes, value }) => ({ kind, gpa, bytes, value }));
    expect(touched).toEqual([{ kind: "store", gpa: DATA + 0x80an, bytes: 2, value: 1n }]);
    // before the chain is given back
    const stores = seen.filter(({ kind }) => kind === "store");
    const [header, used] = [stores.findIndex(({ gpa }) => gpa >= DATA), stores.findLastIndex(({ gpa }) => gpa < DATA)];
    expect(used).toBeGreaterThan(header);
  },
);
