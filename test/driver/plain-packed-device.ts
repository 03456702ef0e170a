/**
 * A packed virtqueue's device side, as plainly as the specification words it: one descriptor after the other, no batching.
 * One thread, so it needs no memory ordering. Truth: virtio 1.3, section 2.8.
 */
import { PackedDriver } from "../../src/driver/packed.ts";
import { VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE } from "../../src/layout/virtio.ts";
import type { TakenChain } from "./plain-device.ts";

const F_AVAIL = 0x80;
const F_USED = 0x8000;

/** A descriptor in the ring and the lap it is in. */
export interface Position {
  index: number;
  wrap: boolean;
}

export class PlainPackedDevice {
  readonly avail: Position;
  readonly used: Position;
  /** Whether use() sets the used bit of all descriptors that it passes, as it may. */
  marksEvery = false;
  readonly #view: DataView;
  readonly #gpa: bigint;
  readonly #size: number;
  readonly #driverEvent: number;
  readonly #deviceEvent: number;
  readonly #lengths = new Map<number, number>(); // descriptors of the chains taken, by id

  /** @param memory guest memory whose first byte has address `gpa`; the ring lies at its start */
  constructor(memory: ArrayBufferLike, gpa: bigint, size: number, base = 0x8000) {
    const layout = PackedDriver.layout(size);
    this.#view = new DataView(memory);
    this.#gpa = gpa;
    this.#size = size;
    this.#driverEvent = layout.avail;
    this.#deviceEvent = layout.used;
    this.avail = { index: base & 0x7fff, wrap: (base & 0x8000) !== 0 };
    this.used = { ...this.avail };
  }

  /** The next available chain, or undefined. */
  take(): TakenChain | undefined {
    const buffers: TakenChain["buffers"] = [];
    for (let count = 1; ; count++) {
      const { index, wrap } = this.avail;
      const flags = this.flags(index);
      const available = ((flags & F_AVAIL) !== 0) === wrap && ((flags & F_USED) !== 0) !== wrap;
      if (!available && count === 1) return undefined;
      if (!available) throw new Error(`descriptor ${index} of a chain is not available: flags ${flags}`);
      const gpa = this.#view.getBigUint64(16 * index, true);
      const len = this.#view.getUint32(16 * index + 8, true);
      const id = this.#view.getUint16(16 * index + 12, true);
      this.#advance(this.avail, 1);
      if (flags & VRING_DESC_F_INDIRECT) {
        for (let entry = 0; entry < len / 16; entry++) buffers.push(this.#entry(Number(gpa - this.#gpa) + 16 * entry));
      } else buffers.push({ gpa, len, writable: (flags & VRING_DESC_F_WRITE) !== 0 });
      if (flags & VRING_DESC_F_NEXT) continue;
      this.#lengths.set(id, count);
      return { head: id, buffers };
    }
  }

  /** Gives a chain back, in any order. @param slots descriptors to go on by, if not those of the chain taken */
  use(id: number, len: number, slots = this.#lengths.get(id) ?? 1): void {
    const { index, wrap } = this.used;
    this.#view.setUint32(16 * index + 8, len, true);
    this.#view.setUint16(16 * index + 12, id, true);
    this.setFlags(index, (len > 0 ? VRING_DESC_F_WRITE : 0) | (wrap ? F_AVAIL | F_USED : 0));
    this.#advance(this.used, 1);
    for (let i = 1; i < slots; i++) {
      const { index: at, wrap: lap } = this.used;
      if (this.marksEvery) this.setFlags(at, (this.flags(at) & ~F_USED) | (lap ? F_USED : 0));
      this.#advance(this.used, 1);
    }
  }

  flags(index: number): number {
    return this.#view.getUint16(16 * index + 14, true);
  }

  setFlags(index: number, flags: number): void {
    this.#view.setUint16(16 * index + 14, flags, true);
  }

  /** The device event area: when it wants to be kicked. */
  setEvent(flags: number, offWrap = 0): void {
    this.#view.setUint16(this.#deviceEvent, offWrap, true);
    this.#view.setUint16(this.#deviceEvent + 2, flags, true);
  }

  /** The driver event area: when it wants to be called. */
  get driverEvent(): { flags: number; offWrap: number } {
    return {
      offWrap: this.#view.getUint16(this.#driverEvent, true),
      flags: this.#view.getUint16(this.#driverEvent + 2, true),
    };
  }

  #entry(at: number): TakenChain["buffers"][number] {
    const writable = (this.#view.getUint16(at + 14, true) & VRING_DESC_F_WRITE) !== 0;
    return { gpa: this.#view.getBigUint64(at, true), len: this.#view.getUint32(at + 8, true), writable };
  }

  #advance(position: Position, slots: number): void {
    position.index += slots;
    if (position.index < this.#size) return;
    position.index -= this.#size;
    position.wrap = !position.wrap;
  }
}
