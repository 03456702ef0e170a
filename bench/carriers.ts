/** What bench/lane.ts compares: things that carry frames of a rig, taking turns on the same rings. */
import { instantiateCore } from "../src/datapath/core.ts";
import { POLL_COUNT } from "../src/layout/lane.ts";
import type { Rig } from "./rig.ts";

/** Frames a poll, as the poller has it. */
export const BUDGET = 64;

/** What a run() did; idle polls found nothing to carry. */
export interface Run {
  elapsedNs: number;
  frames: number;
  polls: number;
  idle: number;
}

export interface Carrier {
  readonly name: string;
  /** Takes the rings over from the carrier before; they are as memory 0 says. */
  begin(): void;
  /** Leaves everything in memory 0. */
  end(): void;
  /** Polls until `frames` posted frames are carried. @returns nanoseconds, or -1 if a poll carried none */
  drain(frames: number): number;
  /** Polls for a while. */
  run(durationMs: number): Run;
  close(): void;
}

/** The core. @param segments of its variant; the rig's guests have one each */
export function wasmCarrier(rig: Rig, segments: number): Carrier {
  const all = (memories: readonly WebAssembly.Memory[]) => Array.from({ length: segments }, () => memories[0]!);
  const core = instantiateCore(rig.lane.memory, all(rig.source.segments), all(rig.destination.segments));
  return {
    name: `Wasm ${segments}`,
    begin: () => core.refresh(),
    end: () => {},
    close: () => {},
    drain(frames) {
      const start = performance.now();
      for (let done = 0, taken = 0; done < frames; done += taken) {
        taken = core.poll(BUDGET, 0) & POLL_COUNT;
        if (taken === 0) return -1;
      }
      return (performance.now() - start) * 1e6;
    },
    run(durationMs) {
      const start = performance.now();
      const run = { elapsedNs: 0, frames: 0, polls: 0, idle: 0 };
      do {
        for (let i = 0; i < 1024; i++) {
          const taken = core.poll(BUDGET, 0) & POLL_COUNT;
          run.frames += taken;
          if (taken === 0) run.idle++;
        }
        run.polls += 1024;
        run.elapsedNs = (performance.now() - start) * 1e6;
      } while (run.elapsedNs < durationMs * 1e6);
      return run;
    },
  };
}
