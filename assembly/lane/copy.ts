/**
 * Ring to ring: frames from the source's transmitq are copied once, into the destination's receiveq.
 *
 * A frame either arrives whole or not at all. Receive chains are collected and validated before the first byte is
 * written; if there are too few, nothing has happened and the transmit chain stays where it is: the lane waits for
 * buffers (the poller decides how long) and the source ring is its queue.
 */
import {
  COUNT_BATCHES,
  COUNT_BYTES,
  COUNT_CALLS_DESTINATION,
  COUNT_CALLS_SOURCE,
  COUNT_CALLS_SUPPRESSED,
  COUNT_DROP_BAD_FRAME,
  COUNT_DROP_DISABLED,
  COUNT_DROP_MALFORMED,
  COUNT_DROP_NO_BUFFER,
  COUNT_DROP_NO_RECEIVER,
  COUNT_DROP_TOO_SMALL,
  COUNT_MALFORMED,
  COUNT_PACKETS,
  COUNT_WAITS,
  DESTINATION_PIECES,
  DESTINATION_VRING,
  FRAME_BYTES_MAX,
  FRAME_BYTES_MIN,
  MERGED_BYTES,
  MERGED_CHAINS,
  MERGED_HEAD,
  MERGED_WRITTEN,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  POLL_BROKE_DESTINATION,
  POLL_BROKE_SOURCE,
  POLL_CALL_DESTINATION,
  POLL_CALL_SOURCE,
  POLL_WAITING,
  SOURCE_PIECES,
  SOURCE_VRING,
  VRING_ENABLED,
  VRING_FLAGS,
  VRING_HEADER_SIZE,
  VRING_MERGEABLE,
  VRING_SINK,
  VRING_SIZE,
} from "../../src/layout/lane.ts";
import { chainBytes, piecesEnd, walk } from "../chain";
import { Destination, Source, copy } from "../guest";
import { asksForOffload, storeHeader } from "../net-header";
import { isCallDue, isCallUndecided, requestKick, suppressKicks } from "../notify";
import {
  breakRing,
  giveUsed,
  isRunning,
  loadAvailIndex,
  loadHead,
  nextAvail,
  publishUsed,
  setNextAvail,
} from "../split";
import { count } from "../stats";

/** What became of one transmit chain. */
const DELIVERED: u32 = 0;
const DROPPED: u32 = 1;
const NO_BUFFERS: u32 = 2;

const NOT_WAITING: u32 = 0x1_0000;
/** The destination's avail index when it had too few buffers: there is no point in looking before it moves. */
let waitingAt: u32 = NOT_WAITING;
/** The destination's avail index as last loaded: entries before it may be taken. */
let availLimit: u32 = 0;

/**
 * Carries up to `budget` frames.
 * @param dropWhenStuck the wait for buffers was too long: drop frames instead
 * @returns POLL_*: transmit chains taken, and what is due
 */
export function carryFrames(budget: u32, dropWhenStuck: bool): u32 {
  if (!isRunning<Source>()) return 0;
  const receiving = isReceiving();
  if (waitingAt != NOT_WAITING && !dropWhenStuck && receiving) {
    if (loadAvailIndex<Destination>() == waitingAt) return POLL_WAITING;
  }

  const size = load<u32>(SOURCE_VRING, VRING_SIZE);
  const first = nextAvail<Source>();
  const pending = (loadAvailIndex<Source>() - first) & 0xffff;
  if (pending == 0) return waitingAt != NOT_WAITING ? POLL_WAITING : 0;
  if (pending > size) {
    breakRing<Source>();
    return POLL_BROKE_SOURCE;
  }

  let result: u32 = 0;
  if (receiving) availLimit = nextAvail<Destination>();
  const limit = min(pending, budget);
  let taken: u32 = 0;
  let delivered: u64 = 0;
  let bytes: u64 = 0;
  for (; taken < limit; ++taken) {
    const head = loadHead<Source>(first + taken);
    if (head >= size) {
      breakRing<Source>();
      result |= POLL_BROKE_SOURCE;
      break;
    }
    let outcome = carryFrame(head);
    if (outcome == NO_BUFFERS) {
      if (!dropWhenStuck) break;
      count(COUNT_DROP_NO_BUFFER);
      outcome = DROPPED;
    }
    if (outcome == DELIVERED) {
      ++delivered;
      bytes += frameBytes;
    }
    giveUsed<Source>(head, 0);
  }

  setNextAvail<Source>(first + taken);
  if (taken) publishUsed<Source>();
  if (delivered) {
    count(COUNT_PACKETS, delivered);
    count(COUNT_BYTES, bytes);
    count(COUNT_BATCHES);
  }
  if (waitingAt != NOT_WAITING) result |= POLL_WAITING;
  return result | taken | finishDestination() | decideCall<Source>(COUNT_CALLS_SOURCE, POLL_CALL_SOURCE);
}

/**
 * Asks for kicks on what the lane waits for: receive buffers, or frames.
 * @param dropWhenStuck as for carryFrames
 * @returns whether there is work after all
 */
export function awaitKicks(dropWhenStuck: bool): bool {
  if (!isRunning<Source>()) return false;
  if (waitingAt != NOT_WAITING && !dropWhenStuck && isReceiving()) {
    requestKick<Destination>(waitingAt);
    return loadAvailIndex<Destination>() != waitingAt;
  }
  requestKick<Source>(nextAvail<Source>());
  return loadAvailIndex<Source>() != nextAvail<Source>();
}

/** Polling again: kicks are pointless. */
export function ignoreKicks(): void {
  if (isRunning<Source>()) suppressKicks<Source>();
  if (isRunning<Destination>()) suppressKicks<Destination>();
}

/** After the control plane has changed a ring: whatever was waited for may be different now. */
export function forgetWait(): void {
  waitingAt = NOT_WAITING;
}

let frameBytes: u64 = 0;

/** Carries the frame of one transmit chain. @returns DELIVERED, DROPPED (counted), or NO_BUFFERS (nothing was changed) */
function carryFrame(head: u32): u32 {
  if (!(load<u32>(SOURCE_VRING, VRING_FLAGS) & VRING_ENABLED)) return drop(COUNT_DROP_DISABLED);
  const headerBytes = load<u32>(SOURCE_VRING, VRING_HEADER_SIZE);
  const bytesMax: u64 = headerBytes + FRAME_BYTES_MAX;
  if (!walk<Source>(SOURCE_VRING, head, SOURCE_PIECES, bytesMax)) return drop(COUNT_DROP_MALFORMED);
  if (chainBytes < headerBytes + FRAME_BYTES_MIN || chainBytes > bytesMax) return drop(COUNT_DROP_BAD_FRAME);
  if (asksForOffload(SOURCE_PIECES)) return drop(COUNT_DROP_BAD_FRAME);
  frameBytes = chainBytes - headerBytes;

  if (!isReceiving()) {
    if (load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_SINK) return DELIVERED;
    return drop(COUNT_DROP_NO_RECEIVER);
  }
  const single = piecesEnd == SOURCE_PIECES + PIECE_BYTES;
  const outcome = collectBuffers(<u32>frameBytes);
  if (outcome != DELIVERED) return outcome;
  const numBuffers = <u32>(mergedEnd - MERGED_CHAINS) / MERGED_BYTES;
  const toHeaderBytes = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  storeHeader(DESTINATION_PIECES, toHeaderBytes, numBuffers);
  if (single && piecesEnd == DESTINATION_PIECES + PIECE_BYTES) {
    copy(
      load<u32>(DESTINATION_PIECES, PIECE_SEGMENT),
      load<u64>(DESTINATION_PIECES, PIECE_OFFSET) + toHeaderBytes,
      load<u32>(SOURCE_PIECES, PIECE_SEGMENT),
      load<u64>(SOURCE_PIECES, PIECE_OFFSET) + headerBytes,
      <u32>frameBytes,
    );
  } else copyPieces(toHeaderBytes, headerBytes, <u32>frameBytes);
  for (let chain: usize = MERGED_CHAINS; chain < mergedEnd; chain += MERGED_BYTES) {
    giveUsed<Destination>(load<u32>(chain, MERGED_HEAD), load<u32>(chain, MERGED_WRITTEN));
  }
  return DELIVERED;
}

function drop(reason: usize): u32 {
  count(reason);
  return DROPPED;
}

/** Whether the destination's receiveq takes frames. */
function isReceiving(): bool {
  return isRunning<Destination>() && (load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_ENABLED) != 0;
}

let mergedEnd: usize = 0;

/**
 * Takes receive chains until they hold header and frame. A malformed chain is returned with length 0, and so are those
 * taken for this frame before it: the entries of one frame must be neighbours in the used ring.
 * @returns DELIVERED (chains in MERGED_CHAINS, pieces in DESTINATION_PIECES), NO_BUFFERS, DROPPED; in the last two cases
 *   no chain is consumed
 */
function collectBuffers(frame: u32): u32 {
  const size = load<u32>(DESTINATION_VRING, VRING_SIZE);
  const mergeable = load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_MERGEABLE;
  const needed: u64 = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE) + frame;
  let next = nextAvail<Destination>();
  let got: u64 = 0;
  let pieces: usize = DESTINATION_PIECES;
  mergedEnd = MERGED_CHAINS;

  for (let step: u32 = 0; step <= size; ++step) {
    if (next == availLimit) {
      availLimit = loadAvailIndex<Destination>();
      // Counted from the chains already taken: an index that runs backwards meanwhile is no index either.
      const taken = (next - nextAvail<Destination>()) & 0xffff;
      if (((availLimit - next) & 0xffff) + taken > size) return breakDestination();
      if (next == availLimit) return taken == size ? drop(COUNT_DROP_TOO_SMALL) : wait(next);
    }
    const head = loadHead<Destination>(next);
    if (head >= size) return breakDestination();
    next = (next + 1) & 0xffff;
    if (
      !walk<Destination>(DESTINATION_VRING, head, pieces, needed - got) ||
      chainBytes == 0 ||
      chainBytes > u32.MAX_VALUE
    ) {
      returnUnused(head);
      setNextAvail<Destination>(next);
      got = 0;
      pieces = DESTINATION_PIECES;
      mergedEnd = MERGED_CHAINS;
      continue;
    }
    if (!mergeable && chainBytes < needed) return drop(COUNT_DROP_TOO_SMALL);
    const written = min(chainBytes, needed - got);
    store<u32>(mergedEnd, head, MERGED_HEAD);
    store<u32>(mergedEnd, <u32>written, MERGED_WRITTEN);
    mergedEnd += MERGED_BYTES;
    got += written;
    pieces = piecesEnd;
    if (got == needed) {
      setNextAvail<Destination>(next);
      waitingAt = NOT_WAITING;
      return DELIVERED;
    }
  }
  return wait(next);
}

/** Gives back a malformed receive chain and those already taken for the same frame, all with length 0. */
function returnUnused(head: u32): void {
  for (let chain: usize = MERGED_CHAINS; chain < mergedEnd; chain += MERGED_BYTES) {
    giveUsed<Destination>(load<u32>(chain, MERGED_HEAD), 0);
  }
  giveUsed<Destination>(head, 0);
  count(COUNT_MALFORMED);
}

/** @param at the avail index up to which buffers were looked at */
function wait(at: u32): u32 {
  if (waitingAt == NOT_WAITING) count(COUNT_WAITS);
  waitingAt = at;
  return NO_BUFFERS;
}

let brokeDestination: bool = false;

function breakDestination(): u32 {
  breakRing<Destination>();
  brokeDestination = true;
  waitingAt = NOT_WAITING;
  return drop(COUNT_DROP_NO_RECEIVER);
}

/** Publishes what this poll used on the destination ring, also if it broke after that. @returns what is due there */
function finishDestination(): u32 {
  let result: u32 = 0;
  if (brokeDestination) {
    brokeDestination = false;
    result = POLL_BROKE_DESTINATION;
  } else if (!isRunning<Destination>()) return 0;
  if (isCallUndecided<Destination>()) publishUsed<Destination>();
  return result | decideCall<Destination>(COUNT_CALLS_DESTINATION, POLL_CALL_DESTINATION);
}

/** Whether to call the driver for what was used since it was last decided; counted either way. */
function decideCall<E>(counter: usize, due: u32): u32 {
  if (!isCallUndecided<E>()) return 0;
  if (isCallDue<E>()) {
    count(counter);
    return due;
  }
  count(COUNT_CALLS_SUPPRESSED);
  return 0;
}

/** Copies the frame when it lies in several pieces on either side, past the headers. */
function copyPieces(toSkip: u32, fromSkip: u32, length: u32): void {
  let to: usize = DESTINATION_PIECES;
  let from: usize = SOURCE_PIECES;
  while (toSkip >= load<u32>(to, PIECE_LENGTH)) {
    toSkip -= load<u32>(to, PIECE_LENGTH);
    to += PIECE_BYTES;
  }
  while (fromSkip >= load<u32>(from, PIECE_LENGTH)) {
    fromSkip -= load<u32>(from, PIECE_LENGTH);
    from += PIECE_BYTES;
  }
  while (length != 0) {
    const room = load<u32>(to, PIECE_LENGTH) - toSkip;
    const rest = load<u32>(from, PIECE_LENGTH) - fromSkip;
    const part = min(length, min(room, rest));
    copy(
      load<u32>(to, PIECE_SEGMENT),
      load<u64>(to, PIECE_OFFSET) + toSkip,
      load<u32>(from, PIECE_SEGMENT),
      load<u64>(from, PIECE_OFFSET) + fromSkip,
      part,
    );
    length -= part;
    toSkip += part;
    fromSkip += part;
    if (part == room) {
      to += PIECE_BYTES;
      toSkip = 0;
    }
    if (part == rest) {
      from += PIECE_BYTES;
      fromSkip = 0;
    }
  }
}
