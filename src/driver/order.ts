/**
 * Chains in the order in which they were made available, for a ring on which VIRTIO_F_IN_ORDER was negotiated.
 *
 * Truth: virtio 1.3, 2.7.9 and 2.8.8 (in-order use of descriptors). The device may write one used entry for a batch: with
 * the id of its last chain, where the entry of its first one would be. All chains before the last count as used whole.
 */
export class ChainOrder {
  /** Chains used, by the entry last read, that are still to be taken. */
  left = 0;
  readonly #ids: Uint16Array;
  #first = 0;
  #count = 0;

  /** @param size of the ring: chains it can hold */
  constructor(size: number) {
    this.#ids = new Uint16Array(size);
  }

  /** A chain is made available. */
  add(id: number): void {
    this.#ids[(this.#first + this.#count++) % this.#ids.length] = id;
  }

  /**
   * A used entry was read: the chains up to that of this id are `left` to be taken.
   * @param most how many the device can have used
   * @returns whether it is one of those
   */
  begin(id: number, most: number): boolean {
    for (let i = 0; i < most; i++) {
      if (this.#ids[(this.#first + i) % this.#ids.length] !== id) continue;
      this.left = i + 1;
      return true;
    }
    return false;
  }

  /** The next chain of those `left`. */
  take(): number {
    const id = this.#ids[this.#first]!;
    this.#first = (this.#first + 1) % this.#ids.length;
    this.#count--;
    this.left--;
    return id;
  }
}
