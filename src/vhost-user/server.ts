/**
 * Serves one device on one socket: takes a front-end, runs its session to the end, takes the next one.
 *
 * One front-end at a time; others wait in the socket's queue. Whatever a front-end does ends at most its own
 * connection. Runs on the event loop of the thread that made it, and gives it a turn after every message and every
 * connection: what a peer sends at once would otherwise be handled at once, and everybody else would wait.
 */
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { SystemError } from "../errors.ts";
import { closeFds } from "./codec.ts";
import { Connection } from "./connection.ts";
import type { Device } from "./device.ts";
import { openEndpoint } from "./endpoint.ts";
import type { Endpoint, SocketAddress } from "./endpoint.ts";
import { TIMEOUT_MS } from "./limits.ts";
import { Session } from "./session.ts";
import type { Answer, Refusal } from "./session.ts";

export type ServerEvent =
  | { type: "connect" }
  /** `error` is absent when the front-end just left. */
  | { type: "disconnect"; error?: unknown }
  | ({ type: "refusal" } & Refusal)
  /** No front-end will come any more: the one connection that there was is gone. */
  | { type: "end" }
  /** No connection could be taken, for example for want of file descriptors; it is tried again. */
  | { type: "failure"; error: unknown };

export type ServerOptions = SocketAddress & {
  onEvent?: (event: ServerEvent) => void;
  /** How long a front-end may stay silent after connecting. */
  firstMessageTimeoutMs?: number;
  /** How long it may take to finish a message, or to read an answer. */
  messageTimeoutMs?: number;
};

const RETRY_MS = 1000;
const REDIAL_MS = 100;

export class Server implements AsyncDisposable {
  readonly #device: Device;
  readonly #options: ServerOptions;
  readonly #endpoint: Endpoint;
  readonly #closing = new AbortController();
  readonly #done: Promise<void>;
  #connection: Connection | undefined;
  #session: Session | undefined;

  /** Serves from now on. @throws ConfigError when the path cannot be listened on, or the fd is no socket */
  constructor(device: Device, options: ServerOptions) {
    this.#device = device;
    this.#options = options;
    this.#endpoint = openEndpoint(options);
    this.#done = this.#run();
  }

  /** Ends the connection and removes the socket file at once; resolves when the device has been reset. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort();
    this.#endpoint[Symbol.dispose]();
    this.#connection?.[Symbol.dispose]();
    this.#session?.interrupt();
    await this.#done;
  }

  async #run(): Promise<void> {
    while (!this.#closing.signal.aborted) {
      try {
        const fd = await this.#endpoint.next();
        if (fd === undefined) break;
        const wasUseful = await this.#serve(fd);
        await (this.#isDialling && !wasUseful ? this.#pause(REDIAL_MS) : nextTurn());
      } catch (error) {
        this.#emit({ type: "failure", error });
        await this.#pause(RETRY_MS);
      }
    }
    if (!this.#closing.signal.aborted) this.#emit({ type: "end" });
  }

  /** Runs one session to its end; never throws. Resolves to whether the front-end said anything. */
  async #serve(fd: number): Promise<boolean> {
    using connection = new Connection(fd, this.#options.messageTimeoutMs ?? TIMEOUT_MS);
    this.#connection = connection;
    this.#emit({ type: "connect" });
    const session = new Session(this.#device, (refusal) => this.#emit({ type: "refusal", ...refusal }));
    this.#session = session;
    const ending: { type: "disconnect"; error?: unknown } = { type: "disconnect" };
    let messages = 0;
    try {
      for (; ; messages++) {
        const message = await connection.receive(
          messages === 0 ? (this.#options.firstMessageTimeoutMs ?? TIMEOUT_MS) : undefined,
        );
        if (message === undefined) break;
        const answer = await session.handle(message);
        if (answer !== undefined) await deliver(connection, answer);
        await nextTurn();
      }
    } catch (error) {
      if (!isPeerGone(error)) ending.error = error;
    }
    connection[Symbol.dispose]();
    this.#connection = undefined;
    this.#session = undefined;
    try {
      await session.end();
    } catch (error) {
      ending.error ??= error;
    }
    this.#emit(ending);
    return messages > 0;
  }

  get #isDialling(): boolean {
    return "connect" in this.#options && this.#options.connect === true;
  }

  #emit(event: ServerEvent): void {
    this.#options.onEvent?.(event);
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal }).catch(() => {});
  }
}

async function deliver(connection: Connection, { bytes, fds }: Answer): Promise<void> {
  try {
    await connection.send(bytes, fds);
  } finally {
    closeFds(fds);
  }
}

/** A peer that dies leaves a reset or broken socket behind: no more than a disconnect. */
function isPeerGone(error: unknown): boolean {
  return error instanceof SystemError && ["ECONNRESET", "EPIPE"].includes(error.code);
}
