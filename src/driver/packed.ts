/**
 * The driver's side of one packed virtqueue: what a guest's virtio driver does, in TypeScript.
 *
 * Truth: virtio 1.3, section 2.8 (packed virtqueues), 2.8.21 (supplying buffers and receiving used ones).
 * Like SplitDriver it judges the device: a used descriptor that no driver could accept throws DeviceError.
 *
 * The device overwrites descriptors, so the driver keeps its own copy of each outstanding one: a chain's copies are linked
 * and the index of the first is the chain's buffer id. Chains may come back in any order; ids are then no longer in
 * the order of the ring.
 *
 * One thread owns a PackedDriver; the device runs on another one. Memory order: the event areas and the flags that hand
 * descriptors over are read and written by Atomics (sequentially consistent), the rest plainly. All chains added
 * since the last publish() stand in the ring complete, but for the flags of the first descriptor of the first chain:
 * the device takes descriptors in the order of the ring, so storing these shows it all of them. Both directions of
 * notification store one word and then load another (publish flags, then read the device's event area; store the
 * driver's, then read flags): only a sequentially consistent pair makes that handshake safe.
 */
import {
  DESC_SIZE,
  PACKED_DESC_FLAGS,
  PACKED_DESC_ID,
  PACKED_EVENT_FLAGS,
  PACKED_EVENT_SIZE,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
  VRING_PACKED_DESC_F_AVAIL,
  VRING_PACKED_DESC_F_USED,
  VRING_PACKED_EVENT_FLAG_DESC,
  VRING_PACKED_EVENT_FLAG_DISABLE,
  VRING_PACKED_EVENT_FLAG_ENABLE,
  VRING_PACKED_EVENT_F_WRAP_CTR,
  VRING_SIZE_MAX,
} from "../layout/virtio.ts";
import { ChainOrder } from "./order.ts";
import {
  ADDR_WORD,
  CACHE_LINE,
  DESC_WORDS,
  DeviceError,
  LAST_WORD,
  LEN_WORD,
  NOT_OUTSTANDING,
  alignUp,
  checkChain,
  storeDescriptor,
  writableBytes,
} from "./virtqueue.ts";
import type { ChainBuffer, IndirectTable, RingLayout, RingPlace, VirtqueueDriver } from "./virtqueue.ts";

const AVAIL = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED = 1 << VRING_PACKED_DESC_F_USED;
const WRAP = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;

// In 16-bit words
const DESC_HALVES = DESC_SIZE >> 1;
const ID_HALF = PACKED_DESC_ID >> 1;
const FLAGS_HALF = PACKED_DESC_FLAGS >> 1;

/** The event areas are read and written whole: off_wrap in the low half, flags in the high one. */
const EVENT_FLAGS_SHIFT = 8 * PACKED_EVENT_FLAGS;

/** A new ring: descriptor 0, wrap counter 1. */
const FIRST_POSITION = WRAP;

export class PackedDriver implements VirtqueueDriver {
  readonly size: number;
  readonly descGpa: bigint;
  readonly availGpa: bigint;
  readonly usedGpa: bigint;
  usedLen = 0;

  readonly #eventIdx: boolean;
  readonly #indirect: boolean;
  readonly #desc: Uint32Array;
  readonly #descHalves: Uint16Array;
  readonly #driverEvent: Uint32Array;
  readonly #deviceEvent: Uint32Array;

  // Never read back from shared memory: the device could have written there.
  readonly #kept: Uint32Array; // descriptors; the last word holds flags of VRING_DESC_F_*
  readonly #nextKept: Uint16Array; // of the chain, or free
  readonly #writable: Float64Array; // writable bytes of the outstanding chain of this id, else NOT_OUTSTANDING
  readonly #chainLength: Uint16Array; // its descriptors; 1 for an id that is not outstanding
  #freeKept = 0;
  #numFree: number;

  #availIndex: number; // where the next chain goes, and AVAIL and USED there
  #availFlags: number;
  #usedIndex: number; // where the device is to use the next one, and its AVAIL and USED
  #usedFlags: number;
  #addedChains = 0; // since the last publish()
  #addedSlots = 0;
  #firstIndex = 0; // the first of them, and its flags
  #firstFlags = 0;
  #seenSlots = 0; // marked as used, from #usedIndex on; not more than 0: look again
  readonly #fence = new Int32Array(new SharedArrayBuffer(4));
  #given = 0; // chains published and not yet popped
  #slotsSinceKick = 0;
  readonly #order: ChainOrder | undefined;
  #batchLen = 0; // length in the used descriptor of the batch that is being taken, for its last chain

  /** The areas of a ring of `size` descriptors, each event area on its own cache line. */
  static layout(size: number): RingLayout {
    const avail = alignUp(DESC_SIZE * size, CACHE_LINE);
    const used = avail + CACHE_LINE;
    return { desc: 0, avail, used, sizeBytes: used + CACHE_LINE };
  }

  /**
   * Lays an empty ring over `place`; its former content is cleared.
   * @param place whose base is a position (index | wrap counter << 15), with or without the device's in the upper half
   */
  constructor(place: RingPlace) {
    const { buffer, byteOffset, gpa, size, eventIdx, indirect, base = FIRST_POSITION } = place;
    const index = base & (WRAP - 1);
    if (!Number.isInteger(size) || size < 1 || size > VRING_SIZE_MAX) {
      throw new RangeError(`a packed ring of ${size} descriptors: the size is from 1 to ${VRING_SIZE_MAX}`);
    }
    if (index >= size) throw new RangeError(`a packed ring of ${size} descriptors does not begin at ${index}`);
    const layout = PackedDriver.layout(size);
    new Uint8Array(buffer, byteOffset, layout.sizeBytes).fill(0);
    this.size = size;
    this.descGpa = gpa + BigInt(layout.desc);
    this.availGpa = gpa + BigInt(layout.avail);
    this.usedGpa = gpa + BigInt(layout.used);
    this.#eventIdx = eventIdx;
    this.#indirect = indirect;
    this.#desc = new Uint32Array(buffer, byteOffset + layout.desc, DESC_WORDS * size);
    this.#descHalves = new Uint16Array(buffer, byteOffset + layout.desc, DESC_HALVES * size);
    this.#driverEvent = new Uint32Array(buffer, byteOffset + layout.avail, PACKED_EVENT_SIZE >> 2);
    this.#deviceEvent = new Uint32Array(buffer, byteOffset + layout.used, PACKED_EVENT_SIZE >> 2);
    this.#kept = new Uint32Array(DESC_WORDS * size);
    this.#nextKept = Uint16Array.from({ length: size }, (_, i) => (i + 1) % size);
    this.#writable = new Float64Array(size).fill(NOT_OUTSTANDING);
    this.#chainLength = new Uint16Array(size).fill(1);
    this.#numFree = size;
    if (place.inOrder) this.#order = new ChainOrder(size);
    this.#availIndex = this.#usedIndex = index;
    this.#availFlags = (base & WRAP) === 0 ? USED : AVAIL;
    this.#usedFlags = (base & WRAP) === 0 ? 0 : AVAIL | USED;
    // As if the device had used everything up to here: this lap's flags in front, the last lap's behind.
    const lastFlags = this.#usedFlags ^ (AVAIL | USED);
    for (let i = 0; i < size; i++) {
      Atomics.store(this.#descHalves, i * DESC_HALVES + FLAGS_HALF, i < index ? this.#usedFlags : lastFlags);
    }
  }

  get numFree(): number {
    return this.#numFree;
  }

  get outstanding(): number {
    return this.#given + this.#addedChains;
  }

  get lastUsed(): number {
    return this.#usedIndex | (this.#usedFlags & WRAP);
  }

  /** The device's position in the upper half, the driver's in the lower one: the same. */
  get base(): number {
    return ((this.lastUsed << 16) | this.lastUsed) >>> 0;
  }

  addBuffer(addressLow: number, addressHigh: number, len: number, writable: boolean): number {
    if (this.#numFree === 0) return -1;
    const id = this.#freeKept;
    const word = id * DESC_WORDS;
    this.#kept[word + ADDR_WORD] = addressLow;
    this.#kept[word + ADDR_WORD + 1] = addressHigh;
    this.#kept[word + LEN_WORD] = len;
    this.#kept[word + LAST_WORD] = writable ? VRING_DESC_F_WRITE : 0;
    this.#freeKept = this.#nextKept[id]!;
    this.#numFree--;
    this.#writable[id] = writable ? len : 0;
    this.#makeAvailable(id, 1);
    return id;
  }

  add(chain: readonly ChainBuffer[]): number {
    checkChain(chain);
    if (chain.length > this.#numFree) return -1;
    const id = this.#freeKept;
    for (const [position, buffer] of chain.entries()) {
      const next = position + 1 < chain.length ? VRING_DESC_F_NEXT : 0;
      storeDescriptor(this.#kept, this.#freeKept, buffer, next | (buffer.writable ? VRING_DESC_F_WRITE : 0));
      this.#freeKept = this.#nextKept[this.#freeKept]!;
    }
    this.#numFree -= chain.length;
    this.#chainLength[id] = chain.length;
    this.#writable[id] = writableBytes(chain);
    this.#makeAvailable(id, chain.length);
    return id;
  }

  addIndirect(chain: readonly ChainBuffer[], table: IndirectTable): number {
    if (!this.#indirect) throw new RangeError("an indirect table on a ring without VIRTIO_F_INDIRECT_DESC");
    checkChain(chain);
    if (this.#numFree === 0) return -1;
    const words = new Uint32Array(table.buffer, table.byteOffset, chain.length * DESC_WORDS);
    for (const [index, buffer] of chain.entries()) {
      storeDescriptor(words, index, buffer, buffer.writable ? VRING_DESC_F_WRITE << 16 : 0);
    }
    const id = this.#freeKept;
    storeDescriptor(this.#kept, id, { gpa: table.gpa, len: chain.length * DESC_SIZE }, VRING_DESC_F_INDIRECT);
    this.#freeKept = this.#nextKept[id]!;
    this.#numFree--;
    this.#writable[id] = writableBytes(chain);
    this.#makeAvailable(id, 1);
    return id;
  }

  publish(): void {
    if (this.#addedChains === 0) return;
    Atomics.store(this.#descHalves, this.#firstIndex * DESC_HALVES + FLAGS_HALF, this.#firstFlags);
    this.#given += this.#addedChains;
    this.#slotsSinceKick += this.#addedSlots;
    this.#addedChains = this.#addedSlots = 0;
  }

  needsKick(): boolean {
    const slots = this.#slotsSinceKick;
    this.#slotsSinceKick = 0;
    if (slots === 0) return false;
    const event = Atomics.load(this.#deviceEvent, 0);
    const flags = event >>> EVENT_FLAGS_SHIFT;
    if (flags === VRING_PACKED_EVENT_FLAG_ENABLE) return true;
    if (flags === VRING_PACKED_EVENT_FLAG_DISABLE) return false;
    const index = event & (WRAP - 1);
    if (flags !== VRING_PACKED_EVENT_FLAG_DESC || !this.#eventIdx || index >= this.size) this.#failEvent(event);
    // Positions repeat after two laps, the first of them with wrap counter 1.
    const laps = 2 * this.size;
    const asked = index + ((event & WRAP) === 0 ? this.size : 0);
    const published = this.#availIndex + (this.#availFlags === AVAIL ? 0 : this.size) - this.#addedSlots;
    return (published - asked - 1 + 2 * laps) % laps < slots;
  }

  pop(): number {
    const id = this.#takeUsed();
    if (id < 0) return -1;
    const count = this.#chainLength[id]!;
    this.#advanceUsed(this.#usedIndex + count, 1);
    let tail = id;
    for (let i = 1; i < count; i++) tail = this.#nextKept[tail]!;
    this.#nextKept[tail] = this.#freeKept;
    this.#freeKept = id;
    this.#numFree += count;
    if (count > 1) this.#chainLength[id] = 1;
    this.#writable[id] = NOT_OUTSTANDING;
    return id;
  }

  recycle(limit: number): number {
    if (this.#order) throw new RangeError("recycle() on a ring with VIRTIO_F_IN_ORDER");
    let count = 0;
    let bytes = 0;
    while (count < limit && (this.#seenSlots > 0 || this.#look())) {
      const before = count;
      const end = this.#usedIndex + this.#seenSlots;
      let index = this.#usedIndex;
      for (; index < end && count < limit; count++) {
        const id = this.#readUsed(index);
        bytes += this.usedLen;
        index += this.#chainLength[id]!;
        this.#makeAvailable(id, this.#chainLength[id]!);
      }
      this.#advanceUsed(index, count - before);
    }
    this.usedLen = bytes;
    return count;
  }

  disableInterrupts(): void {
    Atomics.store(this.#driverEvent, 0, VRING_PACKED_EVENT_FLAG_DISABLE << EVENT_FLAGS_SHIFT);
  }

  enableInterrupts(skip = 0): boolean {
    const index = this.#usedIndex + skip;
    const wrap = this.#usedFlags & WRAP;
    const position = index < this.size ? index | wrap : (index - this.size) | (wrap ^ WRAP);
    const event = this.#eventIdx
      ? (VRING_PACKED_EVENT_FLAG_DESC << EVENT_FLAGS_SHIFT) | position
      : VRING_PACKED_EVENT_FLAG_ENABLE << EVENT_FLAGS_SHIFT;
    Atomics.store(this.#driverEvent, 0, event);
    return !this.#hasUsed();
  }

  /** Puts the kept descriptors of a chain into the ring. */
  #makeAvailable(id: number, count: number): void {
    const desc = this.#desc;
    const kept = this.#kept;
    let index = this.#availIndex;
    let from = id;
    for (let i = 0; i < count; i++) {
      const word = index * DESC_WORDS;
      const keptWord = from * DESC_WORDS;
      desc[word + ADDR_WORD] = kept[keptWord + ADDR_WORD]!;
      desc[word + ADDR_WORD + 1] = kept[keptWord + ADDR_WORD + 1]!;
      desc[word + LEN_WORD] = kept[keptWord + LEN_WORD]!;
      const flags = kept[keptWord + LAST_WORD]! | this.#availFlags;
      if (this.#addedSlots === 0) {
        this.#descHalves[index * DESC_HALVES + ID_HALF] = id;
        this.#firstIndex = index;
        this.#firstFlags = flags;
      } else desc[word + LAST_WORD] = (flags << 16) | id;
      this.#addedSlots++;
      from = this.#nextKept[from]!;
      if (++index === this.size) {
        index = 0;
        this.#availFlags ^= AVAIL | USED;
      }
    }
    this.#availIndex = index;
    this.#addedChains++;
    this.#order?.add(id);
  }

  /** The id of the next used chain, -1 if there is none; `usedLen` holds its length. */
  #takeUsed(): number {
    const order = this.#order;
    if (!order || order.left === 0) {
      if (this.#seenSlots <= 0 && !this.#look()) return -1;
      const index = this.#usedIndex;
      const id = this.#readUsed(index);
      if (!order) return id;
      if (!order.begin(id, this.#given)) this.#fail(index, `id ${id} is not of one of ${this.#given} chains in order`);
      this.#batchLen = this.usedLen;
    }
    const id = order.take();
    this.usedLen = order.left === 0 ? this.#batchLen : this.#writable[id]!;
    return id;
  }

  /** Reads the used descriptor there. @returns its id; `usedLen` holds its length */
  #readUsed(index: number): number {
    const word = index * DESC_WORDS;
    const last = this.#desc[word + LAST_WORD]!;
    const id = last & 0xffff;
    const len = (last & (VRING_DESC_F_WRITE << 16)) === 0 ? 0 : this.#desc[word + LEN_WORD]!;
    if (id >= this.size || len > this.#writable[id]!) this.#failEntry(index, id, len);
    this.usedLen = len;
    return id;
  }

  /** Goes on to `index`, which may be past the ring's end: so many chains were used. */
  #advanceUsed(index: number, chains: number): void {
    this.#given -= chains;
    if (this.#given < 0) this.#fail(this.#usedIndex, "used, but the device has no chains");
    this.#seenSlots -= index - this.#usedIndex;
    this.#usedIndex = index;
    if (index < this.size) return;
    this.#usedIndex -= this.size;
    this.#usedFlags ^= AVAIL | USED;
  }

  /** Looks which descriptors from #usedIndex on, in one piece, are marked as used. @returns whether the first one is */
  #look(): boolean {
    const halves = this.#descHalves;
    const first = this.#usedIndex;
    const flags = Atomics.load(halves, first * DESC_HALVES + FLAGS_HALF);
    const wanted = this.#usedFlags;
    if ((flags & (AVAIL | USED)) !== wanted) {
      const asGiven = (flags & (AVAIL | USED)) === (wanted ^ USED);
      if (this.#given > 0 && !asGiven) this.#fail(first, `flags 0x${flags.toString(16)} are of another lap`);
      return false;
    }
    let index = first + 1;
    while (index < this.size && (halves[index * DESC_HALVES + FLAGS_HALF]! & (AVAIL | USED)) === wanted) index++;
    this.#seenSlots = index - first;
    // An atomic load costs as much as the rest of pop(), so there is none for each descriptor. A store and a load that
    // are sequentially consistent keep the plain loads before them from those after them, on any CPU.
    if (this.#seenSlots > 1) {
      Atomics.store(this.#fence, 0, 0);
      Atomics.load(this.#fence, 0);
    }
    return true;
  }

  /** Whether pop() would find a chain. */
  #hasUsed(): boolean {
    return (this.#order?.left ?? 0) > 0 || this.#seenSlots > 0 || this.#look();
  }

  #failEntry(index: number, id: number, len: number): never {
    const writable = this.#writable[id] ?? NOT_OUTSTANDING;
    if (writable === NOT_OUTSTANDING) this.#fail(index, `id ${id} is not of an outstanding chain`);
    this.#fail(index, `len ${len} for id ${id}, whose chain has ${writable} writable bytes`);
  }

  #failEvent(event: number): never {
    const words = `off_wrap 0x${(event & 0xffff).toString(16)}, flags ${event >>> EVENT_FLAGS_SHIFT}`;
    throw new DeviceError(`device event area at gpa 0x${this.usedGpa.toString(16)}: ${words}`);
  }

  #fail(index: number, what: string): never {
    throw new DeviceError(`packed ring at gpa 0x${this.descGpa.toString(16)}, descriptor ${index}: ${what}`);
  }
}
