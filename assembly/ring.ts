/**
 * A virtqueue of either format. Chains are taken, and given back, in the order in which the driver made them available, at
 * positions (src/layout/lane.ts); so VIRTIO_F_IN_ORDER asks for nothing that is not done anyway.
 */
import {
  VRING_BROKEN,
  VRING_FLAGS,
  VRING_FRESH,
  VRING_NEXT_AVAIL,
  VRING_NEXT_USED,
  VRING_PUBLISHED,
  VRING_READY,
  VRING_SIZE,
  VRING_UNDECIDED,
} from "../src/layout/lane.ts";
import { suppressKicks } from "./notify";
import { advance, batchRoom, givePacked, isOfferedPacked, openPacked, publishPacked, walkPacked } from "./packed";
import { giveSplit, loadAvailIndex, loadUsedIndex, openSplit, publishSplit, walkSplit } from "./split";
import { isPacked, nextAvail, vringOf } from "./vring";

/** Whether the ring may be touched. A split ring that was just started gets its used index from guest memory first. */
export function isRunning<E>(): bool {
  const vring = vringOf<E>();
  const flags = load<u32>(vring, VRING_FLAGS);
  if ((flags & (VRING_READY | VRING_BROKEN)) != VRING_READY) return false;
  if (flags & VRING_FRESH) {
    const used = isPacked<E>() ? load<u32>(vring, VRING_NEXT_AVAIL) : loadUsedIndex<E>();
    store<u32>(vring, used, VRING_NEXT_USED);
    store<u32>(vring, used, VRING_PUBLISHED);
    store<u32>(vring, 0, VRING_UNDECIDED);
    store<u32>(vring, flags & ~VRING_FRESH, VRING_FLAGS);
    suppressKicks<E>();
  }
  return true;
}

/** Whether the driver has made a chain available at the position, the first that it had not. */
export function isOffered<E>(position: u32): bool {
  return isPacked<E>() ? isOfferedPacked<E>(position) : loadAvailIndex<E>() != position;
}

/** Chains from the next position on, at most `budget`; of a packed ring it is not known yet. @returns -1: the ring makes no sense */
export function countOffered<E>(budget: u32): i32 {
  if (isPacked<E>()) return budget;
  const pending = (loadAvailIndex<E>() - nextAvail<E>()) & 0xffff;
  return pending > load<u32>(vringOf<E>(), VRING_SIZE) ? -1 : min(pending, budget);
}

/** Opens the chain at a position; of a split ring one that is known to be offered. @returns CHAIN_READY, _NONE, _BROKEN */
export function open<E>(position: u32): u32 {
  return isPacked<E>() ? openPacked<E>(position) : openSplit<E>(position);
}

/** Walks an opened chain: walkSplit, walkPacked. @returns CHAIN_READY, _REFUSED, _BROKEN */
export function walk<E>(position: u32, id: u32, address: u64, rest: u64, pieces: usize, wanted: u64): u32 {
  return isPacked<E>()
    ? walkPacked<E>(position, address, rest, pieces, wanted)
    : walkSplit<E>(id, address, rest, pieces, wanted);
}

/** Flags of a descriptor, from the word that holds its length. */
export function flagsOf<E>(rest: u64): u32 {
  return isPacked<E>() ? <u32>(rest >> 48) : <u32>(rest >> 32) & 0xffff;
}

/** The id to give a chain of one descriptor back with. @param id as it was opened */
export function idOf<E>(id: u32, rest: u64): u32 {
  return isPacked<E>() ? <u32>(rest >> 32) & 0xffff : id;
}

/** The position behind a chain. */
export function behind<E>(position: u32, slots: u32): u32 {
  return isPacked<E>() ? advance(position, slots, load<u32>(vringOf<E>(), VRING_SIZE)) : (position + 1) & 0xffff;
}

/**
 * Whether chains of so many slots together can be given back before the next publication; an empty batch takes any. In a
 * packed ring only the first chain of a batch may have several slots, so that a batch cut off by a kill can be told.
 */
export function fits<E>(chains: u32, slots: u32): bool {
  const vring = vringOf<E>();
  const isEmpty = load<u32>(vring, VRING_NEXT_USED) == load<u32>(vring, VRING_PUBLISHED);
  return isEmpty || !isPacked<E>() || (slots == chains && slots <= batchRoom<E>());
}

/** Gives a chain back; the driver sees it after publish(). @param written bytes written to it */
export function give<E>(id: u32, written: u32, slots: u32): void {
  if (isPacked<E>()) givePacked<E>(id, written, slots);
  else giveSplit<E>(id, written);
}

/** Makes all chains given back so far visible to the driver; a ring that may be touched. */
export function publish<E>(): void {
  const vring = vringOf<E>();
  if (load<u32>(vring, VRING_NEXT_USED) == load<u32>(vring, VRING_PUBLISHED)) return;
  if (isPacked<E>()) publishPacked<E>();
  else publishSplit<E>();
}
