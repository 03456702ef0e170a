/**
 * A virtqueue in guest memory as the main thread sees it before a lane runs on it.
 *
 * Main thread, within a change of the port: no lane runs. The driver may write at any time, so what is read is copied
 * once and trusted for nothing but what it is.
 */
import { DESC_SIZE, PACKED_DESC_FLAGS } from "../layout/virtio.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import type { Area } from "./port.ts";

/** The bytes of an area. */
export function areaView(memory: GuestMemory, { segment, offset }: Area, sizeBytes: number): DataView {
  const { buffer } = memory.segments[segment] as WebAssembly.Memory;
  return new DataView(buffer, Number(offset), sizeBytes);
}

/** A copy of the flags of every descriptor of a packed ring. */
export function packedFlags(desc: DataView): Uint16Array {
  return Uint16Array.from({ length: desc.byteLength / DESC_SIZE }, (_, slot) =>
    desc.getUint16(slot * DESC_SIZE + PACKED_DESC_FLAGS, true),
  );
}

/** Stores 16 bits where the driver may look at any time: all before it is visible before it. */
export function storeU16(view: DataView, at: number, value: number): void {
  Atomics.store(new Uint16Array(view.buffer, view.byteOffset + at, 1), 0, value);
}
