/**
 * The packed virtqueue of the reference (virtio 1.3, 2.8), and the mark that is our own: the used bit of every
 * descriptor of a chain that was given back, so that the ring itself says how far the device came.
 */
import { type Chain, type Offered, type ReferenceQueue, append } from "./reference-queue.ts";
import type { ReferenceRam } from "./reference-ram.ts";
import type { Ring } from "./rig.ts";

const [NEXT, WRITE, INDIRECT, AVAIL, USED] = [1, 2, 4, 1 << 7, 1 << 15];

/** A slot of the ring and the wrap counter that applies there: index | wrap << 15. */
export function positionOf(index: number, wrap: number): number {
  return index | (wrap << 15);
}

/** The position so many slots on; at most once round. */
export function advance(position: number, slots: number, size: number): number {
  const index = (position & 0x7fff) + slots;
  return index < size ? positionOf(index, position >> 15) : positionOf(index - size, (position >> 15) ^ 1);
}

interface Slot {
  position: number;
  gpa: bigint;
  length: number;
  id: number;
  flags: number;
}

export class ReferencePacked implements ReferenceQueue {
  readonly ring: Ring;
  broken = false;
  next: number;
  readonly #writable: boolean;
  #begun = false;
  /** Slots given back since the last decision about a call. */
  #undecided = 0;

  constructor(ring: Ring, writable: boolean, base: number) {
    this.ring = ring;
    this.#writable = writable;
    this.next = base;
  }

  begin(ram: ReferenceRam): void {
    if (!this.#begun) this.suppressKicks(ram);
    this.#begun = true;
  }

  isOverrun(): boolean {
    return false;
  }

  look(ram: ReferenceRam, position: number): Offered | "none" | "broken" {
    if (!this.hasChain(ram, position)) return "none";
    const { size } = this.ring;
    const slots: Slot[] = [];
    // Chains that are looked at together lie side by side: they have one ring in all.
    const room = size - this.#distance(this.next, position);
    let at = position;
    do {
      if (slots.length === room || !this.hasChain(ram, at)) return "broken";
      slots.push(this.#slot(ram, at));
      at = advance(at, 1, size);
    } while (slots.at(-1)!.flags & NEXT);
    return {
      chain: this.#readChain(ram, slots),
      next: at,
      slots: slots.length,
      giveBack: (written) => this.#giveBack(ram, slots, written),
    };
  }

  hasChain(ram: ReferenceRam, position: number): boolean {
    const { flags } = this.#slot(ram, position);
    const wrap = position >> 15 === 1;
    return ((flags & AVAIL) !== 0) === wrap && ((flags & USED) !== 0) !== wrap;
  }

  publish(): void {
    // Each chain's flags say it, and nothing sees RAM before the poll is over.
  }

  decideCall(ram: ReferenceRam): boolean | undefined {
    const { size, avail, eventIdx } = this.ring;
    const used = this.#undecided;
    if (used === 0) return undefined;
    this.#undecided = 0;
    const [event, flags] = [ram.u16(avail), ram.u16(avail + 2n) & 3];
    if (flags !== 2 || !eventIdx) return flags !== 1;
    const behind = this.#distance(event, this.next);
    return (event & 0x7fff) >= size || (behind >= 1 && behind <= used);
  }

  requestKick(ram: ReferenceRam, position: number): void {
    const { used, eventIdx } = this.ring;
    if (eventIdx) ram.setU16(used, position);
    ram.setU16(used + 2n, eventIdx ? 2 : 0);
  }

  suppressKicks(ram: ReferenceRam): void {
    ram.setU16(this.ring.used + 2n, 1);
  }

  /** Slots from one position on to another, less than twice round. */
  #distance(from: number, to: number): number {
    const { size } = this.ring;
    const linear = (position: number) => (position & 0x7fff) + (position >> 15) * size;
    return (linear(to) - linear(from) + 2 * size) % (2 * size);
  }

  #slot(ram: ReferenceRam, position: number): Slot {
    const bytes = Buffer.concat(ram.views(this.#slotGpa(position), 16)!);
    return {
      position,
      gpa: bytes.readBigUInt64LE(0),
      length: bytes.readUInt32LE(8),
      id: bytes.readUInt16LE(12),
      flags: bytes.readUInt16LE(14),
    };
  }

  #slotGpa(position: number): bigint {
    return this.ring.desc + 16n * BigInt(position & 0x7fff);
  }

  /** 2.8.6, 2.8.7: the first slot gets the used descriptor, the others their used bit. */
  #giveBack(ram: ReferenceRam, slots: readonly Slot[], written: number): void {
    const [first, last] = [slots[0]!, slots.at(-1)!];
    const at = this.#slotGpa(first.position);
    ram.setU32(at + 8n, written);
    ram.setU16(at + 12n, last.id);
    ram.setU16(at + 14n, (first.position >> 15 ? AVAIL | USED : 0) | (written > 0 ? WRITE : 0));
    for (const { position, flags } of slots.slice(1)) {
      ram.setU16(this.#slotGpa(position) + 14n, (flags & 0xff) | (position >> 15 ? USED : 0));
    }
    this.next = advance(last.position, 1, this.ring.size);
    this.#undecided += slots.length;
  }

  /** The buffers of a chain: its slots, or the table that its only slot names. Undefined if it breaks a rule. */
  #readChain(ram: ReferenceRam, slots: readonly Slot[]): Chain | undefined {
    const chain: Chain = { views: [], length: 0 };
    const add = (gpa: bigint, length: number, flags: number) =>
      !(flags & INDIRECT) && ((flags & WRITE) !== 0) === this.#writable && append(ram, chain, gpa, length);
    const [first] = slots;
    if (slots.length > 1 || !(first!.flags & INDIRECT)) {
      return slots.every(({ gpa, length, flags }) => add(gpa, length, flags)) ? chain : undefined;
    }
    const { gpa: table, length } = first!;
    if (!this.ring.indirect || length === 0 || length % 16 !== 0 || length / 16 > this.ring.size) return undefined;
    for (let at = 0; at < length; at += 16) {
      const views = ram.views(table + BigInt(at), 16);
      if (!views) return undefined;
      const bytes = Buffer.concat(views);
      if (!add(bytes.readBigUInt64LE(0), bytes.readUInt32LE(8), bytes.readUInt16LE(14))) return undefined;
    }
    return chain;
  }
}
