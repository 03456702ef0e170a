/** The drivers of a bench on a thread of their own, pinned to another CPU than the lane. */
import { parentPort, workerData } from "node:worker_threads";
import { pinThread } from "../native/sched.ts";
import type { Window } from "../src/driver/guest.ts";
import { Drivers } from "./drivers.ts";
import type { Plan, Rings } from "./drivers.ts";

/** Indexes of the control words: which drivers, and what they are to do. */
export const CONTROL = 0;
export const WHICH = 1;
// Values of CONTROL
export const CONTROL_REST = 0; // the lane's turn
export const CONTROL_TURN = 1; // take one turn, then rest
export const CONTROL_RUN = 2; // turn after turn
export const CONTROL_STOP = 3;

export interface DriverTask {
  plan: Plan;
  /** One pair of drivers for each. */
  stands: { rings: Rings; source: Window; destination: Window }[];
  cpu: number;
  control: Int32Array;
}

/**
 * A running driver works in bursts, as DPDK's and Linux's do. One that looks at the ring for every single frame would measure
 * how fast a cache line travels between two CPUs.
 */
const BURST = 32;
const PAUSE_MS = 0.001;

if (workerData) runDrivers(workerData as DriverTask);

function runDrivers({ plan, stands, cpu, control }: DriverTask): void {
  pinThread(cpu);
  const pairs = stands.map(({ rings, source, destination }) => new Drivers(plan, rings, source, destination));
  parentPort!.postMessage(pairs.map(({ rings }) => rings));
  for (;;) {
    const command = Atomics.load(control, CONTROL);
    if (command === CONTROL_STOP) return;
    if (command === CONTROL_REST) continue;
    const sent = pairs[Atomics.load(control, WHICH)]!.turn();
    if (command === CONTROL_TURN) Atomics.store(control, CONTROL, CONTROL_REST);
    else if (sent < BURST) for (const end = performance.now() + PAUSE_MS; performance.now() < end;);
  }
}
