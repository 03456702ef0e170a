import { describe, expect, it } from "vitest";
import { SystemError } from "../../src/errors.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { encodeMessage, encodeU64 } from "../../src/vhost-user/codec.ts";
import type { Frontend } from "../../src/vhost-user/frontend.ts";
import {
  ackOf,
  AREAS,
  barrier,
  BIT_30,
  expectDropped,
  GPA_AREAS,
  negotiated,
  openFds,
  REPLY_ACK,
  RING_SIZE,
  started,
  STATUS,
  VERSION_1,
} from "./rig.ts";
import type { Rig } from "./rig.ts";

const ACKNOWLEDGE = 1;
const DRIVER = 2;
const DRIVER_OK = 4;
const FEATURES_OK = 8;
const UNKNOWN_FEATURE = 1n << 34n;

const resets: [name: string, reset: (frontend: Frontend) => Promise<void>][] = [
  ["RESET_DEVICE", (frontend) => frontend.resetDevice()],
  ["BI-049: SET_STATUS 0", (frontend) => frontend.setStatus(0)],
];

describe.each(resets)("PROTOCOL, 4: %s", (_name, reset) => {
  /** What a front-end sends to start the ring anew: no memory table, no err fd. */
  async function startAnew(rig: Rig, frontend: Frontend): Promise<void> {
    await frontend.setFeatures(VERSION_1 | BIT_30);
    await frontend.setVringNum(0, RING_SIZE);
    await frontend.setVringAddr(0, AREAS);
    await frontend.setVringKick(0, rig.eventfd());
  }

  it("stops and disables every ring, and closes their kick and call fds", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setVringEnable(0, true);
    await frontend.setVringCall(0, rig.eventfd());
    rig.device.takeNames();
    const fds = openFds();
    await reset(frontend);
    expect(rig.device.calls).toEqual([
      { name: "stopVring", index: 0 },
      { name: "setFeatures", features: 0n },
    ]);
    expect(openFds()).toBe(fds - 2);
  });

  it("keeps memory and err fds, which front-ends send only once; rings begin at 0, disabled", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setVringErr(0, rig.eventfd());
    await frontend.setVringEnable(0, true);
    rig.device.stopIndex = 77;
    await reset(frontend);
    rig.device.takeNames();
    await startAnew(rig, frontend);
    expect(rig.device.calls).toMatchObject([
      { name: "setFeatures", features: VERSION_1 },
      { name: "startVring", vring: { ...GPA_AREAS, base: 0, enabled: false, call: undefined } },
    ]);
    expect(rig.device.lastVring.err).toBeTypeOf("number");
  });

  it("forgets ring sizes and addresses: a kick alone starts nothing", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await reset(frontend);
    rig.device.takeNames();
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("keeps what was negotiated of the protocol", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await reset(frontend);
    expect(await frontend.getQueueNum()).toBe(2);
    expect(await frontend.getMaxMemSlots()).toBe(509);
    expect(await frontend.getStatus()).toBe(0);
  });

  it("is all or nothing: if one ring cannot be stopped, those that were go on with all they had", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setVringCall(0, rig.eventfd());
    await frontend.setVringNum(1, RING_SIZE);
    await frontend.setVringAddr(1, AREAS);
    await frontend.setVringKick(1, rig.eventfd());
    rig.device.takeNames();
    rig.device.stopIndex = 77;
    rig.device.before = (call) => {
      if (call.name === "stopVring" && call.index === 1) throw new SystemError("close", 5, "EIO", "the ring");
    };
    const fds = openFds();
    await expect(reset(frontend)).rejects.toThrow(/refused/);
    expect(rig.device.calls).toMatchObject([
      { name: "stopVring", index: 0 },
      { name: "startVring", vring: { index: 0, base: 77, size: RING_SIZE, ...GPA_AREAS, call: expect.any(Number) } },
    ]);
    expect(openFds()).toBe(fds);
    rig.device.before = () => {};
    await reset(frontend);
  });

  it("is refused when the device does not let go of a ring", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    rig.device.before = () => {
      throw new SystemError("write", 5, "EIO", "parking");
    };
    await expect(reset(frontend)).rejects.toThrow(/refused/);
    rig.device.before = () => {};
  });
});

describe("PROTOCOL, 4: STATUS", () => {
  it("GET_STATUS is what SET_STATUS said; it begins at 0", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await frontend.getStatus()).toBe(0);
    for (const status of [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, 0xff]) {
      await frontend.setStatus(status);
      expect(await frontend.getStatus()).toBe(status);
    }
  });

  it.each([0x100n, 0x10fn, 1n << 63n])("BI-047: SET_STATUS %i is refused, the status stays", async (status) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.setStatus(ACKNOWLEDGE);
    expect(await ackOf(frontend, L.VHOST_USER_SET_STATUS, encodeU64(status))).not.toBe(0n);
    expect(await frontend.getStatus()).toBe(ACKNOWLEDGE);
  });

  it("BI-048: after refused features FEATURES_OK does not stay; after accepted ones it does", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await expect(frontend.setFeatures(VERSION_1 | UNKNOWN_FEATURE)).rejects.toThrow(/refused/);
    await frontend.setStatus(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    expect(await frontend.getStatus()).toBe(ACKNOWLEDGE | DRIVER);
    await frontend.setFeatures(VERSION_1 | BIT_30);
    await frontend.setStatus(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    expect(await frontend.getStatus()).toBe(ACKNOWLEDGE | DRIVER | FEATURES_OK);
  });

  it("BI-048: a reset forgets the refusal", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await expect(frontend.setFeatures(UNKNOWN_FEATURE)).rejects.toThrow(/refused/);
    await frontend.setStatus(0);
    await frontend.setStatus(FEATURES_OK);
    expect(await frontend.getStatus()).toBe(FEATURES_OK);
  });

  it("rings do not wait for DRIVER_OK: SET_VRING_KICK starts them", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setStatus(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    await frontend.setStatus(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    expect(rig.device.takeNames()).toEqual([]);
    expect(await frontend.getVringBase(0)).toBe(0);
  });

  it("PROTOCOL, 4.1: without the protocol feature it is refused, and does not reset", async () => {
    const { rig, frontend } = await started(0, REPLY_ACK);
    await using _ = rig;
    await expect(frontend.setStatus(0)).rejects.toThrow(/refused/);
    await expect(frontend.resetDevice()).rejects.toThrow(/refused/);
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("PROTOCOL, 4.1: GET_STATUS without the protocol feature closes the connection", async () => {
    const { rig, frontend } = await negotiated(REPLY_ACK);
    await using _ = rig;
    await frontend.send(encodeMessage(L.VHOST_USER_GET_STATUS, 0, Buffer.alloc(0)));
    await expectDropped(frontend);
  });

  it("a refused SET_STATUS without REPLY_ACK is ignored: the session is sound without it", async () => {
    const { rig, frontend } = await negotiated(STATUS);
    await using _ = rig;
    await frontend.send(encodeMessage(L.VHOST_USER_SET_STATUS, 0, encodeU64(0x100n)));
    await barrier(frontend);
    expect(rig.refusals).toEqual(["SET_STATUS"]);
  });
});
