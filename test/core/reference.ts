/**
 * What a lane must do, slow and plain: the device of virtio 1.3 (2.7 split virtqueues, 5.1.6 network frames) joined to
 * another, and the rules of our own that assembly/ states: which frames are refused, who waits, who is called.
 *
 * It works on copies of both guests' RAM and applies to them what the device may write; after a poll real RAM must be
 * equal to its copy, byte for byte. It shares no code with the core, and no state. It knows no limit of work for one
 * poll: that is reached by rings of tens of thousands of descriptors only, and has work.test.ts.
 */
import { ReferenceRam } from "./reference-ram.ts";
import type { PollResult, Ring } from "./rig.ts";

const FRAME_BYTES = { min: 14, max: 65_600 };

export interface Counters {
  packets: number;
  bytes: number;
  batches: number;
  waits: number;
  malformedBuffers: number;
  calls: { source: number; destination: number; suppressed: number };
  drops: Record<"noReceiver" | "noBuffer" | "tooSmall" | "malformed" | "badFrame" | "disabled", number>;
}

type Drop = keyof Counters["drops"];

/** A virtqueue between two polls. */
interface Queue {
  ring: Ring;
  nextAvail: number;
  /** Undefined: just started, the used index is in guest memory. */
  nextUsed: number | undefined;
  /** Used index at the last decision about a call; undefined: none was made since the start. */
  decided: number | undefined;
  broken: boolean;
}

interface Chain {
  /** All bytes of its buffers, in order, as they lie in RAM. */
  views: Uint8Array[];
  length: number;
}

const startQueue = (ring: Ring, nextAvail = ring.base): Queue => {
  return { ring, nextAvail, nextUsed: undefined, decided: undefined, broken: false };
};

export class ReferenceLane {
  source: Queue;
  destination: Queue;
  /** Frames delivered by all polls so far. */
  readonly frames: Uint8Array[] = [];
  readonly counters: Counters = {
    packets: 0,
    bytes: 0,
    batches: 0,
    waits: 0,
    malformedBuffers: 0,
    calls: { source: 0, destination: 0, suppressed: 0 },
    drops: { noReceiver: 0, noBuffer: 0, tooSmall: 0, malformed: 0, badFrame: 0, disabled: 0 },
  };
  /** Avail index of the receiveq when it had too few buffers for the next frame. */
  #waitingAt: number | undefined;

  constructor(source: Ring, destination: Ring) {
    this.source = startQueue(source);
    this.destination = startQueue(destination);
  }

  /** A stopped virtqueue is started again; whatever was waited for is looked at anew. */
  restart(end: "source" | "destination", base: number): void {
    this[end] = startQueue(this[end].ring, base);
    this.#waitingAt = undefined;
  }

  poll(from: ReferenceRam, to: ReferenceRam, budget: number, stuck: boolean): PollResult {
    const result = {
      taken: 0,
      callSource: false,
      callDestination: false,
      brokeSource: false,
      brokeDestination: false,
      waiting: false,
    };
    const { source, destination } = this;
    if (source.broken) return result;
    begin(from, source);
    if (!destination.broken) begin(to, destination);

    const asleep = this.#waitingAt !== undefined && !stuck && isReceiving(destination);
    if (asleep && availIndex(to, destination) === this.#waitingAt) return { ...result, waiting: true };
    const offered = distance(source.nextAvail, availIndex(from, source));
    if (offered === 0) return { ...result, waiting: this.#waitingAt !== undefined };
    if (offered > source.ring.size) {
      source.broken = true;
      return { ...result, brokeSource: true };
    }

    const framesBefore = this.frames.length;
    while (result.taken < Math.min(offered, budget)) {
      const head = headAt(from, source, source.nextAvail);
      if (head >= source.ring.size) {
        source.broken = result.brokeSource = true;
        break;
      }
      const fate = this.#carry(from, to, head, result);
      // Buffers came back: what waits from now on waits anew.
      if (fate === "wait" && (!stuck || this.frames.length > framesBefore)) break;
      if (fate === "wait") this.counters.drops.noBuffer++;
      else if (fate !== "delivered") {
        this.counters.drops[fate]++;
        this.#waitingAt = undefined;
      }
      giveUsed(from, source, head, 0);
      source.nextAvail = (source.nextAvail + 1) & 0xffff;
      result.taken++;
    }

    if (result.taken > 0) from.setU16(source.ring.used + 2n, source.nextUsed!);
    const delivered = this.frames.slice(framesBefore);
    this.counters.packets += delivered.length;
    this.counters.bytes += delivered.reduce((sum, frame) => sum + frame.length, 0);
    if (delivered.length > 0) this.counters.batches++;
    if (!destination.broken || result.brokeDestination) {
      if (destination.decided !== destination.nextUsed) to.setU16(destination.ring.used + 2n, destination.nextUsed!);
      result.callDestination = this.#decideCall(to, "destination");
    }
    result.callSource = this.#decideCall(from, "source");
    result.waiting = this.#waitingAt !== undefined && !(stuck && delivered.length > 0);
    return result;
  }

  /** Before blocking: a kick is wanted for what the lane waits for. @returns whether there is work already */
  arm(from: ReferenceRam, to: ReferenceRam, stuck: boolean): boolean {
    if (this.source.broken) return false;
    begin(from, this.source);
    if (this.#waitingAt !== undefined && !stuck && isReceiving(this.destination)) {
      requestKick(to, this.destination, this.#waitingAt);
      return availIndex(to, this.destination) !== this.#waitingAt;
    }
    requestKick(from, this.source, this.source.nextAvail);
    return availIndex(from, this.source) !== this.source.nextAvail;
  }

  /** Polling again: no kicks. */
  disarm(from: ReferenceRam, to: ReferenceRam): void {
    for (const [ram, queue] of [
      [from, this.source],
      [to, this.destination],
    ] as const) {
      if (queue.broken) continue;
      begin(ram, queue);
      suppressKicks(ram, queue);
    }
  }

  /** Takes one frame to where it belongs. */
  #carry(from: ReferenceRam, to: ReferenceRam, head: number, result: PollResult): "delivered" | "wait" | Drop {
    const { ring } = this.source;
    if (!ring.enabled) return "disabled";
    const chain = readChain(from, ring, head, false);
    if (!chain) return "malformed";
    const length = chain.length - ring.headerBytes;
    if (length < FRAME_BYTES.min || length > FRAME_BYTES.max) return "badFrame";
    const bytes = Buffer.concat(chain.views);
    if (bytes[0] !== 0 || bytes[1] !== 0) return "badFrame"; // flags, gso_type
    const frame = Uint8Array.from(bytes.subarray(ring.headerBytes));
    if (!isReceiving(this.destination)) return "noReceiver";
    const fate = this.#deliver(to, frame);
    if (fate === "broken") {
      result.brokeDestination = true;
      return "noReceiver";
    }
    if (fate === "delivered") this.frames.push(frame);
    return fate;
  }

  /** Writes a frame into as many receive chains as it needs, or into none. */
  #deliver(ram: ReferenceRam, frame: Uint8Array): "delivered" | "wait" | "tooSmall" | "broken" {
    const { destination: queue } = this;
    const { ring } = queue;
    const needed = ring.headerBytes + frame.length;
    let taken: { head: number; chain: Chain }[] = [];
    const room = () => taken.reduce((sum, { chain }) => sum + chain.length, 0);

    while (room() < needed) {
      const offered = distance(queue.nextAvail, availIndex(ram, queue));
      if (offered > ring.size) return this.#breakDestination();
      if (taken.length === offered) {
        if (offered === ring.size) return "tooSmall";
        if (this.#waitingAt === undefined) this.counters.waits++;
        this.#waitingAt = availIndex(ram, queue);
        return "wait";
      }
      const head = headAt(ram, queue, queue.nextAvail + taken.length);
      if (head >= ring.size) return this.#breakDestination();
      const chain = readChain(ram, ring, head, true);
      if (chain && chain.length > 0 && chain.length < 2 ** 32) {
        if (!ring.mergeable && chain.length < needed) return "tooSmall";
        taken.push({ head, chain });
        continue;
      }
      // Entries of one frame must be neighbours in the used ring, so what was taken before this one goes back too.
      for (const each of [...taken.map((t) => t.head), head]) giveUsed(ram, queue, each, 0);
      queue.nextAvail = (queue.nextAvail + taken.length + 1) & 0xffff;
      taken = [];
      this.counters.malformedBuffers++;
    }

    const header = new Uint8Array(ring.headerBytes);
    if (ring.headerBytes === 12) new DataView(header.buffer).setUint16(10, taken.length, true);
    const bytes = Buffer.concat([header, frame]);
    let done = 0;
    for (const { head, chain } of taken) {
      const part = bytes.subarray(done, done + chain.length);
      done += part.length;
      scatter(chain.views, part);
      giveUsed(ram, queue, head, part.length);
    }
    queue.nextAvail = (queue.nextAvail + taken.length) & 0xffff;
    this.#waitingAt = undefined;
    return "delivered";
  }

  #breakDestination(): "broken" {
    this.destination.broken = true;
    this.#waitingAt = undefined;
    return "broken";
  }

  /** After the used index is visible: whether the driver wants to hear of it. */
  #decideCall(ram: ReferenceRam, end: "source" | "destination"): boolean {
    const { ring, decided, nextUsed } = this[end];
    if (decided === nextUsed) return false;
    this[end].decided = nextUsed;
    let due: boolean;
    if (ring.eventIdx) {
      const usedEvent = ram.u16(ring.avail + 4n + 2n * BigInt(ring.size));
      // 2.7.7.2: call if the entry that used_event names is one of the new ones
      due = distance(decided!, usedEvent) < distance(decided!, nextUsed!);
    } else due = (ram.u16(ring.avail) & 1) === 0;
    if (due) this.counters.calls[end]++;
    else this.counters.calls.suppressed++;
    return due;
  }
}

/** How far a free-running 16-bit index went. */
function distance(from: number, to: number): number {
  return (to - from) & 0xffff;
}

function isReceiving({ broken, ring }: Queue): boolean {
  return !broken && ring.enabled;
}

/** The first look at a started ring. */
function begin(ram: ReferenceRam, queue: Queue): void {
  if (queue.nextUsed !== undefined) return;
  queue.nextUsed = queue.decided = ram.u16(queue.ring.used + 2n);
  suppressKicks(ram, queue);
}

function suppressKicks(ram: ReferenceRam, { ring }: Queue): void {
  if (!ring.eventIdx) ram.setU16(ring.used, 1);
}

/** The driver shall kick when it makes the chain with this avail index available. */
function requestKick(ram: ReferenceRam, { ring }: Queue, index: number): void {
  if (ring.eventIdx) ram.setU16(ring.used + 4n + 8n * BigInt(ring.size), index);
  else ram.setU16(ring.used, 0);
}

function availIndex(ram: ReferenceRam, { ring }: Queue): number {
  return ram.u16(ring.avail + 2n);
}

function headAt(ram: ReferenceRam, { ring }: Queue, index: number): number {
  return ram.u16(ring.avail + 4n + 2n * BigInt(index % ring.size));
}

function giveUsed(ram: ReferenceRam, queue: Queue, head: number, written: number): void {
  const entry = queue.ring.used + 4n + 8n * BigInt(queue.nextUsed! % queue.ring.size);
  ram.setU32(entry, head);
  ram.setU32(entry + 4n, written);
  queue.nextUsed = (queue.nextUsed! + 1) & 0xffff;
}

/**
 * The buffers of a chain (2.7.5, 2.7.7): at most as many as the ring has descriptors, all in RAM, all of one direction,
 * at most one indirect table, which ends the ring's part of the chain. Undefined if it breaks a rule.
 */
function readChain(ram: ReferenceRam, ring: Ring, head: number, writable: boolean): Chain | undefined {
  let table = { gpa: ring.desc, entries: ring.size, indirect: false };
  let index = head;
  const chain: Chain = { views: [], length: 0 };
  for (let buffers = 0; buffers < ring.size;) {
    const at = table.gpa + 16n * BigInt(index);
    const views = ram.views(at, 16);
    if (!views) return undefined;
    const bytes = Buffer.concat(views);
    const [gpa, length] = [bytes.readBigUInt64LE(0), bytes.readUInt32LE(8)];
    const [flags, next] = [bytes.readUInt16LE(12), bytes.readUInt16LE(14)];
    const [hasNext, isWritable, isIndirect] = [(flags & 1) !== 0, (flags & 2) !== 0, (flags & 4) !== 0];
    if (isIndirect) {
      if (table.indirect || hasNext || !ring.indirect || length === 0 || length % 16 !== 0) return undefined;
      table = { gpa, entries: length / 16, indirect: true };
      index = 0;
      continue;
    }
    if (isWritable !== writable) return undefined;
    if (length > 0) {
      const buffer = ram.views(gpa, length);
      if (!buffer) return undefined;
      chain.views.push(...buffer);
      chain.length += length;
    }
    if (!hasNext) return chain;
    if (next >= table.entries) return undefined;
    index = next;
    buffers++;
  }
  return undefined;
}

function scatter(views: Uint8Array[], bytes: Uint8Array): void {
  let done = 0;
  for (const view of views) {
    const part = bytes.subarray(done, done + view.length);
    view.set(part);
    done += part.length;
  }
}
