/**
 * Drivers that break the rules of packed rings: section G of the catalogue of bad inputs, each row by its number. Every
 * poll is compared with the reference, byte for byte.
 *
 * Elsewhere: BI-226, BI-228 and BI-229 where packed rings differ in nothing (hostile.test.ts, header.test.ts), BI-231 and BI-232
 * (notify.test.ts), BI-237 (access.test.ts), a base that the ring belies after a kill (crash.test.ts).
 */
import { describe, expect, test } from "vitest";
import { frameOf } from "./chains.ts";
import { AVAIL, USED, availableAt, usedAt } from "./raw-packed.ts";
import { INDIRECT, NEXT, WRITE } from "./raw-ring.ts";
import { advance } from "./reference-packed.ts";
import { type Row, crossed, mustAccept, mustRefuse } from "./rows.ts";
import { DATA, RAM_END, Stage, everywhere, packed } from "./stage.ts";

const where = "$direction, ring of $size";
const at = "$where.direction, ring of $where.size";

/** A packed ring under attack, and whatever the other side needs to have work. */
function attacked(place: { direction: "transmit" | "receive"; size: number }, base?: number): Stage {
  const stage = new Stage({ ...place, format: "packed", peer: "split" }, base === undefined ? {} : { base });
  if (place.direction === "receive") stage.send();
  else stage.post();
  stage.rig.source.ram.slice(DATA, 2).fill(0);
  return stage;
}

const isBroken = ({ direction }: { direction: string }) =>
  direction === "transmit" ? { brokeSource: true } : { brokeDestination: true };

describe("whose a descriptor is", () => {
  test.each(everywhere("packed"))(`BI-218 AVAIL and USED equal in every slot: no work (${where})`, (place) => {
    for (const flags of [0, AVAIL | USED]) {
      const stage = attacked(place);
      const ring = packed(stage);
      for (let i = 0; i < place.size; i++) ring.put(i, { gpa: DATA, len: 112, id: i, flags: flags | stage.flags });
      const waiting = place.direction === "receive";
      for (let i = 0; i < 2; i++) {
        expect(stage.judge.poll()).toEqual({ ...idle, waiting });
        expect(stage.judge.arm()).toBe(false);
        stage.judge.disarm();
      }
    }
  });

  test.each(everywhere("packed"))(
    `BI-219 available, but in the other lap: no work, wherever the lap began (${where})`,
    (place) => {
      for (const base of [0x8000, 0, 0x8000 | (place.size - 1), place.size - 1]) {
        const stage = attacked(place, base);
        const ring = packed(stage);
        for (let i = 0, position = base; i < place.size; i++, position = advance(position, 1, place.size)) {
          const flags = availableAt(position ^ 0x8000) | stage.flags;
          ring.put(position, { gpa: DATA, len: 112, id: i, flags });
        }
        expect(stage.judge.poll()).toEqual({ ...idle, waiting: place.direction === "receive" });
      }
    },
  );

  test.each(everywhere("packed"))(
    `BI-223 a head that is available before the rest of its chain: broken (${where})`,
    (place) => {
      const stage = attacked(place);
      const ring = packed(stage);
      ring.put(0x8001 % place.size, { gpa: DATA + 50n, len: 62, id: 0, flags: stage.flags });
      ring.put(0x8000, { gpa: DATA, len: 50, id: 0, flags: stage.flags | NEXT | availableAt(0x8000) });
      expect(stage.judge.poll()).toMatchObject(isBroken(place));
      expect(stage.rig.counters).toMatchObject({ packets: 0 });
      expect(stage.judge.poll()).toMatchObject({ brokeSource: false, brokeDestination: false });
    },
  );

  test.each(everywhere("packed"))(
    `BI-222 a chain across the ring's end with the wrong wrap behind it: broken (${where})`,
    (place) => {
      for (const lap of [0x8000, 0]) {
        const last = lap | (place.size - 1);
        const stage = attacked(place, last);
        const ring = packed(stage);
        ring.put(last, { gpa: DATA, len: 50, id: 0, flags: stage.flags | NEXT | availableAt(last) });
        ring.put(0, { gpa: DATA + 50n, len: 62, id: 0, flags: stage.flags | availableAt(last) });
        expect(stage.judge.poll()).toMatchObject(isBroken(place));
        expect(stage.rig.counters).toMatchObject({ packets: 0 });
      }
    },
  );

  test.each(everywhere("packed"))(`BI-222 the same chain with the right wrap is carried (${where})`, (place) => {
    for (const lap of [0x8000, 0]) {
      const stage = attacked(place, lap | (place.size - 1));
      stage.chain({ gpa: DATA, len: 50 }, { gpa: DATA + 50n, len: 62 });
      stage.ring.offer(0);
      expect(stage.judge.poll()).toMatchObject({ taken: 1 });
      expect(stage.rig.counters).toMatchObject({ packets: 1, bytes: 100 });
      expect(stage.ring.used()).toEqual([{ id: 0, len: place.direction === "transmit" ? 0 : 112 }]);
    }
  });

  test.each(everywhere("packed"))(`BI-221 NEXT on every slot: broken, whoever else has work (${where})`, (place) => {
    const stage = attacked(place);
    stage.ring.describe(0, { gpa: DATA, len: 1, flags: stage.flags | NEXT, next: 0 });
    stage.ring.offer(0);
    expect(stage.judge.poll()).toMatchObject(isBroken(place));
    const end = place.direction === "transmit" ? "source" : "destination";
    expect(stage.rig.lane.isBroken(end)).toBe(true);
    expect(stage.ring.used()).toEqual([]);
    if (place.direction === "receive") stage.send(); // the sender is not held up
    expect(stage.judge.poll()).toMatchObject({ brokeSource: false, brokeDestination: false, waiting: false });
    expect(stage.rig.counters.drops.noReceiver).toBe(place.direction === "receive" ? 2 : 0);
  });
});

const idle = {
  taken: 0,
  callSource: false,
  callDestination: false,
  brokeSource: false,
  brokeDestination: false,
  waiting: false,
};

describe("ids", () => {
  test.each(everywhere("packed"))(`BI-224 an id is echoed, whatever it is and how often (${where})`, (place) => {
    for (const id of [0, place.size - 1, place.size, 0x7fff, 0x8000, 0xffff]) {
      const stage = attacked(place);
      stage.ring.describe(0, { gpa: DATA, len: 112, flags: stage.flags });
      packed(stage).offerAs(id, 0);
      packed(stage).offerAs(id, 0);
      if (place.direction === "receive") stage.transmitq.offer(0);
      else stage.receiveq.offer(0);
      expect(stage.judge.poll()).toMatchObject({ taken: 2 });
      const len = place.direction === "transmit" ? 0 : 112;
      expect(stage.ring.used()).toEqual([
        { id, len },
        { id, len },
      ]);
    }
  });

  test.each(everywhere("packed"))(
    `the id of a chain is that of its last descriptor, of a refused one too (${where})`,
    (place) => {
      const stage = attacked(place);
      stage.chain({ gpa: DATA, len: 50 }, { gpa: DATA + 50n, len: 62, flags: stage.flags ^ WRITE });
      packed(stage).offerAs(77, 0);
      stage.judge.poll();
      expect(stage.ring.used()).toEqual([{ id: 77, len: 0 }]);
      stage.mustDeliver();
    },
  );
});

describe("indirect tables", () => {
  const refused: Row[] = [
    [
      "BI-226 a later descriptor of a chain is INDIRECT",
      (stage) => {
        stage.chain({ gpa: DATA, len: 50 }, { gpa: DATA + 4096n, len: 16, flags: INDIRECT });
        stage.ring.write(DATA + 4096n, { gpa: DATA, len: 62, flags: stage.flags });
      },
    ],
    [
      // Every entry of a packed ring's table is used: there is no NEXT to end it sooner.
      "BI-226 a table that leaves RAM behind the last entry that a split ring would read",
      (stage) => {
        stage.table(RAM_END - 16n, { gpa: DATA, len: 112 });
        stage.ring.describe(0, { gpa: RAM_END - 16n, len: 32, flags: INDIRECT });
      },
    ],
    [
      "BI-239 a table in the layout of split rings: its flags are where ids are, its links where flags are",
      (stage) => {
        stage.table(DATA + 4096n, { gpa: DATA, len: 56 }, { gpa: DATA, len: 56 });
        // flags at 12, next at 14: where packed rings have id and flags
        for (const [i, next] of [WRITE, 0].entries()) {
          const at = DATA + 4096n + 16n * BigInt(i);
          stage.ring.write(at, { gpa: DATA, len: 56, next: stage.flags | NEXT, flags: next });
        }
      },
    ],
  ];
  test.each(crossed(refused, "packed"))(`refused: $name (${at})`, mustRefuse);

  const accepted: Row[] = [0x8080, 0x80, 0x8000, NEXT, NEXT | 0x8080, 0x7f78].map((bits): Row => [
    `BI-227 flags 0x${bits.toString(16)} in the entries of a table mean nothing`,
    (stage) => {
      stage.table(DATA + 4096n, { gpa: DATA, len: 50 }, { gpa: DATA + 50n, len: 62 });
      for (const [i, [gpa, len]] of (
        [
          [DATA, 50],
          [DATA + 50n, 62],
        ] as const
      ).entries()) {
        stage.ring.write(DATA + 4096n + 16n * BigInt(i), { gpa, len, flags: stage.flags | bits, next: 0xffff });
      }
    },
  ]);
  test.each(crossed(accepted, "packed"))(`accepted: $name (${at})`, mustAccept);
});

describe("sizes", () => {
  test.each(["transmit", "receive"] as const)(
    "BI-233 a ring of one descriptor, direct and indirect, lap after lap (%s)",
    (direction) => {
      for (const isTable of [false, true]) {
        const stage = attacked({ direction, size: 1 });
        for (let lap = 0; lap < 5; lap++) {
          if (isTable) stage.table(DATA + 4096n, { gpa: DATA, len: 112 });
          else stage.chain({ gpa: DATA, len: 112 });
          stage.ring.offer(0);
          expect(stage.judge.poll()).toMatchObject({ taken: 1 });
          expect(stage.ring.used()).toEqual([{ id: 0, len: direction === "transmit" ? 0 : 112 }]);
          if (direction === "receive") stage.send();
          else stage.post();
        }
        expect(stage.rig.counters.packets).toBe(5);
      }
    },
  );

  test.each([3, 5, 7, 300])(
    "BI-234, BI-242 a ring of %i, three laps of chains of 1, 2 and 3 descriptors: exact lengths",
    (size) => {
      for (const direction of ["transmit", "receive"] as const) {
        const stage = attacked({ direction, size });
        for (let slots = 0, i = 0; slots < 3 * size; i++) {
          const parts = 1 + (i % Math.min(3, size));
          const lens = [10, 20].slice(0, parts - 1);
          lens.push(112 - lens.reduce((sum, len) => sum + len, 0));
          stage.chain(...lens.map((len, part) => ({ gpa: DATA + BigInt(256 * part), len })));
          packed(stage).offerAs(i, 0);
          slots += parts;
          expect(stage.judge.poll()).toMatchObject({ taken: 1 });
          expect(stage.ring.used()).toEqual([{ id: i, len: direction === "transmit" ? 0 : 112 }]);
          if (direction === "receive") stage.send();
          else stage.post();
        }
      }
    },
  );
});

describe("batches", () => {
  test.each([0, 1, 2, 3])("BI-236 four descriptors at once, number %i is bad: it alone comes back empty", (bad) => {
    for (const [what, broken] of [
      ["length", { gpa: DATA, len: 0xffff_ffff }],
      ["address", { gpa: 0x8000_0000n, len: 112 }],
    ] as const) {
      for (const direction of ["transmit", "receive"] as const) {
        const stage = attacked({ direction, size: 4 });
        const frames = [0, 1, 2, 3].map((i) => frameOf(i, 100));
        for (const i of [0, 1, 2, 3]) {
          const gpa = DATA + BigInt(256 * i);
          stage.transmitq.describe(i, { gpa, len: 112 });
          stage.receiveq.describe(i, { gpa, len: 112, flags: WRITE });
          if (i === bad) stage.ring.describe(i, { ...broken, flags: stage.flags });
          stage.rig.source.ram.slice(gpa, 112).set(Buffer.concat([new Uint8Array(12), frames[i]!]));
        }
        stage.transmitq.offer(...(direction === "transmit" ? [0, 1, 2, 3] : [0, 1, 2]));
        stage.receiveq.offer(...(direction === "transmit" ? [0, 1, 2] : [0, 1, 2, 3]));
        stage.judge.poll();
        const used = stage.ring.used();
        expect([what, used.map(({ id }) => id)]).toEqual([what, [0, 1, 2, 3]]);
        if (direction === "receive") expect(used.map(({ len }) => len > 0)).toEqual([0, 1, 2, 3].map((i) => i !== bad));
        expect(stage.rig.counters.packets).toBe(3);
      }
    }
  });

  test.each([0, 1, 2, 3])("BI-236 a frame that needs four buffers, number %i is bad: none of it is seen", (bad) => {
    const stage = attacked({ direction: "receive", size: 8 });
    for (const i of [0, 1, 2, 3]) stage.receiveq.describe(i, { gpa: DATA + BigInt(256 * i), len: 30, flags: WRITE });
    stage.receiveq.describe(bad, { gpa: 0x8000_0000n, len: 30, flags: WRITE });
    stage.receiveq.offer(0, 1, 2, 3);
    expect(stage.judge.poll()).toMatchObject({ taken: 0, waiting: true });
    const returned = Array.from({ length: bad + 1 }, (_, id) => ({ id, len: 0 }));
    expect(stage.receiveq.used()).toEqual(returned);
  });
});

describe("BI-238 the header", () => {
  // A packed ring needs VIRTIO_F_VERSION_1, with or without it the session says how long the header is; 12 without mergeable buffers.
  test.each(["transmit", "receive"] as const)("has 12 bytes without mergeable buffers, too (%s)", (direction) => {
    const stage = new Stage({ direction, format: "packed", size: 4 }, { ring: { mergeable: false, headerBytes: 12 } });
    stage.mustDeliver();
    expect(stage.receiveq.used()).toEqual([{ id: 0, len: 112 }]);
  });
});

describe("BI-241 started where the driver is not", () => {
  test.each(["transmit", "receive"] as const)("no descriptor is used twice, wherever it starts (%s)", (direction) => {
    const size = 4;
    for (let at = 0; at < 2 * size; at++) {
      const base = at < size ? 0x8000 | at : at - size;
      const stage = attacked({ direction, size }, base);
      const ring = packed(stage);
      // the driver has offered three chains from the ring's first place on
      for (let i = 0; i < 4; i++) {
        const flags = i < 3 ? availableAt(0x8000) : usedAt(0);
        ring.put(i, { gpa: DATA + BigInt(256 * i), len: 112, id: 10 + i, flags: flags | stage.flags });
      }
      if (direction === "receive") stage.transmitq.offer(0, 0, 0);
      else stage.receiveq.offer(0, 0, 0);
      const completions = new Map<number, number>();
      for (let poll = 0; poll < 4; poll++) {
        const before = [0, 1, 2, 3].map((i) => ring.slot(i).flags);
        stage.judge.poll();
        for (const i of [0, 1, 2, 3]) {
          if (ring.slot(i).flags !== before[i]) completions.set(i, (completions.get(i) ?? 0) + 1);
        }
      }
      expect([...completions.values()].every((count) => count === 1)).toBe(true);
      // it begins where it was told to, and there is nothing to do there in the wrong lap
      expect(completions.size).toBe(base >= 0x8000 && at < 3 ? 3 - at : 0);
    }
  });
});
