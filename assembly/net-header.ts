/**
 * The virtio-net header in front of every frame (virtio 1.3, 5.1.6): 12 bytes, or 10 for a legacy driver without
 * mergeable buffers.
 *
 * Its first 8 bytes are handled as one word: flags, gso_type, hdr_len, gso_size, csum_start, each read once with it.
 */
import { NET_HDR_CSUM_OFFSET, NET_HDR_NUM_BUFFERS, NET_HDR_SIZE } from "../src/layout/virtio.ts";
import { PIECE_BYTES, PIECE_LENGTH, PIECE_OFFSET, PIECE_SEGMENT, SOURCE_PIECES } from "../src/layout/lane.ts";
import { Destination, Source, end, load16, load64, store16, store32, store64, store8 } from "./guest";
import { loadPieces } from "./lane/pieces";

/** Whether a header asks for an offload: flags and gso_type, the first two bytes of its word. */
export function asksForOffload(word: u64): bool {
  return (word & 0xffff) != 0;
}

export function headerOf(flags: u32, gsoType: u32, hdrLen: u32, gsoSize: u32, csumStart: u32): u64 {
  return <u64>(flags | (gsoType << 8) | (hdrLen << 16)) | ((<u64>(gsoSize | (csumStart << 16))) << 32);
}

/** The word of a header in contiguous memory. */
export function loadHeader(segment: u32, at: u64): u64 {
  return load64(end<Source>(), segment, at);
}

/** The word of the header that the source pieces begin with. */
export function loadHeaderPieces(): u64 {
  if (load<u32>(SOURCE_PIECES, PIECE_LENGTH) < 8) return loadPieces(0, 8);
  return loadHeader(load<u32>(SOURCE_PIECES, PIECE_SEGMENT), load<u64>(SOURCE_PIECES, PIECE_OFFSET));
}

/** Its csum_offset, in the two bytes after the word. */
export function loadCsumOffset(segment: u32, at: u64): u32 {
  return load16(end<Source>(), segment, at + NET_HDR_CSUM_OFFSET);
}

export function loadCsumOffsetPieces(): u32 {
  return <u32>loadPieces(NET_HDR_CSUM_OFFSET, 2);
}

/** Writes a header. @param size NET_HDR_SIZE or NET_HDR_SIZE_LEGACY */
export function storeHeader(segment: u32, at: u64, size: u32, word: u64, csumOffset: u32, numBuffers: u32): void {
  store64(end<Destination>(), segment, at, word);
  if (size == NET_HDR_SIZE) store32(end<Destination>(), segment, at + 8, csumOffset | (numBuffers << 16));
  else store16(end<Destination>(), segment, at + 8, csumOffset);
}

/** The same into pieces, which hold at least `size` bytes. */
export function storeHeaderPieces(piece: usize, size: u32, word: u64, csumOffset: u32, numBuffers: u32): void {
  if (load<u32>(piece, PIECE_LENGTH) >= size) {
    storeHeader(load<u32>(piece, PIECE_SEGMENT), load<u64>(piece, PIECE_OFFSET), size, word, csumOffset, numBuffers);
    return;
  }
  const last = csumOffset | (numBuffers << ((<u32>(NET_HDR_NUM_BUFFERS - NET_HDR_CSUM_OFFSET)) << 3));
  let into: u32 = 0;
  for (let i: u32 = 0; i < size; ++i, ++into) {
    while (into >= load<u32>(piece, PIECE_LENGTH)) {
      piece += PIECE_BYTES;
      into = 0;
    }
    const byte = i < 8 ? <u32>(word >> (i << 3)) : last >> ((i - 8) << 3);
    store8(end<Destination>(), load<u32>(piece, PIECE_SEGMENT), load<u64>(piece, PIECE_OFFSET) + into, byte & 0xff);
  }
}
