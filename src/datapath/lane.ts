/**
 * A lane as the control plane sees it: memory 0 of one direction of one queue pair.
 *
 * Main thread only. Everything but the counters is written while the poller has parked the lane.
 */
import { baseAddress, mapAnonymous, mapShared } from "../../native/mman.ts";
import { SystemError } from "../errors.ts";
import {
  COUNTERS,
  COUNT_BATCHES,
  COUNT_BYTES,
  COUNT_CALLS_DESTINATION,
  COUNT_CALLS_SOURCE,
  COUNT_CALLS_SUPPRESSED,
  COUNT_DROP_BAD_FRAME,
  COUNT_DROP_DISABLED,
  COUNT_DROP_MALFORMED,
  COUNT_DROP_NO_BUFFER,
  COUNT_DROP_NO_RECEIVER,
  COUNT_DROP_TOO_SMALL,
  COUNT_KICKS,
  COUNT_MALFORMED,
  COUNT_PACKETS,
  COUNT_WAITS,
  DESTINATION_EXTENTS,
  DESTINATION_INFLIGHT,
  DESTINATION_VRING,
  EXTENTS_FIRST,
  EXTENTS_MAX,
  EXTENT_BYTES,
  EXTENT_GPA,
  EXTENT_OFFSET,
  EXTENT_SEGMENT,
  EXTENT_SIZE,
  INFLIGHT_PAGE_BYTES,
  SOURCE_EXTENTS,
  SOURCE_INFLIGHT,
  SOURCE_VRING,
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_BROKEN,
  VRING_BYTES,
  VRING_DESC,
  VRING_DESC_SEGMENT,
  VRING_FILE,
  VRING_FLAGS,
  VRING_FRESH,
  VRING_HEADER_SIZE,
  VRING_INFLIGHT,
  VRING_NEXT_AVAIL,
  VRING_OFFLOADS,
  VRING_READY,
  VRING_SEGMENTS_SENT,
  VRING_SINK,
  VRING_SIZE,
  VRING_USED,
  VRING_USED_SEGMENT,
  VRING_WAITING,
} from "../layout/lane.ts";
import {
  HELD_END,
  HELD_NEXT,
  MEMORY_BASES,
  READS_LARGE,
  READS_NEXT,
  READS_SINCE,
  READ_BYTES_MAX,
} from "../layout/requests.ts";
import { NET_HDR_SIZE } from "../layout/virtio.ts";
import type { Extent } from "../memory/guest-memory.ts";
import type { InflightPlace, RunningVring } from "../ports/port.ts";
import { createLaneMemory } from "./core.ts";

/** Counters of one lane since it exists. Drops: transmit chains that were consumed and whose frame went nowhere. */
export interface LaneCounters {
  packets: number;
  bytes: number;
  batches: number;
  /** Wake-ups of the poller by a kick of either driver. */
  kicks: number;
  /** Calls to the sender's driver (transmit completions) and to the receiver's. */
  calls: { source: number; destination: number; suppressed: number };
  /** Times the lane began to wait for receive buffers. */
  waits: number;
  /** Receive chains that broke a rule and were returned with length 0. */
  malformedBuffers: number;
  drops: {
    noReceiver: number;
    noBuffer: number;
    tooSmall: number;
    malformed: number;
    badFrame: number;
    disabled: number;
  };
}

type End = "source" | "destination";
const VRING_AT = { source: SOURCE_VRING, destination: DESTINATION_VRING };
const EXTENTS_AT = { source: SOURCE_EXTENTS, destination: DESTINATION_EXTENTS };
const INFLIGHT_AT = { source: SOURCE_INFLIGHT, destination: DESTINATION_INFLIGHT };

export class Lane {
  readonly name: string;
  readonly memory = createLaneMemory();
  readonly #view = new DataView(this.memory.buffer);
  readonly #counters = new BigUint64Array(this.memory.buffer, COUNTERS);
  /** Which start of a virtqueue memory 0 reflects: a later start begins anew, an update keeps the core's indexes. */
  readonly #starts: Record<End, RunningVring["start"] | undefined> = { source: undefined, destination: undefined };
  /** What memory 0 has; a change of a guest's memory makes a new list. */
  readonly #extents: Record<End, readonly Extent[] | undefined> = { source: undefined, destination: undefined };

  /** What is mapped over the pages for inflight headers. */
  readonly #inflights: Record<End, InflightPlace | undefined> = { source: undefined, destination: undefined };
  /** Of a follower: its own receiveq, which is not in memory 0. */
  #displaced: { state: Uint8Array; inflight: InflightPlace | undefined } | undefined;

  constructor(name: string) {
    this.name = name;
  }

  /** Writes a virtqueue's state; undefined: it is not running. */
  setVring(end: End, vring: RunningVring | undefined): void {
    const at = VRING_AT[end];
    const view = this.#view;
    this.#setInflight(end, vring?.inflight);
    view.setUint32(DESTINATION_VRING + VRING_WAITING, 0, true); // buffers are looked for anew
    if (!vring) {
      this.#starts[end] = undefined;
      view.setUint32(at + VRING_FLAGS, 0, true);
      return;
    }
    const restarted = this.#starts[end] !== vring.start;
    const kept = restarted ? VRING_FRESH : view.getUint32(at + VRING_FLAGS, true) & (VRING_FRESH | VRING_BROKEN);
    if (restarted) {
      this.#starts[end] = vring.start;
      view.setUint32(at + VRING_NEXT_AVAIL, vring.base, true);
      view.setUint32(at + VRING_SEGMENTS_SENT, 0, true);
      for (const word of [READS_NEXT, READS_SINCE, READS_LARGE, HELD_NEXT, HELD_END]) view.setUint32(word, 0, true);
    }
    view.setUint32(at + VRING_SIZE, vring.size, true);
    view.setUint32(at + VRING_HEADER_SIZE, vring.headerBytes, true);
    view.setUint32(at + VRING_OFFLOADS, vring.offloads ?? 0, true);
    const areas = [
      [VRING_DESC_SEGMENT, VRING_DESC, vring.desc],
      [VRING_AVAIL_SEGMENT, VRING_AVAIL, vring.avail],
      [VRING_USED_SEGMENT, VRING_USED, vring.used],
    ] as const;
    for (const [segmentAt, offsetAt, { segment, offset }] of areas) {
      view.setUint32(at + segmentAt, segment, true);
      view.setBigUint64(at + offsetAt, offset, true);
    }
    view.setUint32(at + VRING_FLAGS, VRING_READY | vring.flags | kept, true);
  }

  /** Maps the page that holds the header; without one, what was mapped there is gone. */
  #setInflight(end: End, inflight: InflightPlace | undefined): void {
    const had = this.#inflights[end];
    if (had?.fd === inflight?.fd && had?.offset === inflight?.offset) return;
    this.#inflights[end] = inflight;
    const page = { memory: this.memory, offset: BigInt(INFLIGHT_AT[end]), sizeBytes: BigInt(INFLIGHT_PAGE_BYTES) };
    const into = (inflight?.offset ?? 0n) % page.sizeBytes;
    let header = 0;
    try {
      if (inflight) mapShared(page, inflight.fd, inflight.offset - into);
      else mapAnonymous(page);
      header = inflight ? INFLIGHT_AT[end] + Number(into) : 0;
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      // Its owner has made it unmappable since it was checked: then nobody keeps its used index, and no change may fail for it.
      mapAnonymous(page);
    }
    this.#view.setUint32(VRING_AT[end] + VRING_INFLIGHT, header, true);
  }

  /** Makes room in memory 0 for the state of another lane's receiveq: that of its own is put aside. */
  follow(leader: Lane): void {
    this.#displaced = { state: this.#receiveq.slice(), inflight: this.#inflights.destination };
    this.#setInflight("destination", leader.#inflights.destination);
  }

  /** Its own receiveq is in memory 0 again, as it was left. */
  unfollow(): void {
    if (!this.#displaced) return;
    const { state, inflight } = this.#displaced;
    this.#displaced = undefined;
    this.#setInflight("destination", inflight);
    this.#receiveq.set(state);
  }

  get #receiveq(): Uint8Array {
    return new Uint8Array(this.memory.buffer, DESTINATION_VRING, VRING_BYTES);
  }

  /** There is no virtqueue at this end: every frame is taken and forgotten. */
  setSink(): void {
    this.#view.setUint32(DESTINATION_VRING + VRING_FLAGS, VRING_SINK, true);
  }

  /** There is no virtqueue at this end but a file. */
  setFile(end: End): void {
    this.#view.setUint32(VRING_AT[end] + VRING_FLAGS, VRING_FILE, true);
  }

  /** The largest frame that the file gives: bytes, without a net header. */
  setFileFrames(bytes: number): void {
    this.#view.setUint32(READ_BYTES_MAX, NET_HDR_SIZE + bytes, true);
  }

  /** Where the guest's segments lie in this process: for requests to the kernel. */
  setBases(segments: readonly WebAssembly.Memory[]): void {
    for (const [i, memory] of [this.memory, ...segments].entries()) {
      this.#view.setBigUint64(MEMORY_BASES + 8 * i, baseAddress(memory), true);
    }
  }

  /** Whether the core stopped the virtqueue because its driver broke the format. */
  isBroken(end: End): boolean {
    return (this.#view.getUint32(VRING_AT[end] + VRING_FLAGS, true) & VRING_BROKEN) !== 0;
  }

  /** The next avail index the core would take: all before it are completed. */
  nextAvail(end: End): number {
    return this.#view.getUint32(VRING_AT[end] + VRING_NEXT_AVAIL, true);
  }

  setExtents(end: End, extents: readonly Extent[]): void {
    if (extents.length > EXTENTS_MAX) throw new RangeError(`${extents.length} extents`);
    if (extents === this.#extents[end]) return;
    this.#extents[end] = extents;
    const at = EXTENTS_AT[end];
    this.#view.setUint32(at, extents.length, true);
    for (const [i, extent] of extents.entries()) {
      const entry = at + EXTENTS_FIRST + i * EXTENT_BYTES;
      this.#view.setBigUint64(entry + EXTENT_GPA, extent.gpa, true);
      this.#view.setBigUint64(entry + EXTENT_SIZE, extent.sizeBytes, true);
      this.#view.setBigUint64(entry + EXTENT_OFFSET, extent.offset, true);
      this.#view.setUint32(entry + EXTENT_SEGMENT, extent.segment, true);
    }
  }

  get counters(): LaneCounters {
    const read = (counter: number) => Number(Atomics.load(this.#counters, counter / 8));
    return {
      packets: read(COUNT_PACKETS),
      bytes: read(COUNT_BYTES),
      batches: read(COUNT_BATCHES),
      kicks: read(COUNT_KICKS),
      calls: {
        source: read(COUNT_CALLS_SOURCE),
        destination: read(COUNT_CALLS_DESTINATION),
        suppressed: read(COUNT_CALLS_SUPPRESSED),
      },
      waits: read(COUNT_WAITS),
      malformedBuffers: read(COUNT_MALFORMED),
      drops: {
        noReceiver: read(COUNT_DROP_NO_RECEIVER),
        noBuffer: read(COUNT_DROP_NO_BUFFER),
        tooSmall: read(COUNT_DROP_TOO_SMALL),
        malformed: read(COUNT_DROP_MALFORMED),
        badFrame: read(COUNT_DROP_BAD_FRAME),
        disabled: read(COUNT_DROP_DISABLED),
      },
    };
  }
}
