/**
 * Guest memory that changes while the core reads it. Whatever changes between two reads, the core stays inside the guests'
 * RAM, ends, and never throws (BI-206, BI-207, BI-208); and it decides by what it has read once (BI-258).
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { busyStage, offerAll } from "./busy.ts";
import type { Access } from "./hooked-core.ts";
import { WRITE } from "./raw-ring.ts";
import { type PollResult, type Ring, areaBytes } from "./rig.ts";
import { runs } from "./runs.ts";
import { DATA, type Format, GOOD, RAM_END, SEAM, Stage, split } from "./stage.ts";

const pairs: [from: Format, to: Format][] = [
  ["split", "split"],
  ["packed", "packed"],
  ["split", "packed"],
  ["packed", "split"],
];

type Observer = (access: Access, index: number) => void;

/** What came of one poll. */
interface Outcome {
  stage: Stage;
  result: PollResult;
  packets: number;
  ram: { source: Uint8Array; destination: Uint8Array };
}

/** A word of a ring or table that is read for good: a second look would be a second decision. Indexes and events are not. */
function isDescriptor({ kind, atomic, bytes }: Access): boolean {
  return kind === "load" && (!atomic || bytes === 8);
}

describe.each(pairs)("memory that changes between two reads, %s to %s", (from, to) => {
  /** A value that means something at some place: an index, a flag, an address at an edge. */
  const word = fc.oneof(
    fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
    fc.constantFrom(0n, 1n, 2n, 3n, 4n, 5n, 0xffffn, 0x8000n, DATA, SEAM - 7n, RAM_END - 1n, 0xffff_ffffn),
    fc.tuple(fc.constantFrom(0n, 1n, 16n, 48n, 0xffff_ffffn), fc.nat(7), fc.nat(3)).map(([len, flags, next]) => {
      return len | (BigInt(flags) << 32n) | (BigInt(next) << 48n);
    }),
  );
  /** How far behind the word that is about to be read the change lies. */
  const change = fc.record({
    at: fc.nat(400),
    far: fc.oneof(fc.constantFrom(-16, -8, -4, -2, 0, 2, 4, 8, 16, 24), fc.integer({ min: -2000, max: 2000 })),
    bytes: fc.constantFrom(2, 2, 8),
    word,
  });

  test.each([2, 4, 256])(
    "no stray access, no hang, no exception, no length above what was written (ring of %i)",
    (size) => {
      const features = fc.record({ indirect: fc.boolean(), mergeable: fc.boolean(), eventIdx: fc.boolean() });
      fc.assert(
        fc.property(
          fc.array(change, { minLength: 1, maxLength: 200 }),
          features,
          fc.boolean(),
          (changes, ring, stuck) => {
            const pending = new Map(changes.map((each) => [each.at, each]));
            let count = 0;
            const written = { now: 0, announced: 0 };
            const observe = (access: Access) => {
              count++;
              if (access.end === "destination" && access.kind !== "load") {
                const announced = announcedBy(access, stage.receiveq.ring);
                if (announced === undefined) written.now += access.bytes;
                else written.announced += announced;
              }
              const found = pending.get(count);
              if (!found || access.kind !== "load") return;
              const ram = stage.rig[access.end].ram;
              const at = ram.at(access.gpa) + found.far;
              const bytes = Buffer.alloc(8);
              bytes.writeBigUInt64LE(found.word);
              if (at >= 0 && at + 8 < ram.bytes.length) ram.bytes.set(bytes.subarray(0, found.bytes), at);
            };
            const stage: Stage = busyStage(size, from, { observe, ring }, to);
            for (let poll = 0; poll < 4; poll++) {
              const before = count;
              stage.rig.poll(64, stuck);
              stage.rig.core.arm(stuck ? 1 : 0);
              stage.rig.core.disarm();
              // work.test.ts has the limit for long chains; below it, a frame costs at most its own walk and one of each
              // receive chain, a descriptor at most 16 loads of a byte
              expect(count - before).toBeLessThan(64 * (size + 2) * (17 * size + 50));
              offerAll(stage);
            }
            expect(written.announced).toBeLessThanOrEqual(written.now);
          },
        ),
        { numRuns: runs(20) },
      );
    },
  );

  /** One poll of a busy lane, again and again from the same state, disturbed by `observe`. */
  function replayed(): { seen: Access[]; run: (observe: Observer) => Outcome } {
    let index = 0;
    let disturb: Observer = () => undefined;
    // more slots than are offered: a slot that was used would be looked at again in the next lap
    const stage = busyStage(8, from, { observe: (access) => disturb(access, index++) }, to);
    const { source, destination } = stage.rig;
    const start = [source, destination].map(({ ram }) => Uint8Array.from(ram.bytes));
    const run = (observe: Observer) => {
      source.ram.bytes.set(start[0]!);
      destination.ram.bytes.set(start[1]!);
      stage.judge.startAll();
      index = 0;
      disturb = observe;
      const { packets } = stage.rig.counters;
      const result = stage.rig.poll();
      return {
        stage,
        result,
        packets: stage.rig.counters.packets - packets,
        ram: { source: Uint8Array.from(source.ram.bytes), destination: Uint8Array.from(destination.ram.bytes) },
      };
    };
    const seen: Access[] = [];
    run((access) => seen.push(access));
    return { seen, run };
  }

  test("BI-206 to 208 a descriptor that changes right after it was read, at every load: nothing comes of it", () => {
    const { seen, run } = replayed();
    const calm = run(() => undefined);
    expect(calm.packets).toBeGreaterThan(0);
    for (const [site, access] of seen.entries()) {
      if (!isDescriptor(access)) continue;
      const { ram } = calm.stage.rig[access.end];
      const [at, end] = [ram.at(access.gpa), ram.at(access.gpa) + access.bytes];
      const {
        result,
        packets,
        ram: after,
      } = run((_, index) => {
        if (index === site + 1) for (let i = at; i < end; i++) ram.bytes[i]! ^= 0xff;
      });
      expect({ site, result, packets }).toEqual({ site, result: calm.result, packets: calm.packets });
      // what was flipped may stay, or have been written over
      after[access.end].set(calm.ram[access.end].subarray(at, end), at);
      for (const each of ["source", "destination"] as const) {
        if (Buffer.compare(after[each], calm.ram[each]) !== 0) expect.fail(`load ${site}, ${each}`);
      }
    }
  });

  test("BI-206 to 208 a word that changes right before it is read, at every load: the core stays in RAM and ends", () => {
    const { seen, run } = replayed();
    const calm = run(() => undefined);
    const flips: ((word: bigint) => bigint)[] = [
      () => 0n,
      () => 0xffff_ffff_ffff_ffffn,
      ...[0n, 31n, 32n, 33n, 34n, 47n, 48n, 50n, 55n, 63n].map((bit) => (word: bigint) => word ^ (1n << bit)),
      () => RAM_END - 1n,
      (word) => (word & ~0xffff_ffffn) | 0xffff_ffffn,
    ];
    for (const [site, access] of seen.entries()) {
      if (access.kind !== "load") continue;
      for (const flip of flips) {
        let count = 0;
        run(({ end, gpa, bytes }, index) => {
          count++;
          const { ram } = calm.stage.rig[end];
          if (index !== site) return;
          const word = Buffer.alloc(8);
          ram.slice(gpa, bytes).forEach((byte, i) => (word[i] = byte));
          word.writeBigUInt64LE(BigInt.asUintN(64, flip(word.readBigUInt64LE())));
          ram.slice(gpa, bytes).set(word.subarray(0, bytes));
        });
        expect(count).toBeLessThan(10 * seen.length);
      }
    }
  });
});

/** The length that a store into the used ring, or over a packed descriptor, announces; undefined: it is no such store. */
function announcedBy({ gpa, bytes, value = 0n }: Access, ring: Ring): number | undefined {
  if (ring.packed) {
    const slot = gpa - ring.desc;
    if (slot < 0n || slot >= BigInt(16 * ring.size)) return gpa >= ring.used && gpa < ring.used + 4n ? 0 : undefined;
    return slot % 16n === 8n && bytes >= 4 ? Number(value & 0xffff_ffffn) : 0;
  }
  if (gpa < ring.used || gpa >= ring.used + BigInt(areaBytes(ring).used)) return undefined;
  return bytes === 8 ? Number(value >> 32n) : 0;
}

test("the avail index runs backwards while buffers for one frame are collected: the ring breaks", () => {
  const size = 32_768;
  let reads = 0;
  const stage: Stage = new Stage(
    { direction: "receive", size },
    {
      variant: "hooked",
      observe: ({ atomic, kind, gpa, end }) => {
        const isAvailIndex =
          end === "destination" && atomic && kind === "load" && gpa === stage.receiveq.ring.avail + 2n;
        if (isAvailIndex && ++reads === 2) split(stage).availIdx -= 1;
      },
    },
  );
  for (let i = 0; i < size; i++) stage.receiveq.describe(i, { gpa: DATA, len: 1, flags: WRITE });
  stage.receiveq.offer(...Array(size / 2).keys());
  stage.send(40_000);
  expect(stage.rig.poll()).toMatchObject({ taken: 1, brokeDestination: true });
  expect(reads).toBe(2);
});

test.each(["split", "packed"] as const)("BI-258 the header is checked and never read again (%s)", (format) => {
  const seen: Access[] = [];
  const stage = new Stage(
    { direction: "transmit", format, size: 4 },
    { variant: "hooked", observe: (access) => seen.push(access) },
  );
  stage.mustDeliver();
  const header = BigInt(stage.transmitq.ring.headerBytes);
  const payload = seen.filter(({ kind, end, gpa }) => kind === "load" && end === "source" && gpa >= DATA);
  const offsets = payload.flatMap(({ gpa, bytes }) => Array.from({ length: bytes }, (_, i) => gpa - GOOD + BigInt(i)));
  expect(offsets.length).toBeGreaterThan(0);
  expect(offsets.every((offset, i) => offset < header && offsets.indexOf(offset) === i)).toBe(true);
  const copies = seen.filter(({ kind }) => kind === "copy");
  expect(copies.map(({ from, bytes }) => [from! - GOOD, bytes])).toEqual([[header, 100]]);
});
