/**
 * What a lane must do, slow and plain: the device of virtio 1.3 (2.7 split and 2.8 packed virtqueues, 5.1.6 network
 * frames) joined to another, and the rules of our own that assembly/ states: which frames are refused, who waits, who is
 * called. How a ring of either format works is in reference-split.ts and reference-packed.ts.
 *
 * It works on copies of both guests' RAM and applies to them what the device may write; after a poll real RAM must be
 * equal to its copy, byte for byte. It shares no code with the core, and no state. It knows no limit of work for one
 * poll: that is reached by rings of tens of thousands of descriptors only, and has work.test.ts.
 */
import { ReferencePacked } from "./reference-packed.ts";
import type { Chain, Offered, ReferenceQueue } from "./reference-queue.ts";
import type { ReferenceRam } from "./reference-ram.ts";
import { ReferenceSplit } from "./reference-split.ts";
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

function startQueue(ring: Ring, end: "source" | "destination", base = ring.base): ReferenceQueue {
  const Queue = ring.packed ? ReferencePacked : ReferenceSplit;
  return new Queue(ring, end === "destination", base);
}

export class ReferenceLane {
  source: ReferenceQueue;
  destination: ReferenceQueue;
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
  /** Position in the receiveq of the chain that was missing for the next frame. */
  #waitingAt: number | undefined;

  constructor(source: Ring, destination: Ring) {
    this.source = startQueue(source, "source");
    this.destination = startQueue(destination, "destination");
  }

  /** A stopped virtqueue is started again; whatever was waited for is looked at anew. */
  restart(end: "source" | "destination", base: number): void {
    this[end] = startQueue(this[end].ring, end, base);
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
    source.begin(from);
    if (!destination.broken) destination.begin(to);

    const asleep = this.#waitingAt !== undefined && !stuck && isReceiving(destination);
    if (asleep && !destination.hasChain(to, this.#waitingAt!)) return { ...result, waiting: true };
    if (source.isOverrun(from)) {
      source.broken = true;
      return { ...result, brokeSource: true };
    }

    const framesBefore = this.frames.length;
    while (result.taken < budget) {
      const offered = source.look(from, source.next);
      if (offered === "none") break;
      if (offered === "broken") {
        source.broken = result.brokeSource = true;
        break;
      }
      const fate = this.#carry(to, offered, result);
      // Buffers came back: what waits from now on waits anew.
      if (fate === "wait" && (!stuck || this.frames.length > framesBefore)) break;
      if (fate === "wait") this.counters.drops.noBuffer++;
      else if (fate !== "delivered") {
        this.counters.drops[fate]++;
        if (!stuck) this.#waitingAt = undefined;
      }
      offered.giveBack(0);
      result.taken++;
    }

    source.publish(from);
    const delivered = this.frames.slice(framesBefore);
    this.counters.packets += delivered.length;
    this.counters.bytes += delivered.reduce((sum, frame) => sum + frame.length, 0);
    if (delivered.length > 0) this.counters.batches++;
    if (!destination.broken || result.brokeDestination) {
      destination.publish(to);
      result.callDestination = this.#decideCall(to, "destination");
    }
    result.callSource = this.#decideCall(from, "source");
    result.waiting = this.#waitingAt !== undefined && !(stuck && delivered.length > 0);
    return result;
  }

  /** Before blocking: a kick is wanted for what the lane waits for. @returns whether there is work already */
  arm(from: ReferenceRam, to: ReferenceRam, stuck: boolean): boolean {
    const { source, destination } = this;
    if (source.broken) return false;
    source.begin(from);
    if (this.#waitingAt !== undefined && !stuck && isReceiving(destination)) {
      destination.requestKick(to, this.#waitingAt);
      return destination.hasChain(to, this.#waitingAt);
    }
    source.requestKick(from, source.next);
    return source.hasChain(from, source.next);
  }

  /** Polling again: no kicks. */
  disarm(from: ReferenceRam, to: ReferenceRam): void {
    for (const [ram, queue] of [
      [from, this.source],
      [to, this.destination],
    ] as const) {
      if (queue.broken) continue;
      queue.begin(ram);
      queue.suppressKicks(ram);
    }
  }

  /** Takes one frame to where it belongs. */
  #carry(to: ReferenceRam, { chain }: Offered, result: PollResult): "delivered" | "wait" | Drop {
    const { ring } = this.source;
    if (!ring.enabled) return "disabled";
    if (!chain) return "malformed";
    const length = chain.length - ring.headerBytes;
    if (length < FRAME_BYTES.min || length > FRAME_BYTES.max) return "badFrame";
    const bytes = Buffer.concat(chain.views);
    // NEEDS_CSUM, gso_type; other flags are ignored (5.1.6.2.2)
    if ((bytes[0]! & 1) !== 0 || bytes[1] !== 0) return "badFrame";
    const frame = Uint8Array.from(bytes.subarray(ring.headerBytes));
    if (!isReceiving(this.destination)) return "noReceiver";
    const fate = this.#deliver(to, frame);
    if (fate === "broken") {
      this.destination.broken = result.brokeDestination = true;
      this.#waitingAt = undefined;
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
    let taken: (Offered & { chain: Chain })[] = [];
    let room = 0;
    let position = queue.next;

    while (room < needed) {
      const offered = queue.look(ram, position);
      if (offered === "broken") return offered;
      if (offered === "none") {
        if (taken.reduce((sum, { slots }) => sum + slots, 0) === ring.size) return "tooSmall";
        if (this.#waitingAt === undefined) this.counters.waits++;
        this.#waitingAt = position;
        return "wait";
      }
      const { chain } = offered;
      position = offered.next;
      if (chain && chain.length > 0 && chain.length < 2 ** 32) {
        if (!ring.mergeable && chain.length < needed) return "tooSmall";
        taken.push({ ...offered, chain });
        room += chain.length;
        continue;
      }
      // Entries of one frame must be neighbours in the used ring, so what was taken before this one goes back too.
      for (const each of [...taken, offered]) each.giveBack(0);
      taken = [];
      room = 0;
      this.counters.malformedBuffers++;
    }

    const header = new Uint8Array(ring.headerBytes);
    if (ring.headerBytes === 12) new DataView(header.buffer).setUint16(10, taken.length, true);
    const bytes = Buffer.concat([header, frame]);
    let done = 0;
    for (const { chain, giveBack } of taken) {
      const part = bytes.subarray(done, done + chain.length);
      done += part.length;
      scatter(chain.views, part);
      giveBack(part.length);
    }
    this.#waitingAt = undefined;
    return "delivered";
  }

  /** After what was used is visible: whether the driver wants to hear of it. */
  #decideCall(ram: ReferenceRam, end: "source" | "destination"): boolean {
    const due = this[end].decideCall(ram);
    if (due === undefined) return false;
    if (due) this.counters.calls[end]++;
    else this.counters.calls.suppressed++;
    return due;
  }
}

function isReceiving({ broken, ring }: ReferenceQueue): boolean {
  return !broken && ring.enabled;
}

function scatter(views: Uint8Array[], bytes: Uint8Array): void {
  let done = 0;
  for (const view of views) {
    const part = bytes.subarray(done, done + view.length);
    view.set(part);
    done += part.length;
  }
}
