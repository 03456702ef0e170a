/**
 * Receive buffers for one frame: taken from the destination's ring, collected until the frame fits, or left where they
 * are.
 */
import {
  COUNT_MALFORMED,
  COUNT_WAITS,
  DESTINATION_PIECES,
  DESTINATION_VRING,
  MERGED_BYTES,
  MERGED_CHAINS,
  MERGED_ID,
  MERGED_SLOTS,
  MERGED_WRITTEN,
  VRING_FLAGS,
  VRING_LIMIT,
  VRING_MERGEABLE,
  VRING_SIZE,
  VRING_WAITING,
} from "../../src/layout/lane.ts";
import {
  CHAIN_BROKEN,
  CHAIN_NONE,
  CHAIN_READY,
  WALK_MAX,
  chainBytes,
  chainId,
  chainSlots,
  openedAddress,
  openedId,
  openedRest,
  piecesEnd,
  walked,
} from "../chain";
import { Destination, Source } from "../guest";
import { behind, fits, give, open, publish, walk } from "../ring";
import { loadAvailIndex } from "../split";
import { count } from "../stats";
import { isPacked, nextAvail, setNextAvail } from "../vring";

export const BUFFERS_READY: u32 = 0;
/** Too few are available now. */
export const BUFFERS_NONE: u32 = 1;
/** Those that there are, or ever can be, do not hold the frame. */
export const BUFFERS_TOO_SMALL: u32 = 2;
/** The ring makes no sense. */
export const BUFFERS_BROKEN: u32 = 3;

const WAITING: u32 = 0x1_0000;

/** Behind the last merged chain; how many slots of the ring they take. */
let mergedEnd: usize = 0;
let mergedSlots: u32 = 0;

/** Whether the lane waits for buffers: there is no point in looking before a chain is available at waitingAt(). */
export function isWaiting(): bool {
  return load<u32>(DESTINATION_VRING, VRING_WAITING) != 0;
}

export function waitingAt(): u32 {
  return load<u32>(DESTINATION_VRING, VRING_WAITING) & 0xffff;
}

/** Remembers that the chains before `position` were not enough. */
function waitForBuffers(position: u32): void {
  if (!isWaiting()) count(COUNT_WAITS);
  store<u32>(DESTINATION_VRING, WAITING | position, VRING_WAITING);
}

/** There were enough, or nothing waits any more. */
export function stopWaiting(): void {
  store<u32>(DESTINATION_VRING, 0, VRING_WAITING);
}

/** At the start of a poll: what was loaded before is old. */
export function beginBuffers(): void {
  store<u32>(DESTINATION_VRING, nextAvail<Destination>(), VRING_LIMIT);
}

/**
 * Whether a chain of the split receiveq is available at avail index `next`; those from nextAvail() up to it are taken by
 * the same frame. @returns CHAIN_READY, _NONE, _BROKEN
 */
export function peekBuffer(next: u32): u32 {
  if (next != load<u32>(DESTINATION_VRING, VRING_LIMIT)) return CHAIN_READY;
  const limit = loadAvailIndex<Destination>();
  // Counted from the chains already taken: an index that runs backwards meanwhile is no index either.
  const taken = (next - nextAvail<Destination>()) & 0xffff;
  if (((limit - next) & 0xffff) + taken > load<u32>(DESTINATION_VRING, VRING_SIZE)) return CHAIN_BROKEN;
  store<u32>(DESTINATION_VRING, limit, VRING_LIMIT);
  return next == limit ? CHAIN_NONE : CHAIN_READY;
}

/** Opens the receive chain at a position, if there is one. @returns BUFFERS_READY, _NONE (the lane waits then), _BROKEN */
export function openBuffer(position: u32): u32 {
  const found = tryBuffer(position);
  if (found == BUFFERS_NONE) waitForBuffers(position);
  return found;
}

/** The same; the lane does not wait. */
export function tryBuffer(position: u32): u32 {
  let found: u32 = isPacked<Destination>() ? CHAIN_READY : peekBuffer(position);
  if (found == CHAIN_READY) found = open<Destination>(position);
  if (found == CHAIN_READY) return BUFFERS_READY;
  return found == CHAIN_BROKEN ? BUFFERS_BROKEN : BUFFERS_NONE;
}

/**
 * Takes receive chains until they hold `needed` bytes, beginning with the one at `position` that has been
 * opened. A malformed chain is returned with length 0, and so are those taken for this frame before it: the chains of one
 * frame must be neighbours in the used ring.
 * @returns BUFFERS_*; if READY, the chains are consumed and their pieces in DESTINATION_PIECES, else none is consumed
 */
export function collectBuffers(needed: u32, position: u32, id: u32, address: u64, rest: u64): u32 {
  const size = load<u32>(DESTINATION_VRING, VRING_SIZE);
  const mergeable = load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_MERGEABLE;
  const walkedBefore = walked;
  let got: u64 = 0;
  let pieces: usize = DESTINATION_PIECES;
  beginMerged();

  for (let chains: u32 = 0; chains < size; ++chains) {
    if (chains != 0) {
      if (walked - walkedBefore > WALK_MAX) {
        if (mergedCount()) return BUFFERS_TOO_SMALL;
        break;
      }
      if (mergedSlots == size) return BUFFERS_TOO_SMALL;
      const found = openBuffer(position);
      if (found != BUFFERS_READY) return found;
      id = openedId;
      address = openedAddress;
      rest = openedRest;
    }
    const found = walk<Destination>(position, id, address, rest, pieces, needed - got);
    if (found == CHAIN_BROKEN || mergedSlots + chainSlots > size) return BUFFERS_BROKEN;
    position = behind<Destination>(position, chainSlots);
    if (found != CHAIN_READY || chainBytes == 0 || chainBytes > u32.MAX_VALUE) {
      returnUnused();
      setNextAvail<Destination>(position);
      got = 0;
      pieces = DESTINATION_PIECES;
      beginMerged();
      continue;
    }
    if (!mergeable && chainBytes < needed) return BUFFERS_TOO_SMALL;
    const written = min(chainBytes, needed - got);
    addMerged(chainId, chainSlots, <u32>written);
    got += written;
    pieces = piecesEnd;
    if (got == needed) {
      setNextAvail<Destination>(position);
      stopWaiting();
      return BUFFERS_READY;
    }
  }
  if (mergedSlots == size) return BUFFERS_TOO_SMALL;
  waitForBuffers(position);
  return BUFFERS_NONE;
}

/** Begins a list of chains by hand. */
export function beginMerged(): void {
  mergedEnd = MERGED_CHAINS;
  mergedSlots = 0;
}

/** Adds a chain to the list, with so many bytes written to it. */
export function addMerged(id: u32, slots: u32, written: u32): void {
  store<u16>(mergedEnd, <u16>id, MERGED_ID);
  store<u16>(mergedEnd, <u16>slots, MERGED_SLOTS);
  store<u32>(mergedEnd, written, MERGED_WRITTEN);
  mergedEnd += MERGED_BYTES;
  mergedSlots += slots;
}

/**
 * Of a list of chains that are written full, keeps the first ones, as many as `written` bytes take.
 * @param position of the first chain @returns the position behind the last one
 */
export function keepMerged(position: u32, written: u32): u32 {
  mergedSlots = 0;
  let chain: usize = MERGED_CHAINS;
  for (; written != 0; chain += MERGED_BYTES) {
    const part = min(load<u32>(chain, MERGED_WRITTEN), written);
    const slots = load<u16>(chain, MERGED_SLOTS);
    store<u32>(chain, part, MERGED_WRITTEN);
    mergedSlots += slots;
    position = behind<Destination>(position, slots);
    written -= part;
  }
  mergedEnd = chain;
  return position;
}

/** How many chains the list has. */
export function mergedCount(): u32 {
  return <u32>(mergedEnd - MERGED_CHAINS) / MERGED_BYTES;
}

/** Gives the collected chains to the driver, filled; it will see all of them at once. */
export function giveMerged(): void {
  makeRoom(mergedCount(), mergedSlots);
  for (let chain: usize = MERGED_CHAINS; chain < mergedEnd; chain += MERGED_BYTES) {
    give<Destination>(load<u16>(chain, MERGED_ID), load<u32>(chain, MERGED_WRITTEN), load<u16>(chain, MERGED_SLOTS));
  }
}

/** Gives back the malformed receive chain walked last and those of the list, all with length 0. */
export function returnUnused(): void {
  for (let chain: usize = MERGED_CHAINS; chain < mergedEnd; chain += MERGED_BYTES) {
    const slots = load<u16>(chain, MERGED_SLOTS);
    makeRoom(1, slots);
    give<Destination>(load<u16>(chain, MERGED_ID), 0, slots);
  }
  makeRoom(1, chainSlots);
  give<Destination>(chainId, 0, chainSlots);
  count(COUNT_MALFORMED);
}

/** Before more is given back than fits the batch: publishes it, the source first, for no frame may be sent twice. */
export function makeRoom(chains: u32, slots: u32): void {
  if (fits<Destination>(chains, slots)) return;
  publish<Source>();
  publish<Destination>();
}
