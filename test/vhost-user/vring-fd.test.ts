import { openSync, readFileSync } from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import { eventfdCreate, signalPeer } from "../../native/eventfd.ts";
import { pipe, setBlocking } from "../../native/fd.ts";
import { close } from "../../native/libc.ts";
import { receive, socketpair } from "../../native/socket.ts";
import * as L from "../../src/layout/vhost-user.ts";
import { encodeU64 } from "../../src/vhost-user/codec.ts";
import { ackOf, ready, started } from "./rig.ts";

const O_PATH = 0o10000000;
const KICK_CALL_ERR = [L.VHOST_USER_SET_VRING_KICK, L.VHOST_USER_SET_VRING_CALL, L.VHOST_USER_SET_VRING_ERR] as const;

describe("PROTOCOL, 4.1: the u64 and fds of SET_VRING_KICK, CALL and ERR", () => {
  it.each(KICK_CALL_ERR)("BI-098: request %i takes 1 fd, or none with the no-fd bit", async (id) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const noFd = encodeU64(BigInt(L.VHOST_USER_VRING_NOFD_MASK));
    expect(await ackOf(frontend, id, noFd, [rig.eventfd()])).not.toBe(0n);
    expect(await ackOf(frontend, id, encodeU64(0n), [])).not.toBe(0n);
    expect(await ackOf(frontend, id, encodeU64(0n), [rig.eventfd(), rig.eventfd()])).not.toBe(0n);
    expect(rig.device.takeNames()).toEqual([]);
    expect(await ackOf(frontend, id, noFd, [])).toBe(0n);
    expect(await ackOf(frontend, id, encodeU64(0n), [rig.eventfd()])).toBe(0n);
  });

  it.each(KICK_CALL_ERR)("BI-099: request %i with a reserved bit set is refused", async (id) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    for (const bit of [9n, 31n, 32n, 63n]) {
      expect(await ackOf(frontend, id, encodeU64(1n << bit), [rig.eventfd()])).not.toBe(0n);
    }
  });

  it.each(KICK_CALL_ERR)("BI-024: request %i refuses an fd that is no event counter", async (id) => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    const fds = [
      rig.memfd(),
      rig.own(openSync(rig.directory, "r")),
      rig.own(openSync(rig.directory, O_PATH)),
      rig.own(openSync("/dev/null", "r+")),
      rig.own(openSync(`/proc/self/fd/${rig.eventfd()}`, O_PATH)),
    ];
    for (const fd of fds) expect(await ackOf(frontend, id, encodeU64(0n), [fd])).not.toBe(0n);
    expect(rig.device.takeNames()).toEqual([]);
  });
});

describe("call and err fds", () => {
  // The first signal of a thread opens what all of them need.
  beforeAll(() => {
    const fd = eventfdCreate();
    signalPeer(fd);
    close(fd);
  });

  it.each([L.VHOST_USER_SET_VRING_CALL, L.VHOST_USER_SET_VRING_ERR])("request %i takes no pipe", async (id) => {
    const { rig, frontend } = await started();
    await using _ = rig;
    for (const fd of pipe().map((each) => rig.own(each))) {
      expect(await ackOf(frontend, id, encodeU64(0n), [fd])).not.toBe(0n);
    }
    expect(rig.device.takeNames()).toEqual([]);
  });

  it("one end of a socket pair is taken too: what user-mode Linux passes", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const [ours, theirs] = socketpair().map((fd) => rig.own(fd)) as [number, number];
    setBlocking(theirs);
    await frontend.setVringCall(0, theirs);
    expect(isNonBlocking(theirs), "the open file is the peer's too").toBe(false);
    expect(signalPeer(rig.device.lastVring.call as number)).toBe(true);
    expect(receive(ours, Buffer.alloc(16))?.count).toBe(8);
  });

  it("BI-027: a call socket whose other end was closed takes no signal, and kills nobody by SIGPIPE", async () => {
    const { rig, frontend } = await started();
    await using _ = rig;
    const [ours, theirs] = socketpair();
    await frontend.setVringCall(0, rig.own(theirs));
    close(ours);
    expect(signalPeer(rig.device.lastVring.call as number)).toBe(false);
  });

  it("BI-024: a kick fd is an eventfd, no pipe and no socket", async () => {
    const { rig, frontend } = await ready();
    await using _ = rig;
    for (const fd of [...pipe(), ...socketpair()].map((each) => rig.own(each))) {
      expect(await ackOf(frontend, L.VHOST_USER_SET_VRING_KICK, encodeU64(0n), [fd])).not.toBe(0n);
    }
  });
});

function isNonBlocking(fd: number): boolean {
  const flags = /flags:\s*(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "latin1"))?.[1];
  return (Number.parseInt(flags ?? "", 8) & 0o4000) !== 0;
}
