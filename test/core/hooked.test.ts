/**
 * The hooked core: a hook sees every access to guest memory and may change that memory before it.
 *
 * Whatever changes between two reads, the core stays inside the guests' RAM, ends, and never throws (BI-206, BI-207,
 * BI-208, BI-258). And how it reads and writes when nothing changes: each word once, in the order the virtqueue's
 * memory model asks for, shared words atomically and only those.
 */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { Access } from "./hooked-core.ts";
import { INDIRECT, NEXT, WRITE } from "./raw-ring.ts";
import type { Ring } from "./rig.ts";
import { runs } from "./runs.ts";
import { DATA, GOOD, RAM_END, SEAM, Stage } from "./stage.ts";

/** A lane with work of all kinds: direct and indirect chains, spread headers, a frame that is merged. */
function busyStage(size: number, observe: (access: Access) => void, ring: Partial<Ring> = {}): Stage {
  const stage = new Stage({ direction: "transmit", size }, { variant: "hooked", observe, ring });
  const { transmitq, receiveq } = stage;
  for (const [raw, flags] of [
    [transmitq, 0],
    [receiveq, WRITE],
  ] as const) {
    // a table that crosses files, with three buffers, one across files
    raw.write(SEAM - 20n, { gpa: DATA, len: 5, flags: flags | NEXT, next: 2 });
    raw.write(SEAM + 12n, { gpa: SEAM - 100n, len: 200, flags });
    raw.describe(0, { gpa: SEAM - 20n, len: 48, flags: INDIRECT });
    raw.describe(1, { gpa: DATA + 256n, len: 1, flags: flags | NEXT, next: 2 % size });
    if (size > 2) raw.describe(2, { gpa: DATA + 1024n, len: flags ? 64 : 300, flags });
    if (size > 2) raw.describe(3, { gpa: DATA + 4096n, len: flags ? 100 : 64, flags });
  }
  stage.rig.source.ram.slice(DATA, 8192).fill(0);
  offer(stage, size);
  return stage;
}

function offer({ transmitq, receiveq }: Stage, size: number): void {
  const heads = size > 2 ? [0, 1, 3] : [0, 0];
  transmitq.offer(...heads);
  receiveq.offer(...heads);
}

describe("memory that changes between two reads", () => {
  /** A value that means something at some place: an index, a flag, an address at an edge. */
  const word = fc.oneof(
    fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }),
    fc.constantFrom(0n, 1n, 2n, 3n, 4n, 5n, 0xffffn, 0x8000n, DATA, SEAM - 7n, RAM_END - 1n, 0xffff_ffffn),
    fc.tuple(fc.constantFrom(0n, 1n, 16n, 48n, 0xffff_ffffn), fc.nat(7), fc.nat(3)).map(([len, flags, next]) => {
      return len | (BigInt(flags) << 32n) | (BigInt(next) << 48n);
    }),
  );
  /** How far behind the word that is about to be read the change lies. */
  const change = fc.record({
    at: fc.nat(400),
    far: fc.oneof(fc.constantFrom(-16, -8, -4, -2, 0, 2, 4, 8, 16, 24), fc.integer({ min: -2000, max: 2000 })),
    bytes: fc.constantFrom(2, 2, 8),
    word,
  });

  test.each([2, 4, 256])(
    "no stray access, no hang, no exception, no length above what was written (ring of %i)",
    (size) => {
      const features = fc.record({ indirect: fc.boolean(), mergeable: fc.boolean(), eventIdx: fc.boolean() });
      fc.assert(
        fc.property(
          fc.array(change, { minLength: 1, maxLength: 200 }),
          features,
          fc.boolean(),
          (changes, ring, stuck) => {
            const pending = new Map(changes.map((each) => [each.at, each]));
            let count = 0;
            const written = { now: 0, before: 0 };
            const stage: Stage = busyStage(
              size,
              (access) => {
                count++;
                if (access.kind === "copy" || (access.end === "destination" && access.kind === "store")) {
                  const used = stage.receiveq.ring.used + 4n;
                  const isEntry = access.gpa >= used && access.gpa < used + 8n * BigInt(size);
                  if (access.atomic) return;
                  if (!isEntry || access.bytes !== 8) written.now += access.bytes;
                  else written.before += Number(access.value! >> 32n);
                }
                const found = pending.get(count);
                if (!found || access.kind !== "load") return;
                const ram = stage.rig[access.end].ram;
                const at = ram.at(access.gpa) + found.far;
                const bytes = Buffer.alloc(8);
                bytes.writeBigUInt64LE(found.word);
                if (at >= 0 && at + 8 < ram.bytes.length) ram.bytes.set(bytes.subarray(0, found.bytes), at);
              },
              ring,
            );
            for (let poll = 0; poll < 4; poll++) {
              const before = count;
              stage.rig.poll(64, stuck);
              stage.rig.core.arm(stuck ? 1 : 0);
              stage.rig.core.disarm();
              // work.test.ts has the limit for long chains; below it, a frame costs at most its own walk and one of each
              // receive chain, a descriptor at most 16 loads of a byte
              expect(count - before).toBeLessThan(64 * (size + 2) * (17 * size + 50));
              offer(stage, size);
            }
            expect(written.before).toBeLessThanOrEqual(written.now);
          },
        ),
        { numRuns: runs(150) },
      );
    },
  );

  test("the avail index runs backwards while buffers for one frame are collected: the ring breaks", () => {
    const size = 32_768;
    let reads = 0;
    const stage: Stage = new Stage(
      { direction: "receive", size },
      {
        variant: "hooked",
        observe: ({ atomic, kind, gpa, end }) => {
          const isAvailIndex =
            end === "destination" && atomic && kind === "load" && gpa === stage.receiveq.ring.avail + 2n;
          if (isAvailIndex && ++reads === 2) stage.receiveq.availIdx -= 1;
        },
      },
    );
    for (let i = 0; i < size; i++) stage.receiveq.describe(i, { gpa: DATA, len: 1, flags: WRITE });
    stage.receiveq.offer(...Array(size / 2).keys());
    stage.send(40_000);
    expect(stage.rig.poll()).toMatchObject({ taken: 1, brokeDestination: true });
    expect(reads).toBe(2);
  });

  test("BI-258 the header is checked and never read again", () => {
    const seen: Access[] = [];
    const stage = new Stage(
      { direction: "transmit", size: 4 },
      { variant: "hooked", observe: (access) => seen.push(access) },
    );
    stage.mustDeliver();
    const header = stage.transmitq.ring.headerBytes;
    const payload = seen.filter(({ kind, end, gpa }) => kind === "load" && end === "source" && gpa >= DATA);
    expect(payload.map(({ bytes }) => bytes)).toEqual([2]);
    const copies = seen.filter(({ kind }) => kind === "copy");
    expect(copies.map(({ from, bytes }) => [from! - payload[0]!.gpa, bytes])).toEqual([[BigInt(header), 100]]);
  });
});

describe("how the core goes to guest memory", () => {
  type Trace = { stage: Stage; seen: Access[]; size: number };

  /** Everything seen while a lane does work of all kinds: no buffers, some, then enough. */
  function trace(eventIdx: boolean): Trace {
    const seen: Access[] = [];
    const size = 4;
    const stage = busyStage(size, (access) => seen.push(access), { eventIdx });
    seen.length = 0;
    for (let i = 0; i < 3; i++) {
      stage.rig.poll();
      stage.rig.core.arm(0);
      stage.rig.core.disarm();
      offer(stage, size);
    }
    return { stage, seen, size };
  }

  const sharedWords = ({ avail, used, size }: Ring) => [
    avail,
    avail + 2n,
    avail + 4n + 2n * BigInt(size),
    used,
    used + 2n,
    used + 4n + 8n * BigInt(size),
  ];

  test.each([true, false])(
    "indexes, flags and event words are accessed atomically, and nothing else is (event index %s)",
    (eventIdx) => {
      const { stage, seen } = trace(eventIdx);
      const words = sharedWords(stage.transmitq.ring);
      expect(seen.filter(({ atomic }) => atomic).length).toBeGreaterThan(10);
      for (const { atomic, gpa, bytes } of seen)
        expect([gpa, words.includes(gpa)]).toEqual([gpa, atomic && bytes === 2]);
    },
  );

  test.each([true, false])(
    "each descriptor word, avail entry and header byte is loaded once per use (event index %s)",
    (eventIdx) => {
      const seen: Access[] = [];
      const stage = busyStage(4, (access) => seen.push(access), { eventIdx });
      stage.rig.poll();
      const loads = seen.filter(({ kind, atomic }) => kind === "load" && !atomic);
      const bytes = loads.flatMap(({ end, gpa, bytes }) =>
        Array.from({ length: bytes }, (_, i) => `${end} ${gpa + BigInt(i)}`),
      );
      expect(stage.rig.counters.packets).toBeGreaterThan(0);
      expect(bytes.filter((each, i) => bytes.indexOf(each) !== i)).toEqual([]);
    },
  );

  test.each([true, false])(
    "entries before the used index, the used index before the suppression word (event index %s)",
    (eventIdx) => {
      const { stage, seen, size } = trace(eventIdx);
      for (const end of ["source", "destination"] as const) {
        const { avail, used } = stage.rig[end].ring;
        const suppression = eventIdx ? avail + 4n + 2n * BigInt(size) : avail;
        const mine = seen.filter((access) => access.end === end);
        let unpublished = 0;
        let undecided = false;
        let published = 0;
        for (const { kind, gpa, atomic } of mine) {
          if (kind === "store" && gpa >= used + 4n && gpa < used + 4n + 8n * BigInt(size)) unpublished++;
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
    const seen: Access[] = [];
    const stage = new Stage({ direction: "receive", size: 4 }, { variant: "hooked", observe: (a) => seen.push(a) });
    stage.mustDeliver();
    const writes = seen.filter(({ end, kind }) => end === "destination" && kind !== "load");
    const { used } = stage.receiveq.ring;
    expect(writes.map(({ kind, gpa, bytes }) => [kind, gpa, bytes])).toEqual([
      ["store", used, 2], // just started: no kicks, please
      ["store", GOOD, 8],
      ["store", GOOD + 8n, 4],
      ["copy", GOOD + 12n, 100],
      ["store", used + 4n, 8],
      ["store", used + 2n, 2],
    ]);
  });

  test.each([true, false])("after asking for kicks the avail index is read again (event index %s)", (eventIdx) => {
    const seen: Access[] = [];
    const stage = new Stage(
      { direction: "receive", size: 4 },
      { variant: "hooked", observe: (a) => seen.push(a), ring: { eventIdx } },
    );
    const { avail, used } = stage.transmitq.ring;
    const wish = eventIdx ? used + 4n + 32n : used;
    const order = () =>
      seen
        .splice(0)
        .filter(({ atomic }) => atomic)
        .map(({ kind, end, gpa }) => [kind, end, gpa]);
    stage.mustDeliver();
    seen.length = 0;
    expect(stage.rig.core.arm(0)).toBe(0);
    expect(order()).toEqual([
      ["store", "source", wish],
      ["load", "source", avail + 2n],
    ]);
    stage.send();
    expect(stage.rig.core.arm(0)).toBe(1);
    stage.rig.poll();
    seen.length = 0;
    expect(stage.rig.core.arm(0)).toBe(0); // it waits for buffers: it is the receiver's kick that counts
    expect(order()).toEqual([
      ["store", "destination", wish],
      ["load", "destination", avail + 2n],
    ]);
    stage.post();
    expect(stage.rig.core.arm(0)).toBe(1);
  });

  test("2.7.13.3.1 the avail index is loaded before the entries it covers", () => {
    const { stage, seen } = trace(true);
    for (const end of ["source", "destination"] as const) {
      const { avail } = stage.rig[end].ring;
      const first = (match: (gpa: bigint) => boolean) => seen.findIndex((a) => a.end === end && match(a.gpa));
      const index = first((gpa) => gpa === avail + 2n);
      expect(index).toBeGreaterThanOrEqual(0);
      expect(index).toBeLessThan(first((gpa) => gpa >= avail + 4n && gpa < avail + 12n));
    }
  });
});
