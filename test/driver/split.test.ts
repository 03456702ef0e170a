/** The driver's side of a split virtqueue against a device written out from virtio 1.3, section 2.7. */
import { describe, expect, test } from "vitest";
import { SplitDriver } from "../../src/driver/split.ts";
import { DeviceError } from "../../src/driver/virtqueue.ts";
import type { ChainBuffer } from "../../src/driver/virtqueue.ts";
import { VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY } from "../../src/layout/virtio.ts";
import { PlainDevice } from "./plain-device.ts";

const GPA = 0x1_2345_0000n; // above 4 GiB: both halves of an address count
const TABLE_OFFSET = 0x8000;

interface Options {
  size?: number;
  eventIdx?: boolean;
  indirect?: boolean;
  base?: number;
}

function ring({ size = 8, eventIdx = true, indirect = true, base = 0 }: Options = {}) {
  const memory = new SharedArrayBuffer(0x10000);
  const driver = new SplitDriver({ buffer: memory, byteOffset: 0, gpa: GPA, size, eventIdx, indirect, base });
  return { memory, driver, device: new PlainDevice(memory, GPA, size, eventIdx, base) };
}

const buffer = (gpa: bigint, len: number, writable: boolean): ChainBuffer => ({ gpa, len, writable });

describe("adding buffers (2.7.13)", () => {
  test("a chain is invisible to the device until publish()", () => {
    const { driver, device } = ring();
    const head = driver.addBuffer(0x9000, 3, 100, true);
    expect(device.take()).toBeUndefined();
    driver.publish();
    expect(device.take()).toEqual({ head, buffers: [buffer(0x3_0000_9000n, 100, true)] });
    expect(device.take()).toBeUndefined();
  });

  test("a chain of several buffers keeps their order, addresses, lengths and directions", () => {
    const { driver, device } = ring();
    const chain = [buffer(0xffff_ffff_f000n, 12, false), buffer(0x2000n, 0xffff_ffff, true), buffer(0x3000n, 1, true)];
    const head = driver.add(chain);
    driver.publish();
    expect(device.take()).toEqual({ head, buffers: chain });
    expect(driver.numFree).toBe(5);
  });

  test("an indirect table takes one ring descriptor whatever the chain's length (2.7.7)", () => {
    const { driver, memory, device } = ring();
    const chain = Array.from({ length: 20 }, (_, i) => buffer(BigInt(i) << 12n, i + 1, i > 4));
    const head = driver.addIndirect(chain, {
      buffer: memory,
      byteOffset: TABLE_OFFSET,
      gpa: GPA + BigInt(TABLE_OFFSET),
    });
    driver.publish();
    expect(device.take()).toEqual({ head, buffers: chain });
    expect(driver.numFree).toBe(7);
  });

  test("an indirect table is refused unless VIRTIO_F_INDIRECT_DESC was negotiated (2.7.7.1)", () => {
    const { driver, memory } = ring({ indirect: false });
    expect(() => driver.addIndirect([buffer(0n, 1, false)], { buffer: memory, byteOffset: 0, gpa: 0n })).toThrow(
      RangeError,
    );
  });

  test("device-readable buffers come first (2.7.4.2), and an empty chain does not exist", () => {
    const { driver } = ring();
    expect(() => driver.add([buffer(0n, 1, true), buffer(0n, 1, false)])).toThrow(RangeError);
    expect(() => driver.add([])).toThrow(RangeError);
  });

  test("a full ring answers -1 and changes nothing; a popped chain makes room again", () => {
    const { driver, device } = ring({ size: 4 });
    expect(driver.add([buffer(0n, 1, false), buffer(1n, 1, false), buffer(2n, 1, false)])).toBeGreaterThanOrEqual(0);
    expect(driver.add([buffer(3n, 1, false), buffer(4n, 1, false)])).toBe(-1);
    expect(driver.addBuffer(5, 0, 1, false)).toBeGreaterThanOrEqual(0);
    expect(driver.addBuffer(6, 0, 1, false)).toBe(-1);
    driver.publish();
    expect(device.take()?.buffers.map((each) => each.gpa)).toEqual([0n, 1n, 2n]);
    const last = device.take();
    expect(last?.buffers.map((each) => each.gpa)).toEqual([5n]);
    device.use(last!.head, 0);
    expect(driver.pop()).toBe(last!.head);
    expect(driver.add([buffer(0n, 1, false), buffer(0n, 1, false)])).toBe(-1);
    expect(driver.addBuffer(7, 0, 1, false)).toBe(last!.head);
  });

  test.each([1, 2, 256, 32768])(
    "layout of %i descriptors: areas aligned 16, 2, 4, disjoint, event words inside",
    (size) => {
      const bare = SplitDriver.layout(size, false);
      const { desc, avail, used, sizeBytes } = SplitDriver.layout(size, true);
      expect([desc % 16, avail % 2, used % 4]).toEqual([0, 0, 0]);
      expect(avail).toBeGreaterThanOrEqual(desc + 16 * size);
      expect(used).toBeGreaterThanOrEqual(avail + 6 + 2 * size);
      expect(sizeBytes).toBeGreaterThanOrEqual(used + 6 + 8 * size);
      expect(bare.sizeBytes).toBeGreaterThanOrEqual(bare.used + 4 + 8 * size);
    },
  );

  test.each([0, 3, 65536])("a ring of %i descriptors is refused (2.7: a power of two up to 32768)", (size) => {
    expect(() => ring({ size })).toThrow(RangeError);
  });
});

describe("receiving used buffers (2.7.14)", () => {
  test("chains come back in the device's order with the bytes it wrote", () => {
    const { driver, device } = ring();
    const a = driver.addBuffer(0, 0, 10, true);
    const b = driver.add([buffer(0n, 1, false), buffer(0n, 20, true), buffer(0n, 30, true)]);
    driver.publish();
    device.use(b, 50);
    device.use(a, 7);
    expect([driver.pop(), driver.usedLen]).toEqual([b, 50]);
    expect([driver.pop(), driver.usedLen]).toEqual([a, 7]);
    expect(driver.pop()).toBe(-1);
    expect([driver.numFree, driver.outstanding, driver.lastUsed]).toEqual([8, 0, 2]);
  });

  test.each([
    ["a head never added", (head: number) => (head + 1) % 8, 0],
    ["an id past the ring", () => 8, 0],
    ["an id of 2^32 - 1", () => 0xffff_ffff, 0],
    ["a length past the writable bytes", (head: number) => head, 11],
  ])("%s in the used ring throws DeviceError", (_, id, len) => {
    const { driver, device } = ring();
    const head = driver.addBuffer(0, 0, 10, true);
    driver.publish();
    device.use(id(head), len);
    expect(() => driver.pop()).toThrow(DeviceError);
  });

  test("a device-readable buffer has no writable bytes: any used length but 0 throws", () => {
    const { driver, device } = ring();
    const head = driver.addBuffer(0, 0, 10, false);
    driver.publish();
    device.use(head, 1);
    expect(() => driver.pop()).toThrow(/len 1 .* 0 writable bytes/);
  });

  test("a head used twice throws", () => {
    const { driver, device } = ring();
    const head = driver.addBuffer(0, 0, 10, true);
    driver.addBuffer(0, 0, 10, true);
    driver.publish();
    device.use(head, 0);
    device.use(head, 0);
    expect(driver.pop()).toBe(head);
    expect(() => driver.pop()).toThrow(DeviceError);
  });

  test("a used index beyond the published chains throws, added or not", () => {
    const { driver, device } = ring();
    driver.addBuffer(0, 0, 10, true);
    driver.publish();
    driver.addBuffer(0, 0, 10, true);
    device.setUsedIdx(2);
    expect(() => driver.pop()).toThrow(DeviceError);
  });

  test("a used index that runs backwards throws", () => {
    const { driver, device } = ring();
    device.setUsedIdx(0xffff);
    expect(() => driver.pop()).toThrow(DeviceError);
  });

  test("recycle() makes used chains available again as they were, and judges used entries like pop()", () => {
    const { driver, device } = ring({ size: 4, base: 65534 });
    const chain = [buffer(0x1000n, 12, false), buffer(0x2000n, 64, true)];
    const heads = [driver.add(chain), driver.addBuffer(0x3000, 0, 100, true)];
    driver.publish();
    for (const len of [10, 20, 30]) {
      expect(heads.map(() => device.take()?.head)).toEqual(heads);
      expect(driver.recycle(4)).toBe(0);
      for (const head of heads) device.use(head, len);
      expect([driver.recycle(1), driver.usedLen, driver.recycle(4), driver.usedLen]).toEqual([1, len, 1, len]);
      expect(device.take()).toBeUndefined();
      driver.publish();
    }
    expect(device.take()).toEqual({ head: heads[0], buffers: chain });
    device.use(heads[0]!, 65);
    expect(() => driver.recycle(1)).toThrow(DeviceError);
    expect([driver.outstanding, driver.numFree]).toEqual([2, 1]);
  });

  test("indexes wrap from 65535 to 0 on both rings; every chain comes back once", () => {
    const { driver, device } = ring({ base: 65530 });
    device.setAvailEvent(65530);
    for (let i = 0; i < 20; i++) {
      const heads = [driver.addBuffer(i, 0, 64, true), driver.add([buffer(0n, 8, false), buffer(0n, i, true)])];
      driver.publish();
      expect(driver.needsKick()).toBe(true);
      for (const head of heads) {
        expect(device.take()?.head).toBe(head);
        device.use(head, i);
        device.setAvailEvent(device.availIdx);
      }
      expect([driver.pop(), driver.pop(), driver.pop()]).toEqual([...heads, -1]);
    }
    expect([driver.lastUsed, driver.numFree]).toEqual([(65530 + 40) & 0xffff, 8]);
  });
});

/** Publishes `count` chains and takes them back, so that the ring never fills. */
function turn(driver: SplitDriver, device: PlainDevice, count: number): void {
  for (let i = 0; i < count; i++) driver.addBuffer(0, 0, 1, false);
  driver.publish();
  for (let i = 0; i < count; i++) {
    device.use(device.take()!.head, 0);
    driver.pop();
  }
}

describe("kicks (2.7.10: the device's notification suppression)", () => {
  test("without event indexes VRING_USED_F_NO_NOTIFY decides", () => {
    const { driver, device } = ring({ eventIdx: false });
    turn(driver, device, 1);
    expect(driver.needsKick()).toBe(true);
    device.setNoNotify(VRING_USED_F_NO_NOTIFY);
    turn(driver, device, 1);
    expect(driver.needsKick()).toBe(false);
  });

  test("with event indexes the flag is ignored", () => {
    const { driver, device } = ring();
    device.setNoNotify(VRING_USED_F_NO_NOTIFY);
    turn(driver, device, 1);
    expect(driver.needsKick()).toBe(true);
  });

  test("nothing published since the last question: no kick", () => {
    const { driver } = ring();
    driver.addBuffer(0, 0, 1, false);
    expect(driver.needsKick()).toBe(false);
    driver.publish();
    expect([driver.needsKick(), driver.needsKick()]).toEqual([true, false]);
  });

  test.each([0, 1, 65533, 65535])(
    "from index %i: kick if and only if avail_event is among the published entries",
    (base) => {
      for (let event = base - 3; event < base + 6; event++) {
        const { driver, device } = ring({ base });
        device.setAvailEvent(event & 0xffff);
        turn(driver, device, 3);
        expect(driver.needsKick(), `avail_event ${event}`).toBe(event >= base && event < base + 3);
      }
    },
  );

  test("batches published between two questions count together", () => {
    const { driver, device } = ring({ base: 10 });
    device.setAvailEvent(10);
    turn(driver, device, 2);
    turn(driver, device, 2);
    expect(driver.needsKick()).toBe(true);
  });

  test("65536 entries between two questions always kick: the index alone would show none", () => {
    const { driver, device } = ring({ size: 1024 });
    for (let i = 0; i < 64; i++) turn(driver, device, 1024);
    device.setAvailEvent(30000);
    expect(driver.needsKick()).toBe(true);
  });
});

describe("interrupts (2.7.7 and 2.7.8: the driver's suppression)", () => {
  test("without event indexes the avail flag carries it; it begins enabled", () => {
    const { driver, device } = ring({ eventIdx: false });
    expect(device.availFlags).toBe(0);
    driver.disableInterrupts();
    expect(device.availFlags).toBe(VRING_AVAIL_F_NO_INTERRUPT);
    expect(driver.enableInterrupts()).toBe(true);
    expect(device.availFlags).toBe(0);
  });

  test("with event indexes the flag stays 0 and used_event carries it", () => {
    const { driver, device } = ring({ base: 65535 });
    expect(device.usedEvent).toBe(65535);
    turn(driver, device, 3);
    driver.disableInterrupts();
    expect([device.availFlags, device.usedEvent]).toEqual([0, 2 + 0x8000]);
    expect(driver.enableInterrupts()).toBe(true);
    expect([device.availFlags, device.usedEvent]).toEqual([0, 2]);
  });

  test("with event indexes an interrupt can be put off: no sleep once that many entries were used", () => {
    const { driver, device } = ring({ base: 65535 });
    for (let i = 0; i < 4; i++) driver.addBuffer(0, 0, 1, false);
    driver.publish();
    device.use(device.take()!.head, 0);
    device.use(device.take()!.head, 0);
    expect(driver.enableInterrupts(2)).toBe(true);
    expect(device.usedEvent).toBe(1);
    device.use(device.take()!.head, 0);
    expect(driver.enableInterrupts(2)).toBe(false);
  });

  test.each([true, false])("eventIdx %s: enabling after an entry was used says not to sleep", (eventIdx) => {
    const { driver, device } = ring({ eventIdx });
    const head = driver.addBuffer(0, 0, 1, true);
    driver.publish();
    device.use(head, 1);
    expect(driver.enableInterrupts()).toBe(false);
    expect(driver.pop()).toBe(head);
    expect(driver.enableInterrupts()).toBe(true);
  });
});
