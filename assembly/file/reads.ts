/**
 * Reads of a file: requests whose iovecs are receive buffers of the destination, and a bounce.
 *
 * Every place that such an iovec names is inside a chain that the driver has made available, writable, and that is not given back
 * before the read is over.
 */
import {
  DESTINATION_PIECES,
  DESTINATION_VRING,
  FRAME_BYTES_MAX,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  VRING_HEADER_SIZE,
  VRING_SIZE,
} from "../../src/layout/lane.ts";
import {
  BOUNCE_BYTES,
  FILE_HEADERS,
  FILE_HEADER_BYTES,
  IOVEC_BYTES,
  READ_BYTES_MAX,
  REQUEST_IOVECS_MAX,
} from "../../src/layout/requests.ts";
import { NET_HDR_SIZE, VRING_DESC_F_WRITE } from "../../src/layout/virtio.ts";
import {
  CHAIN_BROKEN,
  CHAIN_READY,
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
import { Destination } from "../guest";
import { behind, flagsOf, idOf, walk } from "../ring";
import { offset, segment, translate } from "../translate";
import { nextAvail, setNextAvail } from "../vring";
import {
  BUFFERS_BROKEN,
  BUFFERS_READY,
  addMerged,
  beginMerged,
  openBuffer,
  returnUnused,
  stopWaiting,
  tryBuffer,
} from "../lane/buffers";
import { breakDestination } from "../lane/frame";
import {
  CARRIED_BEHIND,
  CARRIED_HEADER,
  CARRIED_HEADER_SEGMENT,
  CARRIED_HELD,
  CARRIED_ID,
  CARRIED_IOVECS,
  CARRIED_ROOM,
  CARRIED_SLOTS,
  addIovec,
  addRequest,
  bounce,
  carried,
  dropIovecs,
  guestAddress,
  batchIovecsLeft,
  iovecsEnd,
  ownAddress,
  requests,
} from "./requests";

/** A frame with its net header. */
const BYTES_MAX: u32 = NET_HDR_SIZE + FRAME_BYTES_MAX;

/** Whether the requests are one read with several chains, which are the merged ones. */
export let isLarge: bool = false;
/** What was walked before this turn. */
let walkedBefore: u32 = 0;

/** A turn begins. */
export function beginReads(): void {
  isLarge = false;
  walkedBefore = walked;
}

/** Whether this turn has walked enough: it ends, the next one goes on. */
export function isLongTurn(): bool {
  return walked - walkedBefore > WALK_MAX;
}

/** Makes a request to read into the next receive chain. @returns whether there was one */
export function askOne(): bool {
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
export function askLarge(): void {
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
  isLarge = true;
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
