/**
 * BI-217 by chance, beside the exhaustion of exhaustive.test.ts: whatever stands in the descriptors of a small ring, in its
 * avail ring and in an indirect table, both directions do what the reference says. VHOST_RELAY_TEST_RUNS multiplies the
 * number of tries.
 */
import fc from "fast-check";
import { test } from "vitest";
import { AVAIL, RawPacked, USED, availableAt } from "./raw-packed.ts";
import type { Descriptor } from "./raw-ring.ts";
import { RawSplit } from "./raw-split.ts";
import { advance, positionOf } from "./reference-packed.ts";
import { runs } from "./runs.ts";
import { DATA, RAM_END, SEAM, Stage } from "./stage.ts";

const TABLE = DATA + 0x1001n;
const descriptor: fc.Arbitrary<Required<Descriptor>> = fc.record({
  gpa: fc.constantFrom(DATA, SEAM - 20n, RAM_END - 30n, 0x8000_0000n, 0xffff_ffff_ffff_fff0n, TABLE),
  len: fc.constantFrom(0, 1, 13, 32, 48, 200, 0xffff_ffff),
  flags: fc.oneof(fc.nat(7), fc.constantFrom(0, 1, 2, 3)),
  next: fc.oneof(fc.nat(3), fc.constantFrom(0xffff)),
});
const garbage = fc.record({
  ring: fc.array(descriptor, { minLength: 4, maxLength: 4 }),
  table: fc.array(descriptor, { minLength: 4, maxLength: 4 }),
  heads: fc.array(
    fc.oneof({ weight: 20, arbitrary: fc.nat(3) }, { weight: 1, arbitrary: fc.constantFrom(4, 0xffff) }),
    {
      maxLength: 4,
    },
  ),
  skip: fc.oneof({ weight: 20, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.constantFrom(5, 32_768, -1) }),
});

/** What a packed ring's four slots hold beside that, and where the device stands in them. */
const owners = fc.record({
  bits: fc.array(
    fc.oneof(
      { weight: 8, arbitrary: fc.constant("available") },
      { weight: 1, arbitrary: fc.constantFrom("none", "all") },
    ),
    { minLength: 4, maxLength: 4 },
  ),
  base: fc.tuple(fc.nat(3), fc.nat(1)),
});

test("BI-217 random descriptors, tables and indexes in both directions", { timeout: 60_000 }, () => {
  const features = fc.record({ indirect: fc.boolean(), mergeable: fc.boolean(), eventIdx: fc.boolean() });
  fc.assert(
    fc.property(
      fc.tuple(garbage, owners),
      fc.tuple(garbage, owners),
      features,
      fc.constantFrom("split" as const, "packed" as const),
      fc.constantFrom("split" as const, "packed" as const),
      fc.array(fc.boolean(), { minLength: 1, maxLength: 3 }),
      (from, to, ring, format, peer, polls) => {
        const base = positionOf(...from[1].base);
        const stage = new Stage({ direction: "transmit", size: 4, format, peer }, { ring, base });
        stage.rig.source.ram.slice(DATA, 2).fill(0);
        for (const [raw, [{ ring, table, heads, skip }, { bits }]] of [
          [stage.transmitq, from],
          [stage.receiveq, to],
        ] as const) {
          for (const [i, each] of table.entries()) raw.write(TABLE + 16n * BigInt(i), each);
          if (raw instanceof RawPacked) {
            for (const [i, each] of ring.entries()) {
              const at = advance(raw.next, i, 4);
              const owner = { available: availableAt(at), none: 0, all: AVAIL | USED }[bits[i]!]!;
              raw.put(at, { gpa: each.gpa, len: each.len, id: each.next, flags: each.flags | owner });
            }
          } else if (raw instanceof RawSplit) {
            for (const [i, each] of ring.entries()) raw.describe(i, each);
            raw.offer(...heads);
            if (skip !== 0) raw.availIdx = (raw.availIdx + skip) & 0xffff;
          }
        }
        for (const stuck of polls) stage.judge.poll(64, stuck);
      },
    ),
    { numRuns: runs(250) },
  );
});
