/**
 * The ring core as a fuzz target: two guests that write whatever the input says into their rings and buffers.
 *
 * Half of the inputs leave memory alone while the core works: every poll must then do what the reference does, to the
 * last byte. The others change it between two accesses of the core, where nobody can say what must come of it but
 * this: no access outside the guests' memory, no exception, no more accesses than the size of the rings explains, no
 * byte of the sending guest written but in the device's part of its ring, none of the receiving one but there and in
 * buffers that its driver described as writable.
 */
import { deepStrictEqual } from "node:assert";
import type { Access } from "../core/hooked-core.ts";
import { RawPacked } from "../core/raw-packed.ts";
import { type Descriptor, type RawRing, WRITE } from "../core/raw-ring.ts";
import { RawSplit } from "../core/raw-split.ts";
import { ReferenceLane } from "../core/reference.ts";
import { ReferenceRam } from "../core/reference-ram.ts";
import { type Ram, Rig, type Ring, areaBytes, ringAt } from "../core/rig.ts";
import { SOURCE_EXTENTS } from "../../src/layout/lane.ts";
import { Reader } from "./bytes.ts";
import type { Features } from "./engine.ts";

const RING = 0x10_0000n;
const DATA = 0x1_0000_0000n;
const SEAM = DATA + 0x3000n;
const RAM_END = SEAM + 0x1000n;
const TABLE = DATA + 0x2000n;
const SIZES = { split: [2, 4, 8, 16], packed: [1, 2, 3, 5, 8] };
const ADDRESSES = [DATA, DATA + 0x100n, DATA + 0x801n, DATA + 0xff0n, SEAM - 40n, RAM_END - 64n, TABLE, TABLE + 8n];
const BAD_ADDRESSES = [0n, RAM_END - 1n, RAM_END, DATA - 1n, 0xffff_ffff_ffff_ffffn, 0xffff_ffff_ffff_fff0n];
const LENGTHS = [0, 1, 11, 12, 16, 25, 26, 32, 48, 60, 64, 100, 300, 1526, 4096, 0xffff, 0xffff_ffff];
const WORDS = [0, 1, 2, 3, 4, 5, 7, 8, 0x7f, 0x80, 0x8000, 0x8080, 0xffff];
const DISTANCES = [-16, -8, -4, -2, 0, 2, 4, 8, 12, 16, 24, 32, 48];
const END_NAMES = ["source", "destination"] as const;

type EndName = (typeof END_NAMES)[number];

/** @throws whatever is wrong */
export function runRing(input: Uint8Array): Features {
  try {
    return new RingRun(new Reader(input)).run();
  } catch (error) {
    scene = undefined; // the core was left in the middle of something
    throw error;
  }
}

/** What is used again from run to run: making it takes longer than a run. */
interface Scene {
  rig: Rig;
  /** What is in the guests' memory at first. */
  pattern: Uint8Array;
  observe: (access: Access) => void;
}

let scene: Scene | undefined;

function sceneFor(rings: Record<EndName, Ring>, observe: Scene["observe"]): Rig {
  const regions = [
    { gpa: RING, sizeBytes: 0x1000 },
    { gpa: DATA, sizeBytes: 0x3000 },
    { gpa: SEAM, sizeBytes: 0x1000 },
  ];
  if (!scene) {
    const rig: Rig = new Rig({
      source: { regions, ring: rings.source },
      destination: { regions, ring: rings.destination },
      variant: "hooked",
      observe: (access) => scene?.observe(access),
    });
    scene = { rig, pattern: Uint8Array.from(rig.source.ram.bytes), observe };
  }
  const { rig, pattern } = scene;
  scene.observe = observe;
  new Uint8Array(rig.lane.memory.buffer, 0, SOURCE_EXTENTS).fill(0); // all state and counters
  for (const name of END_NAMES) {
    rig[name].ram.bytes.set(pattern);
    rig[name].ring = rings[name];
    rig.start(name);
  }
  rig.core.refresh();
  return rig;
}

interface Change {
  /** How many accesses after the change before it. */
  after: number;
  /** Bytes from the access. */
  distance: number;
  word: number;
}

class RingRun {
  readonly #input: Reader;
  readonly #rig: Rig;
  readonly #reference: ReferenceLane | undefined;
  readonly #rings: Record<EndName, RawRing>;
  readonly #features: Features = new Map();
  readonly #changes: Change[] = [];
  #accesses = 0;
  #untilChange = 0;
  /** The last two accesses, as features. */
  #trail = [0, 0];
  /** What the core has read where descriptors are, of the receiving guest. */
  readonly #addresses = new Set<bigint>();
  readonly #lengths = new Set<number>();
  #readByPieces = false;

  constructor(input: Reader) {
    this.#input = input;
    const isMutating = input.bool();
    this.#rig = sceneFor({ source: this.#ring(), destination: this.#ring() }, (access) => this.#observe(access));
    const { source, destination } = this.#rig;
    this.#rings = { source: rawRing(source), destination: rawRing(destination) };
    if (isMutating) {
      for (let left = input.u8() % 24; left > 0; left--)
        this.#changes.push({ after: input.u8(), distance: input.pick(DISTANCES), word: input.pick(WORDS) });
      this.#untilChange = this.#changes[0]?.after ?? 0;
    } else this.#reference = new ReferenceLane(source.ring, destination.ring);
  }

  run(): Features {
    for (let operations = 0; !this.#input.done && operations < 200; operations++) this.#operation();
    this.#poll(64, false);
    return this.#features;
  }

  #ring(): Ring {
    const input = this.#input;
    const flags = input.u8();
    const packed = (flags & 1) !== 0;
    const mergeable = (flags & 8) === 0;
    return ringAt(RING, input.pick(SIZES[packed ? "packed" : "split"]), {
      packed,
      eventIdx: (flags & 2) === 0,
      indirect: (flags & 4) === 0,
      mergeable,
      headerBytes: !mergeable && (flags & 16) !== 0 ? 10 : 12,
      enabled: (flags & 0xe0) !== 0xe0,
    });
  }

  #operation(): void {
    const input = this.#input;
    const name = input.pick(END_NAMES);
    const ring = this.#rings[name];
    const { size } = ring.ring;
    switch (input.u8() % 12) {
      case 0:
        return ring.describe(input.u8() % size, this.#descriptor());
      case 1:
        return ring.write(TABLE + 16n * BigInt(input.u8() % 8), this.#descriptor());
      case 2:
      case 3:
        return this.#offer(ring, input.u8());
      case 4:
      case 5:
        return this.#offerGood(name, input.u8() % size, input.pick([14, 60, 100, 300, 1514]));
      case 6:
        return this.#writeWord(name);
      case 7:
        return ring.interrupts(input.bool());
      case 8:
        return this.#sleep(input.bool());
      case 9:
        return this.#restart(name);
      default:
        return this.#poll(input.pick([64, 64, 1, 2, 3]), input.u8() % 8 === 0);
    }
  }

  #descriptor(): Descriptor {
    const input = this.#input;
    const choice = input.u8();
    const gpa = choice >= 0xe0 ? BAD_ADDRESSES[choice % BAD_ADDRESSES.length]! : ADDRESSES[choice % ADDRESSES.length]!;
    return { gpa, len: input.pick(LENGTHS), flags: input.u8() & 7, next: input.pick([0, 1, 2, 3, 4, 5, 6, 7, 0xffff]) };
  }

  #offer(ring: RawRing, choice: number): void {
    if (ring instanceof RawPacked && ring.free === 0) return;
    // Of a split ring it may be no head at all.
    const head = choice >= 0xf0 && !ring.ring.packed ? ring.ring.size + choice : choice % ring.ring.size;
    ring.offer(head);
  }

  #offerGood(name: EndName, index: number, length: number): void {
    const gpa = DATA + 0x100n * BigInt(index);
    const ring = this.#rings[name];
    ring.describe(index, { gpa, len: 12 + length, flags: name === "source" ? 0 : WRITE });
    if (name === "source") this.#rig.source.ram.slice(gpa, 12).fill(0);
    this.#offer(ring, index);
  }

  /** A 16-bit word anywhere in the areas of a ring. */
  #writeWord(name: EndName): void {
    const { ram, ring } = this.#rig[name];
    const area = this.#input.pick(["desc", "avail", "used"] as const);
    const at = ram.at(ring[area]) + 2 * (this.#input.u16() % (areaBytes(ring)[area] >> 1));
    ram.view.setUint16(at, this.#input.pick(WORDS), true);
  }

  #poll(budget: number, stuck: boolean): void {
    const result = this.#step(
      () => this.#rig.poll(budget, stuck),
      (reference, from, to) => reference.poll(from, to, budget, stuck),
    );
    for (const [i, value] of Object.values(result).entries()) if (value) this.#count(0x10_0000 + i);
  }

  #sleep(stuck: boolean): void {
    this.#step(
      () => this.#rig.core.arm(stuck ? 1 : 0) !== 0,
      (reference, from, to) => reference.arm(from, to, stuck),
    );
    this.#step(
      () => this.#rig.core.disarm(),
      (reference, from, to) => reference.disarm(from, to),
    );
  }

  /** Stops a virtqueue and starts it where it stopped. */
  #restart(name: EndName): void {
    const base = this.#rig.lane.nextAvail(name);
    if (this.#reference) deepStrictEqual(base, this.#reference[name].next, "position");
    this.#rig.start(name, base);
    this.#rig.core.refresh();
    this.#reference?.restart(name, base);
  }

  /** Has core and reference do the same, and compares all that came of it. */
  #step<T>(real: () => T, model: (reference: ReferenceLane, from: ReferenceRam, to: ReferenceRam) => T): T {
    const { source, destination, counters: before } = this.#rig;
    this.#accesses = 0;
    if (!this.#reference) return this.#noting(before, real);
    const from = copyOf(source.ram);
    const to = copyOf(destination.ram);
    const expected = model(this.#reference, from.ram, to.ram);
    const result = this.#noting(before, real);
    deepStrictEqual(result, expected, "result");
    deepStrictEqual(this.#rig.counters, { ...this.#reference.counters, kicks: 0 }, "counters");
    mustEqual("source", source.ram, from.bytes);
    mustEqual("destination", destination.ram, to.bytes);
    return result;
  }

  /** Counters that moved are features. */
  #noting<T>(before: Rig["counters"], real: () => T): T {
    const result = real();
    const [then, now] = [before, this.#rig.counters].map((counters) =>
      [counters, counters.drops, counters.calls].flatMap((group) => Object.values(group)),
    );
    for (const [i, value] of now!.entries())
      if (typeof value === "number" && value !== then![i]) this.#count(0x11_0000 + i);
    return result;
  }

  #observe(access: Access): void {
    const { ring } = this.#rig[access.end];
    const area = areaOf(ring, access.gpa);
    const what = ["load", "store", "copy"].indexOf(access.kind) * 2 + (access.atomic ? 1 : 0);
    const feature =
      ((what * 2 + (access.end === "source" ? 0 : 1)) * 5 + AREAS.indexOf(area)) * 5 + ((access.bytes >> 2) & 3);
    this.#count(hash(this.#trail[0]!, this.#trail[1]!, feature));
    this.#trail = [this.#trail[1]!, feature];
    const limit = LANE_BUDGET * (RING_MAX + 2) * (17 * RING_MAX + 50);
    if (++this.#accesses > limit) throw new Error(`endless: ${limit} accesses`);
    if (this.#reference) return;
    this.#change(access);
    if (access.kind === "load") this.#remember(access, area);
    else this.#mustBeAllowed(access, area);
  }

  /** Memory changes before this access, if its turn has come. */
  #change(access: Access): void {
    if (this.#changes.length === 0 || this.#untilChange-- > 0) return;
    const { distance, word } = this.#changes.shift()!;
    this.#untilChange = this.#changes[0]?.after ?? 0;
    const { ram } = this.#rig[access.end];
    const at = ram.at(access.gpa) + distance;
    if (at >= 0 && at + 2 <= ram.bytes.length) ram.view.setUint16(at, word, true);
  }

  #remember({ end, gpa, bytes }: Access, area: Area): void {
    if (end !== "destination" || area === "avail") return;
    if (bytes !== 8) {
      if (area !== "used" && area !== "desc") this.#readByPieces = true;
      return;
    }
    const word = this.#rig.destination.ram.view.getBigUint64(this.#rig.destination.ram.at(gpa), true);
    this.#addresses.add(word);
    this.#lengths.add(Number(word & 0xffff_ffffn));
  }

  #mustBeAllowed({ end, gpa, bytes }: Access, area: Area): void {
    const { packed } = this.#rig[end].ring;
    if (area === "used" || (packed && area === "desc")) return;
    const isBuffer = () => {
      const offsets = [...this.#addresses].map((address) => gpa - address).filter((offset) => offset >= 0n);
      return [...this.#lengths].some((length) => offsets.some((into) => into + BigInt(bytes) <= BigInt(length)));
    };
    if (end === "destination" && (this.#readByPieces || isBuffer())) return;
    throw new Error(`stray write: ${bytes} bytes at gpa 0x${gpa.toString(16)} of the ${end}, ${area}`);
  }

  #count(feature: number): void {
    this.#features.set(feature, (this.#features.get(feature) ?? 0) + 1);
  }
}

const LANE_BUDGET = 64;
const RING_MAX = 16;

const AREAS = ["desc", "avail", "used", "table", "buffer"] as const;
type Area = (typeof AREAS)[number];

function areaOf(ring: Ring, gpa: bigint): Area {
  if (gpa >= DATA) return gpa >= TABLE && gpa < SEAM ? "table" : "buffer";
  return gpa >= ring.used ? "used" : gpa >= ring.avail ? "avail" : "desc";
}

function rawRing({ ram, ring }: { ram: Ram; ring: Ring }): RawRing {
  return ring.packed ? new RawPacked(ram, ring) : new RawSplit(ram, ring);
}

function hash(a: number, b: number, c: number): number {
  return ((Math.imul(a, 0x9e37_79b1) ^ Math.imul(b, 0x85eb_ca6b) ^ Math.imul(c, 0xc2b2_ae35)) >>> 12) & 0xf_ffff;
}

function copyOf(ram: Ram): { bytes: Uint8Array; ram: ReferenceRam } {
  const bytes = Uint8Array.from(ram.bytes);
  const regions = ram.regions.map(({ gpa, sizeBytes, start }) => ({
    gpa,
    bytes: bytes.subarray(start, start + sizeBytes),
  }));
  return { bytes, ram: new ReferenceRam(regions) };
}

function mustEqual(which: EndName, ram: Ram, expected: Uint8Array): void {
  if (Buffer.compare(ram.bytes, expected) === 0) return;
  const at = expected.findIndex((byte, i) => byte !== ram.bytes[i]);
  const shown = (bytes: Uint8Array) => Buffer.from(bytes.subarray(at, at + 16)).toString("hex");
  throw new Error(`${which} RAM at 0x${ram.gpa(at).toString(16)}: ${shown(ram.bytes)}, expected ${shown(expected)}`);
}
