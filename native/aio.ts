/**
 * Requests through Linux AIO: io_submit(2) carries them out, io_getevents(2) fetches their completions into memory 0.
 *
 * A TAP queue takes and gives packets within io_submit, and never waits there if its fd is non-blocking. Not asked for:
 * RWF_NOWAIT, which tun may lack in the older kernels, those that this is for.
 *
 * Source: linux/aio_abi.h.
 */
import { COMPLETIONS, REQUEST_BYTES, REQUEST_POINTERS, REQUESTS, REQUESTS_MAX } from "../src/layout/requests.ts";
import { check, EAGAIN, EINTR, errno, libc, systemError } from "./libc.ts";
import { baseAddress } from "./mman.ts";
import type { FormattedQueue, RequestFormat, RequestTarget } from "./request-queue.ts";

const [SYS_io_setup, SYS_io_destroy, SYS_io_getevents, SYS_io_submit] =
  process.arch === "arm64" ? [0, 1, 4, 2] : [206, 207, 208, 209];
const CONTEXT_EVENTS = 2 * REQUESTS_MAX;
const ENOMEM = 12;

// struct iocb
const IOCB_DATA = 0;
export const IOCB_OPCODE = 16;
const IOCB_FD = 20;
export const IOCB_BUFFER = 24;
export const IOCB_LENGTH = 32;
export const OPCODES = { send: { whole: 1, vector: 8 }, receive: { whole: 0, vector: 7 } };

// struct io_event
const EVENT_SHIFT = 5;
const EVENT_DATA = 0;
const EVENT_RESULT = 16;

// Behind a batch's events in their page: words in place of those that io_uring has
const WORDS = COMPLETIONS + (REQUESTS_MAX << EVENT_SHIFT);
const TAIL = 0;
const DONE_HEAD = 1;
const DONE_TAIL = 2;

const setup = libc.func("long syscall(long number, unsigned int events, void *context)");
const destroy = libc.func("long syscall(long number, uint64_t context)");
const submit = libc.func("long syscall(long number, uint64_t context, long count, uint64_t requests)");
const getevents = libc.func(
  "long syscall(long number, uint64_t context, long minimum, long maximum, uint64_t events, void *timeout)",
);

/** Requests as struct iocb, completions as struct io_event. Those of a batch begin at the first event again. */
export class Iocbs {
  readonly format: RequestFormat;
  readonly #view: DataView;
  readonly #words: Uint32Array;

  constructor({ memory, fd, direction }: RequestTarget) {
    this.#view = new DataView(memory.buffer);
    this.#words = new Uint32Array(memory.buffer, WORDS, 3);
    this.format = {
      operation: IOCB_OPCODE,
      address: IOCB_BUFFER,
      length: IOCB_LENGTH,
      ...OPCODES[direction],
      tail: WORDS + 4 * TAIL,
      doneHead: WORDS + 4 * DONE_HEAD,
      doneTail: WORDS + 4 * DONE_TAIL,
      doneMask: REQUESTS_MAX - 1,
      done: COMPLETIONS,
      doneShift: EVENT_SHIFT,
      doneResult: EVENT_RESULT,
    };
    for (let slot = 0; slot < REQUESTS_MAX; slot++) {
      this.#view.setUint32(REQUESTS + slot * REQUEST_BYTES + IOCB_DATA, slot, true);
      this.#view.setUint32(REQUESTS + slot * REQUEST_BYTES + IOCB_FD, fd, true);
    }
  }

  /** Begins a batch. @returns the number of its first request */
  begin(count: number): number {
    this.#words[DONE_HEAD] = 0;
    this.#words[DONE_TAIL] = 0;
    return this.#words[TAIL]! - count;
  }

  /** Ends a batch: `next` is the number of the first request that was not taken. */
  end(next: number): void {
    this.#words[TAIL] = next;
  }

  /** A completion of our own making. @param result bytes, or a negative errno */
  complete(slot: number, result: number): void {
    const event = this.nextEvent();
    this.#view.setUint32(event + EVENT_DATA, slot, true);
    this.#view.setInt32(event + EVENT_RESULT, result, true);
    this.completed(1);
  }

  /** Where the next completion will lie in memory 0. */
  nextEvent(): number {
    return COMPLETIONS + (this.#words[DONE_TAIL]! << EVENT_SHIFT);
  }

  /** The next `count` completions are there. */
  completed(count: number): void {
    this.#words[DONE_TAIL]! += count;
  }
}

export class AioQueue implements FormattedQueue {
  readonly method = "aio";
  readonly #base: bigint;
  readonly #context: bigint;
  readonly #iocbs: Iocbs;

  /** @throws SystemError where it is forbidden, or fs.aio-max-nr is used up */
  constructor(target: RequestTarget) {
    const context = new BigUint64Array(1);
    check(setup(SYS_io_setup, CONTEXT_EVENTS, context), "io_setup", "making a context; EAGAIN: raise fs.aio-max-nr");
    this.#context = context[0]!;
    this.#base = baseAddress(target.memory);
    this.#iocbs = new Iocbs(target);
    const pointers = new BigUint64Array(target.memory.buffer, REQUEST_POINTERS, 2 * REQUESTS_MAX);
    for (let i = 0; i < pointers.length; i++) {
      pointers[i] = this.#base + BigInt(REQUESTS + (i % REQUESTS_MAX) * REQUEST_BYTES);
    }
  }

  get format(): RequestFormat {
    return this.#iocbs.format;
  }

  submit(count: number): void {
    let next = this.#iocbs.begin(count);
    const end = next + count;
    while (next !== end) {
      const slot = next & (REQUESTS_MAX - 1);
      const pointers = this.#base + BigInt(REQUEST_POINTERS + 8 * slot);
      const taken = submit(SYS_io_submit, this.#context, end - next, pointers);
      if (taken > 0) {
        this.#fetch(taken);
        next += taken;
        continue;
      }
      const error = taken === 0 ? EAGAIN : errno();
      if (error === EINTR) continue;
      if (error === EAGAIN || error === ENOMEM) break;
      // The first one is bad in itself; those behind it are not reached before it is out of the way.
      this.#iocbs.complete(slot, -error);
      next++;
    }
    this.#iocbs.end(next);
  }

  close(): void {
    destroy(SYS_io_destroy, this.#context);
  }

  #fetch(count: number): void {
    for (let left = count; left > 0;) {
      const events = this.#base + BigInt(this.#iocbs.nextEvent());
      const got = getevents(SYS_io_getevents, this.#context, left, left, events, null);
      if (got < 0 && errno() !== EINTR) throw systemError("io_getevents", `fetching ${left} completions`);
      if (got <= 0) continue;
      this.#iocbs.completed(got);
      left -= got;
    }
  }
}
