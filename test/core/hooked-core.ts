/**
 * The hooked core: the accessors of assembly/guest.ts as JS functions over the same segments. Every guest access is
 * announced before it happens, so that an observer may change guest memory first, and is refused outside the extents.
 */
import type { Core } from "../../src/datapath/core.ts";
import { loadModule } from "../../src/datapath/core.ts";
import { SEGMENTS_MAX } from "../../src/layout/lane.ts";
import type { Extent } from "../../src/memory/guest-memory.ts";

export interface Access {
  kind: "load" | "store" | "copy";
  /** Declared atomic: a ring index, flags or event word. */
  atomic: boolean;
  /** Of a copy: the end it writes to; `from` is what it reads. */
  end: "source" | "destination";
  gpa: bigint;
  bytes: number;
  /** What is stored. */
  value?: bigint;
  /** Of a copy: the source guest's address. */
  from?: bigint;
}

/** What the core may never do, whatever a guest writes. */
export class StrayAccess extends Error {}

interface Guest {
  extents: readonly Extent[];
  segments: readonly WebAssembly.Memory[];
}

export function instantiateHooked(
  memory: WebAssembly.Memory,
  source: Guest,
  destination: Guest,
  observe: (access: Access) => void,
): Core {
  const names = ["source", "destination"] as const;
  const guests = [source, destination];
  const views = guests.map(({ segments }) => segments.map((segment) => new DataView(segment.buffer)));

  /** The guest physical address of an access, all of which must lie in one extent. */
  const gpaOf = (end: number, segment: number, offset: bigint, bytes: number): bigint => {
    const start = BigInt.asUintN(64, offset);
    const extent = guests[end]!.extents.find(
      (e) => e.segment === segment && start >= e.offset && start + BigInt(bytes) <= e.offset + e.sizeBytes,
    );
    if (!extent) throw new StrayAccess(`${names[end]}, segment ${segment}, offset ${start}, ${bytes} bytes`);
    return extent.gpa + (start - extent.offset);
  };

  const load = (bits: 8 | 16 | 32 | 64, atomic = false) => {
    return (end: number, segment: number, offset: bigint) => {
      observe({ kind: "load", atomic, end: names[end]!, gpa: gpaOf(end, segment, offset, bits / 8), bytes: bits / 8 });
      const view = views[end]![segment]!;
      const at = Number(offset);
      if (atomic && at % (bits / 8) !== 0) throw new StrayAccess(`misaligned atomic load at ${at}`);
      if (bits === 8) return view.getUint8(at);
      if (bits === 16) return view.getUint16(at, true);
      return bits === 32 ? view.getUint32(at, true) : view.getBigUint64(at, true);
    };
  };
  const store = (bits: 8 | 16 | 32 | 64, atomic = false) => {
    return (end: number, segment: number, offset: bigint, word: number | bigint) => {
      const gpa = gpaOf(end, segment, offset, bits / 8);
      const value = BigInt.asUintN(bits, BigInt(word));
      observe({ kind: "store", atomic, end: names[end]!, gpa, bytes: bits / 8, value });
      const view = views[end]![segment]!;
      const at = Number(offset);
      if (atomic && at % (bits / 8) !== 0) throw new StrayAccess(`misaligned atomic store at ${at}`);
      if (bits === 8) view.setUint8(at, Number(value));
      else if (bits === 16) view.setUint16(at, Number(value), true);
      else if (bits === 32) view.setUint32(at, Number(value), true);
      else view.setBigUint64(at, value, true);
    };
  };
  const copy = (toSegment: number, to: bigint, fromSegment: number, from: bigint, length: number) => {
    const bytes = length >>> 0;
    const gpa = gpaOf(1, toSegment, to, bytes);
    observe({ kind: "copy", atomic: false, end: "destination", gpa, bytes, from: gpaOf(0, fromSegment, from, bytes) });
    const target = new Uint8Array(destination.segments[toSegment]!.buffer, Number(to), bytes);
    target.set(new Uint8Array(source.segments[fromSegment]!.buffer, Number(from), bytes));
  };
  const guest = {
    atomicLoad16: load(16, true),
    atomicLoad64: load(64, true),
    atomicStore16: store(16, true),
    atomicStore64: store(64, true),
    load8: load(8),
    load16: load(16),
    load32: load(32),
    load64: load(64),
    store8: store(8),
    store16: store(16),
    store32: store(32),
    store64: store(64),
    copy,
    segmentsPerEnd: SEGMENTS_MAX,
  };
  return new WebAssembly.Instance(loadModule("core-hooked"), { env: { memory }, guest }).exports as unknown as Core;
}
