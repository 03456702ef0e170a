/** What the demo's main thread and its driver threads share. */

/** Word 0 of `control`: written by the main thread, which then signals `wakeFd`. */
export const PHASE = { hold: 0, transmit: 1, drain: 2, quit: 3 } as const;

/**
 * Indexes of `counters`: written by the driver thread. Received frames are verified ones; `phase` is the one the other
 * counters belong to, so that in `drain` the count of sent frames is final.
 */
export const COUNTER = { sent: 0, received: 1, receivedBytes: 2, phase: 3 } as const;
export const COUNTERS = 4;

/** A driver thread's workerData. */
export interface DriverTask {
  /** Socket of the relay's port. */
  path: string;
  /** Eventfd that wakes the thread; fds are the process's, so any thread may use the number. */
  wakeFd: number;
  /** Captured frames to replay. */
  frames: readonly Uint8Array[];
  /** Streams of Traffic: the one to send and the one to expect. */
  send: number;
  expect: number;
  control: Int32Array;
  counters: BigUint64Array;
}
