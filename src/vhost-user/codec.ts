/**
 * vhost-user syntax: messages and payloads to bytes and back. No meaning, no state but a half-read message.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Message Specification"; offsets in src/layout/vhost-user.ts.
 */
import { close } from "../../native/libc.ts";
import { ProtocolError } from "../errors.ts";
import * as L from "../layout/vhost-user.ts";

/** One message. Whoever keeps an fd takes it out of `fds`; what is left there is closed by the receiver. */
export interface Message {
  request: number;
  flags: number;
  payload: Buffer;
  fds: number[];
}

/** Closes and forgets the fds nobody took. */
export function closeFds(fds: number[]): void {
  for (const fd of fds.splice(0)) close(fd);
}

/** The bytes of a message; flags get the protocol version. */
export function encodeMessage(request: number, flags: number, payload: Uint8Array): Buffer {
  const bytes = Buffer.alloc(L.HEADER_SIZE + payload.length);
  bytes.writeUInt32LE(request, L.HEADER_REQUEST);
  bytes.writeUInt32LE(flags | L.VHOST_USER_VERSION, L.HEADER_FLAGS);
  bytes.writeUInt32LE(payload.length, L.HEADER_PAYLOAD_SIZE);
  bytes.set(payload, L.HEADER_SIZE);
  return bytes;
}

/**
 * Cuts a byte stream into messages. Read exactly into `space()`, then report it with `push()`: no read ever spans
 * two messages, so the fds of a read belong to the message whose header began with it. Fds that came with any
 * later byte belong to nothing and are closed.
 */
export class MessageReader {
  readonly #header = Buffer.alloc(L.HEADER_SIZE);
  #payload: Buffer | undefined;
  #fds: number[] = [];
  #filled = 0;

  /** Where the next bytes go; never empty. */
  space(): Buffer {
    return (this.#payload ?? this.#header).subarray(this.#filled);
  }

  /** Whether part of a message has been read. */
  get isMidMessage(): boolean {
    return this.#filled > 0 || this.#payload !== undefined;
  }

  /** `count` bytes of `space()` are filled. Returns the message they complete. @throws ProtocolError (drop) */
  push(count: number, fds: number[]): Message | undefined {
    if (this.isMidMessage) closeFds(fds);
    else this.#fds = fds;
    this.#filled += count;
    if (this.#payload === undefined) {
      if (this.#filled < L.HEADER_SIZE) return undefined;
      this.#payload = Buffer.alloc(checkedPayloadSize(this.#header));
      this.#filled = 0;
    }
    return this.#filled < this.#payload.length ? undefined : this.#finish(this.#payload);
  }

  /** Closes the fds of a message that will not be completed. */
  [Symbol.dispose](): void {
    closeFds(this.#fds);
  }

  #finish(payload: Buffer): Message {
    const request = this.#header.readUInt32LE(L.HEADER_REQUEST);
    const flags = this.#header.readUInt32LE(L.HEADER_FLAGS);
    const message = { request, flags, payload, fds: this.#fds };
    this.#payload = undefined;
    this.#fds = [];
    this.#filled = 0;
    return message;
  }
}

/** Framing cannot be trusted after either error. */
function checkedPayloadSize(header: Buffer): number {
  const version = header.readUInt32LE(L.HEADER_FLAGS) & L.VHOST_USER_VERSION_MASK;
  const size = header.readUInt32LE(L.HEADER_PAYLOAD_SIZE);
  if (version !== L.VHOST_USER_VERSION) {
    throw new ProtocolError(
      `message of protocol version ${version}, expected 1; the peer does not speak vhost-user`,
      "drop",
    );
  }
  if (size > L.PAYLOAD_SIZE_MAX) {
    throw new ProtocolError(`message with ${size} bytes of payload, the limit is ${L.PAYLOAD_SIZE_MAX}`, "drop");
  }
  return size;
}

export function encodeU64(value: bigint): Buffer {
  const bytes = Buffer.alloc(L.U64_SIZE);
  bytes.writeBigUInt64LE(value);
  return bytes;
}

export function decodeU64(payload: Buffer): bigint {
  return payload.readBigUInt64LE();
}

/** struct vhost_vring_state: a ring index and a number whose meaning the request gives. */
interface VringNumber {
  index: number;
  num: number;
}

export function encodeVringState({ index, num }: VringNumber): Buffer {
  const bytes = Buffer.alloc(L.VRING_STATE_SIZE);
  bytes.writeUInt32LE(index, L.VRING_STATE_INDEX);
  bytes.writeUInt32LE(num, L.VRING_STATE_NUM);
  return bytes;
}

export function decodeVringState(payload: Buffer): VringNumber {
  return { index: payload.readUInt32LE(L.VRING_STATE_INDEX), num: payload.readUInt32LE(L.VRING_STATE_NUM) };
}

/** struct vhost_vring_addr; addresses are front-end user addresses. */
export interface VringAddress {
  index: number;
  flags: number;
  desc: bigint;
  used: bigint;
  avail: bigint;
  log: bigint;
}

export function encodeVringAddress(address: VringAddress): Buffer {
  const bytes = Buffer.alloc(L.VRING_ADDR_SIZE);
  bytes.writeUInt32LE(address.index, L.VRING_ADDR_INDEX);
  bytes.writeUInt32LE(address.flags, L.VRING_ADDR_FLAGS);
  bytes.writeBigUInt64LE(address.desc, L.VRING_ADDR_DESC);
  bytes.writeBigUInt64LE(address.used, L.VRING_ADDR_USED);
  bytes.writeBigUInt64LE(address.avail, L.VRING_ADDR_AVAIL);
  bytes.writeBigUInt64LE(address.log, L.VRING_ADDR_LOG);
  return bytes;
}

export function decodeVringAddress(payload: Buffer): VringAddress {
  return {
    index: payload.readUInt32LE(L.VRING_ADDR_INDEX),
    flags: payload.readUInt32LE(L.VRING_ADDR_FLAGS),
    desc: payload.readBigUInt64LE(L.VRING_ADDR_DESC),
    used: payload.readBigUInt64LE(L.VRING_ADDR_USED),
    avail: payload.readBigUInt64LE(L.VRING_ADDR_AVAIL),
    log: payload.readBigUInt64LE(L.VRING_ADDR_LOG),
  };
}

/** A memory region as it is on the wire: its fd travels beside it. */
export interface RegionRecord {
  gpa: bigint;
  sizeBytes: bigint;
  userAddress: bigint;
  mmapOffset: bigint;
}

export function encodeMemTable(regions: readonly RegionRecord[]): Buffer {
  const bytes = Buffer.alloc(L.MEM_TABLE_HEADER_SIZE + regions.length * L.MEM_REGION_SIZE);
  bytes.writeUInt32LE(regions.length, L.MEM_TABLE_COUNT);
  for (const [index, region] of regions.entries()) {
    writeRegion(bytes, L.MEM_TABLE_HEADER_SIZE + index * L.MEM_REGION_SIZE, region);
  }
  return bytes;
}

/**
 * User-mode Linux always sends its whole array, unused entries too: a payload may be longer than its regions, by
 * whole regions.
 * @throws ProtocolError unless there are 1 to 8 regions and the payload holds them
 */
export function decodeMemTable(payload: Buffer): RegionRecord[] {
  const count = payload.length < L.MEM_TABLE_HEADER_SIZE ? 0 : payload.readUInt32LE(L.MEM_TABLE_COUNT);
  if (count < 1 || count > L.MEM_REGIONS_MAX) {
    throw new ProtocolError(
      `memory table of ${count} regions, expected 1 to ${L.MEM_REGIONS_MAX}; ` +
        `is the VM's memory shared (QEMU: memory-backend-memfd,share=on)?`,
    );
  }
  const size = L.MEM_TABLE_HEADER_SIZE + count * L.MEM_REGION_SIZE;
  if (payload.length < size || (payload.length - size) % L.MEM_REGION_SIZE !== 0) {
    throw new ProtocolError(`memory table of ${count} regions in ${payload.length} bytes, expected ${size}`);
  }
  return Array.from({ length: count }, (_, index) =>
    readRegion(payload, L.MEM_TABLE_HEADER_SIZE + index * L.MEM_REGION_SIZE),
  );
}

/** The payload of ADD_MEM_REG and REM_MEM_REG. */
export function encodeSingleRegion(region: RegionRecord): Buffer {
  const bytes = Buffer.alloc(L.SINGLE_REGION_SIZE);
  writeRegion(bytes, L.SINGLE_REGION, region);
  return bytes;
}

export function decodeSingleRegion(payload: Buffer): RegionRecord {
  return readRegion(payload, L.SINGLE_REGION);
}

/** A piece of the configuration space. */
export interface ConfigRange {
  offset: number;
  size: number;
}

/** The request for a piece: as long as its reply. */
export function encodeConfig({ offset, size }: ConfigRange): Buffer {
  const bytes = Buffer.alloc(L.CONFIG_HEADER_SIZE + size);
  bytes.writeUInt32LE(offset, L.CONFIG_OFFSET);
  bytes.writeUInt32LE(size, L.CONFIG_SIZE);
  return bytes;
}

/** @throws ProtocolError unless the piece is inside the configuration space and the payload has room for it, no more */
export function decodeConfig(payload: Buffer): ConfigRange {
  const hasHeader = payload.length >= L.CONFIG_HEADER_SIZE;
  const offset = hasHeader ? payload.readUInt32LE(L.CONFIG_OFFSET) : 0;
  const size = hasHeader ? payload.readUInt32LE(L.CONFIG_SIZE) : 0;
  if (size === 0 || offset + size > L.CONFIG_SIZE_MAX || payload.length !== L.CONFIG_HEADER_SIZE + size) {
    throw new ProtocolError(
      `configuration bytes ${offset} to ${offset + size} in a payload of ${payload.length}, ` +
        `expected some of ${L.CONFIG_SIZE_MAX} and a payload ${L.CONFIG_HEADER_SIZE} longer`,
    );
  }
  return { offset, size };
}

/** An inflight region: how many queues of what size it is for, and where in its file it lies. */
export interface InflightRecord {
  mmapSize: bigint;
  mmapOffset: bigint;
  queues: number;
  queueSize: number;
}

export function encodeInflight({ mmapSize, mmapOffset, queues, queueSize }: InflightRecord): Buffer {
  const bytes = Buffer.alloc(L.INFLIGHT_SIZE);
  bytes.writeBigUInt64LE(mmapSize, L.INFLIGHT_MMAP_SIZE);
  bytes.writeBigUInt64LE(mmapOffset, L.INFLIGHT_MMAP_OFFSET);
  bytes.writeUInt16LE(queues, L.INFLIGHT_QUEUES);
  bytes.writeUInt16LE(queueSize, L.INFLIGHT_QUEUE_SIZE);
  return bytes;
}

export function decodeInflight(payload: Buffer): InflightRecord {
  return {
    mmapSize: payload.readBigUInt64LE(L.INFLIGHT_MMAP_SIZE),
    mmapOffset: payload.readBigUInt64LE(L.INFLIGHT_MMAP_OFFSET),
    queues: payload.readUInt16LE(L.INFLIGHT_QUEUES),
    queueSize: payload.readUInt16LE(L.INFLIGHT_QUEUE_SIZE),
  };
}

function writeRegion(bytes: Buffer, at: number, region: RegionRecord): void {
  bytes.writeBigUInt64LE(region.gpa, at + L.MEM_REGION_GPA);
  bytes.writeBigUInt64LE(region.sizeBytes, at + L.MEM_REGION_BYTES);
  bytes.writeBigUInt64LE(region.userAddress, at + L.MEM_REGION_USER_ADDRESS);
  bytes.writeBigUInt64LE(region.mmapOffset, at + L.MEM_REGION_MMAP_OFFSET);
}

function readRegion(bytes: Buffer, at: number): RegionRecord {
  return {
    gpa: bytes.readBigUInt64LE(at + L.MEM_REGION_GPA),
    sizeBytes: bytes.readBigUInt64LE(at + L.MEM_REGION_BYTES),
    userAddress: bytes.readBigUInt64LE(at + L.MEM_REGION_USER_ADDRESS),
    mmapOffset: bytes.readBigUInt64LE(at + L.MEM_REGION_MMAP_OFFSET),
  };
}
