/**
 * Positions in a packed ring, and from which one a ring goes on.
 *
 * Truth: virtio 1.3, 2.8.1 (wrap counters) and 2.8.21; docs/PROTOCOL.md, 5 ("Where a ring goes on"). A position
 * is a slot and the wrap counter there, index | wrap << 15; a ring begins at slot 0 with wrap counter 1. Pure functions
 * of numbers: the holder copies the flags out of guest memory once.
 */
import {
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
  VRING_PACKED_EVENT_F_WRAP_CTR,
} from "../layout/virtio.ts";

const WRAP = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;
const INDEX_MASK = WRAP - 1;

/** The flags of a descriptor that say, by the wrap counter, whether it is available and whether it is used. */
export const AVAIL = 1 << VRING_PACKED_DESC_F_AVAIL;
export const USED = 1 << VRING_PACKED_DESC_F_USED;

/** Where a ring begins. */
export const FIRST_POSITION = WRAP;

export function positionIndex(position: number): number {
  return position & INDEX_MASK;
}

export function positionWrap(position: number): 0 | 1 {
  return (position & WRAP) === 0 ? 0 : 1;
}

export function makePosition(index: number, wrap: number): number {
  return index | (wrap === 0 ? 0 : WRAP);
}

/** The position `count` slots further on, at most a whole ring. */
export function advance(position: number, count: number, size: number): number {
  const index = positionIndex(position) + count;
  return index < size
    ? makePosition(index, positionWrap(position))
    : makePosition(index - size, 1 - positionWrap(position));
}

/** The 32 bits of SET and GET_VRING_BASE: next avail position below, next used position above. */
export function encodePackedBase(position: number): number {
  return ((position << 16) | position) >>> 0;
}

/**
 * The position where a device goes on: what was taken and not used must be taken again, so it is the used half. Some
 * front-ends and back-ends leave that half 0 (PROTOCOL, 13.9).
 */
export function decodePackedBase(base: number): number {
  const used = base >>> 16;
  return used === 0 ? base & 0xffff : used;
}

/**
 * Where the device goes on in a ring, by the flags of all its descriptors: where the ring says, or at `base` if it says
 * nothing. The front-end of a back-end that was killed cannot know how far that one got; the ring does, because our core
 * sets the used bit of every slot of a chain that it gives back.
 */
export function startPosition(base: number, flags: Uint16Array): number {
  return readPosition(flags) ?? base;
}

/**
 * The position that the ring shows: with each slot's lap counted from there, the used bit of the slots before it is the lap's
 * wrap counter, that of the others is not; the driver has made some of these available, the first ones. Undefined if the ring
 * does not look like that, as that of a device may that marks only the first slot of a chain.
 *
 * One more pattern is ours: of a batch that was written and not published only the first slot does not look used. It is taken to
 * be the shortest that there can be, and that is right as long as a batch leaves two slots of the ring alone.
 */
export function readPosition(flags: Uint16Array): number | undefined {
  const starts = [0];
  for (let slot = 1; slot < flags.length && starts.length <= RUNS_MAX; slot++) {
    if ((((flags[slot] as number) ^ (flags[slot - 1] as number)) & USED) !== 0) starts.push(slot);
  }
  if (starts.length > RUNS_MAX) return undefined;
  let shortest = Number.POSITIVE_INFINITY;
  let position: number | undefined;
  const size = flags.length;
  // The slot of the position begins a run, or ends one if it alone is missing from a batch as long as the ring.
  for (const start of new Set(starts.flatMap((slot) => [slot, (slot + size - 1) % size]))) {
    const candidate = makePosition(start, ((flags[start] as number) & USED) === 0 ? 1 : 0);
    const batch = unpublished(candidate, flags);
    if (batch < shortest) [shortest, position] = [batch, candidate];
  }
  return position;
}

/** Runs of equal used bits in a ring that we left: a batch may lie across its end. */
const RUNS_MAX = 4;

/**
 * How many slots of an unpublished batch lie at a position, if that is where the device stood: at least 2, or 0 if there is none.
 * Infinite if it cannot have stood there.
 */
export function unpublished(position: number, flags: Uint16Array): number {
  const size = flags.length;
  if (find(flags, USED, position, 0, true) === 0) return Number.POSITIVE_INFINITY;
  const marked = find(flags, USED, position, 1, false);
  const offered = find(flags, AVAIL, position, 0, false);
  // Behind them there are no others.
  if (find(flags, USED, position, marked, true) < size) return Number.POSITIVE_INFINITY;
  if (find(flags, AVAIL, position, offered, true) < size) return Number.POSITIVE_INFINITY;
  if (marked === 1) return 0;
  return marked <= offered ? marked : Number.POSITIVE_INFINITY;
}

/**
 * How far from a position, `from` slots or more, the first slot is at which a flag is as the wrap counter there, or is not
 * (`isAsWrap`); the ring's size if there is none.
 */
function find(flags: Uint16Array, flag: number, position: number, from: number, isAsWrap: boolean): number {
  const size = flags.length;
  const index = positionIndex(position);
  const wrap = positionWrap(position) === 1 ? flag : 0;
  for (let distance = from; distance < size; distance++) {
    const slot = index + distance;
    // Behind the ring's end the wrap counter is the other one.
    const bit = slot < size ? (flags[slot] as number) : ~(flags[slot - size] as number);
    if (((bit & flag) === wrap) === isAsWrap) return distance;
  }
  return size;
}
