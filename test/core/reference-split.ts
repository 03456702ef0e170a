/** The split virtqueue of the reference (virtio 1.3, 2.7). */
import { type Chain, type Offered, type ReferenceQueue, append } from "./reference-queue.ts";
import type { ReferenceRam } from "./reference-ram.ts";
import type { Ring } from "./rig.ts";

export class ReferenceSplit implements ReferenceQueue {
  readonly ring: Ring;
  broken = false;
  next: number;
  readonly #writable: boolean;
  /** Undefined: just started, the used index is in guest memory. */
  #nextUsed: number | undefined;
  /** Used index at the last decision about a call. */
  #decided = 0;

  constructor(ring: Ring, writable: boolean, base: number) {
    this.ring = ring;
    this.#writable = writable;
    this.next = base;
  }

  begin(ram: ReferenceRam): void {
    if (this.#nextUsed !== undefined) return;
    this.#nextUsed = this.#decided = ram.u16(this.ring.used + 2n);
    this.suppressKicks(ram);
  }

  isOverrun(ram: ReferenceRam): boolean {
    return distance(this.next, this.#availIndex(ram)) > this.ring.size;
  }

  look(ram: ReferenceRam, position: number): Offered | "none" | "broken" {
    if (this.isOverrun(ram)) return "broken";
    if (!this.hasChain(ram, position)) return "none";
    const { ring } = this;
    const head = ram.u16(ring.avail + 4n + 2n * BigInt(position % ring.size));
    if (head >= ring.size) return "broken";
    return {
      chain: readChain(ram, ring, head, this.#writable),
      next: (position + 1) & 0xffff,
      slots: 1,
      giveBack: (written) => this.#giveBack(ram, head, written),
    };
  }

  hasChain(ram: ReferenceRam, position: number): boolean {
    return position !== this.#availIndex(ram);
  }

  publish(ram: ReferenceRam): void {
    if (this.#nextUsed !== this.#decided) ram.setU16(this.ring.used + 2n, this.#nextUsed!);
  }

  decideCall(ram: ReferenceRam): boolean | undefined {
    const { ring } = this;
    const [before, now] = [this.#decided, this.#nextUsed!];
    if (before === now) return undefined;
    this.#decided = now;
    if (!ring.eventIdx) return (ram.u16(ring.avail) & 1) === 0;
    // 2.7.7.2: call if the entry that used_event names is one of the new ones
    const usedEvent = ram.u16(ring.avail + 4n + 2n * BigInt(ring.size));
    return distance(before, usedEvent) < distance(before, now);
  }

  requestKick(ram: ReferenceRam, position: number): void {
    const { used, size, eventIdx } = this.ring;
    if (eventIdx) ram.setU16(used + 4n + 8n * BigInt(size), position);
    else ram.setU16(used, 0);
  }

  suppressKicks(ram: ReferenceRam): void {
    if (!this.ring.eventIdx) ram.setU16(this.ring.used, 1);
  }

  #availIndex(ram: ReferenceRam): number {
    return ram.u16(this.ring.avail + 2n);
  }

  #giveBack(ram: ReferenceRam, head: number, written: number): void {
    const entry = this.ring.used + 4n + 8n * BigInt(this.#nextUsed! % this.ring.size);
    ram.setU32(entry, head);
    ram.setU32(entry + 4n, written);
    this.#nextUsed = (this.#nextUsed! + 1) & 0xffff;
    this.next = (this.next + 1) & 0xffff;
  }
}

/** How far a free-running 16-bit index went. */
function distance(from: number, to: number): number {
  return (to - from) & 0xffff;
}

/**
 * The buffers of a chain (2.7.5, 2.7.7): at most as many as the ring has descriptors, all in RAM, all of one direction,
 * at most one indirect table, which ends the ring's part of the chain. Undefined if it breaks a rule.
 */
function readChain(ram: ReferenceRam, ring: Ring, head: number, writable: boolean): Chain | undefined {
  let table = { gpa: ring.desc, entries: ring.size, indirect: false };
  let index = head;
  const chain: Chain = { views: [], length: 0 };
  for (let buffers = 0; buffers < ring.size;) {
    const at = table.gpa + 16n * BigInt(index);
    const views = ram.views(at, 16);
    if (!views) return undefined;
    const bytes = Buffer.concat(views);
    const [gpa, length] = [bytes.readBigUInt64LE(0), bytes.readUInt32LE(8)];
    const [flags, next] = [bytes.readUInt16LE(12), bytes.readUInt16LE(14)];
    const [hasNext, isWritable, isIndirect] = [(flags & 1) !== 0, (flags & 2) !== 0, (flags & 4) !== 0];
    if (isIndirect) {
      if (table.indirect || hasNext || !ring.indirect || length === 0 || length % 16 !== 0) return undefined;
      table = { gpa, entries: length / 16, indirect: true };
      index = 0;
      continue;
    }
    if (isWritable !== writable || !append(ram, chain, gpa, length)) return undefined;
    if (!hasNext) return chain;
    if (next >= table.entries) return undefined;
    index = next;
    buffers++;
  }
  return undefined;
}
