/** A pair of well-behaved VMs beside a hostile one: whatever that does, the pair loses no frame (I2 of the bad inputs). */
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";

// Words shared with the thread
export const CANARY_MODE = 0; // MODE_*
export const CANARY_READY = 1;
export const CANARY_SENT = 2;
export const CANARY_RECEIVED = 3;
export const CANARY_ERRORS = 4; // frames out of order or changed
export const CANARY_WORST_US = 5; // longest way of a frame since last asked
const WORDS = 6;

export const MODE_RUN = 0;
const MODE_PAUSE = 1;
export const MODE_END = 2;

/** How long frames in flight are waited for, in rounds of a millisecond or more. */
const ROUNDS_MAX = 3000;

export class Canary implements AsyncDisposable {
  readonly #control = new Int32Array(new SharedArrayBuffer(4 * WORDS));
  readonly #worker: Worker;

  /** @param paths sockets of the two ends of a link */
  static async start(paths: readonly [string, string]): Promise<Canary> {
    const canary = new Canary(paths);
    await canary.#until(() => canary.#read(CANARY_READY) === 1);
    return canary;
  }

  private constructor(paths: readonly [string, string]) {
    this.#worker = new Worker(new URL("./canary-thread.ts", import.meta.url), {
      workerData: { paths, control: this.#control },
    });
  }

  /** Stops sending and waits for what is under way. @returns frames lost or damaged since it started, and the longest way of one */
  async pause(): Promise<{ lost: number; errors: number; worstMs: number }> {
    this.#set(MODE_PAUSE);
    await sleep(5);
    await this.#until(() => this.#read(CANARY_RECEIVED) === this.#read(CANARY_SENT));
    const worstMs = Atomics.exchange(this.#control, CANARY_WORST_US, 0) / 1000;
    return {
      lost: this.#read(CANARY_SENT) - this.#read(CANARY_RECEIVED),
      errors: this.#read(CANARY_ERRORS),
      worstMs,
    };
  }

  resume(): void {
    this.#set(MODE_RUN);
  }

  get received(): number {
    return this.#read(CANARY_RECEIVED);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#set(MODE_END);
    await once(this.#worker, "exit");
  }

  async #until(isDone: () => boolean): Promise<void> {
    for (let round = 0; !isDone() && round < ROUNDS_MAX; round++) await sleep(1);
  }

  #set(mode: number): void {
    Atomics.store(this.#control, CANARY_MODE, mode);
    Atomics.notify(this.#control, CANARY_MODE);
  }

  #read(word: number): number {
    return Atomics.load(this.#control, word);
  }
}
