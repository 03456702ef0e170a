/**
 * BI-217: rings of two descriptors, in every state of both, against the reference: split and packed, both directions.
 *
 * A descriptor's states: all flags that mean something, all successors (split) or owners (packed), and places: of every class
 * of address and length. Of the pairs of states every seventh is tried; all of them if VHOST_RELAY_TEST_RUNS is 8 or more.
 */
import { expect, test } from "vitest";
import { Judge } from "./judge.ts";
import { AVAIL, RawPacked, USED } from "./raw-packed.ts";
import { INDIRECT, NEXT, WRITE } from "./raw-ring.ts";
import { RawSplit } from "./raw-split.ts";
import { Rig, type Ring, ringAt } from "./rig.ts";
import { runs } from "./runs.ts";
import type { Direction, Format } from "./stage.ts";

const [RING, DATA, HOLE] = [0x1000n, 0x10_0000n, 0x8000_0000n];
const END = DATA + 0x1000n;
const TABLE = DATA + 0x800n;

/** In RAM, across its end, in none, and a table; lengths of nothing, less than a frame, enough, a table and too much. */
const places = [DATA, END - 50n, HOLE, TABLE].flatMap((gpa) => [0, 40, 112, 32].map((len) => ({ gpa, len })));
places.push({ gpa: DATA, len: 0xffff_ffff }, { gpa: 0xffff_ffff_ffff_ffffn, len: 112 });

interface State {
  gpa: bigint;
  len: number;
  flags: number;
  /** Split: next; packed: id. */
  next: number;
}

const links: Record<Format, { flags: number; next: number }[]> = {
  // next means something with NEXT only; 2 is none of the ring's
  split: [0, WRITE, INDIRECT, INDIRECT | WRITE].flatMap((flags) => [
    { flags, next: 0 },
    ...[0, 1, 2].map((next) => ({ flags: flags | NEXT, next })),
  ]),
  packed: [0, 1, 2, 3, 4, 5, 6, 7].flatMap((flags) => [
    { flags: flags | AVAIL, next: 7 },
    { flags: flags | USED, next: 8 },
    ...(flags < 2 ? [0, AVAIL | USED].map((owner) => ({ flags: flags | owner, next: 9 })) : []),
  ]),
};

/** The ring under attack at one end, at the other a frame that waits or a buffer. */
class Scene {
  readonly judge: Judge;
  readonly #raw: RawSplit | RawPacked;
  readonly #start: Uint8Array[];
  readonly #rig: Rig;

  constructor(format: Format, direction: Direction, base: number) {
    const regions = [
      { gpa: RING, sizeBytes: 0x1000 },
      { gpa: DATA, sizeBytes: 0x1000 },
    ];
    const ring: Ring = ringAt(RING, 2, { packed: format === "packed", base, eventIdx: false });
    const peer: Ring = ringAt(RING, 2, { eventIdx: false });
    const isTransmit = direction === "transmit";
    this.#rig = new Rig({
      source: { regions, ring: isTransmit ? ring : peer },
      destination: { regions, ring: isTransmit ? peer : ring },
    });
    const [attacked, other] = isTransmit
      ? [this.#rig.source, this.#rig.destination]
      : [this.#rig.destination, this.#rig.source];
    for (const { ram } of [attacked, other]) ram.slice(DATA, 0x1000).fill(0);
    this.#raw = format === "packed" ? new RawPacked(attacked.ram, ring) : new RawSplit(attacked.ram, ring);
    // the table: a good entry, and one that leads back
    const flags = isTransmit ? 0 : WRITE;
    this.#raw.write(TABLE, { gpa: DATA, len: 100, flags: flags | NEXT, next: 1 });
    this.#raw.write(TABLE + 16n, { gpa: DATA + 100n, len: 12, flags });
    const raw = new RawSplit(other.ram, peer);
    raw.describe(0, { gpa: DATA, len: isTransmit ? 2048 : 112, flags: isTransmit ? WRITE : 0 });
    raw.offer(0, 0);
    this.judge = new Judge(this.#rig);
    this.#start = [this.#rig.source, this.#rig.destination].map(({ ram }) => Uint8Array.from(ram.bytes));
  }

  /** One poll with these two descriptors. @param heads, delta of a split ring: its avail entries, how far its index is */
  poll(states: readonly [State, State], heads: readonly number[] = [0, 1], delta = 1): void {
    this.#rig.source.ram.bytes.set(this.#start[0]!);
    this.#rig.destination.ram.bytes.set(this.#start[1]!);
    const raw = this.#raw;
    for (const [i, state] of states.entries()) {
      if (raw instanceof RawPacked) raw.put(i, { gpa: state.gpa, len: state.len, id: state.next, flags: state.flags });
      else raw.describe(i, state);
    }
    if (raw instanceof RawSplit) raw.availAt(delta, heads);
    this.judge.startAll();
    this.judge.poll();
  }
}

/** No divisor of the number of states: so every second descriptor occurs, with a seventh of the first ones. */
const SAMPLE = 7;
const EVERYTHING = 8;

const directions = ["transmit", "receive"] as const;
const cases = directions.flatMap((direction) => [
  { format: "split" as const, direction, base: 0 },
  { format: "packed" as const, direction, base: 0x8000 },
  { format: "packed" as const, direction, base: 0x0001 },
]);

test.each(cases)(
  "BI-217 every pair of descriptors ($format, $direction, from $base)",
  ({ format, direction, base }) => {
    const scene = new Scene(format, direction, base);
    const states = links[format].flatMap((link) => places.map((place) => ({ ...place, ...link })));
    const stride = runs(1) >= EVERYTHING ? 1 : SAMPLE;
    for (let at = 0; at < states.length ** 2; at += stride) {
      scene.poll([states[Math.floor(at / states.length)]!, states[at % states.length]!]);
    }
    expect(scene.judge.reference.frames.length).toBeGreaterThan(0);
  },
);

test.each(directions)("BI-217 every avail index and pair of heads (split, %s)", (direction) => {
  const scene = new Scene("split", direction, 0);
  const flags = direction === "transmit" ? 0 : WRITE;
  const good = { gpa: DATA, len: 112, flags, next: 0 };
  const states: State[] = [
    good,
    { ...good, gpa: HOLE },
    { ...good, flags: flags | NEXT, next: 1 },
    { ...good, flags: flags | NEXT, next: 0 },
    { ...good, flags: flags ^ WRITE },
    { ...good, gpa: TABLE, len: 32, flags: INDIRECT },
  ];
  for (const first of states) {
    for (const second of states) {
      for (const delta of [0, 1, 2, 3, 4, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff]) {
        for (const a of [0, 1, 2, 0xffff]) for (const b of [0, 1, 2]) scene.poll([first, second], [a, b], delta);
      }
    }
  }
});
