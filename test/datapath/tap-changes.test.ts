/** What changes under traffic: the interface, by somebody else; the guest's memory, rings and front-end; the relay's end. */
import { execFileSync, spawn } from "node:child_process";
import { chmodSync, closeSync, existsSync, openSync, readdirSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close, libc } from "../../native/libc.ts";
import { changeInterface, findInterface } from "../../native/network-interface.ts";
import { openTap } from "../../native/tun.ts";
import { ConfigError, SystemError } from "../../src/errors.ts";
import { Relay } from "../../src/index.ts";
import { IFF_NO_PI, IFF_TAP, IFREQ_FLAGS, IFREQ_SIZE, TUNSETIFF } from "../../src/layout/tun.ts";
import { RECEIVEQ, TRANSMITQ } from "../../src/layout/virtio.ts";
import { PacketSocket, isNumbered, numberOf, numbered } from "./tap-packets.ts";
import { Stage, enterNetwork, interfaces, ip, until } from "./tap-stage.ts";
import type { Vm } from "./tap-vm.ts";

const NOBODY = 65_534;
const ioctl = libc.func("int ioctl(int fd, unsigned long request, void *argument)");
const skipped = enterNetwork();
let stage: Stage;

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
  stage = new Stage();
});

afterEach(async () => {
  if (skipped === undefined) await stage.close();
});

/** Frames that go both ways between a guest and a network, a few at a time, as long as turns are taken. */
class Traffic {
  readonly vm: Vm;
  readonly network: PacketSocket;
  /** Frames sent, frames that have arrived, and the least number that the next one has. */
  readonly out = { sent: 0, arrived: 0, next: 0 };
  readonly into = { sent: 0, arrived: 0, next: 0 };
  readonly #length: number;
  /** Frames under way at most, unless some are lost. */
  readonly #window = 60;

  constructor(vm: Vm, network: PacketSocket, length = 700) {
    this.vm = vm;
    this.network = network;
    this.#length = length;
  }

  /** @param lost how many frames either way did not arrive as far as is known */
  turn(lost = { out: 0, into: 0 }, sends = true): void {
    const { vm, network, out, into } = this;
    while (sends && into.sent - into.arrived - lost.into < this.#window && network.send(this.#frame(into.sent)))
      into.sent++;
    while (sends && out.sent - out.arrived - lost.out < this.#window && vm.send(this.#frame(out.sent))) out.sent++;
    vm.supply();
    for (const { frame } of vm.receive()) this.#take(frame, into);
    for (let got = network.receive(); got; got = network.receive()) this.#take(got.frame, out);
  }

  /** Takes turns until it is so. */
  async until(what: string, isSo: () => boolean, lost?: () => { out: number; into: number }): Promise<void> {
    await until(what, () => (this.turn(lost?.()), isSo()));
  }

  /** So many more frames go either way. */
  async carries(count: number): Promise<void> {
    const { out, into } = this;
    const goals = [out.arrived + count, into.arrived + count] as const;
    // What is lost is counted as lost by now.
    const lost = { out: out.sent - out.arrived, into: into.sent - into.arrived };
    await this.until(
      `${count} more frames went either way`,
      () => out.arrived >= goals[0] && into.arrived >= goals[1],
      () => lost,
    );
  }

  /** Everything sent has arrived. */
  async settles(): Promise<void> {
    await until(
      "all has arrived",
      () => (this.turn(undefined, false), this.out.arrived === this.out.sent && this.into.arrived === this.into.sent),
    );
  }

  #frame(k: number): Buffer {
    return numbered(k, this.#length);
  }

  #take(frame: Buffer, way: { arrived: number; next: number }): void {
    if (!isNumbered(frame)) return;
    const k = numberOf(frame);
    expect(k, "frames arrive in order, and once").toBeGreaterThanOrEqual(way.next);
    expect(Buffer.compare(frame, this.#frame(k)), `frame ${k}`).toBe(0);
    way.next = k + 1;
    way.arrived++;
  }
}

async function startTraffic(name = "a", tap = "tap0"): Promise<Traffic> {
  const vm = await stage.vm(name);
  return new Traffic(vm, stage.open.use(new PacketSocket(tap)));
}

const portState = (link = 0) => stage.state.links[link]!.ports[1];

async function expectAsleep(): Promise<void> {
  const iterations = () => stage.state.pollers.map(({ busy, idle }) => busy + idle);
  let before = iterations();
  for (let same = 0, round = 0; same < 5; round++) {
    expect(round, "rounds in which the pollers did not sleep").toBeLessThan(400);
    await sleep(5);
    const now = iterations();
    same = now.every((count, i) => count === before[i]) ? same + 1 : 0;
    before = now;
  }
}

describe("an interface that somebody changes under traffic", () => {
  it.each(["io_uring", "aio", "rw"])(
    "%s: brought down and up: drops are counted, it is told, traffic goes on",
    async (io) => {
      await stage.start([`tap:tap0,io=${io}`]);
      const traffic = await startTraffic();
      await traffic.carries(300);
      for (let life = 1; life <= 2; life++) {
        await traffic.settles();
        const dropped = stage.dropped;
        expect(stage.lane("send").packets).toBe(traffic.out.arrived);
        ip("link", "set", "tap0", "down");
        await until("it is told", () => stage.news.length === 2 * life - 1);
        expect(portState()).toMatchObject({ state: "down", mtu: 1500 });
        for (let k = 0; k < 100; k++) await until("there is room", () => traffic.vm.send(numbered(k, 60)));
        await until("all are given back", () => traffic.vm.unsent() === 0);
        expect(stage.lane("send").drops.noReceiver).toBe(100 * life);
        expect(stage.dropped).toBe(dropped + 100);
        await expectAsleep();
        ip("link", "set", "tap0", "up");
        await until("it is told", () => stage.news.length === 2 * life);
        expect(portState()).toMatchObject({ state: "up" });
        await traffic.carries(300);
      }
      expect(stage.news).toEqual(["down", "up", "down", "up"]);
    },
  );

  it("brought down while frames are on their way, at any time", async () => {
    await stage.start(["tap:tap0"]);
    const traffic = await startTraffic();
    const { index } = findInterface("tap0")!;
    for (let life = 0; life < 10; life++) {
      await traffic.carries(20 + 17 * life);
      changeInterface(index, { isUp: false }, "down");
      for (let turn = 0; turn < 5; turn++) traffic.turn();
      if (life % 2) await sleep(1);
      changeInterface(index, { isUp: true }, "up");
    }
    await traffic.carries(200);
    expect(portState()).toMatchObject({ state: "up" });
  });

  it("another MTU: larger frames are carried as soon as the relay knows", async () => {
    await stage.start(["tap:tap0"]);
    const vm = await stage.vm("a");
    const network = stage.open.use(new PacketSocket("tap0"));
    const small = new Traffic(vm, network);
    const { index } = findInterface("tap0")!;
    for (const mtu of [9000, 1500, 4000, 65_521, 1500]) {
      await small.carries(100);
      changeInterface(index, { mtu }, "another MTU");
      await small.carries(100);
      await small.settles();
      await until("it is told", () => portState().mtu === mtu);
      // Until the lanes know as well, a frame that is too large for them may be dropped.
      const frame = (k: number) => numbered(1_000_000 + k, mtu + 14);
      const arrives = (k: number) => (vm.supply(), vm.receive().some((got) => got.frame.equals(frame(k))));
      await until("a large frame has arrived", () => (network.send(frame(0)), arrives(0)));
      await expectAsleep();
      const dropped = stage.dropped;
      arrives(0);
      for (let k = 1; k < 40; k++) {
        network.send(frame(k));
        await until("it has arrived", () => arrives(k));
      }
      expect(stage.dropped).toBe(dropped);
    }
    expect(stage.news).toEqual(["mtu", "mtu", "mtu", "mtu", "mtu"]);
    expect(stage.dropped).toBe(stage.lane("receive").drops.tooSmall);
  });

  it.each(["io_uring", "aio", "rw"])(
    "%s: deleted: it is told, drops are counted, the other link goes on, close() works",
    async (io) => {
      await stage.start([`tap:tap0,io=${io}`, `tap:tap1,io=${io}`]);
      const traffic = await startTraffic("a", "tap0");
      const other = await startTraffic("b", "tap1");
      await traffic.carries(300);
      ip("link", "del", "tap0");
      await until("it is told", () => stage.news.includes("gone"));
      expect(portState(0)).toMatchObject({ state: "gone", mtu: null });
      const received = stage.lane("receive").packets;
      for (let k = 0; k < 400; k++) await until("there is room", () => traffic.vm.send(numbered(k, 60)));
      await until("all are given back", () => traffic.vm.unsent() === 0);
      expect(stage.lane("send").drops.noReceiver).toBeGreaterThanOrEqual(400);
      expect(stage.lane("receive")).toMatchObject({
        packets: received,
        drops: { noBuffer: 0, badFrame: 0, tooSmall: 0, malformed: 0 },
      });
      await other.carries(500);
      await expectAsleep();
      // its guest goes on as well, and comes anew
      await traffic.vm.frontend.getVringBase(RECEIVEQ);
      await traffic.vm.startRing(RECEIVEQ);
      traffic.vm.frontend[Symbol.dispose]();
      await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");
      const next = await stage.vm("a");
      next.send(numbered(0, 60));
      await until("it is given back", () => next.unsent() === 0);
      await other.carries(100);
      expect(stage.events.filter(({ type }) => type === "fault")).toEqual([]);
    },
  );

  it("deleted and made anew by somebody else: that is another one", async () => {
    await stage.start(["tap:tap0"]);
    const traffic = await startTraffic();
    await traffic.carries(50);
    ip("link", "del", "tap0");
    ip("tuntap", "add", "dev", "tap0", "mode", "tap");
    ip("link", "set", "tap0", "up");
    await until("it is told", () => stage.news.includes("gone"));
    await sleep(20);
    expect(stage.news.at(-1)).toBe("gone");
    expect(portState()).toMatchObject({ state: "gone" });
    ip("link", "del", "tap0");
  });

  it("moved to another network namespace: it works on there, and its state is unknown", async () => {
    await stage.start(["tap:tap0"]);
    const traffic = await startTraffic();
    await traffic.carries(100);
    const there = spawn("unshare", ["--net", "sleep", "1000"], { stdio: "ignore" });
    stage.open.defer(() => there.kill("SIGKILL"));
    const own = execFileSync("readlink", ["/proc/self/ns/net"], { encoding: "utf8" });
    const namespace = () => execFileSync("readlink", [`/proc/${there.pid}/ns/net`], { encoding: "utf8" });
    await until("the other namespace is there", () => namespace() !== own);
    const within = (...words: string[]) =>
      execFileSync("nsenter", ["-t", String(there.pid), "-n", ...words], { encoding: "utf8" });
    ip("link", "set", "tap0", "netns", String(there.pid));
    await until("it is told", () => stage.news.includes("moved"));
    expect(stage.news.at(-1)).toBe("moved");
    expect(portState()).toMatchObject({ state: "up", mtu: null });
    within("ip", "link", "set", "tap0", "up");
    const counted = () => JSON.parse(within("ip", "-j", "-s", "link", "show", "tap0"))[0].stats64.rx.packets as number;
    await until("all are given back", () => traffic.vm.unsent() === 0);
    const before = counted();
    for (let k = 0; k < 50; k++) traffic.vm.send(numbered(k, 60));
    await until("all have come", () => counted() === before + 50);
    within("ip", "addr", "add", "10.7.0.1/24", "dev", "tap0");
    within("ip", "neigh", "add", "10.7.0.2", "lladdr", "02:00:00:00:00:02", "dev", "tap0");
    const program = `const s = require("dgram").createSocket("udp4"); s.send("hello", 7, "10.7.0.2", () => s.close());`;
    within(process.execPath, "-e", program);
    await until("it has arrived", () => {
      traffic.vm.supply();
      return traffic.vm.receive().some(({ frame }) => frame.toString("latin1").endsWith("hello"));
    });
    // the guest's own changes are followed there
    await traffic.vm.frontend.setVringEnable(RECEIVEQ, false);
    await traffic.vm.frontend.setVringEnable(RECEIVEQ, true);
    within(process.execPath, "-e", program);
    await until("it has arrived", () => {
      traffic.vm.supply();
      return traffic.vm.receive().some(({ frame }) => frame.toString("latin1").endsWith("hello"));
    });
    await stage.relay!.close();
    expect(JSON.parse(within("ip", "-j", "link", "show")).map(({ ifname }: { ifname: string }) => ifname)).toEqual([
      "lo",
    ]);
  });

  it("what was asked for at the start is no news", async () => {
    ip("link", "add", "br0", "type", "bridge");
    ip("tuntap", "add", "dev", "mine", "mode", "tap", "multi_queue");
    await stage.start(["tap:tap0,mtu=9000,bridge=br0", "tap:mine,mtu=3000,bridge=br0"]);
    const traffic = await startTraffic();
    await traffic.carries(50);
    await sleep(50);
    expect(stage.news).toEqual([]);
    expect([portState(0), portState(1)]).toMatchObject([
      { state: "up", mtu: 9000 },
      { state: "up", mtu: 3000 },
    ]);
  });
});

describe("a guest that changes under traffic", () => {
  it("its memory table: nothing is lost, either way", async () => {
    await stage.start(["tap:tap0"]);
    const traffic = await startTraffic();
    const { frontend, guest } = traffic.vm;
    for (let change = 0; change < 30; change++) {
      await traffic.carries(23);
      await frontend.setMemTable(change % 2 ? guest.regions : guest.regions.slice(0, 1));
    }
    await traffic.carries(100);
    await traffic.settles();
    expect(stage.dropped).toBe(0);
  });

  it("its rings: nothing that it sends is lost or sent twice, nothing arrives twice or out of order", async () => {
    await stage.start(["tap:tap0"]);
    const traffic = await startTraffic();
    const { frontend } = traffic.vm;
    for (let change = 0; change < 30; change++) {
      await traffic.carries(31);
      const index = change % 3 === 0 ? RECEIVEQ : TRANSMITQ;
      const stopped = frontend.getVringBase(index);
      traffic.turn();
      await stopped;
      for (let turn = 0; turn < 3; turn++) traffic.turn();
      await traffic.vm.startRing(index);
    }
    await traffic.carries(100);
    await until(
      "all that was sent is out",
      () => (traffic.turn(undefined, false), traffic.out.arrived === traffic.out.sent),
    );
    expect(stage.dropped).toBe(0);
  });

  it("its front-end dies and comes back, again and again, while the network goes on", async () => {
    await stage.start(["tap:tap0"]);
    const network = stage.open.use(new PacketSocket("tap0"));
    for (let life = 0; life < 8; life++) {
      const vm = await stage.vm("a");
      while (network.receive());
      const traffic = new Traffic(vm, network);
      // what came before belongs to nobody
      vm.supply();
      await traffic.carries(50 + 37 * life);
      for (let turn = 0; turn < 3; turn++) traffic.turn();
      vm.frontend[Symbol.dispose]();
      for (let k = 0; k < 50; k++) network.send(numbered(1_000_000, 700));
      await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");
      for (let k = 0; k < 50; k++) network.send(numbered(1_000_000, 700));
    }
    const { drops } = stage.lane("receive");
    expect(drops).toMatchObject({ badFrame: 0, malformed: 0, tooSmall: 0 });
  });
});

describe("several links", () => {
  it.each([1, 2])("two of them on %i poller(s), all at once", async (pollers) => {
    await stage.start(["tap:tap0", "tap:tap1,io=aio"], { cpus: [0, 1].slice(0, pollers), queues: 2 });
    const all = [await startTraffic("a", "tap0"), await startTraffic("b", "tap1")];
    await Promise.all(all.map((traffic) => traffic.carries(1500)));
    await Promise.all(all.map((traffic) => traffic.settles()));
    expect(stage.dropped).toBe(0);
  });
});

describe("the end", () => {
  it("close() with traffic: interfaces, threads, sockets and files are gone", async () => {
    const threads = () => readdirSync("/proc/self/task").length;
    const files = () => readdirSync("/proc/self/fd").length;
    // what the first relay of a process leaves for those to come
    await using _first = await Relay.start({ links: [[stage.port("x"), "tap:tap0"]] });
    await _first.close();
    const before = { threads: threads(), files: files() };
    await stage.start(["tap:tap0", "tap:tap1,io=aio", "tap:tap2,io=rw"], { cpus: [0, 1] });
    const all = await Promise.all([0, 1, 2].map((i) => startTraffic("abc"[i], `tap${i}`)));
    await Promise.all(all.map((traffic) => traffic.carries(100)));
    for (const traffic of all) for (let turn = 0; turn < 3; turn++) traffic.turn();
    const closed = stage.relay!.close();
    for (const traffic of all) traffic.turn();
    await closed;
    expect(interfaces()).toEqual(["lo"]);
    expect(["a", "b", "c"].map((name) => existsSync(stage.path(name)))).toEqual([false, false, false]);
    stage.open.dispose();
    await until("threads and files are gone", () => threads() <= before.threads && files() <= before.files);
  });
});

describe("Relay.start refuses, and leaves nothing behind:", () => {
  const tun = (flags: number): number => {
    const fd = openSync("/dev/net/tun", "r+");
    stage.open.defer(() => closeSync(fd));
    const request = Buffer.alloc(IFREQ_SIZE);
    request.write("odd");
    request.writeUInt16LE(flags, IFREQ_FLAGS);
    expect(ioctl(fd, TUNSETIFF, request)).toBe(0);
    return fd;
  };
  const taken = (): string => {
    const { fds } = openTap("taken", 1);
    stage.open.defer(() => fds.forEach(close));
    return "tap:taken";
  };
  it.each<[string, () => string, typeof ConfigError | typeof SystemError, RegExp]>([
    [
      "a bridge that is not there",
      () => "tap:tap7,bridge=br7",
      ConfigError,
      /bridge=br7: there is no such interface; "ip link add br7/,
    ],
    ["an interface that another program has", taken, SystemError, /queue of taken; another program has it open.*EBUSY/],
    [
      "a queue without net header",
      () => `tap:fd=${tun(IFF_TAP | IFF_NO_PI)}`,
      ConfigError,
      /must be opened with IFF_TAP \| IFF_NO_PI \| IFF_VNET_HDR/,
    ],
    ["an MTU that it cannot have", () => "tap:tap7,mtu=65535", SystemError, /tap7.*mtu 65535.*EINVAL/],
  ])("%s", async (_, make, kind, message) => {
    const tap = make();
    await expectRefused(tap, kind, message);
  });

  it("no privileges", async () => {
    chmodSync(stage.directory, 0o777);
    const message = /of tap7; to create it takes CAP_NET_ADMIN.*EPERM/;
    process.seteuid?.(NOBODY);
    try {
      await expect(Relay.start({ links: [[stage.port("a"), "tap:tap7"]] })).rejects.toThrow(message);
      await expect(Relay.start({ links: [[stage.port("a"), "tap:new"]] })).rejects.toThrow(SystemError);
    } finally {
      process.seteuid?.(0);
    }
    expect(interfaces()).toEqual(["lo"]);
    expect(readdirSync(stage.directory)).toEqual([]);
  });

  it("a socket that cannot be made, when the interface is there already", async () => {
    const { fds } = openTap("given", 1);
    for (const tap of ["tap:tap7", `tap:fd=${fds[0]}`]) {
      const started = Relay.start({ links: [["vhost-user:/nowhere/at/all.sock", tap]] });
      await expect(started).rejects.toThrow(/\/nowhere\/at\/all.sock.*ENOENT/);
    }
    // The fd was the relay's from then on.
    expect(interfaces()).toEqual(["lo"]);
  });

  /** In the second of two links: the first one has begun. */
  async function expectRefused(tap: string, kind: typeof ConfigError | typeof SystemError, message: RegExp) {
    const links = [
      [stage.port("a"), "tap:tap6"],
      [stage.port("b"), tap],
    ] as const;
    const left = () => [readdirSync("/proc/self/fd").length, readdirSync("/proc/self/task").length];
    const before = { interfaces: interfaces(), left: left() };
    const error: unknown = await Relay.start({ links }).then(
      (relay) => relay.close(),
      (reason: unknown) => reason,
    );
    expect(error).toBeInstanceOf(kind);
    expect((error as Error).message).toMatch(message);
    expect((error as Error).message).not.toContain("\n");
    expect(interfaces()).toEqual(before.interfaces);
    expect(readdirSync(stage.directory)).toEqual([]);
    await until("threads and files are gone", () => left().every((count, i) => count <= before.left[i]!));
  }
});
