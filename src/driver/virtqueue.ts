/**
 * What the driver's side of a split and of a packed virtqueue have in common: chains, places, and the judgement of devices.
 *
 * Truth: virtio 1.3, section 2.6 (virtqueues), 2.7.4 and 2.8.6 (descriptors).
 */
import { RelayError } from "../errors.ts";
import { DESC_ADDR, DESC_LEN, DESC_SIZE } from "../layout/virtio.ts";

/** The device broke the virtqueue: it holds something no driver can accept. */
export class DeviceError extends RelayError {
  readonly code = "DEVICE";
}

/** One buffer of a descriptor chain, by guest physical address. */
export interface ChainBuffer {
  gpa: bigint;
  len: number;
  writable: boolean;
}

/** Driver memory for one indirect table: 16 bytes a descriptor, aligned to 16. */
export interface IndirectTable {
  buffer: ArrayBufferLike;
  byteOffset: number;
  gpa: bigint;
}

/** Where a ring lies, and what was negotiated for it. */
export interface RingPlace {
  buffer: ArrayBufferLike;
  /** First byte of the ring in `buffer`; a multiple of 64 keeps the areas on cache lines of their own. */
  byteOffset: number;
  /** Guest physical address of that byte. */
  gpa: bigint;
  /** Descriptors, up to 32768; in a split ring a power of two. */
  size: number;
  /** VIRTIO_F_EVENT_IDX was negotiated. */
  eventIdx: boolean;
  /** VIRTIO_F_INDIRECT_DESC was negotiated. */
  indirect: boolean;
  /** VIRTIO_F_IN_ORDER was negotiated; default: no. */
  inOrder?: boolean;
  /** Where to begin: what GET_VRING_BASE of an emptied ring returned. Default: as a new ring does. */
  base?: number;
}

/** Byte offsets of the three areas from the start of the ring, and the bytes they take together. */
export interface RingLayout {
  desc: number;
  avail: number;
  used: number;
  sizeBytes: number;
}

/** The driver's side of one virtqueue, split or packed; one thread owns it, the device runs on another one. */
export interface VirtqueueDriver {
  readonly size: number;
  /** Addresses for SET_VRING_ADDR, guest physical; of a packed ring: descriptors, driver event, device event area. */
  readonly descGpa: bigint;
  readonly availGpa: bigint;
  readonly usedGpa: bigint;
  /** Bytes the device wrote into what the last pop() or recycle() took back. */
  readonly usedLen: number;
  /** Free descriptors. */
  readonly numFree: number;
  /** Chains added and not yet popped. */
  readonly outstanding: number;
  /** Up to where chains were popped: the used index, in a packed ring the position (index | wrap counter << 15). */
  readonly lastUsed: number;
  /** The same as SET_VRING_BASE has it: where a device goes on that used nothing but what was popped. */
  readonly base: number;

  /**
   * Adds a chain of one buffer; allocates nothing. Seen by the device after publish().
   * @param addressLow, addressHigh the halves of its guest physical address
   * @returns the chain's id, less than `size`, or -1 if the ring is full
   */
  addBuffer(addressLow: number, addressHigh: number, len: number, writable: boolean): number;

  /**
   * Adds a chain of buffers, one ring descriptor each.
   * @returns the chain's id, or -1 if too few descriptors are free
   */
  add(chain: readonly ChainBuffer[]): number;

  /**
   * Adds a chain through an indirect table: one ring descriptor whatever the chain's length.
   * The table belongs to the device until pop() returns the id.
   * @returns the chain's id, or -1 if the ring is full
   */
  addIndirect(chain: readonly ChainBuffer[], table: IndirectTable): number;

  /** Shows the device every chain added so far, by one store. */
  publish(): void;

  /** Whether the device asked to be kicked for what was published since the last call. */
  needsKick(): boolean;

  /**
   * Takes back the next used chain; allocates nothing. `usedLen` then holds the bytes the device wrote.
   * @returns the chain's id, or -1 if no more was used
   * @throws DeviceError if the device broke the ring
   */
  pop(): number;

  /**
   * Takes back up to `limit` used chains and makes each available again as it is: same descriptors, same buffers.
   * A bench posts and reaps through this alone. Allocates nothing; seen by the device after publish(). Not for a ring
   * whose descriptors are used in order: this would not.
   * @returns how many; `usedLen` then holds the bytes the device wrote into all of them
   * @throws DeviceError if the device broke the ring, which is of no further use then
   */
  recycle(limit: number): number;

  /** Asks the device not to interrupt. It may still do so now and then: in a split ring with event indexes, once in 65536 entries. */
  disableInterrupts(): void;

  /**
   * Asks the device to interrupt when it uses the next chain, or with event indexes after letting `skip` chains pass; in
   * a packed ring, which counts descriptors, sooner where chains have several of them.
   * @param skip less than outstanding, or the interrupt may never come
   * @returns whether the caller may sleep; false if that many were used before the device could know (of a packed ring:
   * if any was), so pop() first
   */
  enableInterrupts(skip?: number): boolean;
}

export const CACHE_LINE = 64;
export const DESC_WORDS = DESC_SIZE >> 2;
export const ADDR_WORD = DESC_ADDR >> 2;
export const LEN_WORD = DESC_LEN >> 2;
/** A split descriptor's flags and next, a packed one's id and flags. */
export const LAST_WORD = DESC_WORDS - 1;

/** In place of a chain's writable bytes; less than any used length, so one comparison finds a stray id and too long a write. */
export const NOT_OUTSTANDING = -1;

export const alignUp = (value: number, alignment: number): number => Math.ceil(value / alignment) * alignment;

/** Fails unless readable buffers come before writable ones and there is at least one (virtio 1.3, 2.7.4.2). */
export function checkChain(chain: readonly ChainBuffer[]): void {
  const firstWritable = chain.findIndex((buffer) => buffer.writable);
  const disordered = firstWritable >= 0 && chain.slice(firstWritable).some((buffer) => !buffer.writable);
  if (chain.length === 0 || disordered) {
    throw new RangeError("a chain is one or more buffers, the device-readable ones first");
  }
}

/** Bytes the device may write into a chain. */
export function writableBytes(chain: readonly ChainBuffer[]): number {
  return chain.reduce((sum, buffer) => sum + (buffer.writable ? buffer.len : 0), 0);
}

/** Stores a descriptor: address, length and a last word that is the caller's. */
export function storeDescriptor(
  table: Uint32Array,
  index: number,
  { gpa, len }: { gpa: bigint; len: number },
  last: number,
): void {
  const word = index * DESC_WORDS;
  table[word + ADDR_WORD] = Number(gpa & 0xffff_ffffn);
  table[word + ADDR_WORD + 1] = Number(gpa >> 32n);
  table[word + LEN_WORD] = len;
  table[word + LAST_WORD] = last;
}
