import { existsSync, mkdirSync, renameSync, unlinkSync, watch, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it, vi } from "vitest";
import { setBlocking } from "../../native/fd.ts";
import { accept, connect, listen, receive, send, shutdown, socketpair } from "../../native/socket.ts";
import { close } from "../../native/libc.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { encodeMessage, encodeU64 } from "../../src/vhost-user/codec.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";
import { Listener } from "../../src/vhost-user/endpoint.ts";
import { Server } from "../../src/vhost-user/server.ts";
import type { ServerEvent } from "../../src/vhost-user/server.ts";
import { barrier, expectDropped, negotiated, Rig, started } from "./rig.ts";

// inotify's own fd is opened once for the process and stays
watch(tmpdir()).close();

const NOTHING = Buffer.alloc(0);
const getFeatures = encodeMessage(L.VHOST_USER_GET_FEATURES, 0, NOTHING);
const errors = (events: ServerEvent[]) =>
  events.flatMap((event) => (event.type === "disconnect" && event.error ? [String(event.error)] : []));

/** How much `count` grows at most in one turn of the event loop, until it is `last`. */
async function largestTurn(count: () => number, last: number): Promise<number> {
  let largest = 0;
  for (let before = count(); before < last;) {
    await new Promise(setImmediate);
    largest = Math.max(largest, count() - before);
    before = count();
  }
  return largest;
}

describe("a socket that was opened before", () => {
  it("that listens: front-ends come one after the other; it stays open until the server ends", async () => {
    await using rig = new Rig();
    const server = rig.serve({ fd: listen(rig.path) });
    for (let round = 0; round < 3; round++) {
      const frontend = rig.connect();
      await barrier(frontend);
      frontend[Symbol.dispose]();
    }
    await server[Symbol.asyncDispose]();
    expect(rig.events.map(({ type }) => type)).toEqual([...Array(3)].flatMap(() => ["connect", "disconnect"]));
  });

  it("that is connected: one session, and then it says that there will be no other", async () => {
    await using rig = new Rig();
    const [ours, theirs] = socketpair();
    rig.serve({ fd: theirs });
    const frontend = rig.adopt(new Frontend(ours));
    expect(await frontend.getFeatures()).toBeTypeOf("bigint");
    frontend[Symbol.dispose]();
    await vi.waitFor(() => expect(rig.events.map(({ type }) => type)).toEqual(["connect", "disconnect", "end"]));
  });

  it("that blocks: is made non-blocking", async () => {
    await using rig = new Rig();
    const fd = listen(rig.path);
    setBlocking(fd);
    rig.serve({ fd });
    await barrier(rig.connect());
  });

  it("that is none, or not of this kind, is refused", async () => {
    await using rig = new Rig();
    for (const fd of [rig.memfd(), rig.eventfd(), 12345]) {
      expect(() => new Server(rig.device, { fd }), `fd ${fd}`).toThrow(/no unix stream socket/);
    }
  });
});

describe("connections", () => {
  it("BI-001: front-ends that connect and leave without a word", async () => {
    await using rig = new Rig();
    rig.serve();
    for (let round = 0; round < 200; round++) {
      rig.connect()[Symbol.dispose]();
      await new Promise(setImmediate);
    }
    await barrier(rig.connect());
    expect(errors(rig.events)).toEqual([]);
  });

  it("one front-end at a time: the next is served when the first is gone, by a device that was reset", async () => {
    await using rig = new Rig();
    rig.serve();
    const first = rig.connect();
    await barrier(first);
    const second = rig.connect();
    let isServed = false;
    const served = barrier(second).then(() => (isServed = true));
    await barrier(first);
    expect(isServed).toBe(false);
    first[Symbol.dispose]();
    await served;
    expect(rig.device.takeNames()).toEqual(["reset"]);
    expect(rig.events.map(({ type }) => type)).toEqual(["connect", "disconnect", "connect"]);
  });

  it("a front-end that dies takes its rings along, and nothing else: another finds everything initial", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    frontend[Symbol.dispose]();
    const next = rig.connect();
    expect(await next.getVringBase(0)).toBe(0);
    expect(rig.device.takeNames()).toEqual(["reset"]);
    await next.send(encodeMessage(L.VHOST_USER_GET_QUEUE_NUM, 0, NOTHING));
    await expectDropped(next);
  });

  it("BI-029: idle connections wait in the socket's queue, which is bounded; one is taken", async () => {
    await using rig = new Rig();
    rig.serve();
    const idle: number[] = [];
    for (let count = 0; count < 10_000; count++) {
      const fd = connect(rig.path);
      if (fd === undefined) break;
      idle.push(rig.own(fd));
      if (count === 0) await vi.waitFor(() => expect(rig.events).toHaveLength(1));
    }
    expect(idle.length).toBeLessThan(200);
    expect(rig.events.map(({ type }) => type)).toEqual(["connect"]);
  });

  it("a front-end that stays silent after connecting is dropped", async () => {
    await using rig = new Rig();
    rig.serve({ firstMessageTimeoutMs: 20 });
    await expectDropped(rig.connect());
    await vi.waitFor(() => expect(errors(rig.events)).toEqual([expect.stringMatching(/in time/)]));
  });

  it("once it has spoken it may be silent for as long as it likes", async () => {
    await using rig = new Rig();
    rig.serve({ firstMessageTimeoutMs: 20, messageTimeoutMs: 20 });
    const frontend = rig.connect();
    await barrier(frontend);
    await new Promise((resolve) => setTimeout(resolve, 60));
    await barrier(frontend);
    expect(rig.events).toEqual([{ type: "connect" }]);
  });

  it("the deadline of a message counts from its first byte, not from the message before", async () => {
    await using rig = new Rig();
    rig.serve({ messageTimeoutMs: 300 });
    const frontend = rig.connect();
    await barrier(frontend);
    await new Promise((resolve) => setTimeout(resolve, 400));
    await frontend.send(getFeatures.subarray(0, 5));
    await new Promise((resolve) => setTimeout(resolve, 5));
    await frontend.send(getFeatures.subarray(5));
    expect(await frontend.receive()).toMatchObject({ request: L.VHOST_USER_GET_FEATURES });
  });

  it("BI-004: a message that is begun and not finished drops the connection", async () => {
    await using rig = new Rig();
    rig.serve({ messageTimeoutMs: 20 });
    const frontend = rig.connect();
    await barrier(frontend);
    await frontend.send(encodeMessage(L.VHOST_USER_SET_FEATURES, 0, encodeU64(0n)).subarray(0, 19), [rig.eventfd()]);
    await expectDropped(frontend);
  });

  it("BI-002: a header that arrives byte by byte is parsed when it is complete, while timers go on", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    for (const byte of getFeatures) {
      await frontend.send(Buffer.of(byte));
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    expect(await frontend.receive()).toMatchObject({ request: L.VHOST_USER_GET_FEATURES });
  });

  it.each([1, 5, 11, 15])("BI-003: a message cut after %i bytes is the end of that connection only", async (size) => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    await frontend.send(encodeMessage(L.VHOST_USER_SET_FEATURES, 0, encodeU64(0n)).subarray(0, size), [rig.eventfd()]);
    frontend[Symbol.dispose]();
    await barrier(rig.connect());
    expect(errors(rig.events)).toEqual([expect.stringMatching(/middle of a message/)]);
  });

  it("BI-006: messages sent at once are answered one by one, fds going to the one they were sent with", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const call = encodeMessage(L.VHOST_USER_SET_VRING_CALL, L.VHOST_USER_NEED_REPLY, encodeU64(0n));
    await frontend.send(Buffer.concat([getFeatures, getFeatures]));
    await frontend.send(Buffer.concat([call, getFeatures]), [rig.eventfd()]);
    const replies = [];
    for (let count = 0; count < 4; count++) replies.push(await frontend.receive());
    expect(replies.map((reply) => reply?.request)).toEqual([1, 1, L.VHOST_USER_SET_VRING_CALL, 1]);
    expect(replies[2]?.payload.readBigUInt64LE()).toBe(0n);
  });

  it("BI-021: fds sent with the payload instead of the header are closed, and the request that needed them refused", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const call = encodeMessage(L.VHOST_USER_SET_VRING_CALL, L.VHOST_USER_NEED_REPLY, encodeU64(0n));
    await frontend.send(call.subarray(0, L.HEADER_SIZE));
    await frontend.send(call.subarray(L.HEADER_SIZE), [rig.eventfd()]);
    expect((await frontend.receive())?.payload.readBigUInt64LE()).not.toBe(0n);
  });

  it.each([
    ["BI-007: a payload of 4 GiB", Buffer.from("0100000001000000ffffffff", "hex")],
    ["BI-008: a payload one byte over the limit", Buffer.from("0100000001000000f50f0000", "hex")],
    ["BI-013: version 2", Buffer.from("010000000200000000000000", "hex")],
    ["BI-014: the reply flag", Buffer.from("010000000500000000000000", "hex")],
  ])("%s drops the connection, fds closed", async (_name, bytes) => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    await frontend.send(bytes, [rig.eventfd(), rig.memfd()]);
    await expectDropped(frontend);
    await barrier(rig.connect());
  });

  it("BI-031: shutdown in one direction is a disconnect", async () => {
    await using rig = new Rig();
    rig.serve();
    const fd = connect(rig.path) as number;
    send(fd, getFeatures);
    shutdown(fd);
    await barrier(rig.connect());
    expect(rig.device.takeNames()).toEqual(["reset"]);
    close(fd);
  });

  it("BI-032: a peer that never reads its answers is dropped, and holds up nobody's event loop", async () => {
    await using rig = new Rig();
    rig.serve({ messageTimeoutMs: 20 });
    const fd = connect(rig.path) as number;
    const flood = () => {
      try {
        while (send(fd, getFeatures) > 0);
      } catch (error) {
        expect(error).toMatchObject({ code: "EPIPE" });
      }
    };
    while (errors(rig.events).length === 0) {
      flood();
      await new Promise(setImmediate);
    }
    expect(errors(rig.events)).toEqual([expect.stringMatching(/read our answer/)]);
    close(fd);
    await barrier(rig.connect());
  });

  it("BI-033: messages sent at once are handled one in a turn of the event loop: others have their turn in between", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    const message = encodeMessage(L.VHOST_USER_SET_FEATURES, 0, encodeU64(0n));
    await frontend.send(Buffer.concat(Array(1000).fill(message)));
    expect(await largestTurn(() => rig.device.calls.length, 1000)).toBe(1);
  });

  it("connections that were closed before they were taken are ended one in a turn of the event loop", async () => {
    await using rig = new Rig();
    rig.serve();
    for (let round = 0; round < 100; round++) rig.connect()[Symbol.dispose]();
    expect(await largestTurn(() => rig.events.length, 200)).toBe(2);
  });

  it("BI-036: random bytes end at most the connection they came on", async () => {
    await using rig = new Rig();
    rig.serve({ messageTimeoutMs: 5, firstMessageTimeoutMs: 5 });
    let seed = 1;
    const random = () => (seed = (seed * 48271) % 2147483647);
    for (let round = 0; round < 50; round++) {
      const bytes = Buffer.from(Array.from({ length: random() % 200 }, () => random() & 0xff));
      // Half of them begin with a header that holds, so that the handlers meet random payloads
      if (round % 2)
        bytes.set(
          [1 + (random() % 46), 0, 0, 0, 9, 0, 0, 0, Math.max(0, bytes.length - 12), 0, 0, 0].slice(0, bytes.length),
        );
      const fd = connect(rig.path) as number;
      if (bytes.length > 0) send(fd, bytes, round % 3 ? [rig.eventfd()] : []);
      close(fd);
      await new Promise(setImmediate);
    }
    await barrier(rig.connect());
  });

  it("BI-034: the socket file may be removed or replaced, the live session goes on", async () => {
    await using rig = new Rig();
    rig.serve();
    const frontend = rig.connect();
    await barrier(frontend);
    unlinkSync(rig.path);
    writeFileSync(rig.path, "somebody else's");
    await barrier(frontend);
  });
});

describe("listening", () => {
  it("closing removes the socket file, disconnects, and resets the device", async () => {
    await using rig = new Rig();
    const server = rig.serve();
    const frontend = rig.connect();
    await barrier(frontend);
    const closed = server[Symbol.asyncDispose]();
    expect(existsSync(rig.path)).toBe(false);
    await closed;
    expect(rig.device.takeNames()).toEqual(["reset"]);
    await expectDropped(frontend);
  });

  it("closing leaves a file that is not its own", async () => {
    await using rig = new Rig();
    const server = rig.serve();
    renameSync(rig.path, join(rig.directory, "moved"));
    writeFileSync(rig.path, "somebody else's");
    await server[Symbol.asyncDispose]();
    expect(existsSync(rig.path)).toBe(true);
  });

  it("BI-331: a path that another server serves is refused", async () => {
    await using rig = new Rig();
    rig.serve();
    expect(() => new Server(rig.device, { path: rig.path })).toThrow(/already served/);
    await barrier(rig.connect());
  });

  it("a socket file left by a server that died is taken over", async () => {
    await using rig = new Rig();
    close(listen(rig.path));
    rig.serve();
    await barrier(rig.connect());
  });
});

describe("dialling", () => {
  it("waits for the front-end's socket, and comes back after it has gone", async () => {
    await using rig = new Rig();
    rig.serve({ connect: true });
    for (let life = 0; life < 3; life++) {
      using listener = new Listener(rig.path);
      const frontend = rig.adopt(new Frontend((await listener.next()) as number));
      await barrier(frontend);
      frontend[Symbol.dispose]();
    }
    expect(errors(rig.events)).toEqual([]);
  });

  it("dials the directory's new socket at once, not at the next slow retry", async () => {
    await using rig = new Rig();
    rig.serve({ connect: true });
    await new Promise((resolve) => setTimeout(resolve, 20));
    const slowRetry = new Promise((resolve) => setTimeout(resolve, 500, "slow"));
    using listener = new Listener(rig.path);
    const dialled = listener.next().then((fd) => {
      rig.own(fd as number);
      return "dialled";
    });
    expect(await Promise.race([dialled, slowRetry])).toBe("dialled");
  });

  it("the directory may come later", async () => {
    await using rig = new Rig();
    const path = join(rig.directory, "later", "s");
    rig.serve({ connect: true, path });
    mkdirSync(join(rig.directory, "later"));
    using listener = new Listener(path);
    rig.own((await listener.next()) as number);
  });

  it("closes at once while it waits", async () => {
    await using rig = new Rig();
    const server = rig.serve({ connect: true });
    await new Promise((resolve) => setTimeout(resolve, 10));
    await server[Symbol.asyncDispose]();
    expect(rig.events).toEqual([]);
  });
});

describe("the front-end", () => {
  it("says that nobody listens", async () => {
    await using rig = new Rig();
    expect(() => rig.connect()).toThrow(/nobody listens/);
  });

  it("sends overlapping calls one after the other and gives each its own reply", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const answers = await Promise.all([
      frontend.getQueueNum(),
      frontend.setOwner(),
      frontend.getVringBase(1),
      frontend.getFeatures(),
    ]);
    expect(answers.slice(0, 3)).toEqual([2, undefined, 0]);
  });

  it("PROTOCOL, 13.4: refuses a reply whose flags are not exactly 0x5", async () => {
    await using rig = new Rig();
    const listener = rig.own(listen(rig.path));
    const frontend = rig.connect();
    const fd = rig.own(accept(listener) as number);
    const features = frontend.getFeatures();
    await vi.waitFor(() => expect(receive(fd, Buffer.alloc(64))?.count).toBe(12));
    send(fd, encodeMessage(L.VHOST_USER_GET_FEATURES, L.VHOST_USER_REPLY | L.VHOST_USER_NEED_REPLY, encodeU64(0n)));
    await expect(features).rejects.toThrow(/flags 13/);
  });
});
