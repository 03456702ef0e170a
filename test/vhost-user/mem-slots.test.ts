import { describe, expect, it } from "vitest";
import { SystemError } from "../../src/errors.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { encodeMessage, encodeSingleRegion } from "../../src/vhost-user/codec.ts";
import {
  ackOf,
  AREAS,
  barrier,
  expectDropped,
  GPA,
  GPA_AREAS,
  MEM_SLOTS,
  MEMORY_SIZE,
  negotiated,
  openFds,
  ready,
  REPLY_ACK,
  RING_SIZE,
  started,
  USER_ADDRESS,
} from "./rig.ts";
import type { Rig } from "./rig.ts";

const SIZE = BigInt(MEMORY_SIZE);

/** The n-th region beside the rig's own, a page each, all of one file. */
function slot(rig: Rig, fd: number, n: number) {
  const offset = 0x1000n * BigInt(n);
  return { ...rig.region(fd, 0x1000n), gpa: offset, userAddress: 0x1000_0000n + offset };
}

describe("CONFIGURE_MEM_SLOTS", () => {
  it("PROTOCOL, 7: GET_MAX_MEM_SLOTS is 509, as QEMU and libvhost-user have it", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await frontend.getMaxMemSlots()).toBe(509);
  });

  it("PROTOCOL, 7: ADD_MEM_REG brings the device this region only, with its fd; REM_MEM_REG takes it away", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const region = slot(rig, rig.memfd(), 0);
    await frontend.addMemReg({ ...region, mmapOffset: 0x2000n });
    expect(rig.device.calls).toMatchObject([
      { name: "addMemory", region: { gpa: 0n, sizeBytes: 0x1000n, userAddress: 0x1000_0000n, mmapOffset: 0x2000n } },
    ]);
    rig.device.takeNames();
    await frontend.remMemReg(region);
    expect(rig.device.calls).toEqual([{ name: "removeMemory", gpa: 0n }]);
  });

  it("PROTOCOL, 4: regions added to an empty table serve a ring as those of SET_MEM_TABLE do", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.addMemReg(rig.region());
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject(GPA_AREAS);
  });

  it("BI-086: the 510th region is refused, its fd closed; room made by REM_MEM_REG is room again", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fd = rig.memfd(0x1000);
    for (let n = 0; n < 509; n++) await frontend.addMemReg(slot(rig, fd, n));
    const fds = openFds();
    await expect(frontend.addMemReg(slot(rig, fd, 509))).rejects.toThrow(/refused/);
    expect(openFds()).toBe(fds);
    await frontend.remMemReg(slot(rig, fd, 77));
    await frontend.addMemReg(slot(rig, fd, 509));
    await expect(frontend.addMemReg(slot(rig, fd, 77))).rejects.toThrow(/refused/);
  });

  it("QEMU before 8 adds and removes a region once a queue pair: mapped once, gone when it was removed as often", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const region = slot(rig, rig.memfd(), 1);
    const fds = openFds();
    for (let pair = 0; pair < 4; pair++) await frontend.addMemReg(region);
    expect(openFds()).toBe(fds);
    expect(rig.device.takeNames()).toEqual(["addMemory"]);
    for (let pair = 0; pair < 3; pair++) await frontend.remMemReg(region);
    expect(rig.device.takeNames()).toEqual([]);
    await frontend.remMemReg(region);
    expect(rig.device.takeNames()).toEqual(["removeMemory"]);
    await expect(frontend.remMemReg(region)).rejects.toThrow(/refused/);
    // Another file in its place is no repetition
    await frontend.addMemReg(region);
    await expect(frontend.addMemReg({ ...region, fd: rig.memfd() })).rejects.toThrow(/refused/);
  });

  it("BI-056: SET_MEM_TABLE takes 8 regions at most, whatever the slots", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fd = rig.memfd(0x1000);
    const table = (count: number) => Array.from({ length: count }, (_, n) => slot(rig, fd, n));
    await expect(frontend.setMemTable(table(9))).rejects.toThrow(/refused/);
    await frontend.setMemTable(table(8));
  });

  it("BI-087: ADD_MEM_REG with no fd or two is refused, the fds closed", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const payload = encodeSingleRegion(rig.region());
    const fds = openFds();
    expect(await ackOf(frontend, L.VHOST_USER_ADD_MEM_REG, payload, [])).not.toBe(0n);
    const fd = rig.memfd();
    expect(await ackOf(frontend, L.VHOST_USER_ADD_MEM_REG, payload, [fd, fd])).not.toBe(0n);
    expect(openFds()).toBe(fds + 1);
    expect(rig.device.takeNames()).toEqual(["setFeatures"]);
  });

  it.each([
    ["BI-066: overlaps in gpa", { gpa: GPA + SIZE - 1n }],
    ["BI-067: overlaps in user addresses", { userAddress: USER_ADDRESS }],
    ["BI-061: gpa + size wraps", { gpa: (1n << 64n) - 0x1000n + 1n }],
    ["BI-073: the file ends before it", { mmapOffset: SIZE }],
    ["BI-108: areas aligned in gpas would not be so in the file", { mmapOffset: 1n, sizeBytes: SIZE - 1n }],
    ["PROTOCOL, 4.1: size 0", { sizeBytes: 0n }],
  ])("%s: ADD_MEM_REG is refused", async (_name, change) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await expect(frontend.addMemReg({ ...slot(rig, rig.memfd(), 0), ...change })).rejects.toThrow(/refused/);
    expect(rig.device.takeNames()).toEqual([]);
  });

  it.each([
    ["unknown gpa", { gpa: GPA + 0x1000n }],
    ["unknown user address", { userAddress: USER_ADDRESS - 1n }],
    ["size differs by 1", { sizeBytes: SIZE - 1n }],
  ])("BI-088: REM_MEM_REG, %s: refused, the region stays", async (_name, change) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await expect(frontend.remMemReg({ ...rig.region(), ...change })).rejects.toThrow(/refused/);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.calls).toMatchObject([{ name: "startVring", vring: GPA_AREAS }]);
  });

  it("PROTOCOL, 7: REM_MEM_REG goes by gpa, user address and size; the mmap offset is ignored", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.remMemReg({ ...rig.region(), mmapOffset: 0x5000n });
    expect(rig.device.calls).toEqual([{ name: "removeMemory", gpa: GPA }]);
  });

  it("BI-089: an fd that comes with REM_MEM_REG is closed unused", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const fds = openFds();
    const payload = encodeSingleRegion(rig.region(-1));
    expect(await ackOf(frontend, L.VHOST_USER_REM_MEM_REG, payload, [rig.eventfd()])).toBe(0n);
    expect(openFds()).toBe(fds + 1);
  });

  it("PROTOCOL, 4.1: without the protocol feature both are refused", async () => {
    const { rig, frontend } = await negotiated(REPLY_ACK);
    await using _ = rig;
    await expect(frontend.addMemReg(rig.region())).rejects.toThrow(/refused/);
    await expect(frontend.remMemReg(rig.region())).rejects.toThrow(/refused/);
  });

  it("PROTOCOL, 4: refused without REPLY_ACK, ADD_MEM_REG closes the connection: the front-end would count on the region", async () => {
    const { rig, frontend } = await negotiated(MEM_SLOTS);
    await using _ = rig;
    await frontend.send(encodeMessage(L.VHOST_USER_ADD_MEM_REG, 0, encodeSingleRegion(rig.region())));
    await expectDropped(frontend);
  });
});

describe("PROTOCOL, 5: regions come and go while rings run", () => {
  it("a ring elsewhere is not touched", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const region = slot(rig, rig.memfd(), 0);
    await frontend.addMemReg(region);
    await frontend.remMemReg(region);
    expect(rig.device.takeNames()).toEqual(["addMemory", "removeMemory"]);
  });

  it("a ring whose region goes stops before, and goes on from there when the region is back, at another gpa too", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.stopIndex = 77;
    await frontend.remMemReg(rig.region());
    expect(rig.device.takeNames()).toEqual(["stopVring", "removeMemory"]);
    await frontend.addMemReg({ ...rig.region(), gpa: 0n });
    expect(rig.device.calls).toMatchObject([
      { name: "addMemory" },
      { name: "startVring", vring: { desc: 0n, avail: 0x1000n, used: 0x2000n, base: 77 } },
    ]);
  });

  it("BI-133: when the device refuses, a ring stopped for it starts again, and the table is what it was", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.before = (call) => {
      if (call.name.endsWith("Memory")) throw new SystemError("mmap", 12, "ENOMEM", "mapping");
    };
    await expect(frontend.remMemReg(rig.region())).rejects.toThrow(/refused/);
    await expect(frontend.addMemReg(slot(rig, rig.memfd(), 0))).rejects.toThrow(/refused/);
    expect(rig.device.calls).toMatchObject([{ name: "stopVring" }, { name: "startVring", vring: GPA_AREAS }]);
    rig.device.before = () => {};
    await frontend.addMemReg(slot(rig, rig.memfd(), 0));
    await frontend.remMemReg(rig.region());
    await barrier(frontend);
    expect(rig.device.takeNames().slice(2)).toEqual(["addMemory", "stopVring", "removeMemory"]);
  });
});

describe("memory-max", () => {
  it("BI-306: regions beyond it are refused, whichever message brings them; what is there stays", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    rig.device.memoryMaxBytes = SIZE + 0x1000n;
    const fd = rig.memfd(2 * MEMORY_SIZE);
    await expect(frontend.setMemTable([{ ...rig.region(fd), sizeBytes: SIZE + 0x1001n }])).rejects.toThrow(/refused/);
    await frontend.setMemTable([rig.region(fd)]);
    await frontend.addMemReg(slot(rig, fd, 0));
    await expect(frontend.addMemReg(slot(rig, fd, 1))).rejects.toThrow(/refused/);
    await frontend.remMemReg(slot(rig, fd, 0));
    await frontend.addMemReg(slot(rig, fd, 1));
  });
});
