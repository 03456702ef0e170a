/**
 * The internet checksum (RFC 1071) of bytes in guest memory and in memory 0.
 *
 * Sums are of little-endian words, so what comes of them is stored little-endian too: the checksum does not care. A guest that
 * rewrites its frame meanwhile gets a wrong checksum, and nothing else.
 */
import { PIECE_BYTES, PIECE_LENGTH, PIECE_OFFSET, PIECE_SEGMENT } from "../src/layout/lane.ts";
import { Source, end, load64, load8 } from "./guest";
import { seekSource, sourceInto, sourcePiece } from "./lane/pieces";

/** Folds a sum to 16 bits. */
export function fold(sum: u64): u32 {
  sum = (sum & 0xffff_ffff) + (sum >> 32);
  sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
  sum = (sum & 0xffff) + (sum >> 16);
  return <u32>((sum & 0xffff) + (sum >> 16));
}

/** What a header field takes; never 0, which in UDP says that there is no checksum. */
export function checksumOf(sum: u64): u32 {
  const checksum = ~fold(sum) & 0xffff;
  return checksum == 0 ? 0xffff : checksum;
}

/** Sum of bytes in memory 0. @param length even */
export function sumBytes(from: usize, length: u32): u64 {
  let sum: u64 = 0;
  for (let i: u32 = 0; i < length; i += 2) sum += <u64>load<u16>(from + i);
  return sum;
}

/** Sum of `length` bytes of the source pieces, of which `skip` come before them; the first byte is an even one. */
export function sumPieces(skip: u32, length: u32): u64 {
  if (length == 0) return 0; // there may be no piece behind what is skipped
  seekSource(skip);
  let piece = sourcePiece;
  skip = sourceInto;
  let sum: u64 = 0;
  let odd = false;
  while (length != 0) {
    const part = min(length, load<u32>(piece, PIECE_LENGTH) - skip);
    const partial = fold(sumContiguous(load<u32>(piece, PIECE_SEGMENT), load<u64>(piece, PIECE_OFFSET) + skip, part));
    sum += odd ? ((partial & 0xff) << 8) | (partial >> 8) : partial;
    if (part & 1) odd = !odd;
    length -= part;
    piece += PIECE_BYTES;
    skip = 0;
  }
  return sum;
}

function sumContiguous(segment: u32, at: u64, length: u32): u64 {
  let sum: u64 = 0;
  const words = at + <u64>(length & ~7);
  const last = at + <u64>length;
  for (; at < words; at += 8) {
    const word = load64(end<Source>(), segment, at);
    sum += (word & 0xffff_ffff) + (word >> 32);
  }
  for (let shift: u64 = 0; at < last; ++at, shift ^= 8) sum += (<u64>load8(end<Source>(), segment, at)) << shift;
  return sum;
}
