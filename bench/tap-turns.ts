/**
 * Carriers in turns on one TAP interface, in one thread: the C loops of tap.c and what is compared with them.
 *
 * Only a carrier's own part is timed, in CPU time of the thread: waiting for a CPU that others use does not count. A
 * turn is a few milliseconds: the machine changes its speed more slowly than that.
 */
import type { BenchTap, Frames } from "./c-tap.ts";
import { median } from "./figures.ts";

/** What carries frames from guest memory to the TAP interface, or from its queue into guest memory. */
export interface Carrier {
  readonly name: string;
  /** Of one carry(). */
  readonly frames: number;
  /** Not timed: the guest's part. */
  prepare(): void;
  /** Carries so many frames. @returns ns of CPU time */
  carry(): number;
}

export const DIRECTIONS = ["send", "receive"] as const;
export type Direction = (typeof DIRECTIONS)[number];

/** Frames the queue can hold. */
export const QUEUE_LENGTH = 4096;
/** Frames that wait in it at the start of a turn: some room is left for what the host itself may send. */
const QUEUE_DEPTH = QUEUE_LENGTH - 128;
const QUEUE_BYTES = 64 << 20;
/** So long that what the carriers before it left in the caches does not count. */
const TURN_NS = 5e6;
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
  /** Carries on until it has taken so long. @returns how long */
  const turn = (carrier: Carrier, figures: number[]): number => {
    let spent = 0;
    while (spent < TURN_NS) {
      carrier.prepare();
      const ns = carrier.carry();
      if (direction === "receive") tap.fill(frames, carrier.frames);
      figures.push(ns / carrier.frames);
      spent += ns;
    }
    return spent;
  };
  const slice = (first: number, ns: number): number[] => {
    const figures = carriers.map((): number[] => []);
    for (const spent = carriers.map(() => 0); Math.min(...spent) < ns;) {
      for (let i = 0; i < carriers.length; i++) {
        const which = (first + i) % carriers.length;
        spent[which]! += turn(carriers[which]!, figures[which]!);
      }
    }
    return figures.map(median);
  };
  slice(0, warm ? WARM_UP_NS : FIRST_WARM_UP_NS);
  warm = true;
  const all = Array.from({ length: rounds }, (_, round) => slice(round, SLICE_NS));
  return carriers.map((_, which) => all.map((figures) => figures[which]!));
}
