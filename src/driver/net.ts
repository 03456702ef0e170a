/**
 * A virtio-net driver and the VMM around it, in one: a vhost-user front-end whose guest is this thread.
 *
 * It negotiates, shares the guest's memory, starts n queue pairs and then moves frames by shared memory and eventfds
 * alone. connect() is asynchronous; everything afterwards is for a thread that owns its loop and may block in wait().
 */
import { Epoll } from "../../native/epoll.ts";
import { eventfdCreate } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { ConfigError } from "../errors.ts";
import { VHOST_USER_PROTOCOL_F_MQ, VHOST_USER_PROTOCOL_F_REPLY_ACK } from "../layout/vhost-user.ts";
import {
  NET_HDR_SIZE,
  RECEIVEQ,
  TRANSMITQ,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1,
  VIRTIO_NET_F_MQ,
  VIRTIO_NET_F_MRG_RXBUF,
  VIRTIO_RING_F_EVENT_IDX,
  VIRTIO_RING_F_INDIRECT_DESC,
} from "../layout/virtio.ts";
import { Frontend } from "../vhost-user/frontend.ts";
import { Arena } from "./guest.ts";
import type { Guest } from "./guest.ts";
import { QueuePair } from "./queue-pair.ts";
import type { PairOptions } from "./queue-pair.ts";
import type { VirtqueueDriver } from "./virtqueue.ts";

const bit = (number: number): bigint => 1n << BigInt(number);

export interface NetDriverOptions {
  /** Socket on which the back-end listens. */
  path: string;
  guest: Guest;
  /** Where rings and buffers go in the guest; default: the start of its first region. */
  gpa?: bigint;
  queuePairs?: number;
  ringSize?: number;
  /** Features to use where the back-end offers them; default: all. */
  mergeable?: boolean;
  eventIdx?: boolean;
  indirect?: boolean;
  /** Features to use where the back-end offers them; default: none. */
  packed?: boolean;
  inOrder?: boolean;
  /** Bytes of a mergeable receive buffer; without mergeable buffers each holds the longest frame. */
  receiveBufferBytes?: number;
  frameBytesMax?: number;
}

export class NetDriver implements Disposable {
  readonly frontend: Frontend;
  readonly pairs: readonly QueuePair[];
  /** Virtio features in force. */
  readonly features: bigint;
  readonly #fds: readonly number[];
  readonly #epoll = new Epoll();

  /** @throws ConfigError when nobody listens; ProtocolError when the back-end refuses or lacks VIRTIO_F_VERSION_1 */
  static async connect(options: NetDriverOptions): Promise<NetDriver> {
    const frontend = Frontend.connect(options.path);
    try {
      const features = await negotiate(frontend, options);
      const driver = new NetDriver(frontend, features, options);
      try {
        await driver.#start(options.guest);
      } catch (error) {
        driver.#closeFds();
        throw error;
      }
      return driver;
    } catch (error) {
      frontend[Symbol.dispose]();
      throw error;
    }
  }

  private constructor(frontend: Frontend, features: bigint, options: NetDriverOptions) {
    const { guest, queuePairs = 1, ringSize = 256, receiveBufferBytes = 4096, frameBytesMax = 9014 } = options;
    const has = (number: number): boolean => (features & bit(number)) !== 0n;
    const mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
    const pair: PairOptions = {
      ringSize,
      packed: has(VIRTIO_F_RING_PACKED),
      inOrder: has(VIRTIO_F_IN_ORDER),
      eventIdx: has(VIRTIO_RING_F_EVENT_IDX),
      indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
      mergeable,
      receiveBufferBytes: mergeable ? receiveBufferBytes : NET_HDR_SIZE + frameBytesMax,
      frameBytesMax,
    };
    const arena = new Arena(guest.window(options.gpa ?? guest.regions[0]!.gpa, queuePairs * QueuePair.sizeBytes(pair)));
    this.frontend = frontend;
    this.features = features;
    this.#fds = Array.from({ length: 4 * queuePairs }, eventfdCreate);
    this.pairs = Array.from({ length: queuePairs }, (_, i) => {
      return new QueuePair(arena, pair, {
        receive: this.#kick(2 * i + RECEIVEQ),
        transmit: this.#kick(2 * i + TRANSMITQ),
      });
    });
  }

  /** A further fd that ends wait() when it becomes readable. */
  wakeOn(fd: number): void {
    this.#epoll.add(fd);
  }

  /**
   * Blocks this thread, without using CPU, until a frame was received, there is room to transmit (if asked for), an fd
   * of wakeOn() is readable, or the time is over.
   * @param forRoom the transmitqs are full: wait until the device has used half of one
   */
  wait(timeoutMs: number, forRoom: boolean): void {
    let idle = true;
    for (const { receiveq, transmitq } of this.pairs) {
      idle = receiveq.enableInterrupts() && idle;
      if (forRoom) idle = transmitq.enableInterrupts(transmitq.outstanding >> 1) && idle;
    }
    if (idle) this.#epoll.wait(timeoutMs);
    for (const { receiveq, transmitq } of this.pairs) {
      receiveq.disableInterrupts();
      transmitq.disableInterrupts();
    }
  }

  /** Disconnects; the back-end stops the rings. */
  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
    this.#closeFds();
  }

  #kick(queue: number): number {
    return this.#fds[2 * queue]!;
  }

  #call(queue: number): number {
    return this.#fds[2 * queue + 1]!;
  }

  #closeFds(): void {
    this.#epoll.close();
    this.#fds.forEach(close);
  }

  async #start(guest: Guest): Promise<void> {
    await this.frontend.setMemTable(guest.regions);
    const queues = this.pairs.flatMap(({ receiveq, transmitq }) => [receiveq, transmitq]);
    for (const [index, queue] of queues.entries()) await this.#startQueue(guest, index, queue);
    if ((this.features & bit(VHOST_USER_F_PROTOCOL_FEATURES)) !== 0n) {
      for (const index of queues.keys()) await this.frontend.setVringEnable(index, true);
    }
    for (const pair of this.pairs) pair.fill();
  }

  async #startQueue(guest: Guest, index: number, queue: VirtqueueDriver): Promise<void> {
    const areas = {
      desc: guest.userAddress(queue.descGpa),
      avail: guest.userAddress(queue.availGpa),
      used: guest.userAddress(queue.usedGpa),
    };
    this.#epoll.add(this.#call(index));
    await this.frontend.setVringNum(index, queue.size);
    await this.frontend.setVringBase(index, queue.base);
    await this.frontend.setVringAddr(index, areas);
    await this.frontend.setVringKick(index, this.#kick(index));
    await this.frontend.setVringCall(index, this.#call(index));
  }
}

async function negotiate(frontend: Frontend, options: NetDriverOptions): Promise<bigint> {
  const { path, queuePairs = 1, mergeable = true, eventIdx = true, indirect = true } = options;
  const { packed = false, inOrder = false } = options;
  const offered = await frontend.getFeatures();
  if ((offered & bit(VIRTIO_F_VERSION_1)) === 0n) {
    throw new ConfigError(
      `the back-end on ${path} offers features 0x${offered.toString(16)}, without VIRTIO_F_VERSION_1`,
    );
  }
  if ((offered & bit(VHOST_USER_F_PROTOCOL_FEATURES)) !== 0n) {
    const protocol = bit(VHOST_USER_PROTOCOL_F_MQ) | bit(VHOST_USER_PROTOCOL_F_REPLY_ACK);
    await frontend.setProtocolFeatures((await frontend.getProtocolFeatures()) & protocol);
  }
  await frontend.setOwner();
  let wanted = bit(VIRTIO_F_VERSION_1) | bit(VHOST_USER_F_PROTOCOL_FEATURES);
  if (mergeable) wanted |= bit(VIRTIO_NET_F_MRG_RXBUF);
  if (eventIdx) wanted |= bit(VIRTIO_RING_F_EVENT_IDX);
  if (indirect) wanted |= bit(VIRTIO_RING_F_INDIRECT_DESC);
  if (packed) wanted |= bit(VIRTIO_F_RING_PACKED);
  if (inOrder) wanted |= bit(VIRTIO_F_IN_ORDER);
  if (queuePairs > 1) wanted |= bit(VIRTIO_NET_F_MQ);
  const features = offered & wanted;
  await frontend.setFeatures(features);
  return features;
}
