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
import { FRAME_BYTES_MAX, INJECT_BYTES_MAX, VRING_ENABLED } from "../layout/lane.ts";
import {
  RECEIVEQ,
  TRANSMITQ,
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_GUEST_USO4,
  VIRTIO_NET_F_GUEST_USO6,
} from "../layout/virtio.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { OFFLOAD_FEATURES } from "../ports/offloads.ts";
import {
  isFilePort,
  isGuestPort,
  type AnyPort,
  type FilePort,
  type GuestPort,
  type RunningVring,
} from "../ports/port.ts";
import { Lane } from "./lane.ts";
import type { FileTask, LaneTask, Poller, Pollers, VringFds } from "./poller.ts";

/** A driver that takes one of these takes frames larger than its MTU. */
const LARGE_FRAMES = [
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_GUEST_USO4,
  VIRTIO_NET_F_GUEST_USO6,
];
/** What comes before the MTU's bytes: Ethernet header and two VLAN tags. */
const LINK_BYTES_MAX = 22;

/** One direction of one queue pair, placed on a poller. */
export interface PlacedLane {
  id: number;
  pair: number;
  lane: Lane;
  /** The poller it is on: its leader's own. */
  poller: Poller;
  ownPoller: Poller;
  /** One of the two ends, at least, is a guest. */
  source: GuestPort | FilePort;
  /** Undefined: a sink. */
  destination: GuestPort | FilePort | undefined;
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

  /** @throws ConfigError, SystemError: what was opened is to be closed by close() */
  async open(): Promise<void> {
    const change = (apply: () => void) => this.#change(apply);
    const file = this.#file;
    // What an interface takes is known once it is open, and is offered to the guest.
    file?.open(change);
    for (const port of this.ports.filter(isGuestPort)) {
      await port.open({
        change,
        nextAvail: (index) => this.#nextAvail(port, index),
        inject: file ? (frame) => file.inject(frame) : (frame) => this.#inject(port, frame),
        offloads: file?.features ?? OFFLOAD_FEATURES,
      });
    }
  }

  get #file(): FilePort | undefined {
    return this.ports.find(isFilePort);
  }

  /** The core broke a virtqueue, or trapped: a lane without a transmitq runs no more, one without a receiveq follows another. */
  settle(): void {
    // A poller that has ended has nothing to settle.
    this.#change(() => undefined).catch(() => undefined);
  }

  async close(): Promise<void> {
    await Promise.all(this.ports.filter(isGuestPort).map((port) => port.close()));
    await this.#last;
    this.#file?.close();
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
      this.#tellFile();
      await Promise.all(this.lanes.map((placed) => this.#run(placed)));
    }
  }

  /** Makes the lanes for queue pairs that came into use: one for each direction in which a guest may send. */
  #placeLanes(): void {
    for (const [end, port] of this.ports.entries()) {
      const source = endOf(port);
      if (!source) continue;
      const other = this.ports[1 - end] as AnyPort;
      const destination = other.kind === "loopback" ? source : endOf(other);
      const pairs = isGuestPort(source) ? source.queuePairs : source.queues.length;
      for (let pair = 0; pair < pairs; pair++) {
        const used = vringOf(source, transmitq(pair)) ?? vringOf(destination, receiveq(pair));
        if (!used || this.lanes.some((placed) => placed.source === source && placed.pair === pair)) continue;
        const lane = new Lane(`${this.name}/${end === 0 ? "a" : "b"}${pair}`);
        if (!destination) lane.setSink();
        else if (isFilePort(destination)) lane.setFile("destination");
        else if (isFilePort(source)) lane.setFile("source");
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

  /** Tells the interface at one end what the guest at the other one takes, and for which queue pairs. */
  #tellFile(): void {
    const guest = this.ports.find(isGuestPort);
    const receiving = this.lanes.filter(
      (placed) => isFilePort(placed.source) && isReceiving(placed) && !placed.trapped,
    );
    if (guest) this.#file?.follow(guest.acknowledged, (pair) => receiving.some((placed) => placed.pair === pair));
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
    const transmit = vringOf(source, transmitq(pair));
    if (placed.trapped || (isFilePort(source) ? !isReceiving(placed) : !transmit || lane.isBroken("source"))) return;
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
      destination: fdsOf(vringOf(destination, receiveq(receiver(placed)))),
      file: this.#fileOf(placed),
    });
  }

  /** What the lane does with a file, if one of its ends is one. A guest may have more pairs than the file has queues. */
  #fileOf({ pair, source }: PlacedLane): FileTask | undefined {
    const file = this.#file;
    if (!file) return undefined;
    const fd = file.queues[pair % file.queues.length] as number;
    return { fd, direction: source === file ? "receive" : "send", methods: file.methods };
  }

  /** The memories to send to the poller; undefined if it has them. */
  #newMemories(placed: PlacedLane): LaneTask["memories"] {
    const source = memoryOf(placed.source, placed.destination).segments;
    const destination = memoryOf(placed.destination, placed.source).segments;
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

/** What a lane can have at an end. */
function endOf(port: AnyPort): GuestPort | FilePort | undefined {
  return isGuestPort(port) || isFilePort(port) ? port : undefined;
}

/** The destination's pair that takes the lane's frames. */
export function receiver({ pair, leader }: PlacedLane): number {
  return leader?.pair ?? pair;
}

/** Brings memory 0 up to date with what the ports say. */
function writeMemory({ lane, pair, source, destination }: PlacedLane): void {
  if (isFilePort(source)) lane.setFileFrames(largestFrame(source, destination));
  else {
    lane.setVring("source", source.vring(transmitq(pair)));
    lane.setExtents("source", source.memory.extents);
  }
  if (destination && !isFilePort(destination)) {
    lane.setVring("destination", destination.vring(receiveq(pair)));
    lane.setExtents("destination", destination.memory.extents);
  }
  if (destination && (isFilePort(source) || isFilePort(destination))) {
    lane.setBases(memoryOf(source, destination).segments);
  }
}

/** Bytes of the largest frame that an interface gives the guest. */
function largestFrame({ mtu }: FilePort, guest: PlacedLane["destination"]): number {
  const takesLarge =
    guest !== undefined && isGuestPort(guest) && LARGE_FRAMES.some((bit) => (guest.acknowledged >> BigInt(bit)) & 1n);
  return mtu === undefined || takesLarge ? FRAME_BYTES_MAX : Math.min(FRAME_BYTES_MAX, mtu + LINK_BYTES_MAX);
}

function vringOf(port: PlacedLane["destination"], index: number): RunningVring | undefined {
  return port && isGuestPort(port) ? port.vring(index) : undefined;
}

/** The memory of the guest at one end; that of the other one's where there is none. */
function memoryOf(port: PlacedLane["destination"], other: PlacedLane["destination"]): GuestMemory {
  const guest = port && isGuestPort(port) ? port : other;
  if (!guest || !isGuestPort(guest)) throw new Error("a lane without a guest");
  return guest.memory;
}

/** Whether the lane's own receiveq takes frames: it is started, enabled and sound, or there is none at all. */
function isReceiving({ destination, pair, lane }: PlacedLane): boolean {
  if (!destination || isFilePort(destination)) return true;
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
