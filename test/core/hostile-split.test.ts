/**
 * What only a split ring's driver can get wrong: links between descriptors, heads and the avail index. Section F of the
 * catalogue of bad inputs, as in hostile.test.ts.
 */
import { describe, expect, test } from "vitest";
import { INDIRECT, NEXT } from "./raw-ring.ts";
import { type Row, crossed, mustAccept, mustRefuse } from "./rows.ts";
import { DATA, RAM_END, Stage, everywhere, split } from "./stage.ts";

/** Chains at head 0 that must be refused whole. */
const refused: Row[] = [
  ["BI-166 next points to itself", ({ ring, flags }) => ring.describe(0, { gpa: DATA, len: 64, flags: flags | NEXT })],
  [
    "BI-166 next points to itself, no bytes",
    ({ ring, flags }) => ring.describe(0, { gpa: DATA, len: 0, flags: flags | NEXT }),
  ],
  [
    "BI-167 cycle of two",
    ({ ring, flags }) => {
      ring.describe(0, { gpa: DATA, len: 64, flags: flags | NEXT, next: 1 });
      ring.describe(1, { gpa: DATA, len: 64, flags: flags | NEXT, next: 0 });
    },
  ],
  [
    "BI-167 cycle over the whole table",
    ({ ring, flags }, size) => {
      for (let i = 0; i < size; i++) ring.describe(i, { gpa: DATA, len: 1, flags: flags | NEXT, next: (i + 1) % size });
    },
  ],
  [
    "BI-171 next is the ring size",
    ({ ring, flags }, size) => ring.describe(0, { gpa: DATA, len: 64, flags: flags | NEXT, next: size }),
  ],
  [
    "BI-198 loop in the table",
    (stage) => {
      stage.table(DATA, { gpa: DATA + 1024n, len: 1 }, { gpa: DATA + 1024n, len: 1 });
      stage.ring.write(DATA + 16n, { gpa: DATA + 1024n, len: 1, flags: stage.flags | NEXT, next: 0 });
    },
  ],
  [
    "BI-198 next past the table's end",
    (stage) => {
      stage.table(DATA, { gpa: DATA + 1024n, len: 64 });
      stage.ring.write(DATA, { gpa: DATA + 1024n, len: 64, flags: stage.flags | NEXT, next: 1 });
      stage.ring.write(DATA + 16n, { gpa: DATA + 1024n, len: 64, flags: stage.flags });
    },
  ],
];

/** Chains at head 0, of 112 bytes: odd, but legal. */
const accepted: Row[] = [
  [
    // Only entries that the chain uses are read, so where the rest of the table would lie does not matter.
    "BI-197 a table that leaves RAM behind the last entry in use",
    (stage) => {
      stage.table(RAM_END - 16n, { gpa: DATA, len: 112 });
      stage.ring.describe(0, { gpa: RAM_END - 16n, len: 160, flags: INDIRECT });
    },
  ],
];

test.each(crossed(refused, "split"))("refused: $name ($where.direction, ring of $where.size)", mustRefuse);
test.each(crossed(accepted, "split"))("accepted: $name ($where.direction, ring of $where.size)", mustAccept);

describe("the ring itself is broken: it stops, the other one goes on", () => {
  const broken: Row[] = [
    ["BI-172 head = ring size", ({ ring }, size) => ring.offer(size)],
    ["BI-172 head = 0xFFFF", ({ ring }) => ring.offer(0xffff)],
    ["BI-172 all heads invalid", ({ ring }, size) => ring.offer(...Array.from({ length: size }, () => 0xffff))],
    ["BI-174 avail index + ring size + 1", (stage, size) => (split(stage).availIdx += size + 1)],
    ["BI-174 avail index + 32769", (stage) => (split(stage).availIdx += 32_769)],
    ["BI-174 avail index - 1", (stage) => (split(stage).availIdx -= 1)],
  ];
  test.each(crossed(broken, "split"))("$name ($where.direction, ring of $where.size)", ({ row: [, lay], where }) => {
    const { direction, size } = where;
    const stage = new Stage({ ...where, peer: "split" }, { ring: { base: 100 } });
    if (direction === "receive") stage.send();
    lay(stage, size);
    const isBroken = direction === "transmit" ? "brokeSource" : "brokeDestination";
    expect(stage.judge.poll()).toMatchObject({ [isBroken]: true });
    expect(stage.ring.used()).toEqual([]);
    if (direction === "receive") stage.send(); // the sender is not held up
    expect(stage.judge.poll()).toMatchObject({ [isBroken]: false, waiting: false });
    expect(stage.rig.counters.drops.noReceiver).toBe(direction === "receive" ? 2 : 0);
    expect(stage.rig.lane.isBroken(direction === "transmit" ? "source" : "destination")).toBe(true);
  });

  test.each([2, 4, 256, 32_768])("what was used before the bad head is published (receive, ring of %i)", (size) => {
    const stage = new Stage({ direction: "receive", size });
    stage.post();
    stage.receiveq.offer(0xffff);
    stage.send();
    stage.transmitq.offer(0);
    expect(stage.judge.poll()).toMatchObject({ taken: 2, brokeDestination: true, callDestination: true });
    expect(stage.receiveq.used()).toEqual([{ id: 0, len: 112 }]);
  });
});

test.each(everywhere("split"))("BI-173 one head offered twice: used twice ($direction, ring of $size)", (where) => {
  const stage = new Stage({ ...where, peer: "split" });
  stage.send();
  stage.transmitq.offer(0);
  stage.post();
  stage.receiveq.offer(0);
  expect(stage.judge.poll()).toMatchObject({ taken: 2 });
  expect(stage.transmitq.used()).toEqual([
    { id: 0, len: 0 },
    { id: 0, len: 0 },
  ]);
  expect(stage.receiveq.used()).toEqual([
    { id: 0, len: 112 },
    { id: 0, len: 112 },
  ]);
});
