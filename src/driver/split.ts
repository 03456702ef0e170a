/**
 * The driver's side of one split virtqueue: what a guest's virtio driver does, in TypeScript.
 *
 * Truth: virtio 1.3, section 2.7 (split virtqueues), 2.7.13 (adding buffers), 2.7.14 (receiving used buffers).
 * It exists once and serves `npm start`, the tests, the benches and the fuzzers, so it also judges the device:
 * a used entry that no driver could accept throws DeviceError.
 *
 * One thread owns a SplitDriver; the device runs on another one. Memory order: indexes, flags and event words are
 * read and written by Atomics (sequentially consistent), everything else by plain stores and loads. A descriptor or
 * ring entry is stored before the index that publishes it, and a used entry is read after the index that
 * announced it. Both directions of notification store one word and then load another (publish avail idx, then read
 * avail_event; store used_event, then read used idx): only a sequentially consistent pair makes that handshake safe.
 */
import {
  AVAIL_ENTRY_SIZE,
  AVAIL_FLAGS,
  AVAIL_IDX,
  AVAIL_RING,
  DESC_SIZE,
  USED_ENTRY_ID,
  USED_ENTRY_LEN,
  USED_ENTRY_SIZE,
  USED_FLAGS,
  USED_IDX,
  USED_RING,
  VRING_AVAIL_F_NO_INTERRUPT,
  VRING_DESC_F_INDIRECT,
  VRING_DESC_F_NEXT,
  VRING_DESC_F_WRITE,
  VRING_SIZE_MAX,
  VRING_USED_F_NO_NOTIFY,
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

const USED_WORDS = USED_ENTRY_SIZE >> 2;
const USED_ID_WORD = (USED_RING + USED_ENTRY_ID) >> 2;
const USED_LEN_WORD = (USED_RING + USED_ENTRY_LEN) >> 2;

/** A device that honours used_event stays silent for this many entries after disableInterrupts(). */
const FAR_AHEAD = 0x8000;

export class SplitDriver implements VirtqueueDriver {
  readonly size: number;
  readonly descGpa: bigint;
  readonly availGpa: bigint;
  readonly usedGpa: bigint;
  usedLen = 0;

  readonly #eventIdx: boolean;
  readonly #indirect: boolean;
  readonly #mask: number;
  readonly #desc: Uint32Array;
  readonly #avail: Uint16Array;
  readonly #used: Uint32Array;
  readonly #usedWords: Uint16Array;
  readonly #usedEvent: number; // indexes of the two event words in #avail and #usedWords
  readonly #availEvent: number;

  // Never read back from shared memory: the device could have written there.
  readonly #nextFree: Uint16Array;
  readonly #writable: Float64Array; // writable bytes of the outstanding chain at this head, else NOT_OUTSTANDING
  readonly #chainLength: Uint16Array; // its ring descriptors; 1 for a head that is not outstanding
  #freeHead = 0;
  #numFree: number;
  #availIdx: number;
  #published: number;
  #publishedSinceKick = 0;
  #lastUsed: number;
  #usedSeen: number;
  readonly #order: ChainOrder | undefined;
  #batchLen = 0; // length in the used entry of the batch that is being taken, for its last chain

  /** The areas of a ring of `size` descriptors, used ring on its own cache line. */
  static layout(size: number, eventIdx: boolean): RingLayout {
    const eventBytes = eventIdx ? 2 : 0;
    const avail = DESC_SIZE * size;
    const used = alignUp(avail + AVAIL_RING + AVAIL_ENTRY_SIZE * size + eventBytes, CACHE_LINE);
    const sizeBytes = alignUp(used + USED_RING + USED_ENTRY_SIZE * size + eventBytes, CACHE_LINE);
    return { desc: 0, avail, used, sizeBytes };
  }

  /** Lays an empty ring over `place`; its former content is cleared. */
  constructor(place: RingPlace) {
    const { buffer, byteOffset, gpa, size, eventIdx, indirect, base = 0 } = place;
    if (size < 1 || size > VRING_SIZE_MAX || (size & (size - 1)) !== 0) {
      throw new RangeError(`a split ring of ${size} descriptors: the size is a power of two from 1 to 32768`);
    }
    const layout = SplitDriver.layout(size, eventIdx);
    new Uint8Array(buffer, byteOffset, layout.sizeBytes).fill(0);
    this.size = size;
    this.descGpa = gpa + BigInt(layout.desc);
    this.availGpa = gpa + BigInt(layout.avail);
    this.usedGpa = gpa + BigInt(layout.used);
    this.#eventIdx = eventIdx;
    this.#indirect = indirect;
    this.#mask = size - 1;
    this.#usedEvent = (AVAIL_RING + AVAIL_ENTRY_SIZE * size) >> 1;
    this.#availEvent = (USED_RING + USED_ENTRY_SIZE * size) >> 1;
    this.#desc = new Uint32Array(buffer, byteOffset + layout.desc, size * DESC_WORDS);
    this.#avail = new Uint16Array(buffer, byteOffset + layout.avail, this.#usedEvent + (eventIdx ? 1 : 0));
    this.#used = new Uint32Array(buffer, byteOffset + layout.used, (USED_RING + USED_ENTRY_SIZE * size) >> 2);
    this.#usedWords = new Uint16Array(buffer, byteOffset + layout.used, this.#availEvent + (eventIdx ? 1 : 0));
    this.#nextFree = Uint16Array.from({ length: size }, (_, i) => (i + 1) & this.#mask);
    this.#writable = new Float64Array(size).fill(NOT_OUTSTANDING);
    this.#chainLength = new Uint16Array(size).fill(1);
    this.#numFree = size;
    if (place.inOrder) this.#order = new ChainOrder(size);
    this.#availIdx = this.#published = this.#lastUsed = this.#usedSeen = base;
    Atomics.store(this.#avail, AVAIL_IDX >> 1, base);
    Atomics.store(this.#usedWords, USED_IDX >> 1, base);
    if (eventIdx) Atomics.store(this.#avail, this.#usedEvent, base);
  }

  get numFree(): number {
    return this.#numFree;
  }

  get outstanding(): number {
    return (this.#availIdx - this.#lastUsed) & 0xffff;
  }

  get lastUsed(): number {
    return this.#lastUsed;
  }

  get base(): number {
    return this.#lastUsed;
  }

  addBuffer(addressLow: number, addressHigh: number, len: number, writable: boolean): number {
    if (this.#numFree === 0) return -1;
    const head = this.#freeHead;
    const word = head * DESC_WORDS;
    this.#desc[word + ADDR_WORD] = addressLow;
    this.#desc[word + ADDR_WORD + 1] = addressHigh;
    this.#desc[word + LEN_WORD] = len;
    this.#desc[word + LAST_WORD] = writable ? VRING_DESC_F_WRITE : 0;
    this.#freeHead = this.#nextFree[head]!;
    this.#numFree--;
    this.#makeAvailable(head, writable ? len : 0);
    return head;
  }

  add(chain: readonly ChainBuffer[]): number {
    checkChain(chain);
    if (chain.length > this.#numFree) return -1;
    const head = this.#freeHead;
    let index = head;
    for (const [position, buffer] of chain.entries()) {
      const next = this.#nextFree[index]!;
      writeDescriptor(this.#desc, index, buffer, position + 1 < chain.length ? next : undefined);
      this.#freeHead = next;
      // A chain's descriptors stay linked in #nextFree, so pop() frees them as one piece.
      index = next;
    }
    this.#numFree -= chain.length;
    this.#chainLength[head] = chain.length;
    this.#makeAvailable(head, writableBytes(chain));
    return head;
  }

  addIndirect(chain: readonly ChainBuffer[], table: IndirectTable): number {
    if (!this.#indirect) throw new RangeError("an indirect table on a ring without VIRTIO_F_INDIRECT_DESC");
    checkChain(chain);
    if (this.#numFree === 0) return -1;
    const words = new Uint32Array(table.buffer, table.byteOffset, chain.length * DESC_WORDS);
    for (const [position, buffer] of chain.entries()) {
      writeDescriptor(words, position, buffer, position + 1 < chain.length ? position + 1 : undefined);
    }
    const head = this.#freeHead;
    storeDescriptor(this.#desc, head, { gpa: table.gpa, len: chain.length * DESC_SIZE }, VRING_DESC_F_INDIRECT);
    this.#freeHead = this.#nextFree[head]!;
    this.#numFree--;
    this.#makeAvailable(head, writableBytes(chain));
    return head;
  }

  publish(): void {
    Atomics.store(this.#avail, AVAIL_IDX >> 1, this.#availIdx);
    this.#publishedSinceKick += (this.#availIdx - this.#published) & 0xffff;
    this.#published = this.#availIdx;
  }

  needsKick(): boolean {
    const count = this.#publishedSinceKick;
    this.#publishedSinceKick = 0;
    if (count === 0) return false;
    if (!this.#eventIdx) return (Atomics.load(this.#usedWords, USED_FLAGS >> 1) & VRING_USED_F_NO_NOTIFY) === 0;
    if (count > 0xffff) return true; // the index went round: avail_event was certainly passed
    const event = Atomics.load(this.#usedWords, this.#availEvent);
    return ((this.#published - event - 1) & 0xffff) < count;
  }

  pop(): number {
    const head = this.#takeUsed();
    if (head < 0) return -1;
    const count = this.#chainLength[head]!;
    // In order, the free descriptors are always the next ones of the ring, linked as they were in the beginning.
    if (!this.#order) {
      let tail = head;
      for (let i = 1; i < count; i++) tail = this.#nextFree[tail]!;
      this.#nextFree[tail] = this.#freeHead;
      this.#freeHead = head;
    }
    this.#numFree += count;
    if (count > 1) this.#chainLength[head] = 1;
    this.#writable[head] = NOT_OUTSTANDING;
    this.#lastUsed = (this.#lastUsed + 1) & 0xffff;
    return head;
  }

  recycle(limit: number): number {
    if (this.#order) throw new RangeError("recycle() on a ring with VIRTIO_F_IN_ORDER");
    if (this.#lastUsed === this.#usedSeen) this.#loadUsedIdx();
    const count = Math.min(limit, (this.#usedSeen - this.#lastUsed) & 0xffff);
    const used = this.#used;
    const avail = this.#avail;
    const writable = this.#writable;
    const mask = this.#mask;
    const first = this.#lastUsed;
    const next = this.#availIdx;
    let bytes = 0;
    for (let i = 0; i < count; i++) {
      const word = ((first + i) & mask) * USED_WORDS;
      const head = used[word + USED_ID_WORD]!;
      const len = used[word + USED_LEN_WORD]!;
      if (head > mask || len > writable[head]!) this.#failEntry(head, len);
      avail[(AVAIL_RING >> 1) + ((next + i) & mask)] = head;
      bytes += len;
    }
    this.#lastUsed = (first + count) & 0xffff;
    this.#availIdx = (next + count) & 0xffff;
    this.usedLen = bytes;
    return count;
  }

  disableInterrupts(): void {
    if (this.#eventIdx) Atomics.store(this.#avail, this.#usedEvent, (this.#lastUsed + FAR_AHEAD) & 0xffff);
    else Atomics.store(this.#avail, AVAIL_FLAGS >> 1, VRING_AVAIL_F_NO_INTERRUPT);
  }

  enableInterrupts(skip = 0): boolean {
    if (this.#eventIdx) Atomics.store(this.#avail, this.#usedEvent, (this.#lastUsed + skip) & 0xffff);
    else Atomics.store(this.#avail, AVAIL_FLAGS >> 1, 0);
    this.#loadUsedIdx();
    return ((this.#usedSeen - this.#lastUsed) & 0xffff) <= (this.#eventIdx ? skip : 0);
  }

  #makeAvailable(head: number, writable: number): void {
    this.#writable[head] = writable;
    this.#avail[(AVAIL_RING >> 1) + (this.#availIdx & this.#mask)] = head;
    this.#availIdx = (this.#availIdx + 1) & 0xffff;
    this.#order?.add(head);
  }

  /** The head of the next used chain, -1 if there is none; `usedLen` holds its length. */
  #takeUsed(): number {
    if (this.#lastUsed === this.#usedSeen) this.#loadUsedIdx();
    if (this.#lastUsed === this.#usedSeen) return -1;
    const order = this.#order;
    if (!order || order.left === 0) {
      const word = (this.#lastUsed & this.#mask) * USED_WORDS;
      const head = this.#used[word + USED_ID_WORD]!;
      const len = this.#used[word + USED_LEN_WORD]!;
      if (head > this.#mask || len > this.#writable[head]!) this.#failEntry(head, len);
      this.usedLen = len;
      if (!order) return head;
      const most = (this.#usedSeen - this.#lastUsed) & 0xffff;
      if (!order.begin(head, most)) this.#fail(`id ${head} is not of one of the next ${most} chains in order`);
      this.#batchLen = len;
    }
    const head = order.take();
    this.usedLen = order.left === 0 ? this.#batchLen : this.#writable[head]!;
    return head;
  }

  #loadUsedIdx(): void {
    const idx = Atomics.load(this.#usedWords, USED_IDX >> 1);
    const fresh = (idx - this.#lastUsed) & 0xffff;
    const given = (this.#published - this.#lastUsed) & 0xffff;
    if (fresh > given) this.#fail(`idx ${idx} announces ${fresh} entries, but the device has ${given} chains`);
    this.#usedSeen = idx;
  }

  #failEntry(head: number, len: number): never {
    const writable = this.#writable[head] ?? NOT_OUTSTANDING;
    if (writable === NOT_OUTSTANDING) this.#fail(`id ${head} is not the head of an outstanding chain`);
    this.#fail(`len ${len} for head ${head}, whose chain has ${writable} writable bytes`);
  }

  #fail(what: string): never {
    throw new DeviceError(`used ring at gpa 0x${this.usedGpa.toString(16)}, entry ${this.#lastUsed}: ${what}`);
  }
}

function writeDescriptor(table: Uint32Array, index: number, buffer: ChainBuffer, next: number | undefined): void {
  const flags = buffer.writable ? VRING_DESC_F_WRITE : 0;
  storeDescriptor(table, index, buffer, next === undefined ? flags : ((next << 16) | flags | VRING_DESC_F_NEXT) >>> 0);
}
