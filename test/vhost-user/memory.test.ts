import { fstatSync, openSync } from "node:fs";
import { join } from "node:path";
import { tmpdir } from "node:os";
import { describe, expect, it } from "vitest";
import { socketpair } from "../../native/socket.ts";
import { SystemError } from "../../src/errors.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { encodeMemTable } from "../../src/vhost-user/codec.ts";
import type { Vring } from "../../src/vhost-user/device.ts";
import {
  ackOf,
  AREAS,
  barrier,
  BIT_30,
  expectDropped,
  EVENT_IDX,
  GPA,
  GPA_ADDRESSES,
  GPA_AREAS,
  MEMORY_SIZE,
  negotiated,
  ready,
  RING_SIZE,
  started,
  USER_ADDRESS,
  USUAL_PROTOCOL_FEATURES,
  VERSION_1,
} from "./rig.ts";

const SIZE = BigInt(MEMORY_SIZE);

describe("SET_MEM_TABLE", () => {
  it("PROTOCOL, 4: the whole table reaches the device, with the fds in the order of the regions", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const seen: string[] = [];
    const first = rig.memfd();
    const second = rig.memfd();
    rig.device.before = (call) => {
      if (call.name === "setMemory") seen.push(...call.regions.map(({ fd }) => String(fstatSync(fd).ino)));
    };
    await frontend.setMemTable([
      { gpa: 0n, sizeBytes: SIZE, userAddress: USER_ADDRESS, mmapOffset: 0n, fd: first },
      { gpa: SIZE, sizeBytes: SIZE / 2n, userAddress: USER_ADDRESS + SIZE, mmapOffset: SIZE / 2n, fd: second },
    ]);
    expect(seen).toEqual([String(fstatSync(first).ino), String(fstatSync(second).ino)]);
    expect(rig.device.calls.at(-1)).toMatchObject({
      regions: [
        { gpa: 0n, sizeBytes: SIZE, mmapOffset: 0n },
        { gpa: SIZE, sizeBytes: SIZE / 2n, userAddress: USER_ADDRESS + SIZE, mmapOffset: SIZE / 2n },
      ],
    });
  });

  it("PROTOCOL, 4.1, BI-057, BI-058: fd count of SET_MEM_TABLE equals the region count", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const payload = encodeMemTable([rig.region()]);
    expect(await ackOf(frontend, L.VHOST_USER_SET_MEM_TABLE, payload, [])).not.toBe(0n);
    expect(await ackOf(frontend, L.VHOST_USER_SET_MEM_TABLE, payload, [rig.memfd(), rig.memfd()])).not.toBe(0n);
    expect(rig.device.takeNames()).toEqual(["setFeatures"]);
  });

  it.each([0, 9, 33, 0xffffffff])(
    "PROTOCOL, 4.1, BI-056: a table that says it has %i regions is refused",
    async (count) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      const payload = Buffer.alloc(8 + 32 * 9);
      payload.writeUInt32LE(count);
      expect(await ackOf(frontend, L.VHOST_USER_SET_MEM_TABLE, payload, [rig.memfd()])).not.toBe(0n);
    },
  );

  it.each([7, 8, 39, 41, 71])("PROTOCOL, 4.1, BI-059: a table of one region in %i bytes is refused", async (size) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const payload = Buffer.alloc(size);
    encodeMemTable([rig.region()]).copy(payload);
    expect(await ackOf(frontend, L.VHOST_USER_SET_MEM_TABLE, payload, [rig.memfd()])).not.toBe(0n);
  });

  it("unused entries after the regions are ignored: user-mode Linux always sends its whole array", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const payload = Buffer.alloc(72, 0xff);
    encodeMemTable([rig.region()]).copy(payload);
    expect(await ackOf(frontend, L.VHOST_USER_SET_MEM_TABLE, payload, [rig.memfd()])).toBe(0n);
    expect(rig.device.calls.at(-1)).toMatchObject({ name: "setMemory", regions: [{ gpa: GPA, sizeBytes: SIZE }] });
  });

  it.each([
    ["PROTOCOL, 4.1: size 0", { sizeBytes: 0n }],
    ["BI-061: gpa + size wraps", { gpa: (1n << 64n) - SIZE + 1n }],
    ["BI-062: user address + size wraps", { userAddress: (1n << 64n) - 0x1000n }],
    ["BI-063: mmap offset + size wraps", { mmapOffset: (1n << 64n) - 0x1000n }],
    ["BI-064: size near 2^64", { gpa: 0n, userAddress: 0n, sizeBytes: (1n << 64n) - 1n }],
    ["BI-073: the file ends before the region", { mmapOffset: 16n }],
    ["BI-108: areas aligned in gpas would not be so in the file", { mmapOffset: 8n, sizeBytes: SIZE - 8n }],
  ])("%s: refused", async (_name, change) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await expect(frontend.setMemTable([{ ...rig.region(), ...change }])).rejects.toThrow(/refused/);
    expect(rig.device.takeNames()).toEqual(["setFeatures"]);
  });

  it.each([
    ["in gpa, wholly", { gpa: GPA, userAddress: 0n }],
    ["in gpa, by one byte", { gpa: GPA + SIZE - 1n, userAddress: 0n }],
    ["in user addresses, by one byte", { gpa: 0n, userAddress: USER_ADDRESS - SIZE + 1n }],
  ])("PROTOCOL, 4.1, BI-066, BI-067: regions that overlap %s are refused", async (_name, change) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await expect(frontend.setMemTable([rig.region(), { ...rig.region(), ...change }])).rejects.toThrow(/refused/);
  });

  it("BI-068, BI-069, BI-071: adjacent regions of one file at two offsets, of any size, are taken", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fd = rig.memfd();
    const half = { ...rig.region(fd), sizeBytes: SIZE / 2n };
    const odd = {
      gpa: GPA + SIZE / 2n,
      userAddress: USER_ADDRESS + SIZE / 2n,
      sizeBytes: 0x1001n,
      mmapOffset: SIZE / 2n,
      fd,
    };
    await frontend.setMemTable([half, odd]);
    expect(rig.device.calls.at(-1)).toMatchObject({ name: "setMemory" });
  });

  // The row asks for a refusal, for in one mapping the page would belong to both. Here each region has pages of its own.
  it("BI-094: regions of two files that meet inside a page are taken", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const first = { ...rig.region(), sizeBytes: 0x1800n };
    const second = { ...rig.region(), gpa: GPA + 0x1800n, userAddress: USER_ADDRESS + 0x1800n, sizeBytes: 0x1800n };
    await frontend.setMemTable([first, second]);
    expect(rig.device.calls.at(-1)).toMatchObject({
      name: "setMemory",
      regions: [{ gpa: GPA }, { gpa: GPA + 0x1800n }],
    });
  });

  it("BI-074, BI-076, BI-077, BI-079: only files of tmpfs or hugetlbfs, open for reading and writing, are memory", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fds = [
      rig.own(openSync("/dev/zero", "r+")),
      rig.own(openSync(tmpdir(), "r")),
      rig.own(openSync("/proc/self/mem", "r+")),
      rig.own(openSync(join(import.meta.dirname, "rig.ts"), "r+")),
      rig.own(openSync(`/proc/self/fd/${rig.memfd()}`, "r")),
      rig.eventfd(),
      ...socketpair().map((fd) => rig.own(fd)),
    ];
    for (const fd of fds) {
      await expect(frontend.setMemTable([{ ...rig.region(fd), sizeBytes: 0x1000n }]), `fd ${fd}`).rejects.toThrow(
        /refused/,
      );
    }
    expect(rig.device.takeNames()).toEqual(["setFeatures"]);
  });

  it("BI-082: the same table twice asks nothing of the device", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const region = rig.region();
    await frontend.setMemTable([region]);
    rig.device.takeNames();
    await frontend.setMemTable([region]);
    expect(rig.device.takeNames()).toEqual([]);
    await frontend.setMemTable([{ ...region, fd: rig.memfd() }]);
    expect(rig.device.takeNames()).toEqual(["setMemory"]);
  });

  it("BI-084: a table the device cannot map is refused, and the old one stays in force", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    rig.device.before = (call) => {
      if (call.name === "setMemory") throw new SystemError("mmap", 12, "ENOMEM", "mapping region 0");
    };
    await expect(frontend.setMemTable([rig.region(rig.memfd(), SIZE / 2n)])).rejects.toThrow(/refused/);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject(GPA_AREAS);
  });

  it("PROTOCOL, 4.1: refused without REPLY_ACK, the connection is closed, for the rings would lie in another memory", async () => {
    const { rig, frontend } = await negotiated(0n);
    await using _ = rig;
    await frontend.setMemTable([{ ...rig.region(), sizeBytes: 0n }]);
    await expectDropped(frontend);
    expect(rig.refusals).toEqual(["SET_MEM_TABLE"]);
  });
});

describe("PROTOCOL, 5: a memory table change while rings run", () => {
  it("BI-083: the running rings reach the device translated anew, in the same call", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setMemTable([{ ...rig.region(), gpa: 0n }]);
    expect(rig.device.calls).toMatchObject([
      { name: "setMemory", vrings: [{ index: 0, size: RING_SIZE, desc: 0n, avail: 0x1000n, used: 0x2000n }] },
    ]);
  });

  it("later updates of the ring carry the new addresses", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setMemTable([{ ...rig.region(), gpa: 0n }]);
    await frontend.setVringEnable(0, true);
    expect(rig.device.lastVring).toMatchObject({ desc: 0n, enabled: true });
  });

  it("a ring the new table cannot translate stops before it, and goes on from there when a later one can", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const elsewhere = { ...rig.region(), userAddress: 0n };
    rig.device.stopIndex = 77;
    await frontend.setMemTable([elsewhere]);
    expect(rig.device.calls).toMatchObject([
      { name: "stopVring", index: 0 },
      { name: "setMemory", vrings: [] },
    ]);
    rig.device.takeNames();
    await frontend.setMemTable([rig.region()]);
    expect(rig.device.calls).toMatchObject([
      { name: "setMemory" },
      { name: "startVring", vring: { ...GPA_AREAS, base: 77 } },
    ]);
    expect((rig.device.lastVring as Vring).kick).toBeTypeOf("number");
  });

  it("BI-133: when the device refuses the new table, a ring stopped for it starts again under the old one", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.stopIndex = 5;
    rig.device.before = (call) => {
      if (call.name === "setMemory") throw new SystemError("mmap", 12, "ENOMEM", "mapping region 0");
    };
    await expect(frontend.setMemTable([{ ...rig.region(), userAddress: 0n }])).rejects.toThrow(/refused/);
    expect(rig.device.calls).toMatchObject([
      { name: "stopVring" },
      { name: "startVring", vring: { ...GPA_AREAS, base: 5 } },
    ]);
  });
});

describe("PROTOCOL, 4.1: each ring area lies fully inside one region", () => {
  const used = { desc: USER_ADDRESS, avail: USER_ADDRESS + 0x1000n };

  it("BI-109: a ring may end exactly at the region's end, not one entry later", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const size = BigInt(4 + 8 * RING_SIZE);
    await frontend.setVringAddr(0, { ...used, used: USER_ADDRESS + SIZE - size });
    await expect(frontend.setVringAddr(0, { ...used, used: USER_ADDRESS + SIZE - size + 4n })).rejects.toThrow(
      /refused/,
    );
  });

  it("PROTOCOL, 16: with EVENT_IDX the avail and used areas are 2 bytes longer", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const last = USER_ADDRESS + SIZE;
    await frontend.setVringAddr(0, { ...used, used: last - BigInt(4 + 8 * RING_SIZE) });
    await frontend.setVringAddr(0, { ...AREAS, avail: last - BigInt(4 + 2 * RING_SIZE) });
    await frontend.setFeatures(VERSION_1 | EVENT_IDX | BIT_30);
    await expect(frontend.setVringAddr(0, { ...used, used: last - BigInt(4 + 8 * RING_SIZE) })).rejects.toThrow(
      /refused/,
    );
    await expect(frontend.setVringAddr(0, { ...AREAS, avail: last - BigInt(4 + 2 * RING_SIZE) })).rejects.toThrow(
      /refused/,
    );
    await frontend.setVringAddr(0, { ...used, used: last - BigInt(4 + 8 * RING_SIZE + 4) });
    await frontend.setVringAddr(0, { ...AREAS, avail: last - BigInt(4 + 2 * RING_SIZE + 2) });
  });

  it.each([
    ["BI-112: address 0", { desc: 0n }],
    ["BI-112: past the region", { avail: USER_ADDRESS + SIZE }],
    ["BI-112: the top of the address space", { desc: 0xffff_ffff_ffff_fff0n }],
    ["BI-113: address + length wraps", { used: 0xffff_ffff_ffff_fffcn }],
    ["BI-108: desc not a multiple of 16", { desc: USER_ADDRESS + 8n }],
    ["BI-108: avail not a multiple of 2", { avail: USER_ADDRESS + 0x1001n }],
    ["BI-108: used not a multiple of 4", { used: USER_ADDRESS + 0x2002n }],
  ])("%s: refused, and the addresses before stay", async (_name, change) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await expect(frontend.setVringAddr(0, { ...AREAS, ...change })).rejects.toThrow(/refused/);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject(GPA_AREAS);
  });

  it("BI-108: a ring aligned in user addresses but not in guest ones is refused", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setMemTable([{ ...rig.region(), gpa: GPA + 8n, mmapOffset: 8n, sizeBytes: SIZE - 8n }]);
    await frontend.setVringNum(0, RING_SIZE);
    await expect(frontend.setVringAddr(0, AREAS)).rejects.toThrow(/refused/);
  });

  it("BI-111: an area that spans two adjacent regions is refused", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fd = rig.memfd();
    const half = SIZE / 2n;
    await frontend.setMemTable([
      { ...rig.region(fd), sizeBytes: half },
      { gpa: GPA + half, userAddress: USER_ADDRESS + half, sizeBytes: half, mmapOffset: half, fd },
    ]);
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringAddr(0, { ...AREAS, desc: USER_ADDRESS + half });
    await expect(frontend.setVringAddr(0, { ...AREAS, desc: USER_ADDRESS + half - 16n })).rejects.toThrow(/refused/);
  });

  it("PROTOCOL, 7: with GPA_ADDRESSES ring addresses are guest physical ones, and user addresses are none", async () => {
    const { rig, frontend } = await negotiated(USUAL_PROTOCOL_FEATURES | GPA_ADDRESSES);
    await using _ = rig;
    await frontend.setMemTable([rig.region()]);
    await frontend.setVringNum(0, RING_SIZE);
    await expect(frontend.setVringAddr(0, AREAS)).rejects.toThrow(/refused/);
    await frontend.setVringAddr(0, GPA_AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject(GPA_AREAS);
  });

  it("PROTOCOL, 7: without it a guest physical address is none", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await expect(frontend.setVringAddr(0, GPA_AREAS)).rejects.toThrow(/refused/);
  });

  it("PROTOCOL, 7: with GPA_ADDRESSES a ring stays where it is when its region gets another user address", async () => {
    const { rig, frontend } = await negotiated(USUAL_PROTOCOL_FEATURES | GPA_ADDRESSES);
    await using _ = rig;
    await frontend.setMemTable([rig.region()]);
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringAddr(0, GPA_AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    rig.device.takeNames();
    await frontend.setMemTable([{ ...rig.region(), userAddress: GPA }]);
    expect(rig.device.calls).toMatchObject([{ name: "setMemory", vrings: [GPA_AREAS] }]);
  });

  it("PROTOCOL, 3: SET_VRING_ADDR carries used before avail, in user addresses; the device gets guest physical ones", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await barrier(frontend);
    await frontend.setVringEnable(0, true);
    expect(rig.device.lastVring).toMatchObject(GPA_AREAS);
  });
});
