/** What a process has mapped: proc_pid_maps(5). */
import { readFileSync } from "node:fs";

/**
 * How many mappings there are, of files of this name or of any kind. V8 adds and drops some of its own as it works, and
 * the kernel merges neighbours: compare with room for both.
 */
export function mappings(name = ""): number {
  return readFileSync("/proc/self/maps", "utf8")
    .split("\n")
    .filter((line) => line.includes(name)).length;
}
