/** The core's half of requests: writes them and reads completions by REQUEST_FORMAT, as src/layout/requests.ts says. */
import { baseAddress } from "../../native/mman.ts";
import {
  FORMAT_ADDRESS,
  FORMAT_DONE,
  FORMAT_DONE_HEAD,
  FORMAT_DONE_MASK,
  FORMAT_DONE_RESULT,
  FORMAT_DONE_SHIFT,
  FORMAT_DONE_TAIL,
  FORMAT_LENGTH,
  FORMAT_OPERATION,
  FORMAT_TAIL,
  FORMAT_VECTOR,
  FORMAT_WHOLE,
  IOVEC_BYTES,
  IOVECS,
  REQUEST_BYTES,
  REQUEST_FORMAT,
  REQUESTS,
  REQUESTS_MAX,
} from "../../src/layout/requests.ts";

/** A stretch of memory in this process. */
export interface Stretch {
  address: bigint;
  length: number;
}

/** What a request is for: one stretch, or several; or `count` iovecs that lie somewhere else. */
export type Wanted = Stretch | Stretch[] | { iovecs: bigint; count: number };

export class Requests {
  readonly #memory: WebAssembly.Memory;
  readonly #view: DataView;
  #iovecs = 0;

  constructor(memory: WebAssembly.Memory) {
    this.#memory = memory;
    this.#view = new DataView(memory.buffer);
  }

  /** The number of the next request. */
  get next(): number {
    return this.#view.getUint32(this.#word(FORMAT_TAIL), true);
  }

  /** Writes requests. @returns their slots, in order */
  write(wanted: readonly Wanted[]): number[] {
    this.#iovecs = 0;
    const first = this.next;
    const slots = wanted.map((one, i) => this.#writeOne((first + i) % REQUESTS_MAX, one));
    this.#view.setUint32(this.#word(FORMAT_TAIL), first + wanted.length, true);
    return slots;
  }

  /** Reads all completions. @returns slots and results, as they lie there */
  reap(): [slot: number, result: number][] {
    const view = this.#view;
    const completions: [number, number][] = [];
    const tail = view.getUint32(this.#word(FORMAT_DONE_TAIL), true);
    let head = view.getUint32(this.#word(FORMAT_DONE_HEAD), true);
    for (; head !== tail; head = (head + 1) >>> 0) {
      const at = this.#word(FORMAT_DONE) + ((head & this.#word(FORMAT_DONE_MASK)) << this.#word(FORMAT_DONE_SHIFT));
      completions.push([view.getUint32(at, true), view.getInt32(at + this.#word(FORMAT_DONE_RESULT), true)]);
    }
    view.setUint32(this.#word(FORMAT_DONE_HEAD), head, true);
    return completions;
  }

  #writeOne(slot: number, wanted: Wanted): number {
    const stretch = "address" in wanted;
    const [address, length] = stretch ? [wanted.address, wanted.length] : this.#vector(wanted);
    const at = REQUESTS + slot * REQUEST_BYTES;
    const operation = this.#word(stretch ? FORMAT_WHOLE : FORMAT_VECTOR);
    this.#view.setUint8(at + this.#word(FORMAT_OPERATION), operation);
    this.#view.setBigUint64(at + this.#word(FORMAT_ADDRESS), address, true);
    this.#view.setUint32(at + this.#word(FORMAT_LENGTH), length, true);
    return slot;
  }

  #vector(wanted: Exclude<Wanted, Stretch>): [address: bigint, count: number] {
    if ("iovecs" in wanted) return [wanted.iovecs, wanted.count];
    const at = IOVECS + this.#iovecs * IOVEC_BYTES;
    for (const { address, length } of wanted) {
      const iovec = IOVECS + this.#iovecs++ * IOVEC_BYTES;
      this.#view.setBigUint64(iovec, address, true);
      this.#view.setBigUint64(iovec + 8, BigInt(length), true);
    }
    return [baseAddress(this.#memory) + BigInt(at), wanted.length];
  }

  #word(at: number): number {
    return this.#view.getUint32(REQUEST_FORMAT + at, true);
  }
}
