/** The driver's side of a packed virtqueue against a device written out from virtio 1.3, section 2.8. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { PackedDriver } from "../../src/driver/packed.ts";
import { DeviceError } from "../../src/driver/virtqueue.ts";
import type { ChainBuffer } from "../../src/driver/virtqueue.ts";
import { PlainPackedDevice } from "./plain-packed-device.ts";

const GPA = 0x1_2345_0000n; // above 4 GiB: both halves of an address count
const TABLE_OFFSET = 0x8000;
const WRAP = 0x8000;
// Flags of the event areas (2.8.10)
const [ENABLE, DISABLE, DESC] = [0, 1, 2];

interface Options {
  size?: number;
  eventIdx?: boolean;
  indirect?: boolean;
  base?: number;
}

function place(size = 8) {
  const buffer = new SharedArrayBuffer(Math.max(0x10000, PackedDriver.layout(size).sizeBytes));
  return { buffer, byteOffset: 0, gpa: GPA, eventIdx: true, indirect: true };
}

function ring({ size = 8, eventIdx = true, indirect = true, base = WRAP }: Options = {}) {
  const at = place(size);
  const driver = new PackedDriver({ ...at, size, eventIdx, indirect, base });
  return { memory: at.buffer, driver, device: new PlainPackedDevice(at.buffer, GPA, size, base) };
}

const buffer = (gpa: bigint, len: number, writable: boolean): ChainBuffer => ({ gpa, len, writable });

describe("adding buffers (2.8.21.1)", () => {
  test("a chain is invisible to the device until publish()", () => {
    const { driver, device } = ring();
    const id = driver.addBuffer(0x9000, 3, 100, true);
    expect(device.take()).toBeUndefined();
    driver.publish();
    expect(device.take()).toEqual({ head: id, buffers: [buffer(0x3_0000_9000n, 100, true)] });
    expect(device.take()).toBeUndefined();
  });

  test("a chain of several buffers keeps their order, addresses, lengths and directions", () => {
    const { driver, device } = ring();
    const chain = [buffer(0xffff_ffff_f000n, 12, false), buffer(0x2000n, 0xffff_ffff, true), buffer(0x3000n, 1, true)];
    const id = driver.add(chain);
    expect(device.take()).toBeUndefined();
    driver.publish();
    expect(device.take()).toEqual({ head: id, buffers: chain });
    expect(driver.numFree).toBe(5);
  });

  test("an indirect table takes one descriptor of the ring whatever the chain's length (2.8.7)", () => {
    const { driver, memory, device } = ring();
    const chain = Array.from({ length: 20 }, (_, i) => buffer(BigInt(i) << 12n, i + 1, i > 4));
    const id = driver.addIndirect(chain, {
      buffer: memory,
      byteOffset: TABLE_OFFSET,
      gpa: GPA + BigInt(TABLE_OFFSET),
    });
    driver.publish();
    expect(device.take()).toEqual({ head: id, buffers: chain });
    expect(driver.numFree).toBe(7);
  });

  test("an indirect table is refused unless VIRTIO_F_INDIRECT_DESC was negotiated", () => {
    const { driver, memory } = ring({ indirect: false });
    const table = { buffer: memory, byteOffset: 0, gpa: 0n };
    expect(() => driver.addIndirect([buffer(0n, 1, false)], table)).toThrow(RangeError);
  });

  test("device-readable buffers come first, and an empty chain does not exist", () => {
    const { driver } = ring();
    expect(() => driver.add([buffer(0n, 1, true), buffer(0n, 1, false)])).toThrow(RangeError);
    expect(() => driver.add([])).toThrow(RangeError);
  });

  test.each([1, 2, 3, 255, 32768])("layout of %i descriptors: areas aligned 16, 4, 4, disjoint", (size) => {
    const { desc, avail, used, sizeBytes } = PackedDriver.layout(size);
    expect([desc % 16, avail % 4, used % 4]).toEqual([0, 0, 0]);
    expect(avail).toBeGreaterThanOrEqual(desc + 16 * size);
    expect(used).toBeGreaterThanOrEqual(avail + 4);
    expect(sizeBytes).toBeGreaterThanOrEqual(used + 4);
  });

  test.each([0, 1.5, 32769])("a ring of %d descriptors is refused (2.8: any size up to 32768)", (size) => {
    expect(() => new PackedDriver({ ...place(), size })).toThrow(RangeError);
  });

  test("a ring does not begin past its end", () => {
    expect(() => ring({ size: 5, base: 5 })).toThrow(RangeError);
    expect(ring({ size: 5, base: 4 }).driver.base).toBe(0x0004_0004);
    expect(ring({ size: 5, base: 0x8004_8004 }).driver.base).toBe(0x8004_8004);
  });

  test("wherever a ring begins, its used bits are as the device left them: of this lap in front, of the last one behind", () => {
    for (const base of [0, 3, WRAP, WRAP | 3]) {
      const { device } = ring({ size: 4, base });
      const lap = base & WRAP;
      const bits = [0, 1, 2, 3].map((index) => device.flags(index) & WRAP);
      expect(bits).toEqual([0, 1, 2, 3].map((index) => (index < (base & 0x7fff) ? lap : lap ^ WRAP)));
      expect(device.take()).toBeUndefined();
    }
  });
});

describe("receiving used buffers (2.8.21.2)", () => {
  const chainOf = (count: number) => Array.from({ length: count }, (_, i) => buffer(BigInt(i), 10, true));

  test("chains come back in the device's order with the bytes it wrote", () => {
    const { driver, device } = ring();
    const a = driver.addBuffer(0, 0, 10, true);
    const b = driver.add([buffer(0n, 1, false), buffer(0n, 20, true), buffer(0n, 30, true)]);
    driver.publish();
    device.use(b, 50, 3);
    device.use(a, 7, 1);
    expect([driver.pop(), driver.usedLen]).toEqual([b, 50]);
    expect([driver.pop(), driver.usedLen]).toEqual([a, 7]);
    expect(driver.pop()).toBe(-1);
    expect([driver.numFree, driver.outstanding, driver.lastUsed]).toEqual([8, 0, WRAP | 4]);
  });

  test("a used descriptor without VIRTQ_DESC_F_WRITE says nothing about lengths: none was written (2.8.4)", () => {
    const { driver, device } = ring();
    const id = driver.addBuffer(0, 0, 10, true);
    driver.publish();
    device.use(id, 10);
    device.setFlags(0, device.flags(0) & ~2);
    expect([driver.pop(), driver.usedLen]).toEqual([id, 0]);
  });

  test.each([
    ["an id never added", (id: number) => (id + 1) % 8, 0],
    ["an id past the ring", () => 8, 0],
    ["an id of 65535", () => 0xffff, 0],
    ["a length past the writable bytes", (id: number) => id, 11],
  ])("%s in a used descriptor throws DeviceError", (_, id, len) => {
    for (const take of ["pop", "recycle"] as const) {
      const { driver, device } = ring();
      const added = driver.addBuffer(0, 0, 10, true);
      driver.publish();
      device.use(id(added), len);
      expect(() => driver[take](1)).toThrow(DeviceError);
    }
  });

  test("an id used twice throws", () => {
    const { driver, device } = ring();
    const id = driver.addBuffer(0, 0, 10, true);
    driver.addBuffer(0, 0, 10, true);
    driver.publish();
    device.use(id, 0);
    device.use(id, 0);
    expect(driver.pop()).toBe(id);
    expect(() => driver.pop()).toThrow(DeviceError);
  });

  test("a chain used before it was published throws", () => {
    for (const take of ["pop", "recycle"] as const) {
      const { driver, device } = ring();
      device.use(driver.addBuffer(0, 0, 10, true), 0);
      expect(() => driver[take](1)).toThrow(DeviceError);
    }
  });

  test("a used descriptor with the wrap counter of another lap throws", () => {
    const { driver, device } = ring();
    device.used.wrap = false;
    device.use(driver.addBuffer(0, 0, 10, true), 0);
    driver.publish();
    device.setFlags(0, 0);
    expect(() => driver.pop()).toThrow(/another lap/);
  });

  test("a device that goes on by fewer descriptors than the chain has is not believed", () => {
    const { driver, device } = ring();
    const [a, b] = [driver.add(chainOf(2)), driver.add(chainOf(2))];
    driver.publish();
    device.use(a, 0, 1);
    device.use(b, 0);
    expect([driver.pop(), driver.pop()]).toEqual([a, -1]);
  });
});

/** Publishes `count` chains and takes them back, so that the ring never fills. */
function turn(driver: PackedDriver, device: PlainPackedDevice, count: number): void {
  for (let i = 0; i < count; i++) driver.addBuffer(0, 0, 1, false);
  driver.publish();
  for (let i = 0; i < count; i++) {
    device.use(device.take()!.head, 0);
    driver.pop();
  }
}

/** All positions of a ring of `size`, in the order in which a device passes them, from `base` on. */
function positions(size: number, base: number, count: number): number[] {
  return Array.from({ length: count }, (_, i) => {
    const linear = ((base & 0x7fff) + ((base & WRAP) === 0 ? size : 0) + i) % (2 * size);
    return linear < size ? linear | WRAP : linear - size;
  });
}

describe("kicks (2.8.10: the device event area)", () => {
  test("its flags enable and disable; nothing published since the last question: no kick", () => {
    const { driver, device } = ring();
    expect(driver.needsKick()).toBe(false);
    driver.addBuffer(0, 0, 1, false);
    expect(driver.needsKick()).toBe(false);
    driver.publish();
    expect([driver.needsKick(), driver.needsKick()]).toEqual([true, false]);
    device.setEvent(DISABLE);
    turn(driver, device, 1);
    expect(driver.needsKick()).toBe(false);
    device.setEvent(ENABLE);
    turn(driver, device, 1);
    expect(driver.needsKick()).toBe(true);
  });

  test.each([1, 2, 5, 8])("size %i: kick if and only if the asked position is among the published ones", (size) => {
    for (const base of positions(size, WRAP, 2 * size)) {
      for (const [distance, position] of positions(size, base, 2 * size).entries()) {
        const { driver, device } = ring({ size, base });
        device.setEvent(DESC, position);
        for (const chains of [1, 2, 3]) {
          turn(driver, device, 1);
          turn(driver, device, 0);
          if (chains < 3) continue;
          expect(driver.needsKick(), `${size} from ${base}, asked for ${position}`).toBe(distance < 3);
        }
      }
    }
  });

  test("chains added and not yet published are not passed", () => {
    const { driver, device } = ring();
    device.setEvent(DESC, WRAP | 1);
    driver.addBuffer(0, 0, 1, false);
    driver.publish();
    driver.addBuffer(0, 0, 1, false);
    expect(driver.needsKick()).toBe(false);
    driver.publish();
    expect(driver.needsKick()).toBe(true);
  });

  test("a position inside a chain is passed with the chain", () => {
    const { driver, device } = ring();
    device.setEvent(DESC, WRAP | 2);
    driver.addBuffer(0, 0, 1, false);
    driver.publish();
    expect(driver.needsKick()).toBe(false);
    driver.add([buffer(0n, 1, false), buffer(0n, 1, false), buffer(0n, 1, false)]);
    driver.publish();
    expect(driver.needsKick()).toBe(true);
  });

  test("a whole round of positions between two questions always kicks", () => {
    const { driver, device } = ring({ size: 3 });
    device.setEvent(DESC, 1);
    for (let i = 0; i < 6; i++) turn(driver, device, 1);
    expect(driver.needsKick()).toBe(true);
  });

  test.each([
    ["reserved flags", DISABLE + DESC, WRAP, true],
    ["a position past the ring", DESC, WRAP | 8, true],
    ["a position although event indexes were not negotiated", DESC, WRAP, false],
  ])("%s: DeviceError", (_, flags, offWrap, eventIdx) => {
    const { driver, device } = ring({ eventIdx });
    device.setEvent(flags, offWrap);
    turn(driver, device, 1);
    expect(() => driver.needsKick()).toThrow(DeviceError);
  });
});

describe("interrupts (2.8.10: the driver event area)", () => {
  test("without event indexes its flags carry it; it begins enabled", () => {
    const { driver, device } = ring({ eventIdx: false });
    expect(device.driverEvent.flags).toBe(ENABLE);
    driver.disableInterrupts();
    expect(device.driverEvent.flags).toBe(DISABLE);
    expect(driver.enableInterrupts()).toBe(true);
    expect(device.driverEvent.flags).toBe(ENABLE);
  });

  test("with event indexes it names the position of the next used chain, or `skip` descriptors further, over the end", () => {
    const { driver, device } = ring({ size: 5, base: WRAP | 3 });
    for (let i = 0; i < 4; i++) driver.addBuffer(0, 0, 1, false);
    driver.publish();
    for (const [skip, offWrap] of positions(5, WRAP | 3, 4).entries()) {
      expect(driver.enableInterrupts(skip)).toBe(true);
      expect(device.driverEvent).toEqual({ flags: DESC, offWrap });
    }
    driver.disableInterrupts();
    expect(device.driverEvent.flags).toBe(DISABLE);
  });

  test.each([true, false])("eventIdx %s: enabling after a chain was used says not to sleep", (eventIdx) => {
    const { driver, device } = ring({ eventIdx });
    const id = driver.addBuffer(0, 0, 1, true);
    driver.publish();
    device.use(id, 1);
    expect(driver.enableInterrupts()).toBe(false);
    expect(driver.pop()).toBe(id);
    expect(driver.enableInterrupts()).toBe(true);
  });
});

/** What a driver and a device can be asked to do in a run. */
interface Step {
  do: "add" | "indirect" | "publish" | "take" | "use" | "pop" | "recycle";
  /** Directions of the buffers added; which chain is used; how many are recycled. */
  writable: boolean[];
  number: number;
}

const step: fc.Arbitrary<Step> = fc.record({
  do: fc.constantFrom("add", "add", "indirect", "publish", "take", "use", "use", "pop", "pop", "recycle"),
  writable: fc.array(fc.boolean(), { minLength: 1, maxLength: 4 }),
  number: fc.nat(1000),
});
const run = fc.record({
  size: fc.constantFrom(1, 2, 3, 5, 8, 13),
  start: fc.nat(12),
  wrap: fc.boolean(),
  marksEvery: fc.boolean(),
  steps: fc.array(step, { maxLength: 300, size: "max" }),
});

test("whatever is added in whatever order comes to the device as it is, and comes back once, on any size of ring", () => {
  fc.assert(
    fc.property(run, ({ size, start, wrap, marksEvery, steps }) => {
      const { driver, device, memory } = ring({ size, base: (start % size) | (wrap ? WRAP : 0) });
      device.marksEvery = marksEvery;
      const added: { head: number; buffers: ChainBuffer[]; slots: number }[] = [];
      const published: typeof added = [];
      const taken: typeof added = [];
      const used: ((typeof added)[number] & { len: number })[] = [];
      const slots = () => [added, published, taken, used].flat().reduce((sum, chain) => sum + chain.slots, 0);
      let gpa = 0n;
      let tables = TABLE_OFFSET;
      const act = {
        add(writable: boolean[], indirect: boolean) {
          const buffers = writable.toSorted().map((each) => buffer((gpa += 0x1_0000_0000n), 10, each));
          const byteOffset = (tables += 64);
          const table = { buffer: memory, byteOffset, gpa: GPA + BigInt(byteOffset) };
          const room = size - slots();
          const head = indirect ? driver.addIndirect(buffers, table) : driver.add(buffers);
          const taking = indirect ? 1 : buffers.length;
          expect(head >= 0).toBe(taking <= room);
          if (head >= 0) added.push({ head, buffers, slots: taking });
        },
        publish() {
          driver.publish();
          published.push(...added.splice(0));
        },
        take() {
          const chain = published.shift();
          expect(device.take()).toEqual(chain && { head: chain.head, buffers: chain.buffers });
          if (chain) taken.push(chain);
          return chain !== undefined;
        },
        use(which: number) {
          const [chain] = taken.splice(which % Math.max(1, taken.length), 1);
          if (!chain) return;
          const room = chain.buffers.filter(({ writable }) => writable).length * 10;
          used.push({ ...chain, len: Math.min(which, room) });
          device.use(chain.head, used.at(-1)!.len);
        },
        pop() {
          const chain = used.shift();
          expect(driver.pop()).toBe(chain?.head ?? -1);
          if (chain) expect(driver.usedLen).toBe(chain.len);
        },
        recycle(limit: number) {
          const chains = used.splice(0, limit);
          expect([driver.recycle(limit), driver.usedLen]).toEqual([
            chains.length,
            chains.reduce((sum, { len }) => sum + len, 0),
          ]);
          added.push(...chains.map(({ head, buffers, slots }) => ({ head, buffers, slots })));
        },
      };
      for (const { do: what, writable, number } of steps) {
        if (what === "add" || what === "indirect") act.add(writable, what === "indirect");
        else act[what](number % 7);
        const outstanding = added.length + published.length + taken.length + used.length;
        expect([driver.numFree, driver.outstanding]).toEqual([size - slots(), outstanding]);
      }
      act.publish();
      while (act.take());
      while (taken.length > 0) act.use(0);
      while (used.length > 0) act.pop();
      const { index, wrap: lap } = device.used;
      const position = index | (lap ? WRAP : 0);
      expect([driver.pop(), driver.numFree, driver.lastUsed]).toEqual([-1, size, position]);
    }),
    { numRuns: 300 },
  );
});
