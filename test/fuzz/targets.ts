/** What can be fuzzed, by name. */
import type { Target } from "./engine.ts";
import { runRing } from "./ring.ts";

export const targets: Record<string, Target> = { ring: runRing };
