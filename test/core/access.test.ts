/**
 * How the core goes to guest memory when nothing changes meanwhile: each word once, in the order the memory model of the
 * virtqueues asks for, shared words atomically and only those. Seen by the hooked core.
 */
import { describe, expect, test } from "vitest";
import { busyStage, offerAll } from "./busy.ts";
import type { Access } from "./hooked-core.ts";
import type { Ring } from "./rig.ts";
import { type Format, GOOD, Stage } from "./stage.ts";

const cases = (["split", "packed"] as const).flatMap((format) => [
  { format, eventIdx: true },
  { format, eventIdx: false },
]);
const SIZE = 4;

/** Everything seen while a lane does work of all kinds: no buffers, some, then enough. */
function trace(format: Format, eventIdx: boolean): { stage: Stage; seen: Access[] } {
  const seen: Access[] = [];
  const stage = busyStage(SIZE, format, { observe: (access) => seen.push(access), ring: { eventIdx } });
  for (let i = 0; i < 3; i++) {
    stage.rig.poll();
    stage.rig.core.arm(0);
    stage.rig.core.disarm();
    offerAll(stage);
  }
  expect(stage.rig.counters.packets).toBeGreaterThan(0);
  return { stage, seen };
}

/** Where a slot's field lies, if the address is in the descriptor ring. */
function slotField({ desc, size }: Ring, gpa: bigint): bigint | undefined {
  return gpa >= desc && gpa < desc + BigInt(16 * size) ? (gpa - desc) % 16n : undefined;
}

/** Whether a load decides about a chain: of an index or event no, of a packed slot if the slot is available. */
function isUse(access: Access, seen: Access[], ring: Ring): boolean {
  const { kind, atomic, end, gpa } = access;
  if (!atomic || !ring.packed || slotField(ring, gpa) !== 8n) return kind === "load" && !atomic;
  const next = seen.slice(seen.indexOf(access) + 1).find((each) => each.kind === "load" && each.end === end);
  return next?.gpa === gpa - 8n;
}

/** Whether an access must be atomic. */
function isShared(ring: Ring, { gpa, bytes, kind }: Access): boolean {
  const { packed, avail, used, size, desc } = ring;
  if (packed) {
    // length, id and flags are one load, or the flags are looked at alone
    if (slotField(ring, gpa) !== undefined && kind === "load") return bytes === 2 || (gpa - desc) % 16n === 8n;
    return [avail, avail + 2n, used, used + 2n].includes(gpa);
  }
  const words = [avail, avail + 2n, avail + 4n + 2n * BigInt(size), used, used + 2n, used + 4n + 8n * BigInt(size)];
  return words.includes(gpa);
}

describe.each(cases)("$format, event index $eventIdx", ({ format, eventIdx }) => {
  test("indexes, flags and event words are accessed atomically, and nothing else is", () => {
    const { stage, seen } = trace(format, eventIdx);
    expect(seen.filter(({ atomic }) => atomic).length).toBeGreaterThan(10);
    for (const access of seen) {
      const { ring } = stage.rig[access.end];
      const { kind, gpa, bytes, atomic } = access;
      // the used descriptor that publishes a batch is atomic, those of the rest are not: see below
      if (ring.packed && kind === "store" && bytes === 8 && slotField(ring, gpa) === 8n) continue;
      expect({ kind, gpa, bytes, atomic }).toEqual({ kind, gpa, bytes, atomic: isShared(ring, access) });
      if (atomic && bytes !== 2)
        expect({ kind, bytes, field: slotField(ring, gpa) }).toEqual({ kind: "load", bytes: 8, field: 8n });
    }
  });

  test("each descriptor word, avail entry and header byte is loaded once per use", () => {
    const seen: Access[] = [];
    const stage = busyStage(SIZE, format, { observe: (access) => seen.push(access), ring: { eventIdx } });
    stage.rig.poll();
    expect(stage.rig.counters.packets).toBeGreaterThan(0);
    const loads = seen.filter((access) => isUse(access, seen, stage.rig[access.end].ring));
    const bytes = loads.flatMap(({ end, gpa, bytes }) =>
      Array.from({ length: bytes }, (_, i) => `${end} ${gpa + BigInt(i)}`),
    );
    expect(bytes.length).toBeGreaterThan(200);
    expect(bytes.filter((each, i) => bytes.indexOf(each) !== i)).toEqual([]);
  });

  test("after asking for kicks it is looked again whether there is a chain", () => {
    const seen: Access[] = [];
    const stage = new Stage(
      { direction: "receive", format, size: SIZE },
      { variant: "hooked", observe: (a) => seen.push(a), ring: { eventIdx } },
    );
    const order = () =>
      seen
        .splice(0)
        .filter(({ atomic }) => atomic)
        .map(({ kind, end, gpa }) => [kind, end, gpa]);
    /** The wish for a kick at the chain number `index`, then the look. */
    const handshake = (end: "source" | "destination", index: number) => {
      const { avail, used, desc } = stage.rig[end].ring;
      if (format === "split") {
        return [
          ["store", end, eventIdx ? used + 4n + 8n * BigInt(SIZE) : used],
          ["load", end, avail + 2n],
        ];
      }
      const wish = [
        ["store", end, used],
        ["store", end, used + 2n],
      ];
      // the offset before the flags that make it count
      return [...(eventIdx ? wish : wish.slice(1)), ["load", end, desc + 16n * BigInt(index) + 14n]];
    };
    stage.mustDeliver();
    seen.length = 0;
    expect(stage.rig.core.arm(0)).toBe(0);
    expect(order()).toEqual(handshake("source", 1));
    stage.send();
    expect(stage.rig.core.arm(0)).toBe(1);
    stage.rig.poll();
    seen.length = 0;
    expect(stage.rig.core.arm(0)).toBe(0); // it waits for buffers: it is the receiver's kick that counts
    expect(order()).toEqual(handshake("destination", 1));
    stage.post();
    expect(stage.rig.core.arm(0)).toBe(1);
  });
});

describe("split", () => {
  test.each([true, false])(
    "entries before the used index, the used index before the suppression word (event index %s)",
    (eventIdx) => {
      const { stage, seen } = trace("split", eventIdx);
      for (const end of ["source", "destination"] as const) {
        const { avail, used } = stage.rig[end].ring;
        const suppression = eventIdx ? avail + 4n + 2n * BigInt(SIZE) : avail;
        const mine = seen.filter((access) => access.end === end);
        let unpublished = 0;
        let undecided = false;
        let published = 0;
        for (const { kind, gpa, atomic } of mine) {
          if (kind === "store" && gpa >= used + 4n && gpa < used + 4n + 8n * BigInt(SIZE)) unpublished++;
          if (kind === "store" && atomic && gpa === used + 2n) {
            if (unpublished > 0) published++;
            unpublished = 0;
            undecided = true;
          }
          if (kind !== "load" || gpa !== suppression) continue;
          expect(unpublished).toBe(0);
          undecided = false;
        }
        expect({ unpublished, undecided, published: published > 0 }).toEqual({
          unpublished: 0,
          undecided: false,
          published: true,
        });
      }
    },
  );

  test("net header and payload are written before the used entry that announces them, the index last", () => {
    const { used, writes } = oneFrame("split");
    expect(writes).toEqual([
      ["store", used, 2], // just started: no kicks, please
      ["store", GOOD, 8],
      ["store", GOOD + 8n, 4],
      ["copy", GOOD + 12n, 100],
      ["store", used + 4n, 8],
      ["store", used + 2n, 2],
    ]);
  });

  test("2.7.13.3.1 the avail index is loaded before the entries it covers", () => {
    const { stage, seen } = trace("split", true);
    for (const end of ["source", "destination"] as const) {
      const { avail } = stage.rig[end].ring;
      const first = (match: (gpa: bigint) => boolean) => seen.findIndex((a) => a.end === end && match(a.gpa));
      const index = first((gpa) => gpa === avail + 2n);
      expect(index).toBeGreaterThanOrEqual(0);
      expect(index).toBeLessThan(first((gpa) => gpa >= avail + 4n && gpa < avail + 12n));
    }
  });
});

describe("packed", () => {
  test("BI-237 net header and payload are written before length, id and flags, which are one store", () => {
    const { used, desc, writes } = oneFrame("packed");
    expect(writes).toEqual([
      ["store", used + 2n, 2], // just started: no kicks, please
      ["store", GOOD, 8],
      ["store", GOOD + 8n, 4],
      ["copy", GOOD + 12n, 100],
      ["store", desc + 8n, 8],
    ]);
  });

  test.each([true, false])(
    "BI-237 the first descriptor of each batch is stored last, atomically, before the driver's event is read (event index %s)",
    (eventIdx) => {
      const { stage, seen } = trace("packed", eventIdx);
      for (const end of ["source", "destination"] as const) {
        const { ring } = stage.rig[end];
        const unpublished = new Set<bigint>();
        let next = 0;
        let published = 0;
        for (const { kind, gpa, atomic, bytes } of seen.filter((access) => access.end === end)) {
          const field = slotField(ring, gpa);
          if (kind === "store" && field !== undefined) {
            const slot = (gpa - ring.desc) / 16n;
            if (!atomic) unpublished.add(slot);
            else {
              expect([slot, field, bytes]).toEqual([BigInt(next), 8n, 8]);
              expect(unpublished.has(slot)).toBe(false);
              next = (next + 1 + unpublished.size) % SIZE;
              unpublished.clear();
              published++;
            }
          }
          if (kind === "load" && gpa >= ring.avail && gpa < ring.avail + 4n) expect(unpublished.size).toBe(0);
        }
        expect({ left: unpublished.size, published: published > 0 }).toEqual({ left: 0, published: true });
      }
    },
  );

  test("2.8.21 length, id and flags are loaded at once, before the address", () => {
    const { stage, seen } = trace("packed", true);
    for (const end of ["source", "destination"] as const) {
      const { ring } = stage.rig[end];
      const loads = seen.filter((a) => a.end === end && a.kind === "load" && slotField(ring, a.gpa) !== undefined);
      const addresses = loads.filter(({ gpa }) => slotField(ring, gpa) === 0n);
      expect(addresses.length).toBeGreaterThan(5);
      for (const address of addresses) {
        const before = loads[loads.indexOf(address) - 1]!;
        expect([before.gpa, before.bytes, before.atomic]).toEqual([address.gpa + 8n, 8, true]);
      }
    }
  });
});

/** All that is written to the destination when the first frame ever is carried. */
function oneFrame(format: Format) {
  const seen: Access[] = [];
  const stage = new Stage(
    { direction: "receive", format, size: 4 },
    { variant: "hooked", observe: (a) => seen.push(a) },
  );
  stage.mustDeliver();
  const writes = seen.filter(({ end, kind }) => end === "destination" && kind !== "load");
  const { used, desc } = stage.receiveq.ring;
  return { used, desc, writes: writes.map(({ kind, gpa, bytes }) => [kind, gpa, bytes]) };
}
