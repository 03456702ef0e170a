/**
 * One receiveq and one transmitq of a virtio-net driver, with the buffers behind them.
 *
 * Truth: virtio 1.3, 5.1.6 (device operation). Every frame is preceded by a 12-byte header (VIRTIO_F_VERSION_1); no
 * offload is negotiated, so all of it but num_buffers is 0. A buffer is header and frame in one piece. Owned by one
 * thread. It judges the device like its virtqueues do: what no driver could accept throws DeviceError.
 */
import { signal } from "../../native/eventfd.ts";
import { NET_HDR_NUM_BUFFERS, NET_HDR_SIZE } from "../layout/virtio.ts";
import type { Arena, Window } from "./guest.ts";
import { PackedDriver } from "./packed.ts";
import { SplitDriver } from "./split.ts";
import { DeviceError } from "./virtqueue.ts";
import type { VirtqueueDriver } from "./virtqueue.ts";

export interface PairOptions {
  ringSize: number;
  /** VIRTIO_F_RING_PACKED was negotiated. */
  packed: boolean;
  /** VIRTIO_F_IN_ORDER was negotiated. */
  inOrder: boolean;
  eventIdx: boolean;
  indirect: boolean;
  /** VIRTIO_NET_F_MRG_RXBUF was negotiated: a frame may fill several receive buffers. */
  mergeable: boolean;
  /** Bytes of one receive buffer, header included. */
  receiveBufferBytes: number;
  /** The longest frame, without header. */
  frameBytesMax: number;
}

export class QueuePair {
  readonly receiveq: VirtqueueDriver;
  readonly transmitq: VirtqueueDriver;
  /** Kicks sent on both queues. */
  kicks = 0;
  /** Receive buffers that came back with nothing in them: so do those that a killed back-end had in hand. */
  emptyBuffers = 0;
  readonly #receiveKick: number;
  readonly #transmitKick: number;
  readonly #mergeable: boolean;
  readonly #receiveBuffers: Buffers;
  readonly #transmitBuffers: Buffers;
  readonly #merged: Uint8Array;

  /** Bytes of guest memory that a pair takes from its arena at most. */
  static sizeBytes({ ringSize, packed, receiveBufferBytes, frameBytesMax }: PairOptions): number {
    const ring = driverClass(packed).layout(ringSize, true).sizeBytes + CACHE_LINE;
    return 2 * ring + ringSize * (alignUp(receiveBufferBytes) + alignUp(NET_HDR_SIZE + frameBytesMax)) + 2 * CACHE_LINE;
  }

  constructor(arena: Arena, options: PairOptions, kicks: { receive: number; transmit: number }) {
    const { ringSize, eventIdx, indirect, inOrder, mergeable, receiveBufferBytes, frameBytesMax } = options;
    const Driver = driverClass(options.packed);
    const ring = (): VirtqueueDriver => {
      const place = arena.take(Driver.layout(ringSize, eventIdx).sizeBytes, CACHE_LINE);
      return new Driver({ ...place, size: ringSize, eventIdx, indirect, inOrder });
    };
    this.receiveq = ring();
    this.transmitq = ring();
    this.#receiveKick = kicks.receive;
    this.#transmitKick = kicks.transmit;
    this.#mergeable = mergeable;
    this.#receiveBuffers = new Buffers(arena, ringSize, receiveBufferBytes);
    this.#transmitBuffers = new Buffers(arena, ringSize, NET_HDR_SIZE + frameBytesMax);
    this.#merged = new Uint8Array(NET_HDR_SIZE + frameBytesMax);
    this.receiveq.disableInterrupts();
    this.transmitq.disableInterrupts();
  }

  /** Gives every free receive buffer to the device. Kicks if it asks for that. */
  fill(): void {
    while (this.#receiveBuffers.add(this.receiveq, this.#receiveBuffers.sizeBytes, true));
    this.#publish(this.receiveq, this.#receiveKick);
  }

  /** Puts a frame on the transmitq; the device sees it after flush(). @returns false if the ring is full */
  transmit(frame: Uint8Array): boolean {
    const bytes = this.#transmitBuffers.next();
    if (bytes === undefined) return false;
    bytes.set(frame, NET_HDR_SIZE);
    return this.#transmitBuffers.add(this.transmitq, NET_HDR_SIZE + frame.length, false);
  }

  /** Shows the device the frames transmitted so far, kicks if it asks for that, takes used ones back. */
  flush(): void {
    this.#publish(this.transmitq, this.#transmitKick);
    while (this.#transmitBuffers.reclaim(this.transmitq) !== undefined);
  }

  /**
   * Takes up to `limit` received frames and gives their buffers back to the device.
   * @param handle gets each frame in turn, valid until it returns
   * @returns how many
   */
  receive(limit: number, handle: (frame: Uint8Array) => void): number {
    let count = 0;
    const emptyBefore = this.emptyBuffers;
    for (; count < limit; count++) {
      const frame = this.#nextFrame();
      if (frame === undefined) break;
      handle(frame);
    }
    // Only now: a frame in one buffer is handled where it lies.
    if (count > 0 || this.emptyBuffers > emptyBefore) this.fill();
    return count;
  }

  #nextFrame(): Uint8Array | undefined {
    let first = this.#receiveBuffers.reclaim(this.receiveq);
    for (; first?.length === 0; first = this.#receiveBuffers.reclaim(this.receiveq)) this.emptyBuffers++;
    if (first === undefined) return undefined;
    if (first.length < NET_HDR_SIZE)
      throw new DeviceError(`receive buffer used with ${first.length} bytes: no whole header`);
    const buffers = first[NET_HDR_NUM_BUFFERS]! | (first[NET_HDR_NUM_BUFFERS + 1]! << 8);
    const zero = first.subarray(0, NET_HDR_NUM_BUFFERS).every((byte) => byte === 0);
    if (!zero || buffers === 0 || (buffers > 1 && !this.#mergeable)) {
      throw new DeviceError(
        `receive header ${Buffer.from(first.subarray(0, NET_HDR_SIZE)).toString("hex")}: not negotiated`,
      );
    }
    if (buffers === 1) return first.subarray(NET_HDR_SIZE);
    this.#merged.set(first);
    let length = first.length;
    for (let i = 1; i < buffers; i++) {
      const part = this.#receiveBuffers.reclaim(this.receiveq);
      // The device shows all buffers of a frame at once (5.1.6.4).
      if (part === undefined) throw new DeviceError(`a frame of ${buffers} buffers, but only ${i} were used`);
      if (length + part.length > this.#merged.length)
        throw new DeviceError(`a frame of more than ${this.#merged.length} bytes`);
      this.#merged.set(part, length);
      length += part.length;
    }
    return this.#merged.subarray(NET_HDR_SIZE, length);
  }

  #publish(queue: VirtqueueDriver, kick: number): void {
    queue.publish();
    if (!queue.needsKick()) return;
    signal(kick);
    this.kicks++;
  }
}

const driverClass = (packed: boolean) => (packed ? PackedDriver : SplitDriver);

const CACHE_LINE = 64;
const alignUp = (bytes: number): number => Math.ceil(bytes / CACHE_LINE) * CACHE_LINE;

/** Equal buffers, one for each descriptor of a ring; each is free or in one chain of its own. */
class Buffers {
  readonly sizeBytes: number;
  readonly #bytes: Uint8Array[];
  readonly #addressLow: Uint32Array;
  readonly #addressHigh: Uint32Array;
  readonly #free: number[];
  readonly #bufferOf: Uint16Array; // by chain id

  constructor(arena: Arena, count: number, sizeBytes: number) {
    const stride = alignUp(sizeBytes);
    const { buffer, byteOffset, gpa }: Window = arena.take(count * stride, CACHE_LINE);
    const addresses = Array.from({ length: count }, (_, i) => gpa + BigInt(i * stride));
    this.sizeBytes = sizeBytes;
    this.#bytes = addresses.map((_, i) => new Uint8Array(buffer, byteOffset + i * stride, sizeBytes));
    this.#addressLow = Uint32Array.from(addresses, (address) => Number(address & 0xffff_ffffn));
    this.#addressHigh = Uint32Array.from(addresses, (address) => Number(address >> 32n));
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i);
    this.#bufferOf = new Uint16Array(count);
  }

  /** The buffer that the next add() takes. */
  next(): Uint8Array | undefined {
    const buffer = this.#free.at(-1);
    return buffer === undefined ? undefined : this.#bytes[buffer];
  }

  /** Adds `len` bytes of the next free buffer to the ring. @returns false if none is free */
  add(queue: VirtqueueDriver, len: number, writable: boolean): boolean {
    const buffer = this.#free.pop();
    if (buffer === undefined) return false;
    const head = queue.addBuffer(this.#addressLow[buffer]!, this.#addressHigh[buffer]!, len, writable);
    this.#bufferOf[head] = buffer;
    return true;
  }

  /** Takes back the next used buffer. @returns what the device wrote into it, or undefined if none was used */
  reclaim(queue: VirtqueueDriver): Uint8Array | undefined {
    const head = queue.pop();
    if (head < 0) return undefined;
    const buffer = this.#bufferOf[head]!;
    this.#free.push(buffer);
    return this.#bytes[buffer]!.subarray(0, queue.usedLen);
  }
}
