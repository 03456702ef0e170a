/** A virtqueue written byte by byte, with nothing to stop a driver from breaking every rule: what both formats have. */
import type { Ring } from "./rig.ts";

export const [NEXT, WRITE, INDIRECT] = [1, 2, 4] as const;

export interface Descriptor {
  gpa: bigint;
  len: number;
  flags?: number;
  next?: number;
}

export interface RawRing {
  readonly ring: Ring;
  /** Sets a descriptor of the chains to come; NEXT leads to the descriptor number `next`. */
  describe(index: number, descriptor: Descriptor): void;
  /** A descriptor anywhere: in an indirect table. */
  write(at: bigint, descriptor: Descriptor): void;
  /** Makes the chains available that begin with these descriptors. */
  offer(...heads: number[]): void;
  /** Whether the driver wants calls. */
  interrupts(wanted: boolean): void;
  /** What was used since the last call. */
  used(): { id: number; len: number }[];
}
