/**
 * A split virtqueue's device side, as plainly as the specification words it: no batching, no state but two indexes.
 * One thread, so it needs no memory ordering. Truth: virtio 1.3, section 2.7.
 */
import { USED_FLAGS, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE } from "../../src/layout/virtio.ts";
import { SplitDriver } from "../../src/driver/split.ts";

export interface TakenChain {
  head: number;
  buffers: { gpa: bigint; len: number; writable: boolean }[];
}

export class PlainDevice {
  availIdx: number;
  usedIdx: number;
  readonly #view: DataView;
  readonly #gpa: bigint;
  readonly #size: number;
  readonly #avail: number;
  readonly #used: number;

  /** @param memory guest memory whose first byte has address `gpa`; the ring lies at its start */
  constructor(memory: ArrayBufferLike, gpa: bigint, size: number, eventIdx: boolean, base = 0) {
    const layout = SplitDriver.layout(size, eventIdx);
    this.#view = new DataView(memory);
    this.#gpa = gpa;
    this.#size = size;
    this.#avail = layout.avail;
    this.#used = layout.used;
    this.availIdx = this.usedIdx = base;
  }

  /** The next available chain, or undefined. */
  take(): TakenChain | undefined {
    if (this.#view.getUint16(this.#avail + 2, true) === this.availIdx) return undefined;
    const head = this.#view.getUint16(this.#avail + 4 + 2 * (this.availIdx % this.#size), true);
    this.availIdx = (this.availIdx + 1) & 0xffff;
    const buffers: TakenChain["buffers"] = [];
    let table = 0;
    let index = head;
    for (;;) {
      const at = table + 16 * index;
      const gpa = this.#view.getBigUint64(at, true);
      const len = this.#view.getUint32(at + 8, true);
      const flags = this.#view.getUint16(at + 12, true);
      if (flags & VRING_DESC_F_INDIRECT) {
        table = Number(gpa - this.#gpa);
        index = 0;
        continue;
      }
      buffers.push({ gpa, len, writable: (flags & VRING_DESC_F_WRITE) !== 0 });
      if (!(flags & VRING_DESC_F_NEXT)) return { head, buffers };
      index = this.#view.getUint16(at + 14, true);
    }
  }

  /** Gives a chain back. */
  use(id: number, len: number): void {
    const at = this.#used + 4 + 8 * (this.usedIdx % this.#size);
    this.#view.setUint32(at, id, true);
    this.#view.setUint32(at + 4, len, true);
    this.setUsedIdx((this.usedIdx + 1) & 0xffff);
  }

  setUsedIdx(idx: number): void {
    this.usedIdx = idx;
    this.#view.setUint16(this.#used + 2, idx, true);
  }

  setNoNotify(flags: number): void {
    this.#view.setUint16(this.#used + USED_FLAGS, flags, true);
  }

  setAvailEvent(idx: number): void {
    this.#view.setUint16(this.#used + 4 + 8 * this.#size, idx, true);
  }

  get availFlags(): number {
    return this.#view.getUint16(this.#avail, true);
  }

  get usedEvent(): number {
    return this.#view.getUint16(this.#avail + 4 + 2 * this.#size, true);
  }
}
