/** A split virtqueue written raw. */
import type { Descriptor, RawRing } from "./raw-ring.ts";
import { type Ram, type Ring, areaBytes } from "./rig.ts";

export class RawSplit implements RawRing {
  readonly ring: Ring;
  readonly #ram: Ram;
  #availIdx: number;
  #usedSeen: number;

  /** Clears the ring. */
  constructor(ram: Ram, ring: Ring) {
    this.#ram = ram;
    this.ring = ring;
    this.#availIdx = this.#usedSeen = ring.base;
    for (const area of ["desc", "avail", "used"] as const) ram.slice(ring[area], areaBytes(ring)[area]).fill(0);
    this.availIdx = ring.base;
    this.#ram.view.setUint16(this.#ram.at(ring.used) + 2, ring.base, true);
  }

  describe(index: number, descriptor: Descriptor): void {
    this.write(this.ring.desc + 16n * BigInt(index), descriptor);
  }

  write(at: bigint, { gpa, len, flags = 0, next = 0 }: Descriptor): void {
    const bytes = Buffer.alloc(16);
    bytes.writeBigUInt64LE(gpa, 0);
    bytes.writeUInt32LE(len, 8);
    bytes.writeUInt16LE(flags, 12);
    bytes.writeUInt16LE(next, 14);
    this.#ram.slice(at, 16).set(bytes);
  }

  /** The heads may be no heads at all. */
  offer(...heads: number[]): void {
    for (const head of heads) {
      const entry = this.ring.avail + 4n + 2n * BigInt(this.#availIdx % this.ring.size);
      this.#ram.view.setUint16(this.#ram.at(entry), head, true);
      this.#availIdx = (this.#availIdx + 1) & 0xffff;
    }
    this.availIdx = this.#availIdx;
  }

  /** Sets the avail index and the ring's first entries, whatever was offered before. */
  availAt(index: number, heads: readonly number[]): void {
    const at = this.#ram.at(this.ring.avail);
    for (const [i, head] of heads.entries()) this.#ram.view.setUint16(at + 4 + 2 * i, head, true);
    this.#availIdx = this.availIdx = index;
  }

  interrupts(wanted: boolean): void {
    this.availFlags = wanted ? 0 : 1;
    if (this.ring.eventIdx) this.usedEvent = (this.#availIdx + (wanted ? 0 : 0x8000)) & 0xffff;
  }

  get availIdx(): number {
    return this.#ram.view.getUint16(this.#ram.at(this.ring.avail) + 2, true);
  }

  set availIdx(index: number) {
    this.#ram.view.setUint16(this.#ram.at(this.ring.avail) + 2, index, true);
  }

  set availFlags(flags: number) {
    this.#ram.view.setUint16(this.#ram.at(this.ring.avail), flags, true);
  }

  set usedEvent(index: number) {
    this.#ram.view.setUint16(this.#ram.at(this.ring.avail) + 4 + 2 * this.ring.size, index, true);
  }

  used(): { id: number; len: number }[] {
    const at = this.#ram.at(this.ring.used);
    const entries: { id: number; len: number }[] = [];
    for (const idx = this.#ram.view.getUint16(at + 2, true); this.#usedSeen !== idx;) {
      const entry = at + 4 + 8 * (this.#usedSeen % this.ring.size);
      entries.push({ id: this.#ram.view.getUint32(entry, true), len: this.#ram.view.getUint32(entry + 4, true) });
      this.#usedSeen = (this.#usedSeen + 1) & 0xffff;
    }
    return entries;
  }
}
