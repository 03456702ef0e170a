/**
 * A link: two ports joined, queue pair by queue pair.
 *
 * It owns the lanes and is the only one that parks them. Changes to either port are serialised here: park the lanes,
 * apply the change, rewrite memory 0 from what the ports say, run the lanes again. Main thread.
 *
 * A lane whose receiveq does not receive, because the other guest has or uses fewer pairs, follows another lane: its
 * frames go to that one's receiveq. The leader's memory 0 is the one home of that virtqueue's state, whether the leader
 * itself runs or not; the poller borrows it for each turn of a follower. So a leader and its followers share a poller.
 */
import { INJECT_BYTES_MAX, VRING_ENABLED } from "../layout/lane.ts";
import { RECEIVEQ, TRANSMITQ } from "../layout/virtio.ts";
import { isGuestPort, type AnyPort, type GuestPort, type RunningVring } from "../ports/port.ts";
import { Lane } from "./lane.ts";
import type { LaneTask, Poller, Pollers, VringFds } from "./poller.ts";

/** One direction of one queue pair, placed on a poller. */
export interface PlacedLane {
  id: number;
  pair: number;
  lane: Lane;
  /** The poller it is on: its leader's own. */
  poller: Poller;
  ownPoller: Poller;
  source: GuestPort;
  /** Undefined: a sink. */
  destination: GuestPort | undefined;
  /** Whether the poller runs it. */
  running: boolean;
  /** Its code trapped: it is not run again. */
  trapped: boolean;
  /** The memories the poller has an instance for. */
  memories: LaneTask["memories"];
  /** The lane whose receiveq takes its frames; undefined: its own does, if any. */
  leader: PlacedLane | undefined;
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
        (frame) => this.#inject(port, frame),
      );
    }
  }

  /** The core broke a virtqueue: a lane without a transmitq runs no more, one without a receiveq follows another. */
  settle(): void {
    // A poller that has ended has nothing to settle.
    this.#change(() => undefined).catch(() => undefined);
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
    for (const { lane } of this.lanes) lane.unfollow();
    try {
      apply();
    } finally {
      this.#placeLanes();
      for (const placed of this.lanes) writeMemory(placed);
      this.#chooseLeaders();
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
        const lane = new Lane(`${this.name}/${end === 0 ? "a" : "b"}${pair}`);
        if (!destination) lane.setSink();
        const poller = this.#pollers.next();
        this.lanes.push({
          id: this.#newId(),
          pair,
          lane,
          poller,
          ownPoller: poller,
          source,
          destination,
          running: false,
          trapped: false,
          memories: undefined,
          leader: undefined,
        });
      }
    }
  }

  /** Lanes whose receiveq does not receive are dealt out to those whose does; if there is none, each keeps its own. */
  #chooseLeaders(): void {
    for (const source of this.ports.filter(isGuestPort)) {
      const lanes = this.lanes.filter((placed) => placed.source === source).toSorted((a, b) => a.pair - b.pair);
      const leaders = lanes.filter(isReceiving);
      for (const placed of lanes) {
        placed.leader = isReceiving(placed) ? undefined : leaders[placed.pair % leaders.length];
      }
    }
  }

  /** Has the poller run the lane if there is anything to take frames from. */
  async #run(placed: PlacedLane): Promise<void> {
    const { lane, pair, source, destination, leader } = placed;
    const transmit = source.vring(transmitq(pair));
    if (!transmit || lane.isBroken("source") || placed.trapped) return;
    const { ownPoller, id } = leader ?? placed;
    if (placed.poller !== ownPoller) {
      placed.poller = ownPoller;
      placed.memories = undefined;
    }
    if (leader) lane.follow(leader.lane);
    placed.running = true;
    await placed.poller.run({
      lane: placed.id,
      name: lane.name,
      memories: this.#newMemories(placed),
      receiveq: { lane: id, memory: leader?.lane.memory.buffer },
      source: fdsOf(transmit),
      destination: fdsOf(destination?.vring(receiveq(receiver(placed)))),
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

  /** Sends a frame as if this port's guest had; dropped unless one of its transmitqs and the other end's receiveq run. */
  #inject(port: GuestPort, frame: Uint8Array): void {
    if (frame.length > INJECT_BYTES_MAX) throw new RangeError(`a frame of ${frame.length} bytes to inject`);
    // Not before the changes that were asked for until now; a poller that has ended injects nothing.
    void this.#last.then(() => {
      const placed = this.lanes.find(({ source, running, trapped }) => source === port && running && !trapped);
      return placed?.poller.inject(placed.id, frame).catch(() => undefined);
    });
  }

  #nextAvail(port: GuestPort, index: number): number {
    const pair = index >> 1;
    const end = index % 2 === TRANSMITQ ? "source" : "destination";
    const placed = this.lanes.find((candidate) => candidate.pair === pair && candidate[end] === port);
    return placed ? placed.lane.nextAvail(end) : (port.vring(index)?.base ?? 0);
  }
}

/** The destination's pair that takes the lane's frames. */
export function receiver({ pair, leader }: PlacedLane): number {
  return leader?.pair ?? pair;
}

/** Brings memory 0 up to date with what the ports say. */
function writeMemory({ lane, pair, source, destination }: PlacedLane): void {
  lane.setVring("source", source.vring(transmitq(pair)));
  lane.setExtents("source", source.memory.extents);
  if (!destination) return;
  lane.setVring("destination", destination.vring(receiveq(pair)));
  lane.setExtents("destination", destination.memory.extents);
}

/** Whether the lane's own receiveq takes frames: it is started, enabled and sound, or there is none at all. */
function isReceiving({ destination, pair, lane }: PlacedLane): boolean {
  if (!destination) return true;
  if (lane.isBroken("destination")) return false;
  return ((destination.vring(receiveq(pair))?.flags ?? 0) & VRING_ENABLED) !== 0;
}

export function receiveq(pair: number): number {
  return 2 * pair + RECEIVEQ;
}

export function transmitq(pair: number): number {
  return 2 * pair + TRANSMITQ;
}

function fdsOf(vring: RunningVring | undefined): VringFds {
  return { kick: vring?.kick, call: vring?.call, err: vring?.err };
}
