/**
 * Builds and loads bench/tap.c: the C loops that the TAP bench compares with, the interface and the clock of both
 * sides.
 *
 * As c-lane.ts, it calls C by itself: this library is never part of the product.
 */
import { spawnSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { getSystemErrorMap } from "node:util";
import koffi from "koffi";
import { ip } from "./tap-host.ts";

const directory = "build/bench";
const library = `${directory}/tap.so`;
const command = ["cc", "-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra"];

/** Compiles tap.c. @throws Error if that cannot be */
export function buildTapLibrary(): void {
  mkdirSync(directory, { recursive: true });
  const [cc, ...flags] = command;
  const { error, status, stderr } = spawnSync(cc!, [...flags, "-o", library, "bench/tap.c"], { encoding: "utf8" });
  if (error) throw new Error(`needs a C compiler (apt-get install gcc): ${error.message}`);
  if (status !== 0) throw new Error(`cc failed: ${stderr}`);
}

/** Frames in guest memory: `buffers` of them, `stride` bytes each, net header first. */
export interface Frames {
  /** Where they begin in this process. */
  address: bigint;
  /** Another one, for fill(). */
  original: bigint;
  stride: number;
  buffers: number;
  /** Without the net header. */
  frameBytes: number;
}

/** A TAP interface with one queue, and a socket that fills it. */
export class BenchTap implements Disposable {
  /** The queue: non-blocking, with net headers of 12 bytes. */
  readonly fd: number;
  readonly #sender: number;
  readonly #c: ReturnType<typeof load>;

  /** @param queueLength frames that wait for a reader at most @throws Error without CAP_NET_ADMIN */
  constructor(name: string, queueLength: number) {
    this.#c = load();
    this.fd = check(this.#c.open(name), `creating the TAP interface ${name}`);
    ip(`link set ${name} txqueuelen ${queueLength} up`);
    this.#sender = check(this.#c.sender(name), `opening a packet socket on ${name}`);
  }

  /** CPU time of the calling thread in ns. */
  threadNs(): number {
    return this.#c.threadNs();
  }

  /** Puts the original into the queue so many times. */
  fill({ original, frameBytes }: Frames, count: number): void {
    check(this.#c.fill(this.#sender, original, frameBytes, count), `filling the queue with ${count} frames`);
  }

  drain(): void {
    this.#c.drain(this.fd);
  }

  /** The C loop that sends. @returns ns of CPU time */
  write({ address, stride, buffers, frameBytes }: Frames, count: number): number {
    return check(this.#c.write(this.fd, address, stride, buffers, frameBytes, count), "write");
  }

  /** The C loop that receives. @returns ns of CPU time */
  read({ address, stride, buffers }: Frames, count: number): number {
    return check(this.#c.read(this.fd, address, stride, buffers, count), "read");
  }

  [Symbol.dispose](): void {
    this.#c.close(this.#sender);
    this.#c.close(this.fd);
  }
}

function load() {
  const c = koffi.load(library);
  const frames = "uintptr_t frames, uint32_t stride, uint32_t buffers";
  return {
    open: c.func("int tap_open(const char *name)"),
    sender: c.func("int tap_sender(const char *name)"),
    fill: c.func("int tap_fill(int sender, uintptr_t frame, uint32_t bytes, uint32_t count)"),
    threadNs: c.func("double tap_thread_ns()"),
    write: c.func(`double tap_write(int fd, ${frames}, uint32_t bytes, uint32_t count)`),
    read: c.func(`double tap_read(int fd, ${frames}, uint32_t count)`),
    drain: c.func("void tap_drain(int fd)"),
    close: koffi.load("libc.so.6").func("int close(int fd)"),
  };
}

function check(result: number, what: string): number {
  if (result >= 0) return result;
  throw new Error(`${what}: ${getSystemErrorMap().get(result)?.join(", ") ?? `errno ${-result}`}`);
}
