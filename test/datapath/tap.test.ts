/** A link with a TAP interface: frames go both ways whole, in order and once; idle, it costs nothing. */
import { beforeEach, afterEach, describe, expect, it } from "vitest";
import { setTimeout as sleep } from "node:timers/promises";
import type { NetDriver } from "../../src/driver/net.ts";
import type { RequestMethod } from "../../native/request-queue.ts";
import {
  VHOST_USER_PROTOCOL_F_RARP,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_SEND_RARP,
} from "../../src/layout/vhost-user.ts";
import { RECEIVEQ, VIRTIO_NET_F_MQ } from "../../src/layout/virtio.ts";
import { rarpFrame } from "../../src/ports/rarp.ts";
import {
  FRAME_BYTES_MIN,
  GUEST_MAC,
  HOST_MAC,
  PacketSocket,
  TRANSPORT,
  numberOf,
  numbered,
  reversed,
  udpFrame,
  type Flow,
} from "./tap-packets.ts";
import { Stage, enterNetwork, ip, until } from "./tap-stage.ts";
import type { Vm } from "./tap-vm.ts";

const skipped = enterNetwork();
let stage: Stage;

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
  stage = new Stage();
});

afterEach(async () => {
  if (skipped === undefined) await stage.close();
});

/** Frames under way at a time: fewer than the interface and a ring of 64 hold. */
const WINDOW = 40;
const MTU_MAX = 65_521;
/** Of a frame that an interface with the largest MTU there is can have. */
const LARGEST = 65_535;

const IPV4 = 0x0800;
const bit = (number: number): bigint => 1n << BigInt(number);

/** Sizes around every limit that there is on the way, and others. */
function sizes(count: number, largest: number): number[] {
  const edges = [14, 15, 16, 17, 59, 60, 61, 244, 245, 246, 1500, 1514, 2035, 2036, 2037, 4084, 4085, 9014, largest];
  return Array.from(
    { length: count },
    (_, i) => edges[i] ?? FRAME_BYTES_MIN + ((i * 2003) % (i % 7 ? 1500 : largest - 14)),
  ).map((size) => Math.min(size, largest));
}

/** Sends numbered frames one way and checks that they come out at the other side. */
async function carry(
  lengths: readonly number[],
  send: (frame: Buffer) => boolean,
  receive: (take: (frame: Uint8Array) => void) => void,
): Promise<void> {
  let sent = 0;
  let received = 0;
  const take = (frame: Uint8Array): void => {
    const expected = numbered(received, lengths[received] ?? 14);
    expect(frame.length, `bytes of frame ${received}`).toBe(expected.length);
    expect(Buffer.compare(frame, expected), `frame ${received}`).toBe(0);
    received++;
  };
  for (let idle = 0; received < lengths.length;) {
    const before = sent + received;
    while (sent < lengths.length && sent - received < WINDOW && send(numbered(sent, lengths[sent]!))) sent++;
    receive(take);
    idle = sent + received === before ? idle + 1 : 0;
    expect(idle, `${received} of ${sent} frames arrived`).toBeLessThan(20_000);
    if (idle > 0) await sleep(1);
  }
}

/** From the guest to the network. */
function out(driver: NetDriver, network: PacketSocket, lengths: readonly number[], pair = 0): Promise<void> {
  const { [pair]: queues } = driver.pairs;
  return carry(
    lengths,
    (frame) => {
      queues!.flush();
      const isSent = queues!.transmit(frame);
      queues!.flush();
      return isSent;
    },
    (take) => {
      for (let got = network.receive(); got; got = network.receive()) take(got.frame);
    },
  );
}

/** From the network to the guest. */
function into(network: PacketSocket, driver: NetDriver, lengths: readonly number[]): Promise<void> {
  return carry(
    lengths,
    (frame) => network.send(frame),
    (take) => driver.pairs[0]!.receive(64, take),
  );
}

describe("frames of 14 to 65550 bytes, both ways", () => {
  const rings = [
    { packed: false, mergeable: true },
    { packed: false, mergeable: false },
    { packed: true, mergeable: true },
    { packed: true, mergeable: false },
  ];
  for (const io of ["io_uring", "aio", "rw"] satisfies RequestMethod[]) {
    it.each(io === "io_uring" ? rings : rings.slice(1, 3))(`${io}, %j`, async (ring) => {
      await stage.start([`tap:tap0,mtu=${MTU_MAX},io=${io}`]);
      expect(stage.events).toContainEqual(expect.objectContaining({ type: "method", method: io, refused: [] }));
      const driver = await stage.driver("a", { ...ring, frameBytesMax: 65_550, ringSize: 128 });
      const network = stage.open.use(new PacketSocket("tap0"));
      await out(driver, network, sizes(120, 65_550));
      await into(network, driver, sizes(120, LARGEST));
      await out(driver, network, sizes(60, 1514));
      await into(network, driver, sizes(60, 1514));
      expect(stage.lane("send")).toMatchObject({ packets: 180, running: true });
      expect(stage.lane("receive")).toMatchObject({ packets: 180, running: true });
      expect(stage.dropped).toBe(0);
    });
  }

  it("with net headers of 10 bytes", async () => {
    await stage.start([`tap:tap0,mtu=9000`]);
    const vm = await stage.vm("a", { version1: false, mergeable: false, bufferBytes: 9100 });
    const network = stage.open.use(new PacketSocket("tap0"));
    expect(vm.headerBytes).toBe(10);
    await carry(
      sizes(120, 9014),
      (frame) => vm.send(frame),
      (take) => {
        for (let got = network.receive(); got; got = network.receive()) take(got.frame);
      },
    );
    await carry(
      sizes(120, 9014),
      (frame) => network.send(frame),
      (take) => {
        vm.supply();
        vm.receive().forEach(({ header, frame }) => {
          expect(header.every((byte) => byte === 0)).toBe(true);
          take(frame);
        });
      },
    );
    expect(stage.dropped).toBe(0);
  });

  it.each(["adaptive", "busy", "interrupt"] as const)("at the same time, with a poller that is %s", async (poll) => {
    await stage.start(["tap:tap0"], { poll });
    const driver = await stage.driver("a");
    const network = stage.open.use(new PacketSocket("tap0"));
    await Promise.all([out(driver, network, sizes(2000, 1514)), into(network, driver, sizes(2000, 1514))]);
    expect(stage.dropped).toBe(0);
  });
});

/** How many queues of an interface are attached, and how many are not. */
function queuesOf(name: string): [attached: number, detached: number] {
  const [found] = JSON.parse(ip("-j", "-d", "link", "show", name));
  const { numqueues, numdisabled } = found.linkinfo.info_data;
  return [numqueues, numdisabled];
}

/** Datagrams of many flows that wait for the guest at each pair: from which port they came. */
function datagrams(vm: Vm, pairs: number): number[][] {
  return Array.from({ length: pairs }, (_, pair) => {
    vm.supply(undefined, pair);
    return vm
      .receive(pair)
      .filter(({ frame }) => frame.readUInt16BE(12) === IPV4)
      .map(({ frame }) => frame.readUInt16BE(TRANSPORT));
  });
}

const flow = (port: number): Flow => ({
  macs: { from: HOST_MAC, to: GUEST_MAC },
  ips: { from: "10.7.0.1", to: "10.7.0.2" },
  ports: { from: port, to: 7 },
});

describe("queue pairs", () => {
  const FLOWS = 60;
  const all = (pairs: number): number[] => Array.from({ length: pairs }, (_, pair) => pair);

  /** Sends a datagram of each of many flows to the guest. @returns the pairs that any of them arrived at */
  async function deal(network: PacketSocket, vm: Vm, pairs: number): Promise<Set<number>> {
    const ports = all(FLOWS).map((i) => 1000 + i);
    for (const port of ports) network.send(udpFrame(flow(port), Buffer.from("hello"), "full"));
    const found = all(pairs).map((): number[] => []);
    const take = () => datagrams(vm, pairs).forEach((some, pair) => found[pair]!.push(...some));
    await until("all datagrams have arrived", () => (take(), found.flat().length >= FLOWS));
    expect(found.flat().toSorted((a, b) => a - b)).toEqual(ports);
    return new Set(all(pairs).filter((pair) => found[pair]!.length > 0));
  }

  it.each([
    [2, false],
    [4, true],
  ])(
    "%i of them, packed %s: each has its queue; what a flow's sender gets comes on the pair that it sends on",
    async (pairs, packed) => {
      await stage.start(["tap:tap0"], { queues: pairs });
      expect(queuesOf("tap0")).toEqual([0, pairs]);
      const vm = await stage.vm("a", { queuePairs: pairs, packed, features: [VIRTIO_NET_F_MQ] });
      expect(queuesOf("tap0")).toEqual([pairs, 0]);
      const network = stage.open.use(new PacketSocket("tap0"));
      expect(await deal(network, vm, pairs)).toEqual(new Set(all(pairs)));
      for (const pair of all(pairs)) {
        vm.send(udpFrame(reversed(flow(5000 + pair)), Buffer.from("question"), "full"), { pair });
        await until("it is out", () => network.receive() !== undefined);
        network.send(udpFrame(flow(5000 + pair), Buffer.from("answer"), "full"));
        let found: number[][] = [];
        await until("the answer is there", () => ((found = datagrams(vm, pairs)), found.flat().length > 0));
        expect(found).toEqual(all(pairs).map((other) => (other === pair ? [5000 + pair] : [])));
      }
      expect(stage.dropped).toBe(0);
    },
  );

  it("a queue is in use while its receiveq is: others get its flows meanwhile, its transmitq sends on", async () => {
    await stage.start(["tap:tap0"], { queues: 4 });
    const vm = await stage.vm("a", { queuePairs: 4 });
    const network = stage.open.use(new PacketSocket("tap0"));
    const { frontend } = vm;
    expect(await deal(network, vm, 4)).toEqual(new Set([0, 1, 2, 3]));
    await frontend.setVringEnable(2 * 1, false);
    expect(queuesOf("tap0")).toEqual([3, 1]);
    expect(await deal(network, vm, 4)).toEqual(new Set([0, 2, 3]));
    await frontend.getVringBase(2 * 3);
    expect(queuesOf("tap0")).toEqual([2, 2]);
    expect(await deal(network, vm, 4)).toEqual(new Set([0, 2]));
    for (const pair of all(4)) {
      vm.send(numbered(pair, 60), { pair });
      let got: ReturnType<PacketSocket["receive"]>;
      await until("it is out", () => (got = network.receive()) !== undefined);
      expect(got!.frame).toEqual(numbered(pair, 60));
    }
    await frontend.setVringEnable(2 * 1, true);
    await vm.startRing(2 * 3);
    expect(queuesOf("tap0")).toEqual([4, 0]);
    expect(await deal(network, vm, 4)).toEqual(new Set([0, 1, 2, 3]));
    for (const pair of all(4)) await frontend.setVringEnable(2 * pair, false);
    expect(queuesOf("tap0")).toEqual([0, 4]);
    expect(network.send(numbered(0, 60))).toBe(true);
    for (const pair of all(4)) await frontend.setVringEnable(2 * pair, true);
    expect(await deal(network, vm, 4)).toEqual(new Set([0, 1, 2, 3]));
    expect(stage.dropped).toBe(0);
  });

  it.each([
    ["with multi_queue", "tap:new", "tap0"],
    ["without", "tap:single", "single"],
  ])(
    "a receiveq that was stopped gets nothing that came meanwhile, or waited: an interface %s",
    async (_, tap, name) => {
      if (name === "single") ip("tuntap", "add", "dev", name, "mode", "tap");
      await stage.start([tap]);
      const vm = await stage.vm("a");
      const network = stage.open.use(new PacketSocket(name));
      const arrived = () => (vm.supply(), vm.receive().map(({ frame }) => numberOf(frame)));
      for (let k = 0; k < 10; k++) network.send(numbered(k, 60));
      await vm.frontend.getVringBase(RECEIVEQ);
      for (let k = 10; k < 20; k++) network.send(numbered(k, 60));
      await vm.startRing(RECEIVEQ);
      network.send(numbered(20, 60));
      let first: number[] = [];
      await until("a frame has arrived", () => (first = arrived()).length > 0);
      expect(first).toEqual([20]);
      // the same for a guest that comes anew
      vm.frontend[Symbol.dispose]();
      await until("it has left", () => stage.state.links[0]!.ports[0].state === "listening");
      for (let k = 30; k < 40; k++) network.send(numbered(k, 60));
      const next = await stage.vm("a");
      network.send(numbered(40, 60));
      next.supply();
      let found: number[] = [];
      await until("a frame has arrived", () => (found = next.receive().map(({ frame }) => numberOf(frame))).length > 0);
      expect(found).toEqual([40]);
    },
  );

  it("more pairs than queues: they share them to send, and those that have one receive", async () => {
    await stage.start(["tap:tap0,queues=2"], { queues: 4, cpus: [0, 1] });
    const vm = await stage.vm("a", { queuePairs: 4 });
    const network = stage.open.use(new PacketSocket("tap0"));
    expect(queuesOf("tap0")).toEqual([2, 0]);
    expect(await deal(network, vm, 4)).toEqual(new Set([0, 1]));
    for (let k = 0; k < 400; k++) {
      await until("there is room", () => vm.send(numbered(k, 60), { pair: k % 4 }));
    }
    const got: number[] = [];
    const take = () => {
      for (let frame = network.receive(); frame; frame = network.receive()) got.push(numberOf(frame.frame));
      return got.length;
    };
    await until("all are out", () => take() >= 400);
    for (const pair of all(4)) {
      const own = got.filter((k) => k % 4 === pair);
      expect(own).toEqual(all(100).map((i) => 4 * i + pair));
    }
  });

  it("fewer pairs than queues: those without a pair are not in use", async () => {
    await stage.start(["tap:tap0,queues=4"], { queues: 2 });
    const vm = await stage.vm("a", { queuePairs: 2 });
    const network = stage.open.use(new PacketSocket("tap0"));
    expect(queuesOf("tap0")).toEqual([2, 2]);
    expect(await deal(network, vm, 2)).toEqual(new Set([0, 1]));
  });
});

describe("idle", () => {
  it.each(["adaptive", "interrupt"] as const)("%s: asleep; a frame wakes the poller once", async (poll) => {
    await stage.start(["tap:tap0"], { poll, queues: 2 });
    const vm = await stage.vm("a", { queuePairs: 2 });
    const network = stage.open.use(new PacketSocket("tap0"));
    vm.supply(undefined, 0);
    vm.supply(undefined, 1);
    const iterations = () => stage.state.pollers[0]!;
    const asleep = async () => {
      let before = iterations();
      for (let same = 0; same < 10;) {
        await sleep(5);
        const now = iterations();
        same = now.busy === before.busy && now.idle === before.idle ? same + 1 : 0;
        before = now;
      }
      return before;
    };
    for (let k = 0; k < 3; k++) {
      const before = await asleep();
      await sleep(100);
      expect(iterations()).toEqual(before);
      network.send(numbered(k, 60));
      await until("it has arrived", () => vm.receive(0).length + vm.receive(1).length > 0);
      const after = await asleep();
      expect(after.sleeps - before.sleeps).toBeGreaterThan(0);
      expect(after.sleeps - before.sleeps).toBeLessThanOrEqual(3);
      expect(after.busy - before.busy).toBeLessThanOrEqual(4);
      if (poll === "interrupt") expect(after.idle - before.idle).toBeLessThanOrEqual(6);
    }
  });

  it("nobody there: a busy network does not wake the poller", async () => {
    await stage.start(["tap:tap0"]);
    const network = stage.open.use(new PacketSocket("tap0"));
    const before = stage.state.pollers[0]!;
    for (let k = 0; k < 2000; k++) network.send(numbered(k, 60));
    await sleep(100);
    expect(stage.state.pollers[0]!.sleeps - before.sleeps).toBeLessThanOrEqual(1);
    expect(stage.state.links[0]!.lanes).toEqual([]);
  });
});

it("SEND_RARP: the network hears where the guest is now", async () => {
  await stage.start(["tap:tap0"]);
  const vm = await stage.vm("a");
  const network = stage.open.use(new PacketSocket("tap0"));
  await vm.frontend.setProtocolFeatures(bit(VHOST_USER_PROTOCOL_F_RARP) | bit(VHOST_USER_PROTOCOL_F_REPLY_ACK));
  const mac = Buffer.from("525400123456", "hex");
  await vm.frontend.command(VHOST_USER_SEND_RARP, Buffer.concat([mac, Buffer.alloc(2)]));
  let got: ReturnType<PacketSocket["receive"]>;
  await until("it is out", () => (got = network.receive()) !== undefined);
  expect(got!.frame.toString("hex")).toBe(Buffer.from(rarpFrame(mac)).toString("hex"));
  expect(got!.frame.toString("hex")).toMatch(/^ffffffffffff5254001234568035/);
});
