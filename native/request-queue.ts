/**
 * Requests to the kernel, the half of them that JavaScript does. The core writes reads or writes of one file into
 * memory 0 (src/layout/requests.ts), `submit` hands them to the kernel with one system call, or two, and the core reads
 * their completions there. Of three ways the first that works is taken:
 *
 * | method     | what for                                                   | packets a second, a C loop on a TAP = 1 |
 * |------------|------------------------------------------------------------|-----------------------------------------|
 * | `io_uring` | Linux 6.5 and newer, unless a sysctl or seccomp forbids it | 1.02..1.07; with iovecs 0.91..0.97      |
 * | `aio`      | all else: Linux AIO; Docker's seccomp profile allows it    | 0.83..0.87                              |
 * | `rw`       | the last resort: a system call for each packet             | 0.70..0.77                              |
 *
 * All requests complete before `submit` returns, so nobody but this thread ever touches the core's buffers. The file
 * has to take requests without waiting (RWF_NOWAIT), or be non-blocking already for `aio` and `rw`.
 *
 * A queue belongs to the thread that opened it.
 */
import { SystemError } from "../src/errors.ts";
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
  REQUEST_FORMAT,
  REQUESTS,
} from "../src/layout/requests.ts";
import { AioQueue } from "./aio.ts";
import { EAGAIN, systemError } from "./libc.ts";
import { ReadWriteQueue } from "./read-write.ts";
import { UringQueue } from "./uring.ts";

export type RequestMethod = "io_uring" | "aio" | "rw";

/** What requests are for, and where they lie. */
export interface RequestTarget {
  /** A lane's memory 0. */
  readonly memory: WebAssembly.Memory;
  /** Non-blocking. */
  readonly fd: number;
  /** `send`: requests write to the file, `receive`: they read. */
  readonly direction: "send" | "receive";
}

export interface RequestQueue {
  readonly method: RequestMethod;
  /**
   * Hands over the last `count` requests, 1..REQUESTS_MAX, those before the number at FORMAT_TAIL, in that order. All
   * completions must have been read.
   *
   * When it returns they have completed. Those that the kernel did not take now have no completion, and their numbers
   * are free again. A request that cannot be carried out completes with its errno.
   */
  submit(count: number): void;
  /** Nothing is written to memory 0 any more, and the file is let go. */
  close(): void;
}

/** How requests and completions look; the words of REQUEST_FORMAT. */
export interface RequestFormat {
  operation: number;
  address: number;
  length: number;
  whole: number;
  vector: number;
  tail: number;
  doneHead: number;
  doneTail: number;
  doneMask: number;
  done: number;
  doneShift: number;
  doneResult: number;
}

/** A queue that says how its requests look. */
export interface FormattedQueue extends RequestQueue {
  readonly format: RequestFormat;
}

/** A method that could not be used, and why. */
export interface RefusedMethod {
  method: RequestMethod;
  reason: string;
}

const EINVAL = 22;
const EBADFD = 77;

const constructors = { io_uring: UringQueue, aio: AioQueue, rw: ReadWriteQueue };

/** Results of a request for nothing that show a working queue: a TAP wants a whole header, or is not attached now. */
const HARMLESS = new Set([-EAGAIN, -EINVAL, -EBADFD]);

/**
 * Opens the first of the methods that works, and describes it at REQUEST_FORMAT.
 * @returns the queue, and the methods before it
 * @throws SystemError if none works
 */
export function openRequestQueue(
  target: RequestTarget,
  methods: readonly RequestMethod[] = ["io_uring", "aio", "rw"],
): { queue: RequestQueue; refused: RefusedMethod[] } {
  const refused: RefusedMethod[] = [];
  let last: SystemError | undefined;
  for (const method of methods) {
    try {
      return { queue: open(method, target), refused };
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      refused.push({ method, reason: error.message });
      last = error;
    }
  }
  if (last === undefined) throw new RangeError("no method to choose from");
  const reasons = refused.map(({ method, reason }) => `${method}: ${reason}`).join("; ");
  throw new SystemError(last.syscall, last.errno, last.code, `no way to reach fd ${target.fd} works (${reasons})`);
}

function open(method: RequestMethod, target: RequestTarget): RequestQueue {
  new Uint8Array(target.memory.buffer, REQUESTS, REQUEST_FORMAT - REQUESTS).fill(0);
  const queue: FormattedQueue = new constructors[method](target);
  const words = new DataView(target.memory.buffer);
  for (const [at, value] of recordOf(queue.format)) words.setUint32(REQUEST_FORMAT + at, value, true);
  try {
    tryOut(queue, words);
  } catch (error) {
    queue.close();
    throw error;
  }
  return queue;
}

function recordOf(format: RequestFormat): [at: number, value: number][] {
  return [
    [FORMAT_OPERATION, format.operation],
    [FORMAT_ADDRESS, format.address],
    [FORMAT_LENGTH, format.length],
    [FORMAT_WHOLE, format.whole],
    [FORMAT_VECTOR, format.vector],
    [FORMAT_TAIL, format.tail],
    [FORMAT_DONE_HEAD, format.doneHead],
    [FORMAT_DONE_TAIL, format.doneTail],
    [FORMAT_DONE_MASK, format.doneMask],
    [FORMAT_DONE, format.done],
    [FORMAT_DONE_SHIFT, format.doneShift],
    [FORMAT_DONE_RESULT, format.doneResult],
  ];
}

/**
 * Hands over one request for 0 bytes, as the core would: it reads no packet from a TAP and writes none.
 * It fails where the method is forbidden half way, or the file cannot do it without waiting.
 */
function tryOut(queue: FormattedQueue, words: DataView): void {
  const { format, method } = queue;
  words.setUint8(REQUESTS + format.operation, format.whole);
  words.setUint32(format.tail, 1, true);
  queue.submit(1);
  const head = words.getUint32(format.doneHead, true);
  if (words.getUint32(format.doneTail, true) === head) {
    throw systemError(method, "trying it out: the kernel takes no request", EAGAIN);
  }
  const completion = format.done + ((head & format.doneMask) << format.doneShift);
  const result = words.getInt32(completion + format.doneResult, true);
  words.setUint32(format.doneHead, head + 1, true);
  if (result < 0 && !HARMLESS.has(result)) throw systemError(method, "trying it out with 0 bytes", -result);
}
