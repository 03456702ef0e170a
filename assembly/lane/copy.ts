/**
 * Ring to ring: frames from the source's transmitq are copied once, into the destination's receiveq.
 *
 * A frame either arrives whole or not at all. Receive chains are collected and validated before the first byte is
 * written; if there are too few, nothing has happened and the transmit chain stays where it is: the lane waits for
 * buffers (the poller decides how long) and the source ring is its queue.
 *
 * Usual frames, one descriptor into one, are carried in runs (run.ts). Whatever else is legal goes through lists of
 * pieces, one frame at a time.
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
  COUNT_PACKETS,
  DESTINATION_PIECES,
  DESTINATION_VRING,
  FRAME_BYTES_MAX,
  FRAME_BYTES_MIN,
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
  VRING_SINK,
  VRING_SIZE,
} from "../../src/layout/lane.ts";
import { WALK_MAX, chainBytes, loadDescAddress, loadDescRest, walk, walked } from "../chain";
import { Destination, Source } from "../guest";
import { asksForOffload, storeHeaderPieces } from "../net-header";
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
import {
  BUFFERS_NONE,
  BUFFERS_READY,
  BUFFERS_TOO_SMALL,
  NOT_WAITING,
  beginBuffers,
  collectBuffers,
  giveMerged,
  mergedCount,
  peekBuffer,
  stopWaiting,
  waitForBuffers,
  waitingAt,
} from "./buffers";
import { copyPieces } from "./pieces";
import {
  LOADED_BUFFER,
  LOADED_BUFFER_HEAD,
  LOADED_CHAIN,
  LOADED_HEAD,
  LOADED_OFFLOAD,
  carryRun,
  loaded,
  loadedAddress,
  loadedBufferAddress,
  loadedBufferHead,
  loadedBufferRest,
  loadedHead,
  loadedRest,
  runBytes,
  skipRun,
} from "./run";

/** What became of one transmit chain. */
const DELIVERED: u32 = 0;
const DROPPED: u32 = 1;
const NO_BUFFERS: u32 = 2;

/** Whether the destination takes frames; settled anew by each poll. */
let receiving: bool = false;
let brokeDestination: bool = false;
/** Of the frame delivered last. */
let frameBytes: u64 = 0;

/**
 * Carries up to `budget` frames.
 * @param dropWhenStuck the wait for buffers was too long: drop frames until there are some
 * @returns POLL_*: transmit chains taken, and what is due
 */
export function carryFrames(budget: u32, dropWhenStuck: bool): u32 {
  if (!isRunning<Source>()) return 0;
  receiving = isReceiving();
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
  if (receiving) beginBuffers();
  const limit = min(pending, budget);
  const walkedBefore = walked;
  let taken: u32 = 0;
  let delivered: u64 = 0;
  let bytes: u64 = 0;
  const enabled = (load<u32>(SOURCE_VRING, VRING_FLAGS) & VRING_ENABLED) != 0;
  for (; taken < limit && walked - walkedBefore <= WALK_MAX; ++taken) {
    if (enabled && receiving && peekBuffer(nextAvail<Destination>()) == BUFFERS_READY) {
      const run = carryRun(first + taken, limit - taken);
      delivered += run;
      bytes += runBytes;
      taken += run;
      if (taken == limit) break;
    } else skipRun();
    const head = loaded >= LOADED_HEAD ? loadedHead : loadHead<Source>(first + taken);
    if (head >= size) {
      breakRing<Source>();
      result |= POLL_BROKE_SOURCE;
      break;
    }
    let outcome = enabled ? carryFrame(head) : drop(COUNT_DROP_DISABLED);
    if (outcome == DROPPED) stopWaiting(); // whatever it waited for
    if (outcome == NO_BUFFERS) {
      if (!dropWhenStuck || delivered) break;
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
  // Where buffers came back the wait begins anew: this poll does not count towards it.
  if (waitingAt != NOT_WAITING && !(dropWhenStuck && delivered)) result |= POLL_WAITING;
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

/** Carries the frame of one transmit chain. @returns DELIVERED, DROPPED (counted), or NO_BUFFERS (nothing was changed) */
function carryFrame(head: u32): u32 {
  const headerBytes = load<u32>(SOURCE_VRING, VRING_HEADER_SIZE);
  const bytesMax: u64 = headerBytes + FRAME_BYTES_MAX;
  const address = loaded >= LOADED_CHAIN ? loadedAddress : loadDescAddress<Source>(head);
  const rest = loaded >= LOADED_CHAIN ? loadedRest : loadDescRest<Source>(head);
  if (!walk<Source>(address, rest, SOURCE_PIECES, bytesMax)) return drop(COUNT_DROP_MALFORMED);
  if (chainBytes < headerBytes + FRAME_BYTES_MIN || chainBytes > bytesMax) return drop(COUNT_DROP_BAD_FRAME);
  if (loaded == LOADED_OFFLOAD || asksForOffload(SOURCE_PIECES)) return drop(COUNT_DROP_BAD_FRAME);
  frameBytes = chainBytes - headerBytes;
  if (!receiving) {
    if (load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_SINK) return DELIVERED;
    return drop(COUNT_DROP_NO_RECEIVER);
  }

  const next = nextAvail<Destination>();
  const found = peekBuffer(next);
  if (found != BUFFERS_READY) return found == BUFFERS_NONE ? waitFor(next) : breakDestination();
  const buffer = loaded >= LOADED_BUFFER_HEAD ? loadedBufferHead : loadHead<Destination>(next);
  if (buffer >= load<u32>(DESTINATION_VRING, VRING_SIZE)) return breakDestination();
  const bufferAddress = loaded >= LOADED_BUFFER ? loadedBufferAddress : loadDescAddress<Destination>(buffer);
  const bufferRest = loaded >= LOADED_BUFFER ? loadedBufferRest : loadDescRest<Destination>(buffer);
  const toHeaderBytes = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  const needed = toHeaderBytes + <u32>frameBytes;
  const collected = collectBuffers(needed, next, buffer, bufferAddress, bufferRest);
  if (collected == BUFFERS_READY) {
    storeHeaderPieces(DESTINATION_PIECES, toHeaderBytes, mergedCount());
    copyPieces(toHeaderBytes, headerBytes, <u32>frameBytes);
    giveMerged();
    return DELIVERED;
  }
  if (collected == BUFFERS_NONE) return NO_BUFFERS;
  return collected == BUFFERS_TOO_SMALL ? drop(COUNT_DROP_TOO_SMALL) : breakDestination();
}

function drop(reason: usize): u32 {
  count(reason);
  return DROPPED;
}

function waitFor(next: u32): u32 {
  waitForBuffers(next);
  return NO_BUFFERS;
}

function breakDestination(): u32 {
  breakRing<Destination>();
  brokeDestination = true;
  receiving = false;
  stopWaiting();
  return drop(COUNT_DROP_NO_RECEIVER);
}

/** Whether the destination's receiveq takes frames. */
function isReceiving(): bool {
  return isRunning<Destination>() && (load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_ENABLED) != 0;
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
