/**
 * What a session knows of one virtqueue, and the layout rules of its three areas.
 *
 * Truth: virtio 1.3, 2.7 (areas and alignment); docs/PROTOCOL.md, 4.1, 5 and 16.
 *
 * "Started" in the protocol's sense is `kicked`: SET_VRING_KICK came and no GET_VRING_BASE since. The device runs
 * the ring (`running`) once its size and addresses are known too and one region of guest memory holds each area.
 */
import { close } from "../../native/libc.ts";
import { ProtocolError } from "../errors.ts";
import {
  AVAIL_ALIGN,
  AVAIL_ENTRY_SIZE,
  AVAIL_RING,
  DESC_ALIGN,
  DESC_SIZE,
  USED_ALIGN,
  USED_ENTRY_SIZE,
  USED_RING,
} from "../layout/virtio.ts";
import type { VringAddress } from "./codec.ts";
import type { Vring } from "./device.ts";
import { hex } from "./memory-table.ts";
import type { AddressSpace, MemoryTable } from "./memory-table.ts";

const EVENT_INDEX_SIZE = 2;

/** Where the three areas of a ring lie; in which address space, the holder knows. */
export interface Areas {
  desc: bigint;
  avail: bigint;
  used: bigint;
}

export class VringState {
  readonly index: number;
  size = 0;
  base = 0;
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
  at({ desc, avail, used }: Areas): Vring {
    const { index, size, base, enabled, kick, call, err } = this;
    return { index, size, desc, avail, used, base, enabled, kick, call, err };
  }

  /** Guest physical addresses of the areas; undefined when size or addresses are missing or no region holds an area. */
  translate(table: MemoryTable, space: AddressSpace, hasEventIndex: boolean): Areas | undefined {
    if (this.size === 0 || this.addresses === undefined) return undefined;
    const sizes = areaSizes(this.size, hasEventIndex);
    const desc = table.translate(this.addresses.desc, sizes.desc, space);
    const avail = table.translate(this.addresses.avail, sizes.avail, space);
    const used = table.translate(this.addresses.used, sizes.used, space);
    if (desc === undefined || avail === undefined || used === undefined) return undefined;
    return misaligned({ desc, avail, used }) === undefined ? { desc, avail, used } : undefined;
  }

  /** Forgets what GET_VRING_BASE ends. Size, base and enable bit stay, and err, which front-ends send only once. */
  stopped(base: number): void {
    this.base = base;
    this.kicked = false;
    this.addresses = undefined;
    this.running = undefined;
    this.replaceFd("kick", undefined);
    this.replaceFd("call", undefined);
  }

  /** Forgets the rest, of a ring that was stopped: what a device reset ends. */
  reset(): void {
    this.size = 0;
    this.base = 0;
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
}

/** Rules that hold whatever the memory table is: a misaligned atomic access would trap. @throws ProtocolError */
export function checkAddresses(address: VringAddress): Areas {
  if (address.flags !== 0) {
    throw new ProtocolError(`ring ${address.index}: address flags ${address.flags}, no flag was offered`);
  }
  const area = misaligned(address);
  if (area !== undefined) {
    throw new ProtocolError(`ring ${address.index}: ${area} area at ${hex(address[area])} is misaligned`);
  }
  return { desc: address.desc, avail: address.avail, used: address.used };
}

function misaligned({ desc, avail, used }: Areas): keyof Areas | undefined {
  if (desc % BigInt(DESC_ALIGN) !== 0n) return "desc";
  if (avail % BigInt(AVAIL_ALIGN) !== 0n) return "avail";
  return used % BigInt(USED_ALIGN) !== 0n ? "used" : undefined;
}

function areaSizes(size: number, hasEventIndex: boolean) {
  const event = hasEventIndex ? EVENT_INDEX_SIZE : 0;
  return {
    desc: BigInt(DESC_SIZE * size),
    avail: BigInt(AVAIL_RING + AVAIL_ENTRY_SIZE * size + event),
    used: BigInt(USED_RING + USED_ENTRY_SIZE * size + event),
  };
}
