/** place(): where stretches of file go in a guest's segments, whatever is there already. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { SEGMENTS_MAX } from "../../src/layout/lane.ts";
import { type Place, SEGMENT_BYTES, place, roundUp } from "../../src/memory/placement.ts";
import { runs } from "../core/runs.ts";

const MIB = 0x10_0000n;
const GIB = 1024n * MIB;

const pageBytes = fc.constantFrom(4096n, 2n * MIB, GIB);
const stretch = fc.tuple(fc.bigInt({ min: 1n, max: 40n * GIB }), pageBytes).map(([size, page]) => {
  return { sizeBytes: roundUp(size, page), pageBytes: page };
});
/** Segments lie at any multiple of 64 KiB. */
const bases = fc.array(
  fc.bigInt({ min: 1n, max: 1n << 30n }).map((n) => n << 16n),
  {
    minLength: SEGMENTS_MAX,
    maxLength: SEGMENTS_MAX,
  },
);

describe("any sequence of stretches", () => {
  test("parts cover each stretch in order, overlap by 1 MiB or more, lie inside, aligned, and apart from all others", () => {
    fc.assert(
      fc.property(fc.array(stretch, { minLength: 1, maxLength: 8 }), bases, (stretches, bases) => {
        const taken: Place[] = [];
        for (const { sizeBytes, pageBytes } of stretches) {
          const places = place(sizeBytes, pageBytes, taken, (segment) => bases[segment]!);
          if (!places) continue;
          expect(places[0]!.start).toBe(0n);
          expect(places.at(-1)!.start + places.at(-1)!.sizeBytes).toBe(sizeBytes);
          for (const [i, part] of places.entries()) {
            const next = places[i + 1];
            if (next) expect(part.start + part.sizeBytes - next.start).toBeGreaterThanOrEqual(MIB);
            if (next) expect(next.start).toBeGreaterThan(part.start);
            expect(part.segment).toBeLessThan(SEGMENTS_MAX);
            expect(part.offset).toBeGreaterThanOrEqual(0n);
            expect(part.offset + part.sizeBytes).toBeLessThanOrEqual(SEGMENT_BYTES);
            expect((bases[part.segment]! + part.offset) % pageBytes).toBe(0n);
            expect(part.start % pageBytes).toBe(0n);
            expect(part.sizeBytes % pageBytes).toBe(0n);
            for (const other of [...taken, ...places.slice(0, i)].filter(({ segment }) => segment === part.segment)) {
              const apart =
                part.offset + part.sizeBytes <= other.offset || other.offset + other.sizeBytes <= part.offset;
              expect(apart).toBe(true);
            }
          }
          taken.push(...places);
        }
      }),
      { numRuns: runs(500) },
    );
  });

  test("a virtqueue area, or a buffer as large, is in one part wherever it starts", () => {
    fc.assert(
      fc.property(stretch, bases, fc.bigInt({ min: 0n, max: 40n * GIB }), (each, bases, at) => {
        const places = place(each.sizeBytes, each.pageBytes, [], (segment) => bases[segment]!)!;
        const area = 16n * 32_768n;
        fc.pre(at + area <= each.sizeBytes);
        const holds = (part: Place) => part.start <= at && at + area <= part.start + part.sizeBytes;
        expect(places.some(holds)).toBe(true);
      }),
      { numRuns: runs(300) },
    );
  });
});

describe("room", () => {
  const base = () => 0x10_0000_0000n;

  test("what fits into a gap goes there whole", () => {
    const taken = [
      { segment: 0, offset: 0n, sizeBytes: GIB, start: 0n },
      { segment: 0, offset: 3n * GIB, sizeBytes: SEGMENT_BYTES - 3n * GIB, start: 0n },
    ];
    expect(place(2n * GIB, 4096n, taken, base)).toEqual([{ segment: 0, offset: GIB, sizeBytes: 2n * GIB, start: 0n }]);
    expect(place(2n * GIB + 4096n, 4096n, taken, base)![0]).toMatchObject({ segment: 1, offset: 0n });
  });

  /** Regions placed one after the other; undefined for those that found no room. */
  const placeAll = (sizes: readonly bigint[]) => {
    const taken: Place[] = [];
    return sizes.map((sizeBytes) => {
      const places = place(sizeBytes, 4096n, taken, base);
      taken.push(...(places ?? []));
      return places;
    });
  };

  test.each([
    [[20, 20, 20]],
    [[3, 17, 20, 20]],
    [[15, 15, 15, 15, 4]],
    [Array.from({ length: 10 }, () => 6)],
    [Array.from({ length: 7 }, () => 9)],
  ])("a guest of regions of %j GiB fits", (sizes) => {
    expect(placeAll(sizes.map((size) => BigInt(size) * GIB))).not.toContain(undefined);
  });

  test("a guest of 64 GiB fits, whatever its regions are", () => {
    const size = fc.bigInt({ min: 1n, max: 32n * GIB }).map((bytes) => roundUp(bytes, 4096n));
    fc.assert(
      fc.property(fc.array(size, { minLength: 1, maxLength: 12 }), (sizes) => {
        let left = 64n * GIB;
        const guest = sizes.filter((sizeBytes) => sizeBytes <= left && ((left -= sizeBytes), true));
        if (left > 0n) guest.push(left);
        expect(placeAll(guest)).not.toContain(undefined);
      }),
      { numRuns: runs(300) },
    );
  });

  test("a whole guest of five segments fits, less the overlaps; one page more does not", () => {
    const most = BigInt(SEGMENTS_MAX) * SEGMENT_BYTES - BigInt(SEGMENTS_MAX - 1) * MIB;
    expect(place(most, 4096n, [], base)).toHaveLength(SEGMENTS_MAX);
    expect(place(most + 4096n, 4096n, [], base)).toBeUndefined();
  });
});
