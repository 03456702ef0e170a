/**
 * Guests of 24 GiB, mapped as in production: rings and buffers above 4 GiB, and both across the place where the first
 * segment ends. The memory is sparse; that nothing was touched elsewhere shows in the pages the files have.
 */
import { fstatSync, readSync, writeSync } from "node:fs";
import { afterEach, describe, expect, test } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { instantiateCore } from "../../src/datapath/core.ts";
import { Lane } from "../../src/datapath/lane.ts";
import { VRING_ENABLED, VRING_MERGEABLE } from "../../src/layout/lane.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { frameOf } from "./chains.ts";

const GIB = 1n << 30n;
const SIZE = 24n * GIB;
/** Guest physical addresses begin above 4 GiB, so no address fits 32 bits. */
const BASE = 8n * GIB;
const BORDER = BASE + 16n * GIB;

const fds: number[] = [];
afterEach(() => fds.splice(0).forEach(close));

interface LargeGuest {
  memory: GuestMemory;
  fd: number;
  write(gpa: bigint, bytes: Uint8Array): void;
  read(gpa: bigint, length: number): Buffer;
}

function largeGuest(): LargeGuest {
  const fd = memfdCreate("large", SIZE);
  fds.push(fd);
  const memory = new GuestMemory();
  memory.setRegions([{ gpa: BASE, sizeBytes: SIZE, mmapOffset: 0n, fd }]);
  return {
    memory,
    fd,
    write: (gpa, bytes) => void writeSync(fd, bytes, 0, bytes.length, Number(gpa - BASE)),
    read: (gpa, length) => {
      const bytes = Buffer.alloc(length);
      readSync(fd, bytes, 0, length, gpa - BASE);
      return bytes;
    },
  };
}

/** Lays one descriptor, offered, on a ring of two. */
function offer({ write }: LargeGuest, ring: bigint, buffer: { gpa: bigint; len: number; flags: number }): void {
  const desc = Buffer.alloc(16);
  desc.writeBigUInt64LE(buffer.gpa, 0);
  desc.writeUInt32LE(buffer.len, 8);
  desc.writeUInt16LE(buffer.flags, 12);
  write(ring, desc);
  write(ring + 32n, Uint8Array.of(0, 0, 1, 0, 0, 0));
}

function start({ memory }: LargeGuest, ring: bigint, flags: number) {
  const area = (gpa: bigint, bytes: bigint) => memory.locate(gpa, bytes)!;
  const fds = { kick: undefined, call: undefined, err: undefined };
  const areas = { desc: area(ring, 32n), avail: area(ring + 32n, 10n), used: area(ring + 64n, 22n) };
  return { start: Symbol("start"), size: 2, base: 0, ...areas, headerBytes: 12, flags, ...fds };
}

describe("24 GiB", () => {
  const beforeSecond = BORDER - 0x10_0000n; // the second segment begins here: the two share 1 MiB
  test.each([
    ["before the border", BORDER - 0x20_0000n, BORDER - 0x18_0000n, 2000],
    ["the ring across the end of the first segment", BORDER - 16n, BORDER + 4096n, 2000],
    ["the ring across the start of the second", beforeSecond - 16n, BORDER + 4096n, 2000],
    ["the buffers across the end of the first segment", BORDER + 4096n, BORDER - 700n, 2000],
    ["the buffers across the start of the second", BORDER + 4096n, beforeSecond - 700n, 2000],
    ["a buffer across all that they share", BORDER + 0x100_0000n, beforeSecond - 700n, 3 << 20],
    ["beyond", BORDER + 7n * GIB, BORDER + 6n * GIB + 1n, 2000],
  ])("%s", (_, ring, buffer, len) => {
    const [source, destination] = [largeGuest(), largeGuest()];
    const frame = frameOf(1, 1500);
    source.write(buffer, Buffer.concat([new Uint8Array(12), frame]));
    offer(source, ring, { gpa: buffer, len: 1512, flags: 0 });
    offer(destination, ring, { gpa: buffer, len, flags: 2 });
    destination.write(buffer, new Uint8Array(2000).fill(0xee));
    destination.write(ring + 64n, new Uint8Array(22));
    source.write(ring + 64n, new Uint8Array(22));
    const pages = [source, destination].map(({ fd }) => fstatSync(fd).blocks);

    const lane = new Lane("large");
    lane.setVring("source", start(source, ring, VRING_ENABLED));
    lane.setVring("destination", start(destination, ring, VRING_ENABLED | VRING_MERGEABLE));
    lane.setExtents("source", source.memory.extents);
    lane.setExtents("destination", destination.memory.extents);
    const core = instantiateCore(lane.memory, source.memory.segments, destination.memory.segments);
    core.refresh();
    expect(core.poll(64, 0) & 0xffff).toBe(1);

    expect(destination.read(buffer, 12)).toEqual(Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]));
    expect(Buffer.compare(destination.read(buffer + 12n, 1500), frame)).toBe(0);
    expect(destination.read(buffer + 1512n, 488)).toEqual(Buffer.alloc(488, 0xee));
    expect([...destination.read(ring + 64n, 12)]).toEqual([1, 0, 1, 0, 0, 0, 0, 0, 0xe8, 5, 0, 0]);
    expect([...source.read(ring + 64n, 12)]).toEqual([1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    expect([source, destination].map(({ fd }) => fstatSync(fd).blocks)).toEqual(pages);
  });
});
