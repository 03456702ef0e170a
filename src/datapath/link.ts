/**
 * A link: two ports joined, queue pair by queue pair.
 *
 * It owns the lanes and is the only one that parks them. Changes to either port are serialised here: park the lanes,
 * apply the change, rewrite memory 0 from what the ports say, run the lanes again. Main thread.
 */
import { RECEIVEQ, TRANSMITQ } from "../layout/virtio.ts";
import { isGuestPort, type AnyPort, type GuestPort, type RunningVring } from "../ports/port.ts";
import { Lane } from "./lane.ts";
import type { LaneTask, Poller, Pollers, VringFds } from "./poller.ts";

/** One direction of one queue pair, placed on a poller. */
export interface PlacedLane {
  id: number;
  pair: number;
  lane: Lane;
  poller: Poller;
  source: GuestPort;
  /** Undefined: a sink. */
  destination: GuestPort | undefined;
  /** Whether the poller runs it. */
  running: boolean;
  /** Its code trapped: it is not run again. */
  trapped: boolean;
  /** The memories the poller has an instance for. */
  memories: LaneTask["memories"];
}

export class Link {
  readonly name: string;
  readonly ports: readonly [AnyPort, AnyPort];
  readonly lanes: PlacedLane[] = [];
  readonly #pollers: Pollers;
  readonly #newId: () => number;
  #last: Promise<unknown> = Promise.resolve();

  constructor(name: string, ports: readonly [AnyPort, AnyPort], pollers: Pollers, newId: () => number) {
    this.name = name;
    this.ports = ports;
    this.#pollers = pollers;
    this.#newId = newId;
  }

  async open(): Promise<void> {
    for (const port of this.ports.filter(isGuestPort)) {
      await port.open(
        (apply) => this.#change(apply),
        (index) => this.#nextAvail(port, index),
      );
    }
  }

  async close(): Promise<void> {
    await Promise.all(this.ports.filter(isGuestPort).map((port) => port.close()));
  }

  /** One change after the other; a failed one does not hold up the next. */
  #change(apply: () => void): Promise<void> {
    const done = this.#last.then(() => this.#applyParked(apply));
    this.#last = done.catch(() => undefined);
    return done;
  }

  async #applyParked(apply: () => void): Promise<void> {
    const running = this.lanes.filter((placed) => placed.running);
    await Promise.all(running.map(({ poller, id }) => poller.park(id)));
    for (const placed of running) placed.running = false;
    try {
      apply();
    } finally {
      this.#placeLanes();
      await Promise.all(this.lanes.map((placed) => this.#run(placed)));
    }
  }

  /** Makes the lanes for queue pairs that came into use: one for each direction in which a guest may send. */
  #placeLanes(): void {
    for (const [end, source] of this.ports.entries()) {
      const other = this.ports[1 - end] as AnyPort;
      if (!isGuestPort(source)) continue;
      const destination = other.kind === "loopback" ? source : isGuestPort(other) ? other : undefined;
      for (let pair = 0; pair < source.queuePairs; pair++) {
        const used = source.vring(transmitq(pair)) ?? destination?.vring(receiveq(pair));
        if (!used || this.lanes.some((placed) => placed.source === source && placed.pair === pair)) continue;
        const id = this.#newId();
        const lane = new Lane(`${this.name}/${end === 0 ? "a" : "b"}${pair}`);
        if (!destination) lane.setSink();
        this.lanes.push({
          id,
          pair,
          lane,
          poller: this.#pollers.next(),
          source,
          destination,
          running: false,
          trapped: false,
          memories: undefined,
        });
      }
    }
  }

  /** Brings memory 0 up to date, and has the poller run the lane if there is anything to take frames from. */
  async #run(placed: PlacedLane): Promise<void> {
    const { lane, pair, source, destination } = placed;
    const transmit = source.vring(transmitq(pair));
    const receive = destination?.vring(receiveq(pair));
    lane.setVring("source", transmit);
    lane.setExtents("source", source.memory.extents);
    if (destination) {
      lane.setVring("destination", receive);
      lane.setExtents("destination", destination.memory.extents);
    }
    if (!transmit || placed.trapped) return;
    placed.running = true;
    await placed.poller.run({
      lane: placed.id,
      name: lane.name,
      memories: this.#newMemories(placed),
      source: fdsOf(transmit),
      destination: fdsOf(receive),
    });
  }

  /** The memories to send to the poller; undefined if it has them. */
  #newMemories(placed: PlacedLane): LaneTask["memories"] {
    const source = placed.source.memory.segments;
    const destination = (placed.destination ?? placed.source).memory.segments;
    const had = placed.memories;
    if (had && had.source.length === source.length && had.destination.length === destination.length) return undefined;
    return (placed.memories = { own: placed.lane.memory, source, destination });
  }

  #nextAvail(port: GuestPort, index: number): number {
    const pair = index >> 1;
    const end = index % 2 === TRANSMITQ ? "source" : "destination";
    const placed = this.lanes.find((candidate) => candidate.pair === pair && candidate[end] === port);
    return placed ? placed.lane.nextAvail(end) : (port.vring(index)?.base ?? 0);
  }
}

function receiveq(pair: number): number {
  return 2 * pair + RECEIVEQ;
}

function transmitq(pair: number): number {
  return 2 * pair + TRANSMITQ;
}

function fdsOf(vring: RunningVring | undefined): VringFds {
  return { kick: vring?.kick, call: vring?.call, err: vring?.err };
}
