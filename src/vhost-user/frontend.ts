/**
 * The front-end's side of the protocol: what a VMM does, for tests, benches, examples and the built-in drivers.
 *
 * Truth: QEMU docs/interop/vhost-user.rst. Calls may overlap: they are sent one after the other. With REPLY_ACK
 * negotiated every call waits for its acknowledgement, without it a call that has no reply ends once it is sent.
 * Fds that are passed stay the caller's.
 */
import { connect } from "../../native/socket.ts";
import { ConfigError, ProtocolError } from "../errors.ts";
import * as L from "../layout/vhost-user.ts";
import type { Areas } from "./areas.ts";
import {
  closeFds,
  decodeInflight,
  decodeU64,
  decodeVringState,
  encodeConfig,
  encodeInflight,
  encodeMemTable,
  encodeMessage,
  encodeSingleRegion,
  encodeU64,
  encodeVringAddress,
  encodeVringState,
} from "./codec.ts";
import type { ConfigRange, InflightRecord, Message, RegionRecord } from "./codec.ts";
import { Connection } from "./connection.ts";

const REPLY_TIMEOUT_MS = 30_000;
const NOTHING = Buffer.alloc(0);

export class Frontend implements Disposable {
  readonly #connection: Connection;
  #protocolFeatures = 0n;
  #turn: Promise<unknown> = Promise.resolve();

  /** @param fd a connected socket, owned from now on */
  constructor(fd: number) {
    this.#connection = new Connection(fd, REPLY_TIMEOUT_MS);
  }

  /** @throws ConfigError when nobody listens on `path` */
  static connect(path: string): Frontend {
    const fd = connect(path);
    if (fd === undefined)
      throw new ConfigError(`nobody listens on ${path}, or its queue is full; start the back-end first`);
    return new Frontend(fd);
  }

  async getFeatures(): Promise<bigint> {
    return decodeU64(await this.request(L.VHOST_USER_GET_FEATURES));
  }

  async setFeatures(features: bigint): Promise<void> {
    await this.command(L.VHOST_USER_SET_FEATURES, encodeU64(features));
  }

  async getProtocolFeatures(): Promise<bigint> {
    return decodeU64(await this.request(L.VHOST_USER_GET_PROTOCOL_FEATURES));
  }

  async setProtocolFeatures(features: bigint): Promise<void> {
    await this.command(L.VHOST_USER_SET_PROTOCOL_FEATURES, encodeU64(features));
    this.#protocolFeatures = features;
  }

  async getQueueNum(): Promise<number> {
    return Number(decodeU64(await this.request(L.VHOST_USER_GET_QUEUE_NUM)));
  }

  async setOwner(): Promise<void> {
    await this.command(L.VHOST_USER_SET_OWNER);
  }

  async resetOwner(): Promise<void> {
    await this.command(L.VHOST_USER_RESET_OWNER);
  }

  async setMemTable(regions: readonly (RegionRecord & { fd: number })[]): Promise<void> {
    const fds = regions.map(({ fd }) => fd);
    await this.command(L.VHOST_USER_SET_MEM_TABLE, encodeMemTable(regions), fds);
  }

  async getMaxMemSlots(): Promise<number> {
    return Number(decodeU64(await this.request(L.VHOST_USER_GET_MAX_MEM_SLOTS)));
  }

  async addMemReg(region: RegionRecord & { fd: number }): Promise<void> {
    await this.command(L.VHOST_USER_ADD_MEM_REG, encodeSingleRegion(region), [region.fd]);
  }

  async remMemReg(region: RegionRecord): Promise<void> {
    await this.command(L.VHOST_USER_REM_MEM_REG, encodeSingleRegion(region));
  }

  async setVringNum(index: number, num: number): Promise<void> {
    await this.command(L.VHOST_USER_SET_VRING_NUM, encodeVringState({ index, num }));
  }

  /** @param areas in user addresses of the memory table, or guest physical ones with GPA_ADDRESSES */
  async setVringAddr(index: number, areas: Areas): Promise<void> {
    await this.command(L.VHOST_USER_SET_VRING_ADDR, encodeVringAddress({ index, flags: 0, log: 0n, ...areas }));
  }

  /** @param num next avail index; of a packed ring encodePackedBase() of its position */
  async setVringBase(index: number, num: number): Promise<void> {
    await this.command(L.VHOST_USER_SET_VRING_BASE, encodeVringState({ index, num }));
  }

  /** Stops the ring. Resolves to its next avail index, of a packed ring to two positions: decodePackedBase(). */
  async getVringBase(index: number): Promise<number> {
    return decodeVringState(await this.request(L.VHOST_USER_GET_VRING_BASE, encodeVringState({ index, num: 0 }))).num;
  }

  /** Starts the ring; without an fd the back-end polls. */
  async setVringKick(index: number, fd?: number): Promise<void> {
    await this.#setVringFd(L.VHOST_USER_SET_VRING_KICK, index, fd);
  }

  /** Without an fd the driver polls. */
  async setVringCall(index: number, fd?: number): Promise<void> {
    await this.#setVringFd(L.VHOST_USER_SET_VRING_CALL, index, fd);
  }

  async setVringErr(index: number, fd?: number): Promise<void> {
    await this.#setVringFd(L.VHOST_USER_SET_VRING_ERR, index, fd);
  }

  async setVringEnable(index: number, enabled: boolean): Promise<void> {
    await this.command(L.VHOST_USER_SET_VRING_ENABLE, encodeVringState({ index, num: enabled ? 1 : 0 }));
  }

  async setBackendReqFd(fd: number): Promise<void> {
    await this.command(L.VHOST_USER_SET_BACKEND_REQ_FD, NOTHING, [fd]);
  }

  /** @returns the bytes of that piece of the configuration space; none if the back-end refuses */
  async getConfig(range: ConfigRange): Promise<Buffer> {
    const reply = await this.request(L.VHOST_USER_GET_CONFIG, encodeConfig(range));
    return reply.subarray(L.CONFIG_HEADER_SIZE);
  }

  async netSetMtu(mtu: number): Promise<void> {
    await this.command(L.VHOST_USER_NET_SET_MTU, encodeU64(BigInt(mtu)));
  }

  /** @returns the region that the back-end made, its fd the caller's; undefined if it refuses */
  async getInflightFd(queues: number, queueSize: number): Promise<(InflightRecord & { fd: number }) | undefined> {
    const wanted = encodeInflight({ mmapSize: 0n, mmapOffset: 0n, queues, queueSize });
    const { payload, fds } = await this.#exchange(L.VHOST_USER_GET_INFLIGHT_FD, wanted);
    const [fd] = fds.splice(0, 1);
    closeFds(fds);
    return fd === undefined ? undefined : { ...decodeInflight(payload), fd };
  }

  async setInflightFd({ fd, ...record }: InflightRecord & { fd: number }): Promise<void> {
    await this.command(L.VHOST_USER_SET_INFLIGHT_FD, encodeInflight(record), [fd]);
  }

  async resetDevice(): Promise<void> {
    await this.command(L.VHOST_USER_RESET_DEVICE);
  }

  /** @param status the virtio device status byte; 0 resets the device */
  async setStatus(status: number): Promise<void> {
    await this.command(L.VHOST_USER_SET_STATUS, encodeU64(BigInt(status)));
  }

  async getStatus(): Promise<number> {
    return Number(decodeU64(await this.request(L.VHOST_USER_GET_STATUS)));
  }

  /** Sends a request that has a reply of its own and resolves to the reply's payload. */
  async request(id: number, payload: Uint8Array = NOTHING, fds: readonly number[] = []): Promise<Buffer> {
    const reply = await this.#exchange(id, payload, fds);
    closeFds(reply.fds);
    return reply.payload;
  }

  /** Sends a request that has none; waits for its ack if one can be had. @throws ProtocolError when it is refused */
  command(id: number, payload: Uint8Array = NOTHING, fds: readonly number[] = []): Promise<void> {
    return this.#inTurn(async () => {
      const waits = (this.#protocolFeatures & (1n << BigInt(L.VHOST_USER_PROTOCOL_F_REPLY_ACK))) !== 0n;
      await this.#connection.send(encodeMessage(id, waits ? L.VHOST_USER_NEED_REPLY : 0, payload), fds);
      if (!waits) return;
      const reply = await this.#reply(id);
      closeFds(reply.fds);
      const status = decodeU64(reply.payload);
      if (status !== 0n) throw new ProtocolError(`the back-end refused request ${id} with status ${status}`);
    });
  }

  /** Sends bytes as they are. */
  send(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    return this.#inTurn(() => this.#connection.send(bytes, fds));
  }

  /** The next message from the back-end, whatever it is; undefined when it closed. Its fds are the caller's. */
  receive(): Promise<Message | undefined> {
    return this.#inTurn(() => this.#connection.receive());
  }

  /** Disconnects. */
  [Symbol.dispose](): void {
    this.#connection[Symbol.dispose]();
  }

  async #setVringFd(id: number, index: number, fd: number | undefined): Promise<void> {
    const value = fd === undefined ? index | L.VHOST_USER_VRING_NOFD_MASK : index;
    await this.command(id, encodeU64(BigInt(value)), fd === undefined ? [] : [fd]);
  }

  /** A request and its reply, whose fds are the caller's. */
  #exchange(id: number, payload: Uint8Array, fds: readonly number[] = []): Promise<Message> {
    return this.#inTurn(async () => {
      await this.#connection.send(encodeMessage(id, 0, payload), fds);
      return this.#reply(id);
    });
  }

  async #reply(id: number): Promise<Message> {
    const message = await this.#connection.receive(REPLY_TIMEOUT_MS);
    if (message === undefined)
      throw new ProtocolError(`the back-end closed the connection instead of answering request ${id}`, "drop");
    if (message.request !== id || message.flags !== (L.VHOST_USER_VERSION | L.VHOST_USER_REPLY)) {
      closeFds(message.fds);
      throw new ProtocolError(
        `request ${id} was answered by message ${message.request} with flags ${message.flags}`,
        "drop",
      );
    }
    return message;
  }

  /** Runs `call` after all calls before it, whether they succeeded or not. */
  #inTurn<T>(call: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(call);
    this.#turn = result.catch(() => {});
    return result;
  }
}
