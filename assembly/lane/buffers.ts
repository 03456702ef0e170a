/**
 * Receive buffers for one frame: taken from the destination's avail ring, collected until the frame fits, or left where they
 * are.
 */
import {
  COUNT_MALFORMED,
  COUNT_WAITS,
  DESTINATION_PIECES,
  DESTINATION_VRING,
  MERGED_BYTES,
  MERGED_CHAINS,
  MERGED_HEAD,
  MERGED_WRITTEN,
  VRING_FLAGS,
  VRING_MERGEABLE,
  VRING_SIZE,
} from "../../src/layout/lane.ts";
import { WALK_MAX, chainBytes, loadDescAddress, loadDescRest, piecesEnd, walk, walked } from "../chain";
import { Destination } from "../guest";
import { giveUsed, loadAvailIndex, loadHead, nextAvail, setNextAvail } from "../split";
import { count } from "../stats";

export const BUFFERS_READY: u32 = 0;
/** Too few are available now. */
export const BUFFERS_NONE: u32 = 1;
/** Those that there are, or ever can be, do not hold the frame. */
export const BUFFERS_TOO_SMALL: u32 = 2;
/** The avail ring makes no sense. */
const BUFFERS_BROKEN: u32 = 3;

export const NOT_WAITING: u32 = 0x1_0000;
/** The avail index up to which there were too few buffers: there is no point in looking before it moves. */
export let waitingAt: u32 = NOT_WAITING;

/** The avail index as last loaded: chains before it may be taken. */
export let availLimit: u32 = 0;
let mergedEnd: usize = 0;

/** At the start of a poll: what was loaded before is old. */
export function beginBuffers(): void {
  availLimit = nextAvail<Destination>();
}

/** Remembers that the chains before avail index `next` were not enough. */
export function waitForBuffers(next: u32): void {
  if (waitingAt == NOT_WAITING) count(COUNT_WAITS);
  waitingAt = next;
}

/** There were enough, or the ring has changed. */
export function stopWaiting(): void {
  waitingAt = NOT_WAITING;
}

/** Whether a chain is available at avail index `next`; those from nextAvail() up to it are taken by the same frame. */
export function peekBuffer(next: u32): u32 {
  if (next != availLimit) return BUFFERS_READY;
  availLimit = loadAvailIndex<Destination>();
  // Counted from the chains already taken: an index that runs backwards meanwhile is no index either.
  const taken = (next - nextAvail<Destination>()) & 0xffff;
  if (((availLimit - next) & 0xffff) + taken > load<u32>(DESTINATION_VRING, VRING_SIZE)) {
    availLimit = next; // nothing may be taken
    return BUFFERS_BROKEN;
  }
  return next == availLimit ? BUFFERS_NONE : BUFFERS_READY;
}

/**
 * Takes receive chains until they hold `needed` bytes, beginning with the one at avail index `next` whose head and first
 * descriptor have been loaded. A malformed chain is returned with length 0, and so are those taken for this frame
 * before it: the entries of one frame must be neighbours in the used ring.
 * @returns BUFFERS_*; if READY, the chains are consumed and their pieces in DESTINATION_PIECES, else none is consumed
 */
export function collectBuffers(needed: u32, next: u32, head: u32, address: u64, rest: u64): u32 {
  const size = load<u32>(DESTINATION_VRING, VRING_SIZE);
  const mergeable = load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_MERGEABLE;
  const walkedBefore = walked;
  let got: u64 = 0;
  let pieces: usize = DESTINATION_PIECES;
  mergedEnd = MERGED_CHAINS;

  for (let chains: u32 = 0; chains < size; ++chains) {
    if (chains != 0) {
      if (walked - walkedBefore > WALK_MAX) {
        if (mergedCount()) return BUFFERS_TOO_SMALL;
        break;
      }
      const found = peekBuffer(next);
      if (found == BUFFERS_BROKEN) return found;
      if (found == BUFFERS_NONE) break;
      head = loadHead<Destination>(next);
      if (head >= size) return BUFFERS_BROKEN;
      address = loadDescAddress<Destination>(head);
      rest = loadDescRest<Destination>(head);
    }
    next = (next + 1) & 0xffff;
    if (!walk<Destination>(address, rest, pieces, needed - got) || chainBytes == 0 || chainBytes > u32.MAX_VALUE) {
      returnUnused(head);
      setNextAvail<Destination>(next);
      got = 0;
      pieces = DESTINATION_PIECES;
      mergedEnd = MERGED_CHAINS;
      continue;
    }
    if (!mergeable && chainBytes < needed) return BUFFERS_TOO_SMALL;
    const written = min(chainBytes, needed - got);
    store<u32>(mergedEnd, head, MERGED_HEAD);
    store<u32>(mergedEnd, <u32>written, MERGED_WRITTEN);
    mergedEnd += MERGED_BYTES;
    got += written;
    pieces = piecesEnd;
    if (got == needed) {
      setNextAvail<Destination>(next);
      stopWaiting();
      return BUFFERS_READY;
    }
  }
  if (mergedCount() == size) return BUFFERS_TOO_SMALL;
  waitForBuffers(next);
  return BUFFERS_NONE;
}

/** How many chains collectBuffers() has taken. */
export function mergedCount(): u32 {
  return <u32>(mergedEnd - MERGED_CHAINS) / MERGED_BYTES;
}

/** Gives the collected chains to the driver, filled. */
export function giveMerged(): void {
  for (let chain: usize = MERGED_CHAINS; chain < mergedEnd; chain += MERGED_BYTES) {
    giveUsed<Destination>(load<u32>(chain, MERGED_HEAD), load<u32>(chain, MERGED_WRITTEN));
  }
}

/** Gives back a malformed receive chain and those already taken for the same frame, all with length 0. */
function returnUnused(head: u32): void {
  for (let chain: usize = MERGED_CHAINS; chain < mergedEnd; chain += MERGED_BYTES) {
    giveUsed<Destination>(load<u32>(chain, MERGED_HEAD), 0);
  }
  giveUsed<Destination>(head, 0);
  count(COUNT_MALFORMED);
}
