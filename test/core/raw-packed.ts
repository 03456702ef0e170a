/**
 * A packed virtqueue written raw. Chains are described beside the ring, for its slots are the device's once they were
 * offered; all chains must fit the ring, but put() writes whatever a test wants wherever it wants.
 */
import type { Descriptor, RawRing } from "./raw-ring.ts";
import { NEXT } from "./raw-ring.ts";
import { advance } from "./reference-packed.ts";
import { type Ram, type Ring, areaBytes } from "./rig.ts";

export const [AVAIL, USED] = [0x80, 0x8000] as const;

export interface Slot {
  gpa: bigint;
  len: number;
  id: number;
  flags: number;
}

/** AVAIL and USED of a slot that is available at a position. */
export function availableAt(position: number): number {
  return position >> 15 ? AVAIL : USED;
}

/** AVAIL and USED of a slot that was used at a position. */
export function usedAt(position: number): number {
  return position >> 15 ? AVAIL | USED : 0;
}

export class RawPacked implements RawRing {
  readonly ring: Ring;
  readonly #ram: Ram;
  readonly #descriptors: Required<Descriptor>[];
  /** Chains that the device has. */
  #offered: { position: number; slots: number }[] = [];
  #used: { id: number; len: number }[] = [];
  /** Where the next chain goes. */
  next: number;

  /** Lays the ring as if all chains before its base had been used. */
  constructor(ram: Ram, ring: Ring) {
    this.#ram = ram;
    this.ring = ring;
    this.next = ring.base;
    this.#descriptors = Array.from({ length: ring.size }, () => ({ gpa: 0n, len: 0, flags: 0, next: 0 }));
    for (const area of ["desc", "avail", "used"] as const) ram.slice(ring[area], areaBytes(ring)[area]).fill(0);
    for (let i = 0, at = ring.base; i < ring.size; i++, at = advance(at, 1, ring.size)) {
      this.put(at, { gpa: 0n, len: 0, id: 0, flags: usedAt(at ^ 0x8000) });
    }
  }

  describe(index: number, { gpa, len, flags = 0, next = 0 }: Descriptor): void {
    this.#descriptors[index] = { gpa, len, flags, next };
  }

  write(at: bigint, { gpa, len, flags = 0, next = 0 }: Descriptor): void {
    this.#store(at, { gpa, len, id: next, flags });
  }

  offer(...heads: number[]): void {
    for (const head of heads) this.offerAs(head, head);
  }

  /** Slots that the device does not have. */
  get free(): number {
    this.#reap();
    return this.ring.size - this.#offered.reduce((sum, { slots }) => sum + slots, 0);
  }

  /** Offers a chain under an id of its own. Chains without an end get all slots that the device does not have. */
  offerAs(id: number, head: number): void {
    const { size } = this.ring;
    const chain: Required<Descriptor>[] = [];
    const { free } = this;
    for (let index = head; chain.length < free;) {
      const descriptor = this.#descriptors[index % size]!;
      chain.push(descriptor);
      if (!(descriptor.flags & NEXT)) break;
      index = descriptor.next;
    }
    if (chain.length === 0) throw new RangeError(`no slot is free for chain ${id}`);
    this.#offered.push({ position: this.next, slots: chain.length });
    for (const [i, { gpa, len, flags }] of chain.entries()) {
      // only the last one's id counts
      const slot = { gpa, len, id: i + 1 < chain.length ? 0xdead : id, flags: flags & ~(AVAIL | USED) };
      this.put(this.next, { ...slot, flags: slot.flags | availableAt(this.next) });
      this.next = advance(this.next, 1, size);
    }
  }

  /** Writes a slot as it is. */
  put(position: number, slot: Slot): void {
    this.#store(this.ring.desc + 16n * BigInt(position & 0x7fff), slot);
  }

  slot(position: number): Slot {
    const bytes = Buffer.from(this.#ram.slice(this.ring.desc + 16n * BigInt(position & 0x7fff), 16));
    return {
      gpa: bytes.readBigUInt64LE(0),
      len: bytes.readUInt32LE(8),
      id: bytes.readUInt16LE(12),
      flags: bytes.readUInt16LE(14),
    };
  }

  interrupts(wanted: boolean): void {
    this.driverEvent = { position: 0, flags: wanted ? 0 : 1 };
  }

  set driverEvent({ position, flags }: { position: number; flags: number }) {
    this.#ram.view.setUint32(this.#ram.at(this.ring.avail), ((flags << 16) | position) >>> 0, true);
  }

  get deviceEvent(): { position: number; flags: number } {
    const event = this.#ram.view.getUint32(this.#ram.at(this.ring.used), true);
    return { position: event & 0xffff, flags: event >>> 16 };
  }

  used(): { id: number; len: number }[] {
    this.#reap();
    return this.#used.splice(0);
  }

  #reap(): void {
    for (let first; (first = this.#offered[0]) !== undefined; this.#offered.shift()) {
      const { id, len, flags } = this.slot(first.position);
      if ((flags & (AVAIL | USED)) !== usedAt(first.position)) return;
      this.#used.push({ id, len });
    }
  }

  #store(at: bigint, { gpa, len, id, flags }: Slot): void {
    const bytes = Buffer.alloc(16);
    bytes.writeBigUInt64LE(gpa, 0);
    bytes.writeUInt32LE(len, 8);
    bytes.writeUInt16LE(id, 12);
    bytes.writeUInt16LE(flags, 14);
    this.#ram.slice(at, 16).set(bytes);
  }
}
