import { readlinkSync } from "node:fs";
import { describe, expect, it, vi } from "vitest";
import { drain, signal } from "../../native/eventfd.ts";
import { ProtocolError } from "../../src/errors.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { decodeVringState, encodeU64, encodeVringAddress, encodeVringState } from "../../src/vhost-user/codec.ts";
import {
  ackOf,
  USUAL_PROTOCOL_FEATURES,
  AREAS,
  barrier,
  BIT_30,
  expectDropped,
  GPA_AREAS,
  negotiated,
  ready,
  REPLY_ACK,
  Rig,
  RING_SIZE,
  started,
  USER_ADDRESS,
  VERSION_1,
} from "./rig.ts";

const BAD_INDEXES = [4, 0xff, 0xffff, 0x10000, 0x10001, 0x80000000];

describe("PROTOCOL, 5: start and stop", () => {
  it("a ring is initially stopped and disabled; SET_VRING_KICK starts it, no kick is waited for", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.calls).toMatchObject([
      { name: "startVring", vring: { index: 0, size: RING_SIZE, base: 0, enabled: false, ...GPA_AREAS } },
    ]);
  });

  it("nothing but SET_VRING_KICK starts it", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setVringEnable(0, true);
    await frontend.setVringCall(0, rig.eventfd());
    await frontend.setVringErr(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("SET_VRING_KICK without an fd starts the ring, to be polled", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setVringKick(0);
    expect(rig.device.lastVring.kick).toBeUndefined();
  });

  it("BI-107: SET_VRING_KICK before the addresses are translatable is accepted; the ring starts when they are", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setVringKick(0, rig.eventfd());
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringBase(0, 9);
    await frontend.setVringAddr(0, AREAS);
    expect(rig.device.takeNames()).toEqual(["setFeatures"]);
    await frontend.setMemTable([rig.region()]);
    expect(rig.device.calls).toMatchObject([
      { name: "setMemory", vrings: [] },
      { name: "startVring", vring: { base: 9, ...GPA_AREAS } },
    ]);
  });

  it.each([
    ["QEMU's", ["num", "base", "addr", "kick", "call"]],
    ["cloud-hypervisor's", ["num", "addr", "base", "call", "kick"]],
    ["addresses last", ["kick", "call", "num", "base", "addr"]],
  ])("the set-up order is free: %s", async (_name, order) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setMemTable([rig.region()]);
    const steps: Record<string, () => Promise<void>> = {
      num: () => frontend.setVringNum(3, RING_SIZE),
      base: () => frontend.setVringBase(3, 7),
      addr: () => frontend.setVringAddr(3, AREAS),
      kick: () => frontend.setVringKick(3, rig.eventfd()),
      call: () => frontend.setVringCall(3, rig.eventfd()),
    };
    for (const step of order) await steps[step]?.();
    expect(rig.device.lastVring).toMatchObject({
      index: 3,
      size: RING_SIZE,
      base: 7,
      ...GPA_AREAS,
      call: expect.any(Number),
    });
  });

  it("GET_VRING_BASE stops the ring on the device, then closes kick and call, then replies with the device's index", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setVringCall(0, rig.eventfd());
    const { kick, call } = rig.device.lastVring;
    const target = (fd: number | undefined) => readlinkSync(`/proc/self/fd/${fd}`);
    rig.device.stopIndex = 65535;
    rig.device.before = () => expect([target(kick), target(call)]).toEqual(Array(2).fill("anon_inode:[eventfd]"));
    rig.device.takeNames();
    expect(await frontend.getVringBase(0)).toBe(65535);
    expect(rig.device.takeNames()).toEqual(["stopVring"]);
    for (const fd of [kick, call])
      expect(
        throws(() => target(fd)),
        "closed",
      ).toBe(true);
  });

  it("a stopped ring starts again the same way, from the base where it stopped", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.stopIndex = 41;
    await frontend.getVringBase(0);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring).toMatchObject({ base: 41, size: RING_SIZE, ...GPA_AREAS, call: undefined });
  });

  it("GET_VRING_BASE drops the addresses: a kick alone does not start the ring on stale ones", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.getVringBase(0);
    rig.device.takeNames();
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("the err fd, which front-ends send once, is kept across GET_VRING_BASE", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const err = rig.eventfd();
    await frontend.setVringErr(0, err);
    await frontend.getVringBase(0);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    signal(rig.device.lastVring.err as number);
    expect(drain(err)).toBe(1n);
  });

  it("GET_VRING_BASE_SKIP_DRAIN is GET_VRING_BASE: nothing is in flight that could be skipped", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.stopIndex = 9;
    const reply = await frontend.request(
      L.VHOST_USER_GET_VRING_BASE_SKIP_DRAIN,
      encodeVringState({ index: 0, num: 0 }),
    );
    expect(decodeVringState(reply)).toEqual({ index: 0, num: 9 });
    expect(rig.device.takeNames()).toEqual(["stopVring"]);
  });

  it("BI-128: GET_VRING_BASE of a ring that never started replies its base", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await frontend.getVringBase(1)).toBe(0);
    await frontend.setVringBase(1, 1234);
    expect(await frontend.getVringBase(1)).toBe(1234);
    expect(rig.device.takeNames()).toEqual(["setFeatures"]);
  });

  it("GET_VRING_BASE ends a ring that was kicked but could not start", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setVringKick(0, rig.eventfd());
    await frontend.getVringBase(0);
    await frontend.setMemTable([rig.region()]);
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringAddr(0, AREAS);
    expect(rig.device.takeNames()).toEqual(["setFeatures", "setMemory"]);
  });

  it("BI-131: only ring 3 is configured, only ring 3 starts", async () => {
    const { rig, frontend } = await ready(3);
    await using _ = rig;
    await frontend.setVringKick(3, rig.eventfd());
    expect(rig.device.calls).toMatchObject([{ name: "startVring", vring: { index: 3 } }]);
  });

  it("a start that the device refuses is nacked, and the ring may be started again", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    rig.device.before = () => {
      throw new ProtocolError("the ring makes no sense");
    };
    await expect(frontend.setVringKick(0, rig.eventfd())).rejects.toThrow(/refused/);
    rig.device.before = () => {};
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual(["startVring"]);
  });
});

describe("PROTOCOL, 5: enable", () => {
  it("BI-123: ENABLE before configuration is accepted and counts when the ring starts", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setVringEnable(0, true);
    await frontend.setMemTable([rig.region()]);
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.enabled).toBe(true);
  });

  it("ENABLE before SET_FEATURES is accepted (QEMU, at attach time), and SET_FEATURES with bit 30 leaves it alone", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    await frontend.setProtocolFeatures(REPLY_ACK);
    await frontend.setVringEnable(0, true);
    await frontend.setFeatures(VERSION_1 | BIT_30);
    await frontend.setMemTable([rig.region()]);
    for (const index of [0, 1]) {
      await frontend.setVringNum(index, RING_SIZE);
      await frontend.setVringAddr(index, AREAS);
      await frontend.setVringKick(index, rig.eventfd());
    }
    expect(rig.device.calls.slice(-2)).toMatchObject([{ vring: { enabled: true } }, { vring: { enabled: false } }]);
  });

  it("ENABLE of a started ring updates it; the bit survives GET_VRING_BASE", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setVringEnable(0, true);
    expect(rig.device.calls).toMatchObject([{ name: "updateVring", vring: { enabled: true } }]);
    await frontend.getVringBase(0);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.enabled).toBe(true);
    await frontend.setVringEnable(0, false);
    expect(rig.device.lastVring.enabled).toBe(false);
  });

  it("PROTOCOL, 4: SET_FEATURES without bit 30 enables all rings, and SET_VRING_ENABLE is refused after it", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setFeatures(VERSION_1);
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.enabled).toBe(true);
    await expect(frontend.setVringEnable(0, false)).rejects.toThrow(/refused/);
    expect(rig.device.lastVring.enabled).toBe(true);
  });

  it.each([
    ["SET_VRING_NUM", "SET_VRING_ADDR"],
    ["SET_VRING_ADDR", "SET_VRING_NUM"],
  ])("PROTOCOL, 5: a %s that the device refuses to start with leaves the ring without it", async (last, first) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const steps: Record<string, () => Promise<void>> = {
      SET_VRING_NUM: () => frontend.setVringNum(0, RING_SIZE),
      SET_VRING_ADDR: () => frontend.setVringAddr(0, AREAS),
    };
    await frontend.setMemTable([rig.region()]);
    await frontend.setVringKick(0, rig.eventfd());
    await steps[first]?.();
    rig.device.before = () => {
      throw new ProtocolError("no");
    };
    await expect(steps[last]?.()).rejects.toThrow(/refused/);
    rig.device.before = () => {};
    rig.device.takeNames();
    await frontend.setVringCall(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual([]);
    await steps[last]?.();
    expect(rig.device.takeNames()).toEqual(["startVring"]);
  });

  it("the features that hold already change nothing: no ring is enabled by them a second time", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setFeatures(VERSION_1);
    await frontend.setVringKick(0, rig.eventfd());
    await barrier(frontend);
    rig.device.takeNames();
    await frontend.setFeatures(VERSION_1);
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("an ENABLE the device refuses is nacked and the bit stays", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.before = () => {
      throw new ProtocolError("no");
    };
    await expect(frontend.setVringEnable(0, true)).rejects.toThrow(/refused/);
    rig.device.before = () => {};
    await frontend.setVringCall(0, rig.eventfd());
    expect(rig.device.lastVring.enabled).toBe(false);
  });

  it.each([2, 0xffffffff])("BI-123: ENABLE with %i is refused", async (num) => {
    const { rig, frontend } = await started();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_ENABLE, encodeVringState({ index: 0, num }))).not.toBe(0n);
    expect(rig.device.takeNames()).toEqual([]);
  });
});

describe("PROTOCOL, 5: while a ring is started", () => {
  it("BI-117, BI-121: its size, base and addresses do not change", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await expect(frontend.setVringNum(0, 128)).rejects.toThrow(/refused/);
    await expect(frontend.setVringBase(0, 5)).rejects.toThrow(/refused/);
    await expect(frontend.setVringAddr(0, { ...AREAS, desc: USER_ADDRESS + 0x4000n })).rejects.toThrow(/refused/);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringEnable(0, true);
    expect(rig.device.calls).toMatchObject([
      { name: "updateVring", vring: { size: RING_SIZE, base: 0, ...GPA_AREAS } },
    ]);
  });

  it.each(["setVringCall", "setVringErr", "setVringKick"] as const)(
    "BI-124, BI-126: %s replaces the fd; the old one is open until the device has settled, then closed",
    async (set) => {
      const { rig, frontend } = await started();
      await using _ = rig;
      const which = set.slice("setVring".length).toLowerCase() as "call" | "err" | "kick";
      await frontend[set](0, rig.eventfd());
      const old = rig.device.lastVring[which] as number;
      const fresh = rig.eventfd();
      rig.device.before = () => {
        expect(readlinkSync(`/proc/self/fd/${old}`)).toBe("anon_inode:[eventfd]");
      };
      await frontend[set](0, fresh);
      expect(throws(() => readlinkSync(`/proc/self/fd/${old}`))).toBe(true);
      signal(rig.device.lastVring[which] as number);
      expect(drain(fresh)).toBe(1n);
    },
  );

  it("PROTOCOL, 13.12, BI-126: SET_VRING_CALL without an fd means that the driver polls", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setVringCall(0, rig.eventfd());
    await frontend.setVringCall(0);
    expect(rig.device.lastVring.call).toBeUndefined();
  });

  it("an update the device refuses is nacked and the old fd stays", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const call = rig.eventfd();
    await frontend.setVringCall(0, call);
    rig.device.before = () => {
      throw new ProtocolError("no");
    };
    await expect(frontend.setVringCall(0, rig.eventfd())).rejects.toThrow(/refused/);
    rig.device.before = () => {};
    await frontend.setVringEnable(0, true);
    signal(rig.device.lastVring.call as number);
    expect(drain(call)).toBe(1n);
  });
});

describe("PROTOCOL, 4.1: numbers", () => {
  it.each([0, 3, 255, 1000, 32769, 65536, 0x10100, 0xffffffff])(
    "BI-101, BI-102: ring size %i is refused",
    async (num) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_NUM, encodeVringState({ index: 0, num }))).not.toBe(0n);
    },
  );

  it.each([1, 2, 32768])("BI-103: ring size %i is taken: no limit is lower than the protocol's", async (num) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setVringNum(0, num);
    expect(rig.refusals).toEqual([]);
  });

  it.each([65536, 0xffffffff])("BI-118: split base %i is refused, not truncated", async (num) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_BASE, encodeVringState({ index: 0, num }))).not.toBe(0n);
    expect(await frontend.getVringBase(0)).toBe(0);
  });

  it.each(BAD_INDEXES)(
    "BI-054, BI-097: ring index %i is refused by every request that has one, not truncated",
    async (index) => {
      const { rig, frontend } = await ready();
      await using _ = rig;
      const state = encodeVringState({ index, num: 1 });
      for (const id of [L.VHOST_USER_SET_VRING_NUM, L.VHOST_USER_SET_VRING_BASE, L.VHOST_USER_SET_VRING_ENABLE]) {
        expect(await ackOf(frontend, id, state)).not.toBe(0n);
      }
      const address = encodeVringAddress({ index, flags: 0, log: 0n, ...AREAS });
      expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_ADDR, address)).not.toBe(0n);
      for (const id of [L.VHOST_USER_SET_VRING_KICK, L.VHOST_USER_SET_VRING_CALL, L.VHOST_USER_SET_VRING_ERR]) {
        expect(await ackOf(frontend, id, encodeU64(BigInt(index)), [rig.eventfd()])).not.toBe(0n);
      }
      await expect(frontend.request(L.VHOST_USER_GET_VRING_BASE, state)).rejects.toThrow(/closed the connection/);
      expect(rig.device.takeNames().filter((name) => name !== "reset")).toEqual([]);
    },
  );

  it.each([1, 2, 0x80000000])("BI-116: address flags %i are refused: nothing with flags is offered", async (flags) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const address = encodeVringAddress({ index: 0, flags, log: 0n, ...AREAS });
    expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_ADDR, address)).not.toBe(0n);
  });

  it("BI-104: SET_VRING_NUM may be repeated; the last one counts", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    for (let round = 0; round < 100; round++) await frontend.setVringNum(0, 64 << (round % 2));
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.lastVring.size).toBe(128);
  });

  it("BI-114: the areas of rings may coincide: what comes of it stays in that guest", async () => {
    const { rig, frontend } = await started(0);
    await using _ = rig;
    await frontend.setVringNum(1, RING_SIZE);
    await frontend.setVringAddr(1, { desc: USER_ADDRESS, avail: USER_ADDRESS, used: USER_ADDRESS });
    await frontend.setVringKick(1, rig.eventfd());
    expect(rig.device.takeNames()).toEqual(["startVring"]);
  });

  it("PROTOCOL, 4: GET_VRING_BASE echoes the index beside the base", async () => {
    const { rig, frontend } = await ready(2, USUAL_PROTOCOL_FEATURES);
    await using _ = rig;
    await frontend.setVringBase(2, 3);
    const reply = await frontend.request(L.VHOST_USER_GET_VRING_BASE, encodeVringState({ index: 2, num: 0 }));
    expect(decodeVringState(reply)).toEqual({ index: 2, num: 3 });
    await barrier(frontend);
  });

  it("PROTOCOL, 4: a GET_VRING_BASE the device cannot answer has no reply that says no: the connection is closed", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.before = ({ name }) => {
      if (name === "stopVring") throw new ProtocolError("no");
    };
    await expect(frontend.getVringBase(0)).rejects.toThrow(/closed the connection/);
    await expectDropped(frontend);
    await vi.waitFor(() => expect(rig.device.calls.at(-1)?.name).toBe("reset"));
  });
});

function throws(call: () => unknown): boolean {
  try {
    call();
    return false;
  } catch {
    return true;
  }
}
