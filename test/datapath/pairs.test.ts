/**
 * Two guests that use different numbers of queue pairs: the receiveqs that receive share what all transmitqs send.
 * Nothing is lost but what is counted as dropped, nothing arrives twice, the order of each source pair is kept.
 */
import { mkdtempSync, readSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { addSeals } from "../../native/memfd.ts";
import { Relay, type RelayEvent, type RelayOptions } from "../../src/index.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import {
  INFLIGHT_ALIGN,
  INFLIGHT_SPLIT_ENTRIES,
  INFLIGHT_SPLIT_ENTRY_SIZE,
  INFLIGHT_SPLIT_USED_IDX,
  VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
} from "../../src/layout/vhost-user.ts";
import { frame } from "./traffic.ts";

/** Frame numbers of a pair start here times its number. */
const PAIR = 1_000_000;
const REPLY_ACK = 1n << BigInt(VHOST_USER_PROTOCOL_F_REPLY_ACK);
const INFLIGHT = 1n << BigInt(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD);

let directory: string;
let open: DisposableStack;
let relay: Relay;
let events: RelayEvent[];

const path = (name: string): string => join(directory, `${name}.sock`);
const receiveq = (pair: number): number => 2 * pair;
const transmitq = (pair: number): number => 2 * pair + 1;

async function start(pairs: { a: number; b: number }, options: Partial<RelayOptions> = {}): Promise<void> {
  const port = (name: "a" | "b") => `vhost-user:${path(name)},queues=${pairs[name]}`;
  events = [];
  const onEvent = (event: RelayEvent) => events.push(event);
  relay = await Relay.start({ links: [[port("a"), port("b")]], cpus: [0, 1], onEvent, ...options });
}

const guests = new Map<NetDriver, Guest>();

async function connect(name: string, queuePairs: number): Promise<NetDriver> {
  const guest = open.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]));
  const driver = open.use(await NetDriver.connect({ path: path(name), guest, queuePairs, ringSize: 128 }));
  guests.set(driver, guest);
  return driver;
}

/** Starts a receiveq again after GET_VRING_BASE, polled from now on. */
async function restart(driver: NetDriver, index: number): Promise<void> {
  const queue = driver.pairs[index >> 1]!.receiveq;
  const userAddress = (gpa: bigint) => guests.get(driver)!.userAddress(gpa);
  const areas = {
    desc: userAddress(queue.descGpa),
    avail: userAddress(queue.availGpa),
    used: userAddress(queue.usedGpa),
  };
  await driver.frontend.setVringAddr(index, areas);
  await driver.frontend.setVringBase(index, queue.lastUsed);
  await driver.frontend.setVringKick(index);
}

/** What the lanes from this port count. */
function drops(from: string): { noReceiver: number; disabled: number; all: number } {
  const lanes = relay.state.links[0]!.lanes.filter((lane) => lane.from.startsWith(`vhost-user:${path(from)},`));
  const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);
  return {
    noReceiver: sum(lanes.map((lane) => lane.drops.noReceiver)),
    disabled: sum(lanes.map((lane) => lane.drops.disabled)),
    all: sum(lanes.flatMap((lane) => Object.values(lane.drops))),
  };
}

/** Frames of all pairs of one driver to whatever pairs of another. */
class Traffic {
  readonly #from: NetDriver;
  readonly #to: NetDriver;
  readonly sent: number[];
  /** By source pair: the least number that its next frame can have. */
  readonly #next: number[];
  received = 0;
  /** By receiving pair: which source pairs its frames came from. */
  readonly sources: Set<number>[];

  constructor(from: NetDriver, to: NetDriver) {
    this.#from = from;
    this.#to = to;
    this.sent = from.pairs.map(() => 0);
    this.#next = from.pairs.map(() => 0);
    this.sources = to.pairs.map(() => new Set<number>());
  }

  send(count: number, pairs = [...this.sent.keys()]): void {
    for (const pair of pairs) {
      this.#from.pairs[pair]!.flush();
      for (let i = 0; i < count && this.#from.pairs[pair]!.transmit(frame(pair * PAIR + this.sent[pair]!)); i++)
        this.sent[pair]!++;
      this.#from.pairs[pair]!.flush();
    }
  }

  /** Empties the receiveqs. @param order one whose lanes moved on to another comes before that */
  receive(order = [...this.#to.pairs.keys()]): void {
    for (const ring of order) while (this.#to.pairs[ring]!.receive(64, (bytes) => this.#check(ring, bytes)) > 0);
  }

  /** Until all frames sent have arrived or were counted as dropped. */
  async settle(dropped = (): number => 0): Promise<void> {
    let idle = 0;
    for (let before = -1; this.received + dropped() !== this.outOf; before = this.received) {
      idle = before === this.received ? idle + 1 : 0;
      expect(idle, `${this.received} of ${this.outOf} frames arrived, ${dropped()} dropped`).toBeLessThan(2000);
      this.#from.pairs.forEach((pair) => pair.flush());
      this.receive();
      if (idle > 0) await sleep(1);
    }
  }

  get outOf(): number {
    return this.sent.reduce((a, b) => a + b, 0);
  }

  #check(ring: number, bytes: Uint8Array): void {
    const number = new DataView(bytes.buffer, bytes.byteOffset).getUint32(14);
    const [pair, sequence] = [Math.floor(number / PAIR), number % PAIR];
    expect(Buffer.compare(bytes, frame(number)), `frame ${sequence} of pair ${pair}`).toBe(0);
    expect(sequence, `frames of pair ${pair} at ${ring}: out of order or twice`).toBeGreaterThanOrEqual(
      this.#next[pair]!,
    );
    this.#next[pair] = sequence + 1;
    this.sources[ring]!.add(pair);
    this.received++;
  }
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  open = new DisposableStack();
});

afterEach(async () => {
  open.dispose();
  await relay.close();
  rmSync(directory, { recursive: true });
  expect(events.filter(({ type }) => type === "fatal" || type === "trapped")).toEqual([]);
});

it("four pairs to one, and one to four: nothing is lost, each transmitq keeps its order", async () => {
  await start({ a: 4, b: 1 });
  const a = await connect("a", 4);
  const b = await connect("b", 1);
  const [there, back] = [new Traffic(a, b), new Traffic(b, a)];
  for (let turn = 0; turn < 40; turn++) {
    there.send(20);
    back.send(20);
    there.receive();
    back.receive();
    if (turn % 8 === 0) await sleep(1);
  }
  await there.settle();
  await back.settle();
  expect(there.sources).toEqual([new Set([0, 1, 2, 3])]);
  expect(back.sources).toEqual([new Set([0]), new Set(), new Set(), new Set()]);
  expect([drops("a").all, drops("b").all]).toEqual([0, 0]);
});

it("pairs that a guest enables and disables while frames flow: those that receive share all frames", async () => {
  await start({ a: 4, b: 4 });
  const a = await connect("a", 4);
  const b = await connect("b", 4);
  const traffic = new Traffic(a, b);
  let count = 4;
  for (const next of [1, 4, 2, 1, 2, 4, 1]) {
    traffic.send(60);
    let changed = false;
    const change = (async () => {
      // As QEMU: all rings of a pair, from the first to the last.
      for (let index = 0; index < 8; index++) await b.frontend.setVringEnable(index, index >> 1 < next);
      changed = true;
    })();
    while (!changed) {
      traffic.send(5);
      await sleep(0);
    }
    await change;
    // Frames of before the change lie in receiveqs that were left by it; those come first.
    const [less, more] = [Math.min(count, next), Math.max(count, next)];
    const [both, others] = [
      [0, 1, 2, 3].filter((pair) => pair < less),
      [0, 1, 2, 3].filter((pair) => pair >= less && pair < more),
    ];
    const order = next < count ? [...others, ...both] : [...both, ...others];
    for (let turn = 0; turn < 20; turn++) {
      traffic.receive(order);
      await sleep(1);
    }
    await traffic.settle();
    traffic.sources.forEach((sources) => sources.clear());
    traffic.send(30);
    await traffic.settle();
    expect(traffic.sources).toEqual(
      [0, 1, 2, 3].map((pair) => new Set(pair < next ? [0, 1, 2, 3].filter((from) => from % next === pair) : [])),
    );
    count = next;
  }
  expect(drops("a").all).toBe(0);
});

it("no receiveq enabled: frames are dropped and counted, then they arrive again", async () => {
  await start({ a: 2, b: 2 });
  const a = await connect("a", 2);
  const b = await connect("b", 2);
  const traffic = new Traffic(a, b);
  const dropped = () => drops("a").noReceiver;
  for (const enabled of [true, false, true, false, true]) {
    for (let index = 0; index < 4; index++) await b.frontend.setVringEnable(index, enabled);
    traffic.send(100);
    await traffic.settle(dropped);
  }
  expect(dropped()).toBe(400);
});

it("a disabled transmitq is emptied into the void, the others are not disturbed", async () => {
  await start({ a: 2, b: 2 });
  const a = await connect("a", 2);
  const b = await connect("b", 2);
  const traffic = new Traffic(a, b);
  await a.frontend.setVringEnable(transmitq(1), false);
  for (let turn = 0; turn < 10; turn++) {
    traffic.send(50);
    await traffic.settle(() => drops("a").disabled);
  }
  expect(drops("a").disabled).toBe(500);
  expect(traffic.sources).toEqual([new Set([0]), new Set()]);
  await a.frontend.setVringEnable(transmitq(1), true);
  traffic.send(50);
  await traffic.settle(() => drops("a").disabled);
  expect(traffic.sources).toEqual([new Set([0]), new Set([1])]);
});

it("the leader's transmitq is stopped: its followers go on, and the receiveq stops and starts where it was", async () => {
  await start({ a: 4, b: 1 });
  const a = await connect("a", 4);
  const b = await connect("b", 1);
  const traffic = new Traffic(a, b);
  traffic.send(100);
  await traffic.settle();
  expect(await a.frontend.getVringBase(transmitq(0))).toBe(100);
  traffic.send(100, [1, 2, 3]);
  await traffic.settle();
  const ring = b.pairs[0]!.receiveq;
  expect(await b.frontend.getVringBase(receiveq(0))).toBe(ring.lastUsed);
  const dropped = () => drops("a").noReceiver;
  traffic.send(50, [1, 2, 3]);
  await traffic.settle(dropped);
  expect(dropped()).toBe(150);
  await restart(b, receiveq(0));
  traffic.send(100, [1, 2, 3]);
  await traffic.settle(dropped);
  expect(dropped()).toBe(150);
});

it("a receiveq that is disabled keeps its place while its lane feeds another", async () => {
  await start({ a: 2, b: 2 });
  const a = await connect("a", 2);
  const b = await connect("b", 2);
  const traffic = new Traffic(a, b);
  traffic.send(70);
  await traffic.settle();
  const place = b.pairs[1]!.receiveq.lastUsed;
  expect(place).toBeGreaterThan(0);
  await b.frontend.setVringEnable(receiveq(1), false);
  traffic.send(100);
  await traffic.settle();
  expect(traffic.sources[0]).toEqual(new Set([0, 1]));
  expect(await b.frontend.getVringBase(receiveq(1))).toBe(place);
  await restart(b, receiveq(1));
  await b.frontend.setVringEnable(receiveq(1), true);
  traffic.send(100);
  await traffic.settle();
  expect(drops("a").all).toBe(0);
});

it("a follower that finds the receiveq's format broken reports that one", async () => {
  await start({ a: 2, b: 1 });
  const a = await connect("a", 2);
  const b = await connect("b", 1);
  const guest = guests.get(b)!;
  const { availGpa, size } = b.pairs[0]!.receiveq;
  const avail = Buffer.from(guest.read(availGpa + 2n, 2)).readUInt16LE();
  guest.write(availGpa + 2n, Buffer.from(Uint16Array.of((avail + size + 1) & 0xffff).buffer));
  const traffic = new Traffic(a, b);
  traffic.send(10, [1]);
  await traffic.settle(() => drops("a").noReceiver);
  await expect
    .poll(() => events.find(({ type }) => type === "broken"))
    .toMatchObject({
      port: `vhost-user:${path("b")},queues=1`,
      virtqueue: receiveq(0),
    });
  traffic.send(10);
  await traffic.settle(() => drops("a").noReceiver);
  expect(events.filter(({ type }) => type === "broken")).toHaveLength(1);
});

it("buffers that trickle into a shared receiveq: no frame is dropped, and every transmitq gets its share", async () => {
  await start({ a: 3, b: 1 }, { stallMs: 400, poll: "interrupt" });
  const a = await connect("a", 3);
  const b = await connect("b", 1);
  const traffic = new Traffic(a, b);
  let received = 0;
  const from = new Set<number>();
  for (const end = performance.now() + 1500; performance.now() < end; await sleep(1)) {
    traffic.send(128);
    b.pairs[0]!.receive(2, (bytes) => {
      received++;
      from.add(Math.floor(new DataView(bytes.buffer, bytes.byteOffset).getUint32(14) / PAIR));
    });
  }
  expect(received).toBeGreaterThan(200);
  expect(drops("a").all).toBe(0);
  expect(from).toEqual(new Set([0, 1, 2]));
});

it("a shared receiveq without buffers costs frames after the stall limit, until it has some", async () => {
  await start({ a: 3, b: 1 }, { stallMs: 20 });
  const a = await connect("a", 3);
  const b = await connect("b", 1);
  const traffic = new Traffic(a, b);
  const dropped = () => drops("a").all;
  await expect.poll(() => (traffic.send(128), dropped()), { interval: 1 }).toBeGreaterThan(1000);
  await traffic.settle(dropped);
  // While this thread does not run, frames may be dropped again.
  for (let turn = 0; turn < 5; turn++) {
    const before = traffic.received;
    traffic.send(30);
    await traffic.settle(dropped);
    expect(traffic.received).toBeGreaterThan(before);
  }
});

it("followers keep the inflight header of the receiveq that they share, and their own one's as it was", async () => {
  await start({ a: 2, b: 2 });
  const a = await connect("a", 2);
  const b = await connect("b", 2);
  await b.frontend.setProtocolFeatures(REPLY_ACK | INFLIGHT);
  const region = (await b.frontend.getInflightFd(4, 128))!;
  open.defer(() => close(region.fd));
  for (const index of [0, 1, 2, 3]) await b.frontend.getVringBase(index);
  await b.frontend.setInflightFd(region);
  for (const pair of [0, 1]) await restart(b, receiveq(pair));
  const part = Math.ceil((INFLIGHT_SPLIT_ENTRIES + INFLIGHT_SPLIT_ENTRY_SIZE * 128) / INFLIGHT_ALIGN) * INFLIGHT_ALIGN;
  const usedIndexes = () =>
    [0, 1].map((pair) => {
      const bytes = Buffer.alloc(2);
      readSync(region.fd, bytes, 0, 2, Number(region.mmapOffset) + part * receiveq(pair) + INFLIGHT_SPLIT_USED_IDX);
      return bytes.readUInt16LE();
    });
  const inRings = () => b.pairs.map(({ receiveq }) => receiveq.lastUsed);
  const traffic = new Traffic(a, b);
  traffic.send(60);
  await traffic.settle();
  const before = inRings();
  expect(usedIndexes()).toEqual(before);
  await b.frontend.setVringEnable(receiveq(1), false);
  traffic.send(100, [1]);
  await traffic.settle();
  expect(inRings()[0]).toBeGreaterThan(before[0]!);
  expect(inRings()[1]).toBe(before[1]);
  expect(usedIndexes()).toEqual(inRings());
  await b.frontend.setVringEnable(receiveq(1), true);
  traffic.send(100);
  await traffic.settle();
  expect(inRings()[1]).toBeGreaterThan(before[1]!);
  expect(usedIndexes()).toEqual(inRings());
});

it("an inflight region that can be mapped no more harms nobody: not the other end, nor who comes next", async () => {
  const F_SEAL_FUTURE_WRITE = 0x10; // linux/fcntl.h
  await start({ a: 2, b: 2 });
  const a = await connect("a", 2);
  const b = await connect("b", 2);
  await b.frontend.setProtocolFeatures(REPLY_ACK | INFLIGHT);
  const region = (await b.frontend.getInflightFd(4, 128))!;
  open.defer(() => close(region.fd));
  for (const index of [0, 1, 2, 3]) await b.frontend.getVringBase(index);
  await b.frontend.setInflightFd(region);
  for (const pair of [0, 1]) await restart(b, receiveq(pair));
  await b.frontend.setVringEnable(receiveq(1), false);
  expect(addSeals(region.fd, F_SEAL_FUTURE_WRITE)).toBe(true);
  const traffic = new Traffic(a, b);
  traffic.send(100);
  await traffic.settle();
  await b.frontend.setVringEnable(receiveq(1), true);
  traffic.send(100);
  await traffic.settle();
  expect(drops("a").all).toBe(0);

  b.frontend[Symbol.dispose]();
  await expect.poll(() => relay.state.links[0]!.ports[1].state).toBe("listening");
  await a.frontend.setVringEnable(receiveq(1), true);
  const next = new Traffic(a, await connect("b", 2));
  const dropped = drops("a").all;
  next.send(100);
  await next.settle();
  expect(drops("a").all).toBe(dropped);
});

it("a receiveq whose driver broke it is left to itself: its frames go to the one that works", async () => {
  await start({ a: 2, b: 2 });
  const a = await connect("a", 2);
  const b = await connect("b", 2);
  const { availGpa, size } = b.pairs[1]!.receiveq;
  guests.get(b)!.write(availGpa + 2n, Buffer.from(Uint16Array.of(3 * size).buffer));
  const traffic = new Traffic(a, b);
  traffic.send(1, [1]);
  await expect.poll(() => events.filter(({ type }) => type === "broken")).toHaveLength(1);
  const dropped = drops("a").all;
  // The lanes are settled after the event.
  await a.frontend.setVringEnable(receiveq(0), true);
  traffic.send(100);
  await traffic.settle(() => dropped);
  expect(drops("a").all).toBe(dropped);
});
