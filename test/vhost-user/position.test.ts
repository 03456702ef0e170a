/** Every state that a small packed ring can be in, with every base that a front-end may have kept. */
import { describe, expect, it } from "vitest";
import {
  advance,
  decodePackedBase,
  encodePackedBase,
  FIRST_POSITION,
  makePosition,
  positionIndex,
  readPosition,
  startPosition,
  unpublished,
} from "../../src/vhost-user/position.ts";

const AVAIL = 1 << 7;
const USED = 1 << 15;
const LAPS = 4;

/** The n-th slot since the ring began, as a position. */
function at(n: number, size: number): number {
  return makePosition(n % size, 1 - (Math.floor(n / size) % 2));
}

/** Flags of a ring whose driver has made `avail` slots available and whose device has given `used` of them back. */
function ringAt(size: number, used: number, avail: number): Uint16Array {
  const flags = new Uint16Array(size);
  for (let n = 0; n < avail; n++) {
    const wrap = 1 - (Math.floor(n / size) % 2);
    const isUsed = n < used;
    flags[n % size] = (wrap ? AVAIL : 0) | ((isUsed ? wrap : 1 - wrap) ? USED : 0);
  }
  return flags;
}

/** All states of rings of 1 to 6 slots in their first laps. */
function* states() {
  for (let size = 1; size <= 6; size++) {
    for (let used = 0; used <= LAPS * size; used++) {
      for (let avail = used; avail <= used + size; avail++) yield { size, used, avail };
    }
  }
}

describe("PROTOCOL, 5: where a packed ring goes on", () => {
  it("a ring that our core left shows its position, whatever the driver has made available since", () => {
    for (const { size, used, avail } of states()) {
      expect(readPosition(ringAt(size, used, avail)), `${used} of ${avail} in ${size}`).toBe(at(used, size));
    }
  });

  it("so it does when the core was killed between writing a batch and publishing it", () => {
    for (const { size, used, avail } of states()) {
      for (let batch = 2; batch <= Math.min(avail - used, size - 2); batch++) {
        const flags = ringAt(size, used, avail);
        for (let n = used + 1; n < used + batch; n++) flags[n % size] = ringAt(size, n + 1, n + 1)[n % size] as number;
        expect(readPosition(flags), `${used} and ${batch} more of ${avail} in ${size}`).toBe(at(used, size));
        expect(unpublished(at(used, size), flags)).toBe(batch);
        expect(startPosition(at(used, size), flags)).toBe(at(used, size));
      }
    }
  });

  it("whatever base the front-end has kept, the ring's position counts", () => {
    for (const { size, used, avail } of states()) {
      for (let base = 0; base <= used; base++) {
        expect(startPosition(at(base, size), ringAt(size, used, avail))).toBe(at(used, size));
      }
    }
  });

  it("the base counts in a ring of a device that marks the first slot of a chain only", () => {
    const flags = Uint16Array.from([AVAIL | USED, AVAIL, AVAIL | USED, AVAIL, AVAIL | USED, 0, 0, 0]);
    expect(startPosition(makePosition(5, 1), flags)).toBe(makePosition(5, 1));
  });

  it("a ring in disorder shows nothing: the base counts, whatever it is", () => {
    for (let pattern = 0; pattern < 1 << 6; pattern++) {
      const flags = Uint16Array.from({ length: 6 }, (_, slot) => (pattern & (1 << slot) ? USED : 0));
      const shown = readPosition(flags);
      for (let index = 0; index < 6; index++) {
        for (const wrap of [0, 1]) {
          const base = makePosition(index, wrap);
          expect([base, shown]).toContain(startPosition(base, flags));
        }
      }
      if (shown !== undefined) expect(positionIndex(shown)).toBeLessThan(6);
    }
  });

  it("a fresh ring begins at slot 0 with wrap counter 1, even if the front-end says 0", () => {
    expect(startPosition(0, new Uint16Array(8))).toBe(FIRST_POSITION);
    expect(startPosition(FIRST_POSITION, new Uint16Array(8))).toBe(FIRST_POSITION);
  });
});

describe("PROTOCOL, 3: the packed vring base", () => {
  it("has two positions; where they differ the used one counts; a used half of 0 is none", () => {
    expect(encodePackedBase(0x8005)).toBe(0x8005_8005);
    expect(decodePackedBase(0x8005_8005)).toBe(0x8005);
    expect(decodePackedBase(0x8005_8007)).toBe(0x8005);
    expect(decodePackedBase(0x0000_8007)).toBe(0x8007);
    expect(decodePackedBase(0)).toBe(0);
  });

  it("positions advance through the end of the ring and turn the wrap counter", () => {
    for (let size = 1; size <= 6; size++) {
      for (let n = 0; n < LAPS * size; n++) {
        for (let count = 0; count <= size; count++) expect(advance(at(n, size), count, size)).toBe(at(n + count, size));
      }
    }
  });
});
