import { describe, expect, it } from "vitest";
import * as L from "../../src/layout/vhost-user.ts";
import { encodeMessage } from "../../src/vhost-user/codec.ts";
import { requests } from "../../src/vhost-user/requests.ts";
import type { Frontend } from "../../src/vhost-user/frontend.ts";
import {
  ackOf,
  USUAL_PROTOCOL_FEATURES,
  barrier,
  expectDropped,
  MQ,
  negotiated,
  VERSION_1,
  BIT_30,
  EVENT_IDX,
} from "./rig.ts";

const NOTHING = Buffer.alloc(0);
const notOffered = [...requests].filter(([, request]) => request.handle === undefined);
const withRefusal = (refusal: string) => notOffered.filter(([, request]) => request.refusal === refusal);

/** The session is in step: the next request is understood. */
async function expectInStep(frontend: Frontend): Promise<void> {
  expect(await frontend.getFeatures()).toBe(VERSION_1 | EVENT_IDX | BIT_30);
}

describe("PROTOCOL, 4.1: requests that are not offered", () => {
  it("are, with those that are, all 45 of the protocol", () => {
    expect([...requests.keys()].toSorted((a, b) => a - b)).toEqual(Array.from({ length: 45 }, (_, index) => index + 1));
  });

  it.each([...withRefusal("ack or drop"), ...withRefusal("ack or ignore")])(
    "BI-151, BI-153, BI-162, BI-164: request %i is refused by a non-zero ack, its payload skipped, its fds closed",
    async (id) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      expect(await ackOf(frontend, id, Buffer.alloc(40), [rig.eventfd(), rig.memfd()])).not.toBe(0n);
      await expectInStep(frontend);
    },
  );

  it.each(withRefusal("ack or ignore"))("request %i without NEED_REPLY is ignored, the session goes on", async (id) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.send(encodeMessage(id, 0, Buffer.alloc(40)), [rig.eventfd()]);
    await expectInStep(frontend);
  });

  it.each(withRefusal("ack or drop"))(
    "request %i without NEED_REPLY closes the connection: the front-end would build on it",
    async (id) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      await frontend.send(encodeMessage(id, 0, Buffer.alloc(40)), [rig.eventfd()]);
      await expectDropped(frontend);
    },
  );

  it.each(withRefusal("drop"))(
    "request %i waits for a reply that cannot say no: the connection is closed",
    async (id) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      await frontend.send(encodeMessage(id, L.VHOST_USER_NEED_REPLY, Buffer.alloc(8)), [rig.eventfd()]);
      await expectDropped(frontend);
    },
  );

  it.each([
    [L.VHOST_USER_IOTLB_MSG, 32, "0100000000000000"],
    [L.VHOST_USER_GET_CONFIG, 20, ""],
    [L.VHOST_USER_POSTCOPY_END, 0, "0100000000000000"],
    [L.VHOST_USER_GET_INFLIGHT_FD, 24, "00".repeat(24)],
    [L.VHOST_USER_SET_DEVICE_STATE_FD, 8, "0101000000000000"],
    [L.VHOST_USER_CHECK_DEVICE_STATE, 0, "0100000000000000"],
  ])(
    "BI-156, BI-162: request %i gets its own reply, which says no, once and whether or not NEED_REPLY is set",
    async (id, size, reply) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      for (const flags of [0, L.VHOST_USER_NEED_REPLY]) {
        await frontend.send(encodeMessage(id, flags, Buffer.alloc(size)), [rig.eventfd()]);
        const message = await frontend.receive();
        expect(message).toMatchObject({ request: id, flags: L.VHOST_USER_VERSION | L.VHOST_USER_REPLY });
        expect(message?.payload.toString("hex")).toBe(reply);
      }
      await expectInStep(frontend);
    },
  );

  it("the cases above are all there are; some are offered, and refuse what is wrong like this", () => {
    const named = [...requests].filter(([, { refusal }]) => typeof refusal !== "string").map(([id]) => id);
    expect(named.toSorted((a, b) => a - b)).toEqual([22, 24, 30, 31, 42, 43]);
  });
});

describe("PROTOCOL, 4: unknown requests", () => {
  it.each([0, 46, 1000, 0xffffffff])(
    "BI-012: id %i: a non-zero ack, or nothing; payload skipped, fds closed",
    async (id) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      expect(await ackOf(frontend, id, Buffer.alloc(100), [rig.eventfd()])).not.toBe(0n);
      await frontend.send(encodeMessage(id, 0, Buffer.alloc(100)), [rig.eventfd()]);
      await expectInStep(frontend);
    },
  );
});

describe("PROTOCOL, 4.1: payload sizes", () => {
  const sized = [...requests].filter(([, { handle, payloadSize }]) => handle && payloadSize !== undefined);

  it.each(sized.filter(([, { refusal }]) => typeof refusal !== "string"))(
    "BI-009, BI-011: request %i gets its reply that says no, with a byte less, a byte more, or none",
    async (id, request) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      const size = request.payloadSize as number;
      for (const wrong of [size - 1, size + 1, size === 0 ? 8 : 0].filter((each) => each >= 0)) {
        expect((await frontend.request(id, Buffer.alloc(wrong))).equals(request.refusal as Buffer)).toBe(true);
      }
      await expectInStep(frontend);
    },
  );

  it.each(sized.filter(([, { refusal }]) => typeof refusal === "string" && refusal !== "drop"))(
    "BI-009, BI-011: request %i is refused with a byte less, a byte more, or none",
    async (id, request) => {
      const { rig, frontend } = await negotiated(USUAL_PROTOCOL_FEATURES);
      await using _ = rig;
      await barrier(frontend);
      rig.device.takeNames();
      const size = request.payloadSize as number;
      for (const wrong of [size - 1, size + 1, size === 0 ? 8 : 0]) {
        if (wrong >= 0) expect(await ackOf(frontend, id, Buffer.alloc(wrong))).not.toBe(0n);
      }
      expect(rig.device.takeNames()).toEqual([]);
      await expectInStep(frontend);
    },
  );

  it.each(sized.filter(([, { refusal }]) => refusal === "drop"))(
    "request %i with a byte too many closes the connection: its reply cannot say no",
    async (id, request) => {
      const { rig, frontend } = await negotiated(MQ);
      await using _ = rig;
      await frontend.send(encodeMessage(id, 0, Buffer.alloc((request.payloadSize as number) + 1)));
      await expectDropped(frontend);
    },
  );
});

describe("PROTOCOL, 4.1: fds of requests that take none", () => {
  it("BI-018: 253 fds with GET_FEATURES are closed, the request is answered", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const fd = rig.eventfd();
    for (let round = 0; round < 50; round++) {
      await frontend.request(L.VHOST_USER_GET_FEATURES, NOTHING, Array(253).fill(fd));
    }
  });
});
