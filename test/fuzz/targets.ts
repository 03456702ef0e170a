/** What can be fuzzed, by name. */
import { type KeptSession, controlSeeds, keepControl, replayControl, runControl } from "./control.ts";
import type { Target } from "./engine.ts";
import { runRing } from "./ring.ts";

/** @template K how an input is kept in a file of test/fuzz/corpus */
interface FuzzTarget<K> {
  run: Target;
  /** Inputs to begin with. */
  seeds(): Uint8Array[];
  keep(input: Uint8Array): K;
  /** @throws what was found */
  replay(kept: K): Promise<void>;
}

const ring: FuzzTarget<{ input: string }> = {
  run: runRing,
  seeds: () => [],
  keep: (input) => ({ input: Buffer.from(input).toString("base64") }),
  replay: async ({ input }) => void runRing(Buffer.from(input, "base64")),
};

const control: FuzzTarget<KeptSession> = {
  run: runControl,
  seeds: controlSeeds,
  keep: keepControl,
  replay: replayControl,
};

export const targets = { ring, control } as Record<string, FuzzTarget<unknown>>;
