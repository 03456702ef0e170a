/**
 * Where connections come from: a listening socket, a peer's socket that is dialled again and again, or a socket that
 * somebody else opened.
 *
 * An endpoint owns what it opened; disposing it ends a next() that waits.
 */
import { lstatSync, unlinkSync, watch } from "node:fs";
import type { FSWatcher } from "node:fs";
import { basename, dirname } from "node:path";
import { close } from "../../native/libc.ts";
import { accept, connect, inherit, listen } from "../../native/socket.ts";
import { ready } from "./ready.ts";

export interface Endpoint extends Disposable {
  /** The next connection, the caller's to close; undefined when there will be none any more. @throws SystemError */
  next(): Promise<number | undefined>;
}

/** A path to listen on or to dial, or a socket that is open already. */
export type SocketAddress = { path: string; connect?: boolean } | { fd: number };

/** @throws ConfigError, SystemError */
export function openEndpoint(address: SocketAddress): Endpoint {
  if ("fd" in address) return new Inherited(address.fd);
  return address.connect ? new Dialer(address.path) : new Listener(address.path);
}

/** Listens on a path; the socket file is removed when disposed. @throws ConfigError, SystemError */
export class Listener implements Endpoint {
  readonly #path: string;
  readonly #fd: number;
  readonly #inode: number;
  readonly #closing = new AbortController();

  constructor(path: string) {
    this.#path = path;
    this.#fd = listen(path);
    this.#inode = lstatSync(path).ino;
  }

  async next(): Promise<number | undefined> {
    return nextAccepted(this.#fd, this.#closing.signal);
  }

  [Symbol.dispose](): void {
    if (this.#closing.signal.aborted) return;
    this.#closing.abort();
    // Somebody else may have put their own socket there since
    if (lstatSync(this.#path, { throwIfNoEntry: false })?.ino === this.#inode) unlinkSync(this.#path);
    close(this.#fd);
  }
}

/** A socket that the caller gives away: the connections of a listening one, or the one connection that it is. */
class Inherited implements Endpoint {
  readonly #fd: number;
  readonly #closing = new AbortController();
  readonly #isListening: boolean;
  /** Whether the fd is still ours to close. */
  #isOwned = true;

  /** @throws ConfigError if it is no unix stream socket; then it stays the caller's */
  constructor(fd: number) {
    this.#fd = fd;
    this.#isListening = inherit(fd) === "listening";
  }

  async next(): Promise<number | undefined> {
    if (this.#isListening) return nextAccepted(this.#fd, this.#closing.signal);
    if (!this.#isOwned) return undefined;
    this.#isOwned = false;
    return this.#fd;
  }

  [Symbol.dispose](): void {
    this.#closing.abort();
    if (this.#isOwned) close(this.#fd);
    this.#isOwned = false;
  }
}

async function nextAccepted(listener: number, closing: AbortSignal): Promise<number | undefined> {
  while (!closing.aborted) {
    const fd = accept(listener);
    if (fd !== undefined) return fd;
    await ready(listener, "readable", closing);
  }
  return undefined;
}

const EAGER_RETRY_MS = 2;
const EAGER_FOR_MS = 1000;
const IDLE_RETRY_MS = 1000;

/**
 * Dials a path until somebody listens there. A new listener always makes a new socket file, so the directory is
 * watched; between the file and its listen(2) there is a moment, so after a change it is dialled at short intervals.
 */
class Dialer implements Endpoint {
  readonly #path: string;
  readonly #closing = new AbortController();
  #watcher: FSWatcher | undefined;
  #eagerUntilMs = 0;
  #wake: () => void = () => {};

  constructor(path: string) {
    this.#path = path;
  }

  async next(): Promise<number | undefined> {
    while (!this.#closing.signal.aborted) {
      this.#watchDirectory();
      const fd = connect(this.#path);
      if (fd !== undefined) return fd;
      await this.#pause(performance.now() < this.#eagerUntilMs ? EAGER_RETRY_MS : IDLE_RETRY_MS);
    }
    return undefined;
  }

  [Symbol.dispose](): void {
    this.#closing.abort();
    this.#watcher?.close();
    this.#wake();
  }

  /** The directory may not exist yet, or be gone: then only the slow retry is left. */
  #watchDirectory(): void {
    if (this.#watcher !== undefined) return;
    try {
      this.#watcher = watch(dirname(this.#path), (_event, name) => {
        if (name !== basename(this.#path)) return;
        this.#eagerUntilMs = performance.now() + EAGER_FOR_MS;
        this.#wake();
      });
    } catch {
      return;
    }
    this.#watcher.on("error", () => {
      this.#watcher?.close();
      this.#watcher = undefined;
    });
  }

  async #pause(ms: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, ms);
    this.#wake = resolve;
    await promise;
    clearTimeout(timer);
  }
}
