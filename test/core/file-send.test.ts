/**
 * Ring to file, without a kernel: what a driver sends is written to the file byte by byte, in order, with its net header,
 * whatever its chains look like; what cannot be sent is counted, and comes back all the same.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type Shape, frameOf } from "./chains.ts";
import { type Answer, EAGAIN, EBADFD, EFAULT, EINVAL, EIO, ENOMEM } from "./file-kernel.ts";
import { FileWorld, PLAIN, withoutNumBuffers } from "./file-world.ts";
import { type Ring, type Variant, ringAt } from "./rig.ts";
import { runs } from "./runs.ts";

const [RING, DATA] = [0x10_0000n, 0x1_0000_0000n];
const HEADER = Uint8Array.of(1, 0, 34, 0, 0, 0, 34, 0, 6, 0, 0, 0);

interface Options {
  ring?: Partial<Ring>;
  variant?: Variant;
  layout?: "io_uring" | "aio";
}

function worldOf(size: number, { ring = {}, variant = 1, layout = "io_uring" }: Options = {}): FileWorld {
  const ringBytes = Math.ceil((40 * size + 200) / 4096) * 4096;
  return new FileWorld({
    direction: "send",
    layout,
    variant,
    end: {
      regions: [
        { gpa: RING, sizeBytes: ringBytes },
        { gpa: DATA, sizeBytes: 0x4_0000 },
        // continues the one before, in another file
        { gpa: DATA + 0x4_0000n, sizeBytes: 0x8_0000 },
      ],
      ...(variant === 5 ? { parts: { sizeBytes: Math.max(ringBytes, 0x5000), overlapBytes: 0x1000 } } : {}),
      ring: ringAt(RING, size, ring),
    },
  });
}

/** What must lie in the file of a frame: header fields and all. */
function expected(world: FileWorld, frame: Uint8Array): Buffer {
  expect(world.ring.headerBytes === 10 || world.ring.headerBytes === 12).toBe(true);
  return Buffer.concat([HEADER.subarray(0, 10), frame]);
}

/** Frames that arrived, without the bytes of num_buffers, which mean nothing here. */
function arrived(world: FileWorld): Buffer[] {
  return world.kernel.passed.map((frame) => Buffer.from(withoutNumBuffers(frame)));
}

const formats = [
  { packed: false, headerBytes: 12 },
  { packed: true, headerBytes: 12 },
  { packed: false, headerBytes: 10, mergeable: false },
];

describe.each(formats)("packed $packed, header of $headerBytes", (ring) => {
  test.each(["io_uring", "aio"] as const)("frames of all lengths, chains of all shapes, through %s", (layout) => {
    const world = worldOf(64, { ring, layout });
    const shapes: Shape[] = [
      PLAIN,
      { ...PLAIN, gap: 3 },
      { ...PLAIN, cuts: [12, 1000] },
      { ...PLAIN, ones: 13 },
      { ...PLAIN, ones: 30, cuts: [1, 2, 3], zeros: [0, 5, 33], gap: 1 },
      { ...PLAIN, cuts: [1, 1, 1], indirect: true, gap: 7 },
      { ...PLAIN, full: true, indirect: true },
    ];
    const sent: Buffer[] = [];
    for (const length of [14, 15, 60, 242, 243, 244, 245, 246, 247, 1514, 9014, 65_549, 65_600]) {
      for (const shape of shapes) {
        const frame = frameOf(sent.length, length);
        expect(world.send(frame, HEADER, shape)).toBe(true);
        sent.push(expected(world, frame));
        // several in one turn where they fit
        if (sent.length % 2 === 0) continue;
        world.turn();
        world.reapSent();
      }
    }
    while (world.turn().count !== 0) world.reapSent();
    expect(world.driver.outstanding).toBe(0);
    expect(arrived(world).map(({ length }) => length)).toEqual(sent.map(({ length }) => length));
    for (const [i, frame] of arrived(world).entries()) expect(Buffer.compare(frame, sent[i]!)).toBe(0);
    const bytes = sent.reduce((sum, { length }) => sum + length - 10, 0);
    expect(world.rig.counters).toMatchObject({ packets: sent.length, bytes });
    expect(Object.values(world.rig.counters.drops).every((drops) => drops === 0)).toBe(true);
    world.mustLeaveTheRest();
  });

  test.each([1020, 1021, 1022, 1023, 1024, 1025, 2000])("a chain of %i descriptors", (count) => {
    const size = 2048;
    const world = worldOf(size, { ring });
    for (const indirect of [false, true]) {
      const frames = Array.from({ length: 5 }, (_, i) => frameOf(i, 3000));
      const ones = count - 1;
      for (const frame of frames.slice(0, indirect ? 5 : 1)) {
        expect(world.send(frame, HEADER, { ...PLAIN, ones, indirect, gap: 1 })).toBe(true);
      }
      let taken = 0;
      for (let turn = 0; turn < 3; turn++) taken += world.turn().count;
      expect(taken).toBe(indirect ? 5 : 1);
      expect(world.reapSent()).toBe(taken);
      expect(arrived(world).splice(indirect ? 1 : 0)).toEqual(frames.slice(0, taken).map((f) => expected(world, f)));
    }
  });

  test.each([1022, 1023, 1024, 1025])("%i descriptors, all of which the file gets bytes of", (count) => {
    const world = worldOf(2048, { ring });
    const frame = frameOf(1, 3000);
    const { headerBytes } = world.ring;
    const cuts = [headerBytes + 1, ...Array<number>(count - 2).fill(1), 3000 - 1 - (count - 2)];
    const parts = cuts.map((len, i) => ({ gpa: DATA + BigInt(2 * i + (i > 0 ? 64 : 0)), len }));
    world.driver.addParts(parts, undefined, Buffer.concat([HEADER.subarray(0, headerBytes), frame]));
    world.driver.publish();
    expect(world.turn()).toMatchObject({ requests: 1, count: 1 });
    expect(world.reapSent()).toBe(1);
    expect(arrived(world)).toEqual([expected(world, frame)]);
  });

  test.each([1, 2, 5] as const)("%i segments, buffers across their ends", (variant) => {
    const world = worldOf(16, { ring, variant });
    const sent: Buffer[] = [];
    for (let i = 0; i < 200; i++) {
      const frame = frameOf(i, 14 + ((i * 7919) % 20_000));
      if (!world.send(frame, HEADER, { ...PLAIN, cuts: [1, 40, 3], gap: i % 13 })) {
        world.turn();
        world.reapSent();
        continue;
      }
      sent.push(expected(world, frame));
    }
    while (world.turn().count !== 0) world.reapSent();
    expect(sent.length).toBeGreaterThan(100);
    expect(arrived(world)).toEqual(sent);
  });

  test("the budget, and 64 requests, are the most of one turn", () => {
    const world = worldOf(256, { ring });
    for (let i = 0; i < 200; i++) world.send(frameOf(i, 60), HEADER);
    expect(world.turn(3)).toMatchObject({ requests: 3, count: 3, fileWaits: false });
    expect(world.turn(1000)).toMatchObject({ requests: 64, count: 64 });
    expect(world.turn(0)).toMatchObject({ requests: 0, count: 0 });
    expect(world.reapSent()).toBe(67);
  });

  test("ring of one or two descriptors, over several laps", () => {
    for (const size of [1, 2]) {
      const world = worldOf(size, { ring: { ...ring, base: ring.packed ? 0x8000 : 0xfffe } });
      const sent: Buffer[] = [];
      for (let i = 0; i < 7; i++) {
        for (let k = 0; k < size; k++) {
          const frame = frameOf(sent.length, 60 + 300 * k);
          expect(world.send(frame, HEADER)).toBe(true);
          sent.push(expected(world, frame));
        }
        expect(world.turn()).toMatchObject({ count: size, fileWaits: false, broke: false });
        expect(world.reapSent()).toBe(size);
      }
      expect(arrived(world)).toEqual(sent);
    }
  });

  test("a full file: what it did not take stays in the ring, in order", () => {
    for (const layout of ["io_uring", "aio"] as const) {
      for (const kind of [EAGAIN, "untaken"] as const) {
        const world = worldOf(64, { ring, layout });
        const frames = Array.from({ length: 10 }, (_, i) => frameOf(i, 60 + 200 * (i % 3)));
        for (const frame of frames) world.send(frame, HEADER);
        world.kernel.answer = (number) => (number >= 4 ? kind : undefined);
        expect(world.turn()).toMatchObject({ requests: 10, count: 4, fileWaits: true });
        expect(world.reapSent()).toBe(4);
        world.kernel.answer = () => kind;
        for (let i = 0; i < 70; i++) expect(world.turn()).toMatchObject({ requests: 6, count: 0, fileWaits: true });
        world.kernel.answer = () => undefined;
        expect(world.turn()).toMatchObject({ requests: 6, count: 6, fileWaits: false });
        expect(world.reapSent()).toBe(6);
        expect(arrived(world)).toEqual(frames.map((frame) => expected(world, frame)));
        expect(world.rig.counters.drops.noBuffer).toBe(0);
      }
    }
  });

  test("a frame that found no room before one that did is lost, and counted", () => {
    const world = worldOf(64, { ring });
    const frames = Array.from({ length: 5 }, (_, i) => frameOf(i, 60));
    for (const frame of frames) world.send(frame, HEADER);
    world.kernel.answer = (number) => ([1, 4].includes(number) ? EAGAIN : undefined);
    expect(world.turn()).toMatchObject({ requests: 5, count: 4, fileWaits: true });
    world.kernel.answer = () => undefined;
    expect(world.turn()).toMatchObject({ requests: 1, count: 1, fileWaits: false });
    expect(arrived(world)).toEqual([0, 2, 3, 4].map((i) => expected(world, frames[i]!)));
    expect(world.reapSent()).toBe(5);
    expect(world.rig.counters).toMatchObject({ packets: 4, bytes: 240, drops: { noBuffer: 1 } });
  });

  test.each([
    [EINVAL, "badFrame"],
    [EFAULT, "malformed"],
    [EIO, "noReceiver"],
    [EBADFD, "noReceiver"],
    [ENOMEM, "noBuffer"],
  ] as const)("errno %i counts as %s, and the rest goes on", (errno, reason) => {
    const world = worldOf(64, { ring });
    for (let i = 0; i < 4; i++) world.send(frameOf(i, 60), HEADER);
    world.kernel.answer = (number) => (number % 2 === 1 ? errno : undefined);
    expect(world.turn()).toMatchObject({ count: 4, fileWaits: false });
    expect(world.reapSent()).toBe(4);
    const none = { noReceiver: 0, noBuffer: 0, tooSmall: 0, malformed: 0, badFrame: 0, disabled: 0 };
    expect(world.rig.counters).toMatchObject({ packets: 2, bytes: 120, batches: 1, drops: { ...none, [reason]: 2 } });
  });

  test("frames too short or too long are dropped between good ones, in order", () => {
    const world = worldOf(64, { ring });
    const sent: Buffer[] = [];
    const lengths = [60, 13, 0, 100, 65_601, 65_600, 1, 14];
    for (const [i, length] of lengths.entries()) {
      const frame = frameOf(i, length);
      expect(world.send(frame, HEADER, { ...PLAIN, cuts: i % 2 ? [1] : [1, 1] })).toBe(true);
      if (length >= 14 && length <= 65_600) sent.push(expected(world, frame));
    }
    let count = 0;
    for (let turn = 0; turn < 8; turn++) {
      count += world.turn().count;
      expect(world.reapSent()).toBeGreaterThanOrEqual(0);
    }
    expect(count).toBe(lengths.length);
    expect(world.driver.outstanding).toBe(0);
    expect(arrived(world)).toEqual(sent);
    expect(world.rig.counters).toMatchObject({ packets: 4, drops: { badFrame: 4 } });
  });

  test("a disabled transmitq drops all, asks for nothing", () => {
    const world = worldOf(64, { ring: { ...ring, enabled: false } });
    for (let i = 0; i < 5; i++) world.send(frameOf(i, 60), HEADER, { ...PLAIN, cuts: [1, 1] });
    expect(world.turn()).toMatchObject({ requests: 0, count: 5 });
    expect(world.reapSent()).toBe(5);
    expect(world.kernel.passed).toEqual([]);
    expect(world.rig.counters).toMatchObject({ packets: 0, drops: { disabled: 5 } });
  });

  test("asks for kicks when all is sent, and sees what came meanwhile", () => {
    const world = worldOf(64, { ring });
    expect(world.arm()).toBe(false);
    world.rig.core.disarm();
    world.send(frameOf(0, 60), HEADER);
    expect(world.arm()).toBe(true);
    world.rig.core.disarm();
    world.turn();
    expect(world.arm()).toBe(false);
    world.send(frameOf(1, 60), HEADER);
    expect(world.driver.queue.needsKick()).toBe(true);
  });
});

describe("at random", () => {
  const shape: fc.Arbitrary<Shape> = fc.record({
    ones: fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, fc.nat(14)),
    cuts: fc.array(fc.integer({ min: 1, max: 100 }), { minLength: 1, maxLength: 6 }),
    zeros: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, fc.array(fc.nat(20), { maxLength: 3 })),
    full: fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, fc.constant(true)),
    indirect: fc.boolean(),
    gap: fc.nat(40),
  });
  const length = fc.oneof(
    { weight: 5, arbitrary: fc.integer({ min: 14, max: 1514 }) },
    { weight: 2, arbitrary: fc.integer({ min: 13, max: 65_601 }) },
  );
  /** Of a turn's requests: so many are taken, then one or another answer. */
  const answers = fc.record({
    taken: fc.oneof({ weight: 3, arbitrary: fc.constant(64) }, fc.nat(8)),
    last: fc.constantFrom<Answer[]>(EAGAIN, EINVAL, EFAULT, EIO, EBADFD, ENOMEM, "untaken"),
    forAll: fc.boolean(),
  });
  const operation = fc.oneof(
    { weight: 6, arbitrary: fc.record({ type: fc.constant("send" as const), length, shape }) },
    {
      weight: 3,
      arbitrary: fc.record({ type: fc.constant("turn" as const), budget: fc.integer({ min: 0, max: 70 }), answers }),
    },
    {
      weight: 1,
      arbitrary: fc.constantFrom("reap" as const, "restart" as const, "sleep" as const).map((type) => ({ type })),
    },
  );

  test("frames arrive in order; each is sent, counted or still in the ring", { timeout: 120_000 }, () => {
    fc.assert(
      fc.property(
        fc.record({
          size: fc.constantFrom(1, 2, 4, 8, 64, 256),
          packed: fc.boolean(),
          legacy: fc.boolean(),
          indirect: fc.boolean(),
          eventIdx: fc.boolean(),
        }),
        fc.constantFrom("io_uring" as const, "aio" as const),
        fc.constantFrom<Variant[]>(1, 2, 5, "hooked"),
        fc.array(operation, { minLength: 5, maxLength: 60, size: "max" }),
        ({ size, packed, legacy, indirect, eventIdx }, layout, variant, operations) => {
          const headerBytes = legacy ? 10 : 12;
          const ring = { packed, headerBytes, mergeable: !legacy, indirect, eventIdx, base: packed ? 0x8000 : 0xfff0 };
          const world = worldOf(size, { ring, variant, layout });
          const sent: { frame: Buffer; good: boolean }[] = [];
          let [counted, reaped] = [0, 0];
          const turn = (budget: number, answer: (number: number) => Answer) => {
            let number = 0;
            world.kernel.answer = () => answer(number++);
            const passed = world.kernel.passed.length;
            const before = world.rig.counters;
            const result = world.turn(budget);
            const { results } = world.kernel;
            counted += result.count;
            expect(result.broke).toBe(false);
            // What was not taken at the end stays.
            const stay = results.toReversed().findIndex((each) => each !== undefined && each !== EAGAIN);
            const left = stay < 0 ? results.length : stay;
            expect(result.fileWaits).toBe(left > 0);
            const { packets, batches, drops } = world.rig.counters;
            const delivered = world.kernel.passed.length - passed;
            expect(packets - before.packets).toBe(delivered);
            expect(batches - before.batches).toBe(delivered > 0 ? 1 : 0);
            const gone = results.slice(0, results.length - left);
            const of = (...errnos: number[]) => gone.filter((each) => errnos.includes(each as number)).length;
            expect(drops.malformed - before.drops.malformed).toBe(of(EFAULT));
            expect(drops.noReceiver - before.drops.noReceiver).toBe(of(EIO, EBADFD));
            expect(drops.noBuffer - before.drops.noBuffer).toBe(of(EAGAIN, ENOMEM));
            return result;
          };
          for (const op of operations) {
            if (op.type === "send") {
              const frame = frameOf(sent.length, op.length);
              if (!world.send(frame, HEADER, op.shape)) continue;
              sent.push({ frame: expected(world, frame), good: op.length >= 14 && op.length <= 65_600 });
            } else if (op.type === "turn") {
              const { taken, last, forAll } = op.answers;
              turn(op.budget, (number) => (number < taken || (!forAll && number > taken) ? undefined : last));
            } else if (op.type === "reap") reaped += world.reapSent();
            else if (op.type === "restart") world.restart();
            else {
              const hasWork = world.arm();
              world.rig.core.disarm();
              expect(hasWork).toBe(sent.length > counted);
            }
          }
          for (let i = 0; i < 300 && turn(64, () => undefined).count !== 0; i++) reaped += world.reapSent();
          reaped += world.reapSent();
          expect({ counted, reaped }).toEqual({ counted: sent.length, reaped: sent.length });
          const { packets, drops } = world.rig.counters;
          expect(packets + Object.values(drops).reduce((a, b) => a + b)).toBe(sent.length);
          let next = 0;
          for (const frame of arrived(world)) {
            while (next < sent.length && !(sent[next]!.good && Buffer.compare(sent[next]!.frame, frame) === 0)) next++;
            expect(next).toBeLessThan(sent.length);
            next++;
          }
          world.mustLeaveTheRest();
        },
      ),
      { numRuns: runs(150), seed: 4 },
    );
  });
});
