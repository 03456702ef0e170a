/**
 * The demo's traffic: a sequence of frames in which frame k is known to the sender and to the receiver.
 *
 * Even frames replay the captured ones in turn, odd ones are generated: their sizes visit every value from 64 to
 * 9000, each carries its number k, and the filling is shifted by k. Without generation of its own the receiver could
 * not tell a lost frame from a changed one.
 */

export const FRAME_SIZE_MIN = 64;
export const FRAME_SIZE_MAX = 9000;

const SIZES = FRAME_SIZE_MAX - FRAME_SIZE_MIN + 1;
/** Prime to SIZES (8937 = 3^3 * 331): small and large frames alternate, and 8937 frames show every size once. */
const SIZE_STEP = 3001;
/** Prime, so that the filling's shift does not repeat with the size. */
const SHIFTS = 251;
const SEQUENCE_OFFSET = 14; // after the Ethernet header
const FILLING_OFFSET = SEQUENCE_OFFSET + 8;
const ETHERTYPE_EXPERIMENTAL = 0x88b5; // IEEE 802, local experimental ethertype 1

export class Traffic {
  readonly #captured: readonly Uint8Array[];
  readonly #filling: Uint8Array;
  readonly #scratch: Buffer;
  readonly #view: DataView;

  /**
   * @param captured frames to replay, at least one
   * @param stream tells two directions apart: their generated frames differ in every part
   */
  constructor(captured: readonly Uint8Array[], stream: number) {
    if (captured.length === 0) throw new RangeError("no captured frame to replay");
    this.#captured = captured;
    this.#filling = noise(FRAME_SIZE_MAX + SHIFTS, stream + 1);
    this.#scratch = Buffer.alloc(FRAME_SIZE_MAX);
    this.#view = new DataView(this.#scratch.buffer, this.#scratch.byteOffset, this.#scratch.length);
    this.#scratch.set([0x02, 0, 0, 0, 1, stream, 0x02, 0, 0, 0, 0, stream]); // locally administered addresses
    this.#view.setUint16(12, ETHERTYPE_EXPERIMENTAL);
  }

  /** Frame k, 0..2^53; valid until the next call. */
  frame(k: number): Uint8Array {
    const turn = Math.floor(k / 2);
    if (k % 2 === 0) return this.#captured[turn % this.#captured.length]!;
    const size = FRAME_SIZE_MIN + (((turn % SIZES) * SIZE_STEP) % SIZES);
    const shift = turn % SHIFTS;
    this.#view.setUint32(SEQUENCE_OFFSET, Math.floor(k / 2 ** 32));
    this.#view.setUint32(SEQUENCE_OFFSET + 4, k >>> 0);
    this.#scratch.set(this.#filling.subarray(shift, shift + size - FILLING_OFFSET), FILLING_OFFSET);
    return this.#scratch.subarray(0, size);
  }

  /** Undefined if `received` is frame k byte for byte, else what is wrong with it. */
  difference(k: number, received: Uint8Array): string | undefined {
    const expected = this.frame(k);
    if (Buffer.compare(expected, received) === 0) return undefined;
    if (expected.length !== received.length)
      return `frame ${k} has ${received.length} bytes instead of ${expected.length}`;
    const at = expected.findIndex((byte, i) => byte !== received[i]);
    return `frame ${k} of ${expected.length} bytes differs at byte ${at}: ${received[at]} instead of ${expected[at]}`;
  }
}

/** Bytes without a visible pattern: xorshift32 from `seed`, not 0. */
function noise(length: number, seed: number): Uint8Array {
  let state = seed;
  return Uint8Array.from({ length }, () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return state & 0xff;
  });
}
