/** An input of a fuzz target is a string of bytes: what to do is read from it, so any bytes are an input and any change makes another. */

/** Reads numbers from an input; behind its end all are 0. */
export class Reader {
  readonly #bytes: Uint8Array;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
  }

  get done(): boolean {
    return this.#at >= this.#bytes.length;
  }

  u8(): number {
    return this.#bytes[this.#at++] ?? 0;
  }

  u16(): number {
    return this.u8() | (this.u8() << 8);
  }

  bool(): boolean {
    return (this.u8() & 1) === 1;
  }

  pick<T>(values: readonly T[]): T {
    return values[this.u8() % values.length] as T;
  }
}

/** Numbers that look random, the same for the same seed (mulberry32). */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** 0 to limit - 1. */
  below(limit: number): number {
    this.#state = (this.#state + 0x6d2b_79f5) >>> 0;
    let mixed = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * limit);
  }

  bytes(length: number): Uint8Array {
    return Uint8Array.from({ length }, () => this.below(256));
  }
}

const INPUT_MAX = 1024;
const INTERESTING = [0, 1, 2, 3, 4, 7, 8, 0x7f, 0x80, 0xff];

/** Another input, made of one or two. */
export function mutate(input: Uint8Array, other: Uint8Array, random: Random): Uint8Array {
  let bytes = [...input];
  for (let change = 1 + random.below(6); change > 0; change--) {
    const at = random.below(bytes.length + 1);
    const length = 1 + random.below(16);
    switch (random.below(7)) {
      case 0:
        bytes[at % Math.max(1, bytes.length)]! ^= 1 << random.below(8);
        break;
      case 1:
        bytes[at % Math.max(1, bytes.length)] = INTERESTING[random.below(INTERESTING.length)]!;
        break;
      case 2:
        bytes[at % Math.max(1, bytes.length)] = random.below(256);
        break;
      case 3:
        bytes.splice(at, 0, ...random.bytes(length));
        break;
      case 4:
        bytes.splice(at, length);
        break;
      case 5:
        bytes.splice(at, 0, ...bytes.slice(random.below(bytes.length + 1)).slice(0, length));
        break;
      default:
        bytes = [...bytes.slice(0, at), ...other.slice(random.below(other.length + 1))];
    }
  }
  return Uint8Array.from(bytes.slice(0, INPUT_MAX));
}
