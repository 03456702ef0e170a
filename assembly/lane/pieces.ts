/** Frames that lie in several pieces at either end. */
import {
  DESTINATION_PIECES,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  SOURCE_PIECES,
} from "../../src/layout/lane.ts";
import { Destination, copy, end, store8 } from "../guest";

/** Copies `length` bytes from the source pieces to the destination pieces, past the header in front of each. */
export function copyPieces(toSkip: u32, fromSkip: u32, length: u32): void {
  let to: usize = DESTINATION_PIECES;
  let from: usize = SOURCE_PIECES;
  if (length == 0) return; // there may be no piece behind what is skipped
  while (toSkip >= load<u32>(to, PIECE_LENGTH)) {
    toSkip -= load<u32>(to, PIECE_LENGTH);
    to += PIECE_BYTES;
  }
  while (fromSkip >= load<u32>(from, PIECE_LENGTH)) {
    fromSkip -= load<u32>(from, PIECE_LENGTH);
    from += PIECE_BYTES;
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

/** Stores a byte to the destination pieces. */
export function storePiecesByte(at: u32, byte: u32): void {
  let to: usize = DESTINATION_PIECES;
  while (at >= load<u32>(to, PIECE_LENGTH)) {
    at -= load<u32>(to, PIECE_LENGTH);
    to += PIECE_BYTES;
  }
  store8(end<Destination>(), load<u32>(to, PIECE_SEGMENT), load<u64>(to, PIECE_OFFSET) + at, byte);
}

/** Stores `length` bytes of memory 0 to the destination pieces, past the header in front. */
export function storePieces(toSkip: u32, from: usize, length: u32): void {
  let to: usize = DESTINATION_PIECES;
  for (let i: u32 = 0; i < length; ++i, ++toSkip) {
    while (toSkip >= load<u32>(to, PIECE_LENGTH)) {
      toSkip -= load<u32>(to, PIECE_LENGTH);
      to += PIECE_BYTES;
    }
    const at = load<u64>(to, PIECE_OFFSET) + toSkip;
    store8(end<Destination>(), load<u32>(to, PIECE_SEGMENT), at, load<u8>(from + i));
  }
}
