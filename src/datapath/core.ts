/** The core's WebAssembly: the one place where it is loaded. */
import { readFileSync } from "node:fs";
import { findPackageJSON } from "node:module";
import { dirname, join } from "node:path";
import { ConfigError } from "../errors.ts";
import { LANE_PAGES } from "../layout/lane.ts";
import { VARIANTS } from "./variants.ts";

/** What the core exports; see assembly/index.ts. */
export interface Core {
  poll(budget: number, stuck: number): number;
  prepare(budget: number): number;
  finish(): number;
  arm(stuck: number): number;
  disarm(): void;
  refresh(): void;
  inject(length: number): number;
}

/** A lane's private memory 0, shared with the control plane; laid out by src/layout/lane.ts. */
export function createLaneMemory(): WebAssembly.Memory {
  return new WebAssembly.Memory({ initial: LANE_PAGES, maximum: LANE_PAGES, shared: true });
}

/** An instance of the smallest variant that has room for both guests' segments. */
export function instantiateCore(
  memory: WebAssembly.Memory,
  source: readonly WebAssembly.Memory[],
  destination: readonly WebAssembly.Memory[],
): Core {
  const needed = Math.max(source.length, destination.length);
  const segments = VARIANTS.find((n) => n >= needed);
  if (segments === undefined) throw new RangeError(`no core variant has ${needed} segments an end`);
  const guest: Record<string, WebAssembly.Memory> = {};
  for (let i = 0; i < segments; i++) {
    // A variant may have more segments than a guest: no extent leads to those, so any memory of that guest will do.
    guest[`source${i}`] = (source[i] ?? source[0]) as WebAssembly.Memory;
    guest[`destination${i}`] = (destination[i] ?? destination[0]) as WebAssembly.Memory;
  }
  const instance = new WebAssembly.Instance(loadModule(`core-${segments}`), { env: { memory }, guest });
  return instance.exports as unknown as Core;
}

const modules = new Map<string, WebAssembly.Module>();

/** Compiles build/core/<name>.wasm, once per thread. */
export function loadModule(name: string): WebAssembly.Module {
  let module = modules.get(name);
  if (!module) {
    const file = join(dirname(findPackageJSON(import.meta.url) as string), "build", "core", `${name}.wasm`);
    let bytes: Uint8Array;
    try {
      bytes = readFileSync(file);
    } catch {
      throw new ConfigError(`the core is not built: ${file} is missing; run "npm run core"`);
    }
    modules.set(name, (module = new WebAssembly.Module(bytes)));
  }
  return module;
}
