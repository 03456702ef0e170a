/**
 * Requests through io_uring(7). Its rings and submission entries lie in memory 0 (IORING_SETUP_NO_MMAP, Linux 6.5).
 *
 * Each of the two areas fits into one page: before Linux 6.10 they had to be contiguous in physical memory. The kernel
 * has both pages pinned until the ring is gone.
 *
 * With RWF_NOWAIT a request completes before the call returns that submits it and waits for all. Without it one that finds the file empty or full stays
 * behind, O_NONBLOCK or not, and is carried out late and in any order.
 *
 * Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2); linux/io_uring.h.
 */
import { COMPLETIONS, COMPLETIONS_BYTES, REQUEST_BYTES, REQUESTS, REQUESTS_MAX } from "../src/layout/requests.ts";
import { close, EINTR, errno, libc, systemError } from "./libc.ts";
import { baseAddress, mapAnonymous } from "./mman.ts";
import type { FormattedQueue, RequestFormat, RequestTarget } from "./request-queue.ts";

const SYS_io_uring_setup = 425;
const SYS_io_uring_enter = 426;
const SYS_io_uring_register = 427;
const ENTER_GETEVENTS = 1;
const REGISTER_FILES = 2;
const UNREGISTER_FILES = 3;

const SETUP_CQSIZE = 1 << 3;
const SETUP_SUBMIT_ALL = 1 << 7;
const SETUP_SINGLE_ISSUER = 1 << 12;
const SETUP_DEFER_TASKRUN = 1 << 13;
const SETUP_NO_MMAP = 1 << 14;
const FLAGS_NEEDED = SETUP_NO_MMAP | SETUP_CQSIZE;
/** The other flags, the best first. */
const FLAGS_WANTED = [SETUP_SUBMIT_ALL | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN, 0];

// struct io_uring_params, with io_sqring_offsets and io_cqring_offsets in it
const PARAMS_BYTES = 120;
const PARAMS_CQ_ENTRIES = 4;
const PARAMS_FLAGS = 8;
const PARAMS_SQ_HEAD = 40;
const PARAMS_SQ_TAIL = 44;
const PARAMS_SQ_ARRAY = 64;
const PARAMS_SQ_USER_ADDR = 72;
const PARAMS_CQ_HEAD = 80;
const PARAMS_CQ_TAIL = 84;
const PARAMS_CQ_CQES = 100;
const PARAMS_CQ_USER_ADDR = 112;
const CQ_ENTRIES = 2 * REQUESTS_MAX;

// struct io_uring_sqe
const SQE_OPCODE = 0;
const SQE_FLAGS = 1;
const SQE_ADDR = 16;
const SQE_LEN = 24;
const SQE_RW_FLAGS = 28;
const SQE_USER_DATA = 32;
const OPCODES = { send: { whole: 23, vector: 2 }, receive: { whole: 22, vector: 1 } };
/** SQE_FD is an index of the registered files: 0. It saves 5 % of a packet. */
const FLAG_FIXED_FILE = 1;
const RWF_NOWAIT = 8;

// struct io_uring_cqe
const CQE_SHIFT = 4;
const CQE_RES = 8;

const EINVAL = 22;
/** What an errno of io_uring_setup means here. */
const HINTS: Record<number, string> = {
  1: "forbidden by the sysctl kernel.io_uring_disabled or by a seccomp filter",
  22: "the kernel is older than 6.5",
  38: "not in this kernel, or forbidden by a seccomp filter",
};

const setup = libc.func("long syscall(long number, uint32_t entries, void *params)");
const enter = libc.func(
  "long syscall(long number, uint32_t fd, uint32_t count, uint32_t minimum, uint32_t flags, void *signals)",
);
const register = libc.func("long syscall(long number, uint32_t fd, uint32_t what, void *argument, uint32_t n)");

export class UringQueue implements FormattedQueue {
  readonly method = "io_uring";
  readonly format: RequestFormat;
  readonly #memory: WebAssembly.Memory;
  readonly #fd: number;
  readonly #head: Uint32Array;
  readonly #tail: Uint32Array;

  /** @throws SystemError where io_uring is forbidden or too old */
  constructor({ memory, fd, direction }: RequestTarget) {
    const { ring, params } = makeRing(memory);
    const offset = (at: number): number => COMPLETIONS + params.getUint32(at, true);
    this.#memory = memory;
    this.#fd = ring;
    this.#head = new Uint32Array(memory.buffer, offset(PARAMS_SQ_HEAD), 1);
    this.#tail = new Uint32Array(memory.buffer, offset(PARAMS_SQ_TAIL), 1);
    this.format = {
      operation: SQE_OPCODE,
      address: SQE_ADDR,
      length: SQE_LEN,
      ...OPCODES[direction],
      tail: offset(PARAMS_SQ_TAIL),
      doneHead: offset(PARAMS_CQ_HEAD),
      doneTail: offset(PARAMS_CQ_TAIL),
      doneMask: CQ_ENTRIES - 1,
      done: offset(PARAMS_CQ_CQES),
      doneShift: CQE_SHIFT,
      doneResult: CQE_RES,
    };
    const order = new Uint32Array(memory.buffer, offset(PARAMS_SQ_ARRAY), REQUESTS_MAX);
    const entries = new DataView(memory.buffer, REQUESTS);
    for (let slot = 0; slot < REQUESTS_MAX; slot++) {
      order[slot] = slot;
      entries.setUint8(slot * REQUEST_BYTES + SQE_FLAGS, FLAG_FIXED_FILE);
      entries.setUint32(slot * REQUEST_BYTES + SQE_RW_FLAGS, RWF_NOWAIT, true);
      entries.setUint32(slot * REQUEST_BYTES + SQE_USER_DATA, slot, true);
    }
    if (register(SYS_io_uring_register, ring, REGISTER_FILES, new Int32Array([fd]), 1) < 0) {
      const error = systemError("io_uring_register", `registering fd ${fd}`);
      this.close();
      throw error;
    }
  }

  submit(count: number): void {
    let taken: number;
    do {
      // Requests that find the file empty or full complete by task work, of which the kernel does a part unless it waits for all.
      taken = enter(SYS_io_uring_enter, this.#fd, count, count, ENTER_GETEVENTS, null);
    } while (taken < 0 && errno() === EINTR);
    // The kernel's head is where it stopped.
    if (taken !== count) this.#tail[0] = this.#head[0]!;
  }

  close(): void {
    // At once: the ring itself goes in its own time, and would hold the file as long.
    register(SYS_io_uring_register, this.#fd, UNREGISTER_FILES, null, 0);
    close(this.#fd);
    dropPages(this.#memory);
  }
}

/** A ring of our own in memory 0, with the best flags that this kernel has. */
function makeRing(memory: WebAssembly.Memory): { ring: number; params: DataView } {
  const base = baseAddress(memory);
  for (const wanted of FLAGS_WANTED) {
    const params = new DataView(new ArrayBuffer(PARAMS_BYTES));
    params.setUint32(PARAMS_CQ_ENTRIES, CQ_ENTRIES, true);
    params.setUint32(PARAMS_FLAGS, FLAGS_NEEDED | wanted, true);
    params.setBigUint64(PARAMS_SQ_USER_ADDR, base + BigInt(REQUESTS), true);
    params.setBigUint64(PARAMS_CQ_USER_ADDR, base + BigInt(COMPLETIONS), true);
    const ring = setup(SYS_io_uring_setup, REQUESTS_MAX, new Uint8Array(params.buffer));
    if (ring >= 0) return { ring, params };
    if (errno() !== EINVAL) break;
  }
  const hint = HINTS[errno()];
  throw systemError("io_uring_setup", `making an io_uring${hint === undefined ? "" : `; ${hint}`}`);
}

/** Lays new pages over those that the kernel has: whatever it may still do there, memory 0 does not see it. */
function dropPages(memory: WebAssembly.Memory): void {
  const sizeBytes = BigInt(COMPLETIONS - REQUESTS + COMPLETIONS_BYTES);
  mapAnonymous({ memory, offset: BigInt(REQUESTS), sizeBytes });
}
