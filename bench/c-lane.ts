/**
 * Builds and loads bench/lane.c where a C compiler is there.
 *
 * The one place outside native/ that calls C by itself: this library is never part of the product.
 */
import { spawnSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import koffi from "koffi";
import { baseAddress } from "../native/mman.ts";
import * as lane from "../src/layout/lane.ts";
import * as virtio from "../src/layout/virtio.ts";
import type { Carrier } from "./carriers.ts";
import { BUDGET } from "./carriers.ts";
import type { Rig } from "./rig.ts";

const directory = "build/bench";
const library = `${directory}/lane.so`;
const command = ["cc", "-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra"];

/** Compiles lane.c with the layouts of src/layout. @returns why it cannot be, or undefined */
export function buildCLane(): string | undefined {
  mkdirSync(directory, { recursive: true });
  const numbers = Object.entries({ ...virtio, ...lane });
  writeFileSync(`${directory}/layout.h`, numbers.map(([name, value]) => `#define ${name} ${value}\n`).join(""));
  const [cc, ...flags] = command;
  const result = spawnSync(cc!, [...flags, `-I${directory}`, "-o", library, "bench/lane.c"], { encoding: "utf8" });
  if (result.error) return `no C compiler: ${result.error.message}`;
  return result.status === 0 ? undefined : `cc failed: ${result.stderr}`;
}

/** The lane in C over a rig's memory and rings. buildCLane() was successful. */
export function cCarrier(rig: Rig): Carrier {
  const c = koffi.load(library);
  const create = c.func("uintptr_t lane_create()");
  const load = c.func("void lane_load(uintptr_t lane, uintptr_t memory, void *segments)");
  const store = c.func("void lane_store(uintptr_t lane, uintptr_t memory)");
  const drain = c.func("double lane_drain(uintptr_t lane, uint32_t budget, uint32_t frames)");
  const run = c.func("void lane_run(uintptr_t lane, uint32_t budget, double duration, void *result)");
  const free = c.func("void lane_free(uintptr_t lane)");

  const state = create();
  const memory = baseAddress(rig.lane.memory);
  const segments = new BigUint64Array(2 * lane.SEGMENTS_MAX);
  rig.source.segments.forEach((segment, i) => (segments[i] = baseAddress(segment)));
  rig.destination.segments.forEach((segment, i) => (segments[lane.SEGMENTS_MAX + i] = baseAddress(segment)));
  const result = new Float64Array(4);
  return {
    name: "C",
    begin: () => load(state, memory, segments),
    end: () => store(state, memory),
    close: () => free(state),
    drain: (frames) => drain(state, BUDGET, frames),
    run(durationMs) {
      run(state, BUDGET, durationMs * 1e6, result);
      const [elapsedNs, frames, polls, idle] = result as unknown as [number, number, number, number];
      return { elapsedNs, frames, polls, idle };
    },
  };
}
