/** `npm test`: everything that needs no program but ours. The real guests have test/guests/vitest.config.ts. */
import { configDefaults, defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    exclude: [...configDefaults.exclude, "test/guests/**"],
    // Processes of their own: tests count the fds and mappings of theirs.
    pool: "forks",
    // A wait ends when what is waited for is there; how long that takes is the machine's affair.
    expect: { poll: { timeout: 60_000 } },
    testTimeout: 120_000,
    hookTimeout: 120_000,
  },
});
