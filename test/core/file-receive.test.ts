/**
 * File to ring, without a kernel: frames that lie in the file arrive in the guest byte by byte, in order, with their net
 * headers, whatever its buffers look like; those that are larger than their buffer, or were read behind one, as well.
 */
import { describe, expect, test } from "vitest";
import { OFFLOAD_CSUM } from "../../src/layout/lane.ts";
import { type Shape, frameOf } from "./chains.ts";
import { EAGAIN, EBADFD, EFAULT, EINVAL, EIO, ENOMEM } from "./file-kernel.ts";
import { FileWorld, PLAIN, inFile } from "./file-world.ts";
import { type Ring, type Variant, ringAt } from "./rig.ts";

const [RING, DATA] = [0x10_0000n, 0x1_0000_0000n];
const HEADER = Uint8Array.of(1, 3, 54, 0, 100, 5, 34, 0, 16, 0, 0xee, 0xee);
/** Smaller than any buffer of a test that wants each read to be one. */
const MTU_FRAME = 1514;

interface Options {
  ring?: Partial<Ring>;
  variant?: Variant;
  layout?: "io_uring" | "aio";
  frameBytesMax?: number;
}

function worldOf(size: number, options: Options = {}): FileWorld {
  const { ring = {}, variant = 1, layout = "io_uring", frameBytesMax } = options;
  const ringBytes = Math.ceil((40 * size + 200) / 4096) * 4096;
  return new FileWorld({
    direction: "receive",
    layout,
    variant,
    ...(frameBytesMax === undefined ? {} : { frameBytesMax }),
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

let sequence = 0;
/** Puts frames into the file. */
function give(world: FileWorld, ...lengths: number[]): Uint8Array[] {
  return lengths.map((length) => {
    const header = HEADER.slice();
    header[4] = sequence;
    const frame = inFile(header, frameOf(sequence++, length));
    world.kernel.queue.push(frame);
    return frame;
  });
}

function mustHaveReceived(world: FileWorld, frames: readonly Uint8Array[]): void {
  const expected = frames.map((frame) => world.arriving(frame));
  expect(world.received.map(({ length }) => length)).toEqual(expected.map(({ length }) => length));
  for (const [i, frame] of expected.entries()) {
    if (Buffer.compare(world.received[i]!, frame) !== 0) expect.fail(`frame ${i} of ${frame.length - 10} bytes`);
  }
}

/** Until nothing comes any more. */
function drain(world: FileWorld, post = (): void => undefined): void {
  for (let idle = 0; idle < 3;) {
    post();
    idle = world.turn().count === 0 ? idle + 1 : 0;
    world.reapReceived();
  }
}

const formats = [
  { packed: false, headerBytes: 12, offloads: OFFLOAD_CSUM },
  { packed: true, headerBytes: 12 },
  { packed: false, headerBytes: 12, mergeable: false },
  { packed: true, headerBytes: 12, mergeable: false },
  { packed: false, headerBytes: 10, mergeable: false },
];

const shapes: Shape[] = [
  PLAIN,
  { ...PLAIN, gap: 3 },
  // the header in a descriptor of its own
  { ...PLAIN, cuts: [12, 65_600] },
  { ...PLAIN, ones: 13 },
  { ...PLAIN, ones: 30, cuts: [1, 2, 3], zeros: [0, 5, 33], gap: 1 },
  { ...PLAIN, cuts: [1, 1, 1], indirect: true, gap: 7 },
  { ...PLAIN, full: true, indirect: true },
];

describe.each(formats)("packed $packed, header of $headerBytes, mergeable $mergeable", (ring) => {
  const { headerBytes, mergeable = true } = ring;

  test.each(["io_uring", "aio"] as const)("usual buffers, frames up to the MTU, through %s", (layout) => {
    for (const frameBytesMax of [MTU_FRAME, undefined]) {
      const world = worldOf(256, { ring, layout, ...(frameBytesMax ? { frameBytesMax } : {}) });
      const frames: Uint8Array[] = [];
      for (let round = 0; round < 20; round++) {
        frames.push(...give(world, ...Array.from({ length: 10 * round }, (_, i) => 14 + ((i * 661) % 1501))));
        drain(world, () => {
          while (world.driver.outstanding < 128 && world.post(MTU_FRAME + 12, shapes[round % 2])) continue;
        });
        mustHaveReceived(world, frames);
      }
      expect(world.driver.scribbled).toBe(0);
      world.mustLeaveTheRest();
      const bytes = frames.reduce((sum, { length }) => sum + length - 12, 0);
      expect(world.rig.counters).toMatchObject({ packets: frames.length, bytes, malformedBuffers: 0 });
      expect(Object.values(world.rig.counters.drops).every((drops) => drops === 0)).toBe(true);
    }
  });

  test.each([...shapes.entries()])("buffers of shape %i, with room for every frame", (_, shape) => {
    const world = worldOf(64, { ring });
    const room = 65_600 + headerBytes;
    const frames: Uint8Array[] = [];
    for (const length of [14, 60, 1514, 9014, 65_599, 65_600, 100]) {
      frames.push(...give(world, length, length));
      drain(world, () => {
        while (world.driver.outstanding < 4 && world.post(room, shape)) continue;
      });
      mustHaveReceived(world, frames);
    }
    world.mustLeaveTheRest();
  });

  test.each([...shapes.entries()])(
    "buffers of shape %i, exactly as long as a frame, one byte more, one less",
    (_, shape) => {
      for (const frameBytesMax of [300, 65_600]) {
        const world = worldOf(64, { ring, frameBytesMax });
        const frames: Uint8Array[] = [];
        for (const difference of [0, 1, -1, 0, 2]) {
          const got = give(world, 300, 300 - difference, 300 - difference);
          frames.push(...(mergeable ? got : got.slice(difference < 0 ? 3 : 0)));
          for (let i = 0; i < 6; i++) world.post(300 + headerBytes - (difference === 2 ? 0 : 0), shape);
          if (difference < 0 && !mergeable) {
            // none fits: all are dropped, the buffers stay
            frames.push(got[0]!);
          }
          drain(world, () => {
            while (world.driver.outstanding < 4 && world.post(300 + headerBytes, shape)) continue;
          });
          mustHaveReceived(world, frames);
        }
      }
    },
  );

  test("the file is empty: said once it has been found so, and never while frames are held", () => {
    const world = worldOf(64, { ring });
    expect(world.turn()).toMatchObject({ requests: 0, fileWaits: false });
    expect(world.arm()).toBe(false); // no buffers
    for (let i = 0; i < 8; i++) world.post(2000);
    expect(world.arm()).toBe(true);
    expect(world.turn()).toMatchObject({ requests: 1, count: 0, fileWaits: true });
    expect(world.arm()).toBe(true);
    const frames = give(world, 100);
    expect(world.turn()).toMatchObject({ requests: 1, count: 1, fileWaits: false });
    frames.push(...give(world, 100, 200));
    world.reads = 4;
    expect(world.turn()).toMatchObject({ requests: 4, count: 2, fileWaits: true });
    world.reapReceived();
    mustHaveReceived(world, frames);
  });

  test("the file was empty for one request and not for the next: what came is held, and nothing waits", () => {
    for (const kind of [EAGAIN, EIO, EINVAL, ENOMEM, EBADFD, 0, 25]) {
      const world = worldOf(64, { ring, frameBytesMax: MTU_FRAME });
      for (let i = 0; i < 20; i++) world.post(2000);
      const frames = give(world, 100, 100, 100, 100, 100);
      expect(world.turn()).toMatchObject({ requests: 1, count: 1 });
      world.kernel.answer = (number) => (number === 2 ? kind : undefined);
      // 4 more: the second of them finds nothing
      world.reads = 4;
      expect(world.turn()).toMatchObject({ requests: 4, count: 1, fileWaits: false });
      expect(world.isHolding).toBe(true);
      world.kernel.answer = () => undefined;
      const turn = world.turn();
      expect(turn.count).toBe(3);
      world.reapReceived();
      mustHaveReceived(world, frames);
      const { drops } = world.rig.counters;
      expect(drops).toMatchObject({ noBuffer: 0, badFrame: kind >= 0 ? 1 : 0 });
      drain(world);
      world.mustLeaveTheRest();
    }
  });

  test("a frame that could not be written to the guest's memory is lost and counted", () => {
    const world = worldOf(64, { ring });
    for (let i = 0; i < 20; i++) world.post(2000);
    const frames = give(world, 100, 101, 102, 103, 104);
    world.kernel.answer = (number) => (number === 1 ? EFAULT : undefined);
    drain(world);
    mustHaveReceived(world, [frames[0]!, ...frames.slice(2)]);
    expect(world.rig.counters).toMatchObject({ packets: 4, drops: { malformed: 1 } });
  });

  test("without buffers nothing is read; the driver is asked for kicks", () => {
    const world = worldOf(8, { ring });
    const frames = give(world, 60, 61, 62);
    expect(world.turn()).toMatchObject({ requests: 0, count: 0, fileWaits: false });
    expect(world.kernel.queue.length).toBe(3);
    expect(world.arm()).toBe(false);
    world.post(100);
    expect(world.driver.queue.needsKick()).toBe(true);
    expect(world.arm()).toBe(true);
    expect(world.turn()).toMatchObject({ count: 1 });
    expect(world.turn()).toMatchObject({ requests: 0, count: 0, fileWaits: false });
    world.reapReceived();
    for (let i = 0; i < 8; i++) world.post(100);
    drain(world);
    mustHaveReceived(world, frames);
    expect(world.rig.counters.waits).toBe(2);
  });

  test("a disabled receiveq takes nothing", () => {
    const world = worldOf(8, { ring: { ...ring, enabled: false } });
    world.post(2000);
    give(world, 60);
    expect(world.turn()).toMatchObject({ requests: 0, count: 0, fileWaits: false });
    expect(world.arm()).toBe(false);
    expect(world.kernel.queue.length).toBe(1);
  });

  test("rings of one, two and three descriptors, over several laps", () => {
    for (const size of ring.packed ? [1, 2, 3] : [1, 2]) {
      const world = worldOf(size, { ring: { ...ring, base: ring.packed ? 0x8000 : 0xfffd } });
      const frames: Uint8Array[] = [];
      for (let i = 0; i < 9; i++) {
        frames.push(...give(world, 60, 70));
        drain(world, () => {
          while (world.post(100)) continue;
        });
        mustHaveReceived(world, frames);
      }
    }
  });

  test.each([2, 5] as const)("%i segments, buffers across their ends", (variant) => {
    const world = worldOf(64, { ring, variant });
    const frames: Uint8Array[] = [];
    for (let i = 0; i < 60; i++) {
      frames.push(...give(world, 14 + ((i * 7919) % 1501), 9000));
      drain(world, () => {
        while (world.driver.outstanding < 8 && world.post(9100, { ...PLAIN, cuts: [3, 40, 1], gap: i % 13 })) continue;
      });
    }
    mustHaveReceived(world, frames);
    world.mustLeaveTheRest();
  });

  test.each([1020, 1021, 1022, 1023, 1024, 1025, 2000])("buffers of %i descriptors", (count) => {
    for (const indirect of [false, true]) {
      const world = worldOf(2048, { ring });
      const shape = { ...PLAIN, ones: count - 1 - 12, cuts: [1], indirect, gap: 1 };
      // a header in one descriptor, then bytes
      const lengths = [20, count - 30, count - 2, count - 1, count, count + 1, 3000, 3500];
      const frames = give(world, ...lengths);
      drain(world, () => {
        while (world.driver.outstanding < (indirect ? 6 : 1)) {
          const parts = [12, ...Array<number>(shape.ones).fill(1), 4000 - shape.ones - 12];
          world.driver.add(4000, { ...shape, ones: 0, cuts: parts });
          world.driver.publish();
        }
      });
      mustHaveReceived(world, frames);
      world.mustLeaveTheRest();
    }
  });
});

describe.each(formats.filter(({ mergeable = true }) => mergeable))("merged, packed $packed", (ring) => {
  test.each([13, 26, 27, 40, 64, 100, 1526, 4096])("large frames in buffers of %i bytes", (length) => {
    const size = 1024;
    const world = worldOf(size, { ring });
    const most = Math.min(65_600, length * size - 12);
    const frames: Uint8Array[] = [];
    for (const frame of [14, 60, 1514, 9014, 65_600, 14, 65_600, 65_599, 100]) {
      if (frame > most) continue;
      frames.push(...give(world, frame, 60, frame));
      drain(world, () => {
        while (world.post(length, { ...PLAIN, gap: 1 })) continue;
      });
      mustHaveReceived(world, frames);
    }
    world.mustLeaveTheRest();
    expect(world.rig.counters.drops).toMatchObject({ tooSmall: 0, badFrame: 0 });
  });

  test("buffers of 1 byte: the header in 12 of them", () => {
    const world = worldOf(256, { ring });
    const frames = give(world, 14, 60, 200, 14);
    drain(world, () => {
      while (world.post(1, { ...PLAIN, gap: 1 })) continue;
    });
    mustHaveReceived(world, frames);
    world.mustLeaveTheRest();
  });

  test("of a large frame that is read into all its buffers none is copied; small ones go on", () => {
    const world = worldOf(256, { ring });
    const post = () => {
      while (world.driver.outstanding < 200 && world.post(1000)) continue;
    };
    const frames = give(world, 20_000);
    drain(world, post);
    frames.push(...give(world, 30_000, 60, 61, 40_000));
    post();
    expect(world.turn()).toMatchObject({ requests: 1, count: 1 });
    expect(world.isHolding).toBe(false);
    drain(world, post);
    for (let i = 0; i < 70; i++) frames.push(...give(world, 100));
    drain(world, post);
    // small frames in turn: reads are many again
    frames.push(...give(world, ...Array<number>(150).fill(100)));
    let most = 0;
    for (let i = 0; i < 20; i++) most = Math.max(most, world.turn().requests);
    expect(most).toBeGreaterThan(1);
    drain(world, post);
    mustHaveReceived(world, frames);
  });

  test("buffers run out while frames are held, then come one by one", () => {
    const world = worldOf(256, { ring, frameBytesMax: 9014 });
    const frames = give(world, ...Array<number>(30).fill(60));
    drain(world, () => {
      while (world.driver.outstanding < 40 && world.post(100)) continue;
    });
    world.reads = 64;
    frames.push(...give(world, 60, 3000, 61, 62, 4000, 63));
    let held = 0;
    for (let turn = 0; turn < 400; turn++) {
      const { fileWaits } = world.turn();
      if (world.isHolding) {
        held++;
        expect(fileWaits).toBe(false);
        // as soon as it waits, until there is a buffer more
        if (turn % 2 === 1) {
          const offered = world.driver.outstanding;
          const hasWork = world.arm();
          world.post(100);
          if (!hasWork) expect(offered).toBeGreaterThanOrEqual(0);
          expect(world.arm()).toBe(true);
        }
      } else if (world.driver.outstanding < 3) world.post(100);
      world.reapReceived();
    }
    expect(held).toBeGreaterThan(10);
    mustHaveReceived(world, frames);
    world.mustLeaveTheRest();
  });

  test("a frame larger than all buffers that the ring can hold is dropped, the next ones arrive", () => {
    const world = worldOf(4, { ring });
    const post = () => {
      while (world.post(100)) continue;
    };
    const frames = give(world, 60, 1000, 61, 62, 388, 389, 63);
    drain(world, post);
    mustHaveReceived(
      world,
      [0, 2, 3, 4, 6].map((i) => frames[i]!),
    );
    expect(world.rig.counters).toMatchObject({ packets: 5, drops: { tooSmall: 2 } });
  });

  test("an injected frame goes before those that are held", () => {
    const world = worldOf(64, { ring });
    for (let i = 0; i < 3; i++) world.post(100);
    const frames = give(world, 60, 250, 70);
    drain(world);
    expect(world.isHolding).toBe(true);
    world.post(100);
    const injected = frameOf(1000, 60);
    new Uint8Array(world.rig.lane.memory.buffer, 0x400, 60).set(injected);
    expect(world.rig.core.inject(60) & 0xffff).toBe(1);
    for (let i = 0; i < 10; i++) world.post(100);
    drain(world);
    const plain = inFile(new Uint8Array(12), injected);
    mustHaveReceived(world, [frames[0]!, plain, frames[1]!, frames[2]!]);
  });
});

describe.each(formats)("held frames, packed $packed, header of $headerBytes, mergeable $mergeable", (ring) => {
  /** Three frames are read at once; the first one finds nothing, so the others are held. */
  function holding(): FileWorld {
    const world = worldOf(16, { ring });
    for (let i = 0; i < 5; i++) world.post(200);
    give(world, 60, 61, 62, 63);
    world.turn();
    world.kernel.answer = (number) => (number === 1 ? EAGAIN : undefined);
    world.reads = 4;
    world.turn();
    world.kernel.answer = () => undefined;
    expect(world.isHolding).toBe(true);
    world.reapReceived();
    world.received.length = 0;
    return world;
  }

  test("a ring that is reset forgets them", () => {
    const world = holding();
    world.resetRing();
    expect(world.isHolding).toBe(false);
    const frames = give(world, 70, 71);
    drain(world, () => {
      while (world.driver.outstanding < 5 && world.post(200)) continue;
    });
    mustHaveReceived(world, frames);
  });

  test("a ring that goes on where it was stopped gets its chains back in order", () => {
    const world = holding();
    world.restart();
    const frames = give(world, 70, 71);
    drain(world, () => {
      while (world.driver.outstanding < 5 && world.post(200)) continue;
    });
    mustHaveReceived(world, frames);
  });

  test("buffers that are too small for them: dropped and counted, unless they are merged", () => {
    const world = holding();
    const held = world.kernel.passed.slice(1);
    // The buffers that there are are used up by held frames; those behind them are too small.
    const frames = give(world, 150, 151);
    drain(world, () => {
      while (world.driver.outstanding < 5 && world.post(60)) continue;
    });
    const { mergeable = true } = ring;
    expect(world.rig.counters.drops.tooSmall).toBe(mergeable ? 0 : world.rig.counters.drops.tooSmall);
    if (mergeable) mustHaveReceived(world, [...held, ...frames]);
    else expect(world.received.length + world.rig.counters.drops.tooSmall).toBe(5);
  });
});
