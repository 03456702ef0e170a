/**
 * The scene of the hostile tests: two guests with RAM at several places, one ring each, written raw.
 *
 *   0x0010_0000    the ring
 *   DATA           1 MiB of buffers, above 4 GiB; beside small rings most of it is a hole, to save time
 *   SEAM           64 KiB more from another file; behind it there is no RAM
 */
import { frameOf } from "./chains.ts";
import { Judge } from "./judge.ts";
import { type Descriptor, INDIRECT, NEXT, RawRing, WRITE } from "./raw-ring.ts";
import { Rig, type Ring, type RigPlan, ringAt } from "./rig.ts";

export const DATA = 0x1_0000_0000n;
export const SEAM = DATA + 0x10_0000n;
export const RAM_END = SEAM + 0x1_0000n;
/** Where the well-behaved half of a test has its buffer: at the end of DATA. */
export const GOOD = SEAM - 0x2_0000n;
const RING = 0x10_0000n;

export type Direction = "transmit" | "receive";
export type Where = { direction: Direction; size: number };
type Options = { ring?: Partial<Ring>; zeroPage?: boolean } & Pick<RigPlan, "variant" | "observe">;

export class Stage {
  readonly direction: Direction;
  readonly rig: Rig;
  readonly judge: Judge;
  readonly transmitq: RawRing;
  readonly receiveq: RawRing;
  #frames = 0;

  constructor({ direction, size }: Where, { ring = {}, zeroPage = false, ...core }: Options = {}) {
    const options = { eventIdx: false, ...ring };
    const end = {
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
      ring: ringAt(RING, size, options),
    };
    this.direction = direction;
    this.rig = new Rig({ source: end, destination: end, ...core });
    this.judge = new Judge(this.rig);
    this.transmitq = new RawRing(this.rig.source.ram, end.ring);
    this.receiveq = new RawRing(this.rig.destination.ram, end.ring);
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
