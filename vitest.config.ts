/** `npm test`: everything that needs no program but ours. The real guests have test/guests/vitest.config.ts. */
import { configDefaults, defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    exclude: [...configDefaults.exclude, "test/guests/**"],
    // Processes of their own: tests count the fds and mappings of theirs.
    pool: "forks",
    testTimeout: 120_000,
    hookTimeout: 120_000,
  },
});
