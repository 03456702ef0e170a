/**
 * Drivers that break the split ring's rules: section F of the catalogue of bad inputs, each row by its number. Every
 * poll is compared with the reference, byte for byte, so a test only adds what its row promises. In both directions:
 * a bad transmit chain is dropped, a bad receive chain is skipped, both come back used with length 0, and the next
 * good chain works.
 *
 * Rows 206 to 208 need memory that changes between two reads (hooked.test.ts), 211 the built code (build.test.ts).
 */
import { describe, expect, test } from "vitest";
import { INDIRECT, NEXT, WRITE } from "./raw-ring.ts";
import { runs } from "./runs.ts";
import { DATA, type Direction, RAM_END, SEAM, Stage, type Where } from "./stage.ts";

const SIZES = [2, 4, 256, 32_768];
const everywhere: Where[] = (["transmit", "receive"] as const).flatMap((direction: Direction) =>
  SIZES.map((size) => ({ direction, size })),
);
const HOLE = 0x8000_0000n;
const TOP = 0xffff_ffff_ffff_ffffn;

type Row = [name: string, lay: (stage: Stage, size: number) => void, options?: ConstructorParameters<typeof Stage>[1]];

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
    "BI-169 one descriptor more than the ring has",
    (stage, size) => stage.table(DATA, ...Array.from({ length: size + 1 }, () => ({ gpa: DATA, len: 1 }))),
  ],
  [
    "BI-171 next is the ring size",
    ({ ring, flags }, size) => ring.describe(0, { gpa: DATA, len: 64, flags: flags | NEXT, next: size }),
  ],
  ["BI-177 address 0, not mapped", (stage) => stage.chain({ gpa: 0n, len: 2048 })],
  ["BI-178 address beyond RAM", (stage) => stage.chain({ gpa: RAM_END, len: 64 })],
  ["BI-178 far beyond RAM", (stage) => stage.chain({ gpa: 1n << 52n, len: 64 })],
  ["BI-179 address in a hole", (stage) => stage.chain({ gpa: HOLE, len: 64 })],
  ["BI-179 buffer runs into a hole", (stage) => stage.chain({ gpa: DATA, len: 64 }, { gpa: RAM_END - 32n, len: 64 })],
  ["BI-181 buffer crosses the end of RAM by one byte", (stage) => stage.chain({ gpa: RAM_END - 100n, len: 101 })],
  ["BI-182 address + length wraps 64 bits", (stage) => stage.chain({ gpa: TOP - 31n, len: 64 })],
  ["BI-182 the last address of all", (stage) => stage.chain({ gpa: TOP, len: 1 })],
  ["BI-183 length 0xFFFFFFFF", (stage) => stage.chain({ gpa: DATA, len: 0xffff_ffff })],
  [
    "BI-188, BI-189 one descriptor of the wrong direction",
    (stage) => stage.chain({ gpa: DATA, len: 64 }, { gpa: DATA, len: 64, flags: stage.flags ^ WRITE }),
  ],
  [
    "BI-188, BI-189 only the wrong direction",
    (stage) => stage.chain({ gpa: DATA, len: 64, flags: stage.flags ^ WRITE }),
  ],
  [
    "BI-188, BI-189 the wrong direction without bytes",
    (stage) => stage.chain({ gpa: DATA, len: 0, flags: stage.flags ^ WRITE }, { gpa: DATA, len: 64 }),
  ],
  [
    "BI-191 indirect without the feature",
    (stage) => stage.table(DATA, { gpa: DATA, len: 64 }),
    { ring: { indirect: false } },
  ],
  [
    "BI-192 indirect in an indirect table",
    (stage) => {
      stage.table(DATA, { gpa: DATA + 64n, len: 16, flags: INDIRECT });
      stage.ring.write(DATA + 64n, { gpa: DATA + 1024n, len: 64, flags: stage.flags });
    },
  ],
  [
    "BI-193 INDIRECT and NEXT together",
    (stage) => {
      stage.table(DATA, { gpa: DATA, len: 64 });
      stage.ring.describe(0, { gpa: DATA, len: 16, flags: INDIRECT | NEXT, next: 1 });
      stage.ring.describe(1, { gpa: DATA, len: 64, flags: stage.flags });
    },
  ],
  ...[0, 1, 15, 17, 8, 0xffff_ffff].map((len): Row => [
    `BI-194 indirect length ${len}`,
    (stage) => {
      stage.table(DATA, { gpa: DATA + 1024n, len: 64 });
      stage.ring.describe(0, { gpa: DATA, len, flags: INDIRECT });
    },
  ]),
  [
    "BI-197 the second entry of the table is beyond RAM",
    (stage) => {
      stage.ring.write(RAM_END - 16n, { gpa: DATA, len: 64, flags: stage.flags | NEXT, next: 1 });
      stage.ring.describe(0, { gpa: RAM_END - 16n, len: 32, flags: INDIRECT });
    },
  ],
  [
    "BI-197 an entry of the table crosses the end of RAM",
    (stage) => stage.ring.describe(0, { gpa: RAM_END - 8n, len: 16, flags: INDIRECT }),
  ],
  ["BI-197 the table is in a hole", (stage) => stage.ring.describe(0, { gpa: HOLE, len: 16, flags: INDIRECT })],
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
    "BI-171 garbage in next, NEXT clear",
    ({ ring, flags }) => ring.describe(0, { gpa: DATA, len: 112, flags, next: 0xffff }),
  ],
  [
    "BI-168 chain of exactly the ring size",
    (stage, size) => {
      const ones = Math.min(size - 1, 111);
      const parts = Array.from({ length: size - 1 }, (_, i) => ({ gpa: DATA + BigInt(i), len: i < ones ? 1 : 0 }));
      stage.chain(...parts, { gpa: DATA + BigInt(ones), len: 112 - ones });
    },
  ],
  [
    "BI-168 indirect chain of exactly the ring size",
    (stage, size) => {
      const parts = Array.from({ length: size - 1 }, () => ({ gpa: DATA, len: 0 }));
      stage.table(DATA + 4096n, ...parts, { gpa: DATA, len: 112 });
    },
  ],
  ["BI-177 address 0, mapped", (stage) => stage.chain({ gpa: 0n, len: 112 }), { zeroPage: true }],
  ["BI-181 buffer ends where RAM ends", (stage) => stage.chain({ gpa: RAM_END - 112n, len: 112 })],
  ["BI-186 a descriptor without bytes", (stage) => stage.chain({ gpa: DATA, len: 0 }, { gpa: DATA, len: 112 })],
  ["BI-187 without bytes, at no address", (stage) => stage.chain({ gpa: TOP, len: 0 }, { gpa: DATA, len: 112 })],
  ["BI-187 at no address, at the end", (stage) => stage.chain({ gpa: DATA, len: 112 }, { gpa: HOLE, len: 0 })],
  [
    "BI-196 indirect table at an odd address",
    (stage) => stage.table(DATA + 4097n, { gpa: DATA, len: 100 }, { gpa: DATA + 100n, len: 12 }),
  ],
  [
    "BI-197 the table crosses regions of two files",
    (stage) => stage.table(SEAM - 16n, { gpa: DATA, len: 100 }, { gpa: DATA + 100n, len: 12 }),
  ],
  [
    "BI-197 an entry of the table crosses regions",
    (stage) => stage.table(SEAM - 27n, { gpa: DATA, len: 100 }, { gpa: DATA + 100n, len: 12 }),
  ],
  [
    // Only entries that the chain uses are read, so where the rest of the table would lie does not matter.
    "BI-197 a table that leaves RAM behind the last entry in use",
    (stage) => {
      stage.table(RAM_END - 16n, { gpa: DATA, len: 112 });
      stage.ring.describe(0, { gpa: RAM_END - 16n, len: 160, flags: INDIRECT });
    },
  ],
  ["CVE-2018-1059 buffer crosses regions of two files", (stage) => stage.chain({ gpa: SEAM - 50n, len: 112 })],
  [
    "BI-199 WRITE on the INDIRECT descriptor is ignored (2.7.5.3.2)",
    (stage) => {
      stage.table(DATA + 4096n, { gpa: DATA, len: 112 });
      stage.ring.describe(0, { gpa: DATA + 4096n, len: 16, flags: INDIRECT | WRITE });
    },
  ],
  [
    "BI-202 reserved flag bits are ignored",
    (stage) => stage.chain({ gpa: DATA, len: 112, flags: stage.flags | 0xfff8 }),
  ],
];

const crossed = (rows: Row[]) => rows.flatMap((row) => everywhere.map((where) => ({ name: row[0], row, ...where })));

describe("refused: used with length 0, the ring goes on", () => {
  test.each(crossed(refused))("$name ($direction, ring of $size)", ({ row: [, lay, options], direction, size }) => {
    const stage = new Stage({ direction, size }, options);
    lay(stage, size);
    stage.ring.offer(0);
    if (direction === "receive") stage.send();
    const { taken, waiting } = stage.judge.poll();
    expect(stage.ring.used()).toEqual([{ id: 0, len: 0 }]);
    const { malformedBuffers, drops, packets } = stage.rig.counters;
    if (direction === "transmit") {
      expect({ taken, malformed: drops.malformed }).toEqual({ taken: 1, malformed: 1 });
    } else {
      expect({ taken, waiting, malformedBuffers }).toEqual({ taken: 0, waiting: true, malformedBuffers: 1 });
      stage.post();
      expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
      expect(stage.ring.used()).toEqual([{ id: 0, len: 112 }]);
    }
    expect(packets).toBe(0);
    stage.mustDeliver();
  });
});

describe("accepted", () => {
  test.each(crossed(accepted))("$name ($direction, ring of $size)", ({ row: [, lay, options], direction, size }) => {
    const stage = new Stage({ direction, size }, options);
    lay(stage, size);
    if (direction === "receive") stage.send();
    else {
      stage.rig.source.ram.slice(options?.zeroPage ? 0n : DATA, 2).fill(0); // its net header asks for nothing
      for (const at of [SEAM - 50n, RAM_END - 112n]) stage.rig.source.ram.slice(at, 2).fill(0);
      stage.post();
      lay(stage, size);
    }
    stage.ring.offer(0);
    expect(stage.judge.poll()).toMatchObject({ taken: 1, waiting: false });
    expect(stage.ring.used()).toEqual([{ id: 0, len: direction === "transmit" ? 0 : 112 }]);
    expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 100 });
    stage.mustDeliver();
  });
});

describe("the ring itself is broken: it stops, the other one goes on", () => {
  const broken: Row[] = [
    ["BI-172 head = ring size", ({ ring }, size) => ring.offer(size)],
    ["BI-172 head = 0xFFFF", ({ ring }) => ring.offer(0xffff)],
    ["BI-172 all heads invalid", ({ ring }, size) => ring.offer(...Array.from({ length: size }, () => 0xffff))],
    ["BI-174 avail index + ring size + 1", ({ ring }, size) => (ring.availIdx += size + 1)],
    ["BI-174 avail index + 32769", ({ ring }) => (ring.availIdx += 32_769)],
    ["BI-174 avail index - 1", ({ ring }) => (ring.availIdx -= 1)],
  ];
  test.each(crossed(broken))("$name ($direction, ring of $size)", ({ row: [, lay], direction, size }) => {
    const stage = new Stage({ direction, size }, { ring: { base: 100 } });
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

  test.each(SIZES)("what was used before the bad head is published (receive, ring of %i)", (size) => {
    const stage = new Stage({ direction: "receive", size });
    stage.post();
    stage.receiveq.offer(0xffff);
    stage.send();
    stage.transmitq.offer(0);
    expect(stage.judge.poll()).toMatchObject({ taken: 2, brokeDestination: true, callDestination: true });
    expect(stage.receiveq.used()).toEqual([{ id: 0, len: 112 }]);
  });
});

describe("many at once", () => {
  test.each(everywhere)("BI-173 one head offered twice: used twice ($direction, ring of $size)", (where) => {
    const stage = new Stage(where);
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

  test.each(everywhere)(
    "BI-213 malformed chains for ever: every head comes back ($direction, ring of $size)",
    (where) => {
      const stage = new Stage(where);
      stage.ring.describe(0, { gpa: HOLE, len: 1, flags: stage.flags });
      if (where.direction === "receive") stage.send();
      const heads = Array.from({ length: Math.min(where.size, 64) }, () => 0);
      const rounds = runs(500);
      for (let i = 0; i < rounds; i++) {
        stage.ring.offer(...heads);
        stage.rig.poll();
        const used = stage.ring.used();
        if (used.length !== heads.length || used.some(({ id, len }) => id !== 0 || len !== 0))
          expect.fail(`round ${i}`);
      }
      const { drops, malformedBuffers } = stage.rig.counters;
      expect(drops.malformed + malformedBuffers).toBe(rounds * heads.length);
    },
  );

  test.each(everywhere.filter(({ size }) => size >= 256))(
    "BI-214 one bad chain in ten ($direction, ring of $size)",
    (where) => {
      const stage = new Stage(where);
      for (let i = 0; i < 100; i++) {
        const bad = i % 10 === 3;
        stage.transmitq.describe(i, { gpa: DATA + BigInt(128 * i), len: 114 });
        stage.receiveq.describe(i, { gpa: DATA + BigInt(128 * i), len: 128, flags: WRITE });
        if (bad) stage.ring.describe(i, { gpa: HOLE, len: 128, flags: stage.flags });
        stage.rig.source.ram.slice(DATA + BigInt(128 * i), 2).fill(0);
      }
      const heads = Array.from({ length: 100 }, (_, i) => i);
      stage.transmitq.offer(...heads);
      stage.receiveq.offer(...heads);
      stage.judge.poll();
      stage.judge.poll();
      expect(stage.rig.counters.packets).toBe(90);
      expect(stage.ring.used().map(({ id }) => id)).toEqual(heads);
    },
  );

  test("BI-216 IN_ORDER is not offered, yet chains are used in the order they were made available", () => {
    const stage = new Stage({ direction: "transmit", size: 4 });
    for (const head of [0, 1, 2, 3]) stage.transmitq.describe(head, { gpa: HOLE, len: 1 });
    stage.transmitq.offer(3, 0, 2, 1);
    stage.judge.poll();
    expect(stage.transmitq.used().map(({ id }) => id)).toEqual([3, 0, 2, 1]);
  });

  test.each(["transmit", "receive"] as const)("BI-212 1024 descriptors of one byte (%s)", (direction) => {
    const stage = new Stage({ direction, size: 1024 });
    stage.table(DATA + 0x8000n, ...Array.from({ length: 1024 }, (_, i) => ({ gpa: DATA + BigInt(2 * i), len: 1 })));
    if (direction === "receive") stage.send(1012);
    else {
      stage.rig.source.ram.slice(DATA, 4).fill(0);
      stage.post();
    }
    stage.ring.offer(0);
    expect(stage.judge.poll()).toMatchObject({ taken: 1 });
    expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 1012 });
  });

  test.each(["transmit", "receive"] as const)(
    "BI-184 lengths whose sum passes 2^32 to a small one (%s)",
    (direction) => {
      const stage = new Stage({ direction, size: 32_768 });
      const mebibytes = Array.from({ length: 4096 }, () => ({ gpa: DATA, len: 0x10_0000 }));
      stage.chain(...mebibytes, { gpa: DATA, len: 112 });
      if (direction === "receive") stage.send();
      stage.ring.offer(0);
      stage.judge.poll();
      expect(stage.ring.used()).toEqual([{ id: 0, len: 0 }]);
      expect(stage.rig.counters).toMatchObject(
        direction === "receive" ? { malformedBuffers: 1 } : { drops: { badFrame: 1 } },
      );
    },
  );
});
