/** GuestMemory.setRegions(): which bytes are whose, what stays mapped, and that a refused table changes nothing. */
import { fstatSync, openSync, readFileSync, readSync, writeSync } from "node:fs";
import { afterEach, describe, expect, test } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { baseAddress } from "../../native/mman.ts";
import { ProtocolError } from "../../src/errors.ts";
import { type FileRegion, GuestMemory } from "../../src/memory/guest-memory.ts";

const GIB = 1n << 30n;
const opened: number[] = [];
afterEach(() => opened.splice(0).forEach(close));

function file(sizeBytes: bigint): number {
  const fd = memfdCreate("test", sizeBytes);
  opened.push(fd);
  return fd;
}

const region = (gpa: bigint, sizeBytes: bigint, fd: number, mmapOffset = 0n): FileRegion => {
  return { gpa, sizeBytes, mmapOffset, fd };
};

/** One byte of guest memory as the core would see it, through the extent that holds it. */
function byteAt(memory: GuestMemory, gpa: bigint): Uint8Array {
  const place = memory.locate(gpa, 1n);
  if (!place) throw new RangeError(`no memory at gpa ${gpa}`);
  return new Uint8Array(memory.segments[place.segment]!.buffer, Number(place.offset), 1);
}

function readByte(fd: number, position: bigint): number {
  const byte = new Uint8Array(1);
  readSync(fd, byte, 0, 1, position);
  return byte[0]!;
}

const inode = (fd: number): bigint => fstatSync(fd, { bigint: true }).ino;

/** A file open for reading only. */
function openSelf(): number {
  const fd = openSync(import.meta.filename, "r");
  opened.push(fd);
  return fd;
}

/** This process's mappings of the segments: start, end, file offset, inode. */
function mappings(memory: GuestMemory): string[] {
  const bases = memory.segments.map((segment) => baseAddress(segment));
  return readFileSync("/proc/self/maps", "utf8")
    .split("\n")
    .filter((line) => {
      const start = BigInt(`0x${line.split("-")[0] || "0"}`);
      return bases.some((base) => start >= base && start < base + 16n * GIB) && line.includes("memfd");
    });
}

describe("what is mapped", () => {
  test("the file's bytes are the guest's bytes, both ways", () => {
    const memory = new GuestMemory();
    const fd = file(0x10_0000n);
    memory.setRegions([region(0n, 0x8_0000n, fd), region(4n * GIB, 0x8_0000n, fd, 0x8_0000n)]);
    writeSync(fd, Uint8Array.of(42), 0, 1, 0x8_1234);
    expect(byteAt(memory, 4n * GIB + 0x1234n)[0]).toBe(42);
    byteAt(memory, 0x7_ffffn)[0] = 43;
    expect(readByte(fd, 0x7_ffffn)).toBe(43);
    expect(memory.locate(0x8_0000n, 1n)).toBeUndefined();
  });

  test("BI-071 a region smaller than its pages: its last byte is there, the next is not", () => {
    const memory = new GuestMemory();
    const fd = file(0x2000n);
    memory.setRegions([region(0x1_0000n, 0x1001n, fd)]);
    byteAt(memory, 0x1_1000n)[0] = 7;
    expect(readByte(fd, 0x1000n)).toBe(7);
    expect(memory.locate(0x1_1001n, 1n)).toBeUndefined();
    expect(memory.locate(0x1_1000n, 2n)).toBeUndefined();
    expect(memory.extents.map(({ gpa, sizeBytes }) => [gpa, sizeBytes])).toEqual([[0x1_0000n, 0x1001n]]);
  });

  test("an mmap offset inside a page: the region begins at its byte, and what is before it is not the guest's", () => {
    const memory = new GuestMemory();
    const fd = file(0x4000n);
    memory.setRegions([region(0x5000n, 0x2000n, fd, 0x0ff0n)]);
    byteAt(memory, 0x5000n)[0] = 9;
    byteAt(memory, 0x6fffn)[0] = 10;
    expect([readByte(fd, 0x0ff0n), readByte(fd, 0x2fefn)]).toEqual([9, 10]);
    expect(memory.locate(0x4fffn, 1n)).toBeUndefined();
    expect(memory.locate(0x7000n, 1n)).toBeUndefined();
  });

  test("BI-069 one file at two offsets, BI-068 adjacent regions: no area may cross from one to the other", () => {
    const memory = new GuestMemory();
    const fd = file(0x2000n);
    memory.setRegions([region(0x1000n, 0x1000n, fd, 0x1000n), region(0x2000n, 0x1000n, fd)]);
    byteAt(memory, 0x1000n)[0] = 1;
    byteAt(memory, 0x2000n)[0] = 2;
    expect([readByte(fd, 0n), readByte(fd, 0x1000n)]).toEqual([2, 1]);
    expect(memory.locate(0x1fffn, 2n)).toBeUndefined();
  });

  test("a region of 24 GiB continues in the next segment; any area of 1 MiB is in one piece", () => {
    const memory = new GuestMemory();
    const fd = file(24n * GIB);
    memory.setRegions([region(GIB, 24n * GIB, fd)]);
    expect(memory.segments).toHaveLength(2);
    for (let at = 16n * GIB - 4n * 0x10_0000n; at < 16n * GIB + 0x40_0000n; at += 0xf_f000n) {
      expect(memory.locate(GIB + at, 0x10_0000n)).toBeDefined();
    }
    const border = memory.extents[1]!.gpa;
    for (const gpa of [border - 1n, border, border + 0xf_ffffn, border + 0x10_0000n]) {
      byteAt(memory, gpa)[0] = Number(gpa % 251n) + 1;
      expect(readByte(fd, gpa - GIB)).toBe(Number(gpa % 251n) + 1);
    }
  });
});

describe("a new table", () => {
  test("BI-082, BI-083 regions sent again keep their mapping; others go and come", () => {
    const memory = new GuestMemory();
    const [kept, old, fresh] = [file(0x3000n), file(0x3000n), file(0x3000n)];
    memory.setRegions([region(0n, 0x3000n, old), region(GIB, 0x3000n, kept)]);
    byteAt(memory, GIB + 5n)[0] = 77;
    const place = memory.locate(GIB, 1n);
    const [line] = mappings(memory).filter((each) => each.includes(` ${inode(kept)} `));
    memory.setRegions([region(GIB, 0x3000n, kept), region(2n * GIB, 0x3000n, fresh)]);
    expect(memory.locate(GIB, 1n)).toEqual(place);
    expect(byteAt(memory, GIB + 5n)[0]).toBe(77);
    expect(mappings(memory).filter((each) => each.includes(` ${inode(kept)} `))).toEqual([line]);
    expect(mappings(memory).some((each) => each.includes(` ${inode(old)} `))).toBe(false);
    expect(mappings(memory).some((each) => each.includes(` ${inode(fresh)} `))).toBe(true);
    expect(memory.locate(0n, 1n)).toBeUndefined();
  });

  test.each([
    ["BI-096 no room left", () => region(2n * GIB, 100n * GIB, file(100n * GIB)), /no room left/],
    ["BI-074 a file that is not writable", () => region(2n * GIB, 0x1000n, openSelf()), /EACCES/],
  ])("BI-084 all or nothing: %s among good regions is refused, and nothing has changed", (_, bad, message) => {
    const memory = new GuestMemory();
    const [kept, unused] = [file(0x3000n), file(0x3000n)];
    memory.setRegions([region(0n, 0x3000n, kept)]);
    byteAt(memory, 0n)[0] = 55;
    const [before, extents] = [mappings(memory), memory.extents];
    const attempt = () => memory.setRegions([region(GIB, 0x3000n, unused), bad()]);
    expect(attempt).toThrow(ProtocolError);
    expect(attempt).toThrow(message);
    expect(memory.extents).toEqual(extents);
    expect(mappings(memory)).toEqual(before);
    expect(byteAt(memory, 0n)[0]).toBe(55);
  });

  test("clear() leaves no file mapped, and inert zeros where there was one", () => {
    const memory = new GuestMemory();
    const fd = file(0x3000n);
    memory.setRegions([region(0n, 0x3000n, fd)]);
    const byte = byteAt(memory, 0n);
    byte[0] = 9;
    memory.clear();
    expect(byte[0]).toBe(0);
    byte[0] = 8;
    expect(readByte(fd, 0n)).toBe(9);
    expect([mappings(memory), memory.extents]).toEqual([[], []]);
  });

  test("BI-092 a hundred tables: as many mappings as at first", () => {
    const memory = new GuestMemory();
    const swap = () => {
      const fd = memfdCreate("test", 0x20_0000n);
      memory.setRegions([region(0n, 0x10_0000n, fd), region(GIB, 0x10_0000n, fd, 0x10_0000n)]);
      close(fd);
    };
    swap();
    const before = mappings(memory).length;
    for (let i = 0; i < 100; i++) swap();
    expect(mappings(memory).length).toBe(before);
  });
});
