/**
 * Runs hostile cases beside a canary and checks after each that the invariants of the catalogue of bad inputs hold:
 *
 *   I1 the relay lives, no lane trapped, the same socket serves a good VM afterwards
 *   I2 the canary pair lost no frame       I3 no fd, I4 no mapping is left
 *   I5 the offender's memory was written only where it may be, the other VM's outside its rings and buffers not at all
 *   I6 the pollers sleep once the input ends     I7 see harness.test.ts     I8 one log line a second of a kind at most
 *
 * That nothing was rejected unhandled is what the test runner itself checks.
 */
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import { expect } from "vitest";
import { EventLog } from "../../src/control/log.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import { Relay, type RelayEvent } from "../../src/index.ts";
import { NET_HDR_SIZE, RECEIVEQ, TRANSMITQ } from "../../src/layout/virtio.ts";
import { mappings } from "../memory/mappings.ts";
import { Canary } from "./canary.ts";
import { BUFFERS, RawVm, WRITE, type VmOptions } from "./raw-vm.ts";

/** One row of the catalogue, or a parameter of one. */
export interface HostileCase {
  number: string;
  what: string;
  vm?: VmOptions;
  /** Does the harm. The VM has connected and said nothing yet. */
  run(vm: RawVm, harness: Harness): Promise<void>;
}

const PEER_BYTES = 16 << 20;
/** The end of the peer's memory, where it has neither rings nor buffers. */
const PEER_REST = 2 << 20;
const LOG_INTERVAL_MS = 1000;

export class Harness implements AsyncDisposable {
  readonly events: RelayEvent[] = [];
  readonly #directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  readonly #lines: { at: number; text: string }[] = [];
  readonly #open = new AsyncDisposableStack();
  #relay!: Relay;
  #canary!: Canary;
  #peer!: NetDriver;
  #peerGuest!: Guest;
  /** The longest way of a canary's frame, by case: reported, not judged. */
  readonly #worstMs = new Map<string, number>();

  static async start(): Promise<Harness> {
    const harness = new Harness();
    const log = new EventLog(harness.#logStream());
    const port = (name: string) => `vhost-user:${harness.path(name)}`;
    harness.#relay = await Relay.start({
      links: [
        [`${port("offender")},queues=2`, `${port("peer")},queues=2`],
        [port("canary-a"), port("canary-b")],
      ],
      onEvent: (event) => {
        harness.events.push(event);
        log.write(event);
      },
    });
    harness.#open.defer(() => rmSync(harness.#directory, { recursive: true }));
    harness.#open.use(harness.#relay);
    harness.#peerGuest = harness.#open.use(new Guest([{ gpa: 0n, sizeBytes: BigInt(PEER_BYTES) }]));
    harness.#peerGuest.write(BigInt(PEER_BYTES - PEER_REST), Buffer.alloc(PEER_REST, 0xa5));
    harness.#peer = harness.#open.use(
      await NetDriver.connect({ path: harness.path("peer"), guest: harness.#peerGuest }),
    );
    harness.#canary = harness.#open.use(await Canary.start([harness.path("canary-a"), harness.path("canary-b")]));
    return harness;
  }

  path(name: string): string {
    return join(this.#directory, `${name}.sock`);
  }

  /** Where the canary's frames took longest. */
  get slowest(): string {
    const worst = [...this.#worstMs].toSorted(([, a], [, b]) => b - a).slice(0, 3);
    return `slowest frames of the canary: ${worst.map(([name, ms]) => `${ms.toFixed(1)} ms in ${name}`).join("; ")}`;
  }

  /** What the other VM of the link received since it was last asked. */
  takePeer(): Uint8Array[] {
    const frames: Uint8Array[] = [];
    const [pair] = this.#peer.pairs;
    while (pair!.receive(64, (bytes) => frames.push(bytes.slice())) > 0);
    return frames;
  }

  /** Drops of the lane that carries the offender's frames, and receive chains of its that were malformed. */
  get counters() {
    const lanes = this.#relay.state.links[0]!.lanes;
    const [out, back] = ["offender", "peer"].map((name) =>
      lanes.find(({ from, pair }) => from.includes(name) && pair === 0),
    );
    return { drops: out!.drops, malformedBuffers: back!.malformedBuffers };
  }

  /** Sends a frame from the other VM to the offender. */
  sendFromPeer(frame: Uint8Array): void {
    this.#peer.pairs[0]!.transmit(frame);
    this.#peer.pairs[0]!.flush();
  }

  async run(hostile: HostileCase): Promise<void> {
    await this.#untilListening(); // whatever became of the case before
    this.#canary.resume();
    const before = { fds: openFds(), maps: mappings("/memfd:guest") };
    const canaryBefore = this.#canary.received;
    {
      using vm = new RawVm(this.path("offender"), hostile.vm);
      await hostile.run(vm, this);
      vm.expectContained();
    }
    await this.#untilListening();
    await this.mustServe();
    await this.#check(hostile, before, canaryBefore);
  }

  async #check(hostile: HostileCase, before: { fds: number; maps: number }, canaryBefore: number): Promise<void> {
    const { lost, errors, worstMs } = await this.#canary.pause();
    expect({ lost, errors }, "I2: the canary's frames").toEqual({ lost: 0, errors: 0 });
    expect(this.#canary.received, "I2: the canary sang").toBeGreaterThan(canaryBefore);
    this.#worstMs.set(`${hostile.number} ${hostile.what}`, worstMs);
    expect(
      this.events.filter(({ type }) => type === "fatal" || type === "trapped"),
      "I1",
    ).toEqual([]);
    await expect.poll(() => openFds(), { message: "I3: open fds", interval: 2 }).toBe(before.fds);
    await expect
      .poll(() => mappings("/memfd:guest"), { message: "I4: mappings of guest memory", interval: 2 })
      .toBe(before.maps);
    const rest = Buffer.from(this.#peerGuest.read(BigInt(PEER_BYTES - PEER_REST), PEER_REST));
    expect(rest.equals(Buffer.alloc(PEER_REST, 0xa5)), "I5: the other VM's memory").toBe(true);
    await this.#mustSleep();
    this.#mustBeQuiet();
  }

  /** I6: once nobody sends, the pollers' loops stand still. */
  async #mustSleep(): Promise<void> {
    const loops = () => this.#relay.state.pollers.map(({ busy, idle }) => busy + idle);
    await expect
      .poll(
        async () => {
          const before = loops();
          await sleep(20);
          return loops().map((after, i) => after - before[i]!);
        },
        { message: "I6: turns of the pollers in 20 ms", interval: 2 },
      )
      .toEqual(loops().map(() => 0));
  }

  /** I8: lines that differ in numbers only are of one kind. */
  #mustBeQuiet(): void {
    const last = new Map<string, number>();
    for (const { at, text } of this.#lines.splice(0)) {
      const kind = text.replaceAll(/\d+/g, "N");
      expect(at - (last.get(kind) ?? -LOG_INTERVAL_MS), `I8: "${kind}" again`).toBeGreaterThanOrEqual(LOG_INTERVAL_MS);
      last.set(kind, at);
    }
  }

  /** I1: the socket takes the next VM, and its frames get to the other one and back. */
  async mustServe(): Promise<void> {
    {
      using vm = new RawVm(this.path("offender"));
      await vm.start();
      this.takePeer();
      const frame = Uint8Array.from({ length: 300 }, (_, i) => i & 0xff);
      vm.send(frame);
      const arrived: Uint8Array[] = [];
      await expect.poll(() => arrived.push(...this.takePeer()), { message: "I1: a frame there", interval: 2 }).toBe(1);
      expect(Buffer.compare(arrived[0]!, frame)).toBe(0);
      const gpa = BUFFERS + 0x2_0000n;
      vm.allow(gpa, NET_HDR_SIZE + frame.length);
      vm.describe({ ring: RECEIVEQ, index: 0 }, { gpa, len: 2048, flags: WRITE });
      vm.offer(RECEIVEQ, 0);
      this.sendFromPeer(frame);
      await vm.untilUsed(RECEIVEQ, 1);
      expect(Buffer.compare(vm.guest.read(gpa + BigInt(NET_HDR_SIZE), frame.length), frame)).toBe(0);
      await vm.untilUsed(TRANSMITQ, 1);
      vm.expectContained();
      this.#peer.pairs[0]!.flush();
    }
    await this.#untilListening();
  }

  #untilListening(): Promise<void> {
    const state = () => this.#relay.state.links[0]!.ports[0].state;
    return expect.poll(state, { interval: 2, message: "I1: waits for a front-end" }).toBe("listening");
  }

  #logStream(): Writable {
    return new Writable({
      write: (chunk: Buffer, _encoding, done) => {
        this.#lines.push({ at: performance.now(), text: String(chunk) });
        done();
      },
    });
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#open.disposeAsync();
  }
}

function openFds(): number {
  return readdirSync("/proc/self/fd").length;
}
