/**
 * The relay: links, their ports and the pollers that move frames between them. What the library gives to its users.
 */
import type { RefusedMethod, RequestMethod } from "../../native/request-queue.ts";
import { ConfigError } from "../errors.ts";
import { isFilePort, isGuestPort, type AnyPort, type FilePort, type GuestPort } from "../ports/port.ts";
import { parsePort } from "../ports/spec.ts";
import type { TapEvent } from "../ports/tap.ts";
import { TapPort } from "../ports/tap.ts";
import { VhostUserPort } from "../ports/vhost-user.ts";
import type { ServerEvent } from "../vhost-user/server.ts";
import type { LaneCounters } from "./lane.ts";
import { Link, receiver, receiveq, transmitq, type PlacedLane } from "./link.ts";
import { Pollers, type PollMode, type PollerEvent } from "./poller.ts";

const STALL_MS_MAX = 3_600_000;
/** The highest CPU that a pinned thread can be put on, see native/sched.ts. */
const CPU_MAX = 1023;

/** A port as on the command line; `{ fd }` is short for `vhost-user:fd=N`, the relay owns the socket from then on. */
export type PortText = string | { fd: number };

export interface RelayOptions {
  /** Pairs of ports to join: `[["vhost-user:/run/a.sock", { fd: 3 }]]`. */
  links: readonly (readonly [PortText, PortText])[];
  /** Default `adaptive`: spin while there is work, sleep when there is none. `busy` never sleeps, `interrupt` sleeps at once. */
  poll?: PollMode;
  /** CPUs to pin pollers to, one poller each; without it one poller runs where the scheduler puts it. */
  cpus?: readonly number[];
  /** How long a frame waits for the receiver to supply buffers before it is dropped: milliseconds, at most an hour; default 1000. */
  stallMs?: number;
  /**
   * Told what happens: front-ends come and go, messages are refused, a guest's driver breaks a virtqueue. What it throws
   * is an uncaught exception of the process; the relay goes on as far as the process does.
   */
  onEvent?: (event: RelayEvent) => void;
}

export type RelayEvent =
  | ({ port: string } & ServerEvent)
  | ({ port: string } & TapEvent)
  | { type: "broken"; lane: string; port: string; virtqueue: number }
  | { type: "trapped"; lane: string; reason: string }
  /** A lane cannot reach its file, and does not run until something changes at its link. */
  | { type: "unreachable"; lane: string; reason: string }
  /** A lane does not reach its file in the way that was chosen, but in another one. */
  | { type: "refused"; lane: string; refused: RefusedMethod[]; method: RequestMethod }
  /** A poller died; the relay cannot go on. */
  | { type: "fatal"; error: unknown };

/** A snapshot of everything that can be observed. */
export interface RelayState {
  links: LinkState[];
  pollers: { cpu: number | null; busy: number; idle: number; sleeps: number }[];
}

export interface LinkState {
  name: string;
  ports: [PortState, PortState];
  lanes: LaneSnapshot[];
}

export interface PortState {
  port: string;
  state: GuestPort["state"] | FilePort["state"] | "ready";
  /** The guest's MTU, or the interface's; null: nobody said. */
  mtu: number | null;
  /** Of a tap port: the interface's name, and how it is reached. */
  interface?: { name: string; method: RequestMethod };
}

export interface LaneSnapshot extends LaneCounters {
  name: string;
  pair: number;
  from: string;
  to: string;
  running: boolean;
  /** It was stopped by a trap in the core, a bug of ours. */
  trapped: boolean;
}

export class Relay implements AsyncDisposable {
  readonly #links: Link[];
  readonly #pollers: Pollers;
  readonly #onEvent: (event: RelayEvent) => void;
  #closed: Promise<void> | undefined;

  private constructor(options: RelayOptions) {
    const { cpus = [], stallMs = 1000 } = options;
    checkOptions(cpus, stallMs);
    this.#onEvent = (event) => callOutside(options.onEvent, event);
    const ends = options.links.map((pair) =>
      pair.map((port) => parsePort(typeof port === "string" ? port : `vhost-user:fd=${port.fd}`)),
    );
    const names = ends.flat().flatMap(namesOf);
    const twice = names.find((name, i) => names.indexOf(name) !== i);
    if (twice !== undefined) throw new ConfigError(`${twice} is named twice; each port needs one of its own`);
    for (const [a, b] of ends) {
      if (a?.kind !== "vhost-user" && b?.kind !== "vhost-user") {
        throw new ConfigError(`link ${a?.text}=${b?.text}: neither end can send; one must be a vhost-user port`);
      }
    }
    // Ports first: they reserve address space, which may fail. Threads would be left behind.
    const ports = ends.map(([a, b]) => [this.#makePort(a as Spec, b), this.#makePort(b as Spec, a)] as const);
    this.#pollers = new Pollers(
      { mode: options.poll ?? "adaptive", cpus, pollers: 1, stallMs },
      (message) => this.#observe(message),
      (error) => this.#onEvent({ type: "fatal", error }),
    );
    let lanes = 0;
    this.#links = ports.map((pair, i) => new Link(`link${i}`, pair, this.#pollers, () => lanes++));
  }

  /** Starts serving: when this settles, all sockets exist. @throws ConfigError, SystemError; nothing is left behind */
  static async start(options: RelayOptions): Promise<Relay> {
    const relay = new Relay(options);
    try {
      await relay.#pollers.ready();
      for (const link of relay.#links) await link.open();
    } catch (error) {
      await relay.close();
      throw error;
    }
    return relay;
  }

  /** May be asked for at any time; reads counters, stops nothing. */
  get state(): RelayState {
    return {
      links: this.#links.map((link) => ({
        name: link.name,
        ports: [portState(link.ports[0]), portState(link.ports[1])],
        lanes: link.lanes.map((placed) => snapshot(link, placed)),
      })),
      pollers: this.#pollers.all.map((poller) => ({ cpu: poller.cpu ?? null, ...poller.iterations })),
    };
  }

  /** Ends all connections, removes the sockets, stops the pollers. */
  close(): Promise<void> {
    return (this.#closed ??= (async () => {
      await Promise.all(this.#links.map((link) => link.close()));
      await this.#pollers.close();
    })());
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #makePort(spec: Spec, other: Spec | undefined): AnyPort {
    if (spec.kind === "tap") {
      const queuePairs = spec.queuePairs ?? (other?.kind === "vhost-user" ? other.queuePairs : 1);
      return new TapPort({ ...spec, queuePairs, onEvent: (event) => this.#onEvent({ port: spec.text, ...event }) });
    }
    if (spec.kind !== "vhost-user") return { kind: spec.kind, spec: spec.text };
    return new VhostUserPort({
      ...spec,
      spec: spec.text,
      onEvent: (event) => this.#onEvent({ port: spec.text, ...event }),
    });
  }

  #observe(message: PollerEvent): void {
    const isMeant = ({ id }: PlacedLane) => id === message.lane;
    const link = this.#links.find(({ lanes }) => lanes.some(isMeant));
    const placed = link?.lanes.find(isMeant);
    if (!link || !placed) return;
    const { lane, source, destination } = placed;
    if (message.type === "trapped") {
      placed.trapped = true;
      this.#onEvent({ type: "trapped", lane: lane.name, reason: message.reason });
      link.settle();
    } else if (message.type !== "broken") {
      this.#onEvent({ ...message, lane: lane.name });
    } else {
      const port = message.end === "source" ? source : destination;
      const virtqueue = message.end === "source" ? transmitq(placed.pair) : receiveq(receiver(placed));
      this.#onEvent({ type: "broken", lane: lane.name, port: port?.spec ?? "", virtqueue });
      link.settle();
    }
  }
}

function checkOptions(cpus: readonly number[], stallMs: number): void {
  const wrong = cpus.find((cpu) => !Number.isInteger(cpu) || cpu < 0 || cpu > CPU_MAX);
  if (wrong !== undefined) throw new ConfigError(`cpus: ${wrong} is not a whole number from 0 to ${CPU_MAX}`);
  if (!(stallMs >= 0 && stallMs <= STALL_MS_MAX))
    throw new ConfigError(`stallMs: ${stallMs} is not a number from 0 to ${STALL_MS_MAX}`);
}

/** Calls a function of the library's user: what it throws surfaces by itself, not in the code that had news. */
function callOutside(onEvent: RelayOptions["onEvent"], event: RelayEvent): void {
  try {
    onEvent?.(event);
  } catch (error) {
    process.nextTick(() => {
      throw error;
    });
  }
}

type Spec = ReturnType<typeof parsePort>;

/** What a port has for itself alone. */
function namesOf(port: Spec): string[] {
  if (port.kind === "vhost-user") return ["fd" in port.socket ? `fd ${port.socket.fd}` : `socket ${port.socket.path}`];
  if (port.kind !== "tap" || port.interface === "new") return [];
  return "name" in port.interface ? [`interface ${port.interface.name}`] : port.interface.fds.map((fd) => `fd ${fd}`);
}

function portState(port: AnyPort): PortState {
  if (!isGuestPort(port) && !isFilePort(port)) return { port: port.spec, state: "ready", mtu: null };
  const state: PortState = { port: port.spec, state: port.state, mtu: port.mtu ?? null };
  if (isFilePort(port)) state.interface = { name: port.name, method: port.methods[0] as RequestMethod };
  return state;
}

function snapshot(link: Link, { lane, pair, source, destination, running, trapped }: PlacedLane): LaneSnapshot {
  const passive = link.ports.find((port) => port !== source);
  const to = destination === source ? `${source.spec} (loopback)` : (destination?.spec ?? passive?.spec ?? "");
  return { name: lane.name, pair, from: source.spec, to, running: running && !trapped, trapped, ...lane.counters };
}
