/**
 * The usual frames, with everything in locals: a run of frames in one transmit descriptor each, each into one receive
 * descriptor that holds it, all inside the extents found last. One function, compiled for each pair of ring formats.
 *
 * The run ends before the first frame that is anything else, broken rules included, and leaves behind what it has loaded
 * of that frame: no word is read from guest memory twice.
 */
import {
  DESTINATION_HIT,
  DESTINATION_VRING,
  EXTENT_GPA,
  EXTENT_OFFSET,
  EXTENT_SEGMENT,
  EXTENT_SIZE,
  FRAME_BYTES_MAX,
  FRAME_BYTES_MIN,
  OFFLOAD_CSUM,
  SOURCE_HIT,
  SOURCE_VRING,
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_DESC,
  VRING_DESC_SEGMENT,
  VRING_HEADER_SIZE,
  VRING_HELD,
  VRING_LIMIT,
  VRING_NEXT_USED,
  VRING_OFFLOADS,
  VRING_PUBLISHED,
  VRING_SIZE,
  VRING_UNDECIDED,
  VRING_USED,
  VRING_USED_SEGMENT,
} from "../../src/layout/lane.ts";
import {
  AVAIL_ENTRY_SIZE,
  AVAIL_RING,
  DESC_LEN,
  DESC_SIZE,
  PACKED_DESC_LEN,
  USED_ENTRY_SIZE,
  USED_RING,
  VRING_DESC_F_WRITE,
} from "../../src/layout/virtio.ts";
import { CHAIN_READY, LINKS } from "../chain";
import { Destination, Source, atomicLoad64, copy, end, load16, load64, store64 } from "../guest";
import { asksForOffload, loadCsumOffset, loadHeader, storeHeader } from "../net-header";
import { OWNER, availableIn, batchRoom, usedDescriptor, usedIn } from "../packed";
import { isPacked, nextAvail, setNextAvail, vringOf } from "../vring";
import { peekBuffer, stopWaiting } from "./buffers";
import { passedChecksum, passesChecksum } from "./offload";

// What the run has loaded of the frame it ended before
const LEFT_NOTHING: u32 = 0;
export const LEFT_END: u32 = 1; // there is none
export const LEFT_BAD_HEAD: u32 = 2; // a head that is no descriptor
export const LEFT_CHAIN: u32 = 3; // the first descriptor; what follows includes it
export const LEFT_BAD_BUFFER: u32 = 4; // and the receive chain's head is no descriptor
export const LEFT_BUFFER: u32 = 5; // and the receive chain's first descriptor
export const LEFT_OFFLOAD: u32 = 6; // and the header, which asks for an offload that takes some work
export let left: u32 = LEFT_NOTHING;
export let leftId: u32 = 0;
export let leftAddress: u64 = 0;
export let leftRest: u64 = 0;
export let leftBufferId: u32 = 0;
export let leftBufferAddress: u64 = 0;
export let leftBufferRest: u64 = 0;
export let leftHeader: u64 = 0;
export let leftCsumOffset: u32 = 0;

/** Frame bytes of the last run, and the position of the transmit chain behind it. */
export let runBytes: u64 = 0;
export let runEnd: u32 = 0;

/** Type arguments that stand for the two ring formats. */
class Split {}
class Packed {}

/** There was no run. */
export function skipRun(): void {
  left = LEFT_NOTHING;
}

/** Carries up to `limit` frames from a position on. Both rings run and are enabled. @returns how many */
export function carryRun(position: u32, limit: u32): u32 {
  runBytes = 0;
  runEnd = position;
  left = LEFT_NOTHING;
  if (isPacked<Source>()) limit = min(limit, batchRoom<Source>());
  if (isPacked<Destination>()) {
    limit = min(limit, batchRoom<Destination>());
    if (limit == 0) return 0;
    return isPacked<Source>() ? run<Packed, Packed>(position, limit) : run<Split, Packed>(position, limit);
  }
  const next = nextAvail<Destination>();
  if (limit == 0 || peekBuffer(next) != CHAIN_READY) return 0;
  limit = min(limit, (load<u32>(DESTINATION_VRING, VRING_LIMIT) - next) & 0xffff);
  return isPacked<Source>() ? run<Packed, Split>(position, limit) : run<Split, Split>(position, limit);
}

function isFormat<F>(): bool {
  return idof<F>() == idof<Packed>();
}

function run<F, T>(position: u32, limit: u32): u32 {
  const fromSize = load<u32>(SOURCE_VRING, VRING_SIZE);
  const fromDescSegment = load<u32>(SOURCE_VRING, VRING_DESC_SEGMENT);
  const fromDesc = load<u64>(SOURCE_VRING, VRING_DESC);
  const fromAvailSegment = load<u32>(SOURCE_VRING, VRING_AVAIL_SEGMENT);
  const fromAvail = load<u64>(SOURCE_VRING, VRING_AVAIL) + AVAIL_RING;
  const fromUsedSegment = load<u32>(SOURCE_VRING, VRING_USED_SEGMENT);
  const fromUsed = load<u64>(SOURCE_VRING, VRING_USED) + USED_RING;
  const fromGpa = load<u64>(SOURCE_HIT, EXTENT_GPA);
  const fromHitSize = load<u64>(SOURCE_HIT, EXTENT_SIZE);
  const fromSegment = load<u32>(SOURCE_HIT, EXTENT_SEGMENT);
  const fromOffset = load<u64>(SOURCE_HIT, EXTENT_OFFSET);
  const fromHeader = load<u32>(SOURCE_VRING, VRING_HEADER_SIZE);
  const toSize = load<u32>(DESTINATION_VRING, VRING_SIZE);
  const toDescSegment = load<u32>(DESTINATION_VRING, VRING_DESC_SEGMENT);
  const toDesc = load<u64>(DESTINATION_VRING, VRING_DESC);
  const toAvailSegment = load<u32>(DESTINATION_VRING, VRING_AVAIL_SEGMENT);
  const toAvail = load<u64>(DESTINATION_VRING, VRING_AVAIL) + AVAIL_RING;
  const toUsedSegment = load<u32>(DESTINATION_VRING, VRING_USED_SEGMENT);
  const toUsed = load<u64>(DESTINATION_VRING, VRING_USED) + USED_RING;
  const toGpa = load<u64>(DESTINATION_HIT, EXTENT_GPA);
  const toHitSize = load<u64>(DESTINATION_HIT, EXTENT_SIZE);
  const toSegment = load<u32>(DESTINATION_HIT, EXTENT_SEGMENT);
  const toOffset = load<u64>(DESTINATION_HIT, EXTENT_OFFSET);
  const toHeader = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);

  // Split: avail and used index, free-running. Packed: the slot, the bits of its lap, whether its used flags are kept back.
  let fromNext = isFormat<F>() ? position & 0x7fff : position;
  let fromUsedNext = load<u32>(SOURCE_VRING, VRING_NEXT_USED);
  let fromAvailable = availableIn(position >> 15);
  let fromUsedFlags = usedIn(position >> 15);
  let fromHolds = fromUsedNext == load<u32>(SOURCE_VRING, VRING_PUBLISHED);
  const first = nextAvail<Destination>();
  let toNext = isFormat<T>() ? first & 0x7fff : first;
  let toUsedNext = load<u32>(DESTINATION_VRING, VRING_NEXT_USED);
  let toAvailable = availableIn(first >> 15);
  let toUsedFlags = usedIn(first >> 15);
  let toHolds = toUsedNext == load<u32>(DESTINATION_VRING, VRING_PUBLISHED);

  const both = load<u32>(SOURCE_VRING, VRING_OFFLOADS) & load<u32>(DESTINATION_VRING, VRING_OFFLOADS);
  const checksumsPass = (both & OFFLOAD_CSUM) != 0;
  let id: u32 = 0;
  let address: u64 = 0;
  let rest: u64 = 0;
  let bufferId: u32 = 0;
  let bufferAddress: u64 = 0;
  let bufferRest: u64 = 0;
  let header: u64 = 0;
  let csumOffset: u32 = 0;
  let bytes: u64 = 0;
  let done: u32 = 0;
  let reached: u32 = LEFT_NOTHING;
  for (; done < limit; ++done) {
    let descriptor: u64;
    let flags: u32;
    if (isFormat<F>()) {
      descriptor = fromDesc + <u64>fromNext * DESC_SIZE;
      rest = atomicLoad64(end<Source>(), fromDescSegment, descriptor + PACKED_DESC_LEN);
      flags = <u32>(rest >> 48);
      id = <u32>(rest >> 32) & 0xffff;
      if ((flags & OWNER) != fromAvailable) {
        reached = LEFT_END;
        break;
      }
      address = load64(end<Source>(), fromDescSegment, descriptor);
    } else {
      const entry = fromAvail + <u64>(fromNext & (fromSize - 1)) * AVAIL_ENTRY_SIZE;
      id = load16(end<Source>(), fromAvailSegment, entry);
      if (id >= fromSize) {
        reached = LEFT_BAD_HEAD;
        break;
      }
      descriptor = fromDesc + <u64>id * DESC_SIZE;
      address = load64(end<Source>(), fromDescSegment, descriptor);
      rest = load64(end<Source>(), fromDescSegment, descriptor + DESC_LEN);
      flags = <u32>(rest >> 32);
    }
    const length = <u32>rest;
    const into = address - fromGpa;
    if (
      (flags & LINKS) != 0 ||
      length - (fromHeader + FRAME_BYTES_MIN) > <u32>(FRAME_BYTES_MAX - FRAME_BYTES_MIN) ||
      into >= fromHitSize ||
      fromHitSize - into < <u64>length
    ) {
      reached = LEFT_CHAIN;
      break;
    }

    let bufferDescriptor: u64;
    let bufferFlags: u32;
    if (isFormat<T>()) {
      bufferDescriptor = toDesc + <u64>toNext * DESC_SIZE;
      bufferRest = atomicLoad64(end<Destination>(), toDescSegment, bufferDescriptor + PACKED_DESC_LEN);
      bufferFlags = <u32>(bufferRest >> 48);
      bufferId = <u32>(bufferRest >> 32) & 0xffff;
      if ((bufferFlags & OWNER) != toAvailable) {
        reached = LEFT_CHAIN;
        break;
      }
      bufferAddress = load64(end<Destination>(), toDescSegment, bufferDescriptor);
    } else {
      const entry = toAvail + <u64>(toNext & (toSize - 1)) * AVAIL_ENTRY_SIZE;
      bufferId = load16(end<Destination>(), toAvailSegment, entry);
      if (bufferId >= toSize) {
        reached = LEFT_BAD_BUFFER;
        break;
      }
      bufferDescriptor = toDesc + <u64>bufferId * DESC_SIZE;
      bufferAddress = load64(end<Destination>(), toDescSegment, bufferDescriptor);
      bufferRest = load64(end<Destination>(), toDescSegment, bufferDescriptor + DESC_LEN);
      bufferFlags = <u32>(bufferRest >> 32);
    }
    const frame = length - fromHeader;
    const written = frame + toHeader;
    const room = <u32>bufferRest;
    const toInto = bufferAddress - toGpa;
    if (
      (bufferFlags & LINKS) != VRING_DESC_F_WRITE ||
      room < written ||
      toInto >= toHitSize ||
      toHitSize - toInto < <u64>room
    ) {
      reached = LEFT_BUFFER;
      break;
    }

    const from = fromOffset + into;
    header = loadHeader(fromSegment, from);
    let word: u64 = 0;
    csumOffset = 0;
    if (asksForOffload(header)) {
      csumOffset = loadCsumOffset(fromSegment, from);
      if (!checksumsPass || !passesChecksum(header, csumOffset, frame)) {
        reached = LEFT_OFFLOAD;
        break;
      }
      word = passedChecksum(header);
    }
    const to = toOffset + toInto;
    storeHeader(toSegment, to, toHeader, word, csumOffset, 1);
    copy(toSegment, to + toHeader, fromSegment, from + fromHeader, frame);

    if (isFormat<T>()) {
      const used = usedDescriptor(bufferId, written, toUsedFlags);
      if (toHolds) store<u64>(DESTINATION_VRING, used, VRING_HELD);
      else store64(end<Destination>(), toDescSegment, bufferDescriptor + PACKED_DESC_LEN, used);
      toHolds = false;
      if (++toNext == toSize) {
        toNext = 0;
        toAvailable ^= OWNER;
        toUsedFlags ^= OWNER;
      }
    } else {
      const used = toUsed + <u64>(toUsedNext & (toSize - 1)) * USED_ENTRY_SIZE;
      store64(end<Destination>(), toUsedSegment, used, <u64>bufferId | ((<u64>written) << 32));
      ++toNext;
      ++toUsedNext;
    }
    if (isFormat<F>()) {
      const used = usedDescriptor(id, 0, fromUsedFlags);
      if (fromHolds) store<u64>(SOURCE_VRING, used, VRING_HELD);
      else store64(end<Source>(), fromDescSegment, descriptor + PACKED_DESC_LEN, used);
      fromHolds = false;
      if (++fromNext == fromSize) {
        fromNext = 0;
        fromAvailable ^= OWNER;
        fromUsedFlags ^= OWNER;
      }
    } else {
      store64(end<Source>(), fromUsedSegment, fromUsed + <u64>(fromUsedNext & (fromSize - 1)) * USED_ENTRY_SIZE, id);
      ++fromNext;
      ++fromUsedNext;
    }
    bytes += frame;
  }

  left = reached;
  leftId = id;
  leftAddress = address;
  leftRest = rest;
  leftBufferId = bufferId;
  leftBufferAddress = bufferAddress;
  leftBufferRest = bufferRest;
  leftHeader = header;
  leftCsumOffset = csumOffset;
  runEnd = isFormat<F>() ? fromNext | (fromUsedFlags & 0x8000) : fromNext & 0xffff;
  if (done) {
    const toEnd = isFormat<T>() ? toNext | (toUsedFlags & 0x8000) : toNext & 0xffff;
    setNextAvail<Destination>(toEnd);
    endRun<Source>(isFormat<F>() ? runEnd : fromUsedNext & 0xffff, done);
    endRun<Destination>(isFormat<T>() ? toEnd : toUsedNext & 0xffff, done);
    stopWaiting();
  }
  runBytes = bytes;
  return done;
}

/** So many chains of one slot were given back. */
function endRun<E>(nextUsed: u32, slots: u32): void {
  const vring = vringOf<E>();
  store<u32>(vring, nextUsed, VRING_NEXT_USED);
  store<u32>(vring, load<u32>(vring, VRING_UNDECIDED) + slots, VRING_UNDECIDED);
}
