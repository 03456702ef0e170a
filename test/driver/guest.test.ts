/** Guest memory as front-ends lay it out: sparse, in regions, above 4 GiB. */
import { statSync } from "node:fs";
import { expect, test } from "vitest";
import { F_SEAL_GROW, F_SEAL_SHRINK, getSeals } from "../../native/memfd.ts";
import { Arena, Guest } from "../../src/driver/guest.ts";

const GIB = 1n << 30n;

test("a guest of 24 GiB takes up only what is touched, and its file is sealed against shrinking", () => {
  using guest = new Guest([
    { gpa: 0n, sizeBytes: 3n * GIB },
    { gpa: 4n * GIB, sizeBytes: 21n * GIB },
  ]);
  guest.write(20n * GIB, Uint8Array.of(1));
  const { fd } = guest.regions[0]!;
  const { size, blocks } = statSync(`/proc/self/fd/${fd}`);
  expect(size).toBe(Number(24n * GIB));
  expect(blocks * 512).toBeLessThan(1 << 20);
  expect(getSeals(fd) & (F_SEAL_SHRINK | F_SEAL_GROW)).toBe(F_SEAL_SHRINK | F_SEAL_GROW);
});

test("windows, read() and write() show the same bytes, across regions that lie elsewhere in the file", () => {
  const border = 16n * GIB;
  using guest = new Guest([
    { gpa: border - 0x2000n, sizeBytes: 0x2000n, fileOffset: 0x5000n },
    { gpa: border, sizeBytes: 0x3000n, fileOffset: 0x1000n },
  ]);
  const window = guest.window(border - 100n, 200);
  const bytes = new Uint8Array(window.buffer, window.byteOffset, window.sizeBytes);
  bytes.set(bytes.map((_, i) => i + 1));
  expect(guest.read(border - 100n, 200)).toEqual(Uint8Array.from(bytes));
  guest.write(border - 1n, Uint8Array.of(0xaa, 0xbb));
  expect([bytes[99], bytes[100]]).toEqual([0xaa, 0xbb]);
  expect(guest.userAddress(border + 5n) - guest.userAddress(border)).toBe(5n);
});

test("an address in no region is refused", () => {
  using guest = new Guest([{ gpa: 0x1000n, sizeBytes: 0x1000n }]);
  expect(() => guest.read(0x1fffn, 2)).toThrow(RangeError);
  expect(() => guest.window(0x0n, 10)).toThrow(RangeError);
  expect(() => guest.userAddress(0x2000n)).toThrow(RangeError);
});

test("an arena hands out aligned, disjoint pieces until its window is spent", () => {
  using guest = new Guest([{ gpa: 0x1000n, sizeBytes: 0x2000n }]);
  const arena = new Arena(guest.window(0x1010n, 0x1100));
  const [a, b] = [arena.take(10, 64), arena.take(100, 4096)];
  expect([a.gpa, b.gpa]).toEqual([0x1040n, 0x2000n]);
  new Uint8Array(b.buffer, b.byteOffset, 1)[0] = 9;
  expect(guest.read(0x2000n, 1)).toEqual(Uint8Array.of(9));
  expect(() => arena.take(0x100, 1)).toThrow(RangeError);
});
