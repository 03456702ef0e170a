/**
 * Either side may die and return. A relay killed under load: its front-ends connect to the next one and go on from the used
 * index; no buffer is lost or completed twice (the drivers judge), no frame arrives twice. A front-end that returns
 * where the relay dials is found at once, not by a timer.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, expect, it } from "vitest";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import type { QueuePair } from "../../src/driver/queue-pair.ts";
import { Relay } from "../../src/index.ts";
import { VHOST_USER_PROTOCOL_F_REPLY_ACK } from "../../src/layout/vhost-user.ts";
import { RECEIVEQ, TRANSMITQ, USED_IDX, VIRTIO_F_RING_PACKED } from "../../src/layout/virtio.ts";
import { Listener } from "../../src/vhost-user/endpoint.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";
import { frame } from "./traffic.ts";

/** Of a packed ring. */
const FIRST_POSITION = 0x8000;

/** How often a relay is killed, and how many frames it has in hand at most. */
const LIVES = 4;
const BATCH = 64;
/** Receive buffers that a frame takes at most. */
const BUFFERS = 3;

let directory: string;
let open: DisposableStack;
let child: ChildProcess | undefined;

const path = (name: string): string => join(directory, `${name}.sock`);

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  open = new DisposableStack();
});

afterEach(() => {
  child?.kill("SIGKILL");
  open.dispose();
  rmSync(directory, { recursive: true });
});

/** One VM through any number of relays: its memory and its driver live on. */
class Machine {
  readonly path: string;
  readonly guest: Guest;
  readonly #driver: NetDriver;
  #frontend: Frontend;
  sent = 0;
  /** Frames of the peer that arrived, and the number that the next one has at least. */
  received = 0;
  next = 0;

  static async connect(path: string, packed: boolean): Promise<Machine> {
    const guest = new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]);
    return new Machine(path, guest, await NetDriver.connect({ path, guest, packed }));
  }

  private constructor(path: string, guest: Guest, driver: NetDriver) {
    this.path = path;
    this.guest = open.use(guest);
    this.#driver = open.use(driver);
    this.#frontend = driver.frontend;
  }

  /** Connects to the next relay, as a VMM does whose guest runs on; it receives only. Its rings are polled from now on. */
  async reconnect(): Promise<void> {
    this.#frontend[Symbol.dispose]();
    const frontend = (this.#frontend = Frontend.connect(this.path));
    open.use(frontend);
    await frontend.setProtocolFeatures(1n << BigInt(VHOST_USER_PROTOCOL_F_REPLY_ACK));
    await frontend.setOwner();
    await frontend.setFeatures(this.#driver.features);
    await frontend.setMemTable(this.guest.regions);
    await this.#start(RECEIVEQ, this.#driver.pairs[0]!.receiveq);
  }

  /** Not before both machines receive: what is sent to one that does not is dropped. */
  async startTransmitq(): Promise<void> {
    await this.#start(TRANSMITQ, this.#driver.pairs[0]!.transmitq);
  }

  async #start(index: number, queue: QueuePair["receiveq"]): Promise<void> {
    const [desc, avail, used] = [queue.descGpa, queue.availGpa, queue.usedGpa].map((gpa) =>
      this.guest.userAddress(gpa),
    ) as [bigint, bigint, bigint];
    await this.#frontend.setVringNum(index, queue.size);
    await this.#frontend.setVringBase(index, this.#base(queue));
    await this.#frontend.setVringAddr(index, { desc, avail, used });
    await this.#frontend.setVringEnable(index, true);
    await this.#frontend.setVringKick(index);
  }

  /** Like QEMU: the used index of a split ring; of a packed one, which has none, where the ring was started first. */
  #base(queue: QueuePair["receiveq"]): number {
    if ((this.#driver.features & (1n << BigInt(VIRTIO_F_RING_PACKED))) !== 0n) return FIRST_POSITION;
    return Buffer.from(this.guest.read(queue.usedGpa + BigInt(USED_IDX), 2)).readUInt16LE();
  }

  /** Sends as much as there is room for, takes what has come. */
  turn(send: boolean): void {
    const [pair] = this.#driver.pairs;
    pair!.flush();
    while (send && pair!.transmit(frame(this.sent))) this.sent++;
    pair!.flush();
    pair!.receive(64, (bytes) => {
      const number = new DataView(bytes.buffer, bytes.byteOffset).getUint32(14);
      expect(number, "frames never arrive twice, nor out of order").toBeGreaterThanOrEqual(this.next);
      expect(Buffer.compare(bytes, frame(number)), `frame ${number}`).toBe(0);
      this.next = number + 1;
      this.received++;
    });
  }

  /** Receive buffers that came back empty: of a packed ring those in hand when a relay was killed, of a split one none. */
  get emptyBuffers(): number {
    return this.#driver.pairs[0]!.emptyBuffers;
  }

  /** Transmit chains that the device still has, and receive buffers that it does not have. */
  get missing(): { transmit: number; receive: number } {
    const { receiveq, transmitq } = this.#driver.pairs[0]!;
    return { transmit: transmitq.outstanding, receive: receiveq.size - receiveq.outstanding };
  }
}

async function startRelay(): Promise<void> {
  const link = `vhost-user:${path("a")}=vhost-user:${path("b")}`;
  const args = ["src/cli/main.ts", "run", "--link", link, "--control", path("control")];
  child = spawn(process.execPath, args, { stdio: "ignore" });
  await expect.poll(() => [isServed("a"), isServed("b")], { timeout: 20_000, interval: 5 }).toEqual([true, true]);
}

function isServed(name: string): boolean {
  try {
    Frontend.connect(path(name))[Symbol.dispose]();
    return true;
  } catch {
    return false;
  }
}

const KINDS = [
  ["split", "split"],
  ["packed", "packed"],
  ["split", "packed"],
] as const;

it.each(KINDS)(
  "BI-317: %s and %s: kill -9 under load and a new relay: buffers once, frames at most once",
  async (...kinds) => {
    await startRelay();
    const connect = (name: string, kind: "split" | "packed") => Machine.connect(path(name), kind === "packed");
    const machines = [await connect("a", kinds[0]), await connect("b", kinds[1])] as const;
    const exchange = async (count: number): Promise<void> => {
      const goal = machines.map(({ received }) => received + count);
      while (machines.some(({ received }, i) => received < goal[i]!)) {
        for (const machine of machines) machine.turn(true);
        await sleep(0);
      }
    };
    for (let life = 0; life < LIVES; life++) {
      await exchange(1000 + 377 * life);
      for (const machine of machines) machine.turn(true);
      child!.kill("SIGKILL");
      await once(child!, "close");
      for (const machine of machines) machine.turn(true);
      await startRelay();
      for (const machine of machines) await machine.reconnect();
      for (const machine of machines) await machine.startTransmitq();
    }
    await exchange(2000);
    const settled = () => {
      for (const machine of machines) machine.turn(false);
      return machines.map(({ missing, next }) => ({ ...missing, next }));
    };
    const [a, b] = machines;
    await expect.poll(settled, { interval: 1 }).toEqual([
      { transmit: 0, receive: 0, next: b.sent },
      { transmit: 0, receive: 0, next: a.sent },
    ]);
    for (const [i, machine] of machines.entries()) {
      const sent = machines[1 - i]!.sent;
      // The frames in hand when the relay was killed may be lost.
      expect(sent - machine.received).toBeLessThanOrEqual(LIVES * BATCH);
      expect(machine.emptyBuffers).toBeLessThanOrEqual(kinds[i] === "packed" ? BUFFERS * LIVES * BATCH : 0);
    }
  },
);

it("a front-end that the relay dials is found as soon as it returns", async () => {
  await using relay = await Relay.start({ links: [[`vhost-user:${path("a")},connect`, "null"]] });
  const waits: number[] = [];
  for (let life = 0; life < 20; life++) {
    await sleep(30);
    const from = performance.now();
    const listener = new Listener(path("a"));
    const frontend = new Frontend((await listener.next())!);
    await frontend.getFeatures();
    waits.push(performance.now() - from);
    listener[Symbol.dispose]();
    frontend[Symbol.dispose]();
    await expect.poll(() => relay.state.links[0]!.ports[0].state, { interval: 1 }).toBe("connecting");
  }
  // All twenty together take less than one wait for a timer of a second would.
  expect(waits.reduce((a, b) => a + b)).toBeLessThan(1000);
});
