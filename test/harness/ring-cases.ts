/** Representative rows of sections F to H and J: split and packed rings, headers, floods. */
import { setTimeout as sleep } from "node:timers/promises";
import { expect } from "vitest";
import {
  NET_HDR_CSUM_OFFSET,
  NET_HDR_CSUM_START,
  NET_HDR_FLAGS,
  NET_HDR_GSO_SIZE,
  NET_HDR_GSO_TYPE,
  NET_HDR_SIZE,
  RECEIVEQ,
  TRANSMITQ,
  VIRTIO_NET_F_CSUM,
  VIRTIO_NET_F_HOST_TSO4,
  VIRTIO_NET_F_HOST_TSO6,
  VIRTIO_NET_F_MRG_RXBUF,
  VIRTIO_NET_HDR_F_NEEDS_CSUM,
  VIRTIO_RING_F_EVENT_IDX,
  VIRTIO_RING_F_INDIRECT_DESC,
} from "../../src/layout/virtio.ts";
import type { HostileCase } from "./harness.ts";
import { BUFFERS, type Descriptor, INDIRECT, NEXT, RAM_BYTES, type RawVm, WRITE } from "./raw-vm.ts";

const [GOOD, TABLE] = [BUFFERS, BUFFERS + 0x1_0000n];
const RAM_END = BigInt(RAM_BYTES);
/** The two flags of a packed descriptor that is available in the first lap. */
const AVAILABLE = 1 << 7;
const INDIRECT_FEATURE = { features: [VIRTIO_RING_F_INDIRECT_DESC] };

/** Chains on the transmitq, each given back with length 0; then the ring works as ever. */
function unused(number: string, what: string, chain: Descriptor[], options: Pick<HostileCase, "vm"> = {}): HostileCase {
  return {
    number,
    what,
    ...options,
    run: async (vm, harness) => {
      await vm.start();
      for (let i = 0; i < 3; i++) await vm.transmitInVain(...chain);
      harness.takePeer();
      vm.send(new Uint8Array(100).fill(7), 8);
      await expect.poll(() => harness.takePeer().length, { interval: 2 }).toBe(1);
    },
  };
}

/** The transmitq is broken by what `act` does to it, and says so once. */
function broken(number: string, what: string, act: (vm: RawVm) => void, vm: HostileCase["vm"] = {}): HostileCase {
  return {
    number,
    what,
    vm,
    run: async (machine, harness) => {
      await machine.start();
      const before = harness.events.length;
      act(machine);
      await machine.untilBroken();
      await sleep(10);
      expect(harness.events.slice(before).filter(({ type }) => type === "broken")).toHaveLength(1);
    },
  };
}

/** The same chain as a table. */
function indirect(number: string, what: string, table: Descriptor[], bytes = 16 * table.length): HostileCase {
  return {
    number,
    what: `${what}, in a table`,
    vm: INDIRECT_FEATURE,
    run: async (vm) => {
      await vm.start();
      for (const [i, descriptor] of table.entries()) vm.describe(TABLE + 16n * BigInt(i), descriptor);
      await vm.transmitInVain({ gpa: TABLE, len: bytes, flags: INDIRECT });
    },
  };
}

/** A header with these bytes, and a frame of this length; the frame must not arrive. */
function header(number: string, what: string, bytes: [number, number][], length: number): HostileCase {
  return {
    number,
    what,
    run: async (vm, harness) => {
      await vm.start();
      harness.takePeer();
      const head = Buffer.alloc(NET_HDR_SIZE);
      for (const [at, byte] of bytes) head[at] = byte;
      vm.write(GOOD, head);
      await vm.transmitInVain({ gpa: GOOD, len: NET_HDR_SIZE + length });
      expect(harness.takePeer()).toEqual([]);
    },
  };
}

/** A frame that asks for an offload that was negotiated, in a way that makes little sense; what comes of it must be bounded. */
function offload(
  number: string,
  what: string,
  { gsoType = 0, gsoSize = 0, start = 0, at = 0, length = 100 },
): HostileCase {
  return {
    number,
    what,
    vm: { features: [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6] },
    run: async (vm, harness) => {
      await vm.start();
      const head = Buffer.alloc(NET_HDR_SIZE);
      head[NET_HDR_FLAGS] = VIRTIO_NET_HDR_F_NEEDS_CSUM;
      head[NET_HDR_GSO_TYPE] = gsoType;
      head.writeUInt16LE(gsoSize, NET_HDR_GSO_SIZE);
      head.writeUInt16LE(start, NET_HDR_CSUM_START);
      head.writeUInt16LE(at, NET_HDR_CSUM_OFFSET);
      vm.write(GOOD, head);
      for (let i = 0; i < 5; i++) await vm.transmitInVain({ gpa: GOOD, len: NET_HDR_SIZE + length });
      for (const frame of harness.takePeer()) expect(frame.length).toBeLessThanOrEqual(length);
    },
  };
}

/** What the offender has as a receive buffer; a frame for it is sent again and again. */
function receiving(number: string, what: string, chain: Descriptor[], vm: HostileCase["vm"] = {}): HostileCase {
  return {
    number,
    what,
    vm,
    run: async (machine, harness) => {
      await machine.start();
      const before = harness.counters.malformedBuffers;
      for (const [index, descriptor] of chain.entries()) machine.describe({ ring: RECEIVEQ, index }, descriptor);
      machine.offer(RECEIVEQ, 0);
      harness.sendFromPeer(new Uint8Array(200).fill(9));
      await machine.untilUsed(RECEIVEQ, 1);
      expect(machine.used(RECEIVEQ).len).toBe(0);
      expect(harness.counters.malformedBuffers).toBe(before + 1);
      const gpa = BUFFERS + 0x2_0000n;
      machine.allow(gpa, NET_HDR_SIZE + 200);
      machine.describe({ ring: RECEIVEQ, index: 9 }, { gpa, len: 2048, flags: WRITE });
      machine.offer(RECEIVEQ, 9);
      await machine.untilUsed(RECEIVEQ, 2);
    },
  };
}

const chainOf = (count: number): Descriptor[] =>
  Array.from({ length: count }, (_, i) => ({ gpa: GOOD, len: 1, flags: NEXT, next: (i + 1) % count }));

export const ringCases: HostileCase[] = [
  unused("BI-166", "a descriptor that follows itself", [{ gpa: GOOD, len: 100, flags: NEXT, next: 0 }]),
  unused("BI-167", "a cycle of two", chainOf(2)),
  unused("BI-167", "a cycle of eight", chainOf(8)),
  unused("BI-178", "beyond the end of memory", [{ gpa: RAM_END + 0x1000n, len: 100 }]),
  unused("BI-181", "one byte too far", [{ gpa: RAM_END - 99n, len: 100 }]),
  unused("BI-182", "an address that wraps", [{ gpa: (1n << 64n) - 1n, len: 1 }]),
  unused("BI-183", "a length of 2^32 - 1", [{ gpa: GOOD, len: 0xffff_ffff }]),
  unused("BI-188", "a writable descriptor to transmit", [{ gpa: GOOD, len: 100, flags: WRITE }]),
  unused("BI-191", "a table that was not negotiated", [{ gpa: TABLE, len: 16, flags: INDIRECT }]),
  unused(
    "BI-193",
    "a table and a next descriptor",
    [
      { gpa: TABLE, len: 16, flags: INDIRECT | NEXT, next: 1 },
      { gpa: GOOD, len: 100 },
    ],
    {
      vm: INDIRECT_FEATURE,
    },
  ),
  indirect("BI-192", "a table in a table", [{ gpa: TABLE, len: 16, flags: INDIRECT }]),
  ...[0, 15, 17].map((bytes) => indirect("BI-194", `${bytes} bytes`, [{ gpa: GOOD, len: 100 }], bytes)),
  indirect("BI-198", "a loop", [{ gpa: GOOD, len: 60, flags: NEXT, next: 0 }]),
  indirect("BI-198", "a next descriptor that is not there", [{ gpa: GOOD, len: 60, flags: NEXT, next: 9 }]),
  broken("BI-172", "a head that is none", (vm) => vm.offer(TRANSMITQ, 256)),
  broken("BI-172", "heads of 65535", (vm) => vm.offer(TRANSMITQ, 0xffff, 0xffff)),
  broken("BI-174", "an avail index that jumps", (vm) => vm.setAvailIdx(TRANSMITQ, 257)),
  broken("BI-174", "an avail index that runs backwards", (vm) => vm.setAvailIdx(TRANSMITQ, 0xffff)),
  receiving("BI-189", "a buffer to be read, on the receiveq", [{ gpa: GOOD, len: 2048 }]),
  receiving("BI-178", "a receive buffer beyond memory", [{ gpa: RAM_END, len: 2048, flags: WRITE }]),
  receiving(
    "BI-167",
    "a cycle of receive buffers",
    chainOf(4).map((d) => ({ ...d, flags: NEXT | WRITE })),
    {
      features: [VIRTIO_NET_F_MRG_RXBUF],
    },
  ),
  {
    number: "BI-203, BI-204",
    what: "event words that are nonsense, changed all the time",
    vm: { features: [VIRTIO_RING_F_EVENT_IDX] },
    run: async (vm) => {
      await vm.start();
      const { avail } = vm.areas(TRANSMITQ);
      for (let i = 0; i < 200; i++) {
        vm.write(avail, Uint8Array.of(i, i * 7));
        vm.write(avail + 4n + 2n * BigInt(vm.size), Uint8Array.of(i * 31, i % 2 === 0 ? 0x80 : 0));
        vm.send(new Uint8Array(60), i % 16);
        await vm.untilUsed(TRANSMITQ, i + 1);
      }
    },
  },
  {
    number: "BI-213, BI-297",
    what: "malformed chains at line rate",
    run: async (vm, harness) => {
      await vm.start();
      const before = harness.counters.drops.malformed;
      vm.describe({ ring: TRANSMITQ, index: 0 }, { gpa: RAM_END, len: 100 });
      let sent = 0;
      for (; sent < 20_000; sent += 200) {
        vm.offer(TRANSMITQ, ...Array.from({ length: 200 }, () => 0));
        await vm.untilUsed(TRANSMITQ, (sent + 200) & 0xffff);
      }
      expect(harness.counters.drops.malformed - before).toBe(sent);
    },
  },
  {
    number: "BI-173, BI-214",
    what: "one bad chain among ten, and one head many times",
    run: async (vm, harness) => {
      await vm.start();
      harness.takePeer();
      vm.send(new Uint8Array(100).fill(1), 1);
      vm.describe({ ring: TRANSMITQ, index: 0 }, { gpa: RAM_END, len: 100 });
      for (let i = 0; i < 10; i++) vm.offer(TRANSMITQ, 0, ...Array.from({ length: 9 }, () => 1));
      await vm.untilUsed(TRANSMITQ, 101);
      const arrived: Uint8Array[] = [];
      await expect.poll(() => arrived.push(...harness.takePeer()), { interval: 2 }).toBe(91);
    },
  },
  ...[0, AVAILABLE | (1 << 15), 1 << 15].map((flags) => ({
    number: "BI-218, BI-219",
    what: `packed, flags of ${flags} in every slot: nothing is available`,
    vm: { packed: true },
    run: async (vm: RawVm) => {
      await vm.start();
      for (let index = 0; index < vm.size; index++)
        vm.describe({ ring: TRANSMITQ, index }, { gpa: GOOD, len: 100, flags });
      await sleep(20);
      expect(await vm.frontend.getVringBase(TRANSMITQ)).toBe(0x8000_8000);
    },
  })),
  broken(
    "BI-221",
    "packed, a chain without end",
    (vm) => {
      for (let index = vm.size - 1; index >= 0; index--)
        vm.describe({ ring: TRANSMITQ, index }, { gpa: GOOD, len: 1, flags: AVAILABLE | NEXT });
    },
    { packed: true },
  ),
  broken(
    "BI-223",
    "packed, a head whose chain is not available",
    (vm) => vm.describe({ ring: TRANSMITQ, index: 0 }, { gpa: GOOD, len: 1, flags: AVAILABLE | NEXT }),
    { packed: true },
  ),
  ...[
    { gpa: RAM_END, len: 100, flags: AVAILABLE, next: 0xffff },
    { gpa: GOOD, len: 0xffff_ffff, flags: AVAILABLE, next: 256 },
    { gpa: TABLE, len: 8, flags: AVAILABLE | INDIRECT },
    { gpa: GOOD, len: 11, flags: AVAILABLE },
  ].map((descriptor, i) => ({
    number: ["BI-229, BI-224", "BI-228, BI-224", "BI-226", "BI-243"][i]!,
    what: `packed, ${JSON.stringify({ ...descriptor, gpa: String(descriptor.gpa) })}`,
    vm: { packed: true, features: [VIRTIO_RING_F_INDIRECT_DESC], size: 3 },
    run: async (vm: RawVm) => {
      await vm.start();
      vm.describe({ ring: TRANSMITQ, index: 0 }, descriptor);
      const given = () => Buffer.from(vm.guest.read(vm.areas(TRANSMITQ).desc + 8n, 8));
      await expect.poll(() => given().readUInt16LE(6) >> 15, { interval: 2 }).toBe(1);
      expect([given().readUInt32LE(0), given().readUInt16LE(4)]).toEqual([0, descriptor.next ?? 0]);
    },
  })),
  header("BI-243", "a header cut short", [], -1),
  header("BI-244", "a header and nothing else", [], 0),
  header("BI-248", "a frame of 70000 bytes", [], 70_000),
  header("BI-249", "a segmentation of type 0x7f", [[NET_HDR_GSO_TYPE, 0x7f]], 100),
  header(
    "BI-249",
    "a segmentation that was not negotiated",
    [
      [NET_HDR_GSO_TYPE, 1],
      [NET_HDR_GSO_SIZE, 1],
    ],
    100,
  ),
  header(
    "BI-254",
    "a checksum at the end that was not negotiated",
    [
      [NET_HDR_FLAGS, 1],
      [NET_HDR_CSUM_START, 99],
    ],
    100,
  ),
  offload("BI-251", "segments of one byte", { gsoType: 1, gsoSize: 1, start: 34, at: 16, length: 60_000 }),
  offload("BI-251", "segments longer than the frame", { gsoType: 1, gsoSize: 0xffff, start: 34, at: 16 }),
  offload("BI-252", "segments of no bytes", { gsoType: 4, gsoSize: 0, start: 54, at: 16, length: 9000 }),
  offload("BI-254", "a checksum from the last byte on", { start: 99, at: 0 }),
  offload("BI-256", "a checksum beyond 65535", { start: 0xffff, at: 0xffff }),
  offload("BI-257", "a checksum in the Ethernet header", { start: 0, at: 2 }),
  {
    number: "BI-263, BI-266",
    what: "buffers that hold no frame",
    run: async (vm, harness) => {
      await vm.start();
      for (let index = 0; index < 4; index++) {
        vm.describe({ ring: RECEIVEQ, index }, { gpa: GOOD + BigInt(index * 256), len: 64, flags: WRITE });
        vm.offer(RECEIVEQ, index);
      }
      for (let i = 0; i < 5; i++) harness.sendFromPeer(new Uint8Array(500));
      await sleep(20);
      expect(vm.used(RECEIVEQ).idx).toBe(0);
    },
  },
  {
    number: "BI-296, BI-298",
    what: "a transmitq that is never empty, kicked all the time",
    run: async (vm, harness) => {
      await vm.start();
      vm.send(new Uint8Array(60), 0);
      for (let round = 0; round < 300; round++) {
        vm.offer(TRANSMITQ, ...Array.from({ length: 64 }, () => 0));
        await expect.poll(() => (65 + 64 * round - vm.used(TRANSMITQ).idx) & 0xffff, { interval: 0 }).toBeLessThan(128);
        harness.takePeer();
      }
    },
  },
  {
    number: "BI-303",
    what: "front-ends that die in the middle of traffic",
    run: async (vm, harness) => {
      vm.frontend[Symbol.dispose]();
      const { RawVm: Machine } = await import("./raw-vm.ts");
      for (let life = 0; life < 20; life++) {
        using next = new Machine(harness.path("offender"));
        await next.start();
        for (let slot = 0; slot < 64; slot++) next.send(new Uint8Array(1000), slot);
      }
    },
  },
];
