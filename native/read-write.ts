/** Requests carried out from here, one system call each: read(2), readv(2), write(2), writev(2). */
import { REQUEST_BYTES, REQUESTS, REQUESTS_MAX } from "../src/layout/requests.ts";
import { IOCB_BUFFER, IOCB_LENGTH, IOCB_OPCODE, Iocbs } from "./aio.ts";
import { EAGAIN, EINTR, errno, libc } from "./libc.ts";
import type { FormattedQueue, RequestFormat, RequestTarget } from "./request-queue.ts";

const arguments_ = "int fd, uint64_t address, size_t length";
const calls = {
  send: { whole: libc.func(`int64_t write(${arguments_})`), vector: libc.func(`int64_t writev(${arguments_})`) },
  receive: { whole: libc.func(`int64_t read(${arguments_})`), vector: libc.func(`int64_t readv(${arguments_})`) },
};

/** Requests look as for AIO. After the first EAGAIN the rest is not taken: the file is full, or empty. */
export class ReadWriteQueue implements FormattedQueue {
  readonly method = "rw";
  readonly #iocbs: Iocbs;
  readonly #view: DataView;
  readonly #fd: number;
  readonly #calls: (typeof calls)["send"];

  constructor(target: RequestTarget) {
    this.#iocbs = new Iocbs(target);
    this.#view = new DataView(target.memory.buffer);
    this.#fd = target.fd;
    this.#calls = calls[target.direction];
  }

  get format(): RequestFormat {
    return this.#iocbs.format;
  }

  submit(count: number): void {
    let next = this.#iocbs.begin(count);
    let result = 0;
    for (const end = next + count; next !== end && result !== -EAGAIN; next++) {
      const slot = next & (REQUESTS_MAX - 1);
      result = this.#perform(REQUESTS + slot * REQUEST_BYTES);
      this.#iocbs.complete(slot, result);
    }
    this.#iocbs.end(next);
  }

  /** Nothing to close. */
  close(): void {}

  /** @returns bytes, or a negative errno */
  #perform(request: number): number {
    const vector = this.#view.getUint8(request + IOCB_OPCODE) === this.format.vector;
    const call = vector ? this.#calls.vector : this.#calls.whole;
    const address = this.#view.getBigUint64(request + IOCB_BUFFER, true);
    const length = this.#view.getUint32(request + IOCB_LENGTH, true);
    for (;;) {
      const result: number = call(this.#fd, address, length);
      if (result >= 0) return result;
      const error = errno();
      if (error !== EINTR) return -error;
    }
  }
}
