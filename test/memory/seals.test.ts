/** The seal that keeps a front-end from shortening memory under the core's loads (BI-278, BI-282). */
import { ftruncateSync } from "node:fs";
import { afterEach, expect, test } from "vitest";
import { close } from "../../native/libc.ts";
import { F_SEAL_SEAL, F_SEAL_SHRINK, addSeals, getSeals, memfdCreate } from "../../native/memfd.ts";
import { MemoryTable } from "../../src/vhost-user/memory-table.ts";

const fds: number[] = [];
afterEach(() => fds.splice(0).forEach(close));

function file(): number {
  const fd = memfdCreate("test", 0x2000n);
  fds.push(fd);
  return fd;
}

const region = (fd: number) => ({ gpa: 0n, sizeBytes: 0x2000n, userAddress: 0x10_0000n, mmapOffset: 0n, fd });

test("memory of a table is sealed against shrinking: truncating it fails from then on", () => {
  const fd = file();
  expect(getSeals(fd)).toBe(0);
  MemoryTable.of([region(fd)]);
  expect(getSeals(fd)).toBe(F_SEAL_SHRINK);
  expect(() => ftruncateSync(fd, 0x1000)).toThrow(/EPERM/);
});

test("BI-081 memory that takes no more seals is accepted as it is", () => {
  const fd = file();
  addSeals(fd, F_SEAL_SEAL);
  expect(() => MemoryTable.of([region(fd)])).not.toThrow();
  expect(getSeals(fd)).toBe(F_SEAL_SEAL);
});
