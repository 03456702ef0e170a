/**
 * Model-based: two well-behaved drivers do random things to a lane; the reference says what must come of each step.
 * Besides, without it: frames come out in order, unchanged, none twice, and none is missing that was not counted.
 * VHOST_RELAY_TEST_RUNS multiplies the number of runs.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { Bump, ChainDriver, type Shape, frameOf } from "./chains.ts";
import { Judge } from "./judge.ts";
import { positionOf } from "./reference-packed.ts";
import { type EndPlan, Rig, type Ring, type Variant, areaBytes, ringAt } from "./rig.ts";
import { runs } from "./runs.ts";

const PAGE = 4096;

type Operation =
  | { type: "send"; length: number; header: number[]; shape: Shape; publish: boolean }
  | { type: "post"; length: number; shape: Shape; publish: boolean }
  | { type: "poll"; budget: number; stuck: boolean }
  | { type: "reap" | "sleep" | "restart source" | "restart destination" }
  | { type: "interrupts"; end: "source" | "destination"; wanted: boolean };

interface EndSketch {
  ringSize: number;
  packed: boolean;
  options: { base: number; eventIdx: boolean; indirect: boolean; mergeable: boolean; enabled: boolean };
  legacyHeader: boolean;
  gpa: bigint;
  /** Regions behind that of the ring. */
  buffers: { pages: number; holePages: number }[];
  /** Cut regions over the segments. */
  scattered: boolean;
  overlapPages: number;
}

const shape: fc.Arbitrary<Shape> = fc.record({
  ones: fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, fc.nat(14)),
  cuts: fc.array(fc.integer({ min: 1, max: 100 }), { minLength: 1, maxLength: 6 }),
  zeros: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, fc.array(fc.nat(20), { maxLength: 3 })),
  full: fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, fc.constant(true)),
  indirect: fc.boolean(),
  gap: fc.oneof(fc.nat(40), fc.nat(5000)),
});
const frameLength = fc.oneof(
  { weight: 6, arbitrary: fc.integer({ min: 14, max: 1514 }) },
  { weight: 2, arbitrary: fc.integer({ min: 1515, max: 9014 }) },
  { weight: 1, arbitrary: fc.constantFrom(0, 1, 13, 14, 65_599, 65_600, 65_601) },
);
const bufferLength = fc.oneof(
  { weight: 3, arbitrary: fc.integer({ min: 1, max: 100 }) },
  { weight: 4, arbitrary: fc.integer({ min: 100, max: 2000 }) },
  { weight: 2, arbitrary: fc.integer({ min: 2000, max: 10_000 }) },
  { weight: 1, arbitrary: fc.constantFrom(10, 12, 13, 26, 65_612) },
);
const header = fc.oneof(
  { weight: 9, arbitrary: fc.array(fc.nat(255), { minLength: 10, maxLength: 10 }).map((rest) => [0, 0, ...rest]) },
  { weight: 1, arbitrary: fc.array(fc.nat(255), { minLength: 12, maxLength: 12 }) },
);
const operation: fc.Arbitrary<Operation> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      type: fc.constant("send" as const),
      length: frameLength,
      header,
      shape,
      publish: fc.boolean(),
    }),
  },
  {
    weight: 6,
    arbitrary: fc.record({ type: fc.constant("post" as const), length: bufferLength, shape, publish: fc.boolean() }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      type: fc.constant("poll" as const),
      budget: fc.oneof(fc.constant(64), fc.integer({ min: 1, max: 3 })),
      stuck: fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, fc.constant(true)),
    }),
  },
  { weight: 2, arbitrary: fc.constant({ type: "reap" as const }) },
  {
    weight: 1,
    arbitrary: fc
      .constantFrom("sleep" as const, "restart source" as const, "restart destination" as const)
      .map((type) => ({ type })),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      type: fc.constant("interrupts" as const),
      end: fc.constantFrom("source" as const, "destination" as const),
      wanted: fc.boolean(),
    }),
  },
);
/** For a split ring the next power of two. */
const ringSize = fc.oneof(
  { weight: 8, arbitrary: fc.constantFrom(2, 3, 4, 7, 16, 64, 255) },
  { weight: 1, arbitrary: fc.constantFrom(1, 1000, 32_768) },
);
const end: fc.Arbitrary<EndSketch> = fc.record({
  ringSize,
  packed: fc.boolean(),
  options: fc.record({
    base: fc.oneof(fc.constantFrom(0, 65_535, 65_530), fc.nat(65_535)),
    eventIdx: fc.boolean(),
    indirect: fc.boolean(),
    mergeable: fc.boolean(),
    enabled: fc.oneof({ weight: 15, arbitrary: fc.constant(true) }, fc.constant(false)),
  }),
  legacyHeader: fc.boolean(),
  gpa: fc.constantFrom(0n, 0x1000n, 0x1_0000_0000n - 0x3000n, 0x4_0000_1000n, 0xffff_fff0_0000_0000n),
  buffers: fc.array(
    fc.record({
      pages: fc.oneof(fc.integer({ min: 1, max: 4 }), fc.integer({ min: 20, max: 60 })),
      holePages: fc.constantFrom(0, 0, 0, 1, 1_000_000),
    }),
    { minLength: 1, maxLength: 5 },
  ),
  scattered: fc.boolean(),
  overlapPages: fc.integer({ min: 0, max: 2 }),
});
const variant = fc.constantFrom<Variant>(1, 2, 5, "hooked");

function ringOf({ ringSize, packed, options, legacyHeader }: EndSketch, gpa: bigint): Ring {
  const size = packed ? ringSize : 2 ** Math.ceil(Math.log2(ringSize));
  const base = packed ? positionOf((options.base & 0x7fff) % size, options.base >> 15) : options.base;
  const headerBytes = !options.mergeable && legacyHeader ? 10 : 12;
  return ringAt(gpa, size, { ...options, packed, base, headerBytes });
}

function planOf(sketch: EndSketch): EndPlan {
  const { scattered, overlapPages } = sketch;
  const ring = ringOf(sketch, sketch.gpa);
  const ringBytes = Math.ceil(Number(ring.used - sketch.gpa + BigInt(areaBytes(ring).used)) / PAGE) * PAGE;
  let gpa = sketch.gpa + BigInt(ringBytes);
  const regions = [{ gpa: sketch.gpa, sizeBytes: ringBytes }];
  for (const { pages, holePages } of sketch.buffers) {
    gpa += BigInt(holePages * PAGE);
    regions.push({ gpa, sizeBytes: pages * PAGE });
    gpa += BigInt(pages * PAGE);
  }
  if (!scattered) return { regions, ring };
  // no part is smaller than the ring, which must lie in one
  return { regions, ring, parts: { sizeBytes: Math.max(ringBytes, 3 * PAGE), overlapBytes: overlapPages * PAGE } };
}

/** Runs the operations and checks every step. */
function drive(rig: Rig, transmitq: ChainDriver, receiveq: ChainDriver, operations: readonly Operation[]): void {
  const judge = new Judge(rig);
  const headerOf = (end: { ring: Ring }) => end.ring.headerBytes;
  const sent: Uint8Array[] = [];
  const received: Uint8Array[] = [];
  let reaped = 0;
  const reap = () => {
    while (transmitq.reap()) reaped++;
    for (let first; (first = receiveq.reap());) {
      const parts = [first];
      const size = () => parts.reduce((sum, part) => sum + part.length, 0);
      while (size() < headerOf(rig.destination)) parts.push(receiveq.reap()!);
      const numBuffers = headerOf(rig.destination) === 12 ? Buffer.concat(parts).readUInt16LE(10) : 1;
      while (parts.length < numBuffers) parts.push(receiveq.reap()!);
      expect(parts.length).toBe(numBuffers);
      received.push(Buffer.concat(parts).subarray(headerOf(rig.destination)));
    }
  };
  for (const op of operations) {
    if (op.type === "send") {
      const frame = frameOf(sent.length, op.length);
      const content = Buffer.concat([Uint8Array.from(op.header).subarray(0, headerOf(rig.source)), frame]);
      if (transmitq.add(content.length, op.shape, content)) sent.push(frame);
      if (op.publish) transmitq.queue.publish();
    } else if (op.type === "post") {
      receiveq.add(op.length, op.shape);
      if (op.publish) receiveq.queue.publish();
    } else if (op.type === "poll") {
      judge.poll(op.budget, op.stuck);
    } else if (op.type === "reap") {
      reap();
    } else if (op.type === "sleep") {
      judge.arm();
      judge.disarm();
    } else if (op.type === "interrupts") {
      const { queue } = op.end === "source" ? transmitq : receiveq;
      if (op.wanted) queue.enableInterrupts();
      else queue.disableInterrupts();
    } else judge.restart(op.type === "restart source" ? "source" : "destination");
  }
  transmitq.queue.publish();
  receiveq.queue.publish();
  judge.poll();
  reap();

  const numbers = received.map((frame) =>
    frame.length >= 4 ? new DataView(Uint8Array.from(frame).buffer).getUint32(0, true) : -1,
  );
  expect(numbers).toEqual([...new Set(numbers)].toSorted((a, b) => a - b));
  for (const [i, frame] of received.entries()) expect(Buffer.compare(frame, sent[numbers[i]!]!)).toBe(0);
  const drops = Object.values(rig.counters.drops).reduce((sum, count) => sum + count, 0);
  expect({ packets: rig.counters.packets, all: received.length + drops }).toEqual({
    packets: received.length,
    all: reaped,
  });
}

describe("a lane and the reference agree on every step", () => {
  test(
    "two guests: ring formats, sizes, layouts, chain shapes, sizes, features at random",
    { timeout: 120_000 },
    () => {
      fc.assert(
        fc.property(
          end,
          end,
          variant,
          fc.array(operation, { minLength: 5, maxLength: 60, size: "max" }),
          (from, to, variant, operations) => {
            const rig = new Rig({ source: planOf(from), destination: planOf(to), variant });
            const [transmitq, receiveq] = [rig.source, rig.destination].map(
              ({ ram, ring }) => new ChainDriver(ram, ring, new Bump(ram, ram.regions[1]!.start)),
            );
            drive(rig, transmitq!, receiveq!, operations);
          },
        ),
        { numRuns: runs(200) },
      );
    },
  );

  test("loopback: both rings in one guest", { timeout: 120_000 }, () => {
    fc.assert(
      fc.property(
        end,
        fc.boolean(),
        variant,
        fc.array(operation, { minLength: 5, maxLength: 60, size: "max" }),
        (sketch, peerPacked, variant, operations) => {
          const plan = planOf({ ...sketch, ringSize: 16 });
          const ring = ringOf({ ...sketch, ringSize: 16, packed: peerPacked }, sketch.gpa + 1024n);
          const rig = new Rig({ source: plan, destination: { in: "source", ring }, variant });
          const { ram } = rig.source;
          const from = ram.regions[1]!.start;
          const middle = from + ((ram.bytes.length - from) >> 1);
          const transmitq = new ChainDriver(ram, rig.source.ring, new Bump(ram, from, middle));
          drive(rig, transmitq, new ChainDriver(ram, ring, new Bump(ram, middle)), operations);
        },
      ),
      { numRuns: runs(50) },
    );
  });
});
