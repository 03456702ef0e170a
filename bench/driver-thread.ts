/** Both drivers of a bench on a thread of their own, pinned to another CPU than the lane. */
import { parentPort, workerData } from "node:worker_threads";
import { pinThread } from "../native/sched.ts";
import type { Window } from "../src/driver/guest.ts";
import { Drivers } from "./drivers.ts";
import type { Plan } from "./drivers.ts";

/** Index and values of the control word. */
export const CONTROL = 0;
export const CONTROL_REST = 0; // the lane's turn
export const CONTROL_TURN = 1; // take one turn, then rest
export const CONTROL_RUN = 2; // turn after turn
export const CONTROL_STOP = 3;

export interface DriverTask {
  plan: Plan;
  source: Window;
  destination: Window;
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

function runDrivers({ plan, source, destination, cpu, control }: DriverTask): void {
  pinThread(cpu);
  const drivers = new Drivers(plan, source, destination);
  parentPort!.postMessage(drivers.rings);
  for (;;) {
    const command = Atomics.load(control, CONTROL);
    if (command === CONTROL_STOP) return;
    if (command === CONTROL_REST) continue;
    const sent = drivers.turn();
    if (command === CONTROL_TURN) Atomics.store(control, CONTROL, CONTROL_REST);
    else if (sent < BURST) for (const end = performance.now() + PAUSE_MS; performance.now() < end;);
  }
}
