/**
 * `npm run bench`: nanoseconds per packet of the copy lane, and of the same lane in C where a compiler is there.
 *
 * Rings: split or packed at both ends, or from one to the other. Modes:
 *
 *   hot        one thread: the drivers post frames, the lane carries them all; only the lane's part is timed
 *   handoff    the same in turns with drivers on another CPU: rings and frame starts are in that CPU's cache
 *   two-cores  the drivers run on another CPU as fast as they can, the lane polls in a tight loop; `idle` polls found
 *              nothing, that is: the drivers are the slower side
 *
 * All carriers take turns in one run, those of the same rings on the same buffers: a machine that changes its speed
 * meanwhile changes it for all of them. Read the ratios.
 * Options: --rounds N, --cpus LANE,DRIVERS, --mode MODE, --rings RINGS,..., --json.
 */
import { availableParallelism, cpus, release } from "node:os";
import { parseArgs } from "node:util";
import { pinThread } from "../native/sched.ts";
import { buildCLane, cCarrier } from "./c-lane.ts";
import { wasmCarrier } from "./carriers.ts";
import { type Layout, type Plan, RINGS, type Rings } from "./drivers.ts";
import { type Bench, type Figures, type Mode, MODES, type Stand, measure } from "./measure.ts";
import { Rig } from "./rig.ts";

const PLANS: Plan[] = [
  ...plans("one", [64, 256, 1518, 9000, 65000]),
  ...plans("two", [64, 1518]),
  ...plans("indirect", [64, 1518]),
  ...plans("merged", [9000, 65000]),
];

interface Row extends Plan {
  mode: Mode;
  figures: Figures[];
}

const { values: options } = parseArgs({
  options: {
    rounds: { type: "string", default: "9" },
    cpus: { type: "string", default: "0,1" },
    mode: { type: "string" },
    rings: { type: "string", default: RINGS.join() },
    json: { type: "boolean", default: false },
  },
});
const rounds = Number(options.rounds);
const [laneCpu = 0, driverCpu = 1] = options.cpus.split(",").map(Number);
const machine = { cpu: cpus()[0]?.model, cpus: availableParallelism(), kernel: release(), node: process.version };

pinThread(laneCpu);
const withoutC = buildCLane();
const stands = RINGS.filter((rings) => options.rings.split(",").includes(rings)).map(standOf);
const bench: Bench = { stands, rounds, driverCpu };
if (!options.json) {
  console.log(`${machine.cpu}, ${machine.cpus} CPUs, Linux ${machine.kernel}, Node ${machine.node}`);
  if (withoutC !== undefined) console.log(`without the lane in C: ${withoutC}`);
}

const rows: Row[] = [];
for (const mode of MODES) {
  if (options.mode && mode !== options.mode) continue;
  if (mode !== "hot" && machine.cpus < 2) {
    console.error(`${mode}: skipped, this machine has one CPU`);
    continue;
  }
  if (!options.json) printHead(mode);
  for (const plan of PLANS) {
    const row = { mode, ...plan, figures: await measure(bench, mode, plan) };
    rows.push(row);
    if (!options.json) printRow(row);
  }
}
for (const { carriers } of stands) for (const carrier of carriers) carrier.close();
if (options.json) console.log(JSON.stringify({ machine, withoutC, rows }));

function plans(layout: Layout, sizes: number[]): Plan[] {
  return sizes.map((frameBytes) => ({ frameBytes, layout }));
}

function standOf(rings: Rings): Stand {
  const rig = new Rig();
  const carriers = [wasmCarrier(rig, 1), wasmCarrier(rig, 5)];
  if (withoutC === undefined) carriers.push(cCarrier(rig));
  return { rings, rig, carriers };
}

function printHead(mode: Mode): void {
  const where = mode === "hot" ? `all on CPU ${laneCpu}` : `lane on CPU ${laneCpu}, drivers on CPU ${driverCpu}`;
  console.log(`\n${mode}, ${where}: ns per packet, median (min..max) of ${rounds} rounds`);
  const titles = ["Wasm 1", "Wasm 5", "C"].map((name) =>
    (mode === "two-cores" ? `${name}, idle, Mpps` : name).padEnd(columnWidth(mode)),
  );
  console.log(["bytes", "layout  ", "rings       ", ...titles, "Wasm 1 / split, / C"].join("  "));
}

function printRow({ mode, frameBytes, layout, figures }: Row): void {
  const find = (rings: Rings, carrier: string) =>
    figures.find((each) => each.rings === rings && each.carrier === carrier);
  for (const { rings } of stands) {
    const cells = ["Wasm 1", "Wasm 5", "C"].map((carrier) => cell(mode, find(rings, carrier)));
    const one = find(rings, "Wasm 1");
    const ratios = [ratio(one, find("split", "Wasm 1")), ratio(one, find(rings, "C"))];
    const head = [String(frameBytes).padStart(5), layout.padEnd(8), rings.padEnd(12)];
    console.log([...head, ...cells, ...ratios].join("  ").trimEnd());
  }
}

function cell(mode: Mode, figures: Figures | undefined): string {
  if (!figures) return "".padEnd(columnWidth(mode));
  const { ns, idle } = figures;
  const middle = median(ns);
  const range = `${digits(middle).padStart(6)} (${digits(Math.min(...ns))}..${digits(Math.max(...ns))})`;
  const load = mode === "two-cores" ? ` ${(100 * idle).toFixed(0)}% ${(1000 / middle).toFixed(2)}` : "";
  return (range + load).padEnd(columnWidth(mode));
}

/** The median of the rounds' ratios. */
function ratio(one: Figures | undefined, other: Figures | undefined): string {
  if (!one || !other) return "";
  return median(one.ns.map((ns, round) => ns / other.ns[round]!)).toFixed(2);
}

function columnWidth(mode: Mode): number {
  return mode === "two-cores" ? 32 : 22;
}

function digits(ns: number): string {
  return ns.toFixed(ns < 100 ? 1 : 0);
}

function median(numbers: readonly number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
}
