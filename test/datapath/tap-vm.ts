/**
 * A VM whose driver does as a test tells it: it negotiates what it is told, writes any net header, gives away as many buffers
 * as it is told, and shows the headers that it gets. Its rings are polled for used chains.
 */
import { eventfdCreate, signal } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { Arena, Guest, type Window } from "../../src/driver/guest.ts";
import { PackedDriver } from "../../src/driver/packed.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import type { VirtqueueDriver } from "../../src/driver/virtqueue.ts";
import { VHOST_USER_PROTOCOL_F_MQ, VHOST_USER_PROTOCOL_F_REPLY_ACK } from "../../src/layout/vhost-user.ts";
import {
  NET_HDR_NUM_BUFFERS,
  NET_HDR_SIZE,
  NET_HDR_SIZE_LEGACY,
  RECEIVEQ,
  TRANSMITQ,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
  VIRTIO_NET_F_MRG_RXBUF,
} from "../../src/layout/virtio.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";

const bit = (number: number): bigint => 1n << BigInt(number);

export interface VmOptions {
  /** Numbers of virtio features to acknowledge, beside those that the other options stand for. */
  features?: readonly number[];
  packed?: boolean;
  mergeable?: boolean;
  /** Default: yes. Without it, and without mergeable buffers, headers have 10 bytes. */
  version1?: boolean;
  queuePairs?: number;
  ringSize?: number;
  /** Of one buffer, header included. */
  bufferBytes?: number;
}

export interface Received {
  /** As the file gave it, without the number of buffers. */
  header: Buffer;
  frame: Buffer;
  buffers: number;
}

interface Ring {
  queue: VirtqueueDriver;
  kick: number;
  buffers: Window[];
  free: number[];
  /** By chain id. */
  used: number[];
}

export class Vm implements Disposable {
  readonly frontend: Frontend;
  readonly guest = new Guest([
    { gpa: 0n, sizeBytes: 96n << 20n },
    { gpa: 1n << 32n, sizeBytes: 1n << 20n },
  ]);
  offered = 0n;
  readonly headerBytes: number;
  readonly #options: VmOptions;
  readonly #rings: Ring[];

  static async connect(path: string, options: VmOptions): Promise<Vm> {
    const vm = new Vm(path, options);
    try {
      await vm.#start();
    } catch (error) {
      vm[Symbol.dispose]();
      throw error;
    }
    return vm;
  }

  private constructor(path: string, options: VmOptions) {
    const { packed = false, mergeable = true, version1 = true } = options;
    const { queuePairs = 1, ringSize = 256, bufferBytes = 2048 } = options;
    this.#options = options;
    this.headerBytes = version1 || mergeable ? NET_HDR_SIZE : NET_HDR_SIZE_LEGACY;
    const Driver = packed ? PackedDriver : SplitDriver;
    const arena = new Arena(this.guest.window(0n, 96 << 20));
    this.#rings = Array.from({ length: 2 * queuePairs }, () => {
      const place = arena.take(Driver.layout(ringSize, false).sizeBytes, 64);
      const queue = new Driver({ ...place, size: ringSize, eventIdx: false, indirect: false });
      queue.disableInterrupts();
      const buffers = Array.from({ length: ringSize }, () => arena.take(bufferBytes, 64));
      return { queue, kick: eventfdCreate(), buffers, free: buffers.map((_, i) => i), used: [] };
    });
    this.frontend = Frontend.connect(path);
  }

  get features(): bigint {
    const { features = [], packed = false, mergeable = true, version1 = true } = this.#options;
    const bits = [VHOST_USER_F_PROTOCOL_FEATURES, ...features];
    if (packed) bits.push(VIRTIO_F_RING_PACKED);
    if (mergeable) bits.push(VIRTIO_NET_F_MRG_RXBUF);
    if (version1) bits.push(VIRTIO_F_VERSION_1);
    return bits.reduce((mask, number) => mask | bit(number), 0n);
  }

  async #start(): Promise<void> {
    this.offered = await this.frontend.getFeatures();
    await this.frontend.setProtocolFeatures(bit(VHOST_USER_PROTOCOL_F_MQ) | bit(VHOST_USER_PROTOCOL_F_REPLY_ACK));
    await this.frontend.setOwner();
    await this.frontend.setFeatures(this.features);
    await this.frontend.setMemTable(this.guest.regions);
    for (const [index, { queue }] of this.#rings.entries()) {
      await this.frontend.setVringNum(index, queue.size);
      await this.startRing(index);
      await this.frontend.setVringEnable(index, true);
    }
  }

  /** Starts a ring, at its place. @param kicked without it the relay polls */
  async startRing(index: number, kicked = true): Promise<void> {
    const { queue, kick } = this.#ring(index);
    const at = (gpa: bigint): bigint => this.guest.userAddress(gpa);
    const areas = { desc: at(queue.descGpa), avail: at(queue.availGpa), used: at(queue.usedGpa) };
    await this.frontend.setVringAddr(index, areas);
    await this.frontend.setVringBase(index, queue.base);
    await this.frontend.setVringKick(index, kicked ? kick : undefined);
  }

  /** @returns whether there was room */
  send(
    frame: Uint8Array,
    { pair = 0, header = Buffer.alloc(0) }: { pair?: number; header?: Uint8Array } = {},
  ): boolean {
    const ring = this.#ring(2 * pair + TRANSMITQ);
    this.#reclaim(ring, () => undefined);
    const slot = ring.free.pop();
    if (slot === undefined) return false;
    const bytes = bytesOf(ring.buffers[slot]!);
    bytes.fill(0, 0, this.headerBytes);
    bytes.set(header.subarray(0, this.headerBytes));
    bytes.set(frame, this.headerBytes);
    this.#add(ring, slot, this.headerBytes + frame.length, false);
    publish(ring);
    return true;
  }

  /** Frames sent that the relay still has. */
  unsent(pair = 0): number {
    const ring = this.#ring(2 * pair + TRANSMITQ);
    this.#reclaim(ring, () => undefined);
    return ring.queue.outstanding;
  }

  /** Gives the relay receive buffers, at most `count`. */
  supply(count = Number.POSITIVE_INFINITY, pair = 0): void {
    const ring = this.#ring(2 * pair + RECEIVEQ);
    for (let i = 0; i < count; i++) {
      const slot = ring.free.pop();
      if (slot === undefined) break;
      this.#add(ring, slot, ring.buffers[slot]!.sizeBytes, true);
    }
    publish(ring);
  }

  /** Takes what has arrived, and gives no buffer back. */
  receive(pair = 0): Received[] {
    const found: Received[] = [];
    let left = 0;
    this.#reclaim(this.#ring(2 * pair + RECEIVEQ), (bytes) => {
      const last = found.at(-1);
      if (left > 0 && last) {
        left--;
        last.frame = Buffer.concat([last.frame, bytes]);
        return;
      }
      if (bytes.length < this.headerBytes) throw new Error(`a buffer used with ${bytes.length} bytes`);
      const header = Buffer.from(bytes.subarray(0, NET_HDR_SIZE_LEGACY));
      const frame = Buffer.from(bytes.subarray(this.headerBytes));
      const buffers = this.headerBytes === NET_HDR_SIZE ? bytes[NET_HDR_NUM_BUFFERS]! : 1;
      left = buffers - 1;
      found.push({ header, frame, buffers });
    });
    if (left > 0) throw new Error(`${left} buffers of a frame are missing`);
    return found;
  }

  #ring(index: number): Ring {
    return this.#rings[index]!;
  }

  #add({ queue, buffers, used }: Ring, slot: number, length: number, writable: boolean): void {
    const { gpa } = buffers[slot]!;
    used[queue.addBuffer(Number(gpa & 0xffff_ffffn), Number(gpa >> 32n), length, writable)] = slot;
  }

  #reclaim(ring: Ring, take: (bytes: Uint8Array) => void): void {
    for (let id = ring.queue.pop(); id >= 0; id = ring.queue.pop()) {
      const slot = ring.used[id]!;
      ring.free.push(slot);
      take(bytesOf(ring.buffers[slot]!).subarray(0, ring.queue.usedLen));
    }
  }

  /** The VMM dies. */
  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
    for (const { kick } of this.#rings.splice(0)) close(kick);
    this.guest[Symbol.dispose]();
  }
}

function bytesOf({ buffer, byteOffset, sizeBytes }: Window): Uint8Array {
  return new Uint8Array(buffer, byteOffset, sizeBytes);
}

function publish({ queue, kick }: Ring): void {
  queue.publish();
  if (queue.needsKick()) signal(kick);
}
