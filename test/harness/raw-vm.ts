/**
 * A VM without manners: raw messages on its socket, raw bytes in its memory. It remembers every byte that it wrote, so that
 * what the relay wrote shows, and whether the relay was allowed to.
 */
import { expect } from "vitest";
import { drain, eventfdCreate, signal } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { Guest } from "../../src/driver/guest.ts";
import { SplitDriver } from "../../src/driver/split.ts";
import { PackedDriver } from "../../src/driver/packed.ts";
import * as L from "../../src/layout/vhost-user.ts";
import * as V from "../../src/layout/virtio.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";

export const bit = (number: number): bigint => 1n << BigInt(number);

export const RAM_BYTES = 1 << 20;
/** Rings lie at RING * (1 + index). */
/** Bytes between one ring and the next. */
export const RING_SPACE = 0x1_0000;
const RING = BigInt(RING_SPACE);
/** From here on there is nothing but what a case puts there. */
export const BUFFERS = 0x8_0000n;
export const [NEXT, WRITE, INDIRECT] = [V.VRING_DESC_F_NEXT, V.VRING_DESC_F_WRITE, V.VRING_DESC_F_INDIRECT] as const;

export interface Descriptor {
  gpa: bigint;
  len: number;
  flags?: number;
  /** Next of a split descriptor, id of a packed one. */
  next?: number;
}

export interface VmOptions {
  size?: number;
  packed?: boolean;
  /** Virtio features beside VERSION_1 and the format of the ring. */
  features?: readonly number[];
}

export class RawVm implements Disposable {
  readonly frontend: Frontend;
  readonly guest: Guest;
  readonly size: number;
  readonly packed: boolean;
  readonly err: number;
  readonly #features: bigint;
  readonly #fds: number[] = [];
  #shadow: Buffer;
  readonly #allowed: { gpa: bigint; length: number }[] = [];
  readonly #availIdx = [0, 0];

  constructor(path: string, { size = 256, packed = false, features = [] }: VmOptions = {}) {
    this.size = size;
    this.packed = packed;
    this.#features = [V.VIRTIO_F_VERSION_1, V.VHOST_USER_F_PROTOCOL_FEATURES, ...features]
      .concat(packed ? [V.VIRTIO_F_RING_PACKED] : [])
      .reduce((mask, number) => mask | bit(number), 0n);
    this.frontend = Frontend.connect(path);
    this.guest = new Guest([{ gpa: 0n, sizeBytes: BigInt(RAM_BYTES) }]);
    this.#shadow = Buffer.from(Uint8Array.from({ length: RAM_BYTES }, (_, i) => ((i % 251) ^ ((i >> 10) & 0xff)) | 1));
    this.guest.write(0n, this.#shadow);
    this.err = this.own(eventfdCreate());
  }

  /** Closes the fd in the end. */
  own(fd: number): number {
    this.#fds.push(fd);
    return fd;
  }

  async negotiate(protocol = bit(L.VHOST_USER_PROTOCOL_F_REPLY_ACK) | bit(L.VHOST_USER_PROTOCOL_F_MQ)): Promise<this> {
    await this.frontend.getFeatures();
    await this.frontend.setProtocolFeatures(protocol);
    await this.frontend.setOwner();
    await this.frontend.setFeatures(this.#features);
    return this;
  }

  async share(): Promise<this> {
    await this.frontend.setMemTable(this.guest.regions);
    return this;
  }

  /** Negotiates and starts both rings, polled by the relay. */
  async start(): Promise<this> {
    await this.negotiate();
    await this.share();
    for (const index of [V.RECEIVEQ, V.TRANSMITQ]) await this.startRing(index);
    return this;
  }

  areas(index: number): { desc: bigint; avail: bigint; used: bigint } {
    const at = RING * BigInt(1 + index);
    const { desc, avail, used } = (this.packed ? PackedDriver : SplitDriver).layout(this.size, true);
    return { desc: at + BigInt(desc), avail: at + BigInt(avail), used: at + BigInt(used) };
  }

  userAreas(index: number): { desc: bigint; avail: bigint; used: bigint } {
    const { desc, avail, used } = this.areas(index);
    const at = (gpa: bigint) => this.guest.userAddress(gpa);
    return { desc: at(desc), avail: at(avail), used: at(used) };
  }

  /** Empties a ring and starts it, enabled. @param usedIdx of a split ring: that far it was used before */
  async startRing(index: number, usedIdx = 0): Promise<void> {
    const { desc, avail, used } = this.areas(index);
    const bytes = (this.packed ? PackedDriver : SplitDriver).layout(this.size, true).sizeBytes;
    this.write(desc, Buffer.alloc(bytes));
    if (!this.packed) this.write(used + BigInt(V.USED_IDX), u16(usedIdx));
    this.#availIdx[index] = 0;
    // What the device may write: used ring and its event words, or descriptors and the device event area.
    if (this.packed) this.allow(desc, V.DESC_SIZE * this.size);
    this.allow(used, this.packed ? V.PACKED_EVENT_SIZE : V.USED_RING + V.USED_ENTRY_SIZE * this.size + 2);
    expect(avail).toBeGreaterThan(desc);
    await this.frontend.setVringNum(index, this.size);
    await this.frontend.setVringBase(index, this.packed ? 0x8000 : usedIdx);
    await this.frontend.setVringAddr(index, this.userAreas(index));
    await this.frontend.setVringErr(index, this.err);
    await this.frontend.setVringEnable(index, true);
    await this.frontend.setVringKick(index);
  }

  write(gpa: bigint, bytes: Uint8Array): void {
    this.#shadow.set(bytes, Number(gpa));
    this.guest.write(gpa, bytes);
  }

  /** The relay may write here from now on. */
  allow(gpa: bigint, length: number): void {
    this.#allowed.push({ gpa, length });
  }

  /** Writes a descriptor to a ring, or to a table. */
  describe(at: { ring: number; index: number } | bigint, { gpa, len, flags = 0, next = 0 }: Descriptor): void {
    const bytes = Buffer.alloc(V.DESC_SIZE);
    bytes.writeBigUInt64LE(gpa, V.DESC_ADDR);
    bytes.writeUInt32LE(len >>> 0, V.DESC_LEN);
    bytes.writeUInt16LE(this.packed ? next : flags, V.DESC_FLAGS);
    bytes.writeUInt16LE(this.packed ? flags : next, V.DESC_FLAGS + 2);
    this.write(typeof at === "bigint" ? at : this.areas(at.ring).desc + BigInt(V.DESC_SIZE * at.index), bytes);
  }

  /** Makes heads of a split ring available. */
  offer(ring: number, ...heads: number[]): void {
    for (const head of heads) {
      const slot = this.#availIdx[ring]! % this.size;
      this.write(this.areas(ring).avail + BigInt(V.AVAIL_RING + 2 * slot), u16(head));
      this.#availIdx[ring] = (this.#availIdx[ring]! + 1) & 0xffff;
    }
    this.setAvailIdx(ring, this.#availIdx[ring]!);
  }

  setAvailIdx(ring: number, index: number): void {
    this.write(this.areas(ring).avail + BigInt(V.AVAIL_IDX), u16(index));
  }

  /** The used index of a split ring, and the length in its last entry. */
  used(ring: number): { idx: number; len: number } {
    const { used } = this.areas(ring);
    const idx = Buffer.from(this.guest.read(used + BigInt(V.USED_IDX), 2)).readUInt16LE();
    const at = V.USED_RING + V.USED_ENTRY_SIZE * ((idx + 0xffff) % this.size) + V.USED_ENTRY_LEN;
    return { idx, len: Buffer.from(this.guest.read(used + BigInt(at), 4)).readUInt32LE() };
  }

  /** Waits until so many chains were given back. */
  async untilUsed(ring: number, idx: number): Promise<void> {
    await expect.poll(() => this.used(ring).idx, { interval: 2 }).toBe(idx);
  }

  /** Waits until the relay has said that a ring is broken. */
  async untilBroken(): Promise<void> {
    await expect.poll(() => drain(this.err), { interval: 2 }).toBe(1n);
  }

  /** A chain for the transmitq at descriptor 0, given back with length 0 or not at all. */
  async transmitInVain(...chain: Descriptor[]): Promise<void> {
    const { idx } = this.used(V.TRANSMITQ);
    for (const [index, descriptor] of chain.entries()) this.describe({ ring: V.TRANSMITQ, index }, descriptor);
    this.offer(V.TRANSMITQ, 0);
    await this.untilUsed(V.TRANSMITQ, idx + 1);
    expect(this.used(V.TRANSMITQ).len).toBe(0);
  }

  /** Sends a frame on the transmitq. */
  send(frame: Uint8Array, slot = 0): void {
    const gpa = BUFFERS + BigInt(slot * 0x1000);
    this.write(gpa, Buffer.concat([Buffer.alloc(V.NET_HDR_SIZE), frame]));
    this.describe({ ring: V.TRANSMITQ, index: slot }, { gpa, len: V.NET_HDR_SIZE + frame.length });
    this.offer(V.TRANSMITQ, slot);
  }

  /** The relay has closed the connection. */
  async expectDropped(): Promise<void> {
    const message = await this.frontend.receive().catch((error: { code: string }) => {
      expect(error.code).toBe("ECONNRESET");
      return undefined;
    });
    expect(message).toBeUndefined();
  }

  /** The relay has written nothing but where it may (I5). */
  expectContained(): void {
    const now = Buffer.from(this.guest.read(0n, RAM_BYTES));
    for (const { gpa, length } of this.#allowed) this.#shadow.copy(now, Number(gpa), Number(gpa), Number(gpa) + length);
    if (Buffer.compare(now, this.#shadow) === 0) return;
    const at = now.findIndex((byte, i) => byte !== this.#shadow[i]);
    expect.fail(`the relay wrote at gpa 0x${at.toString(16)}: ${now.subarray(at, at + 32).toString("hex")}`);
  }

  /** Rings are polled; this is for cases about kick fds. */
  kick(fd: number): void {
    signal(fd);
  }

  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
    this.guest[Symbol.dispose]();
    for (const fd of this.#fds.splice(0)) close(fd);
    this.#shadow = Buffer.alloc(0); // the test runner keeps what a poll refers to until the test ends
  }
}

function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16LE(value & 0xffff);
  return bytes;
}
