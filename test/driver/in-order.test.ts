/** Both kinds of ring with VIRTIO_F_IN_ORDER (virtio 1.3, 2.7.9 and 2.8.8): used one by one, or a batch by one entry. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { PackedDriver } from "../../src/driver/packed.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import { DeviceError } from "../../src/driver/virtqueue.ts";
import type { VirtqueueDriver } from "../../src/driver/virtqueue.ts";
import { PlainDevice } from "./plain-device.ts";
import type { TakenChain } from "./plain-device.ts";
import { PlainPackedDevice } from "./plain-packed-device.ts";

const GPA = 0x4000_0000n;
const SIZE = 8;

interface Device {
  take(): TakenChain | undefined;
  /** Gives all these chains back by one entry, for the last of them. */
  use(chains: readonly TakenChain[], len: number): void;
}

const place = () => ({ buffer: new SharedArrayBuffer(4096), byteOffset: 0, gpa: GPA, size: SIZE, eventIdx: true });

function split(): { driver: VirtqueueDriver; device: Device } {
  const at = place();
  const driver = new SplitDriver({ ...at, indirect: true, inOrder: true });
  const device = new PlainDevice(at.buffer, GPA, SIZE, true);
  const use = (chains: readonly TakenChain[], len: number) => {
    const first = device.usedIdx;
    device.use(chains.at(-1)!.head, len);
    device.setUsedIdx((first + chains.length) & 0xffff);
  };
  return { driver, device: { take: () => device.take(), use } };
}

function packed(): { driver: VirtqueueDriver; device: Device } {
  const at = place();
  const driver = new PackedDriver({ ...at, indirect: true, inOrder: true });
  const device = new PlainPackedDevice(at.buffer, GPA, SIZE);
  const use = (chains: readonly TakenChain[], len: number) => {
    const slots = chains.reduce((sum, { buffers }) => sum + buffers.length, 0);
    device.use(chains.at(-1)!.head, len, slots);
  };
  return { driver, device: { take: () => device.take(), use } };
}

/** How many buffers the chains of a turn have, and by how many at a time they are used. */
const turns = fc.array(
  fc.record({
    chains: fc.array(fc.integer({ min: 1, max: 3 }), { maxLength: SIZE }),
    batch: fc.integer({ min: 1, max: 4 }),
  }),
  { maxLength: 40, size: "max" },
);

describe.each([
  ["split", split],
  ["packed", packed],
])("%s", (kind, ring) => {
  test("chains come back in order, once; those skipped by an entry count as used whole", () => {
    fc.assert(
      fc.property(turns, (all) => {
        const { driver, device } = ring();
        for (const { chains, batch } of all) {
          const added: number[] = [];
          for (const count of chains) {
            const chain = Array.from({ length: count }, (_, i) => ({ gpa: BigInt(i), len: 10, writable: true }));
            const id = driver.add(chain);
            if (id >= 0) added.push(id);
          }
          driver.publish();
          const taken = added.map(() => device.take()!);
          expect(taken.map(({ head }) => head)).toEqual(added);
          for (let done = 0; done < taken.length; done += batch) {
            const part = taken.slice(done, done + batch);
            expect(driver.enableInterrupts()).toBe(true);
            device.use(part, 3);
            for (const [i, { head, buffers }] of part.entries()) {
              expect(driver.enableInterrupts()).toBe(false);
              const len = i + 1 === part.length ? 3 : 10 * buffers.length;
              expect([driver.pop(), driver.usedLen]).toEqual([head, len]);
            }
          }
          expect([driver.pop(), driver.numFree, driver.outstanding]).toEqual([-1, SIZE, 0]);
        }
      }),
    );
  });

  test("a chain that was used before, by the entry of a later one, cannot be used again", () => {
    const { driver, device } = ring();
    for (let i = 0; i < 4; i++) driver.addBuffer(i, 0, 10, true);
    driver.publish();
    const [a, b] = [device.take()!, device.take()!];
    device.use([a, b], 0);
    device.use([a], 0);
    expect([driver.pop(), driver.pop()]).toEqual([a.head, b.head]);
    expect(() => driver.pop()).toThrow(DeviceError);
  });

  test("recycle() would use descriptors out of order", () => {
    expect(() => ring().driver.recycle(1)).toThrow(RangeError);
  });

  if (kind === "split") {
    test("descriptors are used in the order of the table (2.7.5)", () => {
      const { driver, device } = ring();
      for (let i = 0; i < 20; i++) {
        const ids = [driver.addBuffer(0, 0, 1, true), driver.addBuffer(0, 0, 1, true), driver.addBuffer(0, 0, 1, true)];
        expect(ids).toEqual([0, 1, 2].map((k) => (3 * i + k) % SIZE));
        driver.publish();
        device.use(
          ids.map(() => device.take()!),
          1,
        );
        while (driver.pop() >= 0);
      }
    });

    test("an entry for more chains than the index announces throws", () => {
      const at = place();
      const driver = new SplitDriver({ ...at, indirect: true, inOrder: true });
      const device = new PlainDevice(at.buffer, GPA, SIZE, true);
      driver.addBuffer(0, 0, 10, true);
      const second = driver.addBuffer(0, 0, 10, true);
      driver.publish();
      device.use(second, 0);
      expect(() => driver.pop()).toThrow(/order/);
    });
  }
});
