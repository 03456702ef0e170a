/**
 * Drivers that break the rules of chains: section F of the catalogue of bad inputs, each row by its number, for split and
 * packed rings; and of section G where it says the same of packed ones. Every poll is compared with the reference, byte for byte, so a test only adds what its row promises. In
 * both directions: a bad transmit chain is dropped, a bad receive chain is skipped, both come back used with length 0,
 * and the next good chain works.
 *
 * What only one format can get wrong is in hostile-split.test.ts and packed.test.ts. Rows 206 to 208 need memory that
 * changes between two reads (toctou.test.ts), 211 the built code (build.test.ts), 203 and 204 are in notify.test.ts,
 * 201 in header.test.ts, 217 in exhaustive.test.ts.
 */
import { describe, expect, test } from "vitest";
import { frameOf } from "./chains.ts";
import { INDIRECT, NEXT, WRITE } from "./raw-ring.ts";
import { HOLE, type Row, TOP, crossed, mustAccept, mustRefuse } from "./rows.ts";
import { runs } from "./runs.ts";
import { DATA, RAM_END, SEAM, Stage, everywhere } from "./stage.ts";

/** Chains at head 0 that must be refused whole. */
const refused: Row[] = [
  [
    "BI-169, BI-226 one descriptor more than the ring has",
    (stage, size) => stage.table(DATA, ...Array.from({ length: size + 1 }, () => ({ gpa: DATA, len: 1 }))),
  ],
  ["BI-177, BI-228 address 0, not mapped", (stage) => stage.chain({ gpa: 0n, len: 2048 })],
  ["BI-178, BI-229 address beyond RAM", (stage) => stage.chain({ gpa: RAM_END, len: 64 })],
  ["BI-178, BI-229 far beyond RAM", (stage) => stage.chain({ gpa: 1n << 52n, len: 64 })],
  ["BI-179, BI-229 address in a hole", (stage) => stage.chain({ gpa: HOLE, len: 64 })],
  [
    "BI-179, BI-229 buffer runs into a hole",
    (stage) => stage.chain({ gpa: DATA, len: 64 }, { gpa: RAM_END - 32n, len: 64 }),
  ],
  [
    "BI-181, BI-229 buffer crosses the end of RAM by one byte",
    (stage) => stage.chain({ gpa: RAM_END - 100n, len: 101 }),
  ],
  ["BI-182, BI-228 address + length wraps 64 bits", (stage) => stage.chain({ gpa: TOP - 31n, len: 64 })],
  ["BI-182, BI-228 the last address of all", (stage) => stage.chain({ gpa: TOP, len: 1 })],
  ["BI-183, BI-228 length 0xFFFFFFFF", (stage) => stage.chain({ gpa: DATA, len: 0xffff_ffff })],
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
    "BI-191, BI-226 indirect without the feature",
    (stage) => stage.table(DATA, { gpa: DATA, len: 64 }),
    { ring: { indirect: false } },
  ],
  [
    "BI-192, BI-226 indirect in an indirect table",
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
    `BI-194, BI-226 indirect length ${len}`,
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
  ["BI-177, BI-228 address 0, mapped", (stage) => stage.chain({ gpa: 0n, len: 112 }), { zeroPage: true }],
  ["BI-181, BI-229 buffer ends where RAM ends", (stage) => stage.chain({ gpa: RAM_END - 112n, len: 112 })],
  ["BI-186, BI-228 a descriptor without bytes", (stage) => stage.chain({ gpa: DATA, len: 0 }, { gpa: DATA, len: 112 })],
  [
    "BI-187, BI-228 without bytes, at no address",
    (stage) => stage.chain({ gpa: TOP, len: 0 }, { gpa: DATA, len: 112 }),
  ],
  ["BI-187, BI-228 at no address, at the end", (stage) => stage.chain({ gpa: DATA, len: 112 }, { gpa: HOLE, len: 0 })],
  [
    "BI-196, BI-226 indirect table at an odd address",
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

describe("refused: used with length 0, the ring goes on", () => {
  test.each(crossed(refused, "split", "packed"))(
    "$name ($where.direction, $where.format ring of $where.size)",
    mustRefuse,
  );
});

describe("accepted", () => {
  test.each(crossed(accepted, "split", "packed"))(
    "$name ($where.direction, $where.format ring of $where.size)",
    mustAccept,
  );
});

describe("many at once", () => {
  const where = "$direction, $format ring of $size";

  test.each(everywhere("split", "packed"))(
    `BI-213 malformed chains for ever: every one comes back (${where})`,
    (at) => {
      const stage = new Stage(at);
      stage.ring.describe(0, { gpa: HOLE, len: 1, flags: stage.flags });
      if (at.direction === "receive") stage.send();
      const heads = Array.from({ length: Math.min(at.size, 64) }, () => 0);
      // a million for one ring of each format
      const isLong =
        (at.size === 256 && at.direction === "transmit") || (at.size === 300 && at.direction === "receive");
      const rounds = isLong ? runs(1_000_000 / heads.length) : runs(100);
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

  test.each(everywhere("split", "packed").filter(({ size }) => size >= 256))(
    `BI-214 one bad chain in ten: the good ones arrive in order (${where})`,
    (at) => {
      const stage = new Stage(at);
      const frames: Uint8Array[] = [];
      for (let i = 0; i < 100; i++) {
        const gpa = DATA + BigInt(128 * i);
        const isBad = i % 10 === 3;
        stage.transmitq.describe(i, { gpa, len: 114 });
        stage.receiveq.describe(i, { gpa, len: 128, flags: WRITE });
        if (isBad) stage.ring.describe(i, { gpa: HOLE, len: 128, flags: stage.flags });
        const frame = frameOf(i, 102);
        stage.rig.source.ram.slice(gpa, 114).set(Buffer.concat([new Uint8Array(12), frame]));
        if (!isBad || at.direction === "receive") frames.push(frame);
      }
      const heads = Array.from({ length: 100 }, (_, i) => i);
      stage.transmitq.offer(...heads);
      stage.receiveq.offer(...heads);
      stage.judge.poll();
      stage.judge.poll();
      expect(stage.rig.counters.packets).toBe(90);
      expect(stage.ring.used().map(({ id }) => id)).toEqual(heads);
      expect(stage.judge.reference.frames.map((frame) => Buffer.from(frame))).toEqual(
        frames.slice(0, 90).map((frame) => Buffer.from(frame)),
      );
    },
  );

  test.each(["split", "packed"] as const)(
    "BI-216 chains are used in the order in which they were made available, whatever their ids (%s)",
    (format) => {
      for (const direction of ["transmit", "receive"] as const) {
        const stage = new Stage({ direction, format, size: 4 });
        for (const head of [0, 1, 2, 3]) stage.ring.describe(head, { gpa: HOLE, len: 1 });
        if (direction === "receive") stage.send();
        stage.ring.offer(3, 0, 2, 1);
        stage.judge.poll();
        expect(stage.ring.used().map(({ id }) => id)).toEqual([3, 0, 2, 1]);
      }
    },
  );

  const both = (["split", "packed"] as const).flatMap((format) => [
    { direction: "transmit", format } as const,
    { direction: "receive", format } as const,
  ]);
  test.each(both)("BI-212 1024 descriptors of one byte ($direction, $format)", ({ direction, format }) => {
    for (const isTable of [false, true]) {
      const stage = new Stage({ direction, format, size: 1024 });
      const ones = Array.from({ length: 1024 }, (_, i) => ({ gpa: DATA + BigInt(2 * i), len: 1 }));
      if (isTable) stage.table(DATA + 0x8000n, ...ones);
      if (direction === "receive") stage.send(1012);
      else {
        stage.rig.source.ram.slice(DATA, 4).fill(0);
        stage.post();
      }
      if (!isTable) stage.chain(...ones);
      stage.ring.offer(0);
      expect(stage.judge.poll()).toMatchObject({ taken: 1 });
      expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 1012 });
    }
  });

  test.each(both)("BI-184, BI-228 lengths whose sum passes 2^32 to a small one ($direction, $format)", (at) => {
    const stage = new Stage({ ...at, size: 32_768 });
    const mebibytes = Array.from({ length: 4096 }, () => ({ gpa: DATA, len: 0x10_0000 }));
    stage.chain(...mebibytes, { gpa: DATA, len: 112 });
    if (at.direction === "receive") stage.send();
    stage.ring.offer(0);
    stage.judge.poll();
    expect(stage.ring.used()).toEqual([{ id: 0, len: 0 }]);
    expect(stage.rig.counters).toMatchObject(
      at.direction === "receive" ? { malformedBuffers: 1 } : { drops: { badFrame: 1 } },
    );
  });
});
