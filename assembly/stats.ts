/** The lane's counters: 64-bit words in memory 0 that the control plane reads whenever it likes. */
import { COUNTERS } from "../src/layout/lane.ts";

export function count(counter: usize, by: u64 = 1): void {
  store<u64>(counter, load<u64>(counter, COUNTERS) + by, COUNTERS);
}
