/**
 * Guest physical address -> (segment, offset), through the end's extents.
 *
 * Extents are sorted by gpa and may overlap (a large region continues in the next segment with some room shared): the
 * last one that starts at or below an address reaches furthest. The control plane writes them; only addresses are
 * the guest's.
 */
import {
  DESTINATION_EXTENTS,
  DESTINATION_HIT,
  EXTENTS_FIRST,
  EXTENT_BYTES,
  EXTENT_GPA,
  EXTENT_OFFSET,
  EXTENT_SEGMENT,
  EXTENT_SIZE,
  SOURCE_EXTENTS,
  SOURCE_HIT,
} from "../src/layout/lane.ts";
import { end } from "./guest";

/** Where the last translated address lies. */
export let segment: u32 = 0;
export let offset: u64 = 0;

/**
 * Translates one address into `segment` and `offset`.
 * @returns how many bytes follow there contiguously, the addressed one included; 0 if no memory is there
 */
export function translate<E>(gpa: u64): u64 {
  const hit: usize = end<E>() ? DESTINATION_HIT : SOURCE_HIT;
  let into = gpa - load<u64>(hit, EXTENT_GPA);
  if (into >= load<u64>(hit, EXTENT_SIZE)) {
    if (!find<E>(gpa)) return 0;
    into = gpa - load<u64>(hit, EXTENT_GPA);
  }
  segment = load<u32>(hit, EXTENT_SEGMENT);
  offset = load<u64>(hit, EXTENT_OFFSET) + into;
  return load<u64>(hit, EXTENT_SIZE) - into;
}

/** Forgets the extents found last; the control plane has changed them. */
export function forgetExtents(): void {
  store<u64>(SOURCE_HIT, 0, EXTENT_SIZE);
  store<u64>(DESTINATION_HIT, 0, EXTENT_SIZE);
}

/** Copies the extent that holds `gpa` into the hit record. Binary search: at most 10 steps. */
function find<E>(gpa: u64): bool {
  const extents: usize = end<E>() ? DESTINATION_EXTENTS : SOURCE_EXTENTS;
  let low: usize = 0;
  let high: usize = load<u32>(extents);
  while (low < high) {
    const middle = (low + high) >> 1;
    if (load<u64>(extents + EXTENTS_FIRST + middle * EXTENT_BYTES, EXTENT_GPA) <= gpa) low = middle + 1;
    else high = middle;
  }
  if (low == 0) return false;
  const found = extents + EXTENTS_FIRST + (low - 1) * EXTENT_BYTES;
  if (gpa - load<u64>(found, EXTENT_GPA) >= load<u64>(found, EXTENT_SIZE)) return false;
  memory.copy(end<E>() ? DESTINATION_HIT : SOURCE_HIT, found, EXTENT_BYTES);
  return true;
}
