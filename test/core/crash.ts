/**
 * A relay that is killed at any store to guest memory, and the next one on the same guests: two well-behaved drivers, who
 * know nothing of that, say whether every chain comes back once and in order.
 */
import { PackedDriver } from "../../src/driver/packed.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import type { VirtqueueDriver } from "../../src/driver/virtqueue.ts";
import { giveBackCutBatch } from "../../src/ports/cut-batch.ts";
import { packedFlags } from "../../src/ports/ring-memory.ts";
import { startPosition } from "../../src/vhost-user/position.ts";
import { frameOf } from "./chains.ts";
import type { Access } from "./hooked-core.ts";
import { type Ram, Rig, type Ring, ringAt } from "./rig.ts";

/** The relay is no more. */
class Killed extends Error {}

const [RING, DATA, DATA_BYTES, HOLE] = [0x10_0000n, 0x1_0000_0000n, 0x4_0000, 0x8000_0000n];
const HEADER = 12;

export interface RingSketch {
  packed: boolean;
  size: number;
  base: number;
}

/** A chain of `parts` descriptors; the last of a bad one lies in no RAM. */
interface ChainSketch {
  length: number;
  parts: number;
  bad: boolean;
}

export type Step = ({ type: "send" | "post" } & ChainSketch) | { type: "poll"; budget: number } | { type: "reap" };

/** One virtqueue's driver; chains must come back in the order in which they were added. */
class FifoDriver {
  readonly queue: VirtqueueDriver;
  readonly #ram: Ram;
  readonly #outstanding: { id: number; parts: { gpa: bigint; len: number }[]; frame: number | undefined }[] = [];

  constructor(ram: Ram, { packed, desc: gpa, size, eventIdx, indirect, base }: Ring) {
    const place = { buffer: ram.bytes.buffer, byteOffset: ram.at(gpa), gpa, size, eventIdx, indirect, base };
    this.queue = packed ? new PackedDriver(place) : new SplitDriver(place);
    this.#ram = ram;
  }

  add(parts: { gpa: bigint; len: number }[], writable: boolean, frame?: number): boolean {
    const id = this.queue.add(parts.map((part) => ({ ...part, writable })));
    if (id < 0) return false;
    this.#outstanding.push({ id, parts, frame });
    this.queue.publish();
    return true;
  }

  /** The frames whose chains the device has. */
  get frames(): number[] {
    return this.#outstanding.flatMap(({ frame }) => frame ?? []);
  }

  get outstanding(): number {
    return this.#outstanding.length;
  }

  /** Takes back one chain. @returns what was written to it */
  reap(): Buffer | undefined {
    const id = this.queue.pop();
    if (id < 0) return undefined;
    const first = this.#outstanding.shift();
    if (first?.id !== id) throw new Error(`chain ${id} came back, it is the turn of ${first?.id}`);
    const written = first.parts.map(({ gpa, len }) => (gpa === HOLE ? new Uint8Array(len) : this.#ram.slice(gpa, len)));
    return Buffer.concat(written).subarray(0, this.queue.usedLen);
  }
}

export class CrashWorld {
  readonly #rig: Rig;
  #busyDrivers: boolean;
  #killAt: number;
  readonly #staleBase: { source: number; destination: number };
  #transmitq: FifoDriver;
  #receiveq: FifoDriver;
  #at = 0;
  #sent = 0;
  #isPolling = false;
  #isPublished = false;
  /** Stores to guest memory so far, of all relays. */
  stores = 0;
  /** The store before which the relay was killed. */
  killedBefore: Access | undefined;
  /** Frames that were sent and not completed when the poll began that was interrupted, or were sent meanwhile. */
  readonly interrupted = new Set<number>();
  /** Frames that cannot arrive: their chains were malformed. */
  readonly #bad = new Set<number>();
  readonly received: number[] = [];

  /** @param killAt stores that the first relay does; @param busyDrivers the drivers act during polls, after every publication */
  constructor(rig: CrashRig, killAt: number, busyDrivers: boolean) {
    this.#rig = rig.rig;
    rig.observe = (access) => this.#onAccess(access);
    this.#killAt = killAt;
    this.#busyDrivers = busyDrivers;
    const { source, destination } = this.#rig;
    this.#staleBase = { source: source.ring.base, destination: destination.ring.base };
    this.#transmitq = new FifoDriver(source.ram, source.ring);
    this.#receiveq = new FifoDriver(destination.ram, destination.ring);
    this.#rig.replaceLane(this.#staleBase);
  }

  run(steps: readonly Step[]): void {
    for (const step of steps) {
      if (step.type === "poll") this.#poll(step.budget);
      else if (step.type === "reap") this.#reapAll();
      else if (step.type === "send") this.#send(step);
      else this.#post(step);
    }
  }

  /** Lets everything come to its end, with no more kills. @throws if a rule was broken */
  finish(): void {
    this.#busyDrivers = false;
    this.#killAt = Infinity;
    const big = { length: 600, parts: 1, bad: false };
    for (let round = 0; this.#transmitq.outstanding + this.#receiveq.outstanding > 0; round++) {
      if (round > 40)
        throw new Error(`${this.#transmitq.outstanding}, ${this.#receiveq.outstanding} chains never come back`);
      if (this.#transmitq.outstanding > 0) this.#post(big);
      else this.#send({ length: 20, parts: 1, bad: false });
      this.#poll(64);
      this.#reapAll();
    }
    const { noBuffer, tooSmall, noReceiver, badFrame } = this.#rig.counters.drops;
    if (noBuffer + tooSmall + noReceiver + badFrame > 0) throw new Error("frames were dropped for another reason");
    const ordered = this.received.every((frame, i) => i === 0 || frame > this.received[i - 1]!);
    if (!ordered) throw new Error(`frames arrived as ${this.received.join()}`);
    for (let frame = 0; frame < this.#sent; frame++) {
      if (this.received.includes(frame) || this.#bad.has(frame) || this.interrupted.has(frame)) continue;
      throw new Error(`frame ${frame} is lost, of ${this.#sent}; interrupted: ${[...this.interrupted].join()}`);
    }
  }

  #send({ length, parts, bad }: ChainSketch): void {
    const frame = this.#sent;
    const { ram } = this.#rig.source;
    const places = this.#take(HEADER + length, parts, bad);
    const content = Buffer.concat([new Uint8Array(HEADER), frameOf(frame, length)]);
    let done = 0;
    for (const { gpa, len } of places) {
      if (gpa !== HOLE) ram.slice(gpa, len).set(content.subarray(done, done + len));
      done += len;
    }
    if (!this.#transmitq.add(places, false, frame)) return;
    this.#sent++;
    if (bad) this.#bad.add(frame);
    if (this.#isPolling) this.interrupted.add(frame);
  }

  #post({ length, parts, bad }: ChainSketch): void {
    this.#receiveq.add(this.#take(length, parts, bad), true);
  }

  /** Memory for a chain; old buffers are long forgotten when theirs is used again. */
  #take(length: number, parts: number, bad: boolean): { gpa: bigint; len: number }[] {
    return Array.from({ length: parts }, (_, i) => {
      const len = i + 1 < parts ? Math.floor(length / parts) : length - Math.floor(length / parts) * (parts - 1);
      if (this.#at + len > DATA_BYTES) this.#at = 0;
      const gpa = bad && i + 1 === parts ? HOLE : DATA + BigInt(this.#at);
      this.#at += len;
      return { gpa, len };
    });
  }

  #poll(budget: number): void {
    const before = this.#transmitq.frames;
    if (this.killedBefore === undefined) {
      this.interrupted.clear();
      for (const frame of before) this.interrupted.add(frame);
    }
    try {
      this.#isPolling = this.killedBefore === undefined;
      this.#rig.poll(budget);
      this.#isPolling = false;
      if (this.killedBefore === undefined) this.interrupted.clear();
    } catch (error) {
      if (!(error instanceof Killed)) throw error;
      this.#isPolling = false;
      this.#startAgain();
    }
  }

  /** What the next relay does: finds out where the rings stand, the front-end's bases being old, and begins there. */
  #startAgain(): void {
    const position = (end: "source" | "destination") => {
      const { ram, ring } = this.#rig[end];
      if (!ring.packed) return ram.view.getUint16(ram.at(ring.used) + 2, true);
      const desc = new DataView(ram.bytes.buffer, ram.bytes.byteOffset + ram.at(ring.desc), 16 * ring.size);
      return giveBackCutBatch(desc, startPosition(this.#staleBase[end], packedFlags(desc)));
    };
    this.#rig.replaceLane({ source: position("source"), destination: position("destination") });
  }

  #onAccess(access: Access): void {
    if (access.kind !== "load") {
      if (this.stores === this.#killAt) {
        this.killedBefore = access;
        this.stores++;
        throw new Killed();
      }
      this.stores++;
    }
    if (!this.#busyDrivers || !this.#isPolling) return;
    if (this.#isPublished) {
      this.#isPublished = false;
      const count = this.#reapAll();
      for (let i = 0; i < count; i++) this.#post({ length: 90, parts: 1, bad: false });
      this.#send({ length: 60, parts: 1, bad: false });
    }
    if (access.kind === "store" && access.atomic) this.#isPublished = true;
  }

  /** @returns how many receive chains came back */
  #reapAll(): number {
    while (this.#transmitq.reap()) continue;
    let count = 0;
    for (let first; (first = this.#receiveq.reap()); count++) {
      if (first.length === 0) continue;
      const parts = [first];
      const bytes = () => Buffer.concat(parts);
      while (bytes().length < HEADER || parts.length < bytes().readUInt16LE(10)) {
        const part = this.#receiveq.reap();
        if (!part) throw new Error(`${parts.length} of ${bytes().readUInt16LE(10)} buffers of one frame came back`);
        parts.push(part);
        count++;
      }
      const frame = bytes().subarray(HEADER);
      const number = frame.readUInt32LE();
      if (Buffer.compare(frame, frameOf(number, frame.length)) !== 0) throw new Error(`frame ${number} is damaged`);
      this.received.push(number);
    }
    return count;
  }
}

/** The guests of many worlds, one after the other. */
export class CrashRig {
  readonly rig: Rig;
  observe: (access: Access) => void = () => undefined;

  constructor(source: RingSketch, destination: RingSketch) {
    const end = (sketch: RingSketch) => ({
      regions: [
        { gpa: RING, sizeBytes: 0x1000 },
        { gpa: DATA, sizeBytes: DATA_BYTES },
      ],
      ring: ringAt(RING, sketch.size, sketch),
    });
    const observe = (access: Access) => this.observe(access);
    this.rig = new Rig({ source: end(source), destination: end(destination), variant: "hooked", observe });
  }
}
