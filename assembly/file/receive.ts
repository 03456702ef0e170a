/**
 * File to ring: frames are read from a file, a queue of a TAP interface, into the destination's receive buffers. The
 * kernel copies them there, net header and all.
 *
 * How large a frame is shows when it has been read. So each read has one receive chain, which fits the usual frame, and behind
 * it a bounce in memory 0 that takes the rest. Chains are given back in their order: if a frame did not fit its chain, it and
 * those read behind it are *held*: they go whole into their bounces, and are delivered from there with a copy, as
 * buffers come. While large frames come, one read at a time has as many chains as the largest may take.
 *
 * Nothing is read before there is a buffer: the file's own queue is the queue.
 */
import {
  COUNT_DROP_BAD_FRAME,
  COUNT_DROP_MALFORMED,
  COUNT_DROP_TOO_SMALL,
  DESTINATION_VRING,
  FRAME_BYTES_MIN,
  OFFLOAD_CSUM,
  POLL_FILE_ASK,
  POLL_FILE_WAITS,
  VRING_FLAGS,
  VRING_HEADER_SIZE,
  VRING_MERGEABLE,
  VRING_OFFLOADS,
} from "../../src/layout/lane.ts";
import {
  FILE_HEADERS,
  FILE_HEADER_BYTES,
  HELD_END,
  HELD_NEXT,
  READS_LARGE,
  READS_NEXT,
  READS_SINCE,
  READ_BYTES_MAX,
  REQUESTS_MAX,
} from "../../src/layout/requests.ts";
import { NET_HDR_CSUM_OFFSET, NET_HDR_FLAGS, NET_HDR_NUM_BUFFERS, NET_HDR_SIZE } from "../../src/layout/virtio.ts";
import { Destination, end, store16, store64, store8 } from "../guest";
import { requestKick } from "../notify";
import { give, isOffered } from "../ring";
import { count, countDelivered } from "../stats";
import { nextAvail, setNextAvail } from "../vring";
import {
  BUFFERS_BROKEN,
  BUFFERS_NONE,
  BUFFERS_READY,
  giveMerged,
  isWaiting,
  keepMerged,
  makeRoom,
  mergedCount,
  stopWaiting,
  waitingAt,
} from "../lane/buffers";
import { beginFrames, deliverStored, finishDestination, isReceiving, receiving } from "../lane/frame";
import { askLarge, askOne, beginReads, isLarge, isLongTurn } from "./reads";
import {
  CARRIED_BEHIND,
  CARRIED_HEADER,
  CARRIED_HEADER_SEGMENT,
  CARRIED_HELD,
  CARRIED_ID,
  CARRIED_RESULT,
  CARRIED_ROOM,
  CARRIED_SLOTS,
  EAGAIN,
  EBADFD,
  EFAULT,
  EINVAL,
  EIO,
  beginRequests,
  bounce,
  carried,
  copyBack,
  endRequests,
  requests,
  takeCompletions,
} from "./requests";

/** Small frames in turn after which reads are small again. */
const LARGE_FRAMES: u32 = 64;

/** Of this turn. */
let delivered: u64 = 0;
let deliveredBytes: u64 = 0;

/** Makes requests to read up to `budget` frames, as far as there are buffers. @returns how many */
export function prepareReceive(budget: u32): u32 {
  beginRequests();
  delivered = 0;
  deliveredBytes = 0;
  beginReads();
  beginFrames();
  if (!receiving || (isWaiting() && !isOffered<Destination>(waitingAt()))) return 0;
  deliverHeld();
  if (!receiving || isHolding()) return 0;
  if (load<u32>(READS_LARGE) && load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_MERGEABLE) askLarge();
  else {
    const reads = min(min<u32>(budget, REQUESTS_MAX), max<u32>(1, load<u32>(READS_NEXT)));
    while (requests < reads && !isLongTurn() && askOne()) {}
  }
  return endRequests();
}

function isHolding(): bool {
  return load<u32>(HELD_NEXT) != load<u32>(HELD_END);
}

/** Gives the guest what was read. @returns POLL_* */
export function finishReceive(): u32 {
  if (requests) takeReads();
  countDelivered(delivered, deliveredBytes);
  const waits = isHolding() ? 0 : waitsFor;
  waitsFor = 0;
  return <u32>delivered | waits | finishDestination();
}

/** POLL_FILE_*: there was nothing to read for one request or more. */
let waitsFor: u32 = 0;

function takeReads(): void {
  takeCompletions();
  const first = nextAvail<Destination>();
  let inOrder: bool = true;
  let found: u32 = 0;
  let foundEmpty: bool = false;
  store<u32>(HELD_NEXT, 0);
  store<u32>(HELD_END, 0);
  for (let number: u32 = 0; number < requests; ++number) {
    const record = carried(number);
    const result = load<i32>(record, CARRIED_RESULT);
    if (result < <i32>(NET_HDR_SIZE + FRAME_BYTES_MIN)) {
      // Whatever it is, its chain was not used.
      inOrder = false;
      if (result >= 0) count(COUNT_DROP_BAD_FRAME);
      else if (result == EFAULT) count(COUNT_DROP_MALFORMED);
      else {
        waitsFor = POLL_FILE_WAITS;
        if (isEmpty(result)) foundEmpty = true;
      }
      continue;
    }
    ++found;
    const room = load<u32>(record, CARRIED_ROOM);
    if (<u32>result == room && room > load<u32>(READ_BYTES_MAX)) {
      // Longer than any frame can be, and there was no bounce: the interface's MTU has just changed.
      inOrder = false;
      count(COUNT_DROP_TOO_SMALL);
      continue;
    }
    const fits = <u32>result <= room;
    if (inOrder && fits) deliverRead(record, number, first, result);
    else {
      inOrder = false;
      hold(record, number, result, fits);
    }
  }
  // Nothing was read, nor found to be empty: perhaps there is something, and no news of it will come.
  if (waitsFor && !foundEmpty) waitsFor |= POLL_FILE_ASK;
  // A read that finds nothing costs half of one that does: half as many as have come since there was nothing.
  const since = load<u32>(READS_SINCE) + found;
  store<u32>(READS_NEXT, min<u32>(REQUESTS_MAX, max<u32>(1, since >> 1)));
  store<u32>(READS_SINCE, waitsFor ? 0 : min<u32>(since, 2 * REQUESTS_MAX));
}

/** Whether a result says that there is no frame: none now, no interface any more, or a queue that is not attached. */
function isEmpty(result: i32): bool {
  return result == EAGAIN || result == EIO || result == EBADFD || result == EINVAL;
}

/** Gives back the chain, or chains, that a frame was read into. */
function deliverRead(record: usize, number: u32, first: u32, bytes: u32): void {
  const headerBytes = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  const written = bytes - NET_HDR_SIZE + headerBytes;
  const id = load<u32>(record, CARRIED_ID);
  const slots = load<u32>(record, CARRIED_SLOTS);
  let position = load<u32>(record, CARRIED_BEHIND);
  let chains: u32 = 1;
  if (isLarge) {
    position = keepMerged(first, written);
    chains = mergedCount();
    store<u32>(READS_LARGE, chains > 1 ? LARGE_FRAMES : load<u32>(READS_LARGE) - 1);
  }
  const headerSegment = load<u32>(record, CARRIED_HEADER_SEGMENT);
  const header = load<u64>(record, CARRIED_HEADER);
  if (headerBytes == NET_HDR_SIZE) {
    if (!takesFlags()) store8(end<Destination>(), headerSegment, header + NET_HDR_FLAGS, 0);
    store16(end<Destination>(), headerSegment, header + NET_HDR_NUM_BUFFERS, chains);
  } else {
    const own: usize = FILE_HEADERS + <usize>number * FILE_HEADER_BYTES;
    store64(end<Destination>(), headerSegment, header, withFlags(load<u64>(own)));
    store16(end<Destination>(), headerSegment, header + NET_HDR_CSUM_OFFSET, load<u16>(own, NET_HDR_CSUM_OFFSET));
  }
  if (isLarge) giveMerged();
  else {
    makeRoom(1, slots);
    give<Destination>(id, written, slots);
  }
  setNextAvail<Destination>(position);
  ++delivered;
  deliveredBytes += bytes - NET_HDR_SIZE;
}

/** Whether a header's flags mean anything to the driver. The kernel says of a checksum that it is good whether asked or not. */
function takesFlags(): bool {
  return (load<u32>(DESTINATION_VRING, VRING_OFFLOADS) & OFFLOAD_CSUM) != 0;
}

/** The word of a header with the flags that the driver takes (virtio 1.3, 5.1.6.4.1). */
function withFlags(word: u64): u64 {
  return takesFlags() ? word : word & ~0xff;
}

/** Keeps a frame for later, all of it in its bounce. */
function hold(record: usize, number: u32, bytes: u32, fits: bool): void {
  const room = load<u32>(record, CARRIED_ROOM);
  copyBack<Destination>(record, bounce(number), min(bytes, room));
  if (room == 0 && load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE) != NET_HDR_SIZE) {
    copyBack<Destination>(record, bounce(number), NET_HDR_SIZE);
  }
  store<u32>(record, bytes, CARRIED_HELD);
  if (!isHolding()) store<u32>(HELD_NEXT, number);
  store<u32>(HELD_END, number + 1);
  if (!fits && load<u32>(DESTINATION_VRING, VRING_FLAGS) & VRING_MERGEABLE) store<u32>(READS_LARGE, LARGE_FRAMES);
}

/** Delivers held frames, until buffers run out. */
function deliverHeld(): void {
  const heldEnd = load<u32>(HELD_END);
  for (let number = load<u32>(HELD_NEXT); number < heldEnd; ++number) {
    store<u32>(HELD_NEXT, number);
    const bytes = load<u32>(carried(number), CARRIED_HELD);
    if (bytes == 0) continue;
    if (isLongTurn()) return;
    const frame = bounce(number);
    const length = bytes - NET_HDR_SIZE;
    const outcome = deliverStored(
      frame + NET_HDR_SIZE,
      length,
      withFlags(load<u64>(frame)),
      load<u16>(frame, NET_HDR_CSUM_OFFSET),
    );
    if (outcome == BUFFERS_NONE || outcome == BUFFERS_BROKEN) return;
    if (outcome == BUFFERS_READY) {
      ++delivered;
      deliveredBytes += length;
    } else {
      count(COUNT_DROP_TOO_SMALL);
      stopWaiting();
    }
  }
  store<u32>(HELD_NEXT, heldEnd);
}

/** Before blocking: asks for a kick when there are the buffers that the lane waits for. @returns whether there is work after all */
export function awaitBuffers(): bool {
  if (!isReceiving()) return false;
  if (!isWaiting()) return true; // there may be something to read
  requestKick<Destination>(waitingAt());
  return isOffered<Destination>(waitingAt());
}
