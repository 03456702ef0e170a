import { describe, expect, it } from "vitest";
import * as L from "../../src/layout/vhost-user.ts";
import { VIRTIO_NET_F_MTU } from "../../src/layout/virtio.ts";
import { encodeMessage, encodeU64 } from "../../src/vhost-user/codec.ts";
import type { Frontend } from "../../src/vhost-user/frontend.ts";
import { ackOf, barrier, negotiated, REPLY_ACK, Rig, USUAL_PROTOCOL_FEATURES } from "./rig.ts";

const CONFIG = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_CONFIG);
const MTU = 1n << BigInt(L.VHOST_USER_PROTOCOL_F_MTU);
const BYTES = Uint8Array.of(0x52, 0x54, 0, 1, 2, 3, 1, 0, 2, 0, 0xdc, 5);

/** A front-end of a device with a configuration space and an MTU. */
async function configured(): Promise<{ rig: Rig; frontend: Frontend }> {
  const rig = new Rig();
  rig.device.config = BYTES;
  rig.device.features |= 1n << BigInt(VIRTIO_NET_F_MTU);
  rig.serve();
  const frontend = rig.connect();
  await frontend.setProtocolFeatures(REPLY_ACK | CONFIG | MTU);
  return { rig, frontend };
}

function range(offset: number, size: number, payloadSize = 12 + size): Buffer {
  const payload = Buffer.alloc(payloadSize);
  payload.writeUInt32LE(offset, 0);
  payload.writeUInt32LE(size, 4);
  return payload;
}

describe("PROTOCOL, 4: GET_CONFIG and SET_CONFIG", () => {
  it("the feature is offered only by a device that has a configuration space", async () => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    expect((await frontend.getProtocolFeatures()) & CONFIG).toBe(CONFIG);
    rig.device.config = undefined;
    expect((await frontend.getProtocolFeatures()) & CONFIG).toBe(0n);
  });

  it.each([
    [0, 12, [...BYTES]],
    [0, 6, [...BYTES.subarray(0, 6)]],
    [10, 2, [0xdc, 5]],
    [10, 4, [0xdc, 5, 0, 0]],
    [0, 256, [...BYTES, ...Array(244).fill(0)]],
    [255, 1, [0]],
  ])("from %i, %i bytes: what the device has, 0 after its end", async (offset, size, expected) => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    expect([...(await frontend.getConfig({ offset, size }))]).toEqual(expected);
  });

  it("the reply has the request's size, offset and size fields", async () => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    const reply = await frontend.request(L.VHOST_USER_GET_CONFIG, range(6, 4));
    expect(reply.toString("hex")).toBe("06000000040000000000000001000200");
  });

  it.each([
    ["size 0", range(0, 0)],
    ["size 257", range(0, 257)],
    ["size 4097, though not that long", range(0, 4097, 64)],
    ["past the end", range(250, 7)],
    ["offset + size wraps u32", range(0xffff_fff0, 0x20, 12 + 0x20)],
    ["size larger than the payload", range(0, 13, 12 + 12)],
    ["size smaller than the payload", range(0, 11, 12 + 12)],
    ["no header", Buffer.alloc(8)],
    ["nothing", Buffer.alloc(0)],
  ])("BI-052: GET_CONFIG, %s: an empty reply, the session goes on", async (_name, payload) => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    expect(await frontend.request(L.VHOST_USER_GET_CONFIG, payload)).toHaveLength(0);
    expect(await frontend.getConfig({ offset: 0, size: 1 })).toHaveLength(1);
  });

  it("BI-053: SET_CONFIG is refused, the value unchanged", async () => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    for (const flags of [0, 1]) {
      const payload = range(0, 6);
      payload.writeUInt32LE(flags, 8);
      payload.fill(0xaa, 12);
      expect(await ackOf(frontend, L.VHOST_USER_SET_CONFIG, payload)).not.toBe(0n);
    }
    expect(new Uint8Array(await frontend.getConfig({ offset: 0, size: 12 }))).toEqual(BYTES);
  });

  it("PROTOCOL, 4.1: not negotiated, GET_CONFIG is answered without payload and SET_CONFIG refused", async () => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    await frontend.setProtocolFeatures(REPLY_ACK);
    expect(await frontend.request(L.VHOST_USER_GET_CONFIG, range(0, 12))).toHaveLength(0);
    expect(await ackOf(frontend, L.VHOST_USER_SET_CONFIG, range(0, 12))).not.toBe(0n);
  });
});

describe("PROTOCOL, 4: NET_SET_MTU", () => {
  it.each([68, 1500, 65535])("%i reaches the device, before SET_FEATURES too", async (mtu) => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    await frontend.netSetMtu(mtu);
    expect(rig.device.mtu).toBe(mtu);
  });

  it.each([0n, 67n, 65536n, 1n << 32n, (1n << 64n) - 1n])("%i is refused", async (mtu) => {
    const { rig, frontend } = await configured();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_NET_SET_MTU, encodeU64(mtu))).not.toBe(0n);
    expect(rig.device.mtu).toBeUndefined();
  });

  it("is not offered by a device without VIRTIO_NET_F_MTU, and refused there", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect((await frontend.getProtocolFeatures()) & MTU).toBe(0n);
    await expect(frontend.setProtocolFeatures(USUAL_PROTOCOL_FEATURES | MTU)).rejects.toThrow(/refused/);
    await expect(frontend.netSetMtu(1500)).rejects.toThrow(/refused/);
    expect(rig.device.mtu).toBeUndefined();
  });
});

describe("PROTOCOL, 13.2: GET_QUEUE_NUM", () => {
  it.each([
    ["pairs", 2],
    ["vrings", 4],
  ] as const)("counts %s where the port says so", async (unit, count) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    rig.device.queueUnit = unit;
    expect(await frontend.getQueueNum()).toBe(count);
  });

  it.each(["pairs", "vrings"] as const)(
    "BI-054: rings of pairs that do not exist are refused, whatever was counted: %s",
    async (unit) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      rig.device.queueUnit = unit;
      await frontend.setVringNum(3, 256);
      for (const index of [4, 5, 7, 255]) {
        await expect(frontend.setVringNum(index, 256)).rejects.toThrow(/refused/);
        await expect(frontend.setVringKick(index, rig.eventfd())).rejects.toThrow(/refused/);
        await expect(frontend.setVringEnable(index, true)).rejects.toThrow(/refused/);
      }
    },
  );
});

describe("what is not offered", () => {
  it("BI-132: SET_VRING_ENDIAN, big or little, is refused", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    for (const endian of [0, 1]) {
      expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_ENDIAN, range(0, endian, 8))).not.toBe(0n);
    }
  });

  it("BI-162: POSTCOPY_LISTEN and POSTCOPY_END are refused", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_POSTCOPY_LISTEN, Buffer.alloc(0))).not.toBe(0n);
    expect(await ackOf(frontend, L.VHOST_USER_POSTCOPY_END, Buffer.alloc(0))).not.toBe(0n);
  });

  it.each([
    [0, 0],
    [2, 0],
    [0, 1],
    [0xffffffff, 0xffffffff],
  ])(
    "BI-163: SET_DEVICE_STATE_FD, direction %i, phase %i: an error, no fd; ours is closed",
    async (direction, phase) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      const reply = await frontend.request(L.VHOST_USER_SET_DEVICE_STATE_FD, range(direction, phase, 8), [
        rig.eventfd(),
      ]);
      expect(reply.toString("hex")).toBe("0101000000000000");
    },
  );

  it.each([
    L.VHOST_USER_CLOSE_CRYPTO_SESSION,
    L.VHOST_USER_GPU_SET_SOCKET,
    L.VHOST_USER_SET_INFLIGHT_FD,
    L.VHOST_USER_SET_LOG_FD,
  ])("BI-164: optional request %i with fds: refused, its fds closed", async (id) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fds = [rig.eventfd(), rig.memfd(), rig.eventfd()];
    for (let round = 0; round < 20; round++) expect(await ackOf(frontend, id, Buffer.alloc(24), fds)).not.toBe(0n);
    await frontend.send(encodeMessage(id, 0, Buffer.alloc(24)), fds);
    await barrier(frontend);
  });
});
