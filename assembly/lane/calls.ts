/** Calls to the drivers, counted. */
import { COUNT_CALLS_SUPPRESSED } from "../../src/layout/lane.ts";
import { isCallDue, isCallUndecided } from "../notify";
import { count } from "../stats";

/** Whether to call the driver for what was used since it was last decided; counted either way. */
export function decideCall<E>(counter: usize, due: u32): u32 {
  if (!isCallUndecided<E>()) return 0;
  if (isCallDue<E>()) {
    count(counter);
    return due;
  }
  count(COUNT_CALLS_SUPPRESSED);
  return 0;
}
