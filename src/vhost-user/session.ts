/**
 * A vhost-user session, back-end side: takes the messages of one connection one after the other, drives the device,
 * and says what to answer.
 *
 * Truth: QEMU docs/interop/vhost-user.rst; docs/PROTOCOL.md, 4 (REPLY_ACK rules) and 4.1. Knows nothing of
 * sockets. The rules of each request are in requests.ts, what it does is in handlers.ts, the ring state machine is in
 * state.ts.
 */
import { ProtocolError, RelayError } from "../errors.ts";
import { VHOST_USER_NEED_REPLY, VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_REPLY } from "../layout/vhost-user.ts";
import { closeFds, encodeMessage, encodeU64 } from "./codec.ts";
import type { Message } from "./codec.ts";
import type { Device } from "./device.ts";
import type { ReplyWithFds } from "./handlers.ts";
import { requests } from "./requests.ts";
import type { Request } from "./requests.ts";
import { SessionState } from "./state.ts";

/** A request that was refused; the session goes on. */
export interface Refusal {
  request: string;
  error: RelayError;
}

/** What to send back. The fds are closed when it has been sent. */
export interface Answer {
  bytes: Buffer;
  fds: number[];
}

export class Session {
  readonly #state: SessionState;
  readonly #onRefusal: (refusal: Refusal) => void;

  constructor(device: Device, onRefusal: (refusal: Refusal) => void = () => {}) {
    this.#state = new SessionState(device);
    this.#onRefusal = onRefusal;
  }

  /**
   * Obeys one message; the previous one must have settled. Takes its fds over.
   * Returns what to send back, if an answer is due. @throws ProtocolError (drop): close the connection
   */
  async handle(message: Message): Promise<Answer | undefined> {
    const request = requests.get(message.request) ?? unknown(message.request);
    const couldAck = this.#canAck;
    try {
      const reply = await this.#obey(request, message);
      if (reply !== undefined) return answer(message, reply.payload, reply.fds);
      // SET_PROTOCOL_FEATURES itself is acknowledged too: user-mode Linux waits for it
      return needsAck(message) && (couldAck || this.#canAck) ? ack(message, 0n) : undefined;
    } catch (error) {
      if (!isRefusal(error)) throw error;
      this.#onRefusal({ request: request.name, error });
      return this.#refuse(request, message, error);
    } finally {
      closeFds(message.fds);
    }
  }

  /** A message that is being handled no longer waits for the front-end. */
  interrupt(): void {
    this.#state.interrupt();
  }

  /** The connection is gone. Afterwards the device is reset and every fd closed. */
  async end(): Promise<void> {
    await this.#state.end();
  }

  get #canAck(): boolean {
    return this.#state.isNegotiated(VHOST_USER_PROTOCOL_F_REPLY_ACK);
  }

  async #obey(request: Request, message: Message): Promise<ReplyWithFds | undefined> {
    const { name, payloadSize, gate, handle } = request;
    if ((message.flags & VHOST_USER_REPLY) !== 0) throw new ProtocolError(`${name} has the reply flag set`, "drop");
    if (handle === undefined) throw new ProtocolError(`${name} is not offered`);
    if (gate !== undefined && !this.#state.isNegotiated(gate)) {
      throw new ProtocolError(`${name} needs protocol feature ${gate}, which was not negotiated`);
    }
    if (payloadSize !== undefined && message.payload.length !== payloadSize) {
      throw new ProtocolError(`${name} with ${message.payload.length} bytes of payload, expected ${payloadSize}`);
    }
    const reply = await handle(this.#state, message);
    return Buffer.isBuffer(reply) ? { payload: reply, fds: [] } : (reply ?? undefined);
  }

  #refuse({ name, refusal }: Request, message: Message, error: RelayError): Answer | undefined {
    if (typeof refusal !== "string") return answer(message, refusal);
    if (refusal !== "drop" && needsAck(message) && this.#canAck) return ack(message, 1n);
    if (refusal === "ack or ignore") return undefined;
    throw new ProtocolError(`${name} was refused and the front-end cannot be told: ${error.message}`, "drop");
  }
}

function unknown(id: number): Request {
  return { name: `request ${id}`, refusal: "ack or ignore" };
}

function isRefusal(error: unknown): error is RelayError {
  return error instanceof RelayError && !(error instanceof ProtocolError && error.recovery === "drop");
}

function needsAck(message: Message): boolean {
  return (message.flags & VHOST_USER_NEED_REPLY) !== 0;
}

function ack(message: Message, value: bigint): Answer {
  return answer(message, encodeU64(value));
}

function answer(message: Message, payload: Buffer, fds: number[] = []): Answer {
  return { bytes: encodeMessage(message.request, VHOST_USER_REPLY, payload), fds };
}
