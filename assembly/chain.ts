/**
 * One descriptor chain: what a walk finds, whichever the ring's format (walkSplit, walkPacked).
 *
 * A walk reads every descriptor exactly once; what is checked is what is used. A chain is refused whole if any rule is
 * broken, and then nothing of it is read or written.
 */
import { EXTENTS_MAX, PIECES_MAX, PIECE_BYTES, PIECE_LENGTH, PIECE_OFFSET, PIECE_SEGMENT } from "../src/layout/lane.ts";
import { VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE } from "../src/layout/virtio.ts";
import { end, load8 } from "./guest";
import { offset, segment, translate } from "./translate";

/** Flags of which the only descriptor of a chain has none in a transmitq, and WRITE alone in a receiveq. */
export const LINKS: u32 = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT;

// What comes of opening a chain at a position
export const CHAIN_READY: u32 = 0;
/** None is available there. */
export const CHAIN_NONE: u32 = 1;
/** The ring makes no sense. */
export const CHAIN_BROKEN: u32 = 2;

// What comes of walking it, beside CHAIN_READY and CHAIN_BROKEN
/** It breaks a rule, and can be given back. */
export const CHAIN_REFUSED: u32 = 3;

/** The chain that was opened last: the id to give back with it (a packed one tells at its end), its first descriptor. */
export let openedId: u32 = 0;
export let openedAddress: u64 = 0;
export let openedRest: u64 = 0;

/** What the last walk found: the id and the slots of the ring to give back, the sum of all lengths, the end of its pieces. */
export let chainId: u32 = 0;
export let chainSlots: u32 = 0;
export let chainBytes: u64 = 0;
export let piecesEnd: usize = 0;

/**
 * Descriptors walked so far, and borders of extents crossed, mod 2^32. A poll begins no frame when it has walked WALK_MAX, and
 * that many are enough for the receive chains of one frame: a driver whose chains are long and hold nothing must not hold
 * up other lanes.
 */
export let walked: u32 = 0;
export const WALK_MAX: u32 = PIECES_MAX;

/** Borders and buffers that the chain being walked may still have. */
let stepsLeft: u32 = 0;

export function setOpened(id: u32, address: u64, rest: u64): void {
  openedId = id;
  openedAddress = address;
  openedRest = rest;
}

/** A walk begins. @param size of the ring: buffers that do not overlap cross each extent's border once */
export function beginChain(pieces: usize, size: u32): void {
  stepsLeft = size + EXTENTS_MAX;
  chainBytes = 0;
  piecesEnd = pieces;
}

export function countWalked(): void {
  ++walked;
}

/** A walk has come to its end. */
export function endChain(id: u32, slots: u32): void {
  chainId = id;
  chainSlots = slots;
}

/**
 * Adds one buffer to the chain: a piece for each extent it touches, of the first `wanted` bytes of the chain.
 * @returns false if some of it is no memory
 */
export function append<E>(gpa: u64, length: u32, wanted: u64): bool {
  let left: u64 = length;
  while (true) {
    const part = min(translate<E>(gpa), left);
    if (part == 0) return false;
    if (chainBytes < wanted) {
      store<u64>(piecesEnd, offset, PIECE_OFFSET);
      store<u32>(piecesEnd, <u32>min(part, wanted - chainBytes), PIECE_LENGTH);
      store<u32>(piecesEnd, segment, PIECE_SEGMENT);
      piecesEnd += PIECE_BYTES;
    }
    chainBytes += part;
    gpa += part;
    left -= part;
    if (left == 0) return true;
    ++walked;
    if (--stepsLeft == 0) return false;
  }
}

export let gathered: u64 = 0;

/** Reads 64 bits that may lie in two extents into `gathered`, byte by byte. @returns false if some are no memory */
export function gather64<E>(gpa: u64): bool {
  gathered = 0;
  for (let i: u64 = 0; i < 8; ++i) {
    if (translate<E>(gpa + i) == 0) return false;
    gathered |= (<u64>load8(end<E>(), segment, offset)) << (i << 3);
  }
  return true;
}
