/**
 * Frames that lie in several pieces at either end.
 *
 * Places in a frame are sought from where the last one was found: cutting a frame of thousands of pieces walks over them
 * once, not once for each segment.
 */
import {
  DESTINATION_PIECES,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  SOURCE_PIECES,
} from "../../src/layout/lane.ts";
import { Destination, Source, copy, end, load8, store64, store8 } from "../guest";

/** The source piece found last, how many bytes come before it, and how far into it the place is. */
export let sourcePiece: usize = SOURCE_PIECES;
let sourceBefore: u32 = 0;
export let sourceInto: u32 = 0;

/** The source pieces are those of another frame. */
export function newSource(): void {
  sourcePiece = SOURCE_PIECES;
  sourceBefore = 0;
}

/** Finds the byte with `skip` bytes before it, one that the source pieces have. */
export function seekSource(skip: u32): void {
  if (skip < sourceBefore) newSource();
  while (skip - sourceBefore >= load<u32>(sourcePiece, PIECE_LENGTH)) {
    sourceBefore += load<u32>(sourcePiece, PIECE_LENGTH);
    sourcePiece += PIECE_BYTES;
  }
  sourceInto = skip - sourceBefore;
}

/** Up to 8 bytes of the source pieces, little-endian. */
export function loadPieces(skip: u32, length: u32): u64 {
  let word: u64 = 0;
  for (let i: u32 = 0; i < length; ++i) {
    seekSource(skip + i);
    const at = load<u64>(sourcePiece, PIECE_OFFSET) + sourceInto;
    word |= (<u64>load8(end<Source>(), load<u32>(sourcePiece, PIECE_SEGMENT), at)) << (i << 3);
  }
  return word;
}

/** Copies `length` bytes from the source pieces to the destination pieces, past the header in front of each. */
export function copyPieces(toSkip: u32, fromSkip: u32, length: u32): void {
  if (length == 0) return; // there may be no piece behind what is skipped
  seekSource(fromSkip);
  let from = sourcePiece;
  fromSkip = sourceInto;
  let to: usize = DESTINATION_PIECES;
  while (toSkip >= load<u32>(to, PIECE_LENGTH)) {
    toSkip -= load<u32>(to, PIECE_LENGTH);
    to += PIECE_BYTES;
  }
  while (length != 0) {
    const room = load<u32>(to, PIECE_LENGTH) - toSkip;
    const rest = load<u32>(from, PIECE_LENGTH) - fromSkip;
    const part = min(length, min(room, rest));
    copy(
      load<u32>(to, PIECE_SEGMENT),
      load<u64>(to, PIECE_OFFSET) + toSkip,
      load<u32>(from, PIECE_SEGMENT),
      load<u64>(from, PIECE_OFFSET) + fromSkip,
      part,
    );
    length -= part;
    toSkip += part;
    fromSkip += part;
    if (part == room) {
      to += PIECE_BYTES;
      toSkip = 0;
    }
    if (part == rest) {
      from += PIECE_BYTES;
      fromSkip = 0;
    }
  }
}

/** Stores `length` bytes of memory 0 to the destination pieces, past the header in front. */
export function storePieces(toSkip: u32, from: usize, length: u32): void {
  for (let to: usize = DESTINATION_PIECES; length != 0; to += PIECE_BYTES) {
    const room = load<u32>(to, PIECE_LENGTH);
    const skipped = min(toSkip, room);
    const part = min(length, room - skipped);
    const segment = load<u32>(to, PIECE_SEGMENT);
    const at = load<u64>(to, PIECE_OFFSET) + skipped;
    let i: u32 = 0;
    for (; i + 8 <= part; i += 8) store64(end<Destination>(), segment, at + i, load<u64>(from + i));
    for (; i < part; ++i) store8(end<Destination>(), segment, at + i, load<u8>(from + i));
    toSkip -= skipped;
    from += part;
    length -= part;
  }
}
