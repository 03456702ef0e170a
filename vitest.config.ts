/** `npm test`: everything that needs no program but ours. The real guests have test/guests/vitest.config.ts. */
import { configDefaults, defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    exclude: [...configDefaults.exclude, "test/guests/**"],
  },
});
