/**
 * A poller as the control plane sees it: one worker thread that runs lanes, and the commands it takes.
 *
 * piscina spawns and supervises the thread; its one task (poller-thread.ts) is endless. A command travels as a message
 * that the thread looks for when the control word moved; an eventfd wakes it if it sleeps. A command is in effect
 * everywhere once its promise settles.
 */
import { extname } from "node:path";
import { MessageChannel, type MessagePort } from "node:worker_threads";
import { Piscina } from "piscina";
import { eventfdCreate, signal } from "../../native/eventfd.ts";
import { close } from "../../native/libc.ts";
import type { RefusedMethod, RequestMethod } from "../../native/request-queue.ts";
import { ConfigError } from "../errors.ts";

export type PollMode = "adaptive" | "busy" | "interrupt";

interface PollerOptions {
  mode: PollMode;
  /** CPUs to pin pollers to, one each. */
  cpus: readonly number[];
  /** Pollers to start when no CPUs are given. */
  pollers: number;
  /** How long a lane waits for receive buffers before it drops. */
  stallMs: number;
}

/** What a thread needs to run a lane. Memories are sent only when they changed: receiving them costs a thread a garbage collection. */
export interface LaneTask {
  lane: number;
  name: string;
  memories:
    | { own: WebAssembly.Memory; source: readonly WebAssembly.Memory[]; destination: readonly WebAssembly.Memory[] }
    | undefined;
  /** Where the destination's virtqueue has its state: the lane, and its memory 0 if it is another one. */
  receiveq: { lane: number; memory: SharedArrayBuffer | undefined };
  source: VringFds;
  destination: VringFds;
  /** The file that is one of its ends. */
  file: FileTask | undefined;
}

export interface FileTask {
  /** Non-blocking. */
  fd: number;
  direction: "send" | "receive";
  /** Ways to read or write it, to be tried in this order. */
  methods: readonly RequestMethod[];
}

export interface VringFds {
  kick: number | undefined;
  call: number | undefined;
  err: number | undefined;
}

export type Command = { sequence: number } & Order;

type Order =
  | { type: "run"; task: LaneTask }
  | { type: "park"; lane: number }
  | { type: "inject"; lane: number; frame: Uint8Array };

export type PollerMessage =
  /** The thread is where it shall run, and takes commands. */
  { type: "ready" } | { type: "done"; sequence: number } | PollerEvent;

export type PollerEvent =
  /** A driver broke the format of its virtqueue; the core stopped it. */
  | { type: "broken"; lane: number; end: "source" | "destination" }
  /** Its file cannot be reached in any way; it does not run until the next change. */
  | { type: "unreachable"; lane: number; reason: string }
  /** Its file is not reached in the first of the ways asked for. */
  | { type: "refused"; lane: number; refused: RefusedMethod[]; method: RequestMethod }
  /** The lane's code trapped: our bug. It is parked for good. */
  | { type: "trapped"; lane: number; reason: string };

/**
 * Words shared with the thread: commands posted, nonzero to end; then iterations that moved frames, those that did
 * not, and sleeps.
 */
export const CONTROL_COMMANDS = 0;
export const CONTROL_STOP = 1;
export const CONTROL_BUSY = 2;
export const CONTROL_IDLE = 3;
export const CONTROL_SLEEPS = 4;
const CONTROL_WORDS = 5;

/** What is handed to the thread's task. */
export interface PollerTask {
  port: MessagePort;
  control: BigInt64Array;
  wake: number;
  name: string;
  mode: PollMode;
  cpu: number | undefined;
  stallMs: number;
}

const ENDED = "the poller has ended";

export class Poller {
  readonly cpu: number | undefined;
  /** Settles once the thread takes commands. @throws ConfigError if it cannot run on its CPU */
  readonly ready: Promise<void>;
  readonly #port: MessagePort;
  readonly #control = new BigInt64Array(new SharedArrayBuffer(8 * CONTROL_WORDS));
  readonly #wake = eventfdCreate();
  readonly #pending = new Map<number, PromiseWithResolvers<void>>();
  readonly #task: Promise<void>;
  #sequence = 0;
  #ended = false;

  /** @param onFailure the thread was ready, and died */
  constructor(
    pool: Piscina,
    name: string,
    cpu: number | undefined,
    options: PollerOptions,
    onEvent: (event: PollerEvent) => void,
    onFailure: (error: unknown) => void,
  ) {
    this.cpu = cpu;
    const ready = Promise.withResolvers<void>();
    this.ready = ready.promise;
    let isReady = false;
    const { port1, port2 } = new MessageChannel();
    this.#port = port1;
    port1.on("message", (message: PollerMessage) => {
      if (message.type === "ready") {
        isReady = true;
        ready.resolve();
      } else if (message.type === "done") {
        this.#pending.get(message.sequence)?.resolve();
        this.#pending.delete(message.sequence);
      } else onEvent(message);
    });
    const task: PollerTask = {
      port: port2,
      control: this.#control,
      wake: this.#wake,
      name,
      mode: options.mode,
      cpu,
      stallMs: options.stallMs,
    };
    // piscina's declaration picks the wrong overload of postMessage
    const transferList = [port2] as unknown as NonNullable<Parameters<Piscina["run"]>[1]>["transferList"];
    this.#task = pool.run(task, { transferList }).then(
      () => this.#end(),
      (error: unknown) => {
        this.#end();
        if (isReady) onFailure(error);
        else
          ready.reject(cpu === undefined ? error : new ConfigError(`CPU ${cpu}: ${String(error)}`, { cause: error }));
      },
    );
  }

  /** Lets the lane run by what its memory 0 says now. Rejects if the thread has ended, or ends before it does so. */
  run(task: LaneTask): Promise<void> {
    return this.#command({ type: "run", task });
  }

  /** Until the lane runs again the thread touches neither its memories nor its fds: true as well of one that has ended. */
  async park(lane: number): Promise<void> {
    try {
      await this.#command({ type: "park", lane });
    } catch (error) {
      if (!this.#ended) throw error;
    }
  }

  /** Has a lane deliver a frame that no guest sent; a lane that does not run drops it. Rejects like run(). */
  inject(lane: number, frame: Uint8Array): Promise<void> {
    return this.#command({ type: "inject", lane, frame });
  }

  /** Ends the thread's task. All that must be done at once is done when this returns; it settles when the task has ended. */
  stop(): Promise<void> {
    if (!this.#ended) {
      Atomics.store(this.#control, CONTROL_STOP, 1n);
      signal(this.#wake);
    }
    return this.#task;
  }

  /** Since the thread started: loop iterations that moved frames, those that did not, and times it went to sleep. */
  get iterations(): { busy: number; idle: number; sleeps: number } {
    const read = (word: number) => Number(Atomics.load(this.#control, word));
    return { busy: read(CONTROL_BUSY), idle: read(CONTROL_IDLE), sleeps: read(CONTROL_SLEEPS) };
  }

  #command(command: Order): Promise<void> {
    if (this.#ended) return Promise.reject(new Error(ENDED));
    const sequence = this.#sequence++;
    const done = Promise.withResolvers<void>();
    this.#pending.set(sequence, done);
    this.#port.postMessage({ ...command, sequence } satisfies Command);
    Atomics.add(this.#control, CONTROL_COMMANDS, 1n);
    signal(this.#wake);
    return done.promise;
  }

  #end(): void {
    this.#ended = true;
    for (const { reject } of this.#pending.values()) reject(new Error(ENDED));
    this.#pending.clear();
    this.#port.close();
    close(this.#wake);
  }
}

export class Pollers {
  readonly all: readonly Poller[];
  readonly #pool: Piscina;
  #next = 0;
  /** A process waits for its threads to end, however it ends: a sleeping one would keep it for ever. */
  readonly #atExit = (): void => this.all.forEach((poller) => void poller.stop());

  /** @param onFailure a thread died: nothing it ran will move again */
  constructor(options: PollerOptions, onEvent: (event: PollerEvent) => void, onFailure: (error: unknown) => void) {
    const threads = options.cpus.length || options.pollers;
    this.#pool = new Piscina({
      filename: new URL(`./poller-thread${extname(import.meta.url)}`, import.meta.url).href,
      minThreads: threads,
      maxThreads: threads,
      concurrentTasksPerWorker: 1,
      idleTimeout: Number.POSITIVE_INFINITY,
      atomics: "disabled",
    });
    const all: Poller[] = [];
    this.all = all;
    process.on("exit", this.#atExit);
    try {
      for (let i = 0; i < threads; i++)
        all.push(new Poller(this.#pool, `relay-poll-${i}`, options.cpus[i], options, onEvent, onFailure));
    } catch (error) {
      void this.close();
      throw error;
    }
  }

  /** Settles once all threads take commands; rejects if one cannot. Then `close` is what is left to do. */
  async ready(): Promise<void> {
    await Promise.all(this.all.map((poller) => poller.ready));
  }

  /** The poller for the next lane: they take turns. */
  next(): Poller {
    return this.all[this.#next++ % this.all.length] as Poller;
  }

  async close(): Promise<void> {
    await Promise.all(this.all.map((poller) => poller.stop()));
    process.off("exit", this.#atExit);
    await this.#pool.close();
  }
}
