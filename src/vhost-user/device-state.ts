/**
 * The device's state as it travels from one back-end to another: what is in it, and its way through a pipe.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Migrating back-end state"; docs/PROTOCOL.md, 19. All that the device has to
 * remember the protocol carries anyway, so the state says only what it belongs to. Runs on the event loop and never blocks
 * it: the pipe is opened anew, so that whether it blocks is nobody's business but ours.
 */
import { closeSync, constants, openSync, readSync, writeSync } from "node:fs";
import { fdKind, isReadable, isWritable } from "../../native/fd.ts";
import { ProtocolError } from "../errors.ts";
import { STATE_TIMEOUT_MS } from "./limits.ts";
import { hex } from "./memory-table.ts";
import { ready } from "./ready.ts";

// "vhrelay" and a zero, u32 version, u32 zero, u64 acknowledged features
const MAGIC = Buffer.from("vhrelay\0");
const VERSION_AT = 8;
const FEATURES_AT = 16;
const STATE_BYTES = 24;
const VERSION = 1;

/** @param features what the driver acknowledged */
export function encodeState(features: bigint): Buffer {
  const bytes = Buffer.alloc(STATE_BYTES);
  MAGIC.copy(bytes);
  bytes.writeUInt32LE(VERSION, VERSION_AT);
  bytes.writeBigUInt64LE(features, FEATURES_AT);
  return bytes;
}

/** @param offered the features that this device has @throws ProtocolError when another device's state it is */
export function checkState(bytes: Buffer, offered: bigint): void {
  if (bytes.length !== STATE_BYTES || !bytes.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw new ProtocolError(`${bytes.length} bytes that are no state of this device`);
  }
  const version = bytes.readUInt32LE(VERSION_AT);
  if (version !== VERSION) throw new ProtocolError(`device state of version ${version}, only ${VERSION} is known`);
  const others = bytes.readBigUInt64LE(FEATURES_AT) & ~offered;
  if (others !== 0n) throw new ProtocolError(`device state of a driver with features ${hex(others)}, not offered here`);
}

/** One way through a pipe, begun at once. Disposing ends it. */
export class StateTransfer implements Disposable {
  readonly #fd: number;
  readonly #aborter = new AbortController();
  readonly #deadlineMs = performance.now() + STATE_TIMEOUT_MS;
  /** Settles when it is over; why it failed, or undefined. Never rejects. */
  readonly outcome: Promise<ProtocolError | undefined>;

  private constructor(fd: number, flags: number, transfer: (state: StateTransfer) => Promise<void>) {
    this.#fd = reopen(fd, flags);
    this.outcome = transfer(this)
      .then(() => undefined)
      .catch((error) => new ProtocolError(`device state: ${(error as Error).message}`))
      .finally(() => closeSync(this.#fd));
  }

  /** @param fd of a pipe; the caller closes it @throws ProtocolError unless it can be written */
  static save(fd: number, bytes: Buffer): StateTransfer {
    if (fdKind(fd) !== "pipe" || !isWritable(fd)) throw new ProtocolError("the fd to save to is no pipe's write end");
    return new StateTransfer(fd, constants.O_WRONLY, (state) => state.#write(bytes));
  }

  /** @param fd of a pipe; the caller closes it @throws ProtocolError unless it can be read */
  static load(fd: number, check: (bytes: Buffer) => void): StateTransfer {
    if (fdKind(fd) !== "pipe" || !isReadable(fd)) throw new ProtocolError("the fd to load from is no pipe's read end");
    return new StateTransfer(fd, constants.O_RDONLY, async (state) => check(await state.#read()));
  }

  [Symbol.dispose](): void {
    this.#aborter.abort();
  }

  async #write(bytes: Buffer): Promise<void> {
    for (let written = 0; written < bytes.length;) {
      written += (await this.#when("writable", () => writeSync(this.#fd, bytes, written))) ?? 0;
    }
  }

  /** Up to the end, or a byte more than a state has. */
  async #read(): Promise<Buffer> {
    const bytes = Buffer.alloc(STATE_BYTES + 1);
    for (let length = 0; ;) {
      const count = await this.#when("readable", () => readSync(this.#fd, bytes, length, bytes.length - length, null));
      length += count ?? 0;
      if (count === 0 || length === bytes.length) return bytes.subarray(0, length);
    }
  }

  /** The result of a call that would not block; undefined: it would have, and may now be tried again. */
  async #when(direction: "readable" | "writable", call: () => number): Promise<number | undefined> {
    try {
      return call();
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
    }
    const leftMs = Math.max(0, this.#deadlineMs - performance.now());
    const outcome = await ready(this.#fd, direction, this.#aborter.signal, leftMs);
    if (outcome !== "ready") throw new ProtocolError(outcome === "late" ? "the pipe stood still" : "it was given up");
    return undefined;
  }
}

/** @throws ProtocolError when the pipe is another user's: then nothing keeps that one from making us wait */
function reopen(fd: number, flags: number): number {
  try {
    return openSync(`/proc/self/fd/${fd}`, flags | constants.O_NONBLOCK);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new ProtocolError(`the pipe for the device state cannot be opened (${code}); has it a peer of this user?`);
  }
}
