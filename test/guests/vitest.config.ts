/**
 * The tests with real guests: `npm run test:guests`, or `npm run test:guests:short` for those that CI has the time for,
 * which is all but `*.long.test.ts`. They share the machine's CPUs, so one file runs at a time.
 */
import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/guests/**/*.test.ts"],
    fileParallelism: false,
    // what hangs is reported by program.ts, with the program's output, before this
    // A wait ends when what is waited for is there; how long that takes is the machine's affair.
    expect: { poll: { timeout: 60_000 } },
    testTimeout: 300_000,
    hookTimeout: 300_000,
  },
});
