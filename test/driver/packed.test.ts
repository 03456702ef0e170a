/** The driver's side of a packed virtqueue against a device written out from virtio 1.3, section 2.8. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { PackedDriver } from "../../src/driver/packed.ts";
import type { ChainBuffer } from "../../src/driver/virtqueue.ts";
import { PlainPackedDevice } from "./plain-packed-device.ts";

const GPA = 0x1_2345_0000n; // above 4 GiB: both halves of an address count
const TABLE_OFFSET = 0x8000;
const WRAP = 0x8000;

interface Options {
  size?: number;
  eventIdx?: boolean;
  indirect?: boolean;
  base?: number;
}

function ring({ size = 8, eventIdx = true, indirect = true, base = WRAP }: Options = {}) {
  const memory = new SharedArrayBuffer(Math.max(0x10000, PackedDriver.layout(size).sizeBytes));
  const driver = new PackedDriver({ buffer: memory, byteOffset: 0, gpa: GPA, size, eventIdx, indirect, base });
  return { memory, driver, device: new PlainPackedDevice(memory, GPA, size, base) };
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
  steps: fc.array(step, { maxLength: 300, size: "max" }),
});

test("whatever is added in whatever order comes to the device as it is, and comes back once, on any size of ring", () => {
  fc.assert(
    fc.property(run, ({ size, start, wrap, steps }) => {
      const { driver, device, memory } = ring({ size, base: (start % size) | (wrap ? WRAP : 0) });
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
