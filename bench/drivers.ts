/**
 * The two drivers of a bench: one sends, one receives, both post the same buffers again and again.
 *
 * Every frame carries its number in its first bytes, written before it is posted and checked when it has arrived: the
 * cache lines of header and frame start travel as with a real driver, and a lane that loses or swaps frames fails.
 */
import { Arena } from "../src/driver/guest.ts";
import type { Window } from "../src/driver/guest.ts";
import { PackedDriver } from "../src/driver/packed.ts";
import { SplitDriver } from "../src/driver/split.ts";
import type { ChainBuffer, VirtqueueDriver } from "../src/driver/virtqueue.ts";
import { DESC_SIZE, NET_HDR_SIZE } from "../src/layout/virtio.ts";

export const RING_SIZE = 512;
const MERGED_BUFFER_BYTES = 4096;
/** Header and number of a frame. */
const START_BYTES = 16;
/** Bytes of guest memory for each end of any case. */
export const WINDOW_BYTES = 4 << 20;
/** Both ends' buffers together: what fits a second-level cache. */
const HOT_BYTES = 768 << 10;

/**
 * How frames lie in buffers. `one`: header and frame in one buffer (Linux: a linear packet); `two`: header and frame in
 * a buffer each (DPDK; Linux without ANY_LAYOUT); `indirect`: those two in an indirect table; `merged`: receive buffers of
 * 4096 bytes, as many as it takes.
 */
export type Layout = "one" | "two" | "indirect" | "merged";

export interface Plan {
  frameBytes: number;
  layout: Layout;
}

/** The forms of the sender's transmitq and the receiver's receiveq. */
export const RINGS = ["split", "packed", "split-packed", "packed-split"] as const;
export type Rings = (typeof RINGS)[number];

/** Frames under way at most: half a ring (chains of two descriptors fit as well), or what stays in the cache. */
export function framesOf({ frameBytes }: Plan): number {
  return Math.min(RING_SIZE / 2, Math.floor(HOT_BYTES / 2 / (NET_HDR_SIZE + frameBytes)));
}

export class Drivers {
  readonly #plan: Plan;
  readonly #frames: number;
  readonly #transmitq: VirtqueueDriver;
  readonly #receiveq: VirtqueueDriver;
  readonly #from: Window;
  readonly #to: Window;
  readonly #fromWords: Uint32Array;
  readonly #toWords: Uint32Array;
  readonly #fromStride: number;
  readonly #toStride: number;
  readonly #buffersPerFrame: number;
  #number: number; // of the next frame to send
  #expected = 0;
  #fromWord = 0; // where it lies, in words
  #toWord = 0;

  /** Lays the rings and posts all frames and buffers. @param source, destination windows of WINDOW_BYTES */
  constructor(plan: Plan, rings: Rings, source: Window, destination: Window) {
    this.#plan = plan;
    const frames = (this.#frames = this.#number = framesOf(plan));
    const bytes = NET_HDR_SIZE + plan.frameBytes;
    this.#buffersPerFrame = plan.layout === "merged" ? Math.ceil(bytes / MERGED_BUFFER_BYTES) : 1;
    this.#fromStride = alignUp(bytes);
    this.#toStride = plan.layout === "merged" ? this.#buffersPerFrame * MERGED_BUFFER_BYTES : alignUp(bytes);

    const fromArena = new Arena(source);
    const toArena = new Arena(destination);
    this.#transmitq = ring(fromArena, rings.startsWith("packed"));
    this.#receiveq = ring(toArena, rings.endsWith("packed"));
    this.#from = fromArena.take(frames * this.#fromStride, 4096);
    this.#to = toArena.take(frames * this.#toStride, 4096);
    this.#fromWords = wordsOf(this.#from);
    this.#toWords = wordsOf(this.#to);
    new Uint8Array(this.#from.buffer, this.#from.byteOffset, this.#from.sizeBytes).forEach(
      (_, i, all) => (all[i] = i * 31 + (i >> 8)),
    );

    const tables = fromArena.take(frames * 2 * DESC_SIZE, DESC_SIZE);
    for (let k = 0; k < frames; k++) {
      this.#writeStart((k * this.#fromStride) >> 2, k);
      const at = this.#from.gpa + BigInt(k * this.#fromStride);
      const whole = [readable(at, bytes)];
      const parts = [readable(at, NET_HDR_SIZE), readable(at + BigInt(NET_HDR_SIZE), plan.frameBytes)];
      if (plan.layout === "two") this.#transmitq.add(parts);
      else if (plan.layout === "indirect") this.#transmitq.addIndirect(parts, piece(tables, k * 2 * DESC_SIZE));
      else this.#transmitq.add(whole);
    }
    const bufferBytes = this.#toStride / this.#buffersPerFrame;
    for (let k = 0; k < frames * this.#buffersPerFrame; k++) {
      this.#receiveq.add([{ gpa: this.#to.gpa + BigInt(k * bufferBytes), len: bufferBytes, writable: true }]);
    }
    this.#receiveq.publish();
    this.#transmitq.publish();
  }

  /** The two virtqueues as they were laid, of which nothing was used yet. */
  get rings(): { transmitq: LaidRing; receiveq: LaidRing } {
    return { transmitq: laid(this.#transmitq), receiveq: laid(this.#receiveq) };
  }

  /**
   * Takes back everything that the lane used, checks what arrived, posts it again.
   * @returns frames sent
   * @throws Error if a frame is not the next
   */
  turn(): number {
    const received = this.#receiveq.recycle(RING_SIZE) / this.#buffersPerFrame;
    for (let i = 0; i < received; i++) {
      this.#checkStart(this.#toWord, this.#expected);
      this.#expected = (this.#expected + 1) | 0;
      this.#toWord += this.#toStride >> 2;
      if (this.#toWord === this.#toWords.length) this.#toWord = 0;
    }
    if (received !== 0) this.#receiveq.publish();
    const sent = this.#transmitq.recycle(RING_SIZE);
    for (let i = 0; i < sent; i++) {
      this.#writeStart(this.#fromWord, this.#number);
      this.#number = (this.#number + 1) | 0;
      this.#fromWord += this.#fromStride >> 2;
      if (this.#fromWord === this.#fromWords.length) this.#fromWord = 0;
    }
    if (sent !== 0) this.#transmitq.publish();
    return sent;
  }

  /** Compares all bytes of all frames, after all of them were carried, and wipes what turn() will not look at. @throws Error */
  verify(): void {
    for (let k = 0; k < this.#frames; k++) {
      const from = Buffer.from(
        this.#from.buffer,
        this.#from.byteOffset + k * this.#fromStride + NET_HDR_SIZE,
        this.#plan.frameBytes,
      );
      const at = this.#to.byteOffset + k * this.#toStride;
      if (!from.equals(Buffer.from(this.#to.buffer, at + NET_HDR_SIZE, this.#plan.frameBytes)))
        throw new Error(`frame ${k} differs`);
      Buffer.from(this.#to.buffer, at, this.#toStride).fill(0, START_BYTES);
    }
  }

  #writeStart(word: number, number: number): void {
    const words = this.#fromWords;
    words[word] = 0;
    words[word + 1] = 0;
    words[word + 2] = 0;
    words[word + 3] = number;
  }

  #checkStart(word: number, number: number): void {
    const buffers = this.#toWords[word + 2]! >>> 16;
    const found = this.#toWords[word + 3]! | 0;
    if (found === number && buffers === this.#buffersPerFrame) return;
    throw new Error(`frame ${found} in ${buffers} buffers arrived instead of frame ${number}`);
  }
}

/** Where a virtqueue's areas are, guest physical, and where its device begins. */
export interface LaidRing {
  descGpa: bigint;
  availGpa: bigint;
  usedGpa: bigint;
  base: number;
  packed: boolean;
}

const CACHE_LINE = 64;
const alignUp = (bytes: number): number => Math.ceil(bytes / CACHE_LINE) * CACHE_LINE;
const readable = (gpa: bigint, len: number): ChainBuffer => ({ gpa, len, writable: false });
const wordsOf = ({ buffer, byteOffset, sizeBytes }: Window) => new Uint32Array(buffer, byteOffset, sizeBytes >> 2);

function piece({ buffer, byteOffset, gpa }: Window, offset: number) {
  return { buffer, byteOffset: byteOffset + offset, gpa: gpa + BigInt(offset) };
}

function ring(arena: Arena, packed: boolean): VirtqueueDriver {
  const Driver = packed ? PackedDriver : SplitDriver;
  const place = arena.take(Driver.layout(RING_SIZE, true).sizeBytes, 4096);
  const driver = new Driver({ ...place, size: RING_SIZE, eventIdx: true, indirect: true });
  driver.disableInterrupts();
  return driver;
}

function laid(driver: VirtqueueDriver): LaidRing {
  const { descGpa, availGpa, usedGpa, lastUsed: base } = driver;
  return { descGpa, availGpa, usedGpa, base, packed: driver instanceof PackedDriver };
}
