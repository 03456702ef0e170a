/** Event counters between front-end, driver and pollers: eventfd(2), io_submit(2). */
import { openSync } from "node:fs";
import koffi from "koffi";
import { check, EAGAIN, errno, libc } from "./libc.ts";

const EFD_NONBLOCK = 0o4000;
const EFD_CLOEXEC = 0o2000000;

const eventfd = libc.func("int eventfd(unsigned int initial, int flags)");
const eventfdRead = libc.func("int64_t read(int fd, void *buffer, size_t length)");
const eventfdWrite = libc.func("int64_t write(int fd, void *buffer, size_t length)");

const send = libc.func("int64_t send(int fd, void *buffer, size_t length, int flags)");
const ioSetup = libc.func("long syscall(long number, unsigned int count, void *context)");
const ioSubmit = libc.func("long syscall(long number, uint64_t context, long count, void *requests)");
const ioGetevents = libc.func(
  "long syscall(long number, uint64_t context, long min, long max, void *events, void *timeout)",
);

const [SYS_io_setup, SYS_io_getevents, SYS_io_submit] = process.arch === "arm64" ? [0, 4, 2] : [206, 208, 209];
const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
// struct iocb: opcode 0 is IOCB_CMD_PREAD; buffer, length and offset stay 0
const IOCB_SIZE = 64;
const IOCB_FD = 20;
const IOCB_FLAGS = 56;
const IOCB_RESFD = 60;
const IOCB_FLAG_RESFD = 1;
const IO_EVENT_SIZE = 32;
const COMPLETIONS_MAX = 128;

const one = new BigUint64Array([1n]);
const counter = new BigUint64Array(1);

/** A non-blocking event counter at 0. */
export function eventfdCreate(): number {
  return check(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd", "creating an event counter");
}

/** Adds 1 to a counter of our own. For one that somebody else may have filled, there is signalPeer(). */
export function signal(fd: number): boolean {
  return eventfdWrite(fd, one, 8) === 8;
}

/**
 * Signals a fd that came from a peer, an eventfd or a socket, without ever blocking.
 *
 * A peer can fill its eventfd and clear O_NONBLOCK, which belongs to the open file that we share: then write(2) never
 * returns. So the kernel does it: an asynchronous read of nothing from /dev/null completes at once and signals the eventfd
 * (IOCB_FLAG_RESFD), and that saturates instead of waiting. Where asynchronous I/O is forbidden it is write(2) after all.
 * Whether the peer was told is all there is to know: a full counter or socket is readable already, a peer that is gone
 * needs nothing.
 */
export function signalPeer(fd: number): boolean {
  completions ??= new Completions();
  return completions.signal(fd) || send(fd, one, 8, MSG_DONTWAIT | MSG_NOSIGNAL) === 8;
}

/** One context of asynchronous I/O a thread (linux/aio_abi.h). */
class Completions {
  readonly #context: bigint;
  readonly #request = new DataView(new ArrayBuffer(IOCB_SIZE));
  readonly #requests: BigUint64Array;
  readonly #events = new Uint8Array(IO_EVENT_SIZE * COMPLETIONS_MAX);

  constructor() {
    const context = new BigUint64Array(1);
    this.#context = ioSetup(SYS_io_setup, COMPLETIONS_MAX, context) === 0 ? (context[0] ?? 0n) : 0n;
    this.#request.setUint32(IOCB_FD, openSync("/dev/null", "r"), true);
    this.#request.setUint32(IOCB_FLAGS, IOCB_FLAG_RESFD, true);
    this.#requests = new BigUint64Array([koffi.address(new Uint8Array(this.#request.buffer))]);
  }

  /** @returns false if the fd is no eventfd */
  signal(fd: number): boolean {
    if (this.#context === 0n) return eventfdWrite(fd, one, 8) === 8;
    this.#request.setUint32(IOCB_RESFD, fd, true);
    if (ioSubmit(SYS_io_submit, this.#context, 1, this.#requests) === 1) return true;
    if (errno() !== EAGAIN) return false;
    // The ring of completions is full of our own; nobody needs them.
    ioGetevents(SYS_io_getevents, this.#context, 0, COMPLETIONS_MAX, this.#events, null);
    return ioSubmit(SYS_io_submit, this.#context, 1, this.#requests) === 1;
  }
}

let completions: Completions | undefined;

/** Takes the count, 0 when there was none. */
export function drain(fd: number): bigint {
  return eventfdRead(fd, counter, 8) === 8 ? (counter[0] ?? 0n) : 0n;
}
