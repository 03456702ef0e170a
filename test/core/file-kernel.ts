/**
 * The kernel's half of a lane with a file at one end: carries out the requests that the core made, on the guest's memory
 * of a rig. It refuses, by an exception, whatever no kernel may be asked for: it would do it.
 *
 * The process addresses that the core is told are made up, so nothing can depend on real ones.
 */
import { Iocbs } from "../../native/aio.ts";
import type { RequestFormat } from "../../native/request-queue.ts";
import {
  BOUNCES,
  BOUNCE_BYTES,
  COMPLETIONS,
  FILE_HEADERS,
  FILE_HEADER_BYTES,
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
  IOVECS,
  IOVECS_MAX,
  IOVEC_BYTES,
  MEMORY_BASES,
  REQUESTS,
  REQUESTS_MAX,
  REQUEST_BYTES,
  REQUEST_FORMAT,
  REQUEST_IOVECS_MAX,
} from "../../src/layout/requests.ts";
import type { Extent } from "../../src/memory/guest-memory.ts";

export type Layout = "io_uring" | "aio";

/** What the core may never ask for, whatever a guest does. */
export class ForbiddenRequest extends Error {}

export const [EIO, EBADF, EAGAIN, ENOMEM, EFAULT, EINVAL, EBADFD] = [-5, -9, -11, -12, -14, -22, -77] as const;

/** NET_HDR_SIZE of the file; the kernel leaves its num_buffers alone when it gives a frame. */
const HEADER = { bytes: 12, written: 10 };
const SEGMENT_BYTES = 1n << 34n;
/** Memory 0, then the segments: side by side, in no order, above what a signed 64-bit number holds. */
const BASES = [0x8000_0000_0000_0000n, ...[3n, 1n, 4n, 0n, 2n].map((i) => 0x9000_0000_0000_0000n + i * SEGMENT_BYTES)];

// What io_uring's rings look like; all counters are about to wrap
const SQE = { flags: 1, rwFlags: 28, userData: 32 };
const URING = { tail: COMPLETIONS + 64, doneHead: COMPLETIONS + 128, doneTail: COMPLETIONS + 192 };
const URING_FORMAT = {
  operation: 0,
  address: 16,
  length: 24,
  ...URING,
  doneMask: 2 * REQUESTS_MAX - 1,
  done: COMPLETIONS + 256,
  doneShift: 4,
  doneResult: 8,
};
const URING_OPERATIONS = { send: { whole: 23, vector: 2 }, receive: { whole: 22, vector: 1 } };

interface Guest {
  readonly extents: readonly Extent[];
  readonly segments: readonly WebAssembly.Memory[];
}

export interface KernelPlan {
  memory: WebAssembly.Memory;
  guest: Guest;
  direction: "send" | "receive";
  layout: Layout;
  /** Whether the guest's driver lets the device read from, or write to, these bytes now. */
  allows: (gpa: bigint, length: number) => boolean;
}

/** What a request gets: an errno, negative, or bytes that are none of a frame; "untaken": it, and all behind it, stay undone. */
export type Answer = number | "untaken" | undefined;

export class FakeKernel {
  readonly #plan: KernelPlan;
  readonly #view: DataView;
  readonly #iocbs: Iocbs | undefined;
  readonly #format: RequestFormat;
  /** Of each request, by its number since the beginning; undefined: what the file has. */
  answer: (number: number) => Answer = () => undefined;
  /** Frames that were sent, or that were read, with their net headers. */
  readonly passed: Uint8Array[] = [];
  /** Frames that wait to be read, with their net headers. */
  readonly queue: Uint8Array[] = [];
  /** Frames that were read and got lost in that. */
  readonly lost: Uint8Array[] = [];
  /** Results of the last batch; undefined: untaken. */
  results: (number | undefined)[] = [];
  #requests = 0;

  constructor(plan: KernelPlan) {
    const { memory, guest, direction, layout } = plan;
    this.#plan = plan;
    this.#view = new DataView(memory.buffer);
    for (let i = 0; i <= guest.segments.length; i++) this.#view.setBigUint64(MEMORY_BASES + 8 * i, BASES[i]!, true);
    this.#iocbs = layout === "aio" ? new Iocbs({ memory, fd: 9, direction }) : undefined;
    this.#format = this.#iocbs?.format ?? { ...URING_FORMAT, ...URING_OPERATIONS[direction] };
    if (layout === "io_uring") this.#beginUring();
    const {
      operation,
      address,
      length,
      whole,
      vector,
      tail,
      doneHead,
      doneTail,
      doneMask,
      done,
      doneShift,
      doneResult,
    } = this.#format;
    for (const [at, value] of [
      [FORMAT_OPERATION, operation],
      [FORMAT_ADDRESS, address],
      [FORMAT_LENGTH, length],
      [FORMAT_WHOLE, whole],
      [FORMAT_VECTOR, vector],
      [FORMAT_TAIL, tail],
      [FORMAT_DONE_HEAD, doneHead],
      [FORMAT_DONE_TAIL, doneTail],
      [FORMAT_DONE_MASK, doneMask],
      [FORMAT_DONE, done],
      [FORMAT_DONE_SHIFT, doneShift],
      [FORMAT_DONE_RESULT, doneResult],
    ] as const) {
      this.#view.setUint32(REQUEST_FORMAT + at, value, true);
    }
  }

  #beginUring(): void {
    for (let slot = 0; slot < REQUESTS_MAX; slot++) {
      this.#view.setUint8(REQUESTS + slot * REQUEST_BYTES + SQE.flags, 1);
      this.#view.setUint32(REQUESTS + slot * REQUEST_BYTES + SQE.rwFlags, 8, true);
      this.#view.setUint32(REQUESTS + slot * REQUEST_BYTES + SQE.userData, slot, true);
    }
    this.#view.setUint32(URING.tail, 0xffff_ffff - 100, true);
    for (const at of [URING.doneHead, URING.doneTail]) this.#view.setUint32(at, 0xffff_ffff - 60, true);
  }

  /** Carries out the last `count` requests, as RequestQueue does. */
  submit(count: number): void {
    this.results = [];
    if (count < 1 || count > REQUESTS_MAX) throw new ForbiddenRequest(`${count} requests`);
    const { tail, doneHead, doneTail } = this.#format;
    if (this.#word(doneHead) !== this.#word(doneTail)) throw new ForbiddenRequest("completions were not read");
    this.#iocbs?.begin(count);
    const end = this.#word(tail);
    const first = end - count;
    for (let number = 0; number < count; number++) {
      const slot = (first + number) & (REQUESTS_MAX - 1);
      const parts = this.#partsOf(slot, number);
      const answer = this.answer(this.#requests);
      if (answer === "untaken") {
        this.results.push(...Array<undefined>(count - number).fill(undefined));
        if (this.#iocbs) this.#iocbs.end(first + number);
        else this.#view.setUint32(tail, first + number, true);
        return;
      }
      this.#requests++;
      const result = this.#plan.direction === "send" ? this.#write(parts, answer) : this.#read(parts, answer);
      this.results.push(result);
      this.#complete(slot, result);
    }
    this.#iocbs?.end(end);
  }

  #complete(slot: number, result: number): void {
    if (this.#iocbs) {
      this.#iocbs.complete(slot, result);
      return;
    }
    const { doneTail, doneMask, done, doneShift, doneResult } = this.#format;
    const at = done + ((this.#word(doneTail) & doneMask) << doneShift);
    this.#view.setUint32(at, slot, true);
    this.#view.setInt32(at + doneResult, result, true);
    this.#view.setUint32(doneTail, this.#word(doneTail) + 1, true);
  }

  #write(parts: readonly Uint8Array[], answer: number | undefined): number {
    if (answer !== undefined) return answer;
    const bytes = Uint8Array.from(Buffer.concat(parts));
    if (bytes.length < HEADER.bytes + 14) return EINVAL;
    this.passed.push(bytes);
    return bytes.length;
  }

  /** As a TAP does: a frame that does not fit is cut, and nobody is told. */
  #read(parts: readonly Uint8Array[], answer: number | undefined): number {
    if (answer !== undefined) {
      const first = answer === EFAULT ? this.queue.shift() : undefined;
      if (first) this.lost.push(first);
      return answer;
    }
    const frame = this.queue.shift();
    if (!frame) return EAGAIN;
    this.passed.push(frame);
    let done = 0;
    for (const part of parts) {
      for (let i = 0; i < part.length && done < frame.length; i++, done++) {
        if (done < HEADER.written || done >= HEADER.bytes) part[i] = frame[done]!;
      }
    }
    return done;
  }

  /** The stretches of memory of a request. */
  #partsOf(slot: number, number: number): Uint8Array[] {
    const at = REQUESTS + slot * REQUEST_BYTES;
    const { operation, whole, vector, address, length } = this.#format;
    if (!this.#iocbs) this.#mustBe("user data", this.#word(at + SQE.userData), slot);
    if (!this.#iocbs) this.#mustBe("flags", this.#word(at + SQE.rwFlags), 8);
    const [start, size] = [this.#view.getBigUint64(at + address, true), this.#word(at + length)];
    const code = this.#view.getUint8(at + operation);
    if (code === whole) return [this.#part(start, BigInt(size), number)];
    this.#mustBe("operation", code, vector);
    const iovecs = Number(start - BASES[0]!);
    const end = iovecs + size * IOVEC_BYTES;
    if (size < 1 || size > REQUEST_IOVECS_MAX || iovecs < IOVECS || end > IOVECS + IOVECS_MAX * IOVEC_BYTES) {
      throw new ForbiddenRequest(`${size} iovecs at 0x${iovecs.toString(16)}`);
    }
    return Array.from({ length: size }, (_, i) => {
      const iovec = iovecs + i * IOVEC_BYTES;
      return this.#part(this.#view.getBigUint64(iovec, true), this.#view.getBigUint64(iovec + 8, true), number);
    });
  }

  /** Of a stretch as the core names it: the memory. */
  #part(address: bigint, size: bigint, number: number): Uint8Array {
    const shown = `0x${address.toString(16)}, ${size} bytes, request ${number}`;
    const length = Number(size);
    const { memory, guest, allows } = this.#plan;
    const own = address - BASES[0]!;
    if (own >= 0n && own < BigInt(memory.buffer.byteLength)) {
      const at = Number(own);
      const isIn = (start: number, bytes: number) => at >= start && at + length <= start + bytes;
      const header = FILE_HEADERS + number * FILE_HEADER_BYTES;
      if (!(at === header && length === HEADER.bytes) && !isIn(BOUNCES + number * BOUNCE_BYTES, BOUNCE_BYTES)) {
        throw new ForbiddenRequest(`memory 0: ${shown}`);
      }
      return new Uint8Array(memory.buffer, at, length);
    }
    const segment = guest.segments.findIndex((_, i) => {
      return address >= BASES[i + 1]! && address < BASES[i + 1]! + SEGMENT_BYTES;
    });
    if (segment < 0) throw new ForbiddenRequest(`no memory: ${shown}`);
    const offset = address - BASES[segment + 1]!;
    const inside = guest.extents.filter(
      (e) => e.segment === segment && offset >= e.offset && offset + size <= e.offset + e.sizeBytes,
    );
    if (!inside.some((e) => allows(e.gpa + (offset - e.offset), length))) {
      throw new ForbiddenRequest(`guest memory: ${shown}, segment ${segment}, offset 0x${offset.toString(16)}`);
    }
    return new Uint8Array(guest.segments[segment]!.buffer, Number(offset), length);
  }

  #mustBe(what: string, value: number, expected: number): void {
    if (value !== expected) throw new ForbiddenRequest(`${what}: ${value}, not ${expected}`);
  }

  #word(at: number): number {
    return this.#view.getUint32(at, true);
  }
}
