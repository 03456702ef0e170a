/**
 * The split virtqueue, device side (virtio 1.3, 2.7): take available chains, give used ones.
 *
 * Memory order: the driver's avail index is loaded sequentially consistently before the entries it covers are read; used entries are
 * plain stores before the one sequentially consistent store of the used index per batch.
 */
import { AVAIL_ENTRY_SIZE, AVAIL_IDX, AVAIL_RING, USED_ENTRY_SIZE, USED_IDX, USED_RING } from "../src/layout/virtio.ts";
import {
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_BROKEN,
  VRING_FLAGS,
  VRING_FRESH,
  VRING_NEXT_AVAIL,
  VRING_NEXT_USED,
  VRING_READY,
  VRING_SIGNALLED,
  VRING_SIZE,
  VRING_USED,
  VRING_USED_SEGMENT,
} from "../src/layout/lane.ts";
import { atomicLoad16, atomicStore16, end, load16, store64 } from "./guest";
import { suppressKicks } from "./notify";
import { vringOf } from "./vring";

/** Whether the ring may be touched. A ring that was just started gets its used index from guest memory first. */
export function isRunning<E>(): bool {
  const vring = vringOf<E>();
  const flags = load<u32>(vring, VRING_FLAGS);
  if ((flags & (VRING_READY | VRING_BROKEN)) != VRING_READY) return false;
  if (flags & VRING_FRESH) {
    const segment = load<u32>(vring, VRING_USED_SEGMENT);
    const used = atomicLoad16(end<E>(), segment, load<u64>(vring, VRING_USED) + USED_IDX);
    store<u32>(vring, used, VRING_NEXT_USED);
    store<u32>(vring, used, VRING_SIGNALLED);
    store<u32>(vring, flags & ~VRING_FRESH, VRING_FLAGS);
    suppressKicks<E>();
  }
  return true;
}

/** Stops the ring for good: its driver broke the format. Only a new start mends it. */
export function breakRing<E>(): void {
  const vring = vringOf<E>();
  store<u32>(vring, load<u32>(vring, VRING_FLAGS) | VRING_BROKEN, VRING_FLAGS);
}

/** The driver's avail index, 0..65535. */
export function loadAvailIndex<E>(): u32 {
  const vring = vringOf<E>();
  return atomicLoad16(end<E>(), load<u32>(vring, VRING_AVAIL_SEGMENT), load<u64>(vring, VRING_AVAIL) + AVAIL_IDX);
}

/** The head that the driver put at an avail index; the caller checks that it is below the ring size. */
export function loadHead<E>(index: u32): u32 {
  const vring = vringOf<E>();
  const slot = <u64>(index & (load<u32>(vring, VRING_SIZE) - 1));
  const entry = load<u64>(vring, VRING_AVAIL) + AVAIL_RING + slot * AVAIL_ENTRY_SIZE;
  return load16(end<E>(), load<u32>(vring, VRING_AVAIL_SEGMENT), entry);
}

/** The next avail index that will be taken. */
export function nextAvail<E>(): u32 {
  return load<u32>(vringOf<E>(), VRING_NEXT_AVAIL);
}

export function setNextAvail<E>(index: u32): void {
  store<u32>(vringOf<E>(), index & 0xffff, VRING_NEXT_AVAIL);
}

/** Writes a used entry; the driver sees it after publishUsed(). @param written bytes written to the chain */
export function giveUsed<E>(head: u32, written: u32): void {
  const vring = vringOf<E>();
  const index = load<u32>(vring, VRING_NEXT_USED);
  const slot = <u64>(index & (load<u32>(vring, VRING_SIZE) - 1));
  const entry = load<u64>(vring, VRING_USED) + USED_RING + slot * USED_ENTRY_SIZE;
  store64(end<E>(), load<u32>(vring, VRING_USED_SEGMENT), entry, <u64>head | ((<u64>written) << 32));
  store<u32>(vring, (index + 1) & 0xffff, VRING_NEXT_USED);
}

/** Makes all used entries so far visible. */
export function publishUsed<E>(): void {
  const vring = vringOf<E>();
  atomicStore16(
    end<E>(),
    load<u32>(vring, VRING_USED_SEGMENT),
    load<u64>(vring, VRING_USED) + USED_IDX,
    load<u32>(vring, VRING_NEXT_USED),
  );
}
