/**
 * A side that takes nothing for a while: frames wait where they are, the kernel's queue or the guest's ring, nobody else is
 * held up, and waiting costs nothing.
 */
import { execFileSync } from "node:child_process";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { libc } from "../../native/libc.ts";
import { findInterface } from "../../native/network-interface.ts";
import { openTap } from "../../native/tun.ts";
import { RECEIVEQ } from "../../src/layout/virtio.ts";
import { PacketSocket, isNumbered, numberOf, numbered } from "./tap-packets.ts";
import { Stage, enterNetwork, ip, until } from "./tap-stage.ts";
import type { Vm } from "./tap-vm.ts";

const TUNSETSNDBUF = 0x4004_54d4; // _IOW('T', 212, int)
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

const range = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i);

/** Numbers of the frames that a guest has got since; each is checked. */
function taken(vm: Vm, length: number): number[] {
  return vm
    .receive()
    .filter(({ frame }) => isNumbered(frame))
    .map(({ frame }) => {
      const k = numberOf(frame);
      expect(Buffer.compare(frame, numbered(k, length)), `frame ${k}`).toBe(0);
      return k;
    });
}

function drain(network: PacketSocket): number[] {
  const numbers: number[] = [];
  for (let got = network.receive(); got; got = network.receive())
    if (isNumbered(got.frame)) numbers.push(numberOf(got.frame));
  return numbers;
}

/** Waits until the pollers sleep; asserts that they stay so for a while. */
async function expectAsleep(): Promise<void> {
  const iterations = () => stage.state.pollers.map(({ busy, idle }) => busy + idle);
  let same = 0;
  for (let before = iterations(), round = 0; same < 10; round++) {
    expect(round, "rounds in which the pollers did not sleep").toBeLessThan(400);
    await sleep(5);
    const now = iterations();
    same = now.every((count, i) => count === before[i]) ? same + 1 : 0;
    before = now;
  }
  const before = stage.state.pollers;
  await sleep(100);
  for (const [i, { sleeps }] of stage.state.pollers.entries())
    expect(sleeps - before[i]!.sleeps, "times that a poller was woken for nothing").toBeLessThanOrEqual(2);
}

/** Frames go both ways at a link while something else is stuck. */
async function expectCarries(vm: Vm, network: PacketSocket, count: number): Promise<void> {
  const into: number[] = [];
  const out: number[] = [];
  let sent = 0;
  let next = 0;
  await until(`${count} frames went either way`, () => {
    vm.supply();
    for (; sent < count && sent - into.length < 100; sent++) network.send(numbered(sent, 900));
    while (next < count && next - out.length < 100 && vm.send(numbered(next, 900))) next++;
    into.push(...taken(vm, 900));
    out.push(...drain(network));
    return into.length >= count && out.length >= count;
  });
  expect([into, out]).toEqual([range(0, count), range(0, count)]);
}

describe("a guest without receive buffers", () => {
  it.each([
    ["split", false, "adaptive"],
    ["packed", true, "interrupt"],
  ] as const)(
    "%s: frames stay in the interface's queue, past the stall limit, and arrive later",
    async (_, packed, poll) => {
      await stage.start(["tap:tap0"], { stallMs: 30, poll });
      const vm = await stage.vm("a", { packed });
      const network = stage.open.use(new PacketSocket("tap0"));
      for (const k of range(0, 500)) network.send(numbered(k, 1000));
      await expectAsleep();
      expect(stage.lane("receive")).toMatchObject({
        packets: 0,
        waits: expect.toSatisfy((waits: number) => waits > 0),
      });
      const got: number[] = [];
      const take = () => got.push(...taken(vm, 1000));
      vm.supply(7);
      await until("7 have arrived", () => take() >= 7);
      await expectAsleep();
      expect(take()).toBe(7);
      // what it sends goes on meanwhile
      vm.send(numbered(0, 60));
      await until("it is out", () => drain(network).length > 0);
      await until("all have arrived", () => (vm.supply(), take() >= 500));
      expect(got).toEqual(range(0, 500));
      expect(stage.dropped).toBe(0);
    },
  );

  it("and a poller that never hears of new ones: they are found nevertheless", async () => {
    await stage.start(["tap:tap0"], { stallMs: 10 });
    const vm = await stage.vm("a");
    await vm.frontend.getVringBase(RECEIVEQ);
    await vm.startRing(RECEIVEQ, false);
    const network = stage.open.use(new PacketSocket("tap0"));
    for (const k of range(0, 20)) network.send(numbered(k, 1000));
    await sleep(50);
    const got: number[] = [];
    vm.supply(20);
    await until("all have arrived", () => got.push(...taken(vm, 1000)) >= 20);
    expect(got).toEqual(range(0, 20));
  });

  it("a frame that has come is kept until there are buffers for all of it, in its place, past the stall limit", async () => {
    await stage.start(["tap:tap0,mtu=9000"], { stallMs: 20 });
    const vm = await stage.vm("a");
    const network = stage.open.use(new PacketSocket("tap0"));
    const got: number[] = [];
    const take = () => {
      for (const { frame } of vm.receive()) {
        const k = numberOf(frame);
        expect(Buffer.compare(frame, numbered(k, k === 1 ? 9014 : 800)), `frame ${k}`).toBe(0);
        got.push(k);
      }
      return got.length;
    };
    vm.supply(3);
    for (const k of range(0, 4)) network.send(numbered(k, k === 1 ? 9014 : 800));
    await until("the first has arrived", () => take() >= 1);
    await expectAsleep();
    for (let i = 0; i < 2; i++) {
      vm.supply(1);
      await expectAsleep();
      expect(take()).toBe(1);
      // it is kept when the guest's memory changes as well
      await vm.frontend.setMemTable(vm.guest.regions);
    }
    vm.supply(1);
    await until("the large one has arrived", () => take() >= 2);
    await expectAsleep();
    expect(got).toEqual([0, 1]);
    await until("the rest has arrived", () => (vm.supply(1), take() >= 4));
    expect(got).toEqual([0, 1, 2, 3]);
    expect(stage.dropped).toBe(0);
  });

  it("a frame that is kept goes when the ring is stopped", async () => {
    await stage.start(["tap:tap0,mtu=9000"]);
    const vm = await stage.vm("a");
    const network = stage.open.use(new PacketSocket("tap0"));
    vm.supply(2);
    network.send(numbered(1, 9014));
    network.send(numbered(2, 800));
    await until("it waits", () => stage.lane("receive").waits > 0);
    await vm.frontend.getVringBase(RECEIVEQ);
    await vm.startRing(RECEIVEQ);
    vm.supply();
    network.send(numbered(3, 800));
    const got: number[] = [];
    await until("a frame has arrived", () => got.push(...taken(vm, 800)) > 0);
    expect(got).toEqual([3]);
  });

  it("does not hold up another one at the same poller, nor fill it", async () => {
    await stage.start(["tap:tap0", "tap:tap1"], { stallMs: 60_000 });
    const stuck = await stage.vm("a");
    const other = await stage.vm("b");
    const [first, second] = ["tap0", "tap1"].map((name) => stage.open.use(new PacketSocket(name))) as [
      PacketSocket,
      PacketSocket,
    ];
    stuck.supply(1);
    first.send(numbered(0, 1000));
    await until("it has arrived", () => taken(stuck, 1000).length > 0);
    const waits = () => Math.max(...stage.state.links[0]!.lanes.map((lane) => lane.waits));
    const before = waits();
    for (let part = 0; part < 4; part++) {
      // more than the interface's queue holds
      for (const k of range(0, 400)) first.send(numbered(k, 1000));
      await expectCarries(other, second, 300);
    }
    expect(stage.lane("receive").packets).toBe(1);
    expect(waits() - before).toBeLessThanOrEqual(1);
    expect(stage.dropped).toBe(0);
    const got: number[] = [];
    await until("the queue is empty", () => (stuck.supply(), got.push(...taken(stuck, 1000)), got.length >= 500));
    // in order, and from the front
    expect(got.slice(0, 400)).toEqual(range(0, 400));
  });

  it("bursts of all sizes are read whole", async () => {
    await stage.start(["tap:tap0"], { poll: "interrupt" });
    const vm = await stage.vm("a");
    const network = stage.open.use(new PacketSocket("tap0"));
    let sent = 0;
    for (const burst of [64, 10, 1, 200, 3, 64, 64, 1, 1, 30, 24, 90, 5, 64, 2, 128, 23]) {
      vm.supply();
      for (const last = sent + burst; sent < last; sent++) network.send(numbered(sent, 300));
      const got: number[] = [];
      await until("the burst has arrived", () => (vm.supply(), got.push(...taken(vm, 300)) >= burst));
      expect(got).toEqual(range(sent - burst, sent));
    }
    expect(stage.dropped).toBe(0);
  });

  it("at one pair does not hold up the others", async () => {
    await stage.start(["tap:tap0"], { queues: 2, stallMs: 60_000 });
    const vm = await stage.vm("a", { queuePairs: 2 });
    const network = stage.open.use(new PacketSocket("tap0"));
    // These go all to one queue: it is unknown which.
    for (const k of range(0, 300)) network.send(numbered(k, 200));
    await until("a lane waits", () => stage.state.links[0]!.lanes.some(({ waits }) => waits > 0));
    for (const k of range(0, 200)) {
      const pair = k % 2;
      await until("there is room", () => vm.send(numbered(k, 200), { pair }));
    }
    const out: number[] = [];
    await until("all are out", () => out.push(...drain(network)) >= 200);
    vm.supply(undefined, 0);
    vm.supply(undefined, 1);
    const got: number[] = [];
    await until("all have come", () => {
      for (const pair of [0, 1]) {
        got.push(...vm.receive(pair).map(({ frame }) => numberOf(frame)));
        vm.supply(undefined, pair);
      }
      return got.length >= 300;
    });
    expect(got).toEqual(range(0, 300));
    expect(stage.dropped).toBe(0);
  });
});

describe("a network that takes nothing: BI-312", () => {
  const KIB_128 = 128 << 10;

  /** A bridge whose other port sends at a crawl. What it holds counts as sent by the interface that it came from, until it is gone. */
  async function startPlugged(io: string): Promise<void> {
    ip("link", "add", "br0", "type", "bridge");
    ip("link", "set", "br0", "up");
    ip("link", "add", "near", "type", "veth", "peer", "name", "far");
    ip("link", "set", "near", "up", "master", "br0");
    ip("link", "set", "far", "up");
    const { fds } = openTap("given", 1);
    expect(ioctl(fds[0]!, TUNSETSNDBUF, new Int32Array([KIB_128]))).toBe(0);
    plug();
    await stage.start([`tap:fd=${fds[0]},bridge=br0,io=${io}`, "tap:tap1"]);
    const forwards = (port: string) => ip("-d", "link", "show", port).includes("state forwarding");
    await until("the bridge forwards", () => forwards("given") && forwards("near"));
  }

  function queueing(...words: string[]): void {
    execFileSync("tc", ["qdisc", "replace", "dev", "near", "root", "tbf", ...words]);
  }

  function plug(): void {
    queueing("rate", "32kbit", "burst", "2000", "limit", "100mb");
  }

  function unplug(): void {
    queueing("rate", "10gbit", "burst", "100mb", "limit", "100mb");
  }

  it.each(["io_uring", "aio", "rw"])(
    "%s: frames wait in the guest's ring, nothing is lost, others are not held up",
    async (io) => {
      await startPlugged(io);
      const stuck = await stage.vm("a");
      const other = await stage.vm("b");
      const far = stage.open.use(new PacketSocket("far"));
      const second = stage.open.use(new PacketSocket("tap1"));
      // Without a receive buffer at first: what waits for the guest is no reason to look whether there is room.
      for (let life = 0; life < 3; life++) {
        if (life > 0) stuck.supply();
        far.send(numbered(0, 60));
        plug();
        const [first, last] = [1000 * life, 1000 * life + 250];
        for (const k of range(first, last)) expect(stuck.send(numbered(k, 1500))).toBe(true);
        await expectAsleep();
        const waiting = stuck.unsent();
        expect(waiting).toBeGreaterThan(100);
        expect(waiting).toBeLessThan(250);
        await expectCarries(other, second, 100);
        expect(stuck.unsent()).toBeGreaterThan(100);
        const got = drain(far);
        unplug();
        await until("all have arrived", () => (got.push(...drain(far)), got.length >= 250));
        expect(got).toEqual(range(first, last));
        await until("all are given back", () => stuck.unsent() === 0);
      }
      expect(stage.dropped).toBe(0);
    },
  );

  it("that is deleted meanwhile: what waits is dropped", async () => {
    await startPlugged("io_uring");
    const vm = await stage.vm("a");
    for (const k of range(0, 250)) expect(vm.send(numbered(k, 1500))).toBe(true);
    await expectAsleep();
    const waiting = vm.unsent();
    expect(waiting).toBeGreaterThan(100);
    ip("link", "del", "given");
    await until("all are given back", () => vm.unsent() === 0);
    expect(stage.lane("send").drops.noReceiver).toBeLessThanOrEqual(waiting);
    expect(stage.lane("send").drops.noReceiver).toBeGreaterThan(waiting - 10);
  });

  it("that is brought down meanwhile: what waits goes on, or is dropped, when it is up again at the latest", async () => {
    await startPlugged("aio");
    const vm = await stage.vm("a");
    for (const k of range(0, 250)) expect(vm.send(numbered(k, 1500))).toBe(true);
    await expectAsleep();
    ip("link", "set", "given", "down");
    await until("it is told", () => stage.news.includes("down"));
    await expectAsleep();
    unplug();
    await expectAsleep();
    ip("link", "set", "given", "up");
    await until("all are given back", () => vm.unsent() === 0);
    const far = stage.open.use(new PacketSocket("far"));
    const goesOn = (): boolean => (vm.send(numbered(1000, 60)), drain(far).includes(1000));
    await until("frames go on", goesOn);
  });

  it("and the relay that ends meanwhile", async () => {
    await startPlugged("io_uring");
    const vm = await stage.vm("a");
    for (const k of range(0, 250)) expect(vm.send(numbered(k, 1500))).toBe(true);
    await expectAsleep();
    await stage.relay!.close();
    unplug();
    await until("the interface is gone", () => findInterface("given") === undefined);
  });
});
