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
  const words = wordsOf(desc);
  const flags = new Uint16Array(desc.byteLength / DESC_SIZE);
  for (let slot = 0; slot < flags.length; slot++) flags[slot] = words[flagsWord(slot)] as number;
  return flags;
}

/** The 16-bit words of an area. Store with Atomics where the driver may look: all before it is visible before it. */
export function wordsOf(area: DataView): Uint16Array {
  return new Uint16Array(area.buffer, area.byteOffset, area.byteLength >> 1);
}

/** Which of the words of a packed ring has the flags of a slot. */
export function flagsWord(slot: number): number {
  return (slot * DESC_SIZE + PACKED_DESC_FLAGS) >> 1;
}
