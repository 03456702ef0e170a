/**
 * Where in a guest's segments a stretch of file goes.
 *
 * What fits into a gap of one segment goes there whole. A larger stretch continues over what is left at the end of
 * the segments, each part sharing OVERLAP_BYTES with the next: a virtqueue area (at most 512 KiB) or a buffer of that size is then always contiguous
 * in one of them, wherever it starts.
 */
import { SEGMENTS_MAX, SEGMENT_PAGES } from "../layout/lane.ts";

export const SEGMENT_BYTES = BigInt(SEGMENT_PAGES) * 0x1_0000n;
const OVERLAP_BYTES = 0x10_0000n;

/** Part of a stretch: [start, start + sizeBytes) of it lies at `offset` of a segment. */
export interface Place {
  segment: number;
  offset: bigint;
  sizeBytes: bigint;
  start: bigint;
}

/**
 * Finds room for `sizeBytes` (whole pages of `pageBytes`) beside what is taken.
 * @param addressOf a segment's address: huge pages want it in the sum with the offset to be a multiple of theirs
 * @returns undefined if there is not enough room
 */
export function place(
  sizeBytes: bigint,
  pageBytes: bigint,
  taken: readonly Place[],
  addressOf: (segment: number) => bigint,
): Place[] | undefined {
  const align = (segment: number, offset: bigint) =>
    roundUp(addressOf(segment) + offset, pageBytes) - addressOf(segment);

  for (let segment = 0; segment < SEGMENTS_MAX; segment++) {
    let offset = align(segment, 0n);
    for (const other of inSegment(taken, segment)) {
      if (offset + sizeBytes <= other.offset) break;
      offset = align(segment, other.offset + other.sizeBytes);
    }
    if (offset + sizeBytes <= SEGMENT_BYTES) return [{ segment, offset, sizeBytes, start: 0n }];
  }

  const overlap = roundUp(OVERLAP_BYTES, pageBytes);
  const places: Place[] = [];
  let start = 0n;
  for (let segment = 0; segment < SEGMENTS_MAX; segment++) {
    const last = inSegment(taken, segment).at(-1);
    const offset = align(segment, last ? last.offset + last.sizeBytes : 0n);
    const room = ((SEGMENT_BYTES - offset) / pageBytes) * pageBytes;
    if (room <= overlap) continue;
    const part = sizeBytes - start < room ? sizeBytes - start : room;
    places.push({ segment, offset, sizeBytes: part, start });
    if (start + part === sizeBytes) return places;
    start += part - overlap;
  }
  return undefined;
}

function inSegment(places: readonly Place[], segment: number): Place[] {
  return places.filter((p) => p.segment === segment).toSorted((a, b) => (a.offset < b.offset ? -1 : 1));
}

/** The next multiple of `unit` at or above `value`. */
export function roundUp(value: bigint, unit: bigint): bigint {
  return ((value + unit - 1n) / unit) * unit;
}
