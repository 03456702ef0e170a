/** The relay as a library, with real front-ends over real sockets: frames arrive whole, in order, once. */
import { existsSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { Relay, type LaneSnapshot, type RelayEvent, type RelayOptions } from "../../src/index.ts";
import { Guest, type RegionPlan } from "../../src/driver/guest.ts";
import { NetDriver, type NetDriverOptions } from "../../src/driver/net.ts";
import {
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_STATUS,
} from "../../src/layout/vhost-user.ts";
import type { MemoryRegion } from "../../src/vhost-user/device.ts";
import { mappings } from "../memory/mappings.ts";
import { exchange, frame } from "./traffic.ts";

const MIB = 1n << 20n;
const GIB = 1n << 30n;
const REPLY_ACK = 1n << BigInt(VHOST_USER_PROTOCOL_F_REPLY_ACK);
const ORDINARY: RegionPlan[] = [{ gpa: 0n, sizeBytes: 64n * MIB }];

let directory: string;
let open: DisposableStack;
let events: RelayEvent[];
let relay: Relay;

const path = (name: string): string => join(directory, `${name}.sock`);
const port = (name: string, options = ""): string => `vhost-user:${path(name)}${options}`;

async function start(options: RelayOptions): Promise<void> {
  relay = await Relay.start({ ...options, onEvent: (event) => events.push(event) });
}

/** The lane that carries what this port sends. */
function lane(from: string): LaneSnapshot {
  return relay.state.links[0]!.lanes.find((candidate) => candidate.from.startsWith(port(from)))!;
}

async function connect(name: string, plan = ORDINARY, options: Partial<NetDriverOptions> = {}): Promise<NetDriver> {
  const guest = open.use(new Guest(plan));
  return open.use(await NetDriver.connect({ path: path(name), guest, ...options }));
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  open = new DisposableStack();
  events = [];
});

afterEach(async () => {
  open.dispose();
  await relay.close();
  rmSync(directory, { recursive: true });
  expect(events.filter(({ type }) => type === "fatal" || type === "trapped")).toEqual([]);
});

describe("two virtual machines", () => {
  for (const mergeable of [true, false]) {
    for (const eventIdx of [true, false]) {
      for (const poll of ["adaptive", "busy", "interrupt"] as const) {
        it(`exchange frames of 60 to 9014 bytes: mergeable ${mergeable}, event index ${eventIdx}, ${poll}`, async () => {
          await start({ links: [[port("a"), port("b")]], poll });
          const a = await connect("a", ORDINARY, { mergeable, eventIdx });
          const b = await connect("b", ORDINARY, { mergeable: true, eventIdx: true });
          await exchange(a, b, 700);
          await exchange(b, a, 700);
          const lanes = relay.state.links[0]!.lanes;
          expect(lanes.map((lane) => lane.packets)).toEqual([700, 700]);
          expect(lanes.flatMap((lane) => Object.values(lane.drops)).every((drops) => drops === 0)).toBe(true);
        });
      }
    }
  }

  it("use every queue pair on its own", async () => {
    await start({ links: [[port("a", ",queues=3"), port("b", ",queues=3")]], cpus: [0, 1] });
    const a = await connect("a", ORDINARY, { queuePairs: 3 });
    const b = await connect("b", ORDINARY, { queuePairs: 3 });
    for (const pair of [2, 0, 1]) await exchange(a, b, 100, { pair, first: pair * 1000 });
    expect(
      relay.state.links[0]!.lanes.filter((lane) => lane.from === port("a", ",queues=3")).map((lane) => lane.packets),
    ).toEqual([100, 100, 100]);
  });

  it("one of them dies and comes back: traffic resumes, the other notices a pause only", async () => {
    await start({ links: [[port("a"), port("b")]] });
    const a = await connect("a");
    for (let life = 0; life < 3; life++) {
      const b = await connect("b");
      await exchange(a, b, 50);
      await exchange(b, a, 50);
      b[Symbol.dispose] = () => undefined; // the stack must not end it again
      b.frontend[Symbol.dispose]();
      await expect.poll(() => relay.state.links[0]!.ports[1]!.state).toBe("listening");
      while (a.pairs[0]!.transmit(frame(0))); // into the void: must not fill the ring for good
      a.pairs[0]!.flush();
      await expect.poll(() => (a.pairs[0]!.flush(), a.pairs[0]!.transmitq.outstanding)).toBe(0);
    }
    expect(lane("a").drops.noReceiver).toBeGreaterThanOrEqual(3 * 256);
  });
});

describe("memory of a guest", () => {
  // The first extent of a region of 24 GiB ends 16 GiB in; the next begins 1 MiB before that.
  for (const [what, into] of [
    ["around the 16 GiB segment border", 16n * GIB - 0x1_8340n],
    ["where the next segment's overlap begins", 15n * GIB + 1023n * MIB - 0x2_0000n],
    ["in the last MiB", 24n * GIB - 8n * MIB],
  ] as const) {
    it(`24 GiB, rings and buffers ${what}`, async () => {
      const plan = [{ gpa: 4n * GIB, sizeBytes: 24n * GIB }];
      await start({ links: [[port("a"), port("b")]] });
      const a = await connect("a", plan, { gpa: 4n * GIB + into });
      const b = await connect("b", plan, { gpa: 4n * GIB + into, mergeable: false });
      await exchange(a, b, 600);
      await exchange(b, a, 600);
    });
  }

  it("in many small regions, one after the other: buffers cross from one to the next", async () => {
    const plan = Array.from({ length: 8 }, (_, i) => ({
      gpa: BigInt(i) * MIB,
      sizeBytes: MIB,
      fileOffset: BigInt(7 - i) * MIB,
    }));
    await start({ links: [[port("a"), port("b")]] });
    const a = await connect("a", plan, { ringSize: 128 });
    const b = await connect("b", plan, { ringSize: 128 });
    await exchange(a, b, 300);
    await exchange(b, a, 300);
  });
});

it("a memory table that is refused leaves the old one in force: an mmap offset that would misalign a ring", async () => {
  await start({ links: [[port("a"), port("b")]] });
  const guest = open.use(new Guest(ORDINARY));
  const a = open.use(await NetDriver.connect({ path: path("a"), guest }));
  const b = await connect("b");
  await exchange(a, b, 50);
  const odd = guest.regions.map((region) => ({ ...region, sizeBytes: region.sizeBytes - 1n, mmapOffset: 1n }));
  await a.frontend.setProtocolFeatures(REPLY_ACK);
  await expect(a.frontend.setMemTable(odd)).rejects.toThrow(/refused/);
  await exchange(a, b, 50, { first: 50 });
  await exchange(b, a, 50);
});

describe("regions that come and go while frames flow", () => {
  /** The driver lives in the second region. */
  const plan: RegionPlan[] = [
    { gpa: 0n, sizeBytes: 4n * MIB },
    { gpa: GIB, sizeBytes: 64n * MIB },
    { gpa: 3n * GIB, sizeBytes: 3n * MIB },
  ];

  async function connectSlots(): Promise<{ a: NetDriver; regions: readonly MemoryRegion[] }> {
    const guest = open.use(new Guest(plan));
    const a = open.use(await NetDriver.connect({ path: path("a"), guest, gpa: GIB }));
    await a.frontend.setProtocolFeatures(REPLY_ACK | (1n << BigInt(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)));
    return { a, regions: guest.regions };
  }

  it("BI-091, BI-092: not a frame outside them is lost, no fd and no mapping is left", async () => {
    await start({ links: [[port("a"), port("b")]] });
    const { a, regions } = await connectSlots();
    const b = await connect("b");
    await exchange(a, b, 10);
    const before = { fds: readdirSync("/proc/self/fd").length, mappings: mappings("/memfd:guest") };
    let changing = true;
    const changes = (async () => {
      for (let n = 0; n < 100; n++) {
        for (const region of [regions[0]!, regions[2]!]) await a.frontend.remMemReg(region);
        for (const region of [regions[2]!, regions[0]!]) await a.frontend.addMemReg(region);
      }
      changing = false;
    })();
    let first = 10;
    for (; changing; first += 50) {
      await exchange(a, b, 50, { first });
      await exchange(b, a, 50, { first });
    }
    await changes;
    expect(first).toBeGreaterThan(10);
    expect(readdirSync("/proc/self/fd").length).toBe(before.fds);
    expect(mappings("/memfd:guest") - before.mappings).toBeLessThan(10);
    expect(relay.state.links[0]!.lanes.flatMap((lane) => Object.values(lane.drops)).every((n) => n === 0)).toBe(true);
  });

  it("BI-093: a buffer in a region that is gone is refused, and taken again once the region is back", async () => {
    await start({ links: [[port("a"), port("b")]], poll: "busy" });
    const { a, regions } = await connectSlots();
    await connect("b");
    const { transmitq } = a.pairs[0]!;
    const send = async (): Promise<void> => {
      transmitq.addBuffer(Number(3n * GIB), 0, 12 + 60, false);
      transmitq.publish();
      await expect.poll(() => transmitq.pop(), { interval: 1 }).toBeGreaterThanOrEqual(0);
    };
    await send();
    await a.frontend.remMemReg(regions[2]!);
    await send();
    await a.frontend.addMemReg(regions[2]!);
    await send();
    expect(lane("a")).toMatchObject({ packets: 2, drops: { malformed: 1 } });
  });

  it("a ring whose region goes stops; with the region back it goes on where it was", async () => {
    await start({ links: [[port("a"), port("b")]] });
    const { a, regions } = await connectSlots();
    const b = await connect("b");
    await exchange(a, b, 100);
    await a.frontend.remMemReg(regions[1]!);
    expect(relay.state.links[0]!.ports.map(({ state }) => state)).toEqual(["connected", "running"]);
    await a.frontend.addMemReg(regions[1]!);
    await exchange(a, b, 100, { first: 100 });
    await exchange(b, a, 100);
  });

  it("all 509 slots are in use", async () => {
    await start({ links: [[port("a"), port("b")]] });
    const { a } = await connectSlots();
    const b = await connect("b");
    const pages = Array.from({ length: 506 }, (_, i) => ({ gpa: 4n * GIB + BigInt(i) * 8192n, sizeBytes: 4096n }));
    const { regions } = open.use(new Guest(pages));
    for (const region of regions) await a.frontend.addMemReg(region);
    await exchange(a, b, 50);
    for (const region of regions.toReversed()) await a.frontend.remMemReg(region);
    await exchange(b, a, 50);
  });
});

it("BI-049: SET_STATUS 0 in the middle of a burst: from its ack on the guest's memory is not touched", async () => {
  await start({ links: [[port("a"), port("b")]] });
  const a = await connect("a");
  const guest = open.use(new Guest(ORDINARY));
  const b = open.use(await NetDriver.connect({ path: path("b"), guest }));
  await b.frontend.setProtocolFeatures(REPLY_ACK | (1n << BigInt(VHOST_USER_PROTOCOL_F_STATUS)));
  const burst = exchange(a, b, 20_000).catch(() => "cut off");
  await expect.poll(() => lane("a").packets).toBeGreaterThan(500);
  await b.frontend.setStatus(0);
  const { usedGpa, size } = b.pairs[0]!.receiveq;
  const used = () => Buffer.from(guest.read(usedGpa, 4 + 8 * size)).toString("hex");
  const before = used();
  await expect.poll(() => lane("a").drops.noReceiver, { timeout: 20_000 }).toBeGreaterThan(500);
  expect(used()).toBe(before);
  expect(await burst).toBe("cut off");
});

describe("a receiver without buffers", () => {
  it("holds the sender up: nothing is lost", async () => {
    await start({ links: [[port("a"), port("b")]], stallMs: 60_000 });
    const a = await connect("a");
    const b = await connect("b");
    let sent = 0;
    while (sent < 10_000 && a.pairs[0]!.transmit(frame(sent))) {
      sent++;
      a.pairs[0]!.flush();
    }
    await expect.poll(() => lane("a").waits).toBeGreaterThan(0);
    let received = 0;
    await expect
      .poll(
        () => {
          b.pairs[0]!.receive(64, (bytes) => expect(Buffer.compare(bytes, frame(received++))).toBe(0));
          return received;
        },
        { timeout: 20_000, interval: 1 },
      )
      .toBe(sent);
  });

  it("that trickle in costs nothing: each frame waits for its own", async () => {
    await start({ links: [[port("a"), port("b")]], stallMs: 500 });
    const a = await connect("a");
    const b = await connect("b");
    let sent = 0;
    let received = 0;
    for (const end = performance.now() + 1500; performance.now() < end; await sleep(1)) {
      while (a.pairs[0]!.transmit(frame(sent))) sent++;
      a.pairs[0]!.flush();
      b.pairs[0]!.receive(4, () => received++);
    }
    expect(lane("a").waits).toBeGreaterThan(0);
    expect(lane("a").drops.noBuffer).toBe(0);
    expect(received).toBeGreaterThan(0);
  });

  it("costs frames only after the stall limit, and gets them again once it has buffers", async () => {
    await start({ links: [[port("a"), port("b")]], stallMs: 20 });
    const a = await connect("a");
    const b = await connect("b");
    let sent = 0;
    await expect
      .poll(
        () => {
          while (a.pairs[0]!.transmit(frame(sent))) sent++;
          a.pairs[0]!.flush();
          return lane("a").drops.noBuffer;
        },
        { interval: 1 },
      )
      .toBeGreaterThan(1000);
    await expect.poll(() => (a.pairs[0]!.flush(), a.pairs[0]!.transmitq.outstanding), { interval: 1 }).toBe(0);
    while (b.pairs[0]!.receive(64, () => undefined) > 0);
    await exchange(a, b, 100);
  });
});

describe("passive ports", () => {
  it("loopback returns a guest's own frames", async () => {
    await start({ links: [[port("a"), "loopback"]] });
    const a = await connect("a");
    await exchange(a, a, 500);
  });

  it("null swallows them and counts them", async () => {
    await start({ links: [["null", port("a")]] });
    const a = await connect("a");
    for (let k = 0; k < 100; k++) a.pairs[0]!.transmit(frame(k));
    a.pairs[0]!.flush();
    await expect.poll(() => relay.state.links[0]!.lanes[0]!.packets).toBe(100);
  });
});

describe("pollers", () => {
  it("sleep when there is nothing to do, and a kick wakes them", async () => {
    await start({ links: [[port("a"), port("b")]] });
    const a = await connect("a");
    const b = await connect("b");
    await exchange(a, b, 10);
    await sleep(100);
    const { busy, idle } = relay.state.pollers[0]!;
    await sleep(300);
    expect(relay.state.pollers[0]).toMatchObject({ busy, idle });
    await exchange(a, b, 10, { first: 10 });
    expect(lane("a").kicks).toBeGreaterThan(0);
  });
});

it("closes with everything connected, and its sockets are gone", async () => {
  await start({ links: [[port("a"), port("b")]] });
  await connect("a");
  await connect("b");
  await relay.close();
  expect([existsSync(path("a")), existsSync(path("b"))]).toEqual([false, false]);
});
