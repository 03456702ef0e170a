/**
 * Carriers in turns on one TAP interface, in one thread: the C loops of tap.c and what is compared with them.
 *
 * Only a carrier's own part is timed, in CPU time of the thread: waiting for a CPU that others use does not count. A turn is a
 * few hundred frames, so all carriers see the same phases of a machine that changes its speed.
 */
import type { BenchTap, Frames } from "./c-tap.ts";
import { median } from "./figures.ts";

/** What carries frames from guest memory to the TAP interface, or from its queue into guest memory. */
export interface Carrier {
  readonly name: string;
  /** Frames of one turn. */
  readonly frames: number;
  /** Not timed: the guest's part. */
  prepare(): void;
  /** @returns ns of CPU time for `frames` frames */
  carry(): number;
}

export const DIRECTIONS = ["send", "receive"] as const;
export type Direction = (typeof DIRECTIONS)[number];

/** Frames the queue can hold. */
export const QUEUE_LENGTH = 4096;
/** Frames that wait in it at the start of a turn: some room is left for what the host itself may send. */
const QUEUE_DEPTH = QUEUE_LENGTH - 128;
const QUEUE_BYTES = 64 << 20;
const SLICE_NS = 25e6;
const WARM_UP_NS = 10e6;
/** V8 compiles the core anew in the background when it has run for a while. */
const FIRST_WARM_UP_NS = 200e6;
let warm = false;

export function cCarrier(tap: BenchTap, direction: Direction, frames: Frames, count: number): Carrier {
  return {
    name: "C",
    frames: count,
    prepare: () => {},
    carry: () => (direction === "send" ? tap.write(frames, count) : tap.read(frames, count)),
  };
}

/** ns a frame of each carrier, one figure a round. */
export function takeTurns(
  tap: BenchTap,
  direction: Direction,
  frames: Frames,
  carriers: readonly Carrier[],
  rounds: number,
): number[][] {
  const depth = Math.min(QUEUE_DEPTH, Math.floor(QUEUE_BYTES / frames.frameBytes));
  tap.drain();
  if (direction === "receive") tap.fill(frames, depth);
  const turn = (carrier: Carrier): number => {
    carrier.prepare();
    const ns = carrier.carry();
    if (direction === "receive") tap.fill(frames, carrier.frames);
    return ns / carrier.frames;
  };
  const slice = (first: number, ns: number): number[] => {
    const figures = carriers.map((): number[] => []);
    for (const spent = carriers.map(() => 0); Math.min(...spent) < ns;) {
      for (let i = 0; i < carriers.length; i++) {
        const which = (first + i) % carriers.length;
        const figure = turn(carriers[which]!);
        figures[which]!.push(figure);
        spent[which]! += figure * carriers[which]!.frames;
      }
    }
    return figures.map(median);
  };
  slice(0, warm ? WARM_UP_NS : FIRST_WARM_UP_NS);
  warm = true;
  const all = Array.from({ length: rounds }, (_, round) => slice(round, SLICE_NS));
  return carriers.map((_, which) => all.map((figures) => figures[which]!));
}
