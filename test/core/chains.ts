/** Well-behaved driving of a rig: chains of any legal shape through a ring's driver, frames that know their number. */
import { PackedDriver } from "../../src/driver/packed.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import type { VirtqueueDriver } from "../../src/driver/virtqueue.ts";
import type { Ram, Ring } from "./rig.ts";

/** How the bytes of a chain are spread over its descriptors. */
export interface Shape {
  /** Descriptors of one byte in front. */
  ones: number;
  /** Weights of the descriptors behind them, at least one. */
  cuts: readonly number[];
  /** Positions of additional descriptors of no bytes. */
  zeros: readonly number[];
  /** As many descriptors as the ring has (small rings), the surplus empty. */
  full: boolean;
  indirect: boolean;
  /** Bytes left free in front of every buffer and the table: odd addresses. */
  gap: number;
}

/** Guest memory for buffers, handed out in order; taken back all at once. */
export class Bump {
  readonly #ram: Ram;
  readonly #from: number;
  readonly #to: number;
  #at: number;

  /** @param from, to offsets in ram.bytes */
  constructor(ram: Ram, from: number, to = ram.bytes.length) {
    this.#ram = ram;
    this.#from = this.#at = from;
    this.#to = to;
  }

  reset(): void {
    this.#at = this.#from;
  }

  /** A stretch of RAM without a hole; undefined when there is none left. */
  take(length: number, gap: number): bigint | undefined {
    for (let at = this.#at + gap; at + length <= this.#to;) {
      const hole = this.#holeAfter(at);
      if (at + length <= hole) {
        this.#at = at + length;
        return at < this.#to ? this.#ram.gpa(at) : 0n;
      }
      at = hole + gap;
    }
    return undefined;
  }

  /** Offset where the guest physical addresses after `at` stop being contiguous. */
  #holeAfter(at: number): number {
    const { regions } = this.#ram;
    let i = regions.findLastIndex((region) => region.start <= at);
    while (i + 1 < regions.length && regions[i]!.gpa + BigInt(regions[i]!.sizeBytes) === regions[i + 1]!.gpa) i++;
    return regions[i]!.start + regions[i]!.sizeBytes;
  }
}

/** One virtqueue's driver, and where its outstanding chains lie. */
export class ChainDriver {
  readonly queue: VirtqueueDriver;
  readonly #ram: Ram;
  readonly #ring: Ring;
  readonly #buffers: Bump;
  readonly #chains = new Map<number, { gpa: bigint; len: number }[]>();

  constructor(ram: Ram, ring: Ring, buffers: Bump) {
    const { packed, size, desc: gpa, eventIdx, indirect, base } = ring;
    const place = { buffer: ram.bytes.buffer, byteOffset: ram.at(gpa), gpa, size, eventIdx, indirect, base };
    this.queue = packed ? new PackedDriver(place) : new SplitDriver(place);
    this.#ram = ram;
    this.#ring = ring;
    this.#buffers = buffers;
  }

  /** Adds a chain of `length` bytes, holding `content` if it is to be read. @returns false if there is no room */
  add(length: number, shape: Shape, content?: Uint8Array): boolean {
    const limit = shape.indirect && this.#ring.indirect ? this.#ring.size : this.queue.numFree;
    if (this.queue.numFree === 0) return false;
    const chain: { gpa: bigint; len: number; writable: boolean }[] = [];
    for (const len of cut(length, shape, limit)) {
      const gpa = this.#buffers.take(len, shape.gap);
      if (gpa === undefined) return false;
      chain.push({ gpa, len, writable: content === undefined });
    }
    const head = shape.indirect && this.#ring.indirect ? this.#addIndirect(chain, shape.gap) : this.queue.add(chain);
    if (head < 0) return false;
    let done = 0;
    for (const { gpa, len } of content && length > 0 ? chain : []) {
      if (len > 0) this.#ram.slice(gpa, len).set(content!.subarray(done, done + len));
      done += len;
    }
    this.#chains.set(head, chain);
    return true;
  }

  /** Takes back one used chain. @returns what was written to it; undefined if there is none */
  reap(): Uint8Array | undefined {
    const head = this.queue.pop();
    if (head < 0) return undefined;
    const parts = this.#chains
      .get(head)!
      .filter(({ len }) => len > 0)
      .map(({ gpa, len }) => this.#ram.slice(gpa, len));
    const bytes = Buffer.concat(parts).subarray(0, this.queue.usedLen);
    if (this.queue.outstanding === 0) this.#buffers.reset();
    return bytes;
  }

  /** The driver library wants aligned tables; the specification does not. So the table is moved. */
  #addIndirect(chain: { gpa: bigint; len: number; writable: boolean }[], gap: number): number {
    const buffer = new ArrayBuffer(16 * chain.length);
    const gpa = this.#buffers.take(buffer.byteLength, gap);
    if (gpa === undefined) return -1;
    const head = this.queue.addIndirect(chain, { buffer, byteOffset: 0, gpa });
    this.#ram.slice(gpa, buffer.byteLength).set(new Uint8Array(buffer));
    return head;
  }
}

/** Lengths of at least one and at most `limit` descriptors, together `total`. */
export function cut(total: number, { ones, cuts, zeros, full }: Shape, limit: number): number[] {
  const lengths: number[] = Array.from({ length: Math.min(ones, total, limit - 1) }, () => 1);
  const rest = total - lengths.length;
  const parts = cuts.slice(0, limit - lengths.length);
  const sum = parts.reduce((a, b) => a + b, 0);
  let done = 0;
  for (const [i, weight] of parts.entries()) {
    const part = i + 1 === parts.length ? rest - done : Math.floor((rest * weight) / sum);
    lengths.push(part);
    done += part;
  }
  for (const position of zeros.slice(0, limit - lengths.length)) lengths.splice(position % (lengths.length + 1), 0, 0);
  while (full && limit <= 256 && lengths.length < limit) lengths.push(0);
  return lengths;
}

/** Frame number `sequence`: carries its number, and no two bytes nearby repeat. */
export function frameOf(sequence: number, length: number): Uint8Array {
  const frame = new Uint8Array(length);
  let state = (sequence * 2_654_435_761 + 12_345) >>> 0;
  for (let i = 0; i < length; i++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    frame[i] = state >>> 24;
  }
  if (length >= 4) new DataView(frame.buffer).setUint32(0, sequence, true);
  return frame;
}
