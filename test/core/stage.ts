/**
 * The scene of the hostile tests: two guests with RAM at several places, one ring each, written raw.
 *
 *   0x0010_0000    the ring
 *   DATA           1 MiB of buffers, above 4 GiB; beside small rings most of it is a hole, to save time
 *   SEAM           64 KiB more from another file; behind it there is no RAM
 */
import { frameOf } from "./chains.ts";
import { Judge } from "./judge.ts";
import { RawPacked } from "./raw-packed.ts";
import { type Descriptor, INDIRECT, NEXT, type RawRing, WRITE } from "./raw-ring.ts";
import { RawSplit } from "./raw-split.ts";
import { type Ram, Rig, type Ring, type RigPlan, ringAt } from "./rig.ts";

export const DATA = 0x1_0000_0000n;
export const SEAM = DATA + 0x10_0000n;
export const RAM_END = SEAM + 0x1_0000n;
/** Where the well-behaved half of a test has its buffer: at the end of DATA. */
export const GOOD = SEAM - 0x2_0000n;
const RING = 0x10_0000n;

export type Direction = "transmit" | "receive";
export type Format = "split" | "packed";
/** Which ring is under attack: its direction, format and size. The other one may be of the other format. */
export type Where = { direction: Direction; size: number; format?: Format; peer?: Format };
/** `ring`: of both rings. `base`: of the one under attack. `loopback`: both rings are the source's. */
export type Options = { ring?: Partial<Ring>; base?: number; zeroPage?: boolean; loopback?: boolean } & Pick<
  RigPlan,
  "variant" | "observe"
>;

const SIZES = { split: [2, 4, 256, 32_768], packed: [2, 3, 300, 32_768] };

/** Rings of every size under attack, in one format or both; every other one has a peer of the other format. */
export function everywhere(...formats: Format[]): Required<Where>[] {
  return (["transmit", "receive"] as const).flatMap((direction) =>
    formats.flatMap((format) =>
      SIZES[format].map((size, i) => {
        const peer = (i % 2 === 0) === (format === "split") ? "split" : "packed";
        return { direction, format, size, peer } as const;
      }),
    ),
  );
}

function rawRing({ ram, ring }: { ram: Ram; ring: Ring }): RawRing {
  return ring.packed ? new RawPacked(ram, ring) : new RawSplit(ram, ring);
}

/** The ring under attack, where only one format will do. */
export function split({ ring }: { ring: RawRing }): RawSplit {
  if (ring instanceof RawSplit) return ring;
  throw new TypeError("not a split ring");
}

export function packed({ ring }: { ring: RawRing }): RawPacked {
  if (ring instanceof RawPacked) return ring;
  throw new TypeError("not a packed ring");
}

export class Stage {
  readonly direction: Direction;
  readonly rig: Rig;
  readonly judge: Judge;
  readonly transmitq: RawRing;
  readonly receiveq: RawRing;
  #frames = 0;

  constructor(where: Where, { ring = {}, base, zeroPage, loopback, ...core }: Options = {}) {
    const { direction, size, format = "split", peer = format } = where;
    const options = { eventIdx: false, ...ring };
    const attacked = base === undefined ? {} : { base };
    const end = (as: Format, more: Partial<Ring>, at = RING) => ({
      regions: [
        ...(zeroPage ? [{ gpa: 0n, sizeBytes: 0x1000 }] : []),
        ...(size <= 1024
          ? [
              { gpa: RING, sizeBytes: 0x8000 },
              { gpa: DATA, sizeBytes: 0x1_4000 },
              { gpa: GOOD, sizeBytes: 0x2_0000 },
            ]
          : [
              { gpa: RING, sizeBytes: 0xf_0000 },
              { gpa: DATA, sizeBytes: 0x10_0000 },
            ]),
        { gpa: SEAM, sizeBytes: 0x1_0000 },
      ],
      // a split ring's size is a power of two
      ring: ringAt(at, as === "split" ? 2 ** Math.ceil(Math.log2(size)) : size, {
        ...options,
        ...more,
        packed: as === "packed",
      }),
    });
    this.direction = direction;
    const isTransmit = direction === "transmit";
    const source = isTransmit ? end(format, attacked) : end(peer, {});
    const destination = isTransmit ? end(peer, {}) : end(format, attacked, loopback ? RING + 0x4000n : RING);
    this.rig = new Rig({
      source,
      destination: loopback ? { in: "source", ring: destination.ring } : destination,
      ...core,
    });
    this.judge = new Judge(this.rig);
    this.transmitq = rawRing(this.rig.source);
    this.receiveq = rawRing(this.rig.destination);
  }

  /** The ring under attack. */
  get ring(): RawRing {
    return this.direction === "transmit" ? this.transmitq : this.receiveq;
  }

  /** The direction a buffer on that ring ought to have. */
  get flags(): number {
    return this.direction === "transmit" ? 0 : WRITE;
  }

  /** Lays a chain over ring descriptors 0, 1, ... of the ring under attack. */
  chain(...descriptors: Descriptor[]): void {
    for (const [i, descriptor] of descriptors.entries())
      this.ring.describe(i, this.#linked(i, descriptors.length, descriptor));
  }

  /** Lays a chain into an indirect table, and the descriptor of the table at 0. */
  table(at: bigint, ...descriptors: Descriptor[]): void {
    for (const [i, descriptor] of descriptors.entries()) {
      this.ring.write(at + 16n * BigInt(i), this.#linked(i, descriptors.length, descriptor));
    }
    this.ring.describe(0, { gpa: at, len: 16 * descriptors.length, flags: INDIRECT });
  }

  /** A well-behaved frame at descriptor 0 of the transmitq. @returns it */
  send(length = 100): Uint8Array {
    const frame = frameOf(this.#frames++, length);
    const header = new Uint8Array(this.transmitq.ring.headerBytes);
    this.rig.source.ram.slice(GOOD, header.length + length).set(Buffer.concat([header, frame]));
    this.transmitq.describe(0, { gpa: GOOD, len: header.length + length });
    this.transmitq.offer(0);
    return frame;
  }

  /** A well-behaved buffer at descriptor 0 of the receiveq. */
  post(len = 2048): void {
    this.receiveq.describe(0, { gpa: GOOD, len, flags: WRITE });
    this.receiveq.offer(0);
  }

  /** Sends a frame and receives it: the ring under attack works as ever. */
  mustDeliver(): void {
    const { packets } = this.rig.counters;
    this.post();
    const frame = this.send();
    this.judge.poll();
    const got = this.rig.destination.ram.slice(GOOD + BigInt(this.receiveq.ring.headerBytes), frame.length);
    if (this.rig.counters.packets !== packets + 1 || Buffer.compare(got, frame) !== 0) throw new Error("not delivered");
  }

  #linked(i: number, count: number, descriptor: Descriptor): Descriptor {
    const { flags = this.flags, next = i + 1 } = descriptor;
    return { ...descriptor, flags: i + 1 < count ? flags | NEXT : flags, next };
  }
}
