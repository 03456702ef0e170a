/** The main thread's hold on one driver thread: start, steer, observe, stop. */
import { extname } from "node:path";
import { Worker } from "node:worker_threads";
import { eventfdCreate, signal } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import { COUNTER, COUNTERS, PHASE } from "./protocol.ts";
import type { DriverTask } from "./protocol.ts";

type DriverPlan = Pick<DriverTask, "path" | "frames" | "send" | "expect">;

export class DriverThread implements AsyncDisposable {
  /** Settles once the rings run, or the thread has ended. */
  readonly ready: Promise<void>;
  readonly #exited: Promise<void>;
  readonly #wakeFd = eventfdCreate();
  readonly #control = new Int32Array(new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT));
  readonly #counters = new BigUint64Array(new SharedArrayBuffer(COUNTERS * BigUint64Array.BYTES_PER_ELEMENT));

  /** @param onFailure told what ended the thread before it was asked to */
  constructor(plan: DriverPlan, onFailure: (error: Error) => void) {
    const task: DriverTask = { ...plan, wakeFd: this.#wakeFd, control: this.#control, counters: this.#counters };
    const worker = new Worker(new URL(`./driver-thread${extname(import.meta.url)}`, import.meta.url), {
      workerData: task,
    });
    const { promise: ready, resolve } = Promise.withResolvers<void>();
    const { promise: exited, resolve: exit } = Promise.withResolvers<void>();
    worker.once("message", () => resolve());
    worker.once("error", onFailure);
    worker.once("exit", () => {
      resolve();
      exit();
    });
    this.ready = ready;
    this.#exited = exited;
  }

  get sent(): number {
    return this.#counter(COUNTER.sent);
  }

  /** Frames received, each found equal to the one sent. */
  get received(): number {
    return this.#counter(COUNTER.received);
  }

  get receivedBytes(): number {
    return this.#counter(COUNTER.receivedBytes);
  }

  /** Whether it has stopped transmitting: `sent` is final. */
  get isDraining(): boolean {
    return this.#counter(COUNTER.phase) === PHASE.drain;
  }

  enter(phase: keyof typeof PHASE): void {
    Atomics.store(this.#control, 0, PHASE[phase]);
    signal(this.#wakeFd);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.enter("quit");
    await this.#exited;
    close(this.#wakeFd);
  }

  #counter(index: number): number {
    return Number(Atomics.load(this.#counters, index));
  }
}
