/**
 * A lane without sockets, pollers or threads: the RAM of two guests, a virtqueue at each, a core. One thread drives it.
 *
 * Guest RAM is real: memory files, mapped into segments for the core and into a flat buffer for the driver's view.
 * The segments are made once per process and mapped anew for every rig, so only the newest rig may be polled.
 */
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { mapAnonymous, mapShared } from "../../native/mman.ts";
import { type Core, instantiateCore } from "../../src/datapath/core.ts";
import { Lane, type LaneCounters } from "../../src/datapath/lane.ts";
import { PackedDriver } from "../../src/driver/packed.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import {
  POLL_BROKE_DESTINATION,
  POLL_BROKE_SOURCE,
  POLL_CALL_DESTINATION,
  POLL_CALL_SOURCE,
  POLL_COUNT,
  POLL_WAITING,
  SEGMENTS_MAX,
  VRING_ENABLED,
  VRING_EVENT_IDX,
  VRING_INDIRECT,
  VRING_MERGEABLE,
  VRING_PACKED,
} from "../../src/layout/lane.ts";
import { type Extent, GuestMemory, createSegment } from "../../src/memory/guest-memory.ts";
import type { RunningVring } from "../../src/ports/port.ts";
import { type Access, instantiateHooked } from "./hooked-core.ts";

const PAGE = 4096n;
const FLAT_BYTES = 64 << 20;

/** A virtqueue as both sides agreed on it. */
export interface Ring {
  packed: boolean;
  size: number;
  /** Of a packed one: the descriptor ring, the driver's event area, the device's. */
  desc: bigint;
  avail: bigint;
  used: bigint;
  /** The position to begin at: an avail index, or index | wrap << 15. */
  base: number;
  headerBytes: number;
  /** OFFLOAD_* */
  offloads: number;
  eventIdx: boolean;
  indirect: boolean;
  mergeable: boolean;
  enabled: boolean;
}

export interface EndPlan {
  /** Regions of whole pages, each a memory file of its own. */
  regions: readonly { gpa: bigint; sizeBytes: number }[];
  /** Cuts every region into parts that lie in different segments, each sharing `overlapBytes` with the next. */
  parts?: { sizeBytes: number; overlapBytes: number };
  ring: Ring;
}

/** What one poll reports. */
export interface PollResult {
  taken: number;
  callSource: boolean;
  callDestination: boolean;
  brokeSource: boolean;
  brokeDestination: boolean;
  waiting: boolean;
}

/** Segments the core is built for, or a core whose accesses are all observed. */
export type Variant = 1 | 2 | 5 | "hooked";

export interface RigPlan {
  source: EndPlan;
  /** "source": the lane of a loopback, its other ring lies in the same RAM. */
  destination: EndPlan | { in: "source"; ring: Ring };
  variant?: Variant;
  /** Hooked core: called before each access. */
  observe?: (access: Access) => void;
}

/** Areas of a ring in one piece, as the driver of its format lays them. */
export function ringAt(gpa: bigint, size: number, options: Partial<Ring> = {}): Ring {
  const { packed = false, eventIdx = true } = options;
  const { desc, avail, used } = packed ? PackedDriver.layout(size) : SplitDriver.layout(size, eventIdx);
  const areas = { desc: gpa + BigInt(desc), avail: gpa + BigInt(avail), used: gpa + BigInt(used) };
  const negotiated = { eventIdx, indirect: true, mergeable: true, enabled: true };
  return { packed, size, base: packed ? 0x8000 : 0, headerBytes: 12, offloads: 0, ...areas, ...negotiated, ...options };
}

/** Bytes of its areas. */
export function areaBytes({ packed, size }: Ring): { desc: number; avail: number; used: number } {
  return packed ? { desc: 16 * size, avail: 4, used: 4 } : { desc: 16 * size, avail: 6 + 2 * size, used: 6 + 8 * size };
}

/** A guest's RAM as its driver sees it: regions side by side in one buffer, in the order of the plan. */
export class Ram {
  readonly regions: readonly { gpa: bigint; sizeBytes: number; start: number }[];
  readonly bytes: Uint8Array;
  readonly view: DataView;

  constructor(flat: WebAssembly.Memory, regions: EndPlan["regions"], fds: readonly number[]) {
    let start = 0;
    this.regions = regions.map(({ gpa, sizeBytes }, i) => {
      const range = { memory: flat, offset: BigInt(start), sizeBytes: BigInt(sizeBytes) };
      mapShared(range, fds[i]!, 0n);
      start += sizeBytes;
      return { gpa, sizeBytes, start: start - sizeBytes };
    });
    this.bytes = new Uint8Array(flat.buffer, 0, start);
    this.view = new DataView(flat.buffer, 0, start);
    // A pattern without zeros and of an odd period: a stray byte, or one copied from the wrong place, shows.
    const pattern = Uint8Array.from({ length: 251 * 255 }, (_, i) => (((i % 251) ^ (i / 251)) % 255) + 1);
    for (let at = 0; at < start; at += pattern.length) this.bytes.set(pattern.subarray(0, start - at), at);
  }

  /** Offset of an address in `bytes`. */
  at(gpa: bigint): number {
    const region = this.regions.find((each) => gpa >= each.gpa && gpa < each.gpa + BigInt(each.sizeBytes));
    if (!region) throw new RangeError(`gpa 0x${gpa.toString(16)} is no RAM`);
    return region.start + Number(gpa - region.gpa);
  }

  /** Address of an offset in `bytes`. */
  gpa(offset: number): bigint {
    const region = this.regions.findLast((each) => each.start <= offset);
    if (!region || offset >= region.start + region.sizeBytes) throw new RangeError(`no RAM at offset ${offset}`);
    return region.gpa + BigInt(offset - region.start);
  }

  /** `length` bytes at an address; they may cross adjacent regions. */
  slice(gpa: bigint, length: number): Uint8Array {
    return this.bytes.subarray(this.at(gpa), this.at(gpa) + length);
  }
}

/** One end: what the core is given of a guest, and the guest's own view. */
interface End {
  ram: Ram;
  extents: readonly Extent[];
  segments: readonly WebAssembly.Memory[];
  ring: Ring;
}

export class Rig {
  readonly source: End;
  readonly destination: End;
  readonly #variant: Variant;
  readonly #observe: (access: Access) => void;
  lane: Lane;
  core: Core;

  constructor(plan: RigPlan) {
    const { source, destination, variant = 1, observe = () => undefined } = plan;
    this.#variant = variant;
    this.#observe = observe;
    this.source = slots.source.fill(source);
    this.destination =
      "in" in destination ? { ...this.source, ring: destination.ring } : slots.destination.fill(destination);
    [this.lane, this.core] = this.#createLane();
  }

  /** A new lane on the same guests, as a relay has that was killed and started again. */
  replaceLane(base: { source: number; destination: number }): void {
    [this.lane, this.core] = this.#createLane(base);
  }

  #createLane(base = { source: this.source.ring.base, destination: this.destination.ring.base }): [Lane, Core] {
    const { source, destination } = this;
    const lane = new Lane("test");
    for (const end of ["source", "destination"] as const) {
      lane.setExtents(end, this[end].extents);
      lane.setVring(end, runningVring(this[end], base[end]));
    }
    const core =
      this.#variant === "hooked"
        ? instantiateHooked(lane.memory, source, destination, this.#observe)
        : instantiateCore(lane.memory, pad(source.segments, this.#variant), pad(destination.segments, this.#variant));
    core.refresh();
    return [lane, core];
  }

  /** Starts the virtqueue of an end, or starts it again from `base`. */
  start(end: "source" | "destination", base = this[end].ring.base): void {
    this.lane.setVring(end, runningVring(this[end], base));
  }

  poll(budget = 64, stuck = false): PollResult {
    const result = this.core.poll(budget, stuck ? 1 : 0);
    const has = (bit: number) => (result & bit) !== 0;
    return {
      taken: result & POLL_COUNT,
      callSource: has(POLL_CALL_SOURCE),
      callDestination: has(POLL_CALL_DESTINATION),
      brokeSource: has(POLL_BROKE_SOURCE),
      brokeDestination: has(POLL_BROKE_DESTINATION),
      waiting: has(POLL_WAITING),
    };
  }

  get counters(): LaneCounters {
    return this.lane.counters;
  }
}

/** Where the guest of one end is mapped; the same memories for every rig. */
class Slot {
  readonly #flat = new WebAssembly.Memory({
    initial: BigInt(FLAT_BYTES >> 16),
    maximum: BigInt(FLAT_BYTES >> 16),
    shared: true,
    address: "i64",
  });
  readonly #memory = new GuestMemory();
  readonly #segments = Array.from({ length: SEGMENTS_MAX }, createSegment);
  #mapped: { memory: WebAssembly.Memory; offset: bigint; sizeBytes: bigint }[] = [];

  fill({ regions, parts, ring }: EndPlan): End {
    const fds = regions.map(({ sizeBytes }) => memfdCreate("test", sizeBytes));
    const ram = new Ram(this.#flat, regions, fds);
    for (const range of this.#mapped) mapAnonymous(range);
    this.#mapped = [];
    let extents: readonly Extent[];
    let segments: readonly WebAssembly.Memory[];
    if (parts) {
      segments = this.#segments;
      extents = regions.flatMap(({ gpa, sizeBytes }, i) => this.#scatter(gpa, sizeBytes, parts, fds[i]!));
      extents = extents.toSorted((a, b) => (a.gpa < b.gpa ? -1 : 1));
    } else {
      const region = ({ gpa, sizeBytes }: { gpa: bigint; sizeBytes: number }, i: number) => {
        return { gpa, sizeBytes: BigInt(sizeBytes), mmapOffset: 0n, fd: fds[i]! };
      };
      this.#memory.setRegions(regions.map(region));
      ({ extents, segments } = this.#memory);
    }
    fds.forEach(close);
    return { ram, extents, segments, ring };
  }

  /** The parts of a region, one after the other in the next segment each. */
  #scatter(
    gpa: bigint,
    size: number,
    { sizeBytes, overlapBytes }: { sizeBytes: number; overlapBytes: number },
    fd: number,
  ) {
    const extents: Extent[] = [];
    for (let start = 0; ; start += sizeBytes - overlapBytes) {
      const length = BigInt(Math.min(sizeBytes, size - start));
      const number = this.#mapped.length;
      const segment = number % SEGMENTS_MAX;
      // apart from each other, the last of them at the very end of its segment
      const limit = BigInt(this.#segments[segment]!.buffer.byteLength);
      const offset =
        number % 2 === 0 ? BigInt(number) * 0x100_0000n + PAGE : limit - BigInt(number) * 0x100_0000n - length;
      const range = { memory: this.#segments[segment]!, offset, sizeBytes: length };
      mapShared(range, fd, BigInt(start));
      this.#mapped.push(range);
      extents.push({ gpa: gpa + BigInt(start), sizeBytes: length, segment, offset });
      if (start + Number(length) === size) return extents;
    }
  }
}

const slots = { source: new Slot(), destination: new Slot() };

/** A core for more segments than a guest has gets one of them more than once, as in production. */
function pad(segments: readonly WebAssembly.Memory[], count: number): WebAssembly.Memory[] {
  return Array.from({ length: Math.max(count, segments.length) }, (_, i) => segments[i] ?? segments[0]!);
}

function runningVring({ ring, extents }: End, base: number): RunningVring {
  const { packed, size, headerBytes, offloads, eventIdx, indirect, mergeable, enabled } = ring;
  const bytes = areaBytes(ring);
  const locate = (gpa: bigint, sizeBytes: number) => {
    const extent = extents.find((e) => gpa >= e.gpa && gpa + BigInt(sizeBytes) <= e.gpa + e.sizeBytes);
    if (!extent) throw new RangeError(`ring area at gpa 0x${gpa.toString(16)} is in no extent`);
    return { segment: extent.segment, offset: extent.offset + (gpa - extent.gpa) };
  };
  const flags = [
    [enabled, VRING_ENABLED],
    [eventIdx, VRING_EVENT_IDX],
    [indirect, VRING_INDIRECT],
    [mergeable, VRING_MERGEABLE],
    [packed, VRING_PACKED],
  ] as const;
  return {
    start: Symbol("start"),
    size,
    base,
    desc: locate(ring.desc, bytes.desc),
    avail: locate(ring.avail, bytes.avail),
    used: locate(ring.used, bytes.used),
    headerBytes,
    offloads,
    flags: flags.reduce((sum, [on, flag]) => sum | (on ? flag : 0), 0),
    kick: undefined,
    call: undefined,
    err: undefined,
  };
}
