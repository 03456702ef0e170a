/** Rounds of slices: every carrier in turn on the same drivers. */
import { once } from "node:events";
import { Worker } from "node:worker_threads";
import type { Carrier } from "./carriers.ts";
import { CONTROL, CONTROL_REST, CONTROL_RUN, CONTROL_STOP, CONTROL_TURN, type DriverTask } from "./driver-thread.ts";
import { Drivers, framesOf } from "./drivers.ts";
import type { Plan } from "./drivers.ts";
import type { Rig } from "./rig.ts";

export const MODES = ["hot", "handoff", "two-cores"] as const;
export type Mode = (typeof MODES)[number];

export interface Bench {
  rig: Rig;
  carriers: readonly Carrier[];
  rounds: number;
  driverCpu: number;
}

/** What one carrier made of one plan: nanoseconds per packet of each round, and the share of its polls that were idle. */
export interface Figures {
  carrier: string;
  ns: number[];
  idle: number;
}

interface Slice {
  ns: number;
  idle: number;
}

const SLICE_MS = 60;
/** V8 compiles the core anew in the background when it has run for a while. */
const FIRST_WARM_UP_MS = 1000;
const WARM_UP_MS = 60;
const ATTEMPTS = 20;
let warm = false;

export async function measure(bench: Bench, mode: Mode, plan: Plan): Promise<Figures[]> {
  const { rig, carriers, rounds } = bench;
  if (mode === "hot") {
    const drivers = new Drivers(plan, rig.source.window, rig.destination.window);
    rig.start(drivers.rings);
    verify(drivers, carriers, framesOf(plan));
    return takeTurns(carriers, rounds, (carrier, ms) => drainSlice(carrier, ms, framesOf(plan), () => drivers.turn()));
  }
  await using drivers = await startDriverThread(bench, plan);
  const slice =
    mode === "two-cores"
      ? runSlice
      : (carrier: Carrier, ms: number) => drainSlice(carrier, ms, framesOf(plan), () => drivers.turn());
  if (mode === "two-cores") drivers.run();
  return takeTurns(carriers, rounds, slice);
}

/** One slice of each carrier a round, in an order that rotates, after one to warm up. */
function takeTurns(
  carriers: readonly Carrier[],
  rounds: number,
  slice: (carrier: Carrier, ms: number) => Slice,
): Figures[] {
  for (const carrier of carriers) slice(carrier, warm ? WARM_UP_MS : FIRST_WARM_UP_MS);
  warm = true;
  const figures = carriers.map(({ name }) => ({ carrier: name, ns: [] as number[], idle: 0 }));
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < carriers.length; i++) {
      const turn = (round + i) % carriers.length;
      const { ns, idle } = slice(carriers[turn]!, SLICE_MS);
      figures[turn]!.ns.push(ns);
      figures[turn]!.idle += idle / rounds;
    }
  }
  return figures;
}

/** Every carrier delivers every byte. */
function verify(drivers: Drivers, carriers: readonly Carrier[], frames: number): void {
  for (const carrier of carriers) {
    carrier.begin();
    drain(carrier, frames);
    drivers.verify();
    drivers.turn();
    carrier.end();
  }
}

/** Posted frames are carried, then the drivers have a turn, and so on; the median of the carrier's parts. */
function drainSlice(carrier: Carrier, ms: number, frames: number, turn: () => void): Slice {
  const ns: number[] = [];
  carrier.begin();
  for (const end = performance.now() + ms; performance.now() < end; turn()) ns.push(drain(carrier, frames));
  carrier.end();
  return { ns: ns.toSorted((a, b) => a - b)[ns.length >> 1]! / frames, idle: 0 };
}

function drain(carrier: Carrier, frames: number): number {
  const ns = carrier.drain(frames);
  if (ns < 0) throw new Error(`${carrier.name} stopped before all ${frames} frames were carried`);
  return ns;
}

/** The carrier polls while the drivers run. */
function runSlice(carrier: Carrier, ms: number): Slice {
  // Drivers that got no CPU in the meantime say nothing about the lane.
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    carrier.begin();
    const { elapsedNs, frames, polls, idle } = carrier.run(ms);
    carrier.end();
    if (frames !== 0) return { ns: elapsedNs / frames, idle: idle / polls };
  }
  throw new Error(`${carrier.name} carried nothing in ${ATTEMPTS} times ${ms} ms`);
}

interface DriverThread extends AsyncDisposable {
  /** One turn of the drivers; returns when it is over. */
  turn(): void;
  /** From now on the drivers run by themselves. */
  run(): void;
}

async function startDriverThread({ rig, driverCpu: cpu }: Bench, plan: Plan): Promise<DriverThread> {
  const control = new Int32Array(new SharedArrayBuffer(4));
  const task: DriverTask = { plan, source: rig.source.window, destination: rig.destination.window, cpu, control };
  const worker = new Worker(new URL("driver-thread.ts", import.meta.url), { workerData: task });
  const [rings] = await once(worker, "message"); // rejects if the thread fails
  rig.start(rings);
  return {
    turn() {
      Atomics.store(control, CONTROL, CONTROL_TURN);
      while (Atomics.load(control, CONTROL) !== CONTROL_REST);
    },
    run() {
      Atomics.store(control, CONTROL, CONTROL_RUN);
    },
    async [Symbol.asyncDispose]() {
      Atomics.store(control, CONTROL, CONTROL_STOP);
      await once(worker, "exit");
    },
  };
}
