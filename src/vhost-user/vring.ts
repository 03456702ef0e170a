/**
 * What a session knows of one virtqueue.
 *
 * Truth: docs/PROTOCOL.md, 4.1 and 5.
 *
 * "Started" in the protocol's sense is `kicked`: SET_VRING_KICK came and no GET_VRING_BASE since. The device runs
 * the ring (`running`) once its size and addresses are known too and one region of guest memory holds each area.
 */
import { close } from "../../native/libc.ts";
import { ProtocolError } from "../errors.ts";
import { VRING_SIZE_MAX } from "../layout/virtio.ts";
import { areaSizes, isRingSize, misaligned } from "./areas.ts";
import type { Areas, RingForm } from "./areas.ts";
import type { VringAddress } from "./codec.ts";
import type { InflightPlace, Vring } from "./device.ts";
import { hex } from "./memory-table.ts";
import type { AddressSpace, MemoryTable } from "./memory-table.ts";
import { decodePackedBase, encodePackedBase, FIRST_POSITION, positionIndex } from "./position.ts";

const SPLIT_BASE_MAX = 0xffff;

export class VringState {
  readonly index: number;
  size = 0;
  /** Next avail index of a split ring, position of a packed one; undefined: it was never said, the ring begins anew. */
  base: number | undefined;
  enabled = false;
  kicked = false;
  /** As SET_VRING_ADDR gave them: user addresses, or with GPA_ADDRESSES guest physical ones. */
  addresses: Areas | undefined;
  /** Guest physical addresses of the areas while the device runs the ring. */
  running: Areas | undefined;
  kick: number | undefined;
  call: number | undefined;
  err: number | undefined;

  constructor(index: number) {
    this.index = index;
  }

  /** The ring for the device, with its areas at the given guest physical addresses. */
  at({ desc, avail, used }: Areas, form: RingForm, inflight: InflightPlace | undefined): Vring {
    const { index, size, enabled, kick, call, err } = this;
    return { index, size, desc, avail, used, base: this.baseOr(form), enabled, kick, call, err, inflight };
  }

  /** The base, or where a ring of this form begins. */
  baseOr({ isPacked }: RingForm): number {
    return this.base ?? (isPacked ? FIRST_POSITION : 0);
  }

  /** @throws ProtocolError when a ring of this form cannot have `num` entries */
  checkSize(num: number, form: RingForm): void {
    if (isRingSize(num, form)) return;
    const expected = form.isPacked ? "a number" : "a power of two";
    throw new ProtocolError(`ring ${this.index}: size ${num}, expected ${expected} from 1 to ${VRING_SIZE_MAX}`);
  }

  /** The base in the number of SET_VRING_BASE. @throws ProtocolError */
  decodeBase(num: number, { isPacked }: RingForm): number {
    if (!isPacked && num > SPLIT_BASE_MAX) {
      throw new ProtocolError(`ring ${this.index}: base ${num}, a split ring's has 16 bits`);
    }
    const base = isPacked ? decodePackedBase(num) : num;
    if (isPacked && this.size !== 0) this.#checkBase(base);
    return base;
  }

  encodeBase(form: RingForm): number {
    const base = this.baseOr(form);
    return form.isPacked ? encodePackedBase(base) : base;
  }

  /** Guest physical addresses of the areas; undefined when size or addresses are missing or no region holds an area. */
  translate(table: MemoryTable, space: AddressSpace, form: RingForm): Areas | undefined {
    if (this.size === 0 || this.addresses === undefined) return undefined;
    const sizes = areaSizes(this.size, form);
    const desc = table.translate(this.addresses.desc, BigInt(sizes.desc), space);
    const avail = table.translate(this.addresses.avail, BigInt(sizes.avail), space);
    const used = table.translate(this.addresses.used, BigInt(sizes.used), space);
    if (desc === undefined || avail === undefined || used === undefined) return undefined;
    return misaligned({ desc, avail, used }, form) === undefined ? { desc, avail, used } : undefined;
  }

  /** What may have been set before the features that give it its meaning. @throws ProtocolError */
  checkStartable(form: RingForm): void {
    this.checkSize(this.size, form);
    if (form.isPacked) this.#checkBase(this.baseOr(form));
  }

  /** Forgets what GET_VRING_BASE ends. Size, base and enable bit stay, and err, which front-ends send only once. */
  stopped(): void {
    this.kicked = false;
    this.addresses = undefined;
    this.running = undefined;
    this.replaceFd("kick", undefined);
    this.replaceFd("call", undefined);
  }

  /** Forgets what a device reset ends, beside that. */
  reset(): void {
    this.stopped();
    this.size = 0;
    this.base = undefined;
    this.enabled = false;
  }

  /** Owns the new fd, closes the old one. */
  replaceFd(which: "kick" | "call" | "err", fd: number | undefined): void {
    const old = this[which];
    this[which] = fd;
    if (old !== undefined) close(old);
  }

  closeFds(): void {
    for (const which of ["kick", "call", "err"] as const) this.replaceFd(which, undefined);
  }

  #checkBase(position: number): void {
    const slot = positionIndex(position);
    if (slot < this.size) return;
    throw new ProtocolError(`ring ${this.index}: base at slot ${slot}, there are ${this.size}`);
  }
}

/** Rules that hold whatever the memory table is: a misaligned atomic access would trap. @throws ProtocolError */
export function checkAddresses(address: VringAddress, form: RingForm): Areas {
  if (address.flags !== 0) {
    throw new ProtocolError(`ring ${address.index}: address flags ${address.flags}, no flag was offered`);
  }
  const area = misaligned(address, form);
  if (area !== undefined) {
    throw new ProtocolError(`ring ${address.index}: ${area} area at ${hex(address[area])} is misaligned`);
  }
  return { desc: address.desc, avail: address.avail, used: address.used };
}
