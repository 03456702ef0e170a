/** Event counters between front-end, driver and pollers: eventfd(2). */
import { check, libc } from "./libc.ts";

const EFD_NONBLOCK = 0o4000;
const EFD_CLOEXEC = 0o2000000;

const eventfd = libc.func("int eventfd(unsigned int initial, int flags)");
const eventfdRead = libc.func("int64_t read(int fd, void *buffer, size_t length)");
const eventfdWrite = libc.func("int64_t write(int fd, void *buffer, size_t length)");

const one = new BigUint64Array([1n]);
const counter = new BigUint64Array(1);

/** A non-blocking event counter at 0. */
export function eventfdCreate(): number {
  return check(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd", "creating an event counter");
}

/**
 * Adds 1. Whether the reader was told is all there is to know: a full counter or pipe (EAGAIN) is already readable,
 * and a reader that is gone (EPIPE) needs nothing.
 */
export function signal(fd: number): boolean {
  return eventfdWrite(fd, one, 8) === 8;
}

/** Takes the count, 0 when there was none. */
export function drain(fd: number): bigint {
  return eventfdRead(fd, counter, 8) === 8 ? (counter[0] ?? 0n) : 0n;
}
