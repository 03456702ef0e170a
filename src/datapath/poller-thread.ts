/**
 * The thread of a poller: runs lanes until it is told to stop.
 *
 * While there is work it never blocks. When there was none for a short grace it asks the drivers for kicks, looks once
 * more, and sleeps on all kick fds and the control eventfd; asleep it costs nothing. Modes: `adaptive` is that, `interrupt` has no
 * grace, `busy` never sleeps.
 */
import { receiveMessageOnPort } from "node:worker_threads";
import { Epoll } from "../../native/epoll.ts";
import { signalPeer } from "../../native/eventfd.ts";
import { openRequestQueue, type RequestQueue } from "../../native/request-queue.ts";
import { nameThread, pinThread } from "../../native/sched.ts";
import { SystemError } from "../errors.ts";
import {
  COUNTERS,
  COUNT_KICKS,
  DESTINATION_VRING,
  POLL_BROKE_DESTINATION,
  POLL_BROKE_SOURCE,
  POLL_CALL_DESTINATION,
  POLL_CALL_SOURCE,
  POLL_COUNT,
  POLL_FILE_ASK,
  POLL_FILE_WAITS,
  POLL_PROGRESS,
  POLL_WAITING,
  INJECT_BYTES_MAX,
  INJECT_FRAME,
  VRING_BYTES,
} from "../layout/lane.ts";
import { type Core, instantiateCore } from "./core.ts";
import {
  CONTROL_BUSY,
  CONTROL_COMMANDS,
  CONTROL_IDLE,
  CONTROL_SLEEPS,
  CONTROL_STOP,
  type Command,
  type FileTask,
  type LaneTask,
  type PollerMessage,
  type PollerTask,
  type VringFds,
} from "./poller.ts";

/** Frames per lane and turn: large enough to spread the cost of publishing, small enough to be fair. */
const BUDGET = 64;
/** How long to sleep at most while a driver may add chains without a kick (SET_VRING_KICK without an fd). */
const UNKICKED_MS = 1;
/** Idle time before sleeping. A wake-up costs the peer a system call and us tens of microseconds. */
const GRACE_MS = 0.05;

interface RunningLane {
  id: number;
  core: Core;
  /** Its memory 0. */
  memory: WebAssembly.Memory;
  source: VringFds;
  destination: VringFds;
  kicks: BigUint64Array;
  /** Of a follower: its leader's state of the receiveq, and the place in its own memory 0 where its core wants that. */
  borrowed: { from: BigUint64Array; to: BigUint64Array } | undefined;
  patience: Patience;
  file: LaneFile | undefined;
}

/** The file at one end of a lane. */
interface LaneFile extends FileTask {
  requests: RequestQueue;
  /** It is empty, or full: there is nothing to do before epoll says that this has changed. */
  waits: boolean;
}

/** How long a receiveq has had no buffers: the same for all lanes that it takes frames of. */
interface Patience {
  /** When a lane began to wait for receive buffers, 0: none does. */
  waitingSince: number;
  /** 1: that was too long ago, frames without buffers are dropped. */
  stuck: number;
}

export default function pollLanes(task: PollerTask): void {
  new PollerThread(task).run();
}

class PollerThread {
  readonly #task: PollerTask;
  readonly #epoll = new Epoll();
  /** All lanes ever run here, parked ones too: a parked lane keeps its instance. */
  readonly #known = new Map<number, RunningLane>();
  /** Who is meant by a kick: a receiveq may take frames of several lanes. */
  readonly #kickOwners = new Map<number, RunningLane[]>();
  /** By the lane that has the receiveq's state. */
  readonly #patience = new Map<number, Patience>();
  #lanes: RunningLane[] = [];
  /** Lanes with a file, and frames moved since it was last looked whether those that wait are ready. */
  #files: RunningLane[] = [];
  #unlooked = 0;
  #handled = 0n;

  constructor(task: PollerTask) {
    this.#task = task;
    nameThread(task.name);
    if (task.cpu !== undefined) pinThread(task.cpu);
    this.#epoll.add(task.wake);
    this.#post({ type: "ready" });
  }

  run(): void {
    const { control, mode } = this.#task;
    let idleSince = 0;
    while (Atomics.load(control, CONTROL_STOP) === 0n) {
      let moved = 0;
      for (const lane of this.#lanes) moved += this.#turn(lane);
      if (this.#files.length !== 0 && this.#lookAtFiles(moved)) moved++;
      if (Atomics.load(control, CONTROL_COMMANDS) !== this.#handled) {
        this.#handleCommands();
      }
      if (moved !== 0) {
        idleSince = 0;
        control[CONTROL_BUSY]!++;
        continue;
      }
      control[CONTROL_IDLE]!++;
      if (mode === "busy") continue;
      if (mode === "adaptive") {
        const now = performance.now();
        idleSince ||= now;
        if (now - idleSince < GRACE_MS) continue;
      }
      this.#sleep();
      idleSince = 0;
    }
    for (const { file } of this.#known.values()) file?.requests.close();
    this.#epoll.close();
  }

  /** One turn of one lane. @returns how many transmit chains it took, or frames it read */
  #turn(lane: RunningLane): number {
    if (lane.file?.waits) return 0;
    const result = this.#call(lane, lane.file ? exchange : poll);
    if (result & POLL_FILE_WAITS) this.#waitForFile(lane.file as LaneFile, (result & POLL_FILE_ASK) !== 0);
    if (result > POLL_COUNT || lane.patience.waitingSince !== 0) this.#act(lane, result);
    return result & POLL_COUNT;
  }

  #waitForFile(file: LaneFile, asks: boolean): void {
    file.waits = true;
    if (asks) this.#epoll.addAgain(file.fd);
  }

  /** Awake, looks whether files that lanes wait for are ready, once for a batch of frames at most. @returns whether one may be */
  #lookAtFiles(moved: number): boolean {
    this.#unlooked += moved;
    if (moved !== 0 && this.#unlooked < BUDGET) return false;
    this.#unlooked = 0;
    if (!this.#files.some(({ file }) => file?.waits)) return false;
    const ready = this.#epoll.wait(0);
    this.#takeReady(ready);
    return ready !== 0;
  }

  /** What a wait has reported: files are ready, lanes were kicked. */
  #takeReady(ready: number): void {
    for (let i = 0; i < ready; i++) {
      const fd = this.#epoll.ready(i);
      const kicked = this.#kickOwners.get(fd)?.[0];
      if (kicked) kicked.kicks[0]!++;
      for (const { file } of this.#files) {
        if (file?.fd !== fd) continue;
        if (file.direction === "receive" ? this.#epoll.isReadable(i) : this.#epoll.isWritable(i)) file.waits = false;
      }
    }
  }

  #act(lane: RunningLane, result: number): void {
    this.#signal(lane, result);
    const { patience } = lane;
    if (!(result & POLL_WAITING)) {
      patience.waitingSince = patience.stuck = 0;
    } else if (!patience.stuck) {
      const now = performance.now();
      // A lane that gets on waits for something new each time.
      if (patience.waitingSince === 0 || result & (POLL_COUNT | POLL_PROGRESS)) patience.waitingSince = now;
      if (now - patience.waitingSince >= this.#task.stallMs) patience.stuck = 1;
    }
    if (result & POLL_BROKE_SOURCE) {
      this.#reportBroken(lane, "source");
      this.#park(lane.id);
    }
  }

  #signal(lane: RunningLane, result: number): void {
    if (result & POLL_CALL_SOURCE && lane.source.call !== undefined) signalPeer(lane.source.call);
    if (result & POLL_CALL_DESTINATION && lane.destination.call !== undefined) signalPeer(lane.destination.call);
    if (result & POLL_BROKE_DESTINATION) this.#reportBroken(lane, "destination");
  }

  #reportBroken(lane: RunningLane, end: "source" | "destination"): void {
    const { err } = lane[end];
    if (err !== undefined) signalPeer(err);
    this.#post({ type: "broken", lane: lane.id, end });
  }

  /** Sleeps until a kick, a command, or the end of some lane's patience; does not if there is work after all. */
  #sleep(): void {
    let timeoutMs = -1;
    let work = 0;
    for (const lane of this.#lanes) {
      if (lane.file?.waits) continue;
      work |= this.#call(lane, arm);
      const { waitingSince, stuck } = lane.patience;
      if (isUnkicked(lane)) {
        timeoutMs = timeoutMs < 0 ? UNKICKED_MS : Math.min(timeoutMs, UNKICKED_MS);
      }
      if (waitingSince !== 0 && !stuck) {
        const left = Math.max(0, Math.ceil(waitingSince + this.#task.stallMs - performance.now()));
        timeoutMs = timeoutMs < 0 ? left : Math.min(timeoutMs, left);
      }
    }
    if (!work) {
      this.#task.control[CONTROL_SLEEPS]!++;
      this.#takeReady(this.#epoll.wait(timeoutMs));
    }
    for (const lane of this.#lanes) this.#call(lane, disarm);
    // Lanes that share a receiveq take turns at being the first to see its new buffers.
    if (this.#lanes.length > 1) this.#lanes.push(this.#lanes.shift() as RunningLane);
  }

  /** Calls a lane's core. A trap is a bug of ours: that lane stops, the others go on. @returns what the core did, 0 if it trapped */
  #call(lane: RunningLane, entry: (lane: RunningLane) => number): number {
    const { borrowed } = lane;
    if (borrowed !== undefined) borrowed.to.set(borrowed.from);
    try {
      return entry(lane);
    } catch (error) {
      this.#park(lane.id);
      this.#post({ type: "trapped", lane: lane.id, reason: String(error) });
      return 0;
    } finally {
      if (borrowed !== undefined) borrowed.from.set(borrowed.to);
    }
  }

  #handleCommands(): void {
    this.#handled = Atomics.load(this.#task.control, CONTROL_COMMANDS);
    for (let received; (received = receiveMessageOnPort(this.#task.port));) {
      const command = received.message as Command;
      if (command.type === "run") this.#tryRun(command.task);
      else if (command.type === "park") this.#park(command.lane);
      else this.#inject(command.lane, command.frame);
      this.#post({ type: "done", sequence: command.sequence });
    }
  }

  #tryRun(task: LaneTask): void {
    try {
      this.#run(task);
    } catch (error) {
      if (!(error instanceof SystemError)) throw error;
      this.#post({ type: "unreachable", lane: task.lane, reason: error.message });
    }
  }

  #run({ lane: id, memories, receiveq, source, destination, file }: LaneTask): void {
    this.#park(id);
    const known = memories
      ? {
          id,
          core: instantiateCore(memories.own, memories.source, memories.destination),
          memory: memories.own,
          kicks: new BigUint64Array(memories.own.buffer, COUNTERS + COUNT_KICKS, 1),
        }
      : (this.#known.get(id) as RunningLane);
    const lane: RunningLane = {
      ...known,
      file: file && this.#open(file, known, this.#known.get(id)),
      source,
      destination,
      borrowed: receiveq.memory && { from: receiveqState(receiveq.memory), to: receiveqState(known.memory.buffer) },
      patience: this.#patience.get(receiveq.lane) ?? { waitingSince: 0, stuck: 0 },
    };
    this.#patience.set(receiveq.lane, lane.patience);
    this.#known.set(id, lane);
    this.#lanes.push(lane);
    for (const fd of kickFds(lane)) {
      const owners = this.#kickOwners.get(fd);
      if (owners) owners.push(lane);
      else {
        this.#epoll.add(fd);
        this.#kickOwners.set(fd, [lane]);
      }
    }
    if (lane.file) {
      this.#files.push(lane);
      if (!this.#files.some((other) => other !== lane && other.file?.fd === lane.file?.fd))
        this.#epoll.add(lane.file.fd);
    }
    this.#call(lane, refresh);
    // A call that was due when the ring changed hands may never have been made; one too many does no harm.
    for (const { call } of [source, destination]) if (call !== undefined) signalPeer(call);
  }

  /** The file of a lane: what it was until now, or opened anew. */
  #open(task: FileTask, { id, memory }: Pick<RunningLane, "id" | "memory">, before: RunningLane | undefined): LaneFile {
    const had = before?.file;
    if (had?.fd === task.fd && before?.memory === memory) return { ...had, waits: false };
    had?.requests.close();
    if (before) before.file = undefined; // whatever comes of the next one
    const target = { memory, fd: task.fd, direction: task.direction };
    const { queue, refused } = openRequestQueue(target, task.methods);
    if (refused.length > 0) this.#post({ type: "refused", lane: id, refused, method: queue.method });
    return { ...task, requests: queue, waits: false };
  }

  #inject(id: number, frame: Uint8Array): void {
    const lane = this.#find(id);
    if (!lane) return;
    new Uint8Array(lane.memory.buffer, INJECT_FRAME, INJECT_BYTES_MAX).set(frame);
    this.#signal(
      lane,
      this.#call(lane, ({ core }) => core.inject(frame.length)),
    );
  }

  #find(id: number): RunningLane | undefined {
    return this.#lanes.find((candidate) => candidate.id === id);
  }

  #park(id: number): void {
    const lane = this.#find(id);
    if (!lane) return;
    this.#lanes = this.#lanes.filter((other) => other !== lane);
    const { file } = lane;
    if (file) {
      this.#files = this.#files.filter((other) => other !== lane);
      if (!this.#files.some((other) => other.file?.fd === file.fd)) this.#epoll.remove(file.fd);
    }
    for (const fd of kickFds(lane)) {
      const others = (this.#kickOwners.get(fd) as RunningLane[]).filter((other) => other !== lane);
      if (others.length > 0) this.#kickOwners.set(fd, others);
      else {
        this.#epoll.remove(fd);
        this.#kickOwners.delete(fd);
      }
    }
  }

  #post(message: PollerMessage): void {
    this.#task.port.postMessage(message);
  }
}

// What is called of a core
const poll = (lane: RunningLane): number => lane.core.poll(BUDGET, lane.patience.stuck);
const exchange = ({ core, file }: RunningLane): number => {
  const requests = core.prepare(BUDGET);
  if (requests !== 0) file?.requests.submit(requests);
  return core.finish();
};
const arm = (lane: RunningLane): number => lane.core.arm(lane.patience.stuck);
const disarm = (lane: RunningLane): number => (lane.core.disarm(), 0);
const refresh = (lane: RunningLane): number => (lane.core.refresh(), 0);

function receiveqState(memory: ArrayBufferLike): BigUint64Array {
  return new BigUint64Array(memory, DESTINATION_VRING, VRING_BYTES / 8);
}

/** Whether a driver may make chains available and tell nobody. */
function isUnkicked({ source, destination, file, patience }: RunningLane): boolean {
  if (file?.direction === "receive") return destination.kick === undefined;
  return source.kick === undefined || (patience.waitingSince !== 0 && destination.kick === undefined);
}

function kickFds(lane: RunningLane): number[] {
  return [lane.source.kick, lane.destination.kick].filter((fd) => fd !== undefined);
}
