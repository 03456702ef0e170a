/** Representative rows of sections A to E: sockets, messages, memory tables, virtqueue set-up. */
import { closeSync, openSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { expect } from "vitest";
import { eventfdCreate } from "../../native/eventfd.ts";
import { pipe } from "../../native/fd.ts";
import { close } from "../../native/libc.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { RECEIVEQ, TRANSMITQ, VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { encodeMemTable, encodeMessage, encodeU64, encodeVringState } from "../../src/vhost-user/codec.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";
import type { HostileCase } from "./harness.ts";
import { BUFFERS, RAM_BYTES, RING_SPACE, type RawVm, bit } from "./raw-vm.ts";

const refused = (asked: Promise<unknown>): Promise<void> => expect(asked).rejects.toThrow(/refused/);

/** A request of the VM's after which everything before it has been handled. */
const barrier = (vm: RawVm): Promise<bigint> => vm.frontend.getFeatures();

function header(request: number, flags: number, sizeBytes: number): Buffer {
  const bytes = encodeMessage(request, flags, new Uint8Array(0));
  bytes.writeUInt32LE(sizeBytes, L.HEADER_PAYLOAD_SIZE);
  return bytes;
}

/** A generator of numbers that look random: 0 to limit - 1. */
function numbers(seed: number): (limit: number) => number {
  let state = seed;
  return (limit) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((state / 2 ** 32) * limit);
  };
}

const region = (vm: RawVm) => vm.guest.regions[0]!;
const INFLIGHT = bit(L.VHOST_USER_PROTOCOL_F_REPLY_ACK) | bit(L.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD);
const U64_MAX = (1n << 64n) - 1n;

export const controlCases: HostileCase[] = [
  {
    number: "BI-001",
    what: "connections that say nothing",
    run: async (vm, harness) => {
      vm.frontend[Symbol.dispose]();
      for (let i = 0; i < 200; i++) {
        await sleep(0);
        Frontend.connect(harness.path("offender"))[Symbol.dispose]();
      }
    },
  },
  {
    number: "BI-002",
    what: "a header byte by byte",
    run: async (vm) => {
      for (const byte of encodeMessage(L.VHOST_USER_GET_FEATURES, 0, new Uint8Array(0))) {
        await vm.frontend.send(Uint8Array.of(byte));
        await sleep(2);
      }
      expect(await vm.frontend.receive()).toMatchObject({ request: L.VHOST_USER_GET_FEATURES });
    },
  },
  ...[1, 7, 11].map((length) => ({
    number: "BI-003",
    what: `a header cut at ${length} bytes`,
    run: (vm: RawVm) => vm.frontend.send(header(L.VHOST_USER_GET_FEATURES, 0, 0).subarray(0, length)),
  })),
  ...[0xffff_ffff, 0x8000_0000, L.PAYLOAD_SIZE_MAX + 1].map((sizeBytes) => ({
    number: sizeBytes === L.PAYLOAD_SIZE_MAX + 1 ? "BI-008" : "BI-007",
    what: `a payload of ${sizeBytes} bytes is announced`,
    run: async (vm: RawVm) => {
      await vm.frontend.send(header(L.VHOST_USER_SET_FEATURES, 0, sizeBytes));
      await vm.expectDropped();
    },
  })),
  ...[0, 46, 1000, 0xffff_ffff].map((request) => ({
    number: "BI-012",
    what: `request ${request}`,
    run: async (vm: RawVm) => {
      await vm.negotiate();
      await refused(vm.frontend.command(request, Buffer.alloc(16)));
      await barrier(vm);
    },
  })),
  {
    number: "BI-018",
    what: "100 messages with 253 fds each",
    run: async (vm) => {
      const fds = Array.from({ length: 253 }, () => vm.err);
      for (let i = 0; i < 100; i++) {
        await vm.frontend.send(encodeMessage(L.VHOST_USER_GET_FEATURES, 0, new Uint8Array(0)), fds);
        await vm.frontend.receive();
      }
    },
  },
  {
    number: "BI-024",
    what: "kick fds that are no eventfds",
    run: async (vm) => {
      await vm.negotiate();
      const ends = pipe();
      const file = openSync("/dev/null", "r");
      for (const fd of [...ends, file]) await refused(vm.frontend.setVringKick(0, fd));
      ends.forEach(close);
      closeSync(file);
    },
  },
  {
    number: "BI-036",
    what: "random bytes",
    run: async (vm, harness) => {
      vm.frontend[Symbol.dispose]();
      const random = numbers(36);
      for (let i = 0; i < 40; i++) {
        using frontend = Frontend.connect(harness.path("offender"));
        await frontend.send(Uint8Array.from({ length: 1 + random(200) }, () => random(256))).catch(() => undefined);
      }
    },
  },
  {
    number: "BI-037",
    what: "features that were not offered",
    run: async (vm) => {
      await vm.negotiate();
      for (const feature of [26, 33, 36, 63]) await refused(vm.frontend.setFeatures(bit(feature)));
    },
  },
  {
    number: "BI-041",
    what: "protocol features that were not offered",
    run: async (vm) => {
      await vm.negotiate();
      await refused(vm.frontend.setProtocolFeatures(bit(62) | bit(L.VHOST_USER_PROTOCOL_F_REPLY_ACK)));
    },
  },
  {
    number: "BI-046",
    what: "well-formed messages in any order, with any numbers",
    run: async (vm) => {
      await vm.negotiate();
      const random = numbers(46);
      const word = () => BigInt([0, 1, 2, 255, 256, 65_535, 0xffff_ffff][random(7)]!);
      const payloads = [
        () => new Uint8Array(0),
        () => encodeU64(word()),
        () => encodeVringState({ index: Number(word() & 3n), num: Number(word()) }),
        () => Uint8Array.from({ length: 40 }, () => random(256)),
      ];
      for (let i = 0; i < 600; i++) {
        const request = 1 + random(45);
        // A good reply to a request that has one looks like a wrong ack: what it says does not matter here.
        const fds = random(4) === 0 ? [vm.err] : [];
        await vm.frontend.send(encodeMessage(request, 0, payloads[random(4)]!()), fds).catch(() => undefined);
        if (i % 50 === 49) await sleep(1);
      }
    },
  },
  {
    number: "BI-056",
    what: "a memory table of 2^32 - 1 regions",
    run: async (vm) => {
      await vm.negotiate();
      const table = encodeMemTable([region(vm)]);
      table.writeUInt32LE(0xffff_ffff, 0);
      await refused(vm.frontend.command(L.VHOST_USER_SET_MEM_TABLE, table, [region(vm).fd]));
    },
  },
  {
    number: "BI-057, BI-058",
    what: "fewer and more fds than regions",
    run: async (vm) => {
      await vm.negotiate();
      const table = encodeMemTable([region(vm)]);
      await refused(vm.frontend.command(L.VHOST_USER_SET_MEM_TABLE, table, []));
      await refused(vm.frontend.command(L.VHOST_USER_SET_MEM_TABLE, table, [region(vm).fd, region(vm).fd]));
    },
  },
  ...(
    [
      ["BI-061", { gpa: U64_MAX - 4095n }],
      ["BI-062", { userAddress: U64_MAX - 4095n }],
      ["BI-063", { mmapOffset: U64_MAX - 4095n }],
      ["BI-064", { sizeBytes: U64_MAX }],
      ["BI-073", { sizeBytes: BigInt(RAM_BYTES) + 1n }],
    ] as const
  ).map(([number, wrong]) => ({
    number,
    what: `a region with ${JSON.stringify(wrong, (_key, value) => (typeof value === "bigint" ? String(value) : value))}`,
    run: async (vm: RawVm) => {
      await vm.start();
      await refused(vm.frontend.setMemTable([{ ...region(vm), ...wrong }]));
      vm.send(new Uint8Array(60));
      await vm.untilUsed(TRANSMITQ, 1); // the old table is in force
    },
  })),
  {
    number: "BI-066",
    what: "regions that overlap by a byte",
    run: async (vm) => {
      await vm.negotiate();
      const { sizeBytes, ...rest } = region(vm);
      const second = { ...rest, gpa: sizeBytes - 1n, userAddress: rest.userAddress + sizeBytes * 2n, sizeBytes: 4096n };
      await refused(vm.frontend.setMemTable([region(vm), second]));
    },
  },
  {
    number: "BI-076",
    what: "a region on /dev/zero, a pipe, an eventfd",
    run: async (vm) => {
      await vm.negotiate();
      const ends = pipe();
      const zero = openSync("/dev/zero", "r+");
      for (const fd of [zero, ...ends, vm.err]) await refused(vm.frontend.setMemTable([{ ...region(vm), fd }]));
      ends.forEach(close);
      closeSync(zero);
    },
  },
  {
    number: "BI-083",
    what: "other memory tables while frames flow",
    run: async (vm) => {
      await vm.start();
      for (let i = 0; i < 100; i++) {
        vm.send(new Uint8Array(60 + i));
        const sizeBytes = BigInt(RAM_BYTES) - (i % 2 === 0 ? 4096n : 0n);
        await vm.frontend.setMemTable([{ ...region(vm), sizeBytes }]);
      }
      await vm.untilUsed(TRANSMITQ, 100);
    },
  },
  {
    number: "BI-097",
    what: "virtqueues that do not exist",
    run: async (vm) => {
      await vm.negotiate();
      for (const index of [4, 0xff, 0xffff, 0x1_0000, 0x1_0001, 0x8000_0000]) {
        await refused(vm.frontend.setVringNum(index, 256));
        await refused(vm.frontend.setVringBase(index, 0));
        await refused(vm.frontend.setVringEnable(index, true));
      }
    },
  },
  {
    number: "BI-098",
    what: "kick, call and err with the wrong number of fds",
    run: async (vm) => {
      await vm.negotiate();
      for (const request of [L.VHOST_USER_SET_VRING_KICK, L.VHOST_USER_SET_VRING_CALL, L.VHOST_USER_SET_VRING_ERR]) {
        await refused(vm.frontend.command(request, encodeU64(0n), []));
        await refused(vm.frontend.command(request, encodeU64(0x100n), [vm.err]));
        await refused(vm.frontend.command(request, encodeU64(0n), [vm.err, vm.err]));
      }
    },
  },
  {
    number: "BI-101, BI-102",
    what: "ring sizes that are none",
    run: async (vm) => {
      await vm.negotiate();
      for (const num of [0, 3, 255, 1000, 32_769, 65_536, 0x1_0100]) await refused(vm.frontend.setVringNum(0, num));
    },
  },
  {
    number: "BI-108, BI-112",
    what: "areas misaligned, at 0, beyond everything",
    run: async (vm) => {
      await (await vm.negotiate()).share();
      await vm.frontend.setVringNum(0, 256);
      const good = vm.userAreas(0);
      const wrong = [
        { desc: good.desc + 8n },
        { avail: good.avail + 1n },
        { used: good.used + 2n },
        { desc: 0n },
        { used: 0xffff_ffff_ffff_fff0n },
        { avail: vm.guest.userAddress(0n) + BigInt(RAM_BYTES) - 16n },
      ];
      for (const areas of wrong) await refused(vm.frontend.setVringAddr(0, { ...good, ...areas }));
    },
  },
  {
    number: "BI-114",
    what: "both rings' areas at one address",
    run: async (vm) => {
      await (await vm.negotiate()).share();
      const { desc } = vm.userAreas(0);
      vm.allow(vm.areas(0).desc, RING_SPACE);
      for (const index of [RECEIVEQ, TRANSMITQ]) {
        await vm.frontend.setVringNum(index, 256);
        await vm.frontend.setVringAddr(index, { desc, avail: desc, used: desc });
        await vm.frontend.setVringEnable(index, true);
        await vm.frontend.setVringKick(index);
      }
      await sleep(20);
    },
  },
  {
    number: "BI-119",
    what: "a base and a used index that the avail index belies",
    run: async (vm) => {
      await (await vm.negotiate()).share();
      await vm.startRing(TRANSMITQ, 1000);
      await vm.untilBroken();
      expect(await vm.frontend.getVringBase(TRANSMITQ)).toBe(1000);
    },
  },
  {
    number: "BI-123",
    what: "enable bits of 2 and more, on rings that are not set up",
    run: async (vm) => {
      await vm.negotiate();
      for (const num of [2, 0xffff_ffff]) {
        await refused(vm.frontend.command(L.VHOST_USER_SET_VRING_ENABLE, encodeVringState({ index: 0, num })));
      }
      await vm.frontend.setVringEnable(0, true);
    },
  },
  {
    number: "BI-124, BI-126",
    what: "kick and call fds replaced again and again while frames flow",
    run: async (vm) => {
      await vm.start();
      for (let i = 0; i < 100; i++) {
        const [kick, call] = [eventfdCreate(), eventfdCreate()];
        vm.send(new Uint8Array(60));
        await vm.frontend.setVringKick(TRANSMITQ, kick);
        await vm.frontend.setVringCall(TRANSMITQ, call);
        vm.kick(kick);
        close(kick);
        close(call);
      }
      await vm.untilUsed(TRANSMITQ, 100);
    },
  },
  {
    number: "BI-128, BI-131",
    what: "the base of a ring that was never set up, and one ring only",
    run: async (vm) => {
      await (await vm.negotiate()).share();
      expect(await vm.frontend.getVringBase(3)).toBe(0);
      await vm.startRing(3);
    },
  },
  ...[L.VHOST_USER_SET_VRING_ENDIAN, L.VHOST_USER_IOTLB_MSG, L.VHOST_USER_GPU_SET_SOCKET].map((request) => ({
    number: "BI-132, BI-156, BI-164",
    what: `request ${request} with fds, of a feature that is not there`,
    run: async (vm: RawVm) => {
      await vm.negotiate();
      await refused(vm.frontend.command(request, Buffer.alloc(16), [vm.err, vm.err]));
    },
  })),
  {
    number: "BI-134, BI-136",
    what: "inflight regions for no queues, too many, again and again",
    run: async (vm) => {
      await vm.negotiate(INFLIGHT);
      for (const [queues, size] of [
        [0, 256],
        [65_535, 256],
        [4, 0],
        [4, 65_535],
      ] as const)
        expect(await vm.frontend.getInflightFd(queues, size)).toBeUndefined();
      for (let i = 0; i < 50; i++) close((await vm.frontend.getInflightFd(4, 256))!.fd);
    },
  },
  {
    number: "BI-137, BI-138, BI-139",
    what: "inflight regions that are too small, elsewhere, for other queues",
    run: async (vm) => {
      await vm.negotiate(INFLIGHT);
      const region = (await vm.frontend.getInflightFd(4, 256))!;
      vm.own(region.fd);
      const wrong = [
        { mmapSize: 64n },
        { mmapSize: 1n << 40n },
        { mmapOffset: 1n },
        { mmapOffset: U64_MAX - 63n },
        { queues: 5 },
      ];
      for (const part of wrong) await refused(vm.frontend.setInflightFd({ ...region, ...part }));
    },
  },
  {
    number: "BI-162",
    what: "post-copy, which has a reply of its own that cannot say no",
    run: async (vm) => {
      await vm.negotiate();
      await vm.frontend.send(encodeMessage(L.VHOST_USER_POSTCOPY_ADVISE, 0, new Uint8Array(0)));
      await vm.expectDropped();
    },
  },
  {
    number: "BI-038",
    what: "a packed ring of another format than negotiated",
    vm: { features: [VIRTIO_F_RING_PACKED], size: 256 },
    run: async (vm) => {
      await vm.start(); // lays split rings
      vm.allow(vm.areas(0).desc, RING_SPACE);
      vm.allow(vm.areas(1).desc, RING_SPACE);
      vm.describe({ ring: TRANSMITQ, index: 0 }, { gpa: BUFFERS, len: 100 });
      vm.offer(TRANSMITQ, 0, 0, 0);
      await sleep(20);
    },
  },
];
