/**
 * One end of a vhost-user connection: a socket, cut into messages, with deadlines. Never blocks the event loop.
 *
 * Owns the socket. One call at a time.
 */
import { close } from "../../native/libc.ts";
import { receive, send, shutdown } from "../../native/socket.ts";
import { ProtocolError } from "../errors.ts";
import { closeFds, MessageReader } from "./codec.ts";
import type { Message } from "./codec.ts";
import { ready } from "./ready.ts";

export class Connection implements Disposable {
  readonly #fd: number;
  readonly #messageTimeoutMs: number;
  readonly #reader = new MessageReader();
  readonly #closing = new AbortController();

  /** @param messageTimeoutMs how long the peer may take over one message: to finish sending it, or to read ours */
  constructor(fd: number, messageTimeoutMs: number) {
    this.#fd = fd;
    this.#messageTimeoutMs = messageTimeoutMs;
  }

  /**
   * The next message; undefined when the peer closed or this end was closed.
   * @param startTimeoutMs how long the peer may take to begin the message; without it, for ever
   * @throws ProtocolError (drop), SystemError
   */
  async receive(startTimeoutMs?: number): Promise<Message | undefined> {
    let sinceMs = performance.now();
    while (!this.#isClosed) {
      const received = receive(this.#fd, this.#reader.space());
      if (received === undefined) {
        const limitMs = this.#reader.isMidMessage ? this.#messageTimeoutMs : startTimeoutMs;
        await this.#wait("readable", limitMs && Math.max(0, limitMs - (performance.now() - sinceMs)));
        continue;
      }
      if (received.truncated) {
        closeFds(received.fds);
        throw new ProtocolError(
          "file descriptors of a message were lost; raise the limit of open files (ulimit -n)",
          "drop",
        );
      }
      if (received.count === 0) return this.#endOfStream();
      if (!this.#reader.isMidMessage) sinceMs = performance.now();
      const message = this.#reader.push(received.count, received.fds);
      if (message !== undefined) return message;
    }
    return undefined;
  }

  /** Sends all of it; `fds` stay the caller's. @throws ProtocolError (drop) when the peer does not read, SystemError */
  async send(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    for (let sent = 0; sent < bytes.length && !this.#isClosed;) {
      const count = send(this.#fd, bytes.subarray(sent), sent === 0 ? fds : []);
      if (count === 0) await this.#wait("writable", this.#messageTimeoutMs);
      sent += count;
    }
  }

  /** Closes the socket; a receive() or send() that waits ends at once. */
  [Symbol.dispose](): void {
    if (this.#isClosed) return;
    this.#closing.abort();
    this.#reader[Symbol.dispose]();
    shutdown(this.#fd);
    close(this.#fd);
  }

  get #isClosed(): boolean {
    return this.#closing.signal.aborted;
  }

  #endOfStream(): undefined {
    if (this.#reader.isMidMessage)
      throw new ProtocolError("the peer closed the connection in the middle of a message", "drop");
  }

  async #wait(direction: "readable" | "writable", timeoutMs: number | undefined): Promise<void> {
    const outcome = await ready(this.#fd, direction, this.#closing.signal, timeoutMs);
    if (outcome === "late") {
      const what = direction === "readable" ? "complete a message" : "read our answer";
      throw new ProtocolError(`the peer did not ${what} in time`, "drop");
    }
  }
}
