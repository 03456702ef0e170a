/**
 * Ring to file: frames of the source's transmitq are written to a file, a queue of a TAP interface. The kernel copies them
 * out of the guest's buffers and checks their headers; the core reads neither.
 *
 * Chains are given back when the kernel has copied them, in their order. Where the file is full they stay in the
 * ring, which is the queue.
 */
import {
  COUNT_CALLS_SOURCE,
  COUNT_DROP_BAD_FRAME,
  COUNT_DROP_DISABLED,
  COUNT_DROP_MALFORMED,
  COUNT_DROP_NO_BUFFER,
  COUNT_DROP_NO_RECEIVER,
  FRAME_BYTES_MAX,
  FRAME_BYTES_MIN,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  POLL_BROKE_SOURCE,
  POLL_CALL_SOURCE,
  POLL_FILE_ASK,
  POLL_FILE_WAITS,
  SOURCE_PIECES,
  SOURCE_VRING,
  VRING_ENABLED,
  VRING_FLAGS,
  VRING_HEADER_SIZE,
} from "../../src/layout/lane.ts";
import { FILE_HEADERS, FILE_HEADER_BYTES, REQUESTS_MAX, REQUEST_IOVECS_MAX } from "../../src/layout/requests.ts";
import { NET_HDR_CSUM_OFFSET, NET_HDR_NUM_BUFFERS, NET_HDR_SIZE } from "../../src/layout/virtio.ts";
import {
  CHAIN_BROKEN,
  CHAIN_REFUSED,
  LINKS,
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
import { Source } from "../guest";
import { loadCsumOffsetPieces, loadHeaderPieces } from "../net-header";
import { requestKick } from "../notify";
import { behind, countOffered, fits, flagsOf, give, idOf, isOffered, isRunning, open, publish, walk } from "../ring";
import { count, countDelivered } from "../stats";
import { offset, segment, translate } from "../translate";
import { breakRing, nextAvail, setNextAvail } from "../vring";
import { decideCall } from "../lane/calls";
import { newSource } from "../lane/pieces";
import {
  CARRIED_BEHIND,
  CARRIED_ID,
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
  addWhole,
  batchIovecsLeft,
  beginRequests,
  bounce,
  carried,
  copyFrom,
  endRequests,
  guestAddress,
  iovecsEnd,
  ownAddress,
  requests,
  takeCompletions,
} from "./requests";

/** A frame in pieces costs the kernel as much as a copy of so many bytes. */
const COPY_BYTES_MAX: u32 = 256;

// What became of one transmit chain
const ASKED: u32 = 0;
const DROPPED: u32 = 1;
/** It is not for this batch. */
const LATER: u32 = 2;
const BROKEN: u32 = 3;

let dropped: u32 = 0;
let broke: bool = false;

/** Makes requests to write up to `budget` frames. @returns how many */
export function prepareSend(budget: u32): u32 {
  beginRequests();
  dropped = 0;
  broke = false;
  if (!isRunning<Source>()) return 0;
  const offered = countOffered<Source>(min<u32>(budget, REQUESTS_MAX));
  const enabled = (load<u32>(SOURCE_VRING, VRING_FLAGS) & VRING_ENABLED) != 0;
  const walkedBefore = walked;
  let outcome = offered < 0 ? BROKEN : ASKED;
  let position = nextAvail<Source>();
  while (outcome <= DROPPED && <i32>(requests + dropped) < offered && walked - walkedBefore <= WALK_MAX) {
    outcome = prepareFrame(position, enabled);
    position = outcome == ASKED ? load<u32>(carried(requests - 1), CARRIED_BEHIND) : nextAvail<Source>();
  }
  // What comes before a mistake is still sent.
  if (outcome == BROKEN && requests == 0) {
    breakRing<Source>();
    broke = true;
  }
  return endRequests();
}

function prepareFrame(position: u32, enabled: bool): u32 {
  const opened = open<Source>(position);
  if (opened != 0) return opened == CHAIN_BROKEN ? BROKEN : LATER;
  const headerBytes = load<u32>(SOURCE_VRING, VRING_HEADER_SIZE);
  const bytesMin = headerBytes + FRAME_BYTES_MIN;
  const bytesMax = headerBytes + FRAME_BYTES_MAX;
  const length = <u32>openedRest;
  // The usual frame: one descriptor, header and all
  if (
    enabled &&
    !(flagsOf<Source>(openedRest) & LINKS) &&
    length >= bytesMin &&
    length <= bytesMax &&
    headerBytes == NET_HDR_SIZE &&
    translate<Source>(openedAddress) >= <u64>length
  ) {
    describe(position, idOf<Source>(openedId, openedRest), 1, length - NET_HDR_SIZE);
    addWhole(guestAddress(segment, offset), length);
    return ASKED;
  }

  const found = walk<Source>(position, openedId, openedAddress, openedRest, SOURCE_PIECES, bytesMax);
  if (found == CHAIN_BROKEN) return BROKEN;
  let reason: usize = 0;
  if (!enabled) reason = COUNT_DROP_DISABLED;
  else if (found == CHAIN_REFUSED) reason = COUNT_DROP_MALFORMED;
  else if (chainBytes < bytesMin || chainBytes > bytesMax) reason = COUNT_DROP_BAD_FRAME;
  if (reason == 0) return askPieces(position, headerBytes);
  // Chains are given back in their order: this one once those before it have been sent.
  if (requests) return LATER;
  count(reason);
  giveBack(chainId, chainSlots, behind<Source>(position, chainSlots));
  ++dropped;
  return DROPPED;
}

/** Makes a request of the frame in SOURCE_PIECES. */
function askPieces(position: u32, headerBytes: u32): u32 {
  const bytes = <u32>chainBytes;
  const pieces = <u32>((piecesEnd - SOURCE_PIECES) / PIECE_BYTES);
  const copies = pieces >= <u32>REQUEST_IOVECS_MAX || bytes <= COPY_BYTES_MAX;
  if (batchIovecsLeft() <= (copies ? 1 : pieces)) return LATER;
  newSource();
  const iovecs = iovecsEnd;
  let skip: u32 = 0;
  let copied = bounce(requests);
  if (headerBytes != NET_HDR_SIZE) {
    const header: usize = copies ? copied : FILE_HEADERS + <usize>requests * FILE_HEADER_BYTES;
    store<u64>(header, loadHeaderPieces());
    store<u16>(header, <u16>loadCsumOffsetPieces(), NET_HDR_CSUM_OFFSET);
    store<u16>(header, 0, NET_HDR_NUM_BUFFERS);
    if (!copies) addIovec(ownAddress(header), NET_HDR_SIZE);
    else copied += NET_HDR_SIZE;
    skip = headerBytes;
  }
  for (let piece: usize = SOURCE_PIECES; piece < piecesEnd; piece += PIECE_BYTES) {
    const length = load<u32>(piece, PIECE_LENGTH);
    const skipped = min(skip, length);
    skip -= skipped;
    if (length == skipped) continue;
    const at = load<u64>(piece, PIECE_OFFSET) + skipped;
    if (copies) {
      copyFrom<Source>(copied, load<u32>(piece, PIECE_SEGMENT), at, length - skipped);
      copied += length - skipped;
    } else addIovec(guestAddress(load<u32>(piece, PIECE_SEGMENT), at), length - skipped);
  }
  if (copies) addIovec(ownAddress(bounce(requests)), <u32>(copied - bounce(requests)));
  describe(position, chainId, chainSlots, bytes - headerBytes);
  addRequest(iovecs);
  return ASKED;
}

/** Writes the record of the next request: the chain that it sends. */
function describe(position: u32, id: u32, slots: u32, frameBytes: u32): void {
  const record = carried(requests);
  store<u32>(record, id, CARRIED_ID);
  store<u32>(record, slots, CARRIED_SLOTS);
  store<u32>(record, behind<Source>(position, slots), CARRIED_BEHIND);
  store<u32>(record, frameBytes, CARRIED_ROOM);
}

/** Gives back what the kernel has taken. @returns POLL_* */
export function finishSend(): u32 {
  if (broke) return POLL_BROKE_SOURCE | publishSource();
  takeCompletions();
  // Up to the last one that the kernel took: one before it that found no room is lost, or frames would change their order.
  let taken = requests;
  while (taken != 0 && isForLater(load<i32>(carried(taken - 1), CARRIED_RESULT))) --taken;
  let delivered: u64 = 0;
  let bytes: u64 = 0;
  for (let number: u32 = 0; number < taken; ++number) {
    const record = carried(number);
    const result = load<i32>(record, CARRIED_RESULT);
    if (result >= 0) {
      ++delivered;
      bytes += load<u32>(record, CARRIED_ROOM);
    } else count(reasonOf(result));
    giveBack(load<u32>(record, CARRIED_ID), load<u32>(record, CARRIED_SLOTS), load<u32>(record, CARRIED_BEHIND));
  }
  countDelivered(delivered, bytes);
  // A file that is full tells when it is not only to somebody who has asked since.
  const waits: u32 = taken < requests ? POLL_FILE_WAITS | POLL_FILE_ASK : 0;
  return (taken + dropped) | waits | publishSource();
}

function isForLater(result: i32): bool {
  return result == EAGAIN || result == NOT_TAKEN;
}

/** Why the kernel did not take a frame: the counter. */
function reasonOf(error: i32): usize {
  if (error == EINVAL) return COUNT_DROP_BAD_FRAME;
  if (error == EFAULT) return COUNT_DROP_MALFORMED;
  return error == EIO || error == EBADFD ? COUNT_DROP_NO_RECEIVER : COUNT_DROP_NO_BUFFER;
}

function giveBack(id: u32, slots: u32, position: u32): void {
  if (!fits<Source>(1, slots)) publish<Source>();
  give<Source>(id, 0, slots);
  setNextAvail<Source>(position);
}

function publishSource(): u32 {
  if (!isRunning<Source>() && !broke) return 0;
  publish<Source>();
  return decideCall<Source>(COUNT_CALLS_SOURCE, POLL_CALL_SOURCE);
}

/** Asks for a kick when there is a frame to send. @returns whether there is one after all */
export function awaitFrames(): bool {
  if (!isRunning<Source>()) return false;
  requestKick<Source>(nextAvail<Source>());
  return isOffered<Source>(nextAvail<Source>());
}
