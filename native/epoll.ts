/**
 * Waiting on many fds: epoll(7), edge-triggered.
 *
 * Edge-triggered, an eventfd reports each write anew without being read: that saves a system call per kick.
 * Used by threads that own their loop (pollers, drivers); the main thread waits in Node's loop (poll.ts).
 */
import { check, close, EINTR, errno, libc, systemError } from "./libc.ts";

const EPOLL_CLOEXEC = 0o2000000;
const EPOLL_CTL_ADD = 1;
const EPOLL_CTL_DEL = 2;
const EPOLL_CTL_MOD = 3;
const EPOLLIN = 0x001;
const EPOLLOUT = 0x004;
const EPOLLET = 0x8000_0000;
/** struct epoll_event: u32 events, u64 data; packed on x86-64, padded elsewhere. */
const DATA_OFFSET = process.arch === "x64" ? 4 : 8;
const EVENT_SIZE = DATA_OFFSET + 8;
const EVENTS_MAX = 64;

const epoll_create1 = libc.func("int epoll_create1(int flags)");
const epoll_ctl = libc.func("int epoll_ctl(int epoll, int operation, int fd, void *event)");
const epoll_wait = libc.func("int epoll_wait(int epoll, void *events, int length, int timeout_ms)");

export class Epoll {
  readonly #fd = check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1", "creating a wait set");
  readonly #events = Buffer.alloc(EVENT_SIZE * EVENTS_MAX);
  readonly #event = Buffer.alloc(EVENT_SIZE);

  /** Reports each time that there is something new to read in `fd`. An fd that is ready now is reported by the next wait. */
  add(fd: number): void {
    this.#control(EPOLL_CTL_ADD, fd, EPOLLIN);
  }

  /** The same for an fd that was added, as if for the first time; from now on it also reports room to write after it was full. */
  addAgain(fd: number): void {
    this.#control(EPOLL_CTL_MOD, fd, EPOLLIN | EPOLLOUT);
  }

  #control(operation: number, fd: number, events: number): void {
    this.#event.writeUInt32LE((events | EPOLLET) >>> 0, 0);
    this.#event.writeUInt32LE(fd, DATA_OFFSET);
    check(epoll_ctl(this.#fd, operation, fd, this.#event), "epoll_ctl", `waiting on fd ${fd}`);
  }

  remove(fd: number): void {
    check(epoll_ctl(this.#fd, EPOLL_CTL_DEL, fd, this.#event), "epoll_ctl", `no longer waiting on fd ${fd}`);
  }

  /** Blocks this thread until an fd is ready or the time is over (-1: for ever). @returns how many are ready, 0..64 */
  wait(timeoutMs: number): number {
    const count = epoll_wait(this.#fd, this.#events, EVENTS_MAX, timeoutMs);
    if (count >= 0) return count;
    if (errno() === EINTR) return 0;
    throw systemError("epoll_wait", "waiting for kicks");
  }

  /** The i-th fd that the last wait reported ready. */
  ready(i: number): number {
    return this.#events.readUInt32LE(i * EVENT_SIZE + DATA_OFFSET);
  }

  /** Whether there may be something to read in the i-th fd, or an error to meet. */
  isReadable(i: number): boolean {
    return (this.#events.readUInt32LE(i * EVENT_SIZE) & ~EPOLLOUT) !== 0;
  }

  /** Whether there may be room to write to it, or an error to meet. */
  isWritable(i: number): boolean {
    return (this.#events.readUInt32LE(i * EVENT_SIZE) & ~EPOLLIN) !== 0;
  }

  close(): void {
    close(this.#fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
