/** What the reference lane needs of a virtqueue, whatever its format: chains are looked at, given back, spoken about. */
import type { ReferenceRam } from "./reference-ram.ts";
import type { Ring } from "./rig.ts";

/** The buffers of a descriptor chain, all of one direction. */
export interface Chain {
  /** All their bytes, in order, as they lie in RAM. */
  views: Uint8Array[];
  length: number;
}

/** A chain that the driver made available. */
export interface Offered {
  /** Undefined: it breaks a rule. */
  chain: Chain | undefined;
  /** The position behind it. */
  next: number;
  /** Descriptors of the ring, or heads in it, that it takes up. */
  slots: number;
  /** Gives it back to the driver; chains are given back in the order in which they lie. */
  giveBack(written: number): void;
}

/** One virtqueue, as the device sees it. */
export interface ReferenceQueue {
  readonly ring: Ring;
  broken: boolean;
  /** The position of the first chain that was not given back: an avail index, or index | wrap << 15. */
  readonly next: number;
  /** The first look at a ring that was started; later ones change nothing. */
  begin(ram: ReferenceRam): void;
  /** Whether the driver claims more chains than a ring can hold. */
  isOverrun(ram: ReferenceRam): boolean;
  /** The chain at a position, which is `next` or what an earlier look named. */
  look(ram: ReferenceRam, position: number): Offered | "none" | "broken";
  /** Whether there is a chain at a position, whatever it is. */
  hasChain(ram: ReferenceRam, position: number): boolean;
  /** Makes what was given back visible. */
  publish(ram: ReferenceRam): void;
  /** After that, once: whether the driver wants a call for it; undefined if there is nothing to call for. */
  decideCall(ram: ReferenceRam): boolean | undefined;
  /** The driver shall kick when it makes a chain available at this position. */
  requestKick(ram: ReferenceRam, position: number): void;
  suppressKicks(ram: ReferenceRam): void;
}

/** Adds one buffer to a chain. @returns false if some of it is no RAM */
export function append(ram: ReferenceRam, chain: Chain, gpa: bigint, length: number): boolean {
  const views = length === 0 ? [] : ram.views(gpa, length);
  chain.views.push(...(views ?? []));
  chain.length += length;
  return views !== undefined;
}
