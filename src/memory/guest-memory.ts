/**
 * A guest's memory inside WebAssembly: regions received as fds, mapped over segments.
 *
 * Owned by the main thread; changed only while every lane that imports the segments is parked. A segment is a shared
 * memory64 of 16 GiB. It is created at full size before anything is mapped, never grows after (growing re-protects
 * mapped pages), and lives as long as its port: a collected memory would take the mappings with it.
 */
import { fstatSync } from "node:fs";
import { constants } from "node:os";
import { baseAddress, checkMappable, mapAnonymous, mapShared } from "../../native/mman.ts";
import { ProtocolError, SystemError } from "../errors.ts";
import { EXTENTS_MAX, SEGMENTS_MAX, SEGMENT_PAGES } from "../layout/lane.ts";
import { type Place, SEGMENT_BYTES, place, roundUp } from "./placement.ts";

/**
 * A piece of guest memory: [gpa, gpa + sizeBytes) is [mmapOffset, mmapOffset + sizeBytes) of the file `fd`. The session
 * has checked that the file is memory, that it is that long, and that regions do not overlap (src/vhost-user/memory-table.ts).
 */
export interface FileRegion {
  gpa: bigint;
  sizeBytes: bigint;
  mmapOffset: bigint;
  /** Valid until setRegions or addRegion returns. */
  fd: number;
}

/** A guest physical range that is contiguous in one segment. Those of a large region overlap. */
export interface Extent {
  gpa: bigint;
  sizeBytes: bigint;
  segment: number;
  offset: bigint;
}

interface MappedRegion {
  gpa: bigint;
  sizeBytes: bigint;
  /** Device, inode and offset: by this a region is recognised when the front-end sends it again. */
  file: string;
  /** Bytes mapped in front of the region, for the file offset must be a multiple of the page size. */
  lead: bigint;
  places: Place[];
}

interface InspectedRegion {
  region: FileRegion;
  file: string;
  pageBytes: bigint;
}

export class GuestMemory {
  readonly #all: WebAssembly.Memory[] = [createSegment()];
  #regions: MappedRegion[] = [];
  #extents: Extent[] = [];

  /** The segments that hold anything, at least one. */
  get segments(): readonly WebAssembly.Memory[] {
    const last = this.#extents.reduce((highest, { segment }) => Math.max(highest, segment), 0);
    return this.#all.slice(0, last + 1);
  }

  /** Where every guest physical address lies, sorted by gpa. */
  get extents(): readonly Extent[] {
    return this.#extents;
  }

  /**
   * Maps exactly these regions; those that are mapped already stay as they are.
   * @throws ProtocolError if one cannot be mapped; then nothing has changed, or (`drop`) all memory is gone, where the
   *   kernel refuses what it allowed a moment ago
   */
  setRegions(regions: readonly FileRegion[]): void {
    const wanted = regions.map((region) => ({ region, ...inspect(region) }));
    const known = wanted.map(({ region, file }) =>
      this.#regions.find((r) => r.gpa === region.gpa && r.sizeBytes === region.sizeBytes && r.file === file),
    );
    const taken = known.flatMap((r) => r?.places ?? []);
    const mapped = wanted.map((each, i) => {
      if (known[i]) return known[i];
      const target = this.#plan(each, taken);
      taken.push(...target.places);
      return target;
    });
    checkExtents(taken);

    this.#orClear(() => {
      for (const old of this.#regions) if (!mapped.includes(old)) this.#unmap(old);
      for (const [i, { region }] of wanted.entries()) {
        if (!known[i]) this.#map(region, mapped[i] as MappedRegion);
      }
      this.#setMapped(mapped);
    });
  }

  /** Maps one region more, and touches no other. @throws ProtocolError as setRegions does */
  addRegion(region: FileRegion): void {
    const taken = this.#regions.flatMap(({ places }) => places);
    const target = this.#plan({ region, ...inspect(region) }, taken);
    checkExtents([...taken, ...target.places]);
    this.#orClear(() => {
      this.#map(region, target);
      this.#setMapped([...this.#regions, target]);
    });
  }

  /** Unmaps the region at this gpa, and touches no other. @throws ProtocolError (drop) if the kernel refuses; then all memory is gone */
  removeRegion(gpa: bigint): void {
    this.#orClear(() => {
      for (const region of this.#regions) if (region.gpa === gpa) this.#unmap(region);
      this.#setMapped(this.#regions.filter((region) => region.gpa !== gpa));
    });
  }

  /**
   * Gives all memory back; the segments stay, inert. Each is laid over whole, which splits no mapping: the kernel refuses
   * that to a process that has too many. Where it refuses this too, what is still mapped is in no extent, and goes next time.
   */
  clear(): void {
    this.#setMapped([]);
    for (const memory of this.#all) mapAnonymous({ memory, offset: 0n, sizeBytes: SEGMENT_BYTES });
  }

  /** Where a whole guest physical range lies in one piece, or undefined. */
  locate(gpa: bigint, sizeBytes: bigint): { segment: number; offset: bigint } | undefined {
    // Of overlapping extents the last that starts at or below the address reaches furthest.
    const extent = this.#extents.findLast((e) => e.gpa <= gpa);
    if (!extent || gpa + sizeBytes > extent.gpa + extent.sizeBytes) return undefined;
    return { segment: extent.segment, offset: extent.offset + (gpa - extent.gpa) };
  }

  #plan({ region, file, pageBytes }: InspectedRegion, taken: readonly Place[]): MappedRegion {
    const { gpa, sizeBytes, mmapOffset } = region;
    const lead = mmapOffset % pageBytes;
    return {
      gpa,
      sizeBytes,
      file,
      lead,
      places: this.#findRoom(region, roundUp(lead + sizeBytes, pageBytes), pageBytes, taken),
    };
  }

  #map({ fd, mmapOffset }: FileRegion, { lead, places }: MappedRegion): void {
    for (const { segment, offset, sizeBytes, start } of places) {
      mapShared({ memory: this.#segment(segment), offset, sizeBytes }, fd, mmapOffset - lead + start);
    }
  }

  /** Makes a change that the kernel should allow; if it does not, all memory goes and the front-end with it. */
  #orClear(change: () => void): void {
    try {
      try {
        change();
      } catch (error) {
        this.clear();
        throw error;
      }
    } catch (error) {
      throw error instanceof SystemError ? new ProtocolError(error.message, "drop") : error;
    }
  }

  #findRoom(region: FileRegion, sizeBytes: bigint, pageBytes: bigint, taken: readonly Place[]): Place[] {
    const what = `memory region at gpa 0x${region.gpa.toString(16)}, ${region.sizeBytes} bytes`;
    const places = place(sizeBytes, pageBytes, taken, (segment) => baseAddress(this.#segment(segment)));
    if (!places) throw new ProtocolError(`${what}: no room left; a guest has ${SEGMENTS_MAX} segments of 16 GiB`);
    try {
      checkMappable(region.fd, region.mmapOffset - (region.mmapOffset % pageBytes), sizeBytes);
    } catch (error) {
      if (error instanceof SystemError) throw new ProtocolError(`${what}: ${error.message}`);
      throw error;
    }
    return places;
  }

  #segment(index: number): WebAssembly.Memory {
    for (let i = this.#all.length; i <= index; i++) this.#all.push(createSegment());
    return this.#all[index] as WebAssembly.Memory;
  }

  #unmap(region: MappedRegion): void {
    for (const { segment, offset, sizeBytes } of region.places)
      mapAnonymous({ memory: this.#segment(segment), offset, sizeBytes });
  }

  #setMapped(regions: MappedRegion[]): void {
    this.#regions = regions;
    this.#extents = regions.flatMap(extentsOf).toSorted((a, b) => (a.gpa < b.gpa ? -1 : 1));
  }
}

/** Full size at once, in two steps: Node 26 runs a whole garbage collection for a memory that starts large. */
export function createSegment(): WebAssembly.Memory {
  const pages = BigInt(SEGMENT_PAGES);
  try {
    const memory = new WebAssembly.Memory({ initial: 1n, maximum: pages, shared: true, address: "i64" });
    memory.grow(pages - 1n);
    return memory;
  } catch {
    const what = "reserving 16 GiB of address space; is it limited (ulimit -v)?";
    throw new SystemError("mmap", constants.errno.ENOMEM, "ENOMEM", what);
  }
}

/** The exact bytes of a region: what is mapped around them, for the sake of whole pages, is nobody's memory. */
function extentsOf({ gpa, sizeBytes, lead, places }: MappedRegion): Extent[] {
  return places.map(({ segment, offset, sizeBytes: placed, start }) => {
    const skip = start === 0n ? lead : 0n;
    const first = gpa - lead + start + skip;
    const end = gpa - lead + start + placed;
    const last = end < gpa + sizeBytes ? end : gpa + sizeBytes;
    return { gpa: first, sizeBytes: last - first, segment, offset: offset + skip };
  });
}

/** Every place is an extent in memory 0 of each lane, which has room for so many. */
function checkExtents(places: readonly Place[]): void {
  if (places.length <= EXTENTS_MAX) return;
  throw new ProtocolError(`memory in ${places.length} pieces, the limit is ${EXTENTS_MAX}; use fewer, larger regions`);
}

function inspect({ fd, mmapOffset }: FileRegion): { file: string; pageBytes: bigint } {
  const { dev, ino, blksize } = fstatSync(fd, { bigint: true });
  return { file: `${dev}:${ino}:${mmapOffset}`, pageBytes: blksize };
}
