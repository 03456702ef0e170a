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
  COUNT_BATCHES,
  COUNT_BYTES,
  COUNT_DROP_BAD_FRAME,
  COUNT_DROP_MALFORMED,
  COUNT_DROP_NO_BUFFER,
  COUNT_DROP_TOO_SMALL,
  COUNT_PACKETS,
  DESTINATION_PIECES,
  DESTINATION_VRING,
  FRAME_BYTES_MIN,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  POLL_FILE_ASK,
  POLL_FILE_WAITS,
  VRING_FLAGS,
  VRING_HEADER_SIZE,
  VRING_MERGEABLE,
  VRING_SIZE,
} from "../../src/layout/lane.ts";
import {
  BOUNCE_BYTES,
  FILE_FRAME_BYTES_MAX,
  FILE_HEADERS,
  FILE_HEADER_BYTES,
  HELD_END,
  HELD_NEXT,
  IOVEC_BYTES,
  READS_LARGE,
  READS_NEXT,
  READS_SINCE,
  READ_BYTES_MAX,
  REQUESTS_MAX,
  REQUEST_IOVECS_MAX,
} from "../../src/layout/requests.ts";
import {
  NET_HDR_CSUM_OFFSET,
  NET_HDR_NUM_BUFFERS,
  NET_HDR_SIZE,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
} from "../../src/layout/virtio.ts";
import {
  CHAIN_BROKEN,
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
import { Destination, end, store16, store64 } from "../guest";
import { requestKick } from "../notify";
import { behind, flagsOf, give, idOf, isOffered, walk } from "../ring";
import { count } from "../stats";
import { offset, segment, translate } from "../translate";
import { nextAvail, setNextAvail } from "../vring";
import {
  BUFFERS_BROKEN,
  BUFFERS_NONE,
  BUFFERS_READY,
  addMerged,
  beginMerged,
  giveMerged,
  isWaiting,
  keepMerged,
  makeRoom,
  mergedCount,
  openBuffer,
  returnUnused,
  stopWaiting,
  tryBuffer,
  waitingAt,
} from "../lane/buffers";
import { beginFrames, breakDestination, deliverStored, finishDestination, isReceiving, receiving } from "../lane/frame";
import {
  CARRIED_BEHIND,
  CARRIED_HEADER,
  CARRIED_HEADER_SEGMENT,
  CARRIED_HELD,
  CARRIED_ID,
  CARRIED_IOVECS,
  CARRIED_RESULT,
  CARRIED_ROOM,
  CARRIED_SLOTS,
  EAGAIN,
  EBADFD,
  EFAULT,
  EINVAL,
  EIO,
  NOT_TAKEN,
  addIovec,
  addRequest,
  beginRequests,
  bounce,
  carried,
  copyBack,
  dropIovecs,
  endRequests,
  guestAddress,
  batchIovecsLeft,
  iovecsEnd,
  ownAddress,
  requests,
  takeCompletions,
} from "./requests";

const LINKS: u32 = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;
/** A frame with its net header. */
const BYTES_MAX: u32 = NET_HDR_SIZE + FILE_FRAME_BYTES_MAX;
/** Small frames in turn after which reads are small again. */
const LARGE_FRAMES: u32 = 64;

/** Whether the requests are one read with several chains. */
let large: bool = false;
/** Of this turn. */
let delivered: u64 = 0;
let deliveredBytes: u64 = 0;
/** What was walked before. */
let walkedBefore: u32 = 0;

/** Whether this turn has walked enough: it ends, the next one goes on. */
function isLongTurn(): bool {
  return walked - walkedBefore > WALK_MAX;
}

/** Makes requests to read up to `budget` frames, as far as there are buffers. @returns how many */
export function prepareReceive(budget: u32): u32 {
  beginRequests();
  delivered = 0;
  deliveredBytes = 0;
  large = false;
  walkedBefore = walked;
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

/** Makes a request to read into the next receive chain. @returns whether there was one */
function askOne(): bool {
  const record = carried(requests);
  const position = requests ? load<u32>(carried(requests - 1), CARRIED_BEHIND) : nextAvail<Destination>();
  if (!addChain(position, true)) return false;
  store<u32>(record, addedId, CARRIED_ID);
  store<u32>(record, addedSlots, CARRIED_SLOTS);
  store<u32>(record, behind<Destination>(addedAt, addedSlots), CARRIED_BEHIND);
  endRead(addedRoom);
  return true;
}

/** Makes one request to read into as many receive chains as a large frame takes, or as there are. */
function askLarge(): void {
  const size = load<u32>(DESTINATION_VRING, VRING_SIZE);
  if (!addChain(nextAvail<Destination>(), true)) return;
  let room = addedRoom;
  let slots: u32 = 0;
  beginMerged();
  while (true) {
    addMerged(addedId, addedSlots, <u32>min<u64>(addedBytes, BYTES_MAX));
    slots += addedSlots;
    if (room == 0 || room >= BYTES_MAX || slots >= size || isLongTurn()) break;
    const iovecs = iovecsEnd;
    if (!addChain(behind<Destination>(addedAt, addedSlots), false)) break;
    if (slots + addedSlots > size) {
      dropIovecs(iovecs);
      break;
    }
    room += addedRoom;
  }
  large = true;
  endRead(room);
}

// The receive chain added last: its position, what to give back, the bytes it holds, and those of the file that go into it
let addedAt: u32 = 0;
let addedId: u32 = 0;
let addedSlots: u32 = 0;
let addedBytes: u64 = 0;
let addedRoom: u32 = 0;

/** Adds iovecs for the receive chain at a position. @param begins it is the read's first one @returns whether there is one */
function addChain(position: u32, begins: bool): bool {
  const headerBytes = begins ? load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE) : 0;
  if (!openNext(position, begins)) return false;
  // The usual buffer: one descriptor. More than the largest frame is never asked for.
  const length = min<u32>(<u32>openedRest, BYTES_MAX);
  if (
    (flagsOf<Destination>(openedRest) & LINKS) == VRING_DESC_F_WRITE &&
    length > headerBytes &&
    translate<Destination>(openedAddress) >= (openedRest & 0xffff_ffff)
  ) {
    if (iovecsLeft(begins) < 3) return false;
    const at = guestAddress(segment, offset);
    addedAt = position;
    addedId = idOf<Destination>(openedId, openedRest);
    addedSlots = 1;
    addedBytes = length;
    addedRoom = length;
    if (begins) beginRead(headerBytes, segment, offset);
    if (begins && headerBytes != NET_HDR_SIZE) {
      addIovec(at + headerBytes, length - headerBytes);
      addedRoom = length - headerBytes + NET_HDR_SIZE;
    } else addIovec(at, length);
    return true;
  }

  if (!walkNext(position, begins)) return false;
  const pieces = <u32>((piecesEnd - DESTINATION_PIECES) / PIECE_BYTES);
  const left = iovecsLeft(begins);
  // The rest of what one request cannot take goes to the bounce.
  if (left < 3 || (left < pieces + 2 && (requests || !begins))) return false;
  if (begins) {
    beginRead(headerBytes, load<u32>(DESTINATION_PIECES, PIECE_SEGMENT), load<u64>(DESTINATION_PIECES, PIECE_OFFSET));
  }
  addedId = chainId;
  addedSlots = chainSlots;
  addedBytes = chainBytes;
  addedRoom = addPieces(headerBytes, left - 2);
  return true;
}

/** How many iovecs a read may still have. */
function iovecsLeft(begins: bool): u32 {
  if (begins) return min<u32>(batchIovecsLeft(), REQUEST_IOVECS_MAX);
  return REQUEST_IOVECS_MAX - <u32>((iovecsEnd - load<u32>(carried(requests), CARRIED_IOVECS)) / IOVEC_BYTES);
}

/** Opens the receive chain at a position, for a read. @returns whether there is one */
function openNext(position: u32, begins: bool): bool {
  // What has begun is not held up, nor ended, by what comes behind it.
  if (requests || !begins) return tryBuffer(position) == BUFFERS_READY;
  const found = openBuffer(position);
  if (found == BUFFERS_BROKEN) breakDestination();
  if (found != BUFFERS_READY) return false;
  stopWaiting();
  return true;
}

/**
 * Walks the chain that was opened at a position, into DESTINATION_PIECES. Malformed ones are returned with length 0, and the
 * first one behind them is walked; of what has begun they are the end.
 * @returns whether there is one, at addedAt
 */
function walkNext(position: u32, begins: bool): bool {
  const size = load<u32>(DESTINATION_VRING, VRING_SIZE);
  for (let chains: u32 = 0; chains < size; ++chains) {
    addedAt = position;
    const found = walk<Destination>(position, openedId, openedAddress, openedRest, DESTINATION_PIECES, BYTES_MAX);
    if (found == CHAIN_READY && chainBytes != 0 && chainBytes <= u32.MAX_VALUE) return true;
    if (requests || !begins) return false;
    if (found == CHAIN_BROKEN) {
      breakDestination();
      return false;
    }
    beginMerged();
    returnUnused();
    position = behind<Destination>(position, chainSlots);
    setNextAvail<Destination>(position);
    if (isLongTurn() || !openNext(position, true)) return false;
  }
  return false;
}

/** Begins the iovecs of a read. @param at where the guest's buffer begins */
function beginRead(headerBytes: u32, headerSegment: u32, at: u64): void {
  const record = carried(requests);
  store<u32>(record, <u32>iovecsEnd, CARRIED_IOVECS);
  store<u32>(record, headerSegment, CARRIED_HEADER_SEGMENT);
  store<u64>(record, at, CARRIED_HEADER);
  if (headerBytes != NET_HDR_SIZE) {
    addIovec(ownAddress(FILE_HEADERS + <usize>requests * FILE_HEADER_BYTES), NET_HDR_SIZE);
  }
}

/**
 * Adds iovecs of DESTINATION_PIECES. @param headerBytes what the first one begins with; 0: none
 * @returns bytes of the file that they hold, up to BYTES_MAX; 0: the buffer is for frames that are held, its header is in pieces
 */
function addPieces(headerBytes: u32, iovecsMax: u32): u32 {
  if (load<u32>(DESTINATION_PIECES, PIECE_LENGTH) < headerBytes) return 0;
  const isOwn = headerBytes != 0 && headerBytes != NET_HDR_SIZE;
  let skip: u32 = isOwn ? headerBytes : 0;
  let room: u32 = isOwn ? NET_HDR_SIZE : 0;
  for (let piece: usize = DESTINATION_PIECES; piece < piecesEnd && iovecsMax != 0; piece += PIECE_BYTES) {
    const length = load<u32>(piece, PIECE_LENGTH) - skip;
    const at = load<u64>(piece, PIECE_OFFSET) + skip;
    skip = 0;
    if (length == 0) continue;
    addIovec(guestAddress(load<u32>(piece, PIECE_SEGMENT), at), length);
    room += length;
    --iovecsMax;
  }
  return room;
}

/** Ends the iovecs of a read with the bounce, for what passes `room` bytes. */
function endRead(room: u32): void {
  const record = carried(requests);
  // A header in pieces: nothing is read into the guest's buffer.
  const isOwn = room == 0 && <u32>iovecsEnd != load<u32>(record, CARRIED_IOVECS);
  const before = isOwn ? <u32>NET_HDR_SIZE : room;
  if (before <= load<u32>(READ_BYTES_MAX)) addIovec(ownAddress(bounce(requests)) + before, BOUNCE_BYTES - before);
  store<u32>(record, room, CARRIED_ROOM);
  store<u32>(record, 0, CARRIED_HELD);
  addRequest(load<u32>(record, CARRIED_IOVECS));
}

/** Gives the guest what was read. @returns POLL_* */
export function finishReceive(): u32 {
  if (requests) takeReads();
  if (delivered) {
    count(COUNT_PACKETS, delivered);
    count(COUNT_BYTES, deliveredBytes);
    count(COUNT_BATCHES);
  }
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
  store<u32>(HELD_NEXT, 0);
  store<u32>(HELD_END, 0);
  for (let number: u32 = 0; number < requests; ++number) {
    const record = carried(number);
    const result = load<i32>(record, CARRIED_RESULT);
    if (result < <i32>(NET_HDR_SIZE + FRAME_BYTES_MIN)) {
      // Whatever it is, its chain was not used.
      inOrder = false;
      if (result < 0 && result != EFAULT) waitsFor |= POLL_FILE_WAITS;
      if (result == NOT_TAKEN) waitsFor |= POLL_FILE_ASK;
      else if (!isNothing(result)) {
        count(result == EFAULT ? COUNT_DROP_MALFORMED : result >= 0 ? COUNT_DROP_BAD_FRAME : COUNT_DROP_NO_BUFFER);
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
  // A read that finds nothing costs half of one that does: half as many as have come since there was nothing.
  const since = load<u32>(READS_SINCE) + found;
  store<u32>(READS_NEXT, min<u32>(REQUESTS_MAX, max<u32>(1, since >> 1)));
  store<u32>(READS_SINCE, waitsFor ? 0 : min<u32>(since, 2 * REQUESTS_MAX));
}

/** Whether a result says that there was no frame: none there, or no interface any more, or a queue that is not attached. */
function isNothing(result: i32): bool {
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
  if (large) {
    position = keepMerged(first, written);
    chains = mergedCount();
    store<u32>(READS_LARGE, chains > 1 ? LARGE_FRAMES : load<u32>(READS_LARGE) - 1);
  }
  const headerSegment = load<u32>(record, CARRIED_HEADER_SEGMENT);
  const header = load<u64>(record, CARRIED_HEADER);
  if (headerBytes == NET_HDR_SIZE) store16(end<Destination>(), headerSegment, header + NET_HDR_NUM_BUFFERS, chains);
  else {
    const own: usize = FILE_HEADERS + <usize>number * FILE_HEADER_BYTES;
    store64(end<Destination>(), headerSegment, header, load<u64>(own));
    store16(end<Destination>(), headerSegment, header + NET_HDR_CSUM_OFFSET, load<u16>(own, NET_HDR_CSUM_OFFSET));
  }
  if (large) giveMerged();
  else {
    makeRoom(1, slots);
    give<Destination>(id, written, slots);
  }
  setNextAvail<Destination>(position);
  ++delivered;
  deliveredBytes += bytes - NET_HDR_SIZE;
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
      load<u64>(frame),
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
