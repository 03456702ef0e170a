/** Regions one by one: what is mapped where, and what is left behind. */
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { ProtocolError } from "../../src/errors.ts";
import { EXTENTS_MAX } from "../../src/layout/lane.ts";
import { GuestMemory } from "../../src/memory/guest-memory.ts";
import { mappings } from "./mappings.ts";

const PAGE = 0x1000n;
const GIB = 1n << 30n;
let fd: number;

beforeEach(() => {
  fd = memfdCreate("guest", 24n * GIB);
});
afterEach(() => close(fd));

/** Region n: a page at an odd place of the file, with a page of nothing after it. */
const region = (n: number) => ({ gpa: BigInt(2 * n) * PAGE, sizeBytes: PAGE, mmapOffset: BigInt(3 * n) * PAGE, fd });

/** The word at a guest physical address, as a lane would see it. */
function word(memory: GuestMemory, gpa: bigint): Uint32Array {
  const place = memory.locate(gpa, 4n);
  if (!place) throw new Error(`gpa ${gpa} is nowhere`);
  return new Uint32Array(memory.segments[place.segment]!.buffer, Number(place.offset), 1);
}

describe("addRegion, removeRegion", () => {
  it("each region shows its own bytes, whatever comes and goes around it", () => {
    const memory = new GuestMemory();
    for (let n = 0; n < 40; n++) {
      memory.addRegion(region(n));
      word(memory, region(n).gpa)[0] = n + 1;
    }
    for (let n = 0; n < 40; n += 3) memory.removeRegion(region(n).gpa);
    for (let n = 0; n < 40; n++) {
      if (n % 3 === 0) expect(memory.locate(region(n).gpa, 4n)).toBeUndefined();
      else expect(word(memory, region(n).gpa)[0]).toBe(n + 1);
    }
    memory.addRegion(region(3));
    expect(word(memory, region(3).gpa)[0]).toBe(4);
  });

  it("regions that stay are not moved", () => {
    const memory = new GuestMemory();
    for (let n = 0; n < 5; n++) memory.addRegion(region(n));
    const place = memory.locate(region(4).gpa, PAGE);
    memory.removeRegion(region(1).gpa);
    memory.addRegion({ ...region(60), gpa: 1000n * PAGE });
    expect(memory.locate(region(4).gpa, PAGE)).toEqual(place);
  });

  it("a removed region's bytes are gone from the segment", () => {
    const memory = new GuestMemory();
    memory.addRegion(region(0));
    const seen = word(memory, 0n);
    seen[0] = 77;
    memory.removeRegion(0n);
    expect(seen[0]).toBe(0);
  });

  it("a region above 16 GiB takes several extents, and gives them all back", () => {
    const memory = new GuestMemory();
    memory.addRegion({ gpa: 0n, sizeBytes: 24n * GIB, mmapOffset: 0n, fd });
    expect(memory.extents.length).toBe(2);
    memory.removeRegion(0n);
    expect(memory.extents).toEqual([]);
    expect(memory.segments.length).toBe(1);
  });

  it("more pieces than a lane has extents for are refused before anything changes", () => {
    const memory = new GuestMemory();
    memory.setRegions(Array.from({ length: EXTENTS_MAX }, (_, n) => region(n)));
    const { extents } = memory;
    expect(() => memory.addRegion(region(EXTENTS_MAX))).toThrow(ProtocolError);
    expect(() => memory.setRegions(Array.from({ length: EXTENTS_MAX + 1 }, (_, n) => region(n + 1)))).toThrow(
      ProtocolError,
    );
    expect(memory.extents).toBe(extents);
  });

  it("BI-092: leave no mapping behind", () => {
    const memory = new GuestMemory();
    memory.addRegion(region(0));
    memory.addRegion(region(1));
    memory.removeRegion(region(1).gpa);
    const before = mappings();
    for (let n = 0; n < 1000; n++) {
      memory.addRegion(region(1 + (n % 7)));
      memory.removeRegion(region(1 + (n % 7)).gpa);
    }
    expect(mappings() - before).toBeLessThan(100);
    expect(memory.extents.length).toBe(1);
  });
});
