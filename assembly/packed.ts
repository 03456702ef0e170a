/**
 * The packed virtqueue, device side (virtio 1.3, 2.8): take available chains, give used ones.
 *
 * Memory order: length, id and flags of a descriptor are one atomic load, before its address is read. Of a batch given
 * back, the first descriptor is stored last, in one sequentially consistent store: the driver looks at the others only when it has
 * seen that one.
 *
 * Where the device stands can be read from the ring itself, as from a split ring's used index, so that a ring goes on after the
 * process was killed. For that all slots of a chain given back get the used bit, not only the first: it equals the
 * lap's wrap counter in all slots before the position, and in none from there on. A batch that is written and not
 * published makes a gap of one slot in that; it tells its batch from all others as long as the batch leaves two slots
 * of the ring alone, and is then given back empty (src/ports/cut-batch.ts).
 */
import {
  DESC_SIZE,
  PACKED_DESC_FLAGS,
  PACKED_DESC_LEN,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
} from "../src/layout/virtio.ts";
import {
  VRING_DESC,
  VRING_DESC_SEGMENT,
  VRING_FLAGS,
  VRING_HELD,
  VRING_INDIRECT,
  VRING_INFLIGHT,
  VRING_NEXT_USED,
  VRING_PUBLISHED,
  VRING_SIZE,
  VRING_UNDECIDED,
} from "../src/layout/lane.ts";
import { INFLIGHT_PACKED_USED_IDX } from "../src/layout/vhost-user.ts";
import {
  CHAIN_BROKEN,
  CHAIN_NONE,
  CHAIN_READY,
  CHAIN_REFUSED,
  append,
  beginChain,
  countWalked,
  endChain,
  gather64,
  gathered,
  setOpened,
} from "./chain";
import { atomicLoad16, atomicLoad64, atomicStore64, end, load64, store64, store8 } from "./guest";
import { offset, segment, translate } from "./translate";
import { vringOf } from "./vring";

const AVAIL: u32 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u32 = 1 << VRING_PACKED_DESC_F_USED;
/** The two bits of flags that say whose a descriptor is. */
export const OWNER: u32 = AVAIL | USED;

/** OWNER bits of a descriptor that is available in a lap. @param wrap 0 or 1 */
export function availableIn(wrap: u32): u32 {
  return wrap ? AVAIL : USED;
}

/** OWNER bits of a descriptor that was used in a lap. */
export function usedIn(wrap: u32): u32 {
  return wrap ? OWNER : 0;
}

/** The position `slots` further on, at most a lap. */
export function advance(position: u32, slots: u32, size: u32): u32 {
  const index = (position & 0x7fff) + slots;
  return index < size ? (position & 0x8000) | index : ((position & 0x8000) ^ 0x8000) | (index - size);
}

/** Slots from one position on to another, mod two laps. */
export function slotsBetween(from: u32, to: u32, size: u32): u32 {
  const distance = lapped(to, size) - lapped(from, size);
  return <i32>distance < 0 ? distance + 2 * size : distance;
}

/** A position counted from the first one, 0x8000. */
function lapped(position: u32, size: u32): u32 {
  return (position & 0x7fff) + (position & 0x8000 ? 0 : size);
}

/** Whether a chain is available at a position. */
export function isOfferedPacked<E>(position: u32): bool {
  const vring = vringOf<E>();
  const at = load<u64>(vring, VRING_DESC) + <u64>(position & 0x7fff) * DESC_SIZE;
  const flags = atomicLoad16(end<E>(), load<u32>(vring, VRING_DESC_SEGMENT), at + PACKED_DESC_FLAGS);
  return (flags & OWNER) == availableIn(position >> 15);
}

/** Opens the chain at a position. @returns CHAIN_READY, CHAIN_NONE */
export function openPacked<E>(position: u32): u32 {
  const vring = vringOf<E>();
  const ring = load<u32>(vring, VRING_DESC_SEGMENT);
  const at = load<u64>(vring, VRING_DESC) + <u64>(position & 0x7fff) * DESC_SIZE;
  const rest = atomicLoad64(end<E>(), ring, at + PACKED_DESC_LEN);
  if ((<u32>(rest >> 48) & OWNER) != availableIn(position >> 15)) return CHAIN_NONE;
  setOpened(0, load64(end<E>(), ring, at), rest);
  return CHAIN_READY;
}

/**
 * Walks a chain from its first descriptor, which has been loaded (`rest`: length | id << 32 | flags << 48), to its last,
 * and writes pieces for its first `wanted` bytes from `pieces` on. All of it must be mapped, and readable for the
 * source, writable for the destination (virtio 1.3, 2.8.5 to 2.8.8).
 * @returns CHAIN_READY; CHAIN_REFUSED if directions, indirect tables or addresses break a rule; CHAIN_BROKEN if it has no end
 */
export function walkPacked<E>(position: u32, address: u64, rest: u64, pieces: usize, wanted: u64): u32 {
  const vring = vringOf<E>();
  const size = load<u32>(vring, VRING_SIZE);
  const ring = load<u32>(vring, VRING_DESC_SEGMENT);
  const first = load<u64>(vring, VRING_DESC);
  const direction = end<E>() ? VRING_DESC_F_WRITE : 0;
  let whole: bool = true;
  beginChain(pieces, size);

  for (let slots: u32 = 1; slots <= size; ++slots) {
    countWalked();
    const length = <u32>rest;
    const flags = <u32>(rest >> 48);
    if (flags & VRING_DESC_F_INDIRECT) {
      whole = slots == 1 && !(flags & VRING_DESC_F_NEXT) && walkTable<E>(address, length, wanted);
    } else if (whole) {
      whole = (flags & VRING_DESC_F_WRITE) == direction && (length == 0 || append<E>(address, length, wanted));
    }
    if (!(flags & VRING_DESC_F_NEXT)) {
      endChain(<u32>(rest >> 32) & 0xffff, slots);
      return whole ? CHAIN_READY : CHAIN_REFUSED;
    }
    position = advance(position, 1, size);
    const at = first + <u64>(position & 0x7fff) * DESC_SIZE;
    if (slots == size) break;
    rest = atomicLoad64(end<E>(), ring, at + PACKED_DESC_LEN);
    if ((<u32>(rest >> 48) & OWNER) != availableIn(position >> 15)) break;
    address = load64(end<E>(), ring, at);
  }
  return CHAIN_BROKEN;
}

/** The buffers of an indirect table: all its entries, in order. Of their flags only the direction counts, and that none is a table. */
function walkTable<E>(gpa: u64, bytes: u32, wanted: u64): bool {
  const vring = vringOf<E>();
  const entries = bytes / DESC_SIZE;
  if (!(load<u32>(vring, VRING_FLAGS) & VRING_INDIRECT)) return false;
  if (bytes == 0 || bytes % DESC_SIZE || entries > load<u32>(vring, VRING_SIZE)) return false;
  const reach = translate<E>(gpa);
  if (reach == 0) return false;
  const scattered = reach < <u64>bytes;
  const tableSegment = segment;
  const table = offset;
  const direction = end<E>() ? VRING_DESC_F_WRITE : 0;
  for (let i: u32 = 0; i < entries; ++i) {
    countWalked();
    const into = <u64>i * DESC_SIZE;
    let address: u64;
    let rest: u64;
    if (!scattered) {
      address = load64(end<E>(), tableSegment, table + into);
      rest = load64(end<E>(), tableSegment, table + into + PACKED_DESC_LEN);
    } else {
      if (!gather64<E>(gpa + into)) return false;
      address = gathered;
      if (!gather64<E>(gpa + into + PACKED_DESC_LEN)) return false;
      rest = gathered;
    }
    const flags = <u32>(rest >> 48);
    if (flags & VRING_DESC_F_INDIRECT || (flags & VRING_DESC_F_WRITE) != direction) return false;
    const length = <u32>rest;
    if (length != 0 && !append<E>(address, length, wanted)) return false;
  }
  return true;
}

/** How many slots may still be added to the batch: in all the ring but two slots of it. */
export function batchRoom<E>(): u32 {
  const vring = vringOf<E>();
  const size = load<u32>(vring, VRING_SIZE);
  const held = slotsBetween(load<u32>(vring, VRING_PUBLISHED), load<u32>(vring, VRING_NEXT_USED), size);
  return held + 2 < size ? size - 2 - held : 0;
}

/**
 * Writes a used descriptor; the driver sees it after publishPacked(). The marks of its other slots come first: so whoever finds a
 * batch that was not published knows where each chain of it ends.
 * @param written bytes written to the chain
 */
export function givePacked<E>(id: u32, written: u32, slots: u32): void {
  const vring = vringOf<E>();
  const size = load<u32>(vring, VRING_SIZE);
  const ring = load<u32>(vring, VRING_DESC_SEGMENT);
  const first = load<u64>(vring, VRING_DESC);
  const position = load<u32>(vring, VRING_NEXT_USED);
  for (let i: u32 = 1; i < slots; ++i) {
    const slot = advance(position, i, size);
    const high = first + <u64>(slot & 0x7fff) * DESC_SIZE + (PACKED_DESC_FLAGS + 1);
    store8(end<E>(), ring, high, usedIn(slot >> 15) >> 8);
  }
  const used = usedDescriptor(id, written, usedIn(position >> 15));
  if (position == load<u32>(vring, VRING_PUBLISHED)) store<u64>(vring, used, VRING_HELD);
  else store64(end<E>(), ring, first + <u64>(position & 0x7fff) * DESC_SIZE + PACKED_DESC_LEN, used);
  store<u32>(vring, advance(position, slots, size), VRING_NEXT_USED);
  store<u32>(vring, load<u32>(vring, VRING_UNDECIDED) + slots, VRING_UNDECIDED);
}

/** Length, id and flags of a used descriptor. @param owner its OWNER bits */
export function usedDescriptor(id: u32, written: u32, owner: u32): u64 {
  const flags = owner | (written ? VRING_DESC_F_WRITE : 0);
  return <u64>written | ((<u64>id) << 32) | ((<u64>flags) << 48);
}

/** Makes all used descriptors so far visible. */
export function publishPacked<E>(): void {
  const vring = vringOf<E>();
  const before = load<u32>(vring, VRING_PUBLISHED);
  const next = load<u32>(vring, VRING_NEXT_USED);
  const inflight = <usize>load<u32>(vring, VRING_INFLIGHT);
  if (inflight) store<u64>(inflight, inflightUsed(next, before), INFLIGHT_PACKED_USED_IDX);
  const at = load<u64>(vring, VRING_DESC) + <u64>(before & 0x7fff) * DESC_SIZE + PACKED_DESC_LEN;
  atomicStore64(end<E>(), load<u32>(vring, VRING_DESC_SEGMENT), at, load<u64>(vring, VRING_HELD));
  store<u32>(vring, next, VRING_PUBLISHED);
  if (inflight) store<u64>(inflight, inflightUsed(next, next), INFLIGHT_PACKED_USED_IDX);
}

/** used_idx, old_used_idx, used_wrap, old_used_wrap of an inflight header. */
function inflightUsed(next: u32, old: u32): u64 {
  return (
    <u64>(next & 0x7fff) | ((<u64>(old & 0x7fff)) << 16) | ((<u64>(next >> 15)) << 32) | ((<u64>(old >> 15)) << 40)
  );
}
