/** The core's lanes to and from a TAP against a C program's loop: CPU time a frame. */
import { pinThread } from "../native/sched.ts";
import type { RequestMethod } from "../native/request-queue.ts";
import { SystemError } from "../src/errors.ts";
import { BenchTap, buildTapLibrary } from "./c-tap.ts";
import { printTable, ratio, spread } from "./figures.ts";
import { TapLane } from "./tap-lane.ts";
import { TapRig } from "./tap-rig.ts";
import { cCarrier, QUEUE_LENGTH, takeTurns } from "./tap-turns.ts";
import type { Direction } from "./tap-turns.ts";

export interface LoopOptions {
  rounds: number;
  cpu: number;
  packed: boolean;
}

interface Plan {
  direction: Direction;
  frameBytes: number;
  merged: boolean;
  /** C's time divided by ours, with the default method and whole batches. */
  target?: number;
}

/** A plan's figures: ns a frame of each carrier, one a round; C first. */
export interface LoopFigures extends Plan {
  carriers: { name: string; ns: number[] }[];
}

const PLANS: Plan[] = [
  { direction: "send", frameBytes: 64, merged: false, target: 0.97 },
  { direction: "send", frameBytes: 1514, merged: false, target: 0.97 },
  { direction: "send", frameBytes: 65_000, merged: false, target: 1 },
  { direction: "receive", frameBytes: 64, merged: false, target: 0.9 },
  { direction: "receive", frameBytes: 1514, merged: false, target: 0.9 },
  { direction: "receive", frameBytes: 65_000, merged: false },
  { direction: "receive", frameBytes: 65_000, merged: true, target: 0.9 },
];
const METHODS: RequestMethod[] = ["io_uring", "aio", "rw"];
const BATCHES = [1, 8, 64];
/** What drivers give for frames of the usual MTU. */
const RECEIVE_BYTES = 2048;
const LARGE = 4096;

export function compareLoops({ rounds, cpu, packed }: LoopOptions): LoopFigures[] {
  buildTapLibrary();
  pinThread(cpu);
  using tap = new BenchTap("bench-loop", QUEUE_LENGTH);
  using rig = new TapRig();
  console.log(
    `\nloop, CPU ${cpu}, ${packed ? "packed" : "split"} rings: ` +
      `ns of CPU time a frame, median (min..max) of ${rounds} rounds`,
  );
  console.log("rate: of the C loop's; batch: frames handed to the kernel at once\n");
  const all = PLANS.map((plan) => measure(rig, tap, plan, rounds, packed));
  printTable([
    ["", "bytes", "batch", "C", ...METHODS.flatMap((method) => [method, "rate"])],
    ...all.flatMap(({ direction, frameBytes, merged, carriers }) =>
      BATCHES.map((batch) => {
        const cells = METHODS.flatMap((method) => {
          const ns = carriers.find(({ name }) => name === `${method} ${batch}`)?.ns;
          return ns === undefined ? ["-", ""] : [spread(ns), rate(carriers[0]!.ns, ns)];
        });
        return [title(direction, merged), String(frameBytes), String(batch), spread(carriers[0]!.ns), ...cells];
      }),
    ),
  ]);
  console.log();
  for (const { direction, frameBytes, merged, target, carriers } of all) {
    const [c, ...ours] = carriers;
    const best = ours.find(({ name }) => name.endsWith(` ${BATCHES.at(-1)}`));
    if (target === undefined || c === undefined || best === undefined) continue;
    const met = ratio(c.ns, best.ns) >= target ? "met" : "missed";
    console.log(
      `${title(direction, merged)}, ${frameBytes} bytes: ${best.name} at ${rate(c.ns, best.ns)} of C's rate ` +
        `(target ${target}: ${met})`,
    );
  }
  return all;
}

function measure(rig: TapRig, tap: BenchTap, plan: Plan, rounds: number, packed: boolean): LoopFigures {
  const { direction, frameBytes, merged } = plan;
  const laid = rig.lay(frameBytes, direction === "receive" ? RECEIVE_BYTES : 0);
  const frames = frameBytes < LARGE ? 256 : merged ? 32 : 64;
  const lanes = METHODS.flatMap((method) =>
    open(() => new TapLane(rig, tap, laid, { method, direction, packed, merged, frames })),
  );
  try {
    const carriers = [
      cCarrier(tap, direction, laid, frames),
      ...lanes.flatMap((lane) => BATCHES.map((n) => lane.carrier(n))),
    ];
    const ns = takeTurns(tap, direction, laid, carriers, rounds);
    return { ...plan, carriers: carriers.map(({ name }, i) => ({ name, ns: ns[i]! })) };
  } finally {
    for (const lane of lanes) lane[Symbol.dispose]();
  }
}

/** None where the method does not work. */
function open(make: () => TapLane): TapLane[] {
  try {
    return [make()];
  } catch (error) {
    if (!(error instanceof SystemError)) throw error;
    console.log(error.message);
    return [];
  }
}

function title(direction: Direction, merged: boolean): string {
  return merged ? `${direction}, merged` : direction;
}

function rate(c: readonly number[], ours: readonly number[]): string {
  return ratio(c, ours).toFixed(2);
}
