/** The two virtqueues of a lane, by the end they belong to; laid out by src/layout/lane.ts. */
import {
  DESTINATION_VRING,
  SOURCE_VRING,
  VRING_BROKEN,
  VRING_FILE,
  VRING_FLAGS,
  VRING_NEXT_AVAIL,
  VRING_PACKED,
} from "../src/layout/lane.ts";
import { end } from "./guest";

/** Address of the virtqueue's record in memory 0. */
export function vringOf<E>(): usize {
  return end<E>() ? DESTINATION_VRING : SOURCE_VRING;
}

export function isPacked<E>(): bool {
  return (load<u32>(vringOf<E>(), VRING_FLAGS) & VRING_PACKED) != 0;
}

/** Whether there is no virtqueue at this end but a file. */
export function isFile<E>(): bool {
  return (load<u32>(vringOf<E>(), VRING_FLAGS) & VRING_FILE) != 0;
}

/** Position of the next chain that will be taken. */
export function nextAvail<E>(): u32 {
  return load<u32>(vringOf<E>(), VRING_NEXT_AVAIL);
}

export function setNextAvail<E>(position: u32): void {
  store<u32>(vringOf<E>(), position, VRING_NEXT_AVAIL);
}

/** Stops the ring for good: its driver broke the format. Only a new start mends it. */
export function breakRing<E>(): void {
  const vring = vringOf<E>();
  store<u32>(vring, load<u32>(vring, VRING_FLAGS) | VRING_BROKEN, VRING_FLAGS);
}
