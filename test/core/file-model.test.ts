/**
 * File to ring at random: a driver that trickles buffers of any shape, a file that trickles frames and refuses some. What
 * was read arrives in order and unchanged, or is counted; and each turn says of the file, and of itself, what is true.
 * VHOST_RELAY_TEST_RUNS multiplies the number of runs.
 */
import fc from "fast-check";
import { expect, test } from "vitest";
import { type Shape, frameOf } from "./chains.ts";
import { type Answer, EAGAIN, EBADFD, EFAULT, EINVAL, EIO, ENOMEM } from "./file-kernel.ts";
import { FileWorld, inFile } from "./file-world.ts";
import { positionOf } from "./reference-packed.ts";
import { type Variant, ringAt } from "./rig.ts";
import { runs } from "./runs.ts";

const [RING, DATA] = [0x10_0000n, 0x1_0000_0000n];

const shape: fc.Arbitrary<Shape> = fc.record({
  ones: fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, fc.nat(14)),
  cuts: fc.array(fc.integer({ min: 1, max: 100 }), { minLength: 1, maxLength: 6 }),
  zeros: fc.oneof({ weight: 3, arbitrary: fc.constant([]) }, fc.array(fc.nat(20), { maxLength: 3 })),
  full: fc.oneof({ weight: 9, arbitrary: fc.constant(false) }, fc.constant(true)),
  indirect: fc.boolean(),
  gap: fc.oneof(fc.nat(40), fc.nat(5000)),
});
const plain: fc.Arbitrary<Shape> = fc.nat(9).map((gap) => {
  return { ones: 0, cuts: [1], zeros: [], full: false, indirect: false, gap };
});
/** Large frames are rare, or nothing else would ever happen. */
const frameLength = fc.oneof(
  { weight: 8, arbitrary: fc.integer({ min: 14, max: 300 }) },
  { weight: 3, arbitrary: fc.integer({ min: 14, max: 1514 }) },
  { weight: 2, arbitrary: fc.integer({ min: 1515, max: 9014 }) },
  { weight: 1, arbitrary: fc.constantFrom(14, 30_000, 65_599, 65_600) },
);
const bufferLength = fc.oneof(
  { weight: 2, arbitrary: fc.integer({ min: 1, max: 100 }) },
  { weight: 6, arbitrary: fc.integer({ min: 100, max: 2000 }) },
  { weight: 2, arbitrary: fc.integer({ min: 2000, max: 10_000 }) },
  { weight: 1, arbitrary: fc.constantFrom(10, 11, 12, 13, 26, 65_612) },
);
const answer = fc.oneof(
  { weight: 6, arbitrary: fc.constant(undefined) },
  { weight: 2, arbitrary: fc.constantFrom<Answer[]>(EAGAIN, "untaken") },
  { weight: 1, arbitrary: fc.constantFrom<Answer[]>(EINVAL, EFAULT, EIO, EBADFD, ENOMEM, 0, 25) },
);
const operation = fc.oneof(
  {
    weight: 5,
    arbitrary: fc.record({ type: fc.constant("give" as const), lengths: fc.array(frameLength, { maxLength: 12 }) }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      type: fc.constant("post" as const),
      lengths: fc.array(bufferLength, { minLength: 1, maxLength: 12 }),
      shape: fc.oneof(plain, shape),
    }),
  },
  {
    weight: 8,
    arbitrary: fc.record({
      type: fc.constant("turn" as const),
      budget: fc.oneof({ weight: 5, arbitrary: fc.constant(64) }, fc.integer({ min: 0, max: 3 })),
      reads: fc.constantFrom(undefined, undefined, 1, 4, 64),
      answers: fc.oneof(fc.constant([]), fc.array(answer, { maxLength: 20 })),
    }),
  },
  { weight: 3, arbitrary: fc.constant({ type: "reap" as const }) },
  {
    weight: 1,
    arbitrary: fc
      .constantFrom("sleep" as const, "restart" as const, "reset" as const, "calls" as const, "no calls" as const)
      .map((type) => ({ type })),
  },
);
const plan = fc.record({
  size: fc.oneof({ weight: 6, arbitrary: fc.constantFrom(1, 2, 3, 4, 7, 16, 64, 255) }, fc.constant(1000)),
  packed: fc.boolean(),
  mergeable: fc.boolean(),
  legacy: fc.boolean(),
  indirect: fc.boolean(),
  eventIdx: fc.boolean(),
  offloads: fc.nat(15),
  base: fc.oneof(fc.constantFrom(0, 65_535, 65_530), fc.nat(65_535)),
  layout: fc.constantFrom("io_uring" as const, "aio" as const),
  variant: fc.constantFrom<Variant[]>(1, 2, 5, "hooked"),
  frameBytesMax: fc.constantFrom(1514, 9014, 65_600, 65_600),
});

test("a lane that reads a file, at random", { timeout: 240_000 }, () => {
  let [everHeld, everMerged, dropped] = [0, 0, 0];
  fc.assert(
    fc.property(plan, fc.array(operation, { minLength: 5, maxLength: 80, size: "max" }), (options, operations) => {
      const { packed, mergeable, legacy, indirect, eventIdx, offloads, layout, variant, frameBytesMax } = options;
      const size = packed ? options.size : 2 ** Math.ceil(Math.log2(options.size));
      const base = packed ? positionOf((options.base & 0x7fff) % size, options.base >> 15) : options.base;
      const headerBytes = !mergeable && legacy ? 10 : 12;
      const ringBytes = Math.ceil((40 * size + 200) / 4096) * 4096;
      const world = new FileWorld({
        direction: "receive",
        layout,
        variant,
        frameBytesMax,
        end: {
          regions: [
            { gpa: RING, sizeBytes: ringBytes },
            { gpa: DATA, sizeBytes: 0x2_5000 },
            { gpa: DATA + 0x2_5000n, sizeBytes: 0x3000 },
            { gpa: DATA + 0x10_0000n, sizeBytes: 0x1_5000 },
          ],
          ...(variant === 5 ? { parts: { sizeBytes: Math.max(ringBytes, 0x3000), overlapBytes: 0x1000 } } : {}),
          ring: ringAt(RING, size, { packed, mergeable, indirect, eventIdx, offloads, base, headerBytes }),
        },
      });
      let sequence = 0;
      /** Frames that were read, then forgotten when the ring was started again. */
      let forgotten = 0;
      /** Frames that were read and neither delivered nor dropped. */
      const held = () => {
        const { packets, drops } = world.rig.counters;
        return world.kernel.passed.length - forgotten - packets - drops.tooSmall;
      };

      const turn = (budget: number, answers: readonly Answer[] = [], reads?: number) => {
        let number = 0;
        world.kernel.answer = () => answers[number++];
        const before = world.rig.counters;
        const heldBefore = held();
        if (reads !== undefined) world.reads = reads;
        const result = world.turn(budget);
        const { results } = world.kernel;
        const { packets, bytes, batches, drops } = world.rig.counters;
        const delivered = packets - before.packets;
        // nothing is read before what is held has been delivered
        if (heldBefore - delivered - (drops.tooSmall - before.drops.tooSmall) > 0) expect(results).toEqual([]);
        expect(result.requests).toBeLessThanOrEqual(Math.max(budget, 1));
        expect(result.count).toBe(delivered);
        expect(batches - before.batches).toBe(delivered > 0 ? 1 : 0);
        expect(bytes - before.bytes).toBeGreaterThanOrEqual(14 * delivered);
        const of = (...found: (number | undefined)[]) => results.filter((each) => found.includes(each)).length;
        expect(drops.malformed - before.drops.malformed).toBe(of(EFAULT));
        expect(drops.badFrame - before.drops.badFrame).toBe(of(0, 25));
        expect(drops.noBuffer).toBe(0);
        // held() counts from outside, isHolding says what the core thinks
        expect(held() > 0).toBe(world.isHolding);
        if (held() > 0) everHeld++;
        const nothing = of(EAGAIN, EIO, EBADFD, EINVAL, ENOMEM, undefined);
        expect(result.fileWaits).toBe(nothing > 0 && held() === 0);
        // whoever found the file empty hears of it when it is not
        expect(result.fileAsk).toBe(result.fileWaits && of(EAGAIN, EIO, EBADFD, EINVAL) === 0);
        expect(result.broke).toBe(false);
        return result;
      };
      const reset = () => {
        forgotten += held();
        expect(held()).toBe(0);
      };
      const post = (length: number, as: Shape) => {
        const isRing = world.driver.add(length, as);
        world.driver.publish();
        return isRing;
      };

      for (const op of operations) {
        if (op.type === "give") {
          for (const length of op.lengths) {
            const header = Uint8Array.from({ length: 12 }, (_, i) => (sequence * 31 + i * 7) & 0xff);
            if (length <= frameBytesMax) world.kernel.queue.push(inFile(header, frameOf(sequence++, length)));
          }
        } else if (op.type === "post") for (const length of op.lengths) post(length, op.shape);
        else if (op.type === "turn") turn(op.budget, op.answers, op.reads);
        else if (op.type === "reap") world.reapReceived();
        else if (op.type === "calls") world.driver.queue.enableInterrupts();
        else if (op.type === "no calls") world.driver.queue.disableInterrupts();
        else if (op.type === "restart") {
          world.restart();
          reset();
        } else if (op.type === "reset") {
          world.reapReceived();
          world.resetRing();
          reset();
        } else {
          turn(64);
          world.rig.core.disarm();
          if (!world.arm()) {
            // it waits for buffers; as long as those there are do not do, nothing happens
            expect(turn(64)).toMatchObject({ requests: 0, count: 0, fileWaits: false });
          }
          world.rig.core.disarm();
        }
      }

      // With enough buffers everything ends.
      for (let idle = 0, rounds = 0; idle < 3; rounds++) {
        while (post(mergeable ? 3000 : 65_700, { ones: 0, cuts: [1], zeros: [], full: false, indirect: false, gap: 0 }))
          continue;
        const { queue } = world.kernel;
        const [heldBefore, before] = [held(), queue.length];
        idle = turn(64).count === 0 && held() === heldBefore && queue.length === before ? idle + 1 : 0;
        world.reapReceived();
        expect(rounds).toBeLessThan(2000);
      }
      const { packets, drops } = world.rig.counters;
      expect(world.received.length).toBe(packets);
      dropped += drops.tooSmall;
      // the guest has no memory left for buffers, or the lane would go on
      if (held() > 0) expect(world.arm()).toBe(false);
      let next = 0;
      const read = world.kernel.passed.map((frame) => world.arriving(frame));
      for (const frame of world.received) {
        while (next < read.length && Buffer.compare(read[next]!, frame) !== 0) next++;
        expect(next++).toBeLessThan(read.length);
        if (frame.length > 3022) everMerged++;
      }
      // Bytes behind what was written change only where something was read that was delivered elsewhere.
      if (everHeld === 0) expect(world.driver.scribbled).toBe(0);
      world.mustLeaveTheRest();
    }),
    { numRuns: runs(100), seed: 15, endOnFailure: true },
  );
  expect(everHeld).toBeGreaterThan(100);
  expect(everMerged).toBeGreaterThan(10);
  expect(dropped).toBeGreaterThan(10);
});
