/**
 * One frame: from its transmit chain into receive chains, or into none.
 *
 * It arrives whole or not at all. Receive chains are collected and validated before the first byte is written; if there are
 * too few, nothing has happened and the transmit chain stays where it is.
 */
import {
  COUNT_CALLS_DESTINATION,
  COUNT_DROP_BAD_FRAME,
  COUNT_DROP_DISABLED,
  COUNT_DROP_MALFORMED,
  COUNT_DROP_NO_RECEIVER,
  COUNT_DROP_TOO_SMALL,
  DESTINATION_PIECES,
  DESTINATION_VRING,
  FRAME_BYTES_MAX,
  FRAME_BYTES_MIN,
  HEADERS,
  INJECT_BYTES_MAX,
  INJECT_FRAME,
  POLL_BROKE_DESTINATION,
  POLL_CALL_DESTINATION,
  SOURCE_PIECES,
  SOURCE_VRING,
  VRING_ENABLED,
  VRING_FLAGS,
  VRING_HEADER_SIZE,
  VRING_SEGMENTS_SENT,
  VRING_SINK,
} from "../../src/layout/lane.ts";
import {
  CHAIN_BROKEN,
  CHAIN_NONE,
  CHAIN_READY,
  CHAIN_REFUSED,
  WALK_MAX,
  chainBytes,
  chainId,
  chainSlots,
  openedAddress,
  openedId,
  openedRest,
  walked,
} from "../chain";
import { Destination, Source } from "../guest";
import { asksForOffload, loadCsumOffsetPieces, loadHeaderPieces, storeHeaderPieces } from "../net-header";
import { isRunning, open, publish, walk } from "../ring";
import { count } from "../stats";
import { breakRing, isPacked, nextAvail } from "../vring";
import {
  BUFFERS_BROKEN,
  BUFFERS_NONE,
  BUFFERS_READY,
  BUFFERS_TOO_SMALL,
  beginBuffers,
  collectBuffers,
  giveMerged,
  isWaiting,
  mergedCount,
  openBuffer,
  stopWaiting,
} from "./buffers";
import {
  OFFLOAD_BAD,
  OFFLOAD_NONE,
  OFFLOAD_SEGMENT,
  OFFLOAD_SUM,
  completeChecksum,
  deliveredCsumOffset,
  deliveredWord,
  judgeOffload,
  noOffload,
} from "./offload";
import { copyPieces, newSource, storePieces } from "./pieces";
import {
  LEFT_BAD_BUFFER,
  LEFT_BAD_HEAD,
  LEFT_BUFFER,
  LEFT_CHAIN,
  LEFT_END,
  LEFT_OFFLOAD,
  left,
  leftAddress,
  leftBufferAddress,
  leftBufferId,
  leftBufferRest,
  leftCsumOffset,
  leftHeader,
  leftId,
  leftRest,
} from "./run";
import {
  beginSegments,
  headersBytes,
  makeSegment,
  payloadBytes,
  payloadStart,
  placeSegment,
  segments,
} from "./segment";
import { decideCall } from "./calls";

/** What became of one transmit chain. */
export const DELIVERED: u32 = 0;
export const DROPPED: u32 = 1;
export const NO_BUFFERS: u32 = 2;
export const NO_CHAIN: u32 = 3;
export const BROKEN: u32 = 4;
/** Of a frame that is cut, enough was done for one poll. */
export const UNFINISHED: u32 = 5;

/** Whether the destination takes frames; settled anew by each poll. */
export let receiving: bool = false;
let brokeDestination: bool = false;
/** Of the frame delivered last. */
export let frameBytes: u32 = 0;
/** Of the transmit chain carried last: what to give back. */
export let frameId: u32 = 0;
export let frameSlots: u32 = 0;
/** Segments of frames that this poll delivered. */
export let madeSegments: u32 = 0;
/** So many are enough for one poll. */
const SEGMENTS_MAX: u32 = 256;

/** At the start of a poll. */
export function beginFrames(): void {
  receiving = isReceiving();
  madeSegments = 0;
  if (receiving) beginBuffers();
}

/**
 * Carries the frame of the transmit chain at a position.
 * @returns DELIVERED, DROPPED (counted): frameId and frameSlots are to be given back; NO_BUFFERS, UNFINISHED: it
 *   stays, some of its segments may have been delivered; NO_CHAIN, BROKEN
 */
export function carryFrame(position: u32, enabled: bool): u32 {
  if (left == LEFT_END) return NO_CHAIN;
  if (left == LEFT_BAD_HEAD) return BROKEN;
  if (left < LEFT_CHAIN) {
    const opened = open<Source>(position);
    if (opened != CHAIN_READY) return opened == CHAIN_NONE ? NO_CHAIN : BROKEN;
  }
  const id = left < LEFT_CHAIN ? openedId : leftId;
  const address = left < LEFT_CHAIN ? openedAddress : leftAddress;
  const rest = left < LEFT_CHAIN ? openedRest : leftRest;
  const headerBytes = load<u32>(SOURCE_VRING, VRING_HEADER_SIZE);
  const bytesMax: u64 = headerBytes + FRAME_BYTES_MAX;
  if (!enabled && !isPacked<Source>()) {
    // Where a split chain ends does not matter to whoever only gives it back.
    frameId = id;
    frameSlots = 1;
    return drop(COUNT_DROP_DISABLED);
  }
  const found = walk<Source>(position, id, address, rest, SOURCE_PIECES, bytesMax);
  if (found == CHAIN_BROKEN) return BROKEN;
  newSource();
  frameId = chainId;
  frameSlots = chainSlots;
  if (!enabled) return drop(COUNT_DROP_DISABLED);
  if (found == CHAIN_REFUSED) return drop(COUNT_DROP_MALFORMED);
  if (chainBytes < headerBytes + FRAME_BYTES_MIN || chainBytes > bytesMax) return drop(COUNT_DROP_BAD_FRAME);
  frameBytes = <u32>chainBytes - headerBytes;
  const word = left == LEFT_OFFLOAD ? leftHeader : loadHeaderPieces();
  let offload = OFFLOAD_NONE;
  if (asksForOffload(word)) {
    const csumOffset = left == LEFT_OFFLOAD ? leftCsumOffset : loadCsumOffsetPieces();
    offload = judgeOffload(word, csumOffset, headerBytes, frameBytes);
    if (offload == OFFLOAD_BAD) return drop(COUNT_DROP_BAD_FRAME);
  } else noOffload();
  if (!receiving) {
    if (load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_SINK) return DELIVERED;
    return drop(COUNT_DROP_NO_RECEIVER);
  }
  return offload == OFFLOAD_SEGMENT ? deliverSegments(headerBytes) : deliver(headerBytes, offload == OFFLOAD_SUM);
}

/** Copies the frame in SOURCE_PIECES, past its header of `fromHeader` bytes, into receive chains. */
function deliver(fromHeader: u32, needsChecksum: bool): u32 {
  const toHeader = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  const collected = collectFor(toHeader + frameBytes, left >= LEFT_BUFFER);
  if (collected != BUFFERS_READY) return fateWithout(collected);
  storeHeaderPieces(DESTINATION_PIECES, toHeader, deliveredWord, deliveredCsumOffset, mergedCount());
  copyPieces(toHeader, fromHeader, frameBytes);
  if (needsChecksum) completeChecksum(fromHeader, toHeader, frameBytes);
  giveMerged();
  return DELIVERED;
}

/**
 * The same, cut into segments. If the buffers do not suffice, those that were delivered are not made again when the
 * chain is taken up the next time.
 */
function deliverSegments(fromHeader: u32): u32 {
  if (!beginSegments(fromHeader, frameBytes)) return drop(COUNT_DROP_BAD_FRAME);
  const toHeader = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  const walkedBefore = walked;
  let isOpened = left >= LEFT_BUFFER;
  for (let number = load<u32>(SOURCE_VRING, VRING_SEGMENTS_SENT); number < segments; ++number) {
    store<u32>(SOURCE_VRING, number, VRING_SEGMENTS_SENT);
    if (madeSegments >= SEGMENTS_MAX || walked - walkedBefore > WALK_MAX) return UNFINISHED;
    placeSegment(number);
    const collected = collectFor(toHeader + headersBytes + payloadBytes, isOpened);
    if (collected != BUFFERS_READY) return fateWithout(collected);
    isOpened = false;
    makeSegment(number, fromHeader);
    storeHeaderPieces(DESTINATION_PIECES, toHeader, 0, 0, mergedCount());
    storePieces(toHeader, HEADERS, headersBytes);
    copyPieces(toHeader + headersBytes, fromHeader + payloadStart, payloadBytes);
    giveMerged();
    ++madeSegments;
  }
  return DELIVERED;
}

/** Collects buffers for so many bytes. @param isOpened the run has opened the first of them */
function collectFor(needed: u32, isOpened: bool): u32 {
  const next = nextAvail<Destination>();
  if (isOpened) return collectBuffers(needed, next, leftBufferId, leftBufferAddress, leftBufferRest);
  if (left == LEFT_BAD_BUFFER) return BUFFERS_BROKEN;
  const found = openBuffer(next);
  return found == BUFFERS_READY ? collectBuffers(needed, next, openedId, openedAddress, openedRest) : found;
}

/** What becomes of a frame for which there were no buffers. */
function fateWithout(collected: u32): u32 {
  if (collected == BUFFERS_NONE) return NO_BUFFERS;
  if (collected == BUFFERS_TOO_SMALL) return drop(COUNT_DROP_TOO_SMALL);
  breakDestination();
  return drop(COUNT_DROP_NO_RECEIVER);
}

function drop(reason: usize): u32 {
  count(reason);
  return DROPPED;
}

/** The destination's driver broke the format. */
export function breakDestination(): void {
  breakRing<Destination>();
  brokeDestination = true;
  receiving = false;
  stopWaiting();
}

/**
 * Carries the frame that the control plane wrote to INJECT_FRAME, if the destination takes it at once.
 * @returns POLL_*: 1 if it was delivered, and what is due
 */
export function carryInjected(length: u32): u32 {
  beginFrames();
  if (!receiving || length > <u32>INJECT_BYTES_MAX) return 0;
  const waits = isWaiting();
  const delivered = deliverStored(INJECT_FRAME, length, 0, 0);
  if (delivered != BUFFERS_READY && !waits) stopWaiting();
  return finishDestination() | (delivered == BUFFERS_READY ? 1 : 0);
}

/**
 * Delivers a frame of memory 0, with a net header of these fields. The destination takes frames.
 * @returns BUFFERS_*: READY if it was delivered, BROKEN if that broke the ring
 */
export function deliverStored(at: usize, length: u32, word: u64, csumOffset: u32): u32 {
  const toHeader = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  const next = nextAvail<Destination>();
  let collected = openBuffer(next);
  if (collected == BUFFERS_READY) {
    collected = collectBuffers(toHeader + length, next, openedId, openedAddress, openedRest);
  }
  if (collected == BUFFERS_READY) {
    storeHeaderPieces(DESTINATION_PIECES, toHeader, word, csumOffset, mergedCount());
    storePieces(toHeader, at, length);
    giveMerged();
  } else if (collected == BUFFERS_BROKEN) breakDestination();
  return collected;
}

/** Whether the destination's receiveq takes frames. */
export function isReceiving(): bool {
  return isRunning<Destination>() && (load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_ENABLED) != 0;
}

/** Publishes what this poll used on the destination ring, also if it broke after that. @returns what is due there */
export function finishDestination(): u32 {
  let result: u32 = 0;
  if (brokeDestination) {
    brokeDestination = false;
    result = POLL_BROKE_DESTINATION;
  } else if (!isRunning<Destination>()) return 0;
  publish<Destination>();
  return result | decideCall<Destination>(COUNT_CALLS_DESTINATION, POLL_CALL_DESTINATION);
}
