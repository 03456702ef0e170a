/**
 * One descriptor chain: walked once, validated, translated into pieces (virtio 1.3, 2.7.5 and 2.7.7).
 *
 * Every descriptor is read exactly once, as two 64-bit words; what is checked is what is used. A chain is refused
 * whole if any rule is broken, and then nothing of it is read or written.
 */
import {
  DESC_LEN,
  DESC_SIZE,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
} from "../src/layout/virtio.ts";
import {
  PIECES_MAX,
  EXTENTS_MAX,
  PIECE_BYTES,
  PIECE_LENGTH,
  PIECE_OFFSET,
  PIECE_SEGMENT,
  VRING_DESC,
  VRING_DESC_SEGMENT,
  VRING_FLAGS,
  VRING_INDIRECT,
  VRING_SIZE,
} from "../src/layout/lane.ts";
import { end, load64, load8 } from "./guest";
import { offset, segment, translate } from "./translate";
import { vringOf } from "./vring";

/** What the last walk found: the sum of all lengths, and the place behind its last piece. */
export let chainBytes: u64 = 0;
export let piecesEnd: usize = 0;

/**
 * Descriptors walked so far, and borders of extents crossed, mod 2^32. A poll begins no frame when it has walked WALK_MAX, and that many are enough for
 * the receive chains of one frame: a driver whose chains are long and hold nothing must not hold up other lanes.
 */
export let walked: u32 = 0;
export const WALK_MAX: u32 = PIECES_MAX;

/** Steps that the chain being walked may still take. */
let stepsLeft: u32 = 0;

/** The first word of a descriptor in the ring, its address. @param index below the ring size */
export function loadDescAddress<E>(index: u32): u64 {
  const vring = vringOf<E>();
  return load64(end<E>(), load<u32>(vring, VRING_DESC_SEGMENT), load<u64>(vring, VRING_DESC) + <u64>index * DESC_SIZE);
}

/** Its second word: length | flags << 32 | next << 48. */
export function loadDescRest<E>(index: u32): u64 {
  const vring = vringOf<E>();
  const table = load<u64>(vring, VRING_DESC);
  return load64(end<E>(), load<u32>(vring, VRING_DESC_SEGMENT), table + <u64>index * DESC_SIZE + DESC_LEN);
}

/**
 * Walks a chain from its first descriptor, which has been loaded (`address`, `rest`), and writes pieces for its
 * first `wanted` bytes from `pieces` on. All of it must be mapped, and readable for the source, writable for the
 * destination.
 * @returns false if the chain breaks a rule: loops or is longer than the ring, next index out of range, wrong direction,
 *   indirect where it may not be, memory that is not there
 */
export function walk<E>(address: u64, rest: u64, pieces: usize, wanted: u64): bool {
  const vring = vringOf<E>();
  const size = load<u32>(vring, VRING_SIZE);
  const direction = end<E>() ? VRING_DESC_F_WRITE : 0;
  let tableSegment = load<u32>(vring, VRING_DESC_SEGMENT);
  let table = load<u64>(vring, VRING_DESC);
  // Buffers that do not overlap cross each extent's border once.
  stepsLeft = size + EXTENTS_MAX;
  let entries = size;
  let indirect = false;
  let scattered = false; // an indirect table in several extents: `table` is then a gpa
  chainBytes = 0;
  piecesEnd = pieces;

  for (let buffers: u32 = 0; buffers < size;) {
    ++walked;
    const length = <u32>rest;
    const flags = <u32>(rest >> 32) & 0xffff;
    let next = <u32>(rest >> 48);
    if (flags & VRING_DESC_F_INDIRECT) {
      if (indirect || flags & VRING_DESC_F_NEXT || !(load<u32>(vring, VRING_FLAGS) & VRING_INDIRECT)) return false;
      if (length == 0 || length % DESC_SIZE) return false;
      const reach = translate<E>(address);
      if (reach == 0) return false;
      scattered = reach < <u64>length;
      table = scattered ? address : offset;
      tableSegment = segment;
      entries = length / DESC_SIZE;
      next = 0;
      indirect = true;
    } else {
      if ((flags & VRING_DESC_F_WRITE) != direction) return false;
      if (length != 0 && !append<E>(address, length, wanted)) return false;
      if (!(flags & VRING_DESC_F_NEXT)) return true;
      if (next >= entries) return false;
      ++buffers;
    }

    const at = table + <u64>next * DESC_SIZE;
    if (!scattered) {
      address = load64(end<E>(), tableSegment, at);
      rest = load64(end<E>(), tableSegment, at + DESC_LEN);
    } else {
      if (!gather64<E>(at)) return false;
      address = gathered;
      if (!gather64<E>(at + DESC_LEN)) return false;
      rest = gathered;
    }
  }
  return false;
}

/** Adds one buffer to the chain: a piece for each extent it touches. */
function append<E>(gpa: u64, length: u32, wanted: u64): bool {
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

let gathered: u64 = 0;

/** Reads 64 bits that may lie in two extents into `gathered`, byte by byte. */
function gather64<E>(gpa: u64): bool {
  gathered = 0;
  for (let i: u64 = 0; i < 8; ++i) {
    if (translate<E>(gpa + i) == 0) return false;
    gathered |= (<u64>load8(end<E>(), segment, offset)) << (i << 3);
  }
  return true;
}
