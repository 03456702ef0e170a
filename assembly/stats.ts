/** The lane's counters: 64-bit words in memory 0 that the control plane reads whenever it likes. */
import { COUNTERS, COUNT_BATCHES, COUNT_BYTES, COUNT_PACKETS } from "../src/layout/lane.ts";

export function count(counter: usize, by: u64 = 1): void {
  store<u64>(counter, load<u64>(counter, COUNTERS) + by, COUNTERS);
}

/** Counts what a poll delivered, if it was anything. @param bytes of frames, without net headers */
export function countDelivered(frames: u64, bytes: u64): void {
  if (frames == 0) return;
  count(COUNT_PACKETS, frames);
  count(COUNT_BYTES, bytes);
  count(COUNT_BATCHES);
}
