import { describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { socketpair } from "../../native/socket.ts";
import { ProtocolError } from "../../src/errors.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { decodeU64, encodeMessage, encodeU64 } from "../../src/vhost-user/codec.ts";
import {
  ackOf,
  USUAL_PROTOCOL_FEATURES,
  BACKEND_REQ,
  BASE_INFLIGHT,
  barrier,
  BIT_30,
  EVENT_IDX,
  expectDropped,
  GPA_ADDRESSES,
  INFLIGHT,
  MQ,
  negotiated,
  ready,
  REPLY_ACK,
  Rig,
  SKIP_DRAIN,
  started,
  VERSION_1,
} from "./rig.ts";

const NOTHING = Buffer.alloc(0);

describe("features", () => {
  it("PROTOCOL, 1.3: GET_FEATURES offers the device's features and bit 30", async () => {
    await using rig = new Rig();
    rig.serve();
    expect(await rig.connect().getFeatures()).toBe(VERSION_1 | EVENT_IDX | BIT_30);
  });

  it("PROTOCOL, 1.3, BI-042: protocol features are negotiated before SET_FEATURES", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    expect(await frontend.getProtocolFeatures()).toBe(USUAL_PROTOCOL_FEATURES | GPA_ADDRESSES);
    await frontend.setProtocolFeatures(USUAL_PROTOCOL_FEATURES | GPA_ADDRESSES);
    expect(await frontend.getQueueNum()).toBe(2);
  });

  it("PROTOCOL, 13.6: a front-end that skips the GETs is served", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    await frontend.setVringKick(0, rig.eventfd());
    expect(rig.device.takeNames()).toEqual(["startVring"]);
  });

  it("PROTOCOL, 4: SET_FEATURES gives the device what the driver acknowledged, without bit 30", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await barrier(frontend);
    expect(rig.device.calls).toEqual([{ name: "setFeatures", features: VERSION_1 }]);
  });

  it("PROTOCOL, 4.1, BI-037: SET_FEATURES with a bit not offered is refused, the device is not asked", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SET_FEATURES, encodeU64(VERSION_1 | (1n << 34n)))).not.toBe(0n);
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("PROTOCOL, 4.1, BI-041: SET_PROTOCOL_FEATURES with a bit not offered is refused, what was negotiated stays", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SET_PROTOCOL_FEATURES, encodeU64(1n << 9n))).not.toBe(0n);
    expect(await frontend.getQueueNum()).toBe(2);
  });

  it("PROTOCOL, 2, BI-043: INBAND_NOTIFICATIONS without REPLY_ACK and BACKEND_REQ closes the connection", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const features = REPLY_ACK | (1n << BigInt(L.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS));
    await frontend.send(
      encodeMessage(L.VHOST_USER_SET_PROTOCOL_FEATURES, L.VHOST_USER_NEED_REPLY, encodeU64(features)),
    );
    await expectDropped(frontend);
  });

  it.each([
    ["GET_VRING_BASE_INFLIGHT", BASE_INFLIGHT],
    ["GET_VRING_BASE_SKIP_DRAIN", INFLIGHT | SKIP_DRAIN],
  ])("PROTOCOL, 2: %s without what it builds on is refused", async (_name, features) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await expect(frontend.setProtocolFeatures(REPLY_ACK | features)).rejects.toThrow(/refused/);
    expect(await frontend.getQueueNum(), "what was negotiated stays").toBe(2);
  });

  it("PROTOCOL, 5, BI-039: features do not change while a ring is started, the same ones may be sent again", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setFeatures(VERSION_1 | BIT_30);
    await expect(frontend.setFeatures(VERSION_1 | EVENT_IDX | BIT_30)).rejects.toThrow(ProtocolError);
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("BI-044: SET_OWNER twice and RESET_OWNER change nothing", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    await frontend.setOwner();
    await frontend.setOwner();
    await frontend.resetOwner();
    expect(rig.device.takeNames()).toEqual([]);
    expect(await frontend.getVringBase(0)).toBe(0);
  });
});

describe("PROTOCOL, 4: REPLY_ACK", () => {
  it("an acknowledged request is answered 0 with flags exactly 0x5", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SET_OWNER, NOTHING)).toBe(0n);
  });

  it("BI-016: without REPLY_ACK, NEED_REPLY is ignored", async () => {
    const { rig, frontend } = await negotiated(MQ);
    await using _ = rig;
    await frontend.send(encodeMessage(L.VHOST_USER_SET_OWNER, L.VHOST_USER_NEED_REPLY, NOTHING));
    await frontend.send(encodeMessage(L.VHOST_USER_GET_FEATURES, 0, NOTHING));
    expect(await frontend.receive()).toMatchObject({ request: L.VHOST_USER_GET_FEATURES });
  });

  it("BI-017: NEED_REPLY on a request with a reply of its own gets that one reply", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.send(encodeMessage(L.VHOST_USER_GET_FEATURES, L.VHOST_USER_NEED_REPLY, NOTHING));
    await frontend.send(encodeMessage(L.VHOST_USER_GET_QUEUE_NUM, 0, NOTHING));
    expect(decodeU64((await frontend.receive())?.payload as Buffer)).toBe(VERSION_1 | EVENT_IDX | BIT_30);
    expect(await frontend.receive()).toMatchObject({ request: L.VHOST_USER_GET_QUEUE_NUM });
  });

  it("the SET_PROTOCOL_FEATURES that negotiates REPLY_ACK is itself acknowledged (user-mode Linux waits for it)", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    expect(await ackOf(frontend, L.VHOST_USER_SET_PROTOCOL_FEATURES, encodeU64(REPLY_ACK))).toBe(0n);
  });

  it("the ack is sent only after the device has completed the request", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const { promise, resolve } = Promise.withResolvers<void>();
    const reached = Promise.withResolvers<void>();
    rig.device.before = () => {
      reached.resolve();
      return promise;
    };
    let isAcked = false;
    const acked = frontend.setVringEnable(0, true).then(() => (isAcked = true));
    await reached.promise;
    for (let turn = 0; turn < 20; turn++) await new Promise(setImmediate);
    expect(isAcked).toBe(false);
    resolve();
    await acked;
  });

  it("a request is handled only after the one before it has completed", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    let running = 0;
    rig.device.before = async () => {
      expect(++running).toBe(1);
      await new Promise(setImmediate);
      running--;
    };
    const requests = [true, false, true].map((enabled) => frontend.setVringEnable(0, enabled));
    await Promise.all(requests);
    expect(rig.device.takeNames()).toEqual(["updateVring", "updateVring", "updateVring"]);
  });
});

describe("gates", () => {
  it("PROTOCOL, 4.1: GET_QUEUE_NUM without MQ has no reply that says no: the connection is closed", async () => {
    const { rig, frontend } = await negotiated(REPLY_ACK);
    await using _ = rig;
    await frontend.send(encodeMessage(L.VHOST_USER_GET_QUEUE_NUM, 0, NOTHING));
    await expectDropped(frontend);
    expect(rig.refusals).toEqual(["GET_QUEUE_NUM"]);
  });

  it("PROTOCOL, 4, BI-161: SET_BACKEND_REQ_FD takes one socket and replaces the one before", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const [a, b] = socketpair().map((fd) => rig.own(fd));
    await frontend.setBackendReqFd(a as number);
    await frontend.setBackendReqFd(b as number);
    expect(rig.refusals).toEqual([]);
  });

  it("PROTOCOL, 4.1, BI-161: SET_BACKEND_REQ_FD without BACKEND_REQ, without an fd, or with another kind of fd is refused", async () => {
    const { rig, frontend } = await negotiated(REPLY_ACK);
    await using _ = rig;
    const [a, b] = socketpair();
    const set = (fds: number[]) => ackOf(frontend, L.VHOST_USER_SET_BACKEND_REQ_FD, NOTHING, fds);
    expect(await set([a])).not.toBe(0n);
    await frontend.setProtocolFeatures(REPLY_ACK | BACKEND_REQ);
    expect(await set([])).not.toBe(0n);
    expect(await set([a, b])).not.toBe(0n);
    expect(await set([rig.eventfd()])).not.toBe(0n);
    expect(await set([a])).toBe(0n);
    [a, b].forEach(close);
  });
});
