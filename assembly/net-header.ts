/**
 * The virtio-net header in front of every frame (virtio 1.3, 5.1.6): 12 bytes, or 10 for a legacy driver without
 * mergeable buffers.
 *
 * No offload is negotiated, so a header must ask for none; the two bytes that could are read once, with the first
 * piece, and nothing else of it is used.
 */
import { NET_HDR_NUM_BUFFERS, NET_HDR_SIZE } from "../src/layout/virtio.ts";
import { PIECE_BYTES, PIECE_LENGTH, PIECE_OFFSET, PIECE_SEGMENT } from "../src/layout/lane.ts";
import { Destination, Source, end, load16, load8, store16, store32, store64, store8 } from "./guest";

/** Whether a header asks for an offload: flags and gso_type, its first two bytes. */
export function isOffloadHeader(segment: u32, at: u64): bool {
  return load16(end<Source>(), segment, at) != 0;
}

/** The same of a header that lies in pieces. */
export function asksForOffload(piece: usize): bool {
  const segment = load<u32>(piece, PIECE_SEGMENT);
  const at = load<u64>(piece, PIECE_OFFSET);
  if (load<u32>(piece, PIECE_LENGTH) >= 2) return isOffloadHeader(segment, at);
  const second = piece + PIECE_BYTES;
  const flags = load8(end<Source>(), segment, at);
  return (flags | load8(end<Source>(), load<u32>(second, PIECE_SEGMENT), load<u64>(second, PIECE_OFFSET))) != 0;
}

/** Writes a header without offloads. @param size NET_HDR_SIZE or NET_HDR_SIZE_LEGACY */
export function storeHeader(segment: u32, at: u64, size: u32, numBuffers: u32): void {
  store64(end<Destination>(), segment, at, 0);
  if (size == NET_HDR_SIZE) store32(end<Destination>(), segment, at + 8, numBuffers << 16);
  else store16(end<Destination>(), segment, at + 8, 0);
}

/** The same into pieces, which hold at least `size` bytes. */
export function storeHeaderPieces(piece: usize, size: u32, numBuffers: u32): void {
  if (load<u32>(piece, PIECE_LENGTH) >= size) {
    storeHeader(load<u32>(piece, PIECE_SEGMENT), load<u64>(piece, PIECE_OFFSET), size, numBuffers);
    return;
  }
  let into: u32 = 0;
  for (let i: u32 = 0; i < size; ++i, ++into) {
    while (into >= load<u32>(piece, PIECE_LENGTH)) {
      piece += PIECE_BYTES;
      into = 0;
    }
    const shift = (i - <u32>NET_HDR_NUM_BUFFERS) << 3;
    const byte = i < <u32>NET_HDR_NUM_BUFFERS ? 0 : (numBuffers >> shift) & 0xff;
    store8(end<Destination>(), load<u32>(piece, PIECE_SEGMENT), load<u64>(piece, PIECE_OFFSET) + into, byte);
  }
}
