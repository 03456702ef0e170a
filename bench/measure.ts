/** Rounds of slices: every carrier in turn on the same drivers. */
import { once } from "node:events";
import { Worker } from "node:worker_threads";
import type { Carrier } from "./carriers.ts";
import {
  CONTROL,
  CONTROL_REST,
  CONTROL_RUN,
  CONTROL_STOP,
  CONTROL_TURN,
  type DriverTask,
  WHICH,
} from "./driver-thread.ts";
import { Drivers, framesOf } from "./drivers.ts";
import type { Plan, Rings } from "./drivers.ts";
import type { Rig } from "./rig.ts";

export const MODES = ["hot", "handoff", "two-cores"] as const;
export type Mode = (typeof MODES)[number];

/** A rig with rings of these forms, and what carries its frames. */
export interface Stand {
  rings: Rings;
  rig: Rig;
  carriers: readonly Carrier[];
}

export interface Bench {
  stands: readonly Stand[];
  rounds: number;
  driverCpu: number;
}

/** What one carrier made of one plan: nanoseconds per packet of each round, and the share of its polls that were idle. */
export interface Figures {
  rings: Rings;
  carrier: string;
  ns: number[];
  idle: number;
}

interface Contestant {
  stand: number;
  rings: Rings;
  carrier: Carrier;
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
  const frames = framesOf(plan);
  if (mode === "hot") {
    const pairs = bench.stands.map(({ rings, rig, carriers }) => {
      const drivers = new Drivers(plan, rings, rig.source.window, rig.destination.window);
      rig.start(drivers.rings);
      verify(drivers, carriers, frames);
      return drivers;
    });
    return takeTurns(bench, ({ carrier, stand }, ms) => drainSlice(carrier, ms, frames, () => pairs[stand]!.turn()));
  }
  await using drivers = await startDriverThread(bench, plan);
  return takeTurns(bench, ({ carrier, stand }, ms) => {
    drivers.select(stand);
    if (mode === "handoff") return drainSlice(carrier, ms, frames, () => drivers.turn());
    drivers.run();
    const slice = runSlice(carrier, ms);
    drivers.rest();
    return slice;
  });
}

/** One slice of each carrier of each stand a round, in an order that rotates, after one to warm up. */
function takeTurns({ stands, rounds }: Bench, slice: (contestant: Contestant, ms: number) => Slice): Figures[] {
  const contestants = stands.flatMap(({ rings, carriers }, stand) =>
    carriers.map((carrier): Contestant => ({ stand, rings, carrier })),
  );
  for (const contestant of contestants) slice(contestant, warm ? WARM_UP_MS : FIRST_WARM_UP_MS);
  warm = true;
  const figures = contestants.map(({ rings, carrier }): Figures => ({ rings, carrier: carrier.name, ns: [], idle: 0 }));
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < contestants.length; i++) {
      const turn = (round + i) % contestants.length;
      const { ns, idle } = slice(contestants[turn]!, SLICE_MS);
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
  /** From now on the drivers of this stand; the others rest. */
  select(stand: number): void;
  /** One turn of the drivers; returns when it is over. */
  turn(): void;
  /** From now on the drivers run by themselves. */
  run(): void;
  /** No more turns after the one that is under way. */
  rest(): void;
}

async function startDriverThread({ stands, driverCpu: cpu }: Bench, plan: Plan): Promise<DriverThread> {
  const control = new Int32Array(new SharedArrayBuffer(8));
  const task: DriverTask = {
    plan,
    stands: stands.map(({ rings, rig }) => ({ rings, source: rig.source.window, destination: rig.destination.window })),
    cpu,
    control,
  };
  const worker = new Worker(new URL("driver-thread.ts", import.meta.url), { workerData: task });
  const [laid] = (await once(worker, "message")) as [Drivers["rings"][]]; // rejects if the thread fails
  for (const [i, { rig }] of stands.entries()) rig.start(laid[i]!);
  return {
    select(stand) {
      Atomics.store(control, WHICH, stand);
    },
    turn() {
      Atomics.store(control, CONTROL, CONTROL_TURN);
      while (Atomics.load(control, CONTROL) !== CONTROL_REST);
    },
    run() {
      Atomics.store(control, CONTROL, CONTROL_RUN);
    },
    rest() {
      Atomics.store(control, CONTROL, CONTROL_REST);
    },
    async [Symbol.asyncDispose]() {
      Atomics.store(control, CONTROL, CONTROL_STOP);
      await once(worker, "exit");
    },
  };
}
