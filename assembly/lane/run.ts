/**
 * The usual frames, with everything in locals: a run of frames in one transmit descriptor each, each into one receive
 * descriptor that holds it, all inside the extents found last.
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
  SOURCE_HIT,
  SOURCE_VRING,
  VRING_AVAIL,
  VRING_AVAIL_SEGMENT,
  VRING_DESC,
  VRING_DESC_SEGMENT,
  VRING_HEADER_SIZE,
  VRING_NEXT_USED,
  VRING_SIZE,
  VRING_USED,
  VRING_USED_SEGMENT,
} from "../../src/layout/lane.ts";
import {
  AVAIL_ENTRY_SIZE,
  AVAIL_RING,
  DESC_LEN,
  DESC_SIZE,
  USED_ENTRY_SIZE,
  USED_RING,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
} from "../../src/layout/virtio.ts";
import { Destination, Source, copy, end, load16, load64, store64 } from "../guest";
import { isOffloadHeader, storeHeader } from "../net-header";
import { nextAvail, setNextAvail } from "../split";
import { availLimit, stopWaiting } from "./buffers";

const LINKS: u32 = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;

// What the run has loaded of the frame it ended before; each includes those above it
const LOADED_NOTHING: u32 = 0;
export const LOADED_HEAD: u32 = 1;
export const LOADED_CHAIN: u32 = 2; // the first descriptor
export const LOADED_BUFFER_HEAD: u32 = 3;
export const LOADED_BUFFER: u32 = 4; // the receive chain's first descriptor
export const LOADED_OFFLOAD: u32 = 5; // the header, and it asks for an offload
export let loaded: u32 = LOADED_NOTHING;
export let loadedHead: u32 = 0;
export let loadedAddress: u64 = 0;
export let loadedRest: u64 = 0;
export let loadedBufferHead: u32 = 0;
export let loadedBufferAddress: u64 = 0;
export let loadedBufferRest: u64 = 0;

/** Frame bytes of the last run. */
export let runBytes: u64 = 0;

/** There was no run. */
export function skipRun(): void {
  loaded = LOADED_NOTHING;
}

/**
 * Carries up to `limit` frames from avail index `first` on. Both rings run and are enabled, and the avail index of the
 * destination has been loaded.
 * @returns how many
 */
export function carryRun(first: u32, limit: u32): u32 {
  const fromMask = load<u32>(SOURCE_VRING, VRING_SIZE) - 1;
  const fromDescSegment = load<u32>(SOURCE_VRING, VRING_DESC_SEGMENT);
  const fromDesc = load<u64>(SOURCE_VRING, VRING_DESC);
  const fromAvailSegment = load<u32>(SOURCE_VRING, VRING_AVAIL_SEGMENT);
  const fromAvail = load<u64>(SOURCE_VRING, VRING_AVAIL) + AVAIL_RING;
  const fromUsedSegment = load<u32>(SOURCE_VRING, VRING_USED_SEGMENT);
  const fromUsed = load<u64>(SOURCE_VRING, VRING_USED) + USED_RING;
  const fromGpa = load<u64>(SOURCE_HIT, EXTENT_GPA);
  const fromSize = load<u64>(SOURCE_HIT, EXTENT_SIZE);
  const fromSegment = load<u32>(SOURCE_HIT, EXTENT_SEGMENT);
  const fromOffset = load<u64>(SOURCE_HIT, EXTENT_OFFSET);
  const fromHeader = load<u32>(SOURCE_VRING, VRING_HEADER_SIZE);
  const toMask = load<u32>(DESTINATION_VRING, VRING_SIZE) - 1;
  const toDescSegment = load<u32>(DESTINATION_VRING, VRING_DESC_SEGMENT);
  const toDesc = load<u64>(DESTINATION_VRING, VRING_DESC);
  const toAvailSegment = load<u32>(DESTINATION_VRING, VRING_AVAIL_SEGMENT);
  const toAvail = load<u64>(DESTINATION_VRING, VRING_AVAIL) + AVAIL_RING;
  const toUsedSegment = load<u32>(DESTINATION_VRING, VRING_USED_SEGMENT);
  const toUsed = load<u64>(DESTINATION_VRING, VRING_USED) + USED_RING;
  const toGpa = load<u64>(DESTINATION_HIT, EXTENT_GPA);
  const toSize = load<u64>(DESTINATION_HIT, EXTENT_SIZE);
  const toSegment = load<u32>(DESTINATION_HIT, EXTENT_SEGMENT);
  const toOffset = load<u64>(DESTINATION_HIT, EXTENT_OFFSET);
  const toHeader = load<u32>(DESTINATION_VRING, VRING_HEADER_SIZE);
  const firstUsed = load<u32>(SOURCE_VRING, VRING_NEXT_USED);
  const firstBuffer = nextAvail<Destination>();
  const firstBufferUsed = load<u32>(DESTINATION_VRING, VRING_NEXT_USED);
  limit = min(limit, (availLimit - firstBuffer) & 0xffff);

  let head: u32 = 0;
  let address: u64 = 0;
  let rest: u64 = 0;
  let bufferHead: u32 = 0;
  let bufferAddress: u64 = 0;
  let bufferRest: u64 = 0;
  let bytes: u64 = 0;
  let done: u32 = 0;
  loaded = LOADED_NOTHING;
  for (; done < limit; ++done) {
    head = load16(end<Source>(), fromAvailSegment, fromAvail + <u64>((first + done) & fromMask) * AVAIL_ENTRY_SIZE);
    if (head > fromMask) {
      loaded = LOADED_HEAD;
      break;
    }
    const descriptor = fromDesc + <u64>head * DESC_SIZE;
    address = load64(end<Source>(), fromDescSegment, descriptor);
    rest = load64(end<Source>(), fromDescSegment, descriptor + DESC_LEN);
    const length = <u32>rest;
    const into = address - fromGpa;
    if (
      (<u32>(rest >> 32) & LINKS) != 0 ||
      length - (fromHeader + FRAME_BYTES_MIN) > <u32>(FRAME_BYTES_MAX - FRAME_BYTES_MIN) ||
      into >= fromSize ||
      fromSize - into < <u64>length
    ) {
      loaded = LOADED_CHAIN;
      break;
    }

    const slot = <u64>((firstBuffer + done) & toMask);
    bufferHead = load16(end<Destination>(), toAvailSegment, toAvail + slot * AVAIL_ENTRY_SIZE);
    if (bufferHead > toMask) {
      loaded = LOADED_BUFFER_HEAD;
      break;
    }
    const bufferDescriptor = toDesc + <u64>bufferHead * DESC_SIZE;
    bufferAddress = load64(end<Destination>(), toDescSegment, bufferDescriptor);
    bufferRest = load64(end<Destination>(), toDescSegment, bufferDescriptor + DESC_LEN);
    const frame = length - fromHeader;
    const written = frame + toHeader;
    const room = <u32>bufferRest;
    const toInto = bufferAddress - toGpa;
    if (
      (<u32>(bufferRest >> 32) & LINKS) != VRING_DESC_F_WRITE ||
      room < written ||
      toInto >= toSize ||
      toSize - toInto < <u64>room
    ) {
      loaded = LOADED_BUFFER;
      break;
    }

    const from = fromOffset + into;
    if (isOffloadHeader(fromSegment, from)) {
      loaded = LOADED_OFFLOAD;
      break;
    }
    const to = toOffset + toInto;
    storeHeader(toSegment, to, toHeader, 1);
    copy(toSegment, to + toHeader, fromSegment, from + fromHeader, frame);
    const bufferUsed = toUsed + <u64>((firstBufferUsed + done) & toMask) * USED_ENTRY_SIZE;
    store64(end<Destination>(), toUsedSegment, bufferUsed, <u64>bufferHead | ((<u64>written) << 32));
    store64(end<Source>(), fromUsedSegment, fromUsed + <u64>((firstUsed + done) & fromMask) * USED_ENTRY_SIZE, head);
    bytes += frame;
  }

  if (loaded != LOADED_NOTHING) {
    loadedHead = head;
    loadedAddress = address;
    loadedRest = rest;
    loadedBufferHead = bufferHead;
    loadedBufferAddress = bufferAddress;
    loadedBufferRest = bufferRest;
  }
  if (done) {
    store<u32>(SOURCE_VRING, (firstUsed + done) & 0xffff, VRING_NEXT_USED);
    store<u32>(DESTINATION_VRING, (firstBufferUsed + done) & 0xffff, VRING_NEXT_USED);
    setNextAvail<Destination>(firstBuffer + done);
    stopWaiting();
  }
  runBytes = bytes;
  return done;
}
