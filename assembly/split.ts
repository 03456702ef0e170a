/**
 * The split virtqueue, device side (virtio 1.3, 2.7): take available chains, give used ones.
 *
 * Memory order: the driver's avail index is loaded sequentially consistently before the entries it covers are read; used entries are
 * plain stores before the one sequentially consistent store of the used index per batch.
 */
import {
  AVAIL_ENTRY_SIZE,
  AVAIL_IDX,
  AVAIL_RING,
  DESC_LEN,
  DESC_SIZE,
  USED_ENTRY_SIZE,
  USED_IDX,
  USED_RING,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
} from "../src/layout/virtio.ts";
import {
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_DESC,
  VRING_DESC_SEGMENT,
  VRING_FLAGS,
  VRING_INDIRECT,
  VRING_INFLIGHT,
  VRING_NEXT_USED,
  VRING_PUBLISHED,
  VRING_SIZE,
  VRING_UNDECIDED,
  VRING_USED,
  VRING_USED_SEGMENT,
} from "../src/layout/lane.ts";
import { INFLIGHT_SPLIT_USED_IDX } from "../src/layout/vhost-user.ts";
import {
  CHAIN_BROKEN,
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
import { atomicLoad16, atomicStore16, end, load16, load64, store64 } from "./guest";
import { offset, segment, translate } from "./translate";
import { vringOf } from "./vring";

/** The used index in guest memory: where a ring that is started goes on. */
export function loadUsedIndex<E>(): u32 {
  const vring = vringOf<E>();
  return atomicLoad16(end<E>(), load<u32>(vring, VRING_USED_SEGMENT), load<u64>(vring, VRING_USED) + USED_IDX);
}

/** The driver's avail index, 0..65535. */
export function loadAvailIndex<E>(): u32 {
  const vring = vringOf<E>();
  return atomicLoad16(end<E>(), load<u32>(vring, VRING_AVAIL_SEGMENT), load<u64>(vring, VRING_AVAIL) + AVAIL_IDX);
}

/** Opens the chain at an avail index, one that the driver's covers. @returns CHAIN_READY, CHAIN_BROKEN */
export function openSplit<E>(index: u32): u32 {
  const vring = vringOf<E>();
  const size = load<u32>(vring, VRING_SIZE);
  const entry = load<u64>(vring, VRING_AVAIL) + AVAIL_RING + <u64>(index & (size - 1)) * AVAIL_ENTRY_SIZE;
  const head = load16(end<E>(), load<u32>(vring, VRING_AVAIL_SEGMENT), entry);
  if (head >= size) return CHAIN_BROKEN;
  const table = load<u32>(vring, VRING_DESC_SEGMENT);
  const at = load<u64>(vring, VRING_DESC) + <u64>head * DESC_SIZE;
  setOpened(head, load64(end<E>(), table, at), load64(end<E>(), table, at + DESC_LEN));
  return CHAIN_READY;
}

/**
 * Walks a chain from its first descriptor, which has been loaded (`rest`: length | flags << 32 | next << 48), and writes pieces for its
 * first `wanted` bytes from `pieces` on. All of it must be mapped, and readable for the source, writable for the
 * destination (virtio 1.3, 2.7.5 and 2.7.7).
 * @returns CHAIN_READY; CHAIN_REFUSED if it loops or is longer than the ring, next index out of range, wrong direction,
 *   indirect where it may not be, memory that is not there
 */
export function walkSplit<E>(head: u32, address: u64, rest: u64, pieces: usize, wanted: u64): u32 {
  const vring = vringOf<E>();
  const size = load<u32>(vring, VRING_SIZE);
  const direction = end<E>() ? VRING_DESC_F_WRITE : 0;
  let tableSegment = load<u32>(vring, VRING_DESC_SEGMENT);
  let table = load<u64>(vring, VRING_DESC);
  let entries = size;
  let indirect = false;
  let scattered = false; // an indirect table in several extents: `table` is then a gpa
  beginChain(pieces, size);
  endChain(head, 1);

  for (let buffers: u32 = 0; buffers < size;) {
    countWalked();
    const length = <u32>rest;
    const flags = <u32>(rest >> 32) & 0xffff;
    let next = <u32>(rest >> 48);
    if (flags & VRING_DESC_F_INDIRECT) {
      if (indirect || flags & VRING_DESC_F_NEXT || !(load<u32>(vring, VRING_FLAGS) & VRING_INDIRECT)) break;
      if (length == 0 || length % DESC_SIZE) break;
      const reach = translate<E>(address);
      if (reach == 0) break;
      scattered = reach < <u64>length;
      table = scattered ? address : offset;
      tableSegment = segment;
      entries = length / DESC_SIZE;
      next = 0;
      indirect = true;
    } else {
      if ((flags & VRING_DESC_F_WRITE) != direction) break;
      if (length != 0 && !append<E>(address, length, wanted)) break;
      if (!(flags & VRING_DESC_F_NEXT)) return CHAIN_READY;
      if (next >= entries) break;
      ++buffers;
    }

    const at = table + <u64>next * DESC_SIZE;
    if (!scattered) {
      address = load64(end<E>(), tableSegment, at);
      rest = load64(end<E>(), tableSegment, at + DESC_LEN);
    } else {
      if (!gather64<E>(at)) break;
      address = gathered;
      if (!gather64<E>(at + DESC_LEN)) break;
      rest = gathered;
    }
  }
  return CHAIN_REFUSED;
}

/** Writes a used entry; the driver sees it after publishSplit(). @param written bytes written to the chain */
export function giveSplit<E>(head: u32, written: u32): void {
  const vring = vringOf<E>();
  const index = load<u32>(vring, VRING_NEXT_USED);
  const slot = <u64>(index & (load<u32>(vring, VRING_SIZE) - 1));
  const entry = load<u64>(vring, VRING_USED) + USED_RING + slot * USED_ENTRY_SIZE;
  store64(end<E>(), load<u32>(vring, VRING_USED_SEGMENT), entry, <u64>head | ((<u64>written) << 32));
  store<u32>(vring, (index + 1) & 0xffff, VRING_NEXT_USED);
  store<u32>(vring, load<u32>(vring, VRING_UNDECIDED) + 1, VRING_UNDECIDED);
}

/** Makes all used entries so far visible. */
export function publishSplit<E>(): void {
  const vring = vringOf<E>();
  const index = load<u32>(vring, VRING_NEXT_USED);
  atomicStore16(end<E>(), load<u32>(vring, VRING_USED_SEGMENT), load<u64>(vring, VRING_USED) + USED_IDX, index);
  store<u32>(vring, index, VRING_PUBLISHED);
  const inflight = <usize>load<u32>(vring, VRING_INFLIGHT);
  if (inflight) store<u16>(inflight, <u16>index, INFLIGHT_SPLIT_USED_IDX);
}
