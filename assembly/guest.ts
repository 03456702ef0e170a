/**
 * The only way to guest memory: accessors that the core is linked against (link/accessors.ts).
 *
 * AssemblyScript knows memory 0 alone; each guest segment is a memory of its own. The link step replaces these
 * imports with code that touches the segments of one end and inlines it; the hooked build leaves them as imports, so
 * that a test sees every access.
 *
 * `end` names which guest: 0 the source (its transmitq), 1 the destination (its receiveq). It is a constant wherever it is used,
 * so that with one segment an end the choice of memory costs nothing. `segment` and `offset` come from an extent or from the
 * control plane, never from the guest as they are.
 */

/** Type arguments that stand for the two ends of the lane; the compiler makes one copy of a ring function for each. */
export class Source {}
export class Destination {}

export function end<E>(): u32 {
  return idof<E>() == idof<Source>() ? 0 : 1;
}

/** Indices, flags and event words: 16-bit sequentially consistent; the address must be even. */
export declare function atomicLoad16(end: u32, segment: u32, offset: u64): u32;
export declare function atomicStore16(end: u32, segment: u32, offset: u64, value: u32): void;

/** Length, id and flags of a packed descriptor, sequentially consistent; the address must be a multiple of 8. */
export declare function atomicLoad64(end: u32, segment: u32, offset: u64): u64;
export declare function atomicStore64(end: u32, segment: u32, offset: u64, value: u64): void;

/** Everything else, at any alignment. */
export declare function load8(end: u32, segment: u32, offset: u64): u32;
export declare function load16(end: u32, segment: u32, offset: u64): u32;
export declare function load32(end: u32, segment: u32, offset: u64): u32;
export declare function load64(end: u32, segment: u32, offset: u64): u64;
export declare function store8(end: u32, segment: u32, offset: u64, value: u32): void;
export declare function store16(end: u32, segment: u32, offset: u64, value: u32): void;
export declare function store32(end: u32, segment: u32, offset: u64, value: u32): void;
export declare function store64(end: u32, segment: u32, offset: u64, value: u64): void;

/** Copies payload from a source segment to a destination segment; they may be the same memory, the ranges may overlap. */
export declare function copy(toSegment: u32, to: u64, fromSegment: u32, from: u64, length: u32): void;
