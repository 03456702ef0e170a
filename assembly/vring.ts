/** The two virtqueues of a lane, by the end they belong to; laid out by src/layout/lane.ts. */
import { DESTINATION_VRING, SOURCE_VRING } from "../src/layout/lane.ts";
import { end } from "./guest";

/** Address of the virtqueue's state in memory 0. */
export function vringOf<E>(): usize {
  return end<E>() ? DESTINATION_VRING : SOURCE_VRING;
}
